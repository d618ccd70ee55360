//! The queues of an endpoint: what its polling thread, its connections and other threads share.
//!
//! | what | written by | read by |
//! |---|---|---|
//! | completion queue | the NIC | the polling thread |
//! | receive queue | the polling thread ([`Queues::recycle`]) | the NIC |
//! | receive buffer `b` | the NIC, from its post to its completion | the polling thread, from then to its release |
//! | `news` | handshakes (a connection joins), the keeper (one has ended) | the polling thread, when `unread` is set |
//! | `sleep` | the polling thread, wakers | both |
//!
//! **Sleep.** A waker that finds [`AWAKE`] or [`WOKEN`] leaves [`WOKEN`] and makes no system call: the polling thread sees
//! it before it goes to sleep. One that finds [`ASLEEP`] writes to the descriptor that the sleeper polls.

use std::{
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
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::{
    error::Error,
    memory::Memory,
    transport::{
        Access, ConnectionId, EndpointConfig,
        rdma::{
            device::{Device, RdmaRegion},
            keeper::{Keeper, set_nonblocking},
            link::Link,
            sending::{SPARE, WorkId},
        },
    },
};

/// Completions taken at a time.
pub(super) const BATCH: usize = 32;
/// Most receive buffers that are given back in one call.
const MOST_CHAINED: usize = 16;
const _: () = assert!(MOST_CHAINED <= BATCH);
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
    Failed(ConnectionId),
    /// The queue pair has taken its last buffer, or the device does not say when.
    Settled(ConnectionId),
    /// The queue pair is destroyed.
    Gone(ConnectionId),
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
    lost: AtomicBool,
    connections: AtomicUsize,
    next_id: AtomicU32,
    pub config: EndpointConfig,
    pub keeper: Arc<Keeper>,
    pub device: Arc<Device>,
}

// SAFETY: verbs calls on these objects are thread-safe; the pointers are not changed after `new`.
unsafe impl Send for Queues {}
// SAFETY: as for `Send`.
unsafe impl Sync for Queues {}

impl Queues {
    pub(super) fn new(
        device: &Arc<Device>,
        keeper: &Arc<Keeper>,
        config: &EndpointConfig,
    ) -> Result<Self, Error> {
        let completions = check(device, config)?;
        let stride = config.receive_size.next_multiple_of(BUFFER_ALIGNMENT);
        let buffers_made = config.receive_buffers + chain(config) - 1;
        let memory = Memory::new("fervor-receive", stride * buffers_made)?;
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
            lost: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            next_id: AtomicU32::new(0),
            config: config.clone(),
            keeper: Arc::clone(keeper),
            device: Arc::clone(device),
        };
        // From here on `drop` ends what has been made.
        queues.make(completions)?;
        let all: Vec<u32> = (0..buffers_made as u32).collect();
        for some in all.chunks(BATCH) {
            queues.post_receives(some).map_err(Error::io(format!("ibv_post_srq_recv({some:?})")))?;
        }
        Ok(queues)
    }

    fn make(&mut self, completions: u64) -> Result<(), Error> {
        let context = self.device.context;
        // SAFETY: the device is open.
        self.channel = unsafe { (self.device.verbs.ibv_create_comp_channel)(context) };
        if self.channel.is_null() {
            return Err(Error::last_os("ibv_create_comp_channel()"));
        }
        set_nonblocking(self.channel_fd())?;
        let vector = self.config.completion_vector % self.device.limits.vectors;
        // SAFETY: the device is open, the channel is of the same device, and the vector is one that it has.
        self.completion = unsafe {
            (self.device.verbs.ibv_create_cq)(
                context,
                completions as i32,
                ptr::null_mut(),
                self.channel,
                vector as i32,
            )
        };
        if self.completion.is_null() {
            return Err(Error::last_os(format!("ibv_create_cq({completions} entries, vector {vector})")));
        }
        let mut attributes = ibv_srq_init_attr {
            srq_context: ptr::null_mut(),
            attr: ibv_srq_attr {
                max_wr: (self.config.receive_buffers + chain(&self.config) - 1) as u32,
                max_sge: 1,
                srq_limit: 0,
            },
        };
        // SAFETY: the domain is of the open device.
        self.receive = unsafe { (self.device.verbs.ibv_create_srq)(self.device.domain, &mut attributes) };
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

    /// Whether there is something to [`take_news`](Self::take_news) of.
    pub(super) fn has_news(&self) -> bool {
        // SYNC POINT: what was told before is in the list.
        self.unread.load(Ordering::Acquire)
    }

    /// What was told since the last call.
    pub(super) fn take_news(&self) -> Vec<News> {
        let mut all = self.lock_news();
        self.unread.store(false, Ordering::Relaxed);
        std::mem::take(&mut *all)
    }

    /// The last news: nobody reads any more.
    pub(super) fn close(&self) -> Vec<News> {
        let mut all = self.lock_news();
        self.closed.store(true, Ordering::Release);
        std::mem::take(&mut *all)
    }

    fn lock_news(&self) -> MutexGuard<'_, Vec<News>> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a present or the next sleep. A system call only if there is a present one.
    pub(super) fn wake(&self) {
        if self.sleep.swap(WOKEN, Ordering::SeqCst) == ASLEEP {
            // It fails only when the counter is full: then the descriptor is readable anyway.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// Sleeps until the queue, if it was armed, gets a completion; until a wake; or until `timeout` is over.
    pub(super) fn sleep(&self, timeout: Duration) {
        if self.sleep.compare_exchange(AWAKE, ASLEEP, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            poll_readable(&[self.channel_fd(), self.wake.as_fd()], timeout);
        }
        if self.sleep.swap(AWAKE, Ordering::SeqCst) == WOKEN {
            // The waker's write may come after this read: then it ends the next sleep, which is allowed.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
    }

    fn channel_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is open as long as `self` lives.
        unsafe { BorrowedFd::borrow_raw((*self.channel).fd) }
    }

    /// Hands buffers to the device, in one chain of at most [`BATCH`].
    fn post_receives(&self, buffers: &[u32]) -> io::Result<()> {
        let registration = &self.buffers.0;
        let blank = ibv_recv_wr { wr_id: 0, next: ptr::null_mut(), sg_list: ptr::null_mut(), num_sge: 1 };
        let mut pieces = [ibv_sge { addr: 0, length: 0, lkey: registration.local_key }; BATCH];
        let mut requests = [blank; BATCH];
        for (index, &buffer) in buffers.iter().enumerate() {
            pieces[index].addr = registration.memory.as_ptr() as u64 + u64::from(buffer) * self.stride as u64;
            pieces[index].length = self.config.receive_size as u32;
            requests[index].wr_id = WorkId::Receive { buffer }.encode();
        }
        let (first, piece) = (requests.as_mut_ptr(), pieces.as_mut_ptr());
        for index in 0..buffers.len() {
            // SAFETY: both arrays have more places than that, or the loop above would have panicked.
            unsafe {
                (*first.add(index)).sg_list = piece.add(index);
                if index + 1 < buffers.len() {
                    (*first.add(index)).next = first.add(index + 1);
                }
            }
        }
        let mut bad = ptr::null_mut();
        // SAFETY: queue and registration live; the pieces lie inside the buffers' memory, and are not in use by anyone else
        // (a buffer is fresh, or has been released); the requests are a chain that ends, and are copied by the call.
        match unsafe { ibv_post_srq_recv(self.receive, first, &mut bad) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno.abs())),
        }
    }

    /// The first `length` bytes of a buffer.
    ///
    /// # Safety
    /// The buffer is not in the receive queue as long as the slice lives.
    pub(super) unsafe fn message(&self, buffer: u32, length: usize) -> &[u8] {
        let memory = &self.buffers.0.memory;
        let offset = buffer as usize * self.stride;
        assert!(length <= self.stride && offset + length <= memory.len(), "a buffer of another endpoint");
        // SAFETY: the bytes lie inside the mapping, which lives as long as `self`. Outside of the receive queue the NIC does
        // not write them (by the caller's promise), and nobody else can: the memory is registered for no remote access.
        unsafe { std::slice::from_raw_parts(memory.as_ptr().add(offset), length) }
    }

    /// Buffers that are given back to the device in one call.
    pub(super) fn chain(&self) -> usize {
        chain(&self.config)
    }

    /// Gives buffers to the device again. The queue has room for each of its buffers.
    pub(super) fn recycle(&self, buffers: &[u32]) {
        if let Err(error) = self.post_receives(buffers) {
            panic!("ibv_post_srq_recv({buffers:?}) on {} failed: {error}", self.device.name);
        }
    }

    /// The device has lost these queues: nothing more completes.
    pub(super) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// Whether it has.
    pub(super) fn are_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Takes completions, as many as there is place for or there are, and returns how many: so many of the places hold one.
    pub(super) fn take(&self, into: &mut [MaybeUninit<ibv_wc>; BATCH]) -> usize {
        // SAFETY: the queue lives, and `into` has room for that many.
        let number = unsafe { ibv_poll_cq(self.completion, BATCH as i32, into.as_mut_ptr().cast()) };
        usize::try_from(number)
            .unwrap_or_else(|_| panic!("ibv_poll_cq on {} failed ({number})", self.device.name))
    }

    /// Asks for an event at the next completion.
    pub(super) fn arm(&self) {
        // SAFETY: the queue lives.
        unsafe { ibv_req_notify_cq(self.completion, 0) };
    }

    /// Takes all events of the completion channel.
    pub(super) fn drain_events(&self) {
        let mut number = 0;
        let (mut queue, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel lives, and there is a place for both results.
        while unsafe { (self.device.verbs.ibv_get_cq_event)(self.channel, &mut queue, &mut context) } == 0 {
            number += 1;
        }
        if number > 0 {
            // SAFETY: so many events of this queue (the only one of the channel) have been taken.
            unsafe { (self.device.verbs.ibv_ack_cq_events)(self.completion, number) };
        }
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        // SAFETY: every queue pair on these queues belonged to a `Link` that held an `Arc` of `self`, and is gone; all
        // events are acknowledged; each object was made by `make` or is NULL, and is ended once, in this order.
        unsafe {
            if !self.receive.is_null() {
                (self.device.verbs.ibv_destroy_srq)(self.receive);
            }
            if !self.completion.is_null() {
                (self.device.verbs.ibv_destroy_cq)(self.completion);
            }
            if !self.channel.is_null() {
                (self.device.verbs.ibv_destroy_comp_channel)(self.channel);
            }
        }
    }
}

/// Waits until one of `fds` is readable, or until `timeout` is over.
fn poll_readable(fds: &[BorrowedFd<'_>], timeout: Duration) {
    let mut polled: Vec<PollFd<'_>> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let timeout = Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    // A signal that interrupts the wait is a wake like any other: every caller looks again.
    let _ = rustix::event::poll(&mut polled, Some(&timeout));
}

/// Buffers that are given back in one call. As many, less one, are made beyond those that were asked for: so many may wait to be given back
/// while the user, who has released them, counts on all of its own.
fn chain(config: &EndpointConfig) -> usize {
    (config.receive_buffers / 4).clamp(1, MOST_CHAINED)
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
    at_most("send_depth", config.send_depth, limits.sends.saturating_sub(SPARE.into()), "")?;
    let receives = config.receive_buffers.saturating_add(chain(config) - 1);
    at_most(
        "the receive queue (receive_buffers, and those that are being given back)",
        receives,
        limits.receives,
        "",
    )?;
    let completions =
        config.connections.saturating_mul(config.send_depth + SPARE as usize).saturating_add(receives);
    at_most(
        "the completion queue (connections * (send_depth + 2) + receive_buffers)",
        completions,
        limits.completions,
        "; use fewer connections, a lower send_depth or more polling threads",
    )?;
    Ok(completions as u64)
}
