//! Random workloads, checked exactly: a few seeds in the simulator, of which `ci/sim` runs thousands, and a few over
//! shared memory with real threads. See [`checker`].

use std::sync::atomic::{AtomicBool, Ordering};

mod checker;
mod support;

use checker::scene::{over_shared_memory, simulated};

/// Most clocks of a job in the simulator: as `ci/sim` runs them.
const CLOCKS: u64 = 30;

#[test]
fn random_workloads_in_the_simulator() {
    for seed in 0..60 {
        if let Err(failure) = simulated(seed, CLOCKS) {
            panic!("{}{}", failure.report, failure.first);
        }
    }
}

#[test]
fn random_workloads_over_shared_memory() {
    for seed in 1000..1020 {
        over_shared_memory(seed, 200);
    }
}

/// Nothing but the seed decides what happens: not what else the machine does.
#[test]
fn a_seed_is_one_history_also_when_the_machine_is_busy() {
    let seeds = [3, 4, 5, 6, 7, 8, 9, 10];
    let hashes = || seeds.map(|seed| simulated(seed, CLOCKS).expect("a clean seed").hash);
    let alone = hashes();
    let enough = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !enough.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let at_once = [(); 2].map(|()| scope.spawn(hashes));
        let found = at_once.map(|thread| thread.join());
        enough.store(true, Ordering::Relaxed);
        for found in found {
            assert_eq!(found.expect("clean seeds"), alone);
        }
    });
    let mut different = alone.to_vec();
    different.sort_unstable();
    different.dedup();
    assert_eq!(different.len(), seeds.len(), "each seed is another history");
}
