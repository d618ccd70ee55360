//! Runs seeds of the checker in the simulator, on all processors: the program behind `ci/sim` and `ci/mutants`.
//!
//! A simulation's threads run one at a time, so each is kept on one processor, and so many run side by side. What a
//! seed comes to depends on the seed alone.

use std::{
    collections::BTreeMap,
    process::ExitCode,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use checker::scene::{Failure, Outcome, Tally, simulated};
use clap::Parser;

mod checker;
mod support;

/// Time of this machine after which a seed has hung for good: in the simulator, waiting takes no time.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs seeds of the checker in the simulator.
#[derive(Parser)]
struct Options {
    /// One seed: replayed exactly, and reported in full.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Seeds from A to B, without B.
    #[arg(long, value_name = "A..B", value_parser = range)]
    seeds: Option<(u64, u64)>,
    /// Most clocks of a job. Another number is another history.
    #[arg(long, default_value_t = 30)]
    clocks: u64,
    /// Says which history each seed is.
    #[arg(long, conflicts_with = "seed")]
    each: bool,
    /// Simulations at a time.
    #[arg(long)]
    jobs: Option<usize>,
    /// Switches a deliberate bug on.
    #[cfg(feature = "mutants")]
    #[arg(long, value_parser = mutants::by_name)]
    mutant: Option<fervor_protocol::mutants::Entry>,
    /// Shows for each deliberate bug the first seed that finds it.
    #[cfg(feature = "mutants")]
    #[arg(long, conflicts_with_all = ["seed", "mutant"])]
    mutants: bool,
}

fn range(text: &str) -> Result<(u64, u64), String> {
    let (from, to) = text.split_once("..").ok_or("seeds are given as A..B")?;
    let number = |text: &str| text.parse().map_err(|error| format!("`{text}`: {error}"));
    let (from, to) = (number(from)?, number(to)?);
    if from < to { Ok((from, to)) } else { Err(format!("{from}..{to} has no seeds")) }
}

fn main() -> ExitCode {
    let options = Options::parse();
    #[cfg(feature = "mutants")]
    {
        if options.mutants {
            // Some bugs show in few jobs.
            return mutants::all(options.seeds.unwrap_or((0, 8000)), options.clocks, jobs(options.jobs));
        }
        fervor_protocol::mutants::activate(options.mutant.map(|entry| entry.mutant));
    }
    match options.seed {
        Some(seed) => replay(seed, options.clocks),
        None => {
            let range = options.seeds.unwrap_or((0, 2000));
            many(range, options.clocks, jobs(options.jobs), options.each)
        }
    }
}

#[cfg(feature = "mutants")]
mod mutants {
    //! The catalogue of deliberate bugs against the seeds.

    use std::{process::ExitCode, time::Instant};

    use fervor_protocol::mutants::{CATALOGUE, Entry, activate};

    pub fn by_name(name: &str) -> Result<Entry, String> {
        let names = || CATALOGUE.iter().map(|entry| entry.name).collect::<Vec<_>>().join(", ");
        let entry = CATALOGUE.iter().find(|entry| entry.name == name);
        entry.copied().ok_or_else(|| format!("there are: {}", names()))
    }

    pub fn all(range: (u64, u64), clocks: u64, jobs: usize) -> ExitCode {
        super::quiet();
        let start = Instant::now();
        let mut survivors = Vec::new();
        println!("| mutant | breaks | first seed | s | noticed as |\n|---|---|---|---|---|");
        for entry in CATALOGUE {
            let start = Instant::now();
            activate(Some(entry.mutant));
            let found = super::run(range, clocks, jobs);
            let took = start.elapsed().as_secs_f64();
            let (seed, first) = match found.failure {
                Some((seed, failure)) => (seed.to_string(), failure.first),
                None => {
                    survivors.push(entry.name);
                    ("none".to_owned(), "SURVIVES".to_owned())
                }
            };
            let first: String = first.replace('\n', " ").chars().take(110).collect();
            println!("| {} | {} | {seed} | {took:.1} | {first} |", entry.name, entry.breaks);
        }
        activate(None);
        let (count, took) = (CATALOGUE.len(), start.elapsed().as_secs_f64());
        if survivors.is_empty() {
            println!("{count} mutants, all killed, in {took:.0} s");
            return ExitCode::SUCCESS;
        }
        println!(
            "{} of {count} mutants survive {}..{}: {}",
            survivors.len(),
            range.0,
            range.1,
            survivors.join(", ")
        );
        ExitCode::FAILURE
    }
}

fn replay(seed: u64, clocks: u64) -> ExitCode {
    match simulated(seed, clocks) {
        Ok(Outcome { hash, events, tally, .. }) => {
            println!("{tally}");
            println!("seed {seed}: clean, history {hash:016x} of {events} events");
            ExitCode::SUCCESS
        }
        Err(Failure { first, report }) => {
            println!("{report}seed {seed} FAILED: {first}");
            ExitCode::FAILURE
        }
    }
}

fn many((from, to): (u64, u64), clocks: u64, jobs: usize, each: bool) -> ExitCode {
    quiet();
    let start = Instant::now();
    let found = run((from, to), clocks, jobs);
    let took = start.elapsed().as_secs_f64();
    if let Some((seed, Failure { first, report })) = found.failure {
        println!("{report}seed {seed} FAILED: {first}\nreplay it with: ci/sim --seed {seed}{}", said(clocks));
        return ExitCode::FAILURE;
    }
    if each {
        found.hashes.iter().for_each(|(seed, hash)| println!("seed {seed}: history {hash:016x}"));
        return ExitCode::SUCCESS;
    }
    println!("{}", found.tally);
    println!("{} seeds, all clean, in {took:.0} s; history {:016x}", to - from, found.hash());
    ExitCode::SUCCESS
}

fn said(clocks: u64) -> String {
    if clocks == 30 { String::new() } else { format!(" --clocks {clocks}") }
}

/// What many seeds came to.
struct Found {
    /// The first seed that failed, and its report.
    failure: Option<(u64, Failure)>,
    tally: Tally,
    /// Of the history of each clean seed.
    hashes: BTreeMap<u64, u64>,
}

impl Found {
    /// Of all histories.
    fn hash(&self) -> u64 {
        self.hashes.iter().fold(0, |all, (seed, hash)| all ^ hash.rotate_left((seed % 63) as u32))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many simulations run at a time: one on each processor that this process may use.
fn jobs(said: Option<usize>) -> usize {
    said.unwrap_or_else(|| core_affinity::get_core_ids().map_or(1, |cores| cores.len())).max(1)
}

/// Runs the seeds until the first one that fails: all below that have been clean.
fn run((from, to): (u64, u64), clocks: u64, jobs: usize) -> Found {
    let next = AtomicU64::new(from);
    let found = Mutex::new(Found { failure: None, tally: Tally::default(), hashes: BTreeMap::new() });
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    std::thread::scope(|scope| {
        for job in 0..jobs {
            let core = cores.get(job % cores.len().max(1)).copied();
            let (next, found) = (&next, &found);
            scope.spawn(move || {
                // The threads of the simulation inherit it. Where it cannot be had, they are slower, and no more.
                core.map(core_affinity::set_for_current);
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let failed =
                        |found: &Found| found.failure.as_ref().is_some_and(|(first, _)| *first < seed);
                    if seed >= to || failed(&lock(found)) {
                        return;
                    }
                    let outcome = watched(seed, || simulated(seed, clocks));
                    let mut found = lock(found);
                    match outcome {
                        Ok(Outcome { hash, tally, .. }) => {
                            found.tally.add(&tally);
                            found.hashes.insert(seed, hash);
                        }
                        Err(_) if failed(&found) => {}
                        Err(failure) => found.failure = Some((seed, failure)),
                    }
                }
            });
        }
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a seed; ends the program, with the seed's number, if it does not come back.
fn watched<X>(seed: u64, body: impl FnOnce() -> X) -> X {
    let over = Arc::new((Mutex::new(false), Condvar::new()));
    let watcher = std::thread::spawn({
        let over = over.clone();
        move || {
            let (flag, bell) = &*over;
            let (flag, _) = bell.wait_timeout_while(lock(flag), PATIENCE, |over| !*over).unwrap();
            if !*flag {
                println!("seed {seed} FAILED: it hangs");
                std::process::exit(1);
            }
        }
    });
    let result = body();
    *lock(&over.0) = true;
    over.1.notify_all();
    watcher.join().expect("the watcher");
    result
}

/// Panics of simulated threads are told in the report of their seed, and not at once.
fn quiet() {
    static ONCE: AtomicBool = AtomicBool::new(false);
    if !ONCE.swap(true, Ordering::SeqCst) {
        std::panic::set_hook(Box::new(|_| ()));
    }
}
