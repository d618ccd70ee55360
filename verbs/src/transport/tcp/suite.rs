//! The conformance suite over TCP: of the provider itself, and as a [`Host`].

use std::{io::Write, marker::PhantomData, net::TcpStream};

use super::{
    Tcp,
    wire::{Opening, OpeningKind},
};
use crate::{
    address::Address,
    transport::{
        Transport,
        any::Host,
        conformance::{Effort, ProcessRig, Side, Subject, loopback},
    },
};

/// A transport over TCP.
trait Over: Transport {
    const MODULE: &'static str;
    const CONNECTS: u32;
    const DEATHS: usize;
    fn make() -> Self;
}

/// Two of them, with an address of this machine that no other rig has.
struct Hosts<T>(PhantomData<T>);

impl<T: Over> Subject for Hosts<T> {
    type Transport = T;
    const MODULE: &'static str = T::MODULE;
    const VIEWS: bool = false;
    const LOOPBACK: bool = true;

    fn host(_: Side) -> T {
        T::make()
    }

    fn address(rig: u32, number: u32) -> Address {
        // Below the ports that the system picks from.
        Address::Tcp { host: loopback(rig), port: 7471 + number as u16 }
    }

    fn effort() -> Effort {
        Effort { connects: T::CONNECTS, deaths: T::DEATHS, ..Effort::default() }
    }

    fn stalled(address: &Address, step: usize) -> Option<Box<dyn Send>> {
        let Address::Tcp { host, port } = address else { panic!("{address} is not of this provider") };
        let kind = OpeningKind::Hello;
        let hello = Opening { kind, receive_size: 64, send_depth: 4, private_data: b"stranger".to_vec() };
        let hello = hello.encode();
        // In the magic number, in the head, in the private data, at its last byte; and after it, when all has been said.
        let said = *[0, 2, 20, 30, hello.len() - 1, hello.len()].get(step)?;
        let mut socket = TcpStream::connect((host.as_str(), *port)).expect("connect");
        // It may have been shown the door by now.
        let _ = socket.write_all(&hello[..said]);
        Some(Box::new(socket))
    }
}

mod provider {
    use super::*;

    impl Over for Tcp {
        const MODULE: &'static str = module_path!();
        const CONNECTS: u32 = 10_000;
        const DEATHS: usize = 1000;
        fn make() -> Self {
            Tcp::new()
        }
    }

    crate::conformance!(ProcessRig<Hosts<Tcp>>);
}

mod host {
    use super::*;

    impl Over for Host {
        const MODULE: &'static str = module_path!();
        const CONNECTS: u32 = 400;
        const DEATHS: usize = 64;
        fn make() -> Self {
            Host::for_addresses(&["tcp://any:1".parse().unwrap()]).unwrap()
        }
    }

    crate::conformance!(ProcessRig<Hosts<Host>>);
}
