//! Ratings around planted factors, so that there is something to find.
//!
//! Each row and column gets [`PLANTED_RANK`] normal numbers; a rating is their product, scaled to variance 1, plus
//! noise of a hundredth of that variance. How often a column is rated follows Zipf's law, as in real data: the
//! column of rank `r` has ratings in proportion to `1 / r`, at most one for each row. The ranks are dealt to the
//! columns at random.

use std::str::FromStr;

use rand::{RngExt as _, SeedableRng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use super::{Rating, Ratings};

/// Rank of the planted factors.
pub const PLANTED_RANK: usize = 8;
/// Standard deviation of the noise; that of the planted part is 1.
pub const NOISE: f32 = 0.1;

/// The size of a matrix to generate: `ROWSxCOLS:RATINGS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planted {
    /// Number of rows.
    pub rows: u32,
    /// Number of columns.
    pub columns: u32,
    /// Number of ratings; no two are of the same row and column.
    pub ratings: u64,
}

impl FromStr for Planted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once(':').and_then(|(size, ratings)| Some((size.split_once('x')?, ratings)));
        let Some(((rows, columns), ratings)) = parts else {
            return Err("write ROWSxCOLS:RATINGS, as in 2000x1000:200000".into());
        };
        let number = |name: &str, digits: &str| {
            digits.parse::<u32>().ok().filter(|&n| n > 0).ok_or_else(|| {
                format!("{name} `{digits}` is not a number from 1 to {}; write ROWSxCOLS:RATINGS", u32::MAX)
            })
        };
        let (rows, columns) = (number("ROWS", rows)?, number("COLS", columns)?);
        let ratings = u64::from(number("RATINGS", ratings)?);
        let cells = u64::from(rows) * u64::from(columns);
        if ratings > cells {
            return Err(format!("{rows}x{columns} has only {cells} places for {ratings} ratings"));
        }
        Ok(Planted { rows, columns, ratings })
    }
}

impl Planted {
    /// The ratings of this `seed`.
    pub fn ratings(&self, seed: u64) -> Ratings {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let scale = (PLANTED_RANK as f32).powf(-0.25);
        let mut factors = |count: u32| -> Vec<[f32; PLANTED_RANK]> {
            (0..count)
                .map(|_| std::array::from_fn(|_| scale * rng.sample::<f32, _>(StandardNormal)))
                .collect()
        };
        let (left, right) = (factors(self.rows), factors(self.columns));
        let mut columns: Vec<u32> = (0..self.columns).collect();
        columns.shuffle(&mut rng);

        let mut entries = Vec::with_capacity(self.ratings as usize);
        for (column, count) in columns.into_iter().zip(self.counts()) {
            let rows = rand::seq::index::sample(&mut rng, self.rows as usize, count as usize);
            for row in rows {
                let planted: f32 = left[row].iter().zip(&right[column as usize]).map(|(a, b)| a * b).sum();
                let noise: f32 = rng.sample(StandardNormal);
                entries.push(Rating { row: row as u32, column, value: planted + NOISE * noise });
            }
        }
        let source = format!("generated (planted rank {PLANTED_RANK}, Zipf columns, seed {seed})");
        Ratings { source, rows: self.rows, columns: self.columns, entries }
    }

    /// How many ratings the column of each rank has: Zipf's share of what is left, at most one for each row.
    fn counts(&self) -> Vec<u64> {
        let mut weight: f64 = (1..=self.columns).map(|rank| 1.0 / f64::from(rank)).sum();
        let mut left = self.ratings;
        let mut counts = Vec::with_capacity(self.columns as usize);
        for rank in 1..=self.columns {
            let share = left as f64 * (1.0 / f64::from(rank)) / weight;
            let after = u64::from(self.columns - rank) * u64::from(self.rows);
            // At least what the later columns have no room for.
            let count =
                (share.round() as u64).min(u64::from(self.rows)).min(left).max(left.saturating_sub(after));
            counts.push(count);
            left -= count;
            weight -= 1.0 / f64::from(rank);
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn planted(text: &str) -> Planted {
        text.parse().unwrap()
    }

    #[test]
    fn the_same_seed_gives_the_same_ratings() {
        let size = planted("50x20:300");
        assert_eq!(size.ratings(7), size.ratings(7));
        assert_ne!(size.ratings(7).entries, size.ratings(8).entries);
    }

    #[test]
    fn there_are_as_many_as_asked_for_and_none_twice() {
        for text in ["2000x1000:200000", "30x20:600", "30x20:599", "1x1:1", "5x1000:17"] {
            let size = planted(text);
            let ratings = size.ratings(1);
            assert_eq!(ratings.entries.len() as u64, size.ratings, "{text}");
            let cells: HashSet<_> = ratings.entries.iter().map(|e| (e.row, e.column)).collect();
            assert_eq!(cells.len() as u64, size.ratings, "{text}");
            assert!(cells.iter().all(|&(row, column)| row < size.rows && column < size.columns), "{text}");
        }
    }

    #[test]
    fn columns_follow_zipf_and_values_have_variance_one() {
        let size = planted("100000x1000:200000");
        let ratings = size.ratings(3);
        let mut counts = vec![0u64; 1000];
        for entry in &ratings.entries {
            counts[entry.column as usize] += 1;
        }
        counts.sort_unstable_by_key(|&count| std::cmp::Reverse(count));
        for (rank, expected) in [(1, 26_718.0), (10, 2_671.8), (100, 267.2)] {
            let ratio = counts[rank - 1] as f64 / expected;
            assert!(
                (0.98..1.02).contains(&ratio),
                "rank {rank}: {} ratings, not {expected}",
                counts[rank - 1]
            );
        }
        let rms = ratings.root_mean_square();
        assert!((0.7..1.3).contains(&rms), "root mean square {rms}");
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused_with_the_cure() {
        for (text, message) in [
            ("2000x1000", "write ROWSxCOLS:RATINGS"),
            ("0x10:1", "ROWS `0`"),
            ("10xten:1", "COLS `ten`"),
            ("10x10:101", "only 100 places"),
            ("99999999999x1:1", "ROWS `99999999999`"),
        ] {
            let error = text.parse::<Planted>().unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
    }
}
