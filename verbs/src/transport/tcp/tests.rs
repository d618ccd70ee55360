//! What the conformance suite cannot show: a peer that says what no provider says, or nothing, and bytes that come in pieces.
//!
//! [`Raw`] is such a peer: a socket that speaks frames.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use super::{
    Tcp, TcpConnection, TcpEndpoint, TcpRegion,
    wire::{FRAME, Frame, Kind, OPENING, Opening, OpeningKind},
};
use crate::{
    address::Address,
    memory::Memory,
    transport::{
        Access, Completion, Connection, Endpoint, EndpointConfig, Listener, Payload, ReceiveBuffer, Region,
        Request, Sge, Transport, WorkError, conformance::Posts,
    },
};

const PATIENCE: Duration = Duration::from_secs(10);
const CONFIG: EndpointConfig = EndpointConfig {
    receive_buffers: 2,
    receive_size: 64,
    send_depth: 4,
    read_depth: 4,
    connections: 4,
    completion_vector: 0,
    core: None,
};

fn listen(transport: &Tcp) -> (super::TcpListener, String) {
    let listener = transport.listen(&"tcp://127.0.0.1:0".parse().unwrap()).unwrap();
    let Address::Tcp { host, port } = listener.address() else { panic!("not a tcp address") };
    let place = format!("{host}:{port}");
    (listener, place)
}

fn hello() -> Opening {
    Opening { kind: OpeningKind::Hello, receive_size: 64, send_depth: 4, private_data: b"raw".to_vec() }
}

/// A side that keeps the contract, and a socket of which the test decides what it says.
struct Raw {
    socket: TcpStream,
    endpoint: TcpEndpoint,
    connection: TcpConnection,
    region: TcpRegion,
    seen: Vec<Completion>,
}

impl Raw {
    fn new(region_bytes: usize) -> Self {
        let transport = Tcp::new();
        let region =
            transport.register(&Memory::new("raw", region_bytes).unwrap(), Access::RemoteWrite).unwrap();
        let endpoint = transport.endpoint(&CONFIG).unwrap();
        let (mut listener, place) = listen(&transport);
        let mut socket = TcpStream::connect(place).unwrap();
        socket.write_all(&hello().encode()).unwrap();
        let request = listener.accept(PATIENCE).unwrap().unwrap();
        assert_eq!(request.private_data(), b"raw");
        let connection = request.accept(&endpoint.attach(), b"").unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = [0; OPENING];
        socket.read_exact(&mut answer).unwrap();
        assert_eq!(Opening::decode(&answer).unwrap().kind, OpeningKind::Accept);
        Self { socket, endpoint, connection, region, seen: Vec::new() }
    }

    fn say(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    fn request(&self, kind: Kind, at: u64, length: u64) -> Frame {
        Frame { kind, immediate: None, key: self.region.remote().key, length, address: at }
    }

    fn frame(&mut self) -> Frame {
        let mut head = [0; FRAME];
        self.socket.read_exact(&mut head).unwrap();
        Frame::decode(&head).unwrap()
    }

    /// The next frame that does not just say how many requests are executed: that is said now and then.
    fn hear(&mut self) -> Frame {
        loop {
            let frame = self.frame();
            if frame.kind != Kind::Executed {
                return frame;
            }
        }
    }

    /// Hears until so many requests are executed.
    fn executed(&mut self, count: u64) {
        loop {
            let frame = self.frame();
            assert_eq!((frame.kind, frame.length), (Kind::Executed, 0));
            assert!(frame.address <= count, "{} requests of {count} are executed", frame.address);
            if frame.address == count {
                return;
            }
        }
    }

    fn next(&mut self) -> Completion {
        let begun = Instant::now();
        while self.seen.is_empty() {
            self.endpoint.poll(&mut self.seen);
            assert!(begun.elapsed() < PATIENCE, "waited {PATIENCE:?} for a completion");
            std::thread::yield_now();
        }
        self.seen.remove(0)
    }

    /// Both receive buffers, each with an empty message.
    fn use_up_the_buffers(&mut self) -> [ReceiveBuffer; 2] {
        [(); 2].map(|()| {
            let bytes = self.request(Kind::Send, 0, 0).encode();
            self.say(&bytes);
            let Completion::Received { buffer, .. } = self.next() else { panic!("expected a message") };
            buffer
        })
    }

    fn nothing(&mut self) {
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(self.endpoint.poll(&mut self.seen), 0, "{:?}", self.seen);
    }

    fn ends(&mut self, expected: WorkError) {
        match self.next() {
            Completion::Disconnected { cause, .. } => assert_eq!(cause, expected),
            other => panic!("expected the end, found {other:?}"),
        }
    }

    /// The peer's kernel says that the connection is over.
    fn is_told_the_end(&mut self) {
        let mut rest = Vec::new();
        match self.socket.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }
}

#[test]
fn bytes_that_come_one_by_one_are_the_same_frames() {
    let mut raw = Raw::new(64);
    let mut bytes = raw.request(Kind::Write, 3, 21).encode().to_vec();
    bytes.extend(1..=21);
    let message = Frame { immediate: Some(7), ..raw.request(Kind::Send, 0, 5) };
    bytes.extend(message.encode());
    bytes.extend(b"hello");
    raw.socket.set_nodelay(true).unwrap();
    for byte in bytes {
        raw.say(&[byte]);
    }
    match raw.next() {
        Completion::Received { buffer, immediate: Some(7), .. } => {
            assert_eq!(raw.endpoint.message(&buffer), b"hello");
            raw.endpoint.release(buffer);
        }
        other => panic!("expected the message, found {other:?}"),
    }
    let mut found = [0; 26];
    raw.region.memory().read(0, &mut found);
    assert_eq!(&found[..3], [0; 3]);
    assert!(found[3..24].iter().copied().eq(1..=21));
    raw.executed(2);
}

/// Requests without a receive buffer wait, in order; the answers between them do not.
#[test]
fn requests_wait_for_a_buffer_and_answers_do_not() {
    let mut raw = Raw::new(64);
    let message = |raw: &Raw, text: u8| [raw.request(Kind::Send, 0, 1).encode().as_slice(), &[text]].concat();
    // Two buffers; the third message waits, and a WRITE behind it.
    for text in 1..=3 {
        let bytes = message(&raw, text);
        raw.say(&bytes);
    }
    let immediate = Frame { immediate: Some(9), ..raw.request(Kind::Write, 0, 8) };
    raw.say(&[immediate.encode().as_slice(), &[0x55; 8]].concat());
    raw.executed(2);
    let mut held = Vec::new();
    for _ in 0..2 {
        let Completion::Received { buffer, .. } = raw.next() else { panic!("expected a message") };
        held.push(buffer);
    }
    // Meanwhile a READ of this side is answered, of which half comes later.
    let own = raw.region.clone();
    let theirs = own.remote();
    raw.connection.read(&[Sge { region: &own, offset: 32, length: 16 }], theirs.at(0), Some(5)).unwrap();
    raw.connection.ring().unwrap();
    assert_eq!(raw.hear().kind, Kind::Read);
    raw.say(&[Frame::answer(Kind::Reply, 0, 16).encode().as_slice(), &[1; 9]].concat());
    raw.nothing();
    // One buffer: the third message, but no credit for the immediate.
    raw.endpoint.release(held.remove(0));
    let Completion::Received { buffer, .. } = raw.next() else { panic!("expected the third message") };
    assert_eq!(raw.endpoint.message(&buffer), [3]);
    raw.nothing();
    assert_eq!(own.memory().load(0), 0, "the WRITE overtook the wait");
    raw.say(&[2; 7]);
    assert!(matches!(raw.next(), Completion::Work { id: 5, result: Ok(()), .. }));
    let mut found = [0; 16];
    own.memory().read(32, &mut found);
    assert_eq!(found, [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]);
    raw.endpoint.release(held.remove(0));
    assert!(matches!(raw.next(), Completion::WriteImmediate { immediate: 9, .. }));
    assert_eq!(own.memory().load(0), 0x5555_5555_5555_5555);
    raw.endpoint.release(buffer);
    raw.executed(4);
}

/// A request of which a part has come when it has to wait goes on where it was.
#[test]
fn a_request_that_waits_may_be_cut_anywhere() {
    for cut in 0..24 {
        let mut raw = Raw::new(64);
        let held = raw.use_up_the_buffers();
        let immediate = Frame { immediate: Some(1), ..raw.request(Kind::Write, 5, 24) };
        let payload: Vec<u8> = (1..=24).collect();
        raw.say(&immediate.encode());
        raw.say(&payload[..cut]);
        raw.nothing();
        held.into_iter().for_each(|buffer| raw.endpoint.release(buffer));
        std::thread::sleep(Duration::from_millis(2));
        raw.say(&payload[cut..]);
        assert!(matches!(raw.next(), Completion::WriteImmediate { .. }), "cut at {cut}");
        let mut found = [0; 24];
        raw.region.memory().read(5, &mut found);
        assert_eq!(found[..], payload, "cut at {cut}");
    }
}

/// What waits is kept up to a bound; what is more stays in the socket, and arrives.
#[test]
fn more_than_is_kept_waits_in_the_socket() {
    const LONG: usize = super::inbound::MAX_PARKED + (4 << 20);
    let mut raw = Raw::new(LONG);
    let held = raw.use_up_the_buffers();
    let data: Vec<u8> = (0..LONG).map(|i| (i * 3 + i / 509) as u8).collect();
    let immediate = Frame { immediate: Some(1), ..raw.request(Kind::Write, 0, LONG as u64) };
    let mut socket = raw.socket.try_clone().unwrap();
    let sender = std::thread::spawn({
        let data = data.clone();
        move || {
            socket.write_all(&immediate.encode()).unwrap();
            socket.write_all(&data).unwrap();
        }
    });
    std::thread::sleep(Duration::from_millis(200));
    raw.nothing();
    held.into_iter().for_each(|buffer| raw.endpoint.release(buffer));
    assert!(matches!(raw.next(), Completion::WriteImmediate { .. }));
    sender.join().unwrap();
    let mut found = vec![0; LONG];
    raw.region.memory().read(0, &mut found);
    assert!(found == data);
}

/// More than is staged at a time, both ways, with a peer that reads late.
#[test]
fn long_payloads_and_replies_arrive_whole() {
    const LONG: usize = 3 << 20;
    let mut raw = Raw::new(LONG + 13);
    let data: Vec<u8> = (0..LONG).map(|i| (i * 7 + i / 251) as u8).collect();
    raw.region.memory().write(13, &data);
    // The peer READs all of it twice, and this side WRITEs it once between two other requests.
    for _ in 0..2 {
        let bytes = raw.request(Kind::Read, 13, LONG as u64).encode();
        raw.say(&bytes);
    }
    std::thread::sleep(Duration::from_millis(50));
    let own = raw.region.clone();
    let remote = own.remote();
    raw.connection.send(Payload::Inline(b"before"), None, None).unwrap();
    let piece = [Sge { region: &own, offset: 13, length: LONG }];
    raw.connection.write(Payload::Gather(&piece), remote.at(13), None, None).unwrap();
    raw.connection.send(Payload::Inline(b"after"), None, Some(3)).unwrap();
    raw.connection.ring().unwrap();
    let mut heard = Vec::new();
    for _ in 0..5 {
        let frame = raw.hear();
        let mut payload = vec![0; frame.payload() as usize];
        raw.socket.read_exact(&mut payload).unwrap();
        if payload.len() == LONG {
            assert!(payload == data, "{frame:?}");
        } else {
            assert!(payload == b"before" || payload == b"after", "{frame:?}");
        }
        heard.push(frame.kind);
    }
    assert_eq!(heard, [Kind::Reply, Kind::Reply, Kind::Send, Kind::Write, Kind::Send]);
    raw.say(&Frame::answer(Kind::Executed, 3, 0).encode());
    assert!(matches!(raw.next(), Completion::Work { id: 3, result: Ok(()), .. }));
}

/// Whatever cannot be ends the connection, and that one alone.
#[test]
fn nonsense_ends_the_connection() {
    let answers = [
        Frame::answer(Kind::Executed, 1, 0),
        Frame::answer(Kind::Reply, 0, 8),
        Frame::answer(Kind::Reply, 3, 0),
    ];
    for frame in answers {
        let mut raw = Raw::new(64);
        raw.say(&frame.encode());
        raw.ends(WorkError::RemoteInvalid);
        raw.is_told_the_end();
    }
    let mut raw = Raw::new(64);
    raw.say(&[0xff; FRAME]);
    raw.ends(WorkError::RemoteInvalid);
    raw.is_told_the_end();
    // A reply of another length than was asked for, an answer that passes over a READ, and one to a READ that is none.
    let bad = [
        Frame::answer(Kind::Reply, 0, 7),
        Frame::answer(Kind::Executed, 1, 0),
        Frame::answer(Kind::Reply, 1, 8),
    ];
    for frame in bad {
        let mut raw = Raw::new(64);
        let own = raw.region.clone();
        raw.connection
            .read(&[Sge { region: &own, offset: 0, length: 8 }], own.remote().at(0), Some(1))
            .unwrap();
        raw.connection.ring().unwrap();
        assert_eq!(raw.hear().kind, Kind::Read);
        raw.say(&frame.encode());
        assert!(matches!(raw.next(), Completion::Work { id: 1, result: Err(WorkError::Flushed), .. }));
        raw.ends(WorkError::RemoteInvalid);
    }
}

/// A peer that asks for more than it may have out, and takes nothing, is not kept for.
#[test]
fn reads_beyond_the_send_queue_end_the_connection() {
    const LONG: usize = 16 << 20;
    let mut raw = Raw::new(LONG);
    // Of 16 MiB each: the kernel does not take one of them.
    let bytes = raw.request(Kind::Read, 0, LONG as u64).encode().repeat(4 + 2);
    raw.say(&bytes);
    raw.ends(WorkError::RemoteInvalid);
}

/// The receive buffer of a message of which the rest never comes is not lost.
#[test]
fn half_messages_cost_no_buffer() {
    let mut raw = Raw::new(64);
    let mut half = vec![raw.request(Kind::Send, 0, 10).encode().to_vec()];
    half.push(
        [Frame { immediate: Some(1), ..raw.request(Kind::Write, 0, 16) }.encode().as_slice(), &[1; 9]]
            .concat(),
    );
    let (mut listener, place) = listen(&Tcp::new());
    for half in half {
        let mut socket = TcpStream::connect(&place).unwrap();
        socket.write_all(&hello().encode()).unwrap();
        let request = listener.accept(PATIENCE).unwrap().unwrap();
        let _connection = request.accept(&raw.endpoint.attach(), b"").unwrap();
        // The region is of another transport, but the key is looked up in the endpoint's.
        socket.write_all(&half).unwrap();
        std::thread::sleep(Duration::from_millis(30));
        drop(socket);
        raw.ends(WorkError::Disconnected);
    }
    let bytes = raw.request(Kind::Send, 0, 0).encode().repeat(2);
    raw.say(&bytes);
    for _ in 0..2 {
        assert!(matches!(raw.next(), Completion::Received { .. }));
    }
}

/// What has not been handed to the kernel cannot have been executed.
#[test]
fn answers_to_what_was_not_sent_end_the_connection() {
    const LONG: usize = 16 << 20;
    let mut raw = Raw::new(LONG);
    let own = raw.region.clone();
    for _ in 0..2 {
        let piece = [Sge { region: &own, offset: 0, length: LONG }];
        raw.connection.write(Payload::Gather(&piece), own.remote().at(0), None, None).unwrap();
    }
    raw.connection.ring().unwrap();
    raw.say(&Frame::answer(Kind::Executed, 2, 0).encode());
    raw.ends(WorkError::RemoteInvalid);
}

/// A connection of which as much waits as is kept is read no more, and yet its end is seen.
#[test]
fn the_end_of_a_connection_that_waits_is_seen() {
    const LONG: usize = super::inbound::MAX_PARKED + (8 << 20);
    let mut raw = Raw::new(LONG);
    let held = raw.use_up_the_buffers();
    let immediate = Frame { immediate: Some(1), ..raw.request(Kind::Write, 0, LONG as u64) };
    raw.say(&immediate.encode());
    let mut socket = raw.socket.try_clone().unwrap();
    let sender = std::thread::spawn(move || socket.write_all(&vec![1; LONG]));
    std::thread::sleep(Duration::from_millis(200));
    raw.nothing();
    raw.socket.shutdown(std::net::Shutdown::Both).unwrap();
    let _ = sender.join().unwrap();
    raw.ends(WorkError::Disconnected);
    held.into_iter().for_each(|buffer| raw.endpoint.release(buffer));
}

/// Many small requests that wait are executed in time that grows with their number, and not with its square.
#[test]
fn many_requests_wait_and_all_are_executed() {
    const MANY: usize = 20_000;
    let mut raw = Raw::new(64);
    let bytes = raw.request(Kind::Send, 0, 0).encode().repeat(MANY);
    let mut socket = raw.socket.try_clone().unwrap();
    let sender = std::thread::spawn(move || socket.write_all(&bytes).unwrap());
    // Whoever does not read the answers is taken for dead.
    let mut socket = raw.socket.try_clone().unwrap();
    let listener = std::thread::spawn(move || while matches!(socket.read(&mut [0; 4096]), Ok(1..)) {});
    for _ in 0..MANY {
        let Completion::Received { buffer, .. } = raw.next() else { panic!("expected a message") };
        raw.endpoint.release(buffer);
    }
    sender.join().unwrap();
    drop(raw);
    listener.join().unwrap();
}

/// A WRITE that is on its way when its region is dropped writes no more.
#[test]
fn a_dropped_region_is_not_written() {
    let transport = Tcp::new();
    let memory = Memory::new("dropped", 64).unwrap();
    let region = transport.register(&memory, Access::RemoteWrite).unwrap();
    let mut endpoint = transport.endpoint(&CONFIG).unwrap();
    let (mut listener, place) = listen(&transport);
    let mut socket = TcpStream::connect(place).unwrap();
    socket.write_all(&hello().encode()).unwrap();
    let request = listener.accept(PATIENCE).unwrap().unwrap();
    let _connection = request.accept(&endpoint.attach(), b"").unwrap();
    let key = region.remote().key;
    let frame = Frame { kind: Kind::Write, immediate: None, key, length: 64, address: 0 };
    socket.write_all(&frame.encode()).unwrap();
    socket.write_all(&[1; 32]).unwrap();
    let begun = Instant::now();
    while memory.load(24) == 0 {
        assert!(begun.elapsed() < PATIENCE, "the first half is not written");
    }
    drop(region);
    socket.write_all(&[1; 32]).unwrap();
    let mut seen = Vec::new();
    while endpoint.poll(&mut seen) == 0 {
        endpoint.wait(PATIENCE);
    }
    assert!(matches!(seen[..], [Completion::Disconnected { .. }]), "{seen:?}");
    assert_eq!(memory.load(32), 0);
}

/// A peer to which nothing was said is said something: so a host that is gone is missed.
#[test]
fn something_is_said_now_and_then() {
    let mut raw = Raw::new(64);
    for _ in 0..2 {
        let frame = raw.frame();
        assert_eq!((frame.kind, frame.address), (Kind::Executed, 0));
    }
}

/// A peer that takes in all of its READs at once does not keep others waiting.
#[test]
fn long_replies_do_not_keep_others_waiting() {
    const LONG: usize = 64 << 20;
    let mut raw = Raw::new(LONG);
    let (mut listener, place) = listen(&Tcp::new());
    let mut other = TcpStream::connect(&place).unwrap();
    other.write_all(&hello().encode()).unwrap();
    let request = listener.accept(PATIENCE).unwrap().unwrap();
    let _other = request.accept(&raw.endpoint.attach(), b"").unwrap();
    let reads = raw.request(Kind::Read, 0, LONG as u64).encode().repeat(4);
    raw.say(&reads);
    let mut socket = raw.socket.try_clone().unwrap();
    let taken = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let reader = std::thread::spawn({
        let taken = taken.clone();
        move || {
            let mut buffer = vec![0; 1 << 20];
            while taken.load(std::sync::atomic::Ordering::SeqCst) < 4 * (FRAME + LONG) {
                let count = socket.read(&mut buffer).unwrap();
                taken.fetch_add(count, std::sync::atomic::Ordering::SeqCst);
            }
        }
    });
    // Messages of the other connection come in while replies go out.
    let mut between = 0;
    while !reader.is_finished() {
        other.write_all(&raw.request(Kind::Send, 0, 0).encode()).unwrap();
        let Completion::Received { buffer, .. } = raw.next() else { panic!("expected a message") };
        raw.endpoint.release(buffer);
        between += 1;
    }
    reader.join().unwrap();
    assert!(between > 4, "only {between} messages came in while 256 MiB went out");
}

/// Peers that say nothing, half of it, or something else do not keep others from connecting.
#[test]
fn strangers_do_not_hold_the_door() {
    let transport = Tcp::new();
    let mut endpoint = transport.endpoint(&CONFIG).unwrap();
    let (mut listener, place) = listen(&transport);
    let silent: Vec<_> = (0..20).map(|_| TcpStream::connect(&place).unwrap()).collect();
    let mut garbled = hello().encode();
    garbled[0] ^= 1;
    for (number, mut stranger) in silent.iter().enumerate() {
        match number % 4 {
            0 => {}
            1 => stranger.write_all(&hello().encode()[..50]).unwrap(),
            2 => stranger.write_all(&garbled).unwrap(),
            _ => stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap(),
        }
    }
    let begun = Instant::now();
    let mut good = TcpStream::connect(&place).unwrap();
    good.write_all(&hello().encode()).unwrap();
    let request = listener.accept(PATIENCE).unwrap().expect("the good one");
    assert!(begun.elapsed() < PATIENCE / 2);
    let connection = request.accept(&endpoint.attach(), b"").unwrap();
    assert!(listener.accept(Duration::from_millis(50)).unwrap().is_none(), "a stranger came in");
    // Those that were garbled have been dropped.
    let mut byte = [0];
    silent[2].set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(!matches!((&silent[2]).read(&mut byte), Ok(1)));
    drop(good);
    let mut seen = Vec::new();
    while endpoint.poll(&mut seen) == 0 {
        endpoint.wait(PATIENCE);
    }
    assert!(matches!(seen[..], [Completion::Disconnected { .. }]));
    drop(connection);
}

/// The sockets of this machine at a port that some process holds.
fn sockets_at(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let at = |address: &str| u16::from_str_radix(address.split(':').nth(1).unwrap(), 16).unwrap() == port;
    let lines = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    // The tenth column is the inode: 0 when only the kernel remembers the connection.
    lines.filter(|columns| (at(columns[1]) || at(columns[2])) && columns[9] != "0").count()
}

/// Nothing is left of connections that have ended but the listener.
#[test]
fn ended_connections_give_everything_back() {
    let mut raw = Raw::new(64);
    let (mut listener, place) = listen(&Tcp::new());
    let port = place.rsplit_once(':').unwrap().1.parse().unwrap();
    for _ in 0..100 {
        let mut socket = TcpStream::connect(&place).unwrap();
        socket.write_all(&hello().encode()).unwrap();
        let request = listener.accept(PATIENCE).unwrap().unwrap();
        drop(request.accept(&raw.endpoint.attach(), b"").unwrap());
        raw.ends(WorkError::Disconnected);
    }
    let begun = Instant::now();
    while sockets_at(port) > 1 {
        assert!(begun.elapsed() < PATIENCE, "{} sockets are left", sockets_at(port));
        std::thread::sleep(Duration::from_millis(10));
    }
}
