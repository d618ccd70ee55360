//! The conformance suite over many seeds, and what the simulation adds to the contract.

use crate::transport::{Runtime, Transport};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::*;
use crate::{
    address::Address,
    transport::{
        Thread as _,
        conformance::{self, Holdings, Rig, Role, Side},
        faulty::suite::{FaultyRig, Late, Nothing},
    },
};

mod timed;
mod views;
mod weakness;

/// Seeds that each case of the suite runs with, if `FERVOR_SEEDS` does not say how many.
const SEEDS: u64 = 10;

pub(in crate::transport) struct SimRig {
    pub(in crate::transport) sim: Sim,
    nodes: [Node; 2],
    victims: AtomicU32,
    /// Whether all nodes are on one host.
    together: bool,
}

impl SimRig {
    /// On one host, or each on one of its own.
    fn over(sim: Sim, together: bool) -> Self {
        let client = sim.node("client");
        let server = if together { sim.node_on(&client, "server") } else { sim.node("server") };
        Self { sim, nodes: [client, server], victims: AtomicU32::new(0), together }
    }
}

impl Rig for SimRig {
    type Transport = Node;
    type Victim = Node;

    fn repeats() -> u64 {
        std::env::var("FERVOR_SEEDS").map_or(SEEDS, |seeds| seeds.parse().expect("FERVOR_SEEDS is a number"))
    }

    fn new(_case: &'static str, repeat: u64) -> Self {
        Self::over(Sim::new(repeat), repeat % 2 == 1)
    }

    fn run(&self, body: Box<dyn FnOnce() + Send>) {
        self.sim.spawn(&self.nodes[0], "case", body);
        self.sim.run();
    }

    fn host(&self, side: Side) -> Node {
        self.nodes[side as usize].clone()
    }

    fn address(&self, number: u32) -> Address {
        Address::Sim(format!("server-{number}"))
    }

    fn views(&self) -> bool {
        self.together
    }

    fn effort(&self) -> conformance::Effort {
        // With each seed: together they are ten thousand connects.
        conformance::Effort { rounds: 60, connects: 1000, deaths: 16, message: 1024, ..Default::default() }
    }

    fn start(&self, role: Role, address: &Address) -> Node {
        let number = self.victims.fetch_add(1, Ordering::Relaxed);
        let name = format!("victim {number}");
        let node = if self.together { self.sim.node_on(&self.nodes[0], &name) } else { self.sim.node(&name) };
        let (inside, address) = (node.clone(), address.clone());
        let message = self.effort().message;
        let body = move || conformance::victim(&inside, role, &address, message);
        node.spawn("main", None, body).expect("spawn");
        node
    }

    fn kill(&self, victim: Node) {
        self.sim.kill(&victim);
    }

    /// A node lives or is dead.
    fn stop(&self, _: &Node) -> bool {
        false
    }

    fn resume(&self, _: &Node) {
        unreachable!("none was stopped");
    }

    /// A request to connect is one event, and so is its answer.
    fn stalled(&self, _: &Address, _: usize) -> Option<Box<dyn Send>> {
        None
    }

    /// Connections break on their own, by [`faulty`](crate::transport::faulty) plans; the network as a whole does not.
    fn cut(&self) -> Option<Box<dyn Send>> {
        None
    }

    /// The simulation remembers all that has been: of a process it says only which connections there are.
    fn holdings(&self) -> Holdings {
        let [client, server] = self.nodes.each_ref().map(|node| self.sim.connections(node) as u64);
        Holdings { counts: vec![("connections", client), ("connections", server)], memory: 0 }
    }
}

crate::conformance!(SimRig);

mod faulty {
    use super::*;

    crate::conformance!(FaultyRig<SimRig, Nothing>);
}

mod late {
    use super::*;

    crate::conformance!(FaultyRig<SimRig, Late>);
}

/// The hash of a run that does a bit of everything.
fn hash_of(case: &'static str, seed: u64) -> u64 {
    let rig = Arc::new(SimRig::new(case, seed));
    let inside = Arc::clone(&rig);
    let case =
        conformance::cases::<SimRig>().into_iter().find(|c| c.name == case).expect("a case of the suite");
    rig.run(Box::new(move || case.run(&inside)));
    assert!(rig.sim.events() > 50, "only {} events", rig.sim.events());
    rig.sim.hash()
}

#[test]
fn equal_seeds_make_equal_histories_and_others_make_others() {
    for case in [
        "order_words_are_read_whole",
        "queues_many_operations_in_flight",
        "handshake_many_clients_at_once",
        "faults_dead_server_with_operations_outstanding",
        "faults_outstanding_operations_complete",
        "threads_signals_are_not_lost",
    ] {
        let mut hashes: Vec<u64> = (0..8).map(|seed| hash_of(case, seed)).collect();
        let again: Vec<u64> = (0..8).map(|seed| hash_of(case, seed)).collect();
        assert_eq!(hashes, again, "{case}: a seed made two histories");
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), 8, "{case}: two seeds made one history");
    }
}

/// The report of a run of one thread that fails.
fn report(settings: Settings, body: impl FnOnce(Node) + Send + 'static) -> String {
    let sim = Sim::with(42, settings);
    let node = sim.node("alone");
    sim.spawn(&node.clone(), "root", move || body(node));
    let report = sim.try_run().expect_err("the run fails");
    assert!(report.contains("seed 42"), "{report}");
    report
}

#[test]
fn a_deadlock_names_each_thread_and_what_it_waits_in() {
    let report = report(Settings::default(), |node| {
        let signal = node.signal();
        let waiter = node.spawn("waiter", None, move || signal.wait(signal.epoch(), Duration::MAX));
        waiter.expect("spawn").join();
    });
    assert!(report.contains("deadlock"), "{report}");
    assert!(report.contains("`alone/root` waits in Thread::join of thread 1"), "{report}");
    assert!(report.contains("`alone/waiter` waits in Signal::wait"), "{report}");
}

#[test]
fn a_run_that_does_not_end_is_ended() {
    let limit = Duration::from_millis(10);
    let report = report(Settings { limit, ..Settings::default() }, |node| {
        loop {
            node.relax(0);
        }
    });
    assert!(report.contains("not over after 0.01 s of virtual time"), "{report}");
}

#[test]
fn a_panic_is_reported_with_the_seed_and_the_last_events() {
    let report = report(Settings::default(), |node| {
        node.relax(0);
        panic!("the words of the panic");
    });
    assert!(report.contains("thread `alone/root` panicked: the words of the panic"), "{report}");
    assert!(report.contains("runs thread 0 node 0 turn 2"), "{report}");
}

#[test]
fn a_panic_that_nobody_joined_fails_the_run() {
    let report = report(Settings::default(), |node| {
        drop(node.spawn("unseen", None, || panic!("nobody looks")).expect("spawn"));
        (0..100).for_each(|_| node.relax(0));
    });
    assert!(report.contains("`alone/unseen` panicked, and nobody joined it"), "{report}");
}

#[test]
fn a_loop_without_a_scheduling_point_is_found() {
    let report = report(Settings::default(), |node| while node.now() < Duration::from_secs(1000) {});
    assert!(report.contains("without a scheduling point"), "{report}");
}

#[test]
fn a_killed_node_runs_no_more_and_frees_its_address() {
    for seed in 0..50 {
        let sim = Sim::new(seed);
        let (victim, killer) = (sim.node("victim"), sim.node("killer"));
        let turns = Arc::new(AtomicU64::new(0));
        /// Tells that the stack of its thread was unwound.
        struct Unwound(Arc<AtomicU64>);
        impl Drop for Unwound {
            fn drop(&mut self) {
                self.0.fetch_add(1 << 32, Ordering::Relaxed);
            }
        }
        for name in ["one", "two"] {
            let (inside, turns) = (victim.clone(), Arc::clone(&turns));
            let unwound = Unwound(Arc::clone(&turns));
            let body = move || {
                let _unwound = unwound;
                let _listener = inside.listen(&Address::Sim(name.to_owned())).expect("listen");
                loop {
                    turns.fetch_add(1, Ordering::Relaxed);
                    inside.relax(0);
                }
            };
            drop(victim.spawn(name, None, body).expect("spawn"));
        }
        let (inside, turns) = (sim.clone(), Arc::clone(&turns));
        sim.spawn(&killer.clone(), "root", move || {
            inside.sleep(&killer, Duration::from_millis(1));
            let before = turns.load(Ordering::Relaxed);
            assert!(before > 10, "the victim never ran");
            inside.kill(&victim);
            killer.listen(&Address::Sim("one".to_owned())).expect("the address of a dead node is free");
            inside.sleep(&killer, Duration::from_millis(1));
            let after = turns.load(Ordering::Relaxed);
            assert_eq!(after, before + (2 << 32), "a dead node's threads end, and do nothing more");
        });
        sim.run();
    }
}

#[test]
fn a_node_may_kill_itself() {
    let sim = Sim::new(1);
    let (victim, other) = (sim.node("victim"), sim.node("other"));
    let after = Arc::new(AtomicU32::new(0));
    let (inside, seen, node) = (sim.clone(), Arc::clone(&after), victim.clone());
    sim.spawn(&victim, "root", move || {
        inside.kill(&node);
        seen.store(1, Ordering::Relaxed);
    });
    sim.spawn(&other.clone(), "root", move || other.relax(0));
    sim.run();
    assert_eq!(after.load(Ordering::Relaxed), 0, "a thread went on after its node's death");
}
