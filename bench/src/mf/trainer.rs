//! What every worker does, with and without a parameter server: passes over its share, and the loss after each.
//!
//! Which factors are whose: a worker's row factors are a slice that nobody else sees; the column factors
//! are behind [`Factors`], which is all that differs between a run on a parameter server and a plain one.
//!
//! # What is timed
//! The seconds of an epoch are those since the worker's start, less the arithmetic of the loss evaluations in
//! between. What an evaluation waited or communicated counts: it may have saved the next pass from having
//! to.

use std::{
    collections::BTreeMap,
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::Sender,
    },
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::{
    messages::Message,
    plan::{Part, Share},
    sgd::{self, Initial, Side},
};

/// The column factors as one worker sees them.
pub trait Factors {
    /// Starts together with all other workers; then the factors have their initial values.
    ///
    /// # Errors
    /// What the parameter server's client says.
    fn start(&mut self) -> Result<()>;

    /// Trains on every group of `part`, in its order, with a step of this size.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    fn train(&mut self, part: &Part, left: &mut [f32], step: f32) -> Result<()>;

    /// The sum of the squared errors of `part`.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    fn loss(&mut self, part: &Part, left: &[f32]) -> Result<f64>;

    /// Ends the worker's clock.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    fn clock(&mut self) -> Result<()>;

    /// The factors of all columns, one after the other.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    fn all(&mut self) -> Result<Vec<f32>>;

    /// What the accesses so far have cost.
    fn accesses(&self) -> Accesses;
}

/// What a worker's accesses to shared factors have cost.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Accesses {
    /// Seconds in which it waited for the shard clock.
    pub waiting: f64,
    /// Seconds in which it read, sent, or waited for room to send.
    pub communicating: f64,
    /// Reads answered by the cache.
    pub hits: u64,
    /// Reads not answered by the cache.
    pub misses: u64,
    /// RDMA READs.
    pub reads: u64,
    /// Reads that returned older data than the model allows: always 0.
    pub violations: u64,
    /// How often a read returned data of a clock this much ahead of the reader's own.
    pub clock_differential: BTreeMap<i64, u64>,
}

impl Accesses {
    fn seconds(&self) -> f64 {
        self.waiting + self.communicating
    }

    /// What they have cost since they had cost `earlier`.
    pub fn since(mut self, earlier: &Accesses) -> Accesses {
        self.waiting -= earlier.waiting;
        self.communicating -= earlier.communicating;
        self.hits -= earlier.hits;
        self.misses -= earlier.misses;
        self.reads -= earlier.reads;
        self.violations -= earlier.violations;
        for (differential, count) in &earlier.clock_differential {
            *self.clock_differential.entry(*differential).or_default() -= count;
        }
        self.clock_differential.retain(|_, count| *count > 0);
        self
    }

    /// Adds what another worker's have cost.
    pub fn add(&mut self, other: &Accesses) {
        self.waiting += other.waiting;
        self.communicating += other.communicating;
        self.hits += other.hits;
        self.misses += other.misses;
        self.reads += other.reads;
        self.violations += other.violations;
        for (differential, count) in &other.clock_differential {
            *self.clock_differential.entry(*differential).or_default() += count;
        }
    }
}

/// How to train.
#[derive(Debug, Clone, PartialEq)]
pub struct Training {
    /// Numbers in a factor.
    pub rank: usize,
    /// Number of passes.
    pub epochs: usize,
    /// Size of a step in the first epoch.
    pub step: f32,
    /// What the step is multiplied with after each epoch.
    pub decay: f32,
    /// Initial factors.
    pub initial: Initial,
    /// Whether worker 0 reports the column factors that it sees at the end.
    pub keep_factors: bool,
}

/// What the workers of a process share with the thread that reports on them.
#[derive(Debug, Default)]
pub struct Shared {
    /// Set when the workers are to stop after the epoch that they are in.
    pub stop: AtomicBool,
    /// Ratings trained on, for the progress bar.
    pub ratings: AtomicU64,
}

/// What a worker says of itself at its end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerReport {
    /// The worker's number within the job.
    pub worker: usize,
    /// Seconds it trained.
    pub seconds: f64,
    /// Clocks it ended while it trained.
    pub clocks: u64,
    /// What its accesses have cost.
    pub accesses: Accesses,
    /// The column factors it sees, if it was asked to keep them.
    pub factors: Option<Vec<f32>>,
}

/// Trains one worker; tells of each epoch, the one before the first (0) included, through `messages`.
///
/// # Errors
/// What the parameter server's client says, or that the loss is no number any more.
pub fn run(
    factors: &mut impl Factors,
    share: &Share,
    training: &Training,
    shared: &Shared,
    messages: &Sender<Message>,
) -> Result<WorkerReport> {
    let mut left = row_factors(share, training);
    let tell = |epoch, seconds, loss: f64| -> Result<()> {
        ensure!(
            loss.is_finite(),
            "the loss after epoch {epoch} is {loss}: the step is too large, lower --step"
        );
        // If nobody listens any more, the job is ending: the stop flag will say so.
        let _ = messages.send(Message::Epoch { worker: share.worker, epoch, seconds, loss });
        Ok(())
    };
    tell(0, 0.0, initial_loss(share, training, &left))?;

    factors.start()?;
    let start = Instant::now();
    let before = factors.accesses();
    let mut evaluating = Duration::ZERO;
    let mut clocks = 0;
    for epoch in 1..=training.epochs {
        if shared.stop.load(Relaxed) {
            break;
        }
        let step = training.step * training.decay.powi(epoch as i32 - 1);
        for part in &share.parts {
            factors.train(part, &mut left, step)?;
            factors.clock()?;
            clocks += 1;
            shared.ratings.fetch_add(part.entries.len() as u64, Relaxed);
        }
        let trained = Instant::now();
        let accessed = factors.accesses().seconds();
        let seconds = (trained - start).saturating_sub(evaluating).as_secs_f64();
        tell(epoch, seconds, factors.loss(&share.whole, &left)?)?;
        let outside = Duration::from_secs_f64((factors.accesses().seconds() - accessed).max(0.0));
        evaluating += trained.elapsed().saturating_sub(outside);
    }
    let seconds = start.elapsed().saturating_sub(evaluating).as_secs_f64();
    let accesses = factors.accesses().since(&before);
    let keep = training.keep_factors && share.worker == 0;
    let factors = keep.then(|| factors.all()).transpose()?;
    Ok(WorkerReport { worker: share.worker, seconds, clocks, accesses, factors })
}

fn row_factors(share: &Share, training: &Training) -> Vec<f32> {
    let mut left = vec![0.0; share.rows as usize * training.rank];
    for (row, factor) in (share.first_row..).zip(left.chunks_mut(training.rank)) {
        training.initial.fill(Side::Row, row, factor);
    }
    left
}

/// The loss before the first epoch. It is that of the initial column factors themselves, not of what is in the
/// table: other workers may be training already.
fn initial_loss(share: &Share, training: &Training, left: &[f32]) -> f64 {
    let mut right = vec![0.0; training.rank];
    let mut loss = 0.0;
    for (group, entries) in share.whole.iter() {
        training.initial.fill(Side::Column, group.column, &mut right);
        loss += sgd::loss(left, &right, entries);
    }
    loss
}
