//! The posting side: every request executes in the call that posts it, by a copy.
//!
//! What [`Connection::ring`] adds is the news: the peer's bell if messages were published, and the own
//! endpoint's bell for the completions. A one-sided READ or WRITE touches nothing of the peer but the memory
//! that it names.

use std::{fmt, sync::Arc};

use super::{
    bell::{self, Page},
    link::Link,
    region::{RemoteTable, ShmRegion},
    ring::{Corrupt, Kind, Outbox},
    view::ShmView,
};
use crate::{
    memory::copy::{from_shared, to_shared},
    transport::{
        Connection, ConnectionId, MAX_INLINE, MAX_SGE, Payload, PostError, Region, RemoteAddress,
        RemoteRegion, Sge, WorkError,
    },
};

/// One end of a connection of the `shm` provider.
pub struct ShmConnection {
    link: Arc<Link>,
    outbox: Outbox,
    peer_bell: Page,
    peer_slot: u32,
    peer_receive_size: u64,
    remote: RemoteTable,
    /// The regions named so far: they live as long as the connection.
    kept: Vec<ShmRegion>,
    /// Requests posted so far, and how many of them were retired when last looked.
    posted: u64,
    retired: u64,
    /// Something was posted, something was published to the peer, since the last `ring`.
    news: bool,
    peer_news: bool,
    /// A request failed since the last `ring`: those after it, up to that, are flushed.
    failed: bool,
}

impl ShmConnection {
    pub(super) fn new(
        link: Arc<Link>,
        outbox: Outbox,
        peer_bell: Page,
        peer_slot: u32,
        peer_receive_size: u64,
        remote: RemoteTable,
    ) -> Self {
        Self {
            link,
            outbox,
            peer_bell,
            peer_slot,
            peer_receive_size,
            remote,
            kept: Vec::new(),
            posted: 0,
            retired: 0,
            news: false,
            peer_news: false,
            failed: false,
        }
    }

    /// Whether a request may be posted. `false`: it may, but is flushed.
    #[inline]
    fn admit(&mut self) -> Result<bool, PostError> {
        if self.posted - self.retired >= self.link.depth() {
            self.retired = self.link.retired();
            if self.posted - self.retired >= self.link.depth() {
                return Err(if self.link.cause().is_some() && !self.failed {
                    PostError::Disconnected
                } else {
                    PostError::Full
                });
            }
        }
        match self.link.cause() {
            None => Ok(true),
            Some(_) if self.failed => Ok(false),
            Some(_) => Err(PostError::Disconnected),
        }
    }

    /// Counts a request that has executed.
    #[inline]
    fn posted(&mut self, signal: Option<u64>, result: Result<(), WorkError>) -> Result<(), PostError> {
        if !self.link.post(self.posted, signal, result) {
            return Err(PostError::Disconnected);
        }
        self.posted += 1;
        self.news = true;
        if let Err(error) = result
            && !self.failed
        {
            self.failed = true;
            self.link.close(error);
        }
        Ok(())
    }

    /// The peer broke the protocol of the ring.
    #[cold]
    fn broken(&mut self) -> PostError {
        self.link.close(WorkError::RemoteInvalid);
        PostError::Disconnected
    }

    /// Writes a word of the outgoing ring's file, as a peer that is up to no good would.
    #[cfg(test)]
    pub(super) fn poison_outbox(&self, offset: usize, value: u64) {
        self.outbox.poison(offset, value);
    }

    /// Makes room for a message in the ring. `Ok(false)`: it is longer than the peer's receive buffers.
    #[inline]
    fn reserve(&mut self, length: usize) -> Result<bool, PostError> {
        if length as u64 > self.peer_receive_size {
            return Ok(false);
        }
        match self.outbox.reserve(length as u64) {
            Ok(true) => Ok(true),
            Ok(false) => {
                // The peer must know of what fills the ring, or it will never make room.
                self.announce();
                Err(PostError::Full)
            }
            Err(Corrupt) => Err(self.broken()),
        }
    }

    #[inline]
    fn announce(&mut self) {
        if std::mem::take(&mut self.peer_news) {
            bell::ring(&self.peer_bell, self.peer_slot);
        }
    }

    /// Panics if a piece is outside its region; keeps the regions alive; returns the sum of the lengths.
    #[inline]
    fn gather(&mut self, pieces: &[Sge<'_, ShmRegion>]) -> usize {
        assert!(pieces.len() <= MAX_SGE, "{} pieces in a list; at most {MAX_SGE} are possible", pieces.len());
        let mut total: usize = 0;
        for piece in pieces {
            piece.region.memory().check(piece.offset, piece.length);
            // Each length is that of existing memory, so four of them do not overflow.
            total += piece.length;
            if !self.kept.last().is_some_and(|last| last.same(piece.region)) {
                self.keep(piece.region);
            }
        }
        total
    }

    /// Moves the region to the end of the kept ones, where it is found first.
    fn keep(&mut self, region: &ShmRegion) {
        match self.kept.iter().position(|kept| kept.same(region)) {
            Some(place) => {
                let last = self.kept.len() - 1;
                self.kept.swap(place, last);
            }
            None => self.kept.push(region.clone()),
        }
    }

    #[inline]
    fn length(&mut self, payload: &Payload<'_, ShmRegion>) -> usize {
        match payload {
            Payload::Inline(bytes) => {
                let most = MAX_INLINE;
                assert!(bytes.len() <= most, "{} bytes inline; at most {most} are possible", bytes.len());
                bytes.len()
            }
            Payload::Gather(pieces) => self.gather(pieces),
        }
    }
}

/// Hands each piece of a payload, and its place in the message, to `each`. The pointers are readable for the
/// length; the lengths have been checked by [`ShmConnection::length`].
#[inline]
fn pieces(payload: &Payload<'_, ShmRegion>, mut each: impl FnMut(usize, *const u8, usize)) {
    match payload {
        Payload::Inline(bytes) => each(0, bytes.as_ptr(), bytes.len()),
        Payload::Gather(pieces) => {
            let mut at = 0;
            for piece in *pieces {
                each(at, start(piece), piece.length);
                at += piece.length;
            }
        }
    }
}

/// First byte of a piece, readable and writable for its length.
#[inline]
fn start(piece: &Sge<'_, ShmRegion>) -> *mut u8 {
    let memory = piece.region.memory();
    memory.check(piece.offset, piece.length);
    // SAFETY: `offset <= offset + length <= len` (just checked), so the pointer stays in the mapping.
    unsafe { memory.as_ptr().add(piece.offset) }
}

impl Connection for ShmConnection {
    type Region = ShmRegion;
    type View = ShmView;

    fn id(&self) -> ConnectionId {
        self.link.id
    }

    fn send(
        &mut self,
        payload: Payload<'_, ShmRegion>,
        immediate: Option<u32>,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        let length = self.length(&payload);
        if !self.admit()? {
            return self.posted(signal, Err(WorkError::Flushed));
        }
        if !self.reserve(length)? {
            return self.posted(signal, Err(WorkError::RemoteInvalid));
        }
        pieces(&payload, |at, from, len| {
            // SAFETY: `from` is readable for `len` bytes (`pieces`) of registered or caller-owned memory,
            // which is no ring; `reserve` said yes to the sum of all pieces, and `at + len` is at most that.
            unsafe { self.outbox.fill(at as u64, from, len) }
        });
        let kind = if immediate.is_some() { Kind::SendImmediate } else { Kind::Send };
        self.outbox.publish(kind, length as u32, immediate.unwrap_or(0));
        self.peer_news = true;
        self.posted(signal, Ok(()))
    }

    fn write(
        &mut self,
        payload: Payload<'_, ShmRegion>,
        remote: RemoteAddress,
        immediate: Option<u32>,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        let length = self.length(&payload);
        if !self.admit()? {
            return self.posted(signal, Err(WorkError::Flushed));
        }
        if length > 0 {
            let target = match self.remote.find(remote, length, true) {
                Ok(target) => target,
                Err(error) => return self.posted(signal, Err(error)),
            };
            if immediate.is_some() {
                self.reserve(0)?;
            }
            if !self.outbox.enter() {
                return Err(PostError::Disconnected);
            }
            pieces(&payload, |at, from, len| {
                // SAFETY: `from` is readable for `len` bytes (`pieces`); `find` vouches for `length` writable
                // bytes at `target`, and `at + len <= length`, the sum of all pieces. The target is a
                // mapping of its own, which nothing of this process's memory overlaps.
                unsafe { to_shared(from, target.add(at), len) }
            });
            self.outbox.leave();
        } else if immediate.is_some() {
            self.reserve(0)?;
        }
        if let Some(immediate) = immediate {
            self.outbox.publish(Kind::WriteImmediate, 0, immediate);
            self.peer_news = true;
        }
        self.posted(signal, Ok(()))
    }

    fn read(
        &mut self,
        into: &[Sge<'_, ShmRegion>],
        remote: RemoteAddress,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        let length = self.gather(into);
        if !self.admit()? {
            return self.posted(signal, Err(WorkError::Flushed));
        }
        if length > 0 {
            let source = match self.remote.find(remote, length, false) {
                Ok(source) => source,
                Err(error) => return self.posted(signal, Err(error)),
            };
            let mut at = 0;
            for piece in into {
                // SAFETY: `find` vouches for `length` readable bytes at `source`, and `at + piece.length <=
                // length`, the sum; `start` for the target, which is a mapping of its own.
                unsafe { from_shared(source.add(at), start(piece), piece.length) }
                at += piece.length;
            }
        }
        self.posted(signal, Ok(()))
    }

    fn ring(&mut self) -> Result<(), PostError> {
        self.announce();
        self.failed = false;
        if std::mem::take(&mut self.news) {
            self.link.ring_own();
        } else if self.link.cause().is_some() {
            return Err(PostError::Disconnected);
        }
        Ok(())
    }

    fn room(&self) -> usize {
        // Every one of them may be a message, of the greatest length: none of them will find the ring full.
        let queue = self.link.depth() - (self.posted - self.link.retired());
        self.outbox.room(self.peer_receive_size, queue) as usize
    }

    fn view(&self, region: RemoteRegion) -> Option<ShmView> {
        self.remote.view(region)
    }

    fn disconnect(&mut self) {
        self.announce();
        self.link.close(WorkError::Disconnected);
    }

    fn ends_with_peer(&self) -> bool {
        true
    }
}

impl Drop for ShmConnection {
    fn drop(&mut self) {
        self.disconnect();
    }
}

impl fmt::Debug for ShmConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShmConnection({:?}, {} posted)", self.link.id, self.posted)
    }
}
