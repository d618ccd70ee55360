//! A table as a client sees it: where its rows are, its cache, and the updates that copies may lack.
//!
//! **Per row, who writes and who reads.**
//!
//! | field | written | read |
//! |---|---|---|
//! | slot image | by the server, or by the worker that installs a READ | by workers, proved by checksum and state word |
//! | `own_lsn` | under the shard's pending lock, growing | by workers, without the lock |
//! | `lacking` | under the shard's pending lock | by workers, without the lock |
//! | pending entries | under the shard's pending lock | under it |
//!
//! A worker that finds `lacking` clear skips the lock. Its own updates were merged by itself, earlier, so it cannot
//! miss them; and an entry is dropped by first raising `own_lsn`, then clearing `lacking`, so whoever sees it
//! clear also sees the `own_lsn` that a copy without that entry fails.

use std::{
    any::Any,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use fervor_protocol::{
    Element, Schema,
    batch::BatchWriter,
    mutants::{Mutant, mutant, pause},
    pending::{Delta, Origin, Pending, Unknown},
    route::Router,
    row::{Header, Seal},
};
use fervor_verbs::transport::RemoteAddress;
use zerocopy::IntoBytes;

use crate::cache::{Cache, Slot, State};

/// Entries of a row beyond which acknowledged ones are dropped though a slot may lack them: a copy that the model allows to
/// be `s` clocks old lacks about `s` own updates, and would have to be READ again without them. At least and at most so many.
const MANY_ENTRIES: (usize, usize) = (4, 64);
/// Times that a torn slot is copied again before the row is READ instead.
const TORN_COPIES: usize = 8;

/// Where a table lies in one shard.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The shard's number of the table.
    pub id: u32,
    /// The first row there.
    pub base: RemoteAddress,
}

/// A table, opened by a client. Cheap to clone.
pub struct Table<E: Element>(pub(crate) Arc<TableCore<E>>);

impl<E: Element> Clone for Table<E> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<E: Element> Table<E> {
    /// Number of rows.
    pub fn rows(&self) -> u64 {
        self.0.schema.rows
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.0.schema.width as usize
    }

    /// What the table is.
    pub fn schema(&self) -> &Schema {
        &self.0.schema
    }
}

impl<E: Element> fmt::Debug for Table<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Table({})", self.0.schema)
    }
}

/// What a worker's look into the cache came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The row is in the buffer; every update stamped below this clock is in it.
    Hit(u64),
    /// It has to be READ.
    Miss,
}

/// Why a copy cannot be completed to what `get` returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incomplete {
    /// It lacks an update that is no longer held here: it is too old.
    Stale,
    /// Wait for the acknowledgement of that batch, and try with the same copy.
    Unknown(u64),
}

/// See the module.
pub struct TableCore<E> {
    schema: Schema,
    client: u64,
    number: usize,
    places: Vec<Place>,
    seal: Seal,
    pub cache: Cache,
    /// See [`MANY_ENTRIES`].
    many_entries: usize,
    own_lsn: Vec<AtomicU64>,
    lacking: Vec<AtomicBool>,
    /// Workers with a READ in hand that wait for an acknowledgement to decide what it contains.
    undecided: AtomicUsize,
    pending: Vec<Mutex<ShardPending<E>>>,
}

impl<E> fmt::Debug for TableCore<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TableCore({})", self.schema)
    }
}

/// Updates of the rows of one shard that copies may lack.
#[derive(Debug)]
pub struct ShardPending<E> {
    /// Per row of the shard: its place in `updates` plus one. Untouched pages of it cost nothing.
    index: Vec<u32>,
    updates: Vec<Pending<E>>,
    /// Places that are free, their buffers kept.
    free: Vec<u32>,
    /// Buffers of dropped updates, to be used again.
    buffers: Vec<Vec<E>>,
    /// Rows with an unsent update, each once.
    unsent: Vec<u64>,
}

/// Buffers kept for use again, for each shard of a table.
const MOST_BUFFERS: usize = 4096;

impl<E: Element> ShardPending<E> {
    fn new(rows: u64) -> Self {
        Self {
            index: vec![0; rows as usize],
            updates: Vec::new(),
            free: Vec::new(),
            buffers: Vec::new(),
            unsent: Vec::new(),
        }
    }

    /// The updates of the shard's `index`-th row.
    fn get(&mut self, index: u64) -> Option<&mut Pending<E>> {
        let place = self.index[index as usize].checked_sub(1)?;
        Some(&mut self.updates[place as usize])
    }

    /// Merges a worker's update of a whole row in.
    pub fn merge_dense(&mut self, table: &TableCore<E>, row: u64, values: &[E]) {
        let mut buffer = self.buffers.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(values);
        self.merge(table, row, Delta::Dense { start: 0, values: buffer });
    }

    /// Merges a worker's update in.
    pub fn merge(&mut self, table: &TableCore<E>, row: u64, delta: Delta<E>) {
        let place = &mut self.index[(row / table.places.len() as u64) as usize];
        if *place == 0 {
            *place = self.free.pop().unwrap_or_else(|| {
                self.updates.push(Pending::default());
                self.updates.len() as u32
            });
        }
        if self.updates[*place as usize - 1].merge(delta, table.schema.width) {
            self.unsent.push(row);
        }
        table.lacking[row as usize].store(true, Ordering::Release);
    }

    /// Drops the first `entries` of `row`, as far as they are acknowledged.
    fn drop_first(&mut self, table: &TableCore<E>, row: u64, entries: usize) {
        let index = (row / table.places.len() as u64) as usize;
        let Some(place) = self.index[index].checked_sub(1) else { return };
        let (pending, buffers) = (&mut self.updates[place as usize], &mut self.buffers);
        let dropped = pending.drop_first(entries, |delta| {
            if let (Delta::Dense { values, .. }, true) = (delta, buffers.len() < MOST_BUFFERS) {
                buffers.push(values);
            }
        });
        if let Some(lsn) = dropped.filter(|_| !mutant(Mutant::OwnLsnNotRaised)) {
            table.own_lsn[row as usize].fetch_max(lsn, Ordering::Release);
        }
        if pending.is_empty() {
            // SYNC POINT: `own_lsn` was raised before; see the module.
            table.lacking[row as usize].store(false, Ordering::Release);
            self.index[index] = 0;
            self.free.push(place + 1);
        }
    }
}

/// A table of whatever element type, for the sender.
pub trait AnyTable: Send + Sync {
    /// What the table is.
    fn schema(&self) -> &Schema;
    /// For the typed way in.
    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
    /// Writes unsent updates of `shard` into batch `number`, as many as there is room for, and their rows into
    /// `rows`. Whether that was all.
    fn encode(&self, shard: usize, number: u64, writer: &mut BatchWriter<'_>, rows: &mut Vec<u64>) -> bool;
    /// Batch `number`, with updates of `rows`, was applied at `lsn`.
    fn acknowledged(&self, shard: usize, number: u64, lsn: u64, rows: &[u64]);
    /// A slot is free again.
    fn closed(&self, slot: Slot);
}

impl<E: Element> TableCore<E> {
    pub fn new(schema: Schema, client: u64, number: usize, places: Vec<Place>, cache: Cache) -> Self {
        let rows = schema.rows as usize;
        let staleness = match schema.model.staleness() {
            Some(staleness) => staleness as usize,
            // A copy is as old as the budget of the pushes makes it.
            None if schema.continuous > 0 => MANY_ENTRIES.1,
            None => 0,
        };
        let router = Router::new(places.len());
        let pending = |shard| Mutex::new(ShardPending::new(router.rows_in(shard, schema.rows)));
        Self {
            client,
            number,
            seal: Seal::new(schema.row_bytes()),
            cache,
            many_entries: staleness.saturating_add(2).clamp(MANY_ENTRIES.0, MANY_ENTRIES.1),
            own_lsn: (0..rows).map(|_| AtomicU64::new(0)).collect(),
            lacking: (0..rows).map(|_| AtomicBool::new(false)).collect(),
            undecided: AtomicUsize::new(0),
            pending: (0..places.len()).map(pending).collect(),
            places,
            schema,
        }
    }

    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// The client that opened it.
    pub fn client(&self) -> u64 {
        self.client
    }

    /// Its number among the client's tables.
    pub fn number(&self) -> usize {
        self.number
    }

    pub fn shards(&self) -> usize {
        self.places.len()
    }

    /// Rows of the table in `shard`.
    pub fn rows_in(&self, shard: usize) -> usize {
        Router::new(self.places.len()).rows_in(shard, self.schema.rows) as usize
    }

    /// The shard's number of the table.
    pub fn id(&self, shard: usize) -> u32 {
        self.places[shard].id
    }

    /// Where the `index`-th row of `shard` is.
    pub fn remote(&self, shard: usize, index: u64) -> RemoteAddress {
        let base = self.places[shard].base;
        RemoteAddress { address: base.address + index * self.schema.stride() as u64, key: base.key }
    }

    /// Whether copies are kept: not under Async without pushes, where each `get` reads the row as it is.
    pub fn cached(&self) -> bool {
        self.schema.cached()
    }

    /// Whether `header` and `data` are one version of a row.
    pub fn verify(&self, header: &Header, data: &[E]) -> bool {
        self.seal.verify(header, data.as_bytes())
    }

    /// The header of a copy that has been decided: what it contains of this client's batches, and which clock it is good for.
    pub fn seal_copy(&self, header: &Header, included: u64, clock: u64) -> Header {
        self.seal.reseal(*header, included, clock)
    }

    /// The lock on a shard's pending updates.
    pub fn pending(&self, shard: usize) -> MutexGuard<'_, ShardPending<E>> {
        self.pending[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks for a copy that contains every update stamped below `needed`, given that `known` is the clock of the last
    /// closed round that was polled *before this call*.
    #[inline]
    pub fn look_up(&self, shard: usize, row: u64, needed: u64, known: u64, into: &mut [E]) -> Found {
        for _ in 0..TORN_COPIES {
            let Some((slot, word)) = self.cache.find(row) else { return Found::Miss };
            pause();
            let header = self.cache.copy(slot, into.as_mut_bytes());
            pause();
            if !self.cache.unchanged(slot, word) {
                continue;
            }
            if !self.verify(&header, into) {
                // The first push has not arrived, or one is arriving just now.
                if header.lsn == 0 && header.check == !0 {
                    return Found::Miss;
                }
                continue;
            }
            // Every push of the rounds up to `known` is visible in a slot that is subscribed: see `server::push`. (Under
            // Async there are pushes, if they are asked for, but no rounds.)
            let in_rounds = word.state() == State::Subscribed && self.schema.model.eager();
            let clock = if in_rounds { header.clock.max(known) } else { header.clock };
            if clock < needed && !mutant(Mutant::CopyTooOld) {
                return Found::Miss;
            }
            if self.complete(shard, row, &header, Origin::Stated, into).is_ok() {
                return Found::Hit(clock);
            }
        }
        Found::Miss
    }

    /// Runs `wait`, during which acknowledgements do not drop what a READ in hand may lack.
    pub fn while_undecided<R>(&self, wait: impl FnOnce() -> R) -> R {
        self.undecided.fetch_add(1, Ordering::Relaxed);
        let result = wait();
        self.undecided.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// Adds to a copy what it lacks of this client's own updates.
    ///
    /// # Errors
    /// [`Incomplete`]; the copy is as it was.
    pub fn complete(
        &self,
        shard: usize,
        row: u64,
        header: &Header,
        origin: Origin,
        copy: &mut [E],
    ) -> Result<(), Incomplete> {
        self.complete_and(shard, row, header, origin, copy, |_, _| {})
    }

    /// As [`TableCore::complete`]; `with` gets the copy before anything is added to it, and the number of the
    /// last batch that it contains, before another batch gets a number.
    pub fn complete_and(
        &self,
        shard: usize,
        row: u64,
        header: &Header,
        origin: Origin,
        copy: &mut [E],
        with: impl FnOnce(&[E], u64),
    ) -> Result<(), Incomplete> {
        // SYNC POINT: pairs with `drop_first`; `own_lsn` is loaded after.
        let lacking = self.lacking[row as usize].load(Ordering::Acquire);
        pause();
        if !lacking && origin == Origin::Stated {
            let fresh = header.lsn >= self.own_lsn[row as usize].load(Ordering::Acquire);
            return if fresh { Ok(()) } else { Err(Incomplete::Stale) };
        }
        let mut shard = self.pending(shard);
        if header.lsn < self.own_lsn[row as usize].load(Ordering::Acquire) {
            return Err(Incomplete::Stale);
        }
        let index = row / self.places.len() as u64;
        let Some(pending) = shard.get(index) else {
            with(copy, 0);
            return Ok(());
        };
        let contained =
            pending.contained(header, origin).map_err(|Unknown { batch }| Incomplete::Unknown(batch))?;
        with(copy, pending.included(contained));
        pending.add_missing(contained, copy);
        shard.drop_first(self, row, contained);
        Ok(())
    }
}

impl<E: Element> AnyTable for TableCore<E> {
    fn schema(&self) -> &Schema {
        &self.schema
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }

    fn encode(&self, shard: usize, number: u64, writer: &mut BatchWriter<'_>, rows: &mut Vec<u64>) -> bool {
        let mut pending = self.pending(shard);
        let pending = &mut *pending;
        let shards = self.places.len() as u64;
        while let Some(&row) = pending.unsent.last() {
            let place = pending.index[(row / shards) as usize] - 1;
            let update = &mut pending.updates[place as usize];
            let delta = update.unsent().expect("an unsent row has an unsent update");
            let elements = match delta {
                Delta::Dense { values, .. } => values.len(),
                Delta::Sparse(pairs) => pairs.len(),
            };
            let written = writer.push(self.places[shard].id, row / shards, delta);
            if written == 0 {
                return false;
            }
            rows.push(row);
            if written < elements {
                update.sent_part(number, written);
                return false;
            }
            update.sent(number);
            pending.unsent.pop();
        }
        true
    }

    fn acknowledged(&self, shard: usize, number: u64, lsn: u64, rows: &[u64]) {
        let mut shard = self.pending(shard);
        for &row in rows {
            let Some(pending) = shard.get(row / self.places.len() as u64) else { continue };
            pending.acknowledged(number, lsn);
            // Without a slot every copy to come is READ, and a READ posted from now on contains the batch. (A READ
            // that waits for this would have to be done again.)
            let useless = !self.cache.holds(row) && self.undecided.load(Ordering::Relaxed) == 0;
            if useless || pending.len() > self.many_entries {
                let entries = pending.len();
                shard.drop_first(self, row, entries);
            }
        }
    }

    fn closed(&self, slot: Slot) {
        self.cache.closed(slot);
    }
}
