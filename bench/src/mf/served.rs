//! The column factors in a table of a parameter server.
//!
//! A worker goes through a part in runs of `RUN` groups: one `get_many` for the column factors of a run, the
//! training on copies of them, and one `inc` of each with what it changed.
//!
//! # The start
//! Worker 0 of the job writes the initial factors with `inc`, and nobody may read before all of them are
//! there, whatever the model of the table. So each worker ends a clock, and then reads every row of a second
//! table, `START`, which has as many rows and is always under BSP: that returns once every shard
//! has applied every worker's first clock. No factor is read before.

use std::ops::Range;

use anyhow::{Result, ensure};
use fervor_client::{Client, Error, Model, Table, TableOptions, Worker};

use super::{
    plan::{Group, Part},
    sgd::{self, Initial, Side},
    trainer::Factors,
};
use crate::{
    job::{Accesses, oracle::Witness},
    model::ModelOptions,
};

/// Groups whose factors are fetched together.
const RUN: usize = 64;

/// Name of the table whose rows the workers read to start together, after the job's name.
const START: &str = "start";

/// The two tables of a job.
#[derive(Debug)]
pub struct Tables {
    factors: Table<f32>,
    start: Table<f32>,
    columns: u32,
    rank: usize,
}

impl Tables {
    /// Creates or joins the tables of the job called `job`.
    ///
    /// # Errors
    /// What the client says, for example that the table does not fit the servers' memory.
    pub fn open(client: &Client, job: &str, columns: u32, rank: usize, model: &ModelOptions) -> Result<Self> {
        let open = |name: &str, width, model, options| {
            client.table_with::<f32>(&format!("{job}/{name}"), columns.into(), width, model, options)
        };
        let factors = open("R", rank, model.model(), model.table())?;
        let start = open(START, 1, Model::Bsp, TableOptions::default())?;
        Ok(Tables { factors, start, columns, rank })
    }
}

/// The column factors as seen by one worker of the parameter server.
#[derive(Debug)]
pub struct Served<'a> {
    tables: &'a Tables,
    worker: Worker,
    initial: Option<Initial>,
    witness: Option<Witness<'a>>,
    rows: Vec<u64>,
    fetched: Vec<f32>,
    trained: Vec<f32>,
}

impl<'a> Served<'a> {
    /// The factors for `worker`, who writes the initial ones if it is given them, and checks what it reads if it has a `witness`.
    pub fn new(
        tables: &'a Tables,
        worker: Worker,
        initial: Option<Initial>,
        witness: Option<Witness<'a>>,
    ) -> Self {
        let buffer = vec![0.0; RUN * tables.rank];
        Served {
            tables,
            worker,
            initial,
            witness,
            rows: Vec::with_capacity(RUN),
            fetched: buffer.clone(),
            trained: buffer,
        }
    }

    /// Whether the initial factors have been written: worker 0 says so in the first row of `START`. (To look at the factors themselves
    /// would leave a copy without them in the cache, which an older bound lets other workers read later.)
    fn is_written(&mut self) -> Result<bool> {
        let mut told = [0.0];
        self.worker.get(&self.tables.start, 0, &mut told)?;
        Ok(told[0] != 0.0)
    }

    /// Fetches the factors of `columns` into the front of `self.fetched`.
    fn fetch(&mut self, columns: impl Iterator<Item = u32>) -> Result<usize> {
        self.rows.clear();
        self.rows.extend(columns.map(u64::from));
        let length = self.rows.len() * self.tables.rank;
        self.worker.get_many(&self.tables.factors, &self.rows, &mut self.fetched[..length])?;
        Ok(length)
    }
}

/// The runs of a part: which groups, and which entries.
fn runs(part: &Part) -> impl Iterator<Item = (&[Group], Range<usize>)> {
    let mut first = 0;
    part.groups.chunks(RUN).map(move |groups| {
        let length: u32 = groups.iter().map(|group| group.ratings).sum();
        let entries = first..first + length as usize;
        first = entries.end;
        (groups, entries)
    })
}

/// Numbers beyond all bounds come from the step.
fn explain(error: Error) -> anyhow::Error {
    let diverges = matches!(error, Error::NonFinite { .. });
    let error = anyhow::Error::from(error);
    if diverges { error.context("the step is too large, lower --step") } else { error }
}

impl Factors for Served<'_> {
    fn start(&mut self) -> Result<()> {
        if let Some(initial) = self.initial {
            ensure!(
                !self.is_written()?,
                "a job of this name has run on these servers before: name another with --job"
            );
            let mut factor = vec![0.0; self.tables.rank];
            for column in 0..self.tables.columns {
                initial.fill(Side::Column, column, &mut factor);
                self.worker.inc(&self.tables.factors, column.into(), &factor)?;
            }
            self.worker.inc(&self.tables.start, 0, &[1.0])?;
        }
        self.clock()?;
        let rows: Vec<u64> = (0..self.tables.columns.into()).collect();
        for rows in rows.chunks(RUN) {
            self.worker.get_many(&self.tables.start, rows, &mut self.fetched[..rows.len()])?;
        }
        ensure!(
            self.is_written()?,
            "the client with index 0 did not write the initial factors: it has failed, and its own output says why"
        );
        Ok(())
    }

    fn train(&mut self, part: &Part, left: &mut [f32], step: f32) -> Result<()> {
        if let Some(witness) = &mut self.witness {
            witness.look(&mut self.worker)?;
        }
        let rank = self.tables.rank;
        for (groups, entries) in runs(part) {
            let length = self.fetch(groups.iter().map(|group| group.column))?;
            self.trained[..length].copy_from_slice(&self.fetched[..length]);
            let mut rest = &part.entries[entries];
            let factors = self.trained.chunks_mut(rank).zip(self.fetched.chunks(rank));
            for (group, (trained, fetched)) in groups.iter().zip(factors) {
                let (entries, after) = rest.split_at(group.ratings as usize);
                rest = after;
                sgd::train(left, trained, entries, step);
                for (trained, fetched) in trained.iter_mut().zip(fetched) {
                    *trained -= fetched;
                }
                self.worker.inc(&self.tables.factors, group.column.into(), trained).map_err(explain)?;
            }
        }
        Ok(())
    }

    fn loss(&mut self, part: &Part, left: &[f32]) -> Result<f64> {
        let mut loss = 0.0;
        for (groups, entries) in runs(part) {
            self.fetch(groups.iter().map(|group| group.column))?;
            let mut rest = &part.entries[entries];
            for (group, factor) in groups.iter().zip(self.fetched.chunks(self.tables.rank)) {
                let (entries, after) = rest.split_at(group.ratings as usize);
                rest = after;
                loss += sgd::loss(left, factor, entries);
            }
        }
        Ok(loss)
    }

    fn clock(&mut self) -> Result<()> {
        if let Some(witness) = &mut self.witness {
            witness.tick(&mut self.worker)?;
        }
        Ok(self.worker.clock()?)
    }

    fn finish(&mut self) -> Result<()> {
        let Some(witness) = &mut self.witness else { return Ok(()) };
        witness.leave(&mut self.worker)?;
        Ok(self.worker.clock()?)
    }

    fn all(&mut self) -> Result<Vec<f32>> {
        let mut all = Vec::with_capacity(self.tables.columns as usize * self.tables.rank);
        for first in (0..self.tables.columns).step_by(RUN) {
            let length = self.fetch(first..self.tables.columns.min(first + RUN as u32))?;
            all.extend_from_slice(&self.fetched[..length]);
        }
        Ok(all)
    }

    fn accesses(&self) -> Accesses {
        self.worker.stats().into()
    }
}
