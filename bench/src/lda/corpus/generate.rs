//! Documents around planted topics, so that there is something to find.
//!
//! Each of [`PLANTED_TOPICS`] topics is a Dirichlet distribution over the words around Zipf's law, so sparse that the
//! topics share little but the most common words; each document mixes few topics (a Dirichlet distribution of
//! [`DOCUMENT_CONCENTRATION`]). All documents have the same length, give or take one token.

use std::str::FromStr;

use rand::{Rng, RngExt as _, SeedableRng as _, distr::Distribution as _};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Gamma, weighted::WeightedAliasIndex};

use super::{Corpus, MAX_TOKENS};

/// Number of planted topics.
pub const PLANTED_TOPICS: usize = 20;
/// Concentration of a document's topics.
pub const DOCUMENT_CONCENTRATION: f64 = 0.1;
/// Sum of the concentrations of a topic's words, in parts of the number of words.
const WORD_CONCENTRATION: f64 = 0.01;

/// The size of a corpus to generate: `DOCSxWORDS:TOKENS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planted {
    /// Number of documents.
    pub documents: u32,
    /// Number of words in the vocabulary.
    pub words: u32,
    /// Number of tokens.
    pub tokens: u32,
}

impl FromStr for Planted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once(':').and_then(|(size, tokens)| Some((size.split_once('x')?, tokens)));
        let Some(((documents, words), tokens)) = parts else {
            return Err("write DOCSxWORDS:TOKENS, as in 5000x10000:1000000".into());
        };
        let number = |name: &str, digits: &str| {
            digits.parse::<u32>().ok().filter(|&n| n > 0 && n as usize <= MAX_TOKENS).ok_or_else(|| {
                format!("{name} `{digits}` is not a number from 1 to {MAX_TOKENS}; write DOCSxWORDS:TOKENS")
            })
        };
        let (documents, words, tokens) =
            (number("DOCS", documents)?, number("WORDS", words)?, number("TOKENS", tokens)?);
        if tokens < documents {
            return Err(format!(
                "{tokens} tokens are too few for {documents} documents: each has at least one"
            ));
        }
        Ok(Planted { documents, words, tokens })
    }
}

impl Planted {
    /// The documents of this `seed`.
    pub fn corpus(&self, seed: u64) -> Corpus {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let topics: Vec<WeightedAliasIndex<f64>> =
            self.topics(&mut rng).into_iter().map(|weights| alias(weights.to_vec())).collect();
        let vocabulary = (0..self.words).map(|word| format!("w{word}")).collect();
        let source = format!("generated ({PLANTED_TOPICS} planted topics, seed {seed})");
        let mut corpus = Corpus::new(source, vocabulary);
        for document in 0..u64::from(self.documents) {
            let cut = |i: u64| u64::from(self.tokens) * i / u64::from(self.documents);
            let mix = alias(dirichlet(&mut rng, (0..PLANTED_TOPICS).map(|_| DOCUMENT_CONCENTRATION)));
            let words = (cut(document)..cut(document + 1))
                .map(|_| topics[mix.sample(&mut rng)].sample(&mut rng) as u32);
            corpus.push(words.collect::<Vec<_>>());
        }
        corpus
    }

    /// The weights of each planted topic's words.
    pub fn topics(&self, rng: &mut impl Rng) -> Vec<Vec<f64>> {
        let total: f64 = (1..=self.words).map(|rank| 1.0 / f64::from(rank)).sum();
        let concentration = WORD_CONCENTRATION * f64::from(self.words) / total;
        (0..PLANTED_TOPICS)
            .map(|_| dirichlet(rng, (1..=self.words).map(|rank| concentration / f64::from(rank))))
            .collect()
    }
}

fn alias(weights: Vec<f64>) -> WeightedAliasIndex<f64> {
    WeightedAliasIndex::new(weights).expect("weights are not negative, and one is above 0")
}

/// Weights drawn from a Dirichlet distribution.
fn dirichlet(rng: &mut impl Rng, concentrations: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut weights: Vec<f64> = concentrations
        .map(|concentration| Gamma::new(concentration, 1.0).expect("a concentration is above 0").sample(rng))
        .collect();
    let sum: f64 = weights.iter().sum();
    if sum > 0.0 {
        weights.iter_mut().for_each(|weight| *weight /= sum);
    } else {
        // All concentrations are so small that every weight is 0 in floating point: their limit is one word alone.
        let one = rng.random_range(0..weights.len());
        weights[one] = 1.0;
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_as_much_as_asked_for_and_it_depends_on_the_seed() {
        for text in ["50x200:5001", "1x1:1", "7x3:7", "3x1000:10"] {
            let planted: Planted = text.parse().unwrap();
            let corpus = planted.corpus(3);
            assert_eq!(corpus.documents(), planted.documents as usize, "{text}");
            assert_eq!(corpus.words(), planted.words as usize, "{text}");
            assert_eq!(corpus.tokens(), planted.tokens as usize, "{text}");
            assert_eq!(corpus, planted.corpus(3), "{text}");
        }
        let planted: Planted = "50x200:5000".parse().unwrap();
        assert_ne!(planted.corpus(1).tokens, planted.corpus(2).tokens);
    }

    #[test]
    fn a_document_has_few_topics_and_so_few_words() {
        let planted: Planted = "200x5000:40000".parse().unwrap();
        let corpus = planted.corpus(1);
        let mut different = 0;
        for document in 0..corpus.documents() {
            let mut words = corpus.document(document).to_vec();
            words.sort_unstable();
            words.dedup();
            different += words.len();
        }
        // Of 200 tokens drawn from Zipf's law over 5000 words, about 120 are different.
        let mean = different as f64 / 200.0;
        assert!((20.0..100.0).contains(&mean), "{mean} different words in a document of 200");
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused_with_the_cure() {
        for (text, message) in [
            ("2000x1000", "write DOCSxWORDS:TOKENS"),
            ("0x10:1", "DOCS `0`"),
            ("10xten:1", "WORDS `ten`"),
            ("10x10:9", "too few for 10 documents"),
            ("10x10:3000000000", "TOKENS `3000000000`"),
        ] {
            let error = text.parse::<Planted>().unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
    }
}
