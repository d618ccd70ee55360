//! Training on a simulated cluster: the arithmetic is real, the time that it takes is charged.
//!
//! What an application ([`mf`](super::mf), [`lda`](super::lda)) does in a clock is its own; that it is timed, charged and
//! measured is here, the same for all.
//!
//! **Who measures.** An observer outside the cluster, to whom nothing takes time, adds up all updates the moment they are made
//! ([`Application::Sums`]). A worker's part of the objective after each of its clocks is that of what it owns and of
//! these sums; the objective of the job at some moment is the sum of the workers' last ones. So no measurement disturbs a
//! run, and no model is judged by stale copies. What a read lacks is its difference from the sums at that moment: how
//! stale it is *by value*, while the clock differential says how stale it is by clocks.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use fervor_client::{Model, Worker};
use fervor_verbs::transport::{Runtime as _, sim::Node};
use serde::Serialize;

use super::cluster::{self, Cluster, Place, Traffic};
use crate::job::Accesses;

/// How it is trained.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    /// The tables' model.
    pub model: Model,
    /// Clocks.
    pub clocks: usize,
    /// What each worker computes in a clock, whatever its share is.
    pub charge: Duration,
}

/// What is trained, with what it is trained on: the same for all runs.
pub trait Application: Send + Sync + 'static {
    /// What the observer adds up.
    type Sums: Send + 'static;
    /// One worker's part.
    type Learner: Learner<Sums = Self::Sums>;
    /// Whether the objective is to rise.
    const RISES: bool;

    /// The sums before the first clock.
    fn sums(&self) -> Self::Sums;

    /// The part of the worker at `place`, of so many; what has to be agreed upon before the first clock is.
    ///
    /// # Errors
    /// What the client says.
    fn learner(
        self: &Arc<Self>,
        place: &Place,
        worker: &mut Worker<Node>,
        workers: usize,
        model: Model,
    ) -> Result<Self::Learner>;

    /// Bytes of a client's cache that all shared rows fit.
    fn cache(&self) -> usize;
}

/// One worker's part of an application.
pub trait Learner {
    /// What the observer adds up.
    type Sums;

    /// Does what there is to do between two clocks; computing, updates and reads are shown to `watch`.
    ///
    /// # Errors
    /// What the client says.
    fn learn(&mut self, worker: &mut Worker<Node>, watch: &mut Watch<Self::Sums>) -> Result<()>;

    /// The worker's part of the objective.
    fn objective(&self, sums: &Self::Sums) -> f64;

    /// Whether it makes no sense to go on from this objective; it was `initial` before the first clock.
    fn diverged(&self, initial: f64, objective: f64) -> bool;
}

/// How a worker is charged and watched.
#[derive(Debug)]
pub struct Watch<S> {
    node: Node,
    sums: Arc<Mutex<S>>,
    charge: Duration,
    computing: Duration,
    lack: Lack,
}

impl<S> Watch<S> {
    /// Computes `part` of what there is to compute in a clock.
    pub fn compute(&mut self, part: f64) {
        let before = self.node.now();
        self.node.compute(self.charge.mul_f64(part));
        self.computing += self.node.now() - before;
    }

    /// The sums of all updates at this moment.
    pub fn sums(&self) -> MutexGuard<'_, S> {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// In some element the row that has been read lacks this much, and nowhere more.
    pub fn lacks(&mut self, most: f64) {
        self.lack.sum += most;
        self.lack.reads += 1;
    }
}

/// What the rows that were read have lacked: in the greatest element of each, summed over reads.
#[derive(Debug, Clone, Copy, Default)]
struct Lack {
    sum: f64,
    reads: u64,
}

/// What a worker has come to.
#[derive(Debug, Default)]
struct Worked {
    start: Duration,
    end: Duration,
    traffic: (Traffic, Traffic),
    computing: Duration,
    accesses: Accesses,
    lack: Lack,
    initial: f64,
    /// After each clock: the time, and the worker's objective.
    objectives: Vec<(Duration, f64)>,
    diverged: bool,
}

/// What a run has come to. Seconds are of virtual time, from the first worker's start.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Run {
    /// Whether the objective is to rise.
    pub rises: bool,
    /// Objective before the first clock.
    pub initial: f64,
    /// Objective over the workers' n-th clocks.
    pub by_clock: Vec<f64>,
    /// Seconds and objective.
    pub by_time: Vec<(f64, f64)>,
    /// Whether the objective went beyond all bounds.
    pub diverged: bool,
    /// Until the last worker's end.
    pub seconds: f64,
    /// Until the end of half of the workers.
    pub half_done: f64,
    /// Seconds of computing, mean over workers.
    pub computing: f64,
    /// What the accesses of all workers together have cost.
    pub accesses: Accesses,
    /// Workers.
    pub workers: usize,
    /// What a row that is read lacks in its greatest element, mean over reads.
    pub lack: f64,
    /// Messages on the network per clock of the job.
    pub messages_per_clock: f64,
    /// Bytes on the network per clock of the job.
    pub bytes_per_clock: f64,
    /// What the servers were busy with.
    pub servers: Servers,
    /// Events of the simulation.
    pub events: u64,
    /// Hash of its history.
    pub hash: u64,
}

/// Parts of a run's time in which the busiest server was at work.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Servers {
    /// Its NIC, sending.
    pub sending: f64,
    /// Its NIC, receiving.
    pub receiving: f64,
    /// Its threads.
    pub threads: f64,
}

impl Run {
    fn reaches(&self, objective: f64, target: f64) -> bool {
        if self.rises { objective >= target } else { objective <= target }
    }

    /// Seconds until the objective is at `target` for the first time.
    pub fn seconds_to(&self, target: f64) -> Option<f64> {
        let reached = self.by_time.iter().find(|(_, objective)| self.reaches(*objective, target));
        reached.map(|(seconds, _)| *seconds)
    }

    /// Clocks until the objective is at `target`.
    pub fn clocks_to(&self, target: f64) -> Option<usize> {
        let reached = self.by_clock.iter().position(|objective| self.reaches(*objective, target));
        reached.map(|clocks| clocks + 1)
    }

    /// The objective after the last clock.
    pub fn last(&self) -> Option<f64> {
        self.by_clock.last().copied().filter(|_| !self.diverged)
    }

    /// Computing, waiting and communication as parts of their sum.
    pub fn shares(&self) -> [f64; 3] {
        let mean = |seconds: f64| seconds / self.workers as f64;
        let times = [self.computing, mean(self.accesses.waiting), mean(self.accesses.communicating)];
        let all: f64 = times.iter().sum();
        times.map(|time| time / all)
    }

    /// The mean clock differential.
    pub fn mean_differential(&self) -> f64 {
        let all = &self.accesses.clock_differential;
        let sum: f64 = all.iter().map(|(d, n)| *d as f64 * *n as f64).sum();
        sum / all.values().sum::<u64>().max(1) as f64
    }

    /// Part of the reads with this clock differential.
    pub fn part_at(&self, differential: i64) -> f64 {
        let all = &self.accesses.clock_differential;
        let count: u64 = all.values().sum();
        all.get(&differential).copied().unwrap_or(0) as f64 / count.max(1) as f64
    }

    /// Reads from the cache, of all.
    pub fn hit_rate(&self) -> f64 {
        let Accesses { hits, misses, .. } = self.accesses;
        hits as f64 / (hits + misses).max(1) as f64
    }
}

/// The shortest of so many passes: what it costs when nothing else is going on.
pub fn best_of(passes: usize, mut pass: impl FnMut()) -> Duration {
    let time = |_| {
        let start = Instant::now();
        pass();
        start.elapsed()
    };
    (0..passes).map(time).min().unwrap_or_default()
}

/// Trains on `cluster`.
///
/// # Errors
/// As [`cluster::run`].
pub fn run<A: Application>(cluster: &Cluster, application: &Arc<A>, job: Job) -> Result<Run> {
    let sums = Arc::new(Mutex::new(application.sums()));
    let (inside, workers) = (application.clone(), cluster.workers);
    let simulated = cluster::run(cluster, move |place| work(place, workers, &inside, job, &sums))?;
    let mut run = sum_up(&simulated.results, job.clocks);
    (run.rises, run.events, run.hash) = (A::RISES, simulated.events, simulated.hash);
    Ok(run)
}

/// What one worker does.
fn work<A: Application>(
    place: &Place,
    workers: usize,
    application: &Arc<A>,
    job: Job,
    sums: &Arc<Mutex<A::Sums>>,
) -> Result<Worked> {
    let node = place.node.clone();
    let mut worker = place.client.worker()?;
    let mut learner = application.learner(place, &mut worker, workers, job.model)?;
    let mut watch = Watch {
        node: node.clone(),
        sums: sums.clone(),
        charge: job.charge,
        computing: Duration::ZERO,
        lack: Lack::default(),
    };
    let before = Accesses::from(worker.stats());
    let mut worked = Worked { initial: learner.objective(&watch.sums()), ..Worked::default() };
    (worked.start, worked.traffic.0) = (node.now(), place.traffic());
    for _ in 0..job.clocks {
        learner.learn(&mut worker, &mut watch)?;
        worker.clock()?;
        let objective = learner.objective(&watch.sums());
        worked.objectives.push((node.now(), objective));
        if learner.diverged(worked.initial, objective) {
            worked.diverged = true;
            break;
        }
    }
    (worked.end, worked.traffic.1) = (node.now(), place.traffic());
    (worked.computing, worked.lack) = (watch.computing, watch.lack);
    worked.accesses = Accesses::from(worker.stats()).since(&before);
    Ok(worked)
}

fn sum_up(workers: &[Worked], clocks: usize) -> Run {
    let start = workers.iter().map(|worker| worker.start).min().unwrap_or_default();
    let mut ends: Vec<Duration> = workers.iter().map(|worker| worker.end - start).collect();
    ends.sort_unstable();
    let computing: Duration = workers.iter().map(|worker| worker.computing).sum();
    let mut run = Run {
        workers: workers.len(),
        initial: workers.iter().map(|worker| worker.initial).sum(),
        seconds: ends.last().map_or(0.0, Duration::as_secs_f64),
        half_done: ends.get(ends.len() / 2).map_or(0.0, Duration::as_secs_f64),
        computing: computing.as_secs_f64() / workers.len() as f64,
        diverged: workers.iter().any(|worker| worker.diverged),
        ..Run::default()
    };
    let shortest = workers.iter().map(|worker| worker.objectives.len()).min().unwrap_or(0);
    run.by_clock =
        (0..shortest).map(|clock| workers.iter().map(|worker| worker.objectives[clock].1).sum()).collect();
    run.by_time = by_time(workers, start);
    let mut lack = Lack::default();
    for worker in workers {
        run.accesses.add(&worker.accesses);
        lack.sum += worker.lack.sum;
        lack.reads += worker.lack.reads;
    }
    run.lack = lack.sum / lack.reads.max(1) as f64;
    let traffic = |of: fn(&Worked) -> Traffic| workers.iter().map(of);
    let first = traffic(|worked| worked.traffic.0).min_by_key(|t| t.sent.messages).unwrap_or_default();
    let last = traffic(|worked| worked.traffic.1).max_by_key(|t| t.sent.messages).unwrap_or_default();
    run.messages_per_clock = (last.sent.messages - first.sent.messages) as f64 / clocks as f64;
    run.bytes_per_clock = (last.sent.bytes - first.sent.bytes) as f64 / clocks as f64;
    // What is queued counts as sent.
    let seconds = run.seconds.max(1e-9);
    let part =
        |of: fn(Traffic) -> Duration| (of(last).saturating_sub(of(first)).as_secs_f64() / seconds).min(1.0);
    run.servers = Servers {
        sending: part(|traffic| traffic.busiest.sending),
        receiving: part(|traffic| traffic.busiest.receiving),
        threads: part(|traffic| traffic.busiest.threads),
    };
    run
}

/// The sum of the workers' last objectives, at each end of a clock.
fn by_time(workers: &[Worked], start: Duration) -> Vec<(f64, f64)> {
    let mut ends: Vec<(Duration, usize, f64)> = workers
        .iter()
        .enumerate()
        .flat_map(|(number, worker)| worker.objectives.iter().map(move |&(time, own)| (time, number, own)))
        .collect();
    ends.sort_by_key(|&(time, number, _)| (time, number));
    let mut last: Vec<f64> = workers.iter().map(|worker| worker.initial).collect();
    let mut all = vec![(0.0, last.iter().sum())];
    for (time, number, objective) in ends {
        last[number] = objective;
        all.push(((time - start).as_secs_f64(), last.iter().sum()));
    }
    all
}
