//! One client's connection: what was posted to it and has not completed.
//!
//! | field | meaning | how it changes |
//! |---|---|---|
//! | `inflight` | posts that read staging memory | each such post adds an entry; a completion of that post, or of a later one, takes it away |
//! | `pinned` | bytes of those entries | with `inflight`. It is at most the quota, so that a client that takes nothing leaves enough for the others |
//! | `serial` | number of the last such post | each such post raises it |
//! | `unsignalled` | some such post has no completion coming that would release it | until [`Peer::ask_for_completion`] |
//!
//! A client outlives its connection ([`fervor_protocol::resume`]). When the end of the connection has been polled, nothing of it is on its
//! way, and the peer is [suspended](Peer::suspend): it has no connection, and so room for nothing. What is to be posted waits in its
//! [`Outbound`], until it is [attached](Peer::attach) to another connection.

use std::collections::VecDeque;

use fervor_protocol::{
    ack::{Immediate, ack_offset, ack_word, round_words},
    batch::Source,
    limits::{CONTROL_BYTES, CONTROL_PUSHED, CONTROL_SPARE},
    mutants::{Mutant, mutant},
    resume::is_later,
    wire::Hello,
};
use fervor_verbs::transport::{Connection, ConnectionId, Payload, Post, PostError, RemoteRegion, Sge, View};

use crate::{
    accept::Place,
    outbound::{Outbound, RESERVE},
    staging::Entry,
};

/// Work id of the SEND of a fault; other ids are serials of [`Peer`].
pub const FAULT_ID: u64 = u64::MAX;
/// Work id of the READ that proves pushes visible.
pub const PROOF_ID: u64 = u64::MAX - 1;
/// One WRITE in so many is signalled, so that its completion releases the entries of those before.
const SIGNAL_EVERY: u64 = 8;

/// The memory that a client has named, seen from here.
#[derive(Debug)]
pub struct Slabs<V>(pub V);

impl<V: View> Source for Slabs<V> {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, at: u64, into: &mut [u8]) {
        self.0.copy(at as usize, into);
    }
}

/// Bytes of staging memory that a post reads.
#[derive(Debug, Clone, Copy)]
pub struct Staged {
    pub entry: Entry,
    /// First byte within the entry.
    pub from: usize,
    pub bytes: usize,
}

fn region(hello: &Hello) -> RemoteRegion {
    RemoteRegion { address: hello.address, length: hello.length, key: hello.key }
}

/// See the module.
pub struct Peer<C: Connection> {
    /// Its number, for people.
    pub number: u64,
    /// `None`: it is suspended.
    connection: Option<C>,
    /// By which it may come back; 0: it may not.
    pub identity: u64,
    /// Number of the last attempt to come back.
    attempt: u16,
    /// It is one of those for which there are receive buffers.
    pub counted: bool,
    pub outbound: Outbound,
    pub slabs: Option<Slabs<C::View>>,
    region: RemoteRegion,
    /// Byte offset of its control block in its region.
    control: u64,
    inflight: VecDeque<(u64, Entry, usize)>,
    pinned: usize,
    serial: u64,
    unsignalled: bool,
    /// The proof on its way: the last post before it, and where it puts the word.
    proof: Option<(u64, Entry)>,
    /// Bytes pushed since the start.
    pushed: u64,
    /// It is in the list of those that have something to post.
    pub listed: bool,
    /// It sent something bad, has been told, and is not listened to.
    pub condemned: bool,
    /// It said that it leaves: its end is no fault.
    pub left: bool,
    /// Its place among the clients of its key.
    pub place: Option<Place>,
}

impl<C: Connection> Peer<C> {
    /// # Errors
    /// What is wrong with the handshake, and the connection.
    pub fn new(connection: C, hello: &Hello, credits: usize) -> Result<Self, (String, C)> {
        let control = u64::from(hello.control);
        if !control.is_multiple_of(64) || control + CONTROL_BYTES as u64 > hello.length {
            return Err((format!("control = {control} is outside the client's region"), connection));
        }
        Ok(Self {
            number: 0,
            connection: Some(connection),
            identity: hello.identity,
            attempt: hello.attempt,
            counted: true,
            outbound: Outbound::new(hello.receives.into(), credits),
            slabs: None,
            region: region(hello),
            control,
            inflight: VecDeque::new(),
            pinned: 0,
            serial: 0,
            unsignalled: false,
            proof: None,
            pushed: 0,
            listed: false,
            condemned: false,
            left: false,
            place: None,
        })
    }

    /// Whether it has no connection.
    pub fn is_suspended(&self) -> bool {
        self.connection.is_none()
    }

    /// Its connection, if it has one.
    pub fn connection_id(&self) -> Option<ConnectionId> {
        self.connection.as_ref().map(C::id)
    }

    /// Whether this is an attempt to come back after all others so far, with the same memory. It counts from now on.
    ///
    /// # Errors
    /// Why it is none.
    pub fn expects(&mut self, hello: &Hello) -> Result<(), &'static str> {
        if self.condemned || self.left {
            return Err("the client was put out, or has left");
        }
        if !is_later(hello.attempt, self.attempt) {
            return Err("a later attempt of the client to come back was made before");
        }
        if (hello.length, u64::from(hello.control)) != (self.region.length, self.control) {
            return Err("the client comes back with other memory");
        }
        self.attempt = hello.attempt;
        Ok(())
    }

    /// Its connection has ended, and that has been polled: nothing of it is on its way. Gives the entries that requests read to
    /// `release`.
    pub fn suspend(&mut self, mut release: impl FnMut(Entry)) {
        self.connection = None;
        self.proof_done(false, &mut release);
        self.completed(u64::MAX, &mut release);
        self.unsignalled = false;
    }

    /// It has come back on this connection.
    pub fn attach(&mut self, connection: C, hello: &Hello) {
        assert!(self.is_suspended(), "one connection at a time");
        self.connection = Some(connection);
        self.region = region(hello);
    }

    /// Requests that may be posted now.
    pub fn room(&self) -> usize {
        self.connection.as_ref().map_or(0, C::room)
    }

    /// Hands over what was posted.
    ///
    /// # Errors
    /// The connection is broken, or there is none.
    pub fn ring(&mut self) -> Result<(), PostError> {
        self.connected()?.ring()
    }

    /// Ends the connection, if there is one.
    pub fn disconnect(&mut self) {
        self.connection.as_mut().map(C::disconnect);
    }

    /// Whether its connection can end only with its process.
    pub fn ends_with_process(&self) -> bool {
        self.connection.as_ref().is_some_and(C::ends_with_peer)
    }

    /// A view of its memory, if it is on this host.
    pub fn view(&self, region: RemoteRegion) -> Option<C::View> {
        self.connection.as_ref()?.view(region)
    }

    fn connected(&mut self) -> Result<&mut C, PostError> {
        self.connection.as_mut().ok_or(PostError::Disconnected)
    }

    /// Bytes of its region.
    pub fn region_bytes(&self) -> u64 {
        self.region.length
    }

    /// Whether a push of `bytes` bytes can be posted now, before anything else that waits, within the quota.
    pub fn takes(&self, bytes: usize, quota: usize) -> bool {
        self.room() > RESERVE && self.outbound.slots() == 0 && self.affords(bytes, quota)
    }

    /// Whether `bytes` more bytes of staging are within the quota.
    pub fn affords(&self, bytes: usize, quota: usize) -> bool {
        self.pinned == 0 || self.pinned + bytes <= quota
    }

    /// Posts a WRITE of staged bytes to `at` of the client's region. There is room. [`Peer::completed`] gives the entry back.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn push(&mut self, region: &C::Region, staged: Staged, at: u64) -> Result<(), PostError> {
        let serial = self.serial + 1;
        let signal = serial.is_multiple_of(SIGNAL_EVERY).then_some(serial);
        let piece = Sge { region, offset: staged.entry.offset() + staged.from, length: staged.bytes };
        let payload = Payload::Gather(&[piece]);
        let to = self.region.at(at);
        self.connected()?.post(Post::Write { payload, to, immediate: None, signal })?;
        self.unsignalled = signal.is_none();
        self.pushed += staged.bytes as u64;
        self.pin(staged);
        Ok(())
    }

    /// Posts the SEND of a staged answer; the last word completes as [`FAULT_ID`].
    ///
    /// # Errors
    /// The connection is broken.
    pub fn send(&mut self, region: &C::Region, staged: Staged) -> Result<(), PostError> {
        let id = if self.outbound.is_last_word() { FAULT_ID } else { self.serial + 1 };
        let piece = Sge { region, offset: staged.entry.offset(), length: staged.bytes };
        let payload = Payload::Gather(&[piece]);
        self.connected()?.post(Post::Send { payload, immediate: None, signal: Some(id) })?;
        self.unsignalled = false;
        self.pin(staged);
        Ok(())
    }

    fn pin(&mut self, staged: Staged) {
        self.serial += 1;
        self.pinned += staged.bytes;
        self.inflight.push_back((self.serial, staged.entry, staged.bytes));
    }

    /// Posts a READ of a word of the client's into `entry`, behind all pushes so far.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn prove(&mut self, region: &C::Region, entry: Entry) -> Result<(), PostError> {
        let to = self.region.at(self.control);
        if mutant(Mutant::VisibleOnWrite) {
            let payload = Payload::Inline(&[]);
            self.connected()?.post(Post::Write { payload, to, immediate: None, signal: Some(PROOF_ID) })?;
        } else {
            let into = Sge { region, offset: entry.offset(), length: 8 };
            self.connected()?.post(Post::Read { into: &[into], from: to, signal: Some(PROOF_ID) })?;
        }
        self.unsignalled = false;
        self.proof = Some((self.serial, entry));
        Ok(())
    }

    /// The proof has completed (`ok`), or will not: gives what it and all before it read to `release`.
    pub fn proof_done(&mut self, ok: bool, mut release: impl FnMut(Entry)) {
        if let Some((serial, entry)) = self.proof.take() {
            release(entry);
            if ok {
                self.completed(serial, release);
            }
        }
    }

    /// A signalled request is done: gives the entries that it and earlier ones read to `release`.
    pub fn completed(&mut self, serial: u64, mut release: impl FnMut(Entry)) {
        while let Some(&(first, entry, bytes)) = self.inflight.front()
            && first <= serial
        {
            self.inflight.pop_front();
            self.pinned -= bytes;
            release(entry);
        }
    }

    /// Posts the acknowledgement of message `sequence`.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn acknowledge(&mut self, sequence: u64, lsn: u64) -> Result<(), PostError> {
        let word = ack_word(sequence, lsn).to_le_bytes();
        let to = self.region.at(self.control + ack_offset(sequence) as u64);
        let payload = Payload::Inline(&word);
        self.connected()?.post(Post::Write { payload, to, immediate: None, signal: None })
    }

    /// Posts a WRITE with immediate, behind all pushes so far, that also tells how many bytes they were.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn tell(&mut self, immediate: Immediate) -> Result<(), PostError> {
        let pushed = self.pushed.to_le_bytes();
        self.write_words(CONTROL_PUSHED, &pushed, Some(immediate))
    }

    /// Closes the round of `clock`, of which all has been posted: one WRITE of the LSN and the bytes, with the immediate.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn close_round(&mut self, clock: u64, lsn: u64) -> Result<(), PostError> {
        if mutant(Mutant::RoundByPlainWrite) {
            self.write_words(CONTROL_SPARE, &clock.to_le_bytes(), None)?;
        }
        let (at, words) = round_words(clock, lsn, self.pushed);
        self.write_words(at, words.map(u64::to_le_bytes).as_flattened(), Some(Immediate::Round(clock)))
    }

    fn write_words(
        &mut self,
        at: usize,
        words: &[u8],
        immediate: Option<Immediate>,
    ) -> Result<(), PostError> {
        let (payload, to) = (Payload::Inline(words), self.region.at(self.control + at as u64));
        let signal = immediate.map(|_| self.serial);
        let bits = immediate.map(Immediate::encode);
        self.connected()?.post(Post::Write { payload, to, immediate: bits, signal })?;
        self.unsignalled &= immediate.is_none();
        Ok(())
    }

    /// Whether there are posts that nothing will complete: there was no room to ask for it.
    pub fn is_unsignalled(&self) -> bool {
        self.unsignalled
    }

    /// Sees to it that the entries of all posts will be released: asks for a completion if none is under way.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn ask_for_completion(&mut self) -> Result<(), PostError> {
        if self.unsignalled && self.room() > 0 {
            let (payload, to) = (Payload::Inline(&[]), self.region.at(self.control));
            let signal = Some(self.serial);
            self.connected()?.post(Post::Write { payload, to, immediate: None, signal })?;
            self.unsignalled = false;
        }
        Ok(())
    }
}
