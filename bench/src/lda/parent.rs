//! Runs a whole job, or one client of it.

use anyhow::Result;

use super::{Tally, client, corpus::Corpus, options::LdaOptions, plain::Matrix, report::Report, trainer};
use crate::job::{
    messages::Epoch,
    parent::{self, Command, Monitor},
};

/// Runs `fervor-bench lda`: the whole job, or one client of it with `--client-index`. The report is
/// none for a client that a parent started: that gets all there is to say.
///
/// # Errors
/// Options that make no sense, documents that cannot be read, a server or client that fails.
pub fn run(options: &LdaOptions) -> Result<Option<Report>> {
    options.validate()?;
    match options.job.client_index {
        Some(index) if options.job.tell_parent => client::run_for_parent(options, index).map(|()| None),
        Some(index) => client::run_by_hand(options, index).map(Some),
        None => {
            let corpus = options.load()?;
            let tally = train(options, &corpus)?;
            Ok(Some(Report::new(options, &corpus, tally, None)))
        }
    }
}

/// Trains with plain threads, or with client processes.
fn train(options: &LdaOptions, corpus: &Corpus) -> Result<Tally> {
    let total = u64::from(options.job.epochs) * corpus.tokens() as u64;
    let judge = Box::new(|epoch: &Epoch| {
        let reached = options.target_loglikelihood.is_some_and(|target| epoch.objective >= target);
        (format!("epoch {} log-likelihood {:.5e}", epoch.epoch, epoch.objective), reached)
    });
    let mut monitor = Monitor::new(&options.job, total, "tokens", judge);
    if options.job.no_server {
        let training = options.training(corpus);
        let workers = options.job.all_workers();
        let shares = (0..workers).map(|number| client::share(options, corpus, number)).collect();
        let matrix = Matrix::new(&training.prior, workers);
        parent::with_threads(shares, &mut monitor, |share, shared, messages| {
            trainer::run(&mut &matrix, share, corpus, &training, shared, messages)
        })?;
    } else {
        let arguments = |index, job: &str, urls: &[String]| options.client_arguments(index, job, urls);
        let command = Command { name: "lda", options: &options.job, arguments: &arguments };
        parent::with_processes(&command, &mut monitor)?;
    }
    Ok(monitor.finish())
}
