//! Throughput: how many rows a second, and how many bytes.
//!
//! | operation | what each worker does | a row counts when |
//! |---|---|---|
//! | `hit` | `get` of rows that the cache has | it was read |
//! | `in-place` | `get` on the server's own host, as the client reads unless it is told to copy | it was read |
//! | `read` | `get` of rows that no cache keeps (Async): one READ at a time | it was read |
//! | `many-hit` | `get_many` of `--batch` rows that the cache has | it was read |
//! | `many-in-place` | the same on the server's own host, read as `in-place` does | it was read |
//! | `range` | `get_range` of `--batch` adjacent rows there | it was read |
//! | `many-read` | `get_many` of `--batch` rows, with `--outstanding` READs in flight | it was read |
//! | `inc` | `inc` of `--batch` rows of its own, then `clock` | its update was applied: the time until the servers have acknowledged all of them counts |
//! | `push` | under ESSP(3): adds to one element of each row of a batch, of four in turn, then `clock`; a second client holds all rows, the workers' own but a few | the server has pushed the whole row to the second client |
//!
//! The workers are threads of one client. Bytes are those of the rows, without headers. Each setting has a server of its own, unless one is
//! named, and runs for `--duration`; `BW peak` is the best tenth of a second.
//!
//! Columns are those of perftest: `MB/sec` is 2^20 bytes a second, and a message is a row.
//!
//! | module | what it is |
//! |---|---|
//! | [`workers`] | the threads that move rows, and the one that watches them |
//! | [`report`] | the figures, and perftest's beside them |

use std::{path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum, value_parser};
use fervor_client::{Model, ReadLanes};

use crate::{
    connect::ReadOptions,
    latency::{
        ops,
        sizes::{Sizes, expand},
    },
    limits::Limit,
    machine::Machine,
    perftest::{Perftest, PerftestOptions},
    report::write_json,
    server::{EmbeddedOptions, EmbeddedServer},
    stream,
};

pub mod report;
mod workers;

use report::{Beside, Row, Throughput, judge};
use workers::{Moved, move_rows};

/// WRITEs that perftest has outstanding beside pushes.
const WRITES: u32 = 128;

/// Clocks that workers may be ahead of what was pushed, the present one included: so many batches of rows has each of them.
const CLOCKS: u64 = 4;

/// An operation whose throughput is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Op {
    /// `get` from the cache
    Hit,
    /// `get` on the server's own host: in place if the client can do that, else from the cache
    InPlace,
    /// `get`, one READ at a time
    Read,
    /// `get_many` from the cache
    ManyHit,
    /// `get_many` on the server's own host, as for in-place
    ManyInPlace,
    /// `get_range` on the server's own host, as for in-place
    Range,
    /// `get_many`, several READs at a time
    ManyRead,
    /// `inc` of many rows, then `clock`
    Inc,
    /// Updates of one element a row, after which the server pushes the whole rows to another client
    Push,
}

impl Op {
    /// All of them.
    pub const ALL: [Op; 9] = [
        Op::Hit,
        Op::InPlace,
        Op::Read,
        Op::ManyHit,
        Op::ManyInPlace,
        Op::Range,
        Op::ManyRead,
        Op::Inc,
        Op::Push,
    ];

    /// Its name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Op::Hit => "hit",
            Op::InPlace => "in-place",
            Op::Read => "read",
            Op::ManyHit => "many-hit",
            Op::ManyInPlace => "many-in-place",
            Op::Range => "range",
            Op::ManyRead => "many-read",
            Op::Inc => "inc",
            Op::Push => "push",
        }
    }

    fn model(self) -> Model {
        match self {
            // Nobody is ever too far behind to read.
            Op::Hit | Op::InPlace | Op::ManyHit | Op::ManyInPlace | Op::Range => {
                Model::Essp { staleness: 1 << 20 }
            }
            Op::Read | Op::ManyRead | Op::Inc => Model::Async,
            Op::Push => Model::Essp { staleness: CLOCKS as u32 - 1 },
        }
    }

    /// Whether copies are read: all but a few operations are about what happens over a network.
    fn copies(self) -> bool {
        !matches!(self, Op::InPlace | Op::ManyInPlace | Op::Range)
    }

    /// Whether each worker has rows of its own.
    fn writes(self) -> bool {
        matches!(self, Op::Inc | Op::Push)
    }

    /// The program of perftest that does the same over the network, and how much it has outstanding.
    fn perftest(self, outstanding: u32) -> Option<(&'static str, u32)> {
        match self {
            Op::Read => Some(("ib_read_bw", 1)),
            Op::ManyRead => Some(("ib_read_bw", outstanding)),
            Op::Push => Some(("ib_write_bw", WRITES)),
            _ => None,
        }
    }
}

/// Options of `fervor-bench throughput`.
#[derive(Debug, Clone, Args)]
pub struct ThroughputOptions {
    /// What to measure; may be repeated, or separated by commas [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub op: Vec<Op>,
    /// Bytes of a row, a multiple of 4; or a sweep that doubles the size, as in 2..65536. May be repeated, or separated by
    /// commas [default: 64,512,4096]
    #[arg(long, short = 's', value_name = "BYTES", value_delimiter = ',')]
    pub size: Vec<Sizes>,
    /// Numbers of workers, separated by commas
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1", value_parser = value_parser!(u16).range(1..=1024))]
    pub workers: Vec<u16>,
    /// Numbers of shards of the server that is started, separated by commas
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1", conflicts_with = "server", value_parser = value_parser!(u32).range(1..=256))]
    pub shards: Vec<u32>,
    /// For many-read: numbers of READs in flight to one shard, separated by commas
    #[arg(long, short = 'o', value_name = "LIST", value_delimiter = ',', default_value = "16", value_parser = value_parser!(u32).range(1..=1024))]
    pub outstanding: Vec<u32>,
    /// For read and many-read: connections to a shard that the workers share; `per-worker`: each worker has its own
    #[arg(long, value_name = "N", default_value_t)]
    pub read_lanes: ReadLanes,
    /// Rows of one get_many or get_range, and rows that are updated between two clocks
    #[arg(long, default_value_t = 256, value_name = "ROWS", value_parser = value_parser!(u32).range(1..=1 << 20))]
    pub batch: u32,
    /// How long each setting is measured
    #[arg(long, short = 'D', default_value_t = 0.5, value_name = "SECONDS")]
    pub duration: f64,
    /// Use this running server instead of starting one; may be repeated
    #[arg(long, value_name = "URL")]
    pub server: Vec<String>,
    /// Memory of the server that is started
    #[arg(long, default_value = "512M", value_name = "SIZE", conflicts_with = "server")]
    pub memory: String,
    /// Leave out the machine's own limits, which are measured for comparison
    #[arg(long)]
    pub no_limits: bool,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// For push: start the server at tcp://127.0.0.1, take turns with a bare TCP stream over loopback, as iperf3 sends one, and show the
    /// ratio
    #[arg(long, conflicts_with_all = ["server", "beside_perftest"])]
    pub beside_stream: bool,
    /// Fail if this moves less than RATIO times as much as what it is measured beside
    #[arg(long, value_name = "RATIO")]
    pub min_ratio: Option<f64>,
    /// Measuring beside perftest.
    #[command(flatten)]
    pub perftest: PerftestOptions,
}

impl ThroughputOptions {
    fn ops(&self) -> &[Op] {
        if self.op.is_empty() { &Op::ALL } else { &self.op }
    }

    fn validate(&self) -> Result<()> {
        ensure!(
            self.duration > 0.0 && self.duration <= 86_400.0,
            "--duration {}: write a number of seconds above 0 and at most 86400",
            self.duration
        );
        if self.perftest.beside_perftest
            && let Some(odd) = self.ops().iter().find(|op| op.perftest(1).is_none())
        {
            bail!(
                "perftest has nothing like --op {}: --beside-perftest goes with --op read, --op many-read and --op push",
                odd.name()
            );
        }
        if self.beside_stream
            && let Some(odd) = self.ops().iter().find(|op| **op != Op::Push)
        {
            bail!("a stream has nothing like --op {}: --beside-stream goes with --op push", odd.name());
        }
        ensure!(
            self.min_ratio.is_none() || self.beside_stream || self.perftest.beside_perftest,
            "--min-ratio goes with --beside-perftest or --beside-stream: there is nothing to compare with"
        );
        self.perftest.validate(&self.server)
    }
}

/// What a setting is measured in turns with.
enum Rival<'a> {
    Perftest { options: &'a PerftestOptions, tool: &'static str, depth: u32 },
    Stream(Duration),
}

impl Rival<'_> {
    fn tool(&self) -> &'static str {
        match self {
            Self::Perftest { tool, .. } => tool,
            Self::Stream(_) => "TCP stream",
        }
    }

    /// Bytes a second of it, with about `count` messages of `size` bytes.
    fn measure(&self, size: u32, count: u64) -> Result<f64> {
        match self {
            Self::Perftest { options, tool, depth } => {
                let perftest = Perftest::new(tool, &options.ends);
                Ok(perftest.bandwidth(size, count.clamp(100, 1_000_000), *depth)?.average)
            }
            Self::Stream(duration) => stream::bandwidth(*duration),
        }
    }
}

/// What is measured at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Setting {
    op: Op,
    size: u32,
    workers: u16,
    shards: u32,
    outstanding: u32,
    batch: u32,
    read_lanes: ReadLanes,
}

impl Setting {
    /// How its workers read.
    fn reads(&self) -> ReadOptions {
        ReadOptions { copies: self.op.copies(), read_lanes: self.read_lanes }
    }

    /// Rows of the table.
    fn rows(&self) -> u64 {
        let batch = u64::from(self.batch);
        match self.op {
            Op::Read | Op::ManyRead => {
                let size = self.size as usize;
                ((ops::miss_bytes(size) / size) as u64).next_multiple_of(batch)
            }
            Op::Push => CLOCKS * batch * u64::from(self.workers),
            Op::Inc => batch * u64::from(self.workers),
            _ => batch,
        }
    }

    /// What one worker can do at best: a copy of each row, or of all rows of one call at once.
    fn limit(&self) -> Limit {
        let (size, batch) = (self.size as usize, self.size as usize * self.batch as usize);
        match self.op {
            Op::ManyHit | Op::ManyInPlace | Op::Range => Limit::copy(batch, batch),
            _ => Limit::copy(size, size * self.rows().min(self.batch.into()) as usize),
        }
    }
}

/// Runs `fervor-bench throughput`.
///
/// # Errors
/// Options that make no sense, a server or perftest that fails, a ratio below the bound.
pub fn run(options: &ThroughputOptions) -> Result<()> {
    options.validate()?;
    let rows = settings(options)?
        .into_iter()
        .map(|setting| {
            measure(options, setting).with_context(|| {
                format!("measuring {} with rows of {} bytes", setting.op.name(), setting.size)
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let throughput = Throughput { machine: Machine::this(), rows };
    print!("{throughput}");
    if let Some(path) = &options.json {
        write_json(path, &throughput)?;
    }
    judge(&throughput.rows, options.min_ratio)
}

fn settings(options: &ThroughputOptions) -> Result<Vec<Setting>> {
    let sizes = expand(&options.size, &[64, 512, 4096])?;
    let mut settings = Vec::new();
    for &op in options.ops() {
        for &size in &sizes {
            for &workers in &options.workers {
                for &shards in &options.shards {
                    let several = if op == Op::ManyRead { &options.outstanding[..] } else { &[16] };
                    settings.extend(several.iter().map(|&outstanding| Setting {
                        op,
                        size,
                        workers,
                        shards,
                        outstanding,
                        batch: options.batch,
                        read_lanes: options.read_lanes,
                    }));
                }
            }
        }
    }
    Ok(settings)
}

/// Measures one setting: in one go, or in turns with something else.
fn measure(options: &ThroughputOptions, setting: Setting) -> Result<Row> {
    let Setting { op, size, workers, shards, outstanding, batch, .. } = setting;
    let embedded = match options.server.is_empty() {
        true => {
            let server = EmbeddedOptions { shards, memory: options.memory.clone() };
            let lanes = setting.reads().lanes(workers);
            Some(match options.beside_stream {
                true => EmbeddedServer::start_at("tcp://127.0.0.1:0", &server, 2, lanes)?,
                false => EmbeddedServer::start(&server, 2, lanes)?,
            })
        }
        false => None,
    };
    let urls = embedded.as_ref().map_or(options.server.clone(), |server| vec![server.url().to_owned()]);
    let duration = Duration::from_secs_f64(options.duration);
    let bytes = f64::from(size);
    let rival = match op.perftest(outstanding).filter(|_| options.perftest.beside_perftest) {
        Some((tool, depth)) => Some(Rival::Perftest { options: &options.perftest, tool, depth }),
        None => options.beside_stream.then_some(Rival::Stream(duration)),
    };
    let mut beside = None;
    let moved = match rival {
        None => move_rows(&urls, setting, duration)?,
        Some(rival) => {
            let (mut best, mut rounds) = (None::<Moved>, Vec::new());
            for _ in 0..options.perftest.rounds {
                let moved = move_rows(&urls, setting, duration)?;
                let rate = |moved: &Moved| moved.rows as f64 / moved.seconds;
                let theirs = rival.measure(size, (rate(&moved) * options.duration) as u64)?;
                rounds.push((rate(&moved) * bytes, theirs));
                if best.is_none_or(|best| rate(&best) < rate(&moved)) {
                    best = Some(moved);
                }
            }
            beside = Some(Beside::new(rival.tool(), rounds));
            best.context("there was no round")?
        }
    };
    let here = !options.beside_stream && options.server.iter().all(|url| url.starts_with("shm://"));
    let rows_per_second = moved.rows as f64 / moved.seconds;
    Ok(Row {
        op: op.name().into(),
        size,
        workers,
        shards: embedded.is_some().then_some(shards),
        outstanding: (op == Op::ManyRead).then_some(outstanding),
        batch,
        iterations: moved.rows,
        seconds: moved.seconds,
        rows_per_second,
        bytes_per_second: rows_per_second * bytes,
        peak_bytes_per_second: moved.peak * bytes,
        limit: (here && !options.no_limits).then(|| setting.limit()),
        beside,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn setting(op: Op) -> Setting {
        let read_lanes = ReadLanes::default();
        Setting { op, size: 64, workers: 3, shards: 1, outstanding: 16, batch: 100, read_lanes }
    }

    #[test]
    fn tables_are_as_large_as_the_operation_needs() {
        assert_eq!(setting(Op::Hit).rows(), 100);
        assert_eq!(setting(Op::ManyHit).rows(), 100);
        assert_eq!(setting(Op::Inc).rows(), 300);
        assert_eq!(setting(Op::Push).rows(), 1200);
        let rows = setting(Op::ManyRead).rows();
        assert!(rows.is_multiple_of(100) && rows >= (4 << 20) / 64, "{rows}");
    }
}
