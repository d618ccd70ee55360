//! A queue pair and its send queue: what the thread that posts, the thread that polls and the connection manager's
//! thread share of one connection.
//!
//! # Who writes, who reads
//!
//! | field | written by | read by |
//! |---|---|---|
//! | `sending` (the chain, the counts) | the posting thread; the manager, for a keep-alive | those; the polling thread once, when the link has ended |
//! | `tags[s]` | whoever posts request `s`, under `sending` | the polling thread, after the completion of `s` |
//! | `retired` | the polling thread | whoever posts, to see what room there is |
//! | `down` | whoever first learns of the end | all |
//! | `cm` | the handshake, then the manager | |
//! | the queue pair's memory | the NIC, and libibverbs under `sending` | |

use std::{
    fmt, io, ptr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rdma_sys::*;

use crate::{
    error::Error,
    transport::{
        ConnectionId, MAX_INLINE, MAX_SGE, PostError,
        rdma::{
            device::Registration,
            id::CmId,
            queues::Queues,
            sending::{Bytes, Operation, SendQueue, WorkId, distance, next},
        },
    },
};

/// A connection on which nothing was posted for this long is asked whether its peer is alive.
const IDLE: Duration = Duration::from_millis(300);
/// `IBV_QP_MIN_RNR_TIMER`: 0.64 ms until a sender whose receiver had no buffer tries again (0 would mean 655 ms).
const RNR_TIMER: u8 = 12;
/// Bytes of a gathered payload that are copied at the doorbell rather than fetched by the NIC, if the device can.
const WANTED_INLINE: u32 = 128;

const _: () = assert!(WANTED_INLINE as usize >= MAX_INLINE);

/// A connection, from the making of its queue pair on.
pub(super) struct Link {
    pub id: ConnectionId,
    queue_pair: *mut ibv_qp,
    pub queue_pair_number: u32,
    depth: u32,
    max_inline: u32,
    sending: Mutex<SendQueue>,
    tags: Box<[AtomicU64]>,
    retired: AtomicU32,
    down: AtomicBool,
    ended: AtomicBool,
    established: AtomicBool,
    /// What the manager knows the link by.
    pub key: usize,
    cm: Mutex<Option<CmId>>,
    /// Completion and receive queues: they outlive the queue pair, which ends with `cm` in `drop`.
    pub queues: Arc<Queues>,
}

// SAFETY: the queue pair may be used from any thread; posts are serialised by `sending`, and all else is
// synchronised by itself.
unsafe impl Send for Link {}
// SAFETY: as for `Send`.
unsafe impl Sync for Link {}

impl Link {
    /// Makes the queue pair of `cm`, with a send queue of `depth` requests, for an endpoint's queues.
    pub(super) fn new(queues: &Arc<Queues>, mut cm: CmId, depth: usize) -> Result<Arc<Self>, Error> {
        let depth = depth as u32;
        // SAFETY: all-zero bytes are a value of this plain C struct.
        let mut attributes: ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        attributes.send_cq = queues.completion_queue();
        attributes.recv_cq = queues.completion_queue();
        attributes.srq = queues.receive_queue();
        attributes.qp_type = ibv_qp_type::IBV_QPT_RC;
        attributes.sq_sig_all = 0;
        let cap = ibv_qp_cap {
            max_send_wr: depth + 1,
            max_recv_wr: 0,
            max_send_sge: MAX_SGE as u32,
            max_recv_sge: 0,
            max_inline_data: WANTED_INLINE,
        };
        attributes.cap = cap;
        // SAFETY: the queues are of the device that `cm` is bound to (the callers have compared), and `queues`
        // outlives `cm` in the link.
        let mut made = unsafe { cm.create_queue_pair(queues.device.domain, &mut attributes) };
        if made.is_err() {
            attributes.cap = ibv_qp_cap { max_inline_data: MAX_INLINE as u32, ..cap };
            // SAFETY: as above.
            made = unsafe { cm.create_queue_pair(queues.device.domain, &mut attributes) };
        }
        made.map_err(Error::io(format!("rdma_create_qp({}, {} requests)", queues.device.name, depth + 1)))?;
        let queue_pair = cm.queue_pair();
        Ok(Arc::new(Self {
            id: queues.next_id(),
            queue_pair,
            // SAFETY: the queue pair has just been made.
            queue_pair_number: unsafe { (*queue_pair).qp_num },
            depth,
            max_inline: attributes.cap.max_inline_data,
            sending: Mutex::new(SendQueue::new(depth as usize + 1)),
            tags: (0..(depth + 1).next_power_of_two()).map(|_| AtomicU64::new(0)).collect(),
            retired: AtomicU32::new(0),
            down: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            established: AtomicBool::new(false),
            key: cm.key(),
            cm: Mutex::new(Some(cm)),
            queues: Arc::clone(queues),
        }))
    }

    /// Has `act` use the identifier. `None`: the link was given up before it was a connection.
    pub(super) fn with_cm<R>(&self, act: impl FnOnce(&mut CmId) -> R) -> Option<R> {
        self.cm.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(act)
    }

    /// Ends queue pair and identifier of a link that never became a connection: nothing was posted to it.
    pub(super) fn give_up(&self) {
        self.set_down();
        // The manager may just be asking for a sign of life: not after this.
        self.close();
        self.end_cm();
    }

    fn end_cm(&self) {
        let Some(cm) = self.cm.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        // Before the identifier ends: its address may be another one's right after.
        self.queues.manager.forget(self.key);
        drop(cm);
    }

    /// Sees to it that READs can make progress, and that a sender of the peer without a receive buffer tries again soon.
    /// Returns the numbers of READs in flight (own, the peer's) that were agreed on.
    pub(super) fn finish_setup(&self) -> Result<(u8, u8), Error> {
        let mut attributes = self
            .query(ibv_qp_attr_mask::IBV_QP_MAX_QP_RD_ATOMIC | ibv_qp_attr_mask::IBV_QP_MAX_DEST_RD_ATOMIC)?;
        let (out, serve) = (attributes.max_rd_atomic, attributes.max_dest_rd_atomic);
        if out == 0 || serve == 0 {
            return Err(Error::System {
                call: format!("agreeing on READs in flight (own {out}, the peer's {serve})"),
                source: io::Error::new(io::ErrorKind::InvalidData, "a READ would never complete"),
            });
        }
        attributes.min_rnr_timer = RNR_TIMER;
        // SAFETY: as above; the timer may be changed in the state in which a connection is.
        let errno = unsafe {
            ibv_modify_qp(self.queue_pair, &mut attributes, ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER.0 as i32)
        };
        // The peer may have broken the connection already: then the timer is of no use, and the polling thread will hear.
        if errno != 0 && !self.is_down() && self.state() != ibv_qp_state::IBV_QPS_ERR {
            return Err(Error::System {
                call: format!("ibv_modify_qp(min_rnr_timer = {RNR_TIMER})"),
                source: io::Error::from_raw_os_error(errno),
            });
        }
        self.established.store(true, Ordering::Release);
        Ok((out, serve))
    }

    /// What the device says of the queue pair.
    fn query(&self, what: ibv_qp_attr_mask) -> Result<ibv_qp_attr, Error> {
        // SAFETY: all-zero bytes are values of these plain C structs.
        let (mut attributes, mut init): (ibv_qp_attr, ibv_qp_init_attr) = unsafe { std::mem::zeroed() };
        // SAFETY: the queue pair lives as long as `cm`, and the callers' link has not been given up.
        match unsafe { ibv_query_qp(self.queue_pair, &mut attributes, what.0 as i32, &mut init) } {
            0 => Ok(attributes),
            errno => Err(Error::System {
                call: "ibv_query_qp()".to_owned(),
                source: io::Error::from_raw_os_error(errno),
            }),
        }
    }

    fn state(&self) -> ibv_qp_state::Type {
        let queried = self.query(ibv_qp_attr_mask::IBV_QP_STATE);
        queried.map_or(ibv_qp_state::IBV_QPS_UNKNOWN, |attributes| attributes.qp_state)
    }

    /// Whether the connection has ended, or is about to.
    pub(super) fn is_down(&self) -> bool {
        self.down.load(Ordering::Acquire)
    }

    /// Notes the end. `true` for the first one who does, who then sees to the rest.
    fn set_down(&self) -> bool {
        !self.down.swap(true, Ordering::AcqRel)
    }

    /// Moves the queue pair to the error state and tells the peer, once; `true` then.
    pub(super) fn end(&self) -> bool {
        self.set_down();
        if self.ended.swap(true, Ordering::AcqRel) {
            return false;
        }
        self.with_cm(CmId::disconnect);
        true
    }

    fn lock(&self) -> MutexGuard<'_, SendQueue> {
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
        let mut queue = self.lock();
        if queue.closed || self.is_down() {
            return Err(PostError::Disconnected);
        }
        if queue.room(self.depth, self.retired()) == 0 {
            // What is chained must reach the device, or no poll would ever make room.
            self.ring_locked(&mut queue);
            return Err(PostError::Full);
        }
        for registration in named {
            queue.keep(registration, &self.queues.device);
        }
        let signalled = signal.is_some();
        self.append(&mut queue, operation, bytes, signal.unwrap_or(0), signalled);
        Ok(())
    }

    fn append(
        &self,
        queue: &mut SendQueue,
        operation: Operation,
        bytes: Bytes<'_>,
        tag: u64,
        signalled: bool,
    ) {
        let number = queue.posted;
        queue.silent += 1;
        // At least one in every half queue completes, so a full queue has at least one that will.
        let completes = signalled || queue.silent >= (self.depth / 2).max(1);
        if completes {
            queue.silent = 0;
        }
        self.place(number).store(tag, Ordering::Release);
        let id = WorkId::Send { connection: self.id, number, signalled };
        queue.chain(id, operation, bytes, completes, self.max_inline);
        queue.posted = next(number);
    }

    /// Hands the chain to the device.
    pub(super) fn ring(&self) -> Result<(), PostError> {
        let mut queue = self.lock();
        if queue.closed || self.is_down() {
            return Err(PostError::Disconnected);
        }
        self.ring_locked(&mut queue);
        if self.is_down() { Err(PostError::Disconnected) } else { Ok(()) }
    }

    fn ring_locked(&self, queue: &mut SendQueue) {
        let (first, length) = queue.linked();
        if length == 0 {
            return;
        }
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair lives until `end_cm`, which comes after `close` (and this queue is not closed) or in
        // `drop`; the requests are a chain that ends, and lead to pieces and bytes in the boxes of `queue`, which the call copies. The device has room for them: `post` counts. The memory that
        // the pieces lead to is registered, and `queue` keeps the registrations.
        let errno = unsafe { ibv_post_send(self.queue_pair, first, &mut bad) };
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

    /// Has the manager end the connection, soon.
    pub(super) fn break_off(&self) {
        if self.set_down() {
            self.queues.manager.end(self.key);
        }
    }

    fn retired(&self) -> u32 {
        self.retired.load(Ordering::Acquire)
    }

    /// Requests that may be posted now.
    pub(super) fn room(&self) -> usize {
        let mut queue = self.lock();
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
        distance(awaited, self.retired()) <= self.depth + 1
    }

    /// Ends posting for good. Returns the number after the last request that has a completion whatever happens.
    pub(super) fn close(&self) -> u32 {
        let mut queue = self.lock();
        queue.closed = true;
        queue.awaited()
    }

    /// Tags of the signalled requests that were posted, but never rung. Called by the polling thread, once, after `close`.
    pub(super) fn unrung(&self) -> Vec<u64> {
        self.lock().unrung().map(|number| self.tag(number)).collect()
    }

    /// Asks the peer for a sign of life if the connection has been idle: an empty WRITE, which needs no memory, no
    /// receive buffer and none of the READs in flight. If the peer is dead, it fails as any request does.
    pub(super) fn keep_alive(&self, now: Instant) {
        if !self.established.load(Ordering::Acquire) {
            return;
        }
        let mut queue = match self.sending.try_lock() {
            Ok(queue) => queue,
            // Somebody is posting: it is not idle.
            Err(TryLockError::WouldBlock) => return,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        };
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
        let operation = Operation {
            opcode: ibv_wr_opcode::IBV_WR_RDMA_WRITE,
            remote_address: 0,
            remote_key: 0,
            immediate: 0,
        };
        // Its completion retires unsignalled requests before it too.
        queue.silent = self.depth;
        self.append(&mut queue, operation, Bytes::Pieces(&[]), 0, false);
        self.ring_locked(&mut queue);
        queue.seen = queue.posted;
        queue.since = now;
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Queue pair and identifier before the queues, and before the registrations that the NIC may still use.
        self.end_cm();
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
