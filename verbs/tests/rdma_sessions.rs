//! Lanes of RDMA in a session, on one of the soft-RoCE devices that `ci/soft-roce` makes: their offers travel in the session, and they end
//! with it.
//!
//! Run by `ci/soft-roce-suite`. A plain `cargo test` leaves it out; where it runs and there is no device, it fails.

use std::{
    env,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use fervor_verbs::{
    Address, Error, Memory,
    session::KeyRing,
    transport::{
        Access, Completion, Connected, Connection, Endpoint, EndpointConfig, LaneSpec, Listener, Payload,
        Post, Region, Request, Transport,
        any::{Host, HostConnection, HostEndpoint, HostListener},
    },
};

mod by_hand;

const PATIENCE: Duration = Duration::from_secs(60);
/// An address of the device that both ends work on.
const AT: &str = "10.7.0.2";

fn url(port: u16) -> Address {
    format!("fervor://{AT}:{port}?via=rdma").parse().unwrap()
}

fn host() -> Host {
    let device = "rxe1".parse().unwrap();
    Host::with_devices(&[url(0)], KeyRing::default(), &[device]).unwrap_or_else(|error| panic!("{error}"))
}

struct Pair {
    client: Host,
    asks: HostEndpoint,
    server: Host,
    answers: HostEndpoint,
    listener: HostListener,
}

impl Pair {
    fn new(config: &EndpointConfig) -> Self {
        let (client, server) = (host(), host());
        let (asks, answers) = (client.endpoint(config).unwrap(), server.endpoint(config).unwrap());
        let listener = server.listen(&url(0)).unwrap();
        Self { client, asks, server, answers, listener }
    }

    /// Makes `count` lanes through `address`.
    fn lanes(
        &mut self,
        address: &Address,
        count: usize,
    ) -> (Vec<Connected<HostConnection>>, Vec<HostConnection>) {
        let (client, attach) = (&self.client, self.asks.attach());
        let (listener, joins) = (&mut self.listener, self.answers.attach());
        thread::scope(|scope| {
            let accepting = scope.spawn(|| {
                let one = |_| {
                    let request = listener.accept(PATIENCE).unwrap().expect("a lane");
                    request.accept_with(&joins, 1, b"yes").unwrap()
                };
                (0..count).map(one).collect::<Vec<_>>()
            });
            let lanes = vec![LaneSpec::new(&attach, b"lane").with_depth(1); count];
            let made = client.connect_all(address, &lanes, PATIENCE).unwrap();
            (made, accepting.join().unwrap())
        })
    }
}

fn files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Polls until `count` completions have come that `wanted` wants.
fn poll_for(
    endpoint: &mut HostEndpoint,
    count: usize,
    wanted: impl Fn(&Completion) -> bool,
) -> Vec<Completion> {
    let (until, mut found) = (Instant::now() + PATIENCE, Vec::new());
    while found.iter().filter(|found| wanted(found)).count() < count {
        assert!(Instant::now() < until, "only {found:?}");
        endpoint.poll(&mut found);
        thread::yield_now();
    }
    found
}

fn is_end(completion: &Completion) -> bool {
    matches!(completion, Completion::Disconnected { .. })
}

fn message(endpoint: &mut HostEndpoint) -> Vec<u8> {
    let found = poll_for(endpoint, 1, |found| matches!(found, Completion::Received { .. }));
    let mut bytes = Vec::new();
    for found in found {
        if let Completion::Received { buffer, .. } = found {
            bytes = endpoint.message(&buffer).to_vec();
            endpoint.release(buffer);
        }
    }
    bytes
}

fn send(lane: &mut HostConnection, words: &[u8]) {
    lane.post(Post::Send { payload: Payload::Inline(words), immediate: None, signal: None }).unwrap();
    lane.ring().unwrap();
}

#[test]
fn lanes_cost_no_descriptor_and_each_end_hears_of_the_other_s() {
    let config = EndpointConfig { connections: 64, send_depth: 4, ..EndpointConfig::default() };
    let mut pair = Pair::new(&config);
    let address = pair.listener.address().clone();
    // The session, and what the endpoints are made of.
    let (first, first_back) = pair.lanes(&address, 1);
    let before = files();
    let (mut lanes, mut back) = pair.lanes(&address, 40);
    assert_eq!(files(), before, "a lane has a descriptor");
    assert_eq!((pair.client.peers().len(), pair.server.peers().len()), (1, 1));
    assert!(lanes.iter().all(|(lane, said)| lane.provider() == "rdma" && said == b"yes" && lane.room() == 1));
    send(&mut back[39], b"to the client");
    assert_eq!(message(&mut pair.asks), b"to the client");
    send(&mut lanes[7].0, b"to the server");
    assert_eq!(message(&mut pair.answers), b"to the server");
    // Whichever end is dropped: the other one is told.
    drop(lanes.split_off(20));
    poll_for(&mut pair.answers, 20, is_end);
    poll_for(&mut pair.asks, 20, is_end);
    drop(back.drain(..20));
    poll_for(&mut pair.asks, 20, is_end);
    poll_for(&mut pair.answers, 20, is_end);
    send(&mut { first }[0].0, b"the first goes on");
    assert_eq!(message(&mut pair.answers), b"the first goes on");
    drop(first_back);
}

/// One is refused: all come to nothing, and the session goes on.
#[test]
fn lanes_are_all_made_or_none() {
    let mut pair = Pair::new(&EndpointConfig { connections: 16, ..EndpointConfig::default() });
    let address = pair.listener.address().clone();
    let (client, attach) = (&pair.client, pair.asks.attach());
    let (listener, joins) = (&mut pair.listener, pair.answers.attach());
    let mut accepted = thread::scope(|scope| {
        let accepting = scope.spawn(|| {
            let mut accepted = Vec::new();
            for number in 0..6 {
                let request = listener.accept(PATIENCE).unwrap().expect("a lane");
                if number == 3 {
                    request.reject(b"full");
                } else {
                    accepted.push(request.accept(&joins, b"").unwrap());
                }
            }
            accepted
        });
        let lanes = [LaneSpec::new(&attach, b""); 6];
        let error = client.connect_all(&address, &lanes, PATIENCE).map(drop).unwrap_err();
        assert!(matches!(&error, Error::Refused { private_data, .. } if private_data == b"full"), "{error}");
        accepting.join().unwrap()
    });
    poll_for(&mut pair.answers, 5, is_end);
    accepted.clear();
    assert_eq!(pair.lanes(&address, 6).0.len(), 6, "their places are free again");
    assert_eq!(pair.client.peers().len(), 1);
}

/// A network between the two, which can be cut.
struct Wire {
    port: u16,
    ends: Vec<TcpStream>,
}

impl Wire {
    fn to(server: u16) -> thread::JoinHandle<Self> {
        let listener = TcpListener::bind((AT, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        PORT.store(port.into(), std::sync::atomic::Ordering::SeqCst);
        thread::spawn(move || {
            let (client, _) = listener.accept().unwrap();
            let server = TcpStream::connect((AT, server)).unwrap();
            let ends = vec![client.try_clone().unwrap(), server.try_clone().unwrap()];
            for (mut from, mut to) in
                [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)]
            {
                thread::spawn(move || {
                    let mut bytes = [0; 4096];
                    while let Ok(count @ 1..) = from.read(&mut bytes) {
                        if to.write_all(&bytes[..count]).is_err() {
                            break;
                        }
                    }
                });
            }
            Self { port, ends }
        })
    }

    fn cut(&self) {
        for end in &self.ends {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

static PORT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

/// The session's socket breaks, and nothing else: both ends of each lane end, nothing is written any more, and a new session makes new ones.
#[test]
fn lanes_end_with_their_session() {
    let mut pair = Pair::new(&EndpointConfig::default());
    let Address::Session { port, .. } = *pair.listener.address() else { panic!() };
    let memory = Memory::new("written", 4096).unwrap();
    let region = pair.server.register(&memory, Access::RemoteWrite).unwrap();
    let wire = Wire::to(port);
    let through = url(PORT.load(std::sync::atomic::Ordering::SeqCst) as u16);
    let (mut lanes, _back) = pair.lanes(&through, 3);
    let wire = wire.join().unwrap();
    assert_ne!(wire.port, port);
    let write = |payload, signal| Post::Write {
        payload: Payload::Inline(payload),
        to: region.remote().at(0),
        immediate: None,
        signal,
    };
    lanes[0].0.post(write(&[7; 8], Some(1))).unwrap();
    lanes[0].0.ring().unwrap();
    let done = poll_for(&mut pair.asks, 1, |found| matches!(found, Completion::Work { .. }));
    assert!(matches!(done[0], Completion::Work { result: Ok(()), .. }), "{done:?}");
    wire.cut();
    poll_for(&mut pair.answers, 3, is_end);
    poll_for(&mut pair.asks, 3, is_end);
    for (lane, _) in &mut lanes {
        assert!(lane.post(write(&[8; 8], None)).is_err());
    }
    let mut seen = [0; 8];
    memory.read(0, &mut seen);
    assert_eq!(seen, [7; 8]);
    let address = pair.listener.address().clone();
    let (mut lanes, _back) = pair.lanes(&address, 2);
    send(&mut lanes[1].0, b"again");
    assert_eq!(message(&mut pair.answers), b"again");
}

/// A listener that is dropped takes no lane with it; the sessions end with their lanes.
#[test]
fn lanes_outlive_their_listener() {
    let mut pair = Pair::new(&EndpointConfig::default());
    let address = pair.listener.address().clone();
    let (mut lanes, mut back) = pair.lanes(&address, 2);
    let Pair { client, mut asks, server, mut answers, listener } = pair;
    drop(listener);
    let error = client.connect(&asks.attach(), &address, b"", PATIENCE).map(drop).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    thread::sleep(Duration::from_millis(1500));
    send(&mut lanes[0].0, b"on");
    assert_eq!(message(&mut answers), b"on");
    send(&mut back[1], b"and on");
    assert_eq!(message(&mut asks), b"and on");
    assert_eq!((client.peers().len(), server.peers().len()), (1, 1));
    // One end of each is dropped: the other hears of it in the session, and that ends.
    drop(lanes);
    poll_for(&mut answers, 2, is_end);
    let until = Instant::now() + PATIENCE;
    while client.peers().len() + server.peers().len() > 0 {
        assert!(Instant::now() < until, "{:?} {:?}", client.peers(), server.peers());
        asks.poll(&mut Vec::new());
        thread::sleep(Duration::from_millis(10));
    }
}

const CHILD: &str = "FERVOR_TEST_UNPINNED";

/// A process that may pin next to nothing goes without RDMA, says why, and fails if it is to use it.
#[test]
fn memory_that_cannot_be_pinned_goes_other_ways() {
    let memory = || Memory::new("large", 8 << 20).unwrap();
    if env::var(CHILD).is_ok() {
        let any: Address = format!("fervor://{AT}:0").parse().unwrap();
        let free = Host::with_keys(&[any], KeyRing::default()).unwrap();
        println!("before: {}", free.ways());
        let region = free.register(&memory(), Access::RemoteWrite).unwrap();
        println!("after: {}", free.ways());
        assert_eq!(region.memory().len(), 8 << 20);
        let bound = host();
        let error = bound.register(&memory(), Access::RemoteWrite).unwrap_err();
        println!("bound: {error}");
        std::process::exit(0);
    }
    // Root may pin what it likes, unless it gives that up.
    let program = env::current_exe().unwrap();
    let script = format!(
        "ulimit -l 64; exec '{}' memory_that_cannot_be_pinned_goes_other_ways --exact --nocapture",
        program.display()
    );
    let child = Command::new("setpriv")
        .args(["--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", "bash", "-c", &script])
        .env(CHILD, "1")
        .output()
        .expect("run setpriv");
    let (out, said) = (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(out.contains("before: shm, rdma (rxe0:1, rxe1:1), tcp\n"), "{out}\n{said}");
    assert!(out.contains("after: shm, tcp\n"), "{out}\n{said}");
    assert!(out.contains("bound: cannot register 8388608 bytes"), "{out}\n{said}");
    assert_eq!(said.matches("going without RDMA: cannot register 8388608 bytes").count(), 1, "{said}");
    assert!(said.contains("ulimit -l unlimited"), "{said}");
}

/// Prints how long it takes to make lanes through one session, beside as many queue pairs made by hand in one batch.
#[test]
#[ignore = "a measurement: run it by name"]
fn a_thousand_lanes_beside_queue_pairs_by_hand() {
    let number: usize =
        env::var("FERVOR_TEST_CONNECTIONS").map_or(1000, |text| text.parse().expect("a number"));
    let config = EndpointConfig {
        receive_buffers: 8,
        send_depth: 1,
        read_depth: 16,
        connections: number + 1,
        ..EndpointConfig::default()
    };
    let mut ratios = Vec::new();
    for _ in 0..3 {
        let mut pair = Pair::new(&config);
        let address = pair.listener.address().clone();
        // The session, and the endpoints.
        let first = pair.lanes(&address, 1);
        let begun = Instant::now();
        let lanes = pair.lanes(&address, number);
        let session = begun.elapsed();
        drop((first, lanes, pair));
        let hand = by_hand::batch(number);
        let ratio = session.as_secs_f64() / hand.as_secs_f64();
        println!(
            "{number} lanes of a session {session:?}, {number} queue pairs by hand {hand:?}: {ratio:.2}"
        );
        ratios.push(ratio);
    }
    ratios.sort_by(f64::total_cmp);
    println!("median {:.2}", ratios[1]);
}
