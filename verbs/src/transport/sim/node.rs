//! Nodes: registered memory, event counts, threads, and what makes the rest.
//!
//! Here and in [`ends`](super::ends) are the contract's objects. Each call locks the world, does its part, and,
//! if it is a scheduling point, waits.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::{
    connection::Place,
    ends::{Attach, Connection, Endpoint, Listener, Request},
    handshake::{Answer, Attempt, ListenerState},
    random::Random,
    threads::{Shared, State, Wait},
    view::View,
    world::{Event, Registered, World},
};
use crate::{
    address::Address,
    error::Error,
    memory::{Exclusive, Memory},
    transport::{self, Access, EndpointConfig, MAX_REQUEST_DATA, RemoteRegion},
};

/// A node of a simulation: a process, with memory, threads and a NIC of its own. The `sim` transport.
#[derive(Debug, Clone)]
pub struct Node {
    pub(super) shared: Arc<Shared>,
    pub(super) index: usize,
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The name in a `sim://name`.
pub(super) fn name(address: &Address) -> Result<&str, Error> {
    match address {
        Address::Sim(name) => Ok(name),
        other => Err(Error::WrongProvider { address: other.to_string(), provider: "sim" }),
    }
}

pub(super) fn at_most(what: &str, value: usize, limit: usize) -> Result<(), Error> {
    if value <= limit {
        return Ok(());
    }
    let (what, cure) = (what.to_owned(), String::new());
    Err(Error::Limit { what, value: value as u64, limit: limit as u64, cure })
}

impl Node {
    fn new_region(&self, memory: &Memory, access: Access) -> RegionInner {
        let mut world = self.shared.lock();
        world.call(1_000);
        let seed = world.random.next();
        let node = &mut world.nodes[self.index];
        let mut keys = Random::new(seed);
        let key = loop {
            let key = keys.next() as u32;
            if !node.regions.contains_key(&key) {
                break key;
            }
        };
        let address = node.next_address;
        // Pages between two regions belong to none.
        node.next_address += (memory.len() as u64).next_multiple_of(4096) + (1 << 20);
        let serial = node.registrations;
        node.registrations += 1;
        node.regions.insert(key, Registered { memory: memory.clone(), access, address, serial });
        let remote = RemoteRegion { address, length: memory.len() as u64, key };
        RegionInner { node: self.clone(), memory: memory.clone(), remote }
    }

    /// Lets virtual time pass for the calling thread, which computes what takes `time` on an ordinary machine: see
    /// [`Machine`](super::Machine).
    pub fn compute(&self, time: Duration) {
        let mut world = self.shared.lock();
        let delay = world.nodes[self.index].computing.takes(nanos(time));
        self.shared.block(world, Wait::Compute, Some(delay));
    }

    /// Where a connection made now begins, at this node.
    pub(super) fn place(&self, world: &World, endpoint: usize) -> Place {
        Place { node: self.index, endpoint, horizon: world.nodes[self.index].registrations }
    }

    /// Blocks in `wait` until `done` finds what it waits for or the timeout is over.
    pub(super) fn until<X>(
        &self,
        wait: Wait,
        timeout: Duration,
        mut done: impl FnMut(&mut World) -> Option<X>,
    ) -> Option<X> {
        let mut world = self.shared.lock();
        let deadline = world.now.saturating_add(nanos(timeout));
        loop {
            if let Some(found) = done(&mut world) {
                return Some(found);
            }
            if world.now >= deadline {
                return None;
            }
            let left = deadline - world.now;
            self.shared.block(world, wait, Some(left));
            world = self.shared.lock();
            if world.threads[self.shared.current()].dying() {
                return None;
            }
        }
    }
}

impl transport::Transport for Node {
    type Region = Region;
    type Export = Export;
    type Endpoint = Endpoint;
    type Attach = Attach;
    type Connection = Connection;
    type View = View;
    type Listener = Listener;
    type Request = Request;
    type Signal = Signal;
    type Thread = Thread;

    // Few: each is a step of the simulation, and sleeping is to be explored, too.
    const AWAKE_TURNS: u32 = 32;

    fn has_views(&self) -> bool {
        true
    }

    fn register(&self, memory: &Memory, access: Access) -> Result<Region, Error> {
        Ok(Region(Arc::new(self.new_region(memory, access))))
    }

    fn export(&self, memory: &Exclusive) -> Result<Export, Error> {
        Ok(Export(self.new_region(&memory.map_again()?, Access::RemoteRead)))
    }

    fn endpoint(&self, config: &EndpointConfig) -> Result<Endpoint, Error> {
        let mut world = self.shared.lock();
        world.call(1_000);
        let index = world.new_endpoint(self.index, config);
        Ok(Endpoint::new(Attach { node: self.clone(), index }, config.receive_buffers))
    }

    fn listen(&self, address: &Address) -> Result<Listener, Error> {
        let name = name(address)?;
        let mut world = self.shared.lock();
        world.call(1_000);
        if world.listeners.contains_key(name) {
            return Err(Error::AddressInUse { address: address.to_string() });
        }
        let state = ListenerState { node: self.index, queue: Default::default(), waiter: None };
        world.listeners.insert(name.to_owned(), state);
        Ok(Listener::new(self, address))
    }

    fn connect(
        &self,
        endpoint: &Attach,
        address: &Address,
        private_data: &[u8],
        timeout: Duration,
    ) -> Result<(Connection, Vec<u8>), Error> {
        let target = name(address)?;
        at_most("the length of the request's private data", private_data.len(), MAX_REQUEST_DATA)?;
        let mut world = self.shared.lock();
        world.call(1_000);
        let thread = self.shared.current();
        let state = &mut world.endpoints[endpoint.index];
        at_most("the number of connections of the endpoint", state.taken + 1, state.config.connections)?;
        state.taken += 1;
        let number = world.attempts.len();
        let place = self.place(&world, endpoint.index);
        world.attempts.push(Attempt {
            address: target.to_owned(),
            place,
            data: private_data.to_vec(),
            thread,
            host: None,
            answer: None,
            answered: false,
            abandoned: false,
        });
        let delay = world.thread_delay(2_000);
        world.schedule(delay, Event::Knock { attempt: number });
        drop(world);
        let answer = self.until(Wait::Connect, timeout, |world| {
            let attempt = &mut world.attempts[number];
            attempt.answered.then(|| attempt.answer.take().expect("it has been answered"))
        });
        let mut world = self.shared.lock();
        if let Some(Answer::Accepted { link, data }) = answer {
            return Ok((Connection::new(self, link, 0, &world), data));
        }
        world.attempts[number].abandoned = true;
        world.endpoints[endpoint.index].taken -= 1;
        let address = address.to_string();
        Err(match answer {
            Some(Answer::Refused { data: private_data }) => Error::Refused { address, private_data },
            Some(Answer::Unreachable { reason }) => Error::Unreachable { address, reason: reason.to_owned() },
            _ => {
                Error::Timeout { what: format!("connecting to `{address}`"), seconds: timeout.as_secs_f64() }
            }
        })
    }

    fn now(&self) -> Duration {
        let mut world = self.shared.lock();
        world.call(20);
        // In a simulation of time the calls so far count at once.
        let lag = if world.traffic.is_some() { world.lag } else { 0 };
        Duration::from_nanos(world.now + lag)
    }

    fn relax(&self, turn: u32) {
        let mut world = self.shared.lock();
        if world.traffic.is_some() {
            let me = self.shared.current();
            let delay = world.starts_to_relax(self.index, turn);
            self.shared.block(world, Wait::Relax, Some(delay));
            return self.shared.lock().has_relaxed(self.index, me);
        }
        // The first turns spin; later ones give the processor away for longer and longer. (Who spins makes the
        // simulation slow: each turn is a switch of threads.)
        let typical = (world.temper.spin << (turn.min(64) / 8)).min(20_000);
        let delay = world.thread_delay(typical);
        self.shared.block(world, Wait::Relax, Some(delay));
    }

    fn signal(&self) -> Signal {
        Signal { node: self.clone(), state: Arc::default() }
    }

    fn spawn(
        &self,
        name: &str,
        _core: Option<usize>,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<Thread, Error> {
        let index = self.shared.spawn(self.index, name, false, body).map_err(Error::io("spawn"))?;
        Ok(Thread { node: self.clone(), index })
    }
}

pub(super) struct RegionInner {
    pub(super) node: Node,
    pub(super) memory: Memory,
    remote: RemoteRegion,
}

impl Drop for RegionInner {
    fn drop(&mut self) {
        let mut world = self.node.shared.lock();
        world.nodes[self.node.index].regions.remove(&self.remote.key);
    }
}

impl fmt::Debug for RegionInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of node {}", self.remote, self.node.index)
    }
}

/// Registered memory of a node.
#[derive(Debug, Clone)]
pub struct Region(pub(super) Arc<RegionInner>);

impl transport::Region for Region {
    fn memory(&self) -> &Memory {
        &self.0.memory
    }

    fn remote(&self) -> RemoteRegion {
        self.0.remote
    }
}

/// Exported memory of a node.
#[derive(Debug)]
pub struct Export(RegionInner);

impl transport::Export for Export {
    fn remote(&self) -> RemoteRegion {
        self.0.remote
    }
}

/// The state of an event count: only the running thread looks at it.
#[derive(Debug, Default)]
struct SignalState {
    epoch: u64,
    waiters: Vec<usize>,
}

/// An event count of a node.
#[derive(Debug, Clone)]
pub struct Signal {
    node: Node,
    state: Arc<Mutex<SignalState>>,
}

impl Signal {
    fn state(&self) -> std::sync::MutexGuard<'_, SignalState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl transport::Signal for Signal {
    fn epoch(&self) -> u64 {
        self.state().epoch
    }

    fn wait(&self, seen: u64, timeout: Duration) {
        let me = self.node.shared.current();
        self.node.until(Wait::Signal, timeout, |_| {
            let mut state = self.state();
            if state.epoch == seen && !state.waiters.contains(&me) {
                state.waiters.push(me);
            }
            (state.epoch != seen).then_some(())
        });
        self.state().waiters.retain(|&waiter| waiter != me);
    }

    fn notify(&self) {
        let waiters = {
            let mut state = self.state();
            state.epoch += 1;
            std::mem::take(&mut state.waiters)
        };
        let mut world = self.node.shared.lock();
        world.call(100);
        for waiter in waiters {
            let delay = world.thread_delay(3_000);
            world.wake(waiter, delay);
        }
    }
}

/// A thread of a node.
#[derive(Debug)]
pub struct Thread {
    node: Node,
    index: usize,
}

impl transport::Thread for Thread {
    fn join(self) -> bool {
        let me = self.node.shared.current();
        self.node
            .until(Wait::Join(self.index), Duration::MAX, |world| {
                let thread = &mut world.threads[self.index];
                if let State::Ended { panicked } = thread.state {
                    thread.joined = true;
                    return Some(!panicked);
                }
                if !thread.joiners.contains(&me) {
                    thread.joiners.push(me);
                }
                None
            })
            // This thread is dying itself.
            .unwrap_or(false)
    }
}
