//! What a client's threads share, and how they wait for each other and for the servers.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, RwLock, TryLockError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fervor_protocol::{
    clock::observed,
    mutants::{Mutant, mutant},
    route::Router,
    wire::Welcome,
};
use fervor_verbs::transport::{Attach, Connection, Endpoint, Region, Signal, Transport};
use zerocopy::IntoBytes;

use crate::{
    connect::{connect_one, main_hello},
    error::Error,
    lock::lock,
    options::ClientOptions,
    session::{
        absence::Next,
        engine::{Engine, Surroundings},
        link::{Link, Wish},
    },
    slab::Pool,
    table::AnyTable,
};

/// Longest sleep when an event ends it.
const SLEEP: Duration = Duration::from_millis(10);
/// Longest sleep when only memory changes: acknowledgements are plain WRITEs.
pub const NAP: Duration = Duration::from_micros(100);

/// How long a worker that lost its connection waits to hear why.
const REASON: Duration = Duration::from_millis(200);

/// What is waited for, which decides how to sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum For {
    /// An immediate or a message: the endpoint wakes.
    Event,
    /// A word of memory: nothing wakes.
    Memory,
}

/// The clocks of this client's workers.
#[derive(Debug, Default)]
pub struct Clocks {
    pub workers: BTreeMap<u64, u64>,
    next: u64,
    /// The client's clock: the minimum, or where the last worker left it.
    pub client: u64,
}

impl Clocks {
    /// A new worker, at the client's clock: its id.
    pub fn join(&mut self) -> u64 {
        self.next += 1;
        self.workers.insert(self.next, self.client);
        self.next
    }

    /// After a change: the client's clock, if it rose.
    fn advance(&mut self) -> Option<u64> {
        let minimum = *self.workers.values().min()?;
        (minimum > self.client).then(|| {
            self.client = minimum;
            minimum
        })
    }

    /// `worker` ends a clock. The client's clock, if it rose.
    pub fn tick(&mut self, worker: u64) -> Option<u64> {
        *self.workers.get_mut(&worker).expect("a worker is there until it leaves") += 1;
        self.advance()
    }

    /// `worker` leaves. The client's clock, if it rose.
    pub fn leave(&mut self, worker: u64) -> Option<u64> {
        self.workers.remove(&worker);
        self.advance()
    }
}

/// See the module.
pub struct Core<T: Transport> {
    pub transport: T,
    pub options: ClientOptions,
    /// Tells this client's tables from others'.
    pub id: u64,
    /// By which the servers know it when it comes back.
    pub identity: u64,
    /// It only reads: see [`fervor_protocol::clock`].
    pub observer: bool,
    pub router: Router,
    pub links: Vec<Link<T::View>>,
    pub engine: Mutex<Engine<T>>,
    /// Threads that need the engine itself ([`Core::with_engine`]): nobody sleeps with it meanwhile.
    pub wanted: AtomicUsize,
    /// Ends the sleep of the thread that holds the engine.
    pub attach: T::Attach,
    /// Tells the threads that do not hold the engine that it did something.
    pub signal: T::Signal,
    /// Something was handed over since the engine was last driven: who lets go of it looks again.
    pub handed_over: AtomicBool,
    pub clocks: Mutex<Clocks>,
    /// Memory for slabs that servers on this host see, if there are any.
    pub pool: Option<Arc<Pool>>,
    pub tables: RwLock<Vec<Arc<dyn AnyTable>>>,
    pub bytes_read: AtomicU64,
    /// Connections that were made again, by shard, for the engine.
    pub made: Mutex<Vec<(usize, T::Connection, Welcome)>>,
    /// The region that servers write; see [`Core::region`].
    pub region: T::Region,
}

impl<T: Transport> Core<T> {
    fn surroundings(&self) -> Surroundings<'_, T::View> {
        Surroundings { links: &self.links, tables: &self.tables }
    }

    /// Fails if a server is lost.
    pub fn alive(&self) -> Result<(), Error> {
        match self.links.iter().find_map(|link| link.end.get()) {
            Some(end) => Err(end.clone()),
            None => Ok(()),
        }
    }

    /// A worker's connection to `shard` is broken: the error to return. A server that ends its connections says why on
    /// the main one, which ends at the same time: that is waited for a little.
    pub fn lost(&self, shard: usize, cause: impl ToString) -> Error {
        let link = &self.links[shard];
        let end = self.transport.now() + REASON;
        let mut turn = 0;
        while link.end.get().is_none() && self.transport.now() < end {
            self.progress();
            self.transport.relax(turn);
            turn += 1;
        }
        link.lose(cause);
        link.end.get().expect("it has just been set").clone()
    }

    /// Waits until `done`, driving the engine meanwhile, or until a server is lost.
    pub fn wait(&self, what: For, done: impl FnMut() -> bool) -> Result<(), Error> {
        self.wait_as(what, 0, done)
    }

    /// Waits until `attempt`, which is given the engine, has a result.
    ///
    /// Threads that wait for something else may hold the engine while they sleep. They are woken, and do not while
    /// this thread is counted in `wanted`.
    pub fn with_engine<R>(
        &self,
        what: For,
        mut attempt: impl FnMut(&mut Engine<T>) -> Option<R>,
    ) -> Result<R, Error> {
        self.wanted.fetch_add(1, Ordering::SeqCst);
        self.attach.wake();
        let mut result = None;
        let outcome = self.wait_as(what, 1, || {
            result = self.try_engine().and_then(|mut engine| attempt(&mut engine));
            result.is_some()
        });
        self.wanted.fetch_sub(1, Ordering::SeqCst);
        outcome.map(|()| result.expect("it was waited for"))
    }

    /// As [`Core::wait`], by a thread that is counted `own` times in `wanted`.
    fn wait_as(&self, what: For, own: usize, mut done: impl FnMut() -> bool) -> Result<(), Error> {
        let mut turn = 0;
        while !done() {
            self.alive()?;
            self.reconnect();
            let epoch = self.signal.epoch();
            let sleepy = turn >= T::AWAKE_TURNS && self.wanted.load(Ordering::SeqCst) == own;
            match self.try_engine() {
                Some(mut engine) => {
                    if self.turn(&mut engine) > 0 {
                        turn = 0;
                        continue;
                    }
                    if sleepy && !self.handed_over.load(Ordering::SeqCst) && !done() {
                        engine.endpoint.wait(if what == For::Event { SLEEP } else { NAP });
                    }
                }
                None if turn == 0 => self.attach.wake(),
                // Who needs the engine itself waits for it, not for what its holder does.
                None if sleepy && own == 0 && !done() => self.signal.wait(epoch, SLEEP),
                None => {}
            }
            if !sleepy || own > 0 {
                self.transport.relax(turn);
            }
            turn = turn.saturating_add(1);
        }
        if self.handed_over.load(Ordering::SeqCst) {
            self.progress();
        }
        Ok(())
    }

    /// Drives the engine once, if nobody else does, and again if something was handed over meanwhile.
    pub fn progress(&self) {
        self.reconnect();
        while let Some(mut engine) = self.try_engine() {
            self.turn(&mut engine);
            drop(engine);
            // SYNC POINT: pairs with `drive`. Whoever found the engine taken had said so before it looked.
            if !self.handed_over.load(Ordering::SeqCst) {
                return;
            }
        }
    }

    /// Has what was just handed over sent as far as credits go: by this thread, or by the one that holds the engine now.
    pub fn drive(&self) {
        self.handed_over.store(true, Ordering::SeqCst);
        self.progress();
        if self.handed_over.load(Ordering::SeqCst) {
            // Its holder may sleep.
            self.attach.wake();
        }
    }

    /// One turn of the engine. Returns how much it did.
    pub fn turn(&self, engine: &mut Engine<T>) -> usize {
        self.handed_over.store(false, Ordering::SeqCst);
        for (shard, connection, welcome) in lock(&self.made).drain(..) {
            engine.attach(shard, connection, &welcome, &self.surroundings());
        }
        let work = engine.progress(&self.surroundings());
        if work > 0 {
            self.signal.notify();
        }
        work
    }

    /// Connects again to shards that are out of reach, if it is time for that and nobody else does. It holds no lock: others drive the
    /// engine meanwhile.
    fn reconnect(&self) {
        let absent =
            |(_, link): &(usize, &Link<T::View>)| link.absence.is_absent() && link.end.get().is_none();
        for (shard, link) in self.links.iter().enumerate().filter(absent) {
            match link.absence.next(self.transport.now(), self.options.connect_timeout) {
                Next::Nothing => {}
                Next::GiveUp(cause) => link.lose(cause),
                Next::Connect(attempt, time) => {
                    let mut hello = main_hello(
                        &self.options,
                        &self.region.remote(),
                        self.identity,
                        (link.shard, link.control),
                    );
                    hello.attempt = attempt;
                    let made =
                        connect_one(&self.transport, &self.attach, &link.address, hello.as_bytes(), time);
                    match made {
                        Ok((connection, welcome)) => {
                            *lock(&link.way) = connection.way();
                            lock(&self.made).push((shard, connection, welcome));
                            // As in `drive`: whoever drives the engine looks again.
                            self.handed_over.store(true, Ordering::SeqCst);
                        }
                        Err(error) => link.absence.failed(self.transport.now(), error.to_string()),
                    }
                }
            }
        }
    }

    /// The engine, if nobody holds it.
    pub fn try_engine(&self) -> Option<MutexGuard<'_, Engine<T>>> {
        match self.engine.try_lock() {
            Ok(engine) => Some(engine),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Waits until every shard has taken the client into its vector clock, and takes up its place.
    ///
    /// A shard lets a client in at its clock of that moment, and closes a first round at it; from then on the clock cannot
    /// rise without the client. The clock that the handshake told was older: an update stamped with it could have
    /// come after a reader was told that all of that stamp are there. Shards of a running job may differ by some clocks: the
    /// client begins at the greatest, and lets the others go on to it. (An observer has no place there, and holds none of them.)
    pub fn join(&self) -> Result<(), Error> {
        let joined =
            |link: &Link<T::View>| link.joined.load(Ordering::Acquire) || mutant(Mutant::JoinAtHandshake);
        self.wait(For::Event, || self.links.iter().all(joined))?;
        if self.observer {
            return Ok(());
        }
        let clocks = || self.links.iter().map(Link::round);
        for link in &self.links {
            // Where it stands in the shard's vector clock: it only announces what is after that.
            link.announced.store(link.round(), Ordering::Release);
        }
        let start = clocks().max().unwrap_or(0);
        lock(&self.clocks).client = start;
        if clocks().any(|clock| clock < start) { self.announce(start) } else { Ok(()) }
    }

    /// The clock of a worker that only reads: all shards are known to have reached it.
    pub fn observed(&self) -> u64 {
        observed(self.links.iter().map(Link::clock))
    }

    /// The client's clock has risen: has it announced to every shard, behind all updates below it. Returns when that is posted.
    pub fn announce(&self, clock: u64) -> Result<(), Error> {
        for link in &self.links {
            link.due.fetch_max(clock, Ordering::Release);
        }
        let announced = |link: &Link<T::View>| link.announced.load(Ordering::Acquire) >= clock;
        self.drive();
        self.wait(For::Memory, || self.links.iter().all(announced))
    }

    /// Has everything unsent sent. Returns, for each shard, the number of the batch up to which it is.
    ///
    /// It asks whoever drives the engine, and never needs it itself: a thread that sleeps with it may not let go for long.
    pub fn flush(&self) -> Result<Vec<u64>, Error> {
        let asked: Vec<u64> = self.links.iter().map(Link::ask_flush).collect();
        self.drive();
        let flushed = |(link, asked): (&Link<T::View>, &u64)| link.flushed.load(Ordering::Acquire) >= *asked;
        self.wait(For::Memory, || self.links.iter().zip(&asked).all(flushed))?;
        Ok(self.links.iter().map(|link| link.posted.load(Ordering::Acquire)).collect())
    }

    /// Has everything unsent sent, and waits until all of it is acknowledged.
    pub fn drain(&self) -> Result<(), Error> {
        self.flush()?;
        self.drained()
    }

    /// Leaves the vector clocks of all shards, after the last batch.
    pub fn leave(&self) -> Result<(), Error> {
        for shard in 0..self.links.len() {
            self.with_engine(For::Memory, |engine| engine.leave(shard, 0).then_some(()))?;
        }
        self.drained()
    }

    /// Waits until every message has been acknowledged.
    fn drained(&self) -> Result<(), Error> {
        let shards = 0..self.links.len();
        self.with_engine(For::Memory, |engine| {
            shards.clone().all(|shard| engine.drained(shard)).then_some(())
        })
    }

    /// Leaves a wish for `shard`, to be sent with the next progress.
    pub fn wish(&self, shard: usize, wish: Wish) -> usize {
        let mut wishes = lock(&self.links[shard].wishes);
        wishes.push(wish);
        wishes.len()
    }
}
