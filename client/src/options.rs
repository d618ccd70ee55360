//! How a client connects.

use std::time::Duration;

/// What a client may be told. `Default` is a job of one client.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Clients in the job. The shard clock stands until so many have joined, so that none runs ahead of
    /// others that are still starting.
    pub clients: u16,
    /// Bytes of cache for all tables together. Allocated, and registered for the servers to write, when connecting.
    pub cache_bytes: usize,
    /// Greatest part of `cache_bytes` that one table takes when no other is said; it takes no more than its rows.
    pub cache_share: f64,
    /// Insist on copies, as over a network, though a server's rows could be read in place.
    pub copies: bool,
    /// Bytes of memory for updates on their way to servers on this host, over `shm://` alone. Only what is used is touched; what does not
    /// fit is sent by copy.
    pub slab_bytes: usize,
    /// Most READs that one [`get_many`](crate::Worker::get_many) has in flight to one shard.
    pub reads_in_flight: usize,
    /// Whether a `get` that returns older data than the table's model allows is an error ([`Error::Stale`]), and not
    /// only counted in [`WorkerStats::violations`]. Neither ever happens, and to look costs nothing.
    ///
    /// [`Error::Stale`]: crate::Error::Stale
    /// [`WorkerStats::violations`]: crate::WorkerStats::violations
    pub check: bool,
    /// How long a server may be out of reach before it is taken for lost. Until then the client tries to connect again, and goes on where
    /// it was; calls that need the server wait. The servers' own `--lease` bounds it, too. 0: a connection that breaks is an error at
    /// once. (Over shared memory it always is: nothing but the server's end breaks one.)
    pub lease: Duration,
    /// How long connecting may take, per connection.
    pub connect_timeout: Duration,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            clients: 1,
            cache_bytes: 64 << 20,
            cache_share: 0.5,
            copies: false,
            slab_bytes: 512 << 20,
            reads_in_flight: 16,
            check: false,
            lease: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
        }
    }
}
