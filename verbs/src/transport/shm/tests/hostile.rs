//! Peers that say, send and write what they should not.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::{
    fs::{MemfdFlags, Mode, OFlags, memfd_create, open},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};

use super::{sockets::stranger, *};
use crate::transport::shm::{
    bell::Bell,
    hear::{Progress, hear},
    mapping::{Mapping, Mappings, PAGE},
    region::MAX_REGIONS,
    strangers::MAX_STRANGERS,
    wire::{Kind, Opening, RegionRecord},
};

/// What a good client says first, if it has so many regions of 64 bytes.
pub(super) fn hello(regions: u32) -> Opening {
    Opening {
        kind: Kind::Hello,
        slot: 0,
        regions,
        region_bytes: 64 * u64::from(regions),
        receive_size: 64,
        receive_buffers: 1,
        send_depth: 1,
        data: b"x".to_vec(),
    }
}

fn records(records: &[RegionRecord]) -> Vec<u8> {
    let mut bytes = Vec::new();
    records.iter().for_each(|record| record.encode(&mut bytes));
    bytes
}

const RECORD: RegionRecord = RegionRecord { key: 1, writable: true, base: 0, length: 64 };

/// What a peer says: packets, each with descriptors.
type Said<'a> = Vec<(Vec<u8>, Vec<BorrowedFd<'a>>)>;

fn say(socket: &OwnedFd, said: &Said<'_>) {
    for (bytes, fds) in said {
        // It may have been shown the door by now.
        let _ = wire::send(socket, bytes, fds, None);
    }
}

/// Files that no peer should send, beside good ones.
struct Files {
    bell: OwnedFd,
    region: OwnedFd,
    short: OwnedFd,
    unsealed: OwnedFd,
    read_only: OwnedFd,
    regular: OwnedFd,
}

impl Files {
    fn new() -> Self {
        let make = |len| Mapping::create("test", len).unwrap().1;
        let region = make(64);
        let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&region));
        Self {
            bell: make(PAGE),
            short: make(63),
            unsealed: memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap(),
            read_only: open(again, OFlags::RDONLY, Mode::empty()).unwrap(),
            regular: std::fs::File::open("/proc/self/exe").unwrap().into(),
            region,
        }
    }

    /// Openings that are wrong, and what is said of them.
    fn wrong(&self) -> Vec<(Said<'_>, &'static str)> {
        let bell = vec![self.bell.as_fd()];
        let one = |opening: Opening| vec![(opening.encode(), bell.clone())];
        let with = |record: RegionRecord, fd: &'static str| {
            let fd = match fd {
                "short" => &self.short,
                "unsealed" => &self.unsealed,
                "read-only" => &self.read_only,
                "regular" => &self.regular,
                _ => &self.region,
            };
            vec![(hello(1).encode(), bell.clone()), (records(&[record]), vec![fd.as_fd()])]
        };
        let raw = |at: usize, byte: u8| {
            let mut bytes = hello(0).encode();
            bytes[at] = byte;
            vec![(bytes, bell.clone())]
        };
        let many = |count| vec![(hello(0).encode(), vec![self.bell.as_fd(); count])];
        let two = |said: Vec<u8>, fds| vec![(hello(2).encode(), bell.clone()), (said, fds)];
        let region = self.region.as_fd();
        vec![
            (vec![(b"GET / HTTP/1.1".to_vec(), vec![])], "does not speak this version"),
            (vec![(vec![7; 4000], vec![])], "does not speak this version"),
            (raw(0, b'f'), "does not speak this version"),
            (raw(8, 1), "does not speak this version"),
            (raw(12, 9), "of kind 9, which does not exist"),
            (raw(56, 2), "announces 2 bytes of private data and sends 1"),
            (
                one(Opening { data: vec![0; 49], ..hello(0) }),
                "announces 49 bytes of private data, but at most 48",
            ),
            (
                one(Opening { slot: 31_744, ..hello(0) }),
                "announces 31744 as the number of its connection, but at most 31743",
            ),
            (one(hello(MAX_REGIONS + 1)), "announces 4097 regions, but at most 4096"),
            (
                one(Opening { region_bytes: (1 << 44) + 1, ..hello(0) }),
                "17592186044417 bytes of regions, but at most 17592186044416",
            ),
            (one(Opening { receive_size: 4_194_305, ..hello(0) }), "receive buffers, but at most 4194304"),
            (one(Opening { receive_size: u64::MAX, ..hello(0) }), "receive buffers, but at most 4194304"),
            (one(Opening { kind: Kind::Refuse, ..hello(1) }), "it refuses, and announces 1 regions"),
            (one(Opening { kind: Kind::Forbid, ..hello(0) }), "a user whose number has 1 bytes"),
            (many(0), "sent 0 descriptors instead of 1"),
            (many(2), "sent 2 descriptors instead of 1"),
            (many(128), "sent 128 descriptors instead of 1"),
            (vec![(hello(0).encode(), bell.clone()), (vec![1], vec![])], "announces 65 bytes and sends 66"),
            (two(records(&[RECORD]), vec![region]), ""),
            (
                two(records(&[RECORD; 2]), vec![region]),
                "2 regions and 1 descriptors in a packet, instead of 2",
            ),
            (
                two(records(&[RECORD; 2]), vec![region; 3]),
                "2 regions and 3 descriptors in a packet, instead of 2",
            ),
            (two(records(&[RECORD; 3]), vec![region; 3]), "announces 113 bytes and sends 137"),
            (
                vec![
                    (hello(2).encode(), bell.clone()),
                    (records(&[RECORD]), vec![region]),
                    (records(&[RECORD]), vec![region]),
                ],
                "1 regions and 1 descriptors in a packet, instead of 2",
            ),
            (with(RegionRecord { length: 0, ..RECORD }, "good"), "malformed list"),
            (with(RegionRecord { base: u64::MAX, ..RECORD }, "good"), "malformed list"),
            (two(records(&[RECORD])[..20].repeat(2), vec![region; 2]), ""),
            (with(RegionRecord { length: 65, ..RECORD }, "good"), "more than the 64 bytes announced"),
            (with(RegionRecord { length: 1 << 50, ..RECORD }, "good"), "more than the 64 bytes announced"),
            (with(RECORD, "short"), "it has 63 bytes and should have 64"),
            (with(RECORD, "unsealed"), "not sealed against shrinking"),
            (with(RECORD, "regular"), "it is no memfd"),
            (with(RECORD, "read-only"), "mmap(64 bytes) failed"),
        ]
    }
}

#[test]
fn what_is_wrong_with_an_opening_is_said_with_its_value() {
    let files = Files::new();
    let mappings = Mappings::new(0);
    for (number, (said, words)) in files.wrong().into_iter().enumerate() {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None).unwrap();
        say(&theirs, &said);
        match hear(&ours, &mappings) {
            Progress::Bad(reason) => {
                assert!(
                    !words.is_empty() && reason.contains(words),
                    "case {number}: {reason}; expected {words}"
                );
            }
            // It has said less than it announced.
            Progress::Unfinished => assert_eq!(words, "", "case {number}"),
            _ => panic!("case {number} is taken"),
        }
    }
    // More descriptors than any packet has: the kernel drops them, and that is seen.
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None).unwrap();
    let many = [files.bell.as_fd(); 128];
    say(&theirs, &vec![(hello(1).encode(), many.to_vec()), (records(&[RECORD]), vec![])]);
    let Progress::Bad(reason) = hear(&ours, &mappings) else { panic!() };
    assert!(reason.contains("128 descriptors"), "{reason}");
}

#[test]
fn strangers_stop_at_every_step_while_others_connect() {
    let (address, path) = socket();
    let transport = Shm::new().unwrap();
    let mut listener = transport.listen(&address).unwrap();
    let config = EndpointConfig { connections: 128, ..EndpointConfig::default() };
    let [server, client] = [(); 2].map(|()| transport.endpoint(&config).unwrap());
    let files = Files::new();
    let (bell, region) = (vec![files.bell.as_fd()], files.region.as_fd());
    let first = (hello(130).encode(), bell);
    let second = (records(&[RECORD; 128]), vec![region; 128]);
    let steps: [Said<'_>; 3] = [vec![], vec![first.clone()], vec![first, second]];
    let mut stopped = Vec::new();
    let mut connections = Vec::new();
    for turn in 0..60 {
        let socket = stranger(&path);
        say(&socket, &steps[turn % 3]);
        stopped.push(socket);
        let (accepted, connected) = std::thread::scope(|scope| {
            let connecting =
                scope.spawn(|| transport.connect(&client.attach(), &address, b"real", PATIENCE).unwrap());
            let request = listener.accept(PATIENCE).unwrap().expect("a request");
            assert_eq!(request.private_data(), b"real");
            (request.accept(&server.attach(), b"").unwrap(), connecting.join().unwrap())
        });
        connections.push((accepted, connected.0));
    }
    // All of them are still being listened to: so nobody has waited until their time was over.
    assert_eq!(listener.strangers(), 60);
    // One who goes on is heard.
    say(&stopped[59], &vec![(records(&[RECORD; 2]), vec![region; 2])]);
    let request = listener.accept(PATIENCE).unwrap().expect("a request");
    assert_eq!(request.private_data(), b"x");
    // A client that stops when it should read the answer holds nobody up, either.
    let _unread = request.accept(&server.attach(), b"").unwrap();
    assert_eq!(listener.strangers(), 59);
}

#[test]
fn half_an_opening_does_not_keep_a_listener_busy() {
    let (address, path) = socket();
    let transport = Shm::new().unwrap();
    let mut listener = transport.listen(&address).unwrap();
    let files = Files::new();
    let half: Vec<_> = (0..50)
        .map(|_| {
            let socket = stranger(&path);
            say(&socket, &vec![(hello(1).encode(), vec![files.bell.as_fd()])]);
            socket
        })
        .collect();
    // In user and system mode, in hundredths of a second.
    let spent = || {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        let fields: Vec<&str> = fields.split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    assert!(listener.accept(Duration::ZERO).unwrap().is_none());
    let before = spent();
    assert!(listener.accept(Duration::from_millis(500)).unwrap().is_none());
    let spent = spent() - before;
    assert!(spent < 10, "it computed for {spent}0 ms");
    assert_eq!(listener.strangers(), half.len());
}

#[test]
fn the_longest_silent_stranger_gives_way_and_the_rest_expire() {
    let (address, path) = socket();
    let transport = Shm::new().unwrap();
    let mut listener = transport.listen(&address).unwrap();
    let begun = Instant::now();
    let take = |listener: &mut ShmListener| assert!(listener.accept(Duration::ZERO).unwrap().is_none());
    let silent: Vec<_> = (0..MAX_STRANGERS)
        .map(|_| {
            let socket = stranger(&path);
            take(&mut listener);
            socket
        })
        .collect();
    assert_eq!(listener.strangers(), MAX_STRANGERS);
    // The first says something, so the second has been silent for longest.
    say(&silent[0], &vec![(hello(1).encode(), vec![])]);
    take(&mut listener);
    let late = stranger(&path);
    take(&mut listener);
    let shown_out = |socket: &OwnedFd| matches!(wire::peek(socket), wire::Received::End);
    if begun.elapsed() < strangers::STRANGER_PATIENCE {
        let out: Vec<_> = (0..MAX_STRANGERS).filter(|&n| shown_out(&silent[n])).collect();
        assert!(out == [1] || begun.elapsed() > strangers::STRANGER_PATIENCE, "{out:?}");
    }
    // A real one finds its place at once, too: before any of these goes by itself.
    let endpoint = transport.endpoint(&EndpointConfig::default()).unwrap();
    let _both = std::thread::scope(|scope| {
        let connecting =
            scope.spawn(|| transport.connect(&endpoint.attach(), &address, b"", PATIENCE).unwrap().0);
        let request = listener.accept(PATIENCE).unwrap().expect("a request");
        (request.accept(&endpoint.attach(), b"").unwrap(), connecting.join().unwrap())
    });
    assert!(begun.elapsed() > strangers::STRANGER_PATIENCE || listener.strangers() >= MAX_STRANGERS - 1);
    let deadline = Instant::now() + PATIENCE;
    while listener.strangers() > 0 {
        assert!(Instant::now() < deadline, "{} strangers stay for ever", listener.strangers());
        assert!(listener.accept(Duration::from_millis(100)).unwrap().is_none());
    }
    assert!(begun.elapsed() >= strangers::STRANGER_PATIENCE);
    assert!(silent.iter().chain([&late]).all(shown_out));
}

/// What a client makes of a listener that says this.
fn answered_with(said: &Said<'_>, stays: bool) -> Error {
    let (address, path) = socket();
    let spy = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    rustix::net::bind(&spy, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&spy, 4).unwrap();
    let transport = Shm::new().unwrap();
    let config = EndpointConfig {
        connections: 1,
        receive_size: 64,
        receive_buffers: 1,
        send_depth: 1,
        ..EndpointConfig::default()
    };
    let endpoint = transport.endpoint(&config).unwrap();
    let timeout = if stays { Duration::from_millis(50) } else { PATIENCE };
    let error = std::thread::scope(|scope| {
        let connecting = scope.spawn(|| transport.connect(&endpoint.attach(), &address, b"", timeout));
        let peer = rustix::net::accept(&spy).unwrap();
        wire::ready(&peer, rustix::event::PollFlags::IN, PATIENCE).unwrap();
        say(&peer, said);
        if !stays {
            drop(peer);
            return connecting.join().unwrap().unwrap_err();
        }
        connecting.join().unwrap().unwrap_err()
    });
    // Its place is free again.
    drop(endpoint::Seat::reserve(&endpoint.attach().0).unwrap());
    std::fs::remove_file(path).unwrap();
    error
}

/// An acceptance without regions, and its descriptors.
fn accepted(fds: Vec<BorrowedFd<'_>>) -> Said<'_> {
    vec![(Opening { kind: Kind::Accept, ..hello(0) }.encode(), fds)]
}

#[test]
fn a_listener_that_answers_nonsense_is_an_error_of_the_client() {
    let files = Files::new();
    let ring = |len: u64| Mapping::create("test", PAGE + len as usize).unwrap().1;
    let (good, small, odd, great) = (ring(64 << 10), ring(32 << 10), ring((64 << 10) + 16), ring(4 << 30));
    let (bell, good) = (files.bell.as_fd(), good.as_fd());
    let accept = |regions| Opening { kind: Kind::Accept, ..hello(regions) };
    for (said, words) in [
        (vec![], "closed the connection"),
        (vec![(vec![0; 64], vec![])], "does not speak this version"),
        (vec![(hello(0).encode(), vec![bell])], "it wants to connect, too"),
        (accepted(vec![]), "0 descriptors instead of 3"),
        (accepted(vec![bell; 4]), "4 descriptors instead of 3"),
        (
            accepted(vec![bell, small.as_fd(), good]),
            "a bad ring to this side: mapping memory of the peer failed: it has 36864 bytes and should have 69632",
        ),
        (
            accepted(vec![bell, good, odd.as_fd()]),
            "a bad ring from this side: mapping memory of the peer failed: it has 69648 bytes",
        ),
        (accepted(vec![bell, great.as_fd(), good]), "it has 4294971392 bytes and should have 69632"),
        (
            accepted(vec![files.region.as_fd(), good, good]),
            "a bad doorbell: mapping memory of the peer failed: it has 64 bytes and should have 4096",
        ),
        (accepted(vec![bell, files.unsealed.as_fd(), good]), "not sealed"),
        (accepted(vec![bell, good, files.regular.as_fd()]), "no memfd"),
        (
            vec![(accept(1).encode(), vec![bell; 3]), (records(&[RECORD]), vec![files.short.as_fd()])],
            "63 bytes",
        ),
        (vec![(accept(1).encode(), vec![bell; 3])], "left in the middle of its answer"),
    ] {
        let error = answered_with(&said, false);
        let text = error.to_string();
        assert!(
            matches!(error, Error::Unreachable { .. }) && text.contains(words),
            "{text}; expected {words}"
        );
    }
    let forbid = vec![(Opening::prohibition(1234).encode(), vec![])];
    assert!(matches!(answered_with(&forbid, false), Error::OtherUser { peer: 1234, .. }));
    // Silence, and half an answer.
    for said in [vec![], vec![(accept(1).encode(), vec![bell; 3])]] {
        let error = answered_with(&said, true);
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
    }
}

/// A generator of numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// One that is small, or at an edge, or anything.
    fn word(&mut self) -> u64 {
        match self.next() % 4 {
            0 => self.next() % 512,
            1 => (self.next() % 4096) * 16,
            2 => [0, u64::MAX, 1 << 63, u64::MAX - 15, (64 << 10) + PAGE as u64, 1 << 16]
                [self.next() as usize % 6],
            _ => self.next(),
        }
    }
}

#[test]
fn whatever_a_peer_writes_into_its_ring_its_receiver_stays_whole() {
    let config =
        EndpointConfig { receive_buffers: 4, receive_size: 100, send_depth: 8, ..EndpointConfig::default() };
    for seed in 1..200 {
        let (a, mut b) = pair(&config);
        let mut connection = a.connection;
        let mut random = Random(seed);
        let mut over = false;
        for _ in 0..50 {
            // Both near the end of the ring, where records wrap, and anywhere.
            for _ in 0..random.next() % 4 {
                let at = match random.next() % 3 {
                    // The word of the gate, behind which the end is waited for, seldom.
                    0 => [0, 128, 136, 256, if seed % 50 == 0 { 8 } else { 0 }][random.next() as usize % 5],
                    1 => PAGE + (random.next() % 64) as usize * 8,
                    _ => PAGE + random.next() as usize % ((64 << 10) / 8) * 8,
                };
                connection.poison_outbox(at, random.word());
            }
            let _ = connection.send(Payload::Inline(&[1; 60]), None, None);
            let _ = connection.ring();
            let mut some = Vec::new();
            b.endpoint.poll(&mut some);
            for completion in some {
                match completion {
                    Completion::Received { buffer, .. } => {
                        assert!(b.endpoint.message(&buffer).len() <= 100);
                        b.endpoint.release(buffer);
                    }
                    Completion::WriteImmediate { .. } => {}
                    Completion::Disconnected { .. } => over = true,
                    Completion::Work { .. } => panic!("nothing was posted"),
                }
            }
            if over {
                break;
            }
        }
        // Its buffers are all there: another connection uses them.
        drop(connection);
        while !over {
            match b.next() {
                Completion::Received { buffer, .. } => b.endpoint.release(buffer),
                Completion::WriteImmediate { .. } => {}
                Completion::Disconnected { .. } => over = true,
                Completion::Work { .. } => panic!("nothing was posted"),
            }
        }
        assert!(b.silent());
    }
}

#[test]
fn whatever_a_peer_writes_into_a_bell_its_owner_stays_whole() {
    let (mut a, mut b) = pair(&EndpointConfig::default());
    let bell = b.endpoint.attach().0.bell.clone();
    for round in 0..200_u64 {
        let all = if round % 2 == 0 { u64::MAX } else { 0x5555_5555_5555_5555 << (round % 7) };
        for leaf in 0..(PAGE - 128) / 8 {
            bell.leaf(leaf).store(all, Ordering::Relaxed);
        }
        bell.summary().store(all, Ordering::Release);
        a.connection.send(Payload::Inline(&round.to_le_bytes()), None, None).unwrap();
        a.connection.ring().unwrap();
        assert_eq!(b.message(), round.to_le_bytes());
        assert!(a.silent(), "nothing was signalled");
        b.endpoint.wait(Duration::from_millis(1));
    }
}

#[test]
fn a_peer_may_hand_this_process_its_own_files() {
    // The doorbell and the region of the listener, as region and doorbell of the client.
    let (address, path) = socket();
    let transport = Shm::new().unwrap();
    let mut listener = transport.listen(&address).unwrap();
    let mut endpoint = transport.endpoint(&EndpointConfig::default()).unwrap();
    let region = transport.register(&Memory::new("test", PAGE).unwrap(), Access::RemoteWrite).unwrap();
    let user = transport.0.user;
    let file = transport.0.registry.offers().unwrap()[0].descriptor(user, user).unwrap();
    let attach = endpoint.attach();
    let raw = stranger(&path);
    say(
        &raw,
        &vec![
            (hello(1).encode(), vec![file.as_fd()]),
            (records(&[RegionRecord { key: 9, base: 0, ..RECORD }]), vec![attach.0.bell_file()]),
        ],
    );
    let request = listener.accept(PATIENCE).unwrap().expect("a request");
    let mut connection = request.accept(&attach, b"").unwrap();
    // It writes its own bell, and rings its own memory.
    let remote = RemoteRegion { address: 0, length: 64, key: 9 };
    connection.write(Payload::Inline(&[0xff; 8]), remote.at(0), None, Some(1)).unwrap();
    connection.read(&piece(&region, 0, 64), remote.at(0), Some(2)).unwrap();
    connection.send(Payload::Inline(b"hi"), None, None).unwrap();
    connection.ring().unwrap();
    let mut some = Vec::new();
    while some.len() < 2 {
        endpoint.poll(&mut some);
    }
    assert!(some.iter().all(|c| matches!(c, Completion::Work { result: Ok(()), .. })), "{some:?}");
    drop(raw);
    assert!(matches!(next(&mut endpoint), Completion::Disconnected { .. }));
}
