//! A queue pair and its send queue: what the thread that posts, the thread that polls and the keeper share of one connection.
//!
//! # Who writes, who reads
//!
//! | field | written by | read by |
//! |---|---|---|
//! | `sending` (the chain, the counts) | the posting thread; the keeper, for a keep-alive, and for the last requests | those; the polling thread once, when the link has ended |
//! | the queue pair, in `sending` | the handshake, which makes it; the keeper, which ends it | whoever posts |
//! | `tags[s]` | whoever posts request `s`, under `sending` | the polling thread, after the completion of `s` |
//! | `retired` | the polling thread | whoever posts, to see what room there is |
//! | `down`, `left` | whoever first learns of the end | all |
//! | `peer` | the handshake, once | the polling thread, when the link has ended |
//! | the queue pair's memory | the NIC, and libibverbs under `sending` | |

use std::{
    fmt,
    net::Ipv6Addr,
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rdma_sys::{ibv_post_send, ibv_wr_opcode};

use crate::{
    error::Error,
    fabric::Local,
    transport::{
        ConnectionId, PostError,
        rdma::{
            device::Registration,
            offer::Offer,
            queue_pair::{On, QueuePair},
            queues::Queues,
            sending::{Bytes, Operation, SPARE, SendQueue, WorkId, distance, next},
        },
    },
};

/// A connection on which nothing was posted for this long is asked whether its peer is alive.
const IDLE: Duration = Duration::from_millis(300);

/// An empty WRITE: it needs no memory, no receive buffer and none of the READs in flight.
const NOTHING: Operation =
    Operation { opcode: ibv_wr_opcode::IBV_WR_RDMA_WRITE, remote_address: 0, remote_key: 0, immediate: 0 };

/// What is posted, and where to.
struct Sending {
    queue: SendQueue,
    /// Until it is destroyed.
    pair: Option<QueuePair>,
}

/// A connection, from the making of its queue pair on.
pub(super) struct Link {
    pub id: ConnectionId,
    pub queue_pair_number: u32,
    queue_pair_address: usize,
    depth: u32,
    max_inline: u32,
    sending: Mutex<Sending>,
    tags: Box<[AtomicU64]>,
    retired: AtomicU32,
    down: AtomicBool,
    /// This end has wished the end of the connection.
    left: AtomicBool,
    /// The address of the peer, and since when there is a connection.
    peer: OnceLock<(Ipv6Addr, Instant)>,
    last_buffer: AtomicBool,
    /// What the keeper knows the link by.
    pub key: u64,
    /// Completion and receive queues: they outlive the queue pair, which ends in `destroy` or with `sending`.
    pub queues: Arc<Queues>,
}

impl Link {
    /// Makes a queue pair on a port, with a send queue of `depth` requests, for an endpoint's queues.
    pub(super) fn new(queues: &Arc<Queues>, port: u8, depth: usize) -> Result<Arc<Self>, Error> {
        let depth = depth as u32;
        let on = On { completions: queues.completion_queue(), receives: queues.receive_queue() };
        // SAFETY: the queues are of their device, and `queues`, which the link holds, outlives `sending` (the order of the fields).
        let pair = unsafe { QueuePair::new(&queues.device, on, depth + SPARE, port) }?;
        let slots = (depth + SPARE).next_power_of_two();
        Ok(Arc::new(Self {
            id: queues.next_id(),
            queue_pair_number: pair.number,
            queue_pair_address: pair.raw() as usize,
            depth,
            max_inline: pair.max_inline,
            sending: Mutex::new(Sending {
                queue: SendQueue::new((depth + SPARE) as usize),
                pair: Some(pair),
            }),
            tags: (0..slots).map(|_| AtomicU64::new(0)).collect(),
            retired: AtomicU32::new(0),
            down: AtomicBool::new(false),
            left: AtomicBool::new(false),
            peer: OnceLock::new(),
            last_buffer: AtomicBool::new(false),
            key: queues.keeper.next_key(),
            queues: Arc::clone(queues),
        }))
    }

    /// The address of the queue pair, to be compared.
    pub(super) fn queue_pair_address(&self) -> usize {
        self.queue_pair_address
    }

    /// Makes the queue pair receive from, and send to, that of `theirs`. If `held`, nothing is sent until [`release`](Self::release).
    pub(super) fn connect(
        &self,
        local: &Local,
        own: &Offer,
        theirs: &Offer,
        held: bool,
    ) -> Result<(), Error> {
        let mut sending = self.lock();
        sending.queue.held = held;
        let _ = self.peer.set((theirs.gid, Instant::now()));
        sending.pair.as_ref().expect("it is destroyed after the handshake").connect(local, own, theirs)
    }

    /// The peer can receive: sends what has been posted so far.
    pub(super) fn release(&self) {
        let mut sending = self.lock();
        sending.queue.held = false;
        if !sending.queue.closed {
            self.ring_locked(&mut sending);
        }
    }

    /// Whether the connection has ended, or is about to.
    pub(super) fn is_down(&self) -> bool {
        self.down.load(Ordering::Acquire)
    }

    /// Notes the end. `true` for the first one who does, who then sees to the rest.
    fn set_down(&self) -> bool {
        !self.down.swap(true, Ordering::AcqRel)
    }

    /// Ends posting, moves the queue pair to the error state, and posts the sentinel: when its completion is there, so are those of all
    /// requests before it. Called by the keeper alone.
    pub(super) fn end(&self) {
        self.set_down();
        let mut sending = self.lock();
        sending.queue.closed = true;
        sending.queue.held = false;
        let Some(pair) = &sending.pair else { return };
        pair.fail();
        self.append(&mut sending.queue, NOTHING, Bytes::Pieces(&[]), 0, false, true);
        self.ring_locked(&mut sending);
    }

    /// Ends the queue pair: after this the device does nothing for the connection any more. Not called by polling threads.
    pub(super) fn destroy(&self) {
        self.set_down();
        let mut sending = self.lock();
        sending.queue.closed = true;
        let pair = sending.pair.take();
        drop(sending);
        drop(pair);
    }

    /// The device has said that the queue pair takes no more receive buffers.
    pub(super) fn note_last_buffer(&self) {
        self.last_buffer.store(true, Ordering::Release);
    }

    /// Whether it has.
    pub(super) fn took_last_buffer(&self) -> bool {
        self.last_buffer.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Sending> {
        // The counts are changed together, after everything that may panic.
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Posts a request that names `named`.
    pub(super) fn post<'n>(
        &self,
        operation: Operation,
        bytes: Bytes<'_>,
        named: impl Iterator<Item = &'n Arc<Registration>>,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        let mut sending = self.lock();
        let queue = &mut sending.queue;
        if queue.closed || self.is_down() {
            return Err(PostError::Disconnected);
        }
        if queue.room(self.depth, self.retired()) == 0 {
            // What is chained must reach the device, or no poll would ever make room.
            self.ring_locked(&mut sending);
            return Err(PostError::Full);
        }
        for registration in named {
            queue.keep(registration, &self.queues.device);
        }
        self.append(queue, operation, bytes, signal.unwrap_or(0), signal.is_some(), false);
        Ok(())
    }

    fn append(
        &self,
        queue: &mut SendQueue,
        operation: Operation,
        bytes: Bytes<'_>,
        tag: u64,
        signalled: bool,
        completes: bool,
    ) {
        let number = queue.posted;
        queue.silent += 1;
        // At least one in every half queue completes, so a full queue has at least one that will.
        let completes = completes || signalled || queue.silent >= (self.depth / 2).max(1);
        if completes {
            queue.silent = 0;
        }
        self.place(number).store(tag, Ordering::Release);
        queue.note_signal(number, signalled);
        let id = WorkId::Send { connection: self.id, number, signalled };
        queue.chain(id, operation, bytes, completes, self.max_inline);
        queue.posted = next(number);
    }

    /// Hands the chain to the device.
    pub(super) fn ring(&self) -> Result<(), PostError> {
        let mut sending = self.lock();
        if sending.queue.closed || self.is_down() {
            return Err(PostError::Disconnected);
        }
        self.ring_locked(&mut sending);
        if self.is_down() { Err(PostError::Disconnected) } else { Ok(()) }
    }

    fn ring_locked(&self, sending: &mut Sending) {
        let Sending { queue, pair: Some(pair) } = sending else { return };
        if queue.held {
            return;
        }
        let (first, length) = queue.linked();
        if length == 0 {
            return;
        }
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is there; the requests are a chain that ends, and lead to pieces and bytes in the boxes of `queue`, which
        // the call copies. The device has room for them: `post` counts, and the spare places are used once at a time. The memory that the
        // pieces lead to is registered, and `queue` keeps the registrations.
        let errno = unsafe { ibv_post_send(pair.raw(), first, &mut bad) };
        // Those before `bad` were taken. Without a bad one all were, but rxe could not ring for them.
        let taken = match bad.is_null() {
            true => length,
            // SAFETY: `bad` is a request of this chain.
            false => (unsafe { bad.offset_from(first) }) as usize,
        };
        if errno == 0 {
            queue.take(length);
        } else {
            // The others complete in error, as those of a connection that has ended.
            queue.take(taken);
            self.break_off();
        }
    }

    /// Has the keeper end the connection, soon.
    pub(super) fn break_off(&self) {
        if self.set_down() {
            self.queues.keeper.end(self.key);
        }
    }

    /// The same, because this end wishes it.
    pub(super) fn leave(&self) {
        if self.set_down() {
            // Before the order to the keeper. If it ends the connection for another reason right now, that is taken for the reason.
            self.left.store(true, Ordering::Release);
            self.queues.keeper.end(self.key);
        }
    }

    /// Whom it was connected to, and since when, if it ended without this end's wish.
    pub(super) fn lost_peer(&self) -> Option<(Ipv6Addr, Instant)> {
        self.peer.get().copied().filter(|_| !self.left.load(Ordering::Acquire))
    }

    fn retired(&self) -> u32 {
        self.retired.load(Ordering::Acquire)
    }

    /// Requests that may be posted now.
    pub(super) fn room(&self) -> usize {
        let queue = &mut self.lock().queue;
        if queue.closed || self.is_down() { 0 } else { queue.room(self.depth, self.retired()) as usize }
    }

    /// Where the tag of request `number` is.
    fn place(&self, number: u32) -> &AtomicU64 {
        &self.tags[number as usize & (self.tags.len() - 1)]
    }

    fn tag(&self, number: u32) -> u64 {
        self.place(number).load(Ordering::Acquire)
    }

    /// Takes note that request `number` and all before it are done, and returns the tag of `number`.
    /// Called by the polling thread alone.
    pub(super) fn retire(&self, number: u32) -> u64 {
        let tag = self.tag(number);
        // SYNC POINT: from here on the tag's place may be used again.
        self.retired.store(next(number), Ordering::Release);
        tag
    }

    /// Whether all requests before number `awaited` are done.
    pub(super) fn is_flushed(&self, awaited: u32) -> bool {
        distance(awaited, self.retired()) <= self.depth + SPARE
    }

    /// The number after the last request that has a completion whatever happens. For good: called after [`end`](Self::end).
    pub(super) fn awaited(&self) -> u32 {
        self.lock().queue.awaited()
    }

    /// Tags of the signalled requests that have no completion and will have none: the device would not take them, or it is lost. Called by the
    /// polling thread, once, after [`end`](Self::end).
    pub(super) fn left_over(&self) -> Vec<u64> {
        let retired = self.retired();
        self.lock().queue.signalled_since(retired).map(|number| self.tag(number)).collect()
    }

    /// Asks the peer for a sign of life if the connection has been idle. If the peer is dead, the request fails as any does. The end of the
    /// bootstrap socket tells of dead processes, and sooner; this tells of dead hosts and of a dead fabric, which the socket may not even use.
    pub(super) fn keep_alive(&self, now: Instant) {
        let mut sending = match self.sending.try_lock() {
            Ok(sending) => sending,
            // Somebody is posting: it is not idle.
            Err(TryLockError::WouldBlock) => return,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        };
        let queue = &mut sending.queue;
        if queue.closed || self.is_down() {
            return;
        }
        if queue.seen != queue.posted {
            queue.seen = queue.posted;
            queue.since = now;
            return;
        }
        queue.expire_keep_alive(self.retired());
        if queue.keep_alive.is_some() || now.saturating_duration_since(queue.since) < IDLE {
            return;
        }
        queue.keep_alive = Some(queue.posted);
        // Its completion retires unsignalled requests before it too.
        self.append(queue, NOTHING, Bytes::Pieces(&[]), 0, false, true);
        queue.seen = queue.posted;
        queue.since = now;
        self.ring_locked(&mut sending);
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "connection {} on {}, queue pair {}",
            self.id.0, self.queues.device.name, self.queue_pair_number
        )
    }
}
