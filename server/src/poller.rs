//! A polling thread: the one owner of a shard, its completion queue and its clients' connections.
//!
//! One turn takes mail, polls, applies what has come, closes a round if the shard clock rose, and posts what waits.
//! A turn with nothing to do makes no system call. After some idle turns (spinning, then yielding the
//! processor) the thread sleeps until the endpoint has something: on two cores, two pollers and two workers must
//! not starve each other. One-sided READs do not wake it.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering, mpsc::Receiver},
    time::Duration,
};

use fervor_protocol::{
    ack::Admit,
    batch::Batch,
    limits::{REPLY_BYTES, ROW_HEADER},
    mutants::{Mutant, mutant},
    wire::{
        self, Fault, Hello, Kind, MessageHeader, PUSH_ONCE, SUBSCRIBE, SlotRecord, TableReply, UNSUBSCRIBE,
    },
};
use fervor_verbs::transport::{
    Completion, Connection, ConnectionId, Endpoint, Export, ReceiveBuffer, Transport, WorkError,
};
use zerocopy::IntoBytes;

use crate::{
    Share,
    accept::Mail,
    peer::{FAULT_ID, PROOF_ID, Peer, Wanted},
    shard::{Shard, Subscriber},
    staging::Staging,
};

/// Longest sleep. Nothing is due at any time but the continuous pushes that wait for their budget: messages, ends of
/// connections, mail and the stop all wake the thread.
const SLEEP: Duration = Duration::from_secs(3600);
/// How long a stopping poller still takes what comes, and then waits for its clients to take their last message.
const FAREWELL: Duration = Duration::from_millis(500);

/// See the module.
pub struct Poller<T: Transport> {
    pub(crate) transport: T,
    endpoint: T::Endpoint,
    mail: Receiver<Mail<T::Connection>>,
    pub(crate) shard: Shard,
    pub(crate) staging: Staging<T::Region>,
    share: Arc<Share>,
    pub(crate) peers: BTreeMap<ConnectionId, Peer<T::Connection>>,
    /// Connection of each client that is in the vector clock or was.
    pub(crate) clients: BTreeMap<u64, ConnectionId>,
    readers: BTreeMap<ConnectionId, T::Connection>,
    next_client: u64,
    completions: Vec<Completion>,
    /// Completions of connections whose mail has not come yet.
    early: Vec<Completion>,
    /// The shard clock rose to this in the present turn.
    rose: Option<u64>,
    /// When a budget allows the next continuous push, if rows wait for that.
    pub(crate) next_push: Option<Duration>,
    /// Registration of the shard's rows: lives as long as the connections through which they are read.
    _export: Box<dyn Export>,
}

impl<T: Transport> Poller<T> {
    pub fn new(
        transport: T,
        endpoint: T::Endpoint,
        mail: Receiver<Mail<T::Connection>>,
        shard: Shard,
        staging: Staging<T::Region>,
        share: Arc<Share>,
        export: Box<dyn Export>,
    ) -> Self {
        Self {
            transport,
            endpoint,
            mail,
            shard,
            staging,
            share,
            peers: BTreeMap::new(),
            clients: BTreeMap::new(),
            readers: BTreeMap::new(),
            next_client: 1,
            completions: Vec::new(),
            early: Vec::new(),
            rose: None,
            next_push: None,
            _export: export,
        }
    }

    /// Runs until told to stop.
    pub fn run(mut self) {
        let mut idle = 0;
        while !self.share.stop.load(Ordering::Acquire) {
            if self.turn() > 0 {
                idle = 0;
            } else if idle < T::AWAKE_TURNS {
                self.transport.relax(idle);
                idle += 1;
            } else {
                self.endpoint.wait(self.until_next_push().unwrap_or(SLEEP));
            }
        }
        self.farewell();
    }

    /// What has been received is applied, clients are told, and get some time to take it.
    fn farewell(&mut self) {
        // Busy clients could go on for ever.
        let end = self.transport.now() + FAREWELL;
        while self.turn() > 0 && self.transport.now() < end {}
        let ids: Vec<_> = self.peers.keys().copied().collect();
        for id in ids {
            self.condemn(id, "the server stops");
        }
        self.pump_all();
        let end = self.transport.now() + FAREWELL;
        let mut turn = 0;
        while !self.peers.is_empty() && self.transport.now() < end {
            self.turn();
            self.transport.relax(turn);
            turn += 1;
        }
    }

    /// Does what there is to do; returns how much that was.
    fn turn(&mut self) -> usize {
        let mut work = self.take_mail();
        let mut completions = std::mem::take(&mut self.completions);
        completions.append(&mut self.early);
        let waiting = completions.len();
        self.endpoint.poll(&mut completions);
        work += completions.len() - waiting;
        for completion in completions.drain(..) {
            self.complete(completion);
        }
        self.completions = completions;
        if work > 0 && self.shard.value_bounded() {
            self.push_changes();
        }
        if let Some(clock) = self.rose.take() {
            self.share.clock.store(clock, Ordering::Release);
            self.round(clock);
        } else if work > 0 || self.peers.values().any(Peer::busy) {
            work += self.pump_all();
        }
        if work > 0 && self.shard.value_bounded() {
            self.follow_visible();
            work += self.pump_all();
        }
        let pushed = self.push_continuously();
        if pushed > 0 {
            work += pushed + self.pump_all();
        }
        work
    }

    fn take_mail(&mut self) -> usize {
        let mut taken = 0;
        while let Ok(Mail { connection, hello }) = self.mail.try_recv() {
            taken += 1;
            match hello {
                None => drop(self.readers.insert(connection.id(), connection)),
                Some(hello) => self.join(connection, &hello),
            }
        }
        taken
    }

    fn join(&mut self, connection: T::Connection, hello: &Hello) {
        let (id, client) = (connection.id(), self.next_client);
        self.next_client += 1;
        let mut peer = match Peer::new(client, connection, hello, self.share.credits) {
            Ok(peer) => peer,
            Err((text, mut connection)) => {
                eprintln!("fervor-server: client {client} refused: {text}");
                self.share.clients.fetch_sub(1, Ordering::Release);
                // It did not even say where to answer. Kept until its end has been polled.
                connection.disconnect();
                self.readers.insert(id, connection);
                return;
            }
        };
        // The clock may have risen since the handshake told it.
        peer.round = Some(self.shard.clock.shard());
        self.peers.insert(id, peer);
        match self.shard.clock.join(client, hello.clients.into()) {
            Ok(()) => drop(self.clients.insert(client, id)),
            Err(expected) => {
                let text = format!(
                    "the running job has {expected} clients, and this one says {}: give all the same number",
                    hello.clients
                );
                self.condemn(id, &text);
            }
        }
    }

    fn complete(&mut self, completion: Completion) {
        let connection = match &completion {
            Completion::Work { connection, .. }
            | Completion::Received { connection, .. }
            | Completion::WriteImmediate { connection, .. }
            | Completion::Disconnected { connection, .. } => *connection,
        };
        if !self.peers.contains_key(&connection) && !self.readers.contains_key(&connection) {
            return self.early.push(completion);
        }
        match completion {
            Completion::Received { buffer, .. } => self.received(connection, buffer),
            Completion::Work { id, result, .. } => self.worked(connection, id, result.is_ok()),
            // Clients write nothing here: no memory of a server is remotely writable.
            Completion::WriteImmediate { .. } => self.condemn(connection, "a client sends no immediates"),
            Completion::Disconnected { cause, .. } => self.gone(connection, cause),
        }
    }

    fn worked(&mut self, connection: ConnectionId, id: u64, ok: bool) {
        let Some(peer) = self.peers.get_mut(&connection) else { return };
        if id == PROOF_ID {
            return self.proved(connection, ok);
        }
        peer.completed(id, |entry| self.staging.release(entry));
        if id == FAULT_ID {
            peer.connection.disconnect();
        }
    }

    fn gone(&mut self, connection: ConnectionId, cause: WorkError) {
        self.readers.remove(&connection);
        self.proved(connection, false);
        let Some(mut peer) = self.peers.remove(&connection) else { return };
        peer.completed(FAULT_ID, |entry| self.staging.release(entry));
        self.clients.remove(&peer.client);
        if !peer.left {
            self.share.clients.fetch_sub(1, Ordering::Release);
        }
        if !peer.left && !peer.condemned {
            eprintln!("fervor-server: client {} is gone ({cause}); the others go on without it", peer.client);
        }
        if !mutant(Mutant::DeadStays) {
            self.rose = self.shard.clock.leave(peer.client).or(self.rose);
        }
    }

    fn received(&mut self, connection: ConnectionId, buffer: ReceiveBuffer) {
        let message = self.endpoint.message(&buffer);
        let outcome = match self.peers.get_mut(&connection) {
            Some(peer) if !peer.condemned => {
                handle(&mut self.shard, peer, message, &mut self.rose, &self.share)
            }
            Some(_) => Ok(()),
            None => Err(Fault::State("a reader's connection carries READs only".into())),
        };
        // The credit goes back only now that the message has been applied.
        self.endpoint.release(buffer);
        match outcome {
            Ok(()) => {}
            Err(fault) if self.peers.contains_key(&connection) => {
                self.condemn(connection, &fault.to_string())
            }
            Err(_) => {
                if let Some(reader) = self.readers.get_mut(&connection) {
                    reader.disconnect();
                }
            }
        }
    }

    /// Tells a client what it did wrong, listens to it no more, and ends the connection when it has been told.
    fn condemn(&mut self, connection: ConnectionId, text: &str) {
        let Some(peer) = self.peers.get_mut(&connection) else { return };
        if peer.condemned {
            return;
        }
        eprintln!("fervor-server: client {}: {text}", peer.client);
        let client = peer.client;
        peer.condemned = true;
        peer.queue.clear();
        peer.replies.clear();
        (peer.round, peer.closed) = (None, None);
        let mut reply = wire::reply(Kind::Fault, 0, text.as_bytes());
        reply.truncate(REPLY_BYTES);
        peer.replies.push_back(reply);
        self.clients.remove(&client);
        self.rose = self.shard.clock.leave(client).or(self.rose);
    }
}

/// Does what a message says.
fn handle<C: Connection>(
    shard: &mut Shard,
    peer: &mut Peer<C>,
    message: &[u8],
    rose: &mut Option<u64>,
    share: &Share,
) -> Result<(), Fault> {
    let header = MessageHeader::parse(message)?;
    if header.sequence != peer.sequence + 1 {
        return Err(Fault::State(format!(
            "sequence = {}, but {} is next",
            header.sequence,
            peer.sequence + 1
        )));
    }
    peer.check_credits(header.sequence).map_err(Fault::State)?;
    peer.receives.update(header.returned).map_err(Fault::State)?;
    let mut lsn = None;
    if peer.left {
        return Err(Fault::State(format!("kind = {}, but the client has left", header.kind)));
    }
    match header.kind()? {
        Kind::Batch => lsn = Some(batch(shard, peer, &header, message, rose)?),
        Kind::Slots => {
            for record in wire::slot_records(&header, message)? {
                slot(shard, peer, &record, header.sequence)?;
            }
        }
        Kind::CreateTable => {
            let (schema, number, shards) = wire::decode_table(message)?;
            let reply = match shard.create(schema, number, shards) {
                Ok((table, offset)) => {
                    let body = TableReply { offset: offset as u64, table, reserved: 0 };
                    wire::reply(Kind::Table, header.sequence, body.as_bytes())
                }
                Err(text) => wire::reply(Kind::Refused, header.sequence, text.as_bytes()),
            };
            peer.replies.push_back(reply[..reply.len().min(REPLY_BYTES)].to_vec());
        }
        Kind::Credit => {}
        Kind::Leave => {
            peer.left = true;
            // It sends nothing more: its receive buffers are free for another client from now on.
            share.clients.fetch_sub(1, Ordering::Release);
            *rose = shard.clock.leave(peer.client).or(*rose);
        }
        kind @ (Kind::Table | Kind::Refused | Kind::Fault) => return Err(Fault::Kind(kind as u8)),
    }
    peer.sequence = header.sequence;
    peer.acknowledge(header.sequence, lsn.unwrap_or(shard.lsn()));
    Ok(())
}

/// Applies a batch, once. Returns the LSN at which it was applied.
fn batch<C: Connection>(
    shard: &mut Shard,
    peer: &mut Peer<C>,
    header: &MessageHeader,
    message: &[u8],
    rose: &mut Option<u64>,
) -> Result<u64, Fault> {
    let batch = Batch::parse(header, message)?;
    match peer.numbers.admit(batch.number) {
        Admit::Duplicate { lsn } => {
            if mutant(Mutant::ReplayApplied) {
                shard.apply(&batch);
            }
            return Ok(lsn);
        }
        Admit::Gap { expected } => {
            return Err(Fault::State(format!("batch number = {}, but {expected} is next", batch.number)));
        }
        Admit::Apply => {}
    }
    if mutant(Mutant::BatchByHalves)
        && let Err(Fault::Field { record, .. }) = shard.check(&batch)
    {
        shard.apply(&batch.first(record));
    }
    shard.check(&batch)?;
    let before = shard.lsn();
    shard.apply(&batch);
    peer.numbers.applied(batch.number, shard.lsn());
    if shard.value_bounded() {
        peer.visible.applied(batch.number, shard.lsn());
    }
    if let Some(clock) = batch.clock {
        *rose = shard.clock.tick(peer.client, clock).or(*rose);
    }
    Ok(if mutant(Mutant::AcknowledgedBeforeApplied) { before } else { shard.lsn() })
}

/// Does what a client wishes for one of its slots.
fn slot<C: Connection>(
    shard: &mut Shard,
    peer: &mut Peer<C>,
    record: &SlotRecord,
    sequence: u64,
) -> Result<(), Fault> {
    let bad = |text: String| Err(Fault::State(text));
    let SlotRecord { row, slot, table, wish } = *record;
    let Some(found) = shard.tables.get_mut(table as usize) else {
        return bad(format!("slot record: table = {table}, which there is not"));
    };
    if row >= found.rows {
        return bad(format!("slot record: row = {row}, but {} rows are in this shard", found.rows));
    }
    if !peer.target.fits(slot, ROW_HEADER + found.row_bytes) {
        return bad(format!("slot record: slot = {slot} is outside the client's region"));
    }
    match wish {
        SUBSCRIBE if found.eager() => {
            let all = &mut found.subscribers[row as usize];
            if all.iter().any(|s| s.client == peer.client) {
                return bad(format!("slot record: row = {row} is subscribed already"));
            }
            all.push(Subscriber { client: peer.client, slot, queued: true });
            if mutant(Mutant::DirtyForgotten) {
                found.forget(row);
            }
            peer.queue.push_back(Wanted { table, row, slot, once: false });
        }
        UNSUBSCRIBE if found.eager() => {
            found.subscribers[row as usize].retain(|s| s.client != peer.client || s.slot != slot);
            peer.closed = Some(sequence);
        }
        PUSH_ONCE if mutant(Mutant::AskIgnored) => {}
        PUSH_ONCE => peer.queue.push_back(Wanted { table, row, slot, once: true }),
        _ => return bad(format!("slot record: wish = {wish} of a table that is not pushed")),
    }
    Ok(())
}
