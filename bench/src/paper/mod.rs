//! The paper's experiments.

pub mod cluster;
pub mod mf;
