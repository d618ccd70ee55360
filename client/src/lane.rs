//! READ lanes: an endpoint with a connection to each shard, by which the workers of a client READ. Workers share lanes.
//!
//! A server pays for each connection, so a client has a few lanes ([`ReadLanes`]), however many workers it has. A worker that READs for
//! the first time takes a *seat* in the lane with the fewest workers. A lane is made when somebody takes its first seat, its connection
//! to a shard when somebody READs there for the first time, and all of it goes with its last worker. Reads that need no READ cost no
//! connection.
//!
//! ```text
//!  worker ──post, ring──▶ Line (mutex) ──▶ shard                  a READ's id names the seat and the place
//!  worker ──try_lock────▶ Hub: poll ──┬──▶ own READ: at once
//!                                     ├──▶ another's: `landed` of its seat
//!                                     └──▶ a connection has ended: `ends`
//! ```
//!
//! | word | who writes | who reads, after which event |
//! |---|---|---|
//! | `Seat::landed`, a bit for each place | who holds the hub sets it (release), after it polled the completion | the seat's worker clears it (acquire), and then reads the place |
//! | `ends`, `ended` | who holds the hub, after it polled the end | every worker of the lane, at each turn of waiting |
//! | `asleep` | who holds the hub: before it sleeps with it, and after | who wants the hub and finds it taken |
//! | `Line::waiting` | who finds the send queue full, under the line's mutex | the same |
//!
//! **Nobody polls for the others as a duty.** A worker polls while it waits for READs of its own, or for room, and takes what
//! completes for the others along. It never holds the hub while it is awake but does not poll. So whoever waits either gets
//! the hub, or finds it held by somebody who polls, or by somebody who sleeps.
//!
//! **A completion goes to the right worker, once.** A place is in flight at most once: its worker posts it again only after it has
//! taken its completion. So a bit is set at most once before it is cleared. The completion was polled before the bit was set, so the
//! data is in the place when the worker sees the bit. A worker that polls its own completion needs no bit.
//!
//! **No wake-up is lost.** A worker sleeps in one of two places: with the hub, where every completion of the lane and every end wakes
//! it; or at `bell`, only while another sleeps with the hub. The sleeper hands out what it finds, clears `asleep`, lets go of the hub,
//! and *then* rings the bell. Another reads the bell's epoch first, then `asleep`, then its bits, and sleeps only if `asleep` was set
//! and the bits are clear. Who set `asleep` has the hub, so it has seen all that was handed out before, and so does who has seen it
//! set. What is handed out after that, this sleeper hands out, and then it rings. It has not rung before the epoch was
//! read, or `asleep` would have been seen clear. A worker that leaves while awake need not ring: who saw no sleeper is awake, too.
//!
//! **A full send queue.** READs of many workers may be more than a connection's queue takes. Who finds it full joins `waiting` and posts
//! when it is first, so nobody is overtaken for ever. It rings for what others posted and did not ring for yet, and polls. So
//! what is in the queue completes, and there is room.
//!
//! **The memory of a worker that is gone.** A worker may be dropped while READs are on their way to its places. The
//! provider keeps the region as long as the connections that named it. The seat keeps it, too, and is given to another worker only
//! when all those READs have completed.
//!
//! **Ends.** [`Lane::end`] is where a broken connection is noticed. Each worker of the lane is told of each end, by the call in which it
//! waits or posts next. A lane with an end gets no new workers. What was in flight is not accounted for then, so its
//! seats are not used again. If the server can be waited for ([`Link::lease`](crate::session::link::Link::lease)), each worker goes to
//! another lane, which is made anew if need be, and posts what it waits for again there: a READ may happen twice, and what is READ later is
//! as good ([`Reader`](crate::reader::Reader)). The old lane ends with its last worker. Otherwise the server is lost, and the
//! worker reads no more ([`Core::alive`]).

use std::{
    collections::VecDeque,
    mem,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, TryLockError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fervor_protocol::mutants::{Mutant, mutant};
use fervor_verbs::transport::{
    Completion, Connection, ConnectionId, Endpoint, EndpointConfig, Post, PostError, RemoteAddress, Sge,
    Signal, Transport, WorkError,
};

mod seat;

pub use seat::{Left, Seat};

use crate::{
    connect::{Unmade, connect_lane, next_completion_vector},
    error::Error,
    lock::lock,
    options::{ClientOptions, ReadLanes},
    session::core::{Core, For},
};

/// Longest sleep: what is waited for wakes, and a peer that has died is found out by polling.
const NAP: Duration = Duration::from_millis(1);
/// Time between two tries to connect to a server that is out of reach.
pub const PAUSE: Duration = Duration::from_millis(20);
/// READs in the send queue of a connection that workers share. A NIC has 16 of them in flight.
const SHARED_DEPTH: usize = 64;

/// The lanes of a client that have workers.
pub struct Lanes<T: Transport> {
    all: Mutex<Vec<Weak<Lane<T>>>>,
    /// Some lane had to be made anew.
    pub broke: Arc<AtomicBool>,
}

/// A worker's seat in a lane.
pub struct Seated<T: Transport> {
    pub lane: Arc<Lane<T>>,
    pub seat: Arc<Seat<T>>,
    /// What the last worker left there, if there was one.
    pub left: Option<Left<T>>,
}

impl<T: Transport> Default for Lanes<T> {
    fn default() -> Self {
        Self { all: Mutex::default(), broke: Arc::default() }
    }
}

impl<T: Transport> Lanes<T> {
    /// A seat in the lane with the fewest workers, or in a new one if there may be one more.
    ///
    /// # Errors
    /// The transport cannot make an endpoint.
    pub fn join(&self, core: &Core<T>) -> Result<Seated<T>, Error> {
        let most = match core.options.read_lanes {
            ReadLanes::Shared(lanes) => usize::from(lanes),
            ReadLanes::PerWorker => usize::MAX,
        };
        // Dropped after the lock: the last of its workers may leave a lane meanwhile.
        let all: Vec<_>;
        let mut lanes = lock(&self.all);
        all = lanes.iter().filter_map(Weak::upgrade).filter(|lane| !lane.has_ended()).collect();
        let lane = if all.len() < most {
            Arc::new(Lane::new(core, self.broke.clone())?)
        } else {
            // Besides the list of this call, each worker holds its lane once.
            all.iter().min_by_key(|lane| Arc::strong_count(lane)).expect("there may be a lane").clone()
        };
        *lanes = all.iter().map(Arc::downgrade).collect();
        if !all.iter().any(|other| Arc::ptr_eq(other, &lane)) {
            lanes.push(Arc::downgrade(&lane));
        }
        let (seat, left) = lane.seat();
        Ok(Seated { lane, seat, left })
    }
}

/// A connection, and those who wait until its send queue has room.
struct Line<C> {
    connection: C,
    /// Numbers of seats.
    waiting: VecDeque<usize>,
}

type SharedLine<T> = Mutex<Line<<T as Transport>::Connection>>;

/// What is polled.
struct Hub<T: Transport> {
    endpoint: T::Endpoint,
    completions: Vec<Completion>,
    /// The first so many of the lane's seats.
    seats: Vec<Arc<Seat<T>>>,
}

/// Which connection is to which shard.
#[derive(Default)]
struct Names {
    shards: Vec<(ConnectionId, usize)>,
    /// Ends that were polled before the connection had its name here.
    early: Vec<(ConnectionId, WorkError)>,
}

/// See the module.
pub struct Lane<T: Transport> {
    lines: Box<[OnceLock<SharedLine<T>>]>,
    hub: Mutex<Hub<T>>,
    attach: T::Attach,
    places: usize,
    seats: Mutex<Vec<Arc<Seat<T>>>>,
    names: Mutex<Names>,
    /// A worker connects: others wait, lest one shard is connected to twice.
    connecting: AtomicBool,
    /// [`Lanes::broke`].
    broke: Arc<AtomicBool>,
    /// Connections that have ended: their number, and to which shards they were.
    ends: AtomicUsize,
    ended: Mutex<Vec<(usize, WorkError)>>,
    /// Who holds the hub sleeps with it, and rings `bell` when it has let go.
    asleep: AtomicBool,
    bell: T::Signal,
}

/// Why READs could not be posted, or do not complete.
pub enum Halt {
    /// The connection of the lane to this shard has ended, with this cause: they are to be posted in another lane.
    Ended(usize, String),
    /// A server is lost, or something else went wrong.
    Failed(Error),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// A READ from `remote` to the place of this number, which is at `into`.
pub struct Read<'a, R> {
    pub place: usize,
    pub remote: RemoteAddress,
    pub into: Sge<'a, R>,
}

impl<T: Transport> Lane<T> {
    fn new(core: &Core<T>, broke: Arc<AtomicBool>) -> Result<Self, Error> {
        let places = places(&core.options);
        let depth = match core.options.read_lanes {
            ReadLanes::Shared(_) => places.max(SHARED_DEPTH),
            ReadLanes::PerWorker => places,
        };
        let endpoint = core.transport.endpoint(&EndpointConfig {
            receive_buffers: 1,
            receive_size: 64,
            send_depth: depth,
            read_depth: places.min(16),
            connections: core.links.len(),
            completion_vector: next_completion_vector(),
            core: None,
        })?;
        Ok(Self {
            lines: core.links.iter().map(|_| OnceLock::new()).collect(),
            attach: endpoint.attach(),
            hub: Mutex::new(Hub { endpoint, completions: Vec::new(), seats: Vec::new() }),
            places,
            seats: Mutex::default(),
            names: Mutex::default(),
            connecting: AtomicBool::new(false),
            broke,
            ends: AtomicUsize::new(0),
            ended: Mutex::default(),
            asleep: AtomicBool::new(false),
            bell: core.transport.signal(),
        })
    }

    /// A seat that nobody sits in.
    fn seat(&self) -> (Arc<Seat<T>>, Option<Left<T>>) {
        let mut seats = lock(&self.seats);
        let inherited = seats.iter().find_map(|seat| Some((seat.clone(), Some(seat.inherit()?))));
        inherited.unwrap_or_else(|| {
            let seat = Arc::new(Seat::new(seats.len(), self.places));
            seats.push(seat.clone());
            (seat, None)
        })
    }

    /// Whether a connection has ended.
    fn has_ended(&self) -> bool {
        self.ends.load(Ordering::Acquire) > 0
    }

    /// Looks whether a connection has ended of which the worker that was told of `told` ends has not been told.
    ///
    /// # Errors
    /// One has.
    #[inline]
    pub fn news(&self, core: &Core<T>, told: &mut usize) -> Result<(), Halt> {
        // SYNC POINT: acquires what `end` released.
        if self.ends.load(Ordering::Acquire) == *told {
            return Ok(());
        }
        *told += 1;
        let end = lock(&self.ended).get(*told - 1).copied();
        end.map_or(Ok(()), |(shard, cause)| Err(self.halt(core, shard, cause)))
    }

    /// The connection to `shard` is broken: what is to be done.
    #[cold]
    fn halt(&self, core: &Core<T>, shard: usize, cause: impl ToString) -> Halt {
        if core.links[shard].lease.is_zero() {
            return Halt::Failed(core.lost(shard, cause));
        }
        Halt::Ended(shard, cause.to_string())
    }

    /// A post was refused. The end of the connection is about to be polled, by whoever polls: no worker is to wait for that.
    #[cold]
    fn refused(&self, core: &Core<T>, shard: usize, cause: PostError) -> Halt {
        if !core.links[shard].lease.is_zero() {
            self.end(shard, WorkError::Disconnected);
        }
        self.halt(core, shard, cause)
    }

    /// The connection to `shard` has ended: all workers are told.
    fn end(&self, shard: usize, cause: WorkError) {
        let mut ended = lock(&self.ended);
        ended.push((shard, cause));
        // SYNC POINT: releases it to `news`.
        self.ends.store(ended.len(), Ordering::Release);
    }

    /// Posts READs of `shard` for the worker at `seat`, which was told of `told` ends, under one lock, and rings for them and for
    /// what was posted before, if `ring` says so.
    ///
    /// # Errors
    /// The server is lost, or has no place for one more connection.
    #[inline]
    pub fn post<'a>(
        &self,
        core: &Core<T>,
        (seat, told): (&Seat<T>, &mut usize),
        shard: usize,
        reads: impl Iterator<Item = Read<'a, T::Region>>,
        ring: bool,
    ) -> Result<(), Halt> {
        let line = match self.lines[shard].get() {
            Some(line) => line,
            None => self.connect(core, shard)?,
        };
        let mut held = lock(line);
        for read in reads {
            let room = held.waiting.is_empty();
            match if room { held.post(seat.number, &read) } else { Err(PostError::Full) } {
                Ok(()) => {}
                Err(PostError::Full) => {
                    drop(held);
                    let posted = self.post_in_turn(core, line, (seat, told), shard, &read);
                    held = lock(line);
                    if let Err(error) = posted {
                        held.waiting.retain(|number| *number != seat.number);
                        return Err(error);
                    }
                }
                Err(error) => {
                    drop(held);
                    return Err(self.refused(core, shard, error));
                }
            }
        }
        let rung = if ring { held.connection.ring() } else { Ok(()) };
        drop(held);
        rung.map_err(|error| self.refused(core, shard, error))
    }

    /// The same, when the send queue is full or others wait for room.
    #[cold]
    fn post_in_turn(
        &self,
        core: &Core<T>,
        line: &SharedLine<T>,
        (seat, told): (&Seat<T>, &mut usize),
        shard: usize,
        read: &Read<'_, T::Region>,
    ) -> Result<(), Halt> {
        lock(line).waiting.push_back(seat.number);
        let mut turn = 0;
        loop {
            let mut held = lock(line);
            if held.waiting.front() == Some(&seat.number) {
                match held.post(seat.number, read) {
                    Ok(()) => {
                        held.waiting.pop_front();
                        return Ok(());
                    }
                    // Its workers may not have rung yet, and may wait for room at another shard.
                    Err(PostError::Full) => _ = held.connection.ring(),
                    Err(error) => {
                        drop(held);
                        return Err(self.refused(core, shard, error));
                    }
                }
            }
            drop(held);
            self.news(core, told)?;
            // What completes of its own is taken when it is waited for.
            let full = || lock(line).connection.room() == 0;
            self.advance(core, seat, turn, full, |place| seat.land(place));
            turn = turn.saturating_add(1);
        }
    }

    /// Rings for what was posted to `shard`.
    ///
    /// # Errors
    /// The server is lost.
    pub fn ring(&self, core: &Core<T>, shard: usize) -> Result<(), Halt> {
        let Some(line) = self.lines[shard].get() else { return Ok(()) };
        let rung = lock(line).connection.ring();
        rung.map_err(|error| self.refused(core, shard, error))
    }

    /// One turn of waiting, the `turn`-th, for the worker at `seat`: polls, if nobody else does, and hands out what has completed; `each`
    /// is told the places of its own READs. How many those were. When there is nothing, it relaxes, or sleeps if what it waits for has
    /// not come: `sleeps`, asked when nobody else can bring it any more without a wake-up.
    #[inline]
    pub fn advance(
        &self,
        core: &Core<T>,
        seat: &Seat<T>,
        turn: u32,
        sleeps: impl Fn() -> bool,
        mut each: impl FnMut(usize),
    ) -> usize {
        let sleepy = turn >= T::AWAKE_TURNS;
        // SYNC POINT: before the look at what others hand out, and at `asleep`.
        let epoch = if sleepy { self.bell.epoch() } else { 0 };
        let Some(mut hub) = self.try_hub() else {
            // SYNC POINT: in this order. Whoever sleeps now has seen all that was handed out before it slept.
            if sleepy && self.asleep.load(Ordering::SeqCst) && sleeps() {
                self.bell.wait(epoch, NAP);
            } else {
                core.transport.relax(turn);
            }
            return 0;
        };
        let own = self.poll(&mut hub, seat.number, &mut each);
        if own > 0 {
            return own;
        }
        if !sleepy {
            // While this thread relaxes, others poll.
            drop(hub);
            core.transport.relax(turn);
            return 0;
        }
        // Nobody hands anything out while this thread has the hub.
        if !sleeps() {
            return 0;
        }
        self.asleep.store(true, Ordering::SeqCst);
        hub.endpoint.wait(NAP);
        let own = self.poll(&mut hub, seat.number, each);
        self.asleep.store(false, Ordering::SeqCst);
        drop(hub);
        // SYNC POINT: last, so that who saw `asleep` set is woken.
        self.bell.notify();
        own
    }

    /// The hub, if nobody holds it.
    #[inline]
    fn try_hub(&self) -> Option<MutexGuard<'_, Hub<T>>> {
        match self.hub.try_lock() {
            Ok(hub) => Some(hub),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Polls, and hands out what has completed: to seat `own` by `each`. How many that were.
    #[inline]
    fn poll(&self, hub: &mut Hub<T>, own: usize, mut each: impl FnMut(usize)) -> usize {
        let Hub { endpoint, completions, seats } = hub;
        if endpoint.poll(completions) == 0 {
            return 0;
        }
        let mut count = 0;
        for completion in completions.drain(..) {
            match completion {
                Completion::Work { id, result: Ok(()), .. } => {
                    let (number, place) = whose(id);
                    if number == own {
                        each(place);
                        count += 1;
                        continue;
                    }
                    if seats.len() <= number {
                        seats.clone_from(&lock(&self.seats));
                    }
                    seats[number].land(place);
                    if mutant(Mutant::CompletionForAll) {
                        let others = seats.iter().filter(|seat| ![own, number].contains(&seat.number));
                        others.for_each(|seat| seat.land(place));
                        each(place);
                        count += 1;
                    }
                }
                // The cause follows.
                Completion::Work { result: Err(_), .. } => {}
                Completion::Disconnected { connection, cause } => {
                    let mut names = lock(&self.names);
                    match names.shards.iter().find(|(name, _)| *name == connection) {
                        Some((_, shard)) => self.end(*shard, cause),
                        None => names.early.push((connection, cause)),
                    }
                }
                // The server sends nothing here.
                Completion::Received { buffer, .. } => endpoint.release(buffer),
                Completion::WriteImmediate { .. } => {}
            }
        }
        count
    }

    /// Connects to `shard`, unless another worker does. A server that is out of reach is waited for, and one that has no place for as
    /// long as it may not know that other lanes have ended.
    #[cold]
    fn connect(&self, core: &Core<T>, shard: usize) -> Result<&SharedLine<T>, Error> {
        let mut turn = None;
        core.wait(For::Memory, || {
            turn = turn.take().or_else(|| Turn::take(&self.connecting));
            turn.is_some() || self.lines[shard].get().is_some()
        })?;
        if let Some(line) = self.lines[shard].get() {
            return Ok(line);
        }
        let link = &core.links[shard];
        let until = core.transport.now() + link.lease;
        let connection = loop {
            let made = connect_lane(
                &core.transport,
                &self.attach,
                &link.address,
                link.shard,
                core.options.connect_timeout,
            );
            let unmade = match made {
                Ok(connection) => break connection,
                Err(unmade) => unmade,
            };
            let now = core.transport.now();
            let may_pass = matches!(unmade, Unmade::Gone(_)) || self.broke.load(Ordering::Relaxed);
            if now >= until || !may_pass {
                return Err(match unmade {
                    Unmade::Gone(cause) => core.lost(shard, cause),
                    Unmade::Refused(error) => error,
                });
            }
            core.wait(For::Event, || core.transport.now() >= now + PAUSE)?;
        };
        let name = connection.id();
        let line = Mutex::new(Line { connection, waiting: VecDeque::new() });
        let line = self.lines[shard].get_or_init(|| line);
        // Its end may have been polled already, by another worker.
        let mut names = lock(&self.names);
        names.shards.push((name, shard));
        for (_, cause) in mem::take(&mut names.early) {
            // Only one connection is made at a time: it is this one's.
            self.end(shard, cause);
        }
        Ok(line)
    }
}

impl<C: Connection> Line<C> {
    #[inline]
    fn post(&mut self, seat: usize, read: &Read<'_, C::Region>) -> Result<(), PostError> {
        let signal = Some(id(seat, read.place));
        self.connection.post(Post::Read { into: &[read.into], from: read.remote, signal })
    }
}

/// A worker's turn to connect.
struct Turn<'a>(&'a AtomicBool);

impl<'a> Turn<'a> {
    fn take(taken: &'a AtomicBool) -> Option<Self> {
        let free = taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        free.then(|| Self(taken))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Rows that a worker can have in flight at a time.
pub fn places(options: &ClientOptions) -> usize {
    options.reads_in_flight.max(1)
}

/// The id of a READ: of the worker at this seat, to this place.
fn id(seat: usize, place: usize) -> u64 {
    (seat as u64) << 32 | place as u64
}

/// Seat and place of the READ with this id.
fn whose(id: u64) -> (usize, usize) {
    ((id >> 32) as usize, id as u32 as usize)
}
