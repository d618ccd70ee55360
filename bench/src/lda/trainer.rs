//! What every worker does, with and without a parameter server: passes over its tokens, the log-likelihood after each,
//! and at the end an account of what was learned.

use std::sync::mpsc::Sender;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::{
    Message, WorkerReport,
    corpus::Corpus,
    counts::Counts,
    likelihood::Likelihood,
    sampler::{Prior, Sampler},
    share::Share,
};
use crate::job::{
    Accesses, Shared,
    epochs::{self, Learner, Place},
};

/// Words of a topic that are reported.
const TOP: usize = 10;

/// How to train.
#[derive(Debug, Clone, PartialEq)]
pub struct Training {
    /// What is assumed.
    pub prior: Prior,
    /// Number of passes.
    pub epochs: usize,
    /// Seed of the draws.
    pub seed: u64,
}

/// What a worker gives back at the end, when all are done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Its part of the log-likelihood.
    pub log_likelihood: f64,
    /// The topics, of worker 0.
    pub topics: Option<Vec<Topic>>,
}

/// A topic that was learned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topic {
    /// Tokens that have it.
    pub tokens: u64,
    /// Its most frequent words, and how often they have it.
    pub words: Vec<(String, u64)>,
}

/// Trains one worker; tells of each epoch, the one before the first (0) included, through `messages`.
///
/// # Errors
/// What the parameter server's client says; or that a token was lost, or counted twice, on the way.
pub fn run(
    counts: &mut impl Counts,
    share: Share,
    corpus: &Corpus,
    training: &Training,
    shared: &Shared,
    messages: &Sender<Message>,
) -> Result<WorkerReport> {
    let (worker, clocks) = (share.worker, share.parts.len());
    let sampler = Sampler::new(training.prior, share, training.seed);
    let mut trainer = Trainer { counts, sampler, likelihood: Likelihood::new(training.prior) };
    let place = Place { worker, epochs: training.epochs, clocks, shared, messages };
    let mut report = epochs::run(&mut trainer, place)?;
    trainer.counts.settle()?;
    let log_likelihood = trainer.log_likelihood()?;
    let topics = (worker == 0).then(|| account(trainer.counts, corpus)).transpose()?;
    report.result = Some(Outcome { log_likelihood, topics });
    Ok(report)
}

struct Trainer<'a, C> {
    counts: &'a mut C,
    sampler: Sampler,
    likelihood: Likelihood,
}

impl<C: Counts> Trainer<'_, C> {
    /// This worker's part of the log-likelihood: its documents, some rows, and, of worker 0, the totals.
    fn log_likelihood(&mut self) -> Result<f64> {
        let (likelihood, share) = (&self.likelihood, self.sampler.share());
        let mut sum = likelihood.documents(self.sampler.documents());
        self.counts.rows(share.words.clone(), &mut |_, row| sum += likelihood.row(row))?;
        if share.worker == 0 {
            sum += likelihood.totals(&self.counts.totals()?);
        }
        Ok(sum)
    }
}

impl<C: Counts> Learner for Trainer<'_, C> {
    fn initial(&mut self) -> Result<f64> {
        self.counts.start(&mut self.sampler)?;
        self.log_likelihood()
    }

    fn start(&mut self) -> Result<()> {
        self.counts.meet()
    }

    fn learn(&mut self, _epoch: usize, clock: usize) -> Result<u64> {
        self.counts.sample(&mut self.sampler, clock)?;
        self.counts.clock()?;
        Ok(self.sampler.part(clock).tokens.len() as u64)
    }

    fn objective(&mut self) -> Result<f64> {
        self.log_likelihood()
    }

    fn accesses(&self) -> Accesses {
        self.counts.accesses()
    }
}

/// Reads all that is shared, which has settled: every token is counted once, and these are the topics.
fn account(counts: &mut impl Counts, corpus: &Corpus) -> Result<Vec<Topic>> {
    let totals = counts.totals()?;
    let mut sums = vec![0i64; totals.len()];
    let mut below = 0;
    let mut top: Vec<Vec<(i32, u32)>> = vec![Vec::new(); totals.len()];
    counts.rows(0..corpus.words() as u32, &mut |word, row| {
        for (topic, &count) in row.iter().enumerate().filter(|(_, count)| **count != 0) {
            sums[topic] += i64::from(count);
            below += usize::from(count < 0);
            let top = &mut top[topic];
            let place = top.partition_point(|&(more, _)| more >= count);
            if place < TOP {
                top.truncate(TOP - 1);
                top.insert(place, (count, word));
            }
        }
    })?;
    let counted: i64 = sums.iter().sum();
    ensure!(
        counted == corpus.tokens() as i64 && below == 0,
        "the word-topic table counts {counted} tokens, of {} ({below} counts are below 0): updates were lost or \
         applied twice",
        corpus.tokens()
    );
    ensure!(
        sums.iter().zip(&totals).all(|(&sum, &total)| sum == i64::from(total)),
        "the topic totals are not those of the word-topic table: updates were lost or applied twice"
    );
    let word = |(count, word): (i32, u32)| (corpus.vocabulary[word as usize].clone(), count as u64);
    let topic = |(top, total): (Vec<(i32, u32)>, i32)| Topic {
        tokens: total as u64,
        words: top.into_iter().map(word).collect(),
    };
    Ok(top.into_iter().zip(totals).map(topic).collect())
}
