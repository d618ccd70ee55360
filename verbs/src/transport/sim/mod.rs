//! The `sim` provider: many nodes in one process, in virtual time, replayable from a seed.
//!
//! ```
//! use std::time::Duration;
//! use fervor_verbs::transport::{Listener, Runtime, Transport, sim::Sim};
//!
//! let sim = Sim::new(7);
//! let (server, client) = (sim.node("server"), sim.node("client"));
//! sim.spawn(&server.clone(), "main", move || {
//!     let mut listener = server.listen(&"sim://server".parse().unwrap()).unwrap();
//!     assert!(listener.accept(Duration::from_secs(1)).unwrap().is_none());
//! });
//! sim.spawn(&client.clone(), "main", move || client.relax(0));
//! sim.run();
//! ```
//!
//! **The model.** A simulation is a queue of events in the order of virtual time (`world`). An event is a
//! step of a NIC (a cache line of a WRITE lands, a completion is acknowledged) or a thread's turn. Threads are
//! real (`threads`), but run one at a time, and hand over only at the contract's scheduling points; between
//! two of them a thread runs in no time, and pays for its calls afterwards. Which thread is next, and how long
//! anything takes, is drawn from the seed, and from nothing else: two runs of one seed and one program are
//! the same ([`Sim::hash`]), if the program decides nothing by addresses, by the iteration order of a
//! `HashMap`, or by real time.
//!
//! Each node is on a host of its own, or on that of another node ([`Sim::node_on`]): then the two have views of each
//! other's memory.
//!
//! **It delivers everything that the contract allows**, and nothing more (`connection`): the lines of a
//! READ or a WRITE move one by one in any order; a WRITE is complete long before it lands, and WRITEs land
//! in any order until a later message, immediate or READ of the same connection proves them; SENDs and
//! WRITEs overtake READs; gather lists are read as late as may be; completions show late; requests that
//! were on their way when a connection broke happened, or in part, or not; regions registered after a
//! connection was made are out of its reach; views are read word by word while others run; a dead peer is noticed at any time within two seconds. Each seed
//! is after another kind of trouble (`random::Temper`).
//!
//! **Time instead.** With a [`Fabric`] ([`Settings::fabric`]) the same nodes, threads and connections are in a simulation of
//! time: how long a job takes on so many machines of such a network. Messages then move whole, in order, and as fast as the
//! NICs on their way let them (`fabric`, `timed`); a thread computes for as long as it says ([`Node::compute`]) on the
//! [`Machine`] that its node is; and a thread that waits is woken by what it waits for, so that hundreds of workers cost little more
//! than their messages. What is delivered is within the contract, but far from the worst of it.
//!
//! **Failures.** A root thread that panics, a thread whose panic nobody joined, a deadlock and a limit of
//! virtual time fail the run, with the seed, what each thread waits in, and the last events.

use std::{sync::Arc, time::Duration};

use crate::transport::{Runtime, Signal as _};

mod chunks;
mod connection;
mod ending;
mod endpoint;
mod ends;
mod fabric;
mod handshake;
mod history;
mod node;
mod provider;
pub(in crate::transport) mod random;
#[cfg(test)]
pub(in crate::transport) mod tests;
mod threads;
mod timed;
mod view;
mod world;

pub use ends::{Attach, Connection, Endpoint, Listener, Request};
pub use fabric::{Busy, Fabric, Machine, Sent};
pub use node::{Export, Node, Region, Signal, Thread};
pub use random::Network;
pub use view::View;

use fabric::{Computing, Traffic};
use threads::{Shared, State};
use world::{NodeState, World};

/// What a simulation can be told, beyond its seed.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How long packets take, when weak memory is simulated.
    pub network: Network,
    /// Simulates time instead: see the module.
    pub fabric: Option<Fabric>,
    /// The processor that all threads of the simulation run on: handing over is cheaper then.
    pub core: Option<usize>,
    /// A run that takes longer (virtual time) fails.
    pub limit: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { network: Network::default(), fabric: None, core: None, limit: Duration::from_secs(300) }
    }
}

/// A simulation. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Sim {
    shared: Arc<Shared>,
}

impl Sim {
    /// A simulation with this seed and the default settings.
    pub fn new(seed: u64) -> Self {
        Self::with(seed, Settings::default())
    }

    /// A simulation with this seed.
    pub fn with(seed: u64, settings: Settings) -> Self {
        let limit = u64::try_from(settings.limit.as_nanos()).unwrap_or(u64::MAX);
        let traffic = settings.fabric.map(Traffic::new);
        Self { shared: Shared::new(World::new(seed, settings.network, traffic, limit), settings.core) }
    }

    /// A new node, on a host of its own.
    pub fn node(&self, name: &str) -> Node {
        let host = self.shared.lock().nodes.len();
        self.add_node(host, name)
    }

    /// A new node on the host of another one: the two have [views](crate::transport::Connection::view) of each other's memory.
    /// In all else they are like any two nodes.
    pub fn node_on(&self, host: &Node, name: &str) -> Node {
        let host = self.shared.lock().nodes[host.index].host;
        self.add_node(host, name)
    }

    fn add_node(&self, host: usize, name: &str) -> Node {
        let mut world = self.shared.lock();
        let computing = Computing::new(Machine::default(), 0);
        world.nodes.push(NodeState {
            computing,
            relaxing: Vec::new(),
            name: name.to_owned(),
            host,
            alive: true,
            regions: Default::default(),
            registrations: 0,
            next_address: 1 << 32,
            prelude: Default::default(),
        });
        Node { shared: Arc::clone(&self.shared), index: world.nodes.len() - 1 }
    }

    /// Has every thread that is started on `node` from now on do this first: a test exposes code of others so.
    pub fn prelude(&self, node: &Node, prelude: impl Fn() + Send + Sync + 'static) {
        self.shared.lock().nodes[node.index].prelude.0 = Some(Arc::new(prelude));
    }

    /// Says what kind of machine `node` is.
    pub fn machine(&self, node: &Node, machine: Machine) {
        let mut world = self.shared.lock();
        let seed = world.seed ^ (node.index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        world.nodes[node.index].computing = Computing::new(machine, seed);
    }

    /// Makes a root thread: the run lasts until all of them have ended. Threads of a run may make more.
    ///
    /// # Panics
    /// When the system has no thread left.
    pub fn spawn(&self, node: &Node, name: &str, body: impl FnOnce() + Send + 'static) {
        self.shared.spawn(node.index, name, true, body).expect("spawn a thread");
    }

    /// Runs until all root threads have ended; then other threads are ended where they wait. Once for a simulation.
    ///
    /// # Panics
    /// When the simulation fails: see the module.
    pub fn run(&self) {
        if let Err(report) = self.try_run() {
            panic!("{report}");
        }
    }

    /// As [`Sim::run`].
    ///
    /// # Errors
    /// The report of a failure.
    pub fn try_run(&self) -> Result<(), String> {
        self.shared.run();
        let mut world = self.shared.lock();
        let unseen =
            |thread: &threads::ThreadState| thread.state == State::Ended { panicked: true } && !thread.joined;
        if let Some(thread) = world.threads.iter().find(|thread| unseen(thread)) {
            let what = format!("thread `{}` panicked, and nobody joined it", thread.name);
            world.fail(what);
        }
        world.failure.take().map_or(Ok(()), Err)
    }

    /// Kills a node, as a process is killed: its threads never run again, nothing it holds matters any more, its
    /// connections break at their other ends within two seconds. Kills the caller, if it is the caller's node.
    pub fn kill(&self, node: &Node) {
        let mut world = self.shared.lock();
        world.kill(node.index);
        let own = world.threads[self.shared.current()].node == node.index;
        drop(world);
        if own {
            node.relax(0);
        }
    }

    /// Lets virtual time pass for the calling thread of `node`.
    pub fn sleep(&self, node: &Node, time: Duration) {
        let signal = node.signal();
        signal.wait(signal.epoch(), time);
    }

    /// A hash of everything that has happened: equal for equal runs.
    pub fn hash(&self) -> u64 {
        self.shared.lock().history.hash()
    }

    /// Ends of connections at the endpoints of `node`: all but those of which the end has been polled and that have been dropped.
    pub fn connections(&self, node: &Node) -> usize {
        let world = self.shared.lock();
        let endpoints =
            world.endpoints.iter().filter(|endpoint| endpoint.alive && endpoint.node == node.index);
        endpoints.map(|endpoint| endpoint.taken).sum()
    }

    /// What has been sent so far, in a simulation of time; nothing otherwise.
    pub fn sent(&self) -> Sent {
        self.shared.lock().traffic.as_ref().map(|traffic| traffic.sent).unwrap_or_default()
    }

    /// How long `node` has been at work with messages so far, in a simulation of time; not at all otherwise.
    pub fn busy(&self, node: &Node) -> Busy {
        self.shared.lock().traffic.as_mut().map(|traffic| traffic.busy_of(node.index)).unwrap_or_default()
    }

    /// Number of events that have happened: turns of threads, and steps of NICs.
    pub fn events(&self) -> u64 {
        self.shared.lock().steps
    }
}
