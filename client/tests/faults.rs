//! What callers may do wrong, and what others may: wrong arguments; clients that come late, go early, or do not call in for
//! long. What breaks or dies is in `broken.rs`.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use fervor_client::{Client, ClientOptions, Error, Model, TableOptions};
use fervor_server::{Config, Server};
use fervor_verbs::{
    Address,
    transport::{Runtime, Thread, sim::Node, sim::Sim},
};
use support::{
    Folder, Random, config,
    site::{Site, options},
};

mod support;

/// Of a job of so many clients.
fn of(clients: u16) -> ClientOptions {
    ClientOptions { clients, ..ClientOptions::default() }
}

/// `result` is an error with all of `texts` in it.
#[track_caller]
fn refused<X>(result: Result<X, Error>, texts: &[&str]) {
    let error = result.err().expect("an error").to_string();
    for text in texts {
        assert!(error.contains(text), "`{error}`: no `{text}`");
    }
}

#[test]
fn addresses_that_lead_nowhere() {
    let folder = Folder::new("nowhere");
    let nobody = folder.address("nobody.sock").to_string();
    refused(Client::connect(&["udp://localhost:1"]), &["`udp://localhost:1`", "scheme is unknown", "tcp://"]);
    refused(
        Client::connect(&["tcp://127.0.0.1:1"]),
        &["cannot reach", "`tcp://127.0.0.1:1`", "running there?"],
    );
    refused(Client::connect(&["localhost:1"]), &["`localhost:1`", "no scheme"]);
    refused(Client::connect(&[""; 0]), &["no server: give at least one"]);
    refused(Client::connect(&[&nobody]), &["cannot reach", &nobody, "is the server running there?"]);
    let site = Site::new("once", 1);
    let url = site.addresses[0].to_string();
    refused(Client::connect(&[&url, &url]), &["are one server: name each once"]);
    site.stop();
}

#[test]
fn tables_that_cannot_be() {
    let site = Site::new("tables", 2);
    let client = site.client(of(1));
    // Two shards with 8 MiB each; a row of 1000 f64 takes 8016 bytes.
    let large = client.table::<f64>("large", 10_000, 1000, Model::Async);
    refused(large, &["`large`", "10000 rows of 1000 f64", "needs 40080000 bytes", "8388608", "--memory"]);
    refused(client.table::<f32>("", 1, 1, Model::Bsp), &["name", "1 to 64 bytes, not 0"]);
    refused(client.table::<f32>(&"x".repeat(65), 1, 1, Model::Bsp), &["not 65"]);
    refused(client.table::<f32>("t", 0, 1, Model::Bsp), &["1 to 4294967296 rows, not 0"]);
    refused(client.table::<f32>("t", 1, 0, Model::Bsp), &["1 to 262144 elements, not 0"]);
    refused(client.table::<f64>("t", 1, 131_073, Model::Bsp), &["1 to 131072 elements, not 131073"]);
    refused(client.table::<f32>("t", 1, usize::MAX, Model::Bsp), &["columns are too many"]);
    let copies = site.client(options(true));
    let options = TableOptions { cache_bytes: Some(2 * 4 * 416 - 1), ..TableOptions::default() };
    let small = copies.table_with::<f32>("small", 100, 100, Model::Bsp, options);
    refused(
        small,
        &["1663 bytes of cache", "416 bytes each", "At least 4 rows", "ClientOptions::cache_bytes"],
    );
    copies.close().unwrap();
    // The same name with anything else is shown both ways; the same schema joins.
    let table = client.table::<f32>("t", 10, 4, Model::Essp { staleness: 3 }).unwrap();
    let mine = "`t`: 10 rows of 4 f32, ESSP(3)";
    let model = Model::Essp { staleness: 3 };
    refused(client.table::<f32>("t", 11, 4, model), &[mine, "`t`: 11 rows of 4 f32, ESSP(3)"]);
    refused(client.table::<f32>("t", 10, 5, model), &[mine, "`t`: 10 rows of 5 f32, ESSP(3)"]);
    refused(client.table::<i32>("t", 10, 4, model), &[mine, "`t`: 10 rows of 4 i32, ESSP(3)"]);
    refused(client.table::<f32>("t", 10, 4, Model::Bsp), &[mine, "`t`: 10 rows of 4 f32, BSP"]);
    let other = TableOptions { non_finite: true, ..TableOptions::default() };
    refused(client.table_with::<f32>("t", 10, 4, model, other), &[mine, "NaN and infinity allowed"]);
    let other = site.client(of(1));
    assert_eq!(other.table::<f32>("t", 10, 4, model).unwrap().schema(), table.schema());
    other.close().unwrap();
    client.close().unwrap();
    site.stop();
}

#[test]
fn a_table_opened_twice_is_one() {
    let site = Site::new("double", 1);
    let client = site.client(of(1));
    let model = Model::Essp { staleness: 0 };
    let tables = [(); 2].map(|()| client.table::<f64>("t", 4, 2, model).unwrap());
    let mut worker = client.worker().unwrap();
    for clock in 1..=20 {
        for table in &tables {
            worker.inc(table, 1, &[1.0, 2.0]).unwrap();
        }
        for table in &tables {
            let mut row = [0.0; 2];
            worker.get(table, 1, &mut row).unwrap();
            assert_eq!(row, [2.0 * f64::from(clock), 4.0 * f64::from(clock)]);
        }
        worker.clock().unwrap();
    }
    drop(worker);
    client.close().unwrap();
    site.stop();
}

#[test]
fn wrong_arguments_change_nothing() {
    let site = Site::new("arguments", 2);
    let client = site.client(of(1));
    let table = client.table::<f32>("t", 10, 4, Model::Ssp { staleness: 1 }).unwrap();
    let mut worker = client.worker().unwrap();
    let mut row = [0.0; 4];
    let out_of_range = ["row 10 is out of range", "`t` has 10 rows"];
    refused(worker.get(&table, 10, &mut row), &out_of_range);
    refused(worker.get_many(&table, &[1, 10], &mut [0.0; 8]), &out_of_range);
    refused(worker.inc(&table, 10, &row), &out_of_range);
    refused(worker.inc_at(&table, 10, &[(0, 1.0)]), &out_of_range);
    refused(worker.get(&table, u64::MAX, &mut row), &["row 18446744073709551615"]);
    refused(worker.inc_at(&table, 1, &[(0, 1.0), (4, 1.0)]), &["column 4", "`t` has 4 columns"]);
    refused(worker.get(&table, 1, &mut [0.0; 3]), &["3 elements", "`t` needs 4"]);
    refused(worker.get_many(&table, &[1, 2], &mut [0.0; 4]), &["4 elements", "`t` needs 8"]);
    refused(worker.inc(&table, 1, &[1.0; 5]), &["5 elements", "`t` needs 4"]);
    for (bad, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let texts = ["row 3", "`t`", name, "column 2", "non_finite"];
        refused(worker.inc(&table, 3, &[1.0, 1.0, bad, 1.0]), &texts);
        refused(worker.inc_at(&table, 3, &[(0, 1.0), (2, bad)]), &texts);
    }
    let other = site.client(of(1));
    let foreign = other.table::<f32>("t", 10, 4, Model::Ssp { staleness: 1 }).unwrap();
    let text = ["`t` was opened by another client"];
    refused(worker.get(&foreign, 1, &mut row), &text);
    refused(worker.get_many(&foreign, &[1], &mut row), &text);
    refused(worker.inc(&foreign, 1, &row), &text);
    refused(worker.inc_at(&foreign, 1, &[(0, 1.0)]), &text);
    other.close().unwrap();
    worker.clock().unwrap();
    for number in 0..10 {
        worker.get(&table, number, &mut row).unwrap();
        assert_eq!(row, [0.0; 4]);
    }
    // A client with workers is not closed.
    refused(client.close(), &["1 workers are still there"]);
    drop(worker);
    site.stop();
}

#[test]
fn a_table_that_takes_nan_gets_it() {
    let site = Site::new("nan", 1);
    let client = site.client(of(1));
    let options = TableOptions { non_finite: true, ..TableOptions::default() };
    let table = client.table_with::<f64>("t", 2, 3, Model::Bsp, options).unwrap();
    let mut worker = client.worker().unwrap();
    worker.inc(&table, 1, &[1.0, f64::NAN, f64::INFINITY]).unwrap();
    worker.inc_at(&table, 0, &[(1, f64::NEG_INFINITY)]).unwrap();
    worker.clock().unwrap();
    let mut rows = [0.0; 6];
    worker.get_many(&table, &[0, 1], &mut rows).unwrap();
    assert_eq!((rows[1], rows[3], rows[5]), (f64::NEG_INFINITY, 1.0, f64::INFINITY));
    assert!(rows[4].is_nan());
    drop(worker);
    client.close().unwrap();
    site.stop();
}

#[test]
fn a_job_has_one_size_and_a_broken_one_binds_nobody() {
    let site = Site::new("size", 2);
    // One of three came, and died: a job of another size may begin.
    drop(site.client(of(3)));
    let start = Instant::now();
    let client = loop {
        match site.try_client(of(2)) {
            Ok(client) => break client,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(5), "{error}"),
        }
    };
    let other = site.try_client(of(5));
    refused(other, &["the running job has 2 clients, and this one says 5: give all the same number"]);
    client.close().unwrap();
    site.stop();
}

/// Rows of an eager table of which few fit the cache: they are given up and subscribed again for ever, and at the end the
/// cache still serves.
#[test]
fn slots_that_were_given_up_come_back() {
    let site = Site::new("slots", 2);
    let client = site.client(options(true));
    // Two rows share an image of 80 bytes; each shard has ten, of which four have a slot.
    let options = TableOptions { cache_bytes: Some(2 * 320), ..TableOptions::default() };
    let model = Model::Essp { staleness: 1 };
    let table = client.table_with::<i64>("t", 40, 4, model, options).unwrap();
    let mut worker = client.worker().unwrap();
    let mut row = [0; 4];
    for clock in 0..300 {
        for number in 0..40 {
            worker.get(&table, number, &mut row).unwrap();
            assert_eq!(row, [clock; 4]);
        }
        for number in 0..40 {
            worker.inc(&table, number, &[1; 4]).unwrap();
        }
        worker.clock().unwrap();
    }
    let before = worker.stats().hits;
    for _ in 0..200 {
        for number in 0..2 {
            worker.get(&table, number, &mut row).unwrap();
        }
        worker.clock().unwrap();
    }
    let hits = worker.stats().hits - before;
    assert!(hits > 300, "{hits} of 400 gets of two rows were answered by a cache of eight images");
    drop(worker);
    client.close().unwrap();
    site.stop();
}

/// One client computes for long and does not call in; the others do thousands of clocks. Its cache is pushed into all the
/// time, its rounds wait for receive buffers, and nobody waits for it; when it calls in it catches up.
#[test]
fn a_client_that_does_not_call_in_holds_up_nobody() {
    const CLOCKS: i64 = 3000;
    let site = Site::new("sleeper", 2);
    let model = Model::Essp { staleness: 5000 };
    let open = |client: &Client| {
        let asynchronous = client.table::<i64>("async", 4, 8, Model::Async).unwrap();
        (client.table::<i64>("essp", 4, 8, model).unwrap(), asynchronous)
    };
    let sleeper = site.client(of(3));
    let mut row = [0; 8];
    thread::scope(|scope| {
        let workers: Vec<_> = (0..2)
            .map(|number| {
                let client = site.client(of(3));
                scope.spawn(move || {
                    let (essp, asynchronous) = open(&client);
                    let mut worker = client.worker().unwrap();
                    let mut row = [0; 8];
                    for clock in 1..=CLOCKS {
                        for table in [&essp, &asynchronous] {
                            worker.inc(table, number, &[1; 8]).unwrap();
                            worker.get(table, number, &mut row).unwrap();
                            assert_eq!(row, [clock; 8]);
                        }
                        worker.clock().unwrap();
                    }
                    drop(worker);
                    client
                })
            })
            .collect();
        let (essp, asynchronous) = open(&sleeper);
        let mut worker = sleeper.worker().unwrap();
        // It ends so many clocks that the others may finish, and holds rows that they change.
        for _ in 0..3 {
            worker.get(&essp, 0, &mut row).unwrap();
            worker.get(&essp, 1, &mut row).unwrap();
            worker.clock().unwrap();
        }
        let start = Instant::now();
        let clients: Vec<_> = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
        let busy = start.elapsed();
        assert!(busy < Duration::from_secs(20), "{busy:?}");
        // They are done; this one has not called in. Now it does, and misses nothing.
        for _ in 3..CLOCKS {
            worker.clock().unwrap();
        }
        for client in clients {
            client.close().unwrap();
        }
        for _ in 0..5001 {
            worker.clock().unwrap();
        }
        for (table, number) in [(&essp, 0), (&essp, 1), (&asynchronous, 0), (&asynchronous, 1)] {
            worker.get(table, number, &mut row).unwrap();
            assert_eq!(row, [CLOCKS; 8], "{}", table.schema());
        }
        drop(worker);
    });
    sleeper.close().unwrap();
    site.stop();
}

/// Workers that leave early, and a client that is closed early, hold up nobody, and what they added stays.
#[test]
fn who_leaves_early_is_not_waited_for() {
    let site = Site::new("early", 2);
    let run = |clients: &[(&str, &[i64])]| {
        thread::scope(|scope| {
            for (end, clocks) in clients {
                let client = site.client(of(clients.len() as u16));
                scope.spawn(move || {
                    let table = client.table::<i64>("t", 3, 2, Model::Bsp).unwrap();
                    let workers: Vec<_> = clocks.iter().map(|_| client.worker().unwrap()).collect();
                    thread::scope(|scope| {
                        for (mut worker, clocks) in workers.into_iter().zip(*clocks) {
                            let table = &table;
                            scope.spawn(move || {
                                for _ in 0..*clocks {
                                    worker.get(table, 1, &mut [0; 2]).unwrap();
                                    worker.inc(table, 1, &[1; 2]).unwrap();
                                    worker.clock().unwrap();
                                }
                            });
                        }
                    });
                    match *end {
                        "close" => client.close().unwrap(),
                        // What was not sent may be lost; what ended a clock was posted.
                        _ => drop(client),
                    }
                });
            }
        });
    };
    run(&[("close", &[1, 50, 200]), ("close", &[7]), ("close", &[300, 300])]);
    let client = site.client(of(1));
    let table = client.table::<i64>("t", 3, 2, Model::Bsp).unwrap();
    let mut worker = client.worker().unwrap();
    let mut row = [0; 2];
    worker.get(&table, 1, &mut row).unwrap();
    assert_eq!(row, [858; 2]);
    drop(worker);
    client.close().unwrap();
    // Two clocks at least: the second `get` waits until all have joined. One that is gone before is waited for.
    run(&[("drop", &[2]), ("drop", &[5, 10]), ("close", &[300])]);
    site.stop();
}

fn sim_address() -> Address {
    Address::Sim("server".into())
}

fn sim_client(node: &Node, clients: usize) -> Result<Client<Node>, Error> {
    let options = ClientOptions { clients: clients as u16, cache_bytes: 1 << 20, ..ClientOptions::default() };
    Client::connect_on(node, &[sim_address()], options)
}

/// A server node whose main thread runs `then` until it is true, and a flag that says that the server listens.
fn sim_server(sim: &Sim, then: impl FnMut() -> bool + Send + 'static) -> (Node, Arc<AtomicBool>) {
    let node = sim.node("server");
    let up = Arc::new(AtomicBool::new(false));
    let (sim2, node2, up2, mut then) = (sim.clone(), node.clone(), up.clone(), then);
    sim.spawn(&node, "main", move || {
        let config = Config { staging: 2 << 20, ..config(&sim_address(), 2) };
        let server = Server::start(&node2, &config).unwrap();
        up2.store(true, Ordering::SeqCst);
        while !then() {
            sim2.sleep(&node2, Duration::from_micros(300));
        }
        assert!(server.stop());
    });
    (node, up)
}

fn await_server(sim: &Sim, node: &Node, up: &AtomicBool) {
    while !up.load(Ordering::SeqCst) {
        sim.sleep(node, Duration::from_micros(100));
    }
}

/// A client joins while another runs: from its first clock on both keep the guarantee to each other.
fn joins_late(seed: u64) {
    const CLOCKS: u64 = 15;
    let sim = Sim::new(seed);
    let mut random = Random(seed);
    let left = Arc::new(AtomicUsize::new(2));
    let (_, up) = sim_server(&sim, {
        let left = left.clone();
        move || left.load(Ordering::SeqCst) == 0
    });
    // Per client: the clock at which it began.
    let began: Arc<[Mutex<Option<u64>>; 2]> = Arc::new([Mutex::new(None), Mutex::new(None)]);
    let delay = Duration::from_nanos(random.among(50_000..=1_500_000));
    let model = [Model::Bsp, Model::Ssp { staleness: 1 }, Model::Essp { staleness: 1 }][seed as usize % 3];
    for number in 0..2 {
        let node = sim.node(&format!("client-{number}"));
        let (up, sim2, left, began) = (up.clone(), sim.clone(), left.clone(), began.clone());
        sim.spawn(&node.clone(), "main", move || {
            await_server(&sim2, &node, &up);
            if number == 1 {
                sim2.sleep(&node, delay);
            }
            let client = sim_client(&node, 1).unwrap();
            let table = client.table::<i64>("t", 2, 20, model).unwrap();
            let mut worker = client.worker().unwrap();
            *began[number].lock().unwrap() = Some(worker.now());
            let mut row = [0; 20];
            for _ in 0..CLOCKS {
                worker.get(&table, 1 - number as u64, &mut row).unwrap();
                let least = worker.now().saturating_sub(model.staleness().unwrap_or(0).into());
                if let Some(start) = *began[1 - number].lock().unwrap() {
                    // It adds 1 each clock, from its first on, until it is done.
                    let promised = least.saturating_sub(start).min(CLOCKS);
                    assert!(row[0] as u64 >= promised, "seed {seed}: {model}: {} < {promised}", row[0]);
                }
                worker.inc(&table, number as u64, &[1; 20]).unwrap();
                worker.clock().unwrap();
            }
            drop(worker);
            client.close().unwrap();
            left.fetch_sub(1, Ordering::SeqCst);
        });
    }
    if let Err(report) = sim.try_run() {
        panic!("a client that joins after {delay:?}, seed {seed}: {report}");
    }
}

#[test]
fn a_client_that_joins_late_is_under_the_guarantee_from_its_first_clock_on() {
    (0..150).for_each(joins_late);
}

/// More rows change in each round than a connection's send queue takes, and all of them are held: the round is closed when
/// the last one has been pushed.
fn great_rounds(seed: u64) {
    const CLOCKS: i64 = 6;
    const ROWS: u64 = 700;
    let sim = Sim::new(seed);
    let left = Arc::new(AtomicUsize::new(2));
    let (_, up) = sim_server(&sim, {
        let left = left.clone();
        move || left.load(Ordering::SeqCst) == 0
    });
    for number in 0..2 {
        let node = sim.node(&format!("client-{number}"));
        let (up, sim2, left) = (up.clone(), sim.clone(), left.clone());
        sim.spawn(&node.clone(), "main", move || {
            await_server(&sim2, &node, &up);
            let client = sim_client(&node, 2).unwrap();
            let table = client.table::<i64>("t", ROWS, 4, Model::Essp { staleness: 0 }).unwrap();
            let mut worker = client.worker().unwrap();
            let mut row = [0; 4];
            for clock in 0..CLOCKS {
                for number in 0..ROWS {
                    worker.get(&table, number, &mut row).unwrap();
                    let expected = 2 * clock..=2 * clock + 1;
                    assert!(
                        row == [row[0]; 4] && expected.contains(&row[0]),
                        "seed {seed}, clock {clock}, row {number}: {row:?}, not {expected:?}"
                    );
                }
                for number in 0..ROWS {
                    worker.inc(&table, number, &[1; 4]).unwrap();
                }
                worker.clock().unwrap();
            }
            let hits = worker.stats().hits;
            assert!(hits > ROWS, "seed {seed}: {hits} hits: the rows are not held");
            drop(worker);
            client.close().unwrap();
            left.fetch_sub(1, Ordering::SeqCst);
        });
    }
    if let Err(report) = sim.try_run() {
        panic!("great rounds, seed {seed}: {report}");
    }
}

#[test]
fn a_round_greater_than_the_send_queue_is_closed_after_all_of_it() {
    (0..8).for_each(great_rounds);
}

/// A worker thread of the transport, joined with its result.
#[test]
fn a_worker_can_move_between_threads() {
    let site = Site::new("move", 1);
    let client = site.client(of(1));
    let table = client.table::<i64>("t", 1, 1, Model::Bsp).unwrap();
    let mut worker = client.worker().unwrap();
    worker.inc(&table, 0, &[1]).unwrap();
    let thread = site.host.spawn("second", None, move || {
        let mut row = [0];
        worker.get(&table, 0, &mut row).unwrap();
        assert_eq!(row, [1]);
    });
    assert!(thread.unwrap().join());
    client.close().unwrap();
    site.stop();
}
