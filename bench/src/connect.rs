//! How the measurements connect to servers: the one place that turns command-line options into [`ClientOptions`].

use clap::Args;
use fervor_client::{ClientOptions, ReadLanes};

/// How rows are read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Args)]
pub struct ReadOptions {
    /// Read copies of rows, as over a network, even where the server's memory could be read in place
    #[arg(long)]
    pub copies: bool,
    /// Connections of a client to each shard for its READs, which its workers share; `per-worker`: each worker has its own
    #[arg(long, value_name = "N", default_value_t)]
    pub read_lanes: ReadLanes,
}

impl ReadOptions {
    /// READ lanes that a client of `workers` workers makes at most.
    pub fn lanes(&self, workers: u16) -> u16 {
        match self.read_lanes {
            ReadLanes::Shared(lanes) => lanes.min(workers),
            ReadLanes::PerWorker => workers,
        }
    }
}

/// The options of a client of a job of `clients` clients.
pub fn client_options(clients: u16, reads: ReadOptions) -> ClientOptions {
    let ReadOptions { copies, read_lanes } = reads;
    ClientOptions { clients, copies, read_lanes, ..ClientOptions::default() }
}
