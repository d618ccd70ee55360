//! What the user of `fervor-bench lda` gets: a table on the terminal, and a JSON file.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use super::{Tally, corpus::Corpus, options::LdaOptions, trainer::Topic};
use crate::{
    job::{
        self,
        messages::Bytes,
        report::{Cache, Costs, Time, differential_table, mean_differential, title},
    },
    machine::Machine,
    report::{self, TextTable},
};

/// An epoch that every worker has finished.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    /// Its number; 0 is before the first.
    pub epoch: usize,
    /// Seconds from the start until the slowest worker had finished it.
    pub seconds: f64,
    /// The log-likelihood of words and topics together, as the workers saw it when each had finished the epoch.
    pub log_likelihood: f64,
}

/// The results of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// `lda`.
    pub application: String,
    /// `bsp`, `ssp`, `essp`, `async`, `vap`; `none` without a parameter server.
    pub model: String,
    /// Greatest lag of a read in clocks, where the model has one.
    pub staleness: Option<u32>,
    /// The bound in the first clock, under `vap`.
    pub v0: Option<f32>,
    /// Client processes.
    pub clients: u16,
    /// Worker threads of each.
    pub workers: u16,
    /// If this is the part of a single client of the job: which.
    pub client_index: Option<u16>,
    /// What was trained on.
    pub data: Data,
    /// Number of topics.
    pub topics: u32,
    /// Concentration of a document's topics.
    pub alpha: f64,
    /// Concentration of a topic's words.
    pub beta: f64,
    /// Clocks of a worker in an epoch.
    pub clocks_per_epoch: u32,
    /// Seed of generated documents, initial topics and draws.
    pub seed: u64,
    /// After each epoch, and (as epoch 0) before the first.
    pub epochs: Vec<Epoch>,
    /// The log-likelihood at the end, when all updates had arrived.
    pub log_likelihood: f64,
    /// The log-likelihood that was to be reached.
    pub target_log_likelihood: Option<f64>,
    /// When it was first reached at the end of an epoch.
    pub seconds_to_target: Option<f64>,
    /// Seconds until the last worker was done.
    pub seconds: f64,
    /// Topics that were drawn in a second, by all workers together.
    pub tokens_per_second: f64,
    /// Clocks that a worker ended in a second, on average.
    pub clocks_per_second: f64,
    /// Where the workers' time went; the parts add up to 1.
    pub time: Time,
    /// How often a read returned data of a clock this much ahead of the reader's own.
    pub clock_differential: BTreeMap<i64, u64>,
    /// How the reads were answered.
    pub cache: Cache,
    /// What moved between clients and servers.
    pub bytes: Bytes,
    /// Where this was measured.
    pub machine: Machine,
    /// The topics with their most frequent words; none in the part of a client without worker 0.
    pub top_words: Vec<Topic>,
}

/// What was trained on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Data {
    /// Where it came from, and how it was understood.
    pub source: String,
    /// Documents.
    pub documents: u64,
    /// Words in the vocabulary.
    pub words: u64,
    /// Tokens, each counted once in the tables at the end: that was checked.
    pub tokens: u64,
}

impl Report {
    /// The report of a job, or of its client number `client_index`.
    pub fn new(options: &LdaOptions, corpus: &Corpus, tally: Tally, client_index: Option<u16>) -> Self {
        let costs = Costs::new(&tally);
        let outcomes = || tally.reports.iter().filter_map(|report| report.result.as_ref());
        let epoch = |epoch: &job::messages::Epoch| Epoch {
            epoch: epoch.epoch,
            seconds: epoch.seconds,
            log_likelihood: epoch.objective,
        };
        let epochs: Vec<Epoch> = tally.epochs.iter().map(epoch).collect();
        let target = options.target_loglikelihood;
        let reached = epochs.iter().find(|epoch| target.is_some_and(|target| epoch.log_likelihood >= target));
        Report {
            application: "lda".into(),
            model: options.job.model_name(),
            staleness: options.job.staleness(),
            v0: options.job.model.v0,
            clients: options.job.clients,
            workers: options.job.workers,
            client_index,
            data: Data {
                source: corpus.source.clone(),
                documents: corpus.documents() as u64,
                words: corpus.words() as u64,
                tokens: corpus.tokens() as u64,
            },
            topics: options.topics,
            alpha: options.alpha,
            beta: options.beta,
            clocks_per_epoch: options.clocks_per_epoch,
            seed: options.seed,
            log_likelihood: outcomes().map(|outcome| outcome.log_likelihood).sum(),
            target_log_likelihood: target,
            seconds_to_target: reached.map(|epoch| epoch.seconds),
            seconds: costs.seconds,
            tokens_per_second: if costs.seconds > 0.0 { tally.count as f64 / costs.seconds } else { 0.0 },
            clocks_per_second: costs.clocks_per_second,
            time: costs.time,
            clock_differential: costs.clock_differential,
            cache: costs.cache,
            bytes: tally.bytes,
            machine: Machine::this(),
            top_words: outcomes().find_map(|outcome| outcome.topics.clone()).unwrap_or_default(),
            epochs,
        }
    }

    /// The model with its staleness.
    pub fn title(&self) -> String {
        title(&self.model, self.staleness, self.v0)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Data { source, documents, words, tokens } = &self.data;
        writeln!(f, "{source}: {tokens} tokens in {documents} documents, {words} words")?;
        let part =
            self.client_index.map_or(String::new(), |index| format!(" (this is the part of client {index})"));
        writeln!(
            f,
            "{} topics, alpha {}, beta {}, {} clocks/epoch, {} clients x {} workers, seed {}{part}",
            self.topics, self.alpha, self.beta, self.clocks_per_epoch, self.clients, self.workers, self.seed
        )?;
        writeln!(f, "{}\n", self.machine)?;
        let last = self.epochs.last();
        let mut table = TextTable::new(["epoch", "seconds", "log-likelihood", "per token"]);
        let shown = self.epochs.len().div_ceil(10).max(1);
        for epoch in self.epochs.iter().filter(|e| e.epoch % shown == 0 || Some(*e) == last) {
            table.row([
                epoch.epoch.to_string(),
                format!("{:.4}", epoch.seconds),
                format!("{:.6e}", epoch.log_likelihood),
                format!("{:.4}", epoch.log_likelihood / *tokens as f64),
            ]);
        }
        writeln!(f, "{table}")?;
        if let Some(target) = self.target_log_likelihood {
            match self.seconds_to_target {
                Some(seconds) => writeln!(f, "target {target:.6e} reached after {seconds:.4} s\n")?,
                None => writeln!(f, "target {target:.6e} not reached\n")?,
            }
        }
        if !self.top_words.is_empty() {
            let mut topics: Vec<&Topic> = self.top_words.iter().collect();
            topics.sort_by_key(|topic| std::cmp::Reverse(topic.tokens));
            let mut table = TextTable::new(["most frequent words of a topic", "tokens"]);
            for topic in topics {
                let words: Vec<&str> = topic.words.iter().map(|(word, _)| word.as_str()).collect();
                table.row([words.join(" "), topic.tokens.to_string()]);
            }
            writeln!(f, "{table}")?;
        }
        writeln!(f, "{}", self.summary())?;
        if !self.clock_differential.is_empty() {
            writeln!(f, "{}", differential_table([(self.title(), &self.clock_differential)]))?;
            writeln!(f, "{}", self.cache)?;
        }
        Ok(())
    }
}

impl Report {
    /// The run in a line.
    fn summary(&self) -> TextTable {
        let mut table = TextTable::new([
            "model",
            "epochs",
            "seconds",
            "M tokens/s",
            "log-likelihood",
            "compute",
            "waiting",
            "comm.",
            "differential",
            "READ",
            "pushed",
            "sent",
        ]);
        let Time { compute, waiting, communication } = self.time;
        table.row([
            self.title(),
            self.epochs.last().map_or("-".into(), |epoch| epoch.epoch.to_string()),
            format!("{:.3}", self.seconds),
            format!("{:.2}", self.tokens_per_second / 1e6),
            format!("{:.6e}", self.log_likelihood),
            report::percent(compute),
            report::percent(waiting),
            report::percent(communication),
            mean_differential(&self.clock_differential).map_or("-".into(), |mean| format!("{mean:.2}")),
            report::bytes(self.bytes.read),
            report::bytes(self.bytes.pushed),
            report::bytes(self.bytes.sent),
        ]);
        table
    }
}
