//! A host of several ways: who may come in, by which way, and what others can do to it.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use super::{
    connection::Route,
    raw::{Raw, hello, lanes, offering},
    *,
};
use crate::{
    session::{
        Reason,
        noise::{self, Initiator},
        wire::{LaneRails, MAX_LANES, Message, Verdict},
    },
    transport::{
        Attach, Completion, Connection, Endpoint, Listener, Payload, Region, Request, Sge,
        conformance::Posts, sim::random::Random, tcp::Tcp,
    },
};

pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn parse(url: &str) -> Address {
    url.parse().unwrap()
}

pub(super) fn key(name: &str) -> Key {
    format!("{name} {}", "5a".repeat(32)).parse().unwrap()
}

fn ring(keys: &[Key]) -> KeyRing {
    keys.iter().cloned().collect()
}

/// A server that welcomes everybody, and keeps what has come.
pub(super) struct Server {
    pub(super) host: Host,
    pub(super) listener: HostListener,
    pub(super) endpoint: HostEndpoint,
    pub(super) connections: Vec<HostConnection>,
}

impl Server {
    /// Room for many connections.
    pub(super) fn room() -> EndpointConfig {
        EndpointConfig { connections: 200, receive_buffers: 8, receive_size: 64, ..EndpointConfig::default() }
    }

    pub(super) fn roomy(via: &str) -> Self {
        let mut server = Self::start(&[], via);
        server.endpoint = server.host.endpoint(&Self::room()).unwrap();
        server
    }

    pub(super) fn start(keys: &[Key], via: &str) -> Self {
        // An address that no other test has: a port is free again at once.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let process = std::process::id();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let url =
            format!("fervor://127.{}.{}.{}:0{via}", 1 + process % 250, process / 250 % 250, 1 + number % 250);
        Self::start_at(keys, &parse(&url))
    }

    fn start_at(keys: &[Key], address: &Address) -> Self {
        let host = Host::with_keys(std::slice::from_ref(address), ring(keys)).unwrap();
        let endpoint = host.endpoint(&EndpointConfig::default()).unwrap();
        let listener = host.listen(address).unwrap();
        Self { host, listener, endpoint, connections: Vec::new() }
    }

    pub(super) fn address(&self) -> Address {
        self.listener.address().clone()
    }

    fn socket(&self) -> SocketAddr {
        let Address::Session { host, port, .. } = self.address() else { panic!("it listens for sessions") };
        (host.parse::<Ipv4Addr>().unwrap(), port).into()
    }

    /// Accepts those who come within a moment. How many.
    pub(super) fn accept(&mut self, timeout: Duration) -> usize {
        let mut count = 0;
        while let Some(request) = self.listener.accept(timeout).unwrap() {
            let welcome = request.private_data().to_vec();
            self.connections.push(request.accept(&self.endpoint.attach(), &welcome).unwrap());
            count += 1;
            if timeout > Duration::from_secs(1) {
                break;
            }
        }
        count
    }
}

/// Connects to `server`, which accepts.
pub(super) fn connect(
    host: &Host,
    endpoint: &HostEndpoint,
    server: &mut Server,
    address: &Address,
) -> HostConnection {
    let attach = endpoint.attach();
    std::thread::scope(|scope| {
        let connecting = scope.spawn(|| host.connect(&attach, address, b"hello", PATIENCE).unwrap());
        assert_eq!(server.accept(PATIENCE), 1);
        let (connection, welcome) = connecting.join().unwrap();
        assert_eq!(welcome, b"hello");
        connection
    })
}

pub(super) fn client(keys: &[Key], addresses: &[Address]) -> (Host, HostEndpoint) {
    let host = Host::with_keys(addresses, ring(keys)).unwrap();
    let endpoint = host.endpoint(&EndpointConfig::default()).unwrap();
    (host, endpoint)
}

/// Waits until at least `count` completions have come.
pub(super) fn next(endpoint: &mut HostEndpoint, count: usize) -> Vec<Completion> {
    let (until, mut found) = (Instant::now() + PATIENCE, Vec::new());
    while found.len() < count {
        assert!(Instant::now() < until, "nothing comes");
        if endpoint.poll(&mut found) == 0 {
            endpoint.wait(Duration::from_secs(1));
        }
    }
    found
}

#[test]
fn the_scheme_picks_the_providers() {
    let choose = |urls: &[&str]| Host::for_addresses(&urls.iter().map(|url| parse(url)).collect::<Vec<_>>());
    let ways = |urls: &[&str]| {
        let host = choose(urls).unwrap();
        [Way::Shm, Way::Tcp].map(|way| host.has(way))
    };
    assert_eq!(ways(&["shm:///tmp/a", "shm:///tmp/b"]), [true, false]);
    assert_eq!(ways(&["tcp://a:1", "tcp://b:1"]), [false, true]);
    assert_eq!(ways(&["fervor://127.0.0.1:1"]), [true, true]);
    assert_eq!(ways(&["fervor://127.0.0.1:1?via=tcp"]), [false, true]);
    assert_eq!(ways(&["fervor://127.0.0.1:1?via=tcp", "fervor://127.0.0.1:2?via=shm"]), [true, true]);
    let mixed = choose(&["shm:///tmp/a", "shm:///tmp/b", "rdma://c:1"]).unwrap_err().to_string();
    assert!(mixed.contains("`rdma://c:1`") && mixed.contains("`shm:///tmp/a`"), "{mixed}");
    assert!(mixed.contains("fervor://"), "no cure in: {mixed}");
    assert!(choose(&["sim://a"]).unwrap_err().to_string().contains("simulations"));
    assert!(choose(&[]).unwrap_err().to_string().contains("no address"));
    let unused = Host::with_keys(&[parse("tcp://a:1")], ring(&[key("a")])).unwrap_err().to_string();
    assert!(unused.contains("`tcp://a:1`") && unused.contains("fervor://"), "{unused}");
}

#[test]
fn one_host_reaches_each_server_by_its_best_way() {
    let (mut near, mut far) = (Server::start(&[key("a")], ""), Server::start(&[key("a")], "?via=tcp"));
    let addresses = [near.address(), far.address()];
    let (host, mut endpoint) = client(&[key("a")], &addresses);
    let memory = Memory::new("mixed", 4096).unwrap();
    // One region, which both servers write, each by its way.
    let region = host.register(&memory, Access::RemoteWrite).unwrap();
    let to_near = connect(&host, &endpoint, &mut near, &addresses[0]);
    let to_far = connect(&host, &endpoint, &mut far, &addresses[1]);
    assert_eq!([to_near.provider(), to_far.provider()], ["shm", "tcp"]);
    assert_ne!(to_near.id(), to_far.id());
    for (number, (server, connection)) in [(&mut near, &to_near), (&mut far, &to_far)].into_iter().enumerate()
    {
        let text = [b"near", b"far!"][number];
        let place = region.remote().at(64 * number as u64);
        server.connections[0].write(Payload::Inline(text), place, Some(7), None).unwrap();
        server.connections[0].send(Payload::Inline(b"message"), None, None).unwrap();
        server.connections[0].ring().unwrap();
        let mut found = next(&mut endpoint, 2);
        let Completion::WriteImmediate { connection: from, immediate: 7 } = found[0] else {
            panic!("{found:?}")
        };
        assert_eq!(from, connection.id());
        let mut seen = [0; 4];
        memory.read(64 * number, &mut seen);
        assert_eq!(&seen, text);
        let Some(Completion::Received { connection: from, buffer, .. }) = found.pop() else { panic!() };
        assert_eq!((from, endpoint.message(&buffer)), (connection.id(), &b"message"[..]));
        endpoint.release(buffer);
    }
    drop((to_near, to_far));
}

#[test]
fn a_thread_that_sleeps_is_woken_by_whichever_way_something_comes() {
    let (mut near, mut far) = (Server::start(&[], ""), Server::start(&[], "?via=tcp"));
    let addresses = [near.address(), far.address()];
    let (host, mut endpoint) = client(&[], &addresses);
    let _connections = [
        connect(&host, &endpoint, &mut far, &addresses[1]),
        connect(&host, &endpoint, &mut near, &addresses[0]),
    ];
    for turn in 0..40 {
        let server = if turn % 2 == 0 { &mut near } else { &mut far };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(turn % 5));
                server.connections[0].send(Payload::Inline(b"wake"), None, None).unwrap();
                server.connections[0].ring().unwrap();
            });
            let (until, mut found) = (Instant::now() + PATIENCE, Vec::new());
            while endpoint.poll(&mut found) == 0 {
                // A lost wake lasts as long as the wait does.
                let before = Instant::now();
                endpoint.wait(PATIENCE);
                assert!(
                    before.elapsed() < PATIENCE && Instant::now() < until,
                    "turn {turn} was slept through"
                );
            }
            let Some(Completion::Received { buffer, .. }) = found.pop() else { panic!("{found:?}") };
            endpoint.release(buffer);
        });
    }
    // Nothing comes: a wake ends it.
    let attach = endpoint.attach();
    std::thread::scope(|scope| {
        scope.spawn(|| attach.wake());
        let before = Instant::now();
        endpoint.wait(PATIENCE);
        assert!(before.elapsed() < PATIENCE);
    });
}

#[test]
fn who_has_not_the_key_comes_to_nothing() {
    let server = Server::start(&[key("a"), key("b")], "");
    let address = server.address();
    let impostor: Key = format!("a {}", "6b".repeat(32)).parse().unwrap();
    for (keys, reason) in
        [(vec![], Reason::KeyNeeded), (vec![key("c")], Reason::WrongKey), (vec![impostor], Reason::WrongKey)]
    {
        let (host, endpoint) = client(&keys, std::slice::from_ref(&address));
        let error = host.connect(&endpoint.attach(), &address, b"", PATIENCE).unwrap_err();
        assert!(matches!(&error, Error::NoSession { .. }), "{error}");
        assert!(error.to_string().contains(&reason.to_string()), "{error}");
    }
    // Without sessions nobody comes in, either: neither by TCP nor by shared memory.
    let tcp = Tcp::new();
    let endpoint = tcp.endpoint(&EndpointConfig::default()).unwrap();
    let Address::Session { host, port, .. } = &address else { unreachable!() };
    for data in [&b""[..], &[0; 16]] {
        let direct = Address::Tcp { host: host.clone(), port: *port };
        let error = tcp.connect(&endpoint.attach(), &direct, data, PATIENCE).unwrap_err();
        assert!(matches!(error, Error::Refused { .. }), "{error}");
    }
    let shm = shm::Shm::new().unwrap();
    let endpoint = shm.endpoint(&EndpointConfig::default()).unwrap();
    let direct = Address::Shm(shm_socket(&server, Some(&key("a"))));
    let error = shm.connect(&endpoint.attach(), &direct, &[0; 16], PATIENCE).unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error}");
}

/// The socket of the server's shared memory, as those learn it who have a session.
fn shm_socket(server: &Server, key: Option<&Key>) -> PathBuf {
    let offers = Raw::shake_hands(server.socket(), key).offers();
    offers.into_iter().find(|offer| offer.way == Way::Shm).expect("it is offered").place.into()
}

/// Connects over plain TCP with a token.
fn lane(server: SocketAddr, token: &[u8]) -> Result<(), Error> {
    let tcp = Tcp::new();
    let endpoint = tcp.endpoint(&EndpointConfig::default()).unwrap();
    let address = Address::Tcp { host: server.ip().to_string(), port: server.port() };
    tcp.connect(&endpoint.attach(), &address, token, PATIENCE).map(drop)
}

#[test]
fn a_token_is_good_for_one_lane_of_its_way_and_its_session() {
    let mut server = Server::start(&[], "");
    let at = server.socket();
    let mut raw = Raw::welcomed(at, None);
    let (good, wrong_way) = (raw.ask(1, Way::Tcp), raw.ask(2, Way::Shm));
    assert!(matches!(lane(at, &wrong_way), Err(Error::Refused { .. })), "a token of another way");
    std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            let mut changed = good;
            changed[3] ^= 1;
            assert!(matches!(lane(at, &changed), Err(Error::Refused { .. })), "a token of nobody's");
            lane(at, &good)
        });
        let request = server.listener.accept(PATIENCE).unwrap().expect("a lane");
        assert_eq!((request.private_data(), request.key()), (&b"raw"[..], None));
        drop(request.accept(&server.endpoint.attach(), b"yes").unwrap());
        first.join().unwrap().unwrap();
    });
    assert!(
        matches!(raw.hear(), Some(Message::Answer { number: 1, verdict: Verdict::Accepted, data, .. }) if data == b"yes")
    );
    assert!(matches!(lane(at, &good), Err(Error::Refused { .. })), "a token once more");
    // A session that has ended has none.
    let late = raw.ask(3, Way::Tcp);
    drop(raw);
    let until = Instant::now() + PATIENCE;
    loop {
        // Until the server has noticed, the lane waits for somebody to accept it.
        let refused = std::thread::scope(|scope| {
            let trying = scope.spawn(|| lane(at, &late));
            drop(server.listener.accept(Duration::from_millis(50)).unwrap());
            trying.join().unwrap()
        });
        assert!(matches!(refused, Err(Error::Refused { .. })));
        if server.accept(Duration::ZERO) == 0 || Instant::now() > until {
            break;
        }
    }
}

#[test]
fn a_guest_that_breaks_the_rules_ends_its_own_session_alone() {
    let mut server = Server::start(&[key("a")], "");
    let at = server.socket();
    let lane = |number| lanes(number, Way::Tcp, 1);
    let mut good = Raw::welcomed(at, Some(&key("a")));

    let mut early = Raw::shake_hands(at, Some(&key("a")));
    early.say(&lane(1));
    assert!(early.hear().is_none(), "a lane before the hello");

    let mut twice = Raw::welcomed(at, Some(&key("a")));
    twice.say(&hello());
    assert!(twice.hear().is_none(), "two hellos");

    let mut server_talk = Raw::welcomed(at, Some(&key("a")));
    server_talk.say(&Message::Go { first: 1, tokens: vec![[0; 16]] });
    assert!(server_talk.hear().is_none(), "a message of servers");

    let mut malformed = Raw::welcomed(at, Some(&key("a")));
    let frame = malformed.cipher.seal(&[3, 1]);
    malformed.socket.write_all(&frame).unwrap();
    assert!(malformed.hear().is_none(), "half a message");

    let mut forged = Raw::welcomed(at, Some(&key("a")));
    let mut frame = forged.cipher.seal(&lane(1).encode());
    frame[9] ^= 1;
    forged.socket.write_all(&frame).unwrap();
    assert!(forged.hear().is_none(), "a changed frame");

    let mut greedy = Raw::welcomed(at, Some(&key("a")));
    for turn in 0..4 {
        greedy.say(&lanes(turn * 1000, Way::Tcp, MAX_LANES));
        assert!(matches!(greedy.hear(), Some(Message::Go { tokens, .. }) if tokens.len() == MAX_LANES));
    }
    greedy.say(&lane(8));
    assert!(greedy.hear().is_none(), "more lanes than a session may be making");

    let mut offers = Raw::welcomed(at, Some(&key("a")));
    offers.say(&offering(0, Way::Tcp, LaneRails::default()));
    assert!(offers.hear().is_none(), "an offer for a way that takes none");

    let mut railed = Raw::welcomed(at, Some(&key("a")));
    railed.say(&offering(0, Way::Rdma, LaneRails { own: 1, theirs: 1 }));
    assert!(railed.hear().is_none(), "by a rail that it has not told of");

    // A way that does not lead here is an answer, and ends nothing. So are news of lanes that there are not.
    good.say(&Message::Ready { first: 7, count: 9 });
    good.say(&Message::Ended { number: 7 });
    good.say(&Message::Beat);
    // Of the server's rails it names the last of those that there may be.
    good.say(&offering(7, Way::Rdma, LaneRails { own: 0, theirs: 1 << 7 }));
    assert!(matches!(good.hear(), Some(Message::Answer { number: 7, verdict: Verdict::Impossible, .. })));

    // A handshake that was recorded is answered, and then comes to nothing.
    let mut replayed = TcpStream::connect(at).unwrap();
    let (initiator, opening) = Initiator::start(Some(&key("a")));
    drop(initiator);
    replayed.write_all(&opening).unwrap();
    replayed.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut heard = Vec::new();
    Raw::frame(&mut replayed, &mut heard).unwrap();
    replayed.write_all(&[16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]).unwrap();
    assert!(Raw::frame(&mut replayed, &mut heard).is_none());

    good.ask(1, Way::Tcp);
    let (host, endpoint) = client(&[key("a")], &[server.address()]);
    let address = server.address();
    drop(connect(&host, &endpoint, &mut server, &address));
}

#[test]
fn half_open_and_garbage_handshakes_hold_up_nobody_and_leave_nothing() {
    let files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut server = Server::start(&[key("a")], "");
    let (at, address) = (server.socket(), server.address());
    let before = files();
    let (host, endpoint) = client(&[key("a")], std::slice::from_ref(&address));
    let (_, opening) = Initiator::start(Some(&key("a")));
    let mut open = Vec::new();
    let mut garbage = Random::new(7);
    for turn in 0..1500_usize {
        let Ok(mut socket) = TcpStream::connect(at) else { continue };
        // They stop at every step: at once, in the opening, after it; or talk nonsense.
        let bytes: Vec<u8> = match turn % 4 {
            0 => Vec::new(),
            1 => opening[..turn % opening.len()].to_vec(),
            2 => opening.to_vec(),
            _ => (0..opening.len()).map(|_| garbage.below(256) as u8).collect(),
        };
        let _ = socket.write_all(&bytes);
        if turn % 3 == 0 && open.len() < 600 {
            open.push(socket);
        }
        if turn % 100 == 0 {
            drop(connect(&host, &endpoint, &mut server, &address));
        }
    }
    drop(connect(&host, &endpoint, &mut server, &address));
    drop((host, endpoint, open));
    server.connections.clear();
    let until = Instant::now() + PATIENCE;
    while files() > before && Instant::now() < until {
        server.accept(Duration::from_millis(20));
        server.endpoint.poll(&mut Vec::new());
    }
    assert!(files() <= before, "{} files are open, and {before} were before", files());
}

#[test]
fn a_server_that_was_started_again_is_found_again() {
    let mut server = Server::start(&[key("a")], "");
    let address = server.address();
    let (host, endpoint) = client(&[key("a")], std::slice::from_ref(&address));
    drop(connect(&host, &endpoint, &mut server, &address));
    drop(server);
    let error = host.connect(&endpoint.attach(), &address, b"", PATIENCE).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    let mut server = Server::start_at(&[key("a")], &address);
    drop(connect(&host, &endpoint, &mut server, &address));
}

#[test]
fn a_way_that_leads_to_somebody_else_is_left_for_the_next() {
    let mut server = Server::start(&[], "");
    let address = server.address();
    // As in a container that has the same kernel, and a folder of its own: somebody else listens at that path.
    let path = shm_socket(&server, None);
    std::fs::remove_file(&path).unwrap();
    let mut other = shm::Shm::new().unwrap().listen(&Address::Shm(path)).unwrap();
    let (host, endpoint) = client(&[], std::slice::from_ref(&address));
    let connection = std::thread::scope(|scope| {
        scope.spawn(|| drop(other.accept(PATIENCE).unwrap().expect("the client tries it first")));
        connect(&host, &endpoint, &mut server, &address)
    });
    assert_eq!(connection.provider(), "tcp");
    // It is not tried again.
    assert_eq!(connect(&host, &endpoint, &mut server, &address).provider(), "tcp");
}

#[test]
fn sockets_of_servers_that_were_killed_are_removed_and_others_are_not() {
    let name = |digits: &str| std::env::temp_dir().join(format!("fervor-{}.sock", digits.repeat(16)));
    let (dead, file) = (name("d0"), name("f1"));
    let _ = std::fs::remove_file(&dead);
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    std::fs::write(&file, "no socket").unwrap();
    let living = Server::start(&[], "");
    let path = shm_socket(&living, None);
    let next = Server::start(&[], "");
    assert!(!dead.exists() && file.exists() && path.exists() && shm_socket(&next, None) != path);
    std::fs::remove_file(&file).unwrap();
    drop(living);
    assert!(!path.exists());
}

#[test]
fn a_region_that_was_not_told_of_cannot_be_reached() {
    for via in ["", "?via=tcp"] {
        let mut server = Server::start(&[], via);
        let address = server.address();
        let told = server.host.register(&Memory::new("told", 4096).unwrap(), Access::RemoteRead).unwrap();
        let (host, mut endpoint) = client(&[], std::slice::from_ref(&address));
        let own = host.register(&Memory::new("own", 4096).unwrap(), Access::Local).unwrap();
        let mut connection = connect(&host, &endpoint, &mut server, &address);
        let mut read = |remote| {
            connection.read(&[Sge { region: &own, offset: 0, length: 8 }], remote, Some(1)).unwrap();
            connection.ring().unwrap();
            matches!(next(&mut endpoint, 1)[0], Completion::Work { result: Ok(()), .. })
        };
        assert!(read(told.remote().at(0)), "{via}");
        // The provider's own key, which the peer never hears.
        let stolen = server.host.0.regions.offers(if via.is_empty() { Route::Shm } else { Route::Tcp })[0];
        assert!(!read(stolen.region.at(0)), "{via}: under the provider's key");
    }
}

#[test]
fn a_refusal_is_three_bytes_that_a_client_understands() {
    let server = Server::start(&[key("a")], "");
    let mut socket = TcpStream::connect(server.socket()).unwrap();
    let (_, opening) = Initiator::start(None);
    socket.write_all(&opening).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, noise::refusal(Reason::KeyNeeded));
}
