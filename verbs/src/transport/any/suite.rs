//! The conformance suite over sessions: by the best way, which is shared memory here, and by TCP.

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicU32, Ordering},
};

use super::Host;
use crate::{
    address::Address,
    session::{Key, KeyRing, Way},
    transport::conformance::{Rig, Role, Side, VictimProcess},
};

/// A way to go, and the `victim` test of its instance of the suite.
trait Subject: Send + Sync + 'static {
    const VICTIM: &'static str;
    const VIA: Option<Way>;
}

/// Two hosts with a key, and an address of this machine that no other rig has.
struct LocalRig<S> {
    number: u32,
    client: Host,
    server: Host,
    subject: PhantomData<S>,
}

fn host(via: Option<Way>) -> Host {
    let address = Address::Session { host: "127.0.0.1".to_owned(), port: 0, via };
    // The same for a victim in a process of its own.
    let key: Key = format!("suite {}", "5a".repeat(32)).parse().unwrap();
    Host::with_keys(&[address], [key].into_iter().collect::<KeyRing>()).unwrap()
}

impl<S: Subject> Rig for LocalRig<S> {
    type Transport = Host;
    type Victim = VictimProcess;

    fn new(_: &'static str, _: u64) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { number, client: host(S::VIA), server: host(S::VIA), subject: PhantomData }
    }

    fn host(&self, side: Side) -> Host {
        match side {
            Side::Client => self.client.clone(),
            Side::Server => self.server.clone(),
        }
    }

    fn address(&self, number: u32) -> Address {
        // All of 127.0.0.0/8 is this machine. The port is below those that the system picks from.
        let process = std::process::id();
        let host = format!("127.{}.{}.{}", 1 + process % 250, process / 250 % 250, 1 + self.number % 250);
        Address::Session { host, port: 17_471 + number as u16, via: S::VIA }
    }

    fn views(&self) -> bool {
        S::VIA != Some(Way::Tcp)
    }

    fn start(&self, role: Role, address: &Address) -> VictimProcess {
        VictimProcess::start(S::VICTIM, role, address)
    }

    fn kill(&self, victim: VictimProcess) {
        victim.kill();
    }
}

mod best {
    use super::*;

    struct Best;
    impl Subject for Best {
        const VICTIM: &'static str = "transport::any::suite::best::victim";
        const VIA: Option<Way> = None;
    }

    crate::conformance!(LocalRig<Best>);
}

mod via_tcp {
    use super::*;

    struct ViaTcp;
    impl Subject for ViaTcp {
        const VICTIM: &'static str = "transport::any::suite::via_tcp::victim";
        const VIA: Option<Way> = Some(Way::Tcp);
    }

    crate::conformance!(LocalRig<ViaTcp>);
}
