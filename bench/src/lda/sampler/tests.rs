//! The sampler against the formula, against all states of a tiny corpus, and against planted topics.

use rand::RngExt as _;

use super::*;
use crate::{
    data::DataError,
    lda::{
        corpus::{Corpus, Planted, bow},
        counts::Counts as _,
        likelihood::Likelihood,
        plain::Matrix,
    },
};

/// What one draw of a token's topic is from, as the formula says.
fn conditional(prior: &Prior, row: &[i32], totals: &[i32], document: &[i32]) -> Vec<f64> {
    let all = prior.beta * prior.words as f64;
    let weights: Vec<f64> = (0..prior.topics)
        .map(|k| {
            (f64::from(document[k]) + prior.alpha) * (f64::from(row[k]) + prior.beta)
                / (f64::from(totals[k]) + all)
        })
        .collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

#[test]
fn a_topic_is_drawn_from_the_exact_conditional() {
    const DRAWS: usize = 200_000;
    for (topics, alpha) in [(1, 0.5), (2, 0.1), (17, 0.05), (100, 0.1), (100, 3.0), (300, 0.01)] {
        let prior = Prior { topics, words: 50, alpha, beta: 0.1 };
        let mut rng = ChaCha8Rng::seed_from_u64(topics as u64);
        // One document; the last token, of word 49, is drawn again and again, the others stay.
        let share = Share {
            worker: 0,
            lengths: vec![31],
            documents: vec![0; 31],
            topics: (0..31).map(|_| rng.random_range(0..topics as u32) as u16).collect(),
            parts: Vec::new(),
            words: 0..50,
        };
        let mut document = vec![0; topics];
        share.topics[..30].iter().for_each(|&topic| document[usize::from(topic)] += 1);
        let others: Vec<i32> = (0..topics).map(|_| rng.random_range(0..4) * rng.random_range(0..9)).collect();
        let rest: Vec<i32> = others.iter().map(|&own| own + rng.random_range(0..500)).collect();
        let expected = conditional(&prior, &others, &rest, &document);

        let (mut row, mut totals) = (others.clone(), rest.clone());
        row[usize::from(share.topics[30])] += 1;
        totals[usize::from(share.topics[30])] += 1;
        let mut sampler = Sampler::new(prior, share, 7);
        sampler.begin(&totals);
        let mut found = vec![0u32; topics];
        for _ in 0..DRAWS {
            sampler.word(&mut row, 30..31);
            found[usize::from(sampler.share.topics[30])] += 1;
        }
        // Topics that are hardly ever drawn count together.
        let (mut statistic, mut freedom) = (0.0, 0.0);
        let (mut rare, mut rarely) = (0.0, 0.0);
        for (&found, expected) in found.iter().zip(&expected) {
            let expected = expected * DRAWS as f64;
            if expected < 10.0 {
                (rare, rarely) = (rare + expected, rarely + f64::from(found));
            } else {
                statistic += (f64::from(found) - expected).powi(2) / expected;
                freedom += 1.0;
            }
        }
        if rare > 0.0 {
            statistic += (rarely - rare).powi(2) / rare;
            freedom += 1.0;
        }
        // Four standard deviations above the mean of the chi-square distribution, which has a long tail.
        let most = (freedom - 1.0) + 4.0 * (2.0 * f64::max(freedom - 1.0, 0.0)).sqrt() + 1e-9;
        assert!(statistic <= most, "{topics} topics, alpha {alpha}: {statistic}, more than {most}");
    }
}

fn tiny() -> Result<Corpus, DataError> {
    bow::read_from("2\n3\n4\n1 1 1\n1 2 2\n2 2 1\n2 3 1\n", &["a", "b", "c"])
}

/// All assignments of two topics to five tokens, as often as the likelihood says: so the sampler, its order and the
/// likelihood agree.
#[test]
fn passes_visit_every_state_as_often_as_it_is_likely() {
    const PASSES: usize = 300_000;
    let corpus = tiny().unwrap();
    let prior = Prior { topics: 2, words: 3, alpha: 0.7, beta: 0.4 };
    let share = Share::new(&corpus, 0, 1, 2, 2, 1);
    let likelihood = Likelihood::new(prior);
    let words: Vec<u32> = share
        .parts
        .iter()
        .flat_map(|part| &part.groups)
        .flat_map(|group| (0..group.tokens).map(|_| group.word))
        .collect();
    let weight = |state: u32| {
        let topics: Vec<u16> = (0..5).map(|token| (state >> token & 1) as u16).collect();
        let (mut rows, mut totals) = (vec![vec![0; 2]; 3], vec![0; 2]);
        for (&word, &topic) in words.iter().zip(&topics) {
            rows[word as usize][usize::from(topic)] += 1;
            totals[usize::from(topic)] += 1;
        }
        let documents = DocumentTopics::new(&Share { topics, ..share.clone() }, 2);
        let rows: f64 = rows.iter().map(|row| likelihood.row(row)).sum();
        (rows + likelihood.totals(&totals) + likelihood.documents(&documents)).exp()
    };
    let weights: Vec<f64> = (0..32).map(weight).collect();
    let sum: f64 = weights.iter().sum();

    let matrix = Matrix::new(&prior, 1);
    let mut sampler = Sampler::new(prior, share.clone(), 5);
    (&matrix).start(&mut sampler).unwrap();
    let mut visits = [0u32; 32];
    for _ in 0..PASSES {
        (0..2).for_each(|part| (&matrix).sample(&mut sampler, part).unwrap());
        let state: u32 = (0..5).map(|token| u32::from(sampler.share.topics[token]) << token).sum();
        visits[state as usize] += 1;
    }
    for (state, (&visits, weight)) in visits.iter().zip(&weights).enumerate() {
        let (found, expected) = (f64::from(visits) / PASSES as f64, weight / sum);
        assert!((found - expected).abs() < 0.004, "state {state:05b}: {found}, not {expected}");
    }
}

#[test]
fn counts_are_those_of_the_tokens_after_any_number_of_passes() {
    let corpus = Planted { documents: 40, words: 30, tokens: 3000 }.corpus(2);
    let prior = Prior { topics: 23, words: 30, alpha: 0.1, beta: 0.1 };
    let matrix = Matrix::new(&prior, 1);
    let mut sampler = Sampler::new(prior, Share::new(&corpus, 0, 1, 3, 23, 1), 1);
    (&matrix).start(&mut sampler).unwrap();
    for _ in 0..5 {
        (0..3).for_each(|part| (&matrix).sample(&mut sampler, part).unwrap());
        let (mut rows, mut totals) = (vec![vec![0; 23]; 30], vec![0; 23]);
        let mut documents = vec![vec![0; 23]; 40];
        for part in &sampler.share.parts {
            let words = part.groups.iter().flat_map(|g| (0..g.tokens).map(|_| g.word as usize));
            for (at, word) in part.tokens.clone().zip(words) {
                let topic = usize::from(sampler.share.topics[at]);
                rows[word][topic] += 1;
                totals[topic] += 1;
                documents[sampler.share.documents[at] as usize][topic] += 1;
            }
        }
        (&matrix).rows(0..30, &mut |word, row| assert_eq!(row, rows[word as usize])).unwrap();
        assert_eq!((&matrix).totals().unwrap(), totals);
        for (number, expected) in documents.iter().enumerate() {
            let mut found = vec![0; 23];
            for own in sampler.documents.of(number) {
                assert!(own.count > 0 && found[own.topic as usize] == 0);
                found[own.topic as usize] = own.count;
            }
            assert_eq!(found, *expected, "document {number}");
        }
    }
}

#[test]
fn planted_topics_are_found() {
    let planted = Planted { documents: 300, words: 400, tokens: 60_000 };
    let corpus = planted.corpus(1);
    let topics = planted.topics(&mut ChaCha8Rng::seed_from_u64(1));
    let prior = Prior { topics: topics.len(), words: 400, alpha: 0.1, beta: 0.01 };
    let matrix = Matrix::new(&prior, 1);
    let mut sampler = Sampler::new(prior, Share::new(&corpus, 0, 1, 1, prior.topics, 1), 1);
    (&matrix).start(&mut sampler).unwrap();
    (0..150).for_each(|_| (&matrix).sample(&mut sampler, 0).unwrap());
    let totals = (&matrix).totals().unwrap();
    let mut learned = vec![vec![0.0; 400]; prior.topics];
    (&matrix)
        .rows(0..400, &mut |word, row| {
            for (topic, &count) in row.iter().enumerate() {
                learned[topic][word as usize] = f64::from(count) / f64::from(totals[topic].max(1));
            }
        })
        .unwrap();
    let apart = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / 2.0;
    let found =
        topics.iter().filter(|planted| learned.iter().any(|learned| apart(planted, learned) < 0.15)).count();
    assert!(found >= 18, "{found} of {} planted topics were found", topics.len());
}
