//! What the conformance suite cannot say of all providers: sockets, strangers, processes, corrupt peers.

use std::{
    collections::VecDeque,
    path::PathBuf,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use super::*;
use crate::transport::{
    Attach, Completion, Connection, Endpoint, Listener, Payload, PostError, Region, RemoteAddress,
    RemoteRegion, Request, Sge, WorkError, conformance::Posts,
};

mod files;
mod hostile;
mod peers;
mod processes;
mod refused;
mod sockets;
mod users;

const PATIENCE: Duration = Duration::from_secs(10);

const ARGUMENT: &str = "FERVOR_TEST_ARGUMENT";

/// This program, to run one test of this module in a process of its own, where it finds its [`argument`].
fn program(test: &str, argument: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", &format!("transport::shm::tests::{test}"), "--nocapture"])
        .env(ARGUMENT, argument);
    command
}

/// What a test that runs in a process of its own was told.
fn argument() -> Option<String> {
    std::env::var(ARGUMENT).ok()
}

/// Runs one test of this module in a process of its own, to its end.
fn run_alone(test: &str, argument: &str) {
    let status = program(test, argument).status().unwrap();
    assert!(status.success(), "the process of {test} ended with {status}");
}

/// A path of its own for each test.
fn socket() -> (Address, PathBuf) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("fervor-shm-{}-{number}", std::process::id()));
    (Address::Shm(path.clone()), path)
}

struct Side {
    transport: Shm,
    endpoint: ShmEndpoint,
    connection: ShmConnection,
    region: ShmRegion,
    remote: RemoteRegion,
    pending: VecDeque<Completion>,
}

impl Side {
    /// The next completion; panics if none comes.
    fn next(&mut self) -> Completion {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(completion) = self.pending.pop_front() {
                return completion;
            }
            assert!(Instant::now() < deadline, "nothing came");
            let mut some = Vec::new();
            if self.endpoint.poll(&mut some) == 0 {
                self.endpoint.wait(Duration::from_millis(100));
            }
            self.pending.extend(some);
        }
    }

    fn work(&mut self) -> (u64, Result<(), WorkError>) {
        match self.next() {
            Completion::Work { id, result, .. } => (id, result),
            other => panic!("{other:?}"),
        }
    }

    fn message(&mut self) -> Vec<u8> {
        match self.next() {
            Completion::Received { buffer, .. } => {
                let message = self.endpoint.message(&buffer).to_vec();
                self.endpoint.release(buffer);
                message
            }
            other => panic!("{other:?}"),
        }
    }

    fn disconnected(&mut self) -> WorkError {
        match self.next() {
            Completion::Disconnected { cause, .. } => cause,
            other => panic!("{other:?}"),
        }
    }

    fn silent(&mut self) -> bool {
        self.pending.is_empty() && self.endpoint.poll(&mut Vec::new()) == 0
    }
}

fn next(endpoint: &mut ShmEndpoint) -> Completion {
    let deadline = Instant::now() + PATIENCE;
    let mut one = Vec::new();
    while endpoint.poll(&mut one) == 0 {
        assert!(Instant::now() < deadline, "nothing came");
        endpoint.wait(Duration::from_millis(100));
    }
    assert_eq!(one.len(), 1, "more than one: {one:?}");
    one.remove(0)
}

/// Two connected sides with a writable region of 1 MiB each.
fn pair(config: &EndpointConfig) -> (Side, Side) {
    pair_with(config, Access::RemoteWrite)
}

fn pair_with(config: &EndpointConfig, access: Access) -> (Side, Side) {
    let (address, _) = socket();
    let make = || {
        let transport = Shm::new().unwrap();
        let region = transport.register(&Memory::new("test", 1 << 20).unwrap(), access).unwrap();
        let endpoint = transport.endpoint(config).unwrap();
        (transport, endpoint, region)
    };
    let (server, client) = (make(), make());
    let mut listener = server.0.listen(&address).unwrap();
    let (accepted, connected) = std::thread::scope(|scope| {
        let connecting =
            scope.spawn(|| client.0.connect(&client.1.attach(), &address, b"hi", PATIENCE).unwrap());
        let request = listener.accept(PATIENCE).unwrap().expect("a request");
        assert_eq!(request.private_data(), b"hi");
        let accepted = request.accept(&server.1.attach(), b"hello").unwrap();
        (accepted, connecting.join().unwrap())
    });
    assert_eq!(connected.1, b"hello");
    let (of_server, of_client) = (server.2.remote(), client.2.remote());
    let side = |(transport, endpoint, region), connection, remote| Side {
        transport,
        endpoint,
        connection,
        region,
        remote,
        pending: VecDeque::new(),
    };
    (side(server, accepted, of_client), side(client, connected.0, of_server))
}

fn piece(region: &ShmRegion, offset: usize, length: usize) -> [Sge<'_, ShmRegion>; 1] {
    [Sge { region, offset, length }]
}

#[test]
fn reads_writes_and_messages_of_all_sizes() {
    let config = EndpointConfig { receive_size: 1 << 20, receive_buffers: 4, ..EndpointConfig::default() };
    let (mut a, mut b) = pair(&config);
    let room = a.connection.room();
    for (turn, size) in [0, 1, 7, 64, 4096, 1 << 20].into_iter().cycle().take(60).enumerate() {
        let data: Vec<u8> = (0..size).map(|i| (i * 7 + turn) as u8).collect();
        a.region.memory().write(0, &data);
        let region = a.region.clone();
        let payload = piece(&region, 0, size);
        a.connection.write(Payload::Gather(&payload), a.remote.at(0), None, Some(1)).unwrap();
        a.connection.ring().unwrap();
        assert_eq!(a.work(), (1, Ok(())));
        let mut seen = vec![0; size];
        b.region.memory().read(0, &mut seen);
        assert_eq!(seen, data);
        assert!(b.silent(), "a WRITE is not noticed");

        a.connection.send(Payload::Gather(&payload), None, None).unwrap();
        a.connection.ring().unwrap();
        assert_eq!(b.message(), data);

        b.region.memory().write(0, &vec![0xaa; size]);
        a.connection.read(&payload, a.remote.at(0), Some(2)).unwrap();
        a.connection.ring().unwrap();
        assert_eq!(a.work(), (2, Ok(())));
        a.region.memory().read(0, &mut seen);
        assert_eq!(seen, vec![0xaa; size]);
        assert_eq!(a.connection.room(), room);
    }
}

#[test]
fn what_is_not_granted_is_refused_and_breaks_the_connection() {
    type Post = fn(&mut Side) -> Result<(), PostError>;
    fn write(side: &mut Side, remote: RemoteAddress) -> Result<(), PostError> {
        side.connection.write(Payload::Inline(&[1; 8]), remote, Some(1), Some(9))
    }
    fn read(side: &mut Side, remote: RemoteAddress) -> Result<(), PostError> {
        side.connection.read(&piece(&side.region, 0, 8), remote, Some(9))
    }
    let (all, read_only, local) = (Access::RemoteWrite, Access::RemoteRead, Access::Local);
    let cases: [(Access, Post); 9] = [
        (all, |s| write(s, s.remote.at((1 << 20) - 7))),
        (all, |s| read(s, s.remote.at((1 << 20) - 7))),
        (all, |s| write(s, s.remote.at(u64::MAX - 3 - s.remote.address))),
        (all, |s| read(s, s.remote.at(0u64.wrapping_sub(s.remote.address)))),
        (all, |s| read(s, s.remote.at(u64::MAX))),
        (all, |s| write(s, RemoteAddress { key: s.remote.key + 1, ..s.remote.at(0) })),
        (read_only, |s| write(s, s.remote.at(0))),
        (local, |s| write(s, s.remote.at(0))),
        (local, |s| read(s, s.remote.at(0))),
    ];
    for (number, (access, post)) in cases.into_iter().enumerate() {
        let (mut a, mut b) = pair_with(&EndpointConfig::default(), access);
        post(&mut a).unwrap();
        // As on hardware, the rest of the batch is taken and flushed.
        a.connection.send(Payload::Inline(b"x"), None, Some(10)).unwrap();
        a.connection.ring().unwrap();
        let mut all = Vec::new();
        while a.endpoint.poll(&mut all) > 0 {}
        let text = format!("case {number}: {all:?}");
        assert_eq!(all.len(), 3, "{text}");
        assert!(
            matches!(all[0], Completion::Work { id: 9, result: Err(WorkError::RemoteAccess), .. }),
            "{text}"
        );
        assert!(matches!(all[1], Completion::Work { id: 10, result: Err(WorkError::Flushed), .. }), "{text}");
        assert!(matches!(all[2], Completion::Disconnected { cause: WorkError::RemoteAccess, .. }), "{text}");
        let remote = a.remote.at(0);
        assert_eq!(read(&mut a, remote), Err(PostError::Disconnected));
        assert_eq!(a.connection.ring(), Err(PostError::Disconnected));
        assert_eq!(b.disconnected(), WorkError::Disconnected);
        let mut bytes = vec![0; 1 << 20];
        b.region.memory().read(0, &mut bytes);
        assert!(bytes.iter().all(|&byte| byte == 0), "case {number} wrote");
    }
}

#[test]
fn the_send_queue_is_as_deep_as_asked_for() {
    let config = EndpointConfig { send_depth: 5, ..EndpointConfig::default() };
    let (mut a, _b) = pair(&config);
    for _ in 0..3 {
        for n in 0..5 {
            assert_eq!(a.connection.room(), 5 - n);
            a.connection.write(Payload::Inline(b"1"), a.remote.at(0), None, None).unwrap();
        }
        let refused = a.connection.write(Payload::Inline(b"2"), a.remote.at(0), None, Some(1));
        assert_eq!(refused, Err(PostError::Full));
        a.connection.ring().unwrap();
        assert!(a.silent(), "nothing was signalled");
        assert_eq!(a.connection.room(), 5, "the poll has made room");
    }
}

#[test]
fn what_has_room_is_taken_however_long_the_messages_are() {
    let config =
        EndpointConfig { receive_buffers: 64, receive_size: 64 << 10, send_depth: 128, ..Default::default() };
    let (mut a, mut b) = pair(&config);
    for round in 0..20 {
        let room = a.connection.room();
        assert!((1..128).contains(&room), "{room} in round {round}: the ring holds less than the queue");
        for _ in 0..room {
            a.connection.send(Payload::Gather(&piece(&a.region, 0, 64 << 10)), None, None).unwrap();
        }
        assert_eq!(a.connection.room(), 0);
        a.connection.ring().unwrap();
        for _ in 0..room {
            assert_eq!(b.message().len(), 64 << 10);
        }
        assert!(a.silent(), "nothing was signalled");
    }
}

#[test]
fn a_full_ring_is_back_pressure_and_nothing_is_lost() {
    let config =
        EndpointConfig { receive_buffers: 2, receive_size: 4096, send_depth: 100_000, ..Default::default() };
    let (mut a, mut b) = pair(&config);
    let mut sent = 0u32;
    let mut received = 0u32;
    while received < 5000 {
        while sent < 5000 {
            a.region.memory().write(0, &[sent as u8; 4000]);
            a.region.memory().write(0, &sent.to_le_bytes());
            match a.connection.send(Payload::Gather(&piece(&a.region, 0, 4000)), None, None) {
                Ok(()) => sent += 1,
                Err(error) => {
                    assert_eq!(error, PostError::Full);
                    break;
                }
            }
        }
        a.connection.ring().unwrap();
        while a.endpoint.poll(&mut Vec::new()) > 0 {}
        for _ in 0..300 {
            if received == sent {
                break;
            }
            let mut some = Vec::new();
            assert!(b.endpoint.poll(&mut some) > 0 && some.len() <= 2, "{some:?}");
            for completion in some {
                let Completion::Received { buffer, .. } = completion else { panic!("{completion:?}") };
                let message = b.endpoint.message(&buffer);
                assert_eq!((message.len(), &message[..4]), (4000, &received.to_le_bytes()[..]));
                assert!(message[4..].iter().all(|&byte| byte == received as u8));
                received += 1;
                b.endpoint.release(buffer);
            }
        }
        if sent < 5000 {
            // The receiver has rung the sender's bell, so this returns at once; or the test takes hours.
            a.endpoint.wait(Duration::from_secs(3600));
        }
    }
}

#[test]
fn immediates_take_no_buffer_but_need_one() {
    let (mut a, mut b) = pair(&EndpointConfig { receive_buffers: 1, ..EndpointConfig::default() });
    a.connection.send(Payload::Inline(b"one"), Some(7), None).unwrap();
    for n in 0..3 {
        a.connection
            .write(Payload::Inline(&[n; 8]), a.remote.at(8 * u64::from(n)), Some(n.into()), None)
            .unwrap();
    }
    a.connection.write(Payload::Inline(b""), RemoteAddress { address: 0, key: 0 }, Some(3), None).unwrap();
    a.connection.ring().unwrap();
    let Completion::Received { buffer, immediate: Some(7), .. } = b.next() else { panic!() };
    assert!(b.silent(), "the only buffer is in use");
    b.endpoint.release(buffer);
    let mut all = Vec::new();
    b.endpoint.poll(&mut all);
    let immediates: Vec<_> =
        all.iter()
            .map(|c| {
                if let Completion::WriteImmediate { immediate, .. } = c {
                    *immediate
                } else {
                    panic!("{c:?}")
                }
            })
            .collect();
    assert_eq!(immediates, [0, 1, 2, 3]);
    assert_eq!(b.region.memory().load(8), 0x0101_0101_0101_0101);
}

#[test]
fn a_message_longer_than_the_receive_buffers_breaks_the_connection() {
    let (mut a, mut b) = pair(&EndpointConfig { receive_size: 10, ..EndpointConfig::default() });
    a.connection.send(Payload::Inline(&[1; 10]), None, None).unwrap();
    a.connection.send(Payload::Inline(&[2; 11]), None, Some(1)).unwrap();
    a.connection.ring().unwrap();
    let mut all = Vec::new();
    a.endpoint.poll(&mut all);
    assert!(
        matches!(
            all[..],
            [
                Completion::Work { id: 1, result: Err(WorkError::RemoteInvalid), .. },
                Completion::Disconnected { cause: WorkError::RemoteInvalid, .. }
            ]
        ),
        "{all:?}"
    );
    assert_eq!(b.message(), [1; 10]);
    assert_eq!(b.disconnected(), WorkError::Disconnected);
}

#[test]
fn a_wake_ends_a_present_or_the_next_wait() {
    let (mut a, _b) = pair(&EndpointConfig::default());
    let attach = a.endpoint.attach();
    attach.wake();
    a.endpoint.wait(Duration::from_secs(3600));
    attach.wake();
    assert!(a.silent());
    a.endpoint.wait(Duration::from_secs(3600));
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        attach.wake();
    });
    let start = Instant::now();
    a.endpoint.wait(Duration::from_secs(3600));
    thread.join().unwrap();
    assert!(start.elapsed() >= Duration::from_millis(20), "a wake is used up");
    a.endpoint.wait(Duration::from_millis(1));
}

#[test]
fn a_parked_endpoint_sleeps_through_reads_and_writes_of_its_memory() {
    let (mut a, mut b) = pair(&EndpointConfig::default());
    assert!(b.silent(), "the bell of the new connection is answered");
    let parked = std::thread::spawn(move || {
        b.endpoint.wait(Duration::from_secs(3600));
        let woken = Instant::now();
        assert_eq!(b.message(), b"now");
        woken
    });
    std::thread::sleep(Duration::from_millis(50));
    for n in 0..1000 {
        a.connection.write(Payload::Inline(&[1; 8]), a.remote.at(0), None, Some(n)).unwrap();
        a.connection.read(&piece(&a.region, 0, 64), a.remote.at(0), None).unwrap();
        a.connection.ring().unwrap();
        assert_eq!(a.work(), (n, Ok(())));
        a.silent();
    }
    let before = Instant::now();
    a.connection.send(Payload::Inline(b"now"), None, None).unwrap();
    a.connection.ring().unwrap();
    assert!(parked.join().unwrap() >= before);
}

#[test]
fn exported_memory_is_read_and_cannot_be_mapped_writable() {
    let (address, _) = socket();
    let server = Shm::new().unwrap();
    let mut exclusive = Exclusive::new("rows", 3 << 20).unwrap();
    exclusive.bytes_mut()[12345] = 77;
    let export = server.export(&exclusive).unwrap();
    let remote = crate::transport::Export::remote(&export);
    let server_endpoint = server.endpoint(&EndpointConfig::default()).unwrap();
    let mut listener = server.listen(&address).unwrap();
    let client = Shm::new().unwrap();
    let mut endpoint = client.endpoint(&EndpointConfig::default()).unwrap();
    let target = client.register(&Memory::new("target", 64).unwrap(), Access::Local).unwrap();
    let (mut connection, _accepted) = std::thread::scope(|scope| {
        let connecting =
            scope.spawn(|| client.connect(&endpoint.attach(), &address, b"", PATIENCE).unwrap().0);
        let request = listener.accept(PATIENCE).unwrap().unwrap();
        let accepted = request.accept(&server_endpoint.attach(), b"").unwrap();
        (connecting.join().unwrap(), accepted)
    });
    connection.read(&piece(&target, 0, 1), remote.at(12345), Some(1)).unwrap();
    connection.ring().unwrap();
    assert!(matches!(next(&mut endpoint), Completion::Work { result: Ok(()), .. }));
    assert_eq!(target.memory().load(0), 77);
    // Even this process can map it only to read.
    let fd = exclusive.memory().as_fd().try_clone_to_owned().unwrap();
    let mappings = mapping::Mappings::new(0);
    assert!(mappings.open(&fd, 1, true).is_err());
    assert!(mappings.open(&fd, 1, false).is_ok());
}

#[test]
fn connections_of_every_layer_of_the_bell_work() {
    let (address, _) = socket();
    let (server, client) = (Shm::new().unwrap(), Shm::new().unwrap());
    let config = EndpointConfig { connections: bell::SLOTS, ..EndpointConfig::default() };
    let mut ends = [server.endpoint(&config).unwrap(), client.endpoint(&config).unwrap()];
    let more = EndpointConfig { connections: bell::SLOTS + 1, ..config };
    assert!(matches!(server.endpoint(&more), Err(Error::Limit { limit: 31_744, .. })));
    let mut listener = server.listen(&address).unwrap();
    let attaches = [ends[0].attach(), ends[1].attach()];
    let (mut seats, mut connections) = (Vec::new(), Vec::new());
    for slot in [0, 1, 63, 64, 3_967, 3_968, 7_936, 15_000, 31_743] {
        // The slots before are taken, without a connection.
        while seats.len() / 2 + connections.len() / 2 < slot {
            seats.extend(attaches.each_ref().map(|attach| endpoint::Seat::reserve(&attach.0).unwrap()));
        }
        assert!(seats.last().is_none_or(|seat: &endpoint::Seat| seat.slot < slot as u32));
        let (to_client, to_server) = std::thread::scope(|scope| {
            let connecting = scope.spawn(|| client.connect(&attaches[1], &address, b"", PATIENCE).unwrap().0);
            let request = listener.accept(PATIENCE).unwrap().expect("a request");
            (request.accept(&attaches[0], b"").unwrap(), connecting.join().unwrap())
        });
        let ids = [to_client.id(), to_server.id()];
        connections.extend([to_server, to_client]);
        let last = connections.len() - 2;
        for (side, connection) in connections[last..].iter_mut().enumerate() {
            connection.send(Payload::Inline(b"hello"), Some(slot as u32), None).unwrap();
            connection.ring().unwrap();
            let Completion::Received { connection, buffer, immediate } = next(&mut ends[side]) else {
                panic!("expected a message")
            };
            assert_eq!((connection, immediate), (ids[side], Some(slot as u32)));
            ends[side].release(buffer);
        }
    }
    assert!(endpoint::Seat::reserve(&attaches[0].0).is_err(), "every slot is taken");
}

#[test]
fn connections_to_one_peer_share_their_mappings() {
    let mappings = mapping::Mappings::new(0);
    let (_own, fd) = mapping::Mapping::create("test", 4096).unwrap();
    let open = |writable| mappings.open(&fd, 4096, writable).unwrap();
    let (a, b, read_only) = (open(true), open(true), open(false));
    assert!(Arc::ptr_eq(&a, &b) && !Arc::ptr_eq(&a, &read_only));
    drop((a, b));
    assert!(Arc::ptr_eq(&open(false), &read_only));
    assert_eq!(open(true).len(), 4096, "mapped anew");
    assert!(mappings.open(&fd, 4097, false).is_err());
}

#[test]
fn keys_are_given_back() {
    let transport = Shm::new().unwrap();
    let memory = Memory::new("test", 64).unwrap();
    let keys: std::collections::HashSet<_> =
        (0..10_000).map(|_| transport.register(&memory, Access::RemoteWrite).unwrap().remote().key).collect();
    assert_eq!(keys.len(), 10_000, "a key is not used again soon");
    assert_eq!(transport.0.registry.offers().unwrap().len(), 0);
}
