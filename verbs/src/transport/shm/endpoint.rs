//! The receiving side: an endpoint polls its connections' completions and rings, and owns the receive
//! buffers.
//!
//! A poll asks the [`super::bell`] which connections have something and visits those, a few messages
//! each, in turn. A message is copied from the ring into a receive buffer, which is private memory and can so
//! be lent as a slice. Without a free buffer the rest of the ring waits, and the sender with it.

use std::{
    collections::VecDeque,
    fmt,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    Inner,
    bell::{self, Page, SLOTS},
    link::Link,
    ring::{Corrupt, Inbox, Kind},
    wire::MAX_RECEIVE_SIZE,
};
use crate::{
    error::Error,
    memory::Exclusive,
    transport::{Attach, Completion, ConnectionId, Endpoint, EndpointConfig, ReceiveBuffer, WorkError},
};

/// Completions that one poll returns, about.
const POLL_BATCH: usize = 64;
/// Completions that one visit of a connection takes before it is the next one's turn.
const VISIT_BATCH: usize = 16;
/// How long messages of a peer that is gone wait for receive buffers, and its end for a WRITE of it that has
/// begun, before the end is reported all the same.
const LINGER: Duration = Duration::from_secs(1);
/// Longest sleep while some do.
const LINGER_LOOK: Duration = Duration::from_millis(20);

/// What an endpoint's handles share.
pub(super) struct Shared {
    pub(super) inner: Arc<Inner>,
    pub(super) config: EndpointConfig,
    pub(super) bell: Page,
    bell_file: OwnedFd,
    seats: Mutex<Seats>,
}

/// Who has which slot. Written by the threads that connect, and by the polling thread when connections come
/// and go; not on the data path.
#[derive(Default)]
struct Seats {
    free: Vec<u32>,
    last_id: u32,
    arrivals: Vec<Arrival>,
    closed: bool,
}

/// A connection on its way to the polling thread.
pub(super) struct Arrival {
    pub(super) link: Arc<Link>,
    pub(super) inbox: Inbox,
    pub(super) peer_bell: Page,
    pub(super) peer_slot: u32,
}

impl Shared {
    fn seats(&self) -> MutexGuard<'_, Seats> {
        // Each change leaves the table whole; a panic between two of them is a panic of the connecting
        // thread.
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn bell_file(&self) -> BorrowedFd<'_> {
        self.bell_file.as_fd()
    }
}

/// A place for a connection; given back when dropped before it is taken.
pub(super) struct Seat {
    shared: Arc<Shared>,
    pub(super) id: ConnectionId,
    pub(super) slot: u32,
    occupied: bool,
}

impl Seat {
    pub(super) fn reserve(shared: &Arc<Shared>) -> Result<Self, Error> {
        let mut seats = shared.seats();
        let full = |cure: &str| Error::Limit {
            what: "the number of connections of the endpoint".to_owned(),
            value: shared.config.connections as u64 + 1,
            limit: shared.config.connections as u64,
            cure: cure.to_owned(),
        };
        if seats.closed {
            return Err(full("; the endpoint has been dropped"));
        }
        let Some(slot) = seats.free.pop() else {
            return Err(full("; make the endpoint with more `connections`"));
        };
        seats.last_id += 1;
        Ok(Self { shared: shared.clone(), id: ConnectionId(seats.last_id), slot, occupied: false })
    }

    /// Hands the connection to the polling thread.
    pub(super) fn occupy(mut self, arrival: Arrival) {
        let link = arrival.link.clone();
        self.occupied = true;
        let mut seats = self.shared.seats();
        if seats.closed {
            link.close(WorkError::Disconnected);
            return;
        }
        seats.arrivals.push(arrival);
        drop(seats);
        // The peer may have rung before there was anybody to look at.
        link.ring_own();
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if !self.occupied {
            self.shared.seats().free.push(self.slot);
        }
    }
}

/// A connection as the polling thread sees it.
struct Polled {
    link: Arc<Link>,
    inbox: Inbox,
    peer_bell: Page,
    peer_slot: u32,
    /// Requests retired so far.
    retired: u64,
    /// Listed in `ready`, and in `blocked`.
    ready: bool,
    blocked: bool,
    /// Until when the end waits for the last messages and WRITEs.
    linger: Option<Instant>,
}

/// What is left of a connection after a visit.
enum Visit {
    Idle,
    /// There is more than one visit takes.
    More,
    /// A message waits for a receive buffer, or the end for the last WRITE.
    Blocked,
    /// Its end has been reported.
    Over,
}

/// The receive buffers.
struct Buffers {
    memory: Exclusive,
    size: usize,
    stride: usize,
    count: usize,
    free: Vec<u32>,
}

impl Buffers {
    fn new(count: usize, size: usize) -> Result<Self, Error> {
        let stride = size.max(1).next_multiple_of(64);
        let too_large = || Error::Limit {
            what: "the size of the receive buffers together".to_owned(),
            value: u64::MAX,
            limit: usize::MAX as u64,
            cure: "; use fewer or smaller ones".to_owned(),
        };
        let memory =
            Exclusive::new("fervor-receive-buffers", count.checked_mul(stride).ok_or_else(too_large)?)?;
        let free = (0..u32::try_from(count).map_err(|_| too_large())?).rev().collect();
        Ok(Self { memory, size, stride, count, free })
    }

    fn slice(&self, index: u32, length: u32) -> &[u8] {
        let (index, length) = (index as usize, length as usize);
        assert!(index < self.count && length <= self.size, "a receive buffer of another endpoint");
        &self.memory.bytes()[index * self.stride..][..length]
    }
}

/// The endpoint of the `shm` provider.
pub struct ShmEndpoint {
    shared: Arc<Shared>,
    buffers: Buffers,
    /// Of the bell.
    layers: usize,
    slots: Vec<Option<Polled>>,
    /// Slots to visit, in turn.
    ready: VecDeque<u32>,
    /// Slots to visit when a receive buffer is free.
    blocked: Vec<u32>,
    /// Some blocked connection is at its end.
    lingering: bool,
    notified: bool,
}

/// The handle of a [`ShmEndpoint`] for other threads.
#[derive(Clone)]
pub struct ShmAttach(pub(super) Arc<Shared>);

impl ShmEndpoint {
    pub(super) fn new(inner: &Arc<Inner>, config: &EndpointConfig) -> Result<Self, Error> {
        let within = |what: &str, value: usize, limit: u64| {
            if value as u64 <= limit {
                return Ok(());
            }
            Err(Error::Limit { what: what.to_owned(), value: value as u64, limit, cure: String::new() })
        };
        within("`connections` of the endpoint", config.connections, SLOTS as u64)?;
        within("`receive_size` of the endpoint", config.receive_size, MAX_RECEIVE_SIZE)?;
        within("`send_depth` of the endpoint", config.send_depth, 1 << 24)?;
        let config = EndpointConfig { send_depth: config.send_depth.max(1), ..config.clone() };
        let buffers = Buffers::new(config.receive_buffers, config.receive_size)?;
        let (bell, bell_file) = Page::create()?;
        let seats = Seats { free: (0..config.connections as u32).rev().collect(), ..Seats::default() };
        let layers = bell::layers(config.connections);
        let slots = (0..config.connections).map(|_| None).collect();
        Ok(Self {
            shared: Arc::new(Shared {
                inner: inner.clone(),
                config,
                bell,
                bell_file,
                seats: Mutex::new(seats),
            }),
            buffers,
            layers,
            slots,
            ready: VecDeque::new(),
            blocked: Vec::new(),
            lingering: false,
            notified: false,
        })
    }

    /// Seats those who have connected since the last look, and visits them: what they rang for may be forgotten.
    /// Called when a bell rings for an empty slot.
    #[cold]
    fn welcome(&mut self) {
        for Arrival { link, inbox, peer_bell, peer_slot } in self.shared.seats().arrivals.drain(..) {
            let slot = link.slot;
            let polled = self.slots[slot as usize].insert(Polled {
                link,
                inbox,
                peer_bell,
                peer_slot,
                retired: 0,
                ready: false,
                blocked: false,
                linger: None,
            });
            polled.enqueue(slot, &mut self.ready);
        }
    }

    /// Queues the connections whose bell rang.
    #[inline]
    fn answer_bell(&mut self) {
        let Self { shared, layers, slots, ready, .. } = self;
        let mut strangers = false;
        let notified = bell::take(&shared.bell, *layers, |slot| match slots.get_mut(slot as usize) {
            Some(Some(polled)) => polled.enqueue(slot, ready),
            _ => strangers = true,
        });
        self.notified |= notified;
        if strangers {
            self.welcome();
        }
    }

    /// Lets the blocked connections try again.
    fn unblock(&mut self) {
        self.lingering = false;
        for slot in self.blocked.drain(..) {
            if let Some(polled) = &mut self.slots[slot as usize] {
                polled.blocked = false;
                polled.enqueue(slot, &mut self.ready);
            }
        }
    }
}

impl Polled {
    #[inline]
    fn enqueue(&mut self, slot: u32, ready: &mut VecDeque<u32>) {
        if !self.ready {
            self.ready = true;
            ready.push_back(slot);
        }
    }

    fn visit(&mut self, buffers: &mut Buffers, into: &mut Vec<Completion>) -> Visit {
        // Before the ring: what the peer published before it left is then seen.
        let cause = self.link.cause();
        let (retired, all) = self.link.complete(self.retired, VISIT_BATCH, into);
        self.retired = retired;
        let end = cause.map_or(Ok(()), |_| self.inbox.close());
        let visit = match end.and_then(|()| self.receive(buffers, into)) {
            Ok(visit) => visit,
            Err(Corrupt) => {
                // The peer broke the protocol of the ring: nothing more is taken from it.
                self.inbox.abandon();
                self.link.close(WorkError::RemoteInvalid);
                Visit::Idle
            }
        };
        let Some(cause) = self.link.cause() else {
            return if all { visit } else { Visit::More };
        };
        if self.inbox.is_open() || matches!(visit, Visit::More) {
            // If the end came during this visit: look once more at what was published before.
            return Visit::More;
        }
        let undelivered = matches!(visit, Visit::Blocked) && self.link.peer_left();
        let writing = !self.inbox.shut();
        if undelivered || writing {
            let now = Instant::now();
            if now < *self.linger.get_or_insert(now + LINGER) {
                return Visit::Blocked;
            }
        }
        if !self.link.seal() {
            // The posting thread is in the middle of a request.
            return Visit::More;
        }
        self.link.complete(self.retired, usize::MAX, into);
        into.push(Completion::Disconnected { connection: self.link.id, cause });
        Visit::Over
    }

    /// Moves messages from the ring to receive buffers.
    #[inline]
    fn receive(&mut self, buffers: &mut Buffers, into: &mut Vec<Completion>) -> Result<Visit, Corrupt> {
        let mut taken = 0;
        let visit = loop {
            let Some(header) = self.inbox.peek(buffers.size)? else { break Visit::Idle };
            if taken == VISIT_BATCH {
                break Visit::More;
            }
            let Some(&index) = buffers.free.last() else { break Visit::Blocked };
            let connection = self.link.id;
            let completion = match header.kind {
                // It takes a receive buffer and gives it back in one.
                Kind::WriteImmediate => {
                    Completion::WriteImmediate { connection, immediate: header.immediate }
                }
                Kind::Send | Kind::SendImmediate => {
                    buffers.free.pop();
                    let start = index as usize * buffers.stride;
                    let length = header.length;
                    self.inbox.copy(&mut buffers.memory.bytes_mut()[start..][..length as usize]);
                    let immediate = (header.kind == Kind::SendImmediate).then_some(header.immediate);
                    Completion::Received { connection, buffer: ReceiveBuffer { index, length }, immediate }
                }
            };
            self.inbox.advance(header.length);
            into.push(completion);
            taken += 1;
        };
        if taken > 0 && self.inbox.pay() {
            bell::ring(&self.peer_bell, self.peer_slot);
        }
        Ok(visit)
    }
}

impl Endpoint for ShmEndpoint {
    type Attach = ShmAttach;

    fn attach(&self) -> ShmAttach {
        ShmAttach(self.shared.clone())
    }

    fn poll(&mut self, into: &mut Vec<Completion>) -> usize {
        self.answer_bell();
        if self.lingering {
            self.unblock();
        }
        if self.ready.is_empty() {
            return 0;
        }
        let before = into.len();
        // Each connection once, at most: one that has more goes to the end of the queue.
        for _ in 0..self.ready.len() {
            if into.len() - before >= POLL_BATCH {
                break;
            }
            let Some(slot) = self.ready.pop_front() else { break };
            let Some(polled) = &mut self.slots[slot as usize] else { continue };
            polled.ready = false;
            match polled.visit(&mut self.buffers, into) {
                Visit::Idle => {}
                Visit::More => polled.enqueue(slot, &mut self.ready),
                Visit::Blocked => {
                    self.lingering |= polled.linger.is_some();
                    if !polled.blocked {
                        polled.blocked = true;
                        self.blocked.push(slot);
                    }
                }
                Visit::Over => {
                    self.slots[slot as usize] = None;
                    self.shared.seats().free.push(slot);
                }
            }
        }
        into.len() - before
    }

    fn wait(&mut self, timeout: Duration) {
        if std::mem::take(&mut self.notified) || !self.ready.is_empty() {
            return;
        }
        let timeout = if self.lingering { timeout.min(LINGER_LOOK) } else { timeout };
        bell::wait(&self.shared.bell, timeout);
    }

    fn message(&self, buffer: &ReceiveBuffer) -> &[u8] {
        self.buffers.slice(buffer.index, buffer.length)
    }

    fn release(&mut self, buffer: ReceiveBuffer) {
        assert!((buffer.index as usize) < self.buffers.count, "a receive buffer of another endpoint");
        self.buffers.free.push(buffer.index);
        if !self.blocked.is_empty() {
            self.unblock();
        }
    }
}

impl Drop for ShmEndpoint {
    fn drop(&mut self) {
        self.shared.seats().closed = true;
        self.welcome();
        for polled in self.slots.iter().flatten() {
            polled.inbox.shut();
            polled.link.close(WorkError::Disconnected);
        }
    }
}

impl Attach for ShmAttach {
    fn wake(&self) {
        bell::notify(&self.0.bell);
    }
}

impl fmt::Debug for ShmEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShmEndpoint({:?})", self.shared.config)
    }
}

impl fmt::Debug for ShmAttach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShmAttach({:?})", self.0.config)
    }
}
