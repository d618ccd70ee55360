//! Bytes on their way out of one connection, in the order of the stream.
//!
//! ```text
//!  heads, short payloads ──────copied at the put──────▶ `copied` ─┐
//!  long payloads of this side ──noted──▶ a place of a region ─────┼──▶ one `sendmsg` of many pieces ──▶ the kernel
//!  what the peer READs ──noted, words are copied in turn──▶ `late`┘
//! ```
//!
//! **A long payload is not copied here.** The kernel copies it out of its region when it takes it. It does not promise to move words
//! whole, and need not. The memory of a post belongs to the transport until the completion, so nobody changes it meanwhile; and a request
//! completes only when the kernel has taken it (`link`). Whole words are promised in the *peer's* memory: the peer's side sees to that.
//!
//! **What the peer READs is copied by words**, by [`Memory::read`], in pieces that end between two words: its owner may be changing it.
//!
//! **Bounds.** Bytes are copied at the put while `copied` has less than [`STAGE`] of them. Of what is put later, only heads and inline
//! payloads are; of the rest the place is noted. So a peer that does not read makes this side keep a few times `STAGE` (a connection has
//! one of these that is put to, and one that is sent), and heads and places, of which there are as many as the send queues of both sides
//! allow.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd},
};

use crate::memory::Memory;

/// Bytes that are copied before the kernel takes them.
pub(super) const STAGE: usize = 256 << 10;
/// From this length on the kernel takes a payload from where it lies: below, a piece of its own costs more than a copy.
const DIRECT: usize = 1024;
/// Pieces of one call, and bytes, about. More bytes would save little, and what a call has taken can complete when it is over.
const PIECES: usize = 128;
const BYTES: usize = 256 << 10;

/// What comes next in the stream.
#[derive(Debug)]
enum Item {
    /// So many bytes of `copied`.
    Copied(usize),
    /// So many bytes of `late`.
    Late(usize),
    /// Bytes of a payload of this side's.
    Place(Memory, usize, usize),
    /// Bytes that the peer READs.
    Reply(Memory, usize, usize),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    copied: Bytes,
    late: Bytes,
    items: VecDeque<Item>,
    /// Where in the stream the replies end that the kernel has not taken.
    replies: VecDeque<u64>,
    /// Bytes of the stream: all so far, and those that the kernel has taken.
    put: u64,
    taken: u64,
}

impl Outgoing {
    /// Whether the kernel has taken all.
    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Whether so much waits that what can wait had better be put behind it.
    pub(super) fn is_long(&self) -> bool {
        self.copied.len() >= STAGE
    }

    /// Bytes of the stream so far.
    pub(super) fn put(&self) -> u64 {
        self.put
    }

    /// How many of them the kernel has taken.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Replies of which the kernel has not taken all.
    pub(super) fn replies(&self) -> usize {
        self.replies.len()
    }

    pub(super) fn put_bytes(&mut self, bytes: &[u8]) {
        self.copied.grow(bytes.len()).copy_from_slice(bytes);
        self.note_copied(bytes.len());
    }

    /// Bytes of a payload of this side's: nobody changes them until the request completes.
    pub(super) fn put_place(&mut self, memory: &Memory, offset: usize, length: usize) {
        if length < DIRECT && !self.is_long() {
            memory.read(offset, self.copied.grow(length));
            return self.note_copied(length);
        }
        if length > 0 {
            self.put += length as u64;
            self.items.push_back(Item::Place(memory.clone(), offset, length));
        }
    }

    /// Bytes that the peer READs.
    pub(super) fn put_reply(&mut self, memory: &Memory, offset: usize, length: usize) {
        let now = whole_words(offset, length, STAGE.saturating_sub(self.copied.len()));
        memory.read(offset, self.copied.grow(now));
        self.note_copied(now);
        if now < length {
            self.put += (length - now) as u64;
            self.items.push_back(Item::Reply(memory.clone(), offset + now, length - now));
        }
        self.replies.push_back(self.put);
    }

    fn note_copied(&mut self, count: usize) {
        self.put += count as u64;
        match self.items.back_mut() {
            _ if count == 0 => {}
            Some(Item::Copied(more)) => *more += count,
            _ => self.items.push_back(Item::Copied(count)),
        }
    }

    /// Copies what the peer READs and is among the next items, as far as there is room.
    fn copy_replies(&mut self) {
        let mut index = 0;
        while index < self.items.len().min(PIECES) {
            if let Item::Reply(memory, offset, length) = &mut self.items[index] {
                let count = whole_words(*offset, *length, STAGE - self.late.len());
                if count == 0 {
                    return;
                }
                memory.read(*offset, self.late.grow(count));
                (*offset, *length) = (*offset + count, *length - count);
                if *length > 0 {
                    return self.items.insert(index, Item::Late(count));
                }
                self.items[index] = Item::Late(count);
            }
            index += 1;
        }
    }

    /// What a call can hand over next: how many pieces, and bytes. They are good until this changes.
    fn pieces(&self, pieces: &mut [libc::iovec; PIECES]) -> (usize, usize) {
        let (mut count, mut bytes) = (0, 0);
        let (mut copied, mut late) = (0, 0);
        for (item, place) in self.items.iter().zip(pieces) {
            let most = BYTES - bytes;
            let piece = match item {
                // There was no room for a copy.
                Item::Reply(..) => break,
                _ if most == 0 => break,
                Item::Copied(length) => {
                    let piece = self.copied.piece(copied, most.min(*length));
                    copied += length;
                    piece
                }
                Item::Late(length) => {
                    let piece = self.late.piece(late, most.min(*length));
                    late += length;
                    piece
                }
                Item::Place(memory, offset, length) => memory.piece(*offset, most.min(*length)),
            };
            bytes += piece.iov_len;
            *place = piece;
            count += 1;
        }
        (count, bytes)
    }

    /// Hands over to the kernel what one call hands over: how many bytes it took, of how many. Before the call `offer` is told how
    /// much of the stream the peer may have seen when it returns. There is something.
    pub(super) fn hand_over(
        &mut self,
        socket: &impl AsFd,
        offer: impl FnOnce(u64),
    ) -> io::Result<(usize, usize)> {
        self.copy_replies();
        let mut pieces = [NOTHING; PIECES];
        let (count, bytes) = self.pieces(&mut pieces);
        offer(self.taken + bytes as u64);
        // SAFETY: all zeroes are a message without an address, pieces and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        (message.msg_iov, message.msg_iovlen) = (pieces.as_mut_ptr(), count as _);
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the first `count` pieces lie in `copied`, in `late` and in mappings that the items keep alive. None of the three
        // changes during the call, since `self` is borrowed. The kernel reads them alone, and makes no reference: that others may
        // write to a mapping meanwhile is no data race of this program.
        let taken = unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &message, flags) };
        let taken = usize::try_from(taken).map_err(|_| io::Error::last_os_error())?;
        self.advance(taken);
        Ok((taken, bytes))
    }

    /// The kernel has taken so many bytes.
    fn advance(&mut self, mut count: usize) {
        self.taken += count as u64;
        while count > 0 {
            let item = self.items.front_mut().expect("what was taken was here");
            let (Item::Copied(length) | Item::Late(length) | Item::Place(_, _, length)) = item else {
                unreachable!("a reply is taken from a copy")
            };
            let part = count.min(*length);
            *length -= part;
            let over = *length == 0;
            match item {
                Item::Copied(_) => self.copied.drop_front(part),
                Item::Late(_) => self.late.drop_front(part),
                Item::Place(_, offset, _) | Item::Reply(_, offset, _) => *offset += part,
            }
            if over {
                self.items.pop_front();
            }
            count -= part;
        }
        while self.replies.front().is_some_and(|end| *end <= self.taken) {
            self.replies.pop_front();
        }
    }

    /// All of this, which follows on what `before` was, becomes that. It is empty.
    pub(super) fn hand_on(&mut self, before: &mut Self) {
        debug_assert!(before.is_empty() && before.put == self.taken, "{} bytes, {}", before.put, self.taken);
        std::mem::swap(self, before);
        (self.put, self.taken) = (before.put, before.put);
    }

    /// What the kernel has not taken is forgotten.
    pub(super) fn clear(&mut self) {
        *self = Self { put: self.put, taken: self.taken, ..Self::default() };
    }
}

const NOTHING: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// How many bytes from `offset` on are to be copied where there is `room`: all `length` of them, or up to the end of a word.
fn whole_words(offset: usize, length: usize, room: usize) -> usize {
    if length <= room { length } else { ((offset + room) / 8 * 8).saturating_sub(offset) }
}

/// Bytes, first in, first out. Its memory is used again without being cleared.
#[derive(Debug, Default)]
struct Bytes {
    memory: Vec<u8>,
    start: usize,
    end: usize,
}

impl Bytes {
    fn len(&self) -> usize {
        self.end - self.start
    }

    /// Room for `count` more bytes, which are to be written.
    fn grow(&mut self, count: usize) -> &mut [u8] {
        if self.end + count > self.memory.len() {
            self.memory.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.len());
            let needed = self.end + count;
            if needed > self.memory.len() {
                self.memory.resize(needed.next_power_of_two(), 0);
            }
        }
        self.end += count;
        &mut self.memory[self.end - count..self.end]
    }

    fn drop_front(&mut self, count: usize) {
        assert!(count <= self.len(), "{count} bytes of {} are taken", self.len());
        self.start += count;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// `count` bytes, `at` bytes from the first one.
    fn piece(&self, at: usize, count: usize) -> libc::iovec {
        let bytes = &self.memory[self.start..self.end][at..at + count];
        libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixStream};

    use super::*;

    const LONG: usize = 1 << 20;

    fn numbers() -> impl FnMut(usize) -> usize {
        let mut state = 7_u64;
        move |below| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        }
    }

    /// Puts something of every kind and length, and notes what the peer is to read.
    fn put_some(
        out: &mut Outgoing,
        memory: &Memory,
        number: &mut impl FnMut(usize) -> usize,
        all: &mut Vec<u8>,
    ) {
        let most = [9, 200, DIRECT + 100, 40_000, LONG / 2][number(5)];
        let (offset, length) = (number(LONG / 2), number(most));
        let mut bytes = vec![0; length];
        memory.read(offset, &mut bytes);
        match number(3) {
            0 => out.put_bytes(&bytes),
            1 => out.put_place(memory, offset, length),
            _ => out.put_reply(memory, offset, length),
        }
        all.extend(bytes);
    }

    #[test]
    fn all_that_is_put_comes_in_order_however_little_is_taken_at_a_time() {
        let memory = Memory::new("out", LONG).unwrap();
        memory.write(0, &(0..LONG).map(|i| (i * 5 + i / 253) as u8).collect::<Vec<_>>());
        let (socket, mut peer) = UnixStream::pair().unwrap();
        let mut number = numbers();
        let (mut out, mut all, mut found) = (Outgoing::default(), Vec::new(), Vec::new());
        let mut buffer = vec![0; 70_000];
        for round in 0..400 {
            for _ in 0..number(4) {
                put_some(&mut out, &memory, &mut number, &mut all);
            }
            assert_eq!(out.put(), all.len() as u64);
            let mut offered = 0;
            while !out.is_empty() {
                match out.hand_over(&socket, |offer| offered = offer) {
                    Ok((count, of)) => {
                        assert!(count > 0 && count <= of && out.taken() <= offered && offered <= out.put());
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => panic!("{error}"),
                }
            }
            // In the last round the peer reads all.
            while found.len() < out.taken() as usize {
                let most = 1 + number(buffer.len());
                let count = peer.read(&mut buffer[..most]).unwrap();
                found.extend_from_slice(&buffer[..count]);
                if round < 399 && number(3) == 0 {
                    break;
                }
            }
        }
        while !out.is_empty() {
            let (count, _) = out.hand_over(&socket, |_| ()).unwrap();
            let from = found.len();
            found.resize(from + count, 0);
            peer.read_exact(&mut found[from..]).unwrap();
        }
        assert!(found == all, "{} bytes are not those that were put", all.len());
        assert_eq!((out.replies(), out.taken()), (0, out.put()));
    }

    /// A peer that reads nothing makes this side copy no more than the bound, besides heads.
    #[test]
    fn what_waits_is_noted_and_not_copied() {
        let memory = Memory::new("out", LONG).unwrap();
        let mut out = Outgoing::default();
        for _ in 0..100 {
            out.put_bytes(&[0; 32]);
            out.put_place(&memory, 0, DIRECT - 1);
            out.put_bytes(&[0; 32]);
            out.put_place(&memory, 3, LONG / 2);
            out.put_bytes(&[0; 32]);
            out.put_reply(&memory, 5, LONG / 2);
        }
        assert!(out.copied.len() <= STAGE + DIRECT + 100 * 3 * 32, "{} bytes are copied", out.copied.len());
        assert_eq!((out.late.len(), out.replies()), (0, 100));
        let (socket, _peer) = UnixStream::pair().unwrap();
        while out.hand_over(&socket, |_| ()).is_ok() {
            assert!(out.late.len() <= STAGE, "{} bytes are copied", out.late.len());
        }
        out.clear();
        assert!(out.is_empty() && out.replies() == 0);
    }
}
