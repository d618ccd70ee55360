//! The rig of providers of real processes: both hosts are in this process, and a victim is this test program, run again.

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicU32, Ordering},
};

use super::{
    Apart, Effort, Holdings, Rig, Role, Side, VictimProcess,
    apart::{self, test_name},
};
use crate::{address::Address, transport::Transport};

/// What a provider says of itself, for a [`ProcessRig`].
pub trait Subject: Send + Sync + 'static {
    /// It, or what holds it.
    type Transport: Transport;
    /// `module_path!()` of where `conformance!` makes its tests, and the `victim` among them.
    const MODULE: &'static str;
    /// As [`Rig::views`].
    const VIEWS: bool;
    /// Whether its network is the loopback interface, which [`Rig::cut`] can take down where nobody else needs it.
    const LOOPBACK: bool;

    /// The transport of a host. The two share nothing but what two processes share.
    fn host(side: Side) -> Self::Transport;

    /// An address of the server's host: the same for the same numbers, and another one for others.
    fn address(rig: u32, number: u32) -> Address;

    /// As [`Rig::dial`].
    fn dial(listening: &Address) -> Address {
        listening.clone()
    }

    /// As [`Rig::effort`].
    fn effort() -> Effort {
        Effort::default()
    }

    /// As [`Rig::stalled`].
    fn stalled(address: &Address, step: usize) -> Option<Box<dyn Send>>;

    /// As [`Rig::cut`], where the network is not the loopback interface.
    fn cut() -> Option<Box<dyn Send>> {
        None
    }

    /// As [`Rig::holdings`].
    fn holdings() -> Holdings {
        Holdings::of_this_process()
    }
}

/// See the module.
#[derive(Debug)]
pub struct ProcessRig<S: Subject> {
    client: S::Transport,
    server: S::Transport,
    number: u32,
    subject: PhantomData<S>,
}

impl<S: Subject> Rig for ProcessRig<S> {
    type Transport = S::Transport;
    type Victim = VictimProcess;

    fn new(_: &'static str, _: u64) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self {
            client: S::host(Side::Client),
            server: S::host(Side::Server),
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            subject: PhantomData,
        }
    }

    fn host(&self, side: Side) -> S::Transport {
        match side {
            Side::Client => self.client.clone(),
            Side::Server => self.server.clone(),
        }
    }

    fn address(&self, number: u32) -> Address {
        S::address(self.number, number)
    }

    fn dial(&self, listening: &Address) -> Address {
        S::dial(listening)
    }

    fn views(&self) -> bool {
        S::VIEWS
    }

    fn effort(&self) -> Effort {
        S::effort()
    }

    fn start(&self, role: Role, address: &Address) -> VictimProcess {
        VictimProcess::start(&test_name(S::MODULE, "victim"), role, address)
    }

    fn kill(&self, victim: VictimProcess) {
        victim.kill();
    }

    fn stop(&self, victim: &VictimProcess) -> bool {
        victim.stop();
        true
    }

    fn resume(&self, victim: &VictimProcess) {
        victim.resume();
    }

    fn stalled(&self, address: &Address, step: usize) -> Option<Box<dyn Send>> {
        S::stalled(address, step)
    }

    fn cut(&self) -> Option<Box<dyn Send>> {
        if S::LOOPBACK { Some(Box::new(LoopbackDown::new())) } else { S::cut() }
    }

    fn holdings(&self) -> Holdings {
        S::holdings()
    }

    fn apart(case: &str) -> Apart {
        match case {
            "holdings_many_connections_leave_nothing" => Apart::Process,
            "faults_a_network_that_is_gone_for_a_second" if S::LOOPBACK => Apart::Network,
            _ => Apart::Not,
        }
    }
}

/// An address of this machine that no other rig has: all of 127.0.0.0/8 is this machine.
pub fn loopback(rig: u32) -> String {
    let process = std::process::id();
    format!("127.{}.{}.{}", 1 + process % 250, process / 250 % 250, 1 + rig % 250)
}

/// The loopback interface of a process that runs [`Apart::Network`] is down while this lives.
struct LoopbackDown;

impl LoopbackDown {
    fn new() -> Self {
        assert!(apart::alone(), "other programs need the loopback interface of this network");
        set_loopback("down");
        Self
    }
}

impl Drop for LoopbackDown {
    fn drop(&mut self) {
        set_loopback("up");
    }
}

fn set_loopback(state: &str) {
    let status =
        std::process::Command::new("ip").args(["link", "set", "lo", state]).status().expect("run ip");
    assert!(status.success(), "ip link set lo {state}: {status}");
}
