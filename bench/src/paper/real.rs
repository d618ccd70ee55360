//! `--real`: the same training on this machine, in real time, over shared memory.

use anyhow::{Context as _, Result};
use clap::{Args, FromArgMatches as _};
use serde_json::json;

use super::{
    claims::{Claim, Spread},
    section::{Figure, Section},
};
use crate::{
    demo::curves,
    mf::{self, MfOptions, Report},
    report::{TextTable, percent},
};

/// Ratings: a clock of a worker is some milliseconds of computing, more than what the operating system gives a thread at a
/// time. (With shorter ones, on a machine with hardly more processors than threads, the scheduler decides how old
/// copies are.)
const SIZE: &str = "20000x2000:2000000";
/// Runs of each model, in turns.
const TURNS: usize = 5;

/// Models that are run, as in command lines of `fervor-bench mf`.
const MODELS: [&[&str]; 4] = [
    &["--model=bsp"],
    &["--model=ssp", "--staleness=3"],
    &["--model=essp", "--staleness=3"],
    &["--model=async"],
];

/// Part of the reads at -1.
fn at_minus_one(report: &Report) -> f64 {
    let all = &report.run.clock_differential;
    all.get(&-1).copied().unwrap_or(0) as f64 / all.values().sum::<u64>().max(1) as f64
}

/// Seconds of the whole run.
fn seconds(report: &Report) -> Option<f64> {
    report.epochs.last().map(|epoch| epoch.seconds)
}

/// Runs and describes it.
///
/// # Errors
/// When a run fails.
pub fn section() -> Result<Section> {
    let command = MfOptions::augment_args(clap::Command::new("mf"));
    // By model, then by turn.
    let mut reports: [Vec<Report>; MODELS.len()] = Default::default();
    for _ in 0..TURNS {
        for (model, reports) in MODELS.iter().zip(&mut reports) {
            let common =
                ["mf", "--generate", SIZE, "--clients=2", "--clocks-per-epoch=4", "--epochs=12", "--copies"];
            let matches = command.clone().try_get_matches_from(common.iter().chain(*model))?;
            reports.extend(mf::run(&MfOptions::from_arg_matches(&matches)?)?);
        }
    }
    let of =
        |reports: &[Report], value: &dyn Fn(&Report) -> Option<f64>| Spread::new(reports.iter().map(value));
    let mean = |reports: &[Report]| of(reports, &|report| report.run.mean_differential());
    let mut table = TextTable::new(["model", "seconds", "last loss", "mean differential", "at -1"]);
    for reports in &reports {
        let first = reports.first().context("a model has not been run")?;
        table.row([
            first.title(),
            of(reports, &seconds).text(3),
            format!("{:.4e}", first.epochs.last().context("a run has no epoch")?.loss),
            mean(reports).text(2),
            percent(of(reports, &|report| Some(at_minus_one(report))).median().unwrap_or(0.0)),
        ]);
    }
    let [_, ssp, essp, _] = &reports;
    let (ssp, essp) = (mean(ssp), mean(essp));
    let first: Vec<Report> = reports.iter().filter_map(|reports| reports.first().cloned()).collect();
    Ok(Section {
        title: "On this machine",
        paper: "ESSP's copies are fresher than SSP's under the same bound.",
        setup: format!(
            "Real processes: a server and two clients of one worker, over shared memory; {SIZE}, rank 32; {TURNS} runs of each, in \
             turns: medians, and in brackets the least and the greatest. The figure shows the first runs."
        ),
        figures: vec![Figure::new("Convergence on this machine", curves::draw(&first)?)],
        table,
        claims: vec![Claim::new(
            "the mean clock differential under ESSP(3) is nearer to -1 than under SSP(3)",
            format!("{} for {}", essp.text(2), ssp.text(2)),
            essp.median() > ssp.median(),
        )],
        remarks: Vec::new(),
        data: json!(reports),
    })
}
