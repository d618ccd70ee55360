//! One endpoint for connections of several providers.
//!
//! It has an endpoint of a provider or a rail (an *inner* one) from the first connection of that provider on. Whoever makes that connection, a
//! thread that connects or accepts, makes the inner endpoint, and puts it where the polling thread finds it ([`Shared::inner`]).
//! With one provider, and no sessions, it is there from the start.
//!
//! Each inner endpoint has places for connections and receive buffers of its own, as many as the endpoint was asked for.
//!
//! # Sleeping
//! The polling thread can sleep in one inner endpoint alone: the *first* one, of `shm`, the rails, `tcp` in this order. Each other one
//! wakes it there when it has something:
//!
//! | | who wakes | when |
//! |---|---|---|
//! | `tcp` | the thread that serves its sockets ([`TcpEndpoint::wake_besides`]) | after it has published events |
//! | `rdma`, each rail | a thread that sleeps on the completion channel ([`Watcher`]) | after it woke, if the polling thread had armed it |
//!
//! **No wake is lost.** [`Attach::wake`] of the first inner endpoint ends its present or its next wait. The polling thread looks at
//! the others, and only then waits; what comes to another after that look is followed by a wake of the first. When a new inner
//! endpoint becomes the first one, all are woken after it was put there: so who had meant to wake the old first one, and did so
//! before, had done what it woke for before the polling thread looks again.
//!
//! | what | written by | read by | order |
//! |---|---|---|---|
//! | `attaches` | who makes an inner endpoint, once each | whoever connects, accepts or wakes | set, then all are woken |
//! | `arrived` | the same | the polling thread | under its lock; `fresh` says that there is something |

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

#[cfg(feature = "rdma")]
use super::watcher::Watcher;
use super::{
    Host, ID_BITS,
    connection::{Route, host_id},
};
use crate::{
    error::Error,
    session::{Way, wire::NamedRegion},
    transport::{
        Attach, Completion, Endpoint, EndpointConfig, ReceiveBuffer, Signal, Transport,
        host::HostSignal,
        shm::{ShmAttach, ShmEndpoint},
        tcp::{TcpAttach, TcpEndpoint},
    },
};
#[cfg(feature = "rdma")]
use crate::{
    rails::MAX_RAILS,
    transport::rdma::{RdmaAttach, RdmaEndpoint},
};

/// The inner endpoints.
#[derive(Default)]
struct Inner {
    shm: Option<ShmEndpoint>,
    tcp: Option<TcpEndpoint>,
    /// In the order of the rails.
    #[cfg(feature = "rdma")]
    rails: Vec<InnerRail>,
}

/// The inner endpoint of a rail.
#[cfg(feature = "rdma")]
struct InnerRail {
    rail: u8,
    endpoint: RdmaEndpoint,
    /// From the time on when the polling thread has slept elsewhere.
    watcher: Option<Watcher>,
}

#[cfg(feature = "rdma")]
impl Inner {
    fn put(&mut self, rail: InnerRail) {
        let place = self.rails.partition_point(|other| other.rail < rail.rail);
        self.rails.insert(place, rail);
    }

    /// The endpoint of the rail of this code, if it is one.
    #[inline]
    fn rail(&self, code: u32) -> Option<&RdmaEndpoint> {
        self.rails.iter().find(|inner| Route::Rail(inner.rail).code() == code).map(|inner| &inner.endpoint)
    }

    #[inline]
    fn rail_mut(&mut self, code: u32) -> Option<&mut RdmaEndpoint> {
        let found = self.rails.iter_mut().find(|inner| Route::Rail(inner.rail).code() == code);
        found.map(|inner| &mut inner.endpoint)
    }
}

/// Their handles.
#[derive(Default)]
struct Attaches {
    shm: OnceLock<ShmAttach>,
    tcp: OnceLock<TcpAttach>,
    #[cfg(feature = "rdma")]
    rails: [OnceLock<RdmaAttach>; MAX_RAILS],
}

/// What the polling thread has not taken yet.
#[derive(Default)]
struct Arrived {
    inner: Inner,
    /// The endpoint is gone.
    closed: bool,
}

/// What the handles of an endpoint share.
struct Shared {
    host: Host,
    config: EndpointConfig,
    attaches: Attaches,
    arrived: Mutex<Arrived>,
    fresh: AtomicBool,
    /// Where the polling thread sleeps as long as there is no inner endpoint.
    signal: HostSignal,
    woken: AtomicBool,
}

impl Shared {
    fn arrived(&self) -> MutexGuard<'_, Arrived> {
        // An inner endpoint is put there or taken in one step.
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The handle of an inner endpoint, which is made by `make` if there is none, and put by `put`.
    fn inner<E: Endpoint>(
        &self,
        attach: &OnceLock<E::Attach>,
        make: impl FnOnce() -> Result<E, Error>,
        put: impl FnOnce(&mut Inner, E),
    ) -> Result<E::Attach, Error> {
        if let Some(attach) = attach.get() {
            return Ok(attach.clone());
        }
        let mut arrived = self.arrived();
        if arrived.closed {
            return Err(Error::Limit {
                what: "the number of connections of the endpoint".to_owned(),
                value: self.config.connections as u64 + 1,
                limit: self.config.connections as u64,
                cure: "; the endpoint has been dropped".to_owned(),
            });
        }
        // Another thread may have been faster.
        if let Some(attach) = attach.get() {
            return Ok(attach.clone());
        }
        let inner = make()?;
        let handle = attach.get_or_init(|| inner.attach()).clone();
        put(&mut arrived.inner, inner);
        // SYNC POINT: releases `arrived` to the polling thread's look.
        self.fresh.store(true, Ordering::SeqCst);
        drop(arrived);
        self.wake_all();
        Ok(handle)
    }

    fn shm(&self) -> Result<ShmAttach, Error> {
        let make =
            || self.host.0.shm.as_ref().ok_or_else(|| self.host.lane_error(Way::Shm))?.endpoint(&self.config);
        self.inner(&self.attaches.shm, make, |inner, endpoint| inner.shm = Some(endpoint))
    }

    fn tcp(self: &Arc<Self>) -> Result<TcpAttach, Error> {
        let weak = Arc::downgrade(self);
        let make = || {
            let tcp = self.host.0.tcp.as_ref().ok_or_else(|| self.host.lane_error(Way::Tcp))?;
            let endpoint = tcp.endpoint(&self.config)?;
            if self.host.0.sessions {
                endpoint.wake_besides(move || {
                    if let Some(shared) = weak.upgrade() {
                        shared.wake_first();
                    }
                });
            }
            Ok(endpoint)
        };
        self.inner(&self.attaches.tcp, make, |inner, endpoint| inner.tcp = Some(endpoint))
    }

    #[cfg(feature = "rdma")]
    fn rail(&self, rail: usize) -> Result<RdmaAttach, Error> {
        let rdma = self.host.0.rails.get(rail).ok_or_else(|| self.host.lane_error(Way::Rdma));
        let dropped = |why: &str| Error::NoDevice { reason: why.to_owned() };
        let make = || self.host.0.pinning.endpoint(|| rdma?.endpoint(&self.config), dropped);
        self.inner(&self.attaches.rails[rail], make, |inner, endpoint| {
            inner.put(InnerRail { rail: rail as u8, endpoint, watcher: None });
        })
    }

    /// Wakes the polling thread where it sleeps.
    fn wake_first(&self) {
        if let Some(shm) = self.attaches.shm.get() {
            return shm.wake();
        }
        #[cfg(feature = "rdma")]
        if let Some(rail) = self.attaches.rails.iter().find_map(OnceLock::get) {
            return rail.wake();
        }
        if let Some(tcp) = self.attaches.tcp.get() {
            return tcp.wake();
        }
        self.woken.store(true, Ordering::SeqCst);
        self.signal.notify();
    }

    /// Wakes it wherever it may sleep.
    fn wake_all(&self) {
        if let Some(shm) = self.attaches.shm.get() {
            shm.wake();
        }
        #[cfg(feature = "rdma")]
        self.attaches.rails.iter().filter_map(OnceLock::get).for_each(Attach::wake);
        if let Some(tcp) = self.attaches.tcp.get() {
            tcp.wake();
        }
        self.woken.store(true, Ordering::SeqCst);
        self.signal.notify();
    }
}

/// A completion queue with receive buffers.
pub struct HostEndpoint {
    shared: Arc<Shared>,
    inner: Inner,
}

/// The handle of a [`HostEndpoint`] for other threads.
#[derive(Clone)]
pub struct HostAttach(Arc<Shared>);

impl HostEndpoint {
    pub(super) fn new(host: &Host, config: &EndpointConfig) -> Result<Self, Error> {
        let shared = Arc::new(Shared {
            host: host.clone(),
            config: config.clone(),
            attaches: Attaches::default(),
            arrived: Mutex::default(),
            fresh: AtomicBool::new(false),
            signal: HostSignal::new(),
            woken: AtomicBool::new(false),
        });
        if !host.0.sessions {
            // What it asks for is refused now, and not at the first connection.
            let way = Way::ALL.into_iter().find(|way| host.has(*way)).expect("a host has a provider");
            HostAttach(shared.clone()).make(way)?;
        }
        let inner = Inner::default();
        let mut endpoint = Self { shared, inner };
        endpoint.take_arrived();
        Ok(endpoint)
    }

    /// Takes the inner endpoints that others have made.
    fn take_arrived(&mut self) {
        // SYNC POINT: acquires what `Shared::inner` has put.
        if !self.shared.fresh.load(Ordering::Relaxed) || !self.shared.fresh.swap(false, Ordering::SeqCst) {
            return;
        }
        let mut arrived = self.shared.arrived();
        self.inner.shm = self.inner.shm.take().or(arrived.inner.shm.take());
        self.inner.tcp = self.inner.tcp.take().or(arrived.inner.tcp.take());
        #[cfg(feature = "rdma")]
        {
            arrived.inner.rails.drain(..).for_each(|rail| self.inner.put(rail));
        }
    }

    /// Has watchers sleep on the queues of all rails, but for that in which the polling thread sleeps. `false`: there may be something to poll.
    #[cfg(feature = "rdma")]
    fn watch_rails(&mut self) -> bool {
        let slept_in = usize::from(self.inner.shm.is_none());
        for InnerRail { endpoint, watcher, .. } in self.inner.rails.iter_mut().skip(slept_in) {
            if !endpoint.arm() {
                return false;
            }
            let start = || {
                let shared = Arc::clone(&self.shared);
                Watcher::start(endpoint.attach(), move || shared.wake_first())
            };
            watcher.get_or_insert_with(start).watch();
        }
        true
    }
}

/// Marks the completions of an inner endpoint that were appended from `first` on as those of a route.
#[inline]
fn mark(route: Route, first: usize, into: &mut [Completion]) {
    for completion in &mut into[first..] {
        match completion {
            Completion::Work { connection, .. }
            | Completion::WriteImmediate { connection, .. }
            | Completion::Disconnected { connection, .. } => *connection = host_id(route, *connection),
            Completion::Received { connection, buffer, .. } => {
                *connection = host_id(route, *connection);
                buffer.index = buffer.index << ROUTE_BITS | route.code();
            }
        }
    }
}

/// The receive buffer as its inner endpoint knows it, and the code of its route.
#[inline]
fn unmark(buffer: &ReceiveBuffer) -> (u32, ReceiveBuffer) {
    let (index, length) = (buffer.index >> ROUTE_BITS, buffer.length);
    (buffer.index & ((1 << ROUTE_BITS) - 1), ReceiveBuffer { index, length })
}

const ROUTE_BITS: u32 = u32::BITS - ID_BITS;
const SHM: u32 = Route::Shm.code();
const TCP: u32 = Route::Tcp.code();
const FOREIGN: &str = "a receive buffer of another endpoint";

impl Endpoint for HostEndpoint {
    type Attach = HostAttach;

    fn attach(&self) -> HostAttach {
        HostAttach(self.shared.clone())
    }

    #[inline]
    fn poll(&mut self, into: &mut Vec<Completion>) -> usize {
        self.take_arrived();
        let before = into.len();
        if let Some(shm) = &mut self.inner.shm {
            let first = into.len();
            shm.poll(into);
            mark(Route::Shm, first, into);
        }
        #[cfg(feature = "rdma")]
        for InnerRail { rail, endpoint, .. } in &mut self.inner.rails {
            let first = into.len();
            endpoint.poll(into);
            mark(Route::Rail(*rail), first, into);
        }
        if let Some(tcp) = &mut self.inner.tcp {
            let first = into.len();
            tcp.poll(into);
            mark(Route::Tcp, first, into);
        }
        into.len() - before
    }

    fn wait(&mut self, timeout: Duration) {
        self.take_arrived();
        if let Some(tcp) = &self.inner.tcp
            && tcp.has_events()
        {
            return;
        }
        #[cfg(feature = "rdma")]
        if !self.watch_rails() {
            return;
        }
        if let Some(shm) = &mut self.inner.shm {
            return shm.wait(timeout);
        }
        #[cfg(feature = "rdma")]
        if let Some(first) = self.inner.rails.first_mut() {
            return first.endpoint.wait(timeout);
        }
        if let Some(tcp) = &mut self.inner.tcp {
            return tcp.wait(timeout);
        }
        let seen = self.shared.signal.epoch();
        if !self.shared.woken.load(Ordering::SeqCst) {
            self.shared.signal.wait(seen, timeout);
        }
        self.shared.woken.store(false, Ordering::SeqCst);
    }

    #[inline]
    fn message(&self, buffer: &ReceiveBuffer) -> &[u8] {
        match unmark(buffer) {
            (SHM, buffer) => self.inner.shm.as_ref().expect(FOREIGN).message(&buffer),
            (TCP, buffer) => self.inner.tcp.as_ref().expect(FOREIGN).message(&buffer),
            #[cfg(feature = "rdma")]
            (code, buffer) => self.inner.rail(code).expect(FOREIGN).message(&buffer),
            #[cfg(not(feature = "rdma"))]
            _ => panic!("{FOREIGN}"),
        }
    }

    #[inline]
    fn release(&mut self, buffer: ReceiveBuffer) {
        match unmark(&buffer) {
            (SHM, buffer) => self.inner.shm.as_mut().expect(FOREIGN).release(buffer),
            (TCP, buffer) => self.inner.tcp.as_mut().expect(FOREIGN).release(buffer),
            #[cfg(feature = "rdma")]
            (code, buffer) => self.inner.rail_mut(code).expect(FOREIGN).release(buffer),
            #[cfg(not(feature = "rdma"))]
            _ => panic!("{FOREIGN}"),
        }
    }
}

impl Drop for HostEndpoint {
    fn drop(&mut self) {
        let mut arrived = self.shared.arrived();
        arrived.closed = true;
        let inner = std::mem::take(&mut arrived.inner);
        // Not under the lock: an engine that ends may be about to wake somebody.
        drop(arrived);
        drop(inner);
    }
}

impl HostAttach {
    /// Whether it is of that host.
    pub(super) fn is_of(&self, host: &Host) -> bool {
        Arc::ptr_eq(&self.0.host.0, &host.0)
    }

    /// What a peer is told of the host's regions, for a lane by this route.
    pub(super) fn offers(&self, route: Route) -> Vec<NamedRegion> {
        self.0.host.0.regions.offers(route)
    }

    /// The host.
    pub(super) fn host(&self) -> &Host {
        &self.0.host
    }

    /// The processor that the polling thread is pinned to, if that is known.
    #[cfg(feature = "rdma")]
    pub(super) fn core(&self) -> Option<usize> {
        self.0.config.core
    }

    /// Makes the inner endpoint of a way, if there is none: of the first rail, if it is RDMA.
    fn make(&self, way: Way) -> Result<(), Error> {
        match way {
            Way::Shm => self.shm().map(drop),
            Way::Tcp => self.tcp().map(drop),
            #[cfg(feature = "rdma")]
            Way::Rdma => self.rail(0).map(drop),
            #[cfg(not(feature = "rdma"))]
            Way::Rdma => Err(self.0.host.lane_error(way)),
        }
    }

    /// The inner endpoint of shared memory.
    pub(super) fn shm(&self) -> Result<ShmAttach, Error> {
        self.0.shm()
    }

    /// The inner endpoint of TCP.
    pub(super) fn tcp(&self) -> Result<TcpAttach, Error> {
        self.0.tcp()
    }

    /// The inner endpoint of a rail.
    #[cfg(feature = "rdma")]
    pub(super) fn rail(&self, rail: usize) -> Result<RdmaAttach, Error> {
        self.0.rail(rail)
    }
}

impl Attach for HostAttach {
    fn wake(&self) {
        self.0.wake_first();
    }
}

impl fmt::Debug for HostEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostEndpoint({:?})", self.shared.config)
    }
}

impl fmt::Debug for HostAttach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HostAttach")
    }
}
