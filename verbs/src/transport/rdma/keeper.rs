//! The thread that keeps the connections of a transport: one per `Rdma`.
//!
//! It watches the bootstrap socket of each connection that has one (its end means that the peer's process is gone, or has disconnected;
//! of others a session tells the same: [`RdmaLeash`](super::RdmaLeash)), reads what the device says, asks idle peers for signs of life, and moves queue pairs to their end. It never waits for anybody: it takes the lock of a send
//! queue only for a call.
//!
//! # The end of a connection
//!
//! ```text
//!  keeper                                   polling thread
//!  end: queue pair → ERR, all that is
//!       posted and a sentinel are flushed,
//!       socket closed            ──Failed─▶ polls until the sentinel is flushed and the queue is empty
//!  settle: waits for LAST_WQE  ◀──settle───
//!       (not if the device gives none)
//!                               ──Settled─▶ polls until the queue is empty
//!  destroy: the queue pair     ◀──destroy──
//!                               ──Gone────▶ polls until the queue is empty; reports the end
//! ```
//!
//! - *Nothing of the connection changes memory after its end is reported.* The queue pair is gone by then. (In ERR alone, software devices may
//!   still be in the middle of a packet.)
//! - *No receive buffer is lost.* A buffer that the queue pair had taken from the shared receive queue comes back in a completion. A device may
//!   throw away completions of a queue pair that is destroyed, so they are polled before: the sentinel's flush says that the sending side has
//!   no more of them, LAST_WQE_REACHED that the receiving side has none. A software device may complete a message after that, so they are
//!   polled afterwards, too.
//! - *No message is lost that had completed.* "Polls until the queue is empty" means a look that began after the step before it was known, and
//!   found the queue empty.
//!
//! An endpoint that is dropped polls no more. Then its connections' queue pairs are destroyed at once, and the buffers end with the endpoint.
//!
//! **Ends of the thread.** The thread holds the connections until their queue pairs are gone; a connection holds its endpoint's queues, and those
//! a [`Keeper`], with the last of which the thread is told to stop. The last one may fall on the thread itself: then nobody joins it.

use std::{
    collections::{HashMap, VecDeque},
    io::{ErrorKind, Read},
    mem::MaybeUninit,
    net::TcpStream,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::event::{Timespec, epoll};

use crate::{
    error::Error,
    transport::{
        host::strangers::STRANGER_PATIENCE,
        rdma::{
            device::Device,
            events::{self, Kind},
            link::Link,
            offer::READY,
            queues::News,
        },
    },
};

/// How often idle connections are looked for.
const TICK: Duration = Duration::from_millis(100);
/// How long a device may take to say that a queue pair has taken its last buffer.
const LAST_BUFFER: Duration = Duration::from_millis(100);
/// How often it is looked whether that time is over, while it is.
const LOOK: Duration = Duration::from_millis(10);

// What an epoll event is of. Connections are numbered from `FIRST_KEY`.
const BELL: u64 = 0;
const DEVICE: u64 = 1;
const FIRST_KEY: u64 = 2;

/// By what the two ends of a connection hear of each other.
pub(super) enum Channel {
    /// A socket of its own.
    Socket(TcpStream),
    /// One that is not the keeper's. At the end of the connection, when the queue pair is in the error state, this is called.
    Other(Box<dyn FnOnce() + Send>),
}

/// What other threads ask for.
enum Order {
    /// A connection is made; and whether its peer has yet to say that it is ready.
    Watch {
        link: Arc<Link>,
        channel: Channel,
        waiting: bool,
    },
    /// The peer is ready.
    Ready(u64),
    End(u64),
    Settle(u64),
    Destroy(u64),
    /// The endpoint is gone.
    Abandon(u64),
}

/// Orders that the thread has not taken yet.
#[derive(Default)]
struct Orders {
    list: Vec<Order>,
    /// The bell has been rung for one of them.
    rung: bool,
}

/// What the thread and its handle share.
struct Core {
    device: Arc<Device>,
    epoll: OwnedFd,
    bell: OwnedFd,
    stop: AtomicBool,
    orders: Mutex<Orders>,
    next_key: AtomicU64,
}

/// Handle of the keeper's thread, which stops with it.
pub(super) struct Keeper {
    core: Arc<Core>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    pub(super) fn start(device: &Arc<Device>) -> Result<Arc<Self>, Error> {
        let failed = |call: &'static str| move |e: rustix::io::Errno| Error::io(call)(e.into());
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let bell = rustix::event::eventfd(0, flags).map_err(failed("eventfd()"))?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed("epoll_create()"))?;
        let readable = epoll::EventFlags::IN;
        epoll::add(&epoll, &bell, epoll::EventData::new_u64(BELL), readable)
            .map_err(failed("epoll_ctl()"))?;
        let device_events = device.events_fd();
        set_nonblocking(device_events)?;
        epoll::add(&epoll, device_events, epoll::EventData::new_u64(DEVICE), readable)
            .map_err(failed("epoll_ctl()"))?;
        let core = Arc::new(Core {
            device: Arc::clone(device),
            epoll,
            bell,
            stop: AtomicBool::new(false),
            orders: Mutex::default(),
            next_key: AtomicU64::new(FIRST_KEY),
        });
        let keeping = Keeping {
            core: Arc::clone(&core),
            links: HashMap::new(),
            settling: Vec::new(),
            doomed: VecDeque::new(),
            by_queue_pair: HashMap::new(),
        };
        let thread = thread::Builder::new()
            .name("fervor-rdma".to_owned())
            .spawn(move || keeping.run())
            .map_err(Error::io("starting thread `fervor-rdma`"))?;
        Ok(Arc::new(Self { core, thread: Some(thread) }))
    }

    /// A name for a connection that is about to be made.
    pub(super) fn next_key(&self) -> u64 {
        self.core.next_key.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes a connection into care. If `waiting`, its peer has yet to say, on its channel, that it is ready.
    pub(super) fn watch(&self, link: &Arc<Link>, channel: Channel, waiting: bool) {
        self.order(Order::Watch { link: Arc::clone(link), channel, waiting });
    }

    /// The peer has said, elsewhere, that it is ready.
    pub(super) fn ready(&self, key: u64) {
        self.order(Order::Ready(key));
    }

    /// Ends a connection, soon.
    pub(super) fn end(&self, key: u64) {
        self.order(Order::End(key));
    }

    /// Waits for the last buffer of a connection, and then tells [`News::Settled`].
    pub(super) fn settle(&self, key: u64) {
        self.order(Order::Settle(key));
    }

    /// Destroys the queue pair of a connection, and then tells [`News::Gone`].
    pub(super) fn destroy(&self, key: u64) {
        self.order(Order::Destroy(key));
    }

    /// Ends a connection whose endpoint is gone.
    pub(super) fn abandon(&self, key: u64) {
        self.order(Order::Abandon(key));
    }

    fn order(&self, order: Order) {
        // Of a connection whose news come by others there is nothing to be read: it is taken into care with the next order, or the next tick.
        let soon = !matches!(order, Order::Watch { channel: Channel::Other(_), .. });
        let mut orders = lock(&self.core.orders);
        orders.list.push(order);
        if soon && !orders.rung {
            orders.rung = true;
            self.core.ring();
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // SYNC POINT: the thread looks at this after each wake.
        self.core.stop.store(true, Ordering::Release);
        self.core.ring();
        if let Some(thread) = self.thread.take().filter(|of| of.thread().id() != thread::current().id()) {
            // A panic there has been reported where it happened.
            let _ = thread.join();
        }
    }
}

impl Core {
    fn ring(&self) {
        // It fails only when the counter is full: then the descriptor is readable anyway.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The peer has until then to say that it is ready.
    Waiting(Instant),
    Open,
    Ending,
    /// The device has until then to say that the last buffer was taken.
    Settling(Instant),
}

struct Watched {
    link: Arc<Link>,
    /// Until its end.
    channel: Option<Channel>,
    stage: Stage,
}

/// The thread's own.
struct Keeping {
    core: Arc<Core>,
    links: HashMap<u64, Watched>,
    /// Connections whose last buffers are waited for.
    settling: Vec<u64>,
    /// Connections whose queue pairs are to be destroyed.
    doomed: VecDeque<u64>,
    /// Keys by the addresses of queue pairs.
    by_queue_pair: HashMap<usize, u64>,
}

impl Keeping {
    fn run(mut self) {
        let mut tick = Instant::now() + TICK;
        let mut space = [MaybeUninit::<epoll::Event>::uninit(); 64];
        while !self.core.stop.load(Ordering::Acquire) {
            let mut left = tick.saturating_duration_since(Instant::now());
            if !self.settling.is_empty() {
                left = left.min(LOOK);
            }
            if !self.doomed.is_empty() {
                left = Duration::ZERO;
            }
            let left = Timespec { tv_sec: 0, tv_nsec: left.as_nanos() as i64 };
            // A signal that interrupts the wait is a wake like any other.
            let core = Arc::clone(&self.core);
            if let Ok((events, _)) = epoll::wait(&core.epoll, &mut space, Some(&left)) {
                for event in events {
                    match event.data.u64() {
                        BELL => {}
                        DEVICE => {
                            // What the device says may be of a connection that is not in care yet.
                            self.obey();
                            self.hear_device();
                        }
                        key => self.hear(key),
                    }
                }
            }
            self.obey();
            self.settle();
            // One at a time: it may take milliseconds, and others wait for their queue pairs to be moved to the error state.
            if let Some(key) = self.doomed.pop_front() {
                self.destroy(key);
            }
            let now = Instant::now();
            if now >= tick {
                tick = now + TICK;
                self.look_after(now);
            }
        }
    }

    fn obey(&mut self) {
        // Before the list is taken: whoever orders something afterwards rings again.
        let _ = rustix::io::read(&self.core.bell, &mut [0; 8]);
        let Orders { list, .. } = std::mem::take(&mut *lock(&self.core.orders));
        for order in list {
            match order {
                Order::Watch { link, channel, waiting } => self.watch(link, channel, waiting),
                Order::Ready(key) => self.ready(key),
                Order::End(key) => self.end(key),
                Order::Settle(key) => {
                    if let Some(watched) = self.links.get_mut(&key) {
                        watched.stage = Stage::Settling(Instant::now() + LAST_BUFFER);
                        self.settling.push(key);
                    }
                }
                Order::Destroy(key) => self.doomed.push_back(key),
                Order::Abandon(key) => {
                    self.end(key);
                    self.doomed.push_back(key);
                }
            }
        }
    }

    fn watch(&mut self, link: Arc<Link>, channel: Channel, waiting: bool) {
        let key = link.key;
        let stage = if waiting { Stage::Waiting(Instant::now() + STRANGER_PATIENCE) } else { Stage::Open };
        self.by_queue_pair.insert(link.queue_pair_address(), key);
        let over = link.is_down()
            || matches!(&channel, Channel::Socket(socket) if {
                let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
                // Without a watch on its socket, a connection would not notice its peer's death.
                epoll::add(&self.core.epoll, socket, epoll::EventData::new_u64(key), flags).is_err()
            });
        self.links.insert(key, Watched { link, channel: Some(channel), stage });
        if over {
            self.end(key);
        }
    }

    fn ready(&mut self, key: u64) {
        let Some(watched) = self.links.get_mut(&key) else { return };
        if matches!(watched.stage, Stage::Waiting(_)) {
            watched.stage = Stage::Open;
            watched.link.release();
        }
    }

    /// Reads a socket. The one thing that a peer may say is that it is ready, once.
    fn hear(&mut self, key: u64) {
        loop {
            let Some(watched) = self.links.get_mut(&key) else { return };
            let Some(Channel::Socket(socket)) = &mut watched.channel else { return };
            let mut said = [0; 1];
            match socket.read(&mut said) {
                Ok(1) if said[0] == READY && matches!(watched.stage, Stage::Waiting(_)) => self.ready(key),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => return self.end(key),
            }
        }
    }

    /// Moves the queue pair to the error state, and closes the channel after that: what the peer learns from it is true.
    fn end(&mut self, key: u64) {
        let Some(watched) = self.links.get_mut(&key) else { return };
        if matches!(watched.stage, Stage::Ending | Stage::Settling(_)) {
            return;
        }
        watched.stage = Stage::Ending;
        watched.link.end();
        match watched.channel.take() {
            Some(Channel::Socket(socket)) => {
                let _ = epoll::delete(&self.core.epoll, &socket);
                // For the peer's sake, if a child process that is being started holds a copy of the socket.
                let _ = socket.shutdown(std::net::Shutdown::Both);
            }
            Some(Channel::Other(told)) => told(),
            None => {}
        }
        if !watched.link.queues.tell(News::Failed(watched.link.id)) {
            self.doomed.push_back(key);
        }
    }

    /// Those whose last buffer was taken, or whose device says nothing of that.
    fn settle(&mut self) {
        let now = Instant::now();
        for key in std::mem::take(&mut self.settling) {
            let Some(watched) = self.links.get_mut(&key) else { continue };
            match watched.stage {
                Stage::Settling(until) if now >= until || watched.link.took_last_buffer() => {
                    watched.stage = Stage::Ending;
                    if !watched.link.queues.tell(News::Settled(watched.link.id)) {
                        self.doomed.push_back(key);
                    }
                }
                Stage::Settling(_) => self.settling.push(key),
                _ => {}
            }
        }
    }

    fn destroy(&mut self, key: u64) {
        let Some(watched) = self.links.remove(&key) else { return };
        self.by_queue_pair.remove(&watched.link.queue_pair_address());
        watched.link.destroy();
        watched.link.queues.tell(News::Gone(watched.link.id));
    }

    /// Reads what the device says.
    fn hear_device(&mut self) {
        let device = Arc::clone(&self.core.device);
        while let Some((kind, object)) = events::take(&device) {
            match kind {
                // The tables have the states of ports, too.
                Kind::AddressesChanged | Kind::PortDown | Kind::PortUp => device.forget_tables(),
                Kind::LastBuffer => {
                    if let Some(watched) = self.of_queue_pair(object) {
                        watched.link.note_last_buffer();
                    }
                }
                Kind::QueuePairFailed => {
                    let key = self.of_queue_pair(object).map(|watched| watched.link.key);
                    key.into_iter().for_each(|key| self.end(key));
                }
                Kind::DeviceLost => self.lose(|_| true),
                Kind::CompletionsLost => self.lose(|link| link.queues.completion_queue() as usize == object),
                Kind::ReceivesLost => self.lose(|link| link.queues.receive_queue() as usize == object),
                Kind::Other(_) => {}
            }
        }
    }

    fn of_queue_pair(&self, address: usize) -> Option<&Watched> {
        self.links.get(self.by_queue_pair.get(&address)?)
    }

    /// Ends the connections whose queues will say nothing more.
    fn lose(&mut self, lost: impl Fn(&Link) -> bool) {
        let links = self.links.values().filter(|watched| lost(&watched.link));
        let keys: Vec<u64> = links
            .map(|watched| {
                watched.link.queues.lose();
                watched.link.key
            })
            .collect();
        keys.into_iter().for_each(|key| self.end(key));
    }

    /// Ends those whose peers were not ready in time, and asks idle ones for a sign of life.
    fn look_after(&mut self, now: Instant) {
        let mut late = Vec::new();
        for (&key, watched) in &self.links {
            match watched.stage {
                Stage::Waiting(until) if now >= until => late.push(key),
                Stage::Open => watched.link.keep_alive(now),
                _ => {}
            }
        }
        late.into_iter().for_each(|key| self.end(key));
    }
}

/// Lets reads of `fd` return at once when there is nothing.
pub(super) fn set_nonblocking(fd: BorrowedFd<'_>) -> Result<(), Error> {
    let flags = rustix::fs::fcntl_getfl(fd).map_err(|e| Error::io("fcntl(F_GETFL)")(e.into()))?;
    rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)
        .map_err(|e| Error::io("fcntl(F_SETFL, O_NONBLOCK)")(e.into()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is one insertion, removal or exchange.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
