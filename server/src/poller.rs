//! A polling thread: the one owner of a shard, its completion queue and its clients' connections.
//!
//! One turn takes mail, polls, and hands what has come to the [core](crate::core). If the shard clock rose,
//! it pushes what changed. Then it posts what waits. A turn costs what there is to do: it looks only at
//! completions, at the images that changed, and at the clients that have something. A turn with nothing to do
//! makes no system call.
//!
//! In idle turns the thread first spins, then yields the processor. After some idle turns it sleeps until the
//! endpoint has something. It has to sleep: two pollers and two workers on two cores must not starve each
//! other. One-sided READs do not wake it, nor does a client that reads in place.
//!
//! | module | knows | does not know |
//! |---|---|---|
//! | [`core`](crate::core) | images, clients, clocks | connections, time |
//! | [`outbound`](crate::outbound) | what waits for a client, in which order | images |
//! | [`posting`](crate::posting) | connections, staging memory | messages |
//! | [`absent`] | who has lost a connection and may come back | messages |
//! | [`parting`] | who is put out, and by when it has to be gone | messages |
//! | this | messages, completions, who comes and goes | |

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering, mpsc::Receiver},
    time::Duration,
};

use fervor_protocol::{
    clock::Departure,
    mutants::{Mutant, mutant},
    wire::{self, Fault, Hello, Kind, MemoryHeader, MessageHeader},
};
use fervor_verbs::transport::{
    Completion, Connection, ConnectionId, Endpoint, Export, ReceiveBuffer, RemoteRegion, Transport, WorkError,
};

use crate::{
    accept::{Mail, Place},
    access::Grant,
    core::{ClientId, Due, Effects, Next, Run, ShardCore, SlotEffect, TableId},
    outbound::MAX_ASKED,
    peer::{FAULT_ID, PROOF_ID, Peer, Slabs},
    posting::Posting,
    share::Share,
};

mod absent;
mod parting;

use absent::Absent;
use parting::Parting;

/// Longest sleep. Nothing is due at any time but the continuous pushes that wait for their budget, and the ends of leases and of last words: messages,
/// ends of connections, mail and the stop all wake the thread.
const SLEEP: Duration = Duration::from_secs(3600);
/// How long a stopping poller still takes what comes, and then waits for its clients to take their last message.
const FAREWELL: Duration = Duration::from_millis(500);
/// Bytes of images that get their checks in a turn, of a table that is being sealed: some 30 µs.
const SEALED_A_TURN: usize = 256 << 10;
/// Images of a table that are pushed continuously before the poller looks again what has come.
const RANKED_A_TURN: usize = 16;

/// See the module.
pub struct Poller<T: Transport> {
    transport: T,
    endpoint: T::Endpoint,
    mail: Receiver<Mail<T::Connection>>,
    core: ShardCore,
    posting: Posting<T>,
    share: Arc<Share>,
    /// Whose connection it is.
    clients: BTreeMap<ConnectionId, ClientId>,
    absent: Absent,
    parting: Parting,
    readers: BTreeMap<ConnectionId, T::Connection>,
    completions: Vec<Completion>,
    /// Completions of connections whose mail has not come yet.
    early: Vec<Completion>,
    /// When a budget allows the next continuous push, if images wait for that.
    next_push: Option<Duration>,
    /// Registration of the shard's rows: lives as long as the connections through which they are read.
    _export: Arc<dyn Export>,
}

impl<T: Transport> Poller<T> {
    pub fn new(
        transport: T,
        endpoint: T::Endpoint,
        mail: Receiver<Mail<T::Connection>>,
        core: ShardCore,
        posting: Posting<T>,
        share: Arc<Share>,
        export: Arc<dyn Export>,
    ) -> Self {
        Self {
            absent: Absent::new(share.lease),
            parting: Parting::default(),
            transport,
            endpoint,
            mail,
            core,
            posting,
            share,
            clients: BTreeMap::new(),
            readers: BTreeMap::new(),
            completions: Vec::new(),
            early: Vec::new(),
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
                self.endpoint.wait(self.next_due().unwrap_or(SLEEP));
            }
        }
        self.farewell();
    }

    /// What has been received is applied, clients are told, and get some time to take it.
    fn farewell(&mut self) {
        // Busy clients could go on for ever.
        let end = self.transport.now() + FAREWELL;
        while self.turn() > 0 && self.transport.now() < end {}
        self.core.stop_clock();
        self.give_up_absent();
        for id in self.posting.ids() {
            self.condemn(id, "the server stops");
        }
        let end = self.transport.now() + FAREWELL;
        let mut turn = 0;
        loop {
            self.turn();
            if self.posting.is_empty() || self.transport.now() >= end {
                break;
            }
            self.transport.relax(turn);
            turn += 1;
        }
    }

    /// Does what there is to do; returns how much that was.
    fn turn(&mut self) -> usize {
        let mut work = self.take_mail() + self.take_completions() + self.end_leases() + self.hang_up();
        if work > 0 {
            self.posting.post_acknowledgements();
            self.push_changes();
        }
        work += usize::from(self.core.seal_some(SEALED_A_TURN));
        self.take_answers();
        work += self.posting.pump(&mut self.core);
        if work > 0 && self.core.is_value_bounded() {
            self.tell_visible();
            work += self.posting.pump(&mut self.core);
        }
        let pushed = self.push_continuously();
        if pushed > 0 {
            work += pushed + self.posting.pump(&mut self.core);
        }
        work
    }

    fn take_mail(&mut self) -> usize {
        let mut taken = 0;
        while let Ok(Mail { connection, hello, grant, place }) = self.mail.try_recv() {
            taken += 1;
            match hello {
                None => drop(self.readers.insert(connection.id(), connection)),
                Some(hello) if hello.attempt > 0 => self.come_back(connection, hello, &grant),
                Some(hello) => self.join(connection, &hello, grant, place),
            }
        }
        taken
    }

    fn join(&mut self, connection: T::Connection, hello: &Hello, grant: Grant, place: Option<Place>) {
        let connection_id = connection.id();
        let mut peer = match Peer::new(connection, hello, self.share.credits) {
            Ok(peer) => peer,
            Err((text, mut connection)) => {
                eprintln!("fervor-server: a client is refused: {text}");
                self.share.clients.fetch_sub(1, Ordering::Release);
                // It did not even say where to answer. Kept until its end has been polled, as if it were a lane.
                self.share.lanes.fetch_add(1, Ordering::Release);
                connection.disconnect();
                self.readers.insert(connection_id, connection);
                return;
            }
        };
        peer.place = place;
        let region = peer.region_bytes();
        let id = self.posting.add(peer);
        self.clients.insert(connection_id, id);
        if !self.absent.knows(hello.identity, id) {
            return self.condemn(id, "another client has the same identity");
        }
        let joined = if grant.observes(hello) {
            Ok(self.core.observe(id, region))
        } else {
            self.core.join(id, hello.clients.into(), region)
        };
        match joined {
            Ok(number) => {
                self.core.grant(id, grant);
                let (clock, lsn) = (self.core.clock(), self.core.round_lsn());
                let peer = self.posting.peer(id).expect("it was added");
                peer.number = number;
                // The clock may have risen since the handshake told it.
                peer.outbound.close_round(clock, lsn);
                self.posting.list(id);
            }
            Err(fault) => self.condemn(id, &fault.to_string()),
        }
    }

    fn take_completions(&mut self) -> usize {
        let mut completions = std::mem::take(&mut self.completions);
        completions.append(&mut self.early);
        let waiting = completions.len();
        self.endpoint.poll(&mut completions);
        let polled = completions.len() - waiting;
        for completion in completions.drain(..) {
            self.complete(completion);
        }
        self.completions = completions;
        polled
    }

    fn complete(&mut self, completion: Completion) {
        let connection = match &completion {
            Completion::Work { connection, .. }
            | Completion::Received { connection, .. }
            | Completion::WriteImmediate { connection, .. }
            | Completion::Disconnected { connection, .. } => *connection,
        };
        let Some(&id) = self.clients.get(&connection) else {
            return self.complete_reader(connection, completion);
        };
        match completion {
            Completion::Received { buffer, .. } => self.received(id, buffer),
            Completion::Work { id: work, result, .. } => self.worked(id, work, result.is_ok()),
            // Clients write nothing here: no memory of a server is remotely writable.
            Completion::WriteImmediate { .. } => self.condemn(id, "a client sends no immediates"),
            Completion::Disconnected { cause, .. } => self.gone(connection, id, cause),
        }
    }

    /// A completion of a connection that is no client's: a reader's, or one whose mail has not come yet.
    fn complete_reader(&mut self, connection: ConnectionId, completion: Completion) {
        let Some(reader) = self.readers.get_mut(&connection) else { return self.early.push(completion) };
        match completion {
            // It carries READs only.
            Completion::Received { buffer, .. } => {
                self.endpoint.release(buffer);
                reader.disconnect();
            }
            Completion::WriteImmediate { .. } => reader.disconnect(),
            Completion::Disconnected { .. } => self.reader_gone(connection),
            Completion::Work { .. } => {}
        }
    }

    fn reader_gone(&mut self, connection: ConnectionId) {
        drop(self.readers.remove(&connection));
        self.share.lanes.fetch_sub(1, Ordering::Release);
    }

    fn worked(&mut self, id: ClientId, work: u64, ok: bool) {
        if work == PROOF_ID {
            self.core.proof_done(id, ok);
            self.posting.proof_done(id, ok);
            // More may have been pushed behind it: that is to be proved next.
            return self.posting.list(id);
        }
        self.posting.completed(id, work);
        if work == FAULT_ID
            && let Some(peer) = self.posting.peer(id)
        {
            peer.disconnect();
        }
    }

    /// The connection of a client has ended: it may come back, or is gone.
    fn gone(&mut self, connection: ConnectionId, id: ClientId, cause: WorkError) {
        self.clients.remove(&connection);
        let Some(peer) = self.posting.peer(id) else { return };
        if peer.condemned {
            self.parting.ended(connection);
        }
        let may_come_back = !peer.left && !peer.condemned && !peer.ends_with_process();
        let identity = peer.identity;
        self.posting.suspend(id);
        self.core.proof_done(id, false);
        if may_come_back && self.absent.keeps(identity, id) {
            self.suspended(id, cause);
        } else {
            self.bury(id, &cause.to_string());
        }
    }

    /// A client is gone for good. It has no connection.
    fn bury(&mut self, id: ClientId, cause: &str) {
        let Some(peer) = self.posting.remove(id) else { return };
        let attempt = self.absent.forget(peer.identity, id);
        if let Some(attempt) = attempt.and_then(|attempt| self.readers.get_mut(&attempt)) {
            attempt.disconnect();
        }
        if peer.counted && !peer.left {
            self.share.clients.fetch_sub(1, Ordering::Release);
        }
        if !peer.counted {
            self.parting.stranger_gone();
        }
        if !peer.left && !peer.condemned {
            eprintln!("fervor-server: client {} is gone ({cause}); the others go on without it", peer.number);
        }
        self.core.forget(id);
    }

    fn received(&mut self, id: ClientId, buffer: ReceiveBuffer) {
        let message = self.endpoint.message(&buffer);
        let outcome = match self.posting.peer(id) {
            Some(peer) if !peer.condemned => handle(&mut self.core, id, peer, message),
            _ => Ok(None),
        };
        // The credit goes back only now that the message has been applied.
        self.endpoint.release(buffer);
        match outcome {
            Ok(left) => {
                if let Some(how) = left {
                    if let (Departure::Died, Some(peer)) = (how, self.posting.peer(id)) {
                        let number = peer.number;
                        eprintln!(
                            "fervor-server: client {number} was dropped without close(); the others go on without it"
                        );
                    }
                    // It sends nothing more: its receive buffers are free for another client from now on.
                    self.share.clients.fetch_sub(1, Ordering::Release);
                }
                self.posting.list(id);
            }
            Err(fault) => self.condemn(id, &fault.to_string()),
        }
    }

    /// Pushes what changed: in value-bounded tables, and if the shard clock rose in all that are pushed in rounds.
    fn push_changes(&mut self) {
        let rose = self.core.take_risen();
        if rose.is_none() && !self.core.is_value_bounded() {
            return;
        }
        let due = if rose.is_some() { Due::Round } else { Due::Batches };
        let mut table = 0;
        while let Some(run) = self.core.take_run(due, &mut table, self.posting.run_bytes()) {
            self.posting.push_run(&mut self.core, &run);
        }
        if let Some(clock) = rose {
            self.share.clock.store(clock, Ordering::Release);
            self.posting.close_rounds(clock, self.core.round_lsn());
        }
    }

    /// Answers that the core has, to those who are still listened to.
    fn take_answers(&mut self) {
        while let Some((id, answer)) = self.core.take_answer() {
            if let Some(peer) = self.posting.peer(id).filter(|peer| !peer.condemned) {
                peer.outbound.answer(answer);
                self.posting.list(id);
            }
        }
    }

    /// Leaves word for the clients whose batches have become visible to all.
    fn tell_visible(&mut self) {
        let posting = &mut self.posting;
        self.core.follow_visible(|id, number| {
            if let Some(peer) = posting.peer(id).filter(|peer| !peer.condemned && !peer.left) {
                peer.outbound.tell_visible(number);
                posting.list(id);
            }
        });
    }

    /// Pushes what the budgets allow and the clients can take, and notes until when a budget makes images wait. How many images.
    fn push_continuously(&mut self) -> usize {
        self.next_push = None;
        if !self.core.ranks_images() {
            return 0;
        }
        let now = self.transport.now();
        (0..self.core.tables()).map(|table| self.push_ranked(table, now)).sum()
    }

    /// The same, of one table.
    fn push_ranked(&mut self, table: TableId, now: Duration) -> usize {
        for pushed in 0..RANKED_A_TURN {
            let image = match self.core.next_ranked(table, now) {
                Next::Image(image) => image,
                Next::At(free) => {
                    self.next_push = Some(self.next_push.map_or(free, |other| other.min(free)));
                    return pushed;
                }
                Next::Nothing => return pushed,
            };
            let run = Run { table, images: image..image + 1 };
            let can = self.posting.can_push(&self.core, &run);
            if !can && !mutant(Mutant::RankingForgotten) {
                return pushed;
            }
            let bytes = if can { self.posting.bytes_pushed(&self.core, &run) } else { 0 };
            self.core.take_ranked(table, image, now, bytes);
            if can {
                self.posting.push_run(&mut self.core, &run);
            }
        }
        RANKED_A_TURN
    }

    /// How long the poller may sleep until something is due.
    fn next_due(&self) -> Option<Duration> {
        let lease = self.absent.next_end().map(|end| end.saturating_sub(self.transport.now()));
        let parting = self.parting.next_end().map(|end| end.saturating_sub(self.transport.now()));
        [self.until_next_push(), lease, parting].into_iter().flatten().min()
    }

    /// How long until a budget allows the next push, as [`Poller::push_continuously`] saw it; it may
    /// be no time by now. (What clients could not take they can when a completion says so, which wakes the poller.)
    fn until_next_push(&self) -> Option<Duration> {
        self.next_push.map(|at| at.saturating_sub(self.transport.now()))
    }
}

/// Has a message done, and leaves word of what follows from it. If it was the client's last one, how that goes.
fn handle<C: Connection>(
    core: &mut ShardCore,
    id: ClientId,
    peer: &mut Peer<C>,
    message: &[u8],
) -> Result<Option<Departure>, Fault> {
    let header = MessageHeader::parse(message)?;
    peer.outbound.admit(&header)?;
    if header.kind == Kind::Memory as u8 && peer.slabs.is_none() {
        let MemoryHeader { address, length, key, .. } = wire::body(message, "memory")?;
        peer.slabs = peer.view(RemoteRegion { address, length, key }).map(Slabs);
    }
    let Effects { lsn, slots, closed, left } = core.handle(id, message, peer.slabs.as_ref())?;
    for effect in slots {
        match effect {
            SlotEffect::Push(slot) => peer.outbound.push_slot(slot),
            SlotEffect::Stop(slot) => peer.outbound.stop_slot(&slot),
            SlotEffect::StopTable(table) => peer.outbound.stop_table(table),
        }
    }
    let most = core.subscriptions(id) + MAX_ASKED;
    if peer.outbound.slots() > most {
        let waiting = peer.outbound.slots();
        return Err(Fault::State(format!(
            "{waiting} slots wait to be pushed: at most {most} may, {MAX_ASKED} of them not subscribed"
        )));
    }
    if closed {
        peer.outbound.close(header.sequence);
    }
    if left.is_some() {
        peer.left = true;
        peer.place = None;
        peer.outbound.stop();
    }
    peer.outbound.acknowledge(header.sequence, lsn);
    Ok(left)
}
