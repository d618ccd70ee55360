//! The cache of one table: slots, which workers read without locks and the server writes.
//!
//! A slot holds a row's image ([`row`](fervor_protocol::row)), which proves itself by its checksum. What a slot is
//! for is said by its *state word*:
//!
//! ```text
//! │ generation (29 bits) │ state (3 bits) │ row (32 bits) │
//! ```
//!
//! | state | image written by | read by |
//! |---|---|---|
//! | `Free` | nobody | nobody |
//! | `Local` | nobody | workers |
//! | `Writing` | the worker that put it there | nobody |
//! | `Subscribed` | the server | workers |
//! | `Asked` | the server, once | the worker that put it there |
//! | `Closing` | perhaps the server: WRITEs may be on their way | nobody |
//!
//! A reader loads the word, copies, and loads the word again: if it has not changed, the slot was for
//! that row all the time. The generation grows with each change, so a slot that was given away and came back
//! is told apart. A reader that loses takes it for a miss.
//!
//! Slots are given away under the mutex, by second chance ("clock"). A subscribed one is first unsubscribed, and
//! free only when the shard has said that nothing more is on its way (invariant 6).
//!
//! **What the shard is told has the order of what happened here.** A row that one worker has just given up may be
//! taken again by another at once, in another slot, and a slot that was just taken may be given up at once. So the
//! wishes are left for the shard while the mutex is still held: a subscription reaches it before the end of that
//! subscription, and the end of one before the next one of the same row.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
};

use fervor_protocol::{
    row::{Header, UNFILLED},
    wire::{PUSH_ONCE, SUBSCRIBE, UNSUBSCRIBE},
};
use fervor_verbs::Memory;
use zerocopy::IntoBytes;

/// What a slot is for. See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum State {
    Free = 0,
    Local = 1,
    Writing = 2,
    Subscribed = 3,
    Asked = 4,
    Closing = 5,
}

/// A slot's state word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word(u64);

impl Word {
    pub fn state(self) -> State {
        match self.0 >> 32 & 7 {
            0 => State::Free,
            1 => State::Local,
            2 => State::Writing,
            3 => State::Subscribed,
            4 => State::Asked,
            5 => State::Closing,
            state => unreachable!("no state {state} is ever stored"),
        }
    }

    pub fn row(self) -> u64 {
        self.0 & u64::from(u32::MAX)
    }

    fn next(self, state: State, row: u64) -> Self {
        Self(((self.0 >> 35).wrapping_add(1)) << 35 | (state as u64) << 32 | row)
    }
}

/// Number of a slot within its table's cache.
pub type Slot = u32;

/// What a call for a slot found.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// A new slot for the row, in the state asked for.
    New(Slot),
    /// The row has a slot.
    Present(Slot),
    /// There is none now: all are in use or on their way out, perhaps by this call.
    None,
}

#[derive(Debug)]
struct Free {
    slots: Vec<Slot>,
    hand: usize,
}

/// See the module.
#[derive(Debug)]
pub struct Cache {
    memory: Memory,
    base: usize,
    stride: usize,
    /// Per row, its slot plus one.
    index: Vec<AtomicU32>,
    words: Vec<AtomicU64>,
    /// Per slot: used since the hand passed. Kept only when there are fewer slots than rows.
    used: Vec<AtomicBool>,
    free: Mutex<Free>,
}

impl Cache {
    /// `slots` slots of `stride` bytes, from byte `base` of `memory`, for a table of `rows` rows.
    pub fn new(memory: Memory, base: usize, stride: usize, slots: usize, rows: u64) -> Self {
        let short = (slots as u64) < rows;
        Self {
            memory,
            base,
            stride,
            index: (0..rows).map(|_| AtomicU32::new(0)).collect(),
            words: (0..slots).map(|_| AtomicU64::new(0)).collect(),
            used: (0..if short { slots } else { 0 }).map(|_| AtomicBool::new(true)).collect(),
            free: Mutex::new(Free { slots: (0..slots as u32).rev().collect(), hand: 0 }),
        }
    }

    /// Byte offset of a slot in the client's region.
    pub fn offset(&self, slot: Slot) -> usize {
        self.base + slot as usize * self.stride
    }

    /// The slot of `row` and its word, if workers may read it.
    #[inline]
    pub fn find(&self, row: u64) -> Option<(Slot, Word)> {
        let slot = self.index[row as usize].load(Ordering::Acquire).checked_sub(1)?;
        let word = self.word(slot);
        let readable = matches!(word.state(), State::Local | State::Subscribed) && word.row() == row;
        readable.then_some((slot, word))
    }

    /// Whether `row` has a slot.
    pub fn holds(&self, row: u64) -> bool {
        self.index[row as usize].load(Ordering::Acquire) != 0
    }

    /// The state word of `slot`.
    pub fn word(&self, slot: Slot) -> Word {
        // SYNC POINT: pairs with the release in `set`: who sees the word sees the image that was made for it.
        Word(self.words[slot as usize].load(Ordering::Acquire))
    }

    /// Copies the image of `slot` out: the header, and the data into `data`. It may be torn.
    #[inline]
    pub fn copy(&self, slot: Slot, data: &mut [u8]) -> Header {
        let mut header = Header::default();
        let offset = self.offset(slot);
        self.memory.read(offset, header.as_mut_bytes());
        self.memory.read(offset + size_of::<Header>(), data);
        header
    }

    /// Whether the word of `slot` is still `word`, after its image was copied.
    #[inline]
    pub fn unchanged(&self, slot: Slot, word: Word) -> bool {
        // SYNC POINT: the loads of the copy are done before the word is loaded again.
        fence(Ordering::Acquire);
        if let Some(used) = self.used.get(slot as usize).filter(|used| !used.load(Ordering::Relaxed)) {
            used.store(true, Ordering::Relaxed);
        }
        self.words[slot as usize].load(Ordering::Relaxed) == word.0
    }

    /// Takes a slot for `row` in `state` (`Subscribed`, `Asked` or `Writing`), unfilled. `tell` leaves a wish for the
    /// shard of a row: what becomes of which slot. It is called under the mutex; see the module.
    pub fn take(&self, row: u64, state: State, mut tell: impl FnMut(Slot, u64, u32)) -> Taken {
        let mut free = self.lock();
        if let Some(slot) = self.index[row as usize].load(Ordering::Acquire).checked_sub(1) {
            return Taken::Present(slot);
        }
        let Some(slot) = free.slots.pop().or_else(|| self.evict(&mut free, &mut tell)) else {
            return Taken::None;
        };
        self.memory.write(self.offset(slot), UNFILLED.as_bytes());
        self.set(slot, self.word(slot).next(state, row));
        self.index[row as usize].store(slot + 1, Ordering::Release);
        match state {
            State::Subscribed => tell(slot, row, SUBSCRIBE),
            State::Asked => tell(slot, row, PUSH_ONCE),
            State::Free | State::Local | State::Writing | State::Closing => {}
        }
        Taken::New(slot)
    }

    /// Puts a copy that a worker has READ into the slot of `row`, or a new one: if that is possible at once.
    pub fn install(&self, row: u64, header: &Header, data: &[u8]) {
        // One writer: whoever changes the word to `Writing`.
        let no_wishes = |_, _, _| unreachable!("only tables that are not pushed are filled by READs");
        let slot = match self.take(row, State::Writing, no_wishes) {
            Taken::New(slot) => slot,
            Taken::Present(slot) if self.change(slot, row, State::Local, State::Writing) => slot,
            Taken::Present(_) | Taken::None => return,
        };
        self.memory.write(self.offset(slot), header.as_bytes());
        self.memory.write(self.offset(slot) + size_of::<Header>(), data);
        self.set(slot, self.word(slot).next(State::Local, row));
    }

    /// Changes the state of `slot`, if it is `from` and for `row`.
    fn change(&self, slot: Slot, row: u64, from: State, to: State) -> bool {
        let word = self.word(slot);
        let new = word.next(to, row);
        word.row() == row
            && word.state() == from
            && self.words[slot as usize]
                .compare_exchange(word.0, new.0, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
    }

    /// Takes the `Local` slot of `row` over for an answer of the server. `false`: it is in use.
    pub fn ask_again(&self, slot: Slot, row: u64) -> bool {
        let won = self.change(slot, row, State::Local, State::Asked);
        if won {
            self.memory.write(self.offset(slot), UNFILLED.as_bytes());
        }
        won
    }

    /// The answer has come: an `Asked` slot of this worker becomes `Local`.
    pub fn answered(&self, slot: Slot, row: u64) {
        self.set(slot, self.word(slot).next(State::Local, row));
    }

    /// Nothing more is on its way to a `Closing` slot: it is free.
    pub fn closed(&self, slot: Slot) {
        let mut free = self.lock();
        assert_eq!(self.word(slot).state(), State::Closing);
        self.set(slot, self.word(slot).next(State::Free, 0));
        free.slots.push(slot);
    }

    fn set(&self, slot: Slot, word: Word) {
        // SYNC POINT: releases the image and whatever else was done for this state.
        self.words[slot as usize].store(word.0, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Second chance: the first slot that was not used since the hand passed. Local ones can be had at once; of
    /// subscribed ones a few are given up, so that some become free before long.
    fn evict(&self, free: &mut Free, tell: &mut impl FnMut(Slot, u64, u32)) -> Option<Slot> {
        let mut closing = 0;
        let enough = (self.words.len() / 16).clamp(1, 64);
        for _ in 0..self.words.len() * 2 {
            let slot = free.hand as Slot;
            free.hand = (free.hand + 1) % self.words.len();
            if self.used.get(slot as usize).is_some_and(|used| used.swap(false, Ordering::Relaxed)) {
                continue;
            }
            let word = self.word(slot);
            let next = match word.state() {
                State::Local => State::Free,
                State::Subscribed => State::Closing,
                State::Free | State::Writing | State::Asked | State::Closing => continue,
            };
            let given_up = word.next(next, word.row());
            let won = self.words[slot as usize].compare_exchange(
                word.0,
                given_up.0,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            if won.is_err() {
                continue;
            }
            self.index[word.row() as usize].store(0, Ordering::Release);
            if next == State::Free {
                return Some(slot);
            }
            tell(slot, word.row(), UNSUBSCRIBE);
            closing += 1;
            if closing == enough {
                break;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::lock;

    struct Enough<'a>(&'a AtomicBool);

    impl Drop for Enough<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    fn cache(slots: usize, rows: u64) -> Cache {
        Cache::new(Memory::new("test", slots * 64).unwrap(), 0, 64, slots, rows)
    }

    #[test]
    fn a_subscribed_slot_is_not_free_before_it_is_closed() {
        let cache = cache(2, 10);
        let wishes = Mutex::new(Vec::new());
        let take = |row| {
            let taken =
                cache.take(row, State::Subscribed, |slot, row, wish| lock(&wishes).push((slot, row, wish)));
            (taken, lock(&wishes).drain(..).collect::<Vec<_>>())
        };
        assert_eq!(take(1), (Taken::New(0), vec![(0, 1, SUBSCRIBE)]));
        assert_eq!(take(1), (Taken::Present(0), vec![]));
        assert_eq!(take(2), (Taken::New(1), vec![(1, 2, SUBSCRIBE)]));
        let (slot, word) = cache.find(1).unwrap();
        assert_eq!(take(3), (Taken::None, vec![(0, 1, UNSUBSCRIBE)]), "a slot to give up");
        assert!(!cache.unchanged(slot, word), "a reader of the slot notices");
        assert_eq!((cache.find(1), cache.holds(1)), (None, false));
        assert_eq!(take(3), (Taken::None, vec![(1, 2, UNSUBSCRIBE)]), "the other slot");
        assert_eq!(take(3), (Taken::None, vec![]));
        cache.closed(1);
        assert_eq!(take(3), (Taken::New(1), vec![(1, 3, SUBSCRIBE)]));
    }

    /// Workers that take slots from each other, and a shard that closes what they give up: its view of a slot, as the
    /// wishes tell it one after the other, never contradicts itself.
    #[test]
    fn the_shard_is_told_in_the_order_of_what_happened() {
        const ROWS: u64 = 12;
        let cache = cache(8, ROWS);
        let wishes = Mutex::new(Vec::new());
        let enough = AtomicBool::new(false);
        let take = |worker: u64| {
            let mut random = worker;
            while !enough.load(Ordering::Relaxed) {
                random =
                    random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let row = (random >> 33) % ROWS;
                let tell = |slot, row, wish| lock(&wishes).push((slot, row, wish));
                if cache.take(row, State::Subscribed, tell) == Taken::None {
                    std::thread::yield_now();
                }
            }
        };
        let mut held: [Option<u64>; 8] = [None; 8];
        let mut taken = 0;
        std::thread::scope(|scope| {
            for worker in [1, 2, 3] {
                let take = &take;
                scope.spawn(move || take(worker));
            }
            // The others end with the test, however it ends.
            let _enough = Enough(&enough);
            while taken < 5000 {
                let told = std::mem::take(&mut *lock(&wishes));
                for (slot, row, wish) in told {
                    let before = held[slot as usize];
                    match wish {
                        SUBSCRIBE => {
                            assert_eq!(before, None, "slot {slot} is taken for row {row}");
                            assert!(!held.contains(&Some(row)), "row {row} is subscribed already");
                            held[slot as usize] = Some(row);
                            taken += 1;
                        }
                        _ => {
                            assert_eq!((wish, before), (UNSUBSCRIBE, Some(row)), "slot {slot} is given up");
                            held[slot as usize] = None;
                            cache.closed(slot);
                        }
                    }
                }
            }
        });
    }

    #[test]
    fn local_copies_are_replaced_at_once_the_unused_first() {
        let cache = cache(2, 10);
        for row in [1, 2] {
            cache.install(row, &Header { lsn: row, ..Header::default() }, &[row as u8; 32]);
        }
        // Both have their second chance used up; then row 1 is used again.
        cache.used.iter().for_each(|used| used.store(false, Ordering::Relaxed));
        let (slot, word) = cache.find(1).unwrap();
        let mut data = [0; 32];
        assert_eq!((cache.copy(slot, &mut data).lsn, data), (1, [1; 32]));
        assert!(cache.unchanged(slot, word));
        cache.install(3, &Header::default(), &[3; 32]);
        assert_eq!([1, 2, 3].map(|row| cache.find(row).is_some()), [true, false, true]);
    }
}
