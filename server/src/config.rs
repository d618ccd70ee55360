//! What a server is made for.

use std::time::Duration;

use fervor_protocol::limits::{ACK_RING, MAX_CREDITS, MAX_ROW_BYTES, MESSAGE_BYTES, ROW_HEADER};
use fervor_verbs::{
    Address,
    memory::{HugePage, Pages},
    transport::EndpointConfig,
};

use crate::{
    core::{Limits, Origin, region_header},
    error::ServerError,
};

/// How long a client is kept whose connection broke, if nothing is said: a network that hiccups is back by then.
const DEFAULT_LEASE: Duration = Duration::from_secs(10);
/// The longest time that is possible: it goes over the wire in milliseconds.
const MOST_LEASE: Duration = Duration::from_secs(1_000_000);
/// Memory is given out by pages.
const PAGE: usize = 4096;
/// Least staging memory that a client may use: a push of this many bytes can be on its way to each.
const LEAST_QUOTA: usize = PAGE;
/// Staging memory that rows of any width get by default, as long as it is no more than this.
const MOST_DEFAULT_STAGING: usize = 64 << 20;

/// What a server is made for.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where it listens.
    pub listen: Address,
    /// Per shard the processor that its polling thread is pinned to, if any.
    pub cores: Vec<Option<usize>>,
    /// Bytes of rows, over all shards.
    pub memory: usize,
    /// Which pages rows lie on. With [huge ones](Pages::Huge), where there are enough of them, each shard has as many whole pages as its part
    /// of [`memory`](Self::memory) needs, and the first of these has the header of its region, too.
    pub pages: Pages,
    /// Rows are touched before the server starts: by all processors near each shard, and then registered, for all shards at once. Otherwise a page
    /// is taken when a row on it is first written, or when it is registered with a device that pins it.
    pub touch: bool,
    /// Most bytes of what is remembered of tables and clients, over all shards: who holds which rows, and what has changed.
    pub bookkeeping: usize,
    /// Most clients at a time. Each costs a shard [`credits`](Self::credits) receive buffers of 64 KiB, 512 bytes of announcements, and at
    /// least 4 KiB of staging: 1,000 clients 67 MiB with one credit, and 505 MiB with eight. (1,000 on one host, of one
    /// worker each, connect in half a second and end a clock of BSP in 0.1 s on two cores; `client/tests/size.rs`.)
    pub clients: usize,
    /// READ lanes for each client: the connections that it may have to a shard besides the main one, for the READs of its workers. They
    /// cost a shard little: they receive nothing, and nothing is sent on them.
    pub lanes: usize,
    /// Messages that a client may have on their way to one shard: each has a receive buffer.
    pub credits: usize,
    /// How long a client is kept whose connection broke, so that it can come back. Until then it holds the clock back, as it is not
    /// known whether its process has died. 0: it is not kept. (Over shared memory no connection breaks without its process.)
    pub lease: Duration,
    /// Bytes per shard that pushes are sent from. What is on its way to one client uses a part of it at most
    /// ([`Config::quota`]), and no row may be wider than that.
    pub staging: usize,
    /// Ports of RDMA devices that it uses, for the budget: each has receive buffers of its own.
    pub rails: usize,
    /// Tells this server from others of a job.
    pub id: u64,
    /// Where its shards begin to count.
    pub origin: Origin,
}

impl Config {
    /// One shard, not pinned, with defaults for the rest.
    pub fn new(listen: Address) -> Self {
        let (memory, clients) = (256 << 20, 16);
        Self {
            listen,
            cores: vec![None],
            memory,
            pages: Pages::Any,
            touch: false,
            bookkeeping: Self::default_bookkeeping(memory),
            clients,
            lanes: 3,
            credits: 8,
            lease: DEFAULT_LEASE,
            staging: Self::default_staging(clients),
            rails: 1,
            id: 0,
            origin: Origin::default(),
        }
    }

    /// Half as many bytes as there are of rows: a set of images takes 1/250 to 1/640 of their memory, and each client that
    /// mirrors a table has one; a subscription takes 96 bytes.
    pub fn default_bookkeeping(memory: usize) -> usize {
        memory / 2
    }

    /// As much as so many clients need for rows of any width, up to 64 MiB.
    pub fn default_staging(clients: usize) -> usize {
        let widest = (MAX_ROW_BYTES + ROW_HEADER).next_multiple_of(PAGE);
        ((clients + 1) * widest).min(MOST_DEFAULT_STAGING).max((clients + 1) * LEAST_QUOTA)
    }

    /// Bytes of staging that what is on its way to one client may use: if all clients but one take nothing, it still has
    /// that much.
    pub fn quota(&self) -> usize {
        self.staging / (self.clients + 1)
    }

    /// Most connections of a shard that carry READs alone: the lanes of all clients, of each the one by which it asks for the
    /// shards before it joins, and some that have ended and wait to be polled.
    pub(crate) fn all_lanes(&self) -> usize {
        self.clients * (self.lanes + 1) + 8
    }

    /// Bounds of each shard.
    pub(crate) fn limits(&self) -> Limits {
        let shards = self.cores.len();
        Limits { seats: self.clients, bookkeeping: self.bookkeeping / shards, image: self.quota() }
    }

    /// Bytes of a shard's rows.
    pub(crate) fn rows_per_shard(&self) -> usize {
        self.memory / self.cores.len() / PAGE * PAGE
    }

    /// Bytes of a shard's exported region, on such pages.
    pub(crate) fn region_bytes(&self, page: Option<HugePage>) -> usize {
        let header = region_header(self.clients);
        match page {
            Some(page) if self.pages == Pages::Huge(page) => {
                self.rows_per_shard().max(header + PAGE).next_multiple_of(page.bytes())
            }
            _ => header + self.rows_per_shard(),
        }
    }

    /// Whether it makes sense.
    ///
    /// # Errors
    /// What does not, with the option that changes it.
    pub fn check(&self) -> Result<(), ServerError> {
        let bad = |text: String| Err(ServerError::Config(text));
        if self.cores.is_empty() || self.cores.len() > usize::from(u16::MAX) {
            return bad(format!(
                "{} shards: 1 to {} are possible; change --shards or --cores",
                self.cores.len(),
                u16::MAX
            ));
        }
        if self.clients == 0 || self.clients > usize::from(u16::MAX) {
            return bad(format!(
                "clients = {}: 1 to {} are possible; change --clients",
                self.clients,
                u16::MAX
            ));
        }
        if self.credits == 0 || self.credits > MAX_CREDITS.min(ACK_RING) {
            return bad(format!(
                "credits = {}: 1 to {MAX_CREDITS} are possible; change --credits",
                self.credits
            ));
        }
        if self.lease > MOST_LEASE {
            return bad(format!(
                "lease = {} s: at most {} are possible; change --lease",
                self.lease.as_secs_f64(),
                MOST_LEASE.as_secs()
            ));
        }
        if self.lanes == 0 || self.lanes > usize::from(u16::MAX) {
            return bad(format!("lanes = {}: 1 to {} are possible; change --lanes", self.lanes, u16::MAX));
        }
        if self.quota() < LEAST_QUOTA {
            return bad(format!(
                "staging = {} bytes: at least {} are needed for {} clients; raise --staging, or lower --clients",
                self.staging,
                (self.clients + 1) * LEAST_QUOTA,
                self.clients
            ));
        }
        if self.memory < self.cores.len() * PAGE {
            return bad(format!(
                "memory = {} bytes: at least a page per shard is needed, {} bytes in all; raise --memory",
                self.memory,
                self.cores.len() * PAGE
            ));
        }
        Ok(())
    }

    /// Configuration of each shard's endpoint.
    pub(crate) fn endpoint(&self, shard: usize) -> EndpointConfig {
        EndpointConfig {
            receive_buffers: self.clients * self.credits,
            receive_size: MESSAGE_BYTES,
            send_depth: 128,
            read_depth: 16,
            // Some have ended and wait to be polled.
            connections: self.clients + self.all_lanes() + 8,
            completion_vector: shard,
            core: self.cores[shard],
        }
    }
}

/// A size in bytes, as it stands on a command line: a number with an optional K, M, G or T (powers of 1024).
///
/// # Errors
/// It is none, and what one looks like.
pub fn parse_size(text: &str) -> Result<usize, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, unit)) if !unit.is_ascii_digit() => {
            let shift = match unit.to_ascii_uppercase() {
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                _ => return Err(format!("`{text}` is not a size: the unit is K, M, G or T, as in 512M")),
            };
            (&text[..at], shift)
        }
        _ => (text, 0),
    };
    let number: usize = digits.parse().map_err(|_| format!("`{text}` is not a size: write 512M or 4G"))?;
    number
        .checked_mul(1 << shift)
        .filter(|bytes| *bytes <= isize::MAX as usize)
        .ok_or_else(|| format!("`{text}` is more than this machine can address: write a smaller size"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(clients: usize, staging: usize) -> Config {
        let config = Config::new("shm:///tmp/x".parse().expect("an address"));
        Config { clients, staging, ..config }
    }

    #[test]
    fn rows_of_any_width_are_possible_by_default_and_many_clients_too() {
        for clients in [1, 16, 60] {
            let config = config(clients, Config::default_staging(clients));
            assert!(config.quota() >= MAX_ROW_BYTES + ROW_HEADER && config.check().is_ok(), "{clients}");
        }
        assert!(config(20_000, Config::default_staging(20_000)).check().is_ok());
        let error = config(20, 4096).check().unwrap_err().to_string();
        assert!(error.contains("staging = 4096") && error.contains("86016"), "{error}");
    }
}
