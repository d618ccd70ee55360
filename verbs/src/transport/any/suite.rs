//! The conformance suite over sessions: by the best way, which is shared memory here, and by TCP.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
};

use super::Host;
use crate::{
    address::Address,
    session::{
        Key, KeyRing, Way,
        noise::{Initiator, Piece, piece},
        wire::{LaneRails, Message, Process, Wanted},
    },
    transport::conformance::{ProcessRig, Side, Subject, loopback},
};

/// The same for a victim in a process of its own.
fn key() -> Key {
    format!("suite {}", "5a".repeat(32)).parse().unwrap()
}

fn host(via: Option<Way>) -> Host {
    let address = Address::Session { host: "127.0.0.1".to_owned(), port: 0, via };
    Host::with_keys(&[address], [key()].into_iter().collect::<KeyRing>()).unwrap()
}

fn address(rig: u32, number: u32, via: Option<Way>) -> Address {
    // The port is below those that the system picks from.
    Address::Session { host: loopback(rig), port: 17_471 + number as u16, via }
}

/// The next frame of a session, if there is one.
fn frame(socket: &mut TcpStream) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 2];
    socket.read_exact(&mut bytes).ok()?;
    let length = usize::from(u16::from_le_bytes([bytes[0], bytes[1]]));
    bytes.resize(2 + length, 0);
    socket.read_exact(&mut bytes[2..]).ok()?;
    matches!(piece(&bytes), Piece::Frame(found) if found == length).then(|| bytes.split_off(2))
}

/// See [`Subject::stalled`].
fn stalled(address: &Address, step: usize) -> Option<Box<dyn Send>> {
    /// Steps within the opening, and then those of a session that is made.
    const WITHIN: [usize; 4] = [0, 9, 60, 167];
    const MADE: usize = 4;
    let Address::Session { host, port, .. } = address else { panic!("{address} is of no session") };
    if step >= WITHIN.len() + MADE {
        return None;
    }
    let at = (host.parse::<Ipv4Addr>().expect("an address of this machine"), *port);
    let mut socket = TcpStream::connect(at).expect("connect");
    let (initiator, opening) = Initiator::start(Some(&key()));
    if let Some(&said) = WITHIN.get(step) {
        let _ = socket.write_all(&opening[..said]);
        return Some(Box::new(socket));
    }
    // All of the opening; a cipher, and nothing said in it; a hello; a lane that nobody takes.
    socket.write_all(&opening).expect("say the opening");
    let steps = step - WITHIN.len();
    if steps > 0 {
        let Ok(mut cipher) = initiator.finish(&frame(&mut socket).expect("an answer")) else {
            panic!("its answer is no Noise")
        };
        let process = Process { host: "elsewhere".to_owned(), pid: 1 };
        let wanted = Wanted { offer: Vec::new(), data: b"stranger".to_vec() };
        let rails = LaneRails::default();
        let lanes =
            Message::Lanes { first: 1, way: Way::Tcp, rails, regions: Vec::new(), lanes: vec![wanted] };
        let hello = Message::Hello { boot: [1; 16], process, rails: Vec::new() };
        for message in [hello, lanes].iter().take(steps - 1) {
            socket.write_all(&cipher.seal(&message.encode())).expect("say it");
            frame(&mut socket).expect("an answer");
        }
    }
    Some(Box::new(socket))
}

mod best {
    use super::*;

    struct Best;
    impl Subject for Best {
        type Transport = Host;
        const MODULE: &'static str = module_path!();
        const VIEWS: bool = true;
        // By shared memory, which has no network that could be gone.
        const LOOPBACK: bool = false;

        fn host(_: Side) -> Host {
            super::host(None)
        }

        fn address(rig: u32, number: u32) -> Address {
            super::address(rig, number, None)
        }

        fn stalled(address: &Address, step: usize) -> Option<Box<dyn Send>> {
            super::stalled(address, step)
        }
    }

    crate::conformance!(ProcessRig<Best>);
}

mod via_tcp {
    use super::*;

    struct ViaTcp;
    impl Subject for ViaTcp {
        type Transport = Host;
        const MODULE: &'static str = module_path!();
        const VIEWS: bool = false;
        const LOOPBACK: bool = true;

        fn host(_: Side) -> Host {
            super::host(Some(Way::Tcp))
        }

        fn address(rig: u32, number: u32) -> Address {
            super::address(rig, number, Some(Way::Tcp))
        }

        fn stalled(address: &Address, step: usize) -> Option<Box<dyn Send>> {
            super::stalled(address, step)
        }
    }

    crate::conformance!(ProcessRig<ViaTcp>);
}
