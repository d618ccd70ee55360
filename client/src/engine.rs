//! The client's one endpoint for messages: what any of its threads does when it waits or ends a clock.
//!
//! There is no thread of its own. Whoever holds the lock polls, takes acknowledgements and immediates, and
//! sends what is due; the others go on or wait for it. What the threads leave for each other is in [`Link`]: one per
//! shard.
//!
//! | field of `Link` | written | read |
//! |---|---|---|
//! | `clock` | by the holder, after the round's immediate was polled | by workers, before they look at a copy |
//! | `joined` | by the holder, after the first round's `clock` | by the thread that connects |
//! | `visible` | by the holder, when the shard said so | by workers that wait for their updates to be visible to all |
//! | `acknowledged` | by the holder, after the tables were told | by workers that cannot decide about a READ |
//! | `due` | by the worker whose `clock()` raised the client's clock, after all was merged | by the holder, before it sends |
//! | `announced` | by the holder, after the batch that ends the clock was posted | by that worker |
//! | `flush` | by threads, after they merged | by the holder, before it looks for updates |
//! | `posted`, then `flushed` | by the holder, after the batch was posted | by threads that asked |
//! | `wishes` | by workers | by the holder |
//!
//! **Why nothing is late.** The batch that ends clock `c` is posted when, after `due >= c` was read, no unsent
//! update was left; every update stamped below `c` had been merged before `due` was raised.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use crossbeam_utils::CachePadded;
use fervor_protocol::{
    ack::{Immediate, SendWindow, Told, ack_offset, acknowledged},
    batch::BatchWriter,
    limits::{ACK_RING, CLIENT_RECEIVES, MESSAGE_BYTES},
    mutants::{Mutant, mutant},
    wire::{Kind, MessageHeader, SlotRecord, TableReply, UNSUBSCRIBE, Welcome},
};
use fervor_verbs::{
    Address, Error as TransportError, Memory,
    transport::{
        Access, Completion, Connection, ConnectionId, Endpoint, Payload, PostError, Region, Sge, Transport,
    },
};
use zerocopy::{FromBytes, IntoBytes};

use crate::{cache::Slot, error::Error, table::AnyTable};

/// Bytes of a control block: the ring of acknowledgements, then the pushed bytes.
pub const CONTROL_BYTES: usize = (ACK_RING + 8) * 8;

/// A wish for a slot, on its way to a shard.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    pub record: SlotRecord,
    pub table: usize,
    pub slot: Slot,
}

/// What the threads of a client know of one shard. See the module.
#[derive(Debug)]
pub struct Link {
    pub address: Address,
    /// Number of the shard in its server.
    pub shard: u16,
    pub welcome: Welcome,
    /// Byte offset of the control block in the client's region.
    pub control: usize,
    pub clock: CachePadded<AtomicU64>,
    /// The shard has closed a round, so it has taken this client into its vector clock.
    pub joined: AtomicBool,
    pub acknowledged: AtomicU64,
    /// Number of this client's last batch that is visible to all: value-bounded tables.
    pub visible: AtomicU64,
    pub due: AtomicU64,
    pub announced: AtomicU64,
    /// How often everything unsent was asked to be sent, though no clock ends.
    pub flush: AtomicU64,
    /// All that was unsent when that had been asked so often is posted, in batches up to `posted`.
    pub flushed: AtomicU64,
    /// Number of the last batch posted.
    pub posted: AtomicU64,
    pub wishes: Mutex<Vec<Wish>>,
    /// Why it is of no more use.
    pub end: OnceLock<Error>,
}

impl Link {
    pub fn new(address: Address, shard: u16, welcome: Welcome, control: usize) -> Self {
        Self {
            address,
            shard,
            welcome,
            control,
            clock: CachePadded::new(AtomicU64::new(welcome.clock)),
            joined: AtomicBool::new(false),
            acknowledged: AtomicU64::new(0),
            visible: AtomicU64::new(0),
            due: AtomicU64::new(0),
            announced: AtomicU64::new(0),
            flush: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            posted: AtomicU64::new(0),
            wishes: Mutex::new(Vec::new()),
            end: OnceLock::new(),
        }
    }

    /// Asks for everything unsent to be sent. It is when `flushed` is what this returns, or more.
    pub fn ask_flush(&self) -> u64 {
        // SYNC POINT: releases what was merged.
        self.flush.fetch_add(1, Ordering::AcqRel) + 1
    }

    fn flush_wanted(&self) -> bool {
        self.flush.load(Ordering::Acquire) > self.flushed.load(Ordering::Relaxed)
    }

    /// The shard's server is gone, as a completion says.
    pub fn lose(&self, cause: impl ToString) {
        let lost = Error::ServerLost { address: self.address.to_string(), cause: cause.to_string() };
        let _ = self.end.set(lost);
    }
}

/// Number of a batch, and the rows of each table in it.
type BatchRows = (u64, Vec<(usize, Vec<u64>)>);

/// A message that has not been acknowledged.
struct Sent {
    batch: Option<BatchRows>,
    /// Slots given up in it, by table.
    closing: Vec<(usize, Slot)>,
}

/// A connection to one shard.
struct Channel<C> {
    connection: C,
    window: SendWindow,
    sent: VecDeque<Sent>,
    /// Sequence of the last SEND that completed: its buffer is ours again.
    completed: u64,
    /// Number of the last batch.
    batch: u64,
    /// Receive buffers used by the shard and given back, and how many it has been told of.
    polled: u64,
    told: u64,
    /// What immediates told.
    heard: Told,
    /// Slots given up, with the sequence after which they are free.
    closing: VecDeque<(u64, usize, Slot)>,
    /// The shard was told that this client leaves: it is sent nothing more.
    left: bool,
    /// Answers to requests, by sequence.
    replies: BTreeMap<u64, Result<TableReply, String>>,
}

/// See the module.
pub struct Engine<T: Transport> {
    pub endpoint: T::Endpoint,
    /// Where the shards write: control blocks and slots.
    control: Memory,
    channels: Vec<Channel<T::Connection>>,
    by_id: BTreeMap<ConnectionId, usize>,
    /// Messages lie here until they are acknowledged and their SEND has completed.
    outbox: T::Region,
    scratch: Vec<u8>,
    completions: Vec<Completion>,
    pub bytes_sent: u64,
}

/// What an engine needs of the client.
pub struct Surroundings<'a> {
    pub links: &'a [Link],
    pub tables: &'a RwLock<Vec<Arc<dyn AnyTable>>>,
}

impl<T: Transport> Engine<T> {
    /// With a connection to each shard, in the order of the links.
    pub fn new(
        transport: &T,
        endpoint: T::Endpoint,
        control: Memory,
        connections: Vec<T::Connection>,
        links: &[Link],
    ) -> Result<Self, TransportError> {
        let credits: usize = links.iter().map(|link| link.welcome.credits as usize).sum();
        let outbox = Memory::new("fervor-outbox", credits * MESSAGE_BYTES)?;
        Ok(Self {
            endpoint,
            control,
            by_id: connections.iter().enumerate().map(|(shard, c)| (c.id(), shard)).collect(),
            channels: connections
                .into_iter()
                .zip(links)
                .map(|(connection, link)| Channel {
                    connection,
                    window: SendWindow::new(link.welcome.credits as usize),
                    sent: VecDeque::new(),
                    completed: 0,
                    batch: 0,
                    polled: 0,
                    told: 0,
                    heard: Told { round: link.welcome.clock, ..Told::default() },
                    closing: VecDeque::new(),
                    left: false,
                    replies: BTreeMap::new(),
                })
                .collect(),
            outbox: transport.register(&outbox, Access::Local)?,
            scratch: vec![0; MESSAGE_BYTES],
            completions: Vec::new(),
            bytes_sent: 0,
        })
    }

    /// Polls once, and sends what is due. Returns how much that was.
    pub fn progress(&mut self, around: &Surroundings<'_>) -> usize {
        let mut completions = std::mem::take(&mut self.completions);
        let mut work = self.endpoint.poll(&mut completions);
        for completion in completions.drain(..) {
            self.complete(completion, around);
        }
        self.completions = completions;
        for shard in 0..self.channels.len() {
            if around.links[shard].end.get().is_none() {
                work += self.take_acknowledgements(shard, around);
                work += self.send_due(shard, around);
            }
        }
        work
    }

    /// The slots that shards have announced free, and their answers, are taken; see [`Channel`].
    fn complete(&mut self, completion: Completion, around: &Surroundings<'_>) {
        match completion {
            Completion::Work { connection, id, result: Ok(()) } => {
                let channel = &mut self.channels[self.by_id[&connection]];
                channel.completed = channel.completed.max(id);
            }
            // The connection is breaking; its end comes with the cause.
            Completion::Work { result: Err(_), .. } => {}
            Completion::WriteImmediate { connection, immediate } => {
                let shard = self.by_id[&connection];
                self.immediate(shard, immediate, around);
            }
            Completion::Received { connection, buffer, .. } => {
                let shard = self.by_id[&connection];
                let link = &around.links[shard];
                let channel = &mut self.channels[shard];
                channel.polled += 1;
                if let Err(error) = receive(channel, link, self.endpoint.message(&buffer)) {
                    let _ = link.end.set(error);
                }
                self.endpoint.release(buffer);
            }
            Completion::Disconnected { connection, cause } => {
                around.links[self.by_id[&connection]].lose(cause);
            }
        }
    }

    fn immediate(&mut self, shard: usize, bits: u32, around: &Surroundings<'_>) {
        let (channel, link) = (&mut self.channels[shard], &around.links[shard]);
        channel.polled += 1;
        match Immediate::decode(bits, &channel.heard) {
            Ok(Immediate::Round(clock)) => {
                channel.heard.round = clock;
                // SYNC POINT: the pushes of the round are visible; who acquires the clock may rely on it.
                link.clock.fetch_max(clock, Ordering::Release);
                link.joined.store(true, Ordering::Release);
            }
            Ok(Immediate::Closed(sequence)) => {
                channel.heard.closed = sequence;
                channel.free_closed(around);
            }
            Ok(Immediate::Visible(batch)) => {
                channel.heard.visible = batch;
                link.visible.fetch_max(batch, Ordering::Release);
            }
            Err(bits) => link.lose(format!("it sent an immediate of no kind: {bits:#x}")),
        }
    }

    fn take_acknowledgements(&mut self, shard: usize, around: &Surroundings<'_>) -> usize {
        let (channel, link) = (&mut self.channels[shard], &around.links[shard]);
        let mut taken = 0;
        if mutant(Mutant::RoundByPlainWrite) {
            link.clock.fetch_max(self.control.load(link.control + (ACK_RING + 1) * 8), Ordering::Release);
        }
        while let Some(sequence) = channel.window.awaited() {
            let word = self.control.load(link.control + ack_offset(sequence));
            let Some(lsn) = acknowledged(word, sequence) else { break };
            channel.window.acknowledge();
            let sent = channel.sent.pop_front().expect("every message that is out is listed");
            channel.closing.extend(sent.closing.into_iter().map(|(table, slot)| (sequence, table, slot)));
            if let Some((number, tables)) = sent.batch {
                let all = around.tables.read().unwrap_or_else(PoisonError::into_inner);
                for (table, rows) in tables {
                    all[table].acknowledged(shard, number, lsn, &rows);
                }
                link.acknowledged.store(number, Ordering::Release);
            }
            taken += 1;
        }
        // Words and immediates are found in either order: what this message gave up may have been announced free.
        channel.free_closed(around);
        taken
    }

    /// Sends what the threads have left for `shard`, as far as credits go.
    fn send_due(&mut self, shard: usize, around: &Surroundings<'_>) -> usize {
        let mut sent = 0;
        loop {
            let (channel, link) = (&self.channels[shard], &around.links[shard]);
            if channel.left || !channel.can_send() {
                break;
            }
            let wishes = {
                let mut all = link.wishes.lock().unwrap_or_else(PoisonError::into_inner);
                let room = link.welcome.message_bytes as usize - size_of::<MessageHeader>();
                let most = room / size_of::<SlotRecord>();
                let count = all.len().min(most);
                all.drain(..count).collect::<Vec<_>>()
            };
            // SYNC POINT: all updates below `due` were merged before it was raised.
            let due = link.due.load(Ordering::Acquire);
            let clock = (due > link.announced.load(Ordering::Relaxed)).then_some(due);
            let outcome = if !wishes.is_empty() {
                self.send_wishes(shard, &wishes).map(|()| true)
            } else if clock.is_some() || link.flush_wanted() {
                self.send_batch(shard, clock, around)
            } else if (channel.polled - channel.told) * 2 >= CLIENT_RECEIVES as u64 {
                self.send(shard, Kind::Credit, &[]).map(|_| true)
            } else {
                Ok(false)
            };
            match outcome {
                Ok(true) => sent += 1,
                // A broken connection: its end is about to be polled.
                Ok(false) | Err(_) => break,
            }
        }
        // As above.
        let _ = self.channels[shard].connection.ring();
        sent
    }

    fn send_wishes(&mut self, shard: usize, wishes: &[Wish]) -> Result<(), PostError> {
        let body: Vec<u8> = wishes.iter().flat_map(|wish| wish.record.as_bytes().to_vec()).collect();
        self.send(shard, Kind::Slots, &body)?;
        let given_up = wishes.iter().filter(|wish| wish.record.wish == UNSUBSCRIBE);
        let sent = self.channels[shard].sent.back_mut().expect("it was just sent");
        sent.closing = given_up.map(|wish| (wish.table, wish.slot)).collect();
        Ok(())
    }

    /// Sends a batch of unsent updates; the last one ends `clock`. Whether there was one to send.
    fn send_batch(
        &mut self,
        shard: usize,
        clock: Option<u64>,
        around: &Surroundings<'_>,
    ) -> Result<bool, PostError> {
        let (channel, link) = (&mut self.channels[shard], &around.links[shard]);
        let number = channel.batch + 1;
        let length = self.scratch.len().min(link.welcome.message_bytes as usize);
        let mut writer = BatchWriter::new(&mut self.scratch[..length]);
        // SYNC POINT: what was merged before it was asked is seen below.
        let wanted = link.flush.load(Ordering::Acquire);
        let (mut tables, mut all) = (Vec::new(), true);
        for (table, core) in around.tables.read().unwrap_or_else(PoisonError::into_inner).iter().enumerate() {
            let mut rows = Vec::new();
            all = core.encode(shard, number, &mut writer, &mut rows);
            if !rows.is_empty() {
                tables.push((table, rows));
            }
            if !all {
                break;
            }
        }
        let clock = clock.filter(|_| all || mutant(Mutant::ClockEndsEarly));
        if writer.records() == 0 && clock.is_none() {
            link.flushed.store(wanted, Ordering::Release);
            return Ok(false);
        }
        channel.batch = number;
        let sequence = channel.window.take().expect("there is a credit");
        let length = writer.finish(sequence, channel.polled, number, clock);
        channel.told = channel.polled;
        self.post(shard, sequence, length, Some((number, tables)))?;
        link.posted.store(number, Ordering::Release);
        if all {
            link.flushed.store(wanted, Ordering::Release);
        }
        if let Some(clock) = clock {
            link.announced.store(clock, Ordering::Release);
        }
        Ok(true)
    }

    /// Sends a message of `kind` if there is a credit for it: its sequence.
    pub fn request(&mut self, shard: usize, kind: Kind, body: &[u8]) -> Option<u64> {
        if !self.channels[shard].can_send() {
            return None;
        }
        let sequence = self.send(shard, kind, body).ok();
        let _ = self.channels[shard].connection.ring();
        sequence
    }

    /// Says that no more messages will come, if there is a credit for it: whether there was.
    pub fn leave(&mut self, shard: usize) -> bool {
        self.channels[shard].left = self.request(shard, Kind::Leave, &[]).is_some();
        self.channels[shard].left
    }

    /// Sends a message; there is a credit, a buffer, and room in the queue.
    fn send(&mut self, shard: usize, kind: Kind, body: &[u8]) -> Result<u64, PostError> {
        let channel = &mut self.channels[shard];
        let sequence = channel.window.take().expect("there is a credit");
        let records = if kind == Kind::Slots { body.len() / size_of::<SlotRecord>() } else { 0 };
        let header = MessageHeader::new(kind, 0, records as u32, sequence, channel.polled);
        channel.told = channel.polled;
        let length = size_of::<MessageHeader>() + body.len();
        self.scratch[..size_of::<MessageHeader>()].copy_from_slice(header.as_bytes());
        self.scratch[size_of::<MessageHeader>()..length].copy_from_slice(body);
        self.post(shard, sequence, length, None)?;
        Ok(sequence)
    }

    /// Posts the message in the scratch buffer.
    fn post(
        &mut self,
        shard: usize,
        sequence: u64,
        length: usize,
        batch: Option<BatchRows>,
    ) -> Result<(), PostError> {
        let before: u64 = self.channels[..shard].iter().map(|c| c.window.credits()).sum();
        let channel = &mut self.channels[shard];
        let offset = (before + sequence % channel.window.credits()) as usize * MESSAGE_BYTES;
        self.outbox.memory().write(offset, &self.scratch[..length]);
        channel.sent.push_back(Sent { batch, closing: Vec::new() });
        self.bytes_sent += length as u64;
        let piece = Sge { region: &self.outbox, offset, length };
        channel.connection.send(Payload::Gather(&[piece]), None, Some(sequence))
    }

    /// The answer to the request with that sequence, if it has come.
    pub fn reply(&mut self, shard: usize, sequence: u64) -> Option<Result<TableReply, String>> {
        self.channels[shard].replies.remove(&sequence)
    }

    /// Whether every message to `shard` has been acknowledged.
    pub fn drained(&self, shard: usize) -> bool {
        self.channels[shard].window.awaited().is_none()
    }

    /// Bytes that `shard` has pushed, as it says.
    pub fn bytes_pushed(&self, link: &Link) -> u64 {
        self.control.load(link.control + ACK_RING * 8)
    }
}

impl<C: Connection> Channel<C> {
    /// Whether a message can be sent: there is a credit, room in the queue, and the buffer is ours, since the SEND that
    /// used it last has completed. (That it was acknowledged follows from there being a credit.)
    fn can_send(&self) -> bool {
        self.window.room() > 0
            && self.window.sent() < self.completed + self.window.credits()
            && self.connection.room() > 0
    }

    /// Frees the slots that were given up by acknowledged messages up to the last `Closed`.
    fn free_closed(&mut self, around: &Surroundings<'_>) {
        let early = mutant(Mutant::SlotReusedEarly);
        let count = self.closing.iter().take_while(|(at, ..)| *at <= self.heard.closed || early).count();
        if count == 0 {
            return;
        }
        let tables = around.tables.read().unwrap_or_else(PoisonError::into_inner);
        for (_, table, slot) in self.closing.drain(..count) {
            tables[table].closed(slot);
        }
    }
}

/// Takes a message from a shard.
fn receive<C>(channel: &mut Channel<C>, link: &Link, message: &[u8]) -> Result<(), Error> {
    let lost = |cause: String| Error::ServerLost { address: link.address.to_string(), cause };
    let header = MessageHeader::parse(message).map_err(|fault| lost(fault.to_string()))?;
    let body = &message[size_of::<MessageHeader>()..];
    let text = || String::from_utf8_lossy(body).into_owned();
    match header.kind().map_err(|fault| lost(fault.to_string()))? {
        Kind::Table => {
            let reply = TableReply::read_from_bytes(body)
                .map_err(|_| lost("it sent a malformed answer about a table".into()))?;
            channel.replies.insert(header.sequence, Ok(reply));
            Ok(())
        }
        Kind::Refused => {
            channel.replies.insert(header.sequence, Err(text()));
            Ok(())
        }
        Kind::Fault => Err(Error::Fault { address: link.address.to_string(), reason: text() }),
        kind => Err(lost(format!("it sent a message of kind {kind:?}"))),
    }
}
