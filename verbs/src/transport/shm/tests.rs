//! What the conformance suite cannot say of all providers: sockets, strangers, processes, corrupt peers.

use std::{
    collections::VecDeque,
    os::unix::net::UnixDatagram,
    path::PathBuf,
    process::{Child, Command},
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use super::*;
use crate::transport::{
    Attach, Completion, Connection, Endpoint, Listener, Payload, PostError, Region, RemoteAddress,
    RemoteRegion, Request, Sge, WorkError,
};

const PATIENCE: Duration = Duration::from_secs(10);

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
        assert_eq!(a.connection.room(), config.send_depth);
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
fn a_dropped_connection_delivers_what_was_sent_and_then_its_end() {
    let (mut a, b) = pair(&EndpointConfig { receive_buffers: 1, ..EndpointConfig::default() });
    let mut b_connection = b.connection;
    for n in 0..20 {
        b_connection.send(Payload::Inline(&[n]), None, None).unwrap();
    }
    // Not even a ring.
    drop(b_connection);
    for n in 0..20 {
        assert_eq!(a.message(), [n]);
    }
    assert_eq!(a.disconnected(), WorkError::Disconnected);
    assert!(a.silent());
    assert_eq!(a.connection.send(Payload::Inline(b""), None, None), Err(PostError::Disconnected));
    drop((b.endpoint, b.transport));
}

#[test]
fn the_end_of_a_peer_is_reported_even_if_its_messages_find_no_buffer() {
    let (mut a, b) = pair(&EndpointConfig { receive_buffers: 0, ..EndpointConfig::default() });
    let mut b_connection = b.connection;
    b_connection.send(Payload::Inline(b"x"), None, None).unwrap();
    drop(b_connection);
    let start = Instant::now();
    assert_eq!(a.disconnected(), WorkError::Disconnected);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
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
    use std::os::fd::AsFd;
    let fd = exclusive.memory().as_fd().try_clone_to_owned().unwrap();
    assert!(mapping::Mapping::open(&fd, 1, true).is_err());
    assert!(mapping::Mapping::open(&fd.as_fd().try_clone_to_owned().unwrap(), 1, false).is_ok());
}

#[test]
fn connections_to_one_peer_share_their_mappings() {
    let mappings = mapping::Mappings::default();
    let (_own, fd) = mapping::Mapping::create("test", 4096).unwrap();
    let open = |writable| mapping::Mapping::open_shared(&mappings, &fd, 4096, writable).unwrap();
    let (a, b, read_only) = (open(true), open(true), open(false));
    assert!(Arc::ptr_eq(&a, &b) && !Arc::ptr_eq(&a, &read_only));
    drop((a, b));
    assert!(Arc::ptr_eq(&open(false), &read_only));
    assert_eq!(open(true).len(), 4096, "mapped anew");
    assert!(mapping::Mapping::open_shared(&mappings, &fd, 4097, false).is_err());
}

#[test]
fn keys_are_given_back() {
    let transport = Shm::new().unwrap();
    let memory = Memory::new("test", 64).unwrap();
    let keys: std::collections::HashSet<_> =
        (0..10_000).map(|_| transport.register(&memory, Access::RemoteWrite).unwrap().remote().key).collect();
    assert_eq!(keys.len(), 10_000, "a key is not used again soon");
    assert_eq!(transport.0.registry.offers().len(), 0);
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let (address, path) = socket();
    let transport = Shm::new().unwrap();
    // A datagram socket that is closed leaves a file that refuses connections, as a killed server does.
    drop(UnixDatagram::bind(&path).unwrap());
    let listener = transport.listen(&address).unwrap();
    let error = transport.listen(&address).err().unwrap();
    assert!(matches!(&error, Error::AddressInUse { address: a } if *a == address.to_string()), "{error}");
    drop(listener);
    assert!(!path.exists(), "the listener removes its file");
    std::fs::write(&path, "precious").unwrap();
    let error = transport.listen(&address).err().unwrap().to_string();
    assert!(error.contains("no socket") && error.contains(path.to_str().unwrap()), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    std::fs::remove_file(&path).unwrap();
    let long = Address::Shm(format!("/tmp/{}", "x".repeat(120)).into());
    assert!(matches!(transport.listen(&long).err(), Some(Error::BadAddress { .. })));
    let other = Address::Sim("a".to_owned());
    assert!(matches!(transport.listen(&other).err(), Some(Error::WrongProvider { .. })));
}

#[test]
fn nobody_there_is_an_error_and_silence_a_timeout() {
    let (address, path) = socket();
    let transport = Shm::new().unwrap();
    let endpoint = transport.endpoint(&EndpointConfig { connections: 1, ..Default::default() }).unwrap();
    let connect =
        |data: &[u8], timeout| transport.connect(&endpoint.attach(), &address, data, timeout).unwrap_err();
    let error = connect(b"", PATIENCE);
    assert!(
        matches!(&error, Error::Unreachable { reason, .. } if reason.contains("No such file")),
        "{error}"
    );
    drop(UnixDatagram::bind(&path).unwrap());
    let error = connect(b"", PATIENCE);
    assert!(matches!(&error, Error::Unreachable { reason, .. } if reason.contains("refused")), "{error}");
    let listener = transport.listen(&address).unwrap();
    let error = connect(b"", Duration::from_millis(20));
    assert!(matches!(&error, Error::Timeout { .. }), "{error}");
    assert!(matches!(connect(&[0; 49], PATIENCE), Error::Limit { value: 49, limit: 48, .. }));
    drop(listener);
}

#[test]
fn refusals_carry_their_data_and_free_the_seat() {
    let (address, _) = socket();
    let transport = Shm::new().unwrap();
    let config = EndpointConfig { connections: 1, ..EndpointConfig::default() };
    let (mut client, server) = (transport.endpoint(&config).unwrap(), transport.endpoint(&config).unwrap());
    let mut listener = transport.listen(&address).unwrap();
    let attach = client.attach();
    let mut accepted = Vec::new();
    for turn in 0..5 {
        let result = std::thread::scope(|scope| {
            let connecting = scope.spawn(|| transport.connect(&attach, &address, &[7; 48], PATIENCE));
            let request = listener.accept(PATIENCE).unwrap().unwrap();
            assert_eq!(request.private_data(), [7; 48]);
            match turn {
                0 => request.reject(&[5; 128]),
                1 => drop(request),
                2 => accepted.push(request.accept(&server.attach(), b"").unwrap()),
                _ => {
                    // The only place of the server is taken.
                    let error = request.accept(&server.attach(), b"").unwrap_err();
                    assert!(matches!(error, Error::Limit { limit: 1, .. }), "{error}");
                }
            }
            connecting.join().unwrap()
        });
        match turn {
            0 => assert!(
                matches!(result, Err(Error::Refused { private_data, .. }) if private_data == [5; 128])
            ),
            2 => {
                let error = transport.connect(&attach, &address, b"", PATIENCE).unwrap_err();
                assert!(matches!(error, Error::Limit { limit: 1, .. }), "{error}");
                drop(result);
                // The place is free when the end has been polled.
                assert!(matches!(next(&mut client), Completion::Disconnected { .. }));
            }
            _ => {
                assert!(matches!(result, Err(Error::Refused { private_data, .. }) if private_data.is_empty()))
            }
        }
    }
}

#[test]
fn nothing_is_written_after_the_end() {
    const SHUT: usize = 256;
    for _ in 0..50 {
        let (mut a, mut b) = pair(&EndpointConfig::default());
        b.connection.disconnect();
        assert_eq!(b.disconnected(), WorkError::Disconnected);
        b.region.memory().store(0, 0);
        // Whether or not this side has noticed.
        let result = a.connection.write(Payload::Inline(&[1; 8]), a.remote.at(0), None, Some(1));
        assert_eq!(result, Err(PostError::Disconnected));
        assert_eq!(b.region.memory().load(0), 0);
    }
    // It has not noticed, for certain.
    let (mut a, b) = pair(&EndpointConfig::default());
    a.connection.poison_outbox(SHUT, 1);
    let result = a.connection.write(Payload::Inline(&[1; 8]), a.remote.at(0), None, Some(1));
    assert_eq!(result, Err(PostError::Disconnected));
    assert_eq!(b.region.memory().load(0), 0);
}

#[test]
fn the_end_does_not_wait_for_ever_for_a_peer_that_died_in_a_write() {
    const WRITING: usize = 8;
    let (a, mut b) = pair(&EndpointConfig::default());
    a.connection.poison_outbox(WRITING, 1);
    b.connection.disconnect();
    let start = Instant::now();
    assert_eq!(b.disconnected(), WorkError::Disconnected);
    let waited = start.elapsed();
    assert!(waited > Duration::from_millis(500) && waited < Duration::from_secs(2), "{waited:?}");
}

#[test]
fn of_two_servers_that_find_a_stale_socket_one_wins() {
    for _ in 0..50 {
        let (address, path) = socket();
        drop(UnixDatagram::bind(&path).unwrap());
        let transport = Shm::new().unwrap();
        let listeners: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| transport.listen(&address))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(listeners.iter().filter(|listener| listener.is_ok()).count(), 1);
        assert!(path.exists());
    }
}

/// A socket connected to the listener, to say anything over.
fn stranger(path: &PathBuf) -> std::os::fd::OwnedFd {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    socket
}

#[test]
fn strangers_do_not_disturb_a_listener() {
    use std::os::fd::AsFd;
    let (address, path) = socket();
    let transport = Shm::new().unwrap();
    let mut endpoint = transport.endpoint(&EndpointConfig::default()).unwrap();
    let mut listener = transport.listen(&address).unwrap();
    let (_bell, bell_file) = bell::Page::create().unwrap();
    let hello = wire::Opening {
        kind: wire::Kind::Hello,
        slot: 0,
        regions: 1,
        receive_size: 64,
        receive_buffers: 1,
        send_depth: 1,
        data: b"x".to_vec(),
    };
    let good = hello.encode();
    let mut record = Vec::new();
    wire::RegionRecord { key: 1, writable: true, base: 0, length: 64 }.encode(&mut record);
    // A file that can shrink, and one that is shorter than it claims to be.
    let unsealed = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    let (_, short) = mapping::Mapping::create("test", 63).unwrap();
    let regular = std::fs::File::open("/proc/self/exe").unwrap();
    let (regular_fd, unsealed_fd, short_fd) = ([regular.as_fd()], [unsealed.as_fd()], [short.as_fd()]);
    let (bell, none) = ([bell_file.as_fd()], []);
    type Said<'a> = (&'a [u8], &'a [std::os::fd::BorrowedFd<'a>]);
    let dialogues: Vec<Vec<Said<'_>>> = vec![
        vec![],
        vec![(b"GET / HTTP/1.1", &none)],
        vec![(&good[..good.len() - 1], &bell)],
        vec![(&good, &none)],
        vec![(&good, &regular_fd)],
        vec![(&good, &bell)],
        vec![(&good, &bell), (&record[..20], &bell)],
        vec![(&good, &bell), (&record, &none)],
        vec![(&good, &bell), (&record, &unsealed_fd)],
        vec![(&good, &bell), (&record, &short_fd)],
        vec![(&good, &bell), (&record, &regular_fd)],
    ];
    let mut silent = Vec::new();
    for dialogue in &dialogues {
        for stays in [false, true] {
            let socket = stranger(&path);
            for (bytes, fds) in dialogue {
                wire::send(&socket, bytes, fds).unwrap();
                assert!(listener.accept(Duration::ZERO).unwrap().is_none());
            }
            if stays {
                silent.push(socket);
            }
        }
    }
    let attach = endpoint.attach();
    let (accepted, connected) = std::thread::scope(|scope| {
        let connecting = scope.spawn(|| transport.connect(&attach, &address, b"real", PATIENCE).unwrap().0);
        let request = listener.accept(PATIENCE).unwrap().unwrap();
        assert_eq!(request.private_data(), b"real");
        (request.accept(&attach, b"").unwrap(), connecting.join().unwrap())
    });
    assert_ne!(accepted.id(), connected.id());
    let mut connected = connected;
    connected.send(Payload::Inline(b"x"), None, None).unwrap();
    connected.ring().unwrap();
    assert!(
        matches!(next(&mut endpoint), Completion::Received { connection, .. } if connection == accepted.id())
    );
}

#[test]
fn a_peer_that_corrupts_the_ring_loses_the_connection_and_no_more() {
    const TAIL: usize = 0;
    const HEAD: usize = 128;
    // What the peer writes into its outgoing ring: (offset, value).
    let of_the_sender: [&[(usize, u64)]; 6] = [
        &[(TAIL, u64::MAX)],
        &[(TAIL, 8)],
        &[(TAIL, 1 << 40)],
        &[(mapping::PAGE, 0), (TAIL, 16)],
        &[(mapping::PAGE, 9 << 32), (TAIL, 16)],
        // A length beyond what is published, and one beyond the receive buffer.
        &[(mapping::PAGE, 100 | 1 << 32), (TAIL, 16)],
    ];
    for writes in of_the_sender {
        let (a, mut b) = pair(&EndpointConfig::default());
        let mut connection = a.connection;
        // The bell rings for a message, which then turns out to be something else.
        connection.send(Payload::Inline(b""), None, None).unwrap();
        for &(offset, value) in writes {
            connection.poison_outbox(offset, value);
        }
        connection.ring().unwrap();
        assert_eq!(b.disconnected(), WorkError::RemoteInvalid, "{writes:?}");
        assert!(b.silent());
    }
    // The receiver's index, which the sender believes when it seeks room.
    for head in [u64::MAX, 1 << 40, 8] {
        let (mut a, _b) = pair(&EndpointConfig { send_depth: 100_000, ..EndpointConfig::default() });
        a.connection.poison_outbox(HEAD, head);
        let error = loop {
            if let Err(error) = a.connection.send(Payload::Gather(&piece(&a.region, 0, 4096)), None, None) {
                break error;
            }
        };
        assert_eq!(error, PostError::Disconnected);
        let mut all = Vec::new();
        a.endpoint.poll(&mut all);
        assert!(
            matches!(all[..], [Completion::Disconnected { cause: WorkError::RemoteInvalid, .. }]),
            "{head}: {all:?}"
        );
    }
}

/// This test as another process, which connects, says hello, and then does nothing for ever.
fn child(test: &str, address: &Address) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("transport::shm::tests::{test}"), "--nocapture"])
        .env(CHILD, address.to_string())
        .spawn()
        .unwrap()
}

const CHILD: &str = "FERVOR_TEST_CHILD_CONNECTS_TO";

#[test]
fn a_killed_peer_is_noticed_at_once() {
    if let Ok(address) = std::env::var(CHILD) {
        let transport = Shm::new().unwrap();
        let endpoint = transport.endpoint(&EndpointConfig::default()).unwrap();
        let memory = Memory::new("child", 4096).unwrap();
        memory.write(0, b"in the child");
        let region = transport.register(&memory, Access::RemoteWrite).unwrap();
        let address = address.parse().unwrap();
        let (mut connection, _) =
            transport.connect(&endpoint.attach(), &address, b"child", PATIENCE).unwrap();
        let RemoteRegion { address, length, key } = region.remote();
        let hello = [address.to_le_bytes(), length.to_le_bytes(), u64::from(key).to_le_bytes()].concat();
        connection.send(Payload::Inline(&hello), None, None).unwrap();
        connection.ring().unwrap();
        loop {
            std::thread::park();
        }
    }
    let (address, _) = socket();
    let transport = Shm::new().unwrap();
    let mut endpoint = transport.endpoint(&EndpointConfig::default()).unwrap();
    let mut listener = transport.listen(&address).unwrap();
    let target = transport.register(&Memory::new("target", 4096).unwrap(), Access::Local).unwrap();
    let mut process = child("a_killed_peer_is_noticed_at_once", &address);
    let request = listener.accept(PATIENCE).unwrap().unwrap();
    assert_eq!(request.private_data(), b"child");
    let mut connection = request.accept(&endpoint.attach(), b"").unwrap();
    let Completion::Received { buffer, .. } = next(&mut endpoint) else { panic!() };
    let word = |at| u64::from_le_bytes(endpoint.message(&buffer)[at..at + 8].try_into().unwrap());
    let remote = RemoteRegion { address: word(0), length: word(8), key: word(16) as u32 };
    endpoint.release(buffer);
    connection.read(&piece(&target, 0, 12), remote.at(0), Some(1)).unwrap();
    connection.ring().unwrap();
    assert!(matches!(next(&mut endpoint), Completion::Work { id: 1, result: Ok(()), .. }));
    let mut bytes = [0; 12];
    target.memory().read(0, &mut bytes);
    assert_eq!(&bytes, b"in the child");

    process.kill().unwrap();
    let start = Instant::now();
    assert!(matches!(next(&mut endpoint), Completion::Disconnected { cause: WorkError::Disconnected, .. }));
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    process.wait().unwrap();
    assert_eq!(connection.read(&piece(&target, 0, 12), remote.at(0), Some(1)), Err(PostError::Disconnected));
}
