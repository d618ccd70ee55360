//! `connect`: how long it takes until all processes of a job are connected.
//!
//! The clock starts before the first process is started, and stops when the last one has said that all its connections are there: the
//! main ones, the READ lanes to each shard, and a table of which each worker has read rows in all shards.

use std::{
    io::{BufRead, BufReader, Write as _},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, value_parser};
use fervor_client::{Client, Model};

use crate::{
    connect::{ReadOptions, client_options},
    machine::Machine,
    report::TextTable,
    server::{EmbeddedOptions, EmbeddedServer},
};

/// What a client says when it is connected.
const CONNECTED: &str = "connected";
/// How long they may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// Elements of a row.
const WIDTH: usize = 16;

/// How much is connected, and by which way.
#[derive(Debug, Clone, Args)]
pub struct ConnectOptions {
    /// Client processes
    #[arg(long, default_value_t = 64, value_parser = value_parser!(u16).range(1..=4096))]
    pub clients: u16,
    /// Workers of each
    #[arg(long, default_value_t = 4, value_parser = value_parser!(u16).range(1..=4096))]
    pub workers: u16,
    /// Where the servers that are started listen, one after the other; port 0 is any free one
    #[arg(
        long,
        value_name = "URL",
        value_delimiter = ',',
        conflicts_with = "server",
        default_value = "shm:,fervor://127.0.0.1:0?via=shm,tcp://127.0.0.1:0,fervor://127.0.0.1:0?via=tcp"
    )]
    pub listen: Vec<String>,
    /// Use this running server instead of starting some
    #[arg(long, value_name = "URL")]
    pub server: Vec<String>,
    /// Times that all of it is done; the figures are medians
    #[arg(long, default_value_t = 3, value_parser = value_parser!(u16).range(1..=1000))]
    pub rounds: u16,
    /// The servers that are started.
    #[command(flatten)]
    pub embedded: EmbeddedOptions,
    /// READ lanes.
    #[command(flatten)]
    pub reads: ReadOptions,
    /// Be one of the clients
    #[arg(long, hide = true, requires = "server")]
    pub child: bool,
}

/// Measures, and prints.
///
/// # Errors
/// A server or a client does not start, or does not connect.
pub fn run(options: &ConnectOptions) -> Result<()> {
    if options.child {
        return child(options);
    }
    let mut table = TextTable::new(["way", "clients", "workers", "connections", "seconds", "ms each"]);
    let ways = if options.server.is_empty() { &options.listen } else { &options.server[..1].to_vec() };
    for way in ways {
        let mut rounds = Vec::new();
        for _ in 0..options.rounds {
            rounds.push(round(options, way)?);
        }
        rounds.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        let Round { seconds, connections } = rounds[rounds.len() / 2];
        table.row([
            way.trim_end_matches(':').to_owned(),
            options.clients.to_string(),
            options.workers.to_string(),
            connections.to_string(),
            format!("{seconds:.2}"),
            format!("{:.2}", 1e3 * seconds / connections as f64),
        ]);
    }
    print!("{}\n{table}", Machine::this());
    Ok(())
}

/// What came of connecting all clients once.
struct Round {
    seconds: f64,
    connections: u64,
}

fn round(options: &ConnectOptions, way: &str) -> Result<Round> {
    let lanes = options.reads.lanes(options.workers);
    let server = match &options.server[..] {
        [] if way == "shm:" => Some(EmbeddedServer::start(&options.embedded, options.clients, lanes)?),
        [] => Some(EmbeddedServer::start_at(way, &options.embedded, options.clients, lanes)?),
        _ => None,
    };
    let urls = server.as_ref().map_or_else(|| options.server.clone(), |server| vec![server.url().to_owned()]);
    let start = Instant::now();
    let clients: Vec<Connecting> =
        (0..options.clients).map(|_| Connecting::start(options, &urls)).collect::<Result<_>>()?;
    let mut connections = 0;
    for client in &clients {
        connections += client.wait(start)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    drop(clients);
    Ok(Round { seconds, connections })
}

/// A client process that connects.
struct Connecting {
    child: Child,
    stdin: Option<ChildStdin>,
    said: mpsc::Receiver<String>,
}

impl Connecting {
    fn start(options: &ConnectOptions, urls: &[String]) -> Result<Self> {
        let own = std::env::current_exe().context("cannot find the own program")?;
        let mut command = Command::new(own);
        command.args(["connect", "--child", "--clients", &options.clients.to_string()]);
        command.args(["--workers", &options.workers.to_string()]);
        command.args(["--read-lanes", &options.reads.read_lanes.to_string()]);
        for url in urls {
            command.args(["--server", url]);
        }
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start a client")?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("no stdout")?;
        let (sender, said) = mpsc::channel();
        thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).for_each(|line| drop(sender.send(line)));
        });
        Ok(Self { child, stdin, said })
    }

    /// Waits until it is connected: how many connections it has.
    fn wait(&self, start: Instant) -> Result<u64> {
        let left = PATIENCE.saturating_sub(start.elapsed());
        let line = self.said.recv_timeout(left).context("a client ended, or was not connected in time")?;
        let count = line.strip_prefix(CONNECTED).with_context(|| format!("a client said `{line}`"))?;
        count.trim().parse().with_context(|| format!("a client said `{line}`"))
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        // Its input ends, and so does it.
        drop(self.stdin.take());
        let _ = self.child.wait();
    }
}

/// One of the clients: connects, says so, and waits until its input ends.
fn child(options: &ConnectOptions) -> Result<()> {
    let mut settings = client_options(options.clients, options.reads);
    settings.copies = true;
    settings.cache_bytes = 1 << 20;
    let client = Client::connect_with(&options.server, settings)?;
    let rows = client.ways().len() as u64 * 64;
    let table = client.table::<f32>("connect", rows, WIDTH, Model::Async)?;
    let mut workers = (0..options.workers).map(|_| client.worker()).collect::<Result<Vec<_>, _>>()?;
    // Rows of all shards: a lane is made when somebody READs there. Under Async each get is a READ.
    let all: Vec<u64> = (0..rows).collect();
    let mut data = vec![1.0; all.len() * WIDTH];
    for worker in &mut workers {
        worker.get_many(&table, &all, &mut data)?;
        ensure!(data.iter().all(|element| *element == 0.0), "a new table is not zero");
    }
    let shards = client.ways().len() as u64;
    println!("{CONNECTED} {}", shards * (1 + u64::from(options.reads.lanes(options.workers))));
    std::io::stdout().flush()?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    if !line.is_empty() {
        bail!("`{line}` is no end of the input");
    }
    drop(workers);
    client.close()?;
    Ok(())
}
