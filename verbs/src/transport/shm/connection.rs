//! The posting side: every request executes in the call that posts it, by a copy.
//!
//! What [`Connection::ring`] adds is the news: the peer's bell if messages were published, and the own
//! endpoint's bell for the completions. A one-sided READ or WRITE touches nothing of the peer but the memory
//! that it names.
//!
//! **A refused post has done nothing.** Each post first looks at all that could refuse it: the queue, the connection, the
//! room in the ring. Then it begins ([`super::claim`]). Only after that it copies, publishes, and counts itself. So
//! nothing that a peer could see comes before the last `return Err`. The one refusal later is that of the peer's gate, and
//! it comes before the first byte. (A post that finds the ring full rings the peer's bell for the messages before it, which
//! were posted.)

use std::{fmt, sync::Arc};

use super::{
    bell::{self, Page},
    link::Link,
    lists,
    region::{RemoteTable, ShmRegion},
    ring::{Corrupt, Kind, Outbox},
    view::ShmView,
};
use crate::{
    memory::copy::{from_shared, to_shared},
    transport::{
        Connection, ConnectionId, MAX_INLINE, MAX_SGE, Payload, Post, PostError, Region, RemoteAddress,
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

    /// Begins a request: from here on it may do something, and is not refused any more (but by
    /// [`withdraw`](Self::withdraw)).
    #[inline]
    fn begin(&mut self) -> Result<(), PostError> {
        if self.link.begin(self.posted) { Ok(()) } else { Err(PostError::Disconnected) }
    }

    /// Refuses the request that has begun, and done nothing.
    #[cold]
    fn withdraw(&mut self) -> PostError {
        self.link.withdraw(self.posted);
        PostError::Disconnected
    }

    /// Counts the request that has begun and executed.
    #[inline]
    fn finish(&mut self, signal: Option<u64>) {
        self.link.finish(self.posted, signal, Ok(()));
        self.posted += 1;
        self.news = true;
    }

    /// Counts a request that fails, and does nothing.
    #[cold]
    fn fail(&mut self, signal: Option<u64>, error: WorkError) -> Result<(), PostError> {
        self.begin()?;
        self.link.finish(self.posted, signal, Err(error));
        self.posted += 1;
        self.news = true;
        if !self.failed {
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

    /// As if the polling thread had just reported the end of the connection.
    #[cfg(test)]
    pub(super) fn report_end(&self) -> bool {
        self.link.seal()
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

    /// Panics if a piece is outside its region; returns the sum of the lengths.
    #[inline]
    fn gather(pieces: &[Sge<'_, ShmRegion>]) -> usize {
        assert!(pieces.len() <= MAX_SGE, "{} pieces in a list; at most {MAX_SGE} are possible", pieces.len());
        let mut total: usize = 0;
        for piece in pieces {
            piece.region.memory().check(piece.offset, piece.length);
            // Each length is that of existing memory, so four of them do not overflow.
            total += piece.length;
        }
        total
    }

    /// Keeps the regions of a request that has begun alive.
    #[inline]
    fn keep_all(&mut self, pieces: &[Sge<'_, ShmRegion>]) {
        for piece in pieces {
            if !self.kept.last().is_some_and(|last| last.same(piece.region)) {
                self.keep(piece.region);
            }
        }
    }

    #[inline]
    fn keep_payload(&mut self, payload: &Payload<'_, ShmRegion>) {
        if let Payload::Gather(pieces) = payload {
            self.keep_all(pieces);
        }
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
    fn length(payload: &Payload<'_, ShmRegion>) -> usize {
        match payload {
            Payload::Inline(bytes) => {
                let most = MAX_INLINE;
                assert!(bytes.len() <= most, "{} bytes inline; at most {most} are possible", bytes.len());
                bytes.len()
            }
            Payload::Gather(pieces) => Self::gather(pieces),
        }
    }

    fn send(
        &mut self,
        payload: Payload<'_, ShmRegion>,
        immediate: Option<u32>,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        let length = Self::length(&payload);
        if !self.admit()? {
            return self.fail(signal, WorkError::Flushed);
        }
        if !self.reserve(length)? {
            return self.fail(signal, WorkError::RemoteInvalid);
        }
        self.begin()?;
        self.keep_payload(&payload);
        pieces(&payload, |at, from, len| {
            // SAFETY: `from` is readable for `len` bytes (`pieces`) of registered or caller-owned memory,
            // which is no ring; `reserve` said yes to the sum of all pieces, and `at + len` is at most that.
            unsafe { self.outbox.fill(at as u64, from, len) }
        });
        let kind = if immediate.is_some() { Kind::SendImmediate } else { Kind::Send };
        self.outbox.publish(kind, length as u32, immediate.unwrap_or(0));
        self.peer_news = true;
        self.finish(signal);
        Ok(())
    }

    fn write(
        &mut self,
        payload: Payload<'_, ShmRegion>,
        remote: RemoteAddress,
        immediate: Option<u32>,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        let length = Self::length(&payload);
        if !self.admit()? {
            return self.fail(signal, WorkError::Flushed);
        }
        let target = match length {
            0 => None,
            _ => match self.remote.find(remote, length, true) {
                Ok(target) => Some(target),
                Err(error) => return self.fail(signal, error),
            },
        };
        if immediate.is_some() {
            self.reserve(0)?;
        }
        self.begin()?;
        if let Some(target) = target {
            if !self.outbox.enter() {
                return Err(self.withdraw());
            }
            self.keep_payload(&payload);
            // SAFETY: `find` vouches for `length` writable bytes at `target`, and `length` is that of the bytes, or the sum of
            // all pieces, each of which is readable (`start`). The target is a mapping of its own, which nothing of this
            // process's memory overlaps.
            unsafe {
                match payload {
                    Payload::Inline(bytes) => to_shared(bytes.as_ptr(), target, length),
                    Payload::Gather([piece]) => to_shared(start(piece), target, length),
                    Payload::Gather(pieces) => {
                        lists::gather(
                            pieces.iter().map(|piece| (start(piece).cast_const(), piece.length)),
                            target,
                        );
                    }
                }
            }
            self.outbox.leave();
        }
        if let Some(immediate) = immediate {
            self.outbox.publish(Kind::WriteImmediate, 0, immediate);
            self.peer_news = true;
        }
        self.finish(signal);
        Ok(())
    }

    fn read(
        &mut self,
        into: &[Sge<'_, ShmRegion>],
        remote: RemoteAddress,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        let length = Self::gather(into);
        if !self.admit()? {
            return self.fail(signal, WorkError::Flushed);
        }
        if length == 0 {
            self.begin()?;
        } else {
            let source = match self.remote.find(remote, length, false) {
                Ok(source) => source,
                Err(error) => return self.fail(signal, error),
            };
            self.begin()?;
            self.keep_all(into);
            // SAFETY: `find` vouches for `length` readable bytes at `source`, and `length` is the sum of all pieces; `start` for the
            // targets. The source is a mapping of its own.
            unsafe {
                match into {
                    [piece] => from_shared(source, start(piece), length),
                    _ => {
                        lists::scatter(source, length, into.iter().map(|piece| (start(piece), piece.length)))
                    }
                }
            }
        }
        self.finish(signal);
        Ok(())
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

    fn provider(&self) -> &'static str {
        "shm"
    }

    // The kind is known where it is posted.
    #[inline(always)]
    fn post(&mut self, post: Post<'_, ShmRegion>) -> Result<(), PostError> {
        match post {
            Post::Send { payload, immediate, signal } => self.send(payload, immediate, signal),
            Post::Write { payload, to, immediate, signal } => self.write(payload, to, immediate, signal),
            Post::Read { into, from, signal } => self.read(into, from, signal),
        }
    }

    fn ring(&mut self) -> Result<(), PostError> {
        self.announce();
        self.failed = false;
        // Where the end is reported there is nothing to tell: what was posted before has completed.
        if std::mem::take(&mut self.news) && !self.link.is_sealed() {
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
