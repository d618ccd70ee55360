//! A connection as its two threads share it: the one that posts, and the one that serves its socket (`engine`).
//!
//! ```text
//!  post ──▶ inflight, staged (or items, when much waits) ──flush──▶ socket      by either thread, under the lock
//!  engine: Executed, Reply ──▶ inflight ──▶ events of the endpoint
//!  engine: a request of the peer is executed ──▶ `executed` ──▶ Executed, Reply ──▶ staged ──flush──▶ socket
//! ```
//!
//! **What goes out goes in the order in which it came**, whole frame after whole frame. Bytes are copied to `staged` at the post as
//! long as there is room; else the place is noted in `items`, and copied when its turn comes. So a peer that does not read makes
//! this side keep [`STAGE`] bytes and the places, of which there are at most the send queue's of both sides.
//!
//! **Whole words.** What a READ asks for is copied out of its region by [`Memory::read`], in pieces that end between two words. The
//! kernel promises no such thing of what it copies itself.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Write},
    net::{Shutdown, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use super::{
    region::TcpRegion,
    wire::{FRAME, Frame, Kind, encode_refusal},
};
use crate::{
    memory::Memory,
    transport::{ConnectionId, MAX_SGE, PostError, Reach, Region, WorkError},
};

/// Bytes that are copied for the socket before it takes them.
const STAGE: usize = 256 << 10;
/// Bytes that one call hands to the kernel, about: others wait for the lock, and the engine has other connections.
const TURN: usize = 1 << 20;

/// What is left after a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flush {
    /// Nothing.
    Done,
    /// The kernel takes no more now, or the connection is broken.
    Blocked,
    /// More than one call hands over.
    More,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) id: ConnectionId,
    pub(super) socket: TcpStream,
    depth: usize,
    /// Requests of the peer's send queue.
    peer_depth: u64,
    /// Requests in the send queue. The posting thread adds to it.
    used: AtomicUsize,
    /// Nothing is to be posted any more.
    broken: AtomicBool,
    /// What the peer may reach, if not everything.
    pub(super) reach: Option<Arc<Reach>>,
    sending: Mutex<Sending>,
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

/// What waits behind `staged`.
#[derive(Debug)]
enum Item {
    Bytes(Vec<u8>),
    /// Bytes of a payload of this side's.
    Place(Memory, usize, usize),
    /// Bytes that the peer READs.
    Reply(Memory, usize, usize),
    /// All before it belongs to earlier requests of this side or to the one that was posted then.
    Mark,
}

/// What is on its way out.
#[derive(Debug, Default)]
pub(super) struct Sending {
    staged: Vec<u8>,
    sent: usize,
    items: VecDeque<Item>,
    inflight: VecDeque<Posted>,
    /// Requests of this side that are known to have been executed, and marks among the items: requests that cannot have been.
    done: u64,
    marks: u64,
    /// Requests of the peer that have been executed, and of how many it was told.
    executed: u64,
    told: u64,
    /// Replies among the items: no more than the peer's send queue holds.
    replies: u64,
    /// Bytes were handed to the kernel since the last [`Link::beat`].
    alive: bool,
    /// Why the socket takes nothing any more.
    failed: Option<WorkError>,
    /// Nothing goes in or out any more.
    over: bool,
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

impl Sending {
    fn put(&mut self, bytes: &[u8]) {
        if self.items.is_empty() && self.staged.len() < STAGE {
            return self.staged.extend_from_slice(bytes);
        }
        match self.items.back_mut() {
            Some(Item::Bytes(tail)) => tail.extend_from_slice(bytes),
            _ => self.items.push_back(Item::Bytes(bytes.to_vec())),
        }
    }

    fn put_place(&mut self, memory: &Memory, offset: usize, length: usize) {
        let now = if self.items.is_empty() { self.stage_place(memory, offset, length) } else { 0 };
        if now < length {
            self.items.push_back(Item::Place(memory.clone(), offset + now, length - now));
        }
    }

    /// As [`Sending::put_place`], for a reply, of which a place is noted also if it has no bytes.
    fn put_reply(&mut self, memory: &Memory, offset: usize, length: usize) {
        let behind = !self.items.is_empty();
        let now = if behind { 0 } else { self.stage_place(memory, offset, length) };
        if behind || now < length {
            self.replies += 1;
            self.items.push_back(Item::Reply(memory.clone(), offset + now, length - now));
        }
    }

    /// Copies as many bytes of the place as there is room for, up to the end of a word. How many.
    fn stage_place(&mut self, memory: &Memory, offset: usize, length: usize) -> usize {
        let room = STAGE.saturating_sub(self.staged.len());
        let whole = ((offset + room) / 8 * 8).saturating_sub(offset);
        let count = if length <= room { length } else { whole };
        let start = self.staged.len();
        self.staged.resize(start + count, 0);
        memory.read(offset, &mut self.staged[start..]);
        count
    }

    /// Fills `staged`, which is empty.
    fn refill(&mut self) {
        while self.staged.len() < STAGE {
            match self.items.pop_front() {
                None => return self.tell(),
                Some(Item::Bytes(bytes)) => self.staged.extend_from_slice(&bytes),
                Some(Item::Place(memory, offset, length)) => {
                    let count = self.stage_place(&memory, offset, length);
                    if count < length {
                        return self.items.push_front(Item::Place(memory, offset + count, length - count));
                    }
                }
                Some(Item::Reply(memory, offset, length)) => {
                    let count = self.stage_place(&memory, offset, length);
                    if count < length {
                        return self.items.push_front(Item::Reply(memory, offset + count, length - count));
                    }
                    self.replies -= 1;
                }
                Some(Item::Mark) => self.marks -= 1,
            }
        }
    }

    /// Requests of this side that the peer can have executed.
    fn handed_over(&self) -> u64 {
        self.done + self.inflight.len() as u64 - self.marks
    }

    /// Says how many requests have been executed, unless much waits: then it is said behind that.
    fn tell(&mut self) {
        if self.executed != self.told && self.items.is_empty() && self.staged.len() < STAGE {
            self.told = self.executed;
            let frame = Frame::answer(Kind::Executed, self.executed, 0).encode();
            self.staged.extend_from_slice(&frame);
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
            sending: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Sending> {
        // A panic while it is held is a bug of this provider, and the connection is of no more use than before.
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
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
        payload: impl FnOnce(&mut Payload<'_>),
    ) -> Result<(), PostError> {
        if self.broken.load(Ordering::Acquire) {
            return Err(PostError::Disconnected);
        }
        if self.room() == 0 {
            return Err(PostError::Full);
        }
        let mut sending = self.lock();
        if sending.over {
            return Err(PostError::Disconnected);
        }
        self.used.fetch_add(1, Ordering::AcqRel);
        sending.inflight.push_back(posted);
        sending.put(&frame.encode());
        payload(&mut Payload(&mut sending));
        if !sending.items.is_empty() {
            sending.marks += 1;
            sending.items.push_back(Item::Mark);
        }
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
        Ok(if news { self.flush() } else { Flush::Done })
    }

    /// Hands to the kernel what it takes. Of a socket that fails, the engine sees the end.
    pub(super) fn flush(&self) -> Flush {
        let mut sending = self.lock();
        let mut handed = 0;
        loop {
            if sending.sent == sending.staged.len() {
                sending.staged.clear();
                sending.sent = 0;
                sending.refill();
                if sending.staged.is_empty() {
                    return Flush::Done;
                }
            }
            if handed >= TURN {
                return Flush::More;
            }
            match (&self.socket).write(&sending.staged[sending.sent..]) {
                Ok(count) => {
                    sending.sent += count;
                    sending.alive = true;
                    handed += count;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != ErrorKind::WouldBlock {
                        // The socket tells it once.
                        sending.failed = Some(cause(&error));
                    }
                    return Flush::Blocked;
                }
            }
        }
    }

    /// Says something to a peer to which nothing was said for a while: its kernel answers, or its host is gone.
    pub(super) fn beat(&self) {
        let mut sending = self.lock();
        if !std::mem::take(&mut sending.alive)
            && sending.sent == sending.staged.len()
            && sending.items.is_empty()
        {
            let frame = Frame::answer(Kind::Executed, sending.told, 0).encode();
            sending.put(&frame);
            drop(sending);
            self.flush();
            self.lock().alive = false;
        }
    }

    /// A request of the peer is executed.
    pub(super) fn executed(&self) {
        self.lock().executed += 1;
    }

    /// Tells the peer how many of its requests are, and flushes.
    pub(super) fn tell(&self) -> Flush {
        self.lock().tell();
        self.flush()
    }

    /// Answers a READ of the peer.
    ///
    /// # Errors
    /// The peer has more READs out than its send queue holds.
    pub(super) fn reply(&self, memory: &Memory, offset: usize, length: usize) -> Result<(), Corrupt> {
        let mut sending = self.lock();
        if sending.replies >= self.peer_depth {
            return Err(Corrupt);
        }
        let frame = Frame::answer(Kind::Reply, sending.executed, length as u64);
        sending.put(&frame.encode());
        sending.put_reply(memory, offset, length);
        sending.executed += 1;
        sending.told = sending.executed;
        Ok(())
    }

    /// Tells the peer that its next request is refused.
    pub(super) fn refuse(&self, error: WorkError) {
        let mut sending = self.lock();
        let frame = Frame::answer(Kind::Refused, sending.executed, 0);
        sending.put(&Frame { key: encode_refusal(error), ..frame }.encode());
    }

    /// The peer has executed `executed` requests. Completes them.
    pub(super) fn acknowledged(
        self: &Arc<Self>,
        executed: u64,
        events: &mut Vec<Event>,
    ) -> Result<(), Corrupt> {
        let mut sending = self.lock();
        if executed > sending.handed_over() {
            return Err(Corrupt);
        }
        while sending.done < executed {
            match sending.inflight.front() {
                // It completes with its reply.
                None | Some(Posted { read: Some(_), .. }) => return Err(Corrupt),
                Some(_) => self.complete(&mut sending, events),
            }
        }
        if sending.done == executed { Ok(()) } else { Err(Corrupt) }
    }

    fn complete(self: &Arc<Self>, sending: &mut Sending, events: &mut Vec<Event>) {
        let posted = sending.inflight.pop_front().expect("the caller has seen it");
        sending.done += 1;
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
        let sending = self.lock();
        let target = sending.inflight.front().and_then(|posted| posted.read.as_ref());
        sending.done < sending.handed_over() && target.is_some_and(|target| target.len() as u64 == length)
    }

    /// Bytes of that READ, from `at` on.
    pub(super) fn replied(&self, at: usize, bytes: &[u8]) {
        let sending = self.lock();
        let target = sending.inflight.front().and_then(|posted| posted.read.as_ref());
        target.expect("it was expected").write(at, bytes);
    }

    /// All of them are there.
    pub(super) fn reply_complete(self: &Arc<Self>, events: &mut Vec<Event>) {
        self.complete(&mut self.lock(), events);
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
        let mut sending = self.lock();
        sending.over = true;
        sending.items.clear();
        (sending.marks, sending.replies) = (0, 0);
        let cause = match (cause, sending.failed) {
            (WorkError::Disconnected, Some(failed)) => failed,
            (cause, _) => cause,
        };
        let mut first = refused;
        for posted in std::mem::take(&mut sending.inflight) {
            let error = first.take().unwrap_or(WorkError::Flushed);
            match posted.signal {
                Some(id) => events.push(Event::Work { link: self.clone(), id, result: Err(error) }),
                None => self.retire(),
            }
        }
        events.push(Event::End { connection: self.id, cause });
        // What was copied may go; then the peer is told that nothing follows. It may be gone.
        let rest = sending.sent;
        let _ = (&self.socket).write(&sending.staged[rest..]);
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

/// Where the payload of a request goes.
pub(super) struct Payload<'a>(&'a mut Sending);

impl Payload<'_> {
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.put(bytes);
    }

    pub(super) fn place(&mut self, memory: &Memory, offset: usize, length: usize) {
        self.0.put_place(memory, offset, length);
    }
}

const _: () = assert!(FRAME < STAGE);
