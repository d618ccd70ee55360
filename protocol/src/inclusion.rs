//! Which of a client's own batches a copy contains: the inclusion rule (read-my-writes, each update exactly once).
//!
//! A worker keeps its updates of a clock as a *slab*, in the form in which they are sent, until every copy that it will read
//! contains them. What `get` returns is the copy, plus the updates of the slabs that the copy does not contain.
//!
//! Whether a copy contains a batch is never guessed from the order in which things arrived. The LSN decides: a
//! shard applies batches one by one, and an image's LSN is that of the last batch which changed it. If batch `n`, which changed the image,
//! was applied at `L`, then a version with LSN `>= L` came of applying it or something later, and one below `L` came before. That
//! holds for a copy read in place, for one that was READ, and for one that was pushed.
//!
//! `L` is known from the acknowledgement. Before it comes, something is known all the same: batches are acknowledged in
//! order, so every unacknowledged batch has an LSN greater than that of the last acknowledged one; and acknowledgements are posted before
//! the pushes of a round, so one that was not found after the round's immediate was polled is of a batch applied after the round was closed.
//! The greater of the two is `below`. A copy at or under it contains no unacknowledged batch; of a newer one it is *unknown*
//! until the acknowledgement comes, which needs nothing of the client.
//!
//! A client that reads in place never has to wait: the shard announces a batch's LSN in its own memory before it changes the first
//! image for it. An image that was copied before the announcement could be seen does not contain the batch.

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
