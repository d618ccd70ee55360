//! How much is done: how large the experiments are, and which runs they have in common.

use std::time::Duration;

use fervor_client::Model;
use fervor_verbs::transport::sim::Fabric;
use serde::Serialize;

use super::{
    cluster::Machines,
    lda, mf,
    spec::{App, Spec},
    training::Run,
};
use crate::{data::Planted, lda::corpus};

/// How long an application is trained, and how it is charged.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Course {
    /// Clocks of a run.
    pub clocks: usize,
    /// What a worker of [`Plan::workers`] computes in a clock.
    pub charge: Duration,
    /// Where the target is. MF: this part of the initial loss. LDA: this part of the way from the initial log-likelihood to
    /// that of BSP's last clock.
    pub target: f64,
    /// Bounds of VAP in the first clock, the greatest first.
    pub vap: Vec<f32>,
}

/// What the experiment about scale does.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scale {
    /// Numbers of workers.
    pub workers: Vec<usize>,
    /// What all workers together compute in a clock.
    pub computing: Duration,
    /// Clocks of a run.
    pub clocks: usize,
    /// Size of a step.
    pub step: f32,
}

/// How much is done.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Worker nodes, where nothing else is said.
    pub workers: usize,
    /// Server nodes.
    pub servers: usize,
    /// Values of s.
    pub staleness: Vec<u32>,
    /// The first seed.
    pub seed: u64,
    /// Seeds of the runs of which medians are taken.
    pub seeds: u64,
    /// Rows, columns and ratings of the matrix.
    pub matrix: (u32, u32, u64),
    /// Numbers in a factor.
    pub rank: usize,
    /// Size of a step.
    pub step: f32,
    /// Sizes of a step of the experiment about robustness.
    pub steps: Vec<f32>,
    /// Matrix factorisation.
    pub mf: Course,
    /// Documents, words and tokens of the corpus.
    pub corpus: (u32, u32, u32),
    /// Topics to learn.
    pub topics: usize,
    /// LDA.
    pub lda: Course,
    /// The experiment about scale.
    pub scale: Scale,
    /// Numbers of workers, and clocks, of the experiment about theory.
    pub theory: (Vec<usize>, Vec<usize>),
}

impl Plan {
    /// The whole of it: 64 nodes, every s from 1 to 10.
    pub fn full() -> Self {
        Self {
            workers: 64,
            servers: 8,
            staleness: (1..=10).collect(),
            seed: 1,
            seeds: 5,
            matrix: (1024, 192, 25_600),
            rank: 16,
            step: 0.01,
            steps: vec![0.0025, 0.005, 0.01, 0.015],
            mf: Course { clocks: 40, charge: Duration::from_millis(40), target: 0.1, vap: vec![0.3, 0.1] },
            corpus: (1280, 300, 102_400),
            topics: 20,
            lda: Course { clocks: 32, charge: Duration::from_millis(40), target: 0.8, vap: vec![100.0] },
            scale: Scale {
                workers: vec![1, 4, 16, 64, 256],
                computing: Duration::from_millis(32),
                clocks: 100,
                step: 0.005,
            },
            theory: (vec![4, 16, 64], vec![25, 50, 100, 200]),
        }
    }

    /// 64 nodes too, for a smaller matrix, fewer clocks and values of s.
    pub fn quick() -> Self {
        let full = Self::full();
        Self {
            staleness: vec![1, 3, 10],
            seeds: 3,
            matrix: (1024, 96, 25_600),
            steps: vec![0.005, 0.01],
            mf: Course { clocks: 26, target: 0.12, vap: vec![0.3], ..full.mf },
            lda: Course { clocks: 18, vap: vec![], ..full.lda },
            scale: Scale { workers: vec![1, 4, 16, 64], ..full.scale },
            theory: (vec![4, 16], vec![25, 50, 100]),
            ..full
        }
    }

    /// How `app` is trained.
    pub fn course(&self, app: App) -> &Course {
        match app {
            App::Mf => &self.mf,
            App::Lda => &self.lda,
        }
    }

    /// The ratings of this seed.
    pub fn ratings(&self, seed: u64) -> mf::Input {
        let (rows, columns, ratings) = self.matrix;
        mf::Input::new(&Planted { rows, columns, ratings }, self.rank, seed)
    }

    /// The documents of this seed.
    pub fn documents(&self, seed: u64) -> lda::Input {
        let (documents, words, tokens) = self.corpus;
        lda::Input::new(&corpus::Planted { documents, words, tokens }, self.topics, seed)
    }

    /// A run on equal machines and 25 GbE, with the first seed; what differs is changed.
    pub fn run(&self, app: App, model: Model) -> Spec {
        let Course { clocks, charge, .. } = *self.course(app);
        Spec {
            app,
            model,
            workers: self.workers,
            fabric: Fabric::roce_25g(),
            machines: Machines::Equal,
            step: self.step,
            clocks,
            charge,
            seed: self.seed,
        }
    }

    /// A run, with each of the seeds.
    pub fn seeds(&self, spec: Spec) -> impl Iterator<Item = Spec> {
        (self.seed..self.seed + self.seeds).map(move |seed| Spec { seed, ..spec.clone() })
    }

    /// The target of `run`, of `app`; `bsp` is BSP's of the same data.
    pub fn target(&self, app: App, bsp: &Run) -> f64 {
        let part = self.course(app).target;
        match app {
            App::Mf => part * bsp.initial,
            App::Lda => bsp.initial + part * (bsp.last().unwrap_or(f64::NAN) - bsp.initial),
        }
    }

    /// BSP, and SSP(s) and ESSP(s) for each s.
    pub fn models(&self) -> Vec<Model> {
        let both = |&s: &u32| [ssp(s), essp(s)];
        std::iter::once(Model::Bsp).chain(self.staleness.iter().flat_map(both)).collect()
    }

    /// VAP with each of its bounds.
    pub fn value_bounded(&self, app: App) -> impl Iterator<Item = Model> {
        self.course(app).vap.iter().map(|&v0| Model::Vap { v0 })
    }

    /// VAP with the greatest of its bounds, if there is one: to simulate smaller ones takes long.
    pub fn loosest(&self, app: App) -> Option<Model> {
        self.value_bounded(app).next()
    }

    /// All models.
    pub fn all_models(&self, app: App) -> Vec<Model> {
        self.models().into_iter().chain(self.value_bounded(app)).collect()
    }

    /// BSP, the models with a few values of s, VAP with its greatest bound: what figures show.
    pub fn shown(&self, app: App) -> Vec<Model> {
        let both = |s: u32| [ssp(s), essp(s)];
        let few = self.few().into_iter().flat_map(both);
        std::iter::once(Model::Bsp).chain(few).chain(self.loosest(app)).collect()
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
