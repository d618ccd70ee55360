//! Connections that break and are made again, with real threads over shared memory and TCP: nothing is lost or counted twice, and
//! workers only see time pass. (In the simulator: `broken.rs`, `guarantee.rs`.)

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use fervor_client::{Client, ClientOptions, Model};
use fervor_server::Server;
use fervor_verbs::{
    Address,
    transport::{
        any::Host,
        faulty::{Fate, Fault, Faulty, Plan, Point, Report},
    },
};
use support::{Folder, config, raw::Raw};
use zerocopy::IntoBytes;

mod support;

const MODELS: [Model; 5] = [
    Model::Bsp,
    Model::Ssp { staleness: 1 },
    Model::Essp { staleness: 1 },
    Model::Async,
    Model::Vap { v0: 50.0 },
];
const ROWS: u64 = 8;
const CLOCKS: u64 = 12;

/// A server of one shard that waits for those who come back.
fn server(address: &Address, lease: Duration) -> (Host, Server<Faulty<Host>>) {
    let host = Host::for_addresses(std::slice::from_ref(address)).unwrap();
    let mut config = config(address, 1);
    config.lease = lease;
    // Round a provider whose connections can break.
    let server = Server::start(&Faulty::new(host.clone(), Plan::default()), &config).unwrap();
    (host, server)
}

/// A client of a job of two, of which each of two workers adds 1 to all rows in each clock; how often it went on.
fn train(host: &Faulty<Host>, address: &Address, model: Model) -> u64 {
    let options = ClientOptions { clients: 2, copies: true, check: true, ..ClientOptions::default() };
    let client = Client::connect_on(host, std::slice::from_ref(address), options).unwrap();
    let table = client.table::<i64>("t", ROWS, 4, model).unwrap();
    let workers: Vec<_> = (0..2).map(|_| client.worker().unwrap()).collect();
    thread::scope(|scope| {
        for mut worker in workers {
            let table = &table;
            scope.spawn(move || {
                let mut copy = [0; 4];
                for clock in 1..=CLOCKS {
                    for row in 0..ROWS {
                        worker.inc(table, row, &[1; 4]).unwrap();
                        worker.get(table, row, &mut copy).unwrap();
                        assert!(copy[0] >= clock as i64, "{model}: {copy:?} lacks own updates at {clock}");
                        assert!(copy[0] <= 4 * CLOCKS as i64, "{model}: {copy:?}");
                    }
                    worker.clock().unwrap();
                }
                assert_eq!(worker.stats().violations, 0);
            });
        }
    });
    let resumptions = client.stats().resumptions;
    client.close().unwrap();
    resumptions
}

/// Breaks connection `connection` of a client at its post or completion `nth`, in a job of this model. How often it went on.
fn heals(address: &Address, model: Model, connection: usize, nth: u64) -> u64 {
    let (host, server) = server(address, Duration::from_secs(30));
    let at = match nth % 3 {
        0 => Point::Completion { nth },
        1 => Point::Post { kind: None, nth, fate: Fate::Done },
        _ => Point::Post { kind: None, nth, fate: Fate::Undone },
    };
    let faulty = Faulty::new(host.clone(), Plan::one(Fault::Break { connection, at }));
    let whole = Faulty::new(host, Plan::default());
    let resumptions = thread::scope(|scope| {
        let other = scope.spawn(|| train(&whole, address, model));
        let resumptions = train(&faulty, address, model);
        assert_eq!(other.join().unwrap(), 0);
        resumptions
    });
    let client = Client::connect_on(&whole, std::slice::from_ref(address), ClientOptions::default()).unwrap();
    let table = client.table::<i64>("t", ROWS, 4, model).unwrap();
    let mut worker = client.worker().unwrap();
    let mut copy = [0; 4];
    for row in 0..ROWS {
        worker.get(&table, row, &mut copy).unwrap();
        assert_eq!(
            copy,
            [4 * CLOCKS as i64; 4],
            "{model}, connection {connection}, {at:?}: each update once"
        );
    }
    drop(worker);
    client.close().unwrap();
    // It may have been when the client left.
    let counted = server.resumptions();
    assert!(counted >= resumptions, "{model}: the server says {counted}, the client {resumptions}");
    assert!(server.stop());
    counted
}

/// The first connection of a client asks for the shards; the second is for messages; then come lanes.
fn all_heal(address: impl Fn(u64) -> Address) {
    for model in MODELS {
        let resumed: u64 = (0..18).map(|nth| heals(&address(nth), model, 1, nth)).sum();
        assert!(resumed >= 15, "{model}: {resumed} resumptions in 18 jobs");
        for nth in 0..4 {
            assert_eq!(heals(&address(nth), model, 2, nth), 0, "{model}: a lane is made anew by itself");
        }
    }
}

#[test]
fn a_connection_over_shared_memory_that_breaks_at_any_call_is_made_again() {
    let folder = Folder::new("resume");
    all_heal(|nth| folder.address(&format!("{nth}.sock")));
}

#[test]
fn a_connection_over_tcp_that_breaks_at_any_call_is_made_again() {
    let process = std::process::id();
    let host = format!("127.{}.{}.7", 1 + process % 250, process / 250 % 250);
    all_heal(|nth| Address::Tcp { host: host.clone(), port: 7480 + nth as u16 });
}

#[test]
fn who_does_not_come_back_holds_the_clock_back_for_the_lease_and_no_longer() {
    let folder = Folder::new("lease");
    let address = folder.address("s.sock");
    let lease = Duration::from_millis(300);
    let (host, server) = server(&address, lease);
    let faulty = Arc::new(Faulty::new(host, Plan::default()));
    let raw = Raw::try_connect(&*faulty, &address, |mut hello| {
        (hello.clients, hello.identity) = (2, 77);
        hello.as_bytes().to_vec()
    });
    let raw = raw.unwrap();
    let options = ClientOptions { clients: 2, ..ClientOptions::default() };
    let client = Client::connect_on(&*faulty, std::slice::from_ref(&address), options).unwrap();
    let table = client.table::<i64>("t", 1, 1, Model::Bsp).unwrap();
    let mut worker = client.worker().unwrap();
    let gone = Instant::now();
    drop(raw);
    worker.clock().unwrap();
    worker.get(&table, 0, &mut [0]).unwrap();
    assert!(gone.elapsed() >= lease, "after {:?}", gone.elapsed());
    // Its lease is over: it is not known any more. Nor is anybody else whom the server has not seen.
    for identity in [77, 78] {
        let mut stranger = Raw::try_connect(&*faulty, &address, |mut hello| {
            (hello.clients, hello.identity, hello.attempt) = (2, identity, 1);
            hello.as_bytes().to_vec()
        })
        .unwrap();
        assert!(stranger.fault().contains("is not known: its lease is over"));
    }
    let nobody = Raw::try_connect(&*faulty, &address, |mut hello| {
        hello.attempt = 1;
        hello.as_bytes().to_vec()
    });
    assert!(nobody.err().unwrap().contains("identity = 0"));
    worker.clock().unwrap();
    drop(worker);
    client.close().unwrap();
    assert!(server.stop());
}

/// Where nobody comes back on time, and a test that waited for that would not end.
const LONG: Duration = Duration::from_secs(3600);

/// A client of a job of `clients`, which waits for its servers for long.
fn join(host: &Faulty<Host>, address: &Address, clients: u16) -> Client<Faulty<Host>> {
    let options = ClientOptions { clients, copies: true, lease: LONG, ..ClientOptions::default() };
    Client::connect_on(host, std::slice::from_ref(address), options).unwrap()
}

/// Two clients train, and one is dropped in the middle of that: before its worker, or after it.
fn goes_without_closing(address: &Address, worker_last: bool) {
    let (host, server) = server(address, LONG);
    let host = Faulty::new(host, Plan::default());
    let clients = [join(&host, address, 2), join(&host, address, 2)];
    let tables = clients.each_ref().map(|client| client.table::<i64>("t", ROWS, 4, Model::Bsp).unwrap());
    let [(stays, mut worker), (goes, mut other)] = clients.map(|client| {
        let worker = client.worker().unwrap();
        (client, worker)
    });
    for row in 0..ROWS {
        other.inc(&tables[1], row, &[1; 4]).unwrap();
    }
    other.clock().unwrap();
    // Of a clock that it does not end: handed over all the same.
    other.inc(&tables[1], 0, &[1; 4]).unwrap();
    if worker_last {
        drop(goes);
        drop(other);
    } else {
        drop(other);
        drop(goes);
    }
    let mut copy = [0; 4];
    for _ in 0..CLOCKS {
        worker.clock().unwrap();
        worker.get(&tables[0], 0, &mut copy).unwrap();
    }
    assert_eq!(copy, [2; 4], "all that it had handed over came before its farewell");
    drop(worker);
    stays.close().unwrap();
    assert!(server.stop());
}

#[test]
fn a_client_that_is_dropped_holds_nobody_up() {
    let folder = Folder::new("dropped");
    let process = std::process::id();
    let host = format!("127.{}.{}.8", 1 + process % 250, process / 250 % 250);
    for worker_last in [false, true] {
        goes_without_closing(&folder.address(&format!("{worker_last}.sock")), worker_last);
        goes_without_closing(&Address::Tcp { host: host.clone(), port: 7480 }, worker_last);
    }
}

#[test]
fn a_job_that_is_starting_waits_for_another_in_the_place_of_one_that_is_dropped() {
    let folder = Folder::new("starting");
    let address = folder.address("s.sock");
    let (host, server) = server(&address, LONG);
    let host = Faulty::new(host, Plan::default());
    drop(join(&host, &address, 3));
    let (first, second) = (join(&host, &address, 3), join(&host, &address, 3));
    let table = first.table::<i64>("t", 1, 1, Model::Ssp { staleness: 1 }).unwrap();
    let (mut worker, mut other) = (first.worker().unwrap(), second.worker().unwrap());
    worker.clock().unwrap();
    other.clock().unwrap();
    worker.get(&table, 0, &mut [0]).unwrap();
    assert_eq!(*worker.stats().clock_differential.iter().next().unwrap().0, -2, "no clock has ended");
    let third = join(&host, &address, 3);
    let mut last = third.worker().unwrap();
    for worker in [&mut last, &mut other, &mut worker] {
        worker.clock().unwrap();
    }
    last.clock().unwrap();
    worker.get(&table, 0, &mut [0]).unwrap();
    drop((worker, other, last));
    [first, second, third].into_iter().for_each(|client| client.close().unwrap());
    assert!(server.stop());
}

/// A client ends a clock and is dropped, where this happens to its connections: what it did.
fn is_dropped(plan: Plan) -> Report {
    let folder = Folder::new("unheard");
    let address = folder.address("s.sock");
    let (host, server) = server(&address, LONG);
    let faulty = Faulty::new(host, plan);
    let client = join(&faulty, &address, 1);
    let mut worker = client.worker().unwrap();
    worker.clock().unwrap();
    drop(worker);
    let before = Instant::now();
    drop(client);
    assert!(before.elapsed() < Duration::from_secs(5), "after {:?}", before.elapsed());
    assert!(server.stop());
    faulty.report()
}

#[test]
fn a_farewell_that_nobody_hears_is_not_waited_for_without_end() {
    let report = is_dropped(Plan::default());
    let farewell = report.connections[1].posts() - 1;
    for fate in [Fate::Done, Fate::Undone] {
        let at = Point::Post { kind: None, nth: farewell, fate };
        assert_eq!(is_dropped(Plan::one(Fault::Break { connection: 1, at })).fired, [0]);
    }
}

/// Somebody with an identity that he has made up says that he comes back.
fn stranger(host: &Host, address: &Address, identity: u64, buffers: usize) -> Raw<Host> {
    Raw::with_buffers(host, address, buffers, |mut hello| {
        (hello.identity, hello.attempt) = (identity, 1);
        hello.as_bytes().to_vec()
    })
    .unwrap()
}

#[test]
fn those_who_make_identities_up_keep_no_places() {
    let process = std::process::id();
    let address =
        Address::Tcp { host: format!("127.{}.{}.9", 1 + process % 250, process / 250 % 250), port: 7480 };
    let host = Host::for_addresses(std::slice::from_ref(&address)).unwrap();
    let mut config = config(&address, 1);
    (config.clients, config.lease) = (2, LONG);
    let server = Server::start(&host, &config).unwrap();
    // They take nothing of what they are told.
    let deaf: Vec<_> = (1..=8).map(|identity| stranger(&host, &address, identity, 0)).collect();
    let began = Instant::now();
    // There is no place for one more. That costs him a word, and nobody else anything.
    let mut ninth = stranger(&host, &address, 9, 16);
    ninth.until("the end", |raw| raw.ended.then_some(()));
    assert_eq!(ninth.fault(), "");
    let options = || ClientOptions { clients: 2, ..ClientOptions::default() };
    let clients =
        [(); 2].map(|()| Client::connect_on(&host, std::slice::from_ref(&address), options()).unwrap());
    let mut workers = clients.each_ref().map(|client| client.worker().unwrap());
    for worker in &mut workers {
        worker.clock().unwrap();
    }
    // All of them are hung up on, though they take nothing, and then the next one is told.
    for mut one in deaf {
        one.until("the end", |raw| raw.ended.then_some(()));
    }
    assert!(began.elapsed() < Duration::from_secs(20), "after {:?}", began.elapsed());
    assert!(stranger(&host, &address, 10, 16).fault().contains("is not known"));
    // A client that does wrong and takes nothing does not keep its place either.
    drop(workers);
    clients.into_iter().for_each(|client| client.close().unwrap());
    let rude = |_| {
        let mut raw = Raw::with_buffers(&host, &address, 0, |hello| hello.as_bytes().to_vec()).unwrap();
        raw.send(&[0; 24]);
        raw
    };
    for mut raw in [1, 2].map(rude) {
        raw.until("the end", |raw| raw.ended.then_some(()));
    }
    Client::connect_on(&host, std::slice::from_ref(&address), options()).unwrap().close().unwrap();
    assert!(server.stop());
}
