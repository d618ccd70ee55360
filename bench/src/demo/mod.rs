//! The digits under all four models: a comparison, the convergence curves, and the learned factors as pictures.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};
use clap::{Args, FromArgMatches as _};

use crate::{
    mf::{
        self, MfOptions, Report,
        report::{comparison, differentials},
    },
    report::write_json,
};

pub mod curves;
pub mod pictures;

/// The times to this part of the initial loss are compared.
const TARGET: f64 = 0.04;

/// Options of `fervor-bench demo`.
#[derive(Debug, Clone, Args)]
pub struct DemoOptions {
    /// Folder for the pictures and the results. It is made if it does not exist
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Passes over the pictures
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub epochs: u32,
    /// Numbers in the factor of a picture or pixel
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub rank: u32,
    /// Clocks that a read may lag under ssp and essp
    #[arg(long, default_value_t = 3)]
    pub staleness: u32,
    /// Seed of the initial factors and the order of the ratings
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// The four runs: arguments of `fervor-bench mf`.
fn runs(options: &DemoOptions) -> Result<Vec<MfOptions>> {
    let staleness = format!("--staleness={}", options.staleness);
    let models: [&[&str]; 4] =
        [&["--model=bsp"], &["--model=ssp", &staleness], &["--model=essp", &staleness], &["--model=async"]];
    let command = MfOptions::augment_args(clap::Command::new("mf"));
    models
        .iter()
        .map(|model| {
            let factors = options.out.join("factors.json");
            let arguments = [
                "mf".into(),
                "--digits".into(),
                // In place, a read is fresh under any model, and there is nothing to compare.
                "--copies".into(),
                format!("--epochs={}", options.epochs).into(),
                format!("--rank={}", options.rank).into(),
                format!("--seed={}", options.seed).into(),
                "--factors".into(),
                factors.into_os_string(),
            ];
            let arguments = arguments.into_iter().chain(model.iter().map(Into::into));
            let matches = command.clone().try_get_matches_from(arguments)?;
            Ok(MfOptions::from_arg_matches(&matches)?)
        })
        .collect()
}

/// Runs the demo and gives back the results of the four models.
///
/// # Errors
/// When a run fails, or the folder cannot be written.
pub fn run(options: &DemoOptions) -> Result<Vec<Report>> {
    fs::create_dir_all(&options.out)
        .with_context(|| format!("cannot make the folder {}", options.out.display()))?;
    let mut reports = Vec::new();
    for run in runs(options)? {
        println!("{} ...", run.title());
        reports.extend(mf::run(&run)?);
    }
    for report in &mut reports {
        report.aim(TARGET * report.epochs[0].loss);
    }
    println!("\n{}\n{}", reports[0].run.machine, comparison(&reports));
    println!("(target: {} % of the initial loss)", 100.0 * TARGET);
    println!("All read copies of rows, as over a network, though the server is on this machine.\n");
    println!("{}", differentials(&reports));
    let file = |name: &str| options.out.join(name);
    curves::write(&file("convergence.svg"), &reports)?;
    let eager =
        reports.iter().find(|report| report.run.model == "essp").context("there is no run under essp")?;
    let factors = eager.factors.as_deref().context("the run under essp gave no factors")?;
    pictures::write(&file("factors.svg"), factors, options.rank as usize, &eager.title())?;
    write_json(&file("results.json"), &reports)?;
    for name in ["convergence.svg", "factors.svg", "results.json"] {
        println!("wrote {}", file(name).display());
    }
    Ok(reports)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_run_for_each_model() {
        let options = DemoOptions { out: "out".into(), epochs: 7, rank: 5, staleness: 2, seed: 9 };
        let runs = runs(&options).unwrap();
        let titles: Vec<_> = runs.iter().map(MfOptions::title).collect();
        assert_eq!(titles, ["bsp", "ssp(2)", "essp(2)", "async"]);
        assert!(
            runs.iter()
                .all(|run| run.validate().is_ok() && run.digits && run.job.epochs == 7 && run.rank == 5)
        );
        assert!(runs.iter().all(|run| run.job.reads.copies), "over copies, or there is nothing to compare");
    }
}
