//! The endpoint: a completion queue, a shared receive queue with its buffers, and the connections that use them.
//!
//! # Who writes, who reads
//!
//! | what | written by | read by |
//! |---|---|---|
//! | completion queue | the NIC | the polling thread |
//! | receive queue | the polling thread ([`Endpoint::release`]) | the NIC |
//! | receive buffer `b` | the NIC, from its post to its completion | the polling thread, from then to its release |
//! | `news` | handshakes (a connection joins), the manager (one has ended) | the polling thread, when `unread` is set |
//! | `sleep` | the polling thread, wakers | both |
//!
//! # The end of a connection
//!
//! ```text
//!  error completion, DISCONNECTED event, disconnect(), drop
//!      │  Link::break_off: nothing more is posted
//!      ▼
//!  manager: queue pair → error state, peer told ──▶ news: InError
//!      │  the device flushes what is in its send queue: a completion each
//!      ▼
//!  polling thread: all rung requests have completed, and the completion queue has been seen empty since InError
//!      │  what was posted but never rung completes too
//!      ▼
//!  Disconnected; the link leaves the tables; later receives of its queue pair go back to the receive queue
//! ```

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasherDefault, Hasher},
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use rdma_sys::*;

use crate::{
    error::Error,
    memory::Memory,
    transport::{
        Access, Attach, Completion, ConnectionId, Endpoint, EndpointConfig, ReceiveBuffer, WorkError,
        rdma::{
            device::{Device, RdmaRegion},
            id::{poll_readable, set_nonblocking},
            link::{Link, WorkId},
            manager::Manager,
        },
    },
};

/// Completions taken at a time.
const BATCH: usize = 32;
/// Receive buffers begin at multiples of this.
const BUFFER_ALIGNMENT: usize = 64;

// States of `Queues::sleep`.
const AWAKE: u32 = 0;
const ASLEEP: u32 = 1;
const WOKEN: u32 = 2;

/// What the polling thread is told by other threads.
pub(super) enum News {
    /// A connection has a queue pair.
    Joined(Arc<Link>),
    /// The queue pair is in the error state.
    InError(ConnectionId),
    /// The handshake failed: the user never learns of this one.
    GivenUp(ConnectionId),
}

/// The part of an endpoint that connections and other threads share.
pub(super) struct Queues {
    completion: *mut ibv_cq,
    channel: *mut ibv_comp_channel,
    receive: *mut ibv_srq,
    buffers: RdmaRegion,
    stride: usize,
    wake: OwnedFd,
    sleep: AtomicU32,
    news: Mutex<Vec<News>>,
    unread: AtomicBool,
    closed: AtomicBool,
    connections: AtomicUsize,
    next_id: AtomicU32,
    pub config: EndpointConfig,
    pub manager: Arc<Manager>,
    pub device: Arc<Device>,
}

// SAFETY: verbs calls on these objects are thread-safe; the pointers are not changed after `new`.
unsafe impl Send for Queues {}
// SAFETY: as for `Send`.
unsafe impl Sync for Queues {}

impl Queues {
    fn new(device: &Arc<Device>, manager: &Arc<Manager>, config: &EndpointConfig) -> Result<Self, Error> {
        let completions = check(device, config)?;
        let stride = config.receive_size.next_multiple_of(BUFFER_ALIGNMENT);
        let memory = Memory::new("fervor-receive", stride * config.receive_buffers)?;
        let buffers = device.register(&memory, Access::Local)?;
        let wake = rustix::event::eventfd(
            0,
            rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK,
        )
        .map_err(|e| Error::io("eventfd()")(e.into()))?;
        let mut queues = Self {
            completion: ptr::null_mut(),
            channel: ptr::null_mut(),
            receive: ptr::null_mut(),
            buffers,
            stride,
            wake,
            sleep: AtomicU32::new(AWAKE),
            news: Mutex::default(),
            unread: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            next_id: AtomicU32::new(0),
            config: config.clone(),
            manager: Arc::clone(manager),
            device: Arc::clone(device),
        };
        // From here on `drop` ends what has been made.
        queues.make(completions)?;
        for buffer in 0..config.receive_buffers as u32 {
            queues.post_receive(buffer).map_err(Error::io(format!("ibv_post_srq_recv({buffer})")))?;
        }
        Ok(queues)
    }

    fn make(&mut self, completions: u64) -> Result<(), Error> {
        let context = self.device.context;
        // SAFETY: the device is open.
        self.channel = unsafe { ibv_create_comp_channel(context) };
        if self.channel.is_null() {
            return Err(Error::last_os("ibv_create_comp_channel()"));
        }
        set_nonblocking(self.channel_fd())?;
        let vector = self.config.completion_vector % self.device.limits.vectors;
        // SAFETY: the device is open, the channel is of the same device, and the vector is one that it has.
        self.completion = unsafe {
            ibv_create_cq(context, completions as i32, ptr::null_mut(), self.channel, vector as i32)
        };
        if self.completion.is_null() {
            return Err(Error::last_os(format!("ibv_create_cq({completions} entries, vector {vector})")));
        }
        let mut attributes = ibv_srq_init_attr {
            srq_context: ptr::null_mut(),
            attr: ibv_srq_attr { max_wr: self.config.receive_buffers as u32, max_sge: 1, srq_limit: 0 },
        };
        // SAFETY: the domain is of the open device.
        self.receive = unsafe { ibv_create_srq(self.device.domain, &mut attributes) };
        if self.receive.is_null() {
            return Err(Error::last_os(format!("ibv_create_srq({} buffers)", self.config.receive_buffers)));
        }
        Ok(())
    }

    pub(super) fn completion_queue(&self) -> *mut ibv_cq {
        self.completion
    }

    pub(super) fn receive_queue(&self) -> *mut ibv_srq {
        self.receive
    }

    /// A fresh name for a connection.
    pub(super) fn next_id(&self) -> ConnectionId {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        assert!(id < 1 << 31, "an endpoint has had 2^31 connections");
        ConnectionId(id)
    }

    /// Takes a place for a connection.
    pub(super) fn reserve(&self) -> Result<(), Error> {
        let limit = self.config.connections;
        let taken = self
            .connections
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < limit).then_some(n + 1));
        match taken {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::Limit {
                what: "the number of connections of an endpoint".to_owned(),
                value: limit as u64 + 1,
                limit: limit as u64,
                cure: "; end one first, or make the endpoint for more".to_owned(),
            }),
        }
    }

    /// Gives a place back.
    pub(super) fn unreserve(&self) {
        self.connections.fetch_sub(1, Ordering::AcqRel);
    }

    /// Tells the polling thread. `false`: the endpoint is gone.
    pub(super) fn tell(&self, news: News) -> bool {
        let mut all = self.lock_news();
        if self.closed.load(Ordering::Acquire) {
            return false;
        }
        all.push(news);
        // SYNC POINT: the polling thread looks into the list when it sees this.
        self.unread.store(true, Ordering::Release);
        drop(all);
        self.wake();
        true
    }

    fn lock_news(&self) -> MutexGuard<'_, Vec<News>> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a present or the next sleep. A system call only if there is a present one.
    fn wake(&self) {
        if self.sleep.swap(WOKEN, Ordering::SeqCst) == ASLEEP {
            // It fails only when the counter is full: then the descriptor is readable anyway.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    fn channel_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is open as long as `self` lives.
        unsafe { BorrowedFd::borrow_raw((*self.channel).fd) }
    }

    fn post_receive(&self, buffer: u32) -> io::Result<()> {
        let registration = &self.buffers.0;
        let mut piece = ibv_sge {
            addr: registration.memory.as_ptr() as u64 + u64::from(buffer) * self.stride as u64,
            length: self.config.receive_size as u32,
            lkey: registration.local_key,
        };
        let mut request = ibv_recv_wr {
            wr_id: WorkId::Receive { buffer }.encode(),
            next: ptr::null_mut(),
            sg_list: &mut piece,
            num_sge: 1,
        };
        let mut bad = ptr::null_mut();
        // SAFETY: queue and registration live; the piece lies inside the buffers' memory, is not in use by anyone else
        // (the buffer is fresh, or has been released), and the request is copied by the call.
        match unsafe { ibv_post_srq_recv(self.receive, &mut request, &mut bad) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno.abs())),
        }
    }

    /// Gives a buffer to the device again. The queue has room for each of its buffers.
    fn recycle(&self, buffer: u32) {
        if let Err(error) = self.post_receive(buffer) {
            panic!("ibv_post_srq_recv({buffer}) on {} failed: {error}", self.device.name);
        }
    }

    /// Takes completions, as many as there is place for or there are.
    fn take<'a>(&self, into: &'a mut [MaybeUninit<ibv_wc>; BATCH]) -> &'a [ibv_wc] {
        // SAFETY: the queue lives, and `into` has room for that many.
        let number = unsafe { ibv_poll_cq(self.completion, BATCH as i32, into.as_mut_ptr().cast()) };
        let number = usize::try_from(number)
            .unwrap_or_else(|_| panic!("ibv_poll_cq on {} failed ({number})", self.device.name));
        // SAFETY: so many have been written, and they are not more than there is room for.
        unsafe { std::slice::from_raw_parts(into[..number].as_ptr().cast(), number) }
    }

    /// Asks for an event at the next completion.
    fn arm(&self) {
        // SAFETY: the queue lives.
        unsafe { ibv_req_notify_cq(self.completion, 0) };
    }

    /// Takes all events of the completion channel.
    fn drain_events(&self) {
        let mut number = 0;
        let (mut queue, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel lives, and there is a place for both results.
        while unsafe { ibv_get_cq_event(self.channel, &mut queue, &mut context) } == 0 {
            number += 1;
        }
        if number > 0 {
            // SAFETY: so many events of this queue (the only one of the channel) have been taken.
            unsafe { ibv_ack_cq_events(self.completion, number) };
        }
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        // SAFETY: every queue pair on these queues belonged to a `Link` that held an `Arc` of `self`, and is gone; all
        // events are acknowledged; each object was made by `make` or is NULL, and is ended once, in this order.
        unsafe {
            if !self.receive.is_null() {
                ibv_destroy_srq(self.receive);
            }
            if !self.completion.is_null() {
                ibv_destroy_cq(self.completion);
            }
            if !self.channel.is_null() {
                ibv_destroy_comp_channel(self.channel);
            }
        }
    }
}

/// Whether the device can do what `config` asks for. Returns the entries that the completion queue needs.
fn check(device: &Device, config: &EndpointConfig) -> Result<u64, Error> {
    let limits = &device.limits;
    let at_most = |what: &str, value: usize, limit: u64, cure: &str| {
        if value as u64 <= limit {
            return Ok(());
        }
        Err(Error::Limit {
            what: format!("{what} on {}", device.name),
            value: value as u64,
            limit,
            cure: cure.to_owned(),
        })
    };
    if config.read_depth == 0 || config.send_depth == 0 || config.receive_buffers == 0 {
        return Err(Error::System {
            call: format!("endpoint({config:?})"),
            source: io::Error::new(
                io::ErrorKind::InvalidInput,
                "read_depth, send_depth and receive_buffers are at least 1",
            ),
        });
    }
    at_most("receive_buffers", config.receive_buffers, limits.receives, "")?;
    at_most("receive_size", config.receive_size, limits.message, "; send longer messages in parts")?;
    // One place more than the user's, for the keep-alive.
    at_most("send_depth", config.send_depth, limits.sends.saturating_sub(1), "")?;
    let completions =
        config.connections.saturating_mul(config.send_depth + 1).saturating_add(config.receive_buffers);
    at_most(
        "the completion queue (connections * (send_depth + 1) + receive_buffers)",
        completions,
        limits.completions,
        "; use fewer connections, a lower send_depth or more polling threads",
    )?;
    Ok(completions as u64)
}

/// A connection, as the polling thread knows it.
struct Entry {
    link: Arc<Link>,
    /// The first error.
    cause: Option<WorkError>,
    /// The queue pair is in the error state, so that nothing new can complete well.
    in_error: bool,
}

/// Connection numbers and queue pair numbers are spread well enough by themselves.
#[derive(Default)]
struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(u32::from(byte));
        }
    }

    fn write_u32(&mut self, number: u32) {
        // The table takes its bits from both ends: a product by an odd constant fills them.
        self.0 = (self.0 ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

type NumberMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

/// An endpoint of the `rdma` provider.
pub struct RdmaEndpoint {
    queues: Arc<Queues>,
    links: NumberMap<ConnectionId, Entry>,
    by_queue_pair: NumberMap<u32, ConnectionId>,
    /// Links that have ended, but have not been reported.
    ending: Vec<ConnectionId>,
    /// Completions that `wait` came upon.
    found: VecDeque<ibv_wc>,
}

impl RdmaEndpoint {
    pub(super) fn new(
        device: &Arc<Device>,
        manager: &Arc<Manager>,
        config: &EndpointConfig,
    ) -> Result<Self, Error> {
        Ok(Self {
            queues: Arc::new(Queues::new(device, manager, config)?),
            links: NumberMap::default(),
            by_queue_pair: NumberMap::default(),
            ending: Vec::new(),
            found: VecDeque::new(),
        })
    }

    /// Reads the news.
    fn catch_up(&mut self) {
        let news = {
            let mut all = self.queues.lock_news();
            self.queues.unread.store(false, Ordering::Relaxed);
            std::mem::take(&mut *all)
        };
        for item in news {
            match item {
                News::Joined(link) => {
                    self.by_queue_pair.insert(link.queue_pair_number, link.id);
                    self.links.insert(link.id, Entry { link, cause: None, in_error: false });
                }
                News::InError(id) => {
                    if let Some(entry) = self.links.get_mut(&id) {
                        entry.in_error = true;
                        self.ending.push(id);
                    }
                }
                News::GivenUp(id) => self.forget(id),
            }
        }
    }

    fn forget(&mut self, id: ConnectionId) {
        let Some(entry) = self.links.remove(&id) else { return };
        self.ending.retain(|&ending| ending != id);
        let number = entry.link.queue_pair_number;
        // Another queue pair may have the number by now.
        if self.by_queue_pair.get(&number) == Some(&id) {
            self.by_queue_pair.remove(&number);
        }
        self.queues.unreserve();
    }

    fn complete(&mut self, completion: &ibv_wc, into: &mut Vec<Completion>) {
        match WorkId::decode(completion.wr_id) {
            WorkId::Send { connection, number, signalled } => {
                let Some(entry) = self.links.get_mut(&connection) else { return };
                let tag = entry.link.retire(number);
                let result = work_result(completion.status);
                entry.note(result);
                if signalled {
                    into.push(Completion::Work { connection, id: tag, result });
                }
            }
            WorkId::Receive { buffer } => self.received(completion, buffer, into),
        }
    }

    fn received(&mut self, completion: &ibv_wc, buffer: u32, into: &mut Vec<Completion>) {
        if !self.by_queue_pair.contains_key(&completion.qp_num) {
            // Of a connection that joined after this poll began; or of one that has been reported as over.
            self.catch_up();
        }
        let connection = self.by_queue_pair.get(&completion.qp_num).copied();
        let Some((connection, entry)) = connection.and_then(|id| Some((id, self.links.get_mut(&id)?))) else {
            return self.queues.recycle(buffer);
        };
        if completion.status != ibv_wc_status::IBV_WC_SUCCESS {
            entry.note(received_result(completion.status));
            return self.queues.recycle(buffer);
        }
        let immediate = (completion.wc_flags & ibv_wc_flags::IBV_WC_WITH_IMM.0 != 0).then(|| {
            // SAFETY: the flag says that the union holds an immediate; every bit pattern is one.
            u32::from_be(unsafe { completion.imm_data_invalidated_rkey_union.imm_data })
        });
        if completion.opcode == ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM {
            self.queues.recycle(buffer);
            into.push(Completion::WriteImmediate { connection, immediate: immediate.unwrap_or_default() });
        } else {
            let buffer = ReceiveBuffer { index: buffer, length: completion.byte_len };
            into.push(Completion::Received { connection, buffer, immediate });
        }
    }

    /// Reports connections of which nothing more can come. Only when the completion queue has just been empty.
    fn bury(&mut self, into: &mut Vec<Completion>) {
        for id in self.ending.clone() {
            let Some(entry) = self.links.get(&id) else { continue };
            let remains = entry.link.close();
            if !entry.in_error || !entry.link.is_flushed(remains.rung) {
                continue;
            }
            let cause = entry.cause.unwrap_or(WorkError::Disconnected);
            let flushed = |id_of_request| Completion::Work {
                connection: id,
                id: id_of_request,
                result: Err(WorkError::Flushed),
            };
            into.extend(remains.unrung.into_iter().map(flushed));
            into.push(Completion::Disconnected { connection: id, cause });
            self.forget(id);
        }
    }
}

impl Entry {
    /// Keeps the first error, and ends the connection at it.
    fn note(&mut self, result: Result<(), WorkError>) {
        let Err(error) = result else { return };
        if error != WorkError::Flushed {
            self.cause.get_or_insert(error);
        }
        self.link.break_off();
    }
}

/// The status of a request of ours.
fn work_result(status: ibv_wc_status::Type) -> Result<(), WorkError> {
    Err(match status {
        ibv_wc_status::IBV_WC_SUCCESS => return Ok(()),
        ibv_wc_status::IBV_WC_WR_FLUSH_ERR => WorkError::Flushed,
        ibv_wc_status::IBV_WC_REM_ACCESS_ERR => WorkError::RemoteAccess,
        ibv_wc_status::IBV_WC_REM_INV_REQ_ERR => WorkError::RemoteInvalid,
        ibv_wc_status::IBV_WC_RETRY_EXC_ERR | ibv_wc_status::IBV_WC_RESP_TIMEOUT_ERR => {
            WorkError::RetryExceeded
        }
        ibv_wc_status::IBV_WC_RNR_RETRY_EXC_ERR => WorkError::ReceiverNotReady,
        other => WorkError::Other(other),
    })
}

/// The status of a receive: too long for the buffer is what the sender calls an invalid request.
fn received_result(status: ibv_wc_status::Type) -> Result<(), WorkError> {
    match status {
        ibv_wc_status::IBV_WC_LOC_LEN_ERR => Err(WorkError::RemoteInvalid),
        status => work_result(status),
    }
}

impl Endpoint for RdmaEndpoint {
    type Attach = RdmaAttach;

    fn attach(&self) -> RdmaAttach {
        RdmaAttach(Arc::clone(&self.queues))
    }

    fn poll(&mut self, into: &mut Vec<Completion>) -> usize {
        let before = into.len();
        // SYNC POINT: what was told before is in the list.
        if self.queues.unread.load(Ordering::Acquire) {
            self.catch_up();
        }
        while let Some(completion) = self.found.pop_front() {
            self.complete(&completion, into);
        }
        let mut places = [const { MaybeUninit::uninit() }; BATCH];
        let queues = Arc::clone(&self.queues);
        let taken = queues.take(&mut places);
        for completion in taken {
            self.complete(completion, into);
        }
        if taken.len() < BATCH && !self.ending.is_empty() {
            self.bury(into);
        }
        into.len() - before
    }

    fn wait(&mut self, timeout: Duration) {
        if !self.found.is_empty() || self.queues.unread.load(Ordering::Acquire) {
            return;
        }
        self.queues.drain_events();
        self.queues.arm();
        // What completed before the queue was armed announces itself to nobody.
        let mut places = [const { MaybeUninit::uninit() }; BATCH];
        let taken = self.queues.take(&mut places);
        if !taken.is_empty() {
            // SAFETY: each is read once out of places that are never dropped: a move.
            self.found.extend(taken.iter().map(|completion| unsafe { ptr::read(completion) }));
            return;
        }
        let sleep = &self.queues.sleep;
        if sleep.compare_exchange(AWAKE, ASLEEP, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            poll_readable(&[self.queues.channel_fd(), self.queues.wake.as_fd()], timeout);
        }
        if sleep.swap(AWAKE, Ordering::SeqCst) == WOKEN {
            // The waker's write may come after this read: then it ends the next sleep, which is allowed.
            let _ = rustix::io::read(&self.queues.wake, &mut [0; 8]);
        }
    }

    fn message(&self, buffer: &ReceiveBuffer) -> &[u8] {
        let memory = &self.queues.buffers.0.memory;
        let (offset, length) = (buffer.index as usize * self.queues.stride, buffer.length as usize);
        assert!(
            length <= self.queues.stride && offset + length <= memory.len(),
            "a buffer of another endpoint"
        );
        // SAFETY: the bytes lie inside the mapping, which lives as long as `self`. From the completion to the release of
        // the buffer (which takes it by value) neither the NIC nor anybody else writes them: it is not in
        // the receive queue, and its memory is registered for no remote access.
        unsafe { std::slice::from_raw_parts(memory.as_ptr().add(offset), length) }
    }

    fn release(&mut self, buffer: ReceiveBuffer) {
        self.queues.recycle(buffer.index);
    }
}

impl Drop for RdmaEndpoint {
    fn drop(&mut self) {
        let news = {
            let mut all = self.queues.lock_news();
            self.queues.closed.store(true, Ordering::Release);
            std::mem::take(&mut *all)
        };
        for entry in self.links.values() {
            entry.link.break_off();
        }
        for item in news {
            if let News::Joined(link) = item {
                link.break_off();
            }
        }
    }
}

/// Handle of an [`RdmaEndpoint`] for other threads.
#[derive(Clone)]
pub struct RdmaAttach(pub(super) Arc<Queues>);

impl Attach for RdmaAttach {
    fn wake(&self) {
        self.0.wake();
    }
}
