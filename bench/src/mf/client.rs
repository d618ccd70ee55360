//! A client of the job: connects, and trains with a table of a parameter server.

use anyhow::{Context as _, Result};
use fervor_client::Client;

use super::{
    options::MfOptions,
    plan,
    report::Report,
    served::{Served, Tables},
    trainer,
};
use crate::{
    data::Ratings,
    job::{
        Shared,
        client::{self, Tell},
        oracle::Oracle,
    },
};

/// Runs client number `index` for the parent that started this process.
///
/// # Errors
/// That the parent does not listen. Anything else is told to it.
pub fn run_for_parent(options: &MfOptions, index: u16) -> Result<()> {
    client::run_for_parent(|shared, tell| train(options, index, &options.load()?, shared, tell))
}

/// Runs client number `index` of a job whose other clients were started elsewhere, and reports its part.
///
/// # Errors
/// Whatever ends the client early.
pub fn run_by_hand(options: &MfOptions, index: u16) -> Result<Report> {
    let ratings = options.load()?;
    let tally =
        client::run_by_hand(&options.job, index, "loss over the rows of this client", |shared, tell| {
            train(options, index, &ratings, shared, tell)
        })?;
    Ok(Report::new(options, &ratings, tally, Some(index)))
}

/// Connects and trains to the end.
fn train(
    options: &MfOptions,
    index: u16,
    ratings: &Ratings,
    shared: &Shared,
    tell: Tell<'_, Vec<f32>>,
) -> Result<()> {
    let training = options.training(ratings);
    let job = &options.job;
    let connect = job.client_options(ratings.columns.into(), training.rank);
    let client = Client::connect_with(&job.server, connect)?;
    let name = job.job.as_deref().unwrap_or("mf");
    let tables = Tables::open(&client, name, ratings.columns, training.rank, &job.model)?;
    let oracle = Oracle::open(&client, name, job)?;
    let seats = job
        .workers_of(index)
        .map(|number| {
            let clocks = options.job.clocks_per_epoch as usize;
            let share = plan::share(ratings, number, job.all_workers(), clocks, options.job.seed);
            Ok((share, client.worker()?))
        })
        .collect::<Result<Vec<_>>>()?;
    let reports = client::threads(seats, shared, tell, |(share, worker), messages| {
        let initial = (share.worker == 0).then_some(training.initial);
        let witness = oracle.as_ref().map(|oracle| oracle.witness(share.worker));
        let mut factors = Served::new(&tables, worker, initial, witness);
        trainer::run(&mut factors, &share, &training, shared, messages)
            .with_context(|| format!("worker {}", share.worker))
    })?;
    client::finish(client, reports, tell)
}
