//! Fervor's server: each shard is owned by one polling thread, which applies batches and pushes images.
//!
//! ```text
//!  control thread                 one poller per shard
//!  ┌───────────────────┐  mail    ┌───────────────────────────────────────────────────────────────┐
//!  │ accept, handshake │ ───────▶ │ poll ─▶ ShardCore ─▶ Outbound ─▶ post                           │
//!  └───────────────────┘          │         images, clocks  what waits,  connections, staging      │
//!                                 │                         in order                               │
//!                                 └───────────────────────────────────────────────────────────────┘
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`core`] | a shard: images, tables, LSN, vector clock, who holds what; pure |
//! | [`outbound`] | what waits for a client, and what goes first; pure |
//! | [`peer`] | a client's connection, and what is on its way to it |
//! | [`posting`] | all clients' connections and the staging memory: pushes |
//! | [`staging`] | the memory that pushes are sent from |
//! | [`poller`] | the loop of a polling thread, and how it idles |
//! | [`access`] | what the holder of a key may do; pure |
//! | [`reach`] | what he may READ, where that is not everything |
//! | [`accept`] | the control thread: handshakes, and mail to the pollers |
//! | [`share`] | the atomics that the two share |
//! | [`config`], [`budget`] | what a server is made for; how much memory that takes, term by term |
//! | [`placement`] | where each shard runs, and where its memory lies |
//! | [`start`] | making the shards: memory taken, touched and registered, for all of them at once |
//!
//! **Invariants.** Only a shard's own thread writes its images. A batch is checked as a whole before any of it is
//! applied. Nothing here blocks, locks or makes a system call between two messages; the control thread and the
//! pollers share one mail queue and a few atomics each, and a lock that a poller takes only when a table is made or dropped. A peer's fault ends that peer's connection and nothing else.

#![forbid(unsafe_code)]

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use fervor_verbs::{
    Address,
    transport::{Attach, Listener, Thread, Transport},
};

mod accept;
mod access;
pub mod budget;
pub mod config;
pub mod core;
pub mod counts;
mod error;
mod outbound;
mod peer;
pub mod placement;
mod poller;
mod posting;
mod reach;
mod share;
mod staging;
mod start;

pub use access::{BadRule, Grant, checked};
pub use budget::Budget;
pub use config::{Config, parse_size};
pub use core::Origin;
pub use error::ServerError;
pub use placement::Placement;
pub use start::Progress;

use share::Share;
use start::Watch;

/// A running server. Dropped, it stops.
pub struct Server<T: Transport> {
    address: Address,
    budget: Budget,
    placement: Placement,
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
        Self::start_watched(transport, config, |_| ())
    }

    /// As [`start`](Self::start). `watch` is told again and again how much memory has been [touched](Config::touch), by several threads.
    ///
    /// # Errors
    /// As there.
    pub fn start_watched(
        transport: &T,
        config: &Config,
        watch: impl Fn(Progress) + Send + Sync + 'static,
    ) -> Result<Self, ServerError> {
        config.check()?;
        let placement = Placement::of(config);
        let mut listener = transport.listen(&config.listen)?;
        let mut server = Self {
            address: listener.address().clone(),
            budget: Budget::of(config, &placement),
            placement,
            stop: Arc::new(AtomicBool::new(false)),
            control: None,
            pollers: Vec::new(),
            shares: Vec::new(),
            wakers: Vec::new(),
        };
        let mut doors: Vec<accept::Door<T>> = Vec::new();
        let mut pollers = Vec::new();
        for start::Made { poller, door, .. } in
            start::shards(transport, config, &mut server.placement, &(Arc::new(watch) as Watch))?
        {
            server.shares.push(door.share.clone());
            server.wakers.push(door.attach.clone());
            doors.push(door);
            pollers.push(poller);
        }
        // With what the memory has become.
        server.budget = Budget::of(config, &server.placement);
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

    /// Where its shards run, and where their memory lies.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    /// How often clients came back after their connection to a shard had broken.
    pub fn resumptions(&self) -> u64 {
        self.shares.iter().map(|share| share.resumptions.load(Ordering::Relaxed)).sum()
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
