//! The value bound of VAP: which updates of a worker are in transit, and whether one more may join them.
//!
//! An update is *in transit* from the `inc` that made it until it is visible to all: applied by its shard, and in every copy
//! of the row that a client may read. The bound (arXiv 1410.8043, section 3; arXiv 1312.7869, section 3.2): in each
//! element of the parameters, the sum of a worker's updates in transit is at most
//!
//! ```text
//! v(t) = max(v0 / sqrt(t), u)       t: the worker's clock, from 1      u: the greatest single update
//! ```
//!
//! An update greater than `v0 / sqrt(t)` alone could otherwise never be made: it is let through when nothing else is
//! in transit.
//!
//! **Weak and strong.** This is the *weak* form: it bounds each worker by itself, so two workers' views of an element may differ
//! by the sum of the bounds of all `P` workers. The *strong* form of 1312.7869 also bounds the sum over the workers of
//! what some have seen and others have not. A table with `v0 / P` has it: the sum of `P` bounds is `v0`.
//!
//! **Who knows what.** The updates are kept as *groups*, one per hand-over to the shards. A group is visible when each shard that
//! got rows of it has said so of the batch that closed it ([`Immediate::Visible`](crate::ack::Immediate::Visible)). Groups
//! leave in the order in which they were made, so what is in transit later is the newest of what is now: the bound is
//! kept for every such rest (`+5` and then `-9` add up to little, until the `+5` is visible). The norm is exact: the
//! sums are made anew from the groups, in `f64`.

use std::collections::{BTreeMap, VecDeque};

use crate::{element::Element, schema::Model};

/// `v0 / sqrt(t)` at the `t`-th clock of a worker, from 1; no bound for other models than VAP.
pub fn bound(model: Model, t: u64) -> f64 {
    match model {
        Model::Vap { v0 } => f64::from(v0) / (t.max(1) as f64).sqrt(),
        _ => f64::INFINITY,
    }
}

/// Updates of rows, in `f64`.
type Rows = BTreeMap<u64, Vec<f64>>;

/// Updates that were handed over together, and the batch after which each shard has all of them.
#[derive(Debug, Clone)]
struct Group {
    rows: Rows,
    /// Pairs of shard and batch number.
    batches: Vec<(usize, u64)>,
}

/// One worker's updates of one table that are in transit. See the module.
#[derive(Debug, Clone, Default)]
pub struct Transit {
    /// Not handed over.
    own: Rows,
    groups: VecDeque<Group>,
    /// Of all rows together.
    norm: f64,
}

impl Transit {
    /// Whether nothing is in transit.
    pub fn is_empty(&self) -> bool {
        self.own.is_empty() && self.groups.is_empty()
    }

    /// Whether updates wait to be handed over.
    pub fn unsent(&self) -> bool {
        !self.own.is_empty()
    }

    /// The infinity norm of the sum of what is in transit, or an older, greater one.
    pub fn norm(&self) -> f64 {
        self.norm
    }

    /// Whether an update may be made now: pairs of column and value, of a row of `width` elements.
    pub fn admits<E: Element>(
        &self,
        row: u64,
        width: usize,
        update: impl Iterator<Item = (usize, E)>,
        bound: f64,
    ) -> bool {
        if self.is_empty() {
            return true;
        }
        let mut new = vec![0.0; width];
        add(&mut new, update);
        self.norm.max(self.greatest(row, new)) <= bound
    }

    /// The update is made.
    pub fn add<E: Element>(&mut self, row: u64, width: usize, update: impl Iterator<Item = (usize, E)>) {
        add(self.own.entry(row).or_insert_with(|| vec![0.0; width]), update);
        // Of the row alone the norm may have fallen; it is measured again when something has become visible.
        self.norm = self.norm.max(self.greatest(row, vec![0.0; width]));
    }

    /// What was not handed over now is, to the shards and up to the batches that `batches` lists.
    pub fn hand_over(&mut self, batches: impl FnOnce(&mut dyn Iterator<Item = u64>) -> Vec<(usize, u64)>) {
        if !self.own.is_empty() {
            let rows = std::mem::take(&mut self.own);
            let batches = batches(&mut rows.keys().copied());
            self.groups.push_back(Group { rows, batches });
        }
    }

    /// Drops the groups that are visible, given the last visible batch of each shard. Whether there were any.
    pub fn retire(&mut self, visible: impl Fn(usize) -> u64) -> bool {
        let before = self.groups.len();
        while let Some(first) = self.groups.front()
            && first.batches.iter().all(|&(shard, batch)| visible(shard) >= batch)
        {
            self.groups.pop_front();
        }
        if self.groups.len() < before {
            self.norm = self.measure();
        }
        self.groups.len() < before
    }

    /// The greatest norm of `row` in transit, now or when some of the groups are visible, with `new` added.
    fn greatest(&self, row: u64, new: Vec<f64>) -> f64 {
        let (mut sum, mut greatest) = (new, 0.0f64);
        for rows in std::iter::once(&self.own).chain(self.groups.iter().rev().map(|group| &group.rows)) {
            if let Some(update) = rows.get(&row) {
                sum.iter_mut().zip(update).for_each(|(sum, value)| *sum += value);
            }
            greatest = greatest.max(norm(&sum));
        }
        greatest
    }

    fn measure(&self) -> f64 {
        let all = self.groups.iter().map(|group| &group.rows).chain([&self.own]);
        all.flatten().map(|(row, update)| self.greatest(*row, vec![0.0; update.len()])).fold(0.0, f64::max)
    }
}

fn add<E: Element>(sum: &mut [f64], update: impl Iterator<Item = (usize, E)>) {
    for (column, value) in update {
        sum[column] += value.to_f64();
    }
}

fn norm(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |norm, value| value.abs().max(norm))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(column: usize, value: f32) -> impl Iterator<Item = (usize, f32)> {
        [(column, value)].into_iter()
    }

    #[test]
    fn a_great_update_goes_alone_and_the_bound_falls_with_the_root_of_the_clock() {
        assert_eq!([1, 4, 100].map(|t| bound(Model::Vap { v0: 6.0 }, t)), [6.0, 3.0, 0.6]);
        let mut transit = Transit::default();
        assert!(transit.admits(0, 2, one(0, 50.0), 1.0));
        transit.add(0, 2, one(0, 50.0));
        assert!(!transit.admits(1, 2, one(0, 0.1), 1.0), "another row: the norm is over all of them");
        transit.hand_over(|_| vec![(0, 7), (1, 3)]);
        assert!(!transit.retire(|shard| [7, 2][shard]));
        assert_eq!(transit.norm(), 50.0);
        assert!(transit.retire(|shard| [7, 3][shard]));
        assert!(transit.is_empty() && transit.norm() == 0.0);
        assert!(transit.admits(1, 2, one(0, 0.1), 1.0));
    }

    #[test]
    fn opposite_updates_cancel() {
        let mut transit = Transit::default();
        transit.add(3, 4, one(1, 2.0));
        assert!(!transit.admits(3, 4, one(1, 1.5), 3.0));
        assert!(transit.admits(3, 4, one(1, -1.5), 3.0));
        assert!(transit.admits(3, 4, one(2, 3.0), 3.0), "another element");
        transit.hand_over(|_| vec![(0, 1)]);
        assert!(!transit.admits(3, 4, one(1, -3.5), 3.0), "the first may be visible before the second");
    }

    proptest! {
        /// Whatever is admitted, the sum in each element stays within the bound, or is a single update.
        #[test]
        fn the_bound_holds(steps in proptest::collection::vec((0u64..3, 0usize..2, -4i64..5, 0u8..4), 1..200)) {
            const BOUND: f64 = 3.0;
            let mut transit = Transit::default();
            let mut live: VecDeque<Vec<(u64, usize, i64)>> = VecDeque::from([vec![]]);
            let (mut batch, mut visible) = (0, 0);
            for (row, column, value, step) in steps {
                match step {
                    0 | 1 => if transit.admits(row, 2, [(column, value)].into_iter(), BOUND) {
                        transit.add(row, 2, [(column, value)].into_iter());
                        live.back_mut().unwrap().push((row, column, value));
                    },
                    2 => if transit.unsent() {
                        batch += 1;
                        transit.hand_over(|_| vec![(0, batch)]);
                        live.push_back(vec![]);
                    },
                    _ => if visible < batch {
                        visible += 1;
                        prop_assert!(transit.retire(|_| visible));
                        live.pop_front();
                    },
                }
                let all: Vec<_> = live.iter().flatten().copied().collect();
                for row in 0..3 {
                    for column in 0..2 {
                        let sum: i64 = all.iter().filter(|u| (u.0, u.1) == (row, column)).map(|u| u.2).sum();
                        prop_assert!(sum.abs() as f64 <= BOUND || all.len() == 1);
                        prop_assert!(sum.abs() as f64 <= transit.norm());
                    }
                }
            }
        }
    }
}
