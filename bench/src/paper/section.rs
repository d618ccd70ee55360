//! An experiment: what it is asked for, and what it hands in.

use anyhow::Result;
use serde_json::Value;

use super::{claims::Claim, plan::Plan, runs::Runs, spec::Spec};
use crate::report::TextTable;

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
