//! The conformance suite over a faulty node: any provider's rig, with both hosts wrapped.

use std::{marker::PhantomData, time::Duration};

use super::{Fault, Faulty, Plan, Shown};
use crate::{
    address::Address,
    transport::conformance::{Apart, Effort, Holdings, Rig, Role, Side},
};

/// What goes wrong at the hosts of a rig: nothing that the suite does not take.
pub trait Planned: Send + Sync + 'static {
    /// The plan of a host.
    fn plan(side: Side, repeat: u64) -> Plan;
}

/// Nothing.
#[derive(Debug)]
pub struct Nothing;

impl Planned for Nothing {
    fn plan(_: Side, _: u64) -> Plan {
        Plan::default()
    }
}

/// Completions of all kinds are late, now and then.
#[derive(Debug)]
pub struct Late;

impl Planned for Late {
    fn plan(side: Side, repeat: u64) -> Plan {
        // Well below the two seconds within which a dead peer is found out, and what a case of silence lasts.
        let delay = |of| Fault::Delay { of, one_in: 8, longest: Duration::from_millis(2) };
        let faults = [Shown::Work, Shown::Arrival, Shown::End].map(delay).to_vec();
        Plan { seed: repeat << 1 | side as u64, faults }
    }
}

/// A rig of another provider, with both hosts faulty as `P` plans.
#[derive(Debug)]
pub struct FaultyRig<R: Rig, P> {
    inner: R,
    hosts: [Faulty<R::Transport>; 2],
    plan: PhantomData<P>,
}

impl<R: Rig, P> FaultyRig<R, P> {
    /// With these plans for the client's host and the server's.
    pub fn over(inner: R, plans: [Plan; 2]) -> Self {
        let [client, server] = plans;
        let host = |side, plan| Faulty::new(inner.host(side), plan);
        let hosts = [host(Side::Client, client), host(Side::Server, server)];
        Self { inner, hosts, plan: PhantomData }
    }

    /// The rig within.
    pub fn inner(&self) -> &R {
        &self.inner
    }
}

impl<R: Rig, P: Planned> Rig for FaultyRig<R, P> {
    type Transport = Faulty<R::Transport>;
    type Victim = R::Victim;

    fn repeats() -> u64 {
        R::repeats()
    }

    fn new(case: &'static str, repeat: u64) -> Self {
        Self::over(R::new(case, repeat), [Side::Client, Side::Server].map(|side| P::plan(side, repeat)))
    }

    fn run(&self, body: Box<dyn FnOnce() + Send>) {
        self.inner.run(body);
    }

    fn host(&self, side: Side) -> Self::Transport {
        self.hosts[side as usize].clone()
    }

    fn address(&self, number: u32) -> Address {
        self.inner.address(number)
    }

    fn dial(&self, listening: &Address) -> Address {
        self.inner.dial(listening)
    }

    fn views(&self) -> bool {
        self.inner.views()
    }

    fn effort(&self) -> Effort {
        // What travels is the same as without a plan: that is where thousands are looked for.
        let effort = self.inner.effort();
        Effort { connects: effort.connects.min(100), deaths: effort.deaths.min(32), ..effort }
    }

    /// A bare one: what travels is the same.
    fn start(&self, role: Role, address: &Address) -> R::Victim {
        self.inner.start(role, address)
    }

    fn kill(&self, victim: R::Victim) {
        self.inner.kill(victim);
    }

    fn stop(&self, victim: &R::Victim) -> bool {
        self.inner.stop(victim)
    }

    fn resume(&self, victim: &R::Victim) {
        self.inner.resume(victim);
    }

    fn stalled(&self, address: &Address, step: usize) -> Option<Box<dyn Send>> {
        self.inner.stalled(address, step)
    }

    fn cut(&self) -> Option<Box<dyn Send>> {
        self.inner.cut()
    }

    fn holdings(&self) -> Holdings {
        self.inner.holdings()
    }

    fn apart(case: &str) -> Apart {
        R::apart(case)
    }
}
