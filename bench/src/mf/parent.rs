//! The process that the user started: starts the others, listens to them, and sees to it that none outlives it.
//!
//! A client whose stdin ends goes away at once, and the server gets a signal from the kernel, so nothing is
//! left over even if this process is killed.

use std::{
    fmt,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        atomic::Ordering::Relaxed,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use super::{
    client,
    messages::{Message, Tally},
    options::MfOptions,
    plain, plan,
    report::Report,
    trainer::Shared,
};
use crate::{data::Ratings, server::EmbeddedServer};

/// How often the server is looked after while nothing is heard of the clients.
const LOOK: Duration = Duration::from_millis(200);

/// Runs `fervor-bench mf`: the whole job, or one client of it with `--client-index`. The report is
/// none for a client that a parent started: that gets all there is to say.
///
/// # Errors
/// Options that make no sense, data that cannot be read, a server or client that fails.
pub fn run(options: &MfOptions) -> Result<Option<Report>> {
    options.validate()?;
    match options.client_index {
        Some(index) if options.tell_parent => client::run_for_parent(options, index).map(|()| None),
        Some(index) => client::run_by_hand(options, index).map(Some),
        None => {
            let ratings = options.load()?;
            let monitor = Monitor::new(options, &ratings);
            let monitor = if options.no_server {
                with_threads(options, &ratings, monitor)?
            } else {
                with_processes(options, monitor)?
            };
            monitor.bar.finish_and_clear();
            Ok(Some(Report::new(options, &ratings, monitor.tally, monitor.target, None)))
        }
    }
}

/// Trains with plain threads.
fn with_threads(options: &MfOptions, ratings: &Ratings, mut monitor: Monitor) -> Result<Monitor> {
    let training = options.training(ratings);
    let workers = options.all_workers();
    let clocks = options.clocks_per_epoch as usize;
    let shares: Vec<_> =
        (0..workers).map(|worker| plan::share(ratings, worker, workers, clocks, options.seed)).collect();
    let shared = Shared::default();
    let (sender, messages) = mpsc::channel();
    thread::scope(|scope| {
        let threads = scope.spawn(|| {
            let sender = sender;
            plain::run(ratings.columns, &shares, &training, &shared, &sender)
        });
        loop {
            match messages.recv_timeout(LOOK) {
                Ok(message) => {
                    if monitor.note(message) {
                        shared.stop.store(true, Relaxed);
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            monitor.note(Message::Progress { ratings: shared.ratings.swap(0, Relaxed) });
        }
        let reports = threads.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        for report in reports {
            monitor.note(Message::Worker(report));
        }
        Ok(monitor)
    })
}

/// Trains with client processes, on the servers given or one of our own.
fn with_processes(options: &MfOptions, mut monitor: Monitor) -> Result<Monitor> {
    let mut embedded = match options.server.is_empty() {
        true => Some(EmbeddedServer::start(&options.embedded, options.clients, options.workers)?),
        false => None,
    };
    let urls = embedded.as_ref().map_or(options.server.clone(), |server| vec![server.url().to_owned()]);
    let (sender, heard) = mpsc::channel();
    let mut clients = Clients::start(options, &urls, &sender)?;
    drop(sender);
    let outcome = listen(&mut clients, &heard, &mut monitor, embedded.as_mut());
    drop(clients);
    // If the server has died, that is why the clients have failed.
    match (outcome, embedded.as_mut().map_or(Ok(()), EmbeddedServer::check)) {
        (Ok(()), _) => Ok(monitor),
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(cause)) => Err(cause.context(error)),
    }
}

/// Listens to the clients until all have ended well.
fn listen(
    clients: &mut Clients,
    heard: &Receiver<(usize, Heard)>,
    monitor: &mut Monitor,
    mut embedded: Option<&mut EmbeddedServer>,
) -> Result<()> {
    loop {
        match heard.recv_timeout(LOOK) {
            Ok((index, Heard::Message(Message::Failed { reason }))) => bail!("client {index}: {reason}"),
            Ok((_, Heard::Message(message))) => {
                if monitor.note(message) {
                    clients.stop();
                }
            }
            Ok((index, Heard::Nonsense(line))) => bail!("client {index} said what is no message: {line}"),
            Ok((index, Heard::End)) => {
                let status = clients.0[index].process.wait().context("cannot wait for a client")?;
                if !status.success() {
                    bail!("client {index} ended without a word ({status})");
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
        if let Some(server) = embedded.as_deref_mut() {
            server.check()?;
        }
    }
}

/// What is heard of a client.
enum Heard {
    Message(Message),
    Nonsense(String),
    End,
}

struct ClientProcess {
    process: Child,
    stdin: ChildStdin,
}

/// The client processes. Those that still run when this is dropped are killed.
struct Clients(Vec<ClientProcess>);

impl Clients {
    fn start(options: &MfOptions, urls: &[String], heard: &Sender<(usize, Heard)>) -> Result<Self> {
        let own = std::env::current_exe().context("cannot find the own program")?;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis());
        let job = options.job.clone().unwrap_or_else(|| format!("mf-{}-{time}", std::process::id()));
        let mut clients = Clients(Vec::new());
        for index in 0..options.clients {
            let mut process = Command::new(&own)
                .arg("mf")
                .args(options.client_arguments(index, &job, urls))
                // An interrupt from the terminal is to reach this process alone: its end is theirs.
                .process_group(0)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .with_context(|| format!("cannot start {} as client {index}", own.display()))?;
            let stdin = process.stdin.take().context("no stdin")?;
            let stdout = process.stdout.take().context("no stdout")?;
            clients.0.push(ClientProcess { process, stdin });
            let heard = heard.clone();
            thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    let message = serde_json::from_str(&line);
                    let message = message.map_or_else(|_| Heard::Nonsense(line), Heard::Message);
                    if heard.send((index as usize, message)).is_err() {
                        return;
                    }
                }
                let _ = heard.send((index as usize, Heard::End));
            });
        }
        Ok(clients)
    }

    /// Asks all to stop after the epoch that they are in. One that has ended meanwhile does not hear it.
    fn stop(&mut self) {
        for client in &mut self.0 {
            let _ = client.stdin.write_all(b"stop\n");
        }
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        for client in &mut self.0 {
            // Both fail for a process that has ended and been waited for.
            let _ = client.process.kill();
            let _ = client.process.wait();
        }
    }
}

/// Adds up, shows progress, and knows when the target is reached.
struct Monitor {
    tally: Tally,
    bar: ProgressBar,
    target: Option<f64>,
    target_fraction: Option<f64>,
}

impl Monitor {
    fn new(options: &MfOptions, ratings: &Ratings) -> Self {
        // Hidden where stderr is no terminal.
        let bar = ProgressBar::new(u64::from(options.epochs) * ratings.entries.len() as u64);
        let style =
            ProgressStyle::with_template("{prefix} {wide_bar} {percent:>3} %  {rate}  {msg}  {elapsed}");
        let rate = |state: &ProgressState, out: &mut dyn fmt::Write| {
            // What cannot be written is not shown.
            let _ = write!(out, "{:.1} M ratings/s", state.per_sec() / 1e6);
        };
        bar.set_style(style.expect("the template is sound").with_key("rate", rate));
        bar.set_prefix(options.title());
        Monitor {
            tally: Tally::new(options.all_workers()),
            bar,
            target: options.target_loss,
            target_fraction: options.target_fraction,
        }
    }

    /// Takes note of a message; true when it brings the target.
    fn note(&mut self, message: Message) -> bool {
        let Some(epoch) = self.tally.add(message) else {
            self.bar.set_position(self.tally.ratings);
            return false;
        };
        if let (0, Some(fraction)) = (epoch.epoch, self.target_fraction) {
            self.target = Some(fraction * epoch.loss);
        }
        self.bar.set_message(format!("epoch {} loss {:.4e}", epoch.epoch, epoch.loss));
        self.target.is_some_and(|target| epoch.loss <= target)
    }
}
