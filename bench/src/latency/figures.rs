//! The figures of a measurement: as a table, as JSON, and as an HdrHistogram log.

use std::{
    fmt,
    fs::File,
    io::{BufWriter, Write as _},
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, anyhow};
use hdrhistogram::{
    Histogram,
    serialization::{
        V2DeflateSerializer,
        interval_log::{IntervalLogWriterBuilder, Tag},
    },
};
use serde::{Deserialize, Serialize};

use super::{Op, ops, perftest::Beside};
use crate::{machine::Machine, report::TextTable};

/// The latency of one operation at one size, in nanoseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// `hit`, `miss` or `visible`.
    pub op: String,
    /// Bytes of a row.
    pub size: u32,
    /// Operations measured.
    pub count: u64,
    /// Operations in a sample: the percentiles of samples of several are those of their means.
    pub group: u64,
    /// The median.
    pub p50_ns: u64,
    /// 90 % of the samples are at most this.
    pub p90_ns: u64,
    /// 99 % of the samples are at most this.
    pub p99_ns: u64,
    /// 99.9 % of the samples are at most this.
    pub p999_ns: u64,
    /// The longest.
    pub max_ns: u64,
    /// The mean.
    pub mean_ns: f64,
    /// What reading the time twice costs. Each sample contains it; it is not subtracted.
    pub timer_ns: u64,
    /// Where the servers listen.
    pub servers: Vec<String>,
    /// The same by perftest, if it was measured.
    pub beside: Option<Beside>,
    /// Where this was measured.
    pub machine: Machine,
}

impl Figures {
    /// The figures of `histogram`.
    pub fn new(
        op: Op,
        size: u32,
        urls: &[String],
        histogram: &Histogram<u64>,
        beside: Option<Beside>,
    ) -> Self {
        let group = if op == Op::Hit { ops::GROUP } else { 1 };
        let at = |quantile| histogram.value_at_quantile(quantile);
        Figures {
            op: op.name().into(),
            size,
            count: histogram.len() * group,
            group,
            p50_ns: at(0.5),
            p90_ns: at(0.9),
            p99_ns: at(0.99),
            p999_ns: at(0.999),
            max_ns: histogram.max(),
            mean_ns: histogram.mean(),
            timer_ns: ops::timer_ns(),
            servers: urls.to_vec(),
            beside,
            machine: Machine::this(),
        }
    }
}

/// Figures, for people.
#[derive(Debug)]
pub struct Table<'a>(pub &'a [Figures]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(first) = self.0.first() else { return Ok(()) };
        writeln!(f, "{}", first.machine)?;
        let mut table = TextTable::new(["op", "bytes", "p50", "p90", "p99", "p99.9", "max", "mean", "count"]);
        for figures in self.0 {
            table.row([
                figures.op.clone(),
                figures.size.to_string(),
                time(figures.p50_ns as f64),
                time(figures.p90_ns as f64),
                time(figures.p99_ns as f64),
                time(figures.p999_ns as f64),
                time(figures.max_ns as f64),
                time(figures.mean_ns),
                figures.count.to_string(),
            ]);
        }
        write!(f, "{table}")?;
        writeln!(f, "Each sample contains {} ns for reading the time twice.", first.timer_ns)?;
        if let Some(grouped) = self.0.iter().find(|figures| figures.group > 1) {
            writeln!(
                f,
                "A sample of `{}` is the mean of {} operations timed together.",
                grouped.op, grouped.group
            )?;
        }
        let beside: Vec<_> =
            self.0.iter().filter_map(|figures| Some((figures, figures.beside.as_ref()?))).collect();
        if beside.is_empty() {
            return Ok(());
        }
        let mut table =
            TextTable::new(["op", "bytes", "best median", "perftest", "best median", "ratio", "rounds"]);
        for (figures, beside) in beside {
            table.row([
                figures.op.clone(),
                figures.size.to_string(),
                time(beside.best_ours_ns),
                beside.tool.clone(),
                time(beside.best_theirs_ns),
                format!("{:.2}", beside.ratio),
                beside.rounds.len().to_string(),
            ]);
        }
        write!(f, "\n{table}")
    }
}

/// Nanoseconds, for people.
pub fn time(nanoseconds: f64) -> String {
    match nanoseconds {
        ns if ns < 1e3 => format!("{ns:.0} ns"),
        ns if ns < 1e6 => format!("{:.2} µs", ns / 1e3),
        ns if ns < 1e9 => format!("{:.2} ms", ns / 1e6),
        ns => format!("{:.2} s", ns / 1e9),
    }
}

/// Writes the histograms as an interval log, one interval for each operation and size, tagged `op-size`.
///
/// # Errors
/// When the file cannot be written.
pub fn write_hlog(path: &Path, figures: &[Figures], histograms: &[Histogram<u64>]) -> Result<()> {
    let failed = || format!("cannot write {}", path.display());
    let mut file = BufWriter::new(File::create(path).with_context(failed)?);
    let mut serializer = V2DeflateSerializer::new();
    {
        let mut log = IntervalLogWriterBuilder::new()
            .add_comment("latencies in nanoseconds, by fervor-bench latency")
            .with_start_time(SystemTime::now())
            .with_max_value_divisor(1e6)
            .begin_log_with(&mut file, &mut serializer)
            .with_context(failed)?;
        for (figures, histogram) in figures.iter().zip(histograms) {
            let tag = format!("{}-{}", figures.op, figures.size);
            let tag = Tag::new(&tag).context("the tag has no forbidden character")?;
            let length = Duration::from_secs_f64(figures.mean_ns * figures.count as f64 / 1e9);
            log.write_histogram(histogram, Duration::ZERO, length, Some(tag))
                .map_err(|error| anyhow!("{error:?}"))
                .with_context(failed)?;
        }
    }
    file.flush().with_context(failed)
}
