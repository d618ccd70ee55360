//! The SSP guarantee: every worker adds 1 to its own element each clock; every reader checks every element against the
//! bound of the table's model, and its own against equality. Over shared memory and TCP with real threads, and in the
//! simulator, which delivers the worst that the transport's contract allows.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use fervor_client::{Model, Table, Worker};
use fervor_verbs::{Address, transport::Transport};
use support::rows::{self, Job};

mod support;

const CLIENTS: usize = 2;
/// Of each client.
const EACH: usize = 2;
const WORKERS: usize = CLIENTS * EACH;
/// Rows span several cache lines.
const WIDTH: usize = 40;
const MODELS: [Model; 4] =
    [Model::Bsp, Model::Ssp { staleness: 3 }, Model::Essp { staleness: 3 }, Model::Async];

/// What each worker has added so far: an upper bound for what others may see.
type Added = Arc<[AtomicU64; WORKERS]>;

fn work<T: Transport>(mut worker: Worker<T>, table: &Table<i64>, me: usize, added: &Added, clocks: u64) {
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

fn job(model: Model, copies: bool) -> Job {
    Job { clients: CLIENTS, each: EACH, width: WIDTH, model, check: true, copies }
}

/// One client of a job in which nobody has added anything yet when it is made.
fn client<T: Transport>(model: Model, copies: bool, clocks: u64) -> impl Fn(&T, &Address, usize) {
    let added = Added::new(std::array::from_fn(|_| AtomicU64::new(0)));
    move |transport, server, number| {
        let added = added.clone();
        job(model, copies).client(transport, server, number, move |worker, table, me| {
            work(worker, table, me, &added, clocks);
        });
    }
}

fn over_shared_memory(model: Model) {
    const CLOCKS: u64 = 5000;
    for copies in [false, true] {
        let after = |host: &_, server: &_| job(model, copies).sums(host, server, |_| CLOCKS);
        rows::over_shared_memory(CLIENTS, client(model, copies, CLOCKS), after);
    }
}

#[test]
fn all_models_over_tcp() {
    const CLOCKS: u64 = 500;
    for model in MODELS {
        let after = |host: &_, server: &_| job(model, false).sums(host, server, |_| CLOCKS);
        let anywhere = "tcp://127.0.0.1:0".parse().unwrap();
        rows::on_this_machine(&anywhere, CLIENTS, client(model, false, CLOCKS), after);
    }
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

fn simulated(model: Model, seed: u64, clocks: u64) -> u64 {
    let after = move |node: &_, server: &_| job(model, false).sums(node, server, |_| clocks);
    rows::simulated(seed, CLIENTS, client(model, false, clocks), after)
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
