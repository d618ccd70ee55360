//! Who trains on what, when: decided before the start, the same with and without a parameter server.
//!
//! ```text
//!  rows ──contiguous ranges with equal numbers of ratings──▶ workers (each owns its row factors)
//!  ratings of a worker ──shuffled once, cut──▶ one part for each clock of a pass
//!  ratings of a part ──ordered by column──▶ groups: one fetch and one update of a column factor each
//! ```

use std::ops::Range;

use rand::{SeedableRng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;

use crate::{
    data::{Rating, Ratings},
    job,
};

/// A rating within a group: its column is the group's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entry {
    /// Row, counted from the worker's first.
    pub row: u32,
    /// The value.
    pub value: f32,
}

/// The ratings of one column within one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// The column.
    pub column: u32,
    /// How many of the part's entries are of this column; they follow those of the group before.
    pub ratings: u32,
}

/// What a worker does in one clock.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Part {
    /// The groups, by column.
    pub groups: Vec<Group>,
    /// The entries of all groups, one after the other, each group's by row.
    pub entries: Vec<Entry>,
}

impl Part {
    fn new(mut ratings: Vec<Rating>, first_row: u32) -> Self {
        ratings.sort_unstable_by_key(|r| (r.column, r.row));
        let groups = ratings
            .chunk_by(|a, b| a.column == b.column)
            .map(|group| Group { column: group[0].column, ratings: group.len() as u32 })
            .collect();
        let entries = ratings.iter().map(|r| Entry { row: r.row - first_row, value: r.value }).collect();
        Part { groups, entries }
    }

    /// Each group with its entries.
    pub fn iter(&self) -> impl Iterator<Item = (Group, &[Entry])> {
        let mut rest = self.entries.as_slice();
        self.groups.iter().map(move |group| {
            let (entries, after) = rest.split_at(group.ratings as usize);
            rest = after;
            (*group, entries)
        })
    }
}

/// The share of one worker.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// The worker's number within the job.
    pub worker: usize,
    /// Its first row.
    pub first_row: u32,
    /// Number of its rows.
    pub rows: u32,
    /// What it does in each clock of a pass.
    pub parts: Vec<Part>,
    /// All of its ratings at once, for the loss.
    pub whole: Part,
}

/// Cuts the rows into `workers` contiguous ranges with about equal numbers of ratings each.
fn ranges(ratings: &Ratings, workers: usize) -> Vec<Range<u32>> {
    let mut counts = vec![0; ratings.rows as usize];
    for entry in &ratings.entries {
        counts[entry.row as usize] += 1;
    }
    job::ranges(&counts, workers).into_iter().map(|rows| rows.start as u32..rows.end as u32).collect()
}

/// The share of `worker`, of `workers`, when a pass takes `clocks` clocks.
///
/// # Panics
/// If `worker` is not below `workers`, or `clocks` is 0.
pub fn share(ratings: &Ratings, worker: usize, workers: usize, clocks: usize, seed: u64) -> Share {
    let Range { start: first_row, end } = ranges(ratings, workers)[worker].clone();
    let mut own: Vec<Rating> =
        ratings.entries.iter().filter(|e| (first_row..end).contains(&e.row)).copied().collect();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(worker as u64 + 1);
    own.shuffle(&mut rng);
    let cut = |i: usize| own.len() * i / clocks;
    let parts = (0..clocks).map(|i| Part::new(own[cut(i)..cut(i + 1)].to_vec(), first_row)).collect();
    let whole = Part::new(own, first_row);
    Share { worker, first_row, rows: end - first_row, parts, whole }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Planted, Source};

    fn ratings() -> Ratings {
        Planted { rows: 300, columns: 40, ratings: 5_000 }.ratings(5)
    }

    #[test]
    fn every_rating_is_in_exactly_one_part_of_one_worker() {
        let ratings = ratings();
        let mut expected: Vec<_> =
            ratings.entries.iter().map(|e| (e.row, e.column, e.value.to_bits())).collect();
        for workers in [1, 2, 3, 7] {
            let mut found = Vec::new();
            for worker in 0..workers {
                let share = share(&ratings, worker, workers, 4, 1);
                let sizes: Vec<_> = share.parts.iter().map(|part| part.entries.len()).collect();
                assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{sizes:?}");
                for part in &share.parts {
                    assert!(part.groups.is_sorted_by(|a, b| a.column < b.column));
                    for (group, entries) in part.iter() {
                        assert_eq!(entries.len(), group.ratings as usize);
                        assert!(entries.iter().all(|e| e.row < share.rows));
                        found.extend(
                            entries
                                .iter()
                                .map(|e| (share.first_row + e.row, group.column, e.value.to_bits())),
                        );
                    }
                }
                assert_eq!(share.whole.entries.len(), sizes.iter().sum::<usize>());
            }
            expected.sort_unstable();
            found.sort_unstable();
            assert_eq!(found, expected, "{workers} workers");
        }
    }

    #[test]
    fn workers_get_about_the_same() {
        for (source, workers) in [
            (Source::Digits, 2),
            (Source::Digits, 5),
            (Source::Planted(Planted { rows: 300, columns: 40, ratings: 5_000 }), 4),
        ] {
            let ratings = source.load(1).unwrap();
            let fair = ratings.entries.len() / workers;
            for worker in 0..workers {
                let got = share(&ratings, worker, workers, 1, 1).whole.entries.len();
                assert!(got.abs_diff(fair) * 50 <= fair, "worker {worker} of {workers}: {got}, not {fair}");
            }
        }
    }

    #[test]
    fn more_workers_than_rows_leave_some_without_work() {
        let ratings = Planted { rows: 2, columns: 3, ratings: 6 }.ratings(1);
        let sizes: Vec<_> =
            (0..5).map(|worker| share(&ratings, worker, 5, 2, 1).whole.entries.len()).collect();
        assert_eq!(sizes.iter().sum::<usize>(), 6);
        assert_eq!(sizes.iter().filter(|&&size| size == 3).count(), 2, "{sizes:?}");
    }

    #[test]
    fn a_row_with_most_ratings_does_not_break_the_ranges() {
        let mut entries: Vec<Rating> =
            (0..1000).map(|column| Rating { row: 0, column, value: 1.0 }).collect();
        entries.extend((1..10).map(|row| Rating { row, column: 0, value: 1.0 }));
        let ratings = Ratings { source: String::new(), rows: 10, columns: 1000, entries };
        let total: usize = (0..3).map(|worker| share(&ratings, worker, 3, 1, 1).whole.entries.len()).sum();
        assert_eq!(total, 1009);
    }
}
