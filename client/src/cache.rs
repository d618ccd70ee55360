//! The cache of one table's part in one shard: slots, which workers read without locks and the server writes.
//!
//! A slot holds an [image](fervor_protocol::row), and the image's checksum shows whether it is whole. A
//! slot's *state word* says what the slot is used for:
//!
//! ```text
//! │ generation (29 bits) │ state (3 bits) │ image (32 bits) │
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
//! **How a worker reads.** It loads the word, copies the image, and loads the word again. If the word has not
//! changed, the slot was for that image all the time. Each change of the word raises the generation. So the
//! reader also notices a slot that was given away and came back. If the word has changed, the reader treats
//! it as a miss.
//!
//! **Where an image may be.** An image may be in any of the [`WAYS`] slots of its *set*. The words of a set
//! lie on one cache line, and finding an image means comparing them. No index is needed, and memory grows
//! with the number of slots, not of rows. If the cache has a slot for each image, each set has one slot.
//!
//! **How slots are given away.** This happens under the mutex, by second chance ("clock") within the set. A
//! subscribed slot is first unsubscribed. It is free only when the shard has said that nothing more is on its
//! way (invariant 6).
//!
//! **The shard hears of changes in the order in which they happened here.** One worker may give up a row that
//! another takes again at once, in another slot. A worker may also give up a slot that was just taken. So a
//! worker leaves its wishes for the shard while it still holds the mutex. Therefore the shard hears of a
//! subscription before the end of that subscription. It hears of that end before the next subscription of the
//! same image.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering, fence},
};

use fervor_protocol::{
    limits::ROW_HEADER,
    mutants::{Mutant, mutant},
    row::{Header, UNFILLED},
    wire::{PUSH_ONCE, SUBSCRIBE, UNSUBSCRIBE},
};
use fervor_verbs::Memory;
use zerocopy::IntoBytes;

/// Slots of a set.
pub const WAYS: usize = 8;

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

    pub fn image(self) -> u64 {
        self.0 & u64::from(u32::MAX)
    }

    /// Whether it is for `image`: neither free nor on its way out.
    fn holds(self, image: u64) -> bool {
        self.image() == image && !matches!(self.state(), State::Free | State::Closing)
    }

    fn next(self, state: State, image: u64) -> Self {
        Self(((self.0 >> 35).wrapping_add(1)) << 35 | (state as u64) << 32 | image)
    }
}

/// Number of a slot within its table's cache.
pub type Slot = u32;

/// What a call for a slot found.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// A new slot for the image, in the state asked for.
    New(Slot),
    /// The image has a slot.
    Present(Slot),
    /// There is none now: all that it may have are in use or on their way out, perhaps by this call.
    None,
}

/// What is known of an image that a worker put into its slot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stamp {
    /// The clock for which it is good.
    pub clock: u64,
    /// It contains this client's batches up to this LSN.
    pub as_of: u64,
}

/// All that is known of a slot besides its image.
#[derive(Debug, Default)]
struct Record {
    clock: AtomicU64,
    as_of: AtomicU64,
    /// Used since the hand passed.
    used: AtomicBool,
}

/// The words of a set, on one cache line.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Words([AtomicU64; WAYS]);

/// See the module.
#[derive(Debug)]
pub struct Cache {
    memory: Memory,
    base: usize,
    stride: usize,
    ways: usize,
    sets: u64,
    words: Vec<Words>,
    records: Vec<Record>,
    /// Where the hand is in each set, if there are fewer slots than images.
    hands: Mutex<Vec<u8>>,
}

impl Cache {
    /// How many of at most `slots` slots a cache for `images` images uses.
    pub fn fit(slots: usize, images: u64) -> usize {
        let all = usize::try_from(images).unwrap_or(usize::MAX);
        if slots >= all {
            all
        } else if slots < WAYS {
            slots
        } else {
            slots / WAYS * WAYS
        }
    }

    /// `slots` slots of `stride` bytes, as [`Cache::fit`] says, from byte `base` of `memory`, for `images` images.
    pub fn new(memory: Memory, base: usize, stride: usize, slots: usize, images: u64) -> Self {
        let ways = if slots as u64 >= images { 1 } else { WAYS.min(slots) };
        let sets = (slots / ways) as u64;
        Self {
            memory,
            base,
            stride,
            ways,
            sets,
            words: (0..slots.div_ceil(WAYS)).map(|_| Words::default()).collect(),
            records: (0..slots).map(|_| Record::default()).collect(),
            hands: Mutex::new(vec![0; if ways > 1 { sets as usize } else { 0 }]),
        }
    }

    /// Byte offset of a slot in the client's region.
    #[inline]
    pub fn offset(&self, slot: Slot) -> usize {
        self.base + slot as usize * self.stride
    }

    /// The slots that `image` may have.
    #[inline]
    fn set(&self, image: u64) -> std::ops::Range<Slot> {
        let set = if self.ways == 1 {
            image
        } else {
            // Fibonacci hashing: neighbours are spread.
            let hash = u128::from(image.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            ((hash * u128::from(self.sets)) >> 64) as u64
        };
        let first = set as u32 * self.ways as u32;
        first..first + self.ways as u32
    }

    #[inline]
    fn atomic(&self, slot: Slot) -> &AtomicU64 {
        &self.words[slot as usize / WAYS].0[slot as usize % WAYS]
    }

    /// The slot of `image` and its word, if workers may read it.
    #[inline]
    pub fn find(&self, image: u64) -> Option<(Slot, Word)> {
        self.set(image).find_map(|slot| {
            let word = self.word(slot);
            let readable = word.image() == image && matches!(word.state(), State::Local | State::Subscribed);
            readable.then_some((slot, word))
        })
    }

    /// The state word of `slot`.
    #[inline]
    pub fn word(&self, slot: Slot) -> Word {
        // SYNC POINT: pairs with the release in `put`: who sees the word sees the image that was made for it.
        Word(self.atomic(slot).load(Ordering::Acquire))
    }

    /// Copies the image of `slot` out: the header, and the data into `data`. It may be torn.
    #[inline]
    pub fn copy(&self, slot: Slot, data: &mut [u8]) -> Header {
        let mut header = Header::default();
        let offset = self.offset(slot);
        self.memory.read(offset, header.as_mut_bytes());
        self.memory.read(offset + ROW_HEADER, data);
        header
    }

    /// What the worker that put the image of `slot` there, or asked for it, said of it.
    #[inline]
    pub fn stamp(&self, slot: Slot) -> Stamp {
        let record = &self.records[slot as usize];
        Stamp { clock: record.clock.load(Ordering::Relaxed), as_of: record.as_of.load(Ordering::Relaxed) }
    }

    fn set_stamp(&self, slot: Slot, stamp: Stamp) {
        let record = &self.records[slot as usize];
        record.clock.store(stamp.clock, Ordering::Relaxed);
        record.as_of.store(stamp.as_of, Ordering::Relaxed);
    }

    /// Whether the word of `slot` is still `word`, after its image was copied.
    #[inline]
    pub fn unchanged(&self, slot: Slot, word: Word) -> bool {
        // SYNC POINT: the loads of the copy are done before the word is loaded again.
        fence(Ordering::Acquire);
        let used = &self.records[slot as usize].used;
        if self.ways > 1 && !used.load(Ordering::Relaxed) {
            used.store(true, Ordering::Relaxed);
        }
        self.atomic(slot).load(Ordering::Relaxed) == word.0 || mutant(Mutant::GenerationIgnored)
    }

    /// Takes a slot for `image` in `state` (`Subscribed`, `Asked` or `Writing`), unfilled. `tell` leaves a wish for the
    /// shard: what becomes of which slot. It is called under the mutex; see the module.
    pub fn take(
        &self,
        image: u64,
        state: State,
        stamp: Stamp,
        mut tell: impl FnMut(Slot, u64, u32),
    ) -> Taken {
        let mut hands = self.lock();
        let set = self.set(image);
        if let Some(slot) = set.clone().find(|slot| self.word(*slot).holds(image)) {
            return Taken::Present(slot);
        }
        let free = set.clone().find(|slot| self.word(*slot).state() == State::Free);
        let Some(slot) = free.or_else(|| self.evict(&mut hands, set, &mut tell)) else {
            return Taken::None;
        };
        if !mutant(Mutant::SlotNotCleared) {
            self.memory.write(self.offset(slot), UNFILLED.as_bytes());
        }
        self.set_stamp(slot, stamp);
        self.put(slot, self.word(slot).next(state, image));
        match state {
            State::Subscribed => tell(slot, image, SUBSCRIBE),
            State::Asked => tell(slot, image, PUSH_ONCE),
            State::Free | State::Local | State::Writing | State::Closing => {}
        }
        Taken::New(slot)
    }

    /// Puts an image that a worker has READ into its slot, or a new one: if that is possible at once.
    pub fn install(&self, image: u64, header: &Header, data: &[u8], stamp: Stamp) {
        // One writer: whoever changes the word to `Writing`.
        let no_wishes = |_, _, _| unreachable!("only tables that are not pushed are filled by READs");
        let slot = match self.take(image, State::Writing, stamp, no_wishes) {
            Taken::New(slot) => slot,
            Taken::Present(slot) if self.change(slot, image, State::Local, State::Writing) => slot,
            Taken::Present(_) | Taken::None => return,
        };
        self.set_stamp(slot, stamp);
        self.memory.write(self.offset(slot), header.as_bytes());
        self.memory.write(self.offset(slot) + ROW_HEADER, data);
        self.put(slot, self.word(slot).next(State::Local, image));
    }

    /// Changes the state of `slot`, if it is `from` and for `image`.
    fn change(&self, slot: Slot, image: u64, from: State, to: State) -> bool {
        let word = self.word(slot);
        let new = word.next(to, image);
        word.image() == image
            && word.state() == from
            && self.atomic(slot).compare_exchange(word.0, new.0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Takes the `Local` slot of `image` over for an answer of the server. `false`: it is in use.
    pub fn ask_again(&self, slot: Slot, image: u64, stamp: Stamp) -> bool {
        let won = self.change(slot, image, State::Local, State::Asked);
        if won {
            self.set_stamp(slot, stamp);
            self.memory.write(self.offset(slot), UNFILLED.as_bytes());
        }
        won
    }

    /// The answer has come: an `Asked` slot of this worker becomes `Local`.
    pub fn answered(&self, slot: Slot, image: u64) {
        self.put(slot, self.word(slot).next(State::Local, image));
    }

    /// The answer to an `Asked` slot of this worker may be lost: gives the slot up. `tell` as in [`Cache::take`].
    pub fn give_up(&self, slot: Slot, image: u64, mut tell: impl FnMut(Slot, u64, u32)) {
        let _hands = self.lock();
        self.put(slot, self.word(slot).next(State::Closing, image));
        tell(slot, image, UNSUBSCRIBE);
    }

    /// Nothing more is on its way to a `Closing` slot: it is free.
    pub fn closed(&self, slot: Slot) {
        let _hands = self.lock();
        assert_eq!(self.word(slot).state(), State::Closing);
        self.put(slot, self.word(slot).next(State::Free, 0));
    }

    fn put(&self, slot: Slot, word: Word) {
        // SYNC POINT: releases the image and whatever else was done for this state.
        self.atomic(slot).store(word.0, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.hands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Second chance: the first slot of the set that was not used since the hand passed. A local one can be had at once; a
    /// subscribed one is given up, so that it becomes free before long.
    fn evict(
        &self,
        hands: &mut [u8],
        set: std::ops::Range<Slot>,
        tell: &mut impl FnMut(Slot, u64, u32),
    ) -> Option<Slot> {
        let hand = hands.get_mut(set.start as usize / self.ways)?;
        // One that is on its way out is enough for the next caller.
        if set.clone().any(|slot| self.word(slot).state() == State::Closing) {
            return None;
        }
        for _ in 0..self.ways * 2 {
            let slot = set.start + u32::from(*hand);
            *hand = (*hand + 1) % self.ways as u8;
            if self.records[slot as usize].used.swap(false, Ordering::Relaxed) {
                continue;
            }
            let word = self.word(slot);
            let next = match word.state() {
                State::Local => State::Free,
                State::Subscribed => State::Closing,
                State::Free | State::Writing | State::Asked | State::Closing => continue,
            };
            let given_up = word.next(next, word.image());
            let won =
                self.atomic(slot).compare_exchange(word.0, given_up.0, Ordering::AcqRel, Ordering::Relaxed);
            if won.is_err() {
                continue;
            }
            if next == State::Free {
                return Some(slot);
            }
            tell(slot, word.image(), UNSUBSCRIBE);
            return None;
        }
        None
    }
}

#[cfg(test)]
mod tests;
