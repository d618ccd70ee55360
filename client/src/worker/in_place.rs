//! Rows that are read where they are, in the memory of a shard on this host.
//!
//! One row is one snapshot of its bytes under the sequence lock of its image. Many rows are read shard by
//! shard, in *runs*. What is the same for all rows of a run (the clock, the shard's memory, the worker's own
//! updates) is looked up once. If rows follow each other in one image, one snapshot serves them all.
//!
//! **Clocks.** A run is as of the clock that was known before its first row was read. All of its rows are
//! counted at that clock, at once.

use fervor_protocol::{
    Element,
    clock::needed,
    limits::{BLOCK_BYTES, ROW_HEADER},
    mutants::{Mutant, mutant},
    row::{Layout, Version},
};
use fervor_verbs::transport::{Transport, View};
use zerocopy::{FromBytes, IntoBytes};

use super::{Worker, known_updates};
use crate::{
    error::Error,
    own::{ShardUpdates, WorkerUpdates},
    session::{core::Core, link::InPlace},
    table::TableCore,
};

/// Bytes of a table of which some are in no near cache, and rows that are fetched ahead then: some more than a processor looks ahead by
/// itself. (Rows of 4 bytes anywhere in 80 MB, on a Xeon of 2023: 19 million a second without, 46 with.)
const FAR: usize = 1 << 20;
const AHEAD: usize = 12;
/// Looks at an image that is being rewritten before it is seen to that its server still lives.
const LOOKS: u32 = 256;
/// Rows read in place before it is seen to that their servers still live.
const BLIND: u64 = 1 << 14;
/// Bytes of an aligned word.
const WORD: usize = 8;

/// A table's rows in one shard, and what of this worker's updates they may lack.
struct Seen<'a, T: Transport, E> {
    core: &'a Core<T>,
    place: &'a InPlace<T::View>,
    layout: &'a Layout,
    /// Byte offset of the first image.
    first: usize,
    /// The table is large: rows are fetched ahead.
    far: bool,
    /// `None`: they lack nothing.
    updates: Option<&'a ShardUpdates<E>>,
}

impl<T: Transport, E: Element> Seen<'_, T, E> {
    /// Copies bytes of an image from byte `within` of its data on. The LSN of the image.
    #[inline]
    fn copy(&self, image: u64, within: usize, into: &mut [u8]) -> Result<u64, Error> {
        let lock = self.first + self.layout.offset(image);
        let data = lock + ROW_HEADER + within;
        match self.place.view.snapshot(lock, data, into) {
            Some(version) => Ok(Version::from_bits(version).lsn()),
            None => self.copy_again(lock, data, into),
        }
    }

    /// The same, after a look that failed. Each such look is a rewrite of this very image, which its shard makes once per batch.
    #[cold]
    fn copy_again(&self, lock: usize, data: usize, into: &mut [u8]) -> Result<u64, Error> {
        let view = &self.place.view;
        if mutant(Mutant::SnapshotUnchecked) {
            return Ok(Version::from_bits(view.load(lock)).lsn());
        }
        let mut looks = 0;
        loop {
            self.core.transport.relax(looks % LOOKS);
            looks += 1;
            if looks % LOOKS == 0 {
                self.core.progress();
                self.core.alive()?;
            }
            if let Some(version) = view.snapshot(lock, data, into) {
                return Ok(Version::from_bits(version).lsn());
            }
        }
    }

    /// Adds what of this worker's updates a copy lacks of the columns of an image from `start` on.
    #[inline]
    fn complete(&self, image: u64, start: usize, lsn: u64, into: &mut [E]) {
        if let Some(updates) = self.updates {
            updates.complete_in_place(image as u32, start, lsn, |batch| self.place.announced(batch), into);
        }
    }

    /// Reads the `index`-th row.
    #[inline]
    fn row(&self, index: u64, into: &mut [E]) -> Result<(), Error> {
        let (image, within) = (self.layout.image(index), self.layout.within(index));
        let lsn = self.copy(image, within, into.as_mut_bytes())?;
        self.complete(image, within / size_of::<E>(), lsn, into);
        Ok(())
    }

    /// The same of a row of one element, which lies in an aligned word.
    #[inline(always)]
    fn element(&self, index: u64) -> Result<E, Error> {
        let (image, within) = (self.layout.image(index), self.layout.within(index));
        let lock = self.first + self.layout.offset(image);
        let data = lock + ROW_HEADER + within / WORD * WORD;
        let (lsn, word) = match self.place.view.snapshot_word(lock, data) {
            Some((version, word)) => (Version::from_bits(version).lsn(), word),
            None => {
                let mut word = 0u64;
                (self.copy_again(lock, data, word.as_mut_bytes())?, word)
            }
        };
        // Its bytes, in the order in which they lie in memory.
        let bytes = (u64::from_le_bytes(word.to_ne_bytes()) >> (within % WORD * 8)).to_le_bytes();
        let mut element = E::default();
        element.as_mut_bytes().copy_from_slice(&bytes[..size_of::<E>()]);
        self.complete(image, within / size_of::<E>(), lsn, std::slice::from_mut(&mut element));
        Ok(element)
    }

    /// When the `done`-th row is read: has the cache fetch one that comes later.
    #[inline]
    fn prefetch(&self, index: &impl Fn(usize) -> Option<u64>, done: usize) {
        if self.far
            && let Some(later) = index(done + AHEAD)
        {
            self.place.view.prefetch(self.first + self.layout.offset(self.layout.image(later)));
        }
    }

    /// Reads rows into `into` until `index`, which tells where they are, has none. How many there were.
    fn rows(&self, index: impl Fn(usize) -> Option<u64>, into: &mut [E]) -> Result<usize, Error> {
        let layout = self.layout;
        let width = layout.row_bytes() / size_of::<E>();
        if layout.rows_per_image() == 1 {
            let mut done = 0;
            while let Some(at) = index(done) {
                self.prefetch(&index, done);
                self.row(at, &mut into[done * width..(done + 1) * width])?;
                done += 1;
            }
            return Ok(done);
        }
        let mut block = [0u64; BLOCK_BYTES / WORD];
        let mut done = 0;
        let mut next = index(0);
        while let Some(at) = next {
            let image = layout.image(at);
            self.prefetch(&index, done);
            next = index(done + 1);
            if next.is_none_or(|next| layout.image(next) != image) {
                match &mut into[done * width..(done + 1) * width] {
                    [one] => *one = self.element(at)?,
                    row => self.row(at, row)?,
                }
                done += 1;
                continue;
            }
            let bytes = &mut block.as_mut_bytes()[..layout.image_bytes()];
            let lsn = self.copy(image, 0, bytes)?;
            let block = <[E]>::mut_from_bytes(bytes).expect("words are aligned for every element");
            self.complete(image, 0, lsn, block);
            next = Some(at);
            while let Some(at) = next.filter(|next| layout.image(*next) == image) {
                let column = layout.within(at) / size_of::<E>();
                let copy = &mut into[done * width..(done + 1) * width];
                match copy {
                    [one] => *one = block[column],
                    copy => copy.copy_from_slice(&block[column..column + width]),
                }
                done += 1;
                next = index(done);
            }
        }
        Ok(done)
    }
}

/// Where `table`, which is `far` or not, is seen in `shard` by a worker that has `updates`.
#[inline]
fn seen<'a, T: Transport, E: Element>(
    core: &'a Core<T>,
    updates: &'a mut WorkerUpdates,
    table: &'a TableCore<E>,
    shard: usize,
    far: bool,
) -> Seen<'a, T, E> {
    let place = core.links[shard].place.get().expect("rows are in place where there is one");
    let updates = known_updates(updates, table).map(|updates| &updates.shards[shard]);
    let first = table.part(shard).offset;
    Seen {
        core,
        place,
        layout: table.layout(),
        first,
        far,
        updates: updates.filter(|updates| !updates.is_clean()),
    }
}

impl<T: Transport> Worker<T> {
    /// Counts rows that were read in place, and now and then sees to it that the servers still live: nothing else would tell.
    #[inline]
    pub(super) fn looked(&mut self, rows: u64) -> Result<(), Error> {
        let before = self.stats.in_place;
        self.stats.in_place += rows;
        if before / BLIND != self.stats.in_place / BLIND {
            self.core.progress();
            self.core.alive()?;
        }
        Ok(())
    }

    /// Reads a row in place.
    #[inline]
    pub(super) fn read_in_place<E: Element>(
        &mut self,
        table: &TableCore<E>,
        shard: usize,
        index: u64,
        into: &mut [E],
    ) -> Result<(), Error> {
        seen(&self.core, &mut self.updates, table, shard, false).row(index, into)
    }

    /// Reads `count` rows that are all in place, and there; `row` tells which.
    pub(super) fn read_many_in_place<E: Element>(
        &mut self,
        table: &TableCore<E>,
        count: usize,
        row: impl Fn(usize) -> u64,
        into: &mut [E],
    ) -> Result<(), Error> {
        let width = table.schema().width as usize;
        let router = self.core.router;
        let needed = needed(table.schema().model, self.clock);
        let layout = table.layout();
        let far = layout.offset(layout.images(table.schema().rows)) > FAR;
        let mut done = 0;
        while done < count {
            let (shard, _) = router.locate(row(done));
            // SYNC POINT: what is read is as of the clock that was known before.
            let known = self.fresh(shard, needed)?;
            let index = |at: usize| {
                let (there, index) = (done + at < count).then(|| router.locate(row(done + at)))?;
                (there == shard).then_some(index)
            };
            let run = seen(&self.core, &mut self.updates, table, shard, far)
                .rows(index, &mut into[done * width..])?;
            self.looked(run as u64)?;
            self.count(table, row(done), run as u64, known, needed)?;
            done += run;
        }
        Ok(())
    }
}
