//! What of the value-bounded tables is visible to whom: the other half of [`fervor_protocol::value`].
//!
//! After each turn that applied batches, the rows that they changed in such tables are pushed to all who hold them.
//! A WRITE's completion does not say that the peer's processor sees it; that of a READ posted behind it does (transport
//! rule 3). So for each peer there is at most one READ on its way, the *proof*:
//!
//! ```text
//!   batch at LSN 7 ─▶ pushes to the peer ─▶ READ of a word of the peer, for LSN 7 ─▶ completed: proved = 7
//! ```
//!
//! | field | meaning |
//! |---|---|
//! | `pushed` | something was pushed, or queued for that, since the last proof was posted |
//! | `proof` | a READ is on its way, behind all pushes up to this LSN |
//! | `proved` | all pushes up to this LSN are visible at the peer |
//! | `batches` | the peer's own batches that it has not been told of: number and LSN |
//! | `tell` | number of its last batch that is visible to all, if it has to be told |
//!
//! The *visible LSN* of the shard is the least over the peers of `proved`, or of the shard's LSN where nothing is on its
//! way. It never falls: a peer that subscribes later fills its slot with what is in the row by then. A batch at or below
//! it is visible to all, and its client is told so by an immediate. A peer that holds nothing is never waited
//! for; one that dies, until its connection has ended.
//!
//! **Why a READ of a worker does no harm.** A `get` that READs returns what was in the row at some moment of that call,
//! and keeps no copy of it: rows of such tables enter caches by pushes alone.

use std::collections::VecDeque;

use fervor_verbs::transport::{ConnectionId, PostError, Sge, Transport};

use crate::{poller::Poller, staging::Entry};

/// Of one peer; see the module.
#[derive(Debug, Default)]
pub struct Visible {
    pushed: bool,
    proof: Option<Proof>,
    proved: u64,
    batches: VecDeque<(u64, u64)>,
    tell: Option<u64>,
}

/// A READ on its way.
#[derive(Debug)]
struct Proof {
    lsn: u64,
    /// The last WRITE from staging before it.
    serial: u64,
    /// Where it puts the word.
    entry: Entry,
}

impl Visible {
    /// A row of a value-bounded table was pushed, or queued for that.
    pub fn pushed(&mut self) {
        self.pushed = true;
    }

    /// Batch `number` of this peer was applied at `lsn`.
    pub fn applied(&mut self, number: u64, lsn: u64) {
        self.batches.push_back((number, lsn));
    }

    /// Number of the batch to tell the peer of.
    pub fn tell(&self) -> Option<u64> {
        self.tell
    }

    /// It is told.
    pub fn told(&mut self) {
        self.tell = None;
    }

    /// All up to this LSN is visible at the peer of a shard that stands at `lsn`.
    fn proved(&self, lsn: u64) -> u64 {
        if self.pushed || self.proof.is_some() { self.proved } else { lsn }
    }

    /// All up to this LSN is visible at every peer.
    fn rise(&mut self, visible: u64) {
        while let Some(&(number, lsn)) = self.batches.front()
            && lsn <= visible
        {
            self.batches.pop_front();
            self.tell = Some(number);
        }
    }
}

impl<T: Transport> Poller<T> {
    /// Pushes what batches changed in value-bounded tables.
    pub(crate) fn push_changes(&mut self) {
        for table in 0..self.shard.tables.len() {
            if self.shard.tables[table].value_bounded() {
                self.push_dirty(table);
            }
        }
    }

    /// Posts the proofs that are due, and leaves word for the clients whose batches have become visible to all.
    pub(crate) fn follow_visible(&mut self) {
        let lsn = self.shard.lsn();
        for peer in self.peers.values_mut().filter(|peer| !peer.condemned) {
            let all_posted = peer.queue.is_empty();
            let due = peer.visible.pushed && peer.visible.proof.is_none() && all_posted;
            if !due || !peer.has_room() {
                continue;
            }
            let Some(entry) = self.staging.reserve(8) else { break };
            let into = Sge { region: self.staging.region(), offset: entry.offset(), length: 8 };
            match peer.prove(into) {
                Ok(()) => {
                    peer.visible.pushed = false;
                    peer.visible.proof = Some(Proof { lsn, serial: peer.serial(), entry });
                }
                // The connection is broken; its end is about to be polled.
                Err(PostError::Full | PostError::Disconnected) => self.staging.release(entry),
            }
        }
        let listening = || self.peers.values().filter(|peer| !peer.condemned && !peer.left);
        let visible = listening().map(|peer| peer.visible.proved(lsn)).min().unwrap_or(lsn);
        self.peers.values_mut().for_each(|peer| peer.visible.rise(visible));
    }

    /// The proof of a peer is here (`ok`), or its connection has ended.
    pub(crate) fn proved(&mut self, connection: ConnectionId, ok: bool) {
        let Some(peer) = self.peers.get_mut(&connection) else { return };
        if let Some(Proof { lsn, serial, entry }) = peer.visible.proof.take() {
            self.staging.release(entry);
            if ok {
                peer.visible.proved = lsn;
                peer.completed(serial, |entry| self.staging.release(entry));
            } else {
                peer.visible.pushed = true;
            }
        }
    }
}
