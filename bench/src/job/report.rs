//! What the reports of all applications have: who worked, where the time went, and how old the data was that reads
//! returned.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use super::{
    JobOptions,
    messages::{Bytes, Tally},
    options::plain_threads,
};
use crate::{
    machine::Machine,
    report::{self, TextTable},
};

/// Parts of the workers' time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Time {
    /// Everything else: arithmetic, and reads that hit the cache.
    pub compute: f64,
    /// Waiting for the shard clock.
    pub waiting: f64,
    /// Reading from servers and sending to them.
    pub communication: f64,
}

/// How reads were answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    /// In place, in the memory of a server on the same host.
    pub in_place: u64,
    /// By the client's cache.
    pub hits: u64,
    /// Not by the cache.
    pub misses: u64,
    /// READs of server memory.
    pub reads: u64,
    /// Reads that returned older data than the model allows: always 0.
    pub violations: u64,
}

impl fmt::Display for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cache { in_place, hits, misses, reads, violations } = self;
        writeln!(f, "reads: {in_place} in place, {hits} hits, {misses} misses, {reads} READs")?;
        write!(f, "staleness violations: {violations}")
    }
}

/// A run of a job, whatever was learned: who worked, and what it cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// The command: `mf`, `lda`.
    pub application: &'static str,
    /// `bsp`, `ssp`, `essp`, `async`, `vap`; `none` without a parameter server.
    pub model: String,
    /// Greatest lag of a read in clocks, where the model has one.
    pub staleness: Option<u32>,
    /// The bound in the first clock, under `vap`.
    pub v0: Option<f32>,
    /// Bytes per second that each shard may push besides rounds.
    pub continuous: Option<u64>,
    /// Threads that trained, over all processes.
    pub threads: usize,
    /// Client processes.
    pub clients: u16,
    /// Worker threads of each.
    pub workers: u16,
    /// If this is the part of a single client of the job: which.
    pub client_index: Option<u16>,
    /// Clocks of a worker in an epoch.
    pub clocks_per_epoch: u32,
    /// Seed of all that is drawn.
    pub seed: u64,
    /// Seconds until the last worker was done.
    pub seconds: f64,
    /// Clocks that a worker ended in a second, on average.
    pub clocks_per_second: f64,
    /// Where the workers' time went; the parts add up to 1.
    pub time: Time,
    /// How often a read returned data of a clock this much ahead of the reader's own.
    pub clock_differential: BTreeMap<i64, u64>,
    /// How the reads were answered.
    pub cache: Cache,
    /// What moved between clients and servers.
    pub bytes: Bytes,
    /// By which ways clients reached shards at the end, and how many of these.
    pub ways: BTreeMap<String, usize>,
    /// What each rail of each client has done.
    pub rails: Vec<String>,
    /// Where this was measured.
    pub machine: Machine,
}

impl Run {
    /// What the workers say that have reported: of the job, or of its client number `client_index`.
    pub fn new<R>(
        application: &'static str,
        options: &JobOptions,
        client_index: Option<u16>,
        tally: &Tally<R>,
    ) -> Self {
        let accesses = tally.accesses();
        let total: f64 = tally.reports.iter().map(|report| report.seconds).sum();
        let clocks: u64 = tally.reports.iter().map(|report| report.clocks).sum();
        // Where updates wait for values, a client's timers may nest: shares are of all that was counted then.
        let counted = total.max(accesses.seconds());
        let share = |part: f64| if counted > 0.0 { part / counted } else { 0.0 };
        let (waiting, communication) = (share(accesses.waiting), share(accesses.communicating));
        Run {
            application,
            model: options.model_name(),
            staleness: options.staleness(),
            v0: options.model.v0,
            continuous: options.model.continuous.filter(|_| !options.no_server),
            threads: options.all_workers(),
            clients: options.clients,
            workers: options.workers,
            client_index,
            clocks_per_epoch: options.clocks_per_epoch,
            seed: options.seed,
            seconds: tally.reports.iter().map(|report| report.seconds).fold(0.0, f64::max),
            clocks_per_second: if total > 0.0 { clocks as f64 / total } else { 0.0 },
            time: Time { compute: (1.0 - waiting - communication).max(0.0), waiting, communication },
            clock_differential: accesses.clock_differential,
            cache: Cache {
                in_place: accesses.in_place,
                hits: accesses.hits,
                misses: accesses.misses,
                reads: accesses.reads,
                violations: accesses.violations,
            },
            bytes: tally.bytes,
            ways: tally.ways.clone(),
            rails: tally.rails.clone(),
            machine: Machine::this(),
        }
    }

    /// The model with its staleness or bound.
    pub fn title(&self) -> String {
        match (&*self.model, self.staleness) {
            ("none", _) => plain_threads(self.threads),
            ("vap", _) => format!("vap({})", self.v0.unwrap_or_default()),
            ("bsp", _) | (_, None) => self.model.clone(),
            (model, Some(staleness)) => format!("{model}({staleness})"),
        }
    }

    /// The mean of the clock differential; none without reads.
    pub fn mean_differential(&self) -> Option<f64> {
        let count: u64 = self.clock_differential.values().sum();
        let sum: f64 = self.clock_differential.iter().map(|(&d, &count)| d as f64 * count as f64).sum();
        (count > 0).then(|| sum / count as f64)
    }

    /// Who worked, after `what` they learned, and where.
    pub fn write_head(&self, what: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Run { clocks_per_epoch, clients, workers, seed, machine, .. } = self;
        let who = match &*self.model {
            "none" => self.title(),
            _ => format!("{clients} clients x {workers} workers"),
        };
        write!(f, "{what}, {clocks_per_epoch} clocks/epoch, {who}, seed {seed}")?;
        if let Some(index) = self.client_index {
            write!(f, " (this is the part of client {index})")?;
        }
        writeln!(f, "\n{machine}\n")
    }

    /// What [`cost_cells`](Self::cost_cells) are.
    pub const COST_HEAD: [&str; 7] =
        ["compute", "waiting", "comm.", "differential", "READ", "pushed", "sent"];

    /// The end of a row about this run: where its time went, and what moved.
    pub fn cost_cells(&self) -> [String; 7] {
        let (Time { compute, waiting, communication }, Bytes { read, pushed, sent }) =
            (self.time, self.bytes);
        [
            report::percent(compute),
            report::percent(waiting),
            report::percent(communication),
            self.mean_differential().map_or("-".into(), |mean| format!("{mean:.2}")),
            report::bytes(read),
            report::bytes(pushed),
            report::bytes(sent),
        ]
    }

    /// How the reads were answered, and with how old data; nothing without reads.
    pub fn write_reads(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.clock_differential.is_empty() {
            return Ok(());
        }
        writeln!(f, "{}", differential_table([self]))?;
        writeln!(f, "{}", self.cache)?;
        self.write_ways(f)
    }

    /// How the shards were reached.
    fn write_ways(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.ways.is_empty() {
            let ways: Vec<_> = self.ways.iter().map(|(way, shards)| format!("{way} x {shards}")).collect();
            writeln!(f, "connections to shards: {}", ways.join(", "))?;
        }
        if !self.rails.is_empty() {
            writeln!(f, "rails: {}", self.rails.join("; "))?;
        }
        Ok(())
    }
}

/// About ten of the epochs, the last one among them: number, seconds, and the objective in two columns, headed by
/// `head`. Then the `target`, if there was one, and when it was reached, if it was.
pub fn write_epochs(
    f: &mut fmt::Formatter<'_>,
    head: [&str; 2],
    epochs: impl ExactSizeIterator<Item = (usize, f64, [String; 2])>,
    target: Option<f64>,
    reached: Option<f64>,
) -> fmt::Result {
    let mut table = TextTable::new(["epoch", "seconds"].into_iter().chain(head));
    let (all, every) = (epochs.len(), epochs.len().div_ceil(10).max(1));
    for (place, (epoch, seconds, objective)) in epochs.enumerate() {
        if epoch % every == 0 || place + 1 == all {
            table.row([epoch.to_string(), format!("{seconds:.4}")].into_iter().chain(objective));
        }
    }
    writeln!(f, "{table}")?;
    match (target, reached) {
        (Some(target), Some(seconds)) => {
            writeln!(f, "target {target:.6e} reached after {seconds:.4} s\n")
        }
        (Some(target), None) => writeln!(f, "target {target:.6e} not reached\n"),
        (None, _) => Ok(()),
    }
}

/// How old the data was that the reads of several runs returned: the share of each clock differential.
pub fn differential_table<'a>(runs: impl IntoIterator<Item = &'a Run>) -> TextTable {
    // Beyond this lie the tails of runs without a bound.
    const SHOWN: i64 = 6;
    let head = (1..SHOWN).map(|lag| format!("-{lag}")).chain([format!("-{SHOWN} and less")]);
    let mut table = TextTable::new(["clock differential".to_owned()].into_iter().chain(head));
    for run in runs.into_iter().filter(|run| !run.clock_differential.is_empty()) {
        let differential = &run.clock_differential;
        let total: u64 = differential.values().sum();
        let share = |holds: &dyn Fn(i64) -> bool| {
            let count: u64 = differential.iter().filter(|(d, _)| holds(**d)).map(|(_, n)| n).sum();
            if count == 0 { "-".to_owned() } else { report::percent(count as f64 / total as f64) }
        };
        // A read under Async may even return data of the reader's own clock or a later one.
        let fresh = share(&|d| d >= -1);
        let middle = (2..SHOWN).map(|lag| share(&|d| d == -lag));
        let old = share(&|d| d <= -SHOWN);
        table.row([run.title(), fresh].into_iter().chain(middle).chain([old]));
    }
    table
}
