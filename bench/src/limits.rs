//! What this machine allows, whatever the program: the figures that Fervor's own are printed beside.
//!
//! | limit | how it is measured | bounds |
//! |---|---|---|
//! | a load | a chain of loads, each of which gives the address of the next, over memory of some size | reading a header that is not in the cache |
//! | a copy | `memcpy` of rows in turn out of a table of some size into one buffer | `get` of a hit or in place; `inc` |
//! | a cache line to another core | two threads on two cores add to one word in turn | messages over shared memory |
//! | a futex wake | two threads on two cores wake each other in turn | whoever sleeps while it waits |
//! | `ib_*` | perftest | READs, messages and pushes over a network |
//!
//! Every figure is the median of [`SLICES`] measurements, each of which repeats the operation for some milliseconds.

use std::{
    fmt,
    hint::{black_box, spin_loop},
    path::PathBuf,
    sync::atomic::{
        AtomicU32, AtomicU64,
        Ordering::{Acquire, Release, SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::Args;
use fervor_verbs::devices;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use rustix::thread::{CpuSet, futex, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};

use crate::{
    machine::Machine,
    perftest::{Ends, Perftest},
    report::{self, TextTable, median, write_json},
};

/// Measurements of each figure.
const SLICES: usize = 9;
/// How long one of them takes.
const SLICE: Duration = Duration::from_millis(4);
/// Bytes of a cache line.
const LINE: usize = 64;
/// Messages that perftest sends for a figure.
const MESSAGES: u64 = 1000;

/// Options of `fervor-bench limits`.
#[derive(Debug, Clone, Args)]
pub struct LimitsOptions {
    /// Bytes of the rows that are copied; may be repeated, or separated by commas
    #[arg(long, value_name = "BYTES", value_delimiter = ',', default_values_t = [64, 512, 4096, 65_536])]
    pub size: Vec<usize>,
    /// Leave out perftest, which runs where there is an RDMA device
    #[arg(long)]
    pub no_perftest: bool,
    /// The ends of perftest.
    #[command(flatten)]
    pub ends: Ends,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// A figure that bounds others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// What it is.
    pub name: String,
    /// Nanoseconds of one operation.
    pub ns: f64,
    /// Bytes that an operation moves, if it moves some.
    pub bytes: Option<u64>,
}

impl Limit {
    /// A copy of `size` bytes out of a table of `footprint` bytes.
    pub fn copy(size: usize, footprint: usize) -> Self {
        let name =
            format!("copy of {}, out of {}", report::bytes(size as u64), report::bytes(footprint as u64));
        Limit { name, ns: copy_ns(size, footprint), bytes: Some(size as u64) }
    }

    /// So many cache lines that go to another core, one after the other; none where there is one core.
    pub fn lines(count: u32) -> Option<Self> {
        let ns = f64::from(count) * line_to_core_ns()?;
        let name = match count {
            1 => "a cache line to another core".into(),
            _ => format!("{count} cache lines to another core, one after the other"),
        };
        Some(Limit { name, ns, bytes: None })
    }

    /// The limit of `count` such operations.
    pub fn times(self, count: u64) -> Self {
        let name = format!("{count} times: {}", self.name);
        Limit { name, ns: self.ns * count as f64, bytes: self.bytes.map(|bytes| bytes * count) }
    }
}

/// All limits of this machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Which machine.
    pub machine: Machine,
    /// The figures.
    pub limits: Vec<Limit>,
    /// Why some are not there.
    pub left_out: Vec<String>,
}

/// Runs `fervor-bench limits`.
///
/// # Errors
/// A size that makes no sense, perftest that fails, a file that cannot be written.
pub fn run(options: &LimitsOptions) -> Result<()> {
    let limits = measure(options)?;
    print!("{limits}");
    options.json.as_ref().map_or(Ok(()), |path| write_json(path, &limits))
}

/// Measures all limits.
///
/// # Errors
/// A size that makes no sense, perftest that fails.
pub fn measure(options: &LimitsOptions) -> Result<Limits> {
    for size in &options.size {
        anyhow::ensure!((1..=1 << 30).contains(size), "--size {size}: write 1 to 1073741824 bytes");
    }
    let mut limits = Vec::new();
    let mut left_out = Vec::new();
    limits.push(Limit { name: "reading the time".into(), ns: timer_ns(), bytes: None });
    for footprint in [16 << 10, 1 << 20, 16 << 20, 256 << 20] {
        let name = format!("a load that waits for the one before, over {}", report::bytes(footprint as u64));
        limits.push(Limit { name, ns: load_ns(footprint), bytes: None });
    }
    for &size in &options.size {
        // Rows that stay in the cache of a core, and a table that does not.
        limits.push(Limit::copy(size, (16 * size).min(256 << 10).max(size)));
        limits.push(Limit::copy(size, (256 << 20).max(size)));
    }
    limits.push(Limit::copy(64 << 20, 64 << 20));
    match (Limit::lines(1), futex_wake_ns()) {
        (Some(line), Some(ns)) => {
            limits.push(line);
            let name = "a futex wake, until the thread that slept runs".into();
            limits.push(Limit { name, ns, bytes: None });
        }
        _ => left_out.push("between cores: this process may use one core only".into()),
    }
    match devices::list() {
        _ if options.no_perftest => left_out.push("perftest: --no-perftest".into()),
        Ok(devices) if devices.is_empty() => left_out.push("perftest: there is no RDMA device".into()),
        Err(error) => left_out.push(format!("perftest: {error}")),
        Ok(_) => limits.extend(perftest(&options.ends)?),
    }
    Ok(Limits { machine: Machine::this(), limits, left_out })
}

fn perftest(ends: &Ends) -> Result<Vec<Limit>> {
    let mut limits = Vec::new();
    for (tool, what) in
        [("ib_read_lat", "there and back"), ("ib_write_lat", "one way"), ("ib_send_lat", "one way")]
    {
        for size in [64, 4096] {
            let ns = Perftest::new(tool, ends).median_ns(size, MESSAGES).context(tool)?;
            let name = format!("{tool} of {}, {what}", report::bytes(size.into()));
            limits.push(Limit { name, ns, bytes: None });
        }
    }
    for tool in ["ib_read_bw", "ib_write_bw"] {
        for size in [4096, 65_536] {
            let bandwidth = Perftest::new(tool, ends).bandwidth(size, MESSAGES, 16).context(tool)?;
            let name = format!("{tool} of {}, 16 outstanding", report::bytes(size.into()));
            limits.push(Limit { name, ns: 1e9 / bandwidth.rate, bytes: Some(size.into()) });
        }
    }
    Ok(limits)
}

/// The median nanoseconds of an operation. `operation` does it so many times.
fn repeated(mut operation: impl FnMut(u64)) -> f64 {
    let mut timed = |count| {
        let start = Instant::now();
        operation(count);
        start.elapsed()
    };
    let mut count = 1;
    loop {
        let taken = timed(count);
        if taken >= SLICE {
            break;
        }
        let factor = SLICE.as_secs_f64() / taken.as_secs_f64().max(1e-7);
        count = ((count as f64 * factor.min(100.0)) as u64).max(count + 1);
    }
    median((0..SLICES).map(|_| timed(count).as_nanos() as f64 / count as f64))
}

/// What reading the time costs.
pub fn timer_ns() -> f64 {
    repeated(|count| {
        for _ in 0..count {
            black_box(Instant::now());
        }
    })
}

/// A load whose address the load before it gave, in a random order over `footprint` bytes.
pub fn load_ns(footprint: usize) -> f64 {
    #[repr(align(64))]
    #[derive(Clone, Copy)]
    struct Line(u32);
    const { assert!(size_of::<Line>() == LINE) };
    let lines = (footprint / LINE).max(2);
    let mut chain: Vec<Line> = (0..lines as u32).map(Line).collect();
    // Sattolo's shuffle: one cycle through all of them.
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for last in (1..lines).rev() {
        chain.swap(last, random.random_range(0..last));
    }
    let mut at = 0;
    repeated(|count| {
        for _ in 0..count {
            at = chain[at as usize].0;
        }
        black_box(at);
    })
}

/// A copy of `size` bytes, of one row after the other of a table of `footprint` bytes, into one buffer.
pub fn copy_ns(size: usize, footprint: usize) -> f64 {
    let rows = (footprint / size).max(1);
    let table = vec![1u8; rows * size];
    let mut buffer = vec![0u8; size];
    let mut row = 0;
    repeated(|count| {
        for _ in 0..count {
            buffer.copy_from_slice(black_box(&table[row * size..][..size]));
            black_box(&mut buffer);
            row = if row + 1 == rows { 0 } else { row + 1 };
        }
    })
}

/// Two cores that this process may use, far from each other in number.
fn two_cores() -> Option<(usize, usize)> {
    let allowed = sched_getaffinity(None).ok()?;
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core)).collect();
    (cores.len() > 1).then(|| (cores[0], cores[cores.len() / 2]))
}

fn pin(core: usize) {
    let mut only = CpuSet::new();
    only.set(core);
    // Where that is not allowed, the threads are where the kernel wants them.
    let _ = sched_setaffinity(None, &only);
}

/// Runs `here` and `there` on two cores; each is told how often. The median nanoseconds of one way, of two in turn.
fn between_cores(here: impl Fn(u64) + Sync, there: impl Fn(u64) + Sync, count: u64) -> Option<f64> {
    let (first, second) = two_cores()?;
    let slices = (0..SLICES).map(|_| {
        thread::scope(|scope| {
            scope.spawn(|| {
                pin(second);
                there(count);
            });
            let timed = scope.spawn(|| {
                pin(first);
                // The other has begun when the first turn is over.
                here(1);
                let start = Instant::now();
                here(count - 1);
                start.elapsed().as_nanos() as f64 / (2 * (count - 1)) as f64
            });
            timed.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    });
    Some(median(slices.collect::<Vec<_>>()))
}

/// A cache line that one core has written, until another core has read it. None where there is one core.
pub fn line_to_core_ns() -> Option<f64> {
    #[repr(align(128))]
    struct Word(AtomicU64);
    let word = Word(AtomicU64::new(0));
    let answer = |mine: u64, count: u64| {
        for _ in 0..count {
            let mut turns = 0u32;
            let seen = loop {
                let seen = word.0.load(Acquire);
                if seen % 2 == mine {
                    break seen;
                }
                // Where both are on one core after all, the other must get it.
                turns += 1;
                if turns.is_multiple_of(1 << 14) { thread::yield_now() } else { spin_loop() }
            };
            word.0.store(seen + 1, Release);
        }
    };
    between_cores(|count| answer(0, count), |count| answer(1, count), 20_000)
}

/// From a futex wake until the thread that slept runs. None where there is one core.
pub fn futex_wake_ns() -> Option<f64> {
    let word = AtomicU32::new(0);
    let answer = |mine: u32, count: u64| {
        for _ in 0..count {
            loop {
                let seen = word.load(SeqCst);
                if seen % 2 == mine {
                    break;
                }
                // It fails when the word has changed meanwhile, which is looked at next.
                let _ = futex::wait(&word, futex::Flags::PRIVATE, seen, None);
            }
            word.fetch_add(1, SeqCst);
            let _ = futex::wake(&word, futex::Flags::PRIVATE, 1);
        }
    };
    between_cores(|count| answer(0, count), |count| answer(1, count), 500)
}

impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.machine)?;
        let mut table = TextTable::new(["limit", "time", "per second"]);
        for Limit { name, ns, bytes } in &self.limits {
            let rate = bytes.map_or(String::new(), |bytes| {
                format!("{}/s", report::bytes((bytes as f64 * 1e9 / ns) as u64))
            });
            let time = if *ns < 100.0 { format!("{ns:.1} ns") } else { report::time(*ns) };
            table.row([name.clone(), time, rate]);
        }
        write!(f, "{table}")?;
        self.left_out.iter().try_for_each(|reason| writeln!(f, "left out: {reason}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_takes_longer() {
        // Far apart, since a busy machine stretches everything.
        let (small, large) = (copy_ns(64, 1 << 10), copy_ns(1 << 20, 1 << 20));
        assert!(small > 0.1 && 20.0 * small < large, "{small} ns, and {large} ns");
        let (near, far) = (load_ns(8 << 10), load_ns(64 << 20));
        assert!(near > 0.1 && 2.0 * near < far, "{near} ns, and {far} ns");
    }

    #[test]
    fn two_cores_answer_each_other() {
        // Which is faster is not compared: where other programs want the cores, it is as they leave it.
        let (line, wake) = (line_to_core_ns(), futex_wake_ns());
        assert_eq!((line.is_some(), wake.is_some()), (two_cores().is_some(), two_cores().is_some()));
        assert!(line.is_none_or(|ns| ns > 1.0) && wake.is_none_or(|ns| ns > 1.0), "{line:?}, and {wake:?}");
    }

    #[test]
    fn a_multiple_of_a_limit_names_itself() {
        let limit = Limit { name: "a copy".into(), ns: 2.0, bytes: Some(8) }.times(3);
        assert_eq!((limit.name.as_str(), limit.ns, limit.bytes), ("3 times: a copy", 6.0, Some(24)));
    }
}
