//! What the user of `fervor-bench mf` gets: a table on the terminal, and a JSON file.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use super::{
    messages::{Bytes, Epoch, Tally},
    options::MfOptions,
};
use crate::{
    data::Ratings,
    machine::Machine,
    report::{self, TextTable},
};

/// The results of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// `mf`.
    pub application: String,
    /// `bsp`, `ssp`, `essp`, `async`; `none` without a parameter server.
    pub model: String,
    /// Greatest lag of a read in clocks, where the model has one.
    pub staleness: Option<u32>,
    /// Client processes.
    pub clients: u16,
    /// The bound in the first clock, under `vap`.
    #[serde(default)]
    pub v0: Option<f32>,
    /// Worker threads of each.
    pub workers: u16,
    /// If this is the part of a single client of the job: which.
    pub client_index: Option<u16>,
    /// What was trained on.
    pub data: Data,
    /// Numbers in a factor.
    pub rank: u32,
    /// Clocks of a worker in an epoch.
    pub clocks_per_epoch: u32,
    /// Size of a step in the first epoch.
    pub step: f32,
    /// What the step is multiplied with after each epoch.
    pub decay: f32,
    /// Seed of generated data, initial factors and the order of the ratings.
    pub seed: u64,
    /// After each epoch, and (as epoch 0) before the first: the time that the slowest worker has trained, and the sum
    /// of squared errors.
    pub epochs: Vec<Epoch>,
    /// The loss that was to be reached.
    pub target_loss: Option<f64>,
    /// When it was first reached at the end of an epoch.
    pub seconds_to_target: Option<f64>,
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
    /// Where this was measured.
    pub machine: Machine,
    /// The column factors, one after the other, if they were kept.
    #[serde(skip)]
    pub factors: Option<Vec<f32>>,
}

/// What was trained on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Data {
    /// Where it came from, and how it was understood.
    pub source: String,
    /// Rows of the matrix.
    pub rows: u32,
    /// Columns of the matrix.
    pub columns: u32,
    /// Known entries.
    pub ratings: u64,
}

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
    /// By the client's cache.
    pub hits: u64,
    /// Not by the cache.
    pub misses: u64,
    /// READs of server memory.
    pub reads: u64,
}

impl Report {
    /// The report of a job, or of its client number `client_index`.
    pub fn new(
        options: &MfOptions,
        ratings: &Ratings,
        tally: Tally,
        target_loss: Option<f64>,
        client_index: Option<u16>,
    ) -> Self {
        let accesses = tally.accesses();
        let total: f64 = tally.reports.iter().map(|report| report.seconds).sum();
        let clocks: u64 = tally.reports.iter().map(|report| report.clocks).sum();
        let share = |part: f64| if total > 0.0 { (part / total).min(1.0) } else { 0.0 };
        let (waiting, communication) = (share(accesses.waiting), share(accesses.communicating));
        let training = options.training(ratings);
        let mut report = Report {
            application: "mf".into(),
            model: options.model_name(),
            staleness: options.staleness(),
            v0: options.model.v0,
            clients: options.clients,
            workers: options.workers,
            client_index,
            data: Data {
                source: ratings.source.clone(),
                rows: ratings.rows,
                columns: ratings.columns,
                ratings: ratings.entries.len() as u64,
            },
            rank: options.rank,
            clocks_per_epoch: options.clocks_per_epoch,
            step: training.step,
            decay: training.decay,
            seed: options.seed,
            target_loss: None,
            seconds_to_target: None,
            seconds: tally.reports.iter().map(|report| report.seconds).fold(0.0, f64::max),
            clocks_per_second: if total > 0.0 { clocks as f64 / total } else { 0.0 },
            time: Time { compute: (1.0 - waiting - communication).max(0.0), waiting, communication },
            clock_differential: accesses.clock_differential,
            cache: Cache { hits: accesses.hits, misses: accesses.misses, reads: accesses.reads },
            bytes: tally.bytes,
            machine: Machine::this(),
            factors: tally.reports.iter().find_map(|report| report.factors.clone()),
            epochs: tally.epochs,
        };
        target_loss.into_iter().for_each(|target| report.aim(target));
        report
    }

    /// Sets the target loss: when was it reached?
    pub fn aim(&mut self, target: f64) {
        self.target_loss = Some(target);
        self.seconds_to_target =
            self.epochs.iter().find(|epoch| epoch.loss <= target).map(|epoch| epoch.seconds);
    }

    /// The model with its staleness.
    pub fn title(&self) -> String {
        match (self.model.as_str(), self.staleness) {
            ("none", _) => "plain threads".into(),
            ("vap", _) => format!("vap({})", self.v0.unwrap_or_default()),
            ("bsp", _) | (_, None) => self.model.clone(),
            (model, Some(staleness)) => format!("{model}({staleness})"),
        }
    }

    /// The last epoch that all workers finished.
    pub fn last(&self) -> Option<&Epoch> {
        self.epochs.last()
    }

    /// The mean of the clock differential; none without reads.
    pub fn mean_differential(&self) -> Option<f64> {
        let count: u64 = self.clock_differential.values().sum();
        let sum: f64 = self.clock_differential.iter().map(|(&d, &count)| d as f64 * count as f64).sum();
        (count > 0).then(|| sum / count as f64)
    }

    /// The column factors, one array for each column, if they were kept.
    pub fn factors_by_column(&self) -> Option<Vec<&[f32]>> {
        Some(self.factors.as_ref()?.chunks(self.rank as usize).collect())
    }
}

/// A comparison of runs.
pub fn comparison(reports: &[Report]) -> TextTable {
    let mut table = TextTable::new([
        "model",
        "epochs",
        "seconds",
        "loss",
        "to target",
        "clocks/s",
        "compute",
        "waiting",
        "comm.",
        "differential",
        "READ",
        "pushed",
        "sent",
    ]);
    for report in reports {
        let Time { compute, waiting, communication } = report.time;
        table.row([
            report.title(),
            report.last().map_or("-".into(), |epoch| epoch.epoch.to_string()),
            format!("{:.3}", report.seconds),
            report.last().map_or("-".into(), |epoch| format!("{:.4e}", epoch.loss)),
            report.seconds_to_target.map_or("-".into(), |seconds| format!("{seconds:.3} s")),
            format!("{:.0}", report.clocks_per_second),
            report::percent(compute),
            report::percent(waiting),
            report::percent(communication),
            report.mean_differential().map_or("-".into(), |mean| format!("{mean:.2}")),
            report::bytes(report.bytes.read),
            report::bytes(report.bytes.pushed),
            report::bytes(report.bytes.sent),
        ]);
    }
    table
}

/// How old the data was that the reads of several runs returned: the share of each clock differential.
pub fn differentials(reports: &[Report]) -> TextTable {
    // Beyond this lie the tails of runs without a bound.
    const SHOWN: i64 = 6;
    let head = (1..SHOWN).map(|lag| format!("-{lag}")).chain([format!("-{SHOWN} and less")]);
    let mut table = TextTable::new(["clock differential".to_owned()].into_iter().chain(head));
    for report in reports.iter().filter(|report| !report.clock_differential.is_empty()) {
        let total: u64 = report.clock_differential.values().sum();
        let share = |holds: &dyn Fn(i64) -> bool| {
            let count: u64 =
                report.clock_differential.iter().filter(|(d, _)| holds(**d)).map(|(_, n)| n).sum();
            if count == 0 { "-".to_owned() } else { report::percent(count as f64 / total as f64) }
        };
        // A read under Async may even return data of the reader's own clock or a later one.
        let fresh = share(&|d| d >= -1);
        let middle = (2..SHOWN).map(|lag| share(&|d| d == -lag));
        let old = share(&|d| d <= -SHOWN);
        table.row([report.title(), fresh].into_iter().chain(middle).chain([old]));
    }
    table
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Data { source, rows, columns, ratings } = &self.data;
        writeln!(f, "{source}: {ratings} ratings of {rows} x {columns}")?;
        let part =
            self.client_index.map_or(String::new(), |index| format!(" (this is the part of client {index})"));
        writeln!(
            f,
            "rank {}, {} clocks/epoch, step {:.3e} x {} each epoch, {} clients x {} workers, seed {}{part}",
            self.rank, self.clocks_per_epoch, self.step, self.decay, self.clients, self.workers, self.seed
        )?;
        writeln!(f, "{}\n", self.machine)?;
        let first = self.epochs.first().map_or(f64::NAN, |epoch| epoch.loss);
        let mut table = TextTable::new(["epoch", "seconds", "loss", "of the first"]);
        let shown = self.epochs.len().div_ceil(10).max(1);
        for epoch in self.epochs.iter().filter(|e| e.epoch % shown == 0 || Some(*e) == self.last()) {
            table.row([
                epoch.epoch.to_string(),
                format!("{:.4}", epoch.seconds),
                format!("{:.6e}", epoch.loss),
                report::percent(epoch.loss / first),
            ]);
        }
        writeln!(f, "{table}")?;
        if let Some(target) = self.target_loss {
            match self.seconds_to_target {
                Some(seconds) => writeln!(f, "target {target:.6e} reached after {seconds:.4} s\n")?,
                None => writeln!(f, "target {target:.6e} not reached\n")?,
            }
        }
        writeln!(f, "{}", comparison(std::slice::from_ref(self)))?;
        if !self.clock_differential.is_empty() {
            writeln!(f, "{}", differentials(std::slice::from_ref(self)))?;
            let Cache { hits, misses, reads } = self.cache;
            writeln!(f, "cache: {hits} hits, {misses} misses, {reads} READs")?;
        }
        Ok(())
    }
}
