//! How connections of the `rdma` provider are made and end, on the two soft-RoCE devices that `ci/soft-roce` makes: strangers at the door, peers
//! who stop half-way, offers over other channels, addresses that come and go.
//!
//! Run by `ci/soft-roce-suite`. A plain `cargo test` leaves it out; where it runs and there is no device, it fails.

use std::{
    env,
    io::{Read, Write},
    net::{IpAddr, TcpStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use fervor_verbs::{
    Address, Error,
    fabric::Fabric,
    transport::{
        Attach, Completion, Connection, Endpoint, EndpointConfig, Listener, Payload, Post, Request,
        Transport,
        rdma::{Rdma, RdmaConnection, RdmaEndpoint, RdmaListener},
    },
};

const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of a message of the bootstrap.
const MESSAGE: usize = 168;

fn on(device: &str) -> Rdma {
    Rdma::on_device(device).unwrap_or_else(|error| panic!("{device}: {error}"))
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A server on rxe1 that listens.
fn listen(server: &Rdma) -> (RdmaListener, u16) {
    let listener =
        server.listen(&Address::Rdma { host: "10.7.0.2".into(), port: 0, from: None }).expect("listen");
    let Address::Rdma { port, .. } = *listener.address() else { panic!("not an rdma address") };
    (listener, port)
}

/// What a client on rxe0 connects to.
fn dial(port: u16) -> Address {
    Address::Rdma { host: "10.7.0.2".into(), port, from: Some("10.7.0.1".into()) }
}

/// Polls until `found` finds what it looks for.
fn poll_for<X>(
    endpoint: &mut RdmaEndpoint,
    limit: Duration,
    mut found: impl FnMut(&mut RdmaEndpoint, Completion) -> Option<X>,
) -> Option<X> {
    let begun = Instant::now();
    let mut seen = Vec::new();
    let mut result = None;
    while result.is_none() && begun.elapsed() < limit {
        endpoint.poll(&mut seen);
        for completion in seen.drain(..) {
            result = result.or(found(endpoint, completion));
        }
        thread::yield_now();
    }
    result
}

fn message(endpoint: &mut RdmaEndpoint) -> Vec<u8> {
    let found = poll_for(endpoint, PATIENCE, |endpoint, completion| {
        let Completion::Received { buffer, .. } = completion else { panic!("found {completion:?}") };
        let bytes = endpoint.message(&buffer).to_vec();
        endpoint.release(buffer);
        Some(bytes)
    });
    found.expect("a message")
}

fn send(connection: &mut RdmaConnection, words: &[u8]) {
    connection.post(Post::Send { payload: Payload::Inline(words), immediate: None, signal: None }).unwrap();
    connection.ring().unwrap();
}

/// A request as it goes over the socket.
fn request(offer: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; MESSAGE];
    bytes[..8].copy_from_slice(b"FVR\x02\x01\0\0\0");
    bytes[8..40].copy_from_slice(offer);
    bytes
}

/// A socket to the server, from the address of rxe0.
fn socket(port: u16) -> TcpStream {
    let socket =
        rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &std::net::SocketAddr::new(ip("10.7.0.1"), 0)).unwrap();
    rustix::net::connect(&socket, &std::net::SocketAddr::new(ip("10.7.0.2"), port)).unwrap();
    let socket = TcpStream::from(socket);
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn answer(socket: &mut TcpStream) -> (u8, Vec<u8>) {
    let mut bytes = [0; MESSAGE];
    socket.read_exact(&mut bytes).expect("an answer");
    let length = usize::from(u16::from_le_bytes([bytes[6], bytes[7]]));
    (bytes[4], bytes[8..40 + length].to_vec())
}

/// Offers may travel over any channel: bytes in, bytes out.
#[test]
fn offers_travel_over_any_channel() {
    let (client, server) = (on("rxe0"), on("rxe1"));
    let config = EndpointConfig::default();
    let (mut asks, mut answers) = (client.endpoint(&config).unwrap(), server.endpoint(&config).unwrap());
    let mut asking = client.join(&asks.attach(), ip("10.7.0.1")).unwrap();
    let mut answering = server.join(&answers.attach(), ip("10.7.0.2")).unwrap();
    answering.answer(&asking.offer()).unwrap();
    let answer = answering.offer();
    let mut to_client = answering.connection();
    // Before the other end can receive: it is held.
    send(&mut to_client, b"early");
    thread::sleep(Duration::from_millis(50));
    asking.finish(&answer).unwrap();
    let mut to_server = asking.connection();
    send(&mut to_server, b"hello");
    assert_eq!(message(&mut answers), b"hello");
    let mut seen = Vec::new();
    assert_eq!(asks.poll(&mut seen), 0, "{seen:?}");
    to_client.peer_is_ready();
    assert_eq!(message(&mut asks), b"early");
    // The one that keeps the channel says when it ends.
    to_client.disconnect();
    to_server.disconnect();
    for endpoint in [&mut asks, &mut answers] {
        let over = poll_for(endpoint, PATIENCE, |_, found| {
            matches!(found, Completion::Disconnected { .. }).then_some(())
        });
        assert!(over.is_some());
    }
}

#[test]
fn a_wrong_offer_is_an_error_that_names_the_field_and_costs_nothing() {
    let server = on("rxe1");
    let endpoint = server.endpoint(&EndpointConfig { connections: 1, ..EndpointConfig::default() }).unwrap();
    for (byte, value, field) in [
        (0, 9, "network"),
        (0, 4, "RoCE v2 over IPv6"),
        (1, 7, "MTU"),
        (2, 0, "READs"),
        (11, 1, "queue pair"),
    ] {
        let mut joining = server.join(&endpoint.attach(), ip("10.7.0.2")).unwrap();
        let mut offer = joining.offer();
        offer[byte] = value;
        let said = joining.answer(&offer).unwrap_err().to_string();
        assert!(said.contains(field), "byte {byte} = {value}: {said}");
    }
    assert!(server.join(&endpoint.attach(), ip("10.7.0.2")).is_ok(), "its place is free again");
}

/// Both ends must use the same kind of address; the error says both.
#[test]
fn different_kinds_of_addresses_are_refused_with_both() {
    // Index 0 is the address of the link, of IPv6.
    let fabric = Fabric { gid_index: Some(0), ..Fabric::default() };
    let (client, server) = (Rdma::with_fabric(Some("rxe0"), fabric).unwrap(), on("rxe1"));
    let (mut listener, port) = listen(&server);
    let (endpoint, accepting) = (
        client.endpoint(&EndpointConfig::default()).unwrap(),
        server.endpoint(&EndpointConfig::default()).unwrap(),
    );
    thread::scope(|scope| {
        scope.spawn(|| {
            let request = listener.accept(PATIENCE).unwrap().expect("a request");
            request.accept(&accepting.attach(), b"").map(drop).expect_err("kinds differ");
        });
        let error =
            client.connect(&endpoint.attach(), &dial(port), b"", PATIENCE).map(drop).unwrap_err().to_string();
        assert!(error.contains("over IPv4") && error.contains("over IPv6"), "{error}");
    });
}

/// A peer that asks and never says that it is ready: `accept` does not wait for it, others connect meanwhile, and its connection ends.
#[test]
fn a_peer_that_withholds_its_last_step_holds_up_nobody() {
    let (client, server) = (on("rxe0"), on("rxe1"));
    let (mut listener, port) = listen(&server);
    let mut accepting = server.endpoint(&EndpointConfig::default()).unwrap();
    let mut endpoint = client.endpoint(&EndpointConfig::default()).unwrap();
    let joining = client.join(&endpoint.attach(), ip("10.7.0.1")).unwrap();
    let mut silent = socket(port);
    let mut half = socket(port);
    half.write_all(b"FVR").unwrap();
    silent.write_all(&request(&joining.offer())).unwrap();
    let begun = Instant::now();
    let asked = listener.accept(PATIENCE).unwrap().expect("a request");
    let mut held = asked.accept(&accepting.attach(), b"").unwrap();
    let (depth, took) = (held.room(), begun.elapsed());
    assert!(took < Duration::from_secs(2), "accepting took {took:?}");
    assert_eq!(answer(&mut silent).0, 2);
    for id in 0..depth as u64 {
        held.post(Post::Send { payload: Payload::Inline(b"held"), immediate: None, signal: Some(id) })
            .unwrap();
    }
    held.ring().unwrap();
    // Meanwhile another one connects.
    let attach = accepting.attach();
    let (mut to_server, _to_client) = thread::scope(|scope| {
        let accept = scope
            .spawn(|| listener.accept(PATIENCE).unwrap().expect("a request").accept(&attach, b"").unwrap());
        let to_server = client.connect(&endpoint.attach(), &dial(port), b"", PATIENCE).unwrap().0;
        (to_server, accept.join().unwrap())
    });
    send(&mut to_server, b"hello");
    assert_eq!(message(&mut accepting), b"hello");
    assert!(begun.elapsed() < Duration::from_secs(4), "others waited for {:?}", begun.elapsed());
    let mut works = 0;
    let over = poll_for(&mut accepting, PATIENCE, |_, found| match found {
        Completion::Work { connection, id, result } if connection == held.id() => {
            assert!(id == works && result.is_err(), "{id}: {result:?}");
            works += 1;
            None
        }
        Completion::Disconnected { connection, .. } if connection == held.id() => Some(()),
        other => panic!("found {other:?}"),
    });
    assert!(over.is_some() && works == depth as u64, "{works} of {depth}");
    assert!(begun.elapsed() > Duration::from_secs(4), "ended after {:?}", begun.elapsed());
    assert_eq!(endpoint.poll(&mut Vec::new()), 0);
}

/// A peer whose socket comes from the network of the device must offer the address that its socket comes from.
#[test]
fn an_address_that_is_not_the_socket_s_is_refused() {
    let (client, server) = (on("rxe0"), on("rxe1"));
    let (mut listener, port) = listen(&server);
    let (accepting, endpoint) = (
        server.endpoint(&EndpointConfig::default()).unwrap(),
        client.endpoint(&EndpointConfig::default()).unwrap(),
    );
    let joining = client.join(&endpoint.attach(), ip("10.7.0.1")).unwrap();
    let mut offer = joining.offer();
    offer[31] = 77;
    let mut stranger = socket(port);
    stranger.write_all(&request(&offer)).unwrap();
    let begun = Instant::now();
    let asked = listener.accept(PATIENCE).unwrap().expect("a request");
    let error = asked.accept(&accepting.attach(), b"").map(drop).unwrap_err().to_string();
    assert!(error.contains("10.7.0.77"), "{error}");
    let (kind, said) = answer(&mut stranger);
    assert_eq!(kind, 4);
    assert!(String::from_utf8_lossy(&said[32..]).contains("10.7.0.77"));
    assert!(begun.elapsed() < Duration::from_millis(900), "the kernel looked for it: {:?}", begun.elapsed());
}

/// An address that the device gets later can be listened at, and connected to: its table is read again when the device says so.
#[test]
fn addresses_that_come_later_are_found() {
    let server = on("rxe1");
    let change = |what: &str| {
        let status =
            Command::new("ip").args(["addr", what, "10.7.0.9/24", "dev", "v1"]).status().expect("run ip");
        assert!(status.success(), "ip addr {what}: {status}");
    };
    change("add");
    let listening = server.listen(&Address::Rdma { host: "10.7.0.9".into(), port: 0, from: None }).map(drop);
    let begun = Instant::now();
    while server.events().addresses_changed == 0 && begun.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(10));
    }
    let events = server.events();
    change("del");
    listening.expect("listen at the new address");
    assert!(events.addresses_changed > 0 && events.failures == 0, "{events:?}");
    // Gone again: it is nobody's.
    let error =
        server.listen(&Address::Rdma { host: "10.7.0.9".into(), port: 0, from: None }).map(drop).unwrap_err();
    assert!(matches!(error, Error::NoDevice { .. }), "{error}");
}

/// An endpoint that is dropped with connections in every state frees them all: its successors find as many places as there were.
#[test]
fn dropped_endpoints_give_everything_back() {
    let (client, server) = (on("rxe0"), on("rxe1"));
    let (mut listener, port) = listen(&server);
    for round in 0..30 {
        let mut accepting = server.endpoint(&EndpointConfig::default()).unwrap();
        let endpoint = client.endpoint(&EndpointConfig::default()).unwrap();
        let attach = accepting.attach();
        let (mut to_server, to_client) = thread::scope(|scope| {
            let accept = scope.spawn(|| {
                listener.accept(PATIENCE).unwrap().expect("a request").accept(&attach, b"").unwrap()
            });
            let to_server = client.connect(&endpoint.attach(), &dial(port), b"", PATIENCE).unwrap().0;
            (to_server, accept.join().unwrap())
        });
        send(&mut to_server, b"hello");
        if round % 3 == 0 {
            to_server.disconnect();
        }
        if round % 2 == 0 {
            accepting.poll(&mut Vec::new());
            attach.wake();
        }
        drop(endpoint);
        if round % 5 == 0 {
            drop(to_client);
        }
    }
}

/// How many connections a measurement makes.
fn how_many() -> usize {
    env::var("FERVOR_TEST_CONNECTIONS").map_or(1000, |text| text.parse().expect("a number"))
}

/// Memory that is free, KiB.
fn free() -> i64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|line| line.starts_with("MemFree")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// An endpoint at each end for connections of which one end only serves READs.
fn two_ends(client: &Rdma, server: &Rdma, number: usize) -> (RdmaEndpoint, RdmaEndpoint) {
    let config = EndpointConfig {
        receive_buffers: 8,
        send_depth: 1,
        read_depth: 16,
        connections: number,
        ..EndpointConfig::default()
    };
    (client.endpoint(&config).unwrap(), server.endpoint(&config).unwrap())
}

fn print_memory(number: usize, took: Duration, before: i64, how: &str) {
    let kib = (before - free()) as f64 / (2 * number) as f64;
    println!(
        "{number} connections {how} in {took:?}: {:?} each; {kib:.1} KiB each at each end",
        took / number as u32
    );
}

/// Waits until all connections have ended, and prints how long that took.
fn end_all(endpoints: [&mut RdmaEndpoint; 2], number: usize) {
    let begun = Instant::now();
    for endpoint in endpoints {
        let mut ended = 0;
        poll_for(endpoint, PATIENCE * 3, |_, completion| {
            ended += usize::from(matches!(completion, Completion::Disconnected { .. }));
            (ended == number).then_some(())
        })
        .expect("the ends");
    }
    println!("their ends took {:?}", begun.elapsed());
}

/// Prints how long connections take, one after the other, and the memory that each takes with its socket.
#[test]
#[ignore = "a measurement: run it by name"]
fn a_thousand_connections() {
    let (client, server, number) = (on("rxe0"), on("rxe1"), how_many());
    let (mut listener, port) = listen(&server);
    let (mut asks, mut answers) = two_ends(&client, &server, number);
    let (before, begun) = (free(), Instant::now());
    let attach = answers.attach();
    let connections = thread::scope(|scope| {
        let accept = scope.spawn(|| {
            let one =
                |_| listener.accept(PATIENCE).unwrap().expect("a request").accept(&attach, b"").unwrap();
            (0..number).map(one).collect::<Vec<_>>()
        });
        let one = |_| client.connect(&asks.attach(), &dial(port), b"", PATIENCE).unwrap().0;
        ((0..number).map(one).collect::<Vec<_>>(), accept.join().unwrap())
    });
    print_memory(number, begun.elapsed(), before, "with sockets");
    drop(connections);
    end_all([&mut asks, &mut answers], number);
}

/// The same of connections whose offers travel over a channel that they share.
#[test]
#[ignore = "a measurement: run it by name"]
fn a_thousand_connections_without_sockets() {
    let (client, server, number) = (on("rxe0"), on("rxe1"), how_many());
    let (mut asks, mut answers) = two_ends(&client, &server, number);
    let (before, begun) = (free(), Instant::now());
    let one = |_| {
        let mut asking = client.join(&asks.attach(), ip("10.7.0.1")).unwrap();
        let mut answering = server.join(&answers.attach(), ip("10.7.0.2")).unwrap();
        answering.answer(&asking.offer()).unwrap();
        asking.finish(&answering.offer()).unwrap();
        let ends = (asking.connection(), answering.connection());
        ends.1.peer_is_ready();
        ends
    };
    let connections: Vec<_> = (0..number).map(one).collect();
    print_memory(number, begun.elapsed(), before, "without sockets");
    drop(connections);
    end_all([&mut asks, &mut answers], number);
}
