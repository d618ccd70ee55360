//! Several rails of a process, on soft-RoCE: the client has rxe0 and rxe2, the server rxe1 and rxe3. The second pair of devices is made by
//! `ci/soft-roce-net`, and broken.
//!
//! Run by `ci/soft-roce-suite`. A plain `cargo test` leaves it out; where it runs and there is no device, it fails.

use std::{
    collections::VecDeque,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use fervor_verbs::{
    Address, Memory,
    session::KeyRing,
    transport::{
        Access, Completion, Connection, Endpoint, EndpointConfig, Listener, Payload, Post, Region,
        RemoteRegion, Request, Sge, Transport,
        any::{Host, HostConnection, HostEndpoint, HostListener, HostRegion},
    },
};

const PATIENCE: Duration = Duration::from_secs(20);

/// The second pair of devices, until this is dropped.
struct Second;

impl Second {
    fn up() -> Self {
        let second = Self;
        second.run("up");
        second
    }

    fn run(&self, what: &str) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci/soft-roce-net");
        let status = Command::new(script).args(["second", what]).status().expect("run the script");
        assert!(status.success(), "soft-roce-net second {what}: {status}");
    }

    fn take_down(&self) {
        let status = Command::new("ip").args(["link", "set", "v3", "down"]).status().expect("run ip");
        assert!(status.success(), "ip link set v3 down: {status}");
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        self.run("down");
    }
}

/// A process at one end: what it has is registered with each of its rails.
struct End {
    host: Host,
    endpoint: HostEndpoint,
    region: HostRegion,
    /// Completions that were polled with another one.
    seen: VecDeque<Completion>,
}

impl End {
    fn new(address: &Address, devices: &[&str]) -> Self {
        let devices: Vec<_> = devices.iter().map(|name| name.parse().unwrap()).collect();
        let host = Host::with_devices(std::slice::from_ref(address), KeyRing::default(), &devices).unwrap();
        let endpoint = host.endpoint(&EndpointConfig::default()).unwrap();
        let memory = Memory::new("rails", 4096).unwrap();
        let region = host.register(&memory, Access::RemoteWrite).unwrap();
        Self { host, endpoint, region, seen: VecDeque::new() }
    }

    /// The next completion.
    fn next(&mut self) -> Completion {
        let deadline = Instant::now() + PATIENCE;
        while self.seen.is_empty() {
            assert!(Instant::now() < deadline, "nothing completes");
            let mut seen = Vec::new();
            if self.endpoint.poll(&mut seen) == 0 {
                self.endpoint.wait(Duration::from_millis(100));
            }
            self.seen.extend(seen);
        }
        self.seen.pop_front().expect("there is one")
    }

    /// The next one that is not the end of a connection.
    fn next_of_living(&mut self) -> Completion {
        loop {
            let next = self.next();
            if !matches!(next, Completion::Disconnected { .. }) {
                return next;
            }
        }
    }
}

struct Scene {
    client: End,
    server: End,
    listener: HostListener,
}

impl Scene {
    fn new() -> Self {
        let address: Address = "fervor://127.0.0.1:0?via=rdma".parse().unwrap();
        let (client, server) =
            (End::new(&address, &["rxe0", "rxe2:1"]), End::new(&address, &["rxe1", "rxe3"]));
        let listener = server.host.listen(&address).unwrap();
        Self { client, server, listener }
    }

    fn connect(&mut self) -> (HostConnection, HostConnection) {
        let (to, from) = (self.client.endpoint.attach(), self.server.endpoint.attach());
        let (host, address, listener) =
            (&self.client.host, self.listener.address().clone(), &mut self.listener);
        thread::scope(|scope| {
            // A lane may be tried more than once before it is made.
            let accept = scope.spawn(|| {
                loop {
                    let request = listener.accept(PATIENCE).unwrap().expect("a request");
                    if let Ok(accepted) = request.accept(&from, b"") {
                        return accepted;
                    }
                }
            });
            let made = host.connect(&to, &address, b"", PATIENCE).unwrap().0;
            (made, accept.join().unwrap())
        })
    }

    /// A message each way, and a READ of the server's region.
    fn use_lane(&mut self, (near, far): &mut (HostConnection, HostConnection)) {
        let (near_id, far_id) = (near.id(), far.id());
        for (from, to, end) in [(&mut *near, far_id, false), (&mut *far, near_id, true)] {
            let payload = Payload::Inline(b"hello");
            from.post(Post::Send { payload, immediate: None, signal: None }).unwrap();
            from.ring().unwrap();
            let end = if end { &mut self.client } else { &mut self.server };
            let Completion::Received { connection, buffer, .. } = end.next_of_living() else {
                panic!("no message")
            };
            assert_eq!((connection, end.endpoint.message(&buffer)), (to, &b"hello"[..]));
            end.endpoint.release(buffer);
        }
        let remote: RemoteRegion = self.server.region.remote();
        let word = u64::from(near.id().0) + 7;
        self.server.region.memory().write(64, &word.to_le_bytes());
        let into = [Sge { region: &self.client.region, offset: 0, length: 8 }];
        near.post(Post::Read { into: &into, from: remote.at(64), signal: Some(3) }).unwrap();
        near.ring().unwrap();
        let done = self.client.next();
        assert!(matches!(done, Completion::Work { id: 3, result: Ok(()), .. }), "{done:?}");
        let mut bytes = [0; 8];
        self.client.region.memory().read(0, &mut bytes);
        assert_eq!(u64::from_le_bytes(bytes), word);
    }
}

#[test]
fn lanes_are_spread_over_rails_leave_a_dead_one_and_come_back_to_it() {
    let second = Second::up();
    let begun = Instant::now();
    let mut scene = Scene::new();
    let mut lanes: Vec<_> = (0..4).map(|_| scene.connect()).collect();
    let mut ways: Vec<_> = lanes.iter().map(|(near, far)| [near.way(), far.way()]).collect();
    lanes.iter_mut().for_each(|lane| scene.use_lane(lane));
    ways.sort();
    let (one, other) = (["rdma(rxe0:1)", "rdma(rxe1:1)"], ["rdma(rxe2:1)", "rdma(rxe3:1)"]);
    assert_eq!(ways, [one, one, other, other]);

    println!("four lanes were made and used after {:?}", begun.elapsed());
    second.take_down();
    let begun = Instant::now();
    let dead: Vec<_> =
        lanes.iter().filter(|(near, _)| near.way() == other[0]).map(|(near, _)| near.id()).collect();
    for _ in &dead {
        let end = scene.client.next();
        let Completion::Disconnected { connection, cause } = end else { panic!("found {end:?}") };
        println!("a lane ended after {:?}: {cause}", begun.elapsed());
        assert!(dead.contains(&connection));
    }
    // They are not accounted for a second time.
    assert_eq!(scene.client.seen.len(), 0);
    for _ in 0..3 {
        let lane = scene.connect();
        assert_eq!([lane.0.way(), lane.1.way()], one);
        lanes.push(lane);
    }
    let stats = scene.client.host.rails();
    println!("{} {}", stats[0], stats[1]);
    assert_eq!((stats[0].lost, stats[1].lost, stats[1].active), (0, 2, false));

    second.run("repair");
    let begun = Instant::now();
    loop {
        let lane = scene.connect();
        if lane.0.way() == other[0] {
            lanes.push(lane);
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "nobody uses the rail that is back");
        lanes.push(lane);
        thread::sleep(Duration::from_millis(500));
    }
    println!("the rail was used again after {:?}", begun.elapsed());
    let mut last = lanes.pop().unwrap();
    scene.use_lane(&mut last);
}

#[test]
fn devices_are_checked_when_the_host_is_made() {
    let _second = Second::up();
    let address: Address = "fervor://127.0.0.1:0".parse().unwrap();
    let made = |address: &str, devices: &[&str]| {
        let devices: Vec<_> = devices.iter().map(|name| name.parse().unwrap()).collect();
        Host::with_devices(&[address.parse().unwrap()], KeyRing::default(), &devices)
            .map_err(|error| error.to_string())
    };
    let names = |host: Host| host.rails().into_iter().map(|rail| rail.name).collect::<Vec<_>>();
    let url = address.to_string();
    assert_eq!(names(made(&url, &[]).unwrap()), ["rxe0:1", "rxe1:1", "rxe2:1", "rxe3:1"]);
    assert_eq!(names(made(&url, &["rxe2"]).unwrap()), ["rxe2:1"]);
    assert!(made(&url, &["rxe7"]).unwrap_err().contains("there is no device `rxe7`"));
    assert!(made(&url, &["rxe0:2"]).unwrap_err().contains("rxe0 has no port 2"));
    assert!(made("rdma://10.7.0.1:0", &["rxe0"]).unwrap_err().contains("only fervor://"));
}
