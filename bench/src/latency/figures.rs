//! The figures of a measurement: as a table with perftest's columns, as JSON, and as comma-separated values.

use std::{fmt, time::Duration};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::{Op, hlog::Recording, ops};
use crate::{
    limits::Limit,
    machine::Machine,
    perftest::Beside,
    report::{TextTable, time},
};

/// The latency of one operation at one size, in nanoseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// `hit`, `miss` …
    pub op: String,
    /// Bytes of a row.
    pub size: u32,
    /// Operations measured.
    pub count: u64,
    /// Operations in a sample: the percentiles of samples of several are those of their means.
    pub group: u64,
    /// Operations that were due in a second, in an open loop.
    pub rate: Option<f64>,
    /// The shortest.
    pub min_ns: u64,
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
    /// The standard deviation.
    pub stdev_ns: f64,
    /// What reading the time twice costs. Each sample contains it; it is not subtracted.
    pub timer_ns: u64,
    /// Of `visible`: updates while the reader waited for which it had to READ the row once or more.
    pub read_instead: u64,
    /// What the machine allows, if it was measured.
    pub limit: Option<Limit>,
    /// Where the servers listen.
    pub servers: Vec<String>,
    /// The same by perftest, if it was measured.
    pub beside: Option<Beside>,
    /// Where this was measured.
    pub machine: Machine,
}

impl Figures {
    /// The figures of `histogram`, whose samples are of `group` operations each.
    pub fn new(op: Op, size: u32, group: u64, urls: &[String], histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile);
        Figures {
            op: op.name().into(),
            size,
            count: histogram.len() * group,
            group,
            rate: None,
            min_ns: histogram.min(),
            p50_ns: at(0.5),
            p90_ns: at(0.9),
            p99_ns: at(0.99),
            p999_ns: at(0.999),
            max_ns: histogram.max(),
            mean_ns: histogram.mean(),
            stdev_ns: histogram.stdev(),
            timer_ns: ops::timer_ns(),
            read_instead: 0,
            limit: None,
            servers: urls.to_vec(),
            beside: None,
            machine: Machine::this(),
        }
    }

    /// With the histogram that they are of.
    pub fn recording(&self, histogram: Histogram<u64>) -> Recording {
        let length = Duration::from_secs_f64(self.mean_ns * self.count as f64 / 1e9);
        Recording { name: format!("{}-{}", self.op, self.size), histogram, length }
    }
}

/// Comma-separated values, with a head.
pub fn csv(figures: &[Figures]) -> String {
    let mut text =
        "op,bytes,iterations,group,rate,min_ns,p50_ns,p90_ns,p99_ns,p99.9_ns,max_ns,mean_ns,stdev_ns\n"
            .to_owned();
    for f in figures {
        let rate = f.rate.map_or(String::new(), |rate| rate.to_string());
        text += &format!(
            "{},{},{},{},{rate},{},{},{},{},{},{},{:.1},{:.1}\n",
            f.op,
            f.size,
            f.count,
            f.group,
            f.min_ns,
            f.p50_ns,
            f.p90_ns,
            f.p99_ns,
            f.p999_ns,
            f.max_ns,
            f.mean_ns,
            f.stdev_ns
        );
    }
    text
}

/// Figures, for people.
#[derive(Debug)]
pub struct Table<'a>(pub &'a [Figures]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(first) = self.0.first() else { return Ok(()) };
        writeln!(f, "{}", first.machine)?;
        let mut table = TextTable::new([
            "op",
            "#bytes",
            "#iterations",
            "t_min[usec]",
            "t_max[usec]",
            "t_typical[usec]",
            "t_avg[usec]",
            "t_stdev[usec]",
            "99% percentile[usec]",
            "99.9% percentile[usec]",
        ]);
        let microseconds = |ns: f64| format!("{:.3}", ns / 1e3);
        for figures in self.0 {
            table.row([
                figures.op.clone(),
                figures.size.to_string(),
                figures.count.to_string(),
                microseconds(figures.min_ns as f64),
                microseconds(figures.max_ns as f64),
                microseconds(figures.p50_ns as f64),
                microseconds(figures.mean_ns),
                microseconds(figures.stdev_ns),
                microseconds(figures.p99_ns as f64),
                microseconds(figures.p999_ns as f64),
            ]);
        }
        write!(f, "{table}")?;
        writeln!(f, "Each sample contains {} ns for reading the time twice.", first.timer_ns)?;
        let mut grouped: Vec<&str> = self.0.iter().filter(|f| f.group > 1).map(|f| &*f.op).collect();
        grouped.dedup();
        if !grouped.is_empty() {
            writeln!(
                f,
                "A sample of {} is the mean of {} operations timed together.",
                grouped.join(", "),
                ops::GROUP
            )?;
        }
        if let Some(rate) = first.rate {
            writeln!(
                f,
                "{rate} operations were due in a second; a sample counts from when its operation was due."
            )?;
        }
        for figures in self.0.iter().filter(|figures| figures.read_instead > 0) {
            writeln!(
                f,
                "{} of {} updates of {} bytes came while the reader had to READ: its copy was being written.",
                figures.read_instead, figures.count, figures.size
            )?;
        }
        self.write_limits(f)?;
        self.write_beside(f)
    }
}

impl Table<'_> {
    fn write_limits(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = TextTable::new(["op", "#bytes", "median", "limit", "ratio", "what the limit is"]);
        for figures in self.0 {
            let Some(limit) = &figures.limit else { continue };
            let median = figures.p50_ns as f64;
            let bound = if limit.ns < 100.0 { format!("{:.1} ns", limit.ns) } else { time(limit.ns) };
            table.row([
                figures.op.clone(),
                figures.size.to_string(),
                time(median),
                bound,
                format!("{:.2}", median / limit.ns),
                limit.name.clone(),
            ]);
        }
        if table.rows().len() > 1 { write!(f, "\n{table}") } else { Ok(()) }
    }

    fn write_beside(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table =
            TextTable::new(["op", "#bytes", "best median", "perftest", "best median", "ratio", "rounds"]);
        for figures in self.0 {
            let Some(beside) = &figures.beside else { continue };
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
        if table.rows().len() > 1 { write!(f, "\n{table}") } else { Ok(()) }
    }
}
