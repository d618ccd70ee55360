//! A connection as its two threads share it: the one that posts, and the one that serves its socket (`engine`).
//!
//! ```text
//!  post ──▶ in flight, outgoing ──flush──▶ socket                               by either thread, under the lock
//!  engine: Executed, Reply ──▶ in flight ──▶ events of the endpoint
//!  engine: a request of the peer is executed ──▶ `executed` ──▶ Executed, Reply ──▶ outgoing ──flush──▶ socket
//! ```
//!
//! **What goes out goes in the order in which it came**, whole frame after whole frame ([`Outgoing`]).
//!
//! | what | written by | read by | under |
//! |---|---|---|---|
//! | `queue` | whoever posts or answers puts, the sender takes it over | the same | its lock, which is held for a moment |
//! | `sending` | the sender, also during the call that hands bytes to the kernel | the same | its lock, which nobody but [`Link::end`] and a claim too early (below) waits for |
//! | `signs` | | | how a thread that finds `sending` taken leaves its bytes to the one that has it: see `sender` |
//! | `flying` | the posting thread adds, the engine takes away | the engine | its lock, which is held for a moment |
//! | `offered`, `taken` | the sender, before and after that call | the engine | atomic |
//! | `executed` | the engine; for a READ under the lock of `queue`, with its reply | whoever takes `queue` over, under that lock | atomic |
//! | `replying` | the engine adds, the sender takes away | the engine | atomic |
//!
//! Locks are taken in the order `sending`, `queue`, `flying`.
//!
//! **When a request completes.** The peer says how many it has executed. It can only have executed what it was sent: a claim beyond
//! `offered` is no answer. But a request of which the kernel is still taking the payload must not complete, since the user may change
//! the payload then. So a claim beyond `taken` waits for the lock of `sending`: then no call is under way, and `taken` says it all. (A
//! READ has no payload, and may complete by `offered`.) The engine has the answer from a socket to which the request was written after
//! `offered`, so it sees that.

use std::{
    collections::VecDeque,
    io::ErrorKind,
    net::{Shutdown, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use super::{
    outgoing::Outgoing,
    region::TcpRegion,
    sender::{Flush, Signs, Try},
    wire::{Frame, Kind, encode_refusal},
};
use crate::{
    memory::Memory,
    transport::{ConnectionId, MAX_SGE, PostError, Reach, Region, WorkError},
};

/// Bytes that one call of `ring` hands to the kernel, about. The engine sends the rest.
const RUNG: usize = 4 << 20;
/// Turns of waiting for a call that hands over bytes, which is about to be over; then its thread is waited for.
const CALL_TURNS: u32 = 100;

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) id: ConnectionId,
    pub(super) socket: TcpStream,
    depth: usize,
    /// Requests of the peer's send queue.
    pub(super) peer_depth: u64,
    /// Requests in the send queue. The posting thread adds to it.
    used: AtomicUsize,
    /// Nothing is to be posted any more.
    broken: AtomicBool,
    /// What the peer may reach, if not everything.
    pub(super) reach: Option<Arc<Reach>>,
    /// Bytes of the stream: those that the kernel was offered, and those that it has taken.
    offered: AtomicU64,
    taken: AtomicU64,
    /// Requests of the peer that have been executed.
    executed: AtomicU64,
    /// Replies that the kernel has not taken all of.
    replying: AtomicU64,
    /// Bytes were handed to the kernel since the last [`Link::beat`].
    alive: AtomicBool,
    signs: Signs<AtomicU64>,
    queue: Mutex<Queue>,
    sending: Mutex<Sending>,
    flying: Mutex<Flying>,
}

/// Where the bytes of a READ go.
#[derive(Debug, Default)]
pub(super) struct Target {
    pub(super) pieces: [Option<(TcpRegion, usize, usize)>; MAX_SGE],
}

impl Target {
    pub(super) fn len(&self) -> usize {
        self.pieces.iter().flatten().map(|(_, _, length)| length).sum()
    }

    /// Writes `bytes`, which are those from `at` on.
    fn write(&self, mut at: usize, mut bytes: &[u8]) {
        for (region, offset, length) in self.pieces.iter().flatten() {
            if at >= *length {
                at -= length;
                continue;
            }
            let count = bytes.len().min(length - at);
            region.memory().write(offset + at, &bytes[..count]);
            (at, bytes) = (0, &bytes[count..]);
        }
        assert!(bytes.is_empty(), "a reply is as long as its target");
    }
}

/// A request that is not known to have been executed.
#[derive(Debug)]
pub(super) struct Posted {
    pub(super) signal: Option<u64>,
    pub(super) read: Option<Target>,
}

/// Requests of this side.
#[derive(Debug, Default)]
struct Flying {
    /// Those that are not known to have been executed, each with the place in the stream where it ends.
    requests: VecDeque<(u64, Posted)>,
    /// How many are.
    done: u64,
}

/// What was put, and is not being sent yet.
#[derive(Debug, Default)]
struct Queue {
    out: Outgoing,
    /// Of how many requests the peer was told that they have been executed.
    told: u64,
    /// Nothing goes in any more.
    over: bool,
}

/// What is being sent.
#[derive(Debug, Default)]
struct Sending {
    out: Outgoing,
    /// Why the socket takes nothing any more.
    failed: Option<WorkError>,
}

/// What becomes of a connection, for the polling thread.
#[derive(Debug)]
pub(super) enum Event {
    Work {
        link: Arc<Link>,
        id: u64,
        result: Result<(), WorkError>,
    },
    Received {
        connection: ConnectionId,
        buffer: Vec<u8>,
        length: usize,
        immediate: Option<u32>,
    },
    /// It holds a buffer until it is polled.
    WriteImmediate {
        connection: ConnectionId,
        buffer: Vec<u8>,
        immediate: u32,
    },
    End {
        connection: ConnectionId,
        cause: WorkError,
    },
}

/// The peer said what cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Corrupt;

impl Queue {
    /// Says how many requests have been executed, unless much waits: then it is said behind that.
    fn tell(&mut self, executed: u64) {
        if executed != self.told && !self.out.is_long() {
            self.told = executed;
            self.out.put_bytes(&Frame::answer(Kind::Executed, executed, 0).encode());
        }
    }
}

impl Link {
    pub(super) fn new(
        id: ConnectionId,
        socket: TcpStream,
        (depth, peer_depth): (usize, u64),
        reach: Option<Arc<Reach>>,
    ) -> Self {
        Self {
            id,
            socket,
            depth,
            peer_depth,
            used: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
            reach,
            offered: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            executed: AtomicU64::new(0),
            replying: AtomicU64::new(0),
            alive: AtomicBool::new(false),
            signs: Signs::default(),
            queue: Mutex::default(),
            sending: Mutex::default(),
            flying: Mutex::default(),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // A panic while it is held is a bug of this provider, and the connection is of no more use than before.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sending(&self) -> MutexGuard<'_, Sending> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flying(&self) -> MutexGuard<'_, Flying> {
        self.flying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn room(&self) -> usize {
        self.depth - self.used.load(Ordering::Acquire)
    }

    /// Whether it was not before that nothing is to be posted.
    pub(super) fn break_off(&self) -> bool {
        !self.broken.swap(true, Ordering::AcqRel)
    }

    /// Takes a request into the send queue: by the posting thread alone. `payload` puts the frame's payload behind it.
    pub(super) fn post(
        &self,
        frame: &Frame,
        posted: Posted,
        payload: impl FnOnce(&mut Outgoing),
    ) -> Result<(), PostError> {
        if self.broken.load(Ordering::Acquire) {
            return Err(PostError::Disconnected);
        }
        if self.room() == 0 {
            return Err(PostError::Full);
        }
        let mut queue = self.queue();
        if queue.over {
            return Err(PostError::Disconnected);
        }
        self.used.fetch_add(1, Ordering::AcqRel);
        queue.out.put_bytes(&frame.encode());
        payload(&mut queue.out);
        // No byte of it goes before this lock is let go of.
        self.flying().requests.push_back((queue.out.put(), posted));
        Ok(())
    }

    /// Hands to the kernel what it takes, if there is `news`.
    ///
    /// # Errors
    /// The connection is broken.
    pub(super) fn ring(&self, news: bool) -> Result<Flush, PostError> {
        if self.broken.load(Ordering::Acquire) {
            return Err(PostError::Disconnected);
        }
        Ok(if news { self.flush(RUNG) } else { Flush::Done })
    }

    /// Hands to the kernel what it takes, about `most` bytes at most, or leaves that to who does so now. Of a socket that fails, the
    /// engine sees the end.
    pub(super) fn flush(&self, most: usize) -> Flush {
        let lock = || match self.sending.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let mut handed = 0;
        self.signs.send(lock, |sending| self.hand_over(sending, &mut handed, most))
    }

    fn hand_over(&self, sending: &mut Sending, handed: &mut usize, most: usize) -> Try {
        if sending.out.is_empty() && !self.take_over(sending) {
            return Try::Nothing;
        }
        if *handed >= most {
            return Try::More;
        }
        // SYNC POINT: the engine takes an answer to these bytes after this.
        let offer = |offer| self.offered.store(offer, Ordering::Release);
        let replies = sending.out.replies();
        match sending.out.hand_over(&self.socket, offer) {
            Ok((count, of)) => {
                self.taken.store(sending.out.taken(), Ordering::Release);
                self.replying.fetch_sub((replies - sending.out.replies()) as u64, Ordering::Release);
                self.alive.store(true, Ordering::Relaxed);
                *handed += count;
                if count == of { Try::All } else { Try::Part }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Try::All,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Try::Full,
            Err(error) => {
                // The socket tells it once.
                sending.failed = Some(cause(&error));
                Try::Failed
            }
        }
    }

    /// Takes over what was put. Whether that is anything.
    fn take_over(&self, sending: &mut Sending) -> bool {
        let mut queue = self.queue();
        queue.tell(self.executed_so_far());
        queue.out.hand_on(&mut sending.out);
        !sending.out.is_empty()
    }

    /// The kernel reports that the socket has room. It does so now and then, also if nobody waits for that.
    pub(super) fn has_room(&self, most: usize) -> Flush {
        if self.signs.is_room_awaited() { self.flush(most) } else { Flush::Done }
    }

    /// Whether nothing waits and no call is under way.
    pub(super) fn has_sent_all(&self) -> bool {
        // In this order: bytes go from the one to the other.
        let queued = !self.queue().out.is_empty();
        !queued && self.sending.try_lock().is_ok_and(|sending| sending.out.is_empty())
    }

    /// Says something to a peer to which nothing was said for a while: its kernel answers, or its host is gone. What another thread has
    /// left to this one meanwhile is sent, too.
    pub(super) fn beat(&self, most: usize) -> Flush {
        // Where something waits, the kernel has something to say already.
        if self.alive.swap(false, Ordering::Relaxed) || self.signs.is_room_awaited() {
            return Flush::Done;
        }
        let mut queue = self.queue();
        let frame = Frame::answer(Kind::Executed, queue.told, 0).encode();
        queue.out.put_bytes(&frame);
        drop(queue);
        let left = self.flush(most);
        self.alive.store(false, Ordering::Relaxed);
        left
    }

    /// A request of the peer is executed: by the engine.
    pub(super) fn executed(&self) {
        self.executed.fetch_add(1, Ordering::Relaxed);
    }

    /// How many are.
    pub(super) fn executed_so_far(&self) -> u64 {
        self.executed.load(Ordering::Relaxed)
    }

    /// Answers a READ of the peer: by the engine.
    ///
    /// # Errors
    /// The peer has more READs out than its send queue holds.
    pub(super) fn reply(&self, memory: &Memory, offset: usize, length: usize) -> Result<(), Corrupt> {
        let has_too_many = || self.replying.load(Ordering::Acquire) >= self.peer_depth;
        if has_too_many() {
            // Those that the peer has had are not counted when the call that hands them over is over.
            drop(self.sending());
            if has_too_many() {
                return Err(Corrupt);
            }
        }
        self.replying.fetch_add(1, Ordering::Relaxed);
        let mut queue = self.queue();
        // SYNC POINT: under the lock of who says how many are executed, or the peer could hear of this one before its reply.
        let before = self.executed.fetch_add(1, Ordering::Relaxed);
        queue.out.put_bytes(&Frame::answer(Kind::Reply, before, length as u64).encode());
        queue.out.put_reply(memory, offset, length);
        queue.told = before + 1;
        Ok(())
    }

    /// Tells the peer that its next request is refused.
    pub(super) fn refuse(&self, error: WorkError) {
        let frame = Frame::answer(Kind::Refused, self.executed.load(Ordering::Relaxed), 0);
        self.queue().out.put_bytes(&Frame { key: encode_refusal(error), ..frame }.encode());
    }

    /// The peer has executed `executed` requests. Completes them.
    pub(super) fn acknowledged(
        self: &Arc<Self>,
        executed: u64,
        events: &mut Vec<Event>,
    ) -> Result<(), Corrupt> {
        let mut flying = self.flying();
        let count = executed.checked_sub(flying.done).ok_or(Corrupt)?;
        let Some(last) = count.checked_sub(1) else { return Ok(()) };
        let (end, _) =
            *usize::try_from(last).ok().and_then(|last| flying.requests.get(last)).ok_or(Corrupt)?;
        if end > self.taken.load(Ordering::Acquire) {
            drop(flying);
            self.await_taken(end)?;
            flying = self.flying();
        }
        for _ in 0..count {
            match flying.requests.front() {
                // It completes with its reply.
                None | Some((_, Posted { read: Some(_), .. })) => return Err(Corrupt),
                Some(_) => self.complete(&mut flying, events),
            }
        }
        Ok(())
    }

    /// Waits until the kernel has taken the stream up to `end`, all of which it was offered: for as long as a call takes.
    fn await_taken(&self, end: u64) -> Result<(), Corrupt> {
        if end > self.offered.load(Ordering::Acquire) {
            return Err(Corrupt);
        }
        for _ in 0..CALL_TURNS {
            if end <= self.taken.load(Ordering::Acquire) {
                return Ok(());
            }
            std::thread::yield_now();
        }
        // No call is under way then.
        drop(self.sending());
        if end <= self.taken.load(Ordering::Acquire) { Ok(()) } else { Err(Corrupt) }
    }

    fn complete(self: &Arc<Self>, flying: &mut Flying, events: &mut Vec<Event>) {
        let (_, posted) = flying.requests.pop_front().expect("the caller has seen it");
        flying.done += 1;
        match posted.signal {
            // It leaves the queue when its completion is polled.
            Some(id) => events.push(Event::Work { link: self.clone(), id, result: Ok(()) }),
            None => self.retire(),
        }
    }

    /// A request leaves the send queue.
    pub(super) fn retire(&self) {
        self.used.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether the first request in flight is a READ of this length.
    pub(super) fn expects_reply(&self, length: u64) -> bool {
        self.flying().requests.front().is_some_and(|(end, posted)| {
            let target = posted.read.as_ref();
            *end <= self.offered.load(Ordering::Acquire)
                && target.is_some_and(|target| target.len() as u64 == length)
        })
    }

    /// Bytes of that READ, from `at` on.
    pub(super) fn replied(&self, at: usize, bytes: &[u8]) {
        let flying = self.flying();
        let target = flying.requests.front().and_then(|(_, posted)| posted.read.as_ref());
        target.expect("it was expected").write(at, bytes);
    }

    /// All of them are there.
    pub(super) fn reply_complete(self: &Arc<Self>, events: &mut Vec<Event>) {
        self.complete(&mut self.flying(), events);
    }

    /// The end: whatever is in flight completes in error, the first one for `refused` if the peer refused it. Then nothing more
    /// happens. What the kernel has not taken is forgotten.
    pub(super) fn end(
        self: &Arc<Self>,
        cause: WorkError,
        refused: Option<WorkError>,
        events: &mut Vec<Event>,
    ) {
        self.broken.store(true, Ordering::Release);
        let mut sending = self.sending();
        self.queue().over = true;
        // What one call takes may go; then the peer is told that nothing follows. It may be gone.
        if !sending.out.is_empty() || self.take_over(&mut sending) {
            let _ = sending.out.hand_over(&self.socket, |_| ());
        }
        sending.out.clear();
        self.queue().out.clear();
        let cause = match (cause, sending.failed) {
            (WorkError::Disconnected, Some(failed)) => failed,
            (cause, _) => cause,
        };
        let mut first = refused;
        for (_, posted) in std::mem::take(&mut self.flying().requests) {
            let error = first.take().unwrap_or(WorkError::Flushed);
            match posted.signal {
                Some(id) => events.push(Event::Work { link: self.clone(), id, result: Err(error) }),
                None => self.retire(),
            }
        }
        events.push(Event::End { connection: self.id, cause });
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

/// What an error of a socket means.
pub(super) fn cause(error: &std::io::Error) -> WorkError {
    match error.kind() {
        ErrorKind::TimedOut | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
            WorkError::RetryExceeded
        }
        _ => WorkError::Disconnected,
    }
}
