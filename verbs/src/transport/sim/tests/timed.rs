//! Simulations of time: the contract holds, a seed replays, and time passes as the model says.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use super::super::{Fabric, Machine, Node, Settings, Sim};
use super::SimRig;
use crate::{
    address::Address,
    transport::{
        Access, Connection, EndpointConfig, Payload, Region, Runtime,
        conformance::{
            self, Effort, Holdings, Posts, Rig, Role, Side,
            pair::{Pair, piece},
        },
    },
};

fn timed(seed: u64, fabric: Fabric) -> Sim {
    Sim::with(seed, Settings { fabric: Some(fabric), ..Settings::default() })
}

/// As [`SimRig`], on one of the fabrics.
struct TimedRig(SimRig);

impl Rig for TimedRig {
    type Transport = Node;
    type Victim = Node;

    fn repeats() -> u64 {
        6
    }

    fn new(_case: &'static str, repeat: u64) -> Self {
        let fabrics = [Fabric::ethernet_1g(), Fabric::roce_25g(), Fabric::infiniband_100g()];
        let sim = timed(repeat, fabrics[repeat as usize % 3].clone());
        Self(SimRig::over(sim, repeat >= 3))
    }

    fn run(&self, body: Box<dyn FnOnce() + Send>) {
        self.0.run(body);
    }

    fn host(&self, side: Side) -> Node {
        self.0.host(side)
    }

    fn address(&self, number: u32) -> Address {
        self.0.address(number)
    }

    fn views(&self) -> bool {
        self.0.views()
    }

    fn effort(&self) -> Effort {
        Effort { connects: 400, ..self.0.effort() }
    }

    fn start(&self, role: Role, address: &Address) -> Node {
        self.0.start(role, address)
    }

    fn kill(&self, victim: Node) {
        self.0.kill(victim);
    }

    fn stop(&self, victim: &Node) -> bool {
        self.0.stop(victim)
    }

    fn resume(&self, victim: &Node) {
        self.0.resume(victim);
    }

    fn stalled(&self, address: &Address, step: usize) -> Option<Box<dyn Send>> {
        self.0.stalled(address, step)
    }

    fn cut(&self) -> Option<Box<dyn Send>> {
        self.0.cut()
    }

    fn holdings(&self) -> Holdings {
        self.0.holdings()
    }
}

crate::conformance!(TimedRig);

/// The hash of a run of a case of the suite.
fn hash_of(case: &'static str, seed: u64) -> u64 {
    let rig = Arc::new(TimedRig::new(case, seed));
    let inside = Arc::clone(&rig);
    let mut cases = conformance::cases::<TimedRig>().into_iter();
    let case = cases.find(|c| c.name == case).expect("a case of the suite");
    rig.run(Box::new(move || case.run(&inside)));
    rig.0.sim.hash()
}

#[test]
fn equal_seeds_make_equal_histories_and_others_make_others() {
    for case in
        ["queues_many_operations_in_flight", "handshake_many_clients_at_once", "order_words_are_read_whole"]
    {
        // Seeds of one fabric.
        let mut hashes: Vec<u64> = (0..4).map(|seed| hash_of(case, 3 * seed + 1)).collect();
        let again: Vec<u64> = (0..4).map(|seed| hash_of(case, 3 * seed + 1)).collect();
        assert_eq!(hashes, again, "{case}: a seed made two histories");
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), 4, "{case}: two seeds made one history");
    }
}

/// How long it takes on a fabric without jitter until `count` requests of `bytes` have completed: READs, or else WRITEs.
fn takes(fabric: Fabric, read: bool, count: u64, bytes: usize) -> Duration {
    let sim = timed(1, Fabric { jitter: Duration::ZERO, ..fabric });
    let rig = Arc::new(TimedRig(SimRig::over(sim, false)));
    let took = Arc::new(Mutex::new(Duration::ZERO));
    let (inside, result) = (Arc::clone(&rig), Arc::clone(&took));
    rig.run(Box::new(move || {
        let mut pair = Pair::alike(&*inside, &EndpointConfig::default());
        let own = pair.region(Side::Client, bytes, Access::Local);
        let theirs = pair.region(Side::Server, bytes, Access::RemoteWrite);
        pair.connect();
        let transport = pair.client.transport.clone();
        let start = transport.now();
        let connection = pair.end(Side::Client);
        for id in 1..=count {
            let (remote, signal) = (theirs.remote().at(0), (id == count).then_some(id));
            match read {
                true => connection.read(&[piece(&own, 0, bytes)], remote, signal).expect("post"),
                false => connection
                    .write(Payload::Gather(&[piece(&own, 0, bytes)]), remote, None, signal)
                    .expect("post"),
            }
        }
        connection.ring().expect("ring");
        pair.work(Side::Client, count);
        *result.lock().expect("result") = transport.now() - start;
    }));
    *took.lock().expect("result")
}

#[test]
fn time_passes_as_the_fabric_says() {
    let near = |found: Duration, expected: f64| {
        let found = found.as_secs_f64() * 1e6;
        assert!((expected..expected * 1.1 + 2.0).contains(&found), "{found} µs, not about {expected}");
    };
    // There and back, and 80,000 bytes with 90 of headers on 1 Gb/s.
    near(takes(Fabric::ethernet_1g(), true, 1, 80_000), 60.0 + 640.7);
    near(takes(Fabric::ethernet_1g(), false, 1, 80_000), 60.0 + 640.7);
    near(takes(Fabric::ethernet_1g(), false, 50, 80_000), 60.0 + 50.0 * 640.7);
    near(takes(Fabric::roce_25g(), true, 1, 8), 2.6);
    near(takes(Fabric::infiniband_100g(), false, 10, 1_000_000), 1.6 + 10.0 * 80.0);
}

#[test]
fn threads_compute_for_as_long_as_their_machine_needs() {
    let sim = timed(3, Fabric::roce_25g());
    let nodes = [sim.node("ordinary"), sim.node("slow")];
    sim.machine(&nodes[1], Machine { slowness: 3.0, ..Machine::default() });
    let took = Arc::new(Mutex::new([Duration::ZERO; 2]));
    for (number, node) in nodes.into_iter().enumerate() {
        let took = Arc::clone(&took);
        sim.spawn(&node.clone(), "main", move || {
            let start = node.now();
            (0..10).for_each(|_| node.compute(Duration::from_millis(20)));
            took.lock().expect("times")[number] = node.now() - start;
        });
    }
    sim.run();
    let took = took.lock().expect("times").map(|time| time.as_millis());
    assert_eq!(took, [200, 600]);
    assert!(sim.events() < 40, "{} events for 20 stretches of computing", sim.events());
}

#[test]
fn who_waits_sleeps_until_it_comes() {
    let sim = timed(3, Fabric::roce_25g());
    let rig = Arc::new(TimedRig(SimRig::over(sim, false)));
    let inside = Arc::clone(&rig);
    let turns = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&turns);
    rig.run(Box::new(move || {
        let mut pair = Pair::alike(&*inside, &EndpointConfig::default());
        pair.connect();
        let (client, server) = (pair.client.transport.clone(), pair.server.transport.clone());
        // The server sends after a second; the client relaxes until it is there.
        server.compute(Duration::from_secs(1));
        let connection = pair.end(Side::Server);
        connection.send(Payload::Inline(b"there"), None, Some(1)).expect("post");
        connection.ring().expect("ring");
        let before = client.now();
        let mut turn = 0;
        while pair.client.poll() == 0 {
            client.relax(turn);
            turn += 1;
        }
        assert!(client.now() - before < Duration::from_micros(4), "{:?}", client.now() - before);
        counted.store(turn, Ordering::Relaxed);
    }));
    assert!(turns.load(Ordering::Relaxed) <= 3, "{} turns", turns.load(Ordering::Relaxed));
}
