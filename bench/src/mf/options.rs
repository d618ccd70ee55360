//! The command line of `fervor-bench mf`.

use std::{ffi::OsString, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::{ArgGroup, Args, value_parser};

use super::{sgd::Initial, trainer::Training};
use crate::{
    data::{Planted, Ratings, Source},
    job::{JobOptions, options::Arguments},
};

/// Options of `fervor-bench mf`.
#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("input").required(true))]
pub struct MfOptions {
    /// Ratings in a file: MovieLens CSV, MatrixMarket, or lines of `row column value`; plain or gzip
    #[arg(long, value_name = "FILE", group = "input")]
    pub data: Option<PathBuf>,
    /// The built-in handwritten digits: 1797 pictures of 64 pixels
    #[arg(long, group = "input")]
    pub digits: bool,
    /// Generate ratings from random factors, as in 2000x1000:200000
    #[arg(long, value_name = "ROWSxCOLS:RATINGS", group = "input")]
    pub generate: Option<Planted>,

    /// Numbers in the factor of a row or column
    #[arg(long, default_value_t = 32, value_parser = value_parser!(u32).range(1..=65_536))]
    pub rank: u32,
    /// Size of a step in the first epoch [default: one that suits the input]
    #[arg(long)]
    pub step: Option<f32>,
    /// The step is multiplied by this after each epoch
    #[arg(long, default_value_t = 0.99)]
    pub decay: f32,
    /// Stop when the sum of squared errors is at most this
    #[arg(long, value_name = "LOSS", conflicts_with = "client_index")]
    pub target_loss: Option<f64>,
    /// Stop when the loss is at most this part of the loss before the first epoch, as in 0.02
    #[arg(long, value_name = "PART", conflicts_with_all = ["target_loss", "client_index"])]
    pub target_fraction: Option<f64>,

    /// Who works where.
    #[command(flatten)]
    pub job: JobOptions,

    /// Write the learned column factors to this file, as a JSON array of an array for each column
    #[arg(long, value_name = "FILE", conflicts_with = "client_index")]
    pub factors: Option<PathBuf>,
    /// Tell the parent process the column factors too
    #[arg(long, hide = true, requires = "tell_parent")]
    pub tell_factors: bool,
}

impl MfOptions {
    /// Checks what the parser cannot.
    ///
    /// # Errors
    /// Values that make no sense, alone or together.
    pub fn validate(&self) -> Result<()> {
        self.job.validate()?;
        if let Some(step) = self.step {
            ensure!(step.is_finite() && step > 0.0, "--step {step}: a step is a number above 0, as in 0.01");
        }
        ensure!(
            self.decay > 0.0 && self.decay <= 1.0,
            "--decay {}: write a number above 0 and at most 1, as in 0.99",
            self.decay
        );
        if let Some(part) = self.target_fraction {
            ensure!(
                part > 0.0 && part < 1.0,
                "--target-fraction {part}: write a number between 0 and 1, as in 0.02"
            );
        }
        Ok(())
    }

    /// Where the ratings come from.
    ///
    /// # Panics
    /// If none of the inputs is given; the parser sees to that.
    pub fn source(&self) -> Source {
        match (&self.data, self.digits, self.generate) {
            (Some(path), _, _) => Source::File(path.clone()),
            (_, true, _) => Source::Digits,
            (_, _, Some(planted)) => Source::Planted(planted),
            _ => unreachable!("the parser requires an input"),
        }
    }

    /// Reads the ratings.
    ///
    /// # Errors
    /// As [`Source::load`].
    pub fn load(&self) -> Result<Ratings> {
        self.source().load(self.job.seed).context("cannot read the ratings")
    }

    /// How to train on `ratings`.
    pub fn training(&self, ratings: &Ratings) -> Training {
        let rank = self.rank as usize;
        Training {
            rank,
            epochs: self.job.epochs as usize,
            step: self.step.unwrap_or_else(|| default_step(ratings, self.job.clocks_per_epoch)),
            decay: self.decay,
            initial: Initial::new(self.job.seed, rank, ratings.root_mean_square()),
            keep_factors: self.tell_factors || self.factors.is_some(),
        }
    }

    /// What the job is, in a few words.
    pub fn title(&self) -> String {
        self.job.title()
    }

    /// The loss that ends the job, given that before the first epoch.
    pub fn target(&self, first: f64) -> Option<f64> {
        self.target_loss.or(self.target_fraction.map(|fraction| fraction * first))
    }

    /// The command line of client number `index` of the job called `job`, for its servers at `urls`.
    pub fn client_arguments(&self, index: u16, job: &str, urls: &[String]) -> Vec<OsString> {
        let mut arguments = Arguments::default();
        self.job.put(index, job, urls, &mut arguments);
        arguments.put("rank", &self.rank);
        arguments.put("decay", &self.decay);
        arguments.put_some("step", self.step.as_ref());
        if let Some(planted) = self.generate {
            arguments.put("generate", &format!("{}x{}:{}", planted.rows, planted.columns, planted.ratings));
        }
        arguments.put_path("data", self.data.as_ref());
        arguments.flag("digits", self.digits);
        arguments.flag("tell-factors", self.factors.is_some());
        arguments.0
    }
}

/// A step that is stable on `ratings`.
///
/// A column's factor moves by all of a clock's ratings of it, from several workers that do not see each other's
/// updates for some clocks. What they do together must not go far beyond the optimum: so the step is lower
/// the more ratings the most popular column gets in a clock, and the larger the values are.
fn default_step(ratings: &Ratings, clocks_per_epoch: u32) -> f32 {
    let mut counts = vec![0u64; ratings.columns as usize];
    for entry in &ratings.entries {
        counts[entry.column as usize] += 1;
    }
    let most = counts.into_iter().max().unwrap_or(1) as f64 / f64::from(clocks_per_epoch);
    let size = ratings.root_mean_square().max(f64::MIN_POSITIVE);
    ((3.0 / most.max(1.0)).min(0.02) / size) as f32
}
