//! The threads that move rows, and the one that watches how many they have moved.

use std::{
    hint::black_box,
    io::IsTerminal as _,
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

use anyhow::{Result, ensure};
use fervor_client::{Client, ClientOptions, Table, TableOptions, Worker};

use super::{CLOCKS, Op, Setting};
use crate::connect;

/// `get`s between two looks at whether the time is up.
const EACH: u64 = 64;

/// Rows of a shard that the client has room for that updates what another holds.
const FEW: usize = 4;

/// How often it is looked how far the workers are.
const LOOK: Duration = Duration::from_millis(100);

/// How long a cache may take to hold all rows.
const LONG: Duration = Duration::from_secs(10);

/// Rows that were moved in some time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Moved {
    pub(super) rows: u64,
    pub(super) seconds: f64,
    /// Rows a second, in the best tenth of a second.
    pub(super) peak: f64,
}

/// A counter that shares no cache line with others.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counter(AtomicU64);

/// Runs the workers for `duration`.
pub(super) fn move_rows(urls: &[String], setting: Setting, duration: Duration) -> Result<Moved> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Relaxed);
    let name = format!("throughput-{}-{}-{}-{number}", setting.op.name(), setting.size, std::process::id());
    let clients = if setting.op == Op::Push { 2 } else { 1 };
    // A row has a header and begins at a cache line. One table may take half of the cache.
    let stride = (32 + setting.size as usize).next_multiple_of(64);
    let options = ClientOptions {
        cache_bytes: (64 << 20).max(3 * setting.rows() as usize * stride),
        reads_in_flight: setting.outstanding as usize,
        ..connect::client_options(clients, setting.reads())
    };
    let open = |few: bool| -> Result<(Client, Table<i32>)> {
        let client = Client::connect_with(urls, options.clone())?;
        // Room for a few rows of each shard, and not for all.
        let cache_bytes = few.then(|| FEW * stride.max(128) * client.ways().len());
        let table = client.table_with(
            &name,
            setting.rows(),
            setting.size as usize / size_of::<i32>(),
            setting.op.model(),
            TableOptions { cache_bytes, ..TableOptions::default() },
        )?;
        Ok((client, table))
    };
    // Who updates rows that another client holds is to be pushed none of them: only the other's are counted.
    let (client, table) = open(setting.op == Op::Push)?;
    let seats = (0..setting.workers).map(|_| client.worker()).collect::<Result<Vec<_>, _>>()?;
    let reader = match setting.op {
        Op::Push => {
            let (client, table) = open(false)?;
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
            Op::Push => number * batch * CLOCKS,
            op if op.writes() => number * batch,
            _ => (number * batch) % setting.rows(),
        };
        let many = matches!(op, Op::ManyHit | Op::ManyInPlace | Op::Range | Op::ManyRead);
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
        if matches!(self.setting.op, Op::Hit | Op::InPlace | Op::ManyHit | Op::ManyInPlace | Op::Range) {
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
            Op::Range => {
                worker.get_range(table, self.rows[0], &mut self.values)?;
                black_box(&self.values);
                Ok(self.rows.len() as u64)
            }
            Op::ManyHit | Op::ManyInPlace | Op::ManyRead => {
                worker.get_many(table, &self.rows, &mut self.values)?;
                black_box(&self.values);
                let (batch, all) = (self.rows.len() as u64, table.rows());
                if batch < all {
                    self.rows.iter_mut().for_each(|row| *row = (*row + batch) % all);
                }
                Ok(batch)
            }
            Op::Inc => {
                for &row in &self.rows {
                    worker.inc(table, row, &self.values)?;
                }
                worker.clock()?;
                Ok(self.rows.len() as u64)
            }
            Op::Push => {
                for &row in &self.rows {
                    worker.inc_at(table, row, &[(0, 1)])?;
                }
                worker.clock()?;
                // Waits for the reader, so that each clock has a round of its own. All workers look at one row, which is the only one
                // that is pushed to this client.
                worker.get(table, 0, &mut self.values)?;
                // Other rows in each clock that the reader may be behind: else a round would push several clocks' updates of a row at
                // once.
                let batch = self.rows.len() as u64;
                let own = CLOCKS * batch;
                self.rows.iter_mut().for_each(|row| *row = *row / own * own + (*row + batch) % own);
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

#[cfg(test)]
mod tests {
    use super::{super::tests::setting, *};

    #[test]
    fn a_time_without_progress_is_no_peak() {
        let start = Instant::now();
        let stop = AtomicBool::new(false);
        let count = || if start.elapsed() < Duration::from_millis(150) { 0 } else { 1000 };
        let moved = watch(setting(Op::Hit), Duration::from_millis(350), &stop, count, || false);
        assert!(stop.load(SeqCst));
        assert_eq!(moved.rows, 1000);
        assert!(moved.seconds >= 0.35 && moved.peak >= 1000.0 / moved.seconds, "{moved:?}");
        let ended = watch(setting(Op::Hit), Duration::from_secs(60), &stop, || 5, || true);
        assert_eq!(ended.rows, 0);
    }
}
