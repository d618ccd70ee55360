//! A worker: one logical thread of computation with its own clock.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use fervor_protocol::{Element, clock, element, mutants::pause};
use fervor_verbs::transport::{Transport, any::Host};

use crate::{
    error::Error,
    lane::Lanes,
    lock::lock,
    own::{Horizon, Updates, WorkerUpdates},
    reader::Reader,
    session::core::{Core, For},
    table::{Holding, Table, TableCore},
};

mod ahead;
mod bounded;
mod copies;
mod in_place;
mod prefetch;
mod ranges;

/// Slabs that may wait for a shard before the worker that handed them over does.
const MOST_WAITING: u64 = 32;
/// Clock differentials kept in an array: `-RECENT..=RECENT`; others in a map.
const RECENT: i64 = 64;

/// What a worker has done so far.
#[derive(Debug, Clone, Default)]
pub struct WorkerStats {
    /// `get`s that read a row in place, in the memory of a shard on this host.
    pub in_place: u64,
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
    /// How many `get`s had which clock differential: clock of the data returned minus clock of the worker. Beyond 64 it is rounded
    /// up to a power of two, so that there are few.
    pub clock_differential: BTreeMap<i64, u64>,
}

/// See the module. It may be moved to another thread; it is used by one at a time.
pub struct Worker<T: Transport = Host> {
    core: Arc<Core<T>>,
    id: u64,
    clock: u64,
    /// Some shard's rows are not read in place.
    copies: bool,
    lanes: Arc<Lanes<T>>,
    /// The way to rows that are READ, once there is one.
    reader: Option<Reader<T>>,
    updates: WorkerUpdates,
    prefetched: Vec<ahead::Prefetched>,
    stats: WorkerStats,
    recent: Vec<u64>,
    /// Bytes that were READ since they were last added to the client's: that word is shared.
    bytes_read: u64,
}

impl<T: Transport> fmt::Debug for Worker<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Worker({} at clock {})", self.id, self.clock)
    }
}

impl<T: Transport> Worker<T> {
    pub(crate) fn new(core: Arc<Core<T>>, lanes: Arc<Lanes<T>>) -> Result<Self, Error> {
        core.alive()?;
        let copies = core.links.iter().any(|link| link.place.get().is_none());
        let mut clocks = lock(&core.clocks);
        let id = clocks.join();
        let clock = if core.observer { core.observed() } else { clocks.workers[&id] };
        drop(clocks);
        Ok(Self {
            core,
            id,
            clock,
            copies,
            lanes,
            reader: None,
            updates: Vec::new(),
            prefetched: Vec::new(),
            stats: WorkerStats::default(),
            recent: vec![0; 2 * RECENT as usize + 1],
            bytes_read: 0,
        })
    }

    /// Its clock: the number of [`clock`](Worker::clock) calls, counted from where the job stood when it joined. Of a client that only
    /// reads: where the job stood when it last called that.
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
    /// The row or the length of the buffer is out of range; a server is lost, or has no place for a READ lane of this client
    /// (see [`ReadLanes`](crate::ReadLanes)).
    #[inline]
    pub fn get<E: Element>(&mut self, table: &Table<E>, row: u64, into: &mut [E]) -> Result<(), Error> {
        let table = &*table.0;
        let width = table.schema().width as usize;
        self.check(table, row)?;
        if into.len() != width {
            return Err(wrong_length(table, into.len(), width));
        }
        self.read(table, row, into)
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
        let core = &*table.0;
        if into.len() != rows.len() * width {
            return Err(wrong_length(core, into.len(), rows.len() * width));
        }
        if let Some(&greatest) = rows.iter().max() {
            self.check(core, greatest)?;
        }
        if !self.copies {
            return self.read_many_in_place(core, rows.len(), |at| rows[at], into);
        }
        self.read_copies(core, rows, into)
    }

    /// Adds `delta`, of the table's width, to `row`. The others see it after this clock; this worker at once.
    ///
    /// # Errors
    /// The row or the length is out of range; an element, or its sum with what this worker has added in this clock, is NaN or
    /// infinite and the table does not take that. Nothing is added then.
    #[inline]
    pub fn inc<E: Element>(&mut self, table: &Table<E>, row: u64, delta: &[E]) -> Result<(), Error> {
        let core = &*table.0;
        self.check(core, row)?;
        if delta.len() != table.width() {
            return Err(wrong_length(core, delta.len(), table.width()));
        }
        let finite = !core.schema().non_finite;
        if core.schema().model.value_bounded() {
            if finite && !element::all_finite(delta) {
                return Err(non_finite(core, row, delta.iter().copied().enumerate()));
            }
            self.admit(table, row, || delta.iter().copied().enumerate())?;
        }
        let (shard, index) = self.core.router.locate(row);
        let (image, start) = place(core, index);
        let slab = self.updates(core)?.shards[shard].current();
        let added = if delta.len() == slab.width() {
            slab.add(image, delta, finite)
        } else {
            slab.add_small(image, start, delta, finite)
        };
        if added { Ok(()) } else { Err(self.too_great(core, row, delta.iter().copied().enumerate())) }
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
        let each = || pairs.iter().map(|(column, value)| (*column as usize, *value));
        let finite = !core.schema().non_finite;
        if finite && !pairs.iter().all(|(_, value)| value.is_finite()) {
            return Err(non_finite(core, row, each()));
        }
        if core.schema().model.value_bounded() {
            self.admit(table, row, each)?;
        }
        let (shard, index) = self.core.router.locate(row);
        let (image, start) = place(core, index);
        let slab = self.updates(core)?.shards[shard].current();
        let added = if start == 0 {
            slab.add_at(image, pairs, finite)
        } else {
            let pairs: Vec<_> = pairs.iter().map(|(column, value)| (column + start as u32, *value)).collect();
            slab.add_at(image, &pairs, finite)
        };
        if added { Ok(()) } else { Err(self.too_great(core, row, each())) }
    }

    /// Ends the worker's clock: its updates are handed over and sent, and if it was the slowest worker of this client, the servers are
    /// told that the clock has ended. Returns when that is posted; it does not wait for other workers. (Over a wire the updates of the
    /// client's workers go together, when the slowest has ended the clock.)
    ///
    /// If the client only reads ([`ClientOptions::observer`](crate::ClientOptions::observer)), nobody waits for this worker, and it waits
    /// for nobody. Its clock becomes the last one that all servers are known to have ended. What it `get`s from then on is as fresh as
    /// its table's model promises a worker of the job at that clock.
    ///
    /// # Errors
    /// A server is lost.
    pub fn clock(&mut self) -> Result<(), Error> {
        if self.core.observer {
            return self.follow();
        }
        let before = self.core.transport.now();
        self.hand_over_all();
        self.clock += 1;
        pause();
        let risen = lock(&self.core.clocks).tick(self.id);
        pause();
        match risen {
            Some(clock) => self.core.announce(clock)?,
            None => self.core.drive(),
        }
        self.keep_pace()?;
        if self.value_bounded().next().is_some() {
            self.hand_over()?;
        }
        self.retire();
        self.tell_bytes_read();
        self.stats.communicating += self.core.transport.now() - before;
        self.core.alive()
    }

    /// The worker only reads: its clock follows the job's.
    fn follow(&mut self) -> Result<(), Error> {
        let before = self.core.transport.now();
        self.core.progress();
        self.clock = self.clock.max(self.core.observed());
        self.tell_bytes_read();
        self.stats.communicating += self.core.transport.now() - before;
        self.core.alive()
    }

    fn tell_bytes_read(&mut self) {
        self.core.bytes_read.fetch_add(std::mem::take(&mut self.bytes_read), Ordering::Relaxed);
    }

    /// Hands the updates of the present clock over.
    fn hand_over_all(&mut self) {
        let (core, stamp) = (&self.core, self.clock);
        for (table, updates) in self.updates.iter_mut().enumerate() {
            if let Some(updates) = updates {
                updates.hand_over(stamp, &mut |shard, slab| core.links[shard].hand_over(table, slab));
            }
        }
    }

    /// Waits if a shard does not keep pace: memory for what is handed over is bounded.
    fn keep_pace(&mut self) -> Result<(), Error> {
        let core = &*self.core;
        for link in &core.links {
            let keeps = || link.waiting.load(Ordering::Acquire) <= MOST_WAITING;
            if !keeps() {
                core.wait(For::Memory, keeps)?;
            }
        }
        Ok(())
    }

    /// Lets those updates go that every copy to come contains.
    fn retire(&mut self) {
        let core = &*self.core;
        for (table, updates) in self.updates.iter_mut().enumerate() {
            let Some(updates) = updates else { continue };
            let (model, cached, eager) = {
                let tables = core.tables.read().unwrap_or_else(std::sync::PoisonError::into_inner);
                let schema = tables[table].schema();
                (schema.model, schema.cached(), schema.eager())
            };
            let needed = (cached && !eager).then(|| clock::needed(model, self.clock));
            let horizon = &mut |shard: usize| {
                let link = &core.links[shard];
                let visible = || link.visible.load(Ordering::Acquire);
                Horizon {
                    at_once: link.place.get().is_some() || !cached,
                    round_lsn: if model.eager() { link.known().round_lsn } else { 0 },
                    visible: if model.value_bounded() { visible() } else { 0 },
                    needed,
                }
            };
            updates.retire(horizon, &|shard| core.links[shard].round());
        }
    }

    #[inline]
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

    /// The worker's updates of a table, made when there are none.
    #[inline]
    fn updates<E: Element>(&mut self, table: &TableCore<E>) -> Result<&mut Updates<E>, Error> {
        let number = table.number();
        if self.updates.get(number).is_none_or(Option::is_none) {
            self.make_updates(table)?;
        }
        let updates = self.updates[number].as_mut().expect("it has been made");
        Ok(updates.as_any().downcast_mut().expect("a table's number stands for its element type"))
    }

    #[cold]
    fn make_updates<E: Element>(&mut self, table: &TableCore<E>) -> Result<(), Error> {
        if self.core.observer {
            return Err(Error::Observer { table: table.schema().name.clone() });
        }
        if self.updates.len() <= table.number() {
            self.updates.resize_with(table.number() + 1, || None);
        }
        let core = &self.core;
        let pool = |shard: usize| core.links[shard].place.get().and(core.pool.clone());
        self.updates[table.number()] = Some(Box::new(Updates::new(table, pool)));
        Ok(())
    }

    /// Reads a row that is there.
    #[inline]
    fn read<E: Element>(&mut self, table: &TableCore<E>, row: u64, into: &mut [E]) -> Result<(), Error> {
        let (shard, index) = self.core.router.locate(row);
        let needed = clock::needed(table.schema().model, self.clock);
        // SYNC POINT: what is read is as of the clock that was known before.
        let known = self.fresh(shard, needed)?;
        if let Holding::InPlace = table.part(shard).holding {
            self.read_in_place(table, shard, index, into)?;
            self.looked(1)?;
            return self.count(table, row, 1, known, needed);
        }
        self.read_copy(table, row, (shard, index), needed, into)
    }

    /// The clock that a shard has reached, when that is at least `needed`.
    #[inline]
    fn fresh(&mut self, shard: usize, needed: u64) -> Result<u64, Error> {
        let mut known = self.core.links[shard].clock();
        if known < needed {
            self.wait_for(shard, needed)?;
            known = self.core.links[shard].clock();
        }
        Ok(known)
    }

    /// Counts `gets` `get`s, of `row` and others of its shard, whose data is as of `clock`.
    #[inline]
    fn count<E: Element>(
        &mut self,
        table: &TableCore<E>,
        row: u64,
        gets: u64,
        clock: u64,
        needed: u64,
    ) -> Result<(), Error> {
        let differential = clock::differential(clock, self.clock);
        match self.recent.get_mut((differential + RECENT) as usize) {
            Some(count) => *count += gets,
            None => self.count_far(differential, gets),
        }
        if clock < needed { self.violated(table, row, clock, needed) } else { Ok(()) }
    }

    #[cold]
    fn count_far(&mut self, differential: i64, gets: u64) {
        let rounded = differential.signum() * differential.unsigned_abs().next_power_of_two() as i64;
        *self.stats.clock_differential.entry(rounded).or_insert(0) += gets;
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

    #[cold]
    fn wait_for(&mut self, shard: usize, needed: u64) -> Result<(), Error> {
        let before = self.core.transport.now();
        let link = &self.core.links[shard];
        self.core.wait(For::Event, || link.clock() >= needed)?;
        self.stats.waiting += self.core.transport.now() - before;
        Ok(())
    }

    /// The error of an update whose sum with the earlier ones of this clock is not finite.
    #[cold]
    fn too_great<E: Element>(
        &mut self,
        table: &TableCore<E>,
        row: u64,
        values: impl Iterator<Item = (usize, E)>,
    ) -> Error {
        let (shard, index) = self.core.router.locate(row);
        let mut sum = vec![E::default(); table.schema().width as usize];
        let (image, start) = place(table, index);
        let updates = known_updates(&mut self.updates, table).expect("it has just added to them");
        updates.shards[shard].current().add_to(image, start, &mut sum);
        let sums = values.map(|(column, value)| {
            sum[column] = sum[column].plus(value);
            (column, sum[column])
        });
        non_finite(table, row, sums)
    }
}

impl<T: Transport> Drop for Worker<T> {
    /// Its updates are handed over, also those of the clock that it has not ended, and it leaves the client's clock.
    fn drop(&mut self) {
        self.hand_over_all();
        self.tell_bytes_read();
        let risen = lock(&self.core.clocks).leave(self.id);
        for link in &self.core.links {
            link.ask_flush();
            if let Some(clock) = risen {
                link.due.fetch_max(clock, Ordering::Release);
            }
        }
        self.core.drive();
    }
}

/// The image of the `index`-th row of a shard, and the row's first column in it.
#[inline]
fn place<E: Element>(table: &TableCore<E>, index: u64) -> (u32, usize) {
    let layout = table.layout();
    (layout.image(index) as u32, layout.within(index) / size_of::<E>())
}

/// A worker's updates of a table, if there are any.
#[inline]
fn known_updates<'a, E: Element>(
    updates: &'a mut WorkerUpdates,
    table: &TableCore<E>,
) -> Option<&'a mut Updates<E>> {
    let updates = updates.get_mut(table.number())?.as_mut()?;
    Some(updates.as_any().downcast_mut().expect("a table's number stands for its element type"))
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
