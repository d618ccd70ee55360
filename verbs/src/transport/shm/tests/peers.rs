//! Peers that leave, die, or write what they should not.

use super::*;

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

#[test]
fn a_killed_peer_is_noticed_at_once() {
    if let Some(address) = argument() {
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
    let mut process =
        program("peers::a_killed_peer_is_noticed_at_once", &address.to_string()).spawn().unwrap();
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
