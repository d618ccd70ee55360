//! A connection to one shard: messages on their way there, acknowledgements and answers on their way back.
//!
//! A message lies in one of the buffers of the outbox. There are as many buffers as the shard granted
//! credits. The message stays in its buffer from its post until two things have happened: it is acknowledged,
//! and its SEND has completed. For a batch the slabs are kept as long, since a reference names their memory.
//!
//! A channel outlives its connection ([`fervor_protocol::resume`]):
//!
//! ```text
//!            the end is polled          another connection           Resumed is polled: what the shard
//!  ┌────┐ ──────────────────▶ ┌──────┐ ───────────────▶ ┌──────────┐ has not processed is sent again
//!  │ Up │                     │ Down │                  │ Resuming │ ──────▶ Up
//!  └────┘                     └──────┘ ◀─────────────── └──────────┘
//!                                           its end
//! ```
//!
//! What is posted between the break and its end stays in its buffer like everything else, and is sent again.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use fervor_protocol::{
    ack::{SendWindow, Told, ack_offset, acknowledged},
    mutants::{Mutant, mutant},
    wire::{Fault, Kind, MessageHeader, NamedReply, TableReply, UNKNOWN, Welcome},
};
use fervor_verbs::{
    Memory,
    transport::{Connection, View},
};
use zerocopy::FromBytes;

use crate::{
    cache::Slot,
    error::Error,
    session::{
        combine::Combining,
        link::{Link, Outgoing},
    },
    slab::Delivery,
};

/// A shard's answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Table(TableReply),
    Named(NamedReply),
}

/// A batch that has not been acknowledged.
#[derive(Debug)]
pub struct SentBatch {
    pub number: u64,
    pub delivery: Arc<Delivery>,
    pub part: usize,
    /// Slabs whose memory the message names.
    pub named: Vec<Outgoing>,
}

/// Whether messages can be sent. See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Up,
    Down,
    Resuming,
    /// The client has left, and the shard has forgotten it.
    Over,
}

/// What a message of the shard means for the channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    Answer,
    /// The shard goes on after this message.
    Resumed(u64),
    /// It has forgotten a client that has left.
    Over,
}

/// A message that has not been acknowledged.
#[derive(Debug, Default)]
pub struct Sent {
    /// Bytes.
    pub length: usize,
    pub batch: Option<SentBatch>,
    /// Slots given up in it, by table.
    pub closing: Vec<(usize, Slot)>,
}

/// See the module.
pub struct Channel<C> {
    /// `None`: its end has been polled.
    pub connection: Option<C>,
    pub state: State,
    pub window: SendWindow,
    pub sent: VecDeque<Sent>,
    /// Sequence of the last SEND that completed: its buffer is ours again.
    pub completed: u64,
    /// Number of the last batch.
    pub batch: u64,
    /// Slabs of which not all batches are posted.
    pub combining: Option<Combining>,
    /// Receive buffers used by the shard and given back, and how many it has been told of.
    pub polled: u64,
    pub told: u64,
    /// What immediates told.
    pub heard: Told,
    /// Slots given up, with the sequence after which they are free.
    pub closing: VecDeque<(u64, usize, Slot)>,
    /// The shard was told that this client leaves: it is sent nothing more.
    pub left: bool,
    /// Answers to requests, by sequence; `None`: it is waited for.
    replies: BTreeMap<u64, Option<Result<Answer, String>>>,
}

impl<C: Connection> Channel<C> {
    pub fn new(connection: C, welcome: &Welcome) -> Self {
        let origin = welcome.origin;
        Self {
            connection: Some(connection),
            state: State::Up,
            window: SendWindow::starting_at(welcome.credits as usize, origin),
            sent: VecDeque::new(),
            completed: origin,
            batch: origin,
            combining: None,
            polled: 0,
            told: 0,
            heard: Told { round: welcome.clock, closed: origin, visible: origin },
            closing: VecDeque::new(),
            left: false,
            replies: BTreeMap::new(),
        }
    }

    /// Whether a message can be sent: there is a credit, room in the queue, and the buffer is ours, since the SEND that
    /// used it last has completed. (That it was acknowledged follows from there being a credit.)
    pub fn can_send(&self) -> bool {
        self.state == State::Up
            && self.window.room() > 0
            && self.window.sent() < self.completed + self.window.credits()
            && self.connection.as_ref().is_some_and(|connection| connection.room() > 0)
    }

    /// The end of the connection has been polled.
    pub fn break_off(&mut self) {
        self.connection = None;
        self.state = State::Down;
    }

    /// On another connection; the shard has not said yet where it goes on.
    pub fn attach(&mut self, connection: C) {
        self.connection = Some(connection);
        self.state = State::Resuming;
        (self.polled, self.told) = (0, 0);
    }

    /// An answer to request `sequence` is waited for.
    pub fn expect_answer(&mut self, sequence: u64) {
        self.replies.insert(sequence, None);
    }

    /// The answer to request `sequence`, if it has come.
    pub fn answer(&mut self, sequence: u64) -> Option<Result<Answer, String>> {
        self.replies.get(&sequence)?.as_ref()?;
        self.replies.remove(&sequence)?
    }

    fn answered(&mut self, sequence: u64, answer: Result<Answer, String>) {
        // After a resumption one comes that has come before: nobody waits for it.
        if let Some(waited) = self.replies.get_mut(&sequence) {
            *waited = Some(answer);
        }
    }

    /// A message is sent now: its sequence, and how many receive buffers it gives back. There is a credit.
    pub fn next_message(&mut self) -> (u64, u64) {
        self.told = self.polled;
        (self.window.take().expect("there is a credit"), self.polled)
    }

    /// Takes the acknowledgements that have come. How many.
    pub fn take_acknowledgements<V: View>(&mut self, link: &Link<V>, control: &Memory) -> usize {
        let mut taken = 0;
        while let Some(sequence) = self.window.awaited() {
            let word = control.load(link.control + ack_offset(sequence));
            let Some(lsn) = acknowledged(word, sequence) else { break };
            self.window.acknowledge();
            let sent = self.sent.pop_front().expect("every message that is out is listed");
            self.closing.extend(sent.closing.into_iter().map(|(table, slot)| (sequence, table, slot)));
            if let Some(SentBatch { delivery, part, named, .. }) = sent.batch {
                // Whoever sees the LSN may use the memory again: nobody else holds it by then.
                drop(named);
                delivery.acknowledged(part, lsn);
            }
            // SYNC POINT: after the slabs were told; see `link`.
            link.acknowledge(lsn);
            taken += 1;
        }
        taken
    }

    /// The slots that were given up by acknowledged messages up to the last `Closed`: they are free.
    pub fn take_closed(&mut self) -> Vec<(usize, Slot)> {
        let early = mutant(Mutant::SlotReusedEarly);
        let count = self.closing.iter().take_while(|(at, ..)| *at <= self.heard.closed || early).count();
        self.closing.drain(..count).map(|(_, table, slot)| (table, slot)).collect()
    }

    /// Takes a message from the shard.
    ///
    /// # Errors
    /// It ends the connection, or makes no sense.
    pub fn receive<V>(&mut self, link: &Link<V>, message: &[u8]) -> Result<Heard, Error> {
        let lost = |cause: String| Error::ServerLost { address: link.address.to_string(), cause };
        let header = MessageHeader::parse(message).map_err(|fault| lost(fault.to_string()))?;
        let body = &message[size_of::<MessageHeader>()..];
        let text = || String::from_utf8_lossy(body).into_owned();
        let malformed = |_| lost("it sent a malformed answer".into());
        match header.kind().map_err(|fault: Fault| lost(fault.to_string()))? {
            Kind::Table => {
                let reply = TableReply::read_from_bytes(body).map_err(malformed)?;
                self.answered(header.sequence, Ok(Answer::Table(reply)));
            }
            Kind::Named => {
                let reply = NamedReply::read_from_bytes(body)
                    .map_err(|_| lost("it sent a malformed answer".into()))?;
                self.answered(header.sequence, Ok(Answer::Named(reply)));
            }
            Kind::Refused => self.answered(header.sequence, Err(text())),
            Kind::Resumed if self.state == State::Resuming => return Ok(Heard::Resumed(header.sequence)),
            // Its farewell was the last that it sent, and all before that had been acknowledged.
            Kind::Fault if header.flags == UNKNOWN && self.left => return Ok(Heard::Over),
            Kind::Fault => return Err(Error::Fault { address: link.address.to_string(), reason: text() }),
            kind => return Err(lost(format!("it sent a message of kind {kind:?}"))),
        }
        Ok(Heard::Answer)
    }
}
