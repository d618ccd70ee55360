//! A check of the guarantee that all else rests on, at any size, over any transport.
//!
//! Every worker adds 1 to its own elements each clock; every worker reads all elements of all others. At its clock `c`
//! under staleness `s` it must see at least the first `c - s` additions of each, at most those that have been
//! made, its own exactly, and each row as a snapshot. Under VAP it must see all that had been made before its read (`made`,
//! raised after they were) but those that the bound lets be in transit. At the end every addition is there once.
//!
//! Clocks are counted here, by the application: nothing rests on what the client says of itself.
//!
//! A row has an element for each worker, several times over: element `i` belongs to worker `i mod workers`. Rows are dealt to
//! the shards in turn, so several rows test several shards. All clients live in this process, so that what has
//! been added is known to everyone (`added`, which a worker raises before it adds).

use std::{
    fmt,
    ops::RangeInclusive,
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, value_parser};
use fervor_client::{Client, ClientOptions, Model, Table, TableOptions, Worker, value_bound};

use crate::{
    connect::{self, ReadOptions},
    model::ModelOptions,
    report::TextTable,
    server::{EmbeddedOptions, EmbeddedServer},
};

/// Options of `fervor-bench check`.
#[derive(Debug, Clone, Args)]
pub struct CheckOptions {
    /// Clocks of each worker
    #[arg(long, default_value_t = 5000, value_parser = value_parser!(u64).range(1..))]
    pub clocks: u64,
    /// Clients
    #[arg(long, default_value_t = 2, value_parser = value_parser!(u16).range(1..=256))]
    pub clients: u16,
    /// Workers of each client
    #[arg(long, default_value_t = 2, value_parser = value_parser!(u16).range(1..=256))]
    pub workers: u16,
    /// Rows of the table
    #[arg(long, default_value_t = 4, value_parser = value_parser!(u16).range(1..))]
    pub rows: u16,
    /// Elements of a row, at least one for each worker
    #[arg(long, default_value_t = 40, value_parser = value_parser!(u16).range(1..))]
    pub width: u16,
    /// The consistency model
    #[command(flatten)]
    pub model: ModelOptions,
    /// How rows are read.
    #[command(flatten)]
    pub reads: ReadOptions,
    /// Check a running server instead of starting one; may be repeated
    #[arg(long, value_name = "URL")]
    pub server: Vec<String>,
    /// The server that is started if none is named.
    #[command(flatten)]
    pub embedded: EmbeddedOptions,
}

/// What was checked, without a violation.
#[derive(Debug, Clone)]
pub struct Checked {
    model: String,
    clocks: u64,
    workers: usize,
    /// Elements that were compared with their bounds.
    pub elements: u64,
    hits: u64,
    misses: u64,
    torn: u64,
    /// `get`s that were older than the model allows, as the workers themselves count them.
    violations: u64,
    seconds: f64,
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = TextTable::new([
            "model",
            "workers",
            "clocks",
            "elements checked",
            "hits",
            "misses",
            "torn READs",
            "seconds",
            "violations",
        ]);
        table.row([
            self.model.clone(),
            self.workers.to_string(),
            self.clocks.to_string(),
            self.elements.to_string(),
            self.hits.to_string(),
            self.misses.to_string(),
            self.torn.to_string(),
            format!("{:.2}", self.seconds),
            self.violations.to_string(),
        ]);
        table.fmt(f)
    }
}

/// Runs the check.
///
/// # Errors
/// The first violation, or whatever the client says.
pub fn run(options: &CheckOptions) -> Result<Checked> {
    options.model.validate()?;
    let all = usize::from(options.clients) * usize::from(options.workers);
    ensure!(
        usize::from(options.width) >= all,
        "--width {} is too small: {all} workers need as many elements, so write at least that number",
        options.width
    );
    // One more client, for the sums at the end.
    let embedded = match options.server.is_empty() {
        true => Some(EmbeddedServer::start(
            &options.embedded,
            options.clients + 1,
            options.reads.lanes(options.workers),
        )?),
        false => None,
    };
    let urls = embedded.as_ref().map_or(options.server.clone(), |server| vec![server.url().to_owned()]);
    let name = format!("check-{}-{}", options.model, std::process::id());
    let job = Job {
        name,
        staleness: options.model.bounded_by().map(Into::into),
        model: options.model.model(),
        reads: options.reads,
        table: options.model.table(),
        rows: options.rows.into(),
        width: options.width.into(),
        clocks: options.clocks,
        added: (0..all).map(|_| AtomicU64::new(0)).collect(),
        made: (0..all).map(|_| AtomicU64::new(0)).collect(),
        ready: Barrier::new(options.clients.into()),
        failed: AtomicBool::new(false),
    };
    let start = Instant::now();
    let counts = thread::scope(|scope| {
        let clients: Vec<_> = (0..options.clients)
            .map(|index| {
                let (job, urls) = (&job, &urls);
                scope.spawn(move || client(job, urls, index, options.clients, options.workers))
            })
            .collect();
        clients
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
            .collect::<Result<Vec<_>>>()
    })?;
    let seconds = start.elapsed().as_secs_f64();
    sums(&job, &urls)?;
    let sum = |count: fn(&Counts) -> u64| counts.iter().flatten().map(count).sum();
    let violations = sum(|c| c.violations);
    ensure!(violations == 0, "{violations} gets were older than the model allows");
    Ok(Checked {
        violations,
        model: options.model.to_string(),
        clocks: options.clocks,
        workers: all,
        elements: sum(|c| c.elements),
        hits: sum(|c| c.hits),
        misses: sum(|c| c.misses),
        torn: sum(|c| c.torn),
        seconds,
    })
}

struct Job {
    name: String,
    model: Model,
    reads: ReadOptions,
    table: TableOptions,
    staleness: Option<u64>,
    rows: u64,
    width: usize,
    clocks: u64,
    /// How often each worker has added, or is about to.
    added: Vec<AtomicU64>,
    /// How often each worker has added to every row.
    made: Vec<AtomicU64>,
    /// All clients have their workers: nobody ends a clock before.
    ready: Barrier,
    /// Somebody has failed: no need to go on.
    failed: AtomicBool,
}

struct Counts {
    elements: u64,
    hits: u64,
    misses: u64,
    torn: u64,
    violations: u64,
}

fn client(job: &Job, urls: &[String], index: u16, clients: u16, workers: u16) -> Result<Vec<Counts>> {
    let made = || -> Result<_> {
        let client = Client::connect_with(
            urls,
            ClientOptions { check: true, ..connect::client_options(clients, job.reads) },
        )?;
        let table = client.table_with::<i64>(&job.name, job.rows, job.width, job.model, job.table)?;
        let workers = (0..workers).map(|_| client.worker()).collect::<Result<Vec<_>, _>>()?;
        Ok((client, table, workers))
    }();
    // Whoever failed must not leave the others waiting.
    job.ready.wait();
    let (client, table, seats) = made?;
    let first = usize::from(index) * usize::from(workers);
    let counts = thread::scope(|scope| {
        let table = &table;
        let threads: Vec<_> = (first..)
            .zip(seats)
            .map(|(me, worker)| {
                scope.spawn(move || {
                    let outcome = Checker { job, table, worker, me, elements: 0, made: Vec::new() }.run();
                    job.failed.fetch_or(outcome.is_err(), SeqCst);
                    outcome
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
            .collect::<Result<Vec<_>>>()
    })?;
    client.close()?;
    Ok(counts)
}

struct Checker<'a> {
    job: &'a Job,
    table: &'a Table<i64>,
    worker: Worker,
    me: usize,
    elements: u64,
    /// What the others had made before the last read.
    made: Vec<u64>,
}

impl Checker<'_> {
    fn run(mut self) -> Result<Counts> {
        let Job { rows, width, clocks, .. } = *self.job;
        let (all, me) = (self.job.added.len(), self.me);
        let mut row_values = vec![0i64; width];
        let dense: Vec<i64> = (0..width).map(|i| i64::from(i % all == me)).collect();
        let sparse: Vec<(u32, i64)> = (0..width).filter(|i| i % all == me).map(|i| (i as u32, 1)).collect();
        for clock in 0..clocks {
            if self.job.failed.load(SeqCst) {
                break;
            }
            // Others start elsewhere, so that all rows are read and written at all times.
            for row in (0..rows).map(|row| (row + me as u64) % rows) {
                self.read(row, &mut row_values)?;
                self.examine(row, clock, &row_values, clock)?;
            }
            self.job.added[self.me].store(clock + 1, SeqCst);
            for row in 0..rows {
                // Both forms of update, in turn.
                match (clock + row) % 2 {
                    0 => self.worker.inc(self.table, row, &dense)?,
                    _ => self.worker.inc_at(self.table, row, &sparse)?,
                }
            }
            self.job.made[self.me].store(clock + 1, SeqCst);
            let row = clock % rows;
            self.read(row, &mut row_values)?;
            self.examine(row, clock, &row_values, clock + 1)?;
            self.worker.clock()?;
        }
        let stats = self.worker.stats();
        Ok(Counts {
            elements: self.elements,
            hits: stats.hits,
            misses: stats.misses,
            torn: stats.torn,
            violations: stats.violations,
        })
    }

    fn read(&mut self, row: u64, into: &mut [i64]) -> Result<()> {
        self.made.clear();
        self.made.extend(self.job.made.iter().map(|made| made.load(SeqCst)));
        Ok(self.worker.get(self.table, row, into)?)
    }

    /// Compares what was read of `row` at `clock` with the bounds; `own` is how often this worker has added to it.
    fn examine(&mut self, row: u64, clock: u64, values: &[i64], own: u64) -> Result<()> {
        let least = self.job.staleness.map_or(0, |staleness| clock.saturating_sub(staleness));
        let bounds = self.job.added.iter().zip(&self.made).enumerate().map(|(worker, (added, &made))| {
            // The last of them was made at clock `made - 1`. An addition may always be in transit alone.
            let transit = value_bound(self.job.model, made).max(1.0);
            let least = if transit.is_finite() { made.saturating_sub(transit as u64) } else { least };
            // Loaded after the row was read: whatever the row contains had been announced before.
            if worker == self.me { own..=own } else { least..=added.load(SeqCst) }
        });
        if let Some(violation) = violation(values, bounds) {
            bail!("worker {}, at clock {clock}, read row {row} with {violation}", self.me);
        }
        self.elements += values.len() as u64;
        Ok(())
    }
}

/// What is wrong with a row, of whose elements each worker in turn has one: how often it has added must be within
/// its bounds, and the same in all of its elements.
fn violation(values: &[i64], bounds: impl ExactSizeIterator<Item = RangeInclusive<u64>>) -> Option<String> {
    let workers = bounds.len();
    bounds.enumerate().find_map(|(worker, bounds)| {
        let seen = values[worker];
        if !u64::try_from(seen).is_ok_and(|seen| bounds.contains(&seen)) {
            let (least, most) = bounds.into_inner();
            return Some(format!("{seen} additions of worker {worker}, not {least} to {most}"));
        }
        let other = values[worker..].iter().step_by(workers).find(|value| **value != seen)?;
        Some(format!("{seen} additions of worker {worker}, and {other} elsewhere: no snapshot"))
    })
}

/// Everything that was added is there, once.
fn sums(job: &Job, urls: &[String]) -> Result<()> {
    let client = Client::connect(urls)?;
    let table = client.table_with::<i64>(&job.name, job.rows, job.width, job.model, job.table)?;
    let mut worker = client.worker()?;
    let mut values = vec![0; job.width];
    for row in 0..job.rows {
        worker.get(&table, row, &mut values)?;
        for (element, &value) in values.iter().enumerate() {
            let worker = element % job.added.len();
            ensure!(
                value == job.clocks as i64,
                "at the end, row {row} has {value} additions of worker {worker}, not {}: some were lost or applied twice",
                job.clocks
            );
        }
    }
    drop(worker);
    client.close().context("cannot leave the job")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_violation_is_found() {
        let check = |values: &[i64]| violation(values, [5..=5, 2..=7].into_iter());
        assert_eq!(check(&[5, 2, 5, 2]), None);
        assert_eq!(check(&[5, 7, 5, 7, 5]), None);
        for (values, what) in [
            ([4, 2, 4, 2], "4 additions of worker 0, not 5 to 5"),
            ([6, 2, 6, 2], "6 additions of worker 0, not 5 to 5"),
            ([5, 1, 5, 1], "1 additions of worker 1, not 2 to 7"),
            ([5, 8, 5, 8], "8 additions of worker 1, not 2 to 7"),
            ([5, -1, 5, -1], "-1 additions of worker 1"),
            ([5, 3, 5, 4], "3 additions of worker 1, and 4 elsewhere: no snapshot"),
            ([5, 3, 4, 3], "5 additions of worker 0, and 4 elsewhere: no snapshot"),
        ] {
            assert!(
                check(&values).is_some_and(|found| found.contains(what)),
                "{values:?}: {:?}",
                check(&values)
            );
        }
    }
}
