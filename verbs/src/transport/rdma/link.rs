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
//!
//! # The send queue
//!
//! Requests are numbered from 0 (modulo 2^31). `posted >= rung >= retired` in that order:
//!
//! ```text
//!      retired          rung              posted
//! ───────┴────────────────┴──────────────────┴──────▶ number
//!         the NIC's        chained: the next
//!         (in flight)      doorbell's
//! ```
//!
//! A completion of request `s` retires all up to `s`, since a send queue completes in order. Not every request has
//! one, so a hidden one is asked for often enough that the queue always holds a request that will complete: `depth` may
//! be used up by unsignalled requests, and polling still makes room. The device's queue has one place more than
//! `depth`, for the one keep-alive that may be under way. Nobody but this count keeps the queue from overrunning: rxe
//! does so in silence.

use std::{
    collections::HashMap,
    ffi::c_uint,
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
        rdma::{device::Registration, endpoint::Queues, id::CmId},
    },
};

/// A connection on which nothing was posted for this long is asked whether its peer is alive.
const IDLE: Duration = Duration::from_millis(500);
/// `IBV_QP_MIN_RNR_TIMER`: 0.64 ms until a sender whose receiver had no buffer tries again (0 would mean 655 ms).
const RNR_TIMER: u8 = 12;
/// Bytes of a gathered payload that are copied at the doorbell rather than fetched by the NIC, if the device can.
const WANTED_INLINE: u32 = 128;

const _: () = assert!(WANTED_INLINE as usize >= MAX_INLINE);

/// Requests are numbered modulo 2^31: the other bits of `wr_id` say what they belong to.
const NUMBER_MASK: u32 = (1 << 31) - 1;

/// What a completion's `wr_id` says.
///
/// | bits | of a send | of a receive |
/// |---|---|---|
/// | 63 | 0 | 1 |
/// | 62..32 | connection | 0 |
/// | 31 | whether the user signalled it | 0 |
/// | 30..0 | number of the request | index of the buffer |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WorkId {
    Send { connection: ConnectionId, number: u32, signalled: bool },
    Receive { buffer: u32 },
}

impl WorkId {
    pub(super) fn encode(self) -> u64 {
        match self {
            Self::Send { connection, number, signalled } => {
                u64::from(connection.0) << 32 | u64::from(signalled) << 31 | u64::from(number)
            }
            Self::Receive { buffer } => 1 << 63 | u64::from(buffer),
        }
    }

    pub(super) fn decode(id: u64) -> Self {
        if id >> 63 == 1 {
            return Self::Receive { buffer: id as u32 };
        }
        Self::Send {
            connection: ConnectionId((id >> 32) as u32),
            number: id as u32 & NUMBER_MASK,
            signalled: id >> 31 & 1 == 1,
        }
    }
}

/// One piece of local memory, as the device knows it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub address: u64,
    pub length: u32,
    pub key: u32,
}

/// What to post.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operation {
    pub opcode: ibv_wr_opcode::Type,
    pub remote_address: u64,
    pub remote_key: u32,
    pub immediate: u32,
}

/// Where the bytes of a request are.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bytes<'a> {
    Inline(&'a [u8]),
    Pieces(&'a [Piece]),
}

/// The chain of requests for the next doorbell, and the counts of the send queue.
pub(super) struct SendQueue {
    /// The chain: requests `rung..posted`, in `requests[chained.start..chained.end]`.
    requests: Box<[ibv_send_wr]>,
    pieces: Box<[[ibv_sge; MAX_SGE]]>,
    inline: Box<[[u8; MAX_INLINE]]>,
    start: usize,
    end: usize,
    posted: u32,
    rung: u32,
    /// Requests since the last one with a completion, whether the user's or a hidden one.
    silent: u32,
    /// Number of the keep-alive that is under way.
    keep_alive: Option<u32>,
    /// Nothing is posted any more: the polling thread has taken stock.
    closed: bool,
    /// What the manager saw last, and since when.
    seen: u32,
    since: Instant,
    /// Registrations that requests have named.
    kept: HashMap<*const Registration, Arc<Registration>>,
    last_kept: *const Registration,
}

// SAFETY: the raw pointers lead into the boxes beside them, and to registrations that `kept` holds.
unsafe impl Send for SendQueue {}

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

/// What is left of a send queue whose connection has ended.
pub(super) struct Remains {
    /// Requests that reached the device; every one of them completes.
    pub rung: u32,
    /// Ids of signalled requests that did not.
    pub unrung: Vec<u64>,
}

impl Link {
    /// Makes the queue pair of `cm`, for an endpoint's queues.
    pub(super) fn new(queues: &Arc<Queues>, mut cm: CmId) -> Result<Arc<Self>, Error> {
        let depth = queues.config.send_depth as u32;
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
        self.down.store(true, Ordering::Release);
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
        // SAFETY: all-zero bytes are values of these plain C structs.
        let (mut attributes, mut init): (ibv_qp_attr, ibv_qp_init_attr) = unsafe { std::mem::zeroed() };
        let mask = ibv_qp_attr_mask::IBV_QP_MAX_QP_RD_ATOMIC | ibv_qp_attr_mask::IBV_QP_MAX_DEST_RD_ATOMIC;
        // SAFETY: the queue pair lives as long as `cm`, which is there until the link is dropped or given up.
        let errno = unsafe { ibv_query_qp(self.queue_pair, &mut attributes, mask.0 as i32, &mut init) };
        if errno != 0 {
            return Err(Error::System {
                call: "ibv_query_qp()".to_owned(),
                source: io::Error::from_raw_os_error(errno),
            });
        }
        let (out, serve) = (attributes.max_rd_atomic, attributes.max_dest_rd_atomic);
        if out == 0 || serve == 0 {
            return Err(Error::System {
                call: format!("agreeing on READs in flight (own {out}, the peer's {serve})"),
                source: io::Error::new(io::ErrorKind::InvalidData, "a READ would never complete"),
            });
        }
        attributes.min_rnr_timer = RNR_TIMER;
        // SAFETY: as above; the timer may be changed in the states in which a connection is.
        let errno = unsafe {
            ibv_modify_qp(self.queue_pair, &mut attributes, ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER.0 as i32)
        };
        if errno != 0 {
            return Err(Error::System {
                call: format!("ibv_modify_qp(min_rnr_timer = {RNR_TIMER})"),
                source: io::Error::from_raw_os_error(errno),
            });
        }
        self.established.store(true, Ordering::Release);
        Ok((out, serve))
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
    pub(super) fn post(
        &self,
        operation: Operation,
        bytes: Bytes<'_>,
        named: &mut dyn Iterator<Item = &Arc<Registration>>,
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
            queue.keep(registration);
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
        self.tags[number as usize & (self.tags.len() - 1)].store(tag, Ordering::Release);
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
        if queue.start == queue.end {
            return;
        }
        let chain = &mut queue.requests[queue.start..queue.end];
        let length = chain.len();
        let first = chain.as_mut_ptr();
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair lives as long as `cm`; the requests are linked to each other in the order of
        // the slice, the last one to none, and lead to pieces and bytes in the boxes of `queue`. The device
        // has room for them: `post` counts. What they name is kept by `queue.kept`.
        let errno = unsafe {
            for index in 1..length {
                (*first.add(index - 1)).next = first.add(index);
            }
            ibv_post_send(self.queue_pair, first, &mut bad)
        };
        if errno == 0 {
            queue.rung = queue.posted;
            (queue.start, queue.end) = (0, 0);
            return;
        }
        // Those before `bad` were taken; the others complete in error, as those of a connection that has ended.
        // SAFETY: `bad` is one of the chain, or NULL if the device did not say which.
        let taken = if bad.is_null() { 0 } else { (unsafe { bad.offset_from(first) }) as usize };
        queue.start += taken;
        queue.rung = queue.rung.wrapping_add(taken as u32) & NUMBER_MASK;
        self.break_off();
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

    /// Takes note that request `number` and all before it are done, and returns the tag of `number`.
    /// Called by the polling thread alone.
    pub(super) fn retire(&self, number: u32) -> u64 {
        let tag = self.tags[number as usize & (self.tags.len() - 1)].load(Ordering::Acquire);
        // SYNC POINT: from here on the tag's place may be used again.
        self.retired.store(next(number), Ordering::Release);
        tag
    }

    /// Whether all of the first `rung` requests are done.
    pub(super) fn is_flushed(&self, rung: u32) -> bool {
        self.retired() == rung
    }

    /// Ends posting for good, and says what is left. Called by the polling thread, once the link is down.
    pub(super) fn close(&self) -> Remains {
        let mut queue = self.lock();
        queue.closed = true;
        let unrung = queue.requests[queue.start..queue.end]
            .iter()
            .filter_map(|request| match WorkId::decode(request.wr_id) {
                WorkId::Send { number, signalled: true, .. } => {
                    Some(self.tags[number as usize & (self.tags.len() - 1)].load(Ordering::Acquire))
                }
                _ => None,
            })
            .collect();
        (queue.start, queue.end) = (0, 0);
        Remains { rung: queue.rung, unrung }
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

impl SendQueue {
    fn new(slots: usize) -> Self {
        Self {
            // SAFETY: all-zero bytes are a value of this plain C struct (null pointers and zeros).
            requests: (0..slots).map(|_| unsafe { std::mem::zeroed::<ibv_send_wr>() }).collect(),
            pieces: vec![[ibv_sge { addr: 0, length: 0, lkey: 0 }; MAX_SGE]; slots].into(),
            inline: vec![[0; MAX_INLINE]; slots].into(),
            start: 0,
            end: 0,
            posted: 0,
            rung: 0,
            silent: 0,
            keep_alive: None,
            closed: false,
            seen: 0,
            since: Instant::now(),
            kept: HashMap::new(),
            last_kept: ptr::null(),
        }
    }

    fn expire_keep_alive(&mut self, retired: u32) {
        let in_flight = distance(retired, self.posted);
        if self.keep_alive.is_some_and(|number| distance(number, self.posted) > in_flight) {
            self.keep_alive = None;
        }
    }

    fn room(&mut self, depth: u32, retired: u32) -> u32 {
        self.expire_keep_alive(retired);
        let in_flight = distance(retired, self.posted) - u32::from(self.keep_alive.is_some());
        depth - in_flight
    }

    fn keep(&mut self, registration: &Arc<Registration>) {
        let key = Arc::as_ptr(registration);
        if key != self.last_kept {
            self.last_kept = key;
            self.kept.entry(key).or_insert_with(|| Arc::clone(registration));
        }
    }

    /// Puts a request at the end of the chain.
    fn chain(
        &mut self,
        id: WorkId,
        operation: Operation,
        bytes: Bytes<'_>,
        completes: bool,
        max_inline: u32,
    ) {
        let slot = self.end;
        let pieces = &mut self.pieces[slot];
        let mut flags = if completes { ibv_send_flags::IBV_SEND_SIGNALED.0 } else { 0 };
        let count = match bytes {
            Bytes::Inline(bytes) => {
                self.inline[slot][..bytes.len()].copy_from_slice(bytes);
                pieces[0] =
                    ibv_sge { addr: self.inline[slot].as_ptr() as u64, length: bytes.len() as u32, lkey: 0 };
                if !bytes.is_empty() {
                    flags |= ibv_send_flags::IBV_SEND_INLINE.0;
                }
                usize::from(!bytes.is_empty())
            }
            Bytes::Pieces(given) => {
                let (mut count, mut total) = (0, 0);
                // Some devices take a length of 0 for 2 GiB.
                for piece in given.iter().filter(|piece| piece.length > 0) {
                    pieces[count] = ibv_sge { addr: piece.address, length: piece.length, lkey: piece.key };
                    total += u64::from(piece.length);
                    count += 1;
                }
                let outgoing = operation.opcode != ibv_wr_opcode::IBV_WR_RDMA_READ;
                if outgoing && (1..=u64::from(max_inline)).contains(&total) {
                    flags |= ibv_send_flags::IBV_SEND_INLINE.0;
                }
                count
            }
        };
        let sg_list = pieces.as_mut_ptr();
        let request = &mut self.requests[slot];
        request.wr_id = id.encode();
        request.next = ptr::null_mut();
        request.sg_list = sg_list;
        request.num_sge = count as i32;
        request.opcode = operation.opcode;
        request.send_flags = flags as c_uint;
        request.imm_data_invalidated_rkey_union.imm_data = operation.immediate.to_be();
        request.wr.rdma = rdma_t { remote_addr: operation.remote_address, rkey: operation.remote_key };
        self.end += 1;
    }
}

/// The number after `number`.
fn next(number: u32) -> u32 {
    number.wrapping_add(1) & NUMBER_MASK
}

/// How far `to` is ahead of `from`.
fn distance(from: u32, to: u32) -> u32 {
    to.wrapping_sub(from) & NUMBER_MASK
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_ids_round_trip() {
        for number in [0, 1, NUMBER_MASK] {
            for connection in [ConnectionId(0), ConnectionId(NUMBER_MASK)] {
                for signalled in [false, true] {
                    let id = WorkId::Send { connection, number, signalled };
                    assert_eq!(WorkId::decode(id.encode()), id);
                }
            }
            let id = WorkId::Receive { buffer: number };
            assert_eq!(WorkId::decode(id.encode()), id);
        }
    }

    #[test]
    fn numbers_go_round() {
        assert_eq!(next(NUMBER_MASK), 0);
        assert_eq!(distance(NUMBER_MASK, 1), 2);
        assert_eq!(distance(5, 5), 0);
    }

    #[test]
    fn the_keep_alive_takes_none_of_the_room() {
        let mut queue = SendQueue::new(5);
        assert_eq!(queue.room(4, 0), 4);
        queue.keep_alive = Some(0);
        queue.posted = 1;
        assert_eq!(queue.room(4, 0), 4);
        queue.posted = 5;
        assert_eq!(queue.room(4, 0), 0);
        // Request 0, the keep-alive, is done: the others are still there.
        assert_eq!(queue.room(4, 1), 0);
        assert_eq!(queue.keep_alive, None);
        assert_eq!(queue.room(4, 3), 2);
    }
}
