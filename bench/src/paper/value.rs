//! Experiment 5, second part: VAP's bound, measured.
//!
//! Each worker has a row of its own, to which it alone adds; what all compute with is the sum of all rows. So a reader's copy of
//! a row says exactly what of that worker's updates it has seen, and the rest is in transit. An observer outside the
//! cluster, to whom nothing takes time, knows all updates the moment they are made, and measures each read: no row may lack more than
//! `max(v0 / sqrt(t), u)` in any element, `t` being the clock, from 1, of the worker's last update, and `u` its greatest.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Result;
use fervor_client::Model;
use fervor_verbs::transport::Runtime as _;

use super::{
    claims::Claim,
    cluster::{self, Place},
    convex::{DIMENSIONS, F, L, Point, cluster, point},
    runs::in_parallel,
};
use crate::report::percent;

/// Bounds in the first clock: from one that never holds anybody up to one that nearly every update exceeds.
const BOUNDS: [f32; 3] = [0.2, 0.01, 0.002];
/// Updates of a worker in a clock.
const UPDATES: usize = 4;
/// What is computed for each.
const CHARGE: Duration = Duration::from_micros(20);

/// What the observer knows of a worker.
#[derive(Debug, Clone, Default)]
struct Known {
    /// All of its updates.
    sum: Point,
    /// Its greatest, in any element.
    single: f64,
    /// The clock of its last one, from 1.
    clock: usize,
}

/// What was measured at one worker.
#[derive(Debug, Default)]
struct Measured {
    /// The greatest lack of a row, as part of what it may lack.
    greatest: f64,
    /// The lack of the sum of all rows, in the greatest element: added up over reads.
    lack: f64,
    reads: usize,
    waiting: Duration,
    start: Duration,
    end: Duration,
}

/// With one bound.
#[derive(Debug, Clone, Copy)]
struct Bounded {
    v0: f32,
    greatest: f64,
    lack: f64,
    waiting: f64,
}

fn greatest(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// What one worker does.
fn work(
    place: &Place,
    v0: f32,
    workers: usize,
    clocks: usize,
    known: &Mutex<Vec<Known>>,
) -> Result<Measured> {
    let know = || known.lock().unwrap_or_else(PoisonError::into_inner);
    let table = place.client.table::<f64>("rows", workers as u64, DIMENSIONS, Model::Vap { v0 })?;
    let mut worker = place.client.worker()?;
    let numbers: Vec<u64> = (0..workers as u64).collect();
    let mut rows = vec![0.0; workers * DIMENSIONS];
    let sum = |rows: &[f64]| -> Point {
        std::array::from_fn(|i| rows.iter().skip(i).step_by(DIMENSIONS).sum::<f64>())
    };
    let sigma = F / (L * (8.0 * workers as f64).sqrt());
    let mut measured = Measured { start: place.node.now(), ..Measured::default() };
    for clock in 1..=clocks {
        for _ in 0..UPDATES {
            worker.get_many(&table, &numbers, &mut rows)?;
            let view = sum(&rows);
            {
                let known = know();
                for (known, row) in
                    known.iter().zip(rows.chunks_exact(DIMENSIONS)).filter(|(k, _)| k.clock > 0)
                {
                    let bound = (f64::from(v0) / (known.clock as f64).sqrt()).max(known.single);
                    measured.greatest = measured.greatest.max(greatest(&known.sum, row) / bound);
                }
                let all: Vec<f64> = known.iter().flat_map(|known| known.sum).collect();
                measured.lack += greatest(&sum(&all), &view);
                measured.reads += 1;
            }
            place.node.compute(CHARGE);
            let a = point(place.number, clock);
            let step = sigma / (UPDATES as f64 * ((place.number + workers * clock) as f64).sqrt());
            let update: Point = std::array::from_fn(|i| -step * (view[i] - a[i]));
            worker.inc(&table, place.number as u64, &update)?;
            let known = &mut know()[place.number];
            known.sum.iter_mut().zip(update).for_each(|(sum, x)| *sum += x);
            known.single = update.iter().fold(known.single, |most, x| most.max(x.abs()));
            known.clock = clock;
        }
        worker.clock()?;
    }
    measured.end = place.node.now();
    measured.waiting = worker.stats().waiting;
    Ok(measured)
}

fn bounded(v0: f32, workers: usize, clocks: usize, seed: u64, core: Option<usize>) -> Result<Bounded> {
    let known = Arc::new(Mutex::new(vec![Known::default(); workers]));
    let simulated =
        cluster::run(&cluster(workers, seed, core), move |place| work(place, v0, workers, clocks, &known))?;
    let all = &simulated.results;
    let sum = |of: fn(&Measured) -> f64| all.iter().map(of).sum::<f64>();
    Ok(Bounded {
        v0,
        greatest: all.iter().map(|one| one.greatest).fold(0.0, f64::max),
        lack: sum(|one| one.lack) / sum(|one| one.reads as f64),
        waiting: sum(|one| one.waiting.as_secs_f64()) / sum(|one| (one.end - one.start).as_secs_f64()),
    })
}

/// The claims about it, with so many workers and clocks.
///
/// # Errors
/// As [`cluster::run`].
pub fn claims(workers: usize, clocks: usize, seed: u64) -> Result<[Claim; 2]> {
    let all: Vec<Bounded> = in_parallel(&BOUNDS, |_, core, &v0| bounded(v0, workers, clocks, seed, core))
        .into_iter()
        .collect::<Result<_>>()?;
    let each = |of: &dyn Fn(&Bounded) -> String| {
        all.iter().map(|one| format!("v0 = {}: {}", one.v0, of(one))).collect::<Vec<_>>().join("; ")
    };
    let tighter = |pair: &[Bounded]| pair[1].lack < pair[0].lack && pair[1].waiting > pair[0].waiting;
    Ok([
        Claim::new(
            "VAP: no read lacks more of a worker's updates than may be in transit, max(v0 / sqrt(t), u) in any element",
            format!(
                "{workers} workers, the most as part of that: {}",
                each(&|one| format!("{:.3}", one.greatest))
            ),
            all.iter().all(|one| one.greatest > 0.0 && one.greatest <= 1.0),
        ),
        Claim::new(
            "VAP: the smaller v0 is, the less reads lack by value, and the more time goes to waiting",
            each(&|one| format!("{:.2e}, {} of the time", one.lack, percent(one.waiting))),
            all.windows(2).all(tighter),
        ),
    ])
}
