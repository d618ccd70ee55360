//! Latencies of several runs side by side: percentiles of the logs that `fervor-bench latency --hlog` writes.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use hdrhistogram::Histogram;

use crate::{
    latency::hlog::{self, Recording},
    report::{TextTable, time},
};

/// The percentiles that are compared.
const PERCENTILES: [f64; 5] = [50.0, 90.0, 99.0, 99.9, 100.0];

/// Options of `fervor-bench compare`.
#[derive(Debug, Clone, Args)]
pub struct CompareOptions {
    /// HdrHistogram logs (V2), as `latency --hlog` writes them. All others are compared with the first
    #[arg(required = true, num_args = 2.., value_name = "FILE.hlog")]
    pub logs: Vec<PathBuf>,
    /// Draw the percentiles of all runs into one picture
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Fail if a median is more than RATIO times that of the first log
    #[arg(long, value_name = "RATIO")]
    pub max_ratio: Option<f64>,
}

/// Runs `fervor-bench compare`.
///
/// # Errors
/// A log that cannot be read; logs that have nothing in common; a median above the bound.
pub fn run(options: &CompareOptions) -> Result<()> {
    let logs = options.logs.iter().map(|path| hlog::read(path)).collect::<Result<Vec<_>>>()?;
    let names = names(&options.logs);
    let (table, medians) = compare(&names, &logs)?;
    print!("{table}");
    if let Some(path) = &options.svg {
        let all: Vec<Recording> = names
            .iter()
            .zip(&logs)
            .flat_map(|(name, log)| {
                log.iter().map(move |r| Recording { name: format!("{name}: {}", r.name), ..r.clone() })
            })
            .collect();
        fs::write(path, hlog::draw(&all)?).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(most) = options.max_ratio
        && let Some((what, ratio)) = medians.into_iter().find(|(_, ratio)| *ratio > most)
    {
        bail!(
            "the median of {what} is {ratio:.2} times that of {}: more than {most} times, the --max-ratio",
            names[0]
        );
    }
    Ok(())
}

/// The names of the files without their folders, if these tell them apart.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let stem = |path: &PathBuf| {
        path.file_stem()
            .map_or_else(|| path.display().to_string(), |stem| stem.to_string_lossy().into_owned())
    };
    let stems: Vec<String> = paths.iter().map(stem).collect();
    let unlike = stems.iter().enumerate().all(|(at, stem)| !stems[..at].contains(stem));
    if unlike { stems } else { paths.iter().map(|path| path.display().to_string()).collect() }
}

/// The table, and each ratio of medians with its name.
fn compare(names: &[String], logs: &[Vec<Recording>]) -> Result<(TextTable, Vec<(String, f64)>)> {
    let mut head = vec!["operation-bytes".to_owned(), "percentile".to_owned(), names[0].clone()];
    head.extend(names[1..].iter().flat_map(|name| [name.clone(), "ratio".to_owned()]));
    let mut table = TextTable::new(head);
    let mut medians = Vec::new();
    for first in &logs[0] {
        let others: Vec<Option<&Recording>> =
            logs[1..].iter().map(|log| log.iter().find(|recording| recording.name == first.name)).collect();
        if others.iter().all(Option::is_none) {
            continue;
        }
        for percentile in PERCENTILES {
            let at = |histogram: &Histogram<u64>| histogram.value_at_percentile(percentile) as f64;
            let base = at(&first.histogram);
            let mut row = vec![first.name.clone(), format!("{percentile} %"), time(base)];
            for (other, name) in others.iter().zip(&names[1..]) {
                let Some(other) = other else {
                    row.extend(["-".to_owned(), "-".to_owned()]);
                    continue;
                };
                let ratio = at(&other.histogram) / base;
                row.extend([time(at(&other.histogram)), format!("{ratio:.2}")]);
                if percentile == 50.0 {
                    medians.push((format!("{} in {name}", first.name), ratio));
                }
            }
            table.row(row);
        }
    }
    let tags = |log: &[Recording]| log.iter().map(|r| r.name.clone()).collect::<Vec<_>>().join(", ");
    ensure!(
        !medians.is_empty(),
        "the logs have no operation of one size in common: {} has {}",
        names[0],
        tags(&logs[0])
    );
    Ok((table, medians))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::latency::ops;

    fn recording(name: &str, value: u64) -> Recording {
        let mut histogram = ops::histogram();
        (0..100).for_each(|_| histogram.record(value).unwrap());
        Recording { name: name.into(), histogram, length: Duration::from_secs(1) }
    }

    #[test]
    fn files_are_called_by_what_tells_them_apart() {
        let names = |paths: [&str; 2]| names(&paths.map(PathBuf::from));
        assert_eq!(names(["a/before.hlog", "a/after.hlog"]), ["before", "after"]);
        assert_eq!(names(["a/run.hlog", "b/run.hlog"]), ["a/run.hlog", "b/run.hlog"]);
    }

    #[test]
    fn what_both_have_is_compared() {
        let names = ["before".to_owned(), "after".to_owned()];
        let logs = [
            vec![recording("hit-64", 100), recording("miss-64", 500)],
            vec![recording("hit-64", 150), recording("inc-64", 30)],
        ];
        let (table, medians) = compare(&names, &logs).unwrap();
        assert_eq!(medians, [("hit-64 in after".to_owned(), 1.5)]);
        let text = table.to_string();
        assert!(text.contains("100 ns") && text.contains("150 ns") && !text.contains("miss-64"), "{text}");
        let error = compare(&names, &[logs[0].clone(), vec![recording("inc-8", 1)]]).unwrap_err();
        assert!(error.to_string().contains("before has hit-64, miss-64"), "{error}");
    }
}
