//! Consistency models on the command line.

use std::fmt;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use fervor_client::{Model, TableOptions};

/// A consistency model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ModelName {
    /// Bulk synchronous: a read sees everything that any worker did before its last clock
    Bsp,
    /// Stale synchronous: a read may lack the last --staleness clocks of other workers
    Ssp,
    /// Eager SSP: the same bound, and the server pushes changed rows
    Essp,
    /// No guarantee between workers
    Async,
    /// Value-bounded: an update waits while the worker's updates that some do not see yet would exceed a bound
    Vap,
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ModelName::Bsp => "bsp",
            ModelName::Ssp => "ssp",
            ModelName::Essp => "essp",
            ModelName::Async => "async",
            ModelName::Vap => "vap",
        })
    }
}

/// The options that choose a model.
#[derive(Debug, Clone, Args)]
pub struct ModelOptions {
    /// Consistency model of the table
    #[arg(long, value_enum, default_value_t = ModelName::Essp)]
    pub model: ModelName,
    /// Clocks that a read may lag, under ssp and essp [default: 3]
    #[arg(long)]
    pub staleness: Option<u32>,
    /// Under vap: the bound in the first clock. It bounds the sum of a worker's updates of an element that some do not
    /// see yet, and falls with the square root of the clock
    #[arg(long, value_name = "BOUND", required_if_eq("model", "vap"))]
    pub v0: Option<f32>,
    /// Under essp and async: bytes per second that each shard may push besides the pushes after a clock, as in 500000,
    /// 20M or max. It pushes the most changed rows first
    #[arg(long, value_name = "BYTES", value_parser = rate)]
    pub continuous: Option<u64>,
}

/// Bytes per second: a number, with `k`, `M` or `G` perhaps, or `max`.
fn rate(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.char_indices().last() {
        Some((at, 'k')) => (&text[..at], 1_000),
        Some((at, 'M')) => (&text[..at], 1_000_000),
        Some((at, 'G')) => (&text[..at], 1_000_000_000),
        _ if text == "max" => return Ok(u64::MAX),
        _ => (text, 1),
    };
    let rate = digits.parse().ok().and_then(|number: u64| number.checked_mul(unit));
    rate.filter(|rate| *rate > 0)
        .ok_or_else(|| "write bytes per second, as in 500000, 300k, 20M, 1G or max".into())
}

impl ModelOptions {
    /// Refuses a staleness, a bound or a rate for a model that has none, and a bound that makes no sense.
    ///
    /// # Errors
    /// Says which.
    pub fn validate(&self) -> Result<()> {
        let bounded = matches!(self.model, ModelName::Ssp | ModelName::Essp);
        ensure!(
            bounded || self.staleness.unwrap_or(0) == 0,
            "--staleness {} goes with --model ssp or essp, not {}: leave it out, or choose one of these",
            self.staleness.unwrap_or(0),
            self.model
        );
        if let Some(v0) = self.v0 {
            ensure!(
                self.model == ModelName::Vap,
                "--v0 {v0} goes with --model vap, not {}: leave it out, or choose vap",
                self.model
            );
            ensure!(v0 > 0.0 && v0.is_finite(), "--v0 {v0}: write a finite number above 0");
        }
        ensure!(
            self.continuous.is_none() || matches!(self.model, ModelName::Essp | ModelName::Async),
            "--continuous goes with --model essp or async, not {}: leave it out, or choose one of these",
            self.model
        );
        Ok(())
    }

    /// What else the table is.
    pub fn table(&self) -> TableOptions {
        TableOptions { continuous: self.continuous.unwrap_or(0), ..TableOptions::default() }
    }

    /// The staleness that is in force, where the model has one.
    pub fn bounded_by(&self) -> Option<u32> {
        (!matches!(self.model, ModelName::Async | ModelName::Vap)).then(|| self.staleness())
    }

    /// The staleness that is in force; none under `async` and `vap` is 0.
    pub fn staleness(&self) -> u32 {
        match self.model {
            ModelName::Ssp | ModelName::Essp => self.staleness.unwrap_or(3),
            ModelName::Bsp | ModelName::Async | ModelName::Vap => 0,
        }
    }

    /// The model, as the client takes it.
    pub fn model(&self) -> Model {
        let staleness = self.staleness();
        match self.model {
            ModelName::Bsp => Model::Bsp,
            ModelName::Ssp => Model::Ssp { staleness },
            ModelName::Essp => Model::Essp { staleness },
            ModelName::Async => Model::Async,
            ModelName::Vap => Model::Vap { v0: self.v0.unwrap_or_default() },
        }
    }
}

impl fmt::Display for ModelOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.model {
            ModelName::Ssp | ModelName::Essp => write!(f, "{}({})", self.model, self.staleness()),
            ModelName::Vap => write!(f, "{}({})", self.model, self.v0.unwrap_or_default()),
            ModelName::Bsp | ModelName::Async => self.model.fmt(f),
        }
    }
}
