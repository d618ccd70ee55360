//! What a poller knows of one client.

use std::collections::VecDeque;

use fervor_protocol::{
    ack::{BatchNumbers, Receives, ack_offset, ack_word},
    limits::ACK_RING,
    mutants::{Mutant, mutant},
    wire::Hello,
};
use fervor_verbs::transport::{Connection, Payload, PostError, RemoteRegion, Sge};

use crate::{Target, shard::TableId, staging::Entry, visible::Visible};

/// Requests kept free in the send queue for acknowledgements and the end of a round.
const RESERVE: usize = 8;

/// Work id of the SEND of a fault; other ids are serials of [`Peer::serial`].
pub const FAULT_ID: u64 = u64::MAX;
/// Work id of the READ that proves pushes visible.
pub const PROOF_ID: u64 = u64::MAX - 1;

/// Bytes of a client's control block for one shard: the acknowledgement ring, then the pushed bytes.
pub const CONTROL_BYTES: usize = (ACK_RING + 8) * 8;

/// A row to push to one slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    pub table: TableId,
    pub row: u64,
    pub slot: u64,
    /// Pushed whether it is subscribed or not.
    pub once: bool,
}

/// One client. `C` is its main connection.
pub struct Peer<C> {
    /// Its entry in the vector clock; never used again.
    pub client: u64,
    pub connection: C,
    pub target: Target,
    control: u64,
    pub receives: Receives,
    pub numbers: BatchNumbers,
    /// Sequence of the last message processed.
    pub sequence: u64,
    /// Messages that it may have on their way.
    credits: u64,
    /// Acknowledgements that have not been posted.
    acks: VecDeque<(u64, u64)>,
    /// Replies that wait for a receive buffer of the client.
    pub replies: VecDeque<Vec<u8>>,
    /// Rows that could not be pushed at once. The round is closed when it is empty.
    pub queue: VecDeque<Wanted>,
    /// A round is to be closed at this clock.
    pub round: Option<u64>,
    /// Slots given up by messages up to this sequence are to be announced free.
    pub closed: Option<u64>,
    /// Entries that posted WRITEs read, oldest first, with the serial of the WRITE.
    inflight: VecDeque<(u64, Entry)>,
    /// Number of the last WRITE from staging.
    serial: u64,
    /// Whether WRITEs from staging were posted since the last signalled request.
    unsignalled: bool,
    /// What of value-bounded tables is visible to it: see [`crate::visible`].
    pub visible: Visible,
    /// Bytes pushed since the start.
    pub pushed: u64,
    /// It sent something bad, has been told, and is not listened to.
    pub condemned: bool,
    /// It said that it leaves: its end is no fault.
    pub left: bool,
}

impl<C: Connection> Peer<C> {
    /// # Errors
    /// What is wrong with the handshake, and the connection.
    pub fn new(client: u64, connection: C, hello: &Hello, credits: usize) -> Result<Self, (String, C)> {
        let target = Target(RemoteRegion { address: hello.address, length: hello.length, key: hello.key });
        if !target.fits(hello.control, CONTROL_BYTES) {
            return Err((format!("control = {} is outside the client's region", hello.control), connection));
        }
        Ok(Self {
            client,
            connection,
            target,
            control: hello.control,
            receives: Receives::new(hello.receives as usize),
            numbers: BatchNumbers::default(),
            sequence: 0,
            credits: credits as u64,
            acks: VecDeque::new(),
            replies: VecDeque::new(),
            queue: VecDeque::new(),
            round: None,
            closed: None,
            inflight: VecDeque::new(),
            serial: 0,
            unsignalled: false,
            visible: Visible::default(),
            pushed: 0,
            condemned: false,
            left: false,
        })
    }

    /// Whether message `sequence`, the next one, is within the client's credits.
    ///
    /// # Errors
    /// It is not: more than the credits would be unacknowledged. (Those whose acknowledgement is posted are not counted.)
    pub fn check_credits(&self, sequence: u64) -> Result<(), String> {
        let out = self.acks.len() as u64 + 1;
        if out > self.credits {
            return Err(format!(
                "sequence = {sequence} is the {out}th message that is not acknowledged: credits = {}",
                self.credits
            ));
        }
        Ok(())
    }

    /// Acknowledges message `sequence` at `lsn`.
    pub fn acknowledge(&mut self, sequence: u64, lsn: u64) {
        self.acks.push_back((sequence, ack_word(sequence, lsn)));
    }

    /// Whether a push can be posted now.
    pub fn has_room(&self) -> bool {
        self.connection.room() > RESERVE
    }

    /// Posts a WRITE of `payload` to `offset` of the client's region, from `entry` of the staging memory.
    /// There is room. The entry's use is released by [`Peer::completed`].
    pub fn push(
        &mut self,
        payload: Payload<'_, C::Region>,
        slot: u64,
        bytes: usize,
        entry: Entry,
    ) -> Result<(), PostError> {
        self.serial += 1;
        // Every eighth is signalled, so that its completion releases the entries of those before.
        let signal = self.serial.is_multiple_of(8).then_some(self.serial);
        self.connection.write(payload, self.target.0.at(slot), None, signal)?;
        self.unsignalled = signal.is_none();
        self.inflight.push_back((self.serial, entry));
        self.pushed += bytes as u64;
        Ok(())
    }

    /// Posts the SEND of a reply, from `entry` of the staging memory, with work id `id` or its serial.
    pub fn reply(
        &mut self,
        payload: Payload<'_, C::Region>,
        id: Option<u64>,
        entry: Entry,
    ) -> Result<(), PostError> {
        self.serial += 1;
        self.connection.send(payload, None, Some(id.unwrap_or(self.serial)))?;
        self.unsignalled = false;
        self.inflight.push_back((self.serial, entry));
        Ok(())
    }

    /// Posts a READ of a word of the client's into `into`, behind all pushes so far. There is room.
    pub fn prove(&mut self, into: Sge<'_, C::Region>) -> Result<(), PostError> {
        self.unsignalled = false;
        if mutant(Mutant::VisibleOnWrite) {
            let remote = self.target.0.at(self.control);
            return self.connection.write(Payload::Inline(&[]), remote, None, Some(PROOF_ID));
        }
        self.connection.read(&[into], self.target.0.at(self.control), Some(PROOF_ID))
    }

    /// Number of the last WRITE from staging.
    pub fn serial(&self) -> u64 {
        self.serial
    }

    /// A signalled request is done: gives the entries that it and earlier ones read to `release`.
    pub fn completed(&mut self, serial: u64, mut release: impl FnMut(Entry)) {
        while self.inflight.front().is_some_and(|(first, _)| *first <= serial) {
            self.inflight.pop_front().into_iter().for_each(|(_, entry)| release(entry));
        }
    }

    /// Posts what needs neither staging nor a receive buffer: the acknowledgements.
    pub fn post_acks(&mut self) -> Result<bool, PostError> {
        let mut any = false;
        while self.connection.room() > 0 {
            let Some((sequence, word)) = self.acks.pop_front() else { break };
            let remote = self.target.0.at(self.control + ack_offset(sequence) as u64);
            self.connection.write(Payload::Inline(&word.to_le_bytes()), remote, None, None)?;
            any = true;
        }
        Ok(any)
    }

    /// Posts a WRITE with immediate, without data, behind all pushes so far. There is room and a receive buffer.
    pub fn announce(&mut self, immediate: u32) -> Result<(), PostError> {
        let pushed = self.target.0.at(self.control + (ACK_RING * 8) as u64);
        self.unsignalled = false;
        self.connection.write(
            Payload::Inline(&self.pushed.to_le_bytes()),
            pushed,
            Some(immediate),
            Some(self.serial),
        )
    }

    /// A mutant: tells a clock by a WRITE without an immediate.
    pub fn write_clock(&mut self, clock: u64) -> Result<(), PostError> {
        let word = self.target.0.at(self.control + ((ACK_RING + 1) * 8) as u64);
        self.connection.write(Payload::Inline(&clock.to_le_bytes()), word, None, None)
    }

    /// Sees to it that the entries of all posted pushes will be released: asks for a completion if none is under way.
    pub fn ask_for_completion(&mut self) -> Result<(), PostError> {
        if self.unsignalled && self.connection.room() > 0 {
            self.unsignalled = false;
            let remote = self.target.0.at(self.control);
            return self.connection.write(Payload::Inline(&[]), remote, None, Some(self.serial));
        }
        Ok(())
    }

    /// Whether there is anything left to post.
    pub fn busy(&self) -> bool {
        !self.acks.is_empty()
            || !self.replies.is_empty()
            || !self.queue.is_empty()
            || self.round.is_some()
            || self.closed.is_some()
            || self.visible.tell().is_some()
    }
}
