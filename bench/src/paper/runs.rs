//! The runs that the experiments share: each is simulated once, on all processors but one simulation per processor.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Context as _, Result};

use super::{
    cluster::Cluster,
    lda, mf,
    plan::Plan,
    spec::{App, Spec},
    training::{self, Application, Job, Run},
};

/// Runs that have been simulated.
#[derive(Debug)]
pub struct Runs {
    servers: usize,
    /// By seed.
    ratings: BTreeMap<u64, Arc<mf::Input>>,
    /// By seed.
    documents: BTreeMap<u64, Arc<lda::Input>>,
    done: BTreeMap<String, Run>,
}

impl Runs {
    /// Simulates `specs`, several at a time; `told` hears of each before.
    ///
    /// # Errors
    /// The first failure.
    pub fn simulate(plan: &Plan, specs: &[Spec], told: impl Fn(usize, usize, &Spec) + Sync) -> Result<Self> {
        let mut runs = Self {
            servers: plan.servers,
            ratings: BTreeMap::new(),
            documents: BTreeMap::new(),
            done: BTreeMap::new(),
        };
        for &Spec { app, seed, .. } in specs {
            match app {
                App::Mf => _ = runs.ratings.entry(seed).or_insert_with(|| Arc::new(plan.ratings(seed))),
                App::Lda => _ = runs.documents.entry(seed).or_insert_with(|| Arc::new(plan.documents(seed))),
            }
        }
        let different: BTreeMap<String, &Spec> = specs.iter().map(|spec| (spec.key(), spec)).collect();
        // The longest first: so no processor is idle at the end.
        let mut different: Vec<_> = different.into_iter().collect();
        different.sort_by(|(_, a), (_, b)| b.effort().total_cmp(&a.effort()));
        let outcomes = in_parallel(&different, |number, core, (_, spec)| {
            told(number, different.len(), spec);
            runs.one(spec, core).with_context(|| spec.to_string())
        });
        let done = different.into_iter().zip(outcomes).map(|((key, _), run)| Ok((key, run?)));
        runs.done = done.collect::<Result<_>>()?;
        Ok(runs)
    }

    /// Simulates one.
    fn one(&self, spec: &Spec, core: Option<usize>) -> Result<Run> {
        match spec.app {
            App::Mf => {
                let input = self.ratings[&spec.seed].clone();
                self.train(spec, core, Arc::new(mf::Factorisation { input, step: spec.step }))
            }
            App::Lda => self.train(spec, core, self.documents[&spec.seed].clone()),
        }
    }

    fn train<A: Application>(&self, spec: &Spec, core: Option<usize>, application: Arc<A>) -> Result<Run> {
        let &Spec { model, workers, machines, clocks, charge, seed, .. } = spec;
        let cluster = Cluster {
            workers,
            servers: self.servers,
            fabric: spec.fabric.clone(),
            machines,
            seed,
            cache: application.cache(),
            core,
        };
        training::run(&cluster, &application, Job { model, clocks, charge })
    }

    /// The ratings of a seed with which there was a run.
    ///
    /// # Panics
    /// When there was none.
    pub fn ratings(&self, seed: u64) -> &mf::Input {
        &self.ratings[&seed]
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

    /// A run that has been simulated.
    ///
    /// # Panics
    /// When it has not.
    pub fn get(&self, spec: &Spec) -> &Run {
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
