//! The log-likelihood `log p(w, z) = log p(w | z) + log p(z)` of words and topics together, with topics' words and
//! documents' topics integrated out (Griffiths & Steyvers, PNAS 2004, for the first term; the second is of the same form):
//!
//! ```text
//!  log p(w | z) = K (lnΓ(Wβ) − W lnΓ(β)) + Σ_k [ Σ_w lnΓ(n_wk + β) − lnΓ(n_k + Wβ) ]
//!  log p(z)     = Σ_d [ lnΓ(Kα) − K lnΓ(α) + Σ_k lnΓ(n_dk + α) − lnΓ(n_d + Kα) ]
//! ```
//!
//! It falls into pieces that are added up: one for each row, one for the totals, one for each document. So each worker
//! evaluates its documents and some of the rows. Where a count is 0, `lnΓ` of the prior cancels: a piece costs as
//! much as there are counts above 0.

use super::sampler::{DocumentTopics, Prior};

/// Pieces of the log-likelihood. Remembers `lnΓ` of small counts.
#[derive(Debug, Clone)]
pub struct Likelihood {
    prior: Prior,
    /// `lnΓ(n + β) − lnΓ(β)`.
    with_beta: Vec<f64>,
    /// `lnΓ(n + α) − lnΓ(α)`.
    with_alpha: Vec<f64>,
}

/// Counts whose `lnΓ` is remembered.
const REMEMBERED: u32 = 4096;

impl Likelihood {
    /// For these priors.
    pub fn new(prior: Prior) -> Self {
        let remember = |offset: f64| {
            (0..REMEMBERED).map(|n| ln_gamma(f64::from(n) + offset) - ln_gamma(offset)).collect()
        };
        Likelihood { prior, with_beta: remember(prior.beta), with_alpha: remember(prior.alpha) }
    }

    /// The piece of a row of the word-topic table.
    pub fn row(&self, row: &[i32]) -> f64 {
        let piece = |&n: &i32| match self.with_beta.get(n as usize) {
            Some(&known) => known,
            None => ln_gamma(f64::from(n) + self.prior.beta) - ln_gamma(self.prior.beta),
        };
        // A row that is behind, as `async` may give it, is never below 0: see `served`.
        row.iter().filter(|&&n| n > 0).map(piece).sum()
    }

    /// The piece of the topic totals.
    pub fn totals(&self, totals: &[i32]) -> f64 {
        let all = self.prior.beta * self.prior.words as f64;
        totals.iter().map(|&n| ln_gamma(all) - ln_gamma(f64::from(n) + all)).sum()
    }

    /// The piece of a worker's documents.
    pub fn documents(&self, documents: &DocumentTopics) -> f64 {
        let all = self.prior.alpha * self.prior.topics as f64;
        let piece = |count: u32| match self.with_alpha.get(count as usize) {
            Some(&known) => known,
            None => ln_gamma(f64::from(count) + self.prior.alpha) - ln_gamma(self.prior.alpha),
        };
        let document = |number| {
            let own = documents.of(number);
            let length: u32 = own.iter().map(|own| own.count).sum();
            let topics: f64 = own.iter().map(|own| piece(own.count)).sum();
            ln_gamma(all) - ln_gamma(f64::from(length) + all) + topics
        };
        (0..documents.len()).map(document).sum()
    }
}

/// The logarithm of the gamma function of `x > 0`: Stirling's series, after steps up to where it is good to 1e-14.
pub fn ln_gamma(x: f64) -> f64 {
    let (mut x, mut product) = (x, 1.0);
    while x < 10.0 {
        product *= x;
        x += 1.0;
    }
    let inverse = 1.0 / (x * x);
    let series = inverse
        * (-1.0 / 360.0
            + inverse
                * (1.0 / 1260.0
                    + inverse * (-1.0 / 1680.0 + inverse * (1.0 / 1188.0 - inverse * 691.0 / 360_360.0))));
    let half_log_of_tau = 0.918_938_533_204_672_7;
    (x - 0.5) * x.ln() - x + half_log_of_tau + (1.0 / 12.0 + series) / x - product.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lda::{corpus::Planted, share::Share};

    #[test]
    fn ln_gamma_is_that_of_the_tables() {
        let mut factorial: f64 = 0.0;
        for n in 1..200 {
            assert!((ln_gamma(f64::from(n)) - factorial).abs() <= 1e-13 * factorial.max(1.0), "{n}");
            factorial += f64::from(n).ln();
        }
        for (x, expected) in [
            (0.5, 0.5 * std::f64::consts::PI.ln()),
            (0.1, 2.252_712_651_734_206),
            (0.01, 4.599_479_878_042_022),
        ] {
            assert!((ln_gamma(x) - expected).abs() < 1e-13, "lnΓ({x}) = {}", ln_gamma(x));
        }
    }

    /// The chain rule: the probability of each token given those before it.
    #[test]
    fn the_pieces_add_up_to_the_probability_of_the_tokens_one_by_one() {
        let corpus = Planted { documents: 7, words: 11, tokens: 200 }.corpus(5);
        let prior = Prior { topics: 4, words: 11, alpha: 0.3, beta: 0.07 };
        let share = Share::new(&corpus, 0, 1, 1, prior.topics, 9);
        let mut rows = vec![vec![0; 4]; 11];
        let (mut totals, mut documents, mut lengths) = (vec![0; 4], vec![[0; 4]; 7], [0; 7]);
        let mut expected = 0.0;
        let words = share.parts[0].groups.iter().flat_map(|g| (0..g.tokens).map(|_| g.word as usize));
        for ((word, &document), &topic) in words.zip(&share.documents).zip(&share.topics) {
            let (d, k) = (document as usize, topic as usize);
            let in_document = (f64::from(documents[d][k]) + 0.3) / (f64::from(lengths[d]) + 4.0 * 0.3);
            let in_topic = (f64::from(rows[word][k]) + 0.07) / (f64::from(totals[k]) + 11.0 * 0.07);
            expected += in_document.ln() + in_topic.ln();
            documents[d][k] += 1;
            lengths[d] += 1;
            rows[word][k] += 1;
            totals[k] += 1;
        }
        let likelihood = Likelihood::new(prior);
        let found = rows.iter().map(|row| likelihood.row(row)).sum::<f64>()
            + likelihood.totals(&totals)
            + likelihood.documents(&DocumentTopics::new(&share, 4));
        assert!((found - expected).abs() < 1e-9 * expected.abs(), "{found}, not {expected}");
    }
}
