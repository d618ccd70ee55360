//! Collapsed Gibbs sampling, exact, at a cost below one step per topic.
//!
//! The topic `k` of a token of word `w` in document `d` is drawn from (Griffiths & Steyvers, PNAS 2004), where no count
//! has the token itself:
//!
//! ```text
//!  p(k) ∝ (n_dk + α) φ_k         φ_k = (n_wk + β) / (n_k + Wβ)
//!       =  n_dk φ_k              over the topics that the document has: few
//!       +     α φ_k              the same for all documents
//! ```
//!
//! Tokens come word by word, so `φ` is computed once for a word (its row was fetched in as many steps) and a token
//! changes it in two places. The first term is summed over the document's topics; the second has its sums kept, of
//! all and of blocks of about `√K` topics, so that a draw from it looks at `2√K` numbers at most. A token
//! costs `O(K_d)` where it is drawn from the first term (most are), `O(K_d + √K)` otherwise: `K_d` is the number of
//! topics in the document.
//!
//! This is the decomposition of F+LDA (Yu, Hsieh, Yun, Vishwanathan & Dhillon, WWW 2015), with blocks in place of its
//! tree: they are cheaper to update, which each token does twice, than to draw from, which few do.
//! SparseLDA (Yao, Mimno & McCallum, KDD 2009) goes document by document, so it would need a row of the
//! word-topic table for each token. LightLDA (Yuan et al., WWW 2015) and WarpLDA (Chen et al., VLDB 2016) draw in
//! `O(1)` from proposals that are then accepted or not: a pass of theirs moves less than one of an exact sampler, and a
//! proposal costs a division and reads of counts that are not in the cache. Beside them, in one thread and to the same
//! log-likelihood (1 million generated tokens; `cargo run --release -p fervor-bench --example lda_samplers -- K`), this
//! sampler takes less than half of the processor time of either at 100 topics; at 1000 it is level with WarpLDA, which
//! needs all tokens of a document and of a word in turns and so does not go with parts of the words in each clock.
//!
//! Measured over 10 passes of 1 million generated tokens in one plain thread, from 50 to 1600 topics: 32 times the topics
//! cost 4.6 times the seconds (`fervor-bench lda --generate 5000x10000:1000000 --no-server --clients 1 --epochs 10 --topics K`).

use std::ops::Range;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::share::{Part, Share};

/// What is assumed before any token is seen, and the sizes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prior {
    /// Number of topics.
    pub topics: usize,
    /// Number of words in the vocabulary.
    pub words: usize,
    /// Concentration of a document's topics.
    pub alpha: f64,
    /// Concentration of a topic's words.
    pub beta: f64,
}

/// How often a document has a topic.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TopicCount {
    /// The topic.
    pub topic: u32,
    /// At least 1.
    pub count: u32,
}

/// The topics of each of a worker's documents: those that it has, the frequent ones rather first.
#[derive(Debug, Clone)]
pub struct DocumentTopics {
    /// Where each document's counts begin.
    starts: Vec<usize>,
    lengths: Vec<u32>,
    counts: Vec<TopicCount>,
}

impl DocumentTopics {
    /// Counts of the topics that `share` begins with.
    pub fn new(share: &Share, topics: usize) -> Self {
        let mut starts = Vec::with_capacity(share.lengths.len());
        let mut end = 0;
        for &length in &share.lengths {
            starts.push(end);
            end += topics.min(length as usize);
        }
        let lengths = vec![0; starts.len()];
        let mut documents = DocumentTopics { starts, lengths, counts: vec![TopicCount::default(); end] };
        for (&document, &topic) in share.documents.iter().zip(&share.topics) {
            documents.add(document as usize, topic.into());
        }
        documents
    }

    /// What a document has.
    #[inline(always)]
    pub fn of(&self, document: usize) -> &[TopicCount] {
        let start = self.starts[document];
        &self.counts[start..start + self.lengths[document] as usize]
    }

    /// Number of documents.
    pub fn len(&self) -> usize {
        self.lengths.len()
    }

    /// Whether there is no document.
    pub fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    #[inline(always)]
    fn add(&mut self, document: usize, topic: u32) {
        let (start, length) = (self.starts[document], self.lengths[document] as usize);
        match self.of(document).iter().position(|own| own.topic == topic) {
            Some(place) => self.increment(document, place),
            None => {
                self.counts[start + length] = TopicCount { topic, count: 1 };
                self.lengths[document] += 1;
            }
        }
    }

    /// Adds one to the count at `place`, and lets it pass a smaller one.
    #[inline(always)]
    fn increment(&mut self, document: usize, place: usize) {
        let start = self.starts[document];
        let own = &mut self.counts[start..=start + place];
        own[place].count += 1;
        if place > 0 && own[place - 1].count < own[place].count {
            own.swap(place - 1, place);
        }
    }

    #[inline(always)]
    fn remove(&mut self, document: usize, topic: u32) {
        let (start, length) = (self.starts[document], self.lengths[document] as usize);
        let own = &mut self.counts[start..start + length];
        let place = own.iter().position(|own| own.topic == topic).expect("a token's topic is counted");
        own[place].count -= 1;
        if own[place].count == 0 {
            own[place] = own[length - 1];
            self.lengths[document] -= 1;
        }
    }
}

/// Changes of counts, gathered one by one.
#[derive(Debug, Clone)]
pub struct Changes {
    /// Per topic.
    sums: Vec<i32>,
    /// Topics whose sum was changed from 0; some more than once.
    touched: Vec<u32>,
    pairs: Vec<(u32, i32)>,
}

impl Changes {
    fn new(topics: usize) -> Self {
        Changes { sums: vec![0; topics], touched: Vec::new(), pairs: Vec::new() }
    }

    #[inline(always)]
    fn add(&mut self, topic: usize, change: i32) {
        if self.sums[topic] == 0 {
            self.touched.push(topic as u32);
        }
        self.sums[topic] += change;
    }

    /// The topics whose count has changed, and by how much; there are no changes then.
    pub fn take(&mut self) -> &[(u32, i32)] {
        self.pairs.clear();
        for topic in self.touched.drain(..) {
            let change = std::mem::take(&mut self.sums[topic as usize]);
            if change != 0 {
                self.pairs.push((topic, change));
            }
        }
        &self.pairs
    }
}

/// One worker's tokens with their topics, and what is needed to draw new ones.
#[derive(Debug, Clone)]
pub struct Sampler {
    prior: Prior,
    share: Share,
    documents: DocumentTopics,
    topics: Topics,
    rng: ChaCha8Rng,
    /// Sums over the document's topics, as far as they have been added up.
    sums: Vec<f32>,
    /// Changes of the row of the word in hand.
    row: Changes,
    /// Changes of the topic totals in this part.
    totals: Changes,
}

impl Sampler {
    /// With the topics that `share` begins with.
    pub fn new(prior: Prior, share: Share, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(share.worker as u64 + 1);
        Sampler {
            documents: DocumentTopics::new(&share, prior.topics),
            topics: Topics::new(prior),
            rng,
            sums: vec![0.0; prior.topics],
            row: Changes::new(prior.topics),
            totals: Changes::new(prior.topics),
            prior,
            share,
        }
    }

    /// What it assumes.
    pub fn prior(&self) -> &Prior {
        &self.prior
    }

    /// The tokens with their present topics.
    pub fn share(&self) -> &Share {
        &self.share
    }

    /// The documents' topics.
    pub fn documents(&self) -> &DocumentTopics {
        &self.documents
    }

    /// Calls `add` for each group of the share with its word and the counts of its tokens' topics.
    ///
    /// # Errors
    /// What `add` says.
    pub fn initial<E>(&mut self, mut add: impl FnMut(u32, &[(u32, i32)]) -> Result<(), E>) -> Result<(), E> {
        for part in &self.share.parts {
            let mut first = part.tokens.start;
            for group in &part.groups {
                let end = first + group.tokens as usize;
                for &topic in &self.share.topics[first..end] {
                    self.row.add(topic.into(), 1);
                    self.totals.add(topic.into(), 1);
                }
                first = end;
                add(group.word, self.row.take())?;
            }
        }
        Ok(())
    }

    /// Begins a part: `totals` are the topic totals as they are seen now.
    pub fn begin(&mut self, totals: &[i32]) {
        self.topics.begin(totals);
    }

    /// Draws new topics for `tokens`, all of one word, whose row (as it is seen now) is `row`. The changes of the row,
    /// for the table; they are in `row` already.
    pub fn word(&mut self, row: &mut [i32], tokens: Range<usize>) -> &[(u32, i32)] {
        let smoothing = self.prior.alpha as f32;
        let (documents, sums) = (&mut self.documents, &mut self.sums[..]);
        let mut word = self.topics.word(row);
        for (&document, topic) in
            self.share.documents[tokens.clone()].iter().zip(&mut self.share.topics[tokens])
        {
            let (document, old) = (document as usize, u32::from(*topic));
            word.change(old as usize, -1);
            // The document still counts the token: that is left out here, and mended only if it gets another topic.
            let own = documents.of(document);
            let mut sum = 0.0;
            for (own, sums) in own.iter().zip(&mut *sums) {
                let count = own.count - u32::from(own.topic == old);
                sum += count as f32 * word.phi[own.topic as usize];
                *sums = sum;
            }
            let drawn = uniform(&mut self.rng) * (sum + smoothing * word.all as f32);
            let new = if drawn < sum {
                let place = sums[..own.len()].iter().position(|&sum| drawn < sum);
                let place = place.expect("the last sum is above what was drawn");
                let new = own[place].topic;
                if new != old {
                    documents.increment(document, place);
                    documents.remove(document, old);
                }
                new
            } else {
                let new = word.draw((drawn - sum) / smoothing);
                if new != old {
                    documents.remove(document, old);
                    documents.add(document, new);
                }
                new
            };
            word.change(new as usize, 1);
            if new != old {
                *topic = new as u16;
                for (topic, change) in [(old, -1), (new, 1)] {
                    self.row.add(topic as usize, change);
                    self.totals.add(topic as usize, change);
                }
            }
        }
        self.row.take()
    }

    /// The changes of the topic totals since this was last asked (or the counts that [`initial`](Self::initial) gave).
    pub fn totals(&mut self) -> &[(u32, i32)] {
        self.totals.take()
    }

    /// A part of the share.
    pub fn part(&self, clock: usize) -> &Part {
        &self.share.parts[clock]
    }
}

/// A number from 0 to below 1.
#[inline(always)]
fn uniform(rng: &mut ChaCha8Rng) -> f32 {
    // As many bits as an `f32` has.
    (rng.next_u32() >> 8) as f32 * (1.0 / (1 << 24) as f32)
}

/// The part of the distribution that is the same for all documents, between words.
#[derive(Debug, Clone)]
struct Topics {
    beta: f32,
    /// `Wβ`.
    all_beta: f32,
    /// A block has `1 << block` topics.
    block: u32,
    /// `n_k`.
    totals: Vec<i32>,
    /// `1 / (n_k + Wβ)`.
    inverse: Vec<f32>,
    /// Room for [`Word::phi`].
    phi: Vec<f32>,
    /// Room for [`Word::blocks`].
    blocks: Vec<f64>,
}

impl Topics {
    fn new(prior: Prior) -> Self {
        let block = (prior.topics as f64).sqrt().log2().ceil() as u32;
        Topics {
            beta: prior.beta as f32,
            all_beta: (prior.beta * prior.words as f64) as f32,
            block,
            totals: vec![0; prior.topics],
            inverse: vec![0.0; prior.topics],
            phi: vec![0.0; prior.topics],
            blocks: vec![0.0; prior.topics.div_ceil(1 << block)],
        }
    }

    fn begin(&mut self, totals: &[i32]) {
        self.totals.copy_from_slice(totals);
        for (inverse, &total) in self.inverse.iter_mut().zip(totals) {
            *inverse = 1.0 / (total as f32 + self.all_beta);
        }
    }

    /// The word with this row.
    fn word<'a>(&'a mut self, row: &'a mut [i32]) -> Word<'a> {
        for ((phi, inverse), &count) in self.phi.iter_mut().zip(&self.inverse).zip(&*row) {
            *phi = (count as f32 + self.beta) * inverse;
        }
        for (sum, phi) in self.blocks.iter_mut().zip(self.phi.chunks(1 << self.block)) {
            *sum = f64::from(sum_of(phi));
        }
        Word {
            beta: self.beta,
            all_beta: self.all_beta,
            block: self.block,
            row,
            totals: &mut self.totals,
            inverse: &mut self.inverse,
            all: self.blocks.iter().sum(),
            phi: &mut self.phi,
            blocks: &mut self.blocks,
        }
    }
}

/// The same for the word in hand.
struct Word<'a> {
    beta: f32,
    all_beta: f32,
    block: u32,
    /// `n_wk`.
    row: &'a mut [i32],
    totals: &'a mut [i32],
    inverse: &'a mut [f32],
    /// `φ_k`.
    phi: &'a mut [f32],
    /// The sum of each block; in `f64`, so that what is added and taken away again leaves nothing.
    blocks: &'a mut [f64],
    /// The sum of all.
    all: f64,
}

impl Word<'_> {
    /// Changes the counts of `topic` by one.
    #[inline(always)]
    fn change(&mut self, topic: usize, change: i32) {
        self.row[topic] += change;
        self.totals[topic] += change;
        let inverse = 1.0 / (self.totals[topic] as f32 + self.all_beta);
        let phi = (self.row[topic] as f32 + self.beta) * inverse;
        let more = f64::from(phi) - f64::from(self.phi[topic]);
        self.inverse[topic] = inverse;
        self.phi[topic] = phi;
        self.blocks[topic >> self.block] += more;
        self.all += more;
    }

    /// The topic at which the sum of `φ` exceeds `drawn`.
    fn draw(&self, drawn: f32) -> u32 {
        let mut left = f64::from(drawn);
        let last = self.blocks.len() - 1;
        let mut block = 0;
        // Rounding may leave a bit after the last one, which is its own then.
        while block < last && left >= self.blocks[block] {
            left -= self.blocks[block];
            block += 1;
        }
        let first = block << self.block;
        let own = &self.phi[first..self.phi.len().min(first + (1 << self.block))];
        let mut topic = 0;
        while topic + 1 < own.len() && left >= f64::from(own[topic]) {
            left -= f64::from(own[topic]);
            topic += 1;
        }
        (first + topic) as u32
    }
}

/// The sum, in an order that vectors take.
fn sum_of(values: &[f32]) -> f32 {
    let (fours, rest) = values.as_chunks::<4>();
    let sums = fours.iter().fold([0.0; 4], |sums: [f32; 4], four| std::array::from_fn(|i| sums[i] + four[i]));
    sums.iter().chain(rest).sum()
}

#[cfg(test)]
mod tests;
