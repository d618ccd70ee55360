//! Runs a whole job, or one client of it.

use anyhow::Result;

use super::{Tally, client, options::MfOptions, plain::Columns, plan, report::Report, trainer};
use crate::{
    data::Ratings,
    job::parent::{self, Command, Monitor},
};

/// Runs `fervor-bench mf`: the whole job, or one client of it with `--client-index`. The report is
/// none for a client that a parent started: that gets all there is to say.
///
/// # Errors
/// Options that make no sense, data that cannot be read, a server or client that fails.
pub fn run(options: &MfOptions) -> Result<Option<Report>> {
    options.validate()?;
    match options.job.client_index {
        Some(index) if options.job.tell_parent => client::run_for_parent(options, index).map(|()| None),
        Some(index) => client::run_by_hand(options, index).map(Some),
        None => {
            let ratings = options.load()?;
            let tally = train(options, &ratings)?;
            Ok(Some(Report::new(options, &ratings, tally, None)))
        }
    }
}

/// Trains with plain threads, or with client processes.
fn train(options: &MfOptions, ratings: &Ratings) -> Result<Tally> {
    let mut target = None;
    let total = u64::from(options.job.epochs) * ratings.entries.len() as u64;
    let judge = Box::new(|epoch: &crate::job::messages::Epoch| {
        let loss = epoch.objective;
        let target = *target.get_or_insert_with(|| options.target(loss));
        (format!("epoch {} loss {loss:.4e}", epoch.epoch), target.is_some_and(|target| loss <= target))
    });
    let mut monitor = Monitor::new(&options.job, total, "ratings", judge);
    if options.job.no_server {
        let training = options.training(ratings);
        let workers = options.job.all_workers();
        let clocks = options.job.clocks_per_epoch as usize;
        let shares: Vec<_> = (0..workers)
            .map(|worker| plan::share(ratings, worker, workers, clocks, options.job.seed))
            .collect();
        let columns = Columns::new(ratings.columns, training.rank, training.initial, workers);
        parent::with_threads(shares, &mut monitor, |share, shared, messages| {
            trainer::run(&mut &columns, &share, &training, shared, messages)
        })?;
    } else {
        let arguments = |index, job: &str, urls: &[String]| options.client_arguments(index, job, urls);
        let command = Command { name: "mf", options: &options.job, arguments: &arguments };
        parent::with_processes(&command, &mut monitor)?;
    }
    Ok(monitor.finish())
}
