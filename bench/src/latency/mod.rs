//! Latency, one operation at a time.
//!
//! | operation | from | until |
//! |---|---|---|
//! | `hit` | the call of `get` on a row that the cache has | it returns |
//! | `in-place` | the call of `get` on a row of the server's own host, as the client reads it unless it is told to copy | it returns |
//! | `miss` | the call of `get` on a row that no cache keeps (Async): one READ | it returns |
//! | `many` | the call of `get_many` on [`ops::MANY`] such rows | it returns |
//! | `inc` | the call of `inc` | it returns |
//! | `clock` | the call of `clock` with one row updated | it returns: the update is posted |
//! | `visible` | the call of `inc` at one client, then `clock` | a `get` at another client returns the new value from its cache |
//! | `barrier` | the first of two `clock`s under BSP, of two clients, each followed by a `get` | the second `get` returns |
//!
//! **Closed loop.** Without `--rate`, an operation begins when the one before it has ended. Reading the time costs about as much as a hit. So `hit`,
//! `in-place` and `inc` are timed in groups of [`ops::GROUP`], and a sample is the mean of a group; everything else is timed one by one.
//!
//! **Open loop.** With `--rate`, operations are due at fixed times. A sample begins when its operation was due, even if the one before
//! it had not ended then. So a stall counts for all operations that were due in it (no coordinated omission), and nothing is grouped.
//!
//! What reading the time twice costs is measured and reported beside the figures. It is *not* subtracted from them.
//!
//! | module | what it is |
//! |---|---|
//! | [`ops`] | the operations, ready to be measured |
//! | [`load`] | how many operations, and when each begins |
//! | [`sizes`] | sizes on the command line |
//! | [`figures`] | results: tables, JSON, CSV |
//! | [`hlog`] | HdrHistogram logs, written and read; curves of percentiles |

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum, value_parser};
use hdrhistogram::Histogram;

use crate::{
    limits::Limit,
    perftest::{Beside, Perftest, PerftestOptions},
    report::write_json,
    server::{EmbeddedOptions, EmbeddedServer},
};

pub mod figures;
pub mod hlog;
pub mod load;
pub mod ops;
pub mod sizes;

use figures::Figures;
use hlog::Recording;
use load::{Load, Until};
use ops::Prepared;
use sizes::{Sizes, expand};

/// An operation whose latency is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Op {
    /// A `get` that the cache answers
    Hit,
    /// A `get` on the server's own host: in place if the client can do that, else as a hit
    InPlace,
    /// A `get` that takes one READ
    Miss,
    /// A `get_many` of 64 rows, each by a READ
    Many,
    /// An `inc` of a row
    Inc,
    /// A `clock` after one row was updated, until the update is posted
    Clock,
    /// The time from an `inc` at one client until another client's cache shows it
    Visible,
    /// Two clocks of two clients under BSP
    Barrier,
}

impl Op {
    /// All of them.
    pub const ALL: [Op; 8] =
        [Op::Hit, Op::InPlace, Op::Miss, Op::Many, Op::Inc, Op::Clock, Op::Visible, Op::Barrier];

    /// Its name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Op::Hit => "hit",
            Op::InPlace => "in-place",
            Op::Miss => "miss",
            Op::Many => "many",
            Op::Inc => "inc",
            Op::Clock => "clock",
            Op::Visible => "visible",
            Op::Barrier => "barrier",
        }
    }

    fn default_count(self) -> u64 {
        match self {
            Op::Hit | Op::InPlace | Op::Inc => 1_000_000,
            Op::Miss | Op::Clock => 100_000,
            Op::Many | Op::Visible | Op::Barrier => 10_000,
        }
    }

    /// Operations that are timed together in a closed loop.
    fn group(self) -> u64 {
        if matches!(self, Op::Hit | Op::InPlace | Op::Inc) { ops::GROUP } else { 1 }
    }

    /// The programs of perftest that together do the same over the network, and how often; none if there is none like it.
    ///
    /// A READ is there and back, and so is what `ib_read_lat` prints. `ib_send_lat` and `ib_write_lat` print one way. An update is a SEND to the
    /// server and then a WRITE to the reader; so is each clock of a barrier, and then the row is READ.
    fn perftest(self) -> Option<(&'static [&'static str], f64)> {
        match self {
            Op::Miss => Some((&["ib_read_lat"], 1.0)),
            Op::Visible => Some((&["ib_send_lat", "ib_write_lat"], 1.0)),
            Op::Barrier => Some((&["ib_send_lat", "ib_write_lat", "ib_read_lat"], 2.0)),
            Op::Hit | Op::InPlace | Op::Many | Op::Inc | Op::Clock => None,
        }
    }

    /// What the machine allows at best, for servers on this host.
    fn limit(self, size: u32) -> Option<Limit> {
        let (size, few) = (size as usize, ops::GROUP as usize);
        match self {
            Op::Hit | Op::InPlace | Op::Inc => Some(Limit::copy(size, few * size)),
            Op::Miss => Some(Limit::copy(size, ops::miss_bytes(size))),
            Op::Many => Some(Limit::copy(size, ops::miss_bytes(size)).times(ops::MANY as u64)),
            // To the server and to the reader.
            Op::Visible => Limit::lines(2),
            Op::Barrier => Limit::lines(4),
            Op::Clock => None,
        }
    }
}

/// Options of `fervor-bench latency`.
#[derive(Debug, Clone, Args)]
pub struct LatencyOptions {
    /// What to measure; may be repeated, or separated by commas [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub op: Vec<Op>,
    /// Bytes of a row, a multiple of 4; or a sweep that doubles the size, as in 2..65536. May be repeated, or separated by
    /// commas [default: 64,512,4096]
    #[arg(long, short = 's', value_name = "BYTES", value_delimiter = ',')]
    pub size: Vec<Sizes>,
    /// Number of operations of each kind and size [default: 1,000,000 of hit, in-place and inc, 100,000 of miss and clock,
    /// 10,000 of the others]
    #[arg(long, short = 'n', visible_aliases = ["iters", "count"], value_parser = value_parser!(u64).range(100..))]
    pub iterations: Option<u64>,
    /// Measure each kind and size for this many seconds, instead of a number of operations
    #[arg(long, short = 'D', value_name = "SECONDS", conflicts_with_all = ["iterations", "beside_perftest"])]
    pub duration: Option<f64>,
    /// Make this many operations due each second. The latency of each counts from the time when it was due, even if the
    /// operation before it ended later
    #[arg(long, value_name = "PER_SECOND", conflicts_with = "beside_perftest")]
    pub rate: Option<f64>,
    /// Write the figures to this file: an object for one operation and one size, else an array of objects
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the figures to this file, as comma-separated values
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Write the histograms to this file, as an HdrHistogram interval log (V2), in nanoseconds. `fervor-bench compare`
    /// reads it
    #[arg(long, value_name = "FILE")]
    pub hlog: Option<PathBuf>,
    /// Draw the percentiles to this file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Draw the runs of this log, written by --hlog, into the same picture; may be repeated
    #[arg(long, value_name = "FILE", requires = "svg")]
    pub svg_with: Vec<PathBuf>,
    /// Leave out the machine's own limits, which are measured for comparison
    #[arg(long)]
    pub no_limits: bool,
    /// Use this running server instead of starting one; may be repeated
    #[arg(long, value_name = "URL")]
    pub server: Vec<String>,
    /// The server that is started if none is named.
    #[command(flatten)]
    pub embedded: EmbeddedOptions,
    /// Fail if this takes more than RATIO times as long as perftest
    #[arg(long, value_name = "RATIO", requires = "beside_perftest")]
    pub max_ratio: Option<f64>,
    /// Measuring beside perftest.
    #[command(flatten)]
    pub perftest: PerftestOptions,
}

impl LatencyOptions {
    fn validate(&self) -> Result<()> {
        for (name, value) in [("duration", self.duration), ("rate", self.rate)] {
            if let Some(value) = value {
                ensure!(
                    value.is_finite() && value > 0.0 && value <= 1e9,
                    "--{name} {value}: write a number above 0 and at most 1e9"
                );
            }
        }
        if self.perftest.beside_perftest {
            let odd = self.ops().iter().find(|op| op.perftest().is_none());
            if let Some(odd) = odd {
                bail!(
                    "perftest has nothing like --op {}: --beside-perftest goes with --op miss, --op visible and --op barrier",
                    odd.name()
                );
            }
        }
        self.perftest.validate(&self.server)
    }

    fn ops(&self) -> &[Op] {
        if self.op.is_empty() { &Op::ALL } else { &self.op }
    }

    fn load(&self, op: Op) -> Load {
        let until = match self.duration {
            Some(seconds) => Until::Time(Duration::from_secs_f64(seconds)),
            None => Until::Count(self.iterations.unwrap_or(op.default_count())),
        };
        Load { until, rate: self.rate }
    }

    /// What the machine allows counts where the servers are on this machine.
    fn limit(&self, op: Op, size: u32) -> Option<Limit> {
        let here = self.server.iter().all(|url| url.starts_with("shm://"));
        (here && !self.no_limits).then(|| op.limit(size)).flatten()
    }

    /// Compares the ratios with perftest's with the bound.
    fn judge(&self, figures: &[Figures]) -> Result<()> {
        let Some(most) = self.max_ratio else { return Ok(()) };
        for figures in figures {
            if let Some(Beside { tool, ratio, .. }) =
                figures.beside.as_ref().filter(|beside| beside.ratio > most)
            {
                bail!(
                    "{} of {} bytes takes {ratio:.2} times as long as {tool}: more than {most} times, the --max-ratio",
                    figures.op,
                    figures.size
                );
            }
        }
        Ok(())
    }
}

/// Runs `fervor-bench latency`.
///
/// # Errors
/// Options that make no sense, a server or perftest that fails, a ratio above the bound.
pub fn run(options: &LatencyOptions) -> Result<()> {
    options.validate()?;
    let sizes = expand(&options.size, &[64, 512, 4096])?;
    // Read before anything is measured: a file may be missing.
    let mut recordings = Vec::new();
    for path in &options.svg_with {
        recordings.extend(hlog::read_named(path)?);
    }
    let mut embedded = match options.server.is_empty() {
        true => Some(EmbeddedServer::start(&options.embedded, 4, 4)?),
        false => None,
    };
    let urls = embedded.as_ref().map_or(options.server.clone(), |server| vec![server.url().to_owned()]);
    let mut all = Vec::new();
    for &op in options.ops() {
        for &size in &sizes {
            let measured = measure(options, &urls, op, size)
                .with_context(|| format!("measuring {} with rows of {size} bytes", op.name()));
            match (measured, embedded.as_mut().map_or(Ok(()), EmbeddedServer::check)) {
                (Ok(measured), _) => all.push(measured),
                (Err(error), Ok(())) => return Err(error),
                // If the server has died, that is why.
                (Err(error), Err(cause)) => return Err(cause.context(error)),
            }
        }
    }
    let (figures, histograms): (Vec<_>, Vec<_>) = all.into_iter().unzip();
    print!("{}", figures::Table(&figures));
    match (&options.json, figures.as_slice()) {
        (Some(path), [one]) => write_json(path, one)?,
        (Some(path), several) => write_json(path, &several)?,
        (None, _) => {}
    }
    if let Some(path) = &options.csv {
        fs::write(path, figures::csv(&figures))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let own: Vec<Recording> =
        figures.iter().zip(histograms).map(|(figures, histogram)| figures.recording(histogram)).collect();
    if let Some(path) = &options.hlog {
        hlog::write(path, &own)?;
    }
    if let Some(path) = &options.svg {
        recordings.splice(..0, own);
        fs::write(path, hlog::draw(&recordings)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    options.judge(&figures)
}

/// Measures one operation at one size: in one go, or in turns with perftest.
fn measure(
    options: &LatencyOptions,
    urls: &[String],
    op: Op,
    size: u32,
) -> Result<(Figures, Histogram<u64>)> {
    let load = options.load(op);
    let mut histogram = ops::histogram();
    let mut prepared = Prepared::new(urls, op, size)?;
    let mut beside = None;
    let mut read_instead = 0;
    match op.perftest().filter(|_| options.perftest.beside_perftest) {
        None => read_instead += prepared.measure(load, &mut histogram)?,
        Some((tools, times)) => {
            let count = options.iterations.unwrap_or(op.default_count());
            let mut rounds = Vec::new();
            for _ in 0..options.perftest.rounds {
                let mut round = ops::histogram();
                read_instead += prepared.measure(load, &mut round)?;
                let mut theirs = 0.0;
                for tool in tools {
                    theirs += times * Perftest::new(tool, &options.perftest.ends).median_ns(size, count)?;
                }
                rounds.push((round.value_at_quantile(0.5) as f64, theirs));
                histogram.add(&round).context("the histograms are alike")?;
            }
            let sum = tools.join(" + ");
            let name = if times == 1.0 { sum } else { format!("{times} x ({sum})") };
            beside = Some(Beside::new(&name, &rounds));
        }
    }
    prepared.close()?;
    let limit = options.limit(op, size);
    let group = if options.rate.is_some() { 1 } else { op.group() };
    let figures = Figures {
        read_instead,
        limit,
        beside,
        rate: options.rate,
        ..Figures::new(op, size, group, urls, &histogram)
    };
    Ok((figures, histogram))
}
