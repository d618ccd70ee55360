//! The process that the user started: starts the others, listens to them, and sees to it that none outlives it.
//!
//! A client whose stdin ends goes away at once, and the server gets a signal from the kernel, so nothing is
//! left over even if this process is killed.

use std::{
    ffi::OsString,
    fmt,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    process::{self, Child, ChildStdin, Stdio},
    sync::{
        atomic::Ordering::Relaxed,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use serde::de::DeserializeOwned;

use super::{
    accesses::Shared,
    client,
    messages::{Epoch, Message, Tally, WorkerReport},
    options::JobOptions,
};
use crate::server::EmbeddedServer;

/// How often the server is looked after while nothing is heard of the clients.
const LOOK: Duration = Duration::from_millis(200);

/// The arguments of the client of an index, of the job of a name, with servers at some URLs.
pub type ArgumentsOf<'a> = dyn Fn(u16, &str, &[String]) -> Vec<OsString> + 'a;

/// How the clients of a job are started.
pub struct Command<'a> {
    /// The subcommand of this program.
    pub name: &'a str,
    /// Who works where.
    pub options: &'a JobOptions,
    /// What a client is started with.
    pub arguments: &'a ArgumentsOf<'a>,
}

/// Trains with a plain thread of this process for each of the `seats`.
///
/// # Errors
/// The first that a thread failed with.
pub fn with_threads<S: Send, R: Send>(
    seats: Vec<S>,
    monitor: &mut Monitor<R>,
    run: impl Fn(S, &Shared, &Sender<Message<R>>) -> Result<WorkerReport<R>> + Sync,
) -> Result<()> {
    let shared = Shared::default();
    let mut note = |message| {
        if monitor.note(message) {
            shared.stop.store(true, Relaxed);
        }
        Ok(())
    };
    let reports = client::threads(seats, &shared, &mut note, |seat, messages| run(seat, &shared, messages))?;
    for report in reports {
        monitor.note(Message::Worker(report));
    }
    Ok(())
}

/// Trains with client processes, on the servers given or one of our own.
///
/// # Errors
/// A server or client that does not start, or fails.
pub fn with_processes<R: DeserializeOwned + Send + 'static>(
    command: &Command<'_>,
    monitor: &mut Monitor<R>,
) -> Result<()> {
    let options = command.options;
    let mut embedded = match options.server.is_empty() {
        true => Some(EmbeddedServer::start(
            &options.embedded,
            options.clients,
            options.reads.lanes(options.workers),
        )?),
        false => None,
    };
    let urls = embedded.as_ref().map_or(options.server.clone(), |server| vec![server.url().to_owned()]);
    let (sender, heard) = mpsc::channel();
    let mut clients = Clients::start(command, &urls, &sender)?;
    drop(sender);
    let outcome = listen(&mut clients, &heard, monitor, embedded.as_mut());
    drop(clients);
    // If the server has died, that is why the clients have failed.
    match (outcome, embedded.as_mut().map_or(Ok(()), EmbeddedServer::check)) {
        (Ok(()), _) => Ok(()),
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(cause)) => Err(cause.context(error)),
    }
}

/// Listens to the clients until all have ended well.
fn listen<R>(
    clients: &mut Clients,
    heard: &Receiver<(usize, Heard<R>)>,
    monitor: &mut Monitor<R>,
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
            Ok((index, Heard::Nonsense(line))) => {
                bail!("client {index} sent a line that is no message: {line}")
            }
            Ok((index, Heard::End)) => {
                let status = clients.0[index].process.wait().context("cannot wait for a client")?;
                if !status.success() {
                    bail!("client {index} ended without saying why ({status})");
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
enum Heard<R> {
    Message(Message<R>),
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
    fn start<R: DeserializeOwned + Send + 'static>(
        command: &Command<'_>,
        urls: &[String],
        heard: &Sender<(usize, Heard<R>)>,
    ) -> Result<Self> {
        let (name, options) = (command.name, command.options);
        let own = std::env::current_exe().context("cannot find the own program")?;
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis());
        let job = options.job.clone().unwrap_or_else(|| format!("{name}-{}-{time}", std::process::id()));
        let mut clients = Clients(Vec::new());
        for index in 0..options.clients {
            let mut process = process::Command::new(&own)
                .arg(name)
                .args((command.arguments)(index, &job, urls))
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

/// What an epoch means: words for the progress bar, and whether it brings the target.
pub type Judge<'a> = Box<dyn FnMut(&Epoch) -> (String, bool) + 'a>;

/// Adds up, shows progress, and knows when the target is reached.
pub struct Monitor<'a, R> {
    tally: Tally<R>,
    bar: ProgressBar,
    judge: Judge<'a>,
}

impl<'a, R> Monitor<'a, R> {
    /// For a job that goes over `total` `units` (ratings, tokens), all epochs together.
    pub fn new(options: &JobOptions, total: u64, units: &'static str, judge: Judge<'a>) -> Self {
        // Hidden where stderr is no terminal.
        let bar = if options.quiet { ProgressBar::hidden() } else { ProgressBar::new(total) };
        let style =
            ProgressStyle::with_template("{prefix} {wide_bar} {percent:>3} %  {rate}  {msg}  {elapsed}");
        let rate = move |state: &ProgressState, out: &mut dyn fmt::Write| {
            // What cannot be written is not shown.
            let _ = write!(out, "{:.1} M {units}/s", state.per_sec() / 1e6);
        };
        bar.set_style(style.expect("the template is sound").with_key("rate", rate));
        bar.set_prefix(options.title());
        Monitor { tally: Tally::new(options.all_workers()), bar, judge }
    }

    /// Takes note of a message; true when it brings the target.
    fn note(&mut self, message: Message<R>) -> bool {
        let Some(epoch) = self.tally.add(message) else {
            self.bar.set_position(self.tally.count);
            return false;
        };
        let (words, reached) = (self.judge)(epoch);
        self.bar.set_message(words);
        reached
    }

    /// What everything adds up to, now that the job is done.
    pub fn finish(self) -> Tally<R> {
        self.bar.finish_and_clear();
        self.tally
    }
}
