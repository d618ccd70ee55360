//! How a job gets faster with more workers, beside as many plain threads.
//!
//! The job is [`mf`] or [`lda`], run exactly as those commands run it: a server process, client processes, worker threads. For 1, 2,
//! 4 … workers it runs with every model and number of shards that were asked for, once with the workers as clients of one worker
//! and once as one client of many. Before each group it runs with as many plain threads and no server.
//!
//! All of these take turns, `--rounds` times, so that a slow minute of the machine falls on all of them alike. The figures are medians over
//! the rounds. A ratio compares the seconds of a job with those of the plain threads of the same run.

use std::{
    fmt, fs,
    io::IsTerminal as _,
    path::PathBuf,
    str::FromStr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum, value_parser};
use serde::{Deserialize, Serialize};

use crate::{
    connect::ReadOptions,
    figures::{Axis, Curve, curves},
    job::report::Run,
    lda::{self, LdaOptions},
    machine::Machine,
    mf::{self, MfOptions},
    model::ModelName,
    report::{TextTable, median, percent, write_json},
};

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
    /// The job
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
    /// How often everything is run; the figures are medians over the rounds
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// Passes over the data in a run [default: 300 for mf, 10 for lda]
    #[arg(long, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub epochs: Option<u32>,
    /// The data: ROWSxCOLS:RATINGS for mf, DOCSxWORDS:TOKENS for lda [default: 2000x1000:200000 for mf,
    /// 5000x10000:1000000 for lda]
    #[arg(long, value_name = "SIZES")]
    pub generate: Option<String>,
    /// Numbers in a factor, for mf
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
    /// Fail when a ratio is greater. One number, or several separated by commas: the first is for 1 worker, the next for 2, and so
    /// on; the last also holds for all further ones
    #[arg(long, value_name = "RATIO", value_delimiter = ',')]
    pub max_ratio: Vec<f64>,
    /// Write the results to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw the speed-up against the number of workers to this file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// One way to run the job on a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Setting {
    model: ModelName,
    clients: u16,
    /// Of each client.
    workers: u16,
    shards: Shards,
}

/// All settings with one number of workers.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    workers: u16,
    settings: Vec<Setting>,
}

/// What a run took.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Taken {
    seconds: f64,
    waiting: f64,
    communication: f64,
}

/// The medians of a setting. The names are those of the JSON file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `mf` or `lda`.
    pub job: String,
    /// The model with its staleness.
    pub model: String,
    /// Client processes.
    pub clients: u16,
    /// Worker threads of each.
    pub workers: u16,
    /// Shards of the server.
    pub shards: u32,
    /// Seconds until the last worker was done.
    pub seconds: f64,
    /// The same with as many plain threads.
    pub plain_seconds: f64,
    /// `seconds / plain_seconds`.
    pub ratio: f64,
    /// Part of the workers' time in which they waited for clocks.
    pub waiting: f64,
    /// Part of the workers' time in which they read from servers and sent to them.
    pub communication: f64,
}

/// The results of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scaling {
    /// Where this was measured.
    pub machine: Machine,
    /// What was run, in words.
    pub settings: String,
    /// For each setting its medians.
    pub rows: Vec<Row>,
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

/// 1, 2, 4 … and `most`.
fn steps(most: u16) -> Vec<u16> {
    let mut steps: Vec<u16> =
        std::iter::successors(Some(1u16), |n| n.checked_mul(2)).take_while(|n| *n < most).collect();
    steps.push(most);
    steps
}

/// The settings with so many workers. One worker is one client of one worker, either way.
fn settings_of(options: &ScalingOptions, workers: u16) -> Vec<Setting> {
    let mut settings = Vec::new();
    for &model in &options.models {
        for &shards in &options.shards {
            settings.push(Setting { model, clients: workers, workers: 1, shards });
            if workers > 1 {
                settings.push(Setting { model, clients: 1, workers, shards });
            }
        }
    }
    settings
}

fn describe(options: &ScalingOptions, workers: u16, setting: Option<&Setting>) -> String {
    let job = options.job.name();
    match setting {
        None => format!("{job}, {}", crate::job::options::plain_threads(workers.into())),
        Some(Setting { model, clients, workers, shards }) => format!(
            "{job} {model}, {clients} clients x {workers} workers, {} shards",
            shards.count(clients * workers)
        ),
    }
}

/// What all runs have in common.
fn in_words(options: &ScalingOptions) -> String {
    let (data, epochs) = defaults(options);
    let size = match options.job {
        Job::Mf => format!("--rank {}", options.rank),
        Job::Lda => format!("--topics {}", options.topics),
    };
    let copies = if options.reads.copies { " --copies" } else { "" };
    format!(
        "{} --generate {data} {size} --clocks-per-epoch {} --epochs {epochs} --seed {}{copies}, medians of {} rounds",
        options.job.name(),
        options.clocks_per_epoch,
        options.seed,
        options.rounds
    )
}

/// The data and the passes over it.
fn defaults(options: &ScalingOptions) -> (String, u32) {
    let (data, epochs) = match options.job {
        Job::Mf => ("2000x1000:200000", 300),
        Job::Lda => ("5000x10000:1000000", 10),
    };
    (options.generate.clone().unwrap_or_else(|| data.into()), options.epochs.unwrap_or(epochs))
}

/// The command line of the job, as a user would write it.
fn arguments(options: &ScalingOptions, workers: u16, setting: Option<&Setting>) -> Vec<String> {
    let (data, epochs) = defaults(options);
    let mut arguments = vec![
        format!("--generate={data}"),
        format!("--epochs={epochs}"),
        format!("--clocks-per-epoch={}", options.clocks_per_epoch),
        format!("--seed={}", options.seed),
        "--quiet".into(),
    ];
    arguments.push(match options.job {
        Job::Mf => format!("--rank={}", options.rank),
        Job::Lda => format!("--topics={}", options.topics),
    });
    match setting {
        None => {
            arguments.extend(["--no-server".into(), "--clients=1".into(), format!("--workers={workers}")])
        }
        Some(setting) => {
            let shards = setting.shards.count(workers);
            arguments.push(format!("--model={}", setting.model));
            if matches!(setting.model, ModelName::Ssp | ModelName::Essp) {
                arguments.push(format!("--staleness={}", options.staleness));
            }
            arguments.push(format!("--clients={}", setting.clients));
            arguments.push(format!("--workers={}", setting.workers));
            arguments.push(format!("--shards={shards}"));
            arguments.push(format!("--memory={}", options.memory));
            arguments.extend(options.reads.copies.then(|| "--copies".into()));
        }
    }
    arguments
}

/// Options of a job from its command line.
fn parsed<O: Args>(name: &'static str, arguments: &[String]) -> Result<O> {
    let command = O::augment_args(clap::Command::new(name).no_binary_name(true));
    Ok(O::from_arg_matches(&command.try_get_matches_from(arguments)?)?)
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

fn title(options: &ScalingOptions, model: ModelName) -> String {
    match model {
        ModelName::Ssp | ModelName::Essp => format!("{model}({})", options.staleness),
        _ => model.to_string(),
    }
}

/// Fails when a row is above its bound: the first of `most` is for the first number of workers, and so on.
fn judge(rows: &[Row], most: &[f64]) -> Result<()> {
    let mut counts: Vec<u32> =
        rows.iter().map(|row| u32::from(row.clients) * u32::from(row.workers)).collect();
    counts.dedup();
    let bound = |row: &Row| {
        let workers = u32::from(row.clients) * u32::from(row.workers);
        let step = counts.iter().position(|count| *count == workers)?;
        most.get(step).or(most.last()).copied()
    };
    let above: Vec<String> = rows
        .iter()
        .filter_map(|row| {
            let most = bound(row).filter(|most| row.ratio > *most)?;
            let Row { model, clients, workers, shards, ratio, .. } = row;
            Some(format!(
                "{model} with {clients} clients x {workers} workers and {shards} shards takes {ratio:.2} times as long as \
                 plain threads, more than {most}"
            ))
        })
        .collect();
    if above.is_empty() { Ok(()) } else { bail!("{}", above.join("; ")) }
}

impl fmt::Display for Scaling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n{}\n", self.settings, self.machine)?;
        let mut table = TextTable::new([
            "model",
            "clients x workers",
            "shards",
            "seconds",
            "plain threads",
            "ratio",
            "waiting",
            "comm.",
        ]);
        for row in &self.rows {
            table.row([
                row.model.clone(),
                format!("{} x {}", row.clients, row.workers),
                row.shards.to_string(),
                format!("{:.3}", row.seconds),
                format!("{:.3}", row.plain_seconds),
                format!("{:.2}", row.ratio),
                percent(row.waiting),
                percent(row.communication),
            ]);
        }
        table.fmt(f)
    }
}

/// The speed-up over one plain thread against the number of workers.
fn draw(scaling: &Scaling, options: &ScalingOptions, settings: &[Setting]) -> Result<String> {
    let workers = |row: &Row| row.clients * row.workers;
    let one = scaling.rows.first().context("nothing was measured")?.plain_seconds;
    let plain = scaling.rows.iter().map(|row| (f64::from(workers(row)), one / row.plain_seconds));
    let mut all = vec![Curve::new("plain threads", plain)];
    for &Setting { model, shards, .. } in settings {
        let model = title(options, model);
        for (shape, in_one) in [("clients of one worker", false), ("one client", true)] {
            let points = scaling.rows.iter().filter(|row| {
                let all = workers(row);
                let alike = row.model == model && row.shards == shards.count(all);
                alike && (all == 1 || (row.clients == 1) == in_one)
            });
            let points = points.map(|row| (f64::from(workers(row)), one / row.seconds));
            let name = match shards {
                Shards::Auto => format!("{model}, {shape}"),
                Shards::Fixed(count) => format!("{model}, {shape}, {count} shards"),
            };
            all.push(Curve::new(name, points));
        }
    }
    curves(Axis::even("workers"), Axis::even("speed-up over one plain thread"), &all)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn options(arguments: &[&str]) -> ScalingOptions {
        parsed("scaling", &arguments.iter().map(|argument| (*argument).to_owned()).collect::<Vec<_>>())
            .unwrap()
    }

    fn row(clients: u16, workers: u16, ratio: f64) -> Row {
        Row {
            job: "mf".into(),
            model: "essp(3)".into(),
            clients,
            workers,
            shards: u32::from(clients * workers / 2).max(1),
            seconds: ratio,
            plain_seconds: 1.0,
            ratio,
            waiting: 0.0,
            communication: 0.0,
        }
    }

    #[test]
    fn workers_double_up_to_the_most() {
        assert_eq!(steps(1), [1]);
        assert_eq!(steps(2), [1, 2]);
        assert_eq!(steps(6), [1, 2, 4, 6]);
        assert_eq!(steps(8), [1, 2, 4, 8]);
    }

    #[test]
    fn settings_are_models_times_shards_times_shapes() {
        let options = options(&["--models=essp,ssp", "--shards=1,auto"]);
        assert_eq!(settings_of(&options, 1).len(), 4);
        let settings = settings_of(&options, 8);
        assert_eq!(settings.len(), 8);
        assert!(settings.iter().all(|s| s.clients * s.workers == 8));
        let shards: Vec<u32> = settings.iter().map(|s| s.shards.count(8)).collect();
        assert_eq!(shards, [1, 1, 4, 4, 1, 1, 4, 4]);
    }

    #[test]
    fn the_jobs_understand_their_command_lines() {
        let options = options(&["--models=essp,bsp", "--epochs=7", "--copies"]);
        for setting in settings_of(&options, 2).iter().map(Some).chain([None]) {
            let arguments = arguments(&options, 2, setting);
            let mf: MfOptions = parsed("mf", &arguments).unwrap();
            mf.validate().unwrap();
            assert_eq!((mf.job.all_workers(), mf.job.epochs, mf.rank), (2, 7, 32));
            assert_eq!(mf.job.no_server, setting.is_none());
            assert_eq!(mf.job.reads.copies, setting.is_some());
        }
    }

    #[test]
    fn a_row_above_its_bound_fails_by_its_number_of_workers() {
        let rows = [row(1, 1, 1.15), row(2, 1, 1.3), row(1, 2, 1.3), row(4, 1, 1.3)];
        judge(&rows, &[]).unwrap();
        judge(&rows, &[1.3]).unwrap();
        judge(&rows, &[1.15, 1.3]).unwrap();
        let said = |most: &[f64]| judge(&rows, most).unwrap_err().to_string();
        assert!(said(&[1.2]).matches("more than 1.2").count() == 3);
        let said = said(&[1.2, 1.3, 1.25]);
        assert!(said.contains("4 clients x 1 workers") && !said.contains("2 clients"), "{said}");
    }

    #[test]
    fn the_figure_has_a_curve_for_each_shape() {
        let options = options(&[]);
        let scaling = Scaling {
            machine: Machine::this(),
            settings: String::new(),
            rows: vec![row(1, 1, 1.1), row(2, 1, 1.3), row(1, 2, 1.2)],
        };
        let svg = draw(&scaling, &options, &settings_of(&options, 1)).unwrap();
        assert!(svg.contains("essp(3), one client") && svg.contains("plain threads"));
        assert!(svg.matches("<polyline").count() >= 3);
    }
}
