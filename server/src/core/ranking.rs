//! Continuous pushing: changed rows go to those who hold them between rounds, the most changed first, within a budget.
//!
//! A table may ask for it under ESSP, where it takes work from the rounds and makes copies fresher than the model asks,
//! and under Async, where it is the only pushing. Bösen (Wei et al., SoCC 2015) sends the most changed rows first
//! when bandwidth is to spare; this is the same for pushes.
//!
//! **What is pushed.** A row that has changed since it was last pushed is *ranked* by the sum of the greatest elements of
//! its updates since, which bounds how far any element of a copy is off. Ranks are powers of two; among equals the
//! row that has waited longer goes first. Every [`TURN`]th push is of the next rank in turn, whichever it is, so that
//! rows that change much cannot keep the others from ever being pushed.
//!
//! **When.** After what else a turn has to do, a few rows each turn, as long as the budget lasts and all who hold the
//! row can take it at once: nothing is queued for these pushes, so a round never waits for more than its own rows. What could
//! not be pushed stays ranked.
//!
//! **Why it is right.** It is the push of a round at another time. A ranked row is a dirty row: a round pushes all that are
//! ranked when the clock rises, and closes behind them (under ESSP; there is no round of an Async table, so its
//! copies are good for the clock that they carry and no other). A row that a continuous push has made clean was posted
//! to all its subscribers on the connections on which the round is closed later.
//!
//! **Cost.** An update costs one more look at its values and, when the rank of its row changes, a few links. Nothing
//! is allocated.

use std::time::Duration;

use fervor_protocol::{
    limits::ROW_HEADER,
    mutants::{Mutant, mutant},
};
use fervor_verbs::transport::Transport;

use crate::{poller::Poller, shard::TableId};

/// So many ranks there are: one for each exponent of an `f32`.
const RANKS: usize = 256;
/// Every so many pushes one is not of the highest rank.
const TURN: u32 = 8;
/// Rows of a table that are pushed before the poller looks again what has come.
const ROWS_A_TURN: usize = 16;
/// What has not been spent is kept for so long.
const SAVED: Duration = Duration::from_millis(1);
/// No row.
const NONE: u32 = u32::MAX;
/// The change of a row that is not ranked.
const CLEAN: f32 = -1.0;

/// A list of rows of one rank.
#[derive(Debug, Clone, Copy)]
struct List {
    first: u32,
    last: u32,
}

/// The changed rows of a table, by how much they have changed.
#[derive(Debug)]
pub struct Ranking {
    /// Per row, how much it has changed; [`CLEAN`] if it is not ranked.
    changes: Vec<f32>,
    /// Per row, its neighbours in the list of its rank.
    links: Vec<List>,
    ranks: [List; RANKS],
    /// The ranks that have rows.
    used: [u64; RANKS / 64],
    /// Rows taken so far, and the rank whose turn came last.
    taken: u32,
    turn: usize,
}

impl Ranking {
    /// Of `rows` rows, fewer than 2^32 - 1.
    fn new(rows: u64) -> Self {
        assert!(rows < u64::from(NONE), "{rows} rows cannot be linked");
        let none = List { first: NONE, last: NONE };
        Self {
            changes: vec![CLEAN; rows as usize],
            links: vec![none; rows as usize],
            ranks: [none; RANKS],
            used: [0; RANKS / 64],
            taken: 0,
            turn: 0,
        }
    }

    /// `row` has changed by `by`, which is not negative.
    pub fn changed(&mut self, row: u64, by: f32) {
        let row = row as u32;
        let before = self.changes[row as usize];
        let ranked = before != CLEAN;
        let change = if ranked { before + by } else { by };
        if !ranked || rank(before) != rank(change) {
            if ranked {
                self.unlink(row);
            }
            self.link(row, rank(change));
        }
        self.changes[row as usize] = change;
    }

    /// `row` is no longer ranked.
    pub fn remove(&mut self, row: u64) {
        if self.changes[row as usize] != CLEAN {
            self.unlink(row as u32);
            self.changes[row as usize] = CLEAN;
        }
    }

    /// The row to push next.
    fn next(&self) -> Option<u64> {
        let rank = if self.has_turn() { self.rank_in_turn() } else { self.highest(RANKS) }?;
        Some(self.ranks[rank].first.into())
    }

    /// Takes the row that [`Ranking::next`] gave.
    fn take(&mut self, row: u64) {
        if self.has_turn() {
            self.turn = rank(self.changes[row as usize]);
        }
        self.taken = self.taken.wrapping_add(1);
        self.remove(row);
    }

    /// Takes all, the most changed first.
    pub fn drain(&mut self) -> Vec<u64> {
        let mut all = Vec::new();
        while let Some(rank) = self.highest(RANKS) {
            let row = self.ranks[rank].first.into();
            self.remove(row);
            all.push(row);
        }
        all
    }

    fn has_turn(&self) -> bool {
        self.taken % TURN == TURN - 1
    }

    /// The next rank below the one whose turn came last, round and round.
    fn rank_in_turn(&self) -> Option<usize> {
        self.highest(self.turn).or_else(|| self.highest(RANKS))
    }

    /// The highest rank below `below` that has rows.
    fn highest(&self, below: usize) -> Option<usize> {
        (0..RANKS / 64).rev().find_map(|word| {
            let bits = match below.saturating_sub(word * 64) {
                0 => 0,
                some @ 1..64 => self.used[word] & ((1 << some) - 1),
                _ => self.used[word],
            };
            bits.checked_ilog2().map(|bit| word * 64 + bit as usize)
        })
    }

    fn link(&mut self, row: u32, rank: usize) {
        let last = self.ranks[rank].last;
        self.links[row as usize] = List { first: last, last: NONE };
        match last {
            NONE => {
                self.ranks[rank].first = row;
                self.used[rank / 64] |= 1 << (rank % 64);
            }
            last => self.links[last as usize].last = row,
        }
        self.ranks[rank].last = row;
    }

    fn unlink(&mut self, row: u32) {
        let rank = rank(self.changes[row as usize]);
        let List { first: before, last: after } = self.links[row as usize];
        match before {
            NONE => self.ranks[rank].first = after,
            before => self.links[before as usize].last = after,
        }
        match after {
            NONE => self.ranks[rank].last = before,
            after => self.links[after as usize].first = before,
        }
        if self.ranks[rank].first == NONE {
            self.used[rank / 64] &= !(1 << (rank % 64));
        }
    }
}

/// The exponent: NaN and infinity are the highest.
fn rank(change: f32) -> usize {
    (change.to_bits() << 1 >> 24) as usize
}

/// Bytes per second, and when the next may go.
#[derive(Debug)]
struct Budget {
    rate: u64,
    free: Duration,
}

impl Budget {
    fn spend(&mut self, now: Duration, bytes: usize) {
        let nanos = bytes as u128 * 1_000_000_000 / u128::from(self.rate);
        let since = self.free.max(now.saturating_sub(SAVED));
        self.free = since.saturating_add(Duration::from_nanos(nanos.try_into().unwrap_or(u64::MAX)));
    }
}

/// What is pushed of one table between rounds. See the module.
#[derive(Debug)]
pub struct Continuous {
    pub ranking: Ranking,
    budget: Budget,
}

impl Continuous {
    /// Of a table of `rows` rows, at `rate` bytes per second.
    pub fn new(rows: u64, rate: u64) -> Self {
        Self { ranking: Ranking::new(rows), budget: Budget { rate, free: Duration::ZERO } }
    }
}

impl<T: Transport> Poller<T> {
    /// Pushes what the budgets allow and the clients can take, and notes until when a budget makes rows wait. How many rows.
    pub(crate) fn push_continuously(&mut self) -> usize {
        let mut pushed = 0;
        self.next_push = None;
        for table in 0..self.shard.tables.len() {
            for _ in 0..ROWS_A_TURN {
                let Some(continuous) = &self.shard.tables[table].continuous else { break };
                let Some(row) = continuous.ranking.next() else { break };
                let now = self.transport.now();
                if now < continuous.budget.free {
                    let free = continuous.budget.free;
                    self.next_push = Some(self.next_push.map_or(free, |other| other.min(free)));
                    break;
                }
                let can = self.can_push(table as TableId, row);
                if !can && !mutant(Mutant::RankingForgotten) {
                    break;
                }
                let found = &mut self.shard.tables[table];
                let bytes = found.subscribers[row as usize].len() * (ROW_HEADER + found.row_bytes);
                let continuous = found.continuous.as_mut().expect("it was there");
                continuous.ranking.take(row);
                if can {
                    continuous.budget.spend(now, bytes);
                    self.push_row(table as TableId, row);
                    pushed += 1;
                }
            }
        }
        pushed
    }

    /// Whether all who hold a row can take it at once.
    fn can_push(&self, table: TableId, row: u64) -> bool {
        self.shard.tables[table as usize].subscribers[row as usize].iter().all(|subscriber| {
            let connection = self.clients.get(&subscriber.client);
            // Of one who is gone nothing is asked.
            let peer = connection.and_then(|connection| self.peers.get(connection));
            !subscriber.queued && peer.is_none_or(|peer| peer.queue.is_empty() && peer.has_room())
        })
    }

    /// How long the poller may sleep until a budget allows the next push, as [`Poller::push_continuously`] saw it; it may
    /// be no time by now. (What clients could not take they can when a completion says so, which wakes the poller.)
    pub(crate) fn until_next_push(&self) -> Option<Duration> {
        self.next_push.map(|at| at.saturating_sub(self.transport.now()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Takes `count` rows one by one.
    fn take(ranking: &mut Ranking, count: usize) -> Vec<u64> {
        let next = |_| {
            let row = ranking.next()?;
            ranking.take(row);
            Some(row)
        };
        (0..count).map_while(next).collect()
    }

    #[test]
    fn the_most_changed_go_first_and_equals_in_their_order() {
        let mut ranking = Ranking::new(6);
        for (row, by) in [(0, 1.0), (1, 9.0), (2, 0.0), (3, 1.5), (4, f32::INFINITY), (0, 30.0)] {
            ranking.changed(row, by);
        }
        assert_eq!(take(&mut ranking, 9), [4, 0, 1, 3, 2]);
        assert_eq!(ranking.next(), None);
        ranking.changed(5, 1.0);
        ranking.changed(2, 1.25);
        assert_eq!(ranking.drain(), [5, 2]);
        assert!(ranking.drain().is_empty());
    }

    #[test]
    fn rows_that_change_little_are_not_kept_waiting_for_ever() {
        let mut ranking = Ranking::new(6);
        ranking.changed(4, 0.5);
        ranking.changed(5, 0.01);
        // Three rows change more between any two pushes; so there are five ranks at most.
        let mut pushed = Vec::new();
        for _ in 0..6 * TURN {
            (0..3).for_each(|row| ranking.changed(row, 1000.0));
            pushed.extend(take(&mut ranking, 1));
        }
        assert!(pushed.contains(&4) && pushed.contains(&5), "{pushed:?}");
    }

    #[test]
    fn a_budget_is_kept_and_little_of_it_saved() {
        let mut budget = Budget { rate: 1_000_000, free: Duration::ZERO };
        let second = Duration::from_secs(1);
        budget.spend(second, 500);
        assert!(budget.free < second, "what was saved");
        budget.spend(second, 500);
        budget.spend(second, 2000);
        assert_eq!(budget.free, second + Duration::from_millis(2));
        let mut unlimited = Budget { rate: u64::MAX, free: Duration::ZERO };
        unlimited.spend(Duration::ZERO, usize::MAX);
        assert!(unlimited.free <= Duration::from_secs(1));
    }

    proptest! {
        /// Against a list of pairs.
        #[test]
        fn a_ranking_has_what_was_put_into_it(steps in proptest::collection::vec((0u64..8, 0u8..4, 0.0f32..100.0), 1..100)) {
            let mut ranking = Ranking::new(8);
            let mut model: Vec<(u64, f32)> = Vec::new();
            for (row, what, by) in steps {
                match what {
                    0 => {
                        ranking.remove(row);
                        model.retain(|entry| entry.0 != row);
                    }
                    1 => {
                        let next = ranking.next();
                        prop_assert_eq!(next.is_some(), !model.is_empty());
                        if let Some(next) = next {
                            let change = model.iter().find(|entry| entry.0 == next).expect("it was put in").1;
                            let most = model.iter().map(|entry| rank(entry.1)).max().unwrap();
                            prop_assert!(rank(change) == most || ranking.has_turn());
                            ranking.take(next);
                            model.retain(|entry| entry.0 != next);
                        }
                    }
                    _ => {
                        ranking.changed(row, by);
                        match model.iter_mut().find(|entry| entry.0 == row) {
                            Some(entry) => entry.1 += by,
                            None => model.push((row, by)),
                        }
                    }
                }
            }
            let mut all = ranking.drain();
            let mut expected: Vec<u64> = model.iter().map(|entry| entry.0).collect();
            all.sort_unstable();
            expected.sort_unstable();
            prop_assert_eq!(all, expected);
            prop_assert!(ranking.used.iter().all(|word| *word == 0));
        }
    }
}
