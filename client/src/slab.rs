//! A *slab*: a worker's updates of one clock, for the rows of one table in one shard. It has the form in
//! which updates are sent. (A *row* is an [image](fervor_protocol::row) here: a row of the table, or the
//! block of small rows that share an image.)
//!
//! ```text
//!  inc, inc_at          clock()                        acknowledged, and every copy contains it
//!  ───────────▶ Slab ───────────▶ Arc<Slab>, unchanged ──────────────────▶ its memory is used again
//!  (one worker)         handed over: sent by whoever drives the engine, read by its worker
//! ```
//!
//! | field | written | read |
//! |---|---|---|
//! | values, index | by its worker, before it is handed over | by its worker; by whoever sends it; by the server, if it lies in named memory |
//! | `delivery`, `parts` | by the thread that sends it, before the batch is posted (release) | by its worker, after it copied an image (acquire) |
//! | `Delivery::lsns` | by the thread that takes the acknowledgement (release) | by its worker (acquire) |
//!
//! **What a worker concludes.** Suppose that a worker copies an image, then looks at the slab, and finds the
//! update unsent. Then the image does not contain the update. The reason is the order of events: the sender
//! sets `parts`, then it posts the batch, and then the shard applies it.
//!
//! **Where it lies.** Whole rows lie in blocks. A block has the row numbers, then the values, aligned, as in
//! a section of a [batch](fervor_protocol::batch). A client on the server's host takes its blocks from memory
//! that the server sees, and sends their places instead of their contents. Other clients use memory of their
//! own.

use std::{
    any::Any,
    fmt,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU16, Ordering},
    },
};

use fervor_protocol::{Element, batch::SectionHeader, element, limits::BLOCK_BYTES};
use zerocopy::FromBytes;

use crate::hash::RowIndex;

mod block;
mod delivery;
mod refer;

pub use block::{PIECE_BYTES, Pool};
pub use delivery::Delivery;

use block::Block;

/// Bytes of a block of other memory, if a row is not longer.
const HEAP_BYTES: usize = 64 << 10;
/// Values of a block begin at multiples of this.
const VALUE_ALIGN: usize = 64;
/// Bit of an index entry: the row has single elements.
const SPARSE: u32 = 1 << 31;
/// Cells of a row before they are compacted for the first time.
const FEW_CELLS: usize = 32;
/// What `parts` says of an update that has not been sent.
const UNSENT: u16 = u16::MAX;
/// What `parts` says of an update that goes in several batches.
const IN_RANGES: u16 = u16::MAX - 1;

/// How whole rows lie in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Geometry {
    row_bytes: usize,
    /// Rows of a block are `1 << shift`.
    shift: u32,
    values_at: usize,
    bytes: usize,
}

impl Geometry {
    fn new(row_bytes: usize, named: bool) -> Self {
        let target = if named { PIECE_BYTES } else { HEAP_BYTES.max(row_bytes + VALUE_ALIGN) };
        let rows = (target - VALUE_ALIGN) / (4 + row_bytes);
        let shift = rows.max(1).ilog2();
        let values_at = (4usize << shift).next_multiple_of(VALUE_ALIGN);
        Self { row_bytes, shift, values_at, bytes: values_at + (row_bytes << shift) }
    }
}

/// How far an update has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// No shard has it.
    Unsent,
    /// It went out with this batch.
    Sent(u64),
    /// It was applied at this LSN.
    Applied(u64),
    /// It goes in several batches: see [`Slab::ranges`].
    InRanges,
}

/// Consecutive elements of a row that is longer than a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SentRange {
    entry: u32,
    /// The first column behind it.
    end: usize,
    part: usize,
}

/// Single elements of a row.
#[derive(Debug)]
struct Cells<E> {
    row: u32,
    pairs: Vec<(u32, E)>,
    /// Pairs at which they are compacted next.
    limit: usize,
}

/// See the module.
pub struct Slab<E> {
    stamp: u64,
    width: usize,
    geometry: Geometry,
    index: RowIndex,
    blocks: Vec<Block>,
    /// How many blocks its contents before these took.
    used_before: usize,
    /// Whole rows.
    rows: usize,
    cells: Vec<Cells<E>>,
    /// Rows whose cells became a whole row: their entry in `cells` is empty.
    emptied: usize,
    pool: Option<Arc<Pool>>,
    /// The cells as sections, in named memory.
    encoded: Vec<Block>,
    /// What to send instead of the contents, if all of it is in named memory.
    sections: Option<Vec<SectionHeader>>,
    greatest: OnceLock<f64>,
    delivery: OnceLock<Arc<Delivery>>,
    /// Per whole row, then per row of cells: which batch of the delivery. Empty: there is one.
    parts: OnceLock<Box<[AtomicU16]>>,
    /// Of rows that are longer than a message, which columns have been written into which batch, in their order.
    ranges: Mutex<Vec<SentRange>>,
}

impl<E> fmt::Debug for Slab<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slab(clock {}, {} rows, {} rows of cells)", self.stamp, self.rows, self.cells.len())
    }
}

impl<E: Element> Slab<E> {
    /// Empty, for a shard that has `rows` rows of `width` elements; in memory of `pool`, if that is given.
    pub fn new(rows: u64, width: usize, pool: Option<Arc<Pool>>) -> Self {
        Self {
            stamp: 0,
            width,
            geometry: Geometry::new(width * size_of::<E>(), pool.is_some()),
            index: RowIndex::new(rows),
            blocks: Vec::new(),
            used_before: 0,
            rows: 0,
            cells: Vec::new(),
            emptied: 0,
            pool,
            encoded: Vec::new(),
            sections: None,
            greatest: OnceLock::new(),
            delivery: OnceLock::new(),
            parts: OnceLock::new(),
            ranges: Mutex::default(),
        }
    }

    /// Whether there is no update.
    pub fn is_empty(&self) -> bool {
        self.rows == 0 && self.cells.is_empty()
    }

    /// Elements of a row.
    #[inline]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of whole rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The `at`-th whole row: its index in the shard.
    #[inline]
    pub fn row(&self, at: usize) -> u32 {
        let (block, at) = self.place(at);
        let bytes = &self.blocks[block].bytes()[at * 4..at * 4 + 4];
        u32::from_le_bytes(bytes.try_into().expect("4 bytes"))
    }

    /// Values of the `at`-th whole row.
    #[inline]
    pub fn values(&self, at: usize) -> &[E] {
        let (block, at) = self.place(at);
        let start = self.geometry.values_at + at * self.geometry.row_bytes;
        <[E]>::ref_from_bytes(&self.blocks[block].bytes()[start..start + self.geometry.row_bytes])
            .expect("blocks and rows are aligned")
    }

    fn values_mut(&mut self, at: usize) -> &mut [E] {
        let (block, at) = self.place(at);
        let start = self.geometry.values_at + at * self.geometry.row_bytes;
        <[E]>::mut_from_bytes(&mut self.blocks[block].bytes_mut()[start..start + self.geometry.row_bytes])
            .expect("blocks and rows are aligned")
    }

    #[inline]
    fn place(&self, at: usize) -> (usize, usize) {
        (at >> self.geometry.shift, at & ((1 << self.geometry.shift) - 1))
    }

    /// Number of rows of cells.
    pub fn cell_rows(&self) -> usize {
        self.cells.len()
    }

    /// The `at`-th row of cells: its index in the shard, and pairs of column and value; none if it has become a whole row.
    pub fn cells(&self, at: usize) -> (u32, &[(u32, E)]) {
        let cells = &self.cells[at];
        (cells.row, &cells.pairs)
    }

    /// A place for the whole row `row`, which has none: its values, which may be anything.
    #[inline]
    fn place_row(&mut self, row: u32) -> &mut [E] {
        let (block, within) = self.place(self.rows);
        if block == self.blocks.len() {
            self.blocks.push(Block::new(self.pool.as_ref(), self.geometry.bytes));
        }
        self.rows += 1;
        self.index.set(row, self.rows as u32);
        let bytes = self.blocks[block].bytes_mut();
        bytes[within * 4..within * 4 + 4].copy_from_slice(&row.to_le_bytes());
        let start = self.geometry.values_at + within * self.geometry.row_bytes;
        <[E]>::mut_from_bytes(&mut bytes[start..start + self.geometry.row_bytes])
            .expect("blocks and rows are aligned")
    }

    /// Adds `delta` to the whole row `row`. `finite`: the sum has to be, and `delta`. `false`: it would not be; nothing is added.
    #[inline]
    pub fn add(&mut self, row: u32, delta: &[E], finite: bool) -> bool {
        match self.index.get(row) {
            0 => {
                if finite && !element::all_finite(delta) {
                    return false;
                }
                self.place_row(row).copy_from_slice(delta);
                true
            }
            entry if entry & SPARSE != 0 => {
                let at = self.make_whole(entry);
                self.add_to_whole(at, delta, finite)
            }
            entry => self.add_to_whole(entry as usize - 1, delta, finite),
        }
    }

    #[inline]
    fn add_to_whole(&mut self, at: usize, delta: &[E], finite: bool) -> bool {
        let values = self.values_mut(at);
        if finite {
            return element::add_finite(values, delta);
        }
        element::add_all(values, delta);
        true
    }

    /// Adds to single elements of `row`, as [`Slab::add`].
    pub fn add_at(&mut self, row: u32, pairs: &[(u32, E)], finite: bool) -> bool {
        let mut entry = self.index.get(row);
        if finite && !self.sums_with(entry, pairs) {
            return false;
        }
        if entry == 0 {
            self.cells.push(Cells { row, pairs: Vec::new(), limit: FEW_CELLS });
            entry = SPARSE | self.cells.len() as u32;
            self.index.set(row, entry);
        }
        if entry & SPARSE == 0 {
            add_pairs(self.values_mut(entry as usize - 1), pairs);
            return true;
        }
        let cells = &mut self.cells[(entry & !SPARSE) as usize - 1];
        cells.pairs.extend_from_slice(pairs);
        if cells.pairs.len() * 2 > self.width {
            self.make_whole(entry);
        } else if cells.pairs.len() > cells.limit {
            compact(&mut cells.pairs);
            cells.limit = FEW_CELLS.max(2 * cells.pairs.len());
        }
        true
    }

    /// Whether what `entry` has of the columns of `pairs` is finite with them added. There may be no entry.
    fn sums_with(&self, entry: u32, pairs: &[(u32, E)]) -> bool {
        let magnitudes = |pairs: &[(u32, E)]| pairs.iter().map(|pair| pair.1.to_f64().abs()).sum::<f64>();
        let whole = (entry != 0 && entry & SPARSE == 0).then(|| self.values(entry as usize - 1));
        let cells = || match entry {
            0 => &[][..],
            entry => &self.cells[(entry & !SPARSE) as usize - 1].pairs,
        };
        let before = match whole {
            Some(values) => {
                pairs.iter().map(|pair| values[pair.0 as usize].to_f64().abs()).fold(0.0, f64::max)
            }
            None => magnitudes(cells()),
        };
        if before + magnitudes(pairs) < E::SAFE_SUM {
            return true;
        }
        let of = |pairs: &[(u32, E)], column| {
            let of_it = pairs.iter().filter(|pair| pair.0 == column);
            of_it.fold(E::default(), |sum, pair| sum.plus(pair.1))
        };
        pairs.iter().all(|&(column, _)| {
            let before = whole.map_or_else(|| of(cells(), column), |values| values[column as usize]);
            before.plus(of(pairs, column)).is_finite()
        })
    }

    /// Makes the cells of `entry` a whole row. Where it is.
    fn make_whole(&mut self, entry: u32) -> usize {
        let cells = &mut self.cells[(entry & !SPARSE) as usize - 1];
        let (row, pairs) = (cells.row, std::mem::take(&mut cells.pairs));
        self.emptied += 1;
        let values = self.place_row(row);
        values.fill(E::default());
        add_pairs(values, &pairs);
        self.rows - 1
    }

    /// Adds to the elements of `row` from column `start` on, as [`Slab::add`]: to one of the small rows that share an image.
    pub fn add_small(&mut self, row: u32, start: usize, delta: &[E], finite: bool) -> bool {
        let entry = self.index.get(row);
        if entry != 0 && entry & SPARSE == 0 {
            let values = &mut self.values_mut(entry as usize - 1)[start..start + delta.len()];
            if finite && !E::sums_are_finite(values, delta) {
                return false;
            }
            E::add_all(values, delta);
            return true;
        }
        let mut pairs = [(0, E::default()); BLOCK_BYTES / 4];
        let pairs = &mut pairs[..delta.len()];
        for ((pair, column), value) in pairs.iter_mut().zip(start as u32..).zip(delta) {
            *pair = (column, *value);
        }
        self.add_at(row, pairs, finite)
    }

    /// Adds what it has of `row`, from column `start` on, to a copy of those columns. Whether it has anything of the row.
    #[inline]
    pub fn add_to(&self, row: u32, start: usize, copy: &mut [E]) -> bool {
        let entry = self.index.get(row);
        if entry == 0 {
            return false;
        }
        self.add_entry(entry, start, copy);
        true
    }

    /// As [`Slab::add_to`], for what [`Slab::find`] found.
    #[inline]
    pub fn add_entry(&self, entry: u32, start: usize, copy: &mut [E]) {
        if entry & SPARSE == 0 {
            element::add_all(copy, &self.values(entry as usize - 1)[start..start + copy.len()]);
            return;
        }
        for (column, value) in &self.cells[(entry & !SPARSE) as usize - 1].pairs {
            if let Some(element) = (*column as usize).checked_sub(start).and_then(|at| copy.get_mut(at)) {
                *element = element.plus(*value);
            }
        }
    }

    /// Its entry for `row`; zero if it has none.
    #[inline]
    pub fn find(&self, row: u32) -> u32 {
        self.index.get(row)
    }

    /// How far the update of an entry has come. Loaded after the image was copied; see the module.
    #[inline]
    pub fn progress(&self, entry: u32) -> Progress {
        let Some(delivery) = self.delivery.get() else { return Progress::Unsent };
        let part = match self.parts.get() {
            None => 0,
            Some(parts) => match parts[self.part_of(entry)].load(Ordering::Acquire) {
                UNSENT => return Progress::Unsent,
                IN_RANGES => return Progress::InRanges,
                part => part as usize,
            },
        };
        match delivery.lsn(part) {
            Some(lsn) => Progress::Applied(lsn),
            None => Progress::Sent(delivery.first + part as u64),
        }
    }

    /// The worker's clock `stamp` has ended: nothing is added any more.
    pub fn hand_over(&mut self, stamp: u64) {
        self.stamp = stamp;
        self.sections = self.pool.is_some().then(|| self.refer()).flatten();
    }

    /// No element of what was handed over is greater, in magnitude: cells of one column taken together.
    pub fn greatest(&self) -> f64 {
        let of = |values: &[E]| values.iter().map(|value| value.to_f64().abs()).fold(0.0, f64::max);
        *self.greatest.get_or_init(|| {
            let rows = (0..self.rows).map(|at| of(self.values(at)));
            let sum = |cells: &Cells<E>| cells.pairs.iter().map(|pair| pair.1.to_f64().abs()).sum();
            rows.chain(self.cells.iter().map(sum)).fold(0.0, f64::max)
        })
    }

    /// Empty again, its memory kept.
    pub fn reset(&mut self) {
        if self.is_empty() {
            return;
        }
        let mut index = std::mem::replace(&mut self.index, RowIndex::new(0));
        index.clear((0..self.rows).map(|at| self.row(at)).chain(self.cells.iter().map(|cells| cells.row)));
        self.index = index;
        // What one great clock needed is given back. What two clocks needed is kept: the next may need it, too. Pieces of the
        // pool are given back: other workers need them.
        let used = self.rows.div_ceil(1 << self.geometry.shift);
        self.blocks.truncate(if self.pool.is_some() { 1 } else { used.min(self.used_before).max(1) });
        self.used_before = used;
        self.rows = 0;
        self.cells.clear();
        self.emptied = 0;
        self.encoded.clear();
        self.sections = None;
        self.greatest = OnceLock::new();
        self.delivery = OnceLock::new();
        self.parts = OnceLock::new();
        self.ranges = Mutex::default();
    }

    /// The greatest LSN at which any of it was applied, when all of it is acknowledged.
    pub fn applied(&self) -> Option<u64> {
        self.delivery.get()?.greatest()
    }

    /// Number of the last batch that carried some of it, when all of it is posted.
    pub fn last_batch(&self) -> Option<u64> {
        self.delivery.get()?.last()
    }

    /// Which batch of its delivery carries the update of an entry.
    pub fn goes_with(&self, entry: u32, part: usize) {
        let parts = self.parts.get().expect("its delivery has parts");
        assert!(part < IN_RANGES as usize, "a delivery of {part} batches");
        // SYNC POINT: before the batch is posted; see the module.
        parts[self.part_of(entry)].store(part as u16, Ordering::Release);
    }

    /// Which batch of its delivery carries the columns of an entry up to `end`, from where the last range ended.
    pub fn range_goes_with(&self, entry: u32, end: usize, part: usize) {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner).push(SentRange { entry, end, part });
        let parts = self.parts.get().expect("its delivery has parts");
        // SYNC POINT: as above.
        parts[self.part_of(entry)].store(IN_RANGES, Ordering::Release);
    }

    /// How many columns of an entry that goes in ranges are in an image with LSN `lsn`, which was copied in place: `announced` tells the
    /// LSN at which a batch was applied, if it has been announced.
    pub fn columns_applied(&self, entry: u32, lsn: u64, announced: impl Fn(u64) -> Option<u64>) -> usize {
        let delivery = self.delivery.get().expect("some of it has been sent");
        // A look at the shard's memory may let other threads run: no lock is held meanwhile. What the image may have was noted before it
        // was copied.
        let of_it: Vec<_> = {
            let ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
            ranges.iter().filter(|range| range.entry == entry).copied().collect()
        };
        let contained = |range: &&SentRange| {
            let known = || delivery.lsn(range.part);
            let applied = known().or_else(|| announced(delivery.first + range.part as u64)).or_else(known);
            applied.is_some_and(|applied| applied <= lsn)
        };
        of_it.iter().take_while(contained).last().map_or(0, |range| range.end)
    }

    /// The ranges of an entry that have been sent, in their order: the first column behind each, and the LSN at which it was
    /// applied if that is known.
    pub fn ranges(&self, entry: u32) -> Vec<(usize, Option<u64>)> {
        let delivery = self.delivery.get().expect("some of it has been sent");
        let ranges = self.ranges.lock().unwrap_or_else(PoisonError::into_inner);
        let of_it = ranges.iter().filter(|range| range.entry == entry);
        of_it.map(|range| (range.end, delivery.lsn(range.part))).collect()
    }

    #[inline]
    fn part_of(&self, entry: u32) -> usize {
        if entry & SPARSE == 0 { entry as usize - 1 } else { self.rows + (entry & !SPARSE) as usize - 1 }
    }

    /// Whether an entry is of single elements.
    pub fn is_cells(entry: u32) -> bool {
        entry & SPARSE != 0
    }

    /// The single elements of an entry that [is of them](Slab::is_cells).
    pub fn pairs(&self, entry: u32) -> &[(u32, E)] {
        &self.cells[(entry & !SPARSE) as usize - 1].pairs
    }

    /// Puts the update of an entry into `row`.
    pub fn copy_entry(&self, entry: u32, row: &mut [E]) {
        if entry & SPARSE == 0 {
            row.copy_from_slice(self.values(entry as usize - 1));
        } else {
            row.fill(E::default());
            add_pairs(row, self.pairs(entry));
        }
    }
}

/// A slab of whatever element type, for who sends it.
pub trait AnySlab: Send + Sync + fmt::Debug {
    /// For the typed way in.
    fn as_any(&self) -> &dyn Any;
    /// The worker's clock when its updates were made.
    fn stamp(&self) -> u64;
    /// What to send instead of its contents; the table is to be filled in.
    fn references(&self) -> Option<&[SectionHeader]>;
    /// It goes out with `delivery`, in several batches if `parts`.
    fn goes_out(&self, delivery: &Arc<Delivery>, parts: bool);
    /// Greatest bytes that one row of it takes in a message, and the bytes and rows of all.
    fn extent(&self) -> (usize, usize, usize);
}

impl<E: Element> AnySlab for Slab<E> {
    fn as_any(&self) -> &dyn Any {
        self
    }

    fn stamp(&self) -> u64 {
        self.stamp
    }

    fn references(&self) -> Option<&[SectionHeader]> {
        self.sections.as_deref()
    }

    fn goes_out(&self, delivery: &Arc<Delivery>, parts: bool) {
        if parts {
            let all = (0..self.rows + self.cells.len()).map(|_| AtomicU16::new(UNSENT)).collect();
            self.parts.set(all).expect("it goes out once");
        }
        self.delivery.set(delivery.clone()).expect("it goes out once");
    }

    fn extent(&self) -> (usize, usize, usize) {
        let whole = if self.rows > 0 { 8 + self.geometry.row_bytes } else { 0 };
        let cell = 4 + size_of::<E>();
        let cells = self.cells.iter().map(|row| 32 + row.pairs.len() * cell);
        let greatest = cells.clone().max().unwrap_or(0);
        (whole.max(greatest), self.rows * whole + cells.sum::<usize>(), self.rows + self.cells.len())
    }
}

fn add_pairs<E: Element>(row: &mut [E], pairs: &[(u32, E)]) {
    for (column, value) in pairs {
        let element = &mut row[*column as usize];
        *element = element.plus(*value);
    }
}

/// One pair per column, in order.
fn compact<E: Element>(pairs: &mut Vec<(u32, E)>) {
    pairs.sort_by_key(|pair| pair.0);
    pairs.dedup_by(|next, sum| {
        let same = next.0 == sum.0;
        if same {
            sum.1 = sum.1.plus(next.1);
        }
        same
    });
}

#[cfg(test)]
mod tests;
