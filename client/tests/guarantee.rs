//! The SSP guarantee over shared memory: every worker adds 1 to its own element each clock; every reader checks every
//! element against the bound of the table's model, and its own against equality.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use fervor_client::{Client, ClientOptions, Model};
use fervor_server::{Config, Server};
use fervor_verbs::{Address, transport::any::Host};

/// A server in this process, listening in a folder of its own.
struct Running {
    _server: Server<Host>,
    url: String,
    folder: std::path::PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn serve(shards: usize) -> Running {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let folder = std::env::temp_dir().join(format!(
        "fervor-guarantee-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    ));
    std::fs::create_dir_all(&folder).unwrap();
    let address: Address = format!("shm://{}/s.sock", folder.display()).parse().unwrap();
    let mut config = Config::new(address.clone());
    config.cores = vec![None; shards];
    config.memory = 16 << 20;
    let server = Server::start(&Host::for_addresses(&[address.clone()]).unwrap(), &config).unwrap();
    Running { _server: server, url: address.to_string(), folder }
}

/// 4 workers (2 clients of 2), 2 shards; rows so wide that they span several cache lines.
fn check(model: Model, clocks: u64) {
    const WORKERS: usize = 4;
    const WIDTH: usize = 40;
    let running = serve(2);
    // What each worker has added so far: an upper bound for what others may see.
    let added: Arc<Vec<AtomicU64>> = Arc::new((0..WORKERS).map(|_| AtomicU64::new(0)).collect());
    let clients: Vec<_> = (0..2)
        .map(|client| {
            let (url, added) = (running.url.clone(), added.clone());
            thread::spawn(move || {
                let options = ClientOptions { clients: 2, ..ClientOptions::default() };
                let client_handle = Client::connect_with(&[url], options).unwrap();
                let table = client_handle.table::<i64>("t", WORKERS as u64, WIDTH, model).unwrap();
                let workers: Vec<_> = (0..2).map(|_| client_handle.worker().unwrap()).collect();
                let threads: Vec<_> = workers
                    .into_iter()
                    .enumerate()
                    .map(|(i, mut worker)| {
                        let (table, added) = (table.clone(), added.clone());
                        thread::spawn(move || {
                            let me = client * 2 + i;
                            let mut row = vec![0i64; WIDTH];
                            for clock in 0..clocks {
                                for other in 0..WORKERS {
                                    worker.get(&table, other as u64, &mut row).unwrap();
                                    assert!(row.iter().all(|v| *v == row[0]), "torn: {row:?}");
                                    let seen = row[0] as u64;
                                    if other == me {
                                        assert_eq!(seen, clock, "{model}: own updates, each once");
                                        continue;
                                    }
                                    let least =
                                        model.staleness().map_or(0, |s| clock.saturating_sub(s.into()));
                                    let most = added[other].load(Ordering::SeqCst);
                                    assert!(
                                        (least..=most).contains(&seen),
                                        "{model}: worker {me} at clock {clock} saw {seen} of worker {other}, not \
                                         {least}..={most}"
                                    );
                                }
                                added[me].fetch_add(1, Ordering::SeqCst);
                                worker.inc(&table, me as u64, &[1; WIDTH]).unwrap();
                                worker.get(&table, me as u64, &mut row).unwrap();
                                assert_eq!(row[0] as u64, clock + 1, "{model}: read my writes");
                                worker.clock().unwrap();
                            }
                            worker.stats()
                        })
                    })
                    .collect();
                let stats: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
                client_handle.close().unwrap();
                stats
            })
        })
        .collect();
    let stats: Vec<_> = clients.into_iter().flat_map(|c| c.join().unwrap()).collect();
    println!("{model}: {} hits, {} misses, {} asked", stats[0].hits, stats[0].misses, stats[0].asked);
    // Everything was applied: a new client reads the sums.
    let client = Client::connect(&[&running.url]).unwrap();
    let table = client.table::<i64>("t", WORKERS as u64, WIDTH, model).unwrap();
    let mut worker = client.worker().unwrap();
    let mut row = vec![0i64; WIDTH];
    for other in 0..WORKERS {
        worker.get(&table, other as u64, &mut row).unwrap();
        assert_eq!(row, vec![clocks as i64; WIDTH], "{model}: nothing lost, nothing twice");
    }
}

const CLOCKS: u64 = 5000;

#[test]
fn bsp() {
    check(Model::Bsp, CLOCKS);
}

#[test]
fn ssp() {
    check(Model::Ssp { staleness: 3 }, CLOCKS);
}

#[test]
fn essp() {
    check(Model::Essp { staleness: 3 }, CLOCKS);
}

#[test]
fn asynchronous() {
    check(Model::Async, CLOCKS);
}
