//! A run of training, as an experiment asks for it.

use std::{fmt, time::Duration};

use fervor_client::Model;
use fervor_verbs::transport::sim::Fabric;
use serde::Serialize;

use super::cluster::Machines;

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum App {
    /// Matrix factorisation.
    Mf,
    /// Topics of documents.
    Lda,
}

impl App {
    /// All of them.
    pub const ALL: [App; 2] = [App::Mf, App::Lda];
}

impl fmt::Display for App {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            App::Mf => "MF",
            App::Lda => "LDA",
        })
    }
}

/// A run of training.
#[derive(Debug, Clone)]
pub struct Spec {
    /// What is trained.
    pub app: App,
    /// The tables' model.
    pub model: Model,
    /// Worker nodes.
    pub workers: usize,
    /// The network.
    pub fabric: Fabric,
    /// The machines.
    pub machines: Machines,
    /// Size of a step of matrix factorisation.
    pub step: f32,
    /// Clocks.
    pub clocks: usize,
    /// What a worker computes in a clock.
    pub charge: Duration,
    /// Seed of all chance: in the data, and in the simulation.
    pub seed: u64,
}

impl Spec {
    /// What tells it from other runs.
    pub fn key(&self) -> String {
        format!("{self:?}")
    }

    /// About how long it takes to simulate, for an order.
    pub fn effort(&self) -> f64 {
        let by_value = if let Model::Vap { v0 } = self.model { 10.0 / f64::from(v0).sqrt() } else { 1.0 };
        by_value * (self.workers * self.clocks) as f64
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { app, model, workers, fabric, machines, step, charge, seed, .. } = self;
        write!(f, "{app}, {model}, {workers} workers, {}, {machines:?}, clocks of {charge:?}", fabric.name)?;
        if *app == App::Mf {
            write!(f, ", step {step}")?;
        }
        write!(f, ", seed {seed}")
    }
}
