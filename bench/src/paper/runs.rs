//! The runs that the experiments share: each is simulated once, on all processors but one simulation per processor.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use fervor_client::Model;
use fervor_verbs::transport::sim::Fabric;

use super::{
    cluster::{Cluster, Machines},
    mf::{self, Input, Job, MfRun},
};

/// A run of matrix factorisation.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The table's model.
    pub model: Model,
    /// Worker nodes.
    pub workers: usize,
    /// The network.
    pub fabric: Fabric,
    /// The machines.
    pub machines: Machines,
    /// Size of a step.
    pub step: f32,
    /// Clocks.
    pub clocks: usize,
    /// What a worker computes in a clock.
    pub charge: Duration,
}

impl Spec {
    /// What tells it from other runs.
    fn key(&self) -> String {
        format!("{self:?}")
    }
}

/// Runs that have been simulated.
#[derive(Debug)]
pub struct Runs {
    input: Arc<Input>,
    servers: usize,
    done: BTreeMap<String, MfRun>,
    /// Real time that simulating has taken, over all processors.
    pub simulating: Duration,
}

impl Runs {
    /// None yet.
    pub fn new(input: Input, servers: usize) -> Self {
        Self { input: Arc::new(input), servers, done: BTreeMap::new(), simulating: Duration::ZERO }
    }

    /// What is trained on.
    pub fn input(&self) -> &Input {
        &self.input
    }

    /// Server nodes of each run.
    pub fn servers(&self) -> usize {
        self.servers
    }

    /// How many have been simulated.
    pub fn count(&self) -> usize {
        self.done.len()
    }

    /// Events of all runs.
    pub fn events(&self) -> u64 {
        self.done.values().map(|run| run.events).sum()
    }

    /// Simulates those of `specs` that have not been, several at a time; `told` hears of each.
    ///
    /// # Errors
    /// The first failure.
    pub fn simulate(&mut self, specs: &[Spec], told: impl Fn(usize, usize, &Spec) + Sync) -> Result<()> {
        let mut missing: BTreeMap<String, &Spec> = specs.iter().map(|spec| (spec.key(), spec)).collect();
        missing.retain(|key, _| !self.done.contains_key(key));
        // The longest first: so no processor is idle at the end.
        let mut missing: Vec<_> = missing.into_iter().collect();
        missing.sort_by_key(|(_, spec)| {
            std::cmp::Reverse((spec.model.value_bounded(), spec.workers * spec.clocks))
        });
        let (input, servers) = (&self.input, self.servers);
        let outcomes = in_parallel(&missing, |number, core, (_, spec)| {
            told(number, missing.len(), spec);
            let cluster = Cluster {
                workers: spec.workers,
                servers,
                fabric: spec.fabric.clone(),
                machines: spec.machines,
                seed: 1,
                cache: input.cache(),
                core,
            };
            let Spec { model, step, clocks, charge, .. } = **spec;
            let start = Instant::now();
            mf::run(&cluster, input, Job { model, step, clocks, charge }).map(|run| (run, start.elapsed()))
        });
        for ((key, _), outcome) in missing.into_iter().zip(outcomes) {
            let (run, took) = outcome?;
            self.simulating += took;
            self.done.insert(key, run);
        }
        Ok(())
    }

    /// A run that has been simulated.
    ///
    /// # Panics
    /// When it has not.
    pub fn get(&self, spec: &Spec) -> &MfRun {
        self.done.get(&spec.key()).expect("an experiment names all its runs before")
    }
}

/// Does `work` for each of `all`, one at a time on each processor: with its number and, where there are several, the processor's.
pub fn in_parallel<S: Sync, X: Send>(
    all: &[S],
    work: impl Fn(usize, Option<usize>, &S) -> X + Sync,
) -> Vec<X> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Option<X>>> = Mutex::new(all.iter().map(|_| None).collect());
    std::thread::scope(|scope| {
        for processor in 0..processors.min(all.len()) {
            let (next, results, work) = (&next, &results, &work);
            scope.spawn(move || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = all.get(number) else { break };
                    let result = work(number, Some(processor), item);
                    results.lock().unwrap_or_else(PoisonError::into_inner)[number] = Some(result);
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.into_iter().map(|result| result.expect("each has been done")).collect()
}
