//! Connecting: private data, refusals, addresses.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use super::{
    Rig, Side,
    pair::{Background, Host, PATIENCE, Pair},
};
use crate::{
    address::Address,
    error::Error,
    transport::{
        Completion, Connection, Endpoint, EndpointConfig, LaneSpec, Listener, MAX_REPLY_DATA,
        MAX_REQUEST_DATA, Payload, Request, Runtime, Transport,
    },
};

fn host<R: Rig>(rig: &R, side: Side) -> Host<R::Transport> {
    Host::new(rig.host(side), &EndpointConfig::default())
}

/// Bytes of which none is the zero that padding is made of, and some are.
fn data(len: usize, zeros: bool) -> Vec<u8> {
    (0..len).map(|i| if zeros && i + 3 > len { 0 } else { i as u8 | 1 }).collect()
}

/// Expects that the connection ends at this host.
fn ends<T: Transport>(host: &mut Host<T>) {
    let deadline = host.transport.now() + PATIENCE;
    let mut turn = 0;
    loop {
        host.poll();
        match host.take() {
            Some(Completion::Disconnected { .. }) => return,
            Some(other) => panic!("expected the end of the connection, found {other:?}"),
            None => {
                assert!(host.transport.now() < deadline, "waited {PATIENCE:?} for the end of a connection")
            }
        }
        host.transport.relax(turn);
        turn += 1;
    }
}

pub(super) fn private_data<R: Rig>(rig: &R) {
    let (mut client, server) = (host(rig, Side::Client), host(rig, Side::Server));
    let mut listener = server.transport.listen(&rig.address(0)).expect("listen");
    let address = rig.dial(listener.address());
    let cases: Vec<(usize, usize, bool)> = (0..=MAX_REQUEST_DATA)
        .map(|len| (len, MAX_REPLY_DATA - len, len % 2 == 0))
        .chain((0..=MAX_REPLY_DATA).map(|len| (len % (MAX_REQUEST_DATA + 1), len, len % 2 == 1)))
        .collect();
    let expected = cases.clone();
    let attach = server.endpoint.attach();
    let acceptor = Background::start(&server.transport.clone(), move || {
        let mut server = server;
        for (request_len, reply_len, zeros) in expected {
            let request = listener.accept(PATIENCE).expect("accept").expect("nobody connects");
            assert_eq!(request.private_data(), data(request_len, zeros));
            let connection = request.accept(&attach, &data(reply_len, zeros)).expect("accept");
            ends(&mut server);
            drop(connection);
        }
    });
    for (request_len, reply_len, zeros) in cases {
        let attach = client.endpoint.attach();
        let (mut connection, reply) = client
            .transport
            .connect(&attach, &address, &data(request_len, zeros), PATIENCE)
            .expect("connect");
        assert_eq!(reply, data(reply_len, zeros));
        connection.disconnect();
        ends(&mut client);
    }
    acceptor.join();
}

pub(super) fn refusals<R: Rig>(rig: &R) {
    let (client, server) = (host(rig, Side::Client), rig.host(Side::Server));
    let mut listener = server.listen(&rig.address(0)).expect("listen");
    let address = rig.dial(listener.address());
    let refuser = Background::start(&server, move || {
        for len in 0..=MAX_REPLY_DATA {
            let request = listener.accept(PATIENCE).expect("accept").expect("nobody connects");
            request.reject(&data(len, len % 2 == 0));
        }
    });
    for len in 0..=MAX_REPLY_DATA {
        match client.transport.connect(&client.endpoint.attach(), &address, b"please", PATIENCE) {
            Err(Error::Refused { private_data, .. }) => assert_eq!(private_data, data(len, len % 2 == 0)),
            other => panic!("expected a refusal with {len} bytes, found {:?}", other.map(|_| "a connection")),
        }
    }
    refuser.join();
}

pub(super) fn dropped_request<R: Rig>(rig: &R) {
    let (client, server) = (host(rig, Side::Client), rig.host(Side::Server));
    let mut listener = server.listen(&rig.address(0)).expect("listen");
    let address = rig.dial(listener.address());
    let dropper = Background::start(&server, move || {
        drop(listener.accept(PATIENCE).expect("accept").expect("nobody connects"));
        listener
    });
    match client.transport.connect(&client.endpoint.attach(), &address, b"please", PATIENCE) {
        Err(Error::Refused { private_data, .. }) => assert_eq!(private_data, []),
        other => panic!("expected a refusal, found {:?}", other.map(|_| "a connection")),
    }
    dropper.join();
}

pub(super) fn nobody_listens<R: Rig>(rig: &R) {
    let (client, server) = (host(rig, Side::Client), rig.host(Side::Server));
    let never = rig.address(0);
    // Somebody did listen there, but does no more.
    let listener = server.listen(&rig.address(1)).expect("listen");
    let once = listener.address().clone();
    drop(listener);
    for address in [never, once] {
        let begun = client.transport.now();
        let dial = rig.dial(&address);
        match client.transport.connect(&client.endpoint.attach(), &dial, b"", PATIENCE) {
            Err(error @ Error::Unreachable { .. }) => {
                assert!(error.to_string().contains(&dial.to_string()), "{error}");
            }
            other => panic!("expected Unreachable, found {:?}", other.map(|_| "a connection")),
        }
        let took = client.transport.now() - begun;
        assert!(took < Duration::from_secs(5), "it took {took:?} to find that nobody listens");
    }
}

pub(super) fn address_in_use<R: Rig>(rig: &R) {
    let server = rig.host(Side::Server);
    let address = rig.address(0);
    let listener = server.listen(&address).expect("listen");
    assert_eq!(listener.address(), &address);
    for _ in 0..2 {
        match server.listen(&address) {
            Err(Error::AddressInUse { address: found }) => assert_eq!(found, address.to_string()),
            other => panic!("expected AddressInUse, found {:?}", other.map(|_| "a listener")),
        }
    }
    let second = server.listen(&rig.address(1)).expect("listen elsewhere");
    drop(listener);
    let again = server.listen(&address).expect("listen where nobody does any more");
    drop((second, again));
}

pub(super) fn wrong_provider<R: Rig>(rig: &R) {
    let client = host(rig, Side::Client);
    let own = rig.address(0);
    for url in ["shm:///nowhere", "rdma://127.0.0.1:1", "tcp://127.0.0.1:1", "sim://nowhere"] {
        let address: Address = url.parse().expect("an address");
        if std::mem::discriminant(&address) == std::mem::discriminant(&own) {
            continue;
        }
        let wrong = |error: Error| match error {
            Error::WrongProvider { address: found, .. } => assert_eq!(found, url),
            other => panic!("expected WrongProvider for {url}, found {other}"),
        };
        wrong(client.transport.listen(&address).map(|_| ()).expect_err("listen"));
        let attach = client.endpoint.attach();
        wrong(client.transport.connect(&attach, &address, b"", PATIENCE).map(|_| ()).expect_err("connect"));
    }
}

pub(super) fn nobody_accepts<R: Rig>(rig: &R) {
    let (client, server) = (host(rig, Side::Client), rig.host(Side::Server));
    let listener = server.listen(&rig.address(0)).expect("listen");
    let address = rig.dial(listener.address());
    let begun = client.transport.now();
    let timeout = Duration::from_millis(300);
    match client.transport.connect(&client.endpoint.attach(), &address, b"", timeout) {
        Err(Error::Timeout { .. }) => (),
        other => panic!("expected Timeout, found {:?}", other.map(|_| "a connection")),
    }
    let took = client.transport.now() - begun;
    assert!(took >= timeout, "it gave up after {took:?}");
    assert!(took < timeout + Duration::from_secs(3), "it took {took:?} to give up");
}

pub(super) fn accept_times_out<R: Rig>(rig: &R) {
    let server = rig.host(Side::Server);
    let mut listener = server.listen(&rig.address(0)).expect("listen");
    for timeout in [Duration::ZERO, Duration::from_millis(30)] {
        let begun = server.now();
        assert!(listener.accept(timeout).expect("accept").is_none(), "a request from nobody");
        let took = server.now() - begun;
        assert!(took >= timeout && took < timeout + Duration::from_secs(3), "{timeout:?} took {took:?}");
    }
}

pub(super) fn full_endpoint<R: Rig>(rig: &R) {
    let config = EndpointConfig { connections: 2, ..EndpointConfig::default() };
    let mut pair = Pair::new(rig, &EndpointConfig::default(), &config);
    pair.connect();
    pair.connect();
    let mut listener = pair.server.transport.listen(&rig.address(1)).expect("listen");
    let address = rig.dial(listener.address());
    let attach = pair.server.endpoint.attach();
    let acceptor = Background::start(&pair.server.transport, move || {
        let request = listener.accept(PATIENCE).expect("accept").expect("nobody connects");
        match request.accept(&attach, b"welcome") {
            Err(Error::Limit { .. }) => (),
            other => panic!("expected Limit, found {:?}", other.map(|_| "a connection")),
        }
    });
    let attach = pair.client.endpoint.attach();
    match pair.client.transport.connect(&attach, &address, b"", PATIENCE) {
        Err(Error::Refused { private_data, .. }) => assert_eq!(private_data, []),
        other => panic!("expected a refusal, found {:?}", other.map(|_| "a connection")),
    }
    acceptor.join();
    // A place that becomes free can be taken again.
    let (client, server) = (pair.to_server[0].id(), pair.to_client[0].id());
    pair.to_server[0].disconnect();
    pair.end_of(Side::Client, client);
    pair.end_of(Side::Server, server);
    drop((pair.to_server.remove(0), pair.to_client.remove(0)));
    pair.connect();
    let newest = pair.to_client.last().expect("a connection").id();
    assert!(newest != server, "the id of a connection was used again");
    let end = pair.to_server.last_mut().expect("a connection");
    end.send(Payload::Inline(b"there is room"), None, None).expect("post");
    end.ring().expect("ring");
    assert_eq!(pair.message(Side::Server), (newest, b"there is room".to_vec(), None));
}

/// The accepting side may post as soon as it has accepted: nothing is lost, though the client may not have
/// returned from its call yet.
pub(super) fn server_posts_at_once<R: Rig>(rig: &R) {
    for round in 0..20_u8 {
        let (mut client, server) = (host(rig, Side::Client), host(rig, Side::Server));
        let mut listener = server.transport.listen(&rig.address(0)).expect("listen");
        let address = rig.dial(listener.address());
        let poster = Background::start(&server.transport.clone(), move || {
            let request = listener.accept(PATIENCE).expect("accept").expect("nobody connects");
            let mut connection = request.accept(&server.endpoint.attach(), b"").expect("accept");
            for i in 0..8 {
                connection.send(Payload::Inline(&[round, i]), None, None).expect("post");
            }
            connection.ring().expect("ring");
            (server, connection, listener)
        });
        let attach = client.endpoint.attach();
        let (connection, _) = client.transport.connect(&attach, &address, b"", PATIENCE).expect("connect");
        let deadline = client.transport.now() + PATIENCE;
        let (mut arrived, mut turn) = (0, 0);
        while arrived < 8 {
            client.poll();
            match client.take() {
                Some(Completion::Received { connection: of, buffer, .. }) => {
                    assert_eq!(of, connection.id());
                    assert_eq!(client.endpoint.message(&buffer), [round, arrived]);
                    client.endpoint.release(buffer);
                    arrived += 1;
                }
                Some(other) => panic!("expected a message, found {other:?}"),
                None => assert!(client.transport.now() < deadline, "message {arrived} is lost"),
            }
            client.transport.relax(turn);
            turn += 1;
        }
        poster.join();
    }
}

/// Connections go on without their listener.
pub(super) fn dropped_listener<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    pair.connect();
    pair.stop_listening();
    for round in 0..20_u8 {
        let side = if round % 2 == 0 { Side::Client } else { Side::Server };
        let end = pair.end(side);
        end.send(Payload::Inline(&[round]), None, Some(u64::from(round))).expect("post");
        end.ring().expect("ring");
        assert_eq!(pair.message(side.other()).1, [round]);
        pair.work(side, u64::from(round));
    }
    pair.silence();
}

pub(super) fn many_clients<R: Rig>(rig: &R) {
    const CLIENTS: u8 = 12;
    let server = host(rig, Side::Server);
    let mut listener = server.transport.listen(&rig.address(0)).expect("listen");
    let address = rig.dial(listener.address());
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (client, address) = (host(rig, Side::Client), address.clone());
            Background::start(&client.transport.clone(), move || {
                let attach = client.endpoint.attach();
                let (_, reply) =
                    client.transport.connect(&attach, &address, &[number; 40], PATIENCE).expect("connect");
                assert_eq!(reply, [number; 100], "the reply to another client");
            })
        })
        .collect();
    let attach = server.endpoint.attach();
    let mut connections = Vec::new();
    for _ in 0..CLIENTS {
        let request = listener.accept(PATIENCE).expect("accept").expect("nobody connects");
        let number = request.private_data()[0];
        assert_eq!(request.private_data(), [number; 40]);
        connections.push(request.accept(&attach, &[number; 100]).expect("accept"));
    }
    clients.into_iter().for_each(Background::join);
    connections.sort_by_key(Connection::id);
    connections.dedup_by_key(|connection| connection.id());
    assert_eq!(connections.len(), usize::from(CLIENTS), "two connections have the same id");
}

/// Connections that are asked for together come in their order, each with its own answer and its own depth.
pub(super) fn together<R: Rig>(rig: &R) {
    let (client, server) = (host(rig, Side::Client), host(rig, Side::Server));
    let mut listener = server.transport.listen(&rig.address(0)).expect("listen");
    let address = rig.dial(listener.address());
    let acceptor = Background::start(&server.transport.clone(), move || {
        let mut server = server;
        let mut accepted = Vec::new();
        for _ in 0..5 {
            let request = listener.accept(PATIENCE).expect("accept").expect("nobody connects");
            let asked = request.private_data().to_vec();
            let connection = request.accept(&server.endpoint.attach(), &[&asked[..], &asked].concat());
            accepted.push((asked, connection.expect("accept")));
        }
        // Each brings a message that says which one it is.
        let deadline = server.transport.now() + PATIENCE;
        let (mut seen, mut turn) = (0, 0);
        while seen < 5 {
            server.poll();
            match server.take() {
                Some(Completion::Received { connection, buffer, .. }) => {
                    let message = server.endpoint.message(&buffer).to_vec();
                    assert!(accepted.iter().any(|(asked, end)| *asked == message && end.id() == connection));
                    server.endpoint.release(buffer);
                    seen += 1;
                }
                Some(other) => panic!("expected a message, found {other:?}"),
                None => assert!(server.transport.now() < deadline, "{seen} messages came"),
            }
            server.transport.relax(turn);
            turn += 1;
        }
    });
    let attach = client.endpoint.attach();
    let asked: Vec<Vec<u8>> = (1..=5).map(|len| data(len, false)).collect();
    let lanes: Vec<_> =
        asked.iter().zip(1..).map(|(data, depth)| LaneSpec::new(&attach, data).with_depth(depth)).collect();
    let mut made = client.transport.connect_all(&address, &lanes, PATIENCE).expect("connect");
    assert_eq!(made.len(), 5);
    for ((connection, reply), lane) in made.iter_mut().zip(&lanes) {
        assert_eq!(reply[..], [lane.private_data, lane.private_data].concat());
        assert_eq!(connection.room(), lane.depth);
        connection.send(Payload::Inline(lane.private_data), None, None).expect("send");
        connection.ring().expect("ring");
    }
    acceptor.join();
    assert!(client.transport.connect_all(&address, &[], PATIENCE).expect("no connections").is_empty());
}

/// One is refused: none is there.
pub(super) fn all_or_none<R: Rig>(rig: &R) {
    let (mut client, server) = (host(rig, Side::Client), host(rig, Side::Server));
    let mut listener = server.transport.listen(&rig.address(0)).expect("listen");
    let address = rig.dial(listener.address());
    let done = Arc::new(AtomicBool::new(false));
    let stop = done.clone();
    let acceptor = Background::start(&server.transport.clone(), move || {
        let mut server = server;
        let mut accepted = Vec::new();
        // A provider may ask for those after the one that is refused, too.
        while !stop.load(Ordering::SeqCst) {
            match listener.accept(Duration::from_millis(20)).expect("accept") {
                Some(request) if request.private_data() == data(3, false) => request.reject(b"not this one"),
                Some(request) => {
                    accepted.push(request.accept(&server.endpoint.attach(), b"").expect("accept"));
                }
                None => {}
            }
        }
        assert!(accepted.len() >= 2, "{} were accepted before the one that was refused", accepted.len());
        accepted.iter().for_each(|_| ends(&mut server));
    });
    let attach = client.endpoint.attach();
    let asked: Vec<Vec<u8>> = (1..=4).map(|len| data(len, false)).collect();
    let lanes: Vec<_> = asked.iter().map(|data| LaneSpec::new(&attach, data)).collect();
    match client.transport.connect_all(&address, &lanes, PATIENCE) {
        Err(Error::Refused { private_data, .. }) => assert_eq!(private_data, b"not this one"),
        other => panic!("expected a refusal, found {:?}", other.map(|made| made.len())),
    }
    done.store(true, Ordering::SeqCst);
    // Those that had been made end here, too.
    let deadline = client.transport.now() + PATIENCE;
    while !acceptor.is_done() {
        client.poll();
        assert!(client.transport.now() < deadline, "waited {PATIENCE:?} for the ends");
        client.transport.relax(u32::MAX);
    }
    acceptor.join();
}
