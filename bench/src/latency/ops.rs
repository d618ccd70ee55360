//! The operations, each prepared so that it can be measured again and again.

use std::{
    hint::black_box,
    process,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU32,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use fervor_client::{Client, Error, Model, Table, Worker};
use hdrhistogram::Histogram;

use super::{Op, load::Load};
use crate::connect::{self, ReadOptions};

/// Operations that are timed together, each on another row.
pub const GROUP: u64 = 16;
/// Rows of one `get_many`.
pub const MANY: usize = 64;
/// `get`s of `visible` between two offers of the core to other threads.
const BURST: usize = 16;
/// Bytes of the table whose rows are READ in turn.
const MISS_BYTES: usize = 4 << 20;
/// Groups of `inc`s between two clocks, which are not timed.
const CLOCK_EVERY: u64 = 64;
/// The reader of `visible` ends as many clocks at once, before the writer does, so that the shard clock is the writer's.
const AHEAD: u64 = 8;
/// How long an update may take to be seen, and a cache to warm up.
const LONG: Duration = Duration::from_secs(10);
/// A reader that has waited so long for an update asks the servers whether they are there, and again after as long.
const DOUBT: Duration = Duration::from_millis(100);
/// Updates that are not counted, of a new connection.
const WARM_UP: u64 = 100;
/// Of so many updates, one may be READ: a poller that loses the processor in the middle of a push leaves a copy half written.
const ONE_READ_IN: u64 = 10;
/// Longest latency that a histogram can tell from others.
const LONGEST_NS: u64 = 60_000_000_000;

/// A histogram of nanoseconds, exact to three digits.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LONGEST_NS, 3).expect("the bounds are sound")
}

/// Nanoseconds that reading the time twice costs: the median over many pairs.
pub fn timer_ns() -> u64 {
    let mut pairs: Vec<Duration> = (0..10_001)
        .map(|_| {
            let before = Instant::now();
            before.elapsed()
        })
        .collect();
    pairs.sort_unstable();
    pairs[pairs.len() / 2].as_nanos() as u64
}

/// Rows of the table whose rows are READ in turn. The least row takes a cache line.
fn miss_rows(size: usize) -> usize {
    (MISS_BYTES / size.max(64)).max(MANY)
}

/// Bytes of all of its rows.
pub fn miss_bytes(size: usize) -> usize {
    miss_rows(size) * size
}

fn record(histogram: &mut Histogram<u64>, nanoseconds: u64) {
    histogram.saturating_record(nanoseconds.max(1));
}

/// Connections and tables, ready to measure an operation.
#[derive(Debug)]
pub enum Prepared {
    /// See [`Op::Hit`] and [`Op::InPlace`].
    Hit(Seat),
    /// See [`Op::Miss`].
    Miss(Seat),
    /// See [`Op::Many`].
    Many(Seat),
    /// See [`Op::Inc`].
    Inc(Seat),
    /// See [`Op::Clock`].
    Clock(Seat),
    /// See [`Op::Visible`]: the reader and the writer.
    Visible(Seat, Box<Seat>),
    /// See [`Op::Barrier`]: one client, and the thread of the other.
    Barrier(Seat, Partner),
}

/// A client with one worker and one table.
#[derive(Debug)]
pub struct Seat {
    client: Client,
    table: Table<i32>,
    /// READ to find out whether the servers are there.
    pulse: Table<i32>,
    worker: Worker,
    row: Vec<i32>,
    rows: u64,
}

impl Seat {
    fn new(
        urls: &[String],
        name: &str,
        rows: u64,
        size: u32,
        model: Model,
        clients: u16,
        reads: ReadOptions,
    ) -> Result<Self> {
        let client = Client::connect_with(urls, connect::client_options(clients, reads))?;
        let width = size as usize / size_of::<i32>();
        let table = client.table(name, rows, width, model)?;
        let pulse = client.table(&format!("{name}/pulse"), 256, 1, Model::Async)?;
        let worker = client.worker()?;
        Ok(Seat { client, table, pulse, worker, row: vec![0; width], rows })
    }

    fn close(self) -> Result<()> {
        drop(self.worker);
        Ok(self.client.close()?)
    }

    fn hits(&mut self, load: Load, histogram: &mut Histogram<u64>) -> Result<()> {
        self.warm_up()?;
        let before = self.worker.stats().misses;
        let group = load.group(GROUP);
        let mut schedule = load.begin(group);
        let mut first = 0;
        while let Some(start) = schedule.next_due() {
            for row in first..first + group {
                self.worker.get(&self.table, row, &mut self.row)?;
                black_box(&self.row);
            }
            record(histogram, start.elapsed().as_nanos() as u64 / group);
            first = (first + group) % GROUP;
        }
        let missed = self.worker.stats().misses - before;
        ensure!(
            missed == 0,
            "{missed} of the gets were not answered by the cache, but only such gets count as hits"
        );
        Ok(())
    }

    /// Reads all rows until the cache answers for each: a pushed row is there once the server has acknowledged it.
    fn warm_up(&mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            let before = self.worker.stats().misses;
            for row in 0..self.rows {
                self.worker.get(&self.table, row, &mut self.row)?;
            }
            if self.worker.stats().misses == before {
                return Ok(());
            }
            ensure!(start.elapsed() < LONG, "the cache did not keep {} rows within {LONG:?}", self.rows);
            // Lets the client hear of the acknowledgement.
            self.worker.clock()?;
        }
    }

    fn misses(&mut self, load: Load, histogram: &mut Histogram<u64>) -> Result<()> {
        for row in 0..self.rows {
            self.worker.get(&self.table, row, &mut self.row)?;
        }
        let before = self.worker.stats();
        let mut schedule = load.begin(1);
        let mut row = 0;
        while let Some(start) = schedule.next_due() {
            self.worker.get(&self.table, row, &mut self.row)?;
            let taken = start.elapsed();
            black_box(&self.row);
            record(histogram, taken.as_nanos() as u64);
            row = (row + 1) % self.rows;
        }
        let (after, count) = (self.worker.stats(), schedule.begun());
        let (missed, reads) = (after.misses - before.misses, after.reads - before.reads);
        ensure!(
            missed == count && reads == count,
            "{count} gets missed the cache {missed} times and took {reads} READs, but each must miss and take one READ"
        );
        Ok(())
    }

    fn many(&mut self, load: Load, histogram: &mut Histogram<u64>) -> Result<()> {
        let mut rows: Vec<u64> = (0..MANY as u64).collect();
        let mut into = vec![0; MANY * self.row.len()];
        self.worker.get_many(&self.table, &rows, &mut into)?;
        let mut schedule = load.begin(1);
        while let Some(start) = schedule.next_due() {
            self.worker.get_many(&self.table, &rows, &mut into)?;
            record(histogram, start.elapsed().as_nanos() as u64);
            black_box(&into);
            rows.iter_mut().for_each(|row| *row = (*row + MANY as u64) % self.rows);
        }
        Ok(())
    }

    fn incs(&mut self, load: Load, histogram: &mut Histogram<u64>) -> Result<()> {
        self.row.fill(1);
        let group = load.group(GROUP);
        let mut schedule = load.begin(group);
        let mut first = 0;
        while let Some(start) = schedule.next_due() {
            for row in first..first + group {
                self.worker.inc(&self.table, row, &self.row)?;
            }
            record(histogram, start.elapsed().as_nanos() as u64 / group);
            first = (first + group) % GROUP;
            if schedule.begun().is_multiple_of(CLOCK_EVERY * GROUP) {
                self.worker.clock()?;
            }
        }
        Ok(self.worker.clock()?)
    }

    fn clocks(&mut self, load: Load, histogram: &mut Histogram<u64>) -> Result<()> {
        self.row.fill(1);
        let mut schedule = load.begin(1);
        while let Some(start) = schedule.next_due() {
            self.worker.inc(&self.table, 0, &self.row)?;
            // In a closed loop the update itself is not timed.
            let start = if load.rate.is_some() { start } else { Instant::now() };
            self.worker.clock()?;
            record(histogram, start.elapsed().as_nanos() as u64);
        }
        Ok(())
    }

    /// One update of `writer` after the other, read here until it is there. For how many updates this had to READ.
    ///
    /// One thread is both clients: where cores are few, a thread for each would measure how the kernel places three.
    fn visible(&mut self, writer: &mut Seat, load: Load, histogram: &mut Histogram<u64>) -> Result<u64> {
        let delta = vec![1; writer.row.len()];
        let mut seen = self.row[0];
        let (mut misses, mut read_instead) = (self.worker.stats().misses, 0);
        let mut schedule = load.begin(1);
        while let Some(due) = schedule.next_due() {
            // Not between two updates: it would be in the way of the second.
            if (seen as u64).is_multiple_of(AHEAD) {
                (0..AHEAD).try_for_each(|_| self.worker.clock())?;
            }
            let start = if load.rate.is_some() { due } else { Instant::now() };
            writer.worker.inc(&writer.table, 0, &delta)?;
            writer.worker.clock()?;
            let now = self.await_change(seen)?;
            record(histogram, (now - start).as_nanos() as u64);
            ensure!(
                self.row[0] == seen + 1,
                "the row went from {seen} to {}, but one update adds 1",
                self.row[0]
            );
            seen = self.row[0];
            let before = std::mem::replace(&mut misses, self.worker.stats().misses);
            read_instead += u64::from(misses > before);
        }
        Ok(read_instead)
    }

    /// Reads until the row is not `seen` any more. When that was.
    fn await_change(&mut self, seen: i32) -> Result<Instant> {
        let start = Instant::now();
        let mut doubt = start + DOUBT;
        loop {
            for _ in 0..BURST {
                self.worker.get(&self.table, 0, &mut self.row)?;
                if self.row[0] != seen {
                    return Ok(Instant::now());
                }
            }
            // Where cores are few, the server may need this one to do what is being waited for.
            thread::yield_now();
            let now = Instant::now();
            if now > doubt {
                self.ask_for_life()?;
                doubt = now + DOUBT;
            }
            ensure!(now - start <= LONG, "an update was not seen within {LONG:?}");
        }
    }

    /// READs a row of every shard. A cache that answers does not notice that its servers are gone.
    fn ask_for_life(&mut self) -> Result<(), Error> {
        let mut word = [0];
        (0..self.pulse.rows()).try_for_each(|row| self.worker.get(&self.pulse, row, &mut word))
    }

    /// Two clocks, each until the other client has ended its own.
    fn barriers(&mut self, load: Load, histogram: &mut Histogram<u64>) -> Result<()> {
        let mut schedule = load.begin(1);
        while let Some(start) = schedule.next_due() {
            self.meet()?;
            self.meet()?;
            record(histogram, start.elapsed().as_nanos() as u64);
        }
        Ok(())
    }

    /// Ends a clock, and waits until the other client has ended it.
    fn meet(&mut self) -> Result<(), Error> {
        self.worker.clock()?;
        self.worker.get(&self.table, 0, &mut self.row)
    }
}

/// Fails if too many of the updates were READ.
///
/// What is counted is updates, not `get`s: a reader that finds its copy half written READs again and again until the poller has
/// the processor back and writes the rest.
fn seen_in_cache(read: u64, updates: u64) -> Result<()> {
    ensure!(
        read * ONE_READ_IN <= updates,
        "{read} of {updates} updates were READ: the cache alone must show nearly all of them"
    );
    Ok(())
}

/// The thread of the other client of a barrier, which does nothing else.
#[derive(Debug)]
pub struct Partner {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<Result<()>>,
}

impl Partner {
    fn start(mut seat: Seat) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = stop.clone();
            move || {
                while !stop.load(SeqCst) {
                    seat.meet()?;
                }
                seat.close()
            }
        });
        Partner { stop, thread }
    }

    /// Ends it, and the client of `seat`, for whose clock it may be waiting.
    fn close(self, seat: Seat) -> Result<()> {
        self.stop.store(true, SeqCst);
        let outcome = seat.close();
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        outcome
    }
}

impl Prepared {
    /// Connects to the servers at `urls` and makes the tables.
    ///
    /// # Errors
    /// What the client says.
    pub fn new(urls: &[String], op: Op, size: u32) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Relaxed);
        let name = format!("latency-{}-{size}-{}-{number}", op.name(), process::id());
        // All but `in-place` are about what happens over a network.
        let reads = ReadOptions { copies: op != Op::InPlace, ..ReadOptions::default() };
        let seat = |rows, model, clients| Seat::new(urls, &name, rows, size, model, clients, reads);
        let all = miss_rows(size as usize) as u64;
        Ok(match op {
            Op::Hit | Op::InPlace => Prepared::Hit(seat(GROUP, Model::Essp { staleness: 0 }, 1)?),
            Op::Miss => Prepared::Miss(seat(all, Model::Async, 1)?),
            Op::Many => Prepared::Many(seat(all, Model::Async, 1)?),
            Op::Inc => Prepared::Inc(seat(GROUP, Model::Async, 1)?),
            Op::Clock => Prepared::Clock(seat(1, Model::Async, 1)?),
            Op::Visible => {
                let model = Model::Essp { staleness: 4 * AHEAD as u32 };
                let mut reader = seat(1, model, 2)?;
                let writer = seat(1, model, 2)?;
                reader.worker.get(&reader.table, 0, &mut reader.row)?;
                Prepared::Visible(reader, Box::new(writer))
            }
            Op::Barrier => {
                let (one, other) = (seat(1, Model::Bsp, 2)?, seat(1, Model::Bsp, 2)?);
                Prepared::Barrier(one, Partner::start(other))
            }
        })
    }

    /// Measures operations into `histogram`, in nanoseconds. Of `visible`, for how many updates the reader had to READ.
    ///
    /// # Errors
    /// What the client says; an operation that was not what it is called.
    pub fn measure(&mut self, load: Load, histogram: &mut Histogram<u64>) -> Result<u64> {
        match self {
            Prepared::Hit(seat) => seat.hits(load, histogram)?,
            Prepared::Miss(seat) => seat.misses(load, histogram)?,
            Prepared::Many(seat) => seat.many(load, histogram)?,
            Prepared::Inc(seat) => seat.incs(load, histogram)?,
            Prepared::Clock(seat) => seat.clocks(load, histogram)?,
            Prepared::Barrier(seat, _) => seat.barriers(load, histogram)?,
            Prepared::Visible(reader, writer) => {
                // The subscription may still be on its way at the first updates.
                reader.visible(writer, Load::count(WARM_UP), &mut self::histogram())?;
                let before = histogram.len();
                let read = reader.visible(writer, load, histogram)?;
                let count = histogram.len() - before;
                seen_in_cache(read, count)?;
                return Ok(read);
            }
        }
        Ok(0)
    }

    /// Leaves the servers.
    ///
    /// # Errors
    /// What the client says.
    pub fn close(self) -> Result<()> {
        match self {
            Prepared::Hit(seat)
            | Prepared::Miss(seat)
            | Prepared::Many(seat)
            | Prepared::Inc(seat)
            | Prepared::Clock(seat) => seat.close(),
            Prepared::Barrier(seat, partner) => partner.close(seat),
            Prepared::Visible(reader, writer) => {
                writer.close()?;
                reader.close()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_updates_may_be_read_however_often_and_many_may_not() {
        // What failed: 233 `get`s of one update were READs.
        seen_in_cache(1, 3000).unwrap();
        seen_in_cache(0, 100).unwrap();
        seen_in_cache(10, 100).unwrap();
        let error = seen_in_cache(11, 100).unwrap_err().to_string();
        assert!(error.contains("11 of 100 updates were READ"), "{error}");
    }

    #[test]
    fn the_table_of_misses_is_some_megabytes_whatever_the_row() {
        for size in [4, 64, 4096, 1 << 20] {
            let rows = miss_rows(size);
            assert!(
                rows >= MANY && rows.is_multiple_of(MANY) && rows * size.max(64) <= 64 << 20,
                "{size}: {rows}"
            );
        }
    }
}
