//! What the paper claims, as functions of what was measured: each says what it found and whether that supports the claim.

use serde::Serialize;

/// A claim, and what this run has to say about it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Claim {
    /// The claim.
    pub claim: String,
    /// What was found, in numbers.
    pub found: String,
    /// Whether that supports it.
    pub holds: bool,
}

impl Claim {
    /// A claim.
    pub fn new(claim: impl Into<String>, found: impl Into<String>, holds: bool) -> Self {
        Self { claim: claim.into(), found: found.into(), holds }
    }
}

/// Number pairs, one for each staleness, as text: `s=1: -1.5, …`.
fn list(values: impl IntoIterator<Item = (u32, String)>) -> String {
    values.into_iter().map(|(s, value)| format!("s={s}: {value}")).collect::<Vec<_>>().join(", ")
}

/// What the same measurement gave with several seeds; what was never reached is infinite.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Spread(Vec<f64>);

impl Spread {
    /// Of these; `None` was never reached.
    pub fn new(values: impl IntoIterator<Item = Option<f64>>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().map(|value| value.unwrap_or(f64::INFINITY)).collect();
        sorted.sort_by(f64::total_cmp);
        Self(sorted)
    }

    /// The middle one, if it was reached (of an even number, the later).
    pub fn median(&self) -> Option<f64> {
        self.0.get(self.0.len() / 2).copied().filter(|median| median.is_finite())
    }

    /// The median, and the least and the greatest if they differ.
    pub fn text(&self, digits: usize) -> String {
        let number = |value: f64| match value.is_finite() {
            true => format!("{value:.digits$}"),
            false => "never".to_owned(),
        };
        let median = number(self.median().unwrap_or(f64::INFINITY));
        match (self.0.first(), self.0.last()) {
            (Some(first), Some(last)) if first < last => {
                format!("{median} ({} to {})", number(*first), number(*last))
            }
            _ => median,
        }
    }
}

/// BSP: every read is of the clock before.
pub fn bsp_at_minus_one(part: f64) -> Claim {
    Claim::new(
        "BSP: every read has clock differential -1",
        format!("{:.2} % have", 100.0 * part),
        part == 1.0,
    )
}

/// SSP(s): uniform over `-1..=-(s+1)`, so the mean is `-(s+2)/2`. Pairs of s and the mean.
pub fn ssp_mean(means: &[(u32, f64)]) -> Claim {
    let expected = |s: u32| -f64::from(s + 2) / 2.0;
    Claim::new(
        "SSP(s): differentials are about uniform over -1..-(s+1): the mean is within 15 % of -(s+2)/2",
        list(means.iter().map(|&(s, mean)| (s, format!("{mean:.2} for {:.1}", expected(s))))),
        means.iter().all(|&(s, mean)| (mean / expected(s) - 1.0).abs() <= 0.15),
    )
}

/// ESSP(s): concentrated at -1. Pairs of s and the mean.
pub fn essp_mean(means: &[(u32, f64)]) -> Claim {
    Claim::new(
        "ESSP(s): differentials are concentrated at -1, whatever s is: the mean is above -1.6",
        list(means.iter().map(|&(s, mean)| (s, format!("{mean:.2}")))),
        means.iter().all(|&(_, mean)| mean > -1.6),
    )
}

/// ESSP needs no more of `what` to the target than SSP: medians. Of each s what SSP and ESSP need.
pub fn essp_no_more(claim: &str, digits: usize, needs: &[(u32, Spread, Spread)]) -> Claim {
    let text = |(s, ssp, essp): &(u32, Spread, Spread)| {
        (*s, format!("{} for {}", essp.text(digits), ssp.text(digits)))
    };
    Claim::new(
        claim,
        list(needs.iter().map(text)),
        needs.iter().all(|(_, ssp, essp)| match (ssp.median(), essp.median()) {
            (Some(ssp), Some(essp)) => essp <= ssp,
            (None, essp) => essp.is_some(),
            (Some(_), None) => false,
        }),
    )
}

/// ESSP is at the target `factor` times sooner than BSP: at its best s, and all are told.
pub fn essp_sooner_than_bsp(factor: f64, bsp: Option<f64>, essp: &[(u32, Option<f64>)]) -> Claim {
    let times = |essp: Option<f64>| essp.zip(bsp).map(|(essp, bsp)| bsp / essp);
    Claim::new(
        format!(
            "ESSP(s) reaches the target at least {factor} times sooner than BSP, if s allows for the pauses"
        ),
        list(
            essp.iter().map(|&(s, essp)| {
                (s, times(essp).map_or("never".into(), |times| format!("{times:.2} times")))
            }),
        ),
        essp.iter().any(|&(_, essp)| times(essp).is_some_and(|times| times >= factor)),
    )
}

/// What grows (or falls) does so from each value to the next, but for a part of `slack`.
pub fn falls(claim: &str, values: &[f64], slack: f64) -> Claim {
    let found = values.iter().map(|value| format!("{value:.3}")).collect::<Vec<_>>().join(", ");
    let holds = values.windows(2).all(|pair| pair[1] <= pair[0] * (1.0 + slack))
        && values.last().zip(values.first()).is_some_and(|(last, first)| last < first);
    Claim::new(claim, found, holds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bsp_has_no_other_differential() {
        assert!(bsp_at_minus_one(1.0).holds);
        assert!(!bsp_at_minus_one(0.9999).holds);
    }

    #[test]
    fn the_mean_of_ssp_is_that_of_the_uniform_distribution() {
        assert!(ssp_mean(&[(1, -1.5), (3, -2.5), (10, -6.0)]).holds);
        assert!(ssp_mean(&[(1, -1.72), (10, -5.2)]).holds);
        assert!(!ssp_mean(&[(1, -1.73)]).holds);
        assert!(!ssp_mean(&[(1, -1.5), (10, -5.0)]).holds, "one is enough");
        assert!(ssp_mean(&[(3, -2.62)]).found.contains("s=3: -2.62 for -2.5"));
    }

    #[test]
    fn the_mean_of_essp_does_not_depend_on_s() {
        assert!(essp_mean(&[(1, -1.1), (10, -1.59)]).holds);
        assert!(!essp_mean(&[(1, -1.1), (10, -1.6)]).holds);
    }

    #[test]
    fn a_target_that_is_never_reached_is_later_than_any() {
        let of = |time| Spread::new([time]);
        let no_later = |ssp, essp| essp_no_more("", 2, &[(3, of(ssp), of(essp))]).holds;
        assert!(no_later(Some(2.0), Some(2.0)));
        assert!(!no_later(Some(2.0), Some(2.01)));
        assert!(no_later(None, Some(9.0)));
        assert!(!no_later(Some(9.0), None));
        assert!(!no_later(None, None), "nothing was shown");
        let sooner = |bsp, essp| essp_sooner_than_bsp(1.3, bsp, &[(1, None), (3, essp)]).holds;
        assert!(sooner(Some(1.3), Some(1.0)));
        assert!(!sooner(Some(1.29), Some(1.0)));
        assert!(!sooner(None, Some(1.0)) && !sooner(Some(1.0), None));
    }

    #[test]
    fn the_median_decides_and_the_spread_is_told() {
        let ssp = Spread::new([Some(1.5), None, Some(1.2)]);
        let essp = Spread::new([Some(1.4), Some(1.0), Some(1.6)]);
        let claim = essp_no_more("", 1, &[(1, ssp.clone(), essp.clone())]);
        assert!(claim.holds && claim.found == "s=1: 1.4 (1.0 to 1.6) for 1.5 (1.2 to never)", "{claim:?}");
        assert!(!essp_no_more("", 1, &[(1, essp, ssp)]).holds);
        assert_eq!(Spread::new([None, Some(1.0), None]).text(1), "never (1.0 to never)");
        assert_eq!(Spread::new([Some(2.0); 3]).text(1), "2.0");
    }

    #[test]
    fn what_falls_may_waver_but_ends_lower() {
        assert!(falls("", &[3.0, 2.0, 2.01, 1.0], 0.05).holds);
        assert!(!falls("", &[3.0, 2.0, 2.2, 1.0], 0.05).holds);
        assert!(!falls("", &[1.0, 1.01], 0.05).holds);
        assert!(!falls("", &[], 0.05).holds);
    }
}
