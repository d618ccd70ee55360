//! What is particular to the `rdma` provider, on the two soft-RoCE devices that `ci/soft-roce` makes: devices, limits,
//! pinned memory, and networks that lose packets.
//!
//! Run by `ci/soft-roce-suite`. A plain `cargo test` leaves it out; where it runs and there is no device, it fails.

use std::{
    env,
    process::Command,
    sync::atomic::{AtomicU16, Ordering},
    thread,
    time::{Duration, Instant},
};

use fervor_verbs::{
    Address, Error, Exclusive, Memory,
    devices::{self, GidKind},
    transport::{
        Access, Completion, Connection, Endpoint, EndpointConfig, Export, Listener, Payload, Post, Region,
        Request, Sge, Transport, WorkError,
        rdma::{Rdma, RdmaConnection, RdmaEndpoint, RdmaRegion},
    },
};

const PATIENCE: Duration = Duration::from_secs(20);

fn on(device: &str) -> Rdma {
    Rdma::on_device(device).unwrap_or_else(|error| panic!("{device}: {error}"))
}

fn address(host: &str, port: u16, from: Option<&str>) -> Address {
    Address::Rdma { host: host.to_owned(), port, from: from.map(str::to_owned) }
}

fn free_port() -> u16 {
    static PORT: AtomicU16 = AtomicU16::new(30_000);
    PORT.fetch_add(1, Ordering::Relaxed)
}

/// A client on rxe0 and a server on rxe1, with a connection.
struct Two {
    client: RdmaEndpoint,
    server: RdmaEndpoint,
    to_server: RdmaConnection,
    to_client: RdmaConnection,
    own: RdmaRegion,
    theirs: RdmaRegion,
}

const REGION: usize = 1 << 20;

fn two() -> Two {
    let (client, server) = (on("rxe0"), on("rxe1"));
    let region =
        |transport: &Rdma, access| transport.register(&Memory::new("test", REGION).unwrap(), access).unwrap();
    let own = region(&client, Access::Local);
    let theirs = region(&server, Access::RemoteWrite);
    let config = EndpointConfig::default();
    let (client_end, server_end) = (client.endpoint(&config).unwrap(), server.endpoint(&config).unwrap());
    let mut listener = server.listen(&address("10.7.0.2", 0, None)).unwrap();
    let Address::Rdma { port, .. } = *listener.address() else { panic!("not an rdma address") };
    let (to_server, to_client) = thread::scope(|scope| {
        let connect = scope.spawn(|| {
            let to = address("10.7.0.2", port, Some("10.7.0.1"));
            client.connect(&client_end.attach(), &to, b"", PATIENCE).unwrap().0
        });
        let request = listener.accept(PATIENCE).unwrap().expect("a request");
        let to_client = request.accept(&server_end.attach(), b"").unwrap();
        (connect.join().unwrap(), to_client)
    });
    Two { client: client_end, server: server_end, to_server, to_client, own, theirs }
}

fn whole(region: &RdmaRegion, offset: usize, length: usize) -> Sge<'_, RdmaRegion> {
    Sge { region, offset, length }
}

/// Polls until `found` finds what it looks for, for at most `limit`.
fn poll_for<X>(
    endpoint: &mut RdmaEndpoint,
    limit: Duration,
    mut found: impl FnMut(Completion) -> Option<X>,
) -> Option<X> {
    let begun = Instant::now();
    let mut seen = Vec::new();
    while begun.elapsed() < limit {
        endpoint.poll(&mut seen);
        for completion in seen.drain(..) {
            if let Some(found) = found(completion) {
                return Some(found);
            }
        }
        thread::yield_now();
    }
    None
}

fn done(endpoint: &mut RdmaEndpoint, expected: u64) {
    let found = poll_for(endpoint, PATIENCE, |completion| match completion {
        Completion::Work { id, result, .. } if id == expected => Some(result),
        Completion::Work { .. } => None,
        other => panic!("expected the completion of {expected}, found {other:?}"),
    });
    assert_eq!(found, Some(Ok(())), "request {expected}");
}

/// A rule of `tc` on v1, the server's end of the wire, for as long as this lives.
struct Network;

impl Network {
    fn with(rule: &str) -> Self {
        let rule: Vec<&str> = rule.split(' ').collect();
        tc(&[&["qdisc", "replace", "dev", "v1", "root"], &rule[..]].concat());
        Self
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        tc(&["qdisc", "del", "dev", "v1", "root"]);
    }
}

fn tc(arguments: &[&str]) {
    let status = Command::new("tc").args(arguments).status().expect("run tc");
    assert!(status.success(), "tc {arguments:?}: {status}");
}

#[test]
fn the_devices_are_listed() {
    let devices = devices::list().unwrap();
    for (name, gid) in [("rxe0", "::ffff:10.7.0.1"), ("rxe1", "::ffff:10.7.0.2")] {
        let device = devices
            .iter()
            .find(|device| device.name == name)
            .unwrap_or_else(|| panic!("{name} is not listed"));
        let [port] = &device.ports[..] else { panic!("{name} has one port, not {:?}", device.ports) };
        assert_eq!((port.number, port.state.as_str(), port.link_layer.as_str()), (1, "ACTIVE", "Ethernet"));
        let found =
            port.gids.iter().find(|entry| entry.gid.to_string() == gid).expect("the GID of its address");
        assert_eq!(found.kind, GidKind::RoceV2);
        assert!(["v0", "v1"].contains(&found.interface.as_str()), "{found:?}");
        let capabilities = device.capabilities.as_ref().expect("libibverbs opens it");
        assert_eq!(capabilities.mtu, [4096]);
        assert!(capabilities.reads_served >= 16 && capabilities.completion_vectors >= 1, "{capabilities:?}");
    }
}

#[test]
fn the_address_chooses_the_device() {
    for (address, device) in [
        (address("10.7.0.1", 0, None), "rxe0"),
        (address("10.7.0.2", 0, None), "rxe1"),
        (address("10.7.0.2", 7, Some("10.7.0.1")), "rxe0"),
        (address("10.7.0.1", 7, Some("10.7.0.2")), "rxe1"),
    ] {
        assert_eq!(Rdma::for_address(&address).unwrap().device_name(), device, "{address}");
    }
    // A wildcard is of no device: then the first one.
    assert_eq!(Rdma::for_address(&address("0.0.0.0", 0, None)).unwrap().device_name(), "rxe0");
}

#[test]
fn what_is_not_there_is_named() {
    let error = Rdma::on_device("rxe7").unwrap_err();
    assert!(matches!(error, Error::NoDevice { .. }), "{error}");
    assert!(error.to_string().contains("`rxe7`") && error.to_string().contains("rxe0"), "{error}");
    // An address of the other device, and one of no device.
    for host in ["10.7.0.1", "192.0.2.1"] {
        let error = on("rxe1").listen(&address(host, 0, None)).unwrap_err();
        assert!(matches!(error, Error::NoDevice { .. }), "{error}");
        assert!(error.to_string().contains(host), "{error}");
    }
    // An address of nobody.
    let client = on("rxe0");
    let endpoint = client.endpoint(&EndpointConfig::default()).unwrap();
    let nobody = address("10.7.0.77", 1, Some("10.7.0.1"));
    match client.connect(&endpoint.attach(), &nobody, b"", Duration::from_secs(5)) {
        Err(Error::Unreachable { .. } | Error::Timeout { .. }) => (),
        other => panic!("expected Unreachable, found {:?}", other.map(|_| "a connection")),
    }
}

/// Without `?from=` the way to an address of this host does not leave its device.
#[test]
fn a_way_through_another_device_is_refused() {
    let (client, server) = (on("rxe0"), on("rxe1"));
    let endpoint = client.endpoint(&EndpointConfig::default()).unwrap();
    let error = client.connect(&endpoint.attach(), &address("10.7.0.2", 1, None), b"", PATIENCE).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("rxe0") && error.to_string().contains("?from="), "{error}");

    // The server listens everywhere, but works on rxe1.
    let port = free_port();
    let mut listener = server.listen(&address("0.0.0.0", port, None)).unwrap();
    thread::scope(|scope| {
        let accept = scope.spawn(|| listener.accept(Duration::from_secs(2)).unwrap().is_none());
        let error =
            client.connect(&endpoint.attach(), &address("10.7.0.1", port, None), b"", PATIENCE).unwrap_err();
        assert!(matches!(error, Error::Unreachable { .. }) && error.to_string().contains("rxe1"), "{error}");
        assert!(accept.join().unwrap(), "the user saw a request that came through another device");
    });
}

#[test]
fn what_the_device_cannot_hold_is_refused_with_both_numbers() {
    let transport = on("rxe0");
    let default = EndpointConfig::default;
    for (config, what) in [
        (EndpointConfig { connections: 10_000, ..default() }, "completion queue"),
        (EndpointConfig { receive_buffers: 1 << 30, ..default() }, "receive_buffers"),
        (EndpointConfig { receive_size: 1 << 30, ..default() }, "receive_size"),
        (EndpointConfig { send_depth: 1 << 24, connections: 1, ..default() }, "send_depth"),
    ] {
        let error = transport.endpoint(&config).unwrap_err();
        let Error::Limit { value, limit, .. } = &error else { panic!("expected Limit, found {error}") };
        assert!(value > limit && error.to_string().contains(what), "{error}");
    }
    let error = transport.endpoint(&EndpointConfig { read_depth: 0, ..default() }).unwrap_err();
    assert!(error.to_string().contains("read_depth"), "{error}");
}

#[test]
fn reads_in_flight_are_agreed_on() {
    let two = two();
    for end in [&two.to_server, &two.to_client] {
        assert_eq!((end.reads_in_flight(), end.reads_served()), (16, 16));
    }
}

/// The device itself refuses to write to exported memory, even for its owner.
#[test]
fn an_export_cannot_be_written_by_its_owner_s_device() {
    let mut two = two();
    let server = on("rxe1");
    let rows = Exclusive::new("rows", 4096).unwrap();
    let export = server.export(&rows).unwrap();
    two.to_server
        .post(Post::Write {
            payload: Payload::Inline(b"no"),
            to: export.remote().at(0),
            immediate: None,
            signal: Some(1),
        })
        .unwrap();
    two.to_server.ring().unwrap();
    let result = poll_for(&mut two.client, PATIENCE, |completion| match completion {
        Completion::Work { id: 1, result, .. } => Some(result),
        _ => None,
    });
    assert_eq!(result, Some(Err(WorkError::RemoteAccess)));
    assert!(rows.bytes().iter().all(|&byte| byte == 0));
}

const MEMLOCK_CHILD: &str = "FERVOR_TEST_MEMLOCK";

#[test]
fn a_low_memlock_limit_is_named_with_the_cure() {
    if env::var(MEMLOCK_CHILD).is_ok() {
        let memory = Memory::new("large", 4 << 20).unwrap();
        let error = on("rxe0").register(&memory, Access::Local).unwrap_err();
        assert!(matches!(error, Error::Memlock { bytes: 0x40_0000, limit: 0x10_0000 }), "{error}");
        assert!(error.to_string().contains("ulimit -l"), "{error}");
        return;
    }
    // Root may pin what it wants; without CAP_IPC_LOCK it is bound like everybody else.
    let program = env::current_exe().unwrap();
    let test = "a_low_memlock_limit_is_named_with_the_cure";
    let script = format!("ulimit -l 1024 && exec {} {test} --exact --nocapture", program.display());
    let output = Command::new("setpriv")
        .args(["--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "bash", "-c", &script])
        .env(MEMLOCK_CHILD, "1")
        .output()
        .expect("run setpriv");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Keep-alives are nobody's business: they neither show, nor take room, nor break an idle connection.
#[test]
fn idle_connections_stay() {
    let mut two = two();
    let begun = Instant::now();
    let mut seen = Vec::new();
    while begun.elapsed() < Duration::from_secs(3) {
        two.client.poll(&mut seen);
        two.server.poll(&mut seen);
        thread::sleep(Duration::from_millis(20));
    }
    assert!(seen.is_empty(), "{seen:?}");
    let depth = EndpointConfig::default().send_depth;
    assert_eq!((two.to_server.room(), two.to_client.room()), (depth, depth));
    two.to_server
        .post(Post::Send { payload: Payload::Inline(b"still here"), immediate: None, signal: Some(1) })
        .unwrap();
    two.to_server.ring().unwrap();
    done(&mut two.client, 1);
}

/// Unsignalled requests leave the queue though nothing is posted after them.
#[test]
fn unsignalled_requests_leave_an_idle_queue() {
    let mut two = two();
    let depth = two.to_server.room();
    for _ in 0..3 {
        two.to_server
            .post(Post::Write {
                payload: Payload::Inline(b"quiet"),
                to: two.theirs.remote().at(0),
                immediate: None,
                signal: None,
            })
            .unwrap();
    }
    two.to_server.ring().unwrap();
    let begun = Instant::now();
    let mut seen = Vec::new();
    while two.to_server.room() < depth {
        two.client.poll(&mut seen);
        assert!(seen.is_empty(), "{seen:?}");
        assert!(begun.elapsed() < Duration::from_secs(3), "{} of {depth}", two.to_server.room());
        thread::yield_now();
    }
}

/// What was posted but never rung completes too when the connection ends, after what was rung, and once.
#[test]
fn requests_that_were_never_rung_complete() {
    for side in 0..2 {
        let mut two = two();
        for id in 0..20 {
            two.to_server
                .post(Post::Read {
                    into: &[whole(&two.own, 0, 4096)],
                    from: two.theirs.remote().at(0),
                    signal: Some(id),
                })
                .unwrap();
        }
        two.to_server.ring().unwrap();
        for id in 20..25 {
            two.to_server
                .post(Post::Write {
                    payload: Payload::Inline(b"never"),
                    to: two.theirs.remote().at(0),
                    immediate: None,
                    signal: Some(id),
                })
                .unwrap();
            two.to_server
                .post(Post::Write {
                    payload: Payload::Inline(b"never"),
                    to: two.theirs.remote().at(0),
                    immediate: None,
                    signal: None,
                })
                .unwrap();
        }
        if side == 0 {
            two.to_server.disconnect()
        } else {
            two.to_client.disconnect()
        }
        let mut works = Vec::new();
        let cause = poll_for(&mut two.client, PATIENCE, |completion| match completion {
            Completion::Work { id, result, .. } => {
                works.push((id, result));
                None
            }
            Completion::Disconnected { cause, .. } => Some(cause),
            other => panic!("found {other:?}"),
        });
        assert!(cause.is_some(), "the end is not seen: {works:?}");
        let ids: Vec<u64> = works.iter().map(|work| work.0).collect();
        assert_eq!(ids, (0..25).collect::<Vec<_>>());
        assert!(works[20..].iter().all(|work| work.1 == Err(WorkError::Flushed)), "{works:?}");
    }
}

/// A network that swallows everything is a dead peer: found out within two seconds by both sides.
#[test]
fn a_dead_network_is_found_out() {
    for busy in [false, true] {
        let mut two = two();
        let network = Network::with("netem loss 100%");
        let cut = Instant::now();
        if busy {
            two.to_server
                .post(Post::Read {
                    into: &[whole(&two.own, 0, 64)],
                    from: two.theirs.remote().at(0),
                    signal: Some(7),
                })
                .unwrap();
            two.to_server
                .post(Post::Write {
                    payload: Payload::Inline(b"lost"),
                    to: two.theirs.remote().at(0),
                    immediate: None,
                    signal: Some(8),
                })
                .unwrap();
            two.to_server.ring().unwrap();
        }
        let mut works = Vec::new();
        let cause = poll_for(&mut two.client, Duration::from_secs(4), |completion| match completion {
            Completion::Work { id, result, .. } => {
                works.push((id, result));
                None
            }
            Completion::Disconnected { cause, .. } => Some(cause),
            other => panic!("found {other:?}"),
        });
        let took = cut.elapsed();
        println!("{} connection: cut off for {took:?}", if busy { "busy" } else { "idle" });
        assert_eq!(cause, Some(WorkError::RetryExceeded), "after {took:?}");
        assert!(took < Duration::from_secs(2), "found out after {took:?}");
        let expected = [(7, Err(WorkError::RetryExceeded)), (8, Err(WorkError::Flushed))];
        assert_eq!(works, if busy { &expected[..] } else { &[] });
        let at_server = poll_for(&mut two.server, Duration::from_secs(4), |completion| match completion {
            Completion::Disconnected { cause, .. } => Some(cause),
            _ => None,
        });
        assert!(at_server.is_some(), "the server does not find out");
        assert!(cut.elapsed() < Duration::from_secs(3), "the server found out after {:?}", cut.elapsed());
        drop(network);
    }
}

/// A network that loses a packet now and then costs time, and nothing else.
#[test]
fn lost_packets_are_sent_again() {
    let mut two = two();
    let _network = Network::with("netem loss 1%");
    let data: Vec<u8> = (0..64 << 10).map(|i| (i * 31 % 251) as u8).collect();
    let half = REGION / 2;
    two.own.memory().write(0, &data);
    for round in 0..60_usize {
        let length = [64, 4096, 64 << 10][round % 3];
        let at = two.theirs.remote().at((round * 64) as u64);
        two.to_server
            .post(Post::Write {
                payload: Payload::Gather(&[whole(&two.own, 0, length)]),
                to: at,
                immediate: None,
                signal: None,
            })
            .unwrap();
        two.to_server
            .post(Post::Read { into: &[whole(&two.own, half, length)], from: at, signal: Some(round as u64) })
            .unwrap();
        two.to_server
            .post(Post::Send {
                payload: Payload::Inline(&round.to_le_bytes()),
                immediate: Some(round as u32),
                signal: None,
            })
            .unwrap();
        two.to_server.ring().unwrap();
        done(&mut two.client, round as u64);
        let mut back = vec![0; length];
        two.own.memory().read(half, &mut back);
        assert!(back == data[..length], "round {round}");
        let message = poll_for(&mut two.server, PATIENCE, |completion| match completion {
            Completion::Received { buffer, immediate, .. } => Some((buffer, immediate)),
            other => panic!("found {other:?}"),
        });
        let (buffer, immediate) = message.expect("a message");
        assert_eq!((two.server.message(&buffer), immediate), (&round.to_le_bytes()[..], Some(round as u32)));
        two.server.release(buffer);
    }
}

/// Prints the latency of READs and WRITEs, to be compared with `ib_read_lat` in the same boot.
#[test]
#[ignore = "a measurement: run it by name beside perftest"]
fn latency() {
    for size in [8, 64, 512, 4096] {
        let mut two = two();
        let mut medians = Vec::new();
        for _ in 0..5 {
            let mut times: Vec<Duration> = Vec::new();
            let mut seen = Vec::new();
            for _ in 0..2000 {
                let begun = Instant::now();
                two.to_server
                    .post(Post::Read {
                        into: &[whole(&two.own, 0, size)],
                        from: two.theirs.remote().at(0),
                        signal: Some(1),
                    })
                    .unwrap();
                two.to_server.ring().unwrap();
                while two.client.poll(&mut seen) == 0 {}
                times.push(begun.elapsed());
                assert!(matches!(seen.pop(), Some(Completion::Work { result: Ok(()), .. })));
            }
            times.sort_unstable();
            medians.push(times[times.len() / 2]);
        }
        medians.sort_unstable();
        println!("READ {size} bytes: medians of 2000, five times: {medians:?}");
    }
}
