//! One seed from start to end: servers, clients, the rogue, the one who kills, trouble, and the sums at last.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fervor_client::{Client, ClientOptions, Error, Model, WorkerStats};
use fervor_server::Server;
use fervor_verbs::{
    Address,
    transport::{
        Runtime, Thread, Transport,
        any::Host,
        faulty::{Faulty, Report},
        sim::{Node, Settings, Sim},
    },
};

use super::{
    actor::{Actor, Number, open},
    journal::What,
    plan::{Plan, Victim, Watcher},
    rogue,
    trouble::Party,
    watcher,
};
use crate::{
    on,
    support::{Folder, config},
};

/// Virtual time after which a run has hung. A death takes up to two seconds of it.
const LIMIT: Duration = Duration::from_secs(8);
/// Time within which the death of a server is noticed, and told.
const NOTICED: Duration = Duration::from_millis(2300);

/// What a run came to.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Hash of everything that happened.
    pub hash: u64,
    pub events: u64,
    pub tally: Tally,
    /// What the servers did, and then the clients.
    pub reports: Vec<Report>,
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
    pub in_place: u64,
    pub hits: u64,
    pub reads: u64,
    pub torn: u64,
    pub asked: u64,
    pub deaths: u64,
    pub rogues: u64,
    pub late: u64,
    /// Jobs beside which a client only read, until they were over.
    pub watched: u64,
    /// Jobs in which a connection broke or a client died at one of its operations.
    pub harmed: u64,
    /// Completions that were held back.
    pub delayed: u64,
    /// How often a client went on after a connection had broken.
    pub resumed: u64,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gets, in_place, hits, reads, torn, asked, .. } = self;
        let Self { deaths, rogues, late, watched, harmed, delayed, resumed, .. } = self;
        writeln!(
            f,
            "{gets} gets checked: {in_place} in place, {hits} hits, {reads} READs, {torn} torn, {asked} rows asked for"
        )?;
        writeln!(
            f,
            "in {deaths} jobs a client was killed, in {rogues} one did wrong, in {late} they came late, in {watched} one only read"
        )?;
        write!(
            f,
            "in {harmed} a connection broke or a client died at a chosen call; {resumed} times one went on after that; {delayed} \
             completions were held back"
        )
    }
}

impl Tally {
    pub fn add(&mut self, other: &Self) {
        self.gets += other.gets;
        self.in_place += other.in_place;
        self.hits += other.hits;
        self.reads += other.reads;
        self.torn += other.torn;
        self.asked += other.asked;
        self.deaths += other.deaths;
        self.rogues += other.rogues;
        self.late += other.late;
        self.watched += other.watched;
        self.harmed += other.harmed;
        self.delayed += other.delayed;
        self.resumed += other.resumed;
    }

    fn count(&mut self, stats: &WorkerStats) {
        self.gets += stats.in_place + stats.hits + stats.misses;
        self.in_place += stats.in_place;
        self.hits += stats.hits;
        self.reads += stats.reads;
        self.torn += stats.torn;
        self.asked += stats.asked;
    }
}

/// A client of the job, from its beginning to its end. `joined` is told when it is part of the job.
///
/// # Errors
/// It has lost a server.
fn client<T: Transport>(
    transport: &T,
    servers: &[Address],
    plan: &Arc<Plan>,
    number: usize,
    tally: &Arc<Mutex<Tally>>,
    joined: impl FnOnce(),
) -> Result<(), Error> {
    let options = ClientOptions {
        clients: plan.expected(),
        cache_bytes: 8 << 20,
        reads_in_flight: plan.reads_in_flight,
        read_lanes: plan.read_lanes,
        copies: plan.places[number].copies,
        // So little that some slabs find no room.
        slab_bytes: 5 << 20,
        ..ClientOptions::default()
    };
    let client = Client::connect_on(transport, servers, options)?;
    plan.joined.fetch_add(1, Ordering::SeqCst);
    joined();
    let tables = open(&client, plan)?;
    let lanes = plan.lanes.iter().enumerate().filter(|(_, lane)| lane.client == number);
    let actors: Vec<_> = lanes
        .map(|(lane, _)| Ok(Actor::new(transport, plan, lane, client.worker()?, tables.clone())))
        .collect::<Result<_, Error>>()?;
    let lost = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = actors
        .into_iter()
        .map(|actor| {
            let (tally, lost) = (tally.clone(), lost.clone());
            let body = move || {
                let plan = actor.plan.clone();
                let (stats, result) = plan.journal.heed(|| actor.run());
                tally.lock().unwrap_or_else(PoisonError::into_inner).count(&stats);
                lost.fetch_or(result.is_err(), Ordering::SeqCst);
            };
            transport.spawn("worker", None, body).unwrap()
        })
        .collect();
    for thread in threads {
        assert!(thread.join(), "seed {}: a worker failed", plan.seed);
    }
    tally.lock().unwrap_or_else(PoisonError::into_inner).resumed += client.stats().resumptions;
    let closed = client.close();
    assert!(closed.is_err() || !lost.load(Ordering::SeqCst), "seed {}: closed without a server", plan.seed);
    closed?;
    plan.closed[number].store(true, Ordering::SeqCst);
    Ok(())
}

/// A new client finds the sums.
///
/// # Errors
/// It has lost a server.
fn sums<T: Transport>(transport: &T, servers: &[Address], plan: &Arc<Plan>) -> Result<(), Error> {
    let options = ClientOptions { cache_bytes: 8 << 20, slab_bytes: 1 << 20, ..ClientOptions::default() };
    let client = Client::connect_on(transport, servers, options)?;
    let tables = open(&client, plan)?;
    let mut worker = client.worker()?;
    for (number, any) in tables.iter().enumerate() {
        on!(any, table => {
            let mut copy = vec![Default::default(); table.width()];
            for row in 0..table.rows() {
                worker.get(table, row, &mut copy)?;
                for (lane, of) in plan.lanes.iter().enumerate() {
                    let found: Vec<i64> = plan.columns(number, lane).map(|c| Number::count(copy[c])).collect();
                    let total = of.total[number][row as usize];
                    let what = || format!("seed {}: at the end, table {number}, row {row}, lane {lane}: {found:?}", plan.seed);
                    if plan.dead[of.client].load(Ordering::SeqCst) {
                        let whole = plan.in_parts(number)
                            || matches!(plan.tables[number].model, Model::Vap { .. })
                            || plan.harmed(of.client) && found.iter().all(|f| *f == found[0])
                            || found.iter().all(|f| *f == found[0]) && of.sums_to(number, row, found[0]);
                        assert!(whole, "PART: {}: no sum at the end of a clock", what());
                        assert!(found.iter().all(|f| *f <= total), "TOO MUCH: {}: of {total}", what());
                        let seen = plan.seen(number, row, lane);
                        assert!(found.iter().all(|f| *f >= seen), "LOST: {}: somebody saw {seen}", what());
                    } else {
                        assert!(found.iter().all(|f| *f >= total), "LOST: {}: not {total}", what());
                        assert!(found.iter().all(|f| *f <= total), "TWICE: {}: not {total}", what());
                    }
                }
            }
        });
    }
    drop(worker);
    client.close()
}

fn start<T: Transport>(transport: &T, address: &Address, plan: &Plan, number: usize) -> Server<T> {
    let mut config = config(address, plan.shards);
    config.credits = plan.credits;
    if let Some(quota) = plan.quota {
        config.staging = quota * (config.clients + 1);
    }
    config.id = number as u64;
    config.origin = plan.origin;
    config.lease = plan.trouble.lease;
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
    /// There is one who only reads.
    watching: AtomicBool,
    /// When a server died, if one did.
    died: Mutex<Option<Duration>>,
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

    /// The client that only reads.
    fn watch(&self, node: &Node, watcher: Watcher, tally: &Mutex<Tally>) {
        self.await_servers(node);
        let over = || self.sleep_until(node, || self.left.load(Ordering::SeqCst) == 0);
        let result = watcher::run(node, &self.addresses, &self.plan, watcher, over);
        let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(stats) => {
                tally.watched += 1;
                tally.count(&stats);
            }
            Err(error) => {
                let (plan, text) = (&self.plan, error.to_string());
                assert!(plan.server_harmed(), "seed {}: who only reads: {text}", plan.seed);
            }
        }
        self.watching.store(false, Ordering::SeqCst);
    }

    /// A client is done, in whatever way; once.
    fn went(&self, number: usize) {
        if !self.gone[number].swap(true, Ordering::SeqCst) {
            self.left.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn server(&self, node: &Faulty<Node>, number: usize) {
        let server = start(node, &self.addresses[number], &self.plan, number);
        let inner = node.inner();
        self.up.fetch_add(1, Ordering::SeqCst);
        if number == 0 {
            self.sleep_until(inner, || {
                self.left.load(Ordering::SeqCst) == 0 && !self.watching.load(Ordering::SeqCst)
            });
            if self.plan.victim.is_some() || self.plan.rogue.is_some() || self.plan.trouble.harms() {
                // Until it has been noticed everywhere who is gone: the job is over then.
                self.sim.sleep(inner, Duration::from_millis(2500) + self.plan.trouble.lease);
            }
            let found = sums(inner, &self.addresses, &self.plan);
            // The fault may have been kept for it; there is but one.
            if let Err(error) = found {
                assert!(self.plan.server_harmed(), "seed {}: the sums: {error}", self.plan.seed);
                sums(inner, &self.addresses, &self.plan).unwrap();
            }
            self.done.store(true, Ordering::SeqCst);
        }
        self.sleep_until(inner, || self.done.load(Ordering::SeqCst));
        assert!(server.stop(), "a server thread failed");
    }

    /// A client of the job, and what has to be if it has lost a server.
    fn client(&self, node: &Faulty<Node>, number: usize, tally: &Arc<Mutex<Tally>>) {
        let inner = node.inner();
        self.await_servers(inner);
        if let Some(late) = &self.plan.late {
            self.sim.sleep(inner, late[number]);
        }
        let joined = || self.joined[number].store(true, Ordering::SeqCst);
        let result = client(node, &self.addresses, &self.plan, number, tally, joined);
        if let Err(error) = result {
            let (plan, text) = (&self.plan, error.to_string());
            let event = What::Event(format!("client {number}: {text}"));
            plan.journal.note(inner.now(), number, 0, event);
            assert!(
                plan.harmed(number),
                "seed {}: client {number}, to whom nothing happened: {text}",
                plan.seed
            );
            let named = self.addresses.iter().any(|address| text.contains(&address.to_string()));
            assert!(named, "seed {}: client {number}: which server? {text}", plan.seed);
            if let Some(died) = *self.died.lock().unwrap_or_else(PoisonError::into_inner) {
                let took = inner.now() - died;
                // One that is connecting waits for its own limit at most.
                let limit = if matches!(error, Error::ServerLost { .. }) { NOTICED } else { LIMIT };
                assert!(took < limit, "seed {}: client {number}: after {took:?}: {text}", plan.seed);
            }
            plan.dead[number].store(true, Ordering::SeqCst);
        }
        self.went(number);
    }

    /// A node that dies as its plan says.
    fn mortal(self: &Arc<Self>, node: Node, party: Party) -> Faulty<Node> {
        let (stage, victim) = (Arc::downgrade(self), node.clone());
        let kill = move || {
            let Some(stage) = stage.upgrade() else { return };
            stage.plan.journal.note(victim.now(), 0, 0, What::Event(format!("{party:?} dies")));
            match party {
                Party::Client(number) => {
                    stage.plan.dead[number].store(true, Ordering::SeqCst);
                    stage.went(number);
                }
                Party::Server(_) => {
                    *stage.died.lock().unwrap_or_else(PoisonError::into_inner) = Some(victim.now())
                }
            }
            let sim = stage.sim.clone();
            // The call below does not return.
            drop(stage);
            sim.kill(&victim);
        };
        Faulty::mortal(node, self.plan.trouble.of(party), kill)
    }

    fn kill(&self, node: &Node, victim: &Node, Victim { client, after }: Victim) {
        // It may have died before, by itself.
        let joined = || self.joined[client].load(Ordering::SeqCst) && self.plan.started();
        let here = || joined() || self.gone[client].load(Ordering::SeqCst);
        self.sleep_until(node, here);
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

/// Lets other threads come between where the server's code says so, now and then.
#[cfg(feature = "mutants")]
fn expose(sim: &Sim, node: &Node, seed: u64) {
    let rarely = [2, 8, 32, u64::MAX][(seed % 4) as usize];
    let host = node.clone();
    sim.prelude(node, move || {
        let (host, mut random) = (host.clone(), crate::support::Random(seed));
        fervor_protocol::mutants::on_pause(Box::new(move || {
            if random.one_in(rarely) {
                host.relax(0);
            }
        }));
    });
}

/// Only with the feature `mutants` does the server's code have places where others may come between.
#[cfg(not(feature = "mutants"))]
fn expose(_: &Sim, _: &Node, _: u64) {}

/// Runs a seed in the simulator, in jobs of at most `clocks` clocks.
///
/// # Errors
/// What went wrong.
pub fn simulated(seed: u64, clocks: u64) -> Result<Outcome, Failure> {
    simulate(Plan::new(seed, clocks, true))
}

/// Runs a job in the simulator.
///
/// # Errors
/// What went wrong.
pub fn simulate(plan: Arc<Plan>) -> Result<Outcome, Failure> {
    let sim = Sim::with(plan.seed, Settings { limit: LIMIT, network: plan.network(), ..Settings::default() });
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
        watching: AtomicBool::new(plan.watcher.is_some()),
        died: Mutex::new(None),
    });
    let tally = Arc::new(Mutex::new(Tally {
        deaths: plan.victim.is_some().into(),
        rogues: plan.rogue.is_some().into(),
        late: plan.late.is_some().into(),
        ..Tally::default()
    }));
    let mut nodes = Vec::new();
    let mut hosts: Vec<Node> = Vec::new();
    for number in 0..plan.servers {
        let name = format!("server-{number}");
        let host = match hosts.first().filter(|_| plan.together) {
            Some(first) => sim.node_on(first, &name),
            None => sim.node(&name),
        };
        hosts.push(host.clone());
        expose(&sim, &host, plan.seed ^ (number as u64) << 40);
        let node = stage.mortal(host, Party::Server(number));
        let (host, stage) = (node.inner().clone(), stage.clone());
        nodes.push((Party::Server(number), node.clone()));
        sim.spawn(&host, "main", move || stage.plan.journal.heed(|| stage.server(&node, number)));
    }
    for number in 0..plan.clients {
        let name = format!("client-{number}");
        let host = match plan.places[number].beside {
            Some(server) => sim.node_on(&hosts[server], &name),
            None => sim.node(&name),
        };
        if let Some(victim) = plan.victim.filter(|victim| victim.client == number) {
            let (killer, host, stage) = (sim.node("killer"), host.clone(), stage.clone());
            sim.spawn(&killer.clone(), "main", move || stage.kill(&killer, &host, victim));
        }
        let (node, stage, tally) =
            (stage.mortal(host.clone(), Party::Client(number)), stage.clone(), tally.clone());
        nodes.push((Party::Client(number), node.clone()));
        sim.spawn(&host, "main", move || {
            let plan = stage.plan.clone();
            plan.journal.heed(|| stage.client(&node, number, &tally));
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
    if let Some(watcher) = plan.watcher {
        let node = match watcher.place.beside {
            Some(server) => sim.node_on(&hosts[server], "watcher"),
            None => sim.node("watcher"),
        };
        let (stage, tally) = (stage.clone(), tally.clone());
        sim.spawn(&node.clone(), "main", move || {
            stage.plan.journal.heed(|| stage.watch(&node, watcher, &tally));
        });
    }
    let reports: Vec<_> = nodes.iter().map(|(_, node)| node.clone()).collect();
    let struck = move |party| nodes.iter().any(|(of, node)| *of == party && node.struck());
    assert!(plan.witness.set(Box::new(struck)).is_ok(), "a plan is for one run");
    let result = sim.try_run();
    result.map_err(|report| {
        let first = plan.journal.complaint();
        let first = first.unwrap_or_else(|| report.lines().next().unwrap_or_default().to_owned());
        Failure { first, report: format!("{report}{}", plan.journal) }
    })?;
    let reports: Vec<_> = reports.iter().map(Faulty::report).collect();
    let mut tally = tally.lock().unwrap_or_else(PoisonError::into_inner).clone();
    tally.harmed = reports.iter().any(|report| !report.fired.is_empty()).into();
    tally.delayed = reports.iter().map(|report| report.late).sum();
    Ok(Outcome { hash: sim.hash(), events: sim.events(), tally, reports })
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
                client(host, addresses, plan, number, tally, || ()).unwrap();
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
    sums(&host, &addresses, &plan).unwrap();
    for server in servers {
        assert!(server.stop());
    }
}
