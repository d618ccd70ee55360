//! The SSP guarantee: every worker adds 1 to its own element each clock; every reader checks every element against the
//! bound of the table's model, and its own against equality. Over shared memory with real threads, and in the
//! simulator, which delivers the worst that the transport's contract allows.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use fervor_client::{Client, ClientOptions, Model};
use fervor_server::{Config, Server};
use fervor_verbs::{
    Address,
    transport::{Thread, Transport, any::Host, sim::Sim},
};

const CLIENTS: usize = 2;
const WORKERS: usize = 4;
/// Rows span several cache lines.
const WIDTH: usize = 40;
const MODELS: [Model; 4] =
    [Model::Bsp, Model::Ssp { staleness: 3 }, Model::Essp { staleness: 3 }, Model::Async];

/// What each worker has added so far: an upper bound for what others may see.
type Added = Arc<[AtomicU64; WORKERS]>;

fn work<T: Transport>(
    mut worker: fervor_client::Worker<T>,
    table: &fervor_client::Table<i64>,
    me: usize,
    added: &Added,
    clocks: u64,
) {
    let model = table.schema().model;
    let mut row = vec![0i64; WIDTH];
    for clock in 0..clocks {
        for other in 0..WORKERS {
            worker.get(table, other as u64, &mut row).unwrap();
            assert!(row.iter().all(|v| *v == row[0]), "{model}: torn: {row:?}");
            let seen = row[0] as u64;
            if other == me {
                assert_eq!(seen, clock, "{model}: own updates, each once");
                continue;
            }
            let least = model.staleness().map_or(0, |s| clock.saturating_sub(s.into()));
            let most = added[other].load(Ordering::SeqCst);
            assert!(
                (least..=most).contains(&seen),
                "{model}: worker {me} at clock {clock} saw {seen} of worker {other}, not {least}..={most}"
            );
        }
        added[me].fetch_add(1, Ordering::SeqCst);
        worker.inc(table, me as u64, &[1; WIDTH]).unwrap();
        worker.get(table, me as u64, &mut row).unwrap();
        assert_eq!(row[0] as u64, clock + 1, "{model}: read my writes");
        worker.clock().unwrap();
    }
}

/// One client with half of the workers, each in a thread of its own.
fn client<T: Transport>(
    transport: &T,
    server: &Address,
    model: Model,
    number: usize,
    added: &Added,
    clocks: u64,
) {
    let options = ClientOptions { clients: CLIENTS as u16, ..ClientOptions::default() };
    let client = Client::connect_on(transport, std::slice::from_ref(server), options).unwrap();
    let table = client.table::<i64>("t", WORKERS as u64, WIDTH, model).unwrap();
    let each = WORKERS / CLIENTS;
    let workers: Vec<_> = (0..each).map(|_| client.worker().unwrap()).collect();
    let threads: Vec<_> = workers
        .into_iter()
        .enumerate()
        .map(|(i, worker)| {
            let (table, added) = (table.clone(), added.clone());
            let body = move || work(worker, &table, number * each + i, &added, clocks);
            transport.spawn("worker", None, body).unwrap()
        })
        .collect();
    for thread in threads {
        assert!(thread.join(), "{model}: a worker failed");
    }
    client.close().unwrap();
}

/// Everything was applied, once: a new client reads the sums.
fn sums<T: Transport>(transport: &T, server: &Address, model: Model, clocks: u64) {
    let client =
        Client::connect_on(transport, std::slice::from_ref(server), ClientOptions::default()).unwrap();
    let table = client.table::<i64>("t", WORKERS as u64, WIDTH, model).unwrap();
    let mut worker = client.worker().unwrap();
    let mut rows = vec![0i64; WORKERS * WIDTH];
    worker.get_many(&table, &[0, 1, 2, 3], &mut rows).unwrap();
    assert_eq!(rows, vec![clocks as i64; WORKERS * WIDTH], "{model}: nothing lost, nothing twice");
    drop(worker);
    client.close().unwrap();
}

/// `shards` shards with 16 MiB of rows.
fn config(address: &Address, shards: usize) -> Config {
    let mut config = Config::new(address.clone());
    config.cores = vec![None; shards];
    config.memory = 16 << 20;
    config.clients = 4;
    config
}

fn added() -> Added {
    Arc::new(std::array::from_fn(|_| AtomicU64::new(0)))
}

fn over_shared_memory(model: Model) {
    const CLOCKS: u64 = 5000;
    let folder = std::env::temp_dir().join(format!("fervor-guarantee-{}-{model}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let address: Address = format!("shm://{}/s.sock", folder.display()).parse().unwrap();
    let host = Host::for_addresses(std::slice::from_ref(&address)).unwrap();
    let server = Server::start(&host, &config(&address, 2)).unwrap();
    let added = added();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (host, address, added) = (host.clone(), address.clone(), added.clone());
            std::thread::spawn(move || client(&host, &address, model, number, &added, CLOCKS))
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    sums(&host, &address, model, CLOCKS);
    assert!(server.stop());
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn bsp_over_shared_memory() {
    over_shared_memory(MODELS[0]);
}

#[test]
fn ssp_over_shared_memory() {
    over_shared_memory(MODELS[1]);
}

#[test]
fn essp_over_shared_memory() {
    over_shared_memory(MODELS[2]);
}

#[test]
fn async_over_shared_memory() {
    over_shared_memory(MODELS[3]);
}

/// Three nodes: a server of two shards, and two clients of two workers.
fn simulated(model: Model, seed: u64, clocks: u64) -> u64 {
    let sim = Sim::new(seed);
    let address = Address::Sim("server".into());
    let nodes = ["server", "a", "b"].map(|name| sim.node(name));
    let added = added();
    let left = Arc::new(Mutex::new(CLIENTS));
    let up = Arc::new(AtomicBool::new(false));
    let [host, ..] = &nodes;
    sim.spawn(host, "main", {
        let (sim, host, address) = (sim.clone(), host.clone(), address.clone());
        let (left, up) = (left.clone(), up.clone());
        move || {
            let server = Server::start(&host, &config(&address, 2)).unwrap();
            up.store(true, Ordering::SeqCst);
            while *left.lock().unwrap() > 0 {
                sim.sleep(&host, Duration::from_millis(1));
            }
            sums(&host, &address, model, clocks);
            assert!(server.stop());
        }
    });
    for (number, node) in nodes[1..].iter().enumerate() {
        let (host, address, added) = (node.clone(), address.clone(), added.clone());
        let (left, up) = (left.clone(), up.clone());
        sim.spawn(node, "main", {
            let sim = sim.clone();
            move || {
                while !up.load(Ordering::SeqCst) {
                    sim.sleep(&host, Duration::from_millis(1));
                }
                client(&host, &address, model, number, &added, clocks);
                *left.lock().unwrap() -= 1;
            }
        });
    }
    sim.run();
    sim.hash()
}

#[test]
fn all_models_in_the_simulator() {
    for seed in 0..40 {
        for model in MODELS {
            simulated(model, seed, 12);
        }
    }
}

#[test]
fn a_seed_replays_exactly() {
    let hashes = [7, 7, 8].map(|seed| simulated(Model::Essp { staleness: 1 }, seed, 6));
    assert_eq!(hashes[0], hashes[1]);
    assert_ne!(hashes[1], hashes[2]);
}
