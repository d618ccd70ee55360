//! What the handles of an endpoint and its engine share: events and buffers on one way, orders on the other.
//!
//! | what | written by | read by | under |
//! |---|---|---|---|
//! | [`Event`]s | the engine, in the order of each connection | the polling thread | the lock of `Inbox` |
//! | a receive buffer | the engine, while it is in neither list | the polling thread, once its event was polled | nobody shares it: it moves |
//! | `pending` | both | both | atomic: a poll of nothing takes no lock |
//! | [`Orders`] | threads that connect, post and disconnect | the engine, when the bell rings | their lock |

use std::{
    collections::VecDeque,
    fmt,
    net::{Shutdown, TcpStream},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustix::event::{EventfdFlags, eventfd};

use super::{
    link::{Event, Link},
    region::Registry,
};
use crate::{
    error::Error,
    transport::{ConnectionId, EndpointConfig, Reach, Signal, host::HostSignal},
};

/// Events, and buffers for more of them.
#[derive(Debug, Default)]
struct Inbox {
    events: VecDeque<Event>,
    free: Vec<Vec<u8>>,
    /// The engine waits for a buffer.
    wanted: bool,
}

/// What the engine is told by others.
#[derive(Debug, Default)]
pub(super) struct Orders {
    pub(super) arrivals: Vec<Arc<Link>>,
    pub(super) leaving: Vec<ConnectionId>,
    /// There is more to send than a post hands over.
    pub(super) sending: Vec<ConnectionId>,
    /// The endpoint is gone.
    pub(super) closed: bool,
    last_id: u32,
    /// Connections that there are, or are being made.
    taken: usize,
}

/// What the handles of an endpoint and its engine share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) registry: Arc<Registry>,
    pub(super) config: EndpointConfig,
    pub(super) bell: OwnedFd,
    inbox: Mutex<Inbox>,
    /// There are events.
    pending: AtomicBool,
    /// [`Shared::wake`] was called.
    woken: AtomicBool,
    signal: HostSignal,
    /// What is called after events were published.
    besides: OnceLock<Waker>,
    orders: Mutex<Orders>,
}

/// Wakes a polling thread that sleeps elsewhere.
struct Waker(Box<dyn Fn() + Send + Sync>);

impl fmt::Debug for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waker")
    }
}

impl Shared {
    /// Of a new endpoint.
    pub(super) fn new(registry: &Arc<Registry>, config: EndpointConfig) -> Result<Self, Error> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("eventfd")(e.into()))?;
        let free = (0..config.receive_buffers).map(|_| vec![0; config.receive_size]).collect();
        Ok(Self {
            registry: registry.clone(),
            config,
            bell,
            inbox: Mutex::new(Inbox { free, ..Inbox::default() }),
            pending: AtomicBool::new(false),
            woken: AtomicBool::new(false),
            signal: HostSignal::new(),
            besides: OnceLock::new(),
            orders: Mutex::default(),
        })
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        // Events and buffers are moved one by one: a panic leaves nothing half done.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the engine look at its orders, and at the buffers.
    fn ring(&self) {
        // Fails only if the counter is at its end, and then the engine is awake already.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Hands events to the polling thread.
    pub(super) fn publish(&self, events: &mut Vec<Event>) {
        if events.is_empty() {
            return;
        }
        self.inbox().events.extend(events.drain(..));
        self.pending.store(true, Ordering::SeqCst);
        self.signal.notify();
        if let Some(Waker(wake)) = self.besides.get() {
            wake();
        }
    }

    /// From now on `wake` is called after events were published. Called once.
    pub(super) fn wake_besides(&self, wake: impl Fn() + Send + Sync + 'static) {
        self.besides.set(Waker(Box::new(wake))).expect("it is called once");
    }

    /// Whether there may be events: without a lock.
    pub(super) fn has_events(&self) -> bool {
        self.pending.load(Ordering::SeqCst)
    }

    /// Hands the first events, `most` of them at most, to `take`. How many.
    pub(super) fn take_events(&self, most: usize, take: impl FnMut(Event)) -> usize {
        let mut inbox = self.inbox();
        let count = inbox.events.len().min(most);
        inbox.events.drain(..count).for_each(take);
        if inbox.events.is_empty() {
            // Under the lock: whoever publishes more sets it after.
            self.pending.store(false, Ordering::SeqCst);
        }
        count
    }

    /// Sleeps until there are events, or [`Shared::wake`] is called, or has been since the last wait, or `timeout` is over.
    pub(super) fn wait(&self, timeout: Duration) {
        let seen = self.signal.epoch();
        if !self.woken.load(Ordering::SeqCst) && !self.has_events() {
            self.signal.wait(seen, timeout);
        }
        self.woken.swap(false, Ordering::SeqCst);
    }

    /// Ends a wait, the present one or the next.
    pub(super) fn wake(&self) {
        self.woken.store(true, Ordering::SeqCst);
        self.signal.notify();
    }

    /// The endpoint is gone.
    pub(super) fn close(&self) {
        self.orders().closed = true;
        self.ring();
    }

    /// A receive buffer. If there is none the bell rings when there is one.
    pub(super) fn take_buffer(&self) -> Option<Vec<u8>> {
        let mut inbox = self.inbox();
        let buffer = inbox.free.pop();
        inbox.wanted |= buffer.is_none();
        buffer
    }

    /// Gives buffers back.
    pub(super) fn give_back(&self, buffers: impl Iterator<Item = Vec<u8>>) {
        let mut inbox = self.inbox();
        let before = inbox.free.len();
        inbox.free.extend(buffers);
        if inbox.free.len() > before && std::mem::take(&mut inbox.wanted) {
            drop(inbox);
            self.ring();
        }
    }

    /// A connection is to be ended.
    pub(super) fn leave(&self, id: ConnectionId) {
        self.orders().leaving.push(id);
        self.ring();
    }

    /// There is more to send on a connection.
    pub(super) fn go_on(&self, id: ConnectionId) {
        self.orders().sending.push(id);
        self.ring();
    }

    /// A connection is no more.
    pub(super) fn vacate(&self) {
        self.orders().taken -= 1;
    }
}

/// A place for a connection; given back when dropped before it is taken.
pub(super) struct Seat {
    pub(super) shared: Arc<Shared>,
    id: ConnectionId,
    occupied: bool,
}

impl Seat {
    pub(super) fn reserve(shared: &Arc<Shared>) -> Result<Self, Error> {
        let mut orders = shared.orders();
        let limit = shared.config.connections;
        let full = |cure: &str| Error::Limit {
            what: "the number of connections of the endpoint".to_owned(),
            value: limit as u64 + 1,
            limit: limit as u64,
            cure: cure.to_owned(),
        };
        if orders.closed {
            return Err(full("; the endpoint has been dropped"));
        }
        if orders.taken >= limit {
            return Err(full("; make the endpoint with more `connections`"));
        }
        let Some(id) = orders.last_id.checked_add(1) else {
            return Err(full("; this one has had 2^32 of them: make another"));
        };
        orders.taken += 1;
        orders.last_id = id;
        Ok(Self { shared: shared.clone(), id: ConnectionId(orders.last_id), occupied: false })
    }

    /// Hands the connection to the engine.
    pub(super) fn occupy(
        mut self,
        socket: TcpStream,
        depth: usize,
        peer_depth: u64,
        reach: Option<Arc<Reach>>,
    ) -> Arc<Link> {
        self.occupied = true;
        let link = Arc::new(Link::new(self.id, socket, (depth, peer_depth), reach));
        let mut orders = self.shared.orders();
        if orders.closed {
            // Nobody will poll its end.
            link.break_off();
            let _ = link.socket.shutdown(Shutdown::Both);
            return link;
        }
        orders.arrivals.push(link.clone());
        drop(orders);
        self.shared.ring();
        link
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if !self.occupied {
            self.shared.vacate();
        }
    }
}
