//! A folder of text: each file in it and below is a document.
//!
//! A token is a run of letters, cut where a name in a program is: `readRow`, `read_row` and `READ_ROW` are two tokens
//! each, `HTTPServer` is `http` and `server`. Tokens are lower case and 3 to 30 letters long. Words of the stop
//! list, words of too few documents and words of too many are left out; of the rest the most frequent are kept.
//!
//! A file that is not UTF-8, or has a zero byte, is no text and is left out; how many those were is said. Symbolic
//! links are not followed. The order of the files is that of their paths, so all processes see the same.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use clap::{Args, value_parser};

use super::{Corpus, word_list};
use crate::data::DataError;

/// Words that say nothing about a text in English.
const STOP_WORDS: &str = include_str!("stop-words.txt");

/// How text becomes tokens.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct TextOptions {
    /// Read only files with these extensions, as in rs,md [default: every file that is text]
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["docword", "generate"], value_name = "EXT")]
    pub extensions: Vec<String>,
    /// Leave out words that are in fewer documents than this
    #[arg(long, default_value_t = 5, value_name = "N", conflicts_with_all = ["docword", "generate"], value_parser = value_parser!(u32).range(1..))]
    pub min_documents: u32,
    /// Leave out words that are in a greater part of the documents than this
    #[arg(long, default_value_t = 0.2, value_name = "PART", conflicts_with_all = ["docword", "generate"])]
    pub max_share: f64,
    /// Keep at most this many words, the most frequent ones
    #[arg(long, default_value_t = 20_000, value_name = "N", conflicts_with_all = ["docword", "generate"], value_parser = value_parser!(u32).range(1..))]
    pub max_words: u32,
    /// Leave out the words in this file, instead of the built-in English ones
    #[arg(long, value_name = "FILE", conflicts_with_all = ["docword", "generate"])]
    pub stop_words: Option<PathBuf>,
}

/// Reads all text in the folder at `path`.
///
/// # Errors
/// It cannot be read; no words are left.
pub fn read(path: &Path, options: &TextOptions) -> Result<Corpus, DataError> {
    let stop_words = match &options.stop_words {
        Some(path) => fs::read_to_string(path).map_err(unreadable(path))?,
        None => STOP_WORDS.to_owned(),
    };
    let mut files = Vec::new();
    list(path, &mut files)?;
    if !options.extensions.is_empty() {
        let wanted = |path: &PathBuf| {
            path.extension().is_some_and(|own| options.extensions.iter().any(|wanted| own == wanted.as_str()))
        };
        files.retain(wanted);
    }
    let mut counted = Counted::default();
    let (mut read, mut skipped) = (0, 0);
    for file in files {
        let bytes = fs::read(&file).map_err(unreadable(&file))?;
        match std::str::from_utf8(&bytes) {
            Ok(text) if !bytes.contains(&0) => {
                counted.document(text);
                read += 1;
            }
            _ => skipped += 1,
        }
    }
    let source = format!("{} ({read} text files, {skipped} others left out)", path.display());
    counted.corpus(source, options, &stop_words).check(&path.display().to_string())
}

fn unreadable(path: &Path) -> impl FnOnce(std::io::Error) -> DataError {
    |reason| DataError::Read { path: path.display().to_string(), reason }
}

/// Puts the files in `folder` and below into `files`, in the order of their names.
fn list(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), DataError> {
    let entries = fs::read_dir(folder).and_then(|entries| entries.collect::<Result<Vec<_>, _>>());
    let mut entries = entries.map_err(unreadable(folder))?;
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        let path = entry.path();
        // The kind of the entry itself, not of what a link leads to.
        let kind = entry.file_type().map_err(unreadable(&path))?;
        if kind.is_dir() {
            list(&path, files)?;
        } else if kind.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

/// The documents as they were read, with every word.
#[derive(Debug, Default)]
struct Counted {
    numbers: HashMap<String, u32>,
    words: Vec<Word>,
    documents: Vec<Vec<u32>>,
}

#[derive(Debug)]
struct Word {
    tokens: u64,
    documents: u32,
    /// The last document that it was seen in, counted from 1.
    seen: usize,
}

impl Counted {
    fn document(&mut self, text: &str) {
        let mut document = Vec::new();
        let number = self.documents.len() + 1;
        tokens(text, |token| {
            let next = self.words.len() as u32;
            let word = match self.numbers.get(token) {
                Some(&word) => word,
                None => {
                    self.numbers.insert(token.to_owned(), next);
                    self.words.push(Word { tokens: 0, documents: 0, seen: 0 });
                    next
                }
            };
            let counts = &mut self.words[word as usize];
            counts.tokens += 1;
            counts.documents += u32::from(counts.seen != number);
            counts.seen = number;
            document.push(word);
        });
        self.documents.push(document);
    }

    /// The corpus of the words that the options let through, numbered in alphabetical order.
    fn corpus(self, source: String, options: &TextOptions, stop_words: &str) -> Corpus {
        let stop_words = word_list(stop_words);
        let most = (options.max_share * self.documents.len() as f64).floor() as u32;
        let mut kept: Vec<(&str, u32)> = self
            .numbers
            .iter()
            .filter(|(text, number)| {
                let documents = self.words[**number as usize].documents;
                (options.min_documents..=most).contains(&documents) && !stop_words.contains(text.as_str())
            })
            .map(|(text, &number)| (text.as_str(), number))
            .collect();
        kept.sort_unstable_by_key(|&(text, number)| {
            (std::cmp::Reverse(self.words[number as usize].tokens), text)
        });
        kept.truncate(options.max_words as usize);
        kept.sort_unstable();
        let mut new_number = vec![None; self.words.len()];
        for (new, &(_, number)) in (0..).zip(&kept) {
            new_number[number as usize] = Some(new);
        }
        let vocabulary = kept.iter().map(|(text, _)| (*text).to_owned()).collect();
        let mut corpus = Corpus::new(source, vocabulary);
        for document in &self.documents {
            corpus.push(document.iter().filter_map(|&word| new_number[word as usize]));
        }
        corpus
    }
}

/// Lengths of a token, in letters.
const LENGTHS: std::ops::RangeInclusive<usize> = 3..=30;

/// Calls `take` with each token of `text`.
fn tokens(text: &str, mut take: impl FnMut(&str)) {
    let mut token = String::new();
    let mut end = |token: &mut String| {
        if LENGTHS.contains(&token.chars().count()) {
            take(token);
        }
        token.clear();
    };
    let (mut before, mut letters) = (' ', text.chars().peekable());
    while let Some(letter) = letters.next() {
        if !letter.is_alphabetic() {
            end(&mut token);
        } else {
            let next_is_lower = letters.peek().is_some_and(|next| next.is_lowercase());
            if letter.is_uppercase() && (before.is_lowercase() || before.is_uppercase() && next_is_lower) {
                end(&mut token);
            }
            token.extend(letter.to_lowercase());
        }
        before = letter;
    }
    end(&mut token);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens_of(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        tokens(text, |token| found.push(token.to_owned()));
        found
    }

    fn options() -> TextOptions {
        TextOptions {
            extensions: Vec::new(),
            min_documents: 1,
            max_share: 1.0,
            max_words: 1000,
            stop_words: None,
        }
    }

    #[test]
    fn names_are_cut_where_a_reader_cuts_them() {
        for (text, expected) in [
            ("readRow read_row READ_ROW", vec!["read", "row", "read", "row", "read", "row"]),
            ("HTTPServer::newXML2", vec!["http", "server", "new", "xml"]),
            ("a bc def, Größe ÉCOLE", vec!["def", "größe", "école"]),
            ("", vec![]),
            ("x86_64 0b1010", vec![]),
        ] {
            assert_eq!(tokens_of(text), expected, "{text}");
        }
        assert_eq!(tokens_of(&"y".repeat(30)).len(), 1);
        assert_eq!(tokens_of(&"y".repeat(31)).len(), 0);
    }

    proptest! {
        #[test]
        fn tokens_of_every_text_are_lower_case_and_of_a_length(text in "\\PC*") {
            for token in tokens_of(&text) {
                prop_assert!(LENGTHS.contains(&token.chars().count()), "{token}");
                // Some letters, such as those of mathematics, have no other case.
                prop_assert!(token.chars().all(|letter| letter.to_lowercase().eq([letter])), "{token}");
            }
        }
    }

    #[test]
    fn the_options_choose_the_words() {
        let counted = || {
            let mut counted = Counted::default();
            for text in ["alpha the alpha gamma", "alpha beta gamma gamma the", "beta alpha", "delta alpha"] {
                counted.document(text);
            }
            counted
        };
        let with = |options: TextOptions| counted().corpus(String::new(), &options, "the and");
        let all = with(options());
        assert_eq!(all.vocabulary, ["alpha", "beta", "delta", "gamma"]);
        assert_eq!((all.documents(), all.document(1)), (4, &[0, 1, 3, 3][..]));
        assert_eq!(with(TextOptions { max_share: 0.75, ..options() }).vocabulary, ["beta", "delta", "gamma"]);
        let rare = with(TextOptions { min_documents: 2, max_share: 0.9, ..options() });
        assert_eq!(rare.vocabulary, ["beta", "gamma"]);
        // The last document has no words left.
        assert_eq!((rare.documents(), rare.tokens()), (3, 5));
        assert_eq!(with(TextOptions { max_words: 2, ..options() }).vocabulary, ["alpha", "gamma"]);
    }
}
