//! A table as a client sees it: where its rows are, and how they are held.
//!
//! | the shard's rows are | when | `get` |
//! |---|---|---|
//! | read in place | the server is on this host | copies the row out of the shard's memory, under the sequence lock of its image |
//! | mirrored | the server pushes them, and the cache has room for all of them | copies it out of the mirror, and verifies it |
//! | in slots | otherwise, if the model keeps copies | copies it out of its slot and verifies it; without a slot, it READs |
//!
//! Only the mirror and the slots are ever written here. The server writes them, or a worker that installs
//! what it has READ ([`cache`](crate::cache)). A worker keeps its own updates elsewhere
//! ([`own`](crate::own)).

use std::{any::Any, fmt, sync::Arc};

use fervor_protocol::{
    Element, Schema,
    batch::BatchWriter,
    limits::ROW_HEADER,
    mutants::{Mutant, mutant, pause},
    route::Router,
    row::{Header, Layout, Seal},
};
use fervor_verbs::{Memory, transport::RemoteAddress};
use zerocopy::IntoBytes;

use crate::{
    cache::{Cache, Slot, State},
    known::Known,
    merge::{Cursor, Merge},
    slab::AnySlab,
};

/// Times that a torn copy is copied again before the row is READ instead.
const TORN_COPIES: usize = 8;

/// How the rows of a table that lie in a shard are held.
#[derive(Debug)]
pub enum Holding {
    /// Not at all: they are read where they are.
    InPlace,
    /// All of them: the first image's byte in the client's region.
    Mirror(usize),
    /// Some of them.
    Slots(Cache),
}

/// Where a table lies in one shard, and how its rows are held here.
#[derive(Debug)]
pub struct Part {
    /// The shard's number of the table.
    pub id: u32,
    /// Byte offset of the first image in the shard's region.
    pub offset: usize,
    /// The first image, for READs.
    pub base: RemoteAddress,
    /// The clock of the last round that was polled before it was opened: a mirror was filled after that.
    pub opened: u64,
    pub holding: Holding,
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

/// A copy of a row that was found here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Every update stamped below this clock is in it.
    pub clock: u64,
    /// LSN of its image.
    pub lsn: u64,
    /// This client's batches up to this LSN are in it.
    pub as_of: u64,
}

/// See the module.
pub struct TableCore<E> {
    schema: Schema,
    layout: Layout,
    client: u64,
    number: usize,
    parts: Vec<Part>,
    seal: Seal,
    memory: Memory,
    element: std::marker::PhantomData<E>,
}

impl<E> fmt::Debug for TableCore<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TableCore({})", self.schema)
    }
}

/// A table of whatever element type, for the sender.
pub trait AnyTable: Send + Sync {
    /// What the table is.
    fn schema(&self) -> &Schema;
    /// For the typed way in.
    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
    /// A shard's number of the table.
    fn id(&self, shard: usize) -> u32;
    /// Writes the updates of `slabs` for `shard`, from the cursor on, into a batch, as many as there is room for; it is the
    /// `part`-th of their delivery. Whether that was all.
    fn write(
        &self,
        shard: usize,
        slabs: &[Arc<dyn AnySlab>],
        cursor: &mut Cursor,
        writer: &mut BatchWriter<'_>,
        part: usize,
    ) -> bool;
    /// A slot is free again.
    fn closed(&self, shard: usize, slot: Slot);
}

impl<E: Element> TableCore<E> {
    /// A table of client number `client`, its `number`-th; mirrors lie in `memory`.
    pub fn new(schema: Schema, client: u64, number: usize, parts: Vec<Part>, memory: Memory) -> Self {
        let layout = schema.layout();
        let seal = Seal::new(layout.image_bytes());
        Self { client, number, seal, layout, parts, memory, schema, element: std::marker::PhantomData }
    }

    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    #[inline]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The client that opened it.
    pub fn client(&self) -> u64 {
        self.client
    }

    /// Its number among the client's tables.
    #[inline]
    pub fn number(&self) -> usize {
        self.number
    }

    pub fn shards(&self) -> usize {
        self.parts.len()
    }

    /// Rows of the table in `shard`.
    pub fn rows_in(&self, shard: usize) -> u64 {
        Router::new(self.parts.len()).rows_in(shard, self.schema.rows)
    }

    #[inline]
    pub fn part(&self, shard: usize) -> &Part {
        &self.parts[shard]
    }

    /// Where an image is in the region of `shard`, for READs.
    pub fn remote(&self, shard: usize, image: u64) -> RemoteAddress {
        let base = self.parts[shard].base;
        RemoteAddress { address: base.address + self.layout.offset(image) as u64, key: base.key }
    }

    /// Whether rows that are READ are kept.
    pub fn keeps_reads(&self) -> bool {
        self.schema.cached() && !self.schema.eager()
    }

    /// Takes the `index`-th row of a shard out of its image, which `copy` copies: header and data. `None`: it is torn.
    #[inline]
    pub fn verified(
        &self,
        index: u64,
        into: &mut [E],
        copy: impl FnOnce(&mut [u8]) -> Header,
    ) -> Result<Header, Header> {
        let row = into.as_mut_bytes();
        if self.layout.rows_per_image() == 1 {
            let header = copy(row);
            return if self.seal.verify(&header, row) { Ok(header) } else { Err(header) };
        }
        let mut block = [0; fervor_protocol::limits::BLOCK_BYTES];
        let block = &mut block[..self.layout.image_bytes()];
        let header = copy(block);
        let within = self.layout.within(index);
        row.copy_from_slice(&block[within..within + row.len()]);
        if self.seal.verify(&header, block) { Ok(header) } else { Err(header) }
    }

    /// Looks for a copy of the `index`-th row of a shard in its mirror or slots, given what was known *before this call*.
    #[inline]
    pub fn look_up(
        &self,
        shard: usize,
        index: u64,
        needed: u64,
        known: &Known,
        into: &mut [E],
    ) -> Option<Found> {
        match &self.parts[shard].holding {
            Holding::InPlace => None,
            Holding::Mirror(base) => {
                self.look_into_mirror(*base, index, self.parts[shard].opened, known, into)
            }
            Holding::Slots(cache) if self.schema.cached() => {
                self.look_into_slots(cache, index, needed, known, into)
            }
            Holding::Slots(_) => None,
        }
    }

    fn look_into_mirror(
        &self,
        base: usize,
        index: u64,
        opened: u64,
        known: &Known,
        into: &mut [E],
    ) -> Option<Found> {
        let at = base + self.layout.offset(self.layout.image(index));
        (0..TORN_COPIES).find_map(|_| {
            pause();
            let copied = self.verified(index, into, |data| {
                let mut header = Header::default();
                self.memory.read(at, header.as_mut_bytes());
                self.memory.read(at + ROW_HEADER, data);
                header
            });
            copied.ok().map(|header| self.pushed(&header, opened, known))
        })
    }

    /// What is to be said of a copy that was pushed; it is good for `clock` in any case.
    fn pushed(&self, header: &Header, clock: u64, known: &Known) -> Found {
        let lsn = header.version.lsn();
        // Every push of the rounds up to `known` is visible. (Under Async there are pushes, if they are asked for, but not
        // for rounds: such a copy is good for a round only if it is of an image that changed after that.)
        if self.schema.model.eager() {
            return Found { clock: known.clock.max(clock), lsn, as_of: known.round_lsn };
        }
        let sealed = if lsn >= known.round_lsn { known.sealed } else { 0 };
        Found { clock: sealed.max(clock), lsn, as_of: 0 }
    }

    fn look_into_slots(
        &self,
        cache: &Cache,
        index: u64,
        needed: u64,
        known: &Known,
        into: &mut [E],
    ) -> Option<Found> {
        let image = self.layout.image(index);
        for _ in 0..TORN_COPIES {
            let (slot, word) = cache.find(image)?;
            pause();
            let copied = self.verified(index, into, |data| cache.copy(slot, data));
            let stamp = cache.stamp(slot);
            pause();
            if !cache.unchanged(slot, word) {
                continue;
            }
            let header = match copied {
                Ok(header) => header,
                // The first push has not arrived.
                Err(header) if header.version.lsn() == 0 && header.check == !0 => return None,
                // One is arriving just now.
                Err(_) => continue,
            };
            let found = if word.state() == State::Subscribed {
                self.pushed(&header, stamp.clock, known)
            } else {
                Found { clock: stamp.clock, lsn: header.version.lsn(), as_of: stamp.as_of }
            };
            let fresh = found.clock >= needed || mutant(Mutant::CopyTooOld);
            return fresh.then_some(found);
        }
        None
    }

    /// The cache for the rows of a shard, if they are in slots.
    pub fn cache(&self, shard: usize) -> Option<&Cache> {
        match &self.parts[shard].holding {
            Holding::Slots(cache) => Some(cache),
            Holding::InPlace | Holding::Mirror(_) => None,
        }
    }
}

impl<E: Element> AnyTable for TableCore<E> {
    fn schema(&self) -> &Schema {
        &self.schema
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }

    fn id(&self, shard: usize) -> u32 {
        self.parts[shard].id
    }

    fn write(
        &self,
        shard: usize,
        slabs: &[Arc<dyn AnySlab>],
        cursor: &mut Cursor,
        writer: &mut BatchWriter<'_>,
        part: usize,
    ) -> bool {
        let finite = !self.schema.non_finite;
        let width = self.layout.image_bytes() / size_of::<E>();
        let merge = Merge::<E>::new(slabs, width, self.parts[shard].id, finite);
        merge.write(cursor, writer, part)
    }

    fn closed(&self, shard: usize, slot: Slot) {
        self.cache(shard).expect("a slot of a cache").closed(slot);
    }
}
