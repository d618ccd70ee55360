//! Why `fervor-bench lda` draws topics as it does: the exact sampler beside LightLDA (Yuan et al., WWW 2015) and WarpLDA
//! (Chen et al., VLDB 2016), each in one thread, on generated documents, from the same first topics.
//!
//! ```text
//! cargo run --release -p fervor-bench --example lda_samplers -- [TOPICS] [SECONDS]
//! ```
//!
//! prints the log-likelihood over the processor seconds of each (100 topics, 10 seconds). The two others are as their papers have
//! them, with a faster generator of random numbers than ours, dense counts of each document's topics for LightLDA, and
//! tokens in the order that each likes best.

use std::time::Duration;

use fervor_bench::lda::{
    corpus::{Source, generate::Planted},
    likelihood::Likelihood,
    sampler::{DocumentTopics, Prior, Sampler},
    share::{Group, Share},
};

const DOCUMENTS: Planted = Planted { documents: 5000, words: 10_000, tokens: 1_000_000 };

/// What all begin with.
struct Job {
    prior: Prior,
    share: Share,
    /// Where each document's tokens begin in `places`, which says where they are in the share.
    starts: Vec<usize>,
    places: Vec<u32>,
    alpha: f32,
    beta: f32,
    all_beta: f32,
}

impl Job {
    fn new(topics: usize) -> Self {
        let corpus = Source::Planted(DOCUMENTS).load(1).expect("it is made up");
        let prior = Prior { topics, words: corpus.words(), alpha: 0.1, beta: 0.01 };
        let share = Share::new(&corpus, 0, 1, 1, topics, 1);
        let mut starts = vec![0];
        starts.extend(share.lengths.iter().scan(0, |end, length| {
            *end += *length as usize;
            Some(*end)
        }));
        let (mut next, mut places) = (starts.clone(), vec![0; share.tokens()]);
        for (token, &document) in share.documents.iter().enumerate() {
            places[next[document as usize]] = token as u32;
            next[document as usize] += 1;
        }
        let all_beta = (prior.beta * prior.words as f64) as f32;
        Job { share, starts, places, alpha: prior.alpha as f32, beta: prior.beta as f32, all_beta, prior }
    }

    /// Each word with its tokens.
    fn words(&self) -> Vec<(usize, std::ops::Range<usize>)> {
        let mut end = 0;
        let next = |group: &Group| {
            let first = end;
            end += group.tokens as usize;
            (group.word as usize, first..end)
        };
        self.share.parts[0].groups.iter().map(next).collect()
    }

    fn log_likelihood(&self, topics: &[u16]) -> f64 {
        let likelihood = Likelihood::new(self.prior);
        let share = Share { topics: topics.to_vec(), ..self.share.clone() };
        let mut sum = likelihood.documents(&DocumentTopics::new(&share, self.prior.topics));
        for (_, tokens) in self.words() {
            sum += likelihood.row(&self.count(&topics[tokens]));
        }
        sum + likelihood.totals(&self.count(topics))
    }

    fn count(&self, topics: &[u16]) -> Vec<i32> {
        let mut counts = vec![0; self.prior.topics];
        topics.iter().for_each(|&topic| counts[usize::from(topic)] += 1);
        counts
    }

    /// Makes passes for so long, and shows what they come to.
    fn race(&self, name: &str, limit: Duration, mut pass: impl FnMut() -> Vec<u16>) {
        let (mut spent, mut passes) = (Duration::ZERO, 0u32);
        while spent < limit {
            let before = processor_time();
            let topics = pass();
            spent += processor_time() - before;
            passes += 1;
            // Tell of about four passes in each doubling.
            if passes.is_multiple_of(1 << passes.ilog2().saturating_sub(2)) || spent >= limit {
                let log_likelihood = self.log_likelihood(&topics);
                println!(
                    "{name:<10} {passes:>5} passes {:>7.2} s {log_likelihood:>14.0}",
                    spent.as_secs_f64()
                );
            }
        }
    }

    fn exact(&self, limit: Duration) {
        let mut sampler = Sampler::new(self.prior, self.share.clone(), 1);
        let mut rows: Vec<Vec<i32>> = vec![Vec::new(); self.prior.words];
        let words = self.words();
        for (word, tokens) in &words {
            rows[*word] = self.count(&self.share.topics[tokens.clone()]);
        }
        let mut totals = self.count(&self.share.topics);
        self.race("exact", limit, || {
            sampler.begin(&totals);
            for (word, tokens) in &words {
                sampler.word(&mut rows[*word], tokens.clone());
            }
            sampler.totals().iter().for_each(|&(topic, change)| totals[topic as usize] += change);
            sampler.share().topics.clone()
        });
    }

    /// Word by word; for each token `steps` proposals from the word and as many from the document.
    fn light(&self, steps: usize, limit: Duration) {
        let k = self.prior.topics;
        let (words, mut random) = (self.words(), Random(1));
        let mut topics = self.share.topics.clone();
        let mut rows: Vec<Vec<i32>> = vec![Vec::new(); self.prior.words];
        words.iter().for_each(|(word, tokens)| rows[*word] = self.count(&topics[tokens.clone()]));
        let mut totals = self.count(&topics);
        let mut documents = vec![0u16; self.share.lengths.len() * k];
        for (&document, &topic) in self.share.documents.iter().zip(&topics) {
            documents[document as usize * k + usize::from(topic)] += 1;
        }
        let mut weights = vec![0.0; k];
        let mut alias = Alias::default();
        self.race(&format!("light {steps}"), limit, || {
            for (word, tokens) in &words {
                let row = &mut rows[*word];
                for (topic, weight) in weights.iter_mut().enumerate() {
                    *weight = (row[topic] as f32 + self.beta) / (totals[topic] as f32 + self.all_beta);
                }
                alias.build(&weights);
                for token in tokens.clone() {
                    let (document, old) = (self.share.documents[token] as usize, usize::from(topics[token]));
                    let own = &mut documents[document * k..(document + 1) * k];
                    let places = &self.places[self.starts[document]..self.starts[document + 1]];
                    let length = places.len() as f32;
                    (own[old], row[old], totals[old]) = (own[old] - 1, row[old] - 1, totals[old] - 1);
                    let density = |topic: usize| {
                        (f32::from(own[topic]) + self.alpha) * (row[topic] as f32 + self.beta)
                            / (totals[topic] as f32 + self.all_beta)
                    };
                    let of_document =
                        |topic: usize| f32::from(own[topic]) + f32::from(u8::from(topic == old)) + self.alpha;
                    let (mut now, mut dense) = (old, density(old));
                    for _ in 0..steps {
                        let new = alias.draw(&mut random);
                        let other = density(new);
                        if random.uniform() * dense * weights[new] < other * weights[now] {
                            (now, dense) = (new, other);
                        }
                        let drawn = random.uniform() * (length + self.alpha * k as f32);
                        let new = match drawn < length {
                            true => usize::from(topics[places[drawn as usize] as usize]),
                            false => random.below(k),
                        };
                        let other = density(new);
                        if random.uniform() * dense * of_document(new) < other * of_document(now) {
                            (now, dense) = (new, other);
                        }
                    }
                    (own[now], row[now], totals[now]) = (own[now] + 1, row[now] + 1, totals[now] + 1);
                    topics[token] = now as u16;
                }
            }
            topics.clone()
        });
    }

    /// First the words, then the documents; each accepts the `steps` proposals of the other and makes new ones.
    fn warp(&self, steps: usize, limit: Duration) {
        let k = self.prior.topics;
        let mut random = Random(1);
        let mut topics = self.share.topics.clone();
        let mut proposals: Vec<u16> = topics.iter().flat_map(|&topic| vec![topic; steps]).collect();
        let words: Vec<Vec<u32>> =
            self.words().into_iter().map(|(_, tokens)| tokens.map(|token| token as u32).collect()).collect();
        let documents: Vec<&[u32]> =
            self.starts.windows(2).map(|ends| &self.places[ends[0]..ends[1]]).collect();
        let words: Vec<&[u32]> = words.iter().map(Vec::as_slice).collect();
        let mut counts = vec![0i32; k];
        self.race(&format!("warp {steps}"), limit, || {
            for (lists, prior) in [(&words, self.beta), (&documents, self.alpha)] {
                let totals = self.count(&topics);
                for list in lists {
                    list.iter().for_each(|&token| counts[usize::from(topics[token as usize])] += 1);
                    let before: Vec<u16> = list.iter().map(|&token| topics[token as usize]).collect();
                    for &token in *list {
                        let token = token as usize;
                        for &new in &proposals[token * steps..(token + 1) * steps] {
                            let (now, new) = (usize::from(topics[token]), usize::from(new));
                            let ratio = (counts[new] as f32 + prior) * (totals[now] as f32 + self.all_beta)
                                / ((counts[now] as f32 + prior) * (totals[new] as f32 + self.all_beta));
                            if random.uniform() < ratio {
                                topics[token] = new as u16;
                            }
                        }
                    }
                    before.iter().for_each(|&topic| counts[usize::from(topic)] = 0);
                    let length = list.len() as f32;
                    for &token in *list {
                        let token = token as usize;
                        for proposal in &mut proposals[token * steps..(token + 1) * steps] {
                            let drawn = random.uniform() * (length + prior * k as f32);
                            *proposal = match drawn < length {
                                true => topics[list[drawn as usize] as usize],
                                false => random.below(k) as u16,
                            };
                        }
                    }
                }
            }
            topics.clone()
        });
    }
}

/// Walker's method: draws in two looks.
#[derive(Default)]
struct Alias {
    own: Vec<f32>,
    other: Vec<u32>,
    small: Vec<u32>,
    large: Vec<u32>,
}

impl Alias {
    fn build(&mut self, weights: &[f32]) {
        let scale = weights.len() as f32 / weights.iter().sum::<f32>();
        self.own.clear();
        self.own.extend(weights.iter().map(|weight| weight * scale));
        self.other.clear();
        self.other.extend(0..weights.len() as u32);
        self.small.clear();
        self.large.clear();
        for (place, own) in self.own.iter().enumerate() {
            if *own < 1.0 { self.small.push(place as u32) } else { self.large.push(place as u32) }
        }
        while let (Some(&small), Some(&large)) = (self.small.last(), self.large.last()) {
            self.small.pop();
            self.other[small as usize] = large;
            self.own[large as usize] += self.own[small as usize] - 1.0;
            if self.own[large as usize] < 1.0 {
                self.large.pop();
                self.small.push(large);
            }
        }
    }

    #[inline(always)]
    fn draw(&self, random: &mut Random) -> usize {
        let place = random.below(self.own.len());
        if random.uniform() < self.own[place] { place } else { self.other[place] as usize }
    }
}

/// Xorshift.
struct Random(u64);

impl Random {
    #[inline(always)]
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    #[inline(always)]
    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 * (1.0 / (1 << 24) as f32)
    }

    #[inline(always)]
    fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }
}

/// What this thread has had of a processor: other programs do not count.
fn processor_time() -> Duration {
    let statistics = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux tells");
    let nanos = statistics.split(' ').next().and_then(|text| text.parse().ok());
    Duration::from_nanos(nanos.expect("it begins with nanoseconds"))
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |what: &str, default: u16| {
        arguments.next().map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{what}: `{text}`")))
    };
    let (topics, seconds) = (number("TOPICS", 100), number("SECONDS", 10));
    let (job, limit) = (Job::new(topics.into()), Duration::from_secs(seconds.into()));
    job.exact(limit);
    [1, 2].into_iter().for_each(|steps| job.light(steps, limit));
    [1, 2, 4].into_iter().for_each(|steps| job.warp(steps, limit));
}
