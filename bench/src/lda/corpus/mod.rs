//! Documents: bags of words from a folder of text, from a UCI file, or generated.
//!
//! As with ratings, every process of a job gets the same documents from the same source, token for token; it takes
//! its own share of them.

use std::{collections::BTreeSet, fmt, path::PathBuf};

use crate::data::DataError;

pub mod bow;
pub mod folder;
pub mod generate;

pub use folder::TextOptions;
pub use generate::Planted;

/// Most tokens of a corpus: topic totals are 32-bit integers.
pub const MAX_TOKENS: usize = i32::MAX as usize;

/// Documents over a vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corpus {
    /// Where it came from and how it was understood, for people.
    pub source: String,
    /// The words, by number.
    pub vocabulary: Vec<String>,
    /// The words of all documents, one document after the other.
    tokens: Vec<u32>,
    /// Where each document ends.
    ends: Vec<usize>,
}

impl Corpus {
    /// An empty one.
    fn new(source: String, vocabulary: Vec<String>) -> Self {
        Corpus { source, vocabulary, tokens: Vec::new(), ends: Vec::new() }
    }

    /// Adds a document; one without words is none.
    fn push(&mut self, words: impl IntoIterator<Item = u32>) {
        let before = self.tokens.len();
        self.tokens.extend(words);
        if self.tokens.len() > before {
            self.ends.push(self.tokens.len());
        }
    }

    /// Checks that there is something to learn from, and not too much.
    fn check(self, path: &str) -> Result<Self, DataError> {
        let content = |reason| DataError::Content { path: path.into(), reason };
        if self.tokens.is_empty() {
            return Err(content("no words are left of it".into()));
        }
        if self.tokens.len() > MAX_TOKENS {
            return Err(content(format!(
                "it has {} tokens, of which {MAX_TOKENS} can be counted",
                self.tokens.len()
            )));
        }
        Ok(self)
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.ends.len()
    }

    /// Number of different words.
    pub fn words(&self) -> usize {
        self.vocabulary.len()
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// The words of a document.
    pub fn document(&self, number: usize) -> &[u32] {
        let start = number.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.tokens[start..self.ends[number]]
    }
}

impl fmt::Display for Corpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} tokens in {} documents, {} words",
            self.source,
            self.tokens(),
            self.documents(),
            self.words()
        )
    }
}

/// Where documents come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// All text files in a folder.
    Folder(PathBuf, TextOptions),
    /// A UCI bag of words, and its vocabulary if it is not beside it.
    BagOfWords(PathBuf, Option<PathBuf>),
    /// Made up around planted topics.
    Planted(Planted),
}

impl Source {
    /// Reads or makes the documents; `seed` matters to those that are made up.
    ///
    /// # Errors
    /// Files that cannot be read or understood; no words.
    pub fn load(&self, seed: u64) -> Result<Corpus, DataError> {
        match self {
            Source::Folder(path, options) => folder::read(path, options),
            Source::BagOfWords(path, vocabulary) => bow::read(path, vocabulary.as_deref()),
            Source::Planted(planted) => Ok(planted.corpus(seed)),
        }
    }
}

/// The words of a list: one in a line.
fn word_list(text: &str) -> BTreeSet<&str> {
    text.split_whitespace().collect()
}
