//! `flood`: how a job fares while strangers besiege its server.
//!
//! A server with keys listens on this host, and matrix factorisation trains at it, in processes of its own. Strangers without a key hold
//! handshakes half open, and connect again and again to send garbage, every second time behind the first bytes of a real handshake. The
//! job runs without them and with them, in turns; what counts is the ratio of the two times in one round. The server's sockets and
//! memory are those before the first round and after the last.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, value_parser};
use fervor_verbs::session::KEY_FILE_VARIABLE;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::{
    machine::Machine,
    report::{TextTable, median},
    server::{self, EmbeddedOptions, EmbeddedServer, Setting},
};

/// The bar: with strangers a job takes at most so many times as long.
const BAR: f64 = 1.1;
/// The first bytes of a handshake, and as many as there are of garbage.
const BEGINNING: &[u8] = b"FERVORSN\x01\0";
const GARBAGE: usize = 168;
/// Half-open handshakes that are opened anew at a time, ten times a second.
const AGAIN: usize = 50;
/// How long a stranger waits to be hung up on.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the server may take to forget them all: more than it waits for one who says nothing.
const SETTLED: Duration = Duration::from_secs(15);
/// Epochs of the run that says how long one takes.
const FIRST: u32 = 20;

/// How many strangers, and how long.
#[derive(Debug, Clone, Args)]
pub struct FloodOptions {
    /// Handshakes that are begun before each run, not finished, and begun anew when the server ends them
    #[arg(long, default_value_t = 1000, value_name = "N")]
    pub half_open: usize,
    /// Handshakes of garbage that there have to be in each run of the job
    #[arg(long, default_value_t = 10_000, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    pub garbage: u64,
    /// Handshakes of garbage in a second
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = value_parser!(u32).range(1..=100_000))]
    pub rate: u32,
    /// Seconds of a run without strangers: with them it must be long enough for all that garbage
    #[arg(long, default_value_t = 15.0)]
    pub seconds: f64,
    /// Ways by which the job's clients reach the server, one after the other
    #[arg(long, value_delimiter = ',', default_value = "shm,tcp")]
    pub via: Vec<String>,
    /// Rounds; the figures are medians
    #[arg(long, default_value_t = 3, value_parser = value_parser!(u16).range(1..=100))]
    pub rounds: u16,
    /// Fail if the job takes more than 1.1 times as long, if there was less garbage, or if sockets do not come back
    #[arg(long)]
    pub check: bool,
}

/// Measures, and prints.
///
/// # Errors
/// A server or a job fails; with `check`, what was to hold does not.
pub fn run(options: &FloodOptions) -> Result<()> {
    let folder = Folder::new()?;
    let keys = folder.0.join("keys");
    let made =
        Command::new(server::program()?).arg("keygen").arg("--out").arg(&keys).stdout(Stdio::null()).status();
    ensure!(made.context("cannot run fervor-server")?.success(), "fervor-server keygen failed");
    let mut table = TextTable::new([
        "way",
        "without, s",
        "with, s",
        "ratio",
        "half open",
        "garbage",
        "unheard",
        "sockets",
        "memory, MiB",
    ]);
    let mut broken = Vec::new();
    for way in &options.via {
        let besieged = besiege(options, way, &folder.0, &keys)?;
        table.row(besieged.cells(way));
        broken.extend(besieged.broken(options).map(|text| format!("by {way}: {text}")));
    }
    print!("{}\n{table}", Machine::this());
    ensure!(!options.check || broken.is_empty(), "{}", broken.join("; "));
    Ok(())
}

/// What came of it, by one way.
struct Besieged {
    /// Seconds without strangers and with them, of each round.
    times: Vec<[f64; 2]>,
    /// Half open: in all, and at the end. The least of the rounds, as of garbage.
    opened: usize,
    held: usize,
    garbage: u64,
    /// Strangers whom the server did not hang up on in time, or who could not connect, of all rounds.
    unheard: u64,
    /// Before, and after.
    sockets: [usize; 2],
    resident: [u64; 2],
}

impl Besieged {
    fn ratio(&self) -> f64 {
        median(self.times.iter().map(|[without, with]| with / without))
    }

    fn cells(&self, way: &str) -> [String; 9] {
        let Self { times, opened, held, garbage, unheard, sockets, resident } = self;
        let of = |which: usize| format!("{:.2}", median(times.iter().map(|times| times[which])));
        let mib = |kib: u64| format!("{:.1}", kib as f64 / 1024.0);
        [
            way.to_owned(),
            of(0),
            of(1),
            format!("{:.3}", self.ratio()),
            format!("{opened}, {held} held"),
            garbage.to_string(),
            unheard.to_string(),
            format!("{} -> {}", sockets[0], sockets[1]),
            format!("{} -> {}", mib(resident[0]), mib(resident[1])),
        ]
    }

    /// What was to hold and does not.
    fn broken(&self, options: &FloodOptions) -> impl Iterator<Item = String> {
        let (ratio, [before, after]) = (self.ratio(), self.sockets);
        let slow =
            (ratio > BAR).then(|| format!("the job takes {ratio:.3} times as long, and {BAR} is the bar"));
        let few = self.garbage < options.garbage;
        let few = few.then(|| {
            format!("{} of {} handshakes of garbage: raise --seconds", self.garbage, options.garbage)
        });
        let kept = (after > before).then(|| format!("{before} descriptors before, and {after} after"));
        [slow, few, kept].into_iter().flatten()
    }
}

fn besiege(options: &FloodOptions, way: &str, folder: &Path, keys: &Path) -> Result<Besieged> {
    let embedded = EmbeddedOptions { shards: 1, memory: "64M".into() };
    let setting = Setting { key_file: Some(keys), ..Setting::default() };
    let server = EmbeddedServer::start_in(setting, "fervor://127.0.0.1:0", &embedded, 2, 3)?;
    let address: SocketAddr =
        server.url().trim_start_matches("fervor://").parse().context("no such address")?;
    let url = format!("{}?via={way}", server.url());
    let job = |epochs| job(&url, folder, keys, epochs);
    let epochs = (options.seconds * f64::from(FIRST) / job(FIRST)?).ceil().max(1.0) as u32;
    let before = Holds::of(server.process())?;
    let (mut times, mut opened, mut held) = (Vec::new(), usize::MAX, usize::MAX);
    let (mut garbage, mut unheard) = (u64::MAX, 0);
    for _ in 0..options.rounds {
        let without = job(epochs)?;
        let strangers = Strangers::set_upon(address, options);
        let with = job(epochs);
        let counts = strangers.call_off()?;
        times.push([without, with?]);
        (opened, held) = (opened.min(counts.opened), held.min(counts.held));
        garbage = garbage.min(counts.garbage);
        unheard += counts.unheard;
    }
    let end = Instant::now() + SETTLED;
    let mut after = Holds::of(server.process())?;
    while after.descriptors > before.descriptors && Instant::now() < end {
        thread::sleep(Duration::from_millis(100));
        after = Holds::of(server.process())?;
    }
    Ok(Besieged {
        times,
        opened,
        held,
        garbage,
        unheard,
        sockets: [before.descriptors, after.descriptors],
        resident: [before.resident, after.resident],
    })
}

/// Trains: the seconds of it.
fn job(url: &str, folder: &Path, keys: &Path, epochs: u32) -> Result<f64> {
    let own = std::env::current_exe().context("cannot find the own program")?;
    let results = folder.join("results.json");
    let output = Command::new(own)
        .env(KEY_FILE_VARIABLE, keys)
        .args(["mf", "--generate", "1000x500:100000", "--rank", "16", "--clients", "2"])
        .args(["--epochs", &epochs.to_string(), "--server", url, "--json"])
        .arg(&results)
        .stdin(Stdio::null())
        .output()
        .context("cannot start the job")?;
    ensure!(output.status.success(), "the job failed: {}", String::from_utf8_lossy(&output.stderr));
    let text = fs::read_to_string(&results).with_context(|| format!("cannot read {}", results.display()))?;
    let results: serde_json::Value =
        serde_json::from_str(&text).context("the job's results make no sense")?;
    results["seconds"].as_f64().context("the job does not say how long it took")
}

/// What a process holds.
struct Holds {
    descriptors: usize,
    /// KiB.
    resident: u64,
}

impl Holds {
    fn of(process: u32) -> Result<Self> {
        let folder = PathBuf::from(format!("/proc/{process}"));
        let descriptors = fs::read_dir(folder.join("fd")).context("the server is gone")?.count();
        let status = fs::read_to_string(folder.join("status")).context("the server is gone")?;
        let resident = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
        Ok(Self {
            descriptors,
            resident: resident.context("/proc does not say how much memory the server has")?,
        })
    }
}

/// Counts of one run.
struct Counts {
    opened: usize,
    held: usize,
    garbage: u64,
    unheard: u64,
}

/// Those without a key, while they are at it.
struct Strangers {
    stop: Arc<AtomicBool>,
    garbage: Arc<AtomicU64>,
    silent: JoinHandle<(usize, usize)>,
    loud: JoinHandle<u64>,
}

impl Strangers {
    /// Returns when the first of them have connected.
    fn set_upon(address: SocketAddr, options: &FloodOptions) -> Self {
        let (stop, garbage) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (count, rate, ready) = (options.half_open, options.rate, Arc::new(AtomicBool::new(false)));
        let silent = thread::spawn({
            let (stop, ready) = (stop.clone(), ready.clone());
            move || hold(address, count, &stop, &ready)
        });
        while !ready.load(Relaxed) && !silent.is_finished() {
            thread::sleep(Duration::from_millis(10));
        }
        let loud = thread::spawn({
            let (stop, garbage) = (stop.clone(), garbage.clone());
            move || babble(address, rate, &stop, &garbage)
        });
        Self { stop, garbage, silent, loud }
    }

    fn call_off(self) -> Result<Counts> {
        let garbage = self.garbage.load(Relaxed);
        self.stop.store(true, Relaxed);
        let failed = |_| anyhow::anyhow!("a thread of strangers failed");
        let ((opened, held), unheard) =
            (self.silent.join().map_err(failed)?, self.loud.join().map_err(failed)?);
        Ok(Counts { opened, held, garbage, unheard })
    }
}

/// Holds `count` handshakes half open until `stop`. The server ends those that are silent for longest when there are many: they are
/// opened anew. How many were opened in all, and how many there are at the end.
fn hold(address: SocketAddr, count: usize, stop: &AtomicBool, ready: &AtomicBool) -> (usize, usize) {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut open = |number: usize| -> Option<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE).ok()?;
        let part = 1 + (number + random.next_u32() as usize) % (BEGINNING.len() - 1);
        stream.write_all(&BEGINNING[..part]).ok()?;
        stream.set_nonblocking(true).ok()?;
        Some(stream)
    };
    let mut held: Vec<Option<TcpStream>> = (0..count).map(&mut open).collect();
    let mut opened = count;
    ready.store(true, Relaxed);
    while !stop.load(Relaxed) {
        thread::sleep(Duration::from_millis(100));
        let ended = held.iter_mut().enumerate().filter_map(|(number, place)| {
            let lives = place.as_mut().is_some_and(lives);
            (!lives).then_some((number, place))
        });
        for (number, place) in ended.take(AGAIN) {
            *place = open(number);
            opened += 1;
        }
    }
    let count = held.iter_mut().flatten().map(lives).filter(|lives| *lives).count();
    (opened, count)
}

/// Whether the server has not hung up.
fn lives(stream: &mut TcpStream) -> bool {
    matches!(stream.read(&mut [0; 64]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

/// Sends garbage `rate` times a second until `stop`, and counts it. How often nobody hung up, or nobody was there.
fn babble(address: SocketAddr, rate: u32, stop: &AtomicBool, count: &AtomicU64) -> u64 {
    let (mut random, mut unheard) = (ChaCha8Rng::seed_from_u64(2), 0);
    let mut once = |number: u64| -> std::io::Result<()> {
        let mut garbage = [0; GARBAGE];
        random.fill_bytes(&mut garbage);
        if number.is_multiple_of(2) {
            garbage[..BEGINNING.len()].copy_from_slice(BEGINNING);
        }
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&garbage)?;
        // What it says to that, until it hangs up: a reset, too, if it did not take all.
        match stream.read_to_end(&mut Vec::new()) {
            Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => Err(error),
            _ => Ok(()),
        }
    };
    let start = Instant::now();
    for number in 0u64.. {
        let due = start + Duration::from_secs_f64(number as f64 / f64::from(rate));
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if stop.load(Relaxed) {
            break;
        }
        match once(number) {
            Ok(()) => _ = count.fetch_add(1, Relaxed),
            Err(_) => unheard += 1,
        }
    }
    unheard
}

/// A folder of its own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("fervor-flood-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot make the folder {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
