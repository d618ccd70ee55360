//! The convex problem of experiment 5: a point that is near to all of many points drawn around a centre.

use fervor_verbs::transport::sim::Fabric;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::cluster::{Cluster, Machines};

/// Coordinates of a point.
pub const DIMENSIONS: usize = 8;
/// `F² = 1` bounds `|x_t - x*|² / 2`, …
pub const F: f64 = 1.0;
/// … and `L` the gradients.
pub const L: f64 = 2.0;

/// A point, or a step.
pub type Point = [f64; DIMENSIONS];

/// The point of update `t`: within 1/2 of the centre in each of a few coordinates.
pub fn point(worker: usize, clock: usize) -> Point {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    rng.set_stream((worker as u64) << 32 | clock as u64);
    // The centre is at distance 1 from the start, which is 0; noise has at most length 1/2.
    let scale = 0.5 / (DIMENSIONS as f64).sqrt();
    std::array::from_fn(|_| (1.0 / DIMENSIONS as f64).sqrt() + scale * rng.random_range(-1.0..1.0))
}

/// The cluster that it runs on.
pub fn cluster(workers: usize, seed: u64, core: Option<usize>) -> Cluster {
    Cluster {
        workers,
        servers: 1,
        fabric: Fabric::roce_25g(),
        machines: Machines::Equal,
        seed,
        cache: 64 << 10,
        core,
    }
}
