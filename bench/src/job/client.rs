//! A client process of a job: runs its worker threads, and tells what they say.

use std::{
    io::{BufRead as _, Write as _},
    process,
    sync::{
        Arc,
        atomic::Ordering::Relaxed,
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use fervor_client::Client;
use serde::Serialize;

use super::{
    accesses::Shared,
    messages::{Bytes, Message, Tally, WorkerReport},
    options::JobOptions,
};

/// How often progress is told.
const PROGRESS: Duration = Duration::from_millis(100);

/// Where a client tells what happens.
pub type Tell<'a, R> = &'a mut dyn FnMut(Message<R>) -> Result<()>;

/// Runs `train` for the parent that started this process: messages to stdout, `stop` from stdin.
///
/// # Errors
/// That the parent does not listen. Anything else is told to it, who tells the user, and ends this process.
pub fn run_for_parent<R: Serialize>(train: impl FnOnce(&Shared, Tell<'_, R>) -> Result<()>) -> Result<()> {
    let shared = Arc::new(Shared::default());
    thread::spawn({
        let shared = Arc::clone(&shared);
        move || obey(&shared)
    });
    let mut tell = |message: Message<R>| -> Result<()> {
        let mut line = serde_json::to_vec(&message)?;
        line.push(b'\n');
        let mut out = std::io::stdout().lock();
        out.write_all(&line).and_then(|()| out.flush()).context("the parent process does not listen any more")
    };
    if let Err(error) = train(&shared, &mut tell) {
        tell(Message::Failed { reason: format!("{error:#}") })?;
        process::exit(1);
    }
    Ok(())
}

/// Obeys the parent until it goes away, and ends this process then: nobody is left to tell anything.
fn obey(shared: &Shared) {
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        if line == "stop" {
            shared.stop.store(true, Relaxed);
        }
    }
    process::exit(1);
}

/// Runs `train` as client number `index` of a job whose other clients were started elsewhere. What it said, added up;
/// `objective` is what the epochs' numbers are called.
///
/// # Errors
/// Whatever ends the client early.
pub fn run_by_hand<R>(
    options: &JobOptions,
    index: u16,
    objective: &str,
    train: impl FnOnce(&Shared, Tell<'_, R>) -> Result<()>,
) -> Result<Tally<R>> {
    let mut tally = Tally::new(options.workers as usize);
    eprintln!("client {index} of {}: waits until all have joined", options.clients);
    train(&Shared::default(), &mut |message| {
        if let Some(epoch) = tally.add(message) {
            eprintln!(
                "epoch {:>4} {:>10.3} s   {objective} {:.6e}",
                epoch.epoch, epoch.seconds, epoch.objective
            );
        }
        Ok(())
    })?;
    Ok(tally)
}

/// Runs a thread for each of the `seats` until all are done; meanwhile tells what they say.
///
/// # Errors
/// The first that a worker failed with, or that nobody listens.
pub fn threads<S: Send, R: Send>(
    seats: Vec<S>,
    shared: &Shared,
    tell: Tell<'_, R>,
    run: impl Fn(S, &Sender<Message<R>>) -> Result<WorkerReport<R>> + Sync,
) -> Result<Vec<WorkerReport<R>>> {
    let (sender, messages) = mpsc::channel();
    thread::scope(|scope| {
        let threads: Vec<_> = seats
            .into_iter()
            .map(|seat| {
                let (messages, run) = (sender.clone(), &run);
                scope.spawn(move || {
                    let outcome = run(seat, &messages);
                    if outcome.is_err() {
                        // The job is lost: the other workers need not go on.
                        shared.stop.store(true, Relaxed);
                    }
                    outcome
                })
            })
            .collect();
        drop(sender);
        loop {
            let next = messages.recv_timeout(PROGRESS);
            let count = shared.count.swap(0, Relaxed);
            let told = if count > 0 { tell(Message::Progress { count }) } else { Ok(()) };
            let told = match next {
                Ok(message) => told.and_then(|()| tell(message)),
                Err(RecvTimeoutError::Timeout) => told,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            if let Err(error) = told {
                shared.stop.store(true, Relaxed);
                return Err(error);
            }
        }
        threads.into_iter().map(|t| t.join().unwrap_or_else(|e| std::panic::resume_unwind(e))).collect()
    })
}

/// Tells of the workers that are done, and closes the client.
///
/// # Errors
/// What the client says; that nobody listens.
pub fn finish<R>(client: Client, reports: Vec<WorkerReport<R>>, tell: Tell<'_, R>) -> Result<()> {
    for report in reports {
        tell(Message::Worker(report))?;
    }
    let stats = client.stats();
    let bytes = Bytes { read: stats.bytes_read, pushed: stats.bytes_pushed, sent: stats.bytes_sent };
    let ways = client.ways().into_iter().map(|(_, way)| way).collect();
    let rails = client.rails().iter().map(ToString::to_string).collect();
    client.close()?;
    tell(Message::Client { bytes, ways, rails })
}
