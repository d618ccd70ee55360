//! The command line of `fervor-bench mf`.

use std::{ffi::OsString, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{ArgGroup, Args, value_parser};

use super::{sgd::Initial, trainer::Training};
use crate::{
    data::{Planted, Ratings, Source},
    model::ModelOptions,
    server::EmbeddedOptions,
};

/// Options of `fervor-bench mf`.
#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("input").required(true))]
pub struct MfOptions {
    /// Ratings in a file: MovieLens CSV, MatrixMarket, or lines of `row column value`; plain or gzip
    #[arg(long, value_name = "FILE", group = "input")]
    pub data: Option<PathBuf>,
    /// The built-in handwritten digits: 1797 pictures of 64 pixels
    #[arg(long, group = "input")]
    pub digits: bool,
    /// Ratings made up around planted factors
    #[arg(long, value_name = "ROWSxCOLS:RATINGS", group = "input")]
    pub generate: Option<Planted>,

    /// Numbers in a factor
    #[arg(long, default_value_t = 32, value_parser = value_parser!(u32).range(1..=65_536))]
    pub rank: u32,
    /// Clocks that each worker ends in one pass over its ratings
    #[arg(long, default_value_t = 10, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub clocks_per_epoch: u32,
    /// Passes over the ratings; fewer if a target is reached before
    #[arg(long, default_value_t = 50, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub epochs: u32,
    /// Size of a step in the first epoch [default: one that suits the input]
    #[arg(long)]
    pub step: Option<f32>,
    /// What the step is multiplied with after each epoch
    #[arg(long, default_value_t = 0.99)]
    pub decay: f32,
    /// Stop when the sum of squared errors is at most this
    #[arg(long, value_name = "LOSS", conflicts_with = "client_index")]
    pub target_loss: Option<f64>,
    /// Stop when the loss is at most this part of the loss before the first epoch
    #[arg(long, value_name = "PART", conflicts_with_all = ["target_loss", "client_index"])]
    pub target_fraction: Option<f64>,
    /// Seed of generated data, initial factors and the order of the ratings
    #[arg(long, default_value_t = 1)]
    pub seed: u64,

    /// The consistency model.
    #[command(flatten)]
    pub model: ModelOptions,
    /// Client processes
    #[arg(long, default_value_t = 2, value_parser = value_parser!(u16).range(1..=4096))]
    pub clients: u16,
    /// Worker threads in each client
    #[arg(long, default_value_t = 1, value_parser = value_parser!(u16).range(1..=4096))]
    pub workers: u16,
    /// Use this running server instead of starting one; may be repeated
    #[arg(long, value_name = "URL")]
    pub server: Vec<String>,
    /// Train with as many plain threads of one process, without any parameter server
    #[arg(long, conflicts_with_all = ["server", "client_index"])]
    pub no_server: bool,
    /// Be client number I of a job whose other clients are started elsewhere in the same way
    #[arg(long, value_name = "I", requires = "server")]
    pub client_index: Option<u16>,
    /// Name of the job on the servers, used once: its clients work together [default: one of its own, or `mf`
    /// with --client-index]
    #[arg(long)]
    pub job: Option<String>,
    /// The server that is started if none is named.
    #[command(flatten)]
    pub embedded: EmbeddedOptions,
    /// Bytes of a client's cache [default: enough for all column factors]
    #[arg(long, value_name = "BYTES")]
    pub cache: Option<usize>,

    /// Write the results to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the learned column factors to this file, as a JSON array of an array for each column
    #[arg(long, value_name = "FILE", conflicts_with = "client_index")]
    pub factors: Option<PathBuf>,
    /// Say what is told to the parent process
    #[arg(long, hide = true, requires = "client_index")]
    pub tell_parent: bool,
    /// Tell the parent process the column factors too
    #[arg(long, hide = true, requires = "tell_parent")]
    pub tell_factors: bool,
}

impl MfOptions {
    /// Checks what the parser cannot.
    ///
    /// # Errors
    /// Values that make no sense, alone or together.
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        if let Some(step) = self.step {
            ensure!(step.is_finite() && step > 0.0, "--step {step}: a step is a number above 0");
        }
        ensure!(self.decay > 0.0 && self.decay <= 1.0, "--decay {}: it is above 0 and at most 1", self.decay);
        if let Some(part) = self.target_fraction {
            ensure!(part > 0.0 && part < 1.0, "--target-fraction {part}: it is between 0 and 1, as in 0.02");
        }
        if let Some(index) = self.client_index.filter(|&index| index >= self.clients) {
            bail!(
                "--client-index {index}: of {} clients, the last has index {}",
                self.clients,
                self.clients - 1
            );
        }
        Ok(())
    }

    /// Where the ratings come from.
    ///
    /// # Panics
    /// If none of the inputs is given; the parser sees to that.
    pub fn source(&self) -> Source {
        match (&self.data, self.digits, self.generate) {
            (Some(path), _, _) => Source::File(path.clone()),
            (_, true, _) => Source::Digits,
            (_, _, Some(planted)) => Source::Planted(planted),
            _ => unreachable!("the parser requires an input"),
        }
    }

    /// Reads the ratings.
    ///
    /// # Errors
    /// As [`Source::load`].
    pub fn load(&self) -> Result<Ratings> {
        self.source().load(self.seed).context("cannot read the ratings")
    }

    /// Workers of the whole job.
    pub fn all_workers(&self) -> usize {
        self.clients as usize * self.workers as usize
    }

    /// How to train on `ratings`.
    pub fn training(&self, ratings: &Ratings) -> Training {
        let rank = self.rank as usize;
        Training {
            rank,
            epochs: self.epochs as usize,
            step: self.step.unwrap_or_else(|| default_step(ratings, self.clocks_per_epoch)),
            decay: self.decay,
            initial: Initial::new(self.seed, rank, ratings.root_mean_square()),
            keep_factors: self.tell_factors || self.factors.is_some(),
        }
    }

    /// Bytes of a client's cache, of which one table may take half.
    pub fn cache_bytes(&self, columns: u32) -> usize {
        // A row has a header of 32 bytes and begins at a cache line.
        let factor = (32 + 4 * self.rank as usize).next_multiple_of(64);
        self.cache.unwrap_or((1 << 20) + 2 * columns as usize * factor)
    }

    /// The model, as the reports name it: `none` without a server.
    pub fn model_name(&self) -> String {
        if self.no_server { "none".into() } else { self.model.model.to_string() }
    }

    /// The staleness, where the model has one.
    pub fn staleness(&self) -> Option<u32> {
        self.model.bounded_by().filter(|_| !self.no_server)
    }

    /// What the job is, in a few words.
    pub fn title(&self) -> String {
        if self.no_server { "plain threads".into() } else { self.model.to_string() }
    }

    /// The command line of client number `index` of the job called `job`, for its servers at `urls`.
    pub fn client_arguments(&self, index: u16, job: &str, urls: &[String]) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut put = |name: &str, value: &dyn ToString| {
            arguments.push(format!("--{name}={}", value.to_string()).into());
        };
        put("client-index", &index);
        put("job", &job);
        urls.iter().for_each(|url| put("server", url));
        put("rank", &self.rank);
        put("clocks-per-epoch", &self.clocks_per_epoch);
        put("epochs", &self.epochs);
        put("decay", &self.decay);
        put("seed", &self.seed);
        put("model", &self.model.model);
        put("clients", &self.clients);
        put("workers", &self.workers);
        if let Some(cache) = self.cache {
            put("cache", &cache);
        }
        if let Some(step) = self.step {
            put("step", &step);
        }
        if let Some(staleness) = self.model.staleness {
            put("staleness", &staleness);
        }
        if let Some(v0) = self.model.v0 {
            put("v0", &v0);
        }
        if let Some(planted) = self.generate {
            put("generate", &format!("{}x{}:{}", planted.rows, planted.columns, planted.ratings));
        }
        if let Some(path) = &self.data {
            // A path need not be text.
            let mut argument = OsString::from("--data=");
            argument.push(path);
            arguments.push(argument);
        }
        let flags =
            [("--digits", self.digits), ("--tell-parent", true), ("--tell-factors", self.factors.is_some())];
        arguments.extend(flags.into_iter().filter(|(_, set)| *set).map(|(flag, _)| flag.into()));
        arguments
    }
}

/// A step that is stable on `ratings`.
///
/// A column's factor moves by all of a clock's ratings of it, from several workers that do not see each other's
/// updates for some clocks. What they do together must not go far beyond the optimum: so the step is lower
/// the more ratings the most popular column gets in a clock, and the larger the values are.
fn default_step(ratings: &Ratings, clocks_per_epoch: u32) -> f32 {
    let mut counts = vec![0u64; ratings.columns as usize];
    for entry in &ratings.entries {
        counts[entry.column as usize] += 1;
    }
    let most = counts.into_iter().max().unwrap_or(1) as f64 / f64::from(clocks_per_epoch);
    let size = ratings.root_mean_square().max(f64::MIN_POSITIVE);
    ((3.0 / most.max(1.0)).min(0.02) / size) as f32
}
