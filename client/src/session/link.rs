//! What the threads of a client tell each other about one shard: words, a queue of slabs, and wishes. (A
//! *wish* asks the shard to push an image into a slot: from now on, once, or no longer.) The *holder* is the
//! thread that holds the lock of the [engine](super::engine).
//!
//! | field | written | read |
//! |---|---|---|
//! | `clock` | by the holder, after the round's immediate was polled | by workers, before they look at a copy |
//! | `round_lsn`, then `sealed` | by the holder, before that `clock`, and after all acknowledgements that are visible by then were taken | by workers, before they complete a copy |
//! | `acknowledged_lsn` | by the holder, after the slabs were told | likewise |
//! | `joined` | by the holder, after the first round's `clock` | by the thread that connects |
//! | `visible` | by the holder, when the shard said so | by workers that wait for their updates to be visible to all |
//! | `outgoing` | workers append slabs; the holder takes them | |
//! | `due` | by the worker whose `clock()` raised the client's clock, after all was handed over | by the holder, before it takes slabs |
//! | `announced` | by the holder, after the batch that ends the clock was posted | by that worker |
//! | `flush` | by threads that want what they handed over sent although no clock ends | by the holder, before it takes slabs |
//! | `posted`, then `flushed` | by the holder, after the batch was posted | by threads that asked |
//! | `wishes` | by workers | by the holder |
//! | `absence` | by the holder, when the connection has ended, and when it goes on; by the thread that tries to connect again | by threads that wait |
//!
//! **Why no update misses its clock.** Workers put every slab stamped below `c` into the queue, and only then
//! is `due` raised to `c`. The holder reads `due >= c`, and takes and posts every such slab. Then it posts
//! the batch that ends clock `c`. Slabs of later clocks do not delay that batch: a worker that is far ahead
//! cannot keep the slowest one from ending its clock.
//!
//! **Why an unacknowledged batch has an LSN above `acknowledged_lsn` and `round_lsn`.** (The greater of the
//! two is `below` in [`inclusion`](fervor_protocol::inclusion).) Each is raised to an LSN only after the
//! slabs of all batches up to that LSN have been told theirs:
//! - `acknowledged_lsn`: acknowledgements are taken in order.
//! - `round_lsn`: the shard posts acknowledgements before the round's immediate. So when the immediate was
//!   polled, the acknowledgements of all batches up to the round's LSN are visible. The holder takes them
//!   first.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use crossbeam_utils::CachePadded;
use fervor_protocol::{
    ack::ack_offset,
    wire::{SlotRecord, Welcome},
};
use fervor_verbs::{
    Address,
    transport::{RemoteRegion, View},
};

use crate::{cache::Slot, error::Error, known::Known, session::absence::Absence, slab::AnySlab};

/// A wish for a slot, on its way to a shard.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    pub record: SlotRecord,
    pub table: usize,
    pub slot: Slot,
}

/// A slab on its way to a shard.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// The client's number of the table.
    pub table: usize,
    pub slab: Arc<dyn AnySlab>,
    /// Its number among all that were handed over for the shard, from 1.
    pub ticket: u64,
}

/// Slabs that have been handed over and not taken.
#[derive(Debug, Default)]
pub struct Queue {
    slabs: VecDeque<Outgoing>,
    tickets: u64,
}

impl Queue {
    /// The last ticket below which everything has been taken.
    pub fn taken(&self) -> u64 {
        self.slabs.iter().map(|entry| entry.ticket).min().map_or(self.tickets, |first| first - 1)
    }

    /// Takes the slabs for which `wanted`, in their order.
    pub fn take(&mut self, wanted: impl FnMut(&Outgoing) -> bool) -> Vec<Outgoing> {
        let (taken, left) = self.slabs.drain(..).partition(wanted);
        self.slabs = left;
        Vec::from(taken)
    }

    /// Whether there is one stamped below `clock`.
    pub fn has_below(&self, clock: u64) -> bool {
        self.slabs.iter().any(|entry| entry.slab.stamp() < clock)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.slabs.len()
    }
}

/// A shard's memory, seen from here.
#[derive(Debug)]
pub struct InPlace<V> {
    pub view: V,
    /// Byte offset of the ring of this client's announcements.
    announcements: usize,
}

impl<V: View> InPlace<V> {
    /// `announcements`: where the shard announces this client's batches, if there is a ring of them.
    pub fn new(view: V, announcements: u64) -> Option<Self> {
        let announcements = usize::try_from(announcements).ok()?;
        let end = announcements.checked_add(fervor_protocol::limits::ANNOUNCE_BYTES)?;
        (announcements.is_multiple_of(8) && end <= view.len()).then_some(Self { view, announcements })
    }

    /// The word that announces `batch`.
    #[inline]
    pub fn announced(&self, batch: u64) -> u64 {
        self.view.load(self.announcements + ack_offset(batch))
    }
}

/// What a shard has said, which workers read at each `get`: in cache lines that nothing else is written to, though a queue
/// that all workers write lies beside.
#[derive(Debug)]
struct Told {
    clock: AtomicU64,
    round_lsn: AtomicU64,
    /// The clock of the last round of which the LSN is known.
    sealed: AtomicU64,
    acknowledged_lsn: AtomicU64,
}

/// See the module.
#[derive(Debug)]
pub struct Link<V> {
    pub address: Address,
    /// Number of the shard in its server.
    pub shard: u16,
    pub welcome: Welcome,
    /// Byte offset of the control block in the client's region.
    pub control: usize,
    /// The shard's memory, if it is on this host and copies are not insisted on.
    pub place: OnceLock<InPlace<V>>,
    told: CachePadded<Told>,
    /// The shard has closed a round, so it has taken this client into its vector clock.
    pub joined: AtomicBool,
    /// Number of this client's last batch that is visible to all: value-bounded tables.
    pub visible: AtomicU64,
    outgoing: CachePadded<Mutex<Queue>>,
    /// How many slabs wait in `outgoing`.
    pub waiting: AtomicU64,
    pub due: AtomicU64,
    pub announced: AtomicU64,
    /// The ticket up to which slabs are to be sent, though no clock ends.
    pub flush: AtomicU64,
    /// The ticket up to which they are posted, in batches up to `posted`.
    pub flushed: AtomicU64,
    /// Number of the last batch posted.
    pub posted: AtomicU64,
    pub wishes: Mutex<Vec<Wish>>,
    pub absence: Absence,
    /// By which way it is connected, for people: written by who connects, and when it was connected again.
    pub way: Mutex<String>,
    /// How long the shard may be out of reach before it is lost.
    pub lease: Duration,
    /// Why it is of no more use.
    pub end: OnceLock<Error>,
}

impl<V: View> Link<V> {
    pub fn new(address: Address, shard: u16, welcome: Welcome, control: usize, lease: Duration) -> Self {
        Self {
            address,
            shard,
            control,
            place: OnceLock::new(),
            told: CachePadded::new(Told {
                clock: AtomicU64::new(welcome.clock),
                round_lsn: AtomicU64::new(0),
                sealed: AtomicU64::new(0),
                acknowledged_lsn: AtomicU64::new(0),
            }),
            joined: AtomicBool::new(false),
            visible: AtomicU64::new(welcome.origin),
            outgoing: CachePadded::default(),
            waiting: AtomicU64::new(0),
            due: AtomicU64::new(0),
            announced: AtomicU64::new(0),
            flush: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
            posted: AtomicU64::new(welcome.origin),
            wishes: Mutex::new(Vec::new()),
            absence: Absence::default(),
            way: Mutex::default(),
            lease,
            end: OnceLock::new(),
            welcome,
        }
    }

    /// The greatest clock that the shard is known to have reached: all updates stamped below are in what is read from now on.
    #[inline]
    pub fn clock(&self) -> u64 {
        let told = self.told.clock.load(Ordering::Acquire);
        // SYNC POINT: the shard publishes the word after it has applied all below it.
        self.place.get().map_or(told, |place| place.view.load(0).max(told))
    }

    /// The clock of the last round that was polled.
    #[inline]
    pub fn round(&self) -> u64 {
        self.told.clock.load(Ordering::Acquire)
    }

    /// What is known before a look at a copy.
    #[inline]
    pub fn known(&self) -> Known {
        let (clock, sealed) = (self.round(), self.told.sealed.load(Ordering::Acquire));
        Known { clock, sealed, round_lsn: self.told.round_lsn.load(Ordering::Acquire) }
    }

    /// The round of `clock` was closed at `lsn`, and all acknowledgements up to that have been taken.
    pub fn seal(&self, clock: u64, lsn: u64) {
        self.told.round_lsn.fetch_max(lsn, Ordering::Release);
        self.told.sealed.fetch_max(clock, Ordering::Release);
    }

    /// A round is closed.
    pub fn rise(&self, clock: u64) {
        // SYNC POINT: the pushes of the round are visible; who acquires the clock may rely on it.
        self.told.clock.fetch_max(clock, Ordering::Release);
    }

    /// All batches of this client up to `lsn` are acknowledged, and the slabs were told.
    pub fn acknowledge(&self, lsn: u64) {
        self.told.acknowledged_lsn.fetch_max(lsn, Ordering::Release);
    }

    /// The LSN up to which this client's batches are acknowledged.
    #[inline]
    pub fn acknowledged(&self) -> u64 {
        self.told.acknowledged_lsn.load(Ordering::Acquire)
    }

    /// An LSN below all of this client's unacknowledged batches.
    #[inline]
    pub fn below(&self) -> u64 {
        self.acknowledged().max(self.told.round_lsn.load(Ordering::Acquire))
    }

    /// The region of the shard.
    pub fn region(&self) -> RemoteRegion {
        RemoteRegion { address: self.welcome.address, length: self.welcome.length, key: self.welcome.key }
    }

    /// The queue of slabs.
    pub fn outgoing(&self) -> MutexGuard<'_, Queue> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a slab over.
    pub fn hand_over(&self, table: usize, slab: Arc<dyn AnySlab>) {
        let mut queue = self.outgoing();
        queue.tickets += 1;
        let ticket = queue.tickets;
        queue.slabs.push_back(Outgoing { table, slab, ticket });
        self.waiting.store(queue.slabs.len() as u64, Ordering::Release);
    }

    /// Asks for everything handed over to be sent. It is when `flushed` is what this returns, or more.
    pub fn ask_flush(&self) -> u64 {
        let ticket = self.outgoing().tickets;
        self.flush.fetch_max(ticket, Ordering::AcqRel);
        ticket
    }

    /// The shard's server is gone, as a completion says.
    pub fn lose(&self, cause: impl ToString) {
        let lost = Error::ServerLost { address: self.address.to_string(), cause: cause.to_string() };
        let _ = self.end.set(lost);
    }
}
