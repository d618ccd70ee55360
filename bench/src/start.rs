//! `start`: how long a server takes until all its memory is there, beside what the machine needs to fill as much.
//!
//! Each round starts a server in this process and stops it. Then one thread fills as many bytes, in three ways:
//!
//! | memory | what the thread pays for |
//! |---|---|
//! | fresh, from the heap | for each page a fault, and the kernel clears it before the thread writes it |
//! | fresh, shared, on such pages as the server's | the same; shared memory has more to be noted of each page |
//! | the same once more | writing alone |
//!
//! A server cannot be faster than the last by much: its pages have to be cleared. It has several processors for that. It maps all pages that it
//! clears, so the first filling of its rows costs no more than the last line.

use std::{fmt, hint::black_box, path::PathBuf, time::Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, value_parser};
use fervor_server::{Config, Server, parse_size};
use fervor_verbs::{
    Address, Exclusive,
    memory::{MemoryOptions, Pages},
    session::KeyRing,
    transport::any::Host,
};
use serde::{Deserialize, Serialize};

use crate::{
    machine::Machine,
    report::{TextTable, bytes, median, write_json},
};

/// What is started, and how often.
#[derive(Debug, Clone, Args)]
pub struct StartOptions {
    /// Memory of the server, which is filled, too
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "1G")]
    pub memory: usize,
    /// Shards of the server
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u16).range(1..=256))]
    pub shards: u16,
    /// Pages that the memory lies on: 2M, 1G, or none for ordinary ones
    #[arg(long, value_name = "SIZE", default_value = "none")]
    pub huge_pages: Pages,
    /// Where the server listens: by rdma:// its memory is registered, too [default: a socket in the temporary folder]
    #[arg(long, value_name = "URL")]
    pub listen: Option<Address>,
    /// Rounds; the figures are medians
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = value_parser!(u16).range(1..=1000))]
    pub rounds: u16,
    /// Fail if the start takes more than so many times as long as filling fresh memory of the heap
    #[arg(long, value_name = "RATIO")]
    pub max_ratio: Option<f64>,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// The medians of all rounds, in seconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Started {
    /// Which machine.
    pub machine: Machine,
    /// Bytes of rows.
    pub memory: usize,
    /// Shards.
    pub shards: u16,
    /// `2 MiB`, `1 GiB` or `ordinary`.
    pub pages: String,
    /// Rounds.
    pub rounds: u16,
    /// From the call that starts the server until it runs.
    pub start: f64,
    /// One thread fills fresh memory of the heap.
    pub heap: f64,
    /// One thread fills fresh shared memory on such pages.
    pub shared: f64,
    /// It fills that once more.
    pub again: f64,
}

impl Started {
    /// How many times as long as filling fresh memory of the heap.
    pub fn ratio(&self) -> f64 {
        self.start / self.heap
    }
}

/// Measures, and prints.
///
/// # Errors
/// The server does not start; pages that are not there; a start that takes longer than it may.
pub fn run(options: &StartOptions) -> Result<()> {
    let started = measure(options)?;
    print!("{started}");
    options.json.as_ref().map_or(Ok(()), |path| write_json(path, &started))?;
    match options.max_ratio {
        Some(most) if started.ratio() > most => {
            bail!(
                "the start takes {:.2} times as long as filling as much memory, more than {most}",
                started.ratio()
            )
        }
        _ => Ok(()),
    }
}

/// Measures.
///
/// # Errors
/// The server does not start; pages that are not there.
pub fn measure(options: &StartOptions) -> Result<Started> {
    let most = options.max_ratio;
    ensure!(
        most.is_none_or(|most| most > 0.0),
        "--max-ratio {}: a ratio is a number above 0",
        most.unwrap_or(0.0)
    );
    // Where this machine is a virtual one, memory that it has not used for a while may be slow to come back: not in a round.
    heap(options.memory);
    let rounds: Vec<[f64; 4]> = (0..options.rounds).map(|_| round(options)).collect::<Result<_>>()?;
    let [start, heap, shared, again] =
        [0, 1, 2, 3].map(|which| median(rounds.iter().map(|round| round[which])));
    let pages = match options.huge_pages {
        Pages::Huge(page) => page.to_string(),
        _ => "ordinary".to_owned(),
    };
    let StartOptions { memory, shards, rounds, .. } = *options;
    Ok(Started { machine: Machine::this(), memory, shards, pages, rounds, start, heap, shared, again })
}

fn round(options: &StartOptions) -> Result<[f64; 4]> {
    let start = server(options)?;
    let heap = heap(options.memory);
    let fresh = Instant::now();
    let memory = MemoryOptions { pages: options.huge_pages, touch: None };
    let mut memory = Exclusive::with("fervor-bench-start", options.memory, &memory)?;
    memory.bytes_mut().fill(1);
    let shared = fresh.elapsed().as_secs_f64();
    black_box(memory.bytes());
    let full = Instant::now();
    memory.bytes_mut().fill(2);
    let again = full.elapsed().as_secs_f64();
    black_box(memory.bytes());
    Ok([start, heap, shared, again])
}

/// Starts a server, and stops it: how long the start took.
fn server(options: &StartOptions) -> Result<f64> {
    let socket = std::env::temp_dir().join(format!("fervor-start-{}.sock", std::process::id()));
    let address = options.listen.clone().unwrap_or(Address::Shm(socket));
    let host = Host::with_keys(std::slice::from_ref(&address), KeyRing::default())?;
    let mut config = Config::new(address);
    config.cores = vec![None; options.shards.into()];
    (config.memory, config.pages, config.touch) = (options.memory, options.huge_pages, true);
    let start = Instant::now();
    let server = Server::start(&host, &config).context("the server does not start")?;
    let taken = start.elapsed().as_secs_f64();
    if let Some(warning) = server.placement().warnings().first() {
        bail!("{warning}");
    }
    ensure!(server.stop(), "a thread of the server panicked");
    Ok(taken)
}

/// Fills fresh memory of the heap: how long it took.
fn heap(size: usize) -> f64 {
    let fresh = Instant::now();
    // Memory that is asked for as zeros is not touched by that.
    let mut memory = vec![0_u8; size];
    memory.fill(1);
    black_box(&memory);
    fresh.elapsed().as_secs_f64()
}

impl fmt::Display for Started {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { machine, memory, shards, pages, rounds, .. } = self;
        writeln!(f, "{machine}")?;
        writeln!(
            f,
            "{} in {shards} shards, {pages} pages; medians of {rounds} rounds",
            bytes(*memory as u64)
        )?;
        let mut table = TextTable::new(["what", "time", "per second", "start / this"]);
        for (what, seconds) in [
            ("start of the server", self.start),
            ("one thread fills fresh memory of the heap", self.heap),
            ("one thread fills fresh shared memory on such pages", self.shared),
            ("one thread fills that once more", self.again),
        ] {
            let rate = format!("{}/s", bytes((*memory as f64 / seconds) as u64));
            table.row([what.into(), format!("{seconds:.3} s"), rate, format!("{:.2}", self.start / seconds)]);
        }
        write!(f, "{table}")
    }
}
