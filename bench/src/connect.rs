//! How the measurements connect to servers: the one place that turns command-line options into [`ClientOptions`].

use clap::Args;
use fervor_client::ClientOptions;

/// How rows are read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Args)]
pub struct ReadOptions {
    /// Read copies of rows, as over a network, even where the server's memory could be read in place
    #[arg(long)]
    pub copies: bool,
}

/// The options of a client of a job of `clients` clients.
pub fn client_options(clients: u16, reads: ReadOptions) -> ClientOptions {
    ClientOptions { clients, copies: reads.copies, ..ClientOptions::default() }
}
