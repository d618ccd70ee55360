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
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fervor_client::{Model, Table, Worker};
use fervor_verbs::{Address, transport::Transport};
use support::{
    Random,
    rows::{self, Job},
};

mod support;

const CLIENTS: usize = 3;
const EACH: usize = 2;
const WORKERS: usize = CLIENTS * EACH;
/// Rows span several cache lines.
const WIDTH: usize = 40;
const V0: f32 = 9.0;
const MODEL: Model = Model::Vap { v0: V0 };
const JOB: Job = Job { clients: CLIENTS, each: EACH, width: WIDTH, model: MODEL, check: true, copies: true };
/// The greatest single update.
const GREATEST: u64 = 3;

/// Of each worker: its clock in the upper half of the word, what it has added in the lower one.
type Made = [AtomicU64; WORKERS];

/// What the workers of a job tell each other, and the test.
#[derive(Debug, Default)]
struct Told {
    made: Made,
    /// Time that all of them have waited.
    waited: Mutex<Duration>,
}

impl Told {
    fn made(&self, worker: usize) -> u64 {
        self.made[worker].load(Ordering::SeqCst) & 0xffff_ffff
    }
}

fn work<T: Transport>(
    mut worker: Worker<T>,
    table: &Table<i64>,
    me: usize,
    made: &Made,
    clocks: u64,
    seed: u64,
) -> Duration {
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
    worker.stats().waiting
}

fn client<T: Transport>(told: &Arc<Told>, clocks: u64, seed: u64) -> impl Fn(&T, &Address, usize) + use<T> {
    let told = told.clone();
    move |transport, server, number| {
        let told = told.clone();
        JOB.client(transport, server, number, move |worker, table, me| {
            let waited = work(worker, table, me, &told.made, clocks, seed);
            *told.waited.lock().unwrap() += waited;
        });
    }
}

#[test]
fn the_value_bound_holds_over_shared_memory() {
    let told = Arc::new(Told::default());
    rows::over_shared_memory(CLIENTS, client(&told, 1000, 1), |host, server| {
        JOB.sums(host, server, |worker| told.made(worker));
    });
    assert!(*told.waited.lock().unwrap() > Duration::ZERO, "no update ever waited: the bound was not tried");
}

#[test]
fn the_value_bound_holds_in_the_simulator() {
    for seed in 0..60 {
        let told = Arc::new(Told::default());
        let after = {
            let told = told.clone();
            move |node: &_, server: &_| JOB.sums(node, server, |worker| told.made(worker))
        };
        rows::simulated(seed, CLIENTS, client(&told, 15, seed), after);
        let waited = *told.waited.lock().unwrap();
        assert!(waited > Duration::ZERO, "seed {seed}: no update ever waited: the bound was not tried");
    }
}
