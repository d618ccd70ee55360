//! The conformance suite over RDMA, between the two soft-RoCE devices that `ci/soft-roce` makes: the client works on
//! rxe0 (10.7.0.1), the server on rxe1 (10.7.0.2), and packets really cross the pair. Once more as a [`Host`] that is
//! [`faulty`](fervor_verbs::transport::faulty): with nothing planned, and with completions that are late. And over sessions, whose two ends
//! work on rxe1: the device of the address that is connected to.
//!
//! Run by `ci/soft-roce-suite`. A plain `cargo test` leaves it out; where it runs and there is no device, it fails.

use std::sync::atomic::{AtomicU16, Ordering};

use fervor_verbs::{
    Address,
    session::{Key, KeyRing, Way},
    transport::{
        Transport,
        any::Host,
        conformance::{Effort, Rig, Role, Side, VictimProcess},
        faulty::suite::{FaultyRig, Late, Nothing},
        rdma::Rdma,
    },
};

/// The provider, or what holds it.
trait Subject: Transport {
    fn of(rdma: Rdma) -> Self;
}

impl Subject for Rdma {
    fn of(rdma: Rdma) -> Self {
        rdma
    }
}

impl Subject for Host {
    fn of(rdma: Rdma) -> Self {
        Host::from(rdma)
    }
}

struct RdmaRig<T> {
    client: T,
    server: T,
    port: u16,
}

impl<T: Subject> Rig for RdmaRig<T> {
    type Transport = T;
    type Victim = VictimProcess;

    fn new(_: &'static str, _: u64) -> Self {
        static PORT: AtomicU16 = AtomicU16::new(20_000);
        let on = |device| T::of(Rdma::on_device(device).unwrap_or_else(|error| panic!("{device}: {error}")));
        Self { client: on("rxe0"), server: on("rxe1"), port: PORT.fetch_add(8, Ordering::Relaxed) }
    }

    fn host(&self, side: Side) -> T {
        match side {
            Side::Client => self.client.clone(),
            Side::Server => self.server.clone(),
        }
    }

    fn address(&self, number: u32) -> Address {
        let port = self.port + u16::try_from(number).expect("few addresses");
        Address::Rdma { host: "10.7.0.2".to_owned(), port, from: None }
    }

    fn dial(&self, listening: &Address) -> Address {
        let Address::Rdma { host, port, .. } = listening else {
            panic!("{listening} is not of this provider")
        };
        Address::Rdma { host: host.clone(), port: *port, from: Some("10.7.0.1".to_owned()) }
    }

    fn views(&self) -> bool {
        false
    }

    fn effort(&self) -> Effort {
        Effort { rounds: 100, in_flight: 10_000 }
    }

    fn start(&self, role: Role, address: &Address) -> VictimProcess {
        VictimProcess::start("victim", role, address)
    }

    fn kill(&self, victim: VictimProcess) {
        victim.kill();
    }
}

fervor_verbs::conformance!(RdmaRig<Rdma>);

mod faulty {
    use super::*;

    fervor_verbs::conformance!(FaultyRig<RdmaRig<Host>, Nothing>);
}

mod late {
    use super::*;

    fervor_verbs::conformance!(FaultyRig<RdmaRig<Host>, Late>);
}

mod sessions {
    use super::*;

    /// Two hosts that go to each other by sessions, and insist on RDMA.
    struct SessionRig {
        client: Host,
        server: Host,
        port: u16,
    }

    fn address(port: u16) -> Address {
        Address::Session { host: "10.7.0.2".to_owned(), port, via: Some(Way::Rdma) }
    }

    impl Rig for SessionRig {
        type Transport = Host;
        type Victim = VictimProcess;

        fn new(_: &'static str, _: u64) -> Self {
            static PORT: AtomicU16 = AtomicU16::new(25_000);
            // The same for a victim in a process of its own.
            let key: Key = format!("suite {}", "5a".repeat(32)).parse().unwrap();
            let keys: KeyRing = [key].into_iter().collect();
            // One rail: an endpoint has places and buffers for each, and the suite counts them.
            let device = ["rxe1".parse().unwrap()];
            let host = || {
                let host = Host::with_devices(&[address(0)], keys.clone(), &device);
                host.unwrap_or_else(|error| panic!("{error}"))
            };
            Self { client: host(), server: host(), port: PORT.fetch_add(8, Ordering::Relaxed) }
        }

        fn host(&self, side: Side) -> Host {
            match side {
                Side::Client => self.client.clone(),
                Side::Server => self.server.clone(),
            }
        }

        fn address(&self, number: u32) -> Address {
            address(self.port + u16::try_from(number).expect("few addresses"))
        }

        fn views(&self) -> bool {
            false
        }

        fn effort(&self) -> Effort {
            Effort { rounds: 100, in_flight: 10_000 }
        }

        fn start(&self, role: Role, address: &Address) -> VictimProcess {
            VictimProcess::start("sessions::victim", role, address)
        }

        fn kill(&self, victim: VictimProcess) {
            victim.kill();
        }
    }

    fervor_verbs::conformance!(SessionRig);
}
