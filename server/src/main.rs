//! `fervor-server`: serves tables until it is told to stop.

#![forbid(unsafe_code)]

mod cores;
mod touching;

use std::{
    io::Write,
    net::ToSocketAddrs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, anyhow, bail};
use clap::{Parser, Subcommand};
use fervor_server::{Budget, Config, Grant, Placement, Server, ServerError, parse_size};
use fervor_verbs::{
    Address,
    memory::Pages,
    rails::RailName,
    session::{KEY_FILE_VARIABLE, Key, KeyRing},
    transport::any::Host,
};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
};
use touching::Shown;

/// Serves tables of parameters to the workers of a job
///
/// Workers on this host read rows in the server's memory. Workers elsewhere read them with one-sided READs, or from
/// caches that the server pushes changes into. The server prints its memory budget, and then `fervor-server ready at
/// URL`. To stop it, send SIGTERM or press ctrl-C: it applies what it has received, tells its clients, and exits with 0.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,

    /// Where to listen (port 0: any free one). fervor://host:port serves clients of this host through shared memory, and others
    /// over RDMA or TCP. shm:///path/to/socket, rdma://host:port and tcp://host:port serve by that way alone
    #[arg(long, value_name = "URL", default_value = "shm:///tmp/fervor.sock")]
    listen: Address,

    /// Talk to clients that have a key of this file, and to nobody else (fervor:// alone). `fervor-server keygen` makes a key [default:
    /// the key in FERVOR_KEY, or those in the file that FERVOR_KEY_FILE names]
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,

    /// Ports of RDMA devices to use, all at once, as in mlx5_0:1,mlx5_1 (fervor:// alone). Clients are spread over them, and move to the others
    /// when one fails [default: those that FERVOR_IB_HCA names; or all that are active, those of devices in software only if there is no
    /// hardware. `fervor-bench devices` shows which]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    devices: Vec<RailName>,

    /// Listen beyond this host without a key. Whoever reaches the port can then read and change every table. (Within this host that
    /// needs no option: over TCP every user of it can, and over shared memory the server's own)
    #[arg(long)]
    insecure: bool,

    /// Processors to pin polling threads to, as in 0,1. Each thread polls one shard, a part of the rows [default: over
    /// RDMA the processors near the NIC, one for each of its completion vectors; over shared memory see --shards]
    #[arg(long, value_name = "LIST", value_delimiter = ',', conflicts_with = "shards")]
    cores: Option<Vec<usize>>,

    /// Number of shards, with polling threads that are not pinned [default over shared memory: half of the processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    shards: Option<u16>,

    /// Memory for the rows of all shards together, as in 512M or 4G
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "256M")]
    memory: usize,

    /// Lay rows on huge pages of this size, 2M or 1G, which the administrator has to have set aside. Where there are not enough the server says how
    /// many are needed, and uses ordinary pages. `none`: ordinary pages at once [default: 2M if there are enough]
    #[arg(long, value_name = "SIZE")]
    huge_pages: Option<Pages>,

    /// Print where each shard would run and where its memory would lie, and the memory that the server would take; then exit
    #[arg(long)]
    plan: bool,

    /// Most memory, in all shards together, for records of who holds which rows and of what has changed [default: half
    /// of --memory]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    bookkeeping: Option<usize>,

    /// Memory that pushes are sent from, in each shard. Each client may use this divided by (--clients + 1), and no row
    /// may be wider than that [default: enough for rows of 1 MiB, up to 64M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    staging: Option<usize>,

    /// Most clients at a time
    #[arg(long, value_name = "N", default_value_t = 16)]
    clients: usize,

    /// Most connections that each client has to a shard for the READs of its workers. A client makes 3 for all of them,
    /// unless it is told otherwise
    #[arg(long, value_name = "N", default_value_t = 3)]
    lanes: usize,

    /// Messages that a client may have on their way to one shard. The shard has a receive buffer for each
    #[arg(long, value_name = "N", default_value_t = 8)]
    credits: usize,

    /// How long a client is waited for whose connection broke, in seconds: it goes on where it was if it is back by then. A process
    /// that died is waited for as long, since that looks the same (but not over shared memory). 0: nobody is waited for
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "10")]
    lease: Duration,
}

/// A time in seconds.
fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("`{text}` is no number of seconds"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| format!("`{text}` is no number of seconds: {error}"))
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes a key for servers and clients, in a new file that only you can read
    Keygen {
        /// The file
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Name of the key, which is shown in logs
        #[arg(long, default_value = "default")]
        name: String,
    },
}

/// Refuses a budget that the machine cannot have: better now than by the out-of-memory killer later.
fn check_memory(budget: &Budget, placement: &Placement) -> anyhow::Result<()> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: Option<usize> = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok());
    let available = kib.context("/proc/meminfo has no MemAvailable")? << 10;
    // Huge pages are set aside, and not among what is available.
    if budget.total() - placement.huge_bytes().min(budget.rows) > available {
        bail!(
            "{budget}\nthe machine has {} MiB available: ask for less --memory or --staging, fewer --clients or fewer --credits",
            available >> 20
        );
    }
    Ok(())
}

fn print_plan(budget: &Budget, placement: &Placement) {
    println!("{budget}\n\n{placement}");
    for warning in placement.warnings() {
        eprintln!("fervor-server: {warning}");
    }
}

/// The ports of RDMA devices that are used.
fn print_rails(transport: &Host) {
    for rail in transport.rails() {
        let state = if rail.active { "" } else { ", which is down now; it will be used when it is up" };
        println!("RDMA by {}{state}", rail.name);
    }
}

/// Refuses to listen where strangers can come in, unless there is a key or the user insists.
fn check_exposure(arguments: &Arguments, keys: &KeyRing) -> anyhow::Result<()> {
    let host = match &arguments.listen {
        Address::Session { host, .. } if keys.is_empty() => host,
        Address::Tcp { host, .. } | Address::Rdma { host, .. } => host,
        _ => return Ok(()),
    };
    if arguments.insecure {
        return Ok(());
    }
    // A name that leads nowhere is refused later, with the reason.
    let mut found = (host.as_str(), 0).to_socket_addrs().into_iter().flatten();
    if found.any(|address| !address.ip().is_loopback()) {
        bail!(
            "{} can be reached from other hosts, and there is no key: whoever reaches it could read and change every table. \
             Make a key (`fervor-server keygen --out FILE`), and start with --listen fervor://HOST:PORT --key-file FILE; or \
             start with --insecure if everybody in that network may",
            arguments.listen
        );
    }
    Ok(())
}

fn keygen(out: &Path, name: &str) -> anyhow::Result<ExitCode> {
    let written = Key::generate(name).and_then(|key| key.write_new(out));
    written.map_err(|error| anyhow!("{error}"))?;
    println!(
        "wrote the key `{name}` to {}; copy it to each client's host, and set {KEY_FILE_VARIABLE} to its path there",
        out.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// The keys of the server: none if it has no sessions, or nobody has said which.
fn keys(arguments: &Arguments) -> anyhow::Result<KeyRing> {
    let environment = || match arguments.listen {
        Address::Session { .. } => KeyRing::from_environment(),
        _ => Ok(KeyRing::default()),
    };
    let keys = arguments.key_file.as_deref().map_or_else(environment, KeyRing::read);
    let keys = keys.map_err(|error| anyhow!("{error}"))?;
    let keys = fervor_server::checked(keys).map_err(|error| anyhow!("{error}"))?;
    let limited = |key: &&Key| Grant::of(key).is_ok_and(|grant| grant.is_limited());
    if let Address::Session { via: Some(via), .. } = &arguments.listen
        && !via.limits()
        && let Some(key) = keys.keys().iter().find(limited)
    {
        bail!(
            "key `{}` is limited to tables, so its holder comes by TCP alone; but {} has ?via={via}: leave that out, or give each tenant a \
             server",
            key.name(),
            arguments.listen
        );
    }
    Ok(keys)
}

fn configure(arguments: &Arguments, transport: &Host) -> anyhow::Result<Config> {
    let mut config = Config::new(arguments.listen.clone());
    config.cores = match (&arguments.cores, arguments.shards) {
        (Some(cores), _) => cores.iter().copied().map(Some).collect(),
        (None, Some(shards)) => vec![None; shards.into()],
        (None, None) => cores::default(transport)?,
    };
    config.memory = arguments.memory;
    config.pages = arguments.huge_pages.unwrap_or_default();
    config.touch = true;
    config.clients = arguments.clients;
    config.lanes = arguments.lanes;
    config.credits = arguments.credits;
    config.lease = arguments.lease;
    config.rails = transport.rails().len();
    config.bookkeeping =
        arguments.bookkeeping.unwrap_or_else(|| Config::default_bookkeeping(arguments.memory));
    config.staging = arguments.staging.unwrap_or_else(|| Config::default_staging(arguments.clients));
    // Servers of one job are told apart by this; two that start in the same nanosecond differ by process.
    let time = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
    config.id = time ^ u64::from(std::process::id()).rotate_left(40);
    Ok(config)
}

/// What the main thread waits for.
enum Event {
    Started(Box<Result<Server<Host>, ServerError>>),
    Panicked,
    Stop,
}

/// Runs a server until it is told to stop: returns it then, still running. `None`: it was told before it had started.
fn serve(transport: &Host, config: Config, vectors: Vec<usize>) -> anyhow::Result<Option<Server<Host>>> {
    let (started, events) = mpsc::channel();
    let stop = started.clone();
    // Before the server starts: a signal that comes early is not lost.
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot take signals")?;
    thread::spawn(move || signals.forever().try_for_each(|_| stop.send(Event::Stop)));
    let (shown, host) = (Shown::new(), transport.clone());
    // By another thread, since it can take long, and stops for no signal.
    thread::spawn(move || {
        // Nothing that it leaves behind is used.
        let start =
            AssertUnwindSafe(|| Server::start_watched(&host, &config, move |progress| shown.show(progress)));
        started.send(catch_unwind(start).map_or(Event::Panicked, |server| Event::Started(Box::new(server))))
    });
    let mut server = None;
    loop {
        match events.recv().context("nobody is left to say that the server is to stop")? {
            Event::Stop => return Ok(server),
            Event::Panicked => bail!("the start of the server panicked: its message is above"),
            Event::Started(result) => {
                let started = result.map_err(|error| anyhow!("{error}"))?;
                print_plan(started.budget(), &started.placement().clone().with_vectors(vectors.clone()));
                print_rails(transport);
                println!("listening at {}: {}", started.address(), transport.ways());
                println!("fervor-server ready at {}", started.address());
                std::io::stdout().flush()?;
                server = Some(started);
            }
        }
    }
}

fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    if let Some(Command::Keygen { out, name }) = &arguments.command {
        return keygen(out, name);
    }
    let keys = keys(&arguments)?;
    if !arguments.plan {
        check_exposure(&arguments, &keys)?;
    }
    // These errors say all that there is to say; their sources are part of it.
    let listen = std::slice::from_ref(&arguments.listen);
    let transport = match &*arguments.devices {
        [] => Host::with_keys(listen, keys),
        devices => Host::with_devices(listen, keys, devices),
    };
    let transport = transport.map_err(|error| anyhow!("{error}"))?;
    let config = configure(&arguments, &transport)?;
    let vectors = cores::completion_vectors(&transport);
    config.check().map_err(|error| anyhow!("{error}"))?;
    let placement = Placement::of(&config).with_vectors(vectors.clone());
    let budget = Budget::of(&config, &placement);
    if arguments.plan {
        print_plan(&budget, &placement);
        print_rails(&transport);
    }
    check_memory(&budget, &placement)?;
    if arguments.plan {
        return Ok(ExitCode::SUCCESS);
    }
    let Some(server) = serve(&transport, config, vectors)? else {
        println!("fervor-server stopped before it had started");
        return Ok(ExitCode::SUCCESS);
    };
    if !server.stop() {
        bail!("a thread of the server panicked: its message is above");
    }
    println!("fervor-server stopped");
    Ok(ExitCode::SUCCESS)
}

fn main() -> ExitCode {
    run(Arguments::parse()).unwrap_or_else(|error| {
        eprintln!("fervor-server: {error:#}");
        ExitCode::FAILURE
    })
}
