//! What an experiment hands in, and what all of them are told.

use std::time::Duration;

use anyhow::Result;
use fervor_client::Model;
use fervor_verbs::transport::sim::Fabric;
use serde::Serialize;
use serde_json::Value;

use super::{
    claims::Claim,
    cluster::Machines,
    runs::{Runs, Spec},
};
use crate::{data::Planted, report::TextTable};

/// How much is done.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Worker nodes, where nothing else is said.
    pub workers: usize,
    /// Server nodes.
    pub servers: usize,
    /// Rows, columns and ratings of the matrix.
    pub matrix: (u32, u32, u64),
    /// Numbers in a factor.
    pub rank: usize,
    /// Values of s.
    pub staleness: Vec<u32>,
    /// Bounds of VAP in the first clock.
    pub vap: Vec<f32>,
    /// Clocks of a run.
    pub clocks: usize,
    /// Size of a step.
    pub step: f32,
    /// Sizes of a step of the experiment about robustness.
    pub steps: Vec<f32>,
    /// The target is this part of the initial loss.
    pub target: f64,
    /// What a worker of `workers` computes in a clock.
    pub charge: Duration,
    /// Numbers of workers of the experiment about scale.
    pub scale: Vec<usize>,
    /// Numbers of workers, and clocks, of the experiment about theory.
    pub theory: (Vec<usize>, Vec<usize>),
}

impl Plan {
    /// The whole of it: 64 nodes, every s from 1 to 10.
    pub fn full() -> Self {
        Self {
            workers: 64,
            servers: 8,
            matrix: (1024, 192, 25_600),
            rank: 16,
            staleness: (1..=10).collect(),
            vap: vec![0.3, 0.03],
            clocks: 66,
            step: 0.005,
            steps: vec![0.0025, 0.005, 0.01, 0.015],
            target: 0.1,
            charge: Duration::from_millis(40),
            scale: vec![1, 4, 16, 64, 256],
            theory: (vec![4, 16, 64], vec![25, 50, 100, 200]),
        }
    }

    /// 64 nodes too, for fewer clocks and values of s.
    pub fn quick() -> Self {
        Self {
            staleness: vec![1, 3, 10],
            vap: vec![0.3],
            clocks: 33,
            step: 0.01,
            steps: vec![0.005, 0.01, 0.015],
            target: 0.12,
            scale: vec![1, 4, 16, 64],
            theory: (vec![4, 16], vec![25, 50, 100]),
            ..Self::full()
        }
    }

    /// The matrix.
    pub fn planted(&self) -> Planted {
        let (rows, columns, ratings) = self.matrix;
        Planted { rows, columns, ratings }
    }

    /// A run on equal machines and 25 GbE; what differs is changed.
    pub fn run(&self, model: Model) -> Spec {
        Spec {
            model,
            workers: self.workers,
            fabric: Fabric::roce_25g(),
            machines: Machines::Equal,
            step: self.step,
            clocks: self.clocks,
            charge: self.charge,
        }
    }

    /// BSP, and SSP(s) and ESSP(s) for each s.
    pub fn models(&self) -> Vec<Model> {
        let both = |&s: &u32| [ssp(s), essp(s)];
        std::iter::once(Model::Bsp).chain(self.staleness.iter().flat_map(both)).collect()
    }

    /// VAP with each of its bounds.
    pub fn value_bounded(&self) -> impl Iterator<Item = Model> {
        self.vap.iter().map(|&v0| Model::Vap { v0 })
    }

    /// BSP, the models with a few values of s, VAP: what figures show.
    pub fn shown(&self) -> Vec<Model> {
        let both = |s: u32| [ssp(s), essp(s)];
        let few = self.few().into_iter().flat_map(both);
        std::iter::once(Model::Bsp).chain(few).chain(self.value_bounded()).collect()
    }

    /// The values of s that are shown where all would be too many: the least, one between, the greatest.
    pub fn few(&self) -> Vec<u32> {
        let all = &self.staleness;
        let mut few = vec![all[0], *all.iter().find(|s| **s >= 3).unwrap_or(&all[0]), all[all.len() - 1]];
        few.dedup();
        few
    }
}

/// SSP(s).
pub fn ssp(staleness: u32) -> Model {
    Model::Ssp { staleness }
}

/// ESSP(s).
pub fn essp(staleness: u32) -> Model {
    Model::Essp { staleness }
}

/// A drawing.
#[derive(Debug, Clone)]
pub struct Figure {
    /// What it shows; also its file's name, in small letters with dashes.
    pub title: String,
    /// The drawing.
    pub svg: String,
}

impl Figure {
    /// A figure.
    pub fn new(title: impl Into<String>, svg: String) -> Self {
        Self { title: title.into(), svg }
    }
}

/// An experiment's part of the page.
#[derive(Debug)]
pub struct Section {
    /// Its name.
    pub title: &'static str,
    /// What the paper says.
    pub paper: &'static str,
    /// What was done, with the parameters that are this experiment's own.
    pub setup: String,
    /// The drawings.
    pub figures: Vec<Figure>,
    /// The numbers.
    pub table: TextTable,
    /// The claims, and what came of them.
    pub claims: Vec<Claim>,
    /// What else there is to say.
    pub remarks: Vec<String>,
    /// For programs.
    pub data: Value,
}

/// An experiment on runs of matrix factorisation.
pub struct Experiment {
    /// The runs that it needs.
    pub specs: fn(&Plan) -> Vec<Spec>,
    /// What it makes of them.
    pub section: fn(&Plan, &Runs) -> Result<Section>,
}

/// Seconds, or never.
pub fn seconds(time: Option<f64>) -> String {
    time.map_or("never".into(), |time| format!("{time:.3}"))
}
