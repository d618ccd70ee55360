//! The three operations, each prepared so that it can be measured again and again.

use std::{
    hint::black_box,
    process,
    sync::{
        atomic::{AtomicU32, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use fervor_client::{Client, ClientOptions, Model, Table, Worker};
use hdrhistogram::Histogram;

use super::Op;

/// Hits that are timed together, each of another row.
pub const GROUP: u64 = 16;
/// `get`s of `visible` between two offers of the core to other threads.
const BURST: usize = 16;
/// Bytes of the table whose rows are READ in turn.
const MISS_BYTES: u64 = 4 << 20;
/// Clocks that the reader of `visible` is ahead of the writer, so that the shard clock is the writer's.
const AHEAD: u64 = 8;
/// How long an update may take to be seen, and a cache to warm up.
const LONG: Duration = Duration::from_secs(10);
/// Updates that are not counted, of a new connection.
const WARM_UP: u64 = 100;
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

fn record(histogram: &mut Histogram<u64>, nanoseconds: u64) {
    histogram.saturating_record(nanoseconds.max(1));
}

/// Connections and tables, ready to measure an operation.
#[derive(Debug)]
pub enum Prepared {
    /// See [`Op::Hit`].
    Hit(Seat),
    /// See [`Op::Miss`].
    Miss(Seat),
    /// See [`Op::Visible`]: the reader, and the thread of the writer.
    Visible(Seat, Writer),
}

/// A client with one worker and one table.
#[derive(Debug)]
pub struct Seat {
    client: Client,
    table: Table<i64>,
    worker: Worker,
    row: Vec<i64>,
    rows: u64,
}

impl Seat {
    fn new(urls: &[String], name: &str, rows: u64, size: u32, model: Model, clients: u16) -> Result<Self> {
        let client = Client::connect_with(urls, ClientOptions { clients, ..ClientOptions::default() })?;
        let width = size as usize / 8;
        let table = client.table(name, rows, width, model)?;
        let worker = client.worker()?;
        Ok(Seat { client, table, worker, row: vec![0; width], rows })
    }

    fn close(self) -> Result<()> {
        drop(self.worker);
        Ok(self.client.close()?)
    }

    fn hits(&mut self, count: u64, histogram: &mut Histogram<u64>) -> Result<()> {
        self.warm_up()?;
        let before = self.worker.stats().misses;
        for _ in 0..count.div_ceil(GROUP) {
            let start = Instant::now();
            for row in 0..GROUP {
                self.worker.get(&self.table, row, &mut self.row)?;
                black_box(&self.row);
            }
            record(histogram, start.elapsed().as_nanos() as u64 / GROUP);
        }
        let missed = self.worker.stats().misses - before;
        ensure!(missed == 0, "{missed} of the gets were no hits");
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

    fn misses(&mut self, count: u64, histogram: &mut Histogram<u64>) -> Result<()> {
        for row in 0..self.rows.min(count) {
            self.worker.get(&self.table, row, &mut self.row)?;
        }
        let before = self.worker.stats();
        for row in (0..count).map(|number| number % self.rows) {
            let start = Instant::now();
            self.worker.get(&self.table, row, &mut self.row)?;
            let taken = start.elapsed();
            black_box(&self.row);
            record(histogram, taken.as_nanos() as u64);
        }
        let after = self.worker.stats();
        let (missed, reads) = (after.misses - before.misses, after.reads - before.reads);
        ensure!(
            missed == count && reads == count,
            "{count} gets were {missed} misses and took {reads} READs"
        );
        Ok(())
    }

    /// One update after the other: has the writer make it, and reads until it is there.
    fn visible(&mut self, writer: &Writer, count: u64, histogram: &mut Histogram<u64>) -> Result<()> {
        let mut seen = self.row[0];
        for _ in 0..count {
            self.worker.clock()?;
            writer.go.send(()).context("the writer is gone")?;
            let start = Instant::now();
            loop {
                for _ in 0..BURST {
                    self.worker.get(&self.table, 0, &mut self.row)?;
                    if self.row[0] != seen {
                        break;
                    }
                }
                let now = Instant::now();
                // Where cores are few, the server may need this one to do what is being waited for.
                thread::yield_now();
                if self.row[0] != seen {
                    // The writer tells when it began before it begins.
                    let began = writer.began.recv().context("the writer is gone")??;
                    record(histogram, (now - began).as_nanos() as u64);
                    break;
                }
                if now - start > LONG {
                    bail!("an update was not seen within {LONG:?}");
                }
            }
            ensure!(self.row[0] == seen + 1, "the row went from {seen} to {}", self.row[0]);
            seen = self.row[0];
        }
        Ok(())
    }
}

/// The thread that updates, each time it is told to.
#[derive(Debug)]
pub struct Writer {
    go: mpsc::Sender<()>,
    began: mpsc::Receiver<Result<Instant>>,
    thread: thread::JoinHandle<Result<()>>,
}

impl Writer {
    fn start(mut seat: Seat) -> Self {
        let (go, orders) = mpsc::channel();
        let (told, began) = mpsc::channel();
        let thread = thread::spawn(move || {
            let delta = vec![1; seat.row.len()];
            // Ends with the reader's end of the channel.
            for () in orders {
                let now = Instant::now();
                let outcome =
                    seat.worker.inc(&seat.table, 0, &delta).and_then(|()| seat.worker.clock()).map(|()| now);
                let _ = told.send(outcome.map_err(Into::into));
            }
            seat.close()
        });
        Writer { go, began, thread }
    }

    fn close(self) -> Result<()> {
        drop(self.go);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
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
        let seat = |rows, model, clients| Seat::new(urls, &name, rows, size, model, clients);
        Ok(match op {
            Op::Hit => Prepared::Hit(seat(GROUP, Model::Essp { staleness: 0 }, 1)?),
            Op::Miss => Prepared::Miss(seat((MISS_BYTES / u64::from(size)).max(16), Model::Async, 1)?),
            Op::Visible => {
                let model = Model::Essp { staleness: 2 * AHEAD as u32 };
                let mut reader = seat(1, model, 2)?;
                let writer = seat(1, model, 2)?;
                reader.worker.get(&reader.table, 0, &mut reader.row)?;
                for _ in 0..AHEAD {
                    reader.worker.clock()?;
                }
                Prepared::Visible(reader, Writer::start(writer))
            }
        })
    }

    /// Measures `count` operations into `histogram`, in nanoseconds.
    ///
    /// # Errors
    /// What the client says; an operation that was not what it is called.
    pub fn measure(&mut self, count: u64, histogram: &mut Histogram<u64>) -> Result<()> {
        match self {
            Prepared::Hit(seat) => seat.hits(count, histogram),
            Prepared::Miss(seat) => seat.misses(count, histogram),
            Prepared::Visible(reader, writer) => {
                // The subscription may still be on its way at the first updates.
                reader.visible(writer, WARM_UP, &mut self::histogram())?;
                let before = reader.worker.stats().misses;
                reader.visible(writer, count, histogram)?;
                let missed = reader.worker.stats().misses - before;
                // One in a while finds a push half way whose poller has lost the processor just then, and READs.
                ensure!(
                    missed * 100 <= count,
                    "{missed} gets READ for {count} updates: they were not seen in the cache alone"
                );
                Ok(())
            }
        }
    }

    /// Leaves the servers.
    ///
    /// # Errors
    /// What the client says.
    pub fn close(self) -> Result<()> {
        match self {
            Prepared::Hit(seat) | Prepared::Miss(seat) => seat.close(),
            Prepared::Visible(reader, writer) => {
                writer.close()?;
                reader.close()
            }
        }
    }
}
