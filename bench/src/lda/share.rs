//! A worker's share of the documents, in the order in which it goes through them: word by word.
//!
//! ```text
//!  documents ──contiguous ranges with equal numbers of tokens──▶ workers (each owns its documents' topics)
//!  tokens of a worker ──ordered by word, cut──▶ one part for each clock of a pass
//!  tokens of a part and a word ──▶ a group: one fetch and one update of a row of the word-topic table
//! ```
//!
//! In this order a row is fetched once in a pass by each worker, not once for each document that has the word. The parts
//! are of equal numbers of tokens, and worker `i` of `n` begins its passes with part `i / n` of the way: so two workers
//! seldom change the same row in the same clock.

use std::ops::Range;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::corpus::Corpus;
use crate::job;

/// The tokens of one word within one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Group {
    /// The word.
    pub word: u32,
    /// How many tokens; they follow those of the group before.
    pub tokens: u32,
}

/// What a worker does in one clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The groups, by word; a word that two parts share is in both.
    pub groups: Vec<Group>,
    /// Where its tokens are among those of the share.
    pub tokens: Range<usize>,
}

/// The share of one worker. Tokens are ordered by word, and those of a word by document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The worker's number within the job.
    pub worker: usize,
    /// Number of tokens of each document.
    pub lengths: Vec<u32>,
    /// The document of each token, counted from the worker's first.
    pub documents: Vec<u32>,
    /// The topic of each token.
    pub topics: Vec<u16>,
    /// What it does in each clock of a pass.
    pub parts: Vec<Part>,
    /// The words whose rows this worker evaluates.
    pub words: Range<u32>,
}

impl Share {
    /// The share of `worker`, of `workers`, when a pass takes `clocks` clocks. Topics are dealt at random, the same
    /// for a document whosever it is.
    ///
    /// # Panics
    /// If `worker` is not below `workers`, or `clocks` or `topics` is 0.
    pub fn new(
        corpus: &Corpus,
        worker: usize,
        workers: usize,
        clocks: usize,
        topics: usize,
        seed: u64,
    ) -> Self {
        let sizes: Vec<u64> = (0..corpus.documents()).map(|d| corpus.document(d).len() as u64).collect();
        let own = job::ranges(&sizes, workers)[worker].clone();
        let lengths: Vec<u32> = sizes[own.clone()].iter().map(|&size| size as u32).collect();

        // Sorted by counting: the documents come in their order, so they are in order within each word.
        let mut places = vec![0usize; corpus.words() + 1];
        for document in own.clone() {
            corpus.document(document).iter().for_each(|&word| places[word as usize + 1] += 1);
        }
        for word in 0..corpus.words() {
            places[word + 1] += places[word];
        }
        let firsts = places.clone();
        let total = firsts[corpus.words()];
        let (mut documents, mut dealt) = (vec![0; total], vec![0; total]);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        for (number, document) in (0..).zip(own) {
            // Streams from 2^32 on are the documents'; those below are the workers'.
            rng.set_stream(1 << 32 | document as u64);
            rng.set_word_pos(0);
            for &word in corpus.document(document) {
                let place = &mut places[word as usize];
                documents[*place] = number;
                dealt[*place] = rng.random_range(0..topics as u32) as u16;
                *place += 1;
            }
        }
        let cut = |i: usize| total * i / clocks;
        let mut parts: Vec<Part> = (0..clocks).map(|i| part(&firsts, cut(i)..cut(i + 1))).collect();
        parts.rotate_left(worker * clocks / workers % clocks);
        let words = job::ranges(&vec![1; corpus.words()], workers)[worker].clone();
        Share {
            worker,
            lengths,
            documents,
            topics: dealt,
            parts,
            words: words.start as u32..words.end as u32,
        }
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.topics.len()
    }
}

/// The part with these tokens, when the tokens of a word begin at `firsts`.
fn part(firsts: &[usize], tokens: Range<usize>) -> Part {
    let mut groups = Vec::new();
    // The last word that begins at the part's first token or before.
    let mut word = firsts.partition_point(|&first| first <= tokens.start).saturating_sub(1);
    let mut at = tokens.start;
    while at < tokens.end {
        let end = firsts[word + 1].min(tokens.end);
        if end > at {
            groups.push(Group { word: word as u32, tokens: (end - at) as u32 });
        }
        at = end;
        word += 1;
    }
    Part { groups, tokens }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lda::corpus::Planted;

    #[test]
    fn every_token_is_in_exactly_one_part_of_one_worker() {
        let corpus = Planted { documents: 60, words: 90, tokens: 5000 }.corpus(2);
        let mut expected: Vec<u32> = (0..60).flat_map(|d| corpus.document(d).to_vec()).collect();
        expected.sort_unstable();
        for (workers, clocks) in [(1, 1), (2, 4), (7, 3), (80, 10)] {
            let (mut found, mut lengths) = (Vec::new(), Vec::new());
            let mut evaluated = 0;
            for worker in 0..workers {
                let share = Share::new(&corpus, worker, workers, clocks, 9, 1);
                assert_eq!(share.lengths.iter().sum::<u32>() as usize, share.tokens());
                assert!(share.topics.iter().all(|&topic| topic < 9));
                let mut counted = vec![0; share.lengths.len()];
                share.documents.iter().for_each(|&d| counted[d as usize] += 1);
                assert_eq!(counted, share.lengths);
                let mut tokens: Vec<_> = share.parts.iter().map(|part| part.tokens.clone()).collect();
                for part in &share.parts {
                    assert!(part.groups.is_sorted_by(|a, b| a.word < b.word));
                    let sum: u32 = part.groups.iter().map(|group| group.tokens).sum();
                    assert_eq!(sum as usize, part.tokens.len());
                    for group in &part.groups {
                        found.extend((0..group.tokens).map(|_| group.word));
                    }
                }
                tokens.sort_by_key(|range| range.start);
                assert_eq!((tokens[0].start, tokens[clocks - 1].end), (0, share.tokens()));
                assert!(tokens.windows(2).all(|pair| pair[0].end == pair[1].start));
                assert!(tokens.iter().all(|range| range.len().abs_diff(share.tokens() / clocks) <= 1));
                lengths.extend(share.lengths);
                evaluated += share.words.len();
            }
            found.sort_unstable();
            assert_eq!(found, expected, "{workers} workers");
            assert_eq!((lengths.len(), evaluated), (60, 90), "{workers} workers");
        }
    }

    #[test]
    fn the_topics_dealt_to_a_document_do_not_depend_on_its_worker() {
        let corpus = Planted { documents: 30, words: 50, tokens: 900 }.corpus(2);
        let dealt = |workers: usize| {
            let mut of_document = vec![Vec::new(); 30];
            let mut first = 0;
            for worker in 0..workers {
                let share = Share::new(&corpus, worker, workers, 2, 5, 4);
                for (&document, &topic) in share.documents.iter().zip(&share.topics) {
                    of_document[first + document as usize].push(topic);
                }
                first += share.lengths.len();
            }
            of_document
        };
        assert_eq!(dealt(1), dealt(3));
    }

    #[test]
    fn workers_begin_in_different_places() {
        let corpus = Planted { documents: 30, words: 50, tokens: 900 }.corpus(2);
        let first = |worker| Share::new(&corpus, worker, 3, 6, 5, 4).parts[0].groups[0].word;
        assert!(first(0) < first(1) && first(1) < first(2));
    }
}
