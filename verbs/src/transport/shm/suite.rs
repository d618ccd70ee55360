//! The conformance suite over shared memory: of the provider itself, as a [`Host`](super::super::any::Host), and
//! with [`Faulty`](super::super::faulty::Faulty) hosts.

use std::{
    marker::PhantomData,
    os::fd::{AsFd, BorrowedFd},
};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};

use super::{bell, mapping::Mapping, wire};
use crate::{
    address::Address,
    transport::{
        Transport,
        any::Host,
        conformance::{Effort, ProcessRig, Side, Subject},
        faulty::suite::{FaultyRig, Late, Nothing},
        shm::Shm,
    },
};

/// The rig of the provider itself.
pub(in crate::transport) type ShmRig = ProcessRig<Hosts<Shm>>;

/// A transport over shared memory.
pub(in crate::transport) trait Over: Transport {
    const MODULE: &'static str;
    const CONNECTS: u32;
    const DEATHS: usize;
    fn make() -> Self;
}

/// Two of them, which share nothing but the file system.
pub(in crate::transport) struct Hosts<T>(PhantomData<T>);

impl<T: Over> Subject for Hosts<T> {
    type Transport = T;
    const MODULE: &'static str = T::MODULE;
    const VIEWS: bool = true;
    const LOOPBACK: bool = false;

    fn host(_: Side) -> T {
        T::make()
    }

    fn address(rig: u32, number: u32) -> Address {
        let name = format!("fervor-suite-{}-{rig}-{number}", std::process::id());
        Address::Shm(std::env::temp_dir().join(name))
    }

    fn effort() -> Effort {
        // A round takes a microsecond here: many, so that the races have time to happen.
        Effort { rounds: 3000, connects: T::CONNECTS, deaths: T::DEATHS, ..Effort::default() }
    }

    fn stalled(address: &Address, step: usize) -> Option<Box<dyn Send>> {
        stalled(address, step)
    }
}

/// See [`Subject::stalled`]. Whoever says all that a request needs is accepted, and takes no answer.
fn stalled(address: &Address, step: usize) -> Option<Box<dyn Send>> {
    let Address::Shm(path) = address else { panic!("{address} is not of this provider") };
    let (_, bell) = bell::Page::create().expect("a bell");
    let (_, region) = Mapping::create("stranger", 64).expect("memory");
    let hello = |regions: u32| wire::Opening {
        kind: wire::Kind::Hello,
        slot: 0,
        regions,
        region_bytes: 64 * u64::from(regions),
        receive_size: 64,
        receive_buffers: 1,
        send_depth: 1,
        data: b"stranger".to_vec(),
    };
    // The regions of more than a packet, of which the first has come.
    let mut records = Vec::new();
    (1..=64)
        .for_each(|key| wire::RegionRecord { key, writable: true, base: 0, length: 64 }.encode(&mut records));
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).expect("socket");
    connect(&socket, &SocketAddrUnix::new(path).expect("a path")).expect("connect");
    let say = |bytes: &[u8], fds: &[BorrowedFd<'_>]| {
        // It may have been shown the door by now.
        let _ = wire::send(&socket, bytes, fds, None);
    };
    match step {
        0 => {}
        1 => say(&hello(1).encode(), &[bell.as_fd()]),
        2 => {
            say(&hello(130).encode(), &[bell.as_fd()]);
            say(&records, &vec![region.as_fd(); 64]);
        }
        3 => say(&hello(0).encode(), &[bell.as_fd()]),
        _ => return None,
    }
    Some(Box::new((socket, bell)))
}

mod provider {
    use super::*;

    impl Over for Shm {
        const MODULE: &'static str = module_path!();
        const CONNECTS: u32 = 10_000;
        const DEATHS: usize = 1000;
        fn make() -> Self {
            Shm::new().unwrap()
        }
    }

    crate::conformance!(ShmRig);
}

mod host {
    use super::*;

    impl Over for Host {
        const MODULE: &'static str = module_path!();
        const CONNECTS: u32 = 400;
        const DEATHS: usize = 64;
        fn make() -> Self {
            Host::for_addresses(&[Address::Shm("/any".into())]).unwrap()
        }
    }

    crate::conformance!(ProcessRig<Hosts<Host>>);
}

mod faulty {
    use super::*;

    crate::conformance!(FaultyRig<ShmRig, Nothing>);
}

mod late {
    use super::*;

    crate::conformance!(FaultyRig<ShmRig, Late>);
}
