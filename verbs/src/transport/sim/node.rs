//! Nodes: registered memory, event counts, threads.
//!
//! Here and in [`ends`](super::ends) are the contract's objects; [`provider`](super::provider) makes them. Each call locks the
//! world, does its part, and, if it is a scheduling point, waits.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::{
    connection::Place,
    random::Random,
    threads::{Shared, State, Wait},
    world::{Registered, World},
};
use crate::{
    address::Address,
    error::Error,
    memory::Memory,
    transport::{self, Access, RemoteRegion},
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
    pub(super) fn new_region(&self, memory: &Memory, access: Access) -> RegionInner {
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
pub struct Export(pub(super) RegionInner);

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
    pub(super) fn new(node: &Node) -> Self {
        Self { node: node.clone(), state: Arc::default() }
    }

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
    pub(super) node: Node,
    pub(super) index: usize,
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
