//! The value bound of VAP, checked at every `get`: what a reader lacks of another worker's updates is at most the bound
//! under which that worker made its last one. Over shared memory with real threads, and in the simulator, where a WRITE
//! that has completed need not be visible.
//!
//! Every worker adds to a row of its own, so what a reader sees of that row tells exactly which of its updates it has. The
//! worker publishes (`Made`), after each `inc` has returned, what it has added by now and at which clock. A reader that
//! looks at that before its `get` must then see at least that, less the bound of that clock.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use fervor_client::{Client, ClientOptions, Model, Table, Worker, WorkerStats};
use fervor_server::Server;
use fervor_verbs::{
    Address,
    transport::{Thread, Transport, any::Host, sim::Sim},
};
use support::{Folder, Random, config};

mod support;

const CLIENTS: usize = 3;
const EACH: usize = 2;
const WORKERS: usize = CLIENTS * EACH;
/// Rows span several cache lines.
const WIDTH: usize = 40;
const V0: f32 = 9.0;
const MODEL: Model = Model::Vap { v0: V0 };
/// The greatest single update.
const GREATEST: u64 = 3;

/// Of each worker: its clock in the upper half of the word, what it has added in the lower one.
type Made = Arc<[AtomicU64; WORKERS]>;

fn work<T: Transport>(
    mut worker: Worker<T>,
    table: &Table<i64>,
    me: usize,
    made: &Made,
    clocks: u64,
    seed: u64,
) -> (WorkerStats, u64) {
    let mut random = Random(seed * 100 + me as u64);
    let mut row = vec![0i64; WIDTH];
    let mut own = 0;
    for clock in 0..clocks {
        for _ in 0..random.among(1..=8) {
            if random.one_in(2) {
                let by = random.among(1..=GREATEST);
                if random.one_in(3) {
                    let pairs: Vec<_> = (0..WIDTH as u32).map(|column| (column, by as i64)).collect();
                    worker.inc_at(table, me as u64, &pairs).unwrap();
                } else {
                    worker.inc(table, me as u64, &[by as i64; WIDTH]).unwrap();
                }
                own += by;
                made[me].store(clock << 32 | own, Ordering::SeqCst);
            }
            let other = random.among(0..=WORKERS as u64 - 1) as usize;
            let word = made[other].load(Ordering::SeqCst);
            worker.get(table, other as u64, &mut row).unwrap();
            assert!(row.iter().all(|value| *value == row[0]), "torn: {row:?}");
            let seen = row[0] as u64;
            if other == me {
                assert_eq!(seen, own, "own updates, each once");
                continue;
            }
            let (at, added) = (word >> 32, word & 0xffff_ffff);
            let bound = (f64::from(V0) / ((at + 1) as f64).sqrt()).max(GREATEST as f64);
            assert!(
                seen as f64 + bound >= added as f64,
                "worker {me} saw {seen} of {added} that worker {other} had added by its clock {at}: bound {bound}"
            );
        }
        worker.clock().unwrap();
    }
    (worker.stats(), own)
}

/// What the workers waited together, and what they added.
type Result = (Duration, u64);

fn client<T: Transport>(
    transport: &T,
    server: &Address,
    number: usize,
    made: &Made,
    clocks: u64,
    seed: u64,
) -> Result {
    let options = ClientOptions { clients: CLIENTS as u16, ..ClientOptions::default() };
    let client = Client::connect_on(transport, std::slice::from_ref(server), options).unwrap();
    let table = client.table::<i64>("t", WORKERS as u64, WIDTH, MODEL).unwrap();
    let workers: Vec<_> = (0..EACH).map(|_| client.worker().unwrap()).collect();
    let results = Arc::new(Mutex::new((Duration::ZERO, 0)));
    let threads: Vec<_> = workers
        .into_iter()
        .enumerate()
        .map(|(i, worker)| {
            let (table, made, results) = (table.clone(), made.clone(), results.clone());
            let body = move || {
                let (stats, own) = work(worker, &table, number * EACH + i, &made, clocks, seed);
                let mut results = results.lock().unwrap();
                results.0 += stats.waiting;
                results.1 += own;
            };
            transport.spawn("worker", None, body).unwrap()
        })
        .collect();
    for thread in threads {
        assert!(thread.join(), "seed {seed}: a worker failed");
    }
    client.close().unwrap();
    *results.lock().unwrap()
}

/// Everything was applied, once: a new client reads the sums.
fn sums<T: Transport>(transport: &T, server: &Address, made: &Made) {
    let client =
        Client::connect_on(transport, std::slice::from_ref(server), ClientOptions::default()).unwrap();
    let table = client.table::<i64>("t", WORKERS as u64, WIDTH, MODEL).unwrap();
    let mut worker = client.worker().unwrap();
    let mut row = vec![0i64; WIDTH];
    for (number, made) in made.iter().enumerate() {
        worker.get(&table, number as u64, &mut row).unwrap();
        let added = made.load(Ordering::SeqCst) & 0xffff_ffff;
        assert_eq!(row, vec![added as i64; WIDTH], "nothing lost, nothing twice");
    }
    drop(worker);
    client.close().unwrap();
}

fn made() -> Made {
    Arc::new(std::array::from_fn(|_| AtomicU64::new(0)))
}

#[test]
fn the_value_bound_holds_over_shared_memory() {
    const CLOCKS: u64 = 1000;
    let folder = Folder::new("value");
    let address = folder.address("s.sock");
    let host = Host::for_addresses(std::slice::from_ref(&address)).unwrap();
    let server = Server::start(&host, &config(&address, 2)).unwrap();
    let made = made();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (host, address, made) = (host.clone(), address.clone(), made.clone());
            std::thread::spawn(move || client(&host, &address, number, &made, CLOCKS, 1))
        })
        .collect();
    let results: Vec<Result> = clients.into_iter().map(|client| client.join().unwrap()).collect();
    let waited: Duration = results.iter().map(|result| result.0).sum();
    assert!(waited > Duration::ZERO, "no update ever waited: the bound was not tried");
    sums(&host, &address, &made);
    assert!(server.stop());
}

fn simulated(seed: u64, clocks: u64) -> Duration {
    let sim = Sim::new(seed);
    let address = Address::Sim("server".into());
    let made = made();
    let left = Arc::new(Mutex::new(CLIENTS));
    let up = Arc::new(AtomicBool::new(false));
    let waited = Arc::new(Mutex::new(Duration::ZERO));
    let host = sim.node("server");
    sim.spawn(&host.clone(), "main", {
        let (sim, address, made) = (sim.clone(), address.clone(), made.clone());
        let (left, up) = (left.clone(), up.clone());
        move || {
            let server = Server::start(&host, &config(&address, 2)).unwrap();
            up.store(true, Ordering::SeqCst);
            while *left.lock().unwrap() > 0 {
                sim.sleep(&host, Duration::from_millis(1));
            }
            sums(&host, &address, &made);
            assert!(server.stop());
        }
    });
    for number in 0..CLIENTS {
        let host = sim.node(&format!("client-{number}"));
        let (address, made) = (address.clone(), made.clone());
        let (left, up, waited) = (left.clone(), up.clone(), waited.clone());
        sim.spawn(&host.clone(), "main", {
            let sim = sim.clone();
            move || {
                while !up.load(Ordering::SeqCst) {
                    sim.sleep(&host, Duration::from_millis(1));
                }
                let result = client(&host, &address, number, &made, clocks, seed);
                *waited.lock().unwrap() += result.0;
                *left.lock().unwrap() -= 1;
            }
        });
    }
    if let Err(report) = sim.try_run() {
        panic!("seed {seed}: {report}");
    }
    *waited.lock().unwrap()
}

#[test]
fn the_value_bound_holds_in_the_simulator() {
    for seed in 0..60 {
        let waited = simulated(seed, 15);
        assert!(waited > Duration::ZERO, "seed {seed}: no update ever waited: the bound was not tried");
    }
}
