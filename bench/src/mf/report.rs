//! What the user of `fervor-bench mf` gets: a table on the terminal, and a JSON file.

use std::fmt;

use serde::Serialize;

use super::{Tally, options::MfOptions};
use crate::{
    data::Ratings,
    job::{
        self,
        report::{Run, differential_table, write_epochs},
    },
    report::{self, TextTable},
};

/// An epoch that every worker has finished.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Epoch {
    /// Its number; 0 is before the first.
    pub epoch: usize,
    /// Seconds from the start until the slowest worker had finished it.
    pub seconds: f64,
    /// The sum of squared errors over all ratings.
    pub loss: f64,
}

/// The results of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// What all applications report.
    #[serde(flatten)]
    pub run: Run,
    /// What was trained on.
    pub data: Data,
    /// Numbers in a factor.
    pub rank: u32,
    /// Size of a step in the first epoch.
    pub step: f32,
    /// What the step is multiplied with after each epoch.
    pub decay: f32,
    /// After each epoch, and (as epoch 0) before the first: the time that the slowest worker has trained, and the sum
    /// of squared errors.
    pub epochs: Vec<Epoch>,
    /// The loss that was to be reached.
    pub target_loss: Option<f64>,
    /// When it was first reached at the end of an epoch.
    pub seconds_to_target: Option<f64>,
    /// The column factors, one after the other, if they were kept.
    #[serde(skip)]
    pub factors: Option<Vec<f32>>,
}

/// What was trained on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Data {
    /// Where it came from, and how it was understood.
    pub source: String,
    /// Rows of the matrix.
    pub rows: u32,
    /// Columns of the matrix.
    pub columns: u32,
    /// Known entries.
    pub ratings: u64,
}

impl Report {
    /// The report of a job, or of its client number `client_index`.
    pub fn new(options: &MfOptions, ratings: &Ratings, tally: Tally, client_index: Option<u16>) -> Self {
        let training = options.training(ratings);
        let epoch = |epoch: job::messages::Epoch| Epoch {
            epoch: epoch.epoch,
            seconds: epoch.seconds,
            loss: epoch.objective,
        };
        let mut report = Report {
            run: Run::new("mf", &options.job, client_index, &tally),
            data: Data {
                source: ratings.source.clone(),
                rows: ratings.rows,
                columns: ratings.columns,
                ratings: ratings.entries.len() as u64,
            },
            rank: options.rank,
            step: training.step,
            decay: training.decay,
            target_loss: None,
            seconds_to_target: None,
            factors: tally.reports.into_iter().find_map(|report| report.result),
            epochs: tally.epochs.into_iter().map(epoch).collect(),
        };
        let target = report.epochs.first().and_then(|first| options.target(first.loss));
        target.into_iter().for_each(|target| report.aim(target));
        report
    }

    /// Sets the target loss: when was it reached?
    pub fn aim(&mut self, target: f64) {
        self.target_loss = Some(target);
        self.seconds_to_target =
            self.epochs.iter().find(|epoch| epoch.loss <= target).map(|epoch| epoch.seconds);
    }

    /// The model with its staleness or bound.
    pub fn title(&self) -> String {
        self.run.title()
    }

    /// The last epoch that all workers finished.
    pub fn last(&self) -> Option<&Epoch> {
        self.epochs.last()
    }

    /// The column factors, one array for each column, if they were kept.
    pub fn factors_by_column(&self) -> Option<Vec<&[f32]>> {
        Some(self.factors.as_ref()?.chunks(self.rank as usize).collect())
    }
}

/// A comparison of runs.
pub fn comparison(reports: &[Report]) -> TextTable {
    let head = ["model", "epochs", "seconds", "loss", "to target", "clocks/s"];
    let mut table = TextTable::new(head.into_iter().chain(Run::COST_HEAD));
    for report in reports {
        let row = [
            report.title(),
            report.last().map_or("-".into(), |epoch| epoch.epoch.to_string()),
            format!("{:.3}", report.run.seconds),
            report.last().map_or("-".into(), |epoch| format!("{:.4e}", epoch.loss)),
            report.seconds_to_target.map_or("-".into(), |seconds| format!("{seconds:.3} s")),
            format!("{:.0}", report.run.clocks_per_second),
        ];
        table.row(row.into_iter().chain(report.run.cost_cells()));
    }
    table
}

/// How old the data was that the reads of several runs returned: the share of each clock differential.
pub fn differentials(reports: &[Report]) -> TextTable {
    differential_table(reports.iter().map(|report| &report.run))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Data { source, rows, columns, ratings } = &self.data;
        writeln!(f, "{source}: {ratings} ratings of {rows} x {columns}")?;
        let step = format!("rank {}, step {:.3e} x {} each epoch", self.rank, self.step, self.decay);
        self.run.write_head(&step, f)?;
        let first = self.epochs.first().map_or(f64::NAN, |epoch| epoch.loss);
        let epochs = self.epochs.iter().map(|epoch| {
            let loss = [format!("{:.6e}", epoch.loss), report::percent(epoch.loss / first)];
            (epoch.epoch, epoch.seconds, loss)
        });
        write_epochs(f, ["loss", "of the first"], epochs, self.target_loss, self.seconds_to_target)?;
        writeln!(f, "{}", comparison(std::slice::from_ref(self)))?;
        self.run.write_reads(f)
    }
}
