//! Latency, ping by ping: one operation at a time, from the call to its result.
//!
//! | operation | from | until |
//! |---|---|---|
//! | `hit` | the call of `get` on a row that the cache has | it returns |
//! | `miss` | the call of `get` on a row that no cache keeps (Async): one READ | it returns |
//! | `visible` | the call of `inc` at one client, then `clock` | a `get` at another client returns the new value from its cache |
//!
//! Reading the time costs about as much as a hit. So hits are timed in groups of [`ops::GROUP`], and a sample is the
//! mean of a group; everything else is timed one by one. What reading the time twice costs is measured and
//! reported beside the figures, and *not* subtracted from them.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum, value_parser};
use hdrhistogram::Histogram;

use crate::{
    report::write_json,
    server::{EmbeddedOptions, EmbeddedServer},
};

pub mod figures;
pub mod ops;
pub mod perftest;

use figures::Figures;
use ops::Prepared;
use perftest::{Beside, Perftest};

/// An operation whose latency is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Op {
    /// A `get` that the cache answers
    Hit,
    /// A `get` that takes one READ
    Miss,
    /// From `inc` at one client until another client's cache shows it
    Visible,
}

impl Op {
    /// Its name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Op::Hit => "hit",
            Op::Miss => "miss",
            Op::Visible => "visible",
        }
    }

    fn default_count(self) -> u64 {
        match self {
            Op::Hit => 1_000_000,
            Op::Miss => 100_000,
            Op::Visible => 10_000,
        }
    }
}

/// Options of `fervor-bench latency`.
#[derive(Debug, Clone, Args)]
pub struct LatencyOptions {
    /// What to measure; may be repeated [default: all]
    #[arg(long, value_enum)]
    pub op: Vec<Op>,
    /// Bytes of a row, a multiple of 8; may be repeated [default: 64, 512 and 4096]
    #[arg(long, value_name = "BYTES", value_parser = value_parser!(u32).range(8..=1 << 20))]
    pub size: Vec<u32>,
    /// How many operations of each kind and size [default: 1,000,000 hits, 100,000 misses, 10,000 updates]
    #[arg(long, value_parser = value_parser!(u64).range(100..))]
    pub count: Option<u64>,
    /// Write the figures to this file: an object if there is one operation and one size, else an array of them
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the histograms to this file, as an HdrHistogram interval log (V2), in nanoseconds
    #[arg(long, value_name = "FILE")]
    pub hlog: Option<PathBuf>,
    /// Use this running server instead of starting one; may be repeated
    #[arg(long, value_name = "URL")]
    pub server: Vec<String>,
    /// The server that is started if none is named.
    #[command(flatten)]
    pub embedded: EmbeddedOptions,
    /// Measuring beside perftest.
    #[command(flatten)]
    pub perftest: perftest::PerftestOptions,
}

impl LatencyOptions {
    fn validate(&self) -> Result<()> {
        for size in &self.size {
            ensure!(size % 8 == 0, "--size {size}: the elements are 8 bytes each, so it is a multiple of 8");
        }
        self.perftest.validate(&self.op)
    }
}

/// Runs `fervor-bench latency`.
///
/// # Errors
/// Options that make no sense, a server or perftest that fails, a ratio above the gate.
pub fn run(options: &LatencyOptions) -> Result<()> {
    options.validate()?;
    let embedded = match options.server.is_empty() {
        true => Some(EmbeddedServer::start(&options.embedded, 4, 4)?),
        false => None,
    };
    let urls = embedded.as_ref().map_or(options.server.clone(), |server| vec![server.url().to_owned()]);
    let ops: &[Op] = if options.op.is_empty() { &[Op::Hit, Op::Miss, Op::Visible] } else { &options.op };
    let sizes: &[u32] = if options.size.is_empty() { &[64, 512, 4096] } else { &options.size };
    let mut all = Vec::new();
    for &op in ops {
        for &size in sizes {
            let count = options.count.unwrap_or(op.default_count());
            let measured = measure(options, &urls, op, size, count)
                .with_context(|| format!("measuring {} with rows of {size} bytes", op.name()))?;
            all.push(measured);
        }
    }
    let (figures, histograms): (Vec<_>, Vec<_>) = all.into_iter().unzip();
    print!("{}", figures::Table(&figures));
    match (&options.json, figures.as_slice()) {
        (Some(path), [one]) => write_json(path, one)?,
        (Some(path), several) => write_json(path, &several)?,
        (None, _) => {}
    }
    if let Some(path) = &options.hlog {
        figures::write_hlog(path, &figures, &histograms)?;
    }
    options.perftest.judge(&figures)
}

/// Measures one operation at one size: in one go, or in turns with perftest.
fn measure(
    options: &LatencyOptions,
    urls: &[String],
    op: Op,
    size: u32,
    count: u64,
) -> Result<(Figures, Histogram<u64>)> {
    let mut histogram = ops::histogram();
    let mut prepared = Prepared::new(urls, op, size)?;
    let mut beside = None;
    match Perftest::new(&options.perftest, op, size, count)? {
        None => prepared.measure(count, &mut histogram)?,
        Some(mut perftest) => {
            let mut rounds = Vec::new();
            for _ in 0..options.perftest.rounds {
                let mut round = ops::histogram();
                prepared.measure(count, &mut round)?;
                let theirs = perftest.median_ns()?;
                rounds.push((round.value_at_quantile(0.5) as f64, theirs));
                histogram.add(&round).context("the histograms are alike")?;
            }
            beside = Some(Beside::new(perftest.tool(), &rounds));
        }
    }
    prepared.close()?;
    Ok((Figures::new(op, size, urls, &histogram, beside), histogram))
}
