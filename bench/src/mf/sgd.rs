//! The mathematics: one step of stochastic gradient descent for one rating, and the loss.
//!
//! A rating `v` of row `i` and column `j` is to be the product of the factors `l_i` and `r_j`. With the error
//! `e = v - l_i · r_j` and the step `g`, both move against the gradient of `e²` at once:
//! `l_i += g e r_j`, `r_j += g e l_i` (the factor 2 of the gradient is in `g`). This is the SGD of the paper,
//! without regularisation.
//!
//! These loops are the only arithmetic of a run, with and without a parameter server. They are plain
//! loops over blocks of `LANES`, which the compiler turns into vector instructions.

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::plan::Entry;

/// Numbers that are worked on together.
const LANES: usize = 8;

/// The initial factors: numbers drawn evenly from `-bound..bound`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Initial {
    /// Seed of the job.
    pub seed: u64,
    /// Bound of the numbers.
    pub bound: f32,
}

/// Which side of the product a factor is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `L`: kept by the worker that owns the row.
    Row,
    /// `R`: shared by all.
    Column,
}

impl Initial {
    /// Initial factors whose products have a third of the size of the values (`root_mean_square`): small enough to
    /// add little to the loss, and not so near to 0, a saddle point, that SGD is long in leaving it.
    pub fn new(seed: u64, rank: usize, root_mean_square: f64) -> Self {
        // The product of two such factors has the standard deviation sqrt(rank) * bound^2 / 3.
        Initial { seed, bound: (root_mean_square / (rank as f64).sqrt()).sqrt() as f32 }
    }

    /// Writes the initial factor of row or column `index`.
    pub fn fill(&self, side: Side, index: u32, factor: &mut [f32]) {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        // Streams from 2^32 on are the factors'; those below are the shares'.
        rng.set_stream((1 + side as u64) << 32 | u64::from(index));
        factor.fill_with(|| self.bound * rng.random_range(-1.0..1.0));
    }
}

/// The product of two factors.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    let half: [f32; 4] = std::array::from_fn(|lane| sums[lane] + sums[lane + 4]);
    (half[0] + half[2]) + (half[1] + half[3]) + rest
}

/// One step for one rating.
#[inline(always)]
fn step(left: &mut [f32], right: &mut [f32], value: f32, step: f32) {
    let scaled = step * (value - dot(left, right));
    for (l, r) in left.iter_mut().zip(right) {
        let old = *l;
        *l += scaled * *r;
        *r += scaled * old;
    }
}

/// One step for each of the `entries`, all of one column, whose factor is `right`. `left` has the factors of
/// all rows of the worker, one after the other.
pub fn train(left: &mut [f32], right: &mut [f32], entries: &[Entry], size: f32) {
    match right.len() {
        // Known lengths let the column's factor stay in registers.
        8 => fixed::<8>(left, right, entries, size),
        16 => fixed::<16>(left, right, entries, size),
        32 => fixed::<32>(left, right, entries, size),
        rank => {
            for entry in entries {
                step(&mut left[entry.row as usize * rank..][..rank], right, entry.value, size);
            }
        }
    }
}

fn fixed<const RANK: usize>(left: &mut [f32], right: &mut [f32], entries: &[Entry], size: f32) {
    let (left, _) = left.as_chunks_mut::<RANK>();
    let (right, _) = right.as_chunks_mut::<RANK>();
    let mut column = right[0];
    for entry in entries {
        step(&mut left[entry.row as usize], &mut column, entry.value, size);
    }
    right[0] = column;
}

/// The sum of the squared errors of the `entries`; as in [`train`].
pub fn loss(left: &[f32], right: &[f32], entries: &[Entry]) -> f64 {
    let rank = right.len();
    let square = |entry: &Entry| {
        let error = entry.value - dot(&left[entry.row as usize * rank..][..rank], right);
        f64::from(error) * f64::from(error)
    };
    entries.iter().map(square).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(side: Side, count: u32, rank: usize) -> Vec<f32> {
        let initial = Initial { seed: 3, bound: 0.5 };
        let mut all = vec![0.0; count as usize * rank];
        for (index, factor) in (0..).zip(all.chunks_mut(rank)) {
            initial.fill(side, index, factor);
        }
        all
    }

    /// The same, written as in a textbook, in `f64`.
    fn straightforward(left: &mut [f64], right: &mut [f64], entries: &[Entry], step: f64) -> f64 {
        let rank = right.len();
        let mut loss = 0.0;
        for entry in entries {
            let row = &mut left[entry.row as usize * rank..][..rank];
            let mut product = 0.0;
            for k in 0..rank {
                product += row[k] * right[k];
            }
            let error = f64::from(entry.value) - product;
            loss += error * error;
            let (old_row, old_right) = (row.to_vec(), right.to_vec());
            for k in 0..rank {
                row[k] += step * error * old_right[k];
                right[k] += step * error * old_row[k];
            }
        }
        loss
    }

    #[test]
    fn steps_and_loss_are_those_of_the_textbook_for_every_rank() {
        let entries: Vec<Entry> =
            (0..50).map(|i| Entry { row: i * 7 % 11, value: (i as f32 * 0.37).sin() * 3.0 }).collect();
        for rank in (1..=40).chain([64, 100]) {
            let (mut left, mut right) = (factors(Side::Row, 11, rank), factors(Side::Column, 1, rank));
            let mut left_64: Vec<f64> = left.iter().map(|&x| x.into()).collect();
            let mut right_64: Vec<f64> = right.iter().map(|&x| x.into()).collect();

            let expected = straightforward(&mut left_64.clone(), &mut right_64.clone(), &entries, 0.0);
            let found = loss(&left, &right, &entries);
            assert!((found - expected).abs() <= 1e-4 * expected, "rank {rank}: loss {found}, not {expected}");

            train(&mut left, &mut right, &entries, 0.01);
            straightforward(&mut left_64, &mut right_64, &entries, 0.01);
            for (found, expected) in left.iter().chain(&right).zip(left_64.iter().chain(&right_64)) {
                let off = (f64::from(*found) - expected).abs();
                assert!(off <= 1e-4, "rank {rank}: {found}, not {expected}");
            }
        }
    }

    #[test]
    fn a_step_goes_down_the_gradient() {
        let entries = [Entry { row: 0, value: 4.0 }];
        let (mut left, mut right) = (vec![1.0, 0.5], vec![0.5, 1.0]);
        assert_eq!(loss(&left, &right, &entries), 9.0);
        train(&mut left, &mut right, &entries, 0.1);
        assert_eq!(left, [1.0 + 0.1 * 3.0 * 0.5, 0.5 + 0.1 * 3.0 * 1.0]);
        assert_eq!(right, [0.5 + 0.1 * 3.0 * 1.0, 1.0 + 0.1 * 3.0 * 0.5]);
    }

    #[test]
    fn initial_factors_depend_on_seed_side_and_index() {
        let fill = |seed, side, index| {
            let mut factor = [0.0; 9];
            Initial { seed, bound: 0.5 }.fill(side, index, &mut factor);
            assert!(factor.iter().all(|x| (-0.5..0.5).contains(x)));
            factor
        };
        assert_eq!(fill(1, Side::Row, 5), fill(1, Side::Row, 5));
        assert_ne!(fill(1, Side::Row, 5), fill(2, Side::Row, 5));
        assert_ne!(fill(1, Side::Row, 5), fill(1, Side::Column, 5));
        assert_ne!(fill(1, Side::Row, 5), fill(1, Side::Row, 6));
    }
}
