//! `--real`: the same training on this machine, in real time, over shared memory.

use anyhow::{Context as _, Result};
use clap::{Args, FromArgMatches as _};
use serde_json::json;

use super::{
    claims::Claim,
    section::{Figure, Section},
};
use crate::{
    demo::curves,
    mf::{self, MfOptions, Report},
    report::{TextTable, percent},
};

/// Command lines of `fervor-bench mf`.
const MODELS: [&[&str]; 4] = [
    &["--model=bsp"],
    &["--model=ssp", "--staleness=3"],
    &["--model=essp", "--staleness=3"],
    &["--model=async"],
];

/// Mean clock differential, and part at -1.
fn freshness(report: &Report) -> (f64, f64) {
    let all = &report.run.clock_differential;
    let count: u64 = all.values().sum();
    let at_minus_one = all.get(&-1).copied().unwrap_or(0) as f64;
    (report.run.mean_differential().unwrap_or(0.0), at_minus_one / count.max(1) as f64)
}

/// Runs and describes it.
///
/// # Errors
/// When a run fails.
pub fn section(quick: bool) -> Result<Section> {
    let command = MfOptions::augment_args(clap::Command::new("mf"));
    let size = if quick { "2000x1000:200000" } else { "20000x2000:2000000" };
    let mut reports = Vec::new();
    for model in MODELS {
        let common = ["mf", "--generate", size, "--clients=2", "--clocks-per-epoch=4", "--epochs=12"];
        let matches = command.clone().try_get_matches_from(common.iter().chain(model))?;
        reports.extend(mf::run(&MfOptions::from_arg_matches(&matches)?)?);
    }
    let mut table = TextTable::new(["model", "seconds", "last loss", "mean differential", "at -1"]);
    for report in &reports {
        let last = report.epochs.last().context("a run has no epoch")?;
        let (mean, at_minus_one) = freshness(report);
        table.row([
            report.title(),
            format!("{:.3}", last.seconds),
            format!("{:.4e}", last.loss),
            format!("{mean:.2}"),
            percent(at_minus_one),
        ]);
    }
    let mean = |model: &str| reports.iter().find(|report| report.run.model == model).map(|r| freshness(r).0);
    let (ssp, essp) = mean("ssp").zip(mean("essp")).context("a model has not been run")?;
    Ok(Section {
        title: "On this machine",
        paper: "ESSP's copies are fresher than SSP's under the same bound.",
        setup: format!(
            "Real processes: a server and two clients of one worker, over shared memory; {size}, rank 32."
        ),
        figures: vec![Figure::new("Convergence on this machine", curves::draw(&reports)?)],
        table,
        claims: vec![Claim::new(
            "the mean clock differential under ESSP(3) is nearer to -1 than under SSP(3)",
            format!("{essp:.2} for {ssp:.2}"),
            essp > ssp,
        )],
        remarks: Vec::new(),
        data: json!(reports),
    })
}
