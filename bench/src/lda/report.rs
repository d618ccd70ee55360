//! What the user of `fervor-bench lda` gets: a table on the terminal, and a JSON file.

use std::{cmp::Reverse, fmt};

use serde::Serialize;

use super::{Tally, corpus::Corpus, options::LdaOptions, trainer::Topic};
use crate::{
    job::{
        self,
        report::{Run, write_epochs},
    },
    report::TextTable,
};

/// An epoch that every worker has finished.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Epoch {
    /// Its number; 0 is before the first.
    pub epoch: usize,
    /// Seconds from the start until the slowest worker had finished it.
    pub seconds: f64,
    /// The log-likelihood of words and topics together, as the workers saw it when each had finished the epoch.
    pub log_likelihood: f64,
}

/// The results of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// What all applications report.
    #[serde(flatten)]
    pub run: Run,
    /// What was trained on.
    pub data: Data,
    /// Number of topics.
    pub topics: u32,
    /// Concentration of a document's topics.
    pub alpha: f64,
    /// Concentration of a topic's words.
    pub beta: f64,
    /// After each epoch, and (as epoch 0) before the first.
    pub epochs: Vec<Epoch>,
    /// The log-likelihood at the end, when all updates had arrived.
    pub log_likelihood: f64,
    /// The log-likelihood that was to be reached.
    pub target_log_likelihood: Option<f64>,
    /// When it was first reached at the end of an epoch.
    pub seconds_to_target: Option<f64>,
    /// Topics that were drawn in a second, by all workers together.
    pub tokens_per_second: f64,
    /// The topics with their most frequent words; none in the part of a client without worker 0.
    pub top_words: Vec<Topic>,
}

/// What was trained on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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
        let run = Run::new("lda", &options.job, client_index, &tally);
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
            data: Data {
                source: corpus.source.clone(),
                documents: corpus.documents() as u64,
                words: corpus.words() as u64,
                tokens: corpus.tokens() as u64,
            },
            topics: options.topics,
            alpha: options.alpha,
            beta: options.beta,
            log_likelihood: outcomes().map(|outcome| outcome.log_likelihood).sum(),
            target_log_likelihood: target,
            seconds_to_target: reached.map(|epoch| epoch.seconds),
            tokens_per_second: if run.seconds > 0.0 { tally.count as f64 / run.seconds } else { 0.0 },
            top_words: outcomes().find_map(|outcome| outcome.topics.clone()).unwrap_or_default(),
            epochs,
            run,
        }
    }

    /// The topics, the most frequent first.
    fn topics(&self) -> TextTable {
        let mut topics: Vec<&Topic> = self.top_words.iter().collect();
        topics.sort_by_key(|topic| Reverse(topic.tokens));
        let mut table = TextTable::new(["most frequent words of a topic", "tokens"]);
        for topic in topics {
            let words: Vec<&str> = topic.words.iter().map(|(word, _)| word.as_str()).collect();
            table.row([words.join(" "), topic.tokens.to_string()]);
        }
        table
    }

    /// The run in a line.
    fn summary(&self) -> TextTable {
        let head = ["model", "epochs", "seconds", "M tokens/s", "log-likelihood"];
        let mut table = TextTable::new(head.into_iter().chain(Run::COST_HEAD));
        let row = [
            self.run.title(),
            self.epochs.last().map_or("-".into(), |epoch| epoch.epoch.to_string()),
            format!("{:.3}", self.run.seconds),
            format!("{:.2}", self.tokens_per_second / 1e6),
            format!("{:.6e}", self.log_likelihood),
        ];
        table.row(row.into_iter().chain(self.run.cost_cells()));
        table
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Data { source, documents, words, tokens } = &self.data;
        writeln!(f, "{source}: {tokens} tokens in {documents} documents, {words} words")?;
        let prior = format!("{} topics, alpha {}, beta {}", self.topics, self.alpha, self.beta);
        self.run.write_head(&prior, f)?;
        let epochs = self.epochs.iter().map(|epoch| {
            let likelihood = epoch.log_likelihood;
            let cells = [format!("{likelihood:.6e}"), format!("{:.4}", likelihood / *tokens as f64)];
            (epoch.epoch, epoch.seconds, cells)
        });
        let head = ["log-likelihood", "per token"];
        write_epochs(f, head, epochs, self.target_log_likelihood, self.seconds_to_target)?;
        if !self.top_words.is_empty() {
            writeln!(f, "{}", self.topics())?;
        }
        writeln!(f, "{}", self.summary())?;
        self.run.write_reads(f)
    }
}
