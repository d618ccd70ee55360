//! A client process of the job: connects, runs its worker threads, and tells what they say.

use std::{
    io::{BufRead as _, Write as _},
    process,
    sync::{
        Arc,
        atomic::Ordering::Relaxed,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use fervor_client::{Client, ClientOptions, Worker};

use super::{
    messages::{Bytes, Message, Tally},
    options::MfOptions,
    plan::{self, Share},
    report::Report,
    served::{Served, Tables},
    trainer::{self, Shared, Training, WorkerReport},
};
use crate::data::Ratings;

/// How often progress is told.
const PROGRESS: Duration = Duration::from_millis(100);

/// Runs client number `index` for the parent that started this process: messages to stdout, `stop` from stdin.
///
/// # Errors
/// That the parent does not listen. Anything else is told to it, who tells the user, and ends this process.
pub fn run_for_parent(options: &MfOptions, index: u16) -> Result<()> {
    let shared = Arc::new(Shared::default());
    thread::spawn({
        let shared = Arc::clone(&shared);
        move || obey(&shared)
    });
    let tell = |message: &Message| -> Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        let mut out = std::io::stdout().lock();
        out.write_all(&line).and_then(|()| out.flush()).context("the parent process does not listen any more")
    };
    let outcome =
        options.load().and_then(|ratings| train(options, index, &ratings, &shared, |message| tell(&message)));
    if let Err(error) = &outcome {
        tell(&Message::Failed { reason: format!("{error:#}") })?;
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

/// Runs client number `index` of a job whose other clients were started elsewhere, and reports its part.
///
/// # Errors
/// Whatever ends the client early.
pub fn run_by_hand(options: &MfOptions, index: u16) -> Result<Report> {
    let ratings = options.load()?;
    let mut tally = Tally::new(options.workers as usize);
    eprintln!("client {index} of {}: waits until all have joined", options.clients);
    train(options, index, &ratings, &Shared::default(), |message| {
        if let Some(epoch) = tally.add(message) {
            eprintln!(
                "epoch {:>4} {:>10.3} s   loss over the rows of this client {:.6e}",
                epoch.epoch, epoch.seconds, epoch.loss
            );
        }
        Ok(())
    })?;
    Ok(Report::new(options, &ratings, tally, None, Some(index)))
}

/// Connects and trains to the end.
fn train(
    options: &MfOptions,
    index: u16,
    ratings: &Ratings,
    shared: &Shared,
    mut tell: impl FnMut(Message) -> Result<()>,
) -> Result<()> {
    let training = options.training(ratings);
    let per_client = options.workers as usize;
    let first = index as usize * per_client;
    let client_options = ClientOptions {
        clients: options.clients,
        cache_bytes: options.cache_bytes(ratings.columns),
        ..ClientOptions::default()
    };
    let client = Client::connect_with(&options.server, client_options)?;
    let job = options.job.as_deref().unwrap_or("mf");
    let tables = Tables::open(&client, job, ratings.columns, training.rank, options.model.model())?;
    let seats = (first..first + per_client)
        .map(|number| {
            let clocks = options.clocks_per_epoch as usize;
            let share = plan::share(ratings, number, options.all_workers(), clocks, options.seed);
            Ok((share, client.worker()?))
        })
        .collect::<Result<Vec<_>>>()?;
    let reports = work(&tables, seats, &training, shared, &mut tell)?;
    for report in reports {
        tell(Message::Worker(report))?;
    }
    let stats = client.stats();
    let bytes = Bytes { read: stats.bytes_read, pushed: stats.bytes_pushed, sent: stats.bytes_sent };
    client.close()?;
    tell(Message::Client { bytes })
}

/// Runs a thread for each worker until all are done; meanwhile tells what they say.
fn work(
    tables: &Tables,
    seats: Vec<(Share, Worker)>,
    training: &Training,
    shared: &Shared,
    tell: &mut impl FnMut(Message) -> Result<()>,
) -> Result<Vec<WorkerReport>> {
    let (sender, messages) = mpsc::channel();
    thread::scope(|scope| {
        let threads: Vec<_> = seats
            .into_iter()
            .map(|(share, worker)| {
                let messages = sender.clone();
                scope.spawn(move || {
                    let initial = (share.worker == 0).then_some(training.initial);
                    let mut factors = Served::new(tables, worker, initial);
                    let outcome = trainer::run(&mut factors, &share, training, shared, &messages);
                    if outcome.is_err() {
                        // The job is lost: the other workers need not go on.
                        shared.stop.store(true, Relaxed);
                    }
                    outcome.with_context(|| format!("worker {}", share.worker))
                })
            })
            .collect();
        drop(sender);
        loop {
            let next = messages.recv_timeout(PROGRESS);
            let ratings = shared.ratings.swap(0, Relaxed);
            let told = if ratings > 0 { tell(Message::Progress { ratings }) } else { Ok(()) };
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
