//! Fervor's server: each shard is owned by one polling thread, which applies batches and pushes rows.
//!
//! ```text
//!  control thread                 one poller per shard
//!  ┌───────────────────┐  mail    ┌──────────────────────────────────────────────────┐
//!  │ accept, handshake │ ───────▶ │ poll → message → apply → acknowledge → round     │
//!  └───────────────────┘          │ Shard: rows (Exclusive), LSN, vector clock       │
//!                                 │ Peer: one client's connection, window and queue  │
//!                                 └──────────────────────────────────────────────────┘
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`accept`] | the control thread: handshakes, and mail to the pollers |
//! | [`poller`] | the loop of a polling thread, and how it idles |
//! | [`shard`] | rows, tables, LSN, vector clock: applying a message |
//! | [`peer`] | what a poller knows of one client |
//! | [`push`] | rounds: who gets which row, from which stable memory |
//! | [`staging`] | the memory that pushes are sent from |
//! | [`budget`] | how much memory all of it takes, term by term |
//!
//! **Invariants.** Only a shard's own thread writes its rows. A batch is checked as a whole before any of it is
//! applied. Nothing here blocks, locks or makes a system call between two messages; the control thread and the
//! pollers share one mail queue and three atomics each. A peer's fault ends that peer's connection and nothing else.

#![forbid(unsafe_code)]

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
};

use fervor_protocol::limits::{ACK_RING, MAX_CREDITS, MAX_ROW_BYTES, MESSAGE_BYTES};
use fervor_verbs::{
    Address, Error, Exclusive,
    transport::{Attach, Endpoint, EndpointConfig, Export, Listener, RemoteRegion, Thread, Transport},
};

mod accept;
pub mod budget;
mod continuous;
mod peer;
mod poller;
mod push;
mod shard;
mod staging;
mod visible;

pub use budget::Budget;

/// What a server is made for.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where it listens.
    pub listen: Address,
    /// Per shard the processor that its polling thread is pinned to, if any.
    pub cores: Vec<Option<usize>>,
    /// Bytes of rows, over all shards.
    pub memory: usize,
    /// Most clients at a time.
    pub clients: usize,
    /// Most workers of a client: each has a connection of its own to each shard, for its READs.
    pub workers: usize,
    /// Messages that a client may have on their way to one shard: each has a receive buffer.
    pub credits: usize,
    /// Bytes per shard that pushes are sent from.
    pub staging: usize,
    /// Tells this server from others of a job.
    pub id: u64,
}

impl Config {
    /// One shard, not pinned, with defaults for the rest.
    pub fn new(listen: Address) -> Self {
        Self {
            listen,
            cores: vec![None],
            memory: 256 << 20,
            clients: 16,
            workers: 8,
            credits: 8,
            staging: 4 << 20,
            id: 0,
        }
    }

    fn check(&self) -> Result<(), ServerError> {
        let bad = |text: String| Err(ServerError::Config(text));
        if self.cores.is_empty() || self.cores.len() > usize::from(u16::MAX) {
            return bad(format!("{} shards: give at least one core", self.cores.len()));
        }
        if self.clients == 0 || self.clients > usize::from(u16::MAX) {
            return bad(format!("clients = {}: 1 to {} are possible", self.clients, u16::MAX));
        }
        if self.credits == 0 || self.credits > MAX_CREDITS.min(ACK_RING) {
            return bad(format!("credits = {}: 1 to {MAX_CREDITS} are possible", self.credits));
        }
        if self.staging < 2 * MAX_ROW_BYTES {
            return bad(format!(
                "staging = {} bytes: at least {} are needed",
                self.staging,
                2 * MAX_ROW_BYTES
            ));
        }
        if self.memory < self.cores.len() * 4096 {
            return bad(format!("memory = {} bytes: at least a page per shard is needed", self.memory));
        }
        Ok(())
    }

    /// Configuration of each shard's endpoint.
    fn endpoint(&self, shard: usize) -> EndpointConfig {
        EndpointConfig {
            receive_buffers: self.clients * self.credits,
            receive_size: MESSAGE_BYTES,
            send_depth: 128,
            read_depth: 16,
            // Of each client the main one, its workers', and the one by which it asks for the shards before; and
            // some that have ended and wait to be polled.
            connections: self.clients * (2 + self.workers) + 8,
            completion_vector: shard,
        }
    }
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The configuration makes no sense.
    #[error("{0}")]
    Config(String),
    /// The transport said so.
    #[error(transparent)]
    Transport(#[from] Error),
}

/// What the control thread and a poller share.
struct Share {
    /// The shard clock, for the handshake. Written by the poller alone.
    clock: AtomicU64,
    /// Tells the poller to finish.
    stop: AtomicBool,
    /// Clients that may still send: counted by the control thread, discounted by the poller.
    clients: AtomicUsize,
    /// Messages that each client may have on their way.
    credits: usize,
}

/// A running server. Dropped, it stops.
pub struct Server<T: Transport> {
    address: Address,
    budget: Budget,
    stop: Arc<AtomicBool>,
    control: Option<T::Thread>,
    pollers: Vec<T::Thread>,
    shares: Vec<Arc<Share>>,
    wakers: Vec<T::Attach>,
}

impl<T: Transport> fmt::Debug for Server<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({})", self.address)
    }
}

impl<T: Transport> Server<T> {
    /// Allocates and registers all memory, starts the pollers, then listens.
    ///
    /// # Errors
    /// A configuration that makes no sense; memory that cannot be had or pinned; an address in use; a core that
    /// this process may not use. Nothing runs then.
    pub fn start(transport: &T, config: &Config) -> Result<Self, ServerError> {
        config.check()?;
        let budget = Budget::of(config);
        let mut listener = transport.listen(&config.listen)?;
        let mut server = Self {
            address: listener.address().clone(),
            budget,
            stop: Arc::new(AtomicBool::new(false)),
            control: None,
            pollers: Vec::new(),
            shares: Vec::new(),
            wakers: Vec::new(),
        };
        let mut doors: Vec<accept::Door<T>> = Vec::new();
        let mut pollers = Vec::new();
        for shard in 0..config.cores.len() {
            let rows = Exclusive::new(&format!("fervor-rows-{shard}"), budget.rows_per_shard(config))?;
            let export = transport.export(&rows)?;
            let endpoint = transport.endpoint(&config.endpoint(shard))?;
            let staging = staging::Staging::new(transport, config.staging)?;
            let share = Arc::new(Share {
                clock: AtomicU64::new(0),
                stop: AtomicBool::new(false),
                clients: AtomicUsize::new(0),
                credits: config.credits,
            });
            let (post, mail) = mpsc::channel();
            server.shares.push(share.clone());
            server.wakers.push(endpoint.attach());
            doors.push(accept::Door {
                attach: endpoint.attach(),
                post,
                share: share.clone(),
                region: export.remote(),
            });
            pollers.push(poller::Poller::new(
                transport.clone(),
                endpoint,
                mail,
                shard::Shard::new(rows),
                staging,
                share,
                Box::new(export),
            ));
        }
        for (shard, (poller, core)) in pollers.into_iter().zip(&config.cores).enumerate() {
            let name = format!("fervor-poll-{shard}");
            server.pollers.push(transport.spawn(&name, *core, move || poller.run())?);
        }
        let control = accept::Control::new(config, doors, server.stop.clone());
        server.control = Some(transport.spawn("fervor-control", None, move || control.run(&mut listener))?);
        Ok(server)
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The memory that it has taken.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Stops: no new connections; what has been received is applied; clients are told; all threads end.
    /// `false` if one of them had panicked.
    pub fn stop(mut self) -> bool {
        self.shut_down()
    }

    fn shut_down(&mut self) -> bool {
        self.stop.store(true, Ordering::Release);
        let mut well = self.control.take().is_none_or(Thread::join);
        for (share, waker) in self.shares.iter().zip(&self.wakers) {
            share.stop.store(true, Ordering::Release);
            waker.wake();
        }
        for poller in self.pollers.drain(..) {
            well &= poller.join();
        }
        well
    }
}

impl<T: Transport> Drop for Server<T> {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// A region of a client, bounds-checked: where the shard may write.
#[derive(Debug, Clone, Copy)]
struct Target(RemoteRegion);

impl Target {
    /// Whether `offset..offset + length` lies in it, on a boundary of 64 bytes.
    fn fits(&self, offset: u64, length: usize) -> bool {
        offset.is_multiple_of(64) && offset.checked_add(length as u64).is_some_and(|end| end <= self.0.length)
    }
}
