//! Everything that is posted to clients, and the staging memory that it is posted from.
//!
//! ```text
//!   a run of images ──copied once──▶ staging entry ──WRITE──▶ mirror of client 1
//!                                        ├────────WRITE──▶ mirror of client 2
//!                                        └─part of it─WRITE──▶ slot of client 3
//! ```
//!
//! **A client that cannot take more** is owed what it could not take, each image once, and its round is
//! closed later. Nobody else waits. There are three reasons: its send queue is full; staging is full, or the
//! client's quota of it is used; there is no receive buffer for an immediate.
//!
//! **Who has something.** A client is in the list `busy` from the moment when something is to be posted to it
//! until nothing waits any more. A turn looks at those clients alone.

use fervor_protocol::{
    limits::REPLY_BYTES,
    mutants::{Mutant, mutant},
};
use fervor_verbs::transport::{PostError, Region, Transport};

use crate::{
    core::{ClientId, CopyKind, Delivery, Run, ShardCore},
    outbound::{Item, RESERVE, Room},
    peer::{Peer, Staged},
    staging::{Entry, Staging},
};

/// Bytes of images that go in one WRITE, unless one image is longer.
const RUN_BYTES: usize = 16 << 10;

/// See the module.
pub struct Posting<T: Transport> {
    /// By place.
    peers: Vec<Option<Peer<T::Connection>>>,
    staging: Staging<T::Region>,
    /// Bytes of staging that what is on its way to one client may take.
    quota: usize,
    busy: Vec<ClientId>,
    /// Kept for its memory.
    deliveries: Vec<Delivery>,
}

/// What became of an attempt to post.
enum Outcome {
    Posted,
    /// There is no staging memory for it now.
    NoStaging,
    /// The connection is broken; its end is about to be polled.
    Broken,
}

impl From<Result<(), PostError>> for Outcome {
    fn from(result: Result<(), PostError>) -> Self {
        if result.is_ok() { Self::Posted } else { Self::Broken }
    }
}

impl<T: Transport> Posting<T> {
    /// To nobody yet, from `staging`, of which a client may use `quota` bytes.
    pub fn new(staging: Staging<T::Region>, quota: usize) -> Self {
        Self { peers: Vec::new(), staging, quota, busy: Vec::new(), deliveries: Vec::new() }
    }

    /// Takes a place for a client.
    pub fn add(&mut self, peer: Peer<T::Connection>) -> ClientId {
        let place = self.peers.iter().position(Option::is_none).unwrap_or(self.peers.len());
        if place == self.peers.len() {
            self.peers.push(None);
        }
        self.peers[place] = Some(peer);
        ClientId(place as u32)
    }

    /// The connection of a client has ended: nothing of it is on its way.
    pub fn suspend(&mut self, id: ClientId) {
        let staging = &mut self.staging;
        if let Some(peer) = self.peers.get_mut(id.0 as usize).and_then(Option::as_mut) {
            peer.suspend(|entry| staging.release(entry));
        }
    }

    /// A client is gone. It has been suspended: nothing is on its way to it.
    pub fn remove(&mut self, id: ClientId) -> Option<Peer<T::Connection>> {
        let peer = self.peers.get_mut(id.0 as usize)?.take()?;
        assert!(peer.is_suspended(), "its connection has ended");
        Some(peer)
    }

    /// The client in a place.
    pub fn peer(&mut self, id: ClientId) -> Option<&mut Peer<T::Connection>> {
        self.peers.get_mut(id.0 as usize)?.as_mut()
    }

    /// All places that are taken.
    pub fn ids(&self) -> Vec<ClientId> {
        let taken = self.peers.iter().enumerate().filter(|(_, peer)| peer.is_some());
        taken.map(|(place, _)| ClientId(place as u32)).collect()
    }

    /// Whether there are no clients.
    pub fn is_empty(&self) -> bool {
        self.peers.iter().all(Option::is_none)
    }

    /// There is something to post to a client.
    pub fn list(&mut self, id: ClientId) {
        if let Some(peer) = self.peers[id.0 as usize].as_mut().filter(|peer| !peer.listed) {
            peer.listed = true;
            self.busy.push(id);
        }
    }

    /// A request of a client is done.
    pub fn completed(&mut self, id: ClientId, serial: u64) {
        if let Some(peer) = self.peers[id.0 as usize].as_mut() {
            peer.completed(serial, |entry| self.staging.release(entry));
        }
    }

    /// The proof of a client is here (`ok`), or will not come.
    pub fn proof_done(&mut self, id: ClientId, ok: bool) {
        if let Some(peer) = self.peers[id.0 as usize].as_mut() {
            peer.proof_done(ok, |entry| self.staging.release(entry));
        }
    }

    /// Every client that is listened to has a round to close.
    pub fn close_rounds(&mut self, clock: u64, lsn: u64) {
        for place in 0..self.peers.len() {
            let listening = |peer: &&mut Peer<T::Connection>| !peer.condemned && !peer.left;
            if let Some(peer) = self.peers[place].as_mut().filter(listening) {
                peer.outbound.close_round(clock, lsn);
                self.list(ClientId(place as u32));
            }
        }
    }

    /// Bytes of images that are pushed together.
    pub fn run_bytes(&self) -> usize {
        RUN_BYTES.min(self.quota)
    }

    /// Pushes a run to all who hold its images; those that cannot take it now are owed it.
    pub fn push_run(&mut self, core: &mut ShardCore, run: &Run) {
        let mut deliveries = std::mem::take(&mut self.deliveries);
        core.deliveries(run, &mut deliveries);
        let mut snapshot = None;
        for delivery in &deliveries {
            let bytes = bytes_of(core, run, delivery);
            let can = !delivery.behind && self.can_take(delivery, bytes);
            let staged = if can { self.stage(core, run, &mut snapshot) } else { None };
            if core.waits_for_visible(run.table) && !(staged.is_none() && mutant(Mutant::QueuedUnproved)) {
                core.wants_proof(delivery.client);
            }
            if self.is_suspended(delivery.client) {
                // When it comes back it is owed all.
                continue;
            }
            match staged {
                Some(entry) => {
                    let from = (delivery.images.start - run.images.start) as usize * core.stride(run.table);
                    self.write(delivery.client, Staged { entry, from, bytes }, delivery.at);
                }
                None => self.defer(core, run, delivery),
            }
            self.list(delivery.client);
        }
        if let Some(entry) = snapshot {
            self.staging.release(entry);
        }
        self.deliveries = deliveries;
    }

    /// Whether all who hold images of a run can take them at once.
    pub fn can_push(&mut self, core: &ShardCore, run: &Run) -> bool {
        let mut deliveries = std::mem::take(&mut self.deliveries);
        core.deliveries(run, &mut deliveries);
        let can = deliveries
            .iter()
            .filter(|delivery| !self.is_suspended(delivery.client))
            .all(|delivery| !delivery.behind && self.can_take(delivery, bytes_of(core, run, delivery)));
        self.deliveries = deliveries;
        can
    }

    /// Bytes that a push of a run moves, over all clients.
    pub fn bytes_pushed(&mut self, core: &ShardCore, run: &Run) -> usize {
        core.deliveries(run, &mut self.deliveries);
        self.deliveries.iter().map(|delivery| bytes_of(core, run, delivery)).sum()
    }

    fn is_suspended(&self, id: ClientId) -> bool {
        self.peers[id.0 as usize].as_ref().is_some_and(Peer::is_suspended)
    }

    fn can_take(&self, delivery: &Delivery, bytes: usize) -> bool {
        let peer = self.peers[delivery.client.0 as usize].as_ref();
        peer.is_some_and(|peer| peer.takes(bytes, self.quota))
    }

    /// The run's images in staging memory: copied when they are first wanted.
    fn stage(&mut self, core: &ShardCore, run: &Run, snapshot: &mut Option<Entry>) -> Option<Entry> {
        if snapshot.is_none() {
            let place = core.place(run);
            let entry = self.staging.reserve(place.len())?;
            self.staging.region().memory().write(entry.offset(), core.bytes(place));
            *snapshot = Some(entry);
        }
        *snapshot
    }

    /// What a client cannot take now waits for it.
    fn defer(&mut self, core: &mut ShardCore, run: &Run, delivery: &Delivery) {
        if mutant(Mutant::PushDropped) {
            return;
        }
        match delivery.copy {
            CopyKind::Mirror => core.owe(delivery.client, run),
            CopyKind::Slot => {
                let slot = delivery.slot(run.table);
                if let Some(peer) = self.peer(delivery.client) {
                    peer.outbound.push_slot(slot);
                }
            }
        }
    }

    /// Posts a WRITE from staging memory, which holds the entry until it is done.
    fn write(&mut self, id: ClientId, staged: Staged, at: u64) -> Outcome {
        let Some(peer) = self.peers[id.0 as usize].as_mut() else { return Outcome::Broken };
        let Ok(()) = peer.push(self.staging.region(), staged, at) else { return Outcome::Broken };
        self.staging.retain(staged.entry);
        if mutant(Mutant::PushFromLiveMemory) {
            peer.completed(u64::MAX, |entry| self.staging.release(entry));
        }
        Outcome::Posted
    }

    /// Posts the acknowledgements that wait, before the pushes of the turn: a reader that finds its own updates in a pushed image
    /// then need not wait to know that they are.
    pub fn post_acknowledgements(&mut self) {
        for id in &self.busy {
            let Some(peer) = self.peers[id.0 as usize].as_mut() else { continue };
            while let Some(item @ Item::Acknowledgement { sequence, lsn }) =
                peer.outbound.next(Room { requests: peer.room(), ..Room::NONE })
                && peer.acknowledge(sequence, lsn).is_ok()
            {
                peer.outbound.posted(item);
            }
        }
    }

    /// Posts what waits for the clients that have something. How much that was.
    ///
    /// Those listed last go first. They are the clients that wait for what others have sent: who sent it is in the list since its
    /// message was taken.
    pub fn pump(&mut self, core: &mut ShardCore) -> usize {
        let mut posted = 0;
        let mut busy = std::mem::take(&mut self.busy);
        busy.reverse();
        busy.retain(|id| {
            posted += self.pump_one(core, *id);
            let Some(peer) = self.peer(*id) else { return false };
            if peer.is_suspended() {
                peer.listed = false;
                return false;
            }
            let waits = peer.outbound.is_busy() || peer.is_unsignalled();
            peer.listed = waits || core.owes(*id) || core.is_proof_due(*id);
            peer.listed
        });
        busy.append(&mut self.busy);
        self.busy = busy;
        posted
    }

    /// Posts what waits for one client, as far as there is room, and rings once.
    fn pump_one(&mut self, core: &mut ShardCore, id: ClientId) -> usize {
        let (mut posted, mut staging) = (0, true);
        loop {
            let run_bytes = self.run_bytes();
            let Some(peer) = self.peer(id) else { return posted };
            let owed = core.owes(id);
            let payable = if owed && staging { core.next_owed(id, run_bytes) } else { None };
            let room = Room {
                requests: peer.room(),
                staging,
                owed,
                payable: payable.is_some(),
                proof: core.is_proof_due(id),
            };
            let Some(item) = peer.outbound.next(room) else { break };
            match self.post(core, id, item, payable) {
                Outcome::Posted => posted += 1,
                Outcome::NoStaging => staging = false,
                Outcome::Broken => break,
            }
        }
        if let Some(peer) = self.peer(id) {
            // Of a broken connection the end is about to be polled.
            let _ = peer.ask_for_completion().and_then(|()| peer.ring());
        }
        posted
    }

    fn post(&mut self, core: &mut ShardCore, id: ClientId, item: Item, owed: Option<(Run, u64)>) -> Outcome {
        let outcome = match item {
            Item::Owed => {
                let (run, at) = owed.expect("it is payable");
                let outcome = self.post_images(core, id, &run, at);
                if matches!(outcome, Outcome::Posted) {
                    core.paid(id, &run);
                }
                outcome
            }
            Item::Slot(slot) => {
                let run = Run { table: slot.table, images: slot.image..slot.image + 1 };
                self.post_images(core, id, &run, slot.at)
            }
            Item::Answer => self.post_answer(id),
            Item::Proof => self.post_proof(core, id),
            Item::Acknowledgement { sequence, lsn } => {
                self.peer(id).expect("it is there").acknowledge(sequence, lsn).into()
            }
            Item::Immediate(immediate) => self.peer(id).expect("it is there").tell(immediate).into(),
            Item::Round { clock, lsn } => self.peer(id).expect("it is there").close_round(clock, lsn).into(),
        };
        if matches!(outcome, Outcome::Posted) {
            self.peer(id).expect("it is there").outbound.posted(item);
        }
        outcome
    }

    /// Posts a run to one client, from a snapshot of its own.
    fn post_images(&mut self, core: &ShardCore, id: ClientId, run: &Run, at: u64) -> Outcome {
        let delivery =
            Delivery { client: id, copy: CopyKind::Mirror, images: run.images.clone(), at, behind: false };
        let bytes = bytes_of(core, run, &delivery);
        let quota = self.quota;
        if !self.peer(id).is_some_and(|peer| peer.affords(bytes, quota)) {
            return Outcome::NoStaging;
        }
        let Some(entry) = self.stage(core, run, &mut None) else { return Outcome::NoStaging };
        let outcome = self.write(id, Staged { entry, from: 0, bytes }, at);
        self.staging.release(entry);
        outcome
    }

    fn post_answer(&mut self, id: ClientId) -> Outcome {
        let Some(entry) = self.staging.reserve(REPLY_BYTES) else { return Outcome::NoStaging };
        let peer = self.peers[id.0 as usize].as_mut().expect("it is there");
        let answer = peer.outbound.first_answer();
        let bytes = answer.len();
        self.staging.region().memory().write(entry.offset(), answer);
        let sent = peer.send(self.staging.region(), Staged { entry, from: 0, bytes });
        if sent.is_err() {
            self.staging.release(entry);
        }
        sent.into()
    }

    fn post_proof(&mut self, core: &mut ShardCore, id: ClientId) -> Outcome {
        let Some(entry) = self.staging.reserve(8) else { return Outcome::NoStaging };
        let peer = self.peers[id.0 as usize].as_mut().expect("it is there");
        let posted = peer.prove(self.staging.region(), entry);
        match posted {
            Ok(()) => core.proof_posted(id),
            Err(_) => self.staging.release(entry),
        }
        posted.into()
    }
}

/// Bytes of a delivery: all of its images, the last one without what lies behind its data.
fn bytes_of(core: &ShardCore, run: &Run, delivery: &Delivery) -> usize {
    let mut before_last = (delivery.images.end - delivery.images.start - 1) as usize;
    if mutant(Mutant::RunCutShort) && before_last > 0 {
        before_last -= 1;
    }
    before_last * core.stride(run.table) + core.image_bytes(run.table)
}

const _: () = assert!(RESERVE >= 3, "acknowledgements and immediates find room");
