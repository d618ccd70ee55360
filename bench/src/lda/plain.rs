//! The same sampling in one process, with plain threads and no parameter server: what the server's cost is measured
//! against.
//!
//! Each row of the word-topic counts has a lock, and a thread holds it while it draws the topics of its tokens of that
//! word: in place, without a copy. The threads begin in different places, so they seldom meet. Topic totals are
//! taken at the beginning of a part and given back at its end, as with a parameter server: threads that shared each
//! change would pass its cache lines to and fro for every token.

use std::{
    ops::Range,
    sync::{Barrier, Mutex, MutexGuard, PoisonError},
};

use anyhow::Result;

use super::{
    counts::Counts,
    sampler::{Prior, Sampler},
};
use crate::job::Accesses;

/// The counts, shared by the threads.
#[derive(Debug)]
pub struct Matrix {
    rows: Vec<Mutex<Vec<i32>>>,
    totals: Mutex<Vec<i32>>,
    barrier: Barrier,
}

impl Matrix {
    /// All zero, for so many threads.
    pub fn new(prior: &Prior, threads: usize) -> Self {
        let zeros = || Mutex::new(vec![0; prior.topics]);
        Matrix {
            rows: (0..prior.words).map(|_| zeros()).collect(),
            totals: zeros(),
            barrier: Barrier::new(threads),
        }
    }
}

fn lock(counts: &Mutex<Vec<i32>>) -> MutexGuard<'_, Vec<i32>> {
    // A thread that panicked takes the job down.
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

fn add(counts: &Mutex<Vec<i32>>, changes: &[(u32, i32)]) {
    let mut counts = lock(counts);
    for &(topic, change) in changes {
        counts[topic as usize] += change;
    }
}

impl Counts for &Matrix {
    fn start(&mut self, sampler: &mut Sampler) -> Result<()> {
        sampler.initial(|word, counts| -> Result<()> {
            add(&self.rows[word as usize], counts);
            Ok(())
        })?;
        add(&self.totals, sampler.totals());
        self.meet()
    }

    fn meet(&mut self) -> Result<()> {
        self.barrier.wait();
        Ok(())
    }

    fn sample(&mut self, sampler: &mut Sampler, part: usize) -> Result<()> {
        sampler.begin(&lock(&self.totals));
        let mut first = sampler.part(part).tokens.start;
        for group in 0..sampler.part(part).groups.len() {
            let group = sampler.part(part).groups[group];
            let tokens = first..first + group.tokens as usize;
            first = tokens.end;
            sampler.word(&mut lock(&self.rows[group.word as usize]), tokens);
        }
        add(&self.totals, sampler.totals());
        Ok(())
    }

    fn clock(&mut self) -> Result<()> {
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        self.meet()
    }

    fn rows(&mut self, words: Range<u32>, with: &mut dyn FnMut(u32, &[i32])) -> Result<()> {
        words.for_each(|word| with(word, &lock(&self.rows[word as usize])));
        Ok(())
    }

    fn totals(&mut self) -> Result<Vec<i32>> {
        Ok(lock(&self.totals).clone())
    }

    fn accesses(&self) -> Accesses {
        Accesses::default()
    }
}
