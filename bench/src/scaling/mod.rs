//! How a job gets faster with more workers, beside as many plain threads.
//!
//! The job is [`mf`] or [`lda`], run exactly as those commands run it: a server process, client processes, worker threads. For 1, 2,
//! 4 … workers it runs with every model and number of shards that were asked for, once with the workers as clients of one worker
//! and once as one client of many. Before each group it runs with as many plain threads and no server.
//!
//! All of these take turns, `--rounds` times, so that a slow minute of the machine falls on all of them alike. The figures are medians over
//! the rounds. A ratio compares the seconds of a job with those of the plain threads of the same run.
//!
//! | module | what it is |
//! |---|---|
//! | [`settings`] | what is run, as command lines of the jobs |
//! | [`report`] | the medians: table, bound, figure |

use std::{
    fmt, fs,
    io::IsTerminal as _,
    path::PathBuf,
    str::FromStr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum, value_parser};

use crate::{
    connect::ReadOptions,
    job::report::Run,
    lda::{self, LdaOptions},
    machine::Machine,
    mf::{self, MfOptions},
    model::ModelName,
    report::{median, write_json},
};

pub mod report;
mod settings;

use report::{Row, Scaling, draw, judge};
use settings::{Group, Setting, arguments, describe, in_words, parsed, settings_of, steps, title};

/// A job that is run with more and more workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Job {
    /// Matrix factorisation
    Mf,
    /// Topics of documents
    Lda,
}

impl Job {
    fn name(self) -> &'static str {
        match self {
            Job::Mf => "mf",
            Job::Lda => "lda",
        }
    }
}

/// How many shards a server has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shards {
    /// One for every two workers.
    Auto,
    /// So many.
    Fixed(u32),
}

impl Shards {
    fn count(self, workers: u16) -> u32 {
        match self {
            Shards::Auto => u32::from(workers / 2).clamp(1, 256),
            Shards::Fixed(count) => count,
        }
    }
}

impl FromStr for Shards {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text == "auto" => Ok(Shards::Auto),
            Ok(count @ 1..=256) => Ok(Shards::Fixed(count)),
            _ => Err(format!("`{text}` is no number of shards: write 1 to 256, or auto")),
        }
    }
}

impl fmt::Display for Shards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Shards::Auto => f.write_str("auto"),
            Shards::Fixed(count) => count.fmt(f),
        }
    }
}

/// Options of `fervor-bench scaling`.
#[derive(Debug, Clone, Args)]
pub struct ScalingOptions {
    /// The job to run
    #[arg(long, value_enum, default_value_t = Job::Mf)]
    pub job: Job,
    /// Greatest number of workers: the job runs with 1, 2, 4 … up to this many [default: the number of processors]
    #[arg(long, value_name = "N", value_parser = value_parser!(u16).range(1..=1024))]
    pub workers: Option<u16>,
    /// Numbers of shards to try, separated by commas; auto is one shard for every two workers
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "auto")]
    pub shards: Vec<Shards>,
    /// Consistency models to try, separated by commas
    #[arg(long, value_name = "LIST", value_enum, value_delimiter = ',', default_value = "essp")]
    pub models: Vec<ModelName>,
    /// Clocks that a read may lag, under ssp and essp
    #[arg(long, default_value_t = 3)]
    pub staleness: u32,
    /// How often each setting is run. The figures are medians over these rounds
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// Passes over the data in a run [default: 300 for mf, 10 for lda]
    #[arg(long, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub epochs: Option<u32>,
    /// The data: ROWSxCOLS:RATINGS for mf, DOCSxWORDS:TOKENS for lda [default: 2000x1000:200000 for mf,
    /// 5000x10000:1000000 for lda]
    #[arg(long, value_name = "SIZES")]
    pub generate: Option<String>,
    /// Numbers in the factor of a row or column, for mf
    #[arg(long, default_value_t = 32)]
    pub rank: u32,
    /// Topics to learn, for lda
    #[arg(long, default_value_t = 100)]
    pub topics: u32,
    /// Clocks that each worker ends in one pass over its data
    #[arg(long, default_value_t = 10)]
    pub clocks_per_epoch: u32,
    /// Seed of all random numbers
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Memory of the server
    #[arg(long, default_value = "512M", value_name = "SIZE")]
    pub memory: String,
    /// How rows are read.
    #[command(flatten)]
    pub reads: ReadOptions,
    /// Fail when the job takes more than RATIO times as long as plain threads. Give one number, or several separated by
    /// commas: for 1 worker, for 2, for 4 and so on. The last number also holds for all greater numbers of workers
    #[arg(long, value_name = "RATIO", value_delimiter = ',')]
    pub max_ratio: Vec<f64>,
    /// Write the results to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw the speed-up against the number of workers, into this file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// What a run took.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Taken {
    seconds: f64,
    waiting: f64,
    communication: f64,
}

/// Runs `fervor-bench scaling`.
///
/// # Errors
/// Options that make no sense, a job that fails, a ratio above the bound.
pub fn run(options: &ScalingOptions) -> Result<()> {
    let scaling = measure(options)?;
    print!("{scaling}");
    if let Some(path) = &options.json {
        write_json(path, &scaling)?;
    }
    if let Some(path) = &options.svg {
        let names = settings_of(options, 1);
        fs::write(path, draw(&scaling, options, &names)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    judge(&scaling.rows, &options.max_ratio)
}

/// Runs everything, and takes the medians.
///
/// # Errors
/// As [`run`].
pub fn measure(options: &ScalingOptions) -> Result<Scaling> {
    validate(options)?;
    let most = options.workers.unwrap_or_else(|| {
        u16::try_from(std::thread::available_parallelism().map_or(1, usize::from)).unwrap_or(u16::MAX)
    });
    let groups: Vec<Group> = steps(most)
        .into_iter()
        .map(|workers| Group { workers, settings: settings_of(options, workers) })
        .collect();
    let runs: usize = groups.iter().map(|group| 1 + group.settings.len()).sum();
    let mut progress = Progress::new(runs * options.rounds as usize);
    // Of each group: the plain runs, and those of each setting.
    let mut taken: Vec<Vec<Vec<Taken>>> =
        groups.iter().map(|group| vec![Vec::new(); 1 + group.settings.len()]).collect();
    for round in 1..=options.rounds {
        for (group, taken) in groups.iter().zip(&mut taken) {
            let all = [None].into_iter().chain(group.settings.iter().map(Some));
            for (setting, taken) in all.zip(taken) {
                let what = describe(options, group.workers, setting);
                progress.next(&format!("round {round} of {}: {what}", options.rounds));
                taken.push(run_once(options, group.workers, setting).with_context(|| what)?);
            }
        }
    }
    progress.end();
    let rows = groups.iter().zip(&taken).flat_map(|(group, taken)| rows(options, group, taken)).collect();
    Ok(Scaling { machine: Machine::this(), settings: in_words(options), rows })
}

fn validate(options: &ScalingOptions) -> Result<()> {
    for &ratio in &options.max_ratio {
        ensure!(
            ratio.is_finite() && ratio > 0.0,
            "--max-ratio {ratio}: a ratio is a number above 0, as in 1.4"
        );
    }
    ensure!(
        !options.models.contains(&ModelName::Vap),
        "--models vap: its bound depends on the job; measure it with `fervor-bench {} --model vap --v0 BOUND`",
        options.job.name()
    );
    Ok(())
}

fn run_once(options: &ScalingOptions, workers: u16, setting: Option<&Setting>) -> Result<Taken> {
    let arguments = arguments(options, workers, setting);
    let run = match options.job {
        Job::Mf => mf::run(&parsed::<MfOptions>("mf", &arguments)?)?.map(|report| report.run),
        Job::Lda => lda::run(&parsed::<LdaOptions>("lda", &arguments)?)?.map(|report| report.run),
    };
    let Run { seconds, time, .. } = run.context("the job gave no report")?;
    Ok(Taken { seconds, waiting: time.waiting, communication: time.communication })
}

/// The rows of a group: of the plain runs first, then of each setting.
fn rows(options: &ScalingOptions, group: &Group, taken: &[Vec<Taken>]) -> Vec<Row> {
    let plain_seconds = median(taken[0].iter().map(|taken| taken.seconds));
    let row = |(setting, taken): (&Setting, &Vec<Taken>)| {
        let of = |part: fn(&Taken) -> f64| median(taken.iter().map(part));
        let seconds = of(|taken| taken.seconds);
        Row {
            job: options.job.name().into(),
            model: title(options, setting.model),
            clients: setting.clients,
            workers: setting.workers,
            shards: setting.shards.count(group.workers),
            seconds,
            plain_seconds,
            ratio: seconds / plain_seconds,
            waiting: of(|taken| taken.waiting),
            communication: of(|taken| taken.communication),
        }
    };
    group.settings.iter().zip(&taken[1..]).map(row).collect()
}

/// A line on stderr that says what runs and how long it may still take.
struct Progress {
    terminal: bool,
    start: Instant,
    told: Instant,
    done: usize,
    all: usize,
}

impl Progress {
    /// How often a line is written where stderr is no terminal.
    const SELDOM: Duration = Duration::from_secs(30);

    fn new(all: usize) -> Self {
        let start = Instant::now();
        Progress { terminal: std::io::stderr().is_terminal(), start, told: start, done: 0, all }
    }

    fn next(&mut self, what: &str) {
        let left = match self.done {
            0 => String::new(),
            done => {
                let each = self.start.elapsed().as_secs_f64() / done as f64;
                format!(", about {:.0} s left", each * (self.all - done) as f64)
            }
        };
        let line = format!("run {} of {}, {what}{left}", self.done + 1, self.all);
        if self.terminal {
            eprint!("\r\x1b[2K{line}");
        } else if self.told.elapsed() > Self::SELDOM {
            eprintln!("{line}");
            self.told = Instant::now();
        }
        self.done += 1;
    }

    fn end(&self) {
        if self.terminal {
            eprint!("\r\x1b[2K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}
