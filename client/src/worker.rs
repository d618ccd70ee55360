//! A worker: one logical thread of computation with its own clock.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use fervor_protocol::{
    Element, clock,
    mutants::{Mutant, mutant, pause},
    pending::Origin,
    row::Header,
    wire::{PUSH_ONCE, SlotRecord},
};
use fervor_verbs::transport::{PostError, Transport, any::Host};
use zerocopy::IntoBytes;

use crate::{
    cache::{Slot, State, Taken},
    core::{Core, For, lock},
    engine::Wish,
    error::Error,
    oplog::{AnyOplog, Oplog},
    reader::Reader,
    table::{Found, Incomplete, Table, TableCore},
};

mod bounded;

/// READs of a row that stays torn before the server is asked for it.
const TORN_READS: usize = 8;
/// Wishes after which they are sent without waiting for the end of the clock.
const MANY_WISHES: usize = 64;
/// Clock differentials kept in an array: `-RECENT..=RECENT`; others in a map.
const RECENT: i64 = 64;

/// What a worker has done so far.
#[derive(Debug, Clone, Default)]
pub struct WorkerStats {
    /// `get`s answered from the cache.
    pub hits: u64,
    /// `get`s that READ.
    pub misses: u64,
    /// READs, those of torn rows counted each time.
    pub reads: u64,
    /// READs that came torn.
    pub torn: u64,
    /// Rows that stayed torn and were asked of the server.
    pub asked: u64,
    /// Time spent waiting for clocks.
    pub waiting: Duration,
    /// Time spent in READs, and in handing over updates at the end of clocks.
    pub communicating: Duration,
    /// `get`s whose copy was older than the table's model allows. Always counted, and always 0: anything else is a bug.
    pub violations: u64,
    /// How many `get`s had which clock differential: clock of the data returned minus clock of the worker.
    pub clock_differential: BTreeMap<i64, u64>,
}

/// See the module. It may be moved to another thread; it is used by one at a time.
pub struct Worker<T: Transport = Host> {
    core: Arc<Core<T>>,
    id: u64,
    clock: u64,
    reader: Reader<T>,
    oplogs: Vec<Option<Box<dyn AnyOplog>>>,
    stats: WorkerStats,
    recent: Vec<u64>,
}

impl<T: Transport> fmt::Debug for Worker<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Worker({} at clock {})", self.id, self.clock)
    }
}

impl<T: Transport> Worker<T> {
    pub(crate) fn new(core: Arc<Core<T>>) -> Result<Self, Error> {
        core.alive()?;
        let reader = Reader::connect(&core)?;
        let mut clocks = lock(&core.clocks);
        let id = clocks.join();
        let clock = clocks.workers[&id];
        drop(clocks);
        Ok(Self {
            core,
            id,
            clock,
            reader,
            oplogs: Vec::new(),
            stats: WorkerStats::default(),
            recent: vec![0; 2 * RECENT as usize + 1],
        })
    }

    /// Its clock: the number of [`clock`](Worker::clock) calls, counted from where the job stood when it joined.
    pub fn now(&self) -> u64 {
        self.clock
    }

    /// What it has done so far.
    pub fn stats(&self) -> WorkerStats {
        let mut stats = self.stats.clone();
        for (i, &count) in self.recent.iter().enumerate().filter(|(_, count)| **count > 0) {
            *stats.clock_differential.entry(i as i64 - RECENT).or_insert(0) += count;
        }
        stats
    }

    /// Reads `row` into `into`, which has the table's width: every update that the table's model promises at this
    /// worker's clock, and all of its own. Waits if the model says so.
    ///
    /// # Errors
    /// The row or the length of the buffer is out of range; a server is lost.
    pub fn get<E: Element>(&mut self, table: &Table<E>, row: u64, into: &mut [E]) -> Result<(), Error> {
        let table = &*table.0;
        let width = table.schema().width as usize;
        self.check(table, row)?;
        if into.len() != width {
            return Err(wrong_length(table, into.len(), width));
        }
        let (shard, index) = self.core.router.locate(row);
        let needed = clock::needed(table.schema().model, self.clock);
        let mut known = self.core.links[shard].clock.load(Ordering::Acquire);
        if known < needed {
            self.wait_for(shard, needed)?;
            known = self.core.links[shard].clock.load(Ordering::Acquire);
        }
        let clock = match table.cached().then(|| table.look_up(shard, row, needed, known, into)) {
            Some(Found::Hit(clock)) => {
                self.stats.hits += 1;
                clock
            }
            Some(Found::Miss) | None => {
                self.stats.misses += 1;
                let before = self.core.transport.now();
                self.hear(table);
                let clock = self.miss(table, row, shard, index, into)?;
                self.stats.communicating += self.core.transport.now() - before;
                clock
            }
        };
        self.finish(table, row, shard, clock, into)
    }

    /// Reads `rows` one after the other into `into`, which has the table's width for each; what has to be READ is in flight together.
    ///
    /// # Errors
    /// As [`Worker::get`].
    pub fn get_many<E: Element>(
        &mut self,
        table: &Table<E>,
        rows: &[u64],
        into: &mut [E],
    ) -> Result<(), Error> {
        let width = table.width();
        if into.len() != rows.len() * width {
            return Err(wrong_length(&*table.0, into.len(), rows.len() * width));
        }
        for &row in rows {
            self.check(&*table.0, row)?;
        }
        let core = &*table.0;
        let needed = clock::needed(core.schema().model, self.clock);
        let mut missed = Vec::new();
        for (place, (&row, copy)) in rows.iter().zip(into.chunks_exact_mut(width)).enumerate() {
            let (shard, _) = self.core.router.locate(row);
            let mut known = self.core.links[shard].clock.load(Ordering::Acquire);
            if known < needed {
                self.wait_for(shard, needed)?;
                known = self.core.links[shard].clock.load(Ordering::Acquire);
            }
            match core.cached().then(|| core.look_up(shard, row, needed, known, copy)) {
                Some(Found::Hit(clock)) => {
                    self.stats.hits += 1;
                    self.finish(core, row, shard, clock, copy)?;
                }
                Some(Found::Miss) | None => missed.push(place),
            }
        }
        let before = self.core.transport.now();
        if !missed.is_empty() {
            self.hear(core);
        }
        for group in missed.chunks(self.reader.places()) {
            self.read_group(core, rows, group, into)?;
        }
        if !missed.is_empty() {
            self.stats.communicating += self.core.transport.now() - before;
        }
        Ok(())
    }

    /// READs the rows at `group` of `rows` together, and what comes torn or undecided one by one after.
    fn read_group<E: Element>(
        &mut self,
        table: &TableCore<E>,
        rows: &[u64],
        group: &[usize],
        into: &mut [E],
    ) -> Result<(), Error> {
        self.may_read()?;
        let width = table.schema().width as usize;
        let row_bytes = table.schema().row_bytes();
        self.reader.fit(&self.core.transport, row_bytes)?;
        // SYNC POINT: a READ is trusted for the clock that was known before it was posted.
        let known: Vec<u64> = self.core.links.iter().map(|link| link.clock.load(Ordering::Acquire)).collect();
        for (place, &at) in group.iter().enumerate() {
            let (shard, index) = self.core.router.locate(rows[at]);
            self.post(table, shard, index, place)?;
        }
        for shard in 0..known.len() {
            self.reader.ring(shard).or_else(|error| self.broken(shard, error))?;
        }
        self.reader.wait(&self.core, group.len())?;
        for (place, &at) in group.iter().enumerate() {
            let row = rows[at];
            let (shard, index) = self.core.router.locate(row);
            let copy = &mut into[at * width..(at + 1) * width];
            self.stats.misses += 1;
            let clock = match self.accept(table, row, shard, place, known[shard], copy)? {
                true => known[shard],
                false => self.miss(table, row, shard, index, copy)?,
            };
            self.finish(table, row, shard, clock, copy)?;
        }
        Ok(())
    }

    /// Adds `delta`, of the table's width, to `row`. The others see it after this clock; this worker at once.
    ///
    /// # Errors
    /// The row or the length is out of range; an element is NaN or infinite and the table does not take that.
    /// Nothing is added then.
    pub fn inc<E: Element>(&mut self, table: &Table<E>, row: u64, delta: &[E]) -> Result<(), Error> {
        let core = &*table.0;
        self.check(core, row)?;
        if delta.len() != table.width() {
            return Err(wrong_length(core, delta.len(), table.width()));
        }
        if !core.schema().non_finite && !E::all_finite(delta) {
            return Err(non_finite(core, row, delta.iter().copied().enumerate()));
        }
        if core.schema().model.value_bounded() {
            self.admit(table, row, || delta.iter().copied().enumerate())?;
        }
        let (shard, _) = self.core.router.locate(row);
        self.oplog(table).add(shard, row, delta);
        Ok(())
    }

    /// Adds to single elements of `row`: pairs of column and value.
    ///
    /// # Errors
    /// As [`Worker::inc`]; a column is out of range.
    pub fn inc_at<E: Element>(
        &mut self,
        table: &Table<E>,
        row: u64,
        pairs: &[(u32, E)],
    ) -> Result<(), Error> {
        let core = &*table.0;
        self.check(core, row)?;
        if let Some((column, _)) = pairs.iter().find(|(column, _)| *column as usize >= table.width()) {
            let table = core.schema().name.clone();
            return Err(Error::Column {
                column: (*column).into(),
                table,
                width: core.schema().width as usize,
            });
        }
        if !core.schema().non_finite && !pairs.iter().all(|(_, value)| value.is_finite()) {
            return Err(non_finite(
                core,
                row,
                pairs.iter().map(|(column, value)| (*column as usize, *value)),
            ));
        }
        if core.schema().model.value_bounded() {
            self.admit(table, row, || pairs.iter().map(|(column, value)| (*column as usize, *value)))?;
        }
        let (shard, _) = self.core.router.locate(row);
        self.oplog(table).add_at(shard, row, pairs);
        Ok(())
    }

    /// Ends the worker's clock: its updates are handed over, and if it was the slowest worker of this client,
    /// they are sent. Returns when they are posted; it does not wait for other workers.
    ///
    /// # Errors
    /// A server is lost.
    pub fn clock(&mut self) -> Result<(), Error> {
        let before = self.core.transport.now();
        for oplog in self.oplogs.iter_mut().flatten() {
            oplog.merge();
        }
        self.clock += 1;
        pause();
        let risen = lock(&self.core.clocks).tick(self.id);
        pause();
        match risen {
            Some(clock) => self.core.announce(clock)?,
            None => self.core.progress(),
        }
        if self.value_bounded().next().is_some() {
            self.hand_over()?;
        }
        self.stats.communicating += self.core.transport.now() - before;
        self.core.alive()
    }

    fn check<E: Element>(&self, table: &TableCore<E>, row: u64) -> Result<(), Error> {
        let schema = table.schema();
        if table.client() != self.core.id {
            return Err(Error::ForeignTable { table: schema.name.clone() });
        }
        if row >= schema.rows {
            return Err(Error::Row { row, table: schema.name.clone(), rows: schema.rows });
        }
        Ok(())
    }

    fn oplog<E: Element>(&mut self, table: &Table<E>) -> &mut Oplog<E> {
        let number = table.0.number();
        if self.oplogs.len() <= number {
            self.oplogs.resize_with(number + 1, || None);
        }
        let oplog = self.oplogs[number].get_or_insert_with(|| Box::new(Oplog::new(table.0.clone())));
        oplog.as_any().downcast_mut().expect("a table's number stands for its element type")
    }

    /// Adds the worker's updates of this clock to a copy, and counts.
    #[inline]
    fn finish<E: Element>(
        &mut self,
        table: &TableCore<E>,
        row: u64,
        shard: usize,
        clock: u64,
        copy: &mut [E],
    ) -> Result<(), Error> {
        if let Some(Some(oplog)) = self.oplogs.get_mut(table.number()) {
            let oplog: &mut Oplog<E> =
                oplog.as_any().downcast_mut().expect("a table's number stands for its element type");
            oplog.add_to(shard, row, copy);
        }
        let needed = clock::needed(table.schema().model, self.clock);
        let differential = clock::differential(clock, self.clock);
        match self.recent.get_mut((differential + RECENT) as usize) {
            Some(count) => *count += 1,
            None => *self.stats.clock_differential.entry(differential).or_insert(0) += 1,
        }
        if clock < needed { self.violated(table, row, clock, needed) } else { Ok(()) }
    }

    /// A copy is older than the model allows, which never happens.
    #[cold]
    fn violated<E: Element>(
        &mut self,
        table: &TableCore<E>,
        row: u64,
        copy: u64,
        needed: u64,
    ) -> Result<(), Error> {
        self.stats.violations += 1;
        if !self.core.options.check {
            return Ok(());
        }
        let (schema, worker, clock) = (table.schema(), self.id, self.clock);
        let (table, model) = (schema.name.clone(), schema.model.to_string());
        Err(Error::Stale { worker, clock, table, row, copy, model, needed })
    }

    /// Before READs under SSP: takes what has been said of the clocks. A copy is trusted for the clock that was known
    /// before its READ, so the later that is, the longer it serves.
    fn hear<E: Element>(&self, table: &TableCore<E>) {
        if table.cached() && !table.schema().eager() {
            self.core.progress();
        }
    }

    fn wait_for(&mut self, shard: usize, needed: u64) -> Result<(), Error> {
        let before = self.core.transport.now();
        let clock = &self.core.links[shard].clock;
        self.core.wait(For::Event, || clock.load(Ordering::Acquire) >= needed)?;
        self.stats.waiting += self.core.transport.now() - before;
        Ok(())
    }

    /// READs a row, keeps it if the model says so, and returns the clock that the copy is good for.
    #[cold]
    fn miss<E: Element>(
        &mut self,
        table: &TableCore<E>,
        row: u64,
        shard: usize,
        index: u64,
        into: &mut [E],
    ) -> Result<u64, Error> {
        self.may_read()?;
        self.reader.fit(&self.core.transport, table.schema().row_bytes())?;
        for _ in 0..TORN_READS {
            // SYNC POINT: a READ is trusted for the clock that was known before it was posted.
            let known = self.core.links[shard].clock.load(Ordering::Acquire);
            self.post(table, shard, index, 0)?;
            self.reader.ring(shard).or_else(|error| self.broken(shard, error))?;
            self.reader.wait(&self.core, 1)?;
            let late = || self.core.links[shard].clock.load(Ordering::Acquire);
            let known = if mutant(Mutant::TrustLateClock) { late() } else { known };
            if self.accept(table, row, shard, 0, known, into)? {
                return Ok(known);
            }
        }
        self.ask(table, row, shard, index, into)
    }

    /// READs that were in flight when a server was lost are not waited for, so the reader reads no more.
    fn may_read(&self) -> Result<(), Error> {
        if mutant(Mutant::ReadAfterLoss) { Ok(()) } else { self.core.alive() }
    }

    fn post<E: Element>(
        &mut self,
        table: &TableCore<E>,
        shard: usize,
        index: u64,
        place: usize,
    ) -> Result<(), Error> {
        self.stats.reads += 1;
        let row_bytes = table.schema().row_bytes();
        self.core.bytes_read.fetch_add((size_of::<Header>() + row_bytes) as u64, Ordering::Relaxed);
        let posted = self.reader.post(shard, place, table.remote(shard, index), row_bytes);
        posted.or_else(|error| self.broken(shard, error))
    }

    /// A post was refused: the connection is broken, since the queue has room for all places.
    fn broken(&self, shard: usize, error: PostError) -> Result<(), Error> {
        Err(self.core.lost(shard, error))
    }

    /// Takes the row that was READ into `place`, when `known` was known, completes it, and keeps it. `false`: it is
    /// torn, or too old for what this client has of its own; READ again.
    fn accept<E: Element>(
        &mut self,
        table: &TableCore<E>,
        row: u64,
        shard: usize,
        place: usize,
        known: u64,
        into: &mut [E],
    ) -> Result<bool, Error> {
        loop {
            let header = self.reader.take(place, into.as_mut_bytes());
            if !table.verify(&header, into) {
                self.stats.torn += 1;
                return Ok(false);
            }
            let keep = table.cached() && !table.schema().eager();
            let completed = table.complete_and(shard, row, &header, Origin::Read, into, |copy, included| {
                if keep {
                    let header = table.seal_copy(&header, included, known);
                    table.cache.install(row, &header, copy.as_bytes());
                }
            });
            match completed {
                Ok(()) => {
                    if table.schema().eager()
                        && let Taken::Present(_) = self.take(table, row, State::Subscribed)
                    {
                        // It was READ before, and its first push has not come: perhaps the wish has not gone.
                        self.core.progress();
                    }
                    return Ok(true);
                }
                Err(Incomplete::Stale) => return Ok(false),
                Err(Incomplete::Unknown(batch)) => {
                    let acknowledged = &self.core.links[shard].acknowledged;
                    table.while_undecided(|| {
                        self.core.wait(For::Memory, || acknowledged.load(Ordering::Acquire) >= batch)
                    })?;
                }
            }
        }
    }

    /// Takes a slot, and leaves the wishes that come of it.
    fn take<E: Element>(&self, table: &TableCore<E>, row: u64, state: State) -> Taken {
        let mut most = 0;
        let mut late = Vec::new();
        let taken = table.cache.take(row, state, |slot, row, wish| {
            if mutant(Mutant::WishesOutOfOrder) {
                return late.push((slot, row, wish));
            }
            most = most.max(self.wish(table, row, slot, wish));
        });
        if mutant(Mutant::WishesOutOfOrder) && !late.is_empty() {
            // Where another worker may come between.
            pause();
            late.into_iter().for_each(|(slot, row, wish)| _ = self.wish(table, row, slot, wish));
        }
        if most >= MANY_WISHES {
            self.core.progress();
        }
        taken
    }

    /// Leaves a wish for the shard of `row`. How many there are now.
    fn wish<E: Element>(&self, table: &TableCore<E>, row: u64, slot: Slot, wish: u32) -> usize {
        let (shard, index) = self.core.router.locate(row);
        let record =
            SlotRecord { row: index, slot: table.cache.offset(slot) as u64, table: table.id(shard), wish };
        self.core.wish(shard, Wish { record, table: table.number(), slot })
    }

    /// A hot row, torn time and again: the server, its one writer, pushes it (invariant 11).
    fn ask<E: Element>(
        &mut self,
        table: &TableCore<E>,
        row: u64,
        shard: usize,
        index: u64,
        into: &mut [E],
    ) -> Result<u64, Error> {
        self.stats.asked += 1;
        loop {
            let known = self.core.links[shard].clock.load(Ordering::Acquire);
            // Where rows are pushed anyway the first push is the answer: a copy that is not kept up to date has no place
            // in the cache of such a table.
            let eager = table.schema().eager();
            let slot = match self.take(table, row, if eager { State::Subscribed } else { State::Asked }) {
                Taken::New(slot) if !eager => Some(slot),
                Taken::Present(slot) if !eager && table.cache.ask_again(slot, row) => {
                    self.wish(table, row, slot, PUSH_ONCE);
                    Some(slot)
                }
                Taken::New(_) | Taken::Present(_) | Taken::None => None,
            };
            if let Some(slot) = slot {
                let mut header = Header::default();
                self.core.wait(For::Memory, || {
                    header = table.cache.copy(slot, into.as_mut_bytes());
                    table.verify(&header, into)
                })?;
                table.cache.answered(slot, row);
                if table.complete(shard, row, &header, Origin::Stated, into).is_ok() {
                    return Ok(header.clock.max(known.min(header.clock)));
                }
            } else {
                // Somebody else's answer, the first push, or a free slot: one of them comes.
                let needed = clock::needed(table.schema().model, self.clock);
                if let Found::Hit(clock) = table.look_up(shard, row, needed, known, into) {
                    return Ok(clock);
                }
                self.core.progress();
                self.post(table, shard, index, 0)?;
                self.reader.ring(shard).or_else(|error| self.broken(shard, error))?;
                self.reader.wait(&self.core, 1)?;
                if self.accept(table, row, shard, 0, known, into)? {
                    return Ok(known);
                }
            }
        }
    }
}

impl<T: Transport> Drop for Worker<T> {
    /// Its updates are handed over, also those of the clock that it has not ended, and it leaves the client's clock.
    fn drop(&mut self) {
        for oplog in self.oplogs.iter_mut().flatten() {
            oplog.merge();
        }
        let risen = lock(&self.core.clocks).leave(self.id);
        for link in &self.core.links {
            link.ask_flush();
            if let Some(clock) = risen {
                link.due.fetch_max(clock, Ordering::Release);
            }
        }
        self.core.progress();
    }
}

#[cold]
fn wrong_length<E: Element>(table: &TableCore<E>, length: usize, needed: usize) -> Error {
    Error::Length { length, table: table.schema().name.clone(), needed }
}

#[cold]
fn non_finite<E: Element>(table: &TableCore<E>, row: u64, values: impl Iterator<Item = (usize, E)>) -> Error {
    let (column, value) = { values }.find(|(_, value)| !value.is_finite()).expect("one is not finite");
    Error::NonFinite { table: table.schema().name.clone(), row, column, value: value.to_string() }
}
