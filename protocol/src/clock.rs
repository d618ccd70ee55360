//! The vector clock of a shard and the staleness rule.
//!
//! A client's entry is the clock up to which *all* updates of all its workers have been applied here. The
//! shard clock `C` is the minimum over the clients; it never goes back. A client that joins enters at `C`; one
//! that leaves, or dies, no longer holds the others up.
//!
//! **Observers.** A client that only reads, an *observer*, has no entry. An entry says which updates are still to come, and of an
//! observer none are. So the minimum without it says the same of all updates that there will ever be, and nobody waits for it,
//! whatever it does. Nor does anybody pace it. A count of its own `clock()` calls would say nothing, and a `get` at a clock that the
//! job never reaches would wait for ever. So its clock follows the job's: `clock()` takes a worker to the least clock that all shards are
//! known to have [reached](observed). `C >= c` holds in each of them from then on, so `C >= c - s` holds without waiting. The promise is
//! that of any worker at clock `c`: it sees all updates stamped `<= c - s - 1`. If it does not call `clock()`, the promise stays what it
//! is: a copy may serve for as long. (A value-bounded table is the exception: what its bound counts is what somebody has not
//! got, and an observer with copies is somebody. It has to do nothing for that: the server proves it alone.)
//!
//! A job may declare how many clients it has. Until so many have joined the clock stands, so that
//! the first one does not run ahead of those that are still starting.

use std::collections::BTreeMap;

use crate::{limits::MAX_CLOCK_JUMP, schema::Model};

/// Clocks of the clients of one shard.
#[derive(Debug, Clone, Default)]
pub struct VectorClock {
    clocks: BTreeMap<u64, u64>,
    shard: u64,
    /// Clients that stand at the shard clock: while there are any it does not rise, and nobody looks for the minimum.
    at_minimum: usize,
    expected: usize,
    joined: usize,
}

/// How a client went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// It said that it leaves: it has had its part in the job.
    Left,
    /// Its connection broke. A job that is still starting waits for another in its place.
    Died,
}

impl VectorClock {
    /// That begins at `clock`, as if so many had been.
    pub fn starting_at(clock: u64) -> Self {
        Self { shard: clock, ..Self::default() }
    }

    /// The shard clock `C`.
    pub fn shard(&self) -> u64 {
        self.shard
    }

    /// Number of clients that it waits for.
    pub fn clients(&self) -> usize {
        self.clocks.len()
    }

    /// Adds `client`, of a job of `expected` clients, at the shard clock.
    ///
    /// The first client of a job sets its size; when all have left, the next one begins a new job. (If not all had
    /// come by then, only one that says another size does: others may still be starting.)
    ///
    /// # Errors
    /// The size of the running job, if it is another one.
    pub fn join(&mut self, client: u64, expected: usize) -> Result<(), usize> {
        let over = self.joined >= self.expected || self.joined == 0 || self.expected != expected;
        if self.clocks.is_empty() && over {
            self.expected = expected;
            self.joined = 0;
        } else if self.expected != expected {
            return Err(self.expected);
        }
        self.joined += 1;
        let before = self.clocks.insert(client, self.shard);
        assert!(before.is_none(), "client {client} joined twice");
        self.at_minimum += 1;
        Ok(())
    }

    /// Removes `client`. Returns the shard clock if it rose.
    pub fn leave(&mut self, client: u64, how: Departure) -> Option<u64> {
        let clock = self.clocks.remove(&client)?;
        self.at_minimum -= usize::from(clock == self.shard);
        if how == Departure::Died && self.joined < self.expected {
            self.joined -= 1;
        }
        self.advance()
    }

    /// All updates of `client` stamped below `clock` have been applied. Returns the shard clock if it rose.
    ///
    /// # Errors
    /// The client's clock, if `clock` is not after it, or too far.
    pub fn tick(&mut self, client: u64, clock: u64) -> Result<Option<u64>, u64> {
        let Some(entry) = self.clocks.get_mut(&client) else { return Ok(None) };
        if clock <= *entry || clock - *entry >= MAX_CLOCK_JUMP {
            return Err(*entry);
        }
        self.at_minimum -= usize::from(*entry == self.shard);
        *entry = clock;
        Ok(self.advance())
    }

    fn advance(&mut self) -> Option<u64> {
        if self.at_minimum > 0 || self.joined < self.expected {
            return None;
        }
        let minimum = *self.clocks.values().min()?;
        if minimum <= self.shard {
            return None;
        }
        self.shard = minimum;
        self.at_minimum = self.clocks.values().filter(|clock| **clock == minimum).count();
        Some(minimum)
    }
}

/// The shard clock that a `get` at clock `clock` needs under `model`: it sees every update stamped
/// `<= clock - staleness - 1` (SSP; arXiv 1410.8043, section 2).
pub fn needed(model: Model, clock: u64) -> u64 {
    model.staleness().map_or(0, |staleness| clock.saturating_sub(staleness.into()))
}

/// The clock of an observer that knows these clocks of all shards: all have reached it.
pub fn observed(shards: impl Iterator<Item = u64>) -> u64 {
    shards.min().unwrap_or(0)
}

/// The clock differential of a `get`: clock of the data returned (`C - 1`, the last one that is in it as a whole)
/// minus clock of the reader.
pub fn differential(copy: u64, reader: u64) -> i64 {
    copy as i64 - 1 - reader as i64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    use Departure::{Died, Left};

    #[test]
    fn the_slowest_client_decides_and_the_dead_do_not() {
        let mut vector = VectorClock::default();
        vector.join(1, 2).unwrap();
        assert_eq!(vector.tick(1, 5), Ok(None), "the second client has not joined");
        vector.join(2, 2).unwrap();
        assert_eq!(vector.tick(2, 1), Ok(Some(1)));
        assert_eq!(vector.tick(9, 7), Ok(None), "not a client");
        assert_eq!(vector.join(3, 4), Err(2));
        assert_eq!(vector.leave(2, Died), Some(5));
        assert_eq!(vector.leave(1, Left), None);
        vector.join(3, 1).unwrap();
        assert_eq!(vector.shard(), 5, "a new job goes on where the last one ended");
        assert_eq!(vector.tick(3, 6), Ok(Some(6)));
    }

    #[test]
    fn a_clock_that_does_not_rise_or_jumps_is_refused_and_changes_nothing() {
        let mut vector = VectorClock::starting_at(7);
        vector.join(1, 1).unwrap();
        for clock in [0, 6, 7, 7 + MAX_CLOCK_JUMP, u64::MAX] {
            assert_eq!(vector.tick(1, clock), Err(7), "{clock}");
        }
        assert_eq!(vector.tick(1, 8), Ok(Some(8)));
        assert_eq!(vector.tick(1, 7 + MAX_CLOCK_JUMP), Ok(Some(7 + MAX_CLOCK_JUMP)));
    }

    #[test]
    fn a_job_of_which_one_left_before_the_others_came_still_waits_for_them() {
        let mut vector = VectorClock::default();
        vector.join(1, 2).unwrap();
        vector.leave(1, Left);
        vector.join(2, 2).unwrap();
        assert_eq!(vector.tick(2, 1), Ok(Some(1)));
    }

    #[test]
    fn a_job_that_broke_off_while_it_started_does_not_bind_the_next_one() {
        let mut vector = VectorClock::default();
        vector.join(1, 3).unwrap();
        assert_eq!(vector.join(2, 1), Err(3), "it is still there");
        vector.leave(1, Died);
        vector.join(3, 1).unwrap();
        assert_eq!(vector.tick(3, 1), Ok(Some(1)));
        // Of the same size, too: the dead one of the first job is not counted among the three of the second.
        vector.leave(3, Left);
        vector.join(4, 3).unwrap();
        vector.leave(4, Died);
        vector.join(5, 3).unwrap();
        vector.join(6, 3).unwrap();
        assert_eq!((vector.tick(5, 2), vector.tick(6, 2)), (Ok(None), Ok(None)), "the third has not joined");
        vector.join(7, 3).unwrap();
        assert_eq!(vector.tick(7, 2), Ok(Some(2)));
    }

    #[test]
    fn an_observer_is_where_all_shards_are() {
        assert_eq!(observed([7, 5, 6].into_iter()), 5);
        assert_eq!(needed(Model::Bsp, observed([4].into_iter())), 4, "which is there");
    }

    #[test]
    fn staleness() {
        let ssp = Model::Ssp { staleness: 3 };
        assert_eq!([0, 3, 4, 10].map(|c| needed(ssp, c)), [0, 0, 1, 7]);
        assert_eq!(needed(Model::Bsp, 4), 4);
        assert_eq!(needed(Model::Async, 4), 0);
        assert_eq!(differential(4, 4), -1);
    }

    proptest! {
        #[test]
        fn the_shard_clock_is_the_minimum_and_never_falls(steps in proptest::collection::vec((0u64..4, 0u64..3), 1..200)) {
            let mut vector = VectorClock::default();
            let mut clocks = [0u64; 4];
            for client in 0..4 { vector.join(client, 4).unwrap(); }
            for (client, by) in steps {
                let before = vector.shard();
                if by == 0 {
                    prop_assert!(vector.tick(client, clocks[client as usize]).is_err());
                    continue;
                }
                clocks[client as usize] += by;
                let rose = vector.tick(client, clocks[client as usize]).unwrap();
                prop_assert_eq!(vector.shard(), *clocks.iter().min().unwrap());
                prop_assert_eq!(rose, (vector.shard() > before).then(|| vector.shard()));
            }
        }
    }
}
