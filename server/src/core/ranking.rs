//! Which images of a table to push next, when the table is pushed between rounds: the most changed first,
//! within a budget.
//!
//! A table may ask for that under two models. Under ESSP it leaves less for the rounds to push, and makes
//! copies fresher than the model asks. Under Async it is the only pushing. Bösen (Wei et al., SoCC 2015)
//! sends the most changed rows first when bandwidth is to spare; this is the same for pushes.
//!
//! **What is pushed.** An image that has changed since it was last pushed is *ranked*. Its rank comes from a
//! sum: the greatest elements of its updates since then, added up. The sum bounds how far any element of a
//! copy is off. Ranks are powers of two. Among images of equal rank, the one that has waited longest goes
//! first. Every [`TURN`]th push takes the next rank in turn, whichever it is. So images that change much
//! cannot keep the others from ever being pushed.
//!
//! **When.** The poller pushes a few images each turn, after the turn's other work, while the budget lasts.
//! It pushes an image only if all who hold it can take it at once. So nothing is owed for these pushes, and a
//! round never waits for more than its own images. What could not be pushed stays ranked.
//!
//! **Why it is right.** Such a push is the push of a round at another time. A ranked image is a dirty one.
//! When the clock rises, the round pushes it before it closes. If a continuous push has made an image clean,
//! that push was posted to all who hold the image, on the connections on which the round is closed later.
//! (There is no round of an Async table. What its copies contain is known from their LSNs.)
//!
//! **Cost.** An update costs one more look at its values. If the rank of its image changes, it also costs a
//! few changes of links. Nothing is allocated.

use std::time::Duration;

/// So many ranks there are: one for each exponent of an `f32`.
const RANKS: usize = 256;
/// Every so many pushes one is not of the highest rank.
const TURN: u32 = 8;
/// What has not been spent is kept for so long.
const SAVED: Duration = Duration::from_millis(1);
/// No image.
const NONE: u32 = u32::MAX;
/// The change of an image that is not ranked. Ranked ones have changed by something: by [`LEAST`], if they have not.
const CLEAN: f32 = 0.0;
const LEAST: f32 = f32::MIN_POSITIVE;

/// A list of images of one rank.
#[derive(Debug, Clone, Copy)]
struct List {
    first: u32,
    last: u32,
}

/// The images before and after one in its list.
type Links = [u32; 2];

/// The changed images of a table, by how much they have changed.
#[derive(Debug)]
struct Ranking {
    /// Per image, how much it has changed; [`CLEAN`] if it is not ranked.
    changes: Vec<f32>,
    /// Per image, its neighbours in the list of its rank, if it is in one.
    links: Vec<Links>,
    ranks: [List; RANKS],
    /// The ranks that have images.
    used: [u64; RANKS / 64],
    /// Images taken so far, and the rank whose turn came last.
    taken: u32,
    turn: usize,
}

impl Ranking {
    /// Of `images` images, fewer than 2^32 - 1.
    fn new(images: u64) -> Self {
        assert!(images < u64::from(NONE), "{images} images cannot be linked");
        let none = List { first: NONE, last: NONE };
        Self {
            // Zeroed memory, both: what no image touches costs nothing, and no time.
            changes: vec![CLEAN; images as usize],
            links: vec![[0; 2]; images as usize],
            ranks: [none; RANKS],
            used: [0; RANKS / 64],
            taken: 0,
            turn: 0,
        }
    }

    /// `image` has changed by `by`, which is not negative.
    fn changed(&mut self, image: u64, by: f32) {
        let image = image as u32;
        let before = self.changes[image as usize];
        let ranked = before != CLEAN;
        let change = (before + by).max(LEAST);
        if !ranked || rank(before) != rank(change) {
            if ranked {
                self.unlink(image);
            }
            self.link(image, rank(change));
        }
        self.changes[image as usize] = change;
    }

    /// `image` is no longer ranked.
    fn remove(&mut self, image: u64) {
        if self.changes[image as usize] != CLEAN {
            self.unlink(image as u32);
            self.changes[image as usize] = CLEAN;
        }
    }

    /// The image to push next.
    fn next(&self) -> Option<u64> {
        let rank = if self.has_turn() { self.rank_in_turn() } else { self.highest(RANKS) }?;
        Some(self.ranks[rank].first.into())
    }

    /// Takes the image that [`Ranking::next`] gave.
    fn take(&mut self, image: u64) {
        if self.has_turn() {
            self.turn = rank(self.changes[image as usize]);
        }
        self.taken = self.taken.wrapping_add(1);
        self.remove(image);
    }

    fn has_turn(&self) -> bool {
        self.taken % TURN == TURN - 1
    }

    /// The next rank below the one whose turn came last, round and round.
    fn rank_in_turn(&self) -> Option<usize> {
        self.highest(self.turn).or_else(|| self.highest(RANKS))
    }

    /// The highest rank below `below` that has images.
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

    fn link(&mut self, image: u32, rank: usize) {
        let last = self.ranks[rank].last;
        self.links[image as usize] = [last, NONE];
        match last {
            NONE => {
                self.ranks[rank].first = image;
                self.used[rank / 64] |= 1 << (rank % 64);
            }
            last => self.links[last as usize][1] = image,
        }
        self.ranks[rank].last = image;
    }

    fn unlink(&mut self, image: u32) {
        let rank = rank(self.changes[image as usize]);
        let [before, after] = self.links[image as usize];
        match before {
            NONE => self.ranks[rank].first = after,
            before => self.links[before as usize][1] = after,
        }
        match after {
            NONE => self.ranks[rank].last = before,
            after => self.links[after as usize][0] = before,
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

/// What a table may push now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// This image.
    Image(u64),
    /// Nothing before this moment, by its budget.
    At(Duration),
    /// Nothing has changed.
    Nothing,
}

/// What is pushed of one table between rounds. See the module.
#[derive(Debug)]
pub struct Continuous {
    ranking: Ranking,
    budget: Budget,
}

impl Continuous {
    /// Of a table of `images` images, at `rate` bytes per second.
    pub fn new(images: u64, rate: u64) -> Self {
        Self { ranking: Ranking::new(images), budget: Budget { rate, free: Duration::ZERO } }
    }

    /// Bytes that it takes.
    pub fn bytes(images: u64) -> usize {
        size_of::<Self>() + images as usize * (size_of::<f32>() + size_of::<Links>())
    }

    /// `image` has changed by `by`, which is not negative.
    pub fn changed(&mut self, image: u64, by: f32) {
        self.ranking.changed(image, by);
    }

    /// `image` is clean.
    pub fn remove(&mut self, image: u64) {
        self.ranking.remove(image);
    }

    /// What may be pushed now.
    pub fn next(&self, now: Duration) -> Next {
        match self.ranking.next() {
            Some(_) if now < self.budget.free => Next::At(self.budget.free),
            Some(image) => Next::Image(image),
            None => Next::Nothing,
        }
    }

    /// `bytes` bytes are pushed of the image that [`Continuous::next`] gave.
    pub fn take(&mut self, image: u64, now: Duration, bytes: usize) {
        self.ranking.take(image);
        self.budget.spend(now, bytes);
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
        assert_eq!(take(&mut ranking, 9), [5, 2]);
        assert_eq!(take(&mut ranking, 9), []);
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
            let mut all = take(&mut ranking, 9);
            let mut expected: Vec<u64> = model.iter().map(|entry| entry.0).collect();
            all.sort_unstable();
            expected.sort_unstable();
            prop_assert_eq!(all, expected);
            prop_assert!(ranking.used.iter().all(|word| *word == 0));
        }
    }
}
