//! A client of the job: connects, and trains with the tables of a parameter server.

use anyhow::{Context as _, Result};
use fervor_client::Client;

use super::{
    corpus::Corpus,
    options::LdaOptions,
    report::Report,
    served::{Served, Tables},
    share::Share,
    trainer::{self, Outcome},
};
use crate::job::{
    Shared,
    client::{self, Tell},
    oracle::Oracle,
};

/// Runs client number `index` for the parent that started this process.
///
/// # Errors
/// That the parent does not listen. Anything else is told to it.
pub fn run_for_parent(options: &LdaOptions, index: u16) -> Result<()> {
    client::run_for_parent(|shared, tell| train(options, index, &options.load()?, shared, tell))
}

/// Runs client number `index` of a job whose other clients were started elsewhere, and reports its part.
///
/// # Errors
/// Whatever ends the client early.
pub fn run_by_hand(options: &LdaOptions, index: u16) -> Result<Report> {
    let corpus = options.load()?;
    let tally = client::run_by_hand(
        &options.job,
        index,
        "this client's part of the log-likelihood",
        |shared, tell| train(options, index, &corpus, shared, tell),
    )?;
    Ok(Report::new(options, &corpus, tally, Some(index)))
}

/// Connects and trains to the end.
fn train(
    options: &LdaOptions,
    index: u16,
    corpus: &Corpus,
    shared: &Shared,
    tell: Tell<'_, Outcome>,
) -> Result<()> {
    let training = options.training(corpus);
    let (job, prior) = (&options.job, &training.prior);
    let client = Client::connect_with(&job.server, job.client_options(prior.words as u64, prior.topics))?;
    let name = job.job.as_deref().unwrap_or("lda");
    let (workers, model) = (job.all_workers(), job.model.model());
    let tables = Tables::open_with(&client, name, prior, workers, model, job.model.table())?;
    let oracle = Oracle::open(&client, name, job)?;
    let seats = job
        .workers_of(index)
        .map(|number| Ok((share(options, corpus, number), client.worker()?)))
        .collect::<Result<Vec<_>>>()?;
    let reports = client::threads(seats, shared, tell, |(share, worker), messages| {
        let number = share.worker;
        let witness = oracle.as_ref().map(|oracle| oracle.witness(number));
        let mut counts = Served::new(&tables, worker, number, witness);
        trainer::run(&mut counts, share, corpus, &training, shared, messages)
            .with_context(|| format!("worker {number}"))
    })?;
    client::finish(client, reports, tell)
}

/// The share of the worker with this number.
pub fn share(options: &LdaOptions, corpus: &Corpus, number: usize) -> Share {
    let (workers, clocks) = (options.job.all_workers(), options.job.clocks_per_epoch as usize);
    Share::new(corpus, number, workers, clocks, options.topics as usize, options.job.seed)
}
