//! A simulated cluster: the real server and the real client on many nodes, in virtual time.
//!
//! ```text
//!  server nodes 0..S: one shard each          worker nodes 0..W: one client with one worker each
//! ```
//!
//! What the workers do is given; when it happens follows from the network, the machines and the seed alone, so that a
//! cluster that is run twice does the same.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use fervor_client::{Client, ClientOptions};
use fervor_server::{Config, Server};
use fervor_verbs::{
    Address,
    transport::sim::{Busy, Fabric, Machine, Node, Sent, Settings, Sim},
};
use serde::Serialize;

/// Greatest difference of a machine's computing from one time to the next, of all machines.
pub const JITTER: f64 = 0.02;
/// How much longer the one slow worker takes.
pub const SLOWNESS: f64 = 3.0;
/// How long a random pause is.
pub const PAUSE: Duration = Duration::from_millis(200);
/// Mean time of computing between two pauses of a worker.
pub const PAUSE_EVERY: Duration = Duration::from_secs(4);

/// What kind of machines the workers are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Machines {
    /// All alike.
    Equal,
    /// Worker 0 computes [`SLOWNESS`] times as long as the others.
    OneSlow,
    /// Each pauses for [`PAUSE`] now and then.
    Pausing,
}

impl Machines {
    fn machine(self, worker: usize) -> Machine {
        let alike = Machine { jitter: JITTER, ..Machine::default() };
        match self {
            Machines::OneSlow if worker == 0 => Machine { slowness: SLOWNESS, ..alike },
            Machines::Pausing => Machine { pause: PAUSE, pause_every: PAUSE_EVERY, ..alike },
            Machines::Equal | Machines::OneSlow => alike,
        }
    }
}

/// A cluster to simulate.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// Worker nodes.
    pub workers: usize,
    /// Server nodes.
    pub servers: usize,
    /// The network.
    pub fabric: Fabric,
    /// The worker's machines.
    pub machines: Machines,
    /// The seed of all chance in it.
    pub seed: u64,
    /// Bytes of each client's cache.
    pub cache: usize,
    /// The processor that simulates it.
    pub core: Option<usize>,
}

/// A worker's place in the cluster.
#[derive(Debug)]
pub struct Place {
    /// The simulation.
    pub sim: Sim,
    /// Its node, whose time is virtual.
    pub node: Node,
    /// Its client.
    pub client: Client<Node>,
    /// Its number.
    pub number: usize,
    /// The servers' nodes.
    servers: Arc<Vec<Node>>,
}

impl Place {
    /// What the network, and the busiest of the servers in each way, have done so far.
    pub fn traffic(&self) -> Traffic {
        let busy = || self.servers.iter().map(|node| self.sim.busy(node));
        let most = |of: fn(Busy) -> Duration| busy().map(of).max().unwrap_or_default();
        Traffic {
            sent: self.sim.sent(),
            busiest: Busy {
                sending: most(|busy| busy.sending),
                receiving: most(|busy| busy.receiving),
                threads: most(|busy| busy.threads),
            },
        }
    }
}

/// What the network and the servers have done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Traffic {
    /// All that was sent.
    pub sent: Sent,
    /// Of the servers.
    pub busiest: Busy,
}

/// What a simulation has come to.
#[derive(Debug)]
pub struct Simulated<X> {
    /// What each worker has come to.
    pub results: Vec<X>,
    /// Events of the simulation.
    pub events: u64,
    /// Hash of its history: equal for equal runs.
    pub hash: u64,
}

/// What the threads of a simulation share.
struct Shared<X> {
    servers_up: AtomicUsize,
    working: AtomicUsize,
    results: Mutex<Vec<(usize, Result<X>)>>,
}

/// Runs `work` as each worker of `cluster`.
///
/// # Errors
/// What the workers, the clients or the servers say; that the simulation failed.
pub fn run<X: Send + 'static>(
    cluster: &Cluster,
    work: impl Fn(&Place) -> Result<X> + Send + Sync + 'static,
) -> Result<Simulated<X>> {
    let settings = Settings {
        fabric: Some(cluster.fabric.clone()),
        limit: Duration::from_secs(24 * 3600),
        core: cluster.core,
        ..Settings::default()
    };
    let sim = Sim::with(cluster.seed, settings);
    let addresses: Arc<Vec<Address>> =
        Arc::new((0..cluster.servers).map(|number| Address::Sim(format!("server-{number}"))).collect());
    let shared = Arc::new(Shared {
        servers_up: AtomicUsize::new(0),
        working: AtomicUsize::new(cluster.workers),
        results: Mutex::new(Vec::new()),
    });
    let servers: Arc<Vec<Node>> =
        Arc::new((0..cluster.servers).map(|number| sim.node(&format!("server {number}"))).collect());
    for (number, (address, node)) in addresses.iter().zip(servers.iter().cloned()).enumerate() {
        let (sim_inside, shared) = (sim.clone(), shared.clone());
        let mut config = Config::new(address.clone());
        config.id = number as u64;
        config.clients = cluster.workers;
        config.lanes = 1;
        config.memory = (cluster.cache / cluster.servers).next_multiple_of(4096).max(64 << 10);
        sim.spawn(&node.clone(), "server", move || serve(&sim_inside, &node, &config, &shared));
    }
    let work = Arc::new(work);
    for number in 0..cluster.workers {
        let node = sim.node(&format!("worker {number}"));
        sim.machine(&node, cluster.machines.machine(number));
        let (sim_inside, shared, work, addresses, servers) =
            (sim.clone(), shared.clone(), work.clone(), addresses.clone(), servers.clone());
        let options = ClientOptions {
            clients: cluster.workers as u16,
            cache_bytes: cluster.cache,
            cache_share: 1.0,
            connect_timeout: Duration::from_secs(60),
            ..ClientOptions::default()
        };
        sim.spawn(&node.clone(), "worker", move || {
            while shared.servers_up.load(Ordering::SeqCst) < addresses.len() {
                sim_inside.sleep(&node, Duration::from_millis(1));
            }
            let result =
                Client::connect_on(&node, &addresses, options).map_err(Into::into).and_then(|client| {
                    let place = Place { sim: sim_inside, node, client, number, servers };
                    let result = work(&place)?;
                    place.client.close()?;
                    Ok(result)
                });
            shared.results.lock().unwrap_or_else(PoisonError::into_inner).push((number, result));
            shared.working.fetch_sub(1, Ordering::SeqCst);
        });
    }
    sim.try_run().map_err(|report| anyhow!("{report}"))?;
    let mut results = std::mem::take(&mut *shared.results.lock().unwrap_or_else(PoisonError::into_inner));
    results.sort_by_key(|(number, _)| *number);
    let results = results
        .into_iter()
        .map(|(number, result)| result.with_context(|| format!("simulated worker {number}")))
        .collect::<Result<_>>()?;
    Ok(Simulated { results, events: sim.events(), hash: sim.hash() })
}

/// A server's main thread: until the last worker is done.
///
/// # Panics
/// When the server does not start, or one of its threads panicked: the simulation fails, with this message.
fn serve<X>(sim: &Sim, node: &Node, config: &Config, shared: &Shared<X>) {
    let server = Server::start(node, config).expect("a simulated server starts");
    shared.servers_up.fetch_add(1, Ordering::SeqCst);
    while shared.working.load(Ordering::SeqCst) > 0 {
        sim.sleep(node, Duration::from_millis(100));
    }
    assert!(server.stop(), "a thread of a simulated server panicked");
}
