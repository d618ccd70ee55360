//! Topics of documents on a simulated cluster: the sampler, the tables and the accesses of `fervor-bench lda`.
//!
//! A worker draws new topics for all its tokens in each clock.

use std::{sync::Arc, time::Duration};

use anyhow::Result;
use fervor_client::{Model, Worker};
use fervor_verbs::transport::sim::Node;

use super::{
    cluster::Place,
    training::{Application, Learner, Watch, best_of},
};
use crate::lda::{
    corpus::{Corpus, Planted},
    counts::Counts as _,
    likelihood::Likelihood,
    plain::Matrix,
    sampler::{Prior, Sampler},
    served::{Observer, Tables},
    share::Share,
};

/// Words whose rows are fetched together: few, as the vocabulary is small. (A clock of a real job has many fetches: it is not all
/// computed with what was to be had at its beginning.)
const RUN: usize = 8;
/// Concentration of documents' topics and of topics' words.
const CONCENTRATION: f64 = 0.1;

/// What is trained on, the same for all runs.
#[derive(Debug)]
pub struct Input {
    corpus: Corpus,
    prior: Prior,
    seed: u64,
}

impl Input {
    /// Documents around planted topics.
    pub fn new(size: &Planted, topics: usize, seed: u64) -> Self {
        let corpus = size.corpus(seed);
        let prior = Prior { topics, words: corpus.words(), alpha: CONCENTRATION, beta: CONCENTRATION };
        Self { corpus, prior, seed }
    }

    /// The sampler of a worker, of so many.
    pub fn sampler(&self, worker: usize, workers: usize) -> Sampler {
        let share = Share::new(&self.corpus, worker, workers, 1, self.prior.topics, self.seed);
        Sampler::new(self.prior, share, self.seed)
    }

    /// What drawing a topic for one token costs on this machine.
    pub fn measure(&self) -> Duration {
        let mut sampler = self.sampler(0, 1);
        let matrix = Matrix::new(&self.prior, 1);
        let mut counts = &matrix;
        counts.start(&mut sampler).expect("no server can fail");
        let pass = || counts.sample(&mut sampler, 0).expect("no server can fail");
        best_of(20, pass) / self.corpus.tokens() as u32
    }
}

/// How often each word has each topic, and the topic totals.
#[derive(Debug)]
pub struct Sums {
    rows: Vec<i32>,
    totals: Vec<i32>,
}

impl Application for Input {
    type Sums = Sums;
    type Learner = Topics;
    const RISES: bool = true;

    fn sums(&self) -> Sums {
        let topics = self.prior.topics;
        let mut sums = Sums { rows: vec![0; self.prior.words * topics], totals: vec![0; topics] };
        let share = Share::new(&self.corpus, 0, 1, 1, topics, self.seed);
        let words = share.parts[0].groups.iter().flat_map(|g| (0..g.tokens).map(|_| g.word as usize));
        for (word, &topic) in words.zip(&share.topics) {
            sums.rows[word * topics + usize::from(topic)] += 1;
            sums.totals[usize::from(topic)] += 1;
        }
        sums
    }

    fn learner(
        self: &Arc<Self>,
        place: &Place,
        worker: &mut Worker<Node>,
        workers: usize,
        model: Model,
    ) -> Result<Topics> {
        let tables = Tables::open(&place.client, "lda", &self.prior, workers, model)?.in_runs_of(RUN);
        let mut sampler = self.sampler(place.number, workers);
        tables.start(worker, &mut sampler)?;
        Ok(Topics { tables, sampler, likelihood: Likelihood::new(self.prior) })
    }

    fn cache(&self) -> usize {
        let stride = (32 + 4 * self.prior.topics).next_multiple_of(64);
        (1 << 20) + 2 * self.prior.words * stride
    }
}

/// A worker's documents.
#[derive(Debug)]
pub struct Topics {
    tables: Tables,
    sampler: Sampler,
    likelihood: Likelihood,
}

impl Learner for Topics {
    type Sums = Sums;

    fn learn(&mut self, worker: &mut Worker<Node>, watch: &mut Watch<Sums>) -> Result<()> {
        let tokens = self.sampler.share().tokens();
        self.tables.sample(worker, &mut self.sampler, 0, &mut Watched { watch, tokens })?;
        Ok(())
    }

    fn objective(&self, sums: &Sums) -> f64 {
        let (topics, share) = (sums.totals.len(), self.sampler.share());
        let rows = share.words.start as usize * topics..share.words.end as usize * topics;
        let totals = if share.worker == 0 { self.likelihood.totals(&sums.totals) } else { 0.0 };
        self.likelihood.documents(self.sampler.documents()) + self.likelihood.row(&sums.rows[rows]) + totals
    }

    fn diverged(&self, _initial: f64, objective: f64) -> bool {
        objective.is_nan()
    }
}

/// Charges what is drawn, and adds up what is changed.
struct Watched<'a> {
    watch: &'a mut Watch<Sums>,
    /// Of the clock.
    tokens: usize,
}

impl Observer for Watched<'_> {
    fn fetched(&mut self, words: &[u64], rows: &[i32], tokens: usize) {
        let topics = rows.len() / words.len().max(1);
        for (&word, row) in words.iter().zip(rows.chunks_exact(topics)) {
            let sums = self.watch.sums();
            let all = &sums.rows[word as usize * topics..][..topics];
            let most = all.iter().zip(row).map(|(all, own)| all.abs_diff(*own)).max().unwrap_or(0);
            drop(sums);
            self.watch.lacks(most.into());
        }
        self.watch.compute(tokens as f64 / self.tokens.max(1) as f64);
    }

    fn changed(&mut self, word: u64, changes: &[(u32, i32)]) {
        let mut sums = self.watch.sums();
        let Sums { rows, totals } = &mut *sums;
        let first = word as usize * totals.len();
        for &(topic, change) in changes {
            rows[first + topic as usize] += change;
            totals[topic as usize] += change;
        }
    }
}
