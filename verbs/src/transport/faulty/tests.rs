//! Each fault happens where the plan says, and does what it says: over `sim` with several seeds, and over `shm`.

use crate::transport::Runtime;
use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    suite::{FaultyRig, Nothing},
    *,
};
use crate::transport::{
    Completion, Endpoint as _, Listener as _, Request as _, WorkError,
    conformance::{
        self, Posts, Rig, Side,
        pair::{Pair, RegionOf, Work, piece, refused_as_disconnected},
    },
    shm::suite::ShmRig,
    sim::{Sim, tests::SimRig},
};

type Rigged<R> = FaultyRig<R, Nothing>;
type Faults<'r, R> = Pair<'r, Rigged<R>>;

/// Runs `body` where the client's host has this plan.
fn with<R: Rig>(seed: u64, plan: &Plan, body: impl FnOnce(&Rigged<R>) + Send + 'static) {
    let rig = Arc::new(Rigged::over(R::new("faulty", seed), [plan.clone(), Plan::default()]));
    let inside = rig.clone();
    rig.run(Box::new(move || body(&inside)));
}

/// Runs `body`, which is generic over the inner rig, over each provider, with several seeds where they matter.
macro_rules! over_all {
    ($plan:expr, $body:ident($($argument:expr),*)) => {
        for seed in 0..6 {
            with::<SimRig>(seed, &$plan, move |rig| $body(rig, $($argument),*));
        }
        with::<ShmRig>(0, &$plan, move |rig| $body(rig, $($argument),*));
    };
}

/// Two hosts with a connection, and a region of each: word `i` of the server's is `100 + i`.
struct Scene<'r, R: Rig> {
    pair: Faults<'r, R>,
    own: RegionOf<Rigged<R>>,
    theirs: RegionOf<Rigged<R>>,
}

impl<'r, R: Rig> Scene<'r, R> {
    fn new(rig: &'r Rigged<R>, config: &EndpointConfig) -> Self {
        let mut pair = Faults::alike(rig, config);
        let own = pair.region(Side::Client, 256, Access::Local);
        let theirs = pair.region(Side::Server, 256, Access::RemoteWrite);
        (0..32).for_each(|i| theirs.memory().store(i * 8, 100 + i as u64));
        pair.connect();
        Self { pair, own, theirs }
    }

    /// Posts and rings request `i`: a message of `i`, a WRITE of `i` to word `i`, or a READ of word `i`.
    fn post(&mut self, kind: Kind, i: u64, signal: Option<u64>) -> Result<(), PostError> {
        let Self { pair, own, theirs } = self;
        let end = pair.to_server.last_mut().expect("a connection");
        let remote = theirs.remote().at(8 * i);
        match kind {
            Kind::Send => end.send(Payload::Inline(&i.to_le_bytes()), None, signal),
            Kind::Write => end.write(Payload::Inline(&i.to_le_bytes()), remote, None, signal),
            Kind::Read => end.read(&[piece(own, 8 * i as usize, 8)], remote, signal),
        }?;
        // Where the connection breaks at this post, the ring is refused.
        let _ = end.ring();
        Ok(())
    }

    /// The ends of connection 0: the client's completions with the cause, and the messages that the server got.
    fn ends(&mut self) -> (Vec<Work>, WorkError, Vec<u64>) {
        let (client, server) = (self.pair.to_server[0].id(), self.pair.to_client[0].id());
        let (works, cause) = self.pair.end_of(Side::Client, client);
        let mut messages = Vec::new();
        loop {
            match self.pair.next(Side::Server) {
                Completion::Received { buffer, .. } => {
                    let endpoint = &mut self.pair.server.endpoint;
                    messages.push(number(endpoint.message(&buffer)));
                    endpoint.release(buffer);
                }
                Completion::Disconnected { connection, .. } => {
                    assert_eq!(connection, server);
                    return (works, cause, messages);
                }
                other => panic!("expected messages and the end, found {other:?}"),
            }
        }
    }

    /// Whether request `i` has happened, which no one waits for any more.
    fn happened(&self, kind: Kind, i: u64, messages: &[u64]) -> bool {
        match kind {
            Kind::Send => messages.contains(&i),
            Kind::Write => self.theirs.memory().load(8 * i as usize) == i,
            Kind::Read => self.own.memory().load(8 * i as usize) == 100 + i,
        }
    }
}

fn number(message: &[u8]) -> u64 {
    u64::from_le_bytes(message.try_into().expect("8 bytes"))
}

fn break_at(kind: Option<Kind>, nth: u64, fate: Fate) -> Plan {
    Plan::one(Fault::Break { connection: 0, at: Point::Post { kind, nth, fate } })
}

#[test]
fn with_an_empty_plan_a_history_is_the_same_event_for_event() {
    fn hash<R: Rig>(rig: R, case: &str, sim: impl Fn(&R) -> Sim) -> u64 {
        let rig = Arc::new(rig);
        let inside = rig.clone();
        let case =
            conformance::cases::<R>().into_iter().find(|c| c.name == case).expect("a case of the suite");
        rig.run(Box::new(move || case.run(&inside)));
        sim(&rig).hash()
    }
    for case in [
        "order_messages_and_immediates_keep_theirs",
        "queues_many_operations_in_flight",
        "handshake_many_clients_at_once",
        "faults_dead_server_with_operations_outstanding",
        "faults_outstanding_operations_complete",
    ] {
        for seed in 0..4 {
            let bare = hash(SimRig::new(case, seed), case, |rig| rig.sim.clone());
            let wrapped = hash(Rigged::<SimRig>::new(case, seed), case, |rig| rig.inner().sim.clone());
            assert_eq!(bare, wrapped, "{case}, seed {seed}");
        }
    }
}

/// It breaks at request 3 of its kind: that has happened or not, as the plan says, and its poster is told nothing of it.
fn at_a_post<R: Rig>(rig: &Rigged<R>, kind: Kind, fate: Fate) {
    let mut scene = Scene::new(rig, &EndpointConfig::default());
    for i in 0..3 {
        // Posts of other kinds do not count.
        let other = if kind == Kind::Read { Kind::Write } else { Kind::Read };
        scene.post(other, 20 + i, None).expect("post");
        scene.post(kind, i, Some(i)).expect("post");
        scene.pair.work(Side::Client, i);
        assert_eq!(fired(rig), [0; 0]);
    }
    scene.post(kind, 3, Some(3)).expect("the request at which it breaks is taken");
    assert_eq!(fired(rig), [0]);
    assert_eq!(scene.post(kind, 4, Some(4)), Err(PostError::Disconnected));
    let (works, cause, messages) = scene.ends();
    assert_eq!(works, [(3, Err(WorkError::RetryExceeded))]);
    assert_eq!(cause, WorkError::RetryExceeded);
    let happened: Vec<bool> = (0..5).map(|i| scene.happened(kind, i, &messages)).collect();
    assert_eq!(happened, [true, true, true, fate == Fate::Done, false]);
    let theirs = scene.theirs.remote();
    scene.pair.posts_are_refused(Side::Client, theirs);
    scene.pair.posts_are_refused(Side::Server, theirs);
    scene.pair.silence();
}

fn fired<R: Rig>(rig: &Rigged<R>) -> Vec<usize> {
    rig.host(Side::Client).report().fired
}

#[test]
fn a_connection_breaks_at_a_post_that_happens_or_not() {
    for kind in [Kind::Send, Kind::Write, Kind::Read] {
        for fate in [Fate::Done, Fate::Undone] {
            over_all!(break_at(Some(kind), 3, fate), at_a_post(kind, fate));
        }
    }
}

/// The last of a queue of unsignalled requests happened, so all have; those whose completion was asked for fail.
fn behind_a_queue<R: Rig>(rig: &Rigged<R>, fate: Fate) {
    let mut scene = Scene::new(rig, &EndpointConfig::default());
    for i in 0..8 {
        scene.post(Kind::Write, i, (i % 3 == 0).then_some(i)).expect("post");
    }
    let (works, _, _) = scene.ends();
    let ids: Vec<u64> = works.iter().map(|work| work.0).collect();
    assert_eq!(ids, [0, 3, 6]);
    let happened: Vec<bool> = (0..8).map(|i| scene.happened(Kind::Write, i, &[])).collect();
    assert_eq!(happened[7], fate == Fate::Done);
    if fate == Fate::Done {
        assert_eq!(happened, [true; 8]);
        assert!(
            works.iter().all(|(_, result)| result.is_ok()),
            "they were known to have happened: {works:?}"
        );
    }
    for (id, result) in works {
        assert!(result.is_err() || happened[id as usize], "{id} did not happen, and succeeded");
    }
    assert_eq!(fired(rig), [0]);
}

#[test]
fn a_break_behind_a_queue_of_requests_is_told_as_the_contract_says() {
    for fate in [Fate::Done, Fate::Undone] {
        over_all!(break_at(None, 7, fate), behind_a_queue(fate));
    }
}

#[test]
fn a_seed_decides_what_a_plan_leaves_open() {
    let outcome = |seed| {
        let found = Arc::new(Mutex::new(None));
        let inside = found.clone();
        with::<SimRig>(1, &Plan { seed, ..break_at(None, 2, Fate::Drawn) }, move |rig| {
            let mut scene = Scene::new(rig, &EndpointConfig::default());
            (0..3).for_each(|i| scene.post(Kind::Write, i, Some(i)).expect("post"));
            scene.ends();
            *inside.lock().expect("the result") = Some(scene.happened(Kind::Write, 2, &[]));
        });
        found.lock().expect("the result").expect("it ran")
    };
    let outcomes: Vec<bool> = (0..20).map(outcome).collect();
    assert!(outcomes.contains(&true) && outcomes.contains(&false), "{outcomes:?}");
    assert_eq!(outcomes, (0..20).map(outcome).collect::<Vec<_>>(), "a seed decided twice, in two ways");
}

/// It breaks behind completion `nth`, and the other connection goes on.
fn at_a_completion<R: Rig>(rig: &Rigged<R>, nth: u64) {
    let mut scene = Scene::new(rig, &EndpointConfig::default());
    for i in 0..6 {
        let expected = if i <= nth { Ok(()) } else { Err(PostError::Disconnected) };
        assert_eq!(scene.post(Kind::Write, i, Some(i)), expected, "{i}");
        if i > nth {
            break;
        }
        scene.pair.work(Side::Client, i);
        assert_eq!(fired(rig).len(), usize::from(i == nth));
    }
    let (works, cause, _) = scene.ends();
    assert_eq!((works, cause), (vec![], WorkError::RetryExceeded));
    scene.pair.connect();
    for i in 10..16 {
        scene.post(Kind::Write, i, Some(i)).expect("post");
        scene.pair.work(Side::Client, i);
    }
    let counts = rig.host(Side::Client).report().connections;
    let count = |writes| Counts { writes, completions: writes, ..Counts::default() };
    assert_eq!(counts, [count(nth + 1), count(6)]);
    scene.pair.silence();
}

#[test]
fn a_connection_breaks_behind_a_completion_and_others_go_on() {
    for nth in [0, 2] {
        let plan = Plan::one(Fault::Break { connection: 0, at: Point::Completion { nth } });
        over_all!(plan, at_a_completion(nth));
    }
}

/// What arrives counts, too, and is handed out before the end.
fn at_an_arrival<R: Rig>(rig: &Rigged<R>) {
    let mut scene = Scene::new(rig, &EndpointConfig::default());
    for i in 0..3_u64 {
        let end = scene.pair.end(Side::Server);
        let posted = end.send(Payload::Inline(&i.to_le_bytes()), None, None);
        assert_eq!(posted.and_then(|()| end.ring()).is_ok(), i < 2, "{i}");
        if i < 2 {
            assert_eq!(number(&scene.pair.message(Side::Client).1), i);
            let broken = scene.post(Kind::Write, i, None);
            assert_eq!(broken, if i == 1 { Err(PostError::Disconnected) } else { Ok(()) });
        }
        if i == 1 {
            let (works, ..) = scene.ends();
            assert_eq!(works, []);
        }
    }
    assert_eq!(fired(rig), [0]);
}

#[test]
fn a_connection_breaks_behind_an_arrival() {
    over_all!(Plan::one(Fault::Break { connection: 0, at: Point::Completion { nth: 1 } }), at_an_arrival());
}

/// The node dies at operation `k`: 1 + 3i posts message `i`, 2 + 3i rings for it, 3 + 3i takes its completion.
fn dies<R: Rig>(rig: &Rigged<R>, k: u64) {
    let mut scene = Scene::new(rig, &EndpointConfig::default());
    let i = (k - 1) / 3;
    for message in 0..i {
        scene.post(Kind::Send, message, Some(message)).expect("post");
        scene.pair.work(Side::Client, message);
    }
    assert_eq!(fired(rig), [0; 0]);
    let posted = scene.post(Kind::Send, i, Some(i));
    assert_eq!(posted.is_err(), k == 1 + 3 * i);
    assert_eq!(fired(rig).len(), usize::from(k < 3 + 3 * i));
    let (works, _, messages) = scene.ends();
    assert_eq!(fired(rig), [0]);
    let least: Vec<u64> = (0..i + u64::from(k == 3 + 3 * i)).collect();
    let most: Vec<u64> = (0..i + u64::from(k > 1 + 3 * i)).collect();
    assert!(messages == least || messages == most, "{messages:?}: neither {least:?} nor {most:?}");
    assert!(works.iter().all(|(id, _)| *id == i) && works.len() == usize::from(posted.is_ok()), "{works:?}");
    // Whatever it does now fails.
    let host = rig.host(Side::Client);
    let dead = |what: &str, result: Result<(), Error>| {
        let error = result.expect_err(what).to_string();
        assert!(error.contains(what) && error.contains("the node is dead"), "{error}");
    };
    let attach = scene.pair.client.endpoint.attach();
    dead("connect", host.connect(&attach, &rig.address(0), &[], Duration::ZERO).map(drop));
    dead("listen", host.listen(&rig.address(1)).map(drop));
    dead("endpoint", host.endpoint(&EndpointConfig::default()).map(drop));
    dead("register", host.register(&Memory::new("late", 8).expect("memory"), Access::Local).map(drop));
    dead("export", host.export(&Exclusive::new("late", 8).expect("memory")).map(drop));
    refused_as_disconnected(&mut scene.pair.to_server[0], &scene.own, scene.theirs.remote());
    scene.pair.silence();
}

#[test]
fn a_node_dies_at_any_of_its_operations() {
    for operation in 1..10 {
        over_all!(Plan::one(Fault::Die { operation }), dies(operation));
    }
}

/// A node of the simulator that sends six messages and dies at operation `k`, in the middle of a call. Returns how many
/// arrived, and whether it outlived its work.
fn mortal(seed: u64, operation: u64) -> (u64, bool) {
    let sim = Sim::new(seed);
    let (server, client) = (sim.node("server"), sim.node("client"));
    let (arrived, lived) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let kill = {
        let (sim, client) = (sim.clone(), client.clone());
        move || sim.kill(&client)
    };
    let address: Address = "sim://server".parse().expect("an address");
    let mortal = Faulty::mortal(client.clone(), Plan::one(Fault::Die { operation }), kill);
    let count = arrived.clone();
    sim.spawn(&server.clone(), "main", {
        let (address, client, sim) = (address.clone(), mortal.clone(), sim.clone());
        let lived = lived.clone();
        move || {
            let mut listener = server.listen(&address).expect("listen");
            let mut endpoint = server.endpoint(&EndpointConfig::default()).expect("endpoint");
            let inside = client.clone();
            let body = move || {
                let mut endpoint = inside.endpoint(&EndpointConfig::default()).expect("endpoint");
                let (mut connection, _) = inside
                    .connect(&endpoint.attach(), &address, &[], Duration::from_secs(5))
                    .expect("connect");
                for i in 0..6_u64 {
                    connection.send(Payload::Inline(&i.to_le_bytes()), None, Some(i)).expect("post");
                    connection.ring().expect("ring");
                    let mut turn = 0;
                    while endpoint.poll(&mut Vec::new()) == 0 {
                        inside.relax(turn);
                        turn += 1;
                    }
                }
                lived.store(1, Ordering::Relaxed);
            };
            drop(client.spawn("main", None, body).expect("spawn"));
            let Some(request) = listener.accept(Duration::from_secs(5)).expect("accept") else { return };
            let connection = request.accept(&endpoint.attach(), &[]).expect("accept");
            let (mut seen, mut over) = (Vec::new(), false);
            let mut died = None;
            while !over {
                endpoint.poll(&mut seen);
                for completion in seen.drain(..) {
                    match completion {
                        Completion::Received { buffer, .. } => {
                            assert_eq!(
                                number(endpoint.message(&buffer)),
                                count.fetch_add(1, Ordering::Relaxed)
                            );
                            endpoint.release(buffer);
                        }
                        Completion::Disconnected { .. } => over = true,
                        other => panic!("expected messages and the end, found {other:?}"),
                    }
                }
                if !client.report().fired.is_empty() {
                    let died = *died.get_or_insert(server.now());
                    assert!(server.now() < died + Duration::from_secs(2), "its death is not found out");
                }
                sim.sleep(&server, Duration::from_micros(5));
            }
            drop(connection);
        }
    });
    sim.run();
    (arrived.load(Ordering::Relaxed), lived.load(Ordering::Relaxed) == 1)
}

#[test]
fn a_node_of_the_simulator_is_killed_in_the_middle_of_a_call() {
    for seed in 0..6 {
        assert_eq!(mortal(seed, 0), (0, false));
        for operation in 1..=18 {
            let (arrived, lived) = mortal(seed, operation);
            let i = (operation - 1) / 3;
            assert!(!lived, "it was killed at operation {operation}, and went on");
            assert!((i..=i + 1).contains(&arrived), "{arrived} messages before operation {operation}");
        }
        assert_eq!(mortal(seed, 19), (6, true), "it has 19 operations");
    }
}

const LATE: Duration = Duration::from_millis(4);

fn late(of: Shown) -> Plan {
    Plan::one(Fault::Delay { of, one_in: 1, longest: LATE })
}

/// Requests have happened long before their completion shows, and until then have their place in the send queue.
fn late_works<R: Rig>(rig: &Rigged<R>) {
    let mut scene = Scene::new(rig, &EndpointConfig { send_depth: 8, ..EndpointConfig::default() });
    let mut longest = Duration::ZERO;
    for round in 0..10 {
        for i in 0..8 {
            scene.post(Kind::Write, i, Some(8 * round + i)).expect("post");
        }
        assert_eq!(scene.post(Kind::Write, 8, None), Err(PostError::Full));
        let happened = scene.pair.until("the last WRITE to be seen", |pair| {
            let seen = pair.client.poll();
            (seen == 8 || scene.theirs.memory().load(56) == 7).then(|| pair.client.transport.now())
        });
        for i in 0..8 {
            scene.pair.until("a completion", |pair| {
                let shown = pair.client.poll();
                // Those that were not handed out, and those that this test has not looked at.
                assert!(pair.to_server[0].room() <= i as usize + shown);
                (shown > 0).then_some(())
            });
            scene.pair.work(Side::Client, 8 * round + i);
        }
        longest = longest.max(scene.pair.client.transport.now() - happened);
        scene.theirs.memory().store(56, 0);
    }
    assert!(longest > LATE / 8, "the latest was {longest:?} late");
    let report = rig.host(Side::Client).report();
    assert!(report.late >= 10 && report.fired.is_empty(), "{report:?}");
}

#[test]
fn completions_of_requests_are_late() {
    over_all!(late(Shown::Work), late_works());
}

/// What arrives is late at a host whose plan says so, in its order, and in no other way.
fn late_arrivals<R: Rig>(rig: &Rigged<R>) {
    let mut scene = Scene::new(rig, &EndpointConfig::default());
    let mut longest = Duration::ZERO;
    for i in 0..20_u64 {
        let begun = scene.pair.client.transport.now();
        let end = scene.pair.end(Side::Server);
        end.send(Payload::Inline(&(2 * i).to_le_bytes()), None, Some(i)).expect("post");
        end.send(Payload::Inline(&(2 * i + 1).to_le_bytes()), None, None).expect("post");
        end.ring().expect("ring");
        for message in [2 * i, 2 * i + 1] {
            assert_eq!(number(&scene.pair.message(Side::Client).1), message);
        }
        longest = longest.max(scene.pair.client.transport.now() - begun);
        scene.pair.work(Side::Server, i);
    }
    assert!(longest > LATE / 8, "the latest was {longest:?} late");
    assert_eq!(rig.host(Side::Server).report().late, 0);
    assert!(rig.host(Side::Client).report().late >= 20);
}

#[test]
fn arrivals_are_late() {
    over_all!(late(Shown::Arrival), late_arrivals());
}

/// The end is late, and still the last word; who waits is woken when it shows.
fn late_ends<R: Rig>(rig: &Rigged<R>) {
    let mut scene = Scene::new(rig, &EndpointConfig::default());
    scene.post(Kind::Write, 1, Some(1)).expect("post");
    scene.pair.work(Side::Client, 1);
    scene.pair.end(Side::Server).disconnect();
    let host = &mut scene.pair.client;
    let begun = host.transport.now();
    let mut waits = 0;
    while host.poll() == 0 {
        host.endpoint.wait(Duration::from_secs(10));
        waits += 1;
        assert!(host.transport.now() < begun + Duration::from_secs(5), "it slept past the end");
    }
    assert!(waits < 1000, "{waits} waits: it does not sleep");
    scene.ends();
    assert_eq!(rig.host(Side::Client).report().late, 1);
}

#[test]
fn ends_are_late_and_end_a_wait() {
    over_all!(late(Shown::End), late_ends());
}

/// The last three of its messages come again on the next connection, before what is new.
fn replays<R: Rig>(rig: &Rigged<R>, break_after: u64) {
    let mut scene = Scene::new(rig, &EndpointConfig::default());
    for i in 0..break_after {
        scene.post(Kind::Send, i, Some(i)).expect("post");
        scene.post(Kind::Write, i, None).expect("post");
        scene.pair.work(Side::Client, i);
    }
    // Not while it lives: this one is another connection to the same address.
    scene.pair.connect();
    scene.post(Kind::Send, 1000, None).expect("post");
    // The last message is not known to have arrived.
    let end = &mut scene.pair.to_server[0];
    end.send(Payload::Inline(&break_after.to_le_bytes()), Some(7), Some(break_after)).expect("post");
    end.ring().expect("ring");
    end.disconnect();
    let client = scene.pair.to_server[0].id();
    scene.pair.end_of(Side::Client, client);
    assert_eq!(fired(rig), [0; 0]);
    scene.pair.connect();
    scene.post(Kind::Send, 2000, None).expect("post");
    let newest = scene.pair.to_client[2].id();
    let first = (break_after + 1).saturating_sub(3);
    let mut expected: Vec<_> = (first..=break_after).collect();
    expected.push(2000);
    let mut found = Vec::new();
    while found.len() < expected.len() {
        let message = match scene.pair.next(Side::Server) {
            Completion::Received { connection, buffer, immediate } => {
                let message = number(scene.pair.server.endpoint.message(&buffer));
                scene.pair.server.endpoint.release(buffer);
                (connection == newest).then_some((message, immediate))
            }
            _ => None,
        };
        if let Some((message, immediate)) = message {
            assert_eq!(immediate, (message == break_after).then_some(7), "with its immediate");
            found.push(message);
        }
    }
    assert_eq!(found, expected);
    let report = rig.host(Side::Client).report();
    assert_eq!((report.fired, report.replayed), (vec![0], expected.len() as u64 - 1));
    // Once.
    scene.pair.connect();
    scene.post(Kind::Send, 3000, None).expect("post");
    let last = scene.pair.until("the last message", |pair| match pair.server.take() {
        Some(Completion::Received { buffer, .. }) => {
            let message = number(pair.server.endpoint.message(&buffer));
            pair.server.endpoint.release(buffer);
            Some(message)
        }
        _ => None,
    });
    assert_eq!(last, 3000);
}

#[test]
fn messages_come_again_after_a_reconnect() {
    for break_after in [1, 6] {
        over_all!(Plan::one(Fault::Replay { connection: 0, last: 3 }), replays(break_after));
    }
}

#[test]
fn a_plan_and_a_seed_make_one_history() {
    let run = |seed| {
        let faults = vec![
            Fault::Break { connection: 0, at: Point::Post { kind: None, nth: 20, fate: Fate::Drawn } },
            Fault::Delay { of: Shown::Work, one_in: 2, longest: LATE },
        ];
        let rig = Arc::new(Rigged::over(SimRig::new("", 5), [Plan { seed, faults }, Plan::default()]));
        let inside = rig.clone();
        rig.run(Box::new(move || {
            let mut scene = Scene::new(&*inside, &EndpointConfig::default());
            let mut i = 0;
            while scene.post(Kind::Write, i % 32, Some(i)).is_ok() {
                i += 1;
            }
            assert_eq!(scene.ends().0.len(), 21);
        }));
        rig.inner().sim.hash()
    };
    let hashes: BTreeSet<u64> = (0..8).map(run).collect();
    assert!(hashes.len() > 4, "{} histories of 8 seeds", hashes.len());
    assert_eq!(hashes, (0..8).map(run).collect());
}
