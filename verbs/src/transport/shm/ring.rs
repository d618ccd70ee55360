//! The byte ring that carries SENDs and immediates: one per direction of a connection.
//!
//! One producer (the sender's posting thread) and one consumer (the receiver's polling thread), in two
//! processes. The file is a header page and `capacity` bytes of records, `capacity` a power of two. The
//! indices count bytes since the beginning and never wrap; a record lies at `index % capacity`.
//!
//! | word | written by | read by |
//! |---|---|---|
//! | `TAIL` | producer, after the record's bytes (release) | consumer, before them (acquire) |
//! | `HEAD` | consumer, after it has copied the record out (release) | producer, before it overwrites (acquire) |
//! | `WANTED` | producer: 1 when it found no room; consumer: 0 | consumer: if 1, it rings the producer |
//!
//! Two more words are the [`super::gate`] of the producer's WRITEs, which do not go through the ring.
//!
//! A record is a header of two words (length and kind, immediate) and the payload, filled up to 16 bytes, so
//! that a header never wraps; a payload may.
//!
//! **Neither side trusts the other.** What is read from the ring only ever bounds a copy after it has been
//! checked: the producer's `TAIL` lies in `[head, head + capacity]`, the consumer's `HEAD` in `[head seen
//! before, tail]`, both are whole records; a record's length fits what is published. Anything else is
//! [`Corrupt`] and ends the connection.

use std::{
    cell::Cell,
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering},
};

use super::{
    gate,
    mapping::{Mapping, PAGE},
    wire::MAX_RECEIVE_SIZE,
};
use crate::{
    error::Error,
    memory::{atomic::Word, copy::to_shared},
};

const TAIL: usize = 0;
// Two cache lines apart: processors fetch lines in pairs.
const HEAD: usize = 128;
const WANTED: usize = 136;
// The gate of the producer's WRITEs: one word beside the producer's, one on a line that seldom changes.
const WRITING: usize = 8;
const SHUT: usize = 256;

/// Records begin at multiples of this, and headers are this long.
const ALIGN: u64 = 16;

/// Smallest and (unless two of the longest messages need more) greatest capacity, bytes. What is copied in and out
/// soon is still in a processor's cache: a larger ring is a slower one.
const LEAST: u64 = 64 << 10;
const MOST: u64 = 1 << 20;

/// Capacity of the greatest ring: for two of the longest messages that any receiver takes.
const GREATEST: u64 = (2 * (MAX_RECEIVE_SIZE + ALIGN)).next_power_of_two();
const _: () = assert!(GREATEST == 16 << 20 && MAX_RECEIVE_SIZE.is_multiple_of(ALIGN) && MOST <= GREATEST);

/// The peer wrote something that the protocol does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the ring has a wrong size, or impossible indices or records")]
pub(super) struct Corrupt;

/// Bytes that a message of `length` bytes takes.
pub(super) fn record_size(length: u64) -> u64 {
    ALIGN + length.next_multiple_of(ALIGN)
}

/// Capacity of a ring in which `messages` messages of `length` bytes should fit: between the bounds above,
/// but room for two of the longest in any case. Both sides of a connection compute it from what they told each other, so
/// that a ring of another size is refused before it is mapped. At most [`GREATEST`].
pub(super) fn capacity(messages: u64, length: u64) -> u64 {
    let record = record_size(length);
    messages.saturating_mul(record).clamp(LEAST, MOST).max(2 * record).next_power_of_two()
}

/// Bytes of the file of a ring of this capacity.
pub(super) fn file_size(capacity: u64) -> usize {
    PAGE + capacity as usize
}

/// Makes a ring of this capacity, a power of two, and the file to pass to the peer.
pub(super) fn create(capacity: u64) -> Result<(Arc<Mapping>, OwnedFd), Error> {
    Mapping::create("fervor-ring", file_size(capacity))
}

/// The producer's side of the index protocol.
#[derive(Debug)]
pub(super) struct Producer {
    capacity: u64,
    tail: u64,
    /// The latest `HEAD` seen.
    head: Cell<u64>,
}

impl Producer {
    pub(super) fn new(capacity: u64) -> Self {
        Self { capacity, tail: 0, head: Cell::new(0) }
    }

    fn free(&self) -> u64 {
        // No overflow: `head <= tail <= head + capacity` always.
        self.capacity - (self.tail - self.head.get())
    }

    fn fits(&self, size: u64) -> bool {
        size <= self.free()
    }

    fn refresh(&self, head: &impl Word) -> Result<(), Corrupt> {
        // SYNC POINT: acquires what the consumer released in `Consumer::advance`: it has copied out all
        // before `head`, so those bytes may be overwritten.
        let seen = head.load(Ordering::Acquire);
        if seen < self.head.get() || seen > self.tail || !seen.is_multiple_of(ALIGN) {
            return Err(Corrupt);
        }
        self.head.set(seen);
        Ok(())
    }

    /// How many records of `size` bytes, up to `most`, can be reserved for sure.
    pub(super) fn room(&self, head: &impl Word, size: u64, most: u64) -> u64 {
        if self.free() / size < most {
            // A head that cannot be is found when the next record is reserved.
            let _ = self.refresh(head);
        }
        most.min(self.free() / size)
    }

    /// Where to write a record of `size` bytes, or `None` when there is no room; the consumer will then say
    /// when there is ([`Consumer::pay`]).
    pub(super) fn reserve(
        &mut self,
        head: &impl Word,
        wanted: &impl Word,
        size: u64,
    ) -> Result<Option<u64>, Corrupt> {
        if !self.fits(size) {
            self.refresh(head)?;
            if !self.fits(size) {
                // SYNC POINT: this swap and that of `pay` are ordered. If ours is first, the other sees 1 and
                // rings. If it is second it acquires the other's, and the look at `HEAD` below sees the room.
                wanted.swap(1, Ordering::AcqRel);
                self.refresh(head)?;
            }
        }
        Ok(self.fits(size).then_some(self.tail))
    }

    /// Hands over the record of `size` bytes at the place reserved.
    pub(super) fn publish(&mut self, tail: &impl Word, size: u64) {
        self.tail += size;
        // SYNC POINT: releases the record's bytes, and the WRITEs posted before, to `Consumer::available`.
        tail.store(self.tail, Ordering::Release);
    }
}

/// The consumer's side of the index protocol.
#[derive(Debug)]
pub(super) struct Consumer {
    capacity: u64,
    head: u64,
    /// The latest `TAIL` seen.
    tail: u64,
}

impl Consumer {
    pub(super) fn new(capacity: u64) -> Self {
        Self { capacity, head: 0, tail: 0 }
    }

    /// Where the next record begins.
    #[cfg(all(test, loom))]
    pub(super) fn head(&self) -> u64 {
        self.head
    }

    /// Bytes published and not consumed.
    pub(super) fn available(&mut self, tail: &impl Word) -> Result<u64, Corrupt> {
        // SYNC POINT: acquires what the producer released in `Producer::publish`.
        let seen = tail.load(Ordering::Acquire);
        // `wrapping_sub`: a tail before the head is a huge distance, and refused as such.
        let distance = seen.wrapping_sub(self.head);
        if distance > self.capacity || !seen.is_multiple_of(ALIGN) {
            return Err(Corrupt);
        }
        self.tail = seen;
        Ok(distance)
    }

    /// Gives back the `size` bytes at the head.
    pub(super) fn advance(&mut self, head: &impl Word, size: u64) {
        self.head += size;
        // SYNC POINT: releases the bytes, copied out, to `Producer::refresh`.
        head.store(self.head, Ordering::Release);
    }

    /// After some `advance`: whether the producer waits for room and is to be rung.
    pub(super) fn pay(&self, wanted: &impl Word) -> bool {
        // SYNC POINT: see `Producer::reserve`.
        wanted.swap(0, Ordering::AcqRel) == 1
    }
}

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Send,
    SendImmediate,
    WriteImmediate,
}

impl Kind {
    fn code(self) -> u64 {
        match self {
            Kind::Send => 1,
            Kind::SendImmediate => 2,
            Kind::WriteImmediate => 3,
        }
    }

    fn from_code(code: u64) -> Result<Self, Corrupt> {
        [Kind::Send, Kind::SendImmediate, Kind::WriteImmediate]
            .into_iter()
            .find(|kind| kind.code() == code)
            .ok_or(Corrupt)
    }
}

/// A ring, seen from its file: checked when it is made.
fn ring_capacity(file: &Mapping) -> Result<u64, Corrupt> {
    let capacity = file.len().saturating_sub(PAGE) as u64;
    if capacity.is_power_of_two() && capacity >= ALIGN { Ok(capacity) } else { Err(Corrupt) }
}

/// The sender's end of a ring.
#[derive(Debug)]
pub(super) struct Outbox {
    file: Arc<Mapping>,
    indices: Producer,
}

impl Outbox {
    pub(super) fn new(file: Arc<Mapping>) -> Result<Self, Corrupt> {
        let capacity = ring_capacity(&file)?;
        Ok(Self { file, indices: Producer::new(capacity) })
    }

    /// Asks the receiver for leave to WRITE its memory: until [`leave`](Self::leave), if it is granted.
    #[inline]
    pub(super) fn enter(&self) -> bool {
        gate::enter(self.file.word(WRITING), self.file.word(SHUT))
    }

    /// The WRITE is done.
    #[inline]
    pub(super) fn leave(&self) {
        gate::leave(self.file.word(WRITING));
    }

    #[cfg(test)]
    pub(super) fn poison(&self, offset: usize, value: u64) {
        self.file.word(offset).store(value, Ordering::Release);
    }

    /// Whether a message of `length` bytes has room now; if not, the receiver will ring when it has.
    #[inline]
    pub(super) fn reserve(&mut self, length: u64) -> Result<bool, Corrupt> {
        let (head, wanted) = (self.file.word(HEAD), self.file.word(WANTED));
        Ok(self.indices.reserve(head, wanted, record_size(length))?.is_some())
    }

    /// How many messages of `length` bytes, up to `most`, have room now.
    #[inline]
    pub(super) fn room(&self, length: u64, most: u64) -> u64 {
        self.indices.room(self.file.word(HEAD), record_size(length), most)
    }

    /// Copies `len` bytes of the payload to place `at` within the payload of the record reserved.
    ///
    /// # Safety
    /// `from` is readable for `len` bytes and no part of a ring; [`reserve`](Self::reserve) has just said
    /// `true` for a message of at least `at + len` bytes.
    #[inline]
    pub(super) unsafe fn fill(&self, at: u64, from: *const u8, len: usize) {
        let start = ((self.indices.tail + ALIGN + at) & (self.indices.capacity - 1)) as usize;
        let first = len.min(self.indices.capacity as usize - start);
        self.file.check(PAGE + start, first);
        self.file.check(PAGE, len - first);
        // SAFETY: the two targets lie inside the file (`check`ed), which cannot shrink; the sources are the
        // two parts of what the caller vouches for. The consumer does not read here before `publish`; a
        // peer that does all the same gets torn bytes.
        unsafe {
            to_shared(from, self.file.as_ptr().add(PAGE + start), first);
            to_shared(from.add(first), self.file.as_ptr().add(PAGE), len - first);
        }
    }

    /// Writes the header of the record reserved and hands the record to the receiver.
    #[inline]
    pub(super) fn publish(&mut self, kind: Kind, length: u32, immediate: u32) {
        let start = PAGE + (self.indices.tail & (self.indices.capacity - 1)) as usize;
        self.file.word(start).store(u64::from(length) | kind.code() << 32, Ordering::Relaxed);
        self.file.word(start + 8).store(u64::from(immediate), Ordering::Relaxed);
        self.indices.publish(self.file.word(TAIL), record_size(u64::from(length)));
    }
}

/// The header of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) length: u32,
    pub(super) immediate: u32,
}

/// The receiver's end of a ring.
#[derive(Debug)]
pub(super) struct Inbox {
    file: Arc<Mapping>,
    indices: Consumer,
    /// Records from here on are not taken any more: the tail when the connection ended.
    end: Option<u64>,
}

impl Inbox {
    pub(super) fn new(file: Arc<Mapping>) -> Result<Self, Corrupt> {
        let capacity = ring_capacity(&file)?;
        Ok(Self { file, indices: Consumer::new(capacity), end: None })
    }

    /// Lets the peer WRITE no more; whether it is not in the middle of it.
    pub(super) fn shut(&self) -> bool {
        gate::close(self.file.word(WRITING), self.file.word(SHUT))
    }

    /// From now on nothing is received but what has been published by now.
    pub(super) fn close(&mut self) -> Result<(), Corrupt> {
        if self.end.is_none() {
            self.indices.available(self.file.word(TAIL))?;
            self.end = Some(self.indices.tail);
        }
        Ok(())
    }

    /// From now on nothing is received.
    pub(super) fn abandon(&mut self) {
        self.end = Some(self.indices.head);
    }

    /// Whether [`close`](Self::close) has not been called.
    pub(super) fn is_open(&self) -> bool {
        self.end.is_none()
    }

    /// The next record, if there is one. `most` is the longest message that can be received.
    #[inline]
    pub(super) fn peek(&mut self, most: usize) -> Result<Option<Header>, Corrupt> {
        if self.end.is_some_and(|end| self.indices.head >= end) {
            return Ok(None);
        }
        let available = self.indices.available(self.file.word(TAIL))?;
        if available == 0 {
            return Ok(None);
        }
        let start = PAGE + (self.indices.head & (self.indices.capacity - 1)) as usize;
        // Both words are read once, and what is checked is what is used.
        let word = self.file.word(start).load(Ordering::Relaxed);
        let immediate = self.file.word(start + 8).load(Ordering::Relaxed) as u32;
        let (kind, length) = (Kind::from_code(word >> 32)?, word as u32);
        if length as usize > most || record_size(u64::from(length)) > available {
            return Err(Corrupt);
        }
        Ok(Some(Header { kind, length, immediate }))
    }

    /// Copies the payload of the record that [`peek`](Self::peek) has just returned.
    #[inline]
    pub(super) fn copy(&self, into: &mut [u8]) {
        let start = ((self.indices.head + ALIGN) & (self.indices.capacity - 1)) as usize;
        let first = into.len().min(self.indices.capacity as usize - start);
        let (first, second) = into.split_at_mut(first);
        self.file.read(PAGE + start, first);
        self.file.read(PAGE, second);
    }

    /// Gives the record of a message of `length` bytes back to the sender.
    #[inline]
    pub(super) fn advance(&mut self, length: u32) {
        self.indices.advance(self.file.word(HEAD), record_size(u64::from(length)));
    }

    /// After some [`advance`](Self::advance): whether the sender waits for room and is to be rung.
    #[inline]
    pub(super) fn pay(&self) -> bool {
        self.indices.pay(self.file.word(WANTED))
    }
}
