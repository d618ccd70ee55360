//! The conformance suite over several seeds, and what the simulation adds to the contract.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use super::*;
use crate::{
    address::Address,
    transport::conformance::{self, Rig, Role, Side},
};

/// Seeds that each case of the suite runs with.
const SEEDS: u64 = 6;

struct SimRig {
    sim: Sim,
    nodes: [Node; 2],
    victims: AtomicU32,
}

impl Rig for SimRig {
    type Transport = Node;
    type Victim = Node;

    fn repeats() -> u64 {
        SEEDS
    }

    fn new(_case: &'static str, repeat: u64) -> Self {
        let sim = Sim::new(repeat);
        let nodes = [sim.node("client"), sim.node("server")];
        Self { sim, nodes, victims: AtomicU32::new(0) }
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

    fn effort(&self) -> conformance::Effort {
        conformance::Effort { rounds: 60, in_flight: 10_000 }
    }

    fn start(&self, role: Role, address: &Address) -> Node {
        let number = self.victims.fetch_add(1, Ordering::Relaxed);
        let node = self.sim.node(&format!("victim {number}"));
        let (inside, address) = (node.clone(), address.clone());
        let body = move || conformance::victim(&inside, role, &address);
        node.spawn("main", None, body).expect("spawn");
        node
    }

    fn kill(&self, victim: Node) {
        self.sim.kill(&victim);
    }
}

crate::conformance!(SimRig);
