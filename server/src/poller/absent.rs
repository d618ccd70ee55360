//! Clients that have lost their connection and may come back: see [`fervor_protocol::resume`].
//!
//! ```text
//!                     its end is polled                   the lease is over
//!  ┌──────────────┐ ────────────────────▶ ┌───────────┐ ────────────────────▶ gone
//!  │  connected   │                       │ suspended │
//!  │              │ ◀──────────────────── │           │
//!  └──────────────┘  an attempt comes     └───────────┘
//!     an attempt comes: the old connection is ended, and the attempt waits until its end is polled
//! ```
//!
//! A client that is suspended keeps everything in the [core](crate::core) and its place; it has no connection, and nothing is posted to it.
//! An attempt that waits is kept among the connections of readers: it may carry nothing before the client is told that it
//! may go on.

use std::{collections::BTreeMap, sync::atomic::Ordering, time::Duration};

use fervor_protocol::{
    mutants::{Mutant, mutant},
    wire::Hello,
};
use fervor_verbs::transport::{Connection, ConnectionId, Transport, WorkError};

use super::Poller;
use crate::{access::Grant, core::ClientId};

/// See the module.
#[derive(Debug)]
pub struct Absent {
    lease: Duration,
    /// All clients that may come back.
    identities: BTreeMap<u64, ClientId>,
    suspended: BTreeMap<ClientId, Suspension>,
    /// Attempts whose client has a connection of which the end has not been polled.
    attempts: BTreeMap<ClientId, (ConnectionId, Hello)>,
}

/// A client without a connection.
#[derive(Debug)]
struct Suspension {
    since: Duration,
    until: Duration,
    cause: WorkError,
}

impl Absent {
    /// Nobody yet. Clients are kept for `lease`.
    pub fn new(lease: Duration) -> Self {
        Self { lease, identities: BTreeMap::new(), suspended: BTreeMap::new(), attempts: BTreeMap::new() }
    }

    /// A new client has this identity. `false`: another one has it.
    pub fn knows(&mut self, identity: u64, id: ClientId) -> bool {
        identity == 0 || *self.identities.entry(identity).or_insert(id) == id
    }

    /// Whether a client with this identity is kept when its connection ends.
    pub fn keeps(&self, identity: u64, id: ClientId) -> bool {
        !self.lease.is_zero() && self.identities.get(&identity) == Some(&id)
    }

    /// A client is gone. The attempt of it that waited.
    pub fn forget(&mut self, identity: u64, id: ClientId) -> Option<ConnectionId> {
        if self.identities.get(&identity) == Some(&id) {
            self.identities.remove(&identity);
        }
        self.suspended.remove(&id);
        self.attempts.remove(&id).map(|(connection, _)| connection)
    }

    /// When the next lease ends.
    pub fn next_end(&self) -> Option<Duration> {
        self.suspended.values().map(|suspension| suspension.until).min()
    }
}

impl<T: Transport> Poller<T> {
    /// The end of a client's connection has been polled: its lease begins, unless it is here again already.
    pub(super) fn suspended(&mut self, id: ClientId, cause: WorkError) {
        let since = self.transport.now();
        let until = since.saturating_add(self.absent.lease);
        self.absent.suspended.insert(id, Suspension { since, until, cause });
        let attempt = self.absent.attempts.remove(&id);
        // Unless the attempt has ended, too.
        let attempt =
            attempt.and_then(|(connection, hello)| Some((self.readers.remove(&connection)?, hello)));
        if let Some((connection, hello)) = attempt {
            self.share.lanes.fetch_sub(1, Ordering::Release);
            self.attach(id, connection, &hello);
        }
    }

    /// Somebody says that it is a client that has lost its connection.
    pub(super) fn come_back(&mut self, connection: T::Connection, hello: Hello, grant: &Grant) {
        let known = self.absent.identities.get(&hello.identity).copied();
        let peer = known.and_then(|id| Some((id, self.posting.peer(id)?)));
        let expected = match peer {
            Some((id, _)) if !self.core.has_grant(id, grant) => Err("the client had another key"),
            Some((id, peer)) => peer.expects(&hello).map(|()| id),
            None => Err("the client is not known: its lease is over, or the server was started again"),
        };
        match expected {
            Err(text) => self.refuse(connection, &hello, text),
            Ok(id) if self.absent.suspended.contains_key(&id) => self.attach(id, connection, &hello),
            Ok(id) => {
                // The client has seen the end of its old connection: here it comes soon, or now.
                self.posting.peer(id).expect("it is expected").disconnect();
                let number = connection.id();
                if let Some((given_up, _)) = self.absent.attempts.insert(id, (number, hello))
                    && let Some(given_up) = self.readers.get_mut(&given_up)
                {
                    given_up.disconnect();
                }
                self.keep_as_lane(connection);
            }
        }
    }

    /// Keeps a connection on which nothing may come until its end has been polled, or it is taken out again.
    pub(super) fn keep_as_lane(&mut self, connection: T::Connection) {
        self.share.lanes.fetch_add(1, Ordering::Release);
        self.readers.insert(connection.id(), connection);
    }

    /// A suspended client goes on, on this connection.
    fn attach(&mut self, id: ClientId, connection: T::Connection, hello: &Hello) {
        let Some(suspension) = self.absent.suspended.remove(&id) else { return };
        let slots = self.core.resume(id);
        let peer = self.posting.peer(id).expect("it is suspended");
        if mutant(Mutant::ResentTwice) && peer.outbound.forget_last() {
            self.core.forget_last(id);
        }
        self.clients.insert(connection.id(), id);
        peer.attach(connection, hello);
        peer.outbound.resume(hello.receives.into(), self.core.processed(id), slots);
        peer.outbound.close_round(self.core.clock(), self.core.round_lsn());
        let (number, gone) = (peer.number, self.transport.now() - suspension.since);
        self.posting.list(id);
        self.share.resumptions.fetch_add(1, Ordering::Relaxed);
        eprintln!(
            "fervor-server: client {number} is back after {:.3} s ({}): it goes on where it was",
            gone.as_secs_f64(),
            suspension.cause
        );
    }

    /// Ends the leases that are over. How many.
    pub(super) fn end_leases(&mut self) -> usize {
        if self.absent.suspended.is_empty() {
            return 0;
        }
        let now = self.transport.now();
        let over = self.absent.suspended.iter().filter(|(_, suspension)| suspension.until <= now);
        let over: Vec<_> = over.map(|(id, _)| *id).collect();
        let lease = self.absent.lease.as_secs_f64();
        over.iter().for_each(|id| self.give_up(*id, &format!(", and it was not back within {lease} s")));
        over.len()
    }

    /// The server stops: nobody can come back any more.
    pub(super) fn give_up_absent(&mut self) {
        let all: Vec<_> = self.absent.suspended.keys().copied().collect();
        all.into_iter().for_each(|id| self.give_up(id, ""));
        self.absent.lease = Duration::ZERO;
    }

    fn give_up(&mut self, id: ClientId, how: &str) {
        if let Some(suspension) = self.absent.suspended.remove(&id) {
            self.bury(id, &format!("{}{how}", suspension.cause));
        }
    }
}
