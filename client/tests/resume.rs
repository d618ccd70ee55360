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
        faulty::{Fate, Fault, Faulty, Plan, Point},
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
