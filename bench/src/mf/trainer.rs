//! What every worker does, with and without a parameter server: passes over its share, and the loss after each.
//!
//! Which factors are whose: a worker's row factors are a slice that nobody else sees; the column factors
//! are behind [`Factors`], which is all that differs between a run on a parameter server and a plain one.

use std::sync::mpsc::Sender;

use anyhow::Result;

use super::{
    Message, WorkerReport,
    plan::{Part, Share},
    sgd::{self, Initial, Side},
};
use crate::job::{
    Accesses, Shared,
    epochs::{self, Learner, Place},
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

    /// The worker is done, after a clock that it has ended.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    fn finish(&mut self) -> Result<()>;

    /// The factors of all columns, one after the other.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    fn all(&mut self) -> Result<Vec<f32>>;

    /// What the accesses so far have cost.
    fn accesses(&self) -> Accesses;
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
    let mut trainer = Trainer { left: row_factors(share, training), factors, share, training };
    let (epochs, clocks) = (training.epochs, share.parts.len());
    let place = Place { worker: share.worker, epochs, clocks, shared, messages };
    let mut report = epochs::run(&mut trainer, place)?;
    let keep = training.keep_factors && share.worker == 0;
    report.result = keep.then(|| trainer.factors.all()).transpose()?;
    trainer.factors.finish()?;
    Ok(report)
}

/// A worker with its row factors.
struct Trainer<'a, F> {
    left: Vec<f32>,
    factors: &'a mut F,
    share: &'a Share,
    training: &'a Training,
}

impl<F: Factors> Learner for Trainer<'_, F> {
    fn initial(&mut self) -> Result<f64> {
        Ok(initial_loss(self.share, self.training, &self.left))
    }

    fn start(&mut self) -> Result<()> {
        self.factors.start()
    }

    fn learn(&mut self, epoch: usize, clock: usize) -> Result<u64> {
        let step = self.training.step * self.training.decay.powi(epoch as i32 - 1);
        let part = &self.share.parts[clock];
        self.factors.train(part, &mut self.left, step)?;
        self.factors.clock()?;
        Ok(part.entries.len() as u64)
    }

    fn objective(&mut self) -> Result<f64> {
        self.factors.loss(&self.share.whole, &self.left)
    }

    fn accesses(&self) -> Accesses {
        self.factors.accesses()
    }
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
