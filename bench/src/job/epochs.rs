//! What every worker of every application does: passes over its share, clock by clock, and its part of the objective
//! after each pass.
//!
//! # What is timed
//! The seconds of an epoch are those since the worker's start, less the arithmetic of the evaluations in
//! between. What an evaluation waited or communicated counts: it may have saved the next pass from having
//! to.

use std::{
    sync::{atomic::Ordering::Relaxed, mpsc::Sender},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use super::{
    accesses::{Accesses, Shared},
    messages::{Message, WorkerReport},
};

/// One worker of an application.
pub trait Learner {
    /// Its part of the objective before the first epoch.
    ///
    /// # Errors
    /// What the parameter server's client says; this holds for all of them.
    fn initial(&mut self) -> Result<f64>;

    /// Starts together with all other workers: what they share has its initial values then.
    ///
    /// # Errors
    /// As [`initial`](Self::initial).
    fn start(&mut self) -> Result<()>;

    /// Learns what belongs to clock `clock` of epoch `epoch` (counted from 1), and ends the clock. How many ratings or
    /// tokens that were.
    ///
    /// # Errors
    /// As [`initial`](Self::initial).
    fn learn(&mut self, epoch: usize, clock: usize) -> Result<u64>;

    /// Its part of the objective now.
    ///
    /// # Errors
    /// As [`initial`](Self::initial).
    fn objective(&mut self) -> Result<f64>;

    /// What its accesses have cost so far.
    fn accesses(&self) -> Accesses;
}

/// Where a worker is in the job.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a, R> {
    /// Its number within the job.
    pub worker: usize,
    /// Passes over its share.
    pub epochs: usize,
    /// Clocks of a pass.
    pub clocks: usize,
    /// What it shares with the thread that reports on it.
    pub shared: &'a Shared,
    /// To that thread.
    pub messages: &'a Sender<Message<R>>,
}

/// Lets one worker learn; tells of each epoch, the one before the first (0) included. The report's result is left to
/// the application.
///
/// # Errors
/// What the learner says, or that the objective is no number any more.
pub fn run<R>(learner: &mut impl Learner, place: Place<'_, R>) -> Result<WorkerReport<R>> {
    let Place { worker, epochs, clocks, shared, messages } = place;
    let tell = |epoch, seconds, objective: f64| -> Result<()> {
        ensure!(
            objective.is_finite(),
            "the objective after epoch {epoch} is {objective}: the step is too large, lower --step"
        );
        // If nobody listens any more, the job is ending: the stop flag will say so.
        let _ = messages.send(Message::Epoch { worker, epoch, seconds, objective });
        Ok(())
    };
    tell(0, 0.0, learner.initial()?)?;

    learner.start()?;
    let start = Instant::now();
    let before = learner.accesses();
    let mut evaluating = Duration::ZERO;
    let mut ended = 0;
    for epoch in 1..=epochs {
        if shared.stop.load(Relaxed) {
            break;
        }
        for clock in 0..clocks {
            let count = learner.learn(epoch, clock)?;
            ended += 1;
            shared.count.fetch_add(count, Relaxed);
        }
        let learned = Instant::now();
        let accessed = learner.accesses().seconds();
        let seconds = (learned - start).saturating_sub(evaluating).as_secs_f64();
        tell(epoch, seconds, learner.objective()?)?;
        let outside = Duration::from_secs_f64((learner.accesses().seconds() - accessed).max(0.0));
        evaluating += learned.elapsed().saturating_sub(outside);
    }
    let seconds = start.elapsed().saturating_sub(evaluating).as_secs_f64();
    let accesses = learner.accesses().since(&before);
    Ok(WorkerReport { worker, seconds, clocks: ended, accesses, result: None })
}
