//! Consistency models on the command line.

use std::fmt;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use fervor_client::Model;

/// A consistency model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ModelName {
    /// Bulk synchronous: a read sees everything that any worker did before its last clock
    Bsp,
    /// Stale synchronous: a read may lack the last clocks of other workers
    Ssp,
    /// Eager SSP: as SSP, and the server pushes what changed
    Essp,
    /// No guarantee between workers
    Async,
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ModelName::Bsp => "bsp",
            ModelName::Ssp => "ssp",
            ModelName::Essp => "essp",
            ModelName::Async => "async",
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
}

impl ModelOptions {
    /// Refuses a staleness for a model that has none.
    ///
    /// # Errors
    /// Says which.
    pub fn validate(&self) -> Result<()> {
        let bounded = matches!(self.model, ModelName::Ssp | ModelName::Essp);
        ensure!(
            bounded || self.staleness.unwrap_or(0) == 0,
            "--staleness {} goes with --model ssp or essp, not {}",
            self.staleness.unwrap_or(0),
            self.model
        );
        Ok(())
    }

    /// The staleness that is in force; none under `async` is 0.
    pub fn staleness(&self) -> u32 {
        match self.model {
            ModelName::Ssp | ModelName::Essp => self.staleness.unwrap_or(3),
            ModelName::Bsp | ModelName::Async => 0,
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
        }
    }
}

impl fmt::Display for ModelOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.model {
            ModelName::Ssp | ModelName::Essp => write!(f, "{}({})", self.model, self.staleness()),
            ModelName::Bsp | ModelName::Async => self.model.fmt(f),
        }
    }
}
