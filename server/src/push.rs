//! Rounds: who gets which row, from which stable memory, and what is said after it.
//!
//! When the shard clock rises to `C`, every row changed since the last round goes to every client that holds
//! it; then each client gets an immediate that says `C`. A push carries a header of its own for each subscriber
//! (`included`: the subscriber's last applied batch; `clock`: the shard clock), and the data once for all.
//!
//! ```text
//!   staging entry   │ data │ header for client 1 │ header for client 2 │ ...
//!   WRITE to 1      gather [header 1, data] ─▶ slot of client 1
//! ```
//!
//! **Why a copy is current.** The immediate of `C` is posted behind every push that belongs to it, on the same
//! connection; when the client has polled it, all of them are visible. A row that was not pushed has not
//! changed. A row subscribed meanwhile was pushed when the subscription was processed, with the clock of
//! that moment in its header; if that is below `C`, the round of `C` came later and covered it. So a filled slot's
//! copy is as of `max(header.clock, C)`, and the first push is the acknowledgement of the subscription.
//!
//! **A client that cannot take more** (send queue full, staging full, no receive buffer for the immediate) has its rows
//! queued, each once, and its round closed later, at the clock of that time. Nobody else waits.

use fervor_protocol::{
    ack::Immediate,
    limits::{REPLY_BYTES, ROW_HEADER},
    mutants::{Mutant, mutant},
    row::Header,
};
use fervor_verbs::transport::{Connection, ConnectionId, Payload, PostError, Region, Sge, Transport};
use zerocopy::IntoBytes;

use crate::{
    peer::{FAULT_ID, Peer, Wanted},
    poller::Poller,
    shard::{Subscriber, TableId},
    staging::{Entry, Staging},
};

/// A row copied to staging memory, with room for headers behind it.
#[derive(Clone, Copy)]
struct Snapshot {
    entry: Entry,
    header: Header,
    row_bytes: usize,
}

impl Snapshot {
    fn header_offset(&self, index: usize) -> usize {
        self.entry.offset() + self.row_bytes.next_multiple_of(ROW_HEADER) + index * ROW_HEADER
    }
}

impl<T: Transport> Poller<T> {
    /// The shard clock has risen: pushes what changed, and has the round closed at every client.
    pub(crate) fn round(&mut self, clock: u64) {
        for table in 0..self.shard.tables.len() {
            if self.shard.tables[table].in_rounds() {
                self.push_dirty(table);
            }
        }
        for peer in self.peers.values_mut().filter(|peer| !peer.condemned) {
            peer.round = Some(clock);
        }
        self.pump_all();
    }

    /// Pushes the rows of a table that have changed.
    pub(crate) fn push_dirty(&mut self, table: usize) {
        for row in self.shard.tables[table].take_dirty() {
            self.push_row(table as TableId, row);
        }
    }

    /// Pushes a row to all its subscribers; those that cannot take it get it queued.
    pub(crate) fn push_row(&mut self, table: TableId, row: u64) {
        let mut subscribers =
            std::mem::take(&mut self.shard.tables[table as usize].subscribers[row as usize]);
        subscribers.retain(|subscriber| self.clients.contains_key(&subscriber.client));
        let snapshot = self.snapshot(table, row, subscribers.len());
        let value_bounded = self.shard.tables[table as usize].value_bounded();
        for (index, subscriber) in subscribers.iter_mut().enumerate() {
            let peer = self.peers.get_mut(&self.clients[&subscriber.client]).expect("a client has a peer");
            let queued = subscriber.queued || !peer.queue.is_empty() || !peer.has_room();
            if value_bounded && !(queued && mutant(Mutant::QueuedUnproved)) {
                peer.visible.pushed();
            }
            if subscriber.queued {
                continue;
            }
            let Some(snapshot) = snapshot.filter(|_| peer.queue.is_empty() && peer.has_room()) else {
                if mutant(Mutant::PushDropped) {
                    continue;
                }
                subscriber.queued = true;
                peer.queue.push_back(Wanted { table, row, slot: subscriber.slot, once: false });
                continue;
            };
            let clock = self.shard.clock.shard();
            let seal = &self.shard.tables[table as usize].seal;
            let header = seal.reseal(snapshot.header, peer.numbers.last(), clock);
            post(&mut self.staging, peer, &snapshot, index, header, subscriber.slot);
        }
        if let Some(snapshot) = snapshot {
            self.staging.release(snapshot.entry);
        }
        self.shard.tables[table as usize].subscribers[row as usize] = subscribers;
    }

    /// Copies a row to staging memory, with room for `headers`. `None`: there is no room for it now.
    fn snapshot(&mut self, table: TableId, row: u64, headers: usize) -> Option<Snapshot> {
        let row_bytes = self.shard.tables[table as usize].row_bytes;
        let bytes = row_bytes.next_multiple_of(ROW_HEADER) + headers * ROW_HEADER;
        let entry = if headers > 0 { self.staging.reserve(bytes)? } else { return None };
        let (header, data) = self.shard.row(table, row);
        self.staging.region().memory().write(entry.offset(), data);
        Some(Snapshot { entry, header, row_bytes })
    }

    /// Posts, for every client, what waits and can go.
    pub(crate) fn pump_all(&mut self) -> usize {
        let ids: Vec<ConnectionId> = self.peers.keys().copied().collect();
        ids.into_iter().map(|id| self.pump(id)).sum()
    }

    /// Posts what waits for one client, as far as there is room, and rings once. Returns whether anything went.
    pub(crate) fn pump(&mut self, id: ConnectionId) -> usize {
        // A post that is refused because the connection is broken is of no matter: its end is about to be polled.
        let posted = self.try_pump(id).unwrap_or(0);
        let Some(peer) = self.peers.get_mut(&id) else { return 0 };
        let _ = peer.ask_for_completion().and_then(|()| peer.connection.ring());
        posted
    }

    fn try_pump(&mut self, id: ConnectionId) -> Result<usize, PostError> {
        let Some(peer) = self.peers.get_mut(&id) else { return Ok(0) };
        let mut posted = usize::from(peer.post_acks()?);
        while !peer.replies.is_empty() && peer.has_room() {
            let Some(entry) = self.staging.reserve(REPLY_BYTES) else { break };
            if peer.condemned {
                peer.receives.take_last();
            } else if !peer.receives.take() {
                self.staging.release(entry);
                break;
            }
            let reply = peer.replies.pop_front().expect("it is not empty");
            self.staging.region().memory().write(entry.offset(), &reply);
            let piece = Sge { region: self.staging.region(), offset: entry.offset(), length: reply.len() };
            let last = peer.condemned && peer.replies.is_empty();
            let sent = peer.reply(Payload::Gather(&[piece]), last.then_some(FAULT_ID), entry);
            if sent.is_err() {
                self.staging.release(entry);
            }
            sent?;
            posted += 1;
        }
        while let Some(wanted) = self.next_wanted(id) {
            let Some(snapshot) = self.snapshot(wanted.table, wanted.row, 1) else {
                return Ok(posted);
            };
            let peer = self.peers.get_mut(&id).expect("it was there");
            peer.queue.pop_front();
            self.unqueue(&wanted, id);
            let clock = self.shard.clock.shard();
            let peer = self.peers.get_mut(&id).expect("it was there");
            let seal = &self.shard.tables[wanted.table as usize].seal;
            let header = seal.reseal(snapshot.header, peer.numbers.last(), clock);
            post(&mut self.staging, peer, &snapshot, 0, header, wanted.slot);
            self.staging.release(snapshot.entry);
            posted += 1;
        }
        let peer = self.peers.get_mut(&id).expect("it was there");
        if let Some(sequence) = peer.closed.filter(|_| peer.has_room())
            && peer.receives.take()
        {
            peer.closed = None;
            peer.announce(Immediate::Closed(sequence).encode())?;
            posted += 1;
        }
        if let Some(number) = peer.visible.tell().filter(|_| peer.has_room())
            && peer.receives.take()
        {
            peer.visible.told();
            peer.announce(Immediate::Visible(number).encode())?;
            posted += 1;
        }
        let early = mutant(Mutant::RoundBeforeQueue) && peer.connection.room() > 0;
        if let Some(clock) = peer.round.filter(|_| peer.queue.is_empty() && peer.has_room() || early)
            && peer.receives.take()
        {
            peer.round = None;
            if mutant(Mutant::RoundByPlainWrite) {
                peer.write_clock(clock)?;
            }
            peer.announce(Immediate::Round(clock).encode())?;
            posted += 1;
        }
        Ok(posted)
    }

    /// The first row in the queue that is still wanted and may be posted now; it stays there.
    fn next_wanted(&mut self, id: ConnectionId) -> Option<Wanted> {
        loop {
            let peer = self.peers.get_mut(&id).filter(|peer| peer.has_room())?;
            let wanted = *peer.queue.front()?;
            if wanted.once || self.subscriber(&wanted, id).is_some_and(|subscriber| subscriber.queued) {
                return Some(wanted);
            }
            let peer = self.peers.get_mut(&id).expect("it was there");
            peer.queue.pop_front();
        }
    }

    /// The subscription behind a queued push, unless it has been given up.
    fn subscriber(&mut self, wanted: &Wanted, id: ConnectionId) -> Option<&mut Subscriber> {
        let client = self.peers.get(&id)?.client;
        // A table that is not eager has no subscribers at all.
        let all = self.shard.tables[wanted.table as usize].subscribers.get_mut(wanted.row as usize)?;
        all.iter_mut().find(|s| s.client == client && s.slot == wanted.slot)
    }

    fn unqueue(&mut self, wanted: &Wanted, id: ConnectionId) {
        if let Some(subscriber) = self.subscriber(wanted, id).filter(|_| !wanted.once) {
            subscriber.queued = false;
        }
    }
}

/// Posts the WRITE of a snapshot with `header` to `slot`; the peer has room.
fn post<C: Connection>(
    staging: &mut Staging<C::Region>,
    peer: &mut Peer<C>,
    snapshot: &Snapshot,
    index: usize,
    header: Header,
    slot: u64,
) {
    let offset = snapshot.header_offset(index);
    staging.region().memory().write(offset, header.as_bytes());
    staging.retain(snapshot.entry);
    let region = staging.region();
    let pieces = [
        Sge { region, offset, length: ROW_HEADER },
        Sge { region, offset: snapshot.entry.offset(), length: snapshot.row_bytes },
    ];
    let bytes = ROW_HEADER + snapshot.row_bytes;
    if peer.push(Payload::Gather(&pieces), slot, bytes, snapshot.entry).is_err() {
        // The connection is broken; its end is about to be polled.
        staging.release(snapshot.entry);
    }
    if mutant(Mutant::PushFromLiveMemory) {
        peer.completed(FAULT_ID, |entry| staging.release(entry));
    }
}
