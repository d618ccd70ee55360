//! What a worker's accesses to shared state cost, and what it shares with the thread that reports on it.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU64},
};

use fervor_client::WorkerStats;
use serde::{Deserialize, Serialize};

/// What a worker's accesses to shared state have cost.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Accesses {
    /// Seconds in which it waited for the shard clock.
    pub waiting: f64,
    /// Seconds in which it read, sent, or waited for room to send.
    pub communicating: f64,
    /// Reads of rows in place, in the memory of a server on the same host.
    pub in_place: u64,
    /// Reads answered by the cache.
    pub hits: u64,
    /// Reads not answered by the cache.
    pub misses: u64,
    /// Reads that returned older data than the model allows: always 0.
    pub violations: u64,
    /// RDMA READs.
    pub reads: u64,
    /// How often a read returned data of a clock this much ahead of the reader's own.
    pub clock_differential: BTreeMap<i64, u64>,
}

impl Accesses {
    /// Seconds of all accesses.
    pub fn seconds(&self) -> f64 {
        self.waiting + self.communicating
    }

    /// What they have cost since they had cost `earlier`.
    pub fn since(mut self, earlier: &Accesses) -> Accesses {
        self.waiting -= earlier.waiting;
        self.communicating -= earlier.communicating;
        self.in_place -= earlier.in_place;
        self.hits -= earlier.hits;
        self.misses -= earlier.misses;
        self.violations -= earlier.violations;
        self.reads -= earlier.reads;
        for (differential, count) in &earlier.clock_differential {
            *self.clock_differential.entry(*differential).or_default() -= count;
        }
        self.clock_differential.retain(|_, count| *count > 0);
        self
    }

    /// Adds what another worker's have cost.
    pub fn add(&mut self, other: &Accesses) {
        self.waiting += other.waiting;
        self.communicating += other.communicating;
        self.in_place += other.in_place;
        self.hits += other.hits;
        self.misses += other.misses;
        self.violations += other.violations;
        self.reads += other.reads;
        for (differential, count) in &other.clock_differential {
            *self.clock_differential.entry(*differential).or_default() += count;
        }
    }
}

impl From<WorkerStats> for Accesses {
    fn from(stats: WorkerStats) -> Self {
        Accesses {
            waiting: stats.waiting.as_secs_f64(),
            communicating: stats.communicating.as_secs_f64(),
            in_place: stats.in_place,
            hits: stats.hits,
            misses: stats.misses,
            violations: stats.violations,
            reads: stats.reads,
            clock_differential: stats.clock_differential,
        }
    }
}

/// What the workers of a process share with the thread that reports on them.
#[derive(Debug, Default)]
pub struct Shared {
    /// Set when the workers are to stop after the epoch that they are in.
    pub stop: AtomicBool,
    /// Ratings or tokens trained on since this was last read, for the progress bar.
    pub count: AtomicU64,
}
