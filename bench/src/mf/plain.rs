//! The same training in one process, with plain threads and no parameter server: what the server's cost is
//! measured against.
//!
//! Each column factor has a lock, and a thread holds it while it trains on a group. That was the fastest of
//! what was tried (copies in and out under the lock, copies in and out of relaxed atomics): it needs no copy, and
//! with many more columns than threads two threads seldom meet. Threads wait for each other nowhere else.

use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};

use anyhow::Result;

use super::{
    plan::Part,
    sgd::{self, Initial, Side},
    trainer::Factors,
};
use crate::job::Accesses;

/// The column factors, shared by the threads.
#[derive(Debug)]
pub struct Columns {
    factors: Vec<Mutex<Vec<f32>>>,
    start: Barrier,
}

impl Columns {
    /// The initial factors of `columns` columns, for `threads` threads that start together.
    pub fn new(columns: u32, rank: usize, initial: Initial, threads: usize) -> Self {
        let column = |index| {
            let mut factor = vec![0.0; rank];
            initial.fill(Side::Column, index, &mut factor);
            Mutex::new(factor)
        };
        Columns { factors: (0..columns).map(column).collect(), start: Barrier::new(threads) }
    }

    fn lock(&self, column: usize) -> MutexGuard<'_, Vec<f32>> {
        // A thread that panicked takes the job down; numbers have no state that it could have left halfway.
        self.factors[column].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Factors for &Columns {
    fn start(&mut self) -> Result<()> {
        self.start.wait();
        Ok(())
    }

    fn train(&mut self, part: &Part, left: &mut [f32], step: f32) -> Result<()> {
        for (group, entries) in part.iter() {
            sgd::train(left, &mut self.lock(group.column as usize), entries, step);
        }
        Ok(())
    }

    fn loss(&mut self, part: &Part, left: &[f32]) -> Result<f64> {
        Ok(part
            .iter()
            .map(|(group, entries)| sgd::loss(left, &self.lock(group.column as usize), entries))
            .sum())
    }

    fn clock(&mut self) -> Result<()> {
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }

    fn all(&mut self) -> Result<Vec<f32>> {
        Ok((0..self.factors.len()).flat_map(|column| self.lock(column).clone()).collect())
    }

    fn accesses(&self) -> Accesses {
        Accesses::default()
    }
}
