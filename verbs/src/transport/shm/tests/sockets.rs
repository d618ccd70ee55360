//! Listening and connecting: stale sockets, strangers, refusals.

use std::os::unix::net::UnixDatagram;

use super::*;

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
pub(super) fn stranger(path: &PathBuf) -> std::os::fd::OwnedFd {
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
        region_bytes: 64,
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
                wire::send(&socket, bytes, fds, None).unwrap();
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
