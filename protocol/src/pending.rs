//! A client's own updates that a copy of a row may lack: the inclusion rule (read-my-writes, each exactly once).
//!
//! Of each row that this client has updated there is a list of entries, one per batch, oldest first; the last
//! one may be *unsent*: it has no number yet and grows by merging. What `get` returns is the copy plus the
//! entries that the copy does not contain.
//!
//! Whether a copy contains a batch is never guessed from the order in which things arrived:
//!
//! | copy | contains batch `n` of this client |
//! |---|---|
//! | pushed | exactly if `n <= included`: the push says so of itself |
//! | READ | exactly if it was applied at an LSN `<=` the row's LSN; until its acknowledgement is here, that is *unknown* |
//!
//! Why the LSN decides: a shard applies batches one by one, and a row's LSN is that of the last batch which
//! changed it. If batch `n`, which changed the row, was applied at `L`, then a version with LSN `>= L` came of applying
//! it or something later, and one below `L` came before.
//!
//! An entry may be dropped when the copies that will be read contain it. `own_lsn` of a row is the greatest
//! LSN of a dropped entry: a copy with a smaller LSN lacks an update that is no longer held here, and must
//! not be used. So dropping too much costs another READ, never an update.

use crate::{
    element::Element,
    mutants::{Mutant, mutant},
    row::Header,
};

/// Number of the batch of an entry that has not been sent.
pub const UNSENT: u64 = u64::MAX;

/// An update of one row.
#[derive(Debug, Clone, PartialEq)]
pub enum Delta<E> {
    /// Consecutive elements.
    Dense {
        /// Column of the first one.
        start: u32,
        /// What to add.
        values: Vec<E>,
    },
    /// Single elements.
    Sparse(
        /// Column and what to add; a column may come more than once.
        Vec<(u32, E)>,
    ),
}

impl<E: Element> Delta<E> {
    /// Adds it to a row.
    pub fn add_to(&self, row: &mut [E]) {
        match self {
            Self::Dense { start, values } => {
                let start = *start as usize;
                E::add_all(&mut row[start..start + values.len()], values);
            }
            Self::Sparse(pairs) => {
                for (column, value) in pairs {
                    let element = &mut row[*column as usize];
                    *element = element.plus(*value);
                }
            }
        }
    }
}

/// One batch's update of a row.
#[derive(Debug, Clone)]
pub struct Entry<E> {
    /// Number of the batch, or [`UNSENT`].
    pub batch: u64,
    /// LSN at which it was applied, once that is known.
    pub lsn: Option<u64>,
    /// The update.
    pub delta: Delta<E>,
}

/// Whether a copy contains a batch cannot be told before that batch is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unknown {
    /// The batch.
    pub batch: u64,
}

/// How a copy came here, which decides what it contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It says of itself which batches it contains (a push, or a READ that has been decided).
    Stated,
    /// READ from the shard: its LSN decides.
    Read,
}

/// The updates of one row that a copy may lack, oldest first.
#[derive(Debug, Clone)]
pub struct Pending<E> {
    entries: Vec<Entry<E>>,
}

impl<E> Default for Pending<E> {
    fn default() -> Self {
        Self { entries: Vec::new() }
    }
}

impl<E: Element> Pending<E> {
    /// Whether nothing is pending.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Adds an unsent update of a row of `width` elements, merged into one that is there. Returns whether there was none.
    pub fn merge(&mut self, delta: Delta<E>, width: u32) -> bool {
        let Some(last) = self.entries.last_mut().filter(|last| last.batch == UNSENT) else {
            self.entries.push(Entry { batch: UNSENT, lsn: None, delta });
            return true;
        };
        match (&mut last.delta, delta) {
            (Delta::Sparse(pairs), Delta::Sparse(more)) => {
                pairs.extend(more);
                // Beyond half the width pairs are the longer form of a whole row.
                if pairs.len() * 2 > width as usize {
                    let mut values = vec![E::default(); width as usize];
                    last.delta.add_to(&mut values);
                    last.delta = Delta::Dense { start: 0, values };
                }
            }
            (Delta::Dense { start: 0, values }, more) if values.len() == width as usize => {
                more.add_to(values)
            }
            (mine, more) => {
                let mut values = vec![E::default(); width as usize];
                mine.add_to(&mut values);
                more.add_to(&mut values);
                *mine = Delta::Dense { start: 0, values };
            }
        }
        false
    }

    /// The unsent update, if there is one.
    pub fn unsent(&self) -> Option<&Delta<E>> {
        self.entries.last().filter(|last| last.batch == UNSENT).map(|last| &last.delta)
    }

    /// The unsent update goes out as part of batch `number`.
    pub fn sent(&mut self, number: u64) {
        let last = self.entries.last_mut().filter(|last| last.batch == UNSENT);
        last.expect("an unsent update").batch = number;
    }

    /// The first `elements` (of a dense update, or pairs of a sparse one) of the unsent update go out as part
    /// of batch `number`; the rest stays unsent.
    pub fn sent_part(&mut self, number: u64, elements: usize) {
        let last = self.entries.last_mut().filter(|last| last.batch == UNSENT).expect("an unsent update");
        let rest = match &mut last.delta {
            Delta::Dense { start, values } => {
                let rest = values.split_off(elements);
                Delta::Dense { start: *start + elements as u32, values: rest }
            }
            Delta::Sparse(pairs) => Delta::Sparse(pairs.split_off(elements)),
        };
        last.batch = number;
        self.entries.push(Entry { batch: UNSENT, lsn: None, delta: rest });
    }

    /// Batch `number` was applied at `lsn`.
    pub fn acknowledged(&mut self, number: u64, lsn: u64) {
        for entry in self.entries.iter_mut().filter(|entry| entry.batch == number) {
            entry.lsn = Some(lsn);
        }
    }

    /// How many of the entries, oldest first, the copy contains.
    ///
    /// # Errors
    /// [`Unknown`]: wait for that acknowledgement and ask again about the same copy.
    pub fn contained(&self, copy: &Header, origin: Origin) -> Result<usize, Unknown> {
        for (i, entry) in self.entries.iter().enumerate() {
            let contained = match (origin, entry.lsn) {
                _ if entry.batch == UNSENT => false,
                (Origin::Stated, lsn) if mutant(Mutant::InclusionByArrival) => lsn.is_some(),
                (Origin::Stated, _) => entry.batch <= copy.included,
                (Origin::Read, Some(lsn)) if mutant(Mutant::InclusionStrict) => lsn < copy.lsn,
                (Origin::Read, Some(lsn)) => lsn <= copy.lsn,
                (Origin::Read, None) => return Err(Unknown { batch: entry.batch }),
            };
            if !contained {
                return Ok(i);
            }
        }
        Ok(self.entries.len())
    }

    /// Number of the last of the first `contained` entries' batches, 0 if there is none: what the copy may
    /// say of itself from now on, since later batches are later entries.
    pub fn included(&self, contained: usize) -> u64 {
        contained.checked_sub(1).map_or(0, |last| self.entries[last].batch)
    }

    /// Adds all entries but the first `contained` to a row.
    pub fn add_missing(&self, contained: usize, row: &mut [E]) {
        for entry in &self.entries[contained..] {
            entry.delta.add_to(row);
        }
    }

    /// Drops the first `entries`, as far as they are acknowledged, and hands their updates to `used` for their
    /// buffers. Returns the greatest LSN among them, for `own_lsn`.
    pub fn drop_first(&mut self, entries: usize, mut used: impl FnMut(Delta<E>)) -> Option<u64> {
        let known = self.entries[..entries].iter().take_while(|entry| entry.lsn.is_some()).count();
        let mut greatest = None;
        for entry in self.entries.drain(..known) {
            greatest = greatest.max(entry.lsn);
            used(entry.delta);
        }
        greatest
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(lsn: u64, included: u64) -> Header {
        Header { lsn, included, clock: 0, check: 0 }
    }

    #[test]
    fn an_unacknowledged_batch_leaves_a_read_undecided_and_a_push_not() {
        let mut pending = Pending::<i64>::default();
        assert!(pending.merge(Delta::Sparse(vec![(0, 1)]), 4));
        pending.sent(7);
        assert_eq!(pending.contained(&header(100, 0), Origin::Read), Err(Unknown { batch: 7 }));
        assert_eq!(pending.contained(&header(100, 7), Origin::Stated), Ok(1));
        assert_eq!(pending.contained(&header(100, 6), Origin::Stated), Ok(0));
        pending.acknowledged(7, 100);
        assert_eq!(pending.contained(&header(100, 0), Origin::Read), Ok(1));
        assert_eq!(pending.contained(&header(99, 0), Origin::Read), Ok(0));
        assert_eq!(pending.drop_first(1, drop), Some(100));
        assert!(pending.is_empty());
    }

    #[test]
    fn what_is_not_acknowledged_is_not_dropped() {
        let mut pending = Pending::<i64>::default();
        pending.merge(Delta::Dense { start: 0, values: vec![1] }, 1);
        pending.sent(1);
        assert_eq!(pending.drop_first(1, drop), None);
        assert_eq!(pending.len(), 1);
    }

    proptest! {
        /// A model of a shard: batches change the row in order; copies are taken at any moment; acknowledgements
        /// come late. Copy plus missing entries is always all that this client ever added.
        #[test]
        fn copy_and_missing_entries_are_every_own_update_once(steps in proptest::collection::vec((0u8..6, 0u32..4, 1i64..9), 1..120)) {
            const WIDTH: u32 = 4;
            let mut pending = Pending::<i64>::default();
            let (mut own, mut shard, mut lsn, mut row_lsn) = (vec![0; 4], vec![0i64; 4], 0u64, 0u64);
            let (mut next, mut applied, mut own_lsn) = (1u64, 0u64, 0u64);
            let mut sent: Vec<(u64, Delta<i64>)> = vec![];
            let mut unacknowledged: Vec<(u64, u64)> = vec![];
            for (step, column, value) in steps {
                match step {
                    0 | 1 => {
                        let delta = if step == 0 { Delta::Sparse(vec![(column, value)]) }
                            else { Delta::Dense { start: column, values: vec![value; (WIDTH - column) as usize] } };
                        delta.add_to(&mut own);
                        pending.merge(delta, WIDTH);
                    }
                    2 => if let Some(delta) = pending.unsent() {
                        sent.push((next, delta.clone()));
                        pending.sent(next);
                        next += 1;
                    },
                    3 => if !sent.is_empty() {
                        let (number, delta) = sent.remove(0);
                        delta.add_to(&mut shard);
                        lsn += 3;
                        row_lsn = lsn;
                        applied = number;
                        unacknowledged.push((number, lsn));
                    },
                    4 => if !unacknowledged.is_empty() {
                        let (number, at) = unacknowledged.remove(0);
                        pending.acknowledged(number, at);
                    },
                    _ => for (copy, origin) in [(header(row_lsn, 0), Origin::Read), (header(row_lsn, applied), Origin::Stated)] {
                        prop_assert!(copy.lsn >= own_lsn);
                        match pending.contained(&copy, origin) {
                            Err(Unknown { batch }) => prop_assert!(unacknowledged.iter().any(|(n, _)| *n == batch) || sent.iter().any(|(n, _)| *n == batch)),
                            Ok(contained) => {
                                let mut row = shard.clone();
                                pending.add_missing(contained, &mut row);
                                prop_assert_eq!(&row, &own);
                                if value % 2 == 0 { own_lsn = pending.drop_first(contained, drop).unwrap_or(own_lsn); }
                            }
                        }
                    },
                }
            }
        }
    }
}
