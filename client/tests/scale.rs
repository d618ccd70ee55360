//! The real server and the real client on 64 nodes and more, in a simulation of time: each worker reads a few rows, computes,
//! adds to its own row and to a common one, and ends its clock. What a read may lack is bounded by the model, and how long it
//! all takes by the network and the computing.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fervor_client::{Client, ClientOptions, Model};
use fervor_server::{Config, Server};
use fervor_verbs::{
    Address,
    transport::{
        Runtime,
        sim::{Fabric, Node, Settings, Sim},
    },
};

const SERVERS: usize = 4;
const WIDTH: usize = 16;
/// What a worker computes in a clock.
const COMPUTING: Duration = Duration::from_millis(1);

/// What a run has come to.
struct Outcome {
    hash: u64,
    events: u64,
    /// Virtual time from the first worker's start to the last one's end.
    time: Duration,
}

/// One client of one worker: it reads the rows of its neighbours, and one that all add to.
fn client(
    node: &Node,
    servers: &[Address],
    model: Model,
    clients: u64,
    me: u64,
    clocks: u64,
) -> (Duration, Duration) {
    let options = ClientOptions { clients: clients as u16, cache_bytes: 1 << 20, ..ClientOptions::default() };
    let client = Client::connect_on(node, servers, options).unwrap();
    let table = client.table::<i64>("t", clients + 1, WIDTH, model).unwrap();
    let mut worker = client.worker().unwrap();
    let start = node.now();
    let mut row = [0i64; WIDTH];
    for clock in 0..clocks {
        for other in (me..me + 8).map(|other| other % clients) {
            worker.get(&table, other, &mut row).unwrap();
            let seen = row[0] as u64;
            if other == me {
                assert_eq!(seen, clock, "{model}: own updates, each once");
            } else {
                let least = model.staleness().map_or(0, |s| clock.saturating_sub(s.into()));
                assert!(seen >= least, "{model}: at clock {clock}, {seen} of worker {other}");
            }
        }
        node.compute(COMPUTING);
        worker.inc(&table, me, &[1; WIDTH]).unwrap();
        worker.inc(&table, clients, &[1; WIDTH]).unwrap();
        worker.clock().unwrap();
    }
    let end = node.now();
    drop(worker);
    client.close().unwrap();
    (start, end)
}

fn run(model: Model, clients: u64, clocks: u64, seed: u64) -> Outcome {
    let sim = Sim::with(seed, Settings { fabric: Some(Fabric::roce_25g()), ..Settings::default() });
    let addresses: Vec<Address> = (0..SERVERS).map(|n| Address::Sim(format!("server-{n}"))).collect();
    let (left, up) = (Arc::new(AtomicU64::new(clients)), Arc::new(AtomicU64::new(0)));
    for (number, address) in addresses.iter().enumerate() {
        let (sim, host, address) = (sim.clone(), sim.node(&format!("server {number}")), address.clone());
        let (left, up) = (left.clone(), up.clone());
        sim.clone().spawn(&host.clone(), "main", move || {
            let mut config = Config::new(address);
            (config.memory, config.clients, config.id) = (1 << 20, clients as usize, number as u64);
            let server = Server::start(&host, &config).unwrap();
            up.fetch_add(1, Ordering::SeqCst);
            while left.load(Ordering::SeqCst) > 0 {
                sim.sleep(&host, Duration::from_millis(10));
            }
            assert!(server.stop());
        });
    }
    let times = Arc::new(Mutex::new(Vec::new()));
    for me in 0..clients {
        let (sim, host, addresses) = (sim.clone(), sim.node(&format!("client {me}")), addresses.clone());
        let (left, up, times) = (left.clone(), up.clone(), times.clone());
        sim.clone().spawn(&host.clone(), "main", move || {
            while up.load(Ordering::SeqCst) < SERVERS as u64 {
                sim.sleep(&host, Duration::from_millis(1));
            }
            let time = client(&host, &addresses, model, clients, me, clocks);
            times.lock().unwrap().push(time);
            left.fetch_sub(1, Ordering::SeqCst);
        });
    }
    sim.run();
    let times = times.lock().unwrap();
    let start = times.iter().map(|time| time.0).min().unwrap();
    let end = times.iter().map(|time| time.1).max().unwrap();
    Outcome { hash: sim.hash(), events: sim.events(), time: end - start }
}

#[test]
fn the_guarantee_holds_on_64_nodes_and_a_seed_replays() {
    for model in [Model::Bsp, Model::Ssp { staleness: 2 }, Model::Essp { staleness: 2 }, Model::Async] {
        let clocks = 8;
        let first = run(model, 64, clocks, 5);
        assert!(first.events < 200_000, "{model}: {} events: who waits had better sleep", first.events);
        assert_eq!(first.hash, run(model, 64, clocks, 5).hash, "{model}: a seed made two histories");
        let computing = COMPUTING * clocks as u32;
        assert!(
            (computing..computing * 2).contains(&first.time),
            "{model}: {:?} for {computing:?}",
            first.time
        );
    }
    let hashes = [6, 7].map(|seed| run(Model::Bsp, 64, 2, seed).hash);
    assert_ne!(hashes[0], hashes[1]);
}
