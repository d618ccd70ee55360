//! One seed from start to end: servers, clients, the rogue, the one who kills, and the sums at last.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fervor_client::{Client, ClientOptions, Model, WorkerStats};
use fervor_server::Server;
use fervor_verbs::{
    Address,
    transport::{
        Thread, Transport,
        any::Host,
        sim::{Node, Settings, Sim},
    },
};

use super::{
    actor::{Actor, Number, open},
    journal::What,
    plan::{Plan, Victim},
    rogue,
};
use crate::{
    on,
    support::{Folder, config},
};

/// Virtual time after which a run has hung. A death takes up to two seconds of it.
const LIMIT: Duration = Duration::from_secs(8);

/// What a run came to.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Hash of everything that happened.
    pub hash: u64,
    pub events: u64,
    pub tally: Tally,
}

/// Why a run failed.
#[derive(Debug)]
pub struct Failure {
    /// What was noticed first.
    pub first: String,
    /// All of it: the threads, the last events, the last operations.
    pub report: String,
}

/// Counts that say what the workloads reach.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    pub gets: u64,
    pub hits: u64,
    pub reads: u64,
    pub torn: u64,
    pub asked: u64,
    pub deaths: u64,
    pub rogues: u64,
    pub late: u64,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gets, hits, reads, torn, asked, deaths, rogues, late } = self;
        writeln!(f, "{gets} gets checked: {hits} hits, {reads} READs, {torn} torn, {asked} rows asked for")?;
        write!(f, "in {deaths} jobs a client was killed, in {rogues} one did wrong, in {late} they came late")
    }
}

impl Tally {
    pub fn add(&mut self, other: &Self) {
        self.gets += other.gets;
        self.hits += other.hits;
        self.reads += other.reads;
        self.torn += other.torn;
        self.asked += other.asked;
        self.deaths += other.deaths;
        self.rogues += other.rogues;
        self.late += other.late;
    }

    fn count(&mut self, stats: &WorkerStats) {
        self.gets += stats.hits + stats.misses;
        self.hits += stats.hits;
        self.reads += stats.reads;
        self.torn += stats.torn;
        self.asked += stats.asked;
    }
}

/// A client of the job, from its beginning to its end. `joined` is told when it is part of the job.
fn client<T: Transport>(
    transport: &T,
    servers: &[Address],
    plan: &Arc<Plan>,
    number: usize,
    tally: &Arc<Mutex<Tally>>,
    joined: impl FnOnce(),
) {
    let options = ClientOptions {
        clients: plan.expected(),
        cache_bytes: 8 << 20,
        reads_in_flight: plan.reads_in_flight,
        ..ClientOptions::default()
    };
    let client = Client::connect_on(transport, servers, options).unwrap();
    joined();
    let tables = open(&client, plan);
    let lanes = plan.lanes.iter().enumerate().filter(|(_, lane)| lane.client == number);
    let actors: Vec<_> = lanes
        .map(|(lane, _)| Actor::new(transport, plan, lane, client.worker().unwrap(), tables.clone()))
        .collect();
    let threads: Vec<_> = actors
        .into_iter()
        .map(|actor| {
            let tally = tally.clone();
            let body = move || {
                let plan = actor.plan.clone();
                let stats = plan.journal.heed(|| actor.run());
                tally.lock().unwrap_or_else(PoisonError::into_inner).count(&stats);
            };
            transport.spawn("worker", None, body).unwrap()
        })
        .collect();
    for thread in threads {
        assert!(thread.join(), "seed {}: a worker failed", plan.seed);
    }
    client.close().unwrap();
    plan.closed[number].store(true, Ordering::SeqCst);
}

/// A new client finds the sums.
fn sums<T: Transport>(transport: &T, servers: &[Address], plan: &Arc<Plan>) {
    let options = ClientOptions { cache_bytes: 8 << 20, ..ClientOptions::default() };
    let client = Client::connect_on(transport, servers, options).unwrap();
    let tables = open(&client, plan);
    let mut worker = client.worker().unwrap();
    for (number, any) in tables.iter().enumerate() {
        on!(any, table => {
            let mut copy = vec![Default::default(); table.width()];
            for row in 0..table.rows() {
                worker.get(table, row, &mut copy).unwrap();
                for (lane, of) in plan.lanes.iter().enumerate() {
                    let found: Vec<i64> = plan.columns(number, lane).map(|c| Number::count(copy[c])).collect();
                    let total = of.total[number][row as usize];
                    let what = || format!("seed {}: at the end, table {number}, row {row}, lane {lane}: {found:?}", plan.seed);
                    if plan.dead[of.client].load(Ordering::SeqCst) {
                        let whole = plan.in_parts(number)
                            || matches!(plan.tables[number].model, Model::Vap { .. })
                            || found.iter().all(|f| *f == found[0]) && of.sums_to(number, row, found[0]);
                        assert!(whole, "PART: {}: no sum at the end of a clock", what());
                        assert!(found.iter().all(|f| *f <= total), "TOO MUCH: {}: of {total}", what());
                    } else {
                        assert!(found.iter().all(|f| *f >= total), "LOST: {}: not {total}", what());
                        assert!(found.iter().all(|f| *f <= total), "TWICE: {}: not {total}", what());
                    }
                }
            }
        });
    }
    drop(worker);
    client.close().unwrap();
}

fn start<T: Transport>(transport: &T, address: &Address, plan: &Plan, number: usize) -> Server<T> {
    let mut config = config(address, plan.shards);
    config.credits = plan.credits;
    config.id = number as u64;
    config.staging = 2 << 20;
    Server::start(transport, &config).unwrap()
}

/// What the nodes of a simulation tell each other past the network.
struct Stage {
    sim: Sim,
    plan: Arc<Plan>,
    addresses: Vec<Address>,
    /// Servers that listen.
    up: AtomicUsize,
    /// Honest clients and rogues that are not done.
    left: AtomicUsize,
    /// Per client: it is part of the job; nothing more is to be expected of it.
    joined: Vec<AtomicBool>,
    gone: Vec<AtomicBool>,
    done: AtomicBool,
}

impl Stage {
    fn sleep_until(&self, node: &Node, mut done: impl FnMut() -> bool) {
        while !done() {
            self.sim.sleep(node, Duration::from_micros(500));
        }
    }

    fn await_servers(&self, node: &Node) {
        self.sleep_until(node, || self.up.load(Ordering::SeqCst) == self.plan.servers);
    }

    /// A client is done, in whatever way; once.
    fn went(&self, number: usize) {
        if !self.gone[number].swap(true, Ordering::SeqCst) {
            self.left.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn server(&self, node: &Node, number: usize) {
        let server = start(node, &self.addresses[number], &self.plan, number);
        self.up.fetch_add(1, Ordering::SeqCst);
        if number == 0 {
            self.sleep_until(node, || self.left.load(Ordering::SeqCst) == 0);
            if self.plan.victim.is_some() || self.plan.rogue.is_some() {
                // Until it has been noticed everywhere who is gone: the job is over then.
                self.sim.sleep(node, Duration::from_millis(2500));
            }
            sums(node, &self.addresses, &self.plan);
            self.done.store(true, Ordering::SeqCst);
        }
        self.sleep_until(node, || self.done.load(Ordering::SeqCst));
        assert!(server.stop(), "a server thread failed");
    }

    fn kill(&self, node: &Node, victim: &Node, Victim { client, after }: Victim) {
        self.sleep_until(node, || self.joined[client].load(Ordering::SeqCst));
        self.sim.sleep(node, after);
        if self.gone[client].load(Ordering::SeqCst) {
            return;
        }
        self.plan.dead[client].store(true, Ordering::SeqCst);
        self.plan.journal.note(node.now(), client, 0, What::Event(format!("client {client} is killed")));
        self.sim.kill(victim);
        self.went(client);
    }
}

/// Runs a seed in the simulator, in jobs of at most `clocks` clocks.
///
/// # Errors
/// What went wrong.
pub fn simulated(seed: u64, clocks: u64) -> Result<Outcome, Failure> {
    let plan = Plan::new(seed, clocks, true);
    let sim = Sim::with(seed, Settings { limit: LIMIT, network: plan.network(), ..Settings::default() });
    let parties = plan.clients + usize::from(plan.rogue.is_some());
    let flags = || (0..parties).map(|_| AtomicBool::new(false)).collect();
    let stage = Arc::new(Stage {
        sim: sim.clone(),
        plan: plan.clone(),
        addresses: (0..plan.servers).map(|n| Address::Sim(format!("server-{n}"))).collect(),
        up: AtomicUsize::new(0),
        left: AtomicUsize::new(parties),
        joined: flags(),
        gone: flags(),
        done: AtomicBool::new(false),
    });
    let tally = Arc::new(Mutex::new(Tally {
        deaths: plan.victim.is_some().into(),
        rogues: plan.rogue.is_some().into(),
        late: plan.late.is_some().into(),
        ..Tally::default()
    }));
    for number in 0..plan.servers {
        let (node, stage) = (sim.node(&format!("server-{number}")), stage.clone());
        sim.spawn(&node.clone(), "main", move || stage.plan.journal.heed(|| stage.server(&node, number)));
    }
    for number in 0..plan.clients {
        let node = sim.node(&format!("client-{number}"));
        if let Some(victim) = plan.victim.filter(|victim| victim.client == number) {
            let (killer, node, stage) = (sim.node("killer"), node.clone(), stage.clone());
            sim.spawn(&killer.clone(), "main", move || stage.kill(&killer, &node, victim));
        }
        let (stage, tally) = (stage.clone(), tally.clone());
        sim.spawn(&node.clone(), "main", move || {
            stage.await_servers(&node);
            if let Some(late) = &stage.plan.late {
                stage.sim.sleep(&node, late[number]);
            }
            let joined = || stage.joined[number].store(true, Ordering::SeqCst);
            let client = || client(&node, &stage.addresses, &stage.plan, number, &tally, joined);
            stage.plan.journal.heed(client);
            stage.went(number);
        });
    }
    if let Some(farewell) = plan.rogue {
        let (node, stage) = (sim.node("rogue"), stage.clone());
        sim.spawn(&node.clone(), "main", move || {
            stage.await_servers(&node);
            let rogue = || rogue::run(&node, &stage.addresses, &stage.plan, farewell);
            stage.plan.journal.heed(rogue);
            stage.went(stage.plan.clients);
        });
    }
    let result = sim.try_run();
    result.map_err(|report| {
        let first = plan.journal.complaint();
        let first = first.unwrap_or_else(|| report.lines().next().unwrap_or_default().to_owned());
        Failure { first, report: format!("{report}{}", plan.journal) }
    })?;
    let tally = tally.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Ok(Outcome { hash: sim.hash(), events: sim.events(), tally })
}

/// Runs a seed over shared memory, with the threads of this machine.
pub fn over_shared_memory(seed: u64, clocks: u64) {
    let plan = Plan::new(seed, clocks, false);
    let folder = Folder::new("workload");
    let addresses: Vec<_> = (0..plan.servers).map(|n| folder.address(&format!("{n}.sock"))).collect();
    let host = Host::for_addresses(&addresses).unwrap();
    let servers: Vec<_> =
        addresses.iter().enumerate().map(|(n, address)| start(&host, address, &plan, n)).collect();
    let tally = Arc::new(Mutex::new(Tally::default()));
    std::thread::scope(|scope| {
        for number in 0..plan.clients {
            let (host, addresses, plan, tally) = (&host, &addresses, &plan, &tally);
            scope.spawn(move || {
                if let Some(late) = &plan.late {
                    std::thread::sleep(late[number]);
                }
                client(host, addresses, plan, number, tally, || ());
            });
        }
        if let Some(farewell) = plan.rogue {
            let (host, addresses, plan) = (&host, &addresses, &plan);
            scope.spawn(move || rogue::run(host, addresses, plan, farewell));
        }
    });
    if plan.rogue.is_some() {
        // Until its end has been noticed: the job is over then.
        std::thread::sleep(Duration::from_millis(100));
    }
    sums(&host, &addresses, &plan);
    for server in servers {
        assert!(server.stop());
    }
}
