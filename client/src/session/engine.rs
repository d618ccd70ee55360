//! The client's one endpoint for messages, and what a thread of the client does with it when it waits or ends
//! a clock.
//!
//! The engine has no thread of its own. Whichever thread holds its lock polls, takes acknowledgements and
//! immediates, and sends what is due. The other threads continue, or wait for it. What the threads leave for
//! each other is in [`link`](super::link).
//!
//! **Two ways to send.** If this host can see the shard's memory, the waiting slabs are sent at once: one
//! message names them. Over a wire they wait until the client's clock ends, or somebody asks, or there are
//! too many. Then they are [combined](super::combine).

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock, atomic::Ordering},
};

use fervor_protocol::{
    ack::{Immediate, round_lsn, round_offset},
    batch::{BatchWriter, HEADERS, SECTION},
    limits::{CLIENT_RECEIVES, CONTROL_PUSHED, CONTROL_SPARE, MESSAGE_BYTES},
    mutants::{Mutant, mutant},
    wire::{Kind, MessageHeader, SlotRecord, UNSUBSCRIBE},
};
use fervor_verbs::{
    Error as TransportError, Memory,
    transport::{
        Access, Completion, Connection, ConnectionId, Endpoint, Payload, Post, PostError, Region, Sge,
        Transport,
    },
};
use zerocopy::IntoBytes;

mod resuming;

use crate::{
    session::{
        channel::{Answer, Channel, Heard, Sent, SentBatch, State},
        combine::Combining,
        link::{Link, Outgoing, Wish},
    },
    slab::Delivery,
    table::AnyTable,
};

/// Slabs that wait for a shard over a wire beyond which they are sent though no clock ends.
const MANY_WAITING: u64 = 16;
/// Sections that are named in one message.
const MOST_SECTIONS: usize = 64;

/// See the module.
pub struct Engine<T: Transport> {
    transport: T,
    pub endpoint: T::Endpoint,
    /// Where the shards write: control blocks, mirrors and slots.
    control: Memory,
    channels: Vec<Channel<T::Connection>>,
    by_id: BTreeMap<ConnectionId, usize>,
    /// Messages lie here until they are acknowledged and their SEND has completed.
    outbox: T::Region,
    /// Byte offset in the outbox of each shard's buffers.
    buffers: Vec<usize>,
    scratch: Vec<u8>,
    completions: Vec<Completion>,
    /// Completions of connections that another thread has made and not handed over yet.
    early: Vec<Completion>,
    pub bytes_sent: u64,
}

/// What an engine needs of the client.
pub struct Surroundings<'a, V> {
    pub links: &'a [Link<V>],
    pub tables: &'a RwLock<Vec<Arc<dyn AnyTable>>>,
}

impl<V> Surroundings<'_, V> {
    fn tables<R>(&self, with: impl FnOnce(&[Arc<dyn AnyTable>]) -> R) -> R {
        with(&self.tables.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T: Transport> Engine<T> {
    /// With a connection to each shard, in the order of the links.
    ///
    /// # Errors
    /// No memory for the outbox.
    pub fn new(
        transport: &T,
        endpoint: T::Endpoint,
        control: Memory,
        connections: Vec<T::Connection>,
        links: &[Link<T::View>],
    ) -> Result<Self, TransportError> {
        let credits = links.iter().map(|link| link.welcome.credits as usize);
        let buffers = credits
            .clone()
            .scan(0, |sum, credits| Some(std::mem::replace(sum, *sum + credits * MESSAGE_BYTES)));
        let buffers = buffers.collect();
        let outbox = Memory::new("fervor-outbox", credits.sum::<usize>() * MESSAGE_BYTES)?;
        Ok(Self {
            transport: transport.clone(),
            endpoint,
            control,
            by_id: connections.iter().enumerate().map(|(shard, c)| (c.id(), shard)).collect(),
            channels: connections
                .into_iter()
                .zip(links)
                .map(|(c, link)| Channel::new(c, &link.welcome))
                .collect(),
            outbox: transport.register(&outbox, Access::Local)?,
            buffers,
            scratch: vec![0; MESSAGE_BYTES],
            completions: Vec::new(),
            early: Vec::new(),
            bytes_sent: 0,
        })
    }

    /// Polls once, and sends what is due. Returns how much that was.
    pub fn progress(&mut self, around: &Surroundings<'_, T::View>) -> usize {
        let mut completions = std::mem::take(&mut self.completions);
        let mut work = self.endpoint.poll(&mut completions);
        for completion in completions.drain(..) {
            self.complete(completion, around);
        }
        self.completions = completions;
        for (shard, link) in around.links.iter().enumerate() {
            if link.end.get().is_none() {
                work += self.take_acknowledgements(shard, around);
                work += self.send_due(shard, around);
            } else if self.channels[shard].state == State::Resuming {
                // It came too late: the shard is not to wait for this client.
                self.disconnect(shard);
                self.channels[shard].state = State::Down;
            }
        }
        work
    }

    fn complete(&mut self, completion: Completion, around: &Surroundings<'_, T::View>) {
        let (Completion::Work { connection, .. }
        | Completion::WriteImmediate { connection, .. }
        | Completion::Received { connection, .. }
        | Completion::Disconnected { connection, .. }) = &completion;
        let Some(&shard) = self.by_id.get(connection) else { return self.early.push(completion) };
        match completion {
            Completion::Work { id, result: Ok(()), .. } => {
                let channel = &mut self.channels[shard];
                channel.completed = channel.completed.max(id);
            }
            // The connection is breaking; its end comes with the cause.
            Completion::Work { result: Err(_), .. } => {}
            Completion::WriteImmediate { immediate, .. } => self.immediate(shard, immediate, around),
            Completion::Received { buffer, .. } => {
                let link = &around.links[shard];
                let channel = &mut self.channels[shard];
                channel.polled += 1;
                let heard = channel.receive(link, self.endpoint.message(&buffer));
                self.endpoint.release(buffer);
                match heard {
                    Ok(Heard::Answer) => {}
                    Ok(Heard::Resumed(sequence)) => self.resumed(shard, sequence, around),
                    Ok(Heard::Over) => channel.state = State::Over,
                    Err(error) => _ = link.end.set(error),
                }
            }
            Completion::Disconnected { connection, cause } => {
                self.by_id.remove(&connection);
                self.broken(shard, cause, around);
            }
        }
    }

    fn immediate(&mut self, shard: usize, bits: u32, around: &Surroundings<'_, T::View>) {
        let link = &around.links[shard];
        let channel = &mut self.channels[shard];
        channel.polled += 1;
        match Immediate::decode(bits, &channel.heard) {
            Ok(Immediate::Round(clock)) => {
                channel.heard.round = clock;
                let word = self.control.load(link.control + round_offset(clock));
                // Those of batches applied before the round was closed are visible: see `link`.
                self.take_acknowledgements(shard, around);
                if let Some(lsn) = round_lsn(word, clock) {
                    link.seal(clock, lsn);
                }
                link.rise(clock);
                link.joined.store(true, Ordering::Release);
            }
            Ok(Immediate::Closed(sequence)) => {
                channel.heard.closed = sequence;
                self.free_closed(shard, around);
            }
            Ok(Immediate::Visible(batch)) => {
                channel.heard.visible = batch;
                link.visible.fetch_max(batch, Ordering::Release);
            }
            Err(bits) => link.lose(format!("it sent an immediate of an unknown kind: {bits:#x}")),
        }
    }

    fn take_acknowledgements(&mut self, shard: usize, around: &Surroundings<'_, T::View>) -> usize {
        let link = &around.links[shard];
        if mutant(Mutant::RoundByPlainWrite) {
            link.rise(self.control.load(link.control + CONTROL_SPARE));
        }
        let taken = self.channels[shard].take_acknowledgements(link, &self.control);
        // Words and immediates are found in either order: what this message gave up may have been announced free.
        if taken > 0 {
            self.free_closed(shard, around);
        }
        taken
    }

    fn free_closed(&mut self, shard: usize, around: &Surroundings<'_, T::View>) {
        let closed = self.channels[shard].take_closed();
        if !closed.is_empty() {
            around.tables(|tables| {
                closed.into_iter().for_each(|(table, slot)| tables[table].closed(shard, slot))
            });
        }
    }

    /// Sends what the threads have left for `shard`, as far as credits go.
    fn send_due(&mut self, shard: usize, around: &Surroundings<'_, T::View>) -> usize {
        let mut sent = 0;
        loop {
            let (channel, link) = (&self.channels[shard], &around.links[shard]);
            if channel.left || !channel.can_send() {
                break;
            }
            if let wishes @ [_, ..] = &*take_wishes(link) {
                self.send_wishes(shard, wishes);
            } else if channel.combining.is_some() {
                self.send_combined(shard, around);
            } else if let Some(clock) = wants_slabs(link) {
                if !self.send_slabs(shard, clock, around) {
                    break;
                }
            } else if (channel.polled - channel.told) * 2 >= CLIENT_RECEIVES as u64 {
                self.send(shard, Kind::Credit, 0, &[]);
            } else {
                break;
            }
            sent += 1;
        }
        if sent > 0 {
            self.ring(shard);
        }
        sent
    }

    /// Has what was posted go out. Of a broken connection the end is about to be polled.
    fn ring(&mut self, shard: usize) {
        if let Some(connection) = &mut self.channels[shard].connection {
            let _ = connection.ring();
        }
    }

    fn send_wishes(&mut self, shard: usize, wishes: &[Wish]) {
        let body: Vec<u8> = wishes.iter().flat_map(|wish| wish.record.as_bytes().to_vec()).collect();
        self.send(shard, Kind::Slots, 0, &body);
        let given_up = wishes.iter().filter(|wish| wish.record.wish == UNSUBSCRIBE);
        let sent = self.channels[shard].sent.back_mut().expect("it was just sent");
        sent.closing = given_up.map(|wish| (wish.table, wish.slot)).collect();
    }

    /// Takes the slabs that are to go and sends a batch of them, which ends `clock` if it is all. Whether there was one.
    fn send_slabs(&mut self, shard: usize, clock: Option<u64>, around: &Surroundings<'_, T::View>) -> bool {
        let link = &around.links[shard];
        let named = link.place.get().is_some();
        let (taken, flushed) = {
            let mut queue = link.outgoing();
            // SYNC POINT: what was handed over before it was asked is in the queue.
            let flush = link.flush.load(Ordering::Acquire);
            let many = queue.len() as u64 > MANY_WAITING;
            // Named slabs go one of a table at a time: an image must not have a batch's LSN before all of the batch is in it.
            let mut tables = Vec::new();
            let taken = queue.take(|entry| {
                if named {
                    let first = !tables.contains(&entry.table);
                    tables.push(entry.table);
                    return first;
                }
                many || entry.ticket <= flush || clock.is_some_and(|clock| entry.slab.stamp() < clock)
            });
            link.waiting.store(queue.len() as u64, Ordering::Release);
            (taken, queue.taken())
        };
        // Slabs of the clock that is to end may be left.
        let clock = clock.filter(|clock| !named || !link.outgoing().has_below(*clock));
        if taken.is_empty() && clock.is_none() {
            link.flushed.fetch_max(flushed, Ordering::Release);
            return false;
        }
        let sections = taken.iter().map(|entry| entry.slab.references().map(<[_]>::len));
        let sections = sections.sum::<Option<usize>>().filter(|sections| named && *sections <= MOST_SECTIONS);
        if sections.is_some() {
            self.send_named(shard, taken, clock, flushed, around);
        } else {
            let message = self.message_bytes(link);
            let first = self.channels[shard].batch + 1;
            self.channels[shard].combining = Some(Combining::new(taken, first, message, clock, flushed));
            self.send_combined(shard, around);
        }
        true
    }

    fn message_bytes(&self, link: &Link<T::View>) -> usize {
        self.scratch.len().min(link.welcome.message_bytes as usize)
    }

    /// Sends the places of slabs that the shard sees: one batch.
    fn send_named(
        &mut self,
        shard: usize,
        taken: Vec<Outgoing>,
        clock: Option<u64>,
        flushed: u64,
        around: &Surroundings<'_, T::View>,
    ) {
        const _: () = assert!(HEADERS + MOST_SECTIONS * SECTION <= MESSAGE_BYTES);
        let link = &around.links[shard];
        let number = self.channels[shard].batch + 1;
        let length = self.message_bytes(link);
        let mut writer = BatchWriter::new(&mut self.scratch[..length]);
        let delivery = Delivery::new(number, 1);
        delivery.complete(1);
        for entry in &taken {
            let table = around.tables(|tables| tables[entry.table].id(shard));
            for section in entry.slab.references().expect("it has been looked at") {
                let mut section = *section;
                section.table = table;
                writer.refer(section);
            }
            // SYNC POINT: before the post, so that nobody finds it unsent in an image that has it.
            entry.slab.goes_out(&delivery, false);
        }
        let kind = if taken.is_empty() { Kind::Batch } else { Kind::Reference };
        let (sequence, returned) = self.channels[shard].next_message();
        let length = writer.finish(kind, sequence, returned, number, clock);
        let named = if mutant(Mutant::SlabReusedEarly) { Vec::new() } else { taken };
        let batch = SentBatch { number, delivery, part: 0, named };
        self.post(shard, sequence, length, Some(batch));
        posted(link, number, clock, Some(flushed));
    }

    /// Sends the next batch of the slabs that are being combined.
    fn send_combined(&mut self, shard: usize, around: &Surroundings<'_, T::View>) {
        let link = &around.links[shard];
        let length = self.message_bytes(link);
        let channel = &mut self.channels[shard];
        let number = channel.batch + 1;
        let combining = channel.combining.as_mut().expect("it is there");
        let mut writer = BatchWriter::new(&mut self.scratch[..length]);
        let (delivery, part, all) = around.tables(|tables| combining.write(&mut writer, tables, shard));
        let clock = combining.clock.filter(|_| all || mutant(Mutant::ClockEndsEarly) && part == 0);
        let flushed = combining.flushed;
        if all {
            combining.posted();
            channel.combining = None;
        }
        let (sequence, returned) = channel.next_message();
        let length = writer.finish(Kind::Batch, sequence, returned, number, clock);
        let batch = SentBatch { number, delivery, part, named: Vec::new() };
        self.post(shard, sequence, length, Some(batch));
        posted(link, number, clock, all.then_some(flushed));
    }

    /// Sends a message of `kind` if there is a credit for it: its sequence.
    pub fn request(&mut self, shard: usize, kind: Kind, body: &[u8]) -> Option<u64> {
        if !self.channels[shard].can_send() {
            return None;
        }
        let sequence = self.send(shard, kind, 0, body);
        if matches!(kind, Kind::CreateTable | Kind::Memory) {
            self.channels[shard].expect_answer(sequence);
        }
        self.ring(shard);
        Some(sequence)
    }

    /// Says that no more messages will come, if there is a credit for it: whether there was.
    pub fn leave(&mut self, shard: usize, flags: u8) -> bool {
        if !self.channels[shard].can_send() {
            return false;
        }
        self.send(shard, Kind::Leave, flags, &[]);
        self.ring(shard);
        self.channels[shard].left = true;
        true
    }

    /// Whether `shard` was told that no more messages will come.
    pub fn has_left(&self, shard: usize) -> bool {
        self.channels[shard].left
    }

    /// Whether `shard` can be reached, or will be as soon as it says where it goes on.
    pub fn reaches(&self, shard: usize) -> bool {
        matches!(self.channels[shard].state, State::Up | State::Resuming)
    }

    /// Sends a message; there is a credit, a buffer, and room in the queue.
    fn send(&mut self, shard: usize, kind: Kind, flags: u8, body: &[u8]) -> u64 {
        let (sequence, returned) = self.channels[shard].next_message();
        let records = if kind == Kind::Slots { body.len() / size_of::<SlotRecord>() } else { 0 };
        let header = MessageHeader::new(kind, flags, records as u32, sequence, returned);
        let length = size_of::<MessageHeader>() + body.len();
        self.scratch[..size_of::<MessageHeader>()].copy_from_slice(header.as_bytes());
        self.scratch[size_of::<MessageHeader>()..length].copy_from_slice(body);
        self.post(shard, sequence, length, None);
        sequence
    }

    /// Posts the message in the scratch buffer. If the connection is broken the message is kept, like all that is not acknowledged, and
    /// goes when the shard can be reached again.
    fn post(&mut self, shard: usize, sequence: u64, length: usize, batch: Option<SentBatch>) {
        let channel = &mut self.channels[shard];
        let buffer = (sequence % channel.window.credits()) as usize;
        let offset = self.buffers[shard] + buffer * MESSAGE_BYTES;
        self.outbox.memory().write(offset, &self.scratch[..length]);
        channel.batch = batch.as_ref().map_or(channel.batch, |batch| batch.number);
        channel.sent.push_back(Sent { length, batch, closing: Vec::new() });
        self.bytes_sent += length as u64;
        let piece = Sge { region: &self.outbox, offset, length };
        if let Some(connection) = &mut channel.connection {
            let posted = connection.post(Post::Send {
                payload: Payload::Gather(&[piece]),
                immediate: None,
                signal: Some(sequence),
            });
            assert!(posted != Err(PostError::Full), "there is room");
        }
    }

    /// The answer to the request with that sequence, if it has come.
    pub fn answer(&mut self, shard: usize, sequence: u64) -> Option<Result<Answer, String>> {
        self.channels[shard].answer(sequence)
    }

    /// Everything that `shard` wrote because of messages up to this one is visible.
    pub fn closed(&self, shard: usize) -> u64 {
        self.channels[shard].heard.closed
    }

    /// The memory of `shard` that it exports, if it is on this host, when the shard can be reached.
    pub fn view(&self, shard: usize, link: &Link<T::View>) -> Option<Option<T::View>> {
        Some(self.channels[shard].connection.as_ref()?.view(link.region()))
    }

    /// Whether every message to `shard` has been acknowledged.
    pub fn drained(&self, shard: usize) -> bool {
        let channel = &self.channels[shard];
        channel.window.awaited().is_none() || channel.state == State::Over
    }

    /// Bytes that `shard` has pushed, as it says.
    pub fn bytes_pushed(&self, link: &Link<T::View>) -> u64 {
        self.control.load(link.control + CONTROL_PUSHED)
    }
}

/// The batch `number` is posted; it ends `clock`, and everything up to the ticket `flushed` is.
fn posted<V>(link: &Link<V>, number: u64, clock: Option<u64>, flushed: Option<u64>) {
    link.posted.store(number, Ordering::Release);
    if let Some(flushed) = flushed {
        link.flushed.fetch_max(flushed, Ordering::Release);
    }
    if let Some(clock) = clock {
        link.announced.store(clock, Ordering::Release);
    }
}

/// Some of the wishes for a shard, as many as fit a message.
fn take_wishes<V>(link: &Link<V>) -> Vec<Wish> {
    let mut all = link.wishes.lock().unwrap_or_else(PoisonError::into_inner);
    let room = link.welcome.message_bytes as usize - size_of::<MessageHeader>();
    let count = all.len().min(room / size_of::<SlotRecord>());
    all.drain(..count).collect()
}

/// Whether slabs are to be sent to a shard, and which clock they end.
fn wants_slabs<V>(link: &Link<V>) -> Option<Option<u64>> {
    // SYNC POINT: all slabs stamped below `due` were handed over before it was raised.
    let due = link.due.load(Ordering::Acquire);
    let clock = (due > link.announced.load(Ordering::Relaxed)).then_some(due);
    let waiting = link.waiting.load(Ordering::Acquire);
    let wanted = clock.is_some()
        || waiting > 0 && link.place.get().is_some()
        || waiting > MANY_WAITING
        || link.flush.load(Ordering::Acquire) > link.flushed.load(Ordering::Relaxed);
    wanted.then_some(clock)
}
