//! What is large, and what may not grow: tables of 10^9 rows, 64 shards, rows of 1 MiB and of 4 bytes, READs that are started ahead.
//! With real threads over shared memory, in place and by copies.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use fervor_client::{Client, ClientOptions, Error, Model, TableOptions};
use fervor_server::Config;
use fervor_verbs::transport::any::Host;
use support::{
    Random,
    site::{Site, options},
};

mod support;

const MIB: usize = 1 << 20;

/// One server, of which `change` changes the configuration.
fn site(shards: usize, change: impl Fn(&mut Config)) -> Site {
    Site::with("size", 1, shards, |_, config| change(config))
}

/// Bytes of this process that are in memory.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// One test at a time: the memory of the process is all tests'.
static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Works on `table`s of 10^9 rows of 4 bytes: the memory of client and server follows what is used.
fn use_a_few_of_a_billion_rows(site: &Site, copies: bool, name: &str, model: Model, table: TableOptions) {
    const ROWS: u64 = 1_000_000_000;
    const MOST: usize = 100 * MIB;
    let before = resident();
    let client = site.client(options(copies));
    let table = client.table_with::<i32>(name, ROWS, 1, model, table).unwrap();
    let opened = resident().saturating_sub(before);
    assert!(opened < 30 * MIB, "{name}, {copies}: {} MiB to open it", opened / MIB);
    let mut worker = client.worker().unwrap();
    let mut random = Random(7);
    // Far apart, the first and the last among them.
    let mut rows: Vec<u64> = (0..1000).map(|_| random.among(0..=ROWS - 1)).chain([0, ROWS - 1]).collect();
    rows.sort_unstable();
    rows.dedup();
    for clock in 0..4 {
        for (at, row) in rows.iter().enumerate() {
            let mut value = [0];
            worker.get(&table, *row, &mut value).unwrap();
            assert_eq!(value, [clock * (at as i32 + 1)], "{name}, {copies}: row {row} at clock {clock}");
            worker.inc(&table, *row, &[at as i32 + 1]).unwrap();
        }
        worker.clock().unwrap();
    }
    let mut values = vec![0; rows.len()];
    worker.get_many(&table, &rows, &mut values).unwrap();
    assert!(values.iter().enumerate().all(|(at, value)| *value == 4 * (at as i32 + 1)));
    // Each row has touched a page of the shard's memory, which may be mapped here several times.
    let grown = resident().saturating_sub(before);
    assert!(grown < MOST, "{name}, {copies}: {} MiB for {} rows", grown / MIB, rows.len());
    drop(worker);
    client.close().unwrap();
}

#[test]
fn memory_follows_what_is_used_of_a_table_of_a_billion_rows() {
    let _alone = alone();
    let site = site(1, |config| {
        (config.memory, config.bookkeeping) = (5 * 5100 * MIB, 2048 * MIB);
    });
    // Some thousand slots, so that rows come and go.
    let few = TableOptions { cache_bytes: Some(500 * 80), ..TableOptions::default() };
    let ranked = TableOptions { continuous: u64::MAX, ..few };
    let tables = [
        ("essp", Model::Essp { staleness: 1 }, few),
        ("ssp", Model::Ssp { staleness: 1 }, few),
        ("async", Model::Async, few),
        ("continuous", Model::Essp { staleness: 1 }, ranked),
    ];
    // The poller makes tables while another client goes on.
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let client = site.client(options(false));
            let table = client.table::<i64>("small", 10, 1, Model::Async).unwrap();
            let mut worker = client.worker().unwrap();
            let mut longest = Duration::ZERO;
            while !done.load(Ordering::SeqCst) {
                let start = Instant::now();
                worker.inc(&table, 3, &[1]).unwrap();
                worker.clock().unwrap();
                longest = longest.max(start.elapsed());
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(longest < Duration::from_secs(1), "a clock took {longest:?}");
            drop(worker);
            client.close().unwrap();
        });
        let _done = Done(&done);
        for (name, model, table) in tables {
            use_a_few_of_a_billion_rows(&site, true, name, model, table);
        }
        use_a_few_of_a_billion_rows(&site, false, "in place", Model::Essp { staleness: 1 }, few);
    });
    site.stop();
}

/// Says so, also when a test fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn a_job_on_64_shards_is_right() {
    let _alone = alone();
    const ROWS: u64 = 500;
    const WIDTH: usize = 3;
    const WORKERS: usize = 3;
    const CLOCKS: i64 = 4;
    for copies in [false, true] {
        let site = Site::new("size", 64);
        let client = site.client(options(copies));
        for (name, model) in [("bsp", Model::Bsp), ("essp", Model::Essp { staleness: 0 })] {
            let table = client.table::<i64>(name, ROWS, WIDTH, model).unwrap();
            let workers: Vec<_> = (0..WORKERS).map(|_| client.worker().unwrap()).collect();
            std::thread::scope(|scope| {
                for mut worker in workers {
                    let table = &table;
                    scope.spawn(move || {
                        let rows: Vec<u64> = (0..ROWS).collect();
                        let mut values = vec![0; rows.len() * WIDTH];
                        for clock in 0..CLOCKS {
                            worker.get_many(table, &rows, &mut values).unwrap();
                            for (row, values) in values.chunks(WIDTH).enumerate() {
                                let least = clock * WORKERS as i64 * row as i64;
                                // The others are one clock ahead at most.
                                let most = (clock + 2) * WORKERS as i64 * row as i64;
                                assert!(values.iter().all(|value| (least..=most).contains(value)));
                            }
                            for row in &rows {
                                worker.inc(table, *row, &[*row as i64; WIDTH]).unwrap();
                            }
                            worker.clock().unwrap();
                        }
                        worker.get_range(table, 0, &mut values).unwrap();
                        let sum = |at: usize| CLOCKS * WORKERS as i64 * (at / WIDTH) as i64;
                        assert!(values.iter().enumerate().all(|(at, value)| *value == sum(at)));
                    });
                }
            });
        }
        client.close().unwrap();
        site.stop();
    }
}

#[test]
fn rows_of_a_mebibyte_are_read_and_added_to_under_every_model() {
    let _alone = alone();
    const ROWS: u64 = 4;
    const WIDTH: usize = MIB / 4;
    let models = [Model::Essp { staleness: 1 }, Model::Ssp { staleness: 1 }, Model::Async];
    let pattern = |row: u64, column: usize| (row as usize * 10 + column % 7) as f32;
    for copies in [false, true] {
        let site = site(2, |config| config.memory = 32 * MIB);
        let client = site.client(options(copies));
        let (mut a, mut b) = (client.worker().unwrap(), client.worker().unwrap());
        for (number, model) in models.into_iter().enumerate() {
            let table = client.table::<f32>(&format!("t{number}"), ROWS, WIDTH, model).unwrap();
            let deltas: Vec<f32> =
                (0..ROWS).flat_map(|row| (0..WIDTH).map(move |column| pattern(row, column))).collect();
            let mut all = vec![0.0; deltas.len()];
            a.inc_range(&table, 0, &deltas).unwrap();
            a.get_range(&table, 0, &mut all).unwrap();
            assert!(all == deltas, "{model}, {copies}: its own, in its clock");
            a.inc_at(&table, 2, &[(5, 0.5), (WIDTH as u32 - 1, 0.25)]).unwrap();
            for _ in 0..3 {
                a.clock().unwrap();
                b.clock().unwrap();
            }
            let mut expected = deltas.clone();
            expected[2 * WIDTH + 5] += 0.5;
            expected[3 * WIDTH - 1] += 0.25;
            let start = Instant::now();
            loop {
                b.get_range(&table, 0, &mut all).unwrap();
                // Nothing is promised of others' updates under Async.
                if all == expected || model != Model::Async || start.elapsed() > Duration::from_secs(5) {
                    break;
                }
            }
            assert!(all == expected, "{model}, {copies}: the other's, two clocks later");
            let mut row = vec![0.0; WIDTH];
            b.inc(&table, 3, &deltas[..WIDTH]).unwrap();
            b.get(&table, 3, &mut row).unwrap();
            let sum = |column: usize| pattern(3, column) + pattern(0, column);
            assert!(row.iter().enumerate().all(|(column, value)| *value == sum(column)));
        }
        drop((a, b));
        client.close().unwrap();
        site.stop();
    }
}

/// A server of a quarter more memory than the data holds a table of rows of 4 or 8 bytes, and of at most twice for any width.
#[test]
fn small_rows_take_little_more_than_their_data() {
    let _alone = alone();
    const ROWS: u64 = 1 << 16;
    for (bytes, quarters) in [(4, 5), (8, 5), (12, 8), (16, 5), (20, 8), (36, 8), (64, 5), (128, 5)] {
        let memory = ROWS as usize * bytes * quarters / 4;
        let site = site(1, |config| config.memory = memory);
        let client = site.client(options(false));
        let table = client.table::<i32>("t", ROWS, bytes / 4, Model::Bsp).unwrap();
        let mut worker = client.worker().unwrap();
        let row: Vec<i32> = (1..=bytes as i32 / 4).collect();
        for at in [0, 1, 15, 16, 17, ROWS - 1] {
            worker.inc(&table, at, &row).unwrap();
        }
        worker.clock().unwrap();
        let mut all = vec![0; ROWS as usize * row.len()];
        worker.get_range(&table, 0, &mut all).unwrap();
        for (at, found) in all.chunks(row.len()).enumerate() {
            let added = [0, 1, 15, 16, 17, ROWS as usize - 1].contains(&at);
            assert!(
                if added { found == row } else { found.iter().all(|value| *value == 0) },
                "{bytes}: row {at}"
            );
        }
        drop(worker);
        client.close().unwrap();
        site.stop();
    }
}

/// Rows that were READ ahead are not READ again, by `get` and by `get_many`.
#[test]
fn what_is_prefetched_is_not_read_again() {
    let _alone = alone();
    let site = Site::new("size", 2);
    let client = site.client(options(true));
    for (name, model) in [
        ("async", Model::Async),
        ("ssp", Model::Ssp { staleness: 2 }),
        ("essp", Model::Essp { staleness: 2 }),
    ] {
        let few = TableOptions { cache_bytes: Some(64 << 10), ..TableOptions::default() };
        let table = client.table_with::<i64>(name, 2000, 16, model, few).unwrap();
        let mut worker = client.worker().unwrap();
        let rows: Vec<u64> = (0..10).map(|row| row * 7).collect();
        for (at, row) in rows.iter().enumerate() {
            worker.inc(&table, *row, &[at as i64; 16]).unwrap();
        }
        // Added in this clock, it is in no copy that is READ.
        worker.prefetch(&table, &rows).unwrap();
        let started = worker.stats().reads;
        assert_eq!(started, 10, "{name}");
        let mut value = [0; 16];
        for (at, row) in rows.iter().enumerate().take(5) {
            worker.get(&table, *row, &mut value).unwrap();
            assert_eq!(value, [at as i64; 16], "{name}");
        }
        let mut values = vec![0; 16 * 5];
        worker.get_many(&table, &rows[5..], &mut values).unwrap();
        assert!(values.chunks(16).enumerate().all(|(at, value)| value == [at as i64 + 5; 16]), "{name}");
        assert_eq!(worker.stats().reads, started, "{name}: READ again");
        // More than there is room for: the rest is READ when it is asked for. Each is READ once.
        let many: Vec<u64> = (1000..1040).collect();
        worker.prefetch(&table, &many).unwrap();
        worker.prefetch(&table, &many).unwrap();
        assert!(worker.stats().reads - started < 16, "{name}");
        for row in &many {
            worker.get(&table, *row, &mut value).unwrap();
            assert_eq!(value, [0; 16]);
        }
        assert_eq!(worker.stats().reads - started, 40, "{name}");
        worker.clock().unwrap();
    }
    client.close().unwrap();
    site.stop();
}

/// What was prefetched and never asked for does not stand in the way of what is prefetched later.
#[test]
fn what_is_never_asked_for_makes_room() {
    let _alone = alone();
    let site = Site::new("size", 1);
    let client = site.client(options(true));
    let table = client.table::<i64>("t", 2000, 16, Model::Async).unwrap();
    let mut worker = client.worker().unwrap();
    let mut value = [0; 16];
    for clock in 0..20 {
        worker.prefetch(&table, &(100 * clock..100 * clock + 15).collect::<Vec<u64>>()).unwrap();
        let before = worker.stats().reads;
        worker.get(&table, 100 * clock + 3, &mut value).unwrap();
        assert_eq!(worker.stats().reads, before, "clock {clock}: it was READ ahead");
        worker.clock().unwrap();
    }
    drop(worker);
    client.close().unwrap();
    site.stop();
}

/// A copy that was READ ahead may be older than an update of this worker's that is acknowledged and no longer held here.
#[test]
fn a_prefetched_copy_lacks_no_own_update() {
    let _alone = alone();
    let site = Site::new("size", 1);
    let client = site.client(options(true));
    for (name, model) in [
        ("async", Model::Async),
        ("ssp", Model::Ssp { staleness: 9 }),
        ("essp", Model::Essp { staleness: 9 }),
    ] {
        let few = TableOptions { cache_bytes: Some(64 << 10), ..TableOptions::default() };
        let table = client.table_with::<i64>(name, 2000, 16, model, few).unwrap();
        let mut worker = client.worker().unwrap();
        for row in 0..5 {
            worker.prefetch(&table, &[row]).unwrap();
            worker.inc(&table, row, &[1; 16]).unwrap();
            // Acknowledged in the first, let go in the second.
            for _ in 0..3 {
                worker.clock().unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
            let mut value = [0; 16];
            worker.get(&table, row, &mut value).unwrap();
            assert_eq!(value, [1; 16], "{name}");
        }
    }
    client.close().unwrap();
    site.stop();
}

#[test]
fn a_server_that_is_lost_while_rows_are_prefetched_is_an_error() {
    let _alone = alone();
    let site = Site::new("size", 1);
    let client = site.client(options(true));
    let table = client.table::<i64>("t", 2000, 16, Model::Async).unwrap();
    let mut worker = client.worker().unwrap();
    worker.prefetch(&table, &[1, 2, 3]).unwrap();
    site.stop();
    let mut value = [0; 16];
    let lost = |outcome: Result<(), Error>| {
        let error = outcome.unwrap_err();
        assert!(matches!(error, Error::ServerLost { .. } | Error::Fault { .. }), "{error}");
    };
    lost(worker.clock());
    lost(worker.get(&table, 1, &mut value));
    lost(worker.get_many(&table, &[2], &mut value));
    lost(worker.prefetch(&table, &[4]));
}

/// 1,000 clients of one worker each, on one server, all in this process: three clocks under BSP. (Fewer, where a process may not open
/// 14 files for each.)
#[test]
fn a_thousand_clients_work_together() {
    let _alone = alone();
    for copies in [false, true] {
        clients_work_together(1000.min(most_files() / 15), copies);
    }
}

/// Files that this process may open.
fn most_files() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    files.split_whitespace().nth(4).unwrap().parse().unwrap_or(usize::MAX)
}

fn clients_work_together(clients: usize, copies: bool) {
    const CLOCKS: i64 = 3;
    let site = site(1, |config| {
        (config.clients, config.lanes, config.credits) = (clients, 1, 1);
        config.staging = Config::default_staging(clients);
    });
    let before = (resident(), Instant::now());
    // Each with a transport of its own, as a process has: a connection offers all regions of its transport.
    let join = |_| {
        let host = Host::for_addresses(&site.addresses).unwrap();
        let options = ClientOptions { clients: clients as u16, cache_bytes: 1 << 20, ..options(copies) };
        let client = Client::connect_on(&host, &site.addresses, options).unwrap();
        let table = client.table::<i64>("t", 64, 4, Model::Bsp).unwrap();
        let worker = client.worker().unwrap();
        Some((client, table, worker))
    };
    let mut seats: Vec<_> = (0..clients).map(join).collect();
    let connected = (resident(), Instant::now());
    let files = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    // A few threads, each of which drives some clients: nobody waits before all of its own have ended the clock.
    std::thread::scope(|scope| {
        for seats in seats.chunks_mut(clients.div_ceil(4)) {
            scope.spawn(move || {
                for clock in 0..CLOCKS {
                    for (at, seat) in seats.iter_mut().enumerate() {
                        let (_, table, worker) = seat.as_mut().unwrap();
                        worker.inc(table, at as u64 % 63, &[1; 4]).unwrap();
                        worker.inc(table, 63, &[1; 4]).unwrap();
                        worker.clock().unwrap();
                    }
                    for seat in seats.iter_mut() {
                        let (_, table, worker) = seat.as_mut().unwrap();
                        let mut value = [0; 4];
                        worker.get(table, 63, &mut value).unwrap();
                        let least = (clock + 1) * clients as i64;
                        assert!(value.iter().all(|value| *value >= least), "{value:?} at clock {clock}");
                    }
                }
                for seat in seats {
                    let (client, _, worker) = seat.take().unwrap();
                    assert_eq!(worker.stats().violations, 0);
                    drop(worker);
                    client.close().unwrap();
                }
            });
        }
    });
    println!(
        "{clients} clients, copies {copies}: {:?} to connect, {} MiB, {files} files, {maps} mappings; {:?} for {CLOCKS} clocks \
         and the end",
        connected.1 - before.1,
        connected.0.saturating_sub(before.0) / MIB,
        connected.1.elapsed(),
    );
    site.stop();
}
