//! Matrix factorisation on a simulated cluster: the arithmetic is real, the time that it takes is charged.
//!
//! A worker passes over all its ratings in each clock, in runs of [`RUN`] columns: it gets their factors, computes (a part
//! of [`Job::charge`] passes), trains on copies, and adds what changed. The table has what the factors have
//! gained on their initial values, which every worker knows; so nobody has to write them first.
//!
//! **Who measures.** An observer outside the cluster, to whom nothing takes time, adds up all updates the moment they are made:
//! the loss of a worker after each of its clocks is that of its row factors and of these sums, over its own ratings.
//! The loss of the job at some moment is the sum of the workers' last ones. So no measurement disturbs a run, and no
//! model's loss is that of stale copies.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use fervor_client::Model;
use fervor_verbs::transport::{Transport as _, sim::Sent};
use serde::Serialize;

use super::cluster::{self, Cluster, Place};
use crate::{
    data::{Planted, Ratings},
    mf::{
        plan::{self, Share},
        sgd::{self, Initial, Side},
    },
};

/// Columns whose factors are fetched together.
const RUN: usize = 16;
/// Of its loss before the first clock: a worker whose loss is beyond stops, the job diverges.
const DIVERGED: f64 = 100.0;

/// What is trained on, the same for all runs.
#[derive(Debug)]
pub struct Input {
    /// The ratings.
    pub ratings: Ratings,
    /// Numbers in a factor.
    pub rank: usize,
    initial: Initial,
}

impl Input {
    /// Ratings around planted factors.
    pub fn new(size: &Planted, rank: usize, seed: u64) -> Self {
        let ratings = size.ratings(seed);
        let initial = Initial::new(seed, rank, ratings.root_mean_square());
        Self { ratings, rank, initial }
    }

    /// The initial factors of all columns.
    fn columns(&self) -> Vec<f32> {
        let mut all = vec![0.0; self.ratings.columns as usize * self.rank];
        for (column, factor) in (0..).zip(all.chunks_mut(self.rank)) {
            self.initial.fill(Side::Column, column, factor);
        }
        all
    }

    /// The initial factors of the rows of a worker.
    fn rows(&self, share: &Share) -> Vec<f32> {
        let mut all = vec![0.0; share.rows as usize * self.rank];
        for (row, factor) in (share.first_row..).zip(all.chunks_mut(self.rank)) {
            self.initial.fill(Side::Row, row, factor);
        }
        all
    }

    /// What a step for one rating costs on this machine.
    pub fn measure(&self) -> Duration {
        let share = plan::share(&self.ratings, 0, 1, 1, 1);
        let (mut left, mut right) = (self.rows(&share), self.columns());
        let passes = 20;
        let start = Instant::now();
        for _ in 0..passes {
            for (group, entries) in share.whole.iter() {
                sgd::train(
                    &mut left,
                    &mut right[group.column as usize * self.rank..][..self.rank],
                    entries,
                    1e-6,
                );
            }
        }
        start.elapsed() / (passes * share.whole.entries.len() as u32)
    }

    /// Bytes of a client's cache that all columns fit.
    pub fn cache(&self) -> usize {
        let stride = (32 + 4 * self.rank).next_multiple_of(64);
        (64 << 10) + 2 * self.ratings.columns as usize * stride
    }
}

/// How it is trained.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    /// The table's model.
    pub model: Model,
    /// Size of a step.
    pub step: f32,
    /// Clocks.
    pub clocks: usize,
    /// What each worker computes in a clock, however its ratings are spread.
    pub charge: Duration,
}

/// What a worker has come to.
#[derive(Debug, Default)]
struct Worked {
    start: Duration,
    end: Duration,
    sent: (Sent, Sent),
    computing: Duration,
    waiting: Duration,
    communicating: Duration,
    differentials: BTreeMap<i64, u64>,
    hits: u64,
    misses: u64,
    initial: f64,
    /// After each clock: the time, and the worker's loss.
    losses: Vec<(Duration, f64)>,
}

/// What a run has come to. Seconds are of virtual time, from the first worker's start.
#[derive(Debug, Clone, Default, Serialize)]
pub struct MfRun {
    /// Loss before the first clock.
    pub initial: f64,
    /// Loss over the workers' n-th clocks.
    pub by_clock: Vec<f64>,
    /// Seconds and loss.
    pub by_time: Vec<(f64, f64)>,
    /// Whether the loss went beyond all bounds.
    pub diverged: bool,
    /// Until the last worker's end.
    pub seconds: f64,
    /// Mean over workers.
    pub computing: f64,
    /// Mean over workers.
    pub waiting: f64,
    /// Mean over workers.
    pub communicating: f64,
    /// How many reads had which clock differential.
    pub differentials: BTreeMap<i64, u64>,
    /// Reads from the cache, of all.
    pub hit_rate: f64,
    /// Messages on the network per clock of the job.
    pub messages_per_clock: f64,
    /// Bytes on the network per clock of the job.
    pub bytes_per_clock: f64,
    /// Events of the simulation.
    pub events: u64,
    /// Hash of its history.
    pub hash: u64,
}

impl MfRun {
    /// Seconds until the loss is `target` or less for the first time.
    pub fn seconds_to(&self, target: f64) -> Option<f64> {
        self.by_time.iter().find(|(_, loss)| *loss <= target).map(|(seconds, _)| *seconds)
    }

    /// Clocks until the loss is `target` or less.
    pub fn clocks_to(&self, target: f64) -> Option<usize> {
        self.by_clock.iter().position(|loss| *loss <= target).map(|clocks| clocks + 1)
    }

    /// The mean clock differential.
    pub fn mean_differential(&self) -> f64 {
        let count: u64 = self.differentials.values().sum();
        let sum: f64 = self.differentials.iter().map(|(d, n)| *d as f64 * *n as f64).sum();
        sum / count.max(1) as f64
    }

    /// Part of the reads with this clock differential.
    pub fn part_at(&self, differential: i64) -> f64 {
        let count: u64 = self.differentials.values().sum();
        self.differentials.get(&differential).copied().unwrap_or(0) as f64 / count.max(1) as f64
    }
}

/// Trains on `cluster`.
///
/// # Errors
/// As [`cluster::run`].
pub fn run(cluster: &Cluster, input: &Arc<Input>, job: Job) -> Result<MfRun> {
    let observed = Arc::new(Mutex::new(input.columns()));
    let (inside, workers) = (input.clone(), cluster.workers);
    let work = move |place: &Place| work(place, workers, &inside, job, &observed);
    let simulated = cluster::run(cluster, work)?;
    let mut run = sum_up(&simulated.results, job.clocks);
    (run.events, run.hash) = (simulated.events, simulated.hash);
    Ok(run)
}

/// What one worker does.
fn work(
    place: &Place,
    workers: usize,
    input: &Input,
    job: Job,
    observed: &Mutex<Vec<f32>>,
) -> Result<Worked> {
    let (rank, node) = (input.rank, &place.node);
    let observe = || observed.lock().unwrap_or_else(PoisonError::into_inner);
    let table = place.client.table::<f32>("R", input.ratings.columns.into(), rank, job.model)?;
    let mut worker = place.client.worker()?;
    let share = plan::share(&input.ratings, place.number, workers, 1, 1);
    let (mut left, initial) = (input.rows(&share), input.columns());
    let loss = |left: &[f32], right: &[f32]| -> f64 {
        let factor = |column: u32| &right[column as usize * rank..][..rank];
        share.whole.iter().map(|(group, entries)| sgd::loss(left, factor(group.column), entries)).sum()
    };
    let mut worked = Worked { initial: loss(&left, &initial), ..Worked::default() };
    (worked.start, worked.sent.0) = (node.now(), place.sim.sent());
    // Shares differ by the ratings of a row: nobody is slow for that.
    let all = share.whole.entries.len() as f64;
    let (mut rows, mut gained) = (Vec::with_capacity(RUN), vec![0.0; RUN * rank]);
    let mut factor = vec![0.0; rank];
    for _ in 0..job.clocks {
        let mut rest = share.whole.entries.as_slice();
        for groups in share.whole.groups.chunks(RUN) {
            rows.clear();
            rows.extend(groups.iter().map(|group| u64::from(group.column)));
            let gained = &mut gained[..groups.len() * rank];
            worker.get_many(&table, &rows, gained)?;
            let ratings: u32 = groups.iter().map(|group| group.ratings).sum();
            let before = node.now();
            node.compute(job.charge.mul_f64(f64::from(ratings) / all));
            worked.computing += node.now() - before;
            for (group, gained) in groups.iter().zip(gained.chunks_mut(rank)) {
                let (entries, after) = rest.split_at(group.ratings as usize);
                rest = after;
                let at = group.column as usize * rank;
                for ((factor, initial), gained) in factor.iter_mut().zip(&initial[at..]).zip(&mut *gained) {
                    *factor = initial + *gained;
                    *gained = *factor;
                }
                sgd::train(&mut left, &mut factor, entries, job.step);
                for (gained, factor) in gained.iter_mut().zip(&factor) {
                    *gained = factor - *gained;
                }
                if gained.iter().any(|gained| !gained.is_finite()) {
                    gained.fill(0.0);
                }
                worker.inc(&table, group.column.into(), gained)?;
                observe()[at..].iter_mut().zip(gained).for_each(|(sum, gained)| *sum += *gained);
            }
        }
        worker.clock()?;
        let loss = loss(&left, &observe());
        worked.losses.push((node.now(), loss));
        if loss.is_nan() || loss > DIVERGED * worked.initial {
            break;
        }
    }
    (worked.end, worked.sent.1) = (node.now(), place.sim.sent());
    let stats = worker.stats();
    (worked.waiting, worked.communicating) = (stats.waiting, stats.communicating);
    (worked.hits, worked.misses) = (stats.hits, stats.misses);
    worked.differentials = stats.clock_differential;
    Ok(worked)
}

fn sum_up(workers: &[Worked], clocks: usize) -> MfRun {
    let start = workers.iter().map(|worker| worker.start).min().unwrap_or_default();
    let end = workers.iter().map(|worker| worker.end).max().unwrap_or_default();
    let mean = |time: fn(&Worked) -> Duration| {
        workers.iter().map(|worker| time(worker).as_secs_f64()).sum::<f64>() / workers.len() as f64
    };
    let mut run = MfRun {
        initial: workers.iter().map(|worker| worker.initial).sum(),
        seconds: (end - start).as_secs_f64(),
        computing: mean(|worker| worker.computing),
        waiting: mean(|worker| worker.waiting),
        communicating: mean(|worker| worker.communicating),
        diverged: workers.iter().any(|worker| {
            worker.losses.len() < clocks || worker.losses.iter().any(|(_, loss)| !loss.is_finite())
        }),
        ..MfRun::default()
    };
    let shortest = workers.iter().map(|worker| worker.losses.len()).min().unwrap_or(0);
    run.by_clock =
        (0..shortest).map(|clock| workers.iter().map(|worker| worker.losses[clock].1).sum()).collect();
    let mut events: Vec<(Duration, usize, f64)> = workers
        .iter()
        .enumerate()
        .flat_map(|(number, worker)| worker.losses.iter().map(move |(time, loss)| (*time, number, *loss)))
        .collect();
    events.sort_by_key(|(time, number, _)| (*time, *number));
    let mut last: Vec<f64> = workers.iter().map(|worker| worker.initial).collect();
    run.by_time.push((0.0, run.initial));
    for (time, number, loss) in events {
        last[number] = loss;
        run.by_time.push(((time - start).as_secs_f64(), last.iter().sum()));
    }
    let (mut hits, mut misses) = (0, 0);
    for worker in workers {
        hits += worker.hits;
        misses += worker.misses;
        for (differential, count) in &worker.differentials {
            *run.differentials.entry(*differential).or_default() += count;
        }
    }
    run.hit_rate = hits as f64 / (hits + misses).max(1) as f64;
    let first =
        workers.iter().map(|worker| worker.sent.0).min_by_key(|sent| sent.messages).unwrap_or_default();
    let last =
        workers.iter().map(|worker| worker.sent.1).max_by_key(|sent| sent.messages).unwrap_or_default();
    run.messages_per_clock = (last.messages - first.messages) as f64 / clocks as f64;
    run.bytes_per_clock = (last.bytes - first.bytes) as f64 / clocks as f64;
    run
}
