//! Throughput: how many rows a second, and how many bytes.
//!
//! | operation | what each worker does | a row counts when |
//! |---|---|---|
//! | `hit` | `get` of rows that the cache has | it was read |
//! | `in-place` | `get` on the server's own host, as the client reads unless it is told to copy | it was read |
//! | `read` | `get` of rows that no cache keeps (Async): one READ at a time | it was read |
//! | `many-hit` | `get_many` of `--batch` rows that the cache has | it was read |
//! | `many-read` | `get_many` of `--batch` rows, with `--outstanding` READs in flight | it was read |
//! | `inc` | `inc` of `--batch` rows of its own, then `clock` | its update was applied: the time until the servers have acknowledged all of them counts |
//! | `push` | the same under ESSP(3), while a second client holds all rows | the server has pushed it to that client |
//!
//! The workers are threads of one client. Bytes are those of the rows, without headers. Each setting has a server of its own, unless one is
//! named, and runs for `--duration`; `BW peak` is the best tenth of a second.
//!
//! Columns are those of perftest: `MB/sec` is 2^20 bytes a second, and a message is a row.

use std::{
    fmt,
    hint::black_box,
    io::IsTerminal as _,
    path::PathBuf,
    sync::{
        Barrier,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum, value_parser};
use fervor_client::{Client, ClientOptions, Model, Table, Worker};
use serde::{Deserialize, Serialize};

use crate::{
    connect::{self, ReadOptions},
    latency::{
        ops,
        sizes::{Sizes, expand},
    },
    limits::Limit,
    machine::Machine,
    perftest::{Perftest, PerftestOptions},
    report::{TextTable, write_json},
    server::{EmbeddedOptions, EmbeddedServer},
};

/// `get`s between two looks at whether the time is up.
const EACH: u64 = 64;
/// How often it is looked how far the workers are.
const LOOK: Duration = Duration::from_millis(100);
/// How long a cache may take to hold all rows.
const LONG: Duration = Duration::from_secs(10);
/// WRITEs that perftest has outstanding beside pushes.
const WRITES: u32 = 128;

/// An operation whose throughput is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Op {
    /// `get` from the cache
    Hit,
    /// `get` on the server's own host, in place where the client can do that, else from the cache
    InPlace,
    /// `get`, one READ at a time
    Read,
    /// `get_many` from the cache
    ManyHit,
    /// `get_many`, several READs at a time
    ManyRead,
    /// `inc` of many rows, then `clock`
    Inc,
    /// The same, and the server pushes the rows to another client
    Push,
}

impl Op {
    /// All of them.
    pub const ALL: [Op; 7] = [Op::Hit, Op::InPlace, Op::Read, Op::ManyHit, Op::ManyRead, Op::Inc, Op::Push];

    /// Its name on the command line and in files.
    pub fn name(self) -> &'static str {
        match self {
            Op::Hit => "hit",
            Op::InPlace => "in-place",
            Op::Read => "read",
            Op::ManyHit => "many-hit",
            Op::ManyRead => "many-read",
            Op::Inc => "inc",
            Op::Push => "push",
        }
    }

    fn model(self) -> Model {
        match self {
            // Nobody is ever too far behind to read.
            Op::Hit | Op::InPlace | Op::ManyHit => Model::Essp { staleness: 1 << 20 },
            Op::Read | Op::ManyRead | Op::Inc => Model::Async,
            Op::Push => Model::Essp { staleness: 3 },
        }
    }

    fn reads(self) -> ReadOptions {
        // All but one are about what happens over a network.
        ReadOptions { copies: self != Op::InPlace }
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
    /// Bytes of a row, a multiple of 4, or a sweep as in 2..65536, which doubles; may be repeated, or separated by commas [default: 64,512,4096]
    #[arg(long, short = 's', value_name = "BYTES", value_delimiter = ',')]
    pub size: Vec<Sizes>,
    /// Numbers of workers, separated by commas
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1", value_parser = value_parser!(u16).range(1..=1024))]
    pub workers: Vec<u16>,
    /// Numbers of shards of the server that is started, separated by commas
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1", conflicts_with = "server", value_parser = value_parser!(u32).range(1..=256))]
    pub shards: Vec<u32>,
    /// Numbers of READs in flight to one shard, of many-read, separated by commas
    #[arg(long, short = 'o', value_name = "LIST", value_delimiter = ',', default_value = "16", value_parser = value_parser!(u32).range(1..=1024))]
    pub outstanding: Vec<u32>,
    /// Rows of one get_many, and rows that are updated in a clock
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
    /// Do not measure what the machine allows beside the figures
    #[arg(long)]
    pub no_limits: bool,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Fail if the ratio to perftest is less
    #[arg(long, value_name = "RATIO", requires = "beside_perftest")]
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
            "--duration {}: it is above 0 and at most 86400 seconds",
            self.duration
        );
        if self.perftest.beside_perftest
            && let Some(odd) = self.ops().iter().find(|op| op.perftest(1).is_none())
        {
            bail!(
                "perftest has nothing like {}: --beside-perftest goes with --op read, --op many-read and --op push",
                odd.name()
            );
        }
        self.perftest.validate(&self.server)
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
}

impl Setting {
    /// Rows of the table.
    fn rows(&self) -> u64 {
        let batch = u64::from(self.batch);
        match self.op {
            Op::Read | Op::ManyRead => {
                let size = self.size as usize;
                ((ops::miss_bytes(size) / size) as u64).next_multiple_of(batch)
            }
            op if op.writes() => batch * u64::from(self.workers),
            _ => batch,
        }
    }

    /// What one worker can do at best, for a row.
    fn limit(&self) -> Limit {
        let size = self.size as usize;
        Limit::copy(size, size * self.rows().min(self.batch.into()) as usize)
    }
}

/// Rows that were moved in some time.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Moved {
    rows: u64,
    seconds: f64,
    /// Rows a second, in the best tenth of a second.
    peak: f64,
}

/// The throughput in one setting. The names are those of the JSON file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `hit`, `read` …
    pub op: String,
    /// Bytes of a row.
    pub size: u32,
    /// Worker threads.
    pub workers: u16,
    /// Shards of the server that was started; none for a server that was named.
    pub shards: Option<u32>,
    /// READs in flight, of many-read.
    pub outstanding: Option<u32>,
    /// Rows of a `get_many`, or of a clock.
    pub batch: u32,
    /// Rows that were moved.
    pub iterations: u64,
    /// In how much time.
    pub seconds: f64,
    /// Rows a second.
    pub rows_per_second: f64,
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// Bytes a second in the best tenth of a second.
    pub peak_bytes_per_second: f64,
    /// What one worker could do at best, for a row, if it was measured.
    pub limit: Option<Limit>,
    /// The same by perftest, if it was measured.
    pub beside: Option<Beside>,
}

/// What perftest gave, beside our own: bytes a second.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Beside {
    /// Its program.
    pub tool: String,
    /// In turn: ours and its.
    pub rounds: Vec<(f64, f64)>,
    /// Our best.
    pub best_ours: f64,
    /// Its best.
    pub best_theirs: f64,
    /// Our best over its best.
    pub ratio: f64,
}

/// The results of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// Where this was measured.
    pub machine: Machine,
    /// For each setting its figures.
    pub rows: Vec<Row>,
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
                    }));
                }
            }
        }
    }
    Ok(settings)
}

fn judge(rows: &[Row], least: Option<f64>) -> Result<()> {
    let Some(least) = least else { return Ok(()) };
    for row in rows {
        if let Some(Beside { tool, ratio, .. }) = row.beside.as_ref().filter(|beside| beside.ratio < least) {
            bail!(
                "{} of {} bytes moves {ratio:.2} times as much as {tool}: less than {least} times",
                row.op,
                row.size
            );
        }
    }
    Ok(())
}

/// Measures one setting: in one go, or in turns with perftest.
fn measure(options: &ThroughputOptions, setting: Setting) -> Result<Row> {
    let Setting { op, size, workers, shards, outstanding, batch } = setting;
    let embedded = match options.server.is_empty() {
        true => {
            let server = EmbeddedOptions { shards, memory: options.memory.clone() };
            Some(EmbeddedServer::start(&server, 2, workers)?)
        }
        false => None,
    };
    let urls = embedded.as_ref().map_or(options.server.clone(), |server| vec![server.url().to_owned()]);
    let duration = Duration::from_secs_f64(options.duration);
    let bytes = f64::from(size);
    let mut beside = None;
    let moved = match op.perftest(outstanding).filter(|_| options.perftest.beside_perftest) {
        None => move_rows(&urls, setting, duration)?,
        Some((tool, depth)) => {
            let (mut best, mut rounds) = (None::<Moved>, Vec::new());
            for _ in 0..options.perftest.rounds {
                let moved = move_rows(&urls, setting, duration)?;
                let rate = |moved: &Moved| moved.rows as f64 / moved.seconds;
                let count = (rate(&moved) * options.duration) as u64;
                let perftest = Perftest::new(tool, &options.perftest.ends);
                let theirs = perftest.bandwidth(size, count.clamp(100, 1_000_000), depth)?;
                rounds.push((rate(&moved) * bytes, theirs.average));
                if best.is_none_or(|best| rate(&best) < rate(&moved)) {
                    best = Some(moved);
                }
            }
            let best_of = |of: fn(&(f64, f64)) -> f64| rounds.iter().map(of).fold(0.0, f64::max);
            let (best_ours, best_theirs) = (best_of(|round| round.0), best_of(|round| round.1));
            let ratio = best_ours / best_theirs;
            beside = Some(Beside { tool: tool.into(), best_ours, best_theirs, ratio, rounds });
            best.context("there was no round")?
        }
    };
    let here = options.server.iter().all(|url| url.starts_with("shm://"));
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

/// A counter that shares no cache line with others.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counter(AtomicU64);

/// Runs the workers for `duration`.
fn move_rows(urls: &[String], setting: Setting, duration: Duration) -> Result<Moved> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Relaxed);
    let name = format!("throughput-{}-{}-{}-{number}", setting.op.name(), setting.size, std::process::id());
    let clients = if setting.op == Op::Push { 2 } else { 1 };
    // A row has a header and begins at a cache line. One table may take half of the cache.
    let stride = (32 + setting.size as usize).next_multiple_of(64);
    let options = ClientOptions {
        cache_bytes: (64 << 20).max(3 * setting.rows() as usize * stride),
        reads_in_flight: setting.outstanding as usize,
        ..connect::client_options(clients, setting.op.reads())
    };
    let open = || -> Result<(Client, Table<i32>)> {
        let client = Client::connect_with(urls, options.clone())?;
        let table = client.table(
            &name,
            setting.rows(),
            setting.size as usize / size_of::<i32>(),
            setting.op.model(),
        )?;
        Ok((client, table))
    };
    let (client, table) = open()?;
    let seats = (0..setting.workers).map(|_| client.worker()).collect::<Result<Vec<_>, _>>()?;
    let reader = match setting.op {
        Op::Push => {
            let (client, table) = open()?;
            let worker = client.worker()?;
            Some((client, table, worker))
        }
        _ => None,
    };
    let stop = AtomicBool::new(false);
    // The workers, the reader if there is one, and this thread.
    let ready = Barrier::new(seats.len() + usize::from(reader.is_some()) + 1);
    let counters: Vec<Counter> = seats.iter().map(|_| Counter::default()).collect();
    let pushed = AtomicU64::new(u64::MAX);
    thread::scope(|scope| {
        let reader = reader.map(|(client, table, worker)| {
            let (stop, ready, pushed) = (&stop, &ready, &pushed);
            scope.spawn(move || hold(client, &table, worker, setting, stop, ready, pushed))
        });
        let (stop, ready) = (&stop, &ready);
        let workers: Vec<_> = seats
            .into_iter()
            .zip(&counters)
            .enumerate()
            .map(|(number, (worker, counter))| {
                let mover = Mover::new(&table, worker, setting, number as u64);
                scope.spawn(move || mover.run(stop, ready, counter))
            })
            .collect();
        ready.wait();
        let start = Instant::now();
        let count = || -> u64 {
            let rows: u64 = counters.iter().map(|counter| counter.0.load(Relaxed)).sum();
            // An update that was pushed together with the next one counts once.
            rows.min(pushed.load(Relaxed))
        };
        let mut moved = watch(setting, duration, stop, count, || {
            workers.iter().any(thread::ScopedJoinHandle::is_finished)
        });
        let outcomes: Vec<Result<()>> = workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect();
        // The reader may be waiting for a clock of this client.
        let closed = client.close();
        if setting.op == Op::Inc {
            // That has waited until all updates were applied.
            moved.rows = count();
            moved.seconds = start.elapsed().as_secs_f64();
        }
        let held = reader
            .map_or(Ok(()), |reader| reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        outcomes.into_iter().collect::<Result<()>>()?;
        closed?;
        held?;
        Ok(moved)
    })
}

/// Looks how far the workers are until the time is up or one has ended, and tells them to stop.
fn watch(
    setting: Setting,
    duration: Duration,
    stop: &AtomicBool,
    count: impl Fn() -> u64,
    ended: impl Fn() -> bool,
) -> Moved {
    let terminal = std::io::stderr().is_terminal();
    let start = Instant::now();
    let first = count();
    let (mut seen, mut since, mut peak) = (first, start, 0.0f64);
    loop {
        let left = duration.saturating_sub(start.elapsed());
        if left.is_zero() || ended() {
            break;
        }
        thread::sleep(left.min(LOOK));
        let (rows, now) = (count(), Instant::now());
        let rate = (rows - seen) as f64 / (now - since).as_secs_f64();
        // A short rest at the end says little.
        if now - since >= LOOK / 2 || peak == 0.0 {
            peak = peak.max(rate);
        }
        (seen, since) = (rows, now);
        if terminal {
            let Setting { op, size, workers, .. } = setting;
            let mib = rate * f64::from(size) / f64::from(1 << 20);
            eprint!(
                "\r\x1b[2K{} of {size} bytes, {workers} workers: {:.3} M rows/s, {mib:.0} MB/sec",
                op.name(),
                rate / 1e6
            );
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let rows = count() - first;
    stop.store(true, SeqCst);
    if terminal {
        eprint!("\r\x1b[2K");
    }
    Moved { rows, seconds, peak: peak.max(rows as f64 / seconds) }
}

/// A worker that moves rows.
struct Mover<'a> {
    setting: Setting,
    table: &'a Table<i32>,
    worker: Worker,
    /// The rows of a `get_many` or of a clock.
    rows: Vec<u64>,
    /// The next row of a `get`.
    next: u64,
    values: Vec<i32>,
}

impl<'a> Mover<'a> {
    fn new(table: &'a Table<i32>, worker: Worker, setting: Setting, number: u64) -> Self {
        let (op, batch) = (setting.op, u64::from(setting.batch));
        // Those who read begin in different places; those who write have rows of their own.
        let first = match op {
            op if op.writes() => number * batch,
            _ => (number * batch) % setting.rows(),
        };
        let many = matches!(op, Op::ManyHit | Op::ManyRead);
        let width = table.width() * if many { batch as usize } else { 1 };
        Mover {
            setting,
            table,
            worker,
            rows: (first..first + batch).collect(),
            next: first,
            values: vec![1; width],
        }
    }

    fn run(mut self, stop: &AtomicBool, ready: &Barrier, counter: &Counter) -> Result<()> {
        let prepared = self.prepare();
        ready.wait();
        prepared?;
        let mut rows = 0;
        while !stop.load(Relaxed) {
            rows += self.turn()?;
            counter.0.store(rows, Relaxed);
        }
        Ok(())
    }

    /// Fills the cache.
    fn prepare(&mut self) -> Result<()> {
        if matches!(self.setting.op, Op::Hit | Op::InPlace | Op::ManyHit) {
            fill(&mut self.worker, self.table)?;
        }
        Ok(())
    }

    /// Moves some rows; how many.
    fn turn(&mut self) -> Result<u64> {
        let (worker, table) = (&mut self.worker, self.table);
        match self.setting.op {
            Op::Hit | Op::InPlace | Op::Read => {
                for _ in 0..EACH {
                    worker.get(table, self.next, &mut self.values)?;
                    black_box(&self.values);
                    self.next = if self.next + 1 == table.rows() { 0 } else { self.next + 1 };
                }
                Ok(EACH)
            }
            Op::ManyHit | Op::ManyRead => {
                worker.get_many(table, &self.rows, &mut self.values)?;
                black_box(&self.values);
                let (batch, all) = (self.rows.len() as u64, table.rows());
                if batch < all {
                    self.rows.iter_mut().for_each(|row| *row = (*row + batch) % all);
                }
                Ok(batch)
            }
            Op::Inc | Op::Push => {
                for &row in &self.rows {
                    worker.inc(table, row, &self.values)?;
                }
                worker.clock()?;
                if self.setting.op == Op::Push {
                    // Waits for the reader, so that each clock has a round of its own.
                    let mut row = std::mem::take(&mut self.values);
                    let outcome = worker.get(table, self.rows[0], &mut row);
                    row.fill(1);
                    self.values = row;
                    outcome?;
                }
                Ok(self.rows.len() as u64)
            }
        }
    }
}

/// Reads all rows until the cache answers for each.
fn fill(worker: &mut Worker, table: &Table<i32>) -> Result<()> {
    let mut row = vec![0; table.width()];
    let start = Instant::now();
    loop {
        let before = worker.stats().misses;
        (0..table.rows()).try_for_each(|number| worker.get(table, number, &mut row))?;
        if worker.stats().misses == before {
            return Ok(());
        }
        ensure!(start.elapsed() < LONG, "the cache did not keep {} rows within {LONG:?}", table.rows());
        // Lets the client hear of the acknowledgement.
        worker.clock()?;
    }
}

/// A client that holds all rows while another updates them. `pushed` is how many rows' bytes the servers have pushed to it.
fn hold(
    client: Client,
    table: &Table<i32>,
    mut worker: Worker,
    setting: Setting,
    stop: &AtomicBool,
    ready: &Barrier,
    pushed: &AtomicU64,
) -> Result<()> {
    let mut row = vec![0; table.width()];
    // Each row is asked for; the copies come with the first clocks.
    let asked = (0..table.rows()).try_for_each(|number| worker.get(table, number, &mut row));
    pushed.store(0, SeqCst);
    ready.wait();
    let outcome = asked.and_then(|()| {
        let before = client.stats().bytes_pushed;
        while !stop.load(Relaxed) {
            worker.clock()?;
            worker.get(table, 0, &mut row)?;
            let bytes = client.stats().bytes_pushed - before;
            pushed.store(bytes / u64::from(setting.size), Relaxed);
        }
        Ok(())
    });
    drop(worker);
    client.close()?;
    Ok(outcome?)
}

impl fmt::Display for Throughput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.machine)?;
        let mut table = TextTable::new([
            "op",
            "workers",
            "shards",
            "outstanding",
            "#bytes",
            "#iterations",
            "BW peak[MB/sec]",
            "BW average[MB/sec]",
            "MsgRate[Mpps]",
            "of the limit",
        ]);
        let mib = |bytes: f64| format!("{:.2}", bytes / f64::from(1 << 20));
        for row in &self.rows {
            let some = |value: Option<u32>| value.map_or("-".into(), |value| value.to_string());
            let limit = row.limit.as_ref().map(|limit| row.share(limit, self.machine.cores));
            table.row([
                row.op.clone(),
                row.workers.to_string(),
                some(row.shards),
                some(row.outstanding),
                row.size.to_string(),
                row.iterations.to_string(),
                mib(row.peak_bytes_per_second),
                mib(row.bytes_per_second),
                format!("{:.6}", row.rows_per_second / 1e6),
                limit.map_or("-".into(), |share| format!("{share:.2}")),
            ]);
        }
        write!(f, "{table}")?;
        if self.rows.iter().any(|row| row.limit.is_some()) {
            writeln!(
                f,
                "The limit is a copy of each row (see `fervor-bench limits`) by each worker that has a core of its own; for push, by one."
            )?;
        }
        let mut table =
            TextTable::new(["op", "#bytes", "best[MB/sec]", "perftest", "best[MB/sec]", "ratio", "rounds"]);
        for row in &self.rows {
            let Some(beside) = &row.beside else { continue };
            table.row([
                row.op.clone(),
                row.size.to_string(),
                mib(beside.best_ours),
                beside.tool.clone(),
                mib(beside.best_theirs),
                format!("{:.2}", beside.ratio),
                beside.rounds.len().to_string(),
            ]);
        }
        if table.rows().len() > 1 { write!(f, "\n{table}") } else { Ok(()) }
    }
}

impl Row {
    /// What part this is of what the machine allows.
    fn share(&self, limit: &Limit, cores: usize) -> f64 {
        let copiers = if self.op == Op::Push.name() { 1 } else { usize::from(self.workers).min(cores) };
        self.rows_per_second * limit.ns / 1e9 / copiers as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(op: Op) -> Setting {
        Setting { op, size: 64, workers: 3, shards: 1, outstanding: 16, batch: 100 }
    }

    #[test]
    fn tables_are_as_large_as_the_operation_needs() {
        assert_eq!(setting(Op::Hit).rows(), 100);
        assert_eq!(setting(Op::ManyHit).rows(), 100);
        assert_eq!(setting(Op::Inc).rows(), 300);
        let rows = setting(Op::ManyRead).rows();
        assert!(rows.is_multiple_of(100) && rows >= (4 << 20) / 64, "{rows}");
    }

    #[test]
    fn a_time_without_progress_is_no_peak() {
        let start = Instant::now();
        let stop = AtomicBool::new(false);
        let count = || if start.elapsed() < Duration::from_millis(150) { 0 } else { 1000 };
        let moved = watch(setting(Op::Hit), Duration::from_millis(350), &stop, count, || false);
        assert!(stop.load(SeqCst));
        assert_eq!(moved.rows, 1000);
        assert!(moved.seconds >= 0.35 && moved.peak > 1000.0 / moved.seconds, "{moved:?}");
        let ended = watch(setting(Op::Hit), Duration::from_secs(60), &stop, || 5, || true);
        assert_eq!(ended.rows, 0);
    }

    #[test]
    fn a_ratio_below_the_bound_fails() {
        let beside = Beside {
            tool: "ib_read_bw".into(),
            rounds: Vec::new(),
            best_ours: 80.0,
            best_theirs: 100.0,
            ratio: 0.8,
        };
        let row = Row {
            op: "many-read".into(),
            size: 4096,
            workers: 1,
            shards: None,
            outstanding: Some(16),
            batch: 256,
            iterations: 1,
            seconds: 1.0,
            rows_per_second: 1.0,
            bytes_per_second: 4096.0,
            peak_bytes_per_second: 4096.0,
            limit: None,
            beside: Some(beside),
        };
        judge(std::slice::from_ref(&row), None).unwrap();
        judge(std::slice::from_ref(&row), Some(0.8)).unwrap();
        let said = judge(&[row], Some(0.9)).unwrap_err().to_string();
        assert!(said.contains("many-read of 4096 bytes moves 0.80 times as much as ib_read_bw"), "{said}");
    }
}
