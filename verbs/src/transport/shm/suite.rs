//! The conformance suite over shared memory: of the provider itself, as a [`Host`](super::super::any::Host), and
//! with [`Faulty`](super::super::faulty::Faulty) hosts.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::{
    address::Address,
    transport::{
        Transport,
        any::Host,
        conformance::{Effort, Rig, Role, Side, VictimProcess},
        faulty::suite::{FaultyRig, Late, Nothing},
        shm::Shm,
    },
};

/// A transport over shared memory, and the `victim` test of its instance of the suite.
pub(in crate::transport) trait Subject: Transport {
    const VICTIM: &'static str;
    fn make() -> Self;
}

/// Two hosts: two transports that share nothing but the file system.
pub(in crate::transport) struct LocalRig<T> {
    client: T,
    server: T,
    number: u32,
}

impl<T: Subject> Rig for LocalRig<T> {
    type Transport = T;
    type Victim = VictimProcess;

    fn new(_: &'static str, _: u64) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        Self { client: T::make(), server: T::make(), number: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    fn host(&self, side: Side) -> T {
        match side {
            Side::Client => self.client.clone(),
            Side::Server => self.server.clone(),
        }
    }

    fn address(&self, number: u32) -> Address {
        let name = format!("fervor-suite-{}-{}-{number}", std::process::id(), self.number);
        Address::Shm(std::env::temp_dir().join(name))
    }

    fn views(&self) -> bool {
        true
    }

    fn effort(&self) -> Effort {
        // A round takes a microsecond here: many, so that the races have time to happen.
        Effort { rounds: 3000, ..Effort::default() }
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

    impl Subject for Shm {
        const VICTIM: &'static str = "transport::shm::suite::provider::victim";
        fn make() -> Self {
            Shm::new().unwrap()
        }
    }

    crate::conformance!(LocalRig<Shm>);
}

mod host {
    use super::*;

    impl Subject for Host {
        const VICTIM: &'static str = "transport::shm::suite::host::victim";
        fn make() -> Self {
            Host::for_addresses(&[Address::Shm("/any".into())]).unwrap()
        }
    }

    crate::conformance!(LocalRig<Host>);
}

mod faulty {
    use super::*;

    crate::conformance!(FaultyRig<LocalRig<Shm>, Nothing>);
}

mod late {
    use super::*;

    crate::conformance!(FaultyRig<LocalRig<Shm>, Late>);
}
