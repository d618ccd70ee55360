//! The polling side: what the engine found, and the receive buffers.
//!
//! | what | written by | read by | under |
//! |---|---|---|---|
//! | [`Event`]s | the engine, in the order of each connection | [`TcpEndpoint::poll`] | the lock of `Inbox` |
//! | a receive buffer | the engine, while it is in neither list | the polling thread, once its event was polled | nobody shares it: it moves |
//! | `pending` | both | both | atomic: a poll of nothing takes no lock |

use std::{
    collections::VecDeque,
    fmt,
    net::{Shutdown, TcpStream},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use rustix::event::{EventfdFlags, eventfd};

use super::{engine::Engine, link::Link, region::Registry, wire::MAX_SEND_DEPTH};
use crate::{
    error::Error,
    transport::{
        Attach, Completion, ConnectionId, Endpoint, EndpointConfig, ReceiveBuffer, Signal, WorkError,
        host::HostSignal,
    },
};

/// Completions that one poll returns at most.
const POLL_BATCH: usize = 64;
/// Bytes of a receive buffer that a length in a completion can tell.
const MAX_RECEIVE_SIZE: u64 = u32::MAX as u64;

/// What the engine has for the polling thread.
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
    /// [`Attach::wake`] was called.
    woken: AtomicBool,
    signal: HostSignal,
    orders: Mutex<Orders>,
}

impl Shared {
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
    pub(super) fn occupy(mut self, socket: TcpStream, peer_depth: u64) -> Arc<Link> {
        self.occupied = true;
        let link = Arc::new(Link::new(self.id, socket, self.shared.config.send_depth, peer_depth));
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

/// The endpoint of the `tcp` provider.
pub struct TcpEndpoint {
    shared: Arc<Shared>,
    engine: Option<JoinHandle<()>>,
    /// Buffers with messages, by index.
    messages: Vec<Option<Vec<u8>>>,
    /// Indices of `messages` that are `None`.
    places: Vec<u32>,
    /// Kept for its memory.
    spent: Vec<Vec<u8>>,
}

/// The handle of a [`TcpEndpoint`] for other threads.
#[derive(Clone)]
pub struct TcpAttach(pub(super) Arc<Shared>);

impl TcpEndpoint {
    pub(super) fn new(registry: &Arc<Registry>, config: &EndpointConfig) -> Result<Self, Error> {
        let within = |what: &str, value: usize, limit: u64| {
            if value as u64 <= limit {
                return Ok(());
            }
            Err(Error::Limit { what: what.to_owned(), value: value as u64, limit, cure: String::new() })
        };
        within("`receive_size` of the endpoint", config.receive_size, MAX_RECEIVE_SIZE)?;
        within("`receive_buffers` of the endpoint", config.receive_buffers, 1 << 24)?;
        within("`send_depth` of the endpoint", config.send_depth, MAX_SEND_DEPTH)?;
        let config = EndpointConfig { send_depth: config.send_depth.max(1), ..config.clone() };
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("eventfd")(e.into()))?;
        let free = (0..config.receive_buffers).map(|_| vec![0; config.receive_size]).collect();
        let (messages, places) = (
            (0..config.receive_buffers).map(|_| None).collect(),
            (0..config.receive_buffers as u32).collect(),
        );
        let shared = Arc::new(Shared {
            registry: registry.clone(),
            config,
            bell,
            inbox: Mutex::new(Inbox { free, ..Inbox::default() }),
            pending: AtomicBool::new(false),
            woken: AtomicBool::new(false),
            signal: HostSignal::new(),
            orders: Mutex::default(),
        });
        let engine = Engine::start(&shared)?;
        Ok(Self { shared, engine: Some(engine), messages, places, spent: Vec::new() })
    }

    fn complete(&mut self, event: Event) -> Completion {
        match event {
            Event::Work { link, id, result } => {
                link.retire();
                Completion::Work { connection: link.id, id, result }
            }
            Event::Received { connection, buffer, length, immediate } => {
                let index = self.places.pop().expect("there are as many places as buffers");
                self.messages[index as usize] = Some(buffer);
                let buffer = ReceiveBuffer { index, length: length as u32 };
                Completion::Received { connection, buffer, immediate }
            }
            Event::WriteImmediate { connection, buffer, immediate } => {
                self.spent.push(buffer);
                Completion::WriteImmediate { connection, immediate }
            }
            Event::End { connection, cause } => Completion::Disconnected { connection, cause },
        }
    }
}

impl Endpoint for TcpEndpoint {
    type Attach = TcpAttach;

    fn attach(&self) -> TcpAttach {
        TcpAttach(self.shared.clone())
    }

    fn poll(&mut self, into: &mut Vec<Completion>) -> usize {
        if !self.shared.pending.load(Ordering::Acquire) {
            return 0;
        }
        let shared = self.shared.clone();
        let mut inbox = shared.inbox();
        let count = inbox.events.len().min(POLL_BATCH);
        for _ in 0..count {
            let event = inbox.events.pop_front().expect("it was counted");
            into.push(self.complete(event));
        }
        if inbox.events.is_empty() {
            // Under the lock: whoever publishes more sets it after.
            shared.pending.store(false, Ordering::SeqCst);
        }
        drop(inbox);
        if !self.spent.is_empty() {
            shared.give_back(self.spent.drain(..));
        }
        count
    }

    fn wait(&mut self, timeout: Duration) {
        let seen = self.shared.signal.epoch();
        let has_something = || self.shared.pending.load(Ordering::SeqCst);
        if !self.shared.woken.load(Ordering::SeqCst) && !has_something() {
            self.shared.signal.wait(seen, timeout);
        }
        self.shared.woken.swap(false, Ordering::SeqCst);
    }

    fn message(&self, buffer: &ReceiveBuffer) -> &[u8] {
        let message = self.messages.get(buffer.index as usize).and_then(Option::as_ref);
        &message.expect("a receive buffer of another endpoint")[..buffer.length as usize]
    }

    fn release(&mut self, buffer: ReceiveBuffer) {
        let message = self.messages.get_mut(buffer.index as usize).and_then(Option::take);
        self.places.push(buffer.index);
        self.shared.give_back(std::iter::once(message.expect("a receive buffer of another endpoint")));
    }
}

impl Attach for TcpAttach {
    fn wake(&self) {
        self.0.woken.store(true, Ordering::SeqCst);
        self.0.signal.notify();
    }
}

impl Drop for TcpEndpoint {
    fn drop(&mut self) {
        self.shared.orders().closed = true;
        self.shared.ring();
        if let Some(engine) = self.engine.take() {
            // It ends at once: it waits for nobody. It says why it panicked.
            let _ = engine.join();
        }
    }
}

impl fmt::Debug for TcpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpEndpoint({:?})", self.shared.config)
    }
}

impl fmt::Debug for TcpAttach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TcpAttach")
    }
}
