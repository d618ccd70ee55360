//! The conformance suite over TCP: of the provider itself, and as a [`Host`].

use std::{
    marker::PhantomData,
    sync::atomic::{AtomicU32, Ordering},
};

use super::Tcp;
use crate::{
    address::Address,
    transport::{
        Transport,
        any::Host,
        conformance::{Rig, Role, Side, VictimProcess},
    },
};

/// A transport over TCP, and the `victim` test of its instance of the suite.
trait Subject: Transport {
    const VICTIM: &'static str;
    fn make() -> Self;
}

/// Two hosts: two transports, and an address of this machine that no other rig has.
struct LocalRig<T> {
    number: u32,
    client: T,
    server: T,
    subject: PhantomData<T>,
}

impl<T: Subject> Rig for LocalRig<T> {
    type Transport = T;
    type Victim = VictimProcess;

    fn new(_: &'static str, _: u64) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { number, client: T::make(), server: T::make(), subject: PhantomData }
    }

    fn host(&self, side: Side) -> T {
        match side {
            Side::Client => self.client.clone(),
            Side::Server => self.server.clone(),
        }
    }

    fn address(&self, number: u32) -> Address {
        // All of 127.0.0.0/8 is this machine. Below the ports that the system picks from.
        let process = std::process::id();
        let host = format!("127.{}.{}.{}", 1 + process % 250, process / 250 % 250, 1 + self.number % 250);
        Address::Tcp { host, port: 7471 + number as u16 }
    }

    fn views(&self) -> bool {
        false
    }

    fn start(&self, role: Role, address: &Address) -> VictimProcess {
        VictimProcess::start(T::VICTIM, role, address)
    }

    fn kill(&self, victim: VictimProcess) {
        victim.kill();
    }
}

mod provider {
    use super::*;

    impl Subject for Tcp {
        const VICTIM: &'static str = "transport::tcp::suite::provider::victim";
        fn make() -> Self {
            Tcp::new()
        }
    }

    crate::conformance!(LocalRig<Tcp>);
}

mod host {
    use super::*;

    impl Subject for Host {
        const VICTIM: &'static str = "transport::tcp::suite::host::victim";
        fn make() -> Self {
            Host::for_addresses(&["tcp://any:1".parse().unwrap()]).unwrap()
        }
    }

    crate::conformance!(LocalRig<Host>);
}
