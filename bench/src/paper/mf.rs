//! Matrix factorisation on a simulated cluster.
//!
//! A worker passes over all its ratings in each clock, in [`FETCHES`] runs of columns: it gets their factors, computes, trains
//! on copies, and adds what changed. The table has what the factors have gained on their initial values, which every
//! worker knows; so nobody has to write them first.

use std::{sync::Arc, time::Duration};

use anyhow::Result;
use fervor_client::{Model, Table, Worker};
use fervor_verbs::transport::sim::Node;

use super::{
    cluster::Place,
    training::{Application, Learner, Watch, best_of},
};
use crate::{
    data::{Planted, Ratings},
    mf::{
        plan::{self, Share},
        sgd::{self, Initial, Side},
    },
};

/// Fetches of a clock, each of so many columns that all take part: a clock is not all computed with what was to be had
/// at its beginning.
const FETCHES: usize = 12;
/// Of its loss before the first clock: a worker whose loss is beyond stops, the job diverges.
const DIVERGED: f64 = 100.0;

/// What is trained on, the same for all runs.
#[derive(Debug)]
pub struct Input {
    /// The ratings.
    pub ratings: Ratings,
    /// Numbers in a factor.
    pub rank: usize,
    initial: Initial,
}

impl Input {
    /// Ratings around planted factors.
    pub fn new(size: &Planted, rank: usize, seed: u64) -> Self {
        let ratings = size.ratings(seed);
        let initial = Initial::new(seed, rank, ratings.root_mean_square());
        Self { ratings, rank, initial }
    }

    /// The initial factors of all columns.
    pub fn columns(&self) -> Vec<f32> {
        let mut all = vec![0.0; self.ratings.columns as usize * self.rank];
        for (column, factor) in (0..).zip(all.chunks_mut(self.rank)) {
            self.initial.fill(Side::Column, column, factor);
        }
        all
    }

    /// The initial factors of the rows of a worker.
    fn rows(&self, share: &Share) -> Vec<f32> {
        let mut all = vec![0.0; share.rows as usize * self.rank];
        for (row, factor) in (share.first_row..).zip(all.chunks_mut(self.rank)) {
            self.initial.fill(Side::Row, row, factor);
        }
        all
    }

    /// How many factors of columns so many workers change in a clock, all together.
    pub fn updates(&self, workers: usize) -> usize {
        (0..workers).map(|worker| plan::share(&self.ratings, worker, workers, 1, 1).whole.groups.len()).sum()
    }

    /// Bytes of a factor.
    pub fn factor(&self) -> usize {
        size_of::<f32>() * self.rank
    }

    /// What a step for one rating costs on this machine.
    pub fn measure(&self) -> Duration {
        let share = plan::share(&self.ratings, 0, 1, 1, 1);
        let (mut left, mut right) = (self.rows(&share), self.columns());
        let pass = || {
            for (group, entries) in share.whole.iter() {
                let factor = &mut right[group.column as usize * self.rank..][..self.rank];
                sgd::train(&mut left, factor, entries, 1e-6);
            }
        };
        best_of(20, pass) / share.whole.entries.len() as u32
    }
}

/// Training with steps of one size.
#[derive(Debug, Clone)]
pub struct Factorisation {
    /// What is trained on.
    pub input: Arc<Input>,
    /// Size of a step.
    pub step: f32,
}

impl Application for Factorisation {
    /// The factors of all columns.
    type Sums = Vec<f32>;
    type Learner = Factors;
    const RISES: bool = false;

    fn sums(&self) -> Vec<f32> {
        self.input.columns()
    }

    fn learner(
        self: &Arc<Self>,
        place: &Place,
        _worker: &mut Worker<Node>,
        workers: usize,
        model: Model,
    ) -> Result<Factors> {
        let (input, rank) = (&self.input, self.input.rank);
        let share = plan::share(&input.ratings, place.number, workers, 1, 1);
        let run = (input.ratings.columns as usize).div_ceil(FETCHES);
        Ok(Factors {
            table: place.client.table("R", input.ratings.columns.into(), rank, model)?,
            step: self.step,
            left: input.rows(&share),
            initial: input.columns(),
            share,
            rows: Vec::with_capacity(run),
            gained: vec![0.0; run * rank],
            run,
            factor: vec![0.0; rank],
        })
    }

    fn cache(&self) -> usize {
        let stride = (32 + self.input.factor()).next_multiple_of(64);
        (64 << 10) + 2 * self.input.ratings.columns as usize * stride
    }
}

/// A worker's ratings and its factors.
#[derive(Debug)]
pub struct Factors {
    table: Table<f32>,
    step: f32,
    share: Share,
    /// Those of its rows.
    left: Vec<f32>,
    /// Those of all columns, before the first clock.
    initial: Vec<f32>,
    /// Columns that are fetched together.
    run: usize,
    // Room for a run of columns: their numbers, what they have gained, and a factor.
    rows: Vec<u64>,
    gained: Vec<f32>,
    factor: Vec<f32>,
}

impl Learner for Factors {
    type Sums = Vec<f32>;

    fn learn(&mut self, worker: &mut Worker<Node>, watch: &mut Watch<Vec<f32>>) -> Result<()> {
        let Self { table, step, share, left, initial, run, rows, gained, factor } = self;
        let rank = factor.len();
        // Shares differ by the ratings of a row: nobody is slow for that.
        let all = share.whole.entries.len() as f64;
        let mut rest = share.whole.entries.as_slice();
        for groups in share.whole.groups.chunks(*run) {
            rows.clear();
            rows.extend(groups.iter().map(|group| u64::from(group.column)));
            let gained = &mut gained[..groups.len() * rank];
            worker.get_many(table, rows, gained)?;
            for (group, gained) in groups.iter().zip(gained.chunks(rank)) {
                let at = group.column as usize * rank;
                let sums = watch.sums();
                let lack = |((sum, initial), gained): ((&f32, &f32), &f32)| (sum - initial - gained).abs();
                let most = sums[at..].iter().zip(&initial[at..]).zip(gained).map(lack).fold(0.0, f32::max);
                drop(sums);
                watch.lacks(most.into());
            }
            let ratings: u32 = groups.iter().map(|group| group.ratings).sum();
            watch.compute(f64::from(ratings) / all);
            for (group, gained) in groups.iter().zip(gained.chunks_mut(rank)) {
                let (entries, after) = rest.split_at(group.ratings as usize);
                rest = after;
                let at = group.column as usize * rank;
                for ((factor, initial), gained) in factor.iter_mut().zip(&initial[at..]).zip(&mut *gained) {
                    *factor = initial + *gained;
                    *gained = *factor;
                }
                sgd::train(left, factor, entries, *step);
                for (gained, factor) in gained.iter_mut().zip(&*factor) {
                    *gained = factor - *gained;
                }
                if gained.iter().any(|gained| !gained.is_finite()) {
                    gained.fill(0.0);
                }
                worker.inc(table, group.column.into(), gained)?;
                watch.sums()[at..].iter_mut().zip(gained).for_each(|(sum, gained)| *sum += *gained);
            }
        }
        Ok(())
    }

    fn objective(&self, sums: &Vec<f32>) -> f64 {
        let rank = self.factor.len();
        let factor = |column: u32| &sums[column as usize * rank..][..rank];
        let loss = |(group, entries): (plan::Group, _)| sgd::loss(&self.left, factor(group.column), entries);
        self.share.whole.iter().map(loss).sum()
    }

    fn diverged(&self, initial: f64, objective: f64) -> bool {
        objective.is_nan() || objective > DIVERGED * initial
    }
}
