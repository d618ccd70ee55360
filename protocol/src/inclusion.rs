//! The inclusion rule: which of a client's own batches a copy contains. It makes a worker read its own
//! writes, each exactly once.
//!
//! A worker keeps its updates of a clock as a *slab*, in the form in which they are sent. It keeps the slab
//! until every copy that it will read contains these updates. `get` returns the copy, plus the updates of the
//! slabs that the copy does not contain.
//!
//! **The LSN decides.** The order in which things arrive says nothing about what a copy contains. The log
//! sequence number (LSN) does. A shard applies batches one by one, and gives each the next LSN. An image's
//! LSN is that of the last batch that changed the image. Suppose that batch `n` changed the image, and was
//! applied at LSN `L`. Then:
//! - A version of the image with LSN `>= L` was made by batch `n`, or later: it contains the batch.
//! - A version with an LSN below `L` was made before: it does not.
//!
//! That holds for a copy read in place, for one that was READ, and for one that was pushed.
//!
//! **Before the acknowledgement.** The client learns `L` from the acknowledgement. Until that comes, it knows
//! two lower bounds of `L`:
//! - Batches are acknowledged in order. So an unacknowledged batch has a greater LSN than the last
//!   acknowledged one.
//! - Acknowledgements are posted before the pushes of a round. So if the client polled a round's immediate
//!   and found no acknowledgement of a batch, the batch was applied after the round was closed.
//!
//! The greater of the two bounds is `below`. A copy with an LSN at or under `below` contains no
//! unacknowledged batch. For a newer copy it is *unknown* until the acknowledgement comes. The client need
//! not do anything for it to come.
//!
//! **In place, nothing is unknown.** The shard announces a batch's LSN in its own memory before it changes
//! the first image for the batch. So if the announcement could not be seen after an image was copied, that
//! copy does not contain the batch. A client that reads in place never has to wait.

use crate::mutants::{Mutant, mutant};

/// What a copy has of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contained {
    /// All of its updates of that image.
    Yes,
    /// None of them.
    No,
    /// That cannot be told before the batch is acknowledged.
    Unknown,
}

/// Whether a copy with LSN `copy` contains a batch that changed its image and was applied at `lsn`, if that is known. If it is
/// not, its LSN is greater than `below`, which was loaded before `lsn` was found unknown.
#[inline]
pub fn contained(lsn: Option<u64>, below: u64, copy: u64) -> Contained {
    match lsn {
        Some(_) if mutant(Mutant::InclusionByArrival) => Contained::Yes,
        Some(lsn) if mutant(Mutant::InclusionStrict) && lsn == copy => Contained::No,
        Some(lsn) if lsn <= copy => Contained::Yes,
        Some(_) => Contained::No,
        None if copy <= below || mutant(Mutant::UnknownIsNo) => Contained::No,
        None => Contained::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_lsn_decides_and_what_is_below_all_unknown_ones_helps() {
        assert_eq!(contained(Some(7), 0, 7), Contained::Yes);
        assert_eq!(contained(Some(7), 0, 6), Contained::No);
        assert_eq!(contained(None, 5, 5), Contained::No);
        assert_eq!(contained(None, 5, 6), Contained::Unknown);
    }

    proptest! {
        /// A model of a shard: two clients' batches change an image in order, copies are taken at any moment, and
        /// acknowledgements come late. Copy plus the batches that it lacks is always all that this client ever added.
        #[test]
        fn copy_and_what_it_lacks_are_every_own_update_once(steps in proptest::collection::vec((0u8..5, 1i64..9), 1..120)) {
            let (mut own, mut shard, mut image, mut lsn) = (0, 0, 0u64, 0u64);
            // Sent batches: value, LSN once applied, LSN once acknowledged.
            let mut batches: Vec<(i64, Option<u64>, Option<u64>)> = vec![];
            for (step, value) in steps {
                match step {
                    0 => { own += value; batches.push((value, None, None)); }
                    1 => if let Some(next) = batches.iter_mut().find(|batch| batch.1.is_none()) {
                        lsn += 1;
                        (next.1, shard, image) = (Some(lsn), shard + next.0, lsn);
                    },
                    2 => { lsn += 1; image = lsn; } // somebody else's, of value 0
                    3 => if let Some(next) = batches.iter_mut().find(|batch| batch.2.is_none()) { next.2 = next.1; },
                    _ => {
                        let below = batches.iter().filter_map(|batch| batch.2).max().unwrap_or(0);
                        let mut sum = shard;
                        let mut known = true;
                        for (value, applied, acknowledged) in &batches {
                            match contained(*acknowledged, below, image) {
                                Contained::Yes => {}
                                Contained::No => sum += value,
                                Contained::Unknown => { known = false; prop_assert!(applied.is_none_or(|lsn| lsn > below)); }
                            }
                        }
                        if known { prop_assert_eq!(sum, own); }
                    }
                }
            }
        }
    }
}
