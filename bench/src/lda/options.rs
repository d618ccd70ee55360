//! The command line of `fervor-bench lda`.

use std::{ffi::OsString, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use clap::{ArgGroup, Args, value_parser};

use super::{
    corpus::{Corpus, Planted, Source, TextOptions},
    sampler::Prior,
    trainer::Training,
};
use crate::{
    job::{JobOptions, options::Arguments},
    model::ModelName,
};

/// Options of `fervor-bench lda`.
#[derive(Debug, Clone, Args)]
#[command(group = ArgGroup::new("input").required(true))]
pub struct LdaOptions {
    /// A folder of documents: each text file in it and in its subfolders is one document
    #[arg(long, value_name = "DIR", group = "input")]
    pub corpus: Option<PathBuf>,
    /// How text becomes tokens.
    #[command(flatten)]
    pub text: TextOptions,
    /// A bag of words of the UCI repository, docword.NAME.txt; plain or gzip
    #[arg(long, value_name = "FILE", group = "input")]
    pub docword: Option<PathBuf>,
    /// The vocabulary of --docword [default: vocab.NAME.txt in the same folder]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["corpus", "generate"])]
    pub vocabulary: Option<PathBuf>,
    /// Generate documents from random topics, as in 5000x10000:1000000
    #[arg(long, value_name = "DOCSxWORDS:TOKENS", group = "input")]
    pub generate: Option<Planted>,

    /// Number of topics to learn
    #[arg(long, default_value_t = 100, value_parser = value_parser!(u32).range(1..=65_535))]
    pub topics: u32,
    /// Concentration of a document's topics: a smaller value gives a document fewer topics
    #[arg(long, default_value_t = 0.1)]
    pub alpha: f64,
    /// Concentration of a topic's words: a smaller value gives a topic fewer words
    #[arg(long, default_value_t = 0.1)]
    pub beta: f64,
    /// Stop when the log-likelihood is at least this
    #[arg(long, value_name = "L", allow_negative_numbers = true, conflicts_with = "client_index")]
    pub target_loglikelihood: Option<f64>,

    /// Who works where.
    #[command(flatten)]
    pub job: JobOptions,
}

impl LdaOptions {
    /// Checks what the parser cannot.
    ///
    /// # Errors
    /// Values that make no sense, alone or together.
    pub fn validate(&self) -> Result<()> {
        self.job.validate()?;
        ensure!(
            self.job.model.continuous.is_none() || self.job.model.model == ModelName::Essp,
            "--continuous goes with --model essp here: under async, copies might lack updates even when all counts have \
             settled, and the check of all counts at the end would fail"
        );
        for (name, value) in [("alpha", self.alpha), ("beta", self.beta)] {
            ensure!(
                value.is_finite() && value > 0.0,
                "--{name} {value}: a concentration is a number above 0, as in 0.1"
            );
        }
        let share = self.text.max_share;
        ensure!(
            share > 0.0 && share <= 1.0,
            "--max-share {share}: write a number above 0 and at most 1, as in 0.2"
        );
        Ok(())
    }

    /// Where the documents come from.
    ///
    /// # Panics
    /// If none of the inputs is given; the parser sees to that.
    pub fn source(&self) -> Source {
        match (&self.corpus, &self.docword, self.generate) {
            (Some(path), _, _) => Source::Folder(path.clone(), self.text.clone()),
            (_, Some(path), _) => Source::BagOfWords(path.clone(), self.vocabulary.clone()),
            (_, _, Some(planted)) => Source::Planted(planted),
            _ => unreachable!("the parser requires an input"),
        }
    }

    /// Reads the documents.
    ///
    /// # Errors
    /// As [`Source::load`].
    pub fn load(&self) -> Result<Corpus> {
        self.source().load(self.job.seed).context("cannot read the documents")
    }

    /// How to train on `corpus`.
    pub fn training(&self, corpus: &Corpus) -> Training {
        let prior =
            Prior { topics: self.topics as usize, words: corpus.words(), alpha: self.alpha, beta: self.beta };
        Training { prior, epochs: self.job.epochs as usize, seed: self.job.seed }
    }

    /// The command line of client number `index` of the job called `job`, for its servers at `urls`.
    pub fn client_arguments(&self, index: u16, job: &str, urls: &[String]) -> Vec<OsString> {
        let mut arguments = Arguments::default();
        self.job.put(index, job, urls, &mut arguments);
        arguments.put("topics", &self.topics);
        arguments.put("alpha", &self.alpha);
        arguments.put("beta", &self.beta);
        if let Some(Planted { documents, words, tokens }) = self.generate {
            arguments.put("generate", &format!("{documents}x{words}:{tokens}"));
        }
        arguments.put_path("docword", self.docword.as_ref());
        arguments.put_path("vocabulary", self.vocabulary.as_ref());
        if self.corpus.is_some() {
            arguments.put_path("corpus", self.corpus.as_ref());
            arguments.put_path("stop-words", self.text.stop_words.as_ref());
            arguments.put("min-documents", &self.text.min_documents);
            arguments.put("max-share", &self.text.max_share);
            arguments.put("max-words", &self.text.max_words);
            if !self.text.extensions.is_empty() {
                arguments.put("extensions", &self.text.extensions.join(","));
            }
        }
        arguments.0
    }
}
