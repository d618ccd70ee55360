//! How a client connects.

use std::{fmt, str::FromStr, time::Duration};

use crate::error::Error;

use fervor_verbs::{rails::RailName, session::Key};

/// What a client may be told. `Default` is a job of one client.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Clients in the job. The shard clock stands until so many have joined, so that none runs ahead of
    /// others that are still starting.
    pub clients: u16,
    /// It only reads: no clock waits for it, it is none of the [`clients`](Self::clients) of the job, and cannot update tables. What
    /// [`Worker::clock`](crate::Worker::clock) does then, it says. (With a key that may only read this is so in any case.)
    pub observer: bool,
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
    /// Connections for READs, to each shard of which rows are READ.
    pub read_lanes: ReadLanes,
    /// Whether a `get` that returns older data than the table's model allows is an error ([`Error::Stale`]), and not
    /// only counted in [`WorkerStats::violations`]. Neither ever happens, and to look costs nothing.
    ///
    /// [`Error::Stale`]: crate::Error::Stale
    /// [`WorkerStats::violations`]: crate::WorkerStats::violations
    pub check: bool,
    /// The key for `fervor://` servers that ask for one [default: that in the environment; see
    /// [`Key::from_environment`]].
    pub key: Option<Key>,
    /// Ports of RDMA devices that are used for `fervor://` servers, all at once [default: those that `FERVOR_IB_HCA` names; or all that are
    /// active].
    pub devices: Vec<RailName>,
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
            observer: false,
            cache_bytes: 64 << 20,
            cache_share: 0.5,
            copies: false,
            slab_bytes: 512 << 20,
            reads_in_flight: 16,
            read_lanes: ReadLanes::default(),
            check: false,
            key: None,
            devices: Vec::new(),
            lease: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
        }
    }
}

/// How many connections the workers of a client have for READs, to each shard. A server takes as many of each client as its `--lanes`
/// says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadLanes {
    /// At most so many, from 1 on, which the workers share.
    Shared(u16),
    /// Each worker that READs has its own. No worker waits for another one's lock, and a server needs more memory.
    PerWorker,
}

impl Default for ReadLanes {
    /// Three, shared.
    fn default() -> Self {
        Self::Shared(3)
    }
}

impl fmt::Display for ReadLanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shared(lanes) => lanes.fmt(f),
            Self::PerWorker => f.pad("per-worker"),
        }
    }
}

impl FromStr for ReadLanes {
    type Err = String;

    /// A number, or `per-worker`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text == "per-worker" => Ok(Self::PerWorker),
            Ok(lanes) if lanes > 0 => Ok(Self::Shared(lanes)),
            _ => Err(format!(
                "`{text}` is no number of READ lanes: write one from 1 to {}, or per-worker",
                u16::MAX
            )),
        }
    }
}

impl ClientOptions {
    /// # Errors
    /// An option that makes no sense.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.read_lanes == ReadLanes::Shared(0) {
            let cure = "write Shared(1) or more, or PerWorker";
            return Err(Error::Options(format!(
                "ClientOptions::read_lanes is Shared(0), with which no row can be READ: {cure}"
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_are_a_number_or_a_word() {
        for lanes in [ReadLanes::Shared(1), ReadLanes::Shared(u16::MAX), ReadLanes::PerWorker] {
            assert_eq!(lanes.to_string().parse(), Ok(lanes));
        }
        for bad in ["0", "65536", "-1", "", "all"] {
            assert!(bad.parse::<ReadLanes>().unwrap_err().starts_with(&format!("`{bad}` ")), "{bad}");
        }
    }
}
