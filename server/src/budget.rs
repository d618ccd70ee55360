//! How much memory a server takes, term by term.
//!
//! What NICs and peers reach is allocated and registered before the first request. What grows with tables and clients, on the heap, is
//! counted, and refused beyond its term.

use std::fmt;

use fervor_protocol::limits::MESSAGE_BYTES;
use fervor_verbs::{Address, session::Way};

use crate::{Config, Placement};

/// Bytes of each kind of memory, over all shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Rows, exported for remote READ, with what clients on this host look at beside them.
    pub rows: usize,
    /// Receive buffers.
    pub receive: usize,
    /// Memory that pushes are sent from.
    pub staging: usize,
    /// At most, of what is remembered of tables and clients.
    pub bookkeeping: usize,
    shards: usize,
    buffers: usize,
    /// Ways that clients may come by, and rails of RDMA: each has receive buffers of its own, from its first client on.
    ways: usize,
}

impl Budget {
    /// Of a server with this configuration, whose rows lie so.
    pub fn of(config: &Config, placement: &Placement) -> Self {
        let shards = config.cores.len();
        let buffers = config.clients * config.credits;
        let rails = config.rails.max(1);
        let ways = match config.listen {
            // Shared memory and TCP besides.
            Address::Session { via: None, .. } => 2 + rails,
            Address::Session { via: Some(Way::Rdma), .. } => rails,
            _ => 1,
        };
        Self {
            rows: placement.shards.iter().map(|shard| shard.bytes).sum(),
            receive: ways * shards * buffers * MESSAGE_BYTES,
            staging: shards * config.staging,
            bookkeeping: config.bookkeeping,
            shards,
            buffers,
            ways,
        }
    }

    /// The sum.
    pub fn total(&self) -> usize {
        self.rows + self.receive + self.staging + self.bookkeeping
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        writeln!(
            f,
            "memory ({} shards), registered before the first request but for the bookkeeping{}:",
            self.shards,
            if self.ways > 1 {
                ", and receive buffers, which each way has from its first client on"
            } else {
                ""
            }
        )?;
        writeln!(f, "  rows             {:>10.1} MiB", mib(self.rows))?;
        writeln!(
            f,
            "  receive buffers  {:>10.1} MiB  ({}{} x {} x {} KiB)",
            mib(self.receive),
            if self.ways > 1 { format!("{} ways x ", self.ways) } else { String::new() },
            self.shards,
            self.buffers,
            MESSAGE_BYTES >> 10
        )?;
        writeln!(f, "  push staging     {:>10.1} MiB", mib(self.staging))?;
        writeln!(f, "  bookkeeping      {:>10.1} MiB  (at most)", mib(self.bookkeeping))?;
        write!(f, "  total            {:>10.1} MiB", mib(self.total()))
    }
}
