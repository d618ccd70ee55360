//! What was once found wrong by probing, each with the program that showed it.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use fervor_client::{ClientOptions, Error, Model, Table, TableOptions, Worker};
use fervor_verbs::transport::any::Host;
use support::site::{Site, options};

mod support;

fn both() -> [ClientOptions; 2] {
    [false, true].map(options)
}

/// The slowest worker's `clock` waits for what was handed over below it, and not for what the others go on to add.
#[test]
fn the_slowest_worker_ends_its_clock_whatever_the_others_add() {
    const ROWS: u64 = 500;
    for options in both() {
        let site = Site::new("probed", 1);
        let client = site.client(options);
        let table = client.table::<f32>("t", ROWS, 256, Model::Ssp { staleness: 1 }).unwrap();
        let mut slow = client.worker().unwrap();
        let writers: Vec<_> = (0..2).map(|_| client.worker().unwrap()).collect();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for mut worker in writers {
                let (table, done) = (&table, &done);
                scope.spawn(move || {
                    while !done.load(Ordering::SeqCst) {
                        for row in 0..ROWS {
                            worker.inc(table, row, &[1.0; 256]).unwrap();
                        }
                        worker.clock().unwrap();
                    }
                });
            }
            for _ in 0..20 {
                std::thread::sleep(Duration::from_millis(2));
                slow.inc_at(&table, 0, &[(0, 1.0)]).unwrap();
                slow.clock().unwrap();
            }
            done.store(true, Ordering::SeqCst);
        });
        drop(slow);
        client.close().unwrap();
        site.stop();
    }
}

/// A clock's updates of a row are one update, however many calls made it, also of a row of few columns among many.
#[test]
fn many_small_updates_of_a_row_are_seen_at_once_or_not_at_all() {
    for options in both() {
        let site = Site::new("probed", 1);
        let client = site.client(options.clone());
        let table = client.table::<f32>("t", 1, 100, Model::Async).unwrap();
        let (mut writer, mut reader) = (client.worker().unwrap(), client.worker().unwrap());
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..20 {
                    for pair in 0..20_000u32 {
                        writer.inc_at(&table, 0, &[(pair % 100, 1.0)]).unwrap();
                    }
                    writer.clock().unwrap();
                }
                done.store(true, Ordering::SeqCst);
            });
            let mut row = [0.0; 100];
            while !done.load(Ordering::SeqCst) {
                reader.get(&table, 0, &mut row).unwrap();
                assert!(row.iter().all(|value| *value == row[0]), "{row:?}");
                assert_eq!(row[0] % 200.0, 0.0, "whole clocks: {}", row[0]);
            }
        });
        drop((writer, reader));
        client.close().unwrap();
        site.stop();
    }
}

/// A table that one shard refuses is on none, and costs its asker nothing.
#[test]
fn a_table_that_a_shard_refuses_is_on_none() {
    let page = 1 << 16;
    // The second server has little memory.
    let site = Site::with("probed", 2, 1, |number, config| {
        config.memory = if number == 0 { 64 * page } else { page };
    });
    for (name, options) in ["t", "u"].into_iter().zip(both()) {
        let options = ClientOptions { cache_bytes: 32 * page, ..options };
        let client = site.client(options);
        for rows in [16_000, 16_001, 16_002, 16_003, 16_004, 16_005] {
            let error =
                client.table::<f32>(name, rows, 32, Model::Essp { staleness: 1 }).unwrap_err().to_string();
            assert!(error.contains("--memory"), "{rows}: {error}");
        }
        // The name, the servers' memory and the cache are free for it.
        let table = client.table::<f32>(name, 100, 32, Model::Essp { staleness: 1 }).unwrap();
        let mut worker = client.worker().unwrap();
        worker.inc(&table, 99, &[1.0; 32]).unwrap();
        worker.clock().unwrap();
        let mut row = [0.0; 32];
        worker.get(&table, 99, &mut row).unwrap();
        assert!(row[0] >= 1.0);
        drop(worker);
        client.close().unwrap();
    }
    site.stop();
}

/// What is counted per clock does not grow with the clocks.
#[test]
fn a_worker_far_ahead_of_one_that_stands_still_counts_in_few_places() {
    for options in both() {
        let site = Site::new("probed", 1);
        let client = site.client(options);
        let table = client.table::<i64>("t", 4, 1, Model::Async).unwrap();
        let (idle, mut busy) = (client.worker().unwrap(), client.worker().unwrap());
        let mut row = [0];
        for clock in 0..5_000 {
            busy.inc(&table, 1, &[1]).unwrap();
            busy.get(&table, 1, &mut row).unwrap();
            assert_eq!(row, [clock + 1]);
            busy.clock().unwrap();
        }
        let places = busy.stats().clock_differential.len();
        assert!(places < 150, "{places} differentials");
        drop((idle, busy));
        client.close().unwrap();
        site.stop();
    }
}

fn sums<E: fervor_client::Element>(worker: &mut Worker<Host>, table: &Table<E>) -> Vec<E> {
    let mut row = vec![E::default(); table.width()];
    worker.get(table, 0, &mut row).unwrap();
    row
}

/// Updates that are finite and whose sum is not are refused where they are made, and the job goes on.
#[test]
fn updates_whose_sum_is_not_finite_are_refused_at_once() {
    for options in both() {
        let site = Site::new("probed", 1);
        let client = site.client(options);
        let table = client.table::<f32>("t", 2, 4, Model::Bsp).unwrap();
        let taking = TableOptions { non_finite: true, ..TableOptions::default() };
        let infinite = client.table_with::<f32>("u", 2, 4, Model::Bsp, taking).unwrap();
        let mut worker = client.worker().unwrap();
        let most = [3e38, 0.0, 0.0, 0.0];
        worker.inc(&table, 0, &most).unwrap();
        for again in [worker.inc(&table, 0, &most), worker.inc_at(&table, 0, &[(0, 3e38)])] {
            let Err(Error::NonFinite { table, row: 0, column: 0, value }) = again else {
                panic!("{again:?}")
            };
            assert_eq!((table.as_str(), value.as_str()), ("t", "inf"));
        }
        worker.inc(&infinite, 0, &most).unwrap();
        worker.inc(&infinite, 0, &most).unwrap();
        worker.clock().unwrap();
        assert_eq!(sums(&mut worker, &table), most);
        assert_eq!(sums(&mut worker, &infinite), [f32::INFINITY, 0.0, 0.0, 0.0]);
        // Between two clocks it is the row that overflows, for whoever reads it; nobody loses a server.
        worker.inc(&table, 0, &most).unwrap();
        worker.clock().unwrap();
        assert_eq!(sums(&mut worker, &table), [f32::INFINITY, 0.0, 0.0, 0.0]);
        drop(worker);
        client.close().unwrap();
        site.stop();
    }
}

/// Two workers of one client whose updates are finite, and whose sum is not: each goes by itself.
#[test]
fn sums_of_several_workers_that_are_not_finite_do_not_end_the_connection() {
    for options in both() {
        let site = Site::new("probed", 1);
        let client = site.client(options);
        let table = client.table::<f32>("t", 2, 4, Model::Bsp).unwrap();
        let mut workers = [client.worker().unwrap(), client.worker().unwrap()];
        for worker in &mut workers {
            worker.inc(&table, 1, &[3e38; 4]).unwrap();
        }
        for worker in &mut workers {
            worker.clock().unwrap();
        }
        let mut row = [0.0; 4];
        for worker in &mut workers {
            worker.get(&table, 1, &mut row).unwrap();
            assert_eq!(row, [f32::INFINITY; 4]);
        }
        drop(workers);
        client.close().unwrap();
        site.stop();
    }
}
