//! How much memory a server takes, term by term.
//!
//! All of it is allocated and registered before the first request. What grows with the tables (subscriptions
//! and dirty marks, on the heap) is bounded by the rows that fit.

use std::fmt;

use fervor_protocol::limits::MESSAGE_BYTES;

use crate::Config;

/// Bytes of each kind of memory, over all shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Rows, exported for remote READ.
    pub rows: usize,
    /// Receive buffers.
    pub receive: usize,
    /// Memory that pushes are sent from.
    pub staging: usize,
    shards: usize,
    buffers: usize,
}

impl Budget {
    /// Of a server with this configuration.
    pub fn of(config: &Config) -> Self {
        let shards = config.cores.len();
        let buffers = config.clients * config.credits;
        Self {
            rows: config.memory,
            receive: shards * buffers * MESSAGE_BYTES,
            staging: shards * config.staging,
            shards,
            buffers,
        }
    }

    /// The sum.
    pub fn total(&self) -> usize {
        self.rows + self.receive + self.staging
    }

    pub(crate) fn rows_per_shard(&self, config: &Config) -> usize {
        config.memory / config.cores.len() / 4096 * 4096
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        writeln!(f, "memory, registered before the first request ({} shards):", self.shards)?;
        writeln!(f, "  rows             {:>10.1} MiB", mib(self.rows))?;
        writeln!(
            f,
            "  receive buffers  {:>10.1} MiB  ({} x {} x {} KiB)",
            mib(self.receive),
            self.shards,
            self.buffers,
            MESSAGE_BYTES >> 10
        )?;
        writeln!(f, "  push staging     {:>10.1} MiB", mib(self.staging))?;
        write!(f, "  total            {:>10.1} MiB", mib(self.total()))
    }
}
