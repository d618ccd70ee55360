//! Rows that are not read in place: from a mirror, from a slot, or by READ.

use std::iter;

use fervor_protocol::{
    Element, clock,
    limits::BLOCK_BYTES,
    mutants::{Mutant, mutant, pause},
    row::Header,
    wire::{PUSH_ONCE, SlotRecord},
};
use fervor_verbs::transport::Transport;
use zerocopy::IntoBytes;

use super::{Worker, known_updates, place};
use crate::{
    cache::{Slot, Stamp, State, Taken},
    error::Error,
    known::Before,
    own::{Copied, Incomplete},
    reader::Reader,
    session::{core::For, link::Wish},
    table::{Found, Holding, TableCore},
};

/// READs of a row that stays torn before the server is asked for it.
const TORN_READS: usize = 8;
/// Wishes after which they are sent without waiting for the end of the clock.
const MANY_WISHES: usize = 64;

impl<T: Transport> Worker<T> {
    /// Reads a row from its copy here, or from its shard.
    pub(super) fn read_copy<E: Element>(
        &mut self,
        table: &TableCore<E>,
        row: u64,
        (shard, index): (usize, u64),
        needed: u64,
        into: &mut [E],
    ) -> Result<(), Error> {
        if let Some(clock) = self.read_held(table, shard, index, needed, into)? {
            self.stats.hits += 1;
            return self.count(table, row, 1, clock, needed);
        }
        self.stats.misses += 1;
        let before = self.core.transport.now();
        self.hear(table);
        let clock = self.miss(table, row, (shard, index), needed, into)?;
        self.stats.communicating += self.core.transport.now() - before;
        self.count(table, row, 1, clock, needed)
    }

    /// As [`Worker::get_many`], where not all rows are read in place.
    pub(super) fn read_copies<E: Element>(
        &mut self,
        table: &TableCore<E>,
        rows: &[u64],
        into: &mut [E],
    ) -> Result<(), Error> {
        let width = table.schema().width as usize;
        let needed = clock::needed(table.schema().model, self.clock);
        let mut missed = Vec::new();
        for (at, (&row, copy)) in rows.iter().zip(into.chunks_exact_mut(width)).enumerate() {
            let (shard, index) = self.core.router.locate(row);
            if let Holding::InPlace = table.part(shard).holding {
                self.read(table, row, copy)?;
                continue;
            }
            if self.core.links[shard].round() < needed {
                self.wait_for(shard, needed)?;
            }
            match self.read_held(table, shard, index, needed, copy)? {
                Some(clock) => {
                    self.stats.hits += 1;
                    self.count(table, row, 1, clock, needed)?;
                }
                None => missed.push(at),
            }
        }
        if missed.is_empty() {
            return Ok(());
        }
        let before = self.core.transport.now();
        self.hear(table);
        self.may_read()?;
        if !self.prefetched.is_empty() {
            self.take_all_prefetched(table, rows, &mut missed, needed, into)?;
        }
        let places: Vec<_> = self.free_places(table.layout().image_bytes(), missed.len())?.collect();
        for group in missed.chunks(places.len()) {
            self.read_group(table, rows, group, &places, needed, into)?;
        }
        self.stats.communicating += self.core.transport.now() - before;
        Ok(())
    }

    /// The way to rows that are not in place.
    #[inline]
    pub(super) fn reader(&mut self) -> Result<&mut Reader<T>, Error> {
        if self.reader.is_none() {
            self.take_seat()?;
        }
        Ok(self.reader.as_mut().expect("it has just been made"))
    }

    #[cold]
    fn take_seat(&mut self) -> Result<(), Error> {
        self.reader = Some(Reader::new(&self.core, &self.lanes)?);
        Ok(())
    }

    /// Reads a row from a mirror or a slot: the clock for which it is good. `None`: it has to be READ.
    #[inline]
    fn read_held<E: Element>(
        &mut self,
        table: &TableCore<E>,
        shard: usize,
        index: u64,
        needed: u64,
        into: &mut [E],
    ) -> Result<Option<u64>, Error> {
        // SYNC POINT: a copy that is pushed is as of the round that was known before the look.
        let known = self.core.links[shard].known();
        let Some(found) = table.look_up(shard, index, needed, &known, into) else { return Ok(None) };
        let complete = self.complete(table, shard, index, &found, into)?;
        Ok(complete.then_some(found.clock))
    }

    /// Adds what of this worker's updates a copy lacks, and waits to be told if that is not known. `false`: the copy is too old.
    #[inline]
    fn complete<E: Element>(
        &mut self,
        table: &TableCore<E>,
        shard: usize,
        index: u64,
        found: &Found,
        into: &mut [E],
    ) -> Result<bool, Error> {
        let (image, start) = place(table, index);
        // No clone of the `Arc`: its count is a word that all workers of the client would write at each `get`.
        let Self { core, updates, .. } = self;
        let Some(updates) = known_updates(updates, table) else { return Ok(true) };
        let updates = &updates.shards[shard];
        loop {
            pause();
            let below = core.links[shard].below();
            pause();
            let copied = Copied { lsn: found.lsn, as_of: found.as_of, below };
            match updates.complete(image, start, &copied, into) {
                Ok(()) => return Ok(true),
                Err(Incomplete::Stale) => return Ok(false),
                Err(Incomplete::Unknown(slab)) => core.wait(For::Memory, || updates.is_applied(slab))?,
            }
        }
    }

    /// Before READs under SSP: takes what has been said of the clocks. A copy is trusted for the clock that was known
    /// before its READ, so the later that is, the longer it serves.
    pub(super) fn hear<E: Element>(&self, table: &TableCore<E>) {
        if table.keeps_reads() {
            self.core.progress();
        }
    }

    /// READs that were in flight when a server was lost are not waited for, so the reader reads no more.
    pub(super) fn may_read(&self) -> Result<(), Error> {
        if mutant(Mutant::ReadAfterLoss) { Ok(()) } else { self.core.alive() }
    }

    pub(super) fn before(&self, shard: usize) -> Before {
        let link = &self.core.links[shard];
        Before { clock: link.clock(), as_of: link.acknowledged() }
    }

    /// READs the rows at `group` of `rows` together, into as many of `places`, and what comes torn or undecided one by one after.
    fn read_group<E: Element>(
        &mut self,
        table: &TableCore<E>,
        rows: &[u64],
        group: &[usize],
        places: &[usize],
        needed: u64,
        into: &mut [E],
    ) -> Result<(), Error> {
        self.may_read()?;
        let width = table.schema().width as usize;
        let router = self.core.router;
        // SYNC POINT: a READ is trusted for the clock that was known before it was posted.
        let before: Vec<Before> = (0..self.core.links.len()).map(|shard| self.before(shard)).collect();
        let mut images: Vec<_> = places
            .iter()
            .zip(group)
            .map(|(&place, &at)| {
                let (shard, index) = router.locate(rows[at]);
                (shard, place, table.layout().image(index))
            })
            .collect();
        // Those of a shard go together, under one lock and with one doorbell.
        images.sort_unstable();
        for images in images.chunk_by(|one, other| one.0 == other.0) {
            let of_shard = images.iter().map(|&(_, place, image)| (place, image));
            self.post(table, images[0].0, of_shard, true)?;
        }
        self.await_reads(group.len())?;
        for (&place, &at) in places.iter().zip(group) {
            let row = rows[at];
            let (shard, index) = router.locate(row);
            let copy = &mut into[at * width..(at + 1) * width];
            self.stats.misses += 1;
            let clock = match self.accept(table, row, (shard, index), place, before[shard], copy)? {
                true => before[shard].clock,
                // What was READ into the first place has been taken by now.
                false => self.miss_alone(table, row, (shard, index), copy, places[0])?,
            };
            self.count(table, row, 1, clock, needed)?;
        }
        Ok(())
    }

    /// READs a row, keeps it if the model says so, and returns the clock that the copy is good for.
    #[cold]
    fn miss<E: Element>(
        &mut self,
        table: &TableCore<E>,
        row: u64,
        at: (usize, u64),
        needed: u64,
        into: &mut [E],
    ) -> Result<u64, Error> {
        self.may_read()?;
        if let Some(clock) = self.take_prefetched(table, row, at, needed, into)? {
            return Ok(clock);
        }
        let place = self.free_places(table.layout().image_bytes(), 1)?.next().expect("there is one");
        self.miss_alone(table, row, at, into, place)
    }

    /// As [`Worker::miss`], into `place`, which is free and long enough.
    fn miss_alone<E: Element>(
        &mut self,
        table: &TableCore<E>,
        row: u64,
        (shard, index): (usize, u64),
        into: &mut [E],
        place: usize,
    ) -> Result<u64, Error> {
        for _ in 0..TORN_READS {
            // SYNC POINT: a READ is trusted for the clock that was known before it was posted.
            let mut before = self.before(shard);
            self.read_into(table, shard, index, place)?;
            if mutant(Mutant::TrustLateClock) {
                before.clock = self.core.links[shard].clock();
            }
            if self.accept(table, row, (shard, index), place, before, into)? {
                return Ok(before.clock);
            }
        }
        self.ask(table, row, (shard, index), place, into)
    }

    /// READs the image of a row into `place`, and waits for it.
    fn read_into<E: Element>(
        &mut self,
        table: &TableCore<E>,
        shard: usize,
        index: u64,
        place: usize,
    ) -> Result<(), Error> {
        self.post(table, shard, iter::once((place, table.layout().image(index))), true)?;
        self.await_reads(1)
    }

    /// Rings for what was posted and not rung for.
    pub(super) fn ring_all(&mut self) -> Result<(), Error> {
        let Self { core, reader, .. } = self;
        reader.as_mut().map_or(Ok(()), |reader| reader.ring(core))
    }

    /// Posts READs of images of a shard, each into its place, and rings for them, if `ring` says so.
    pub(super) fn post<E: Element>(
        &mut self,
        table: &TableCore<E>,
        shard: usize,
        images: impl ExactSizeIterator<Item = (usize, u64)>,
        ring: bool,
    ) -> Result<(), Error> {
        let (bytes, count) = (table.layout().image_bytes(), images.len() as u64);
        self.stats.reads += count;
        self.bytes_read += count * (size_of::<Header>() + bytes) as u64;
        let Self { core, reader, .. } = self;
        let reader = reader.as_mut().expect("it has given the places");
        let images = images.map(|(place, image)| (place, table.remote(shard, image)));
        reader.post(core, shard, bytes, images, ring)
    }

    /// Takes the row that was READ into `place`, given what was known before, completes it, and keeps it. `false`: it is
    /// torn, or too old for what this worker has of its own; READ again.
    pub(super) fn accept<E: Element>(
        &mut self,
        table: &TableCore<E>,
        row: u64,
        (shard, index): (usize, u64),
        place: usize,
        before: Before,
        into: &mut [E],
    ) -> Result<bool, Error> {
        let reader = self.reader.as_ref().expect("it has READ");
        let Ok(header) = table.verified(index, into, |data| reader.take(place, data)) else {
            self.stats.torn += 1;
            return Ok(false);
        };
        let (lsn, image) = (header.version.lsn(), table.layout().image(index));
        let stamp = Stamp { clock: before.clock, as_of: before.as_of };
        if let Some(cache) = table.cache(shard).filter(|_| table.keeps_reads()) {
            if table.layout().rows_per_image() == 1 {
                cache.install(image, &header, into.as_bytes(), stamp);
            } else {
                let mut block = [0; BLOCK_BYTES];
                let block = &mut block[..table.layout().image_bytes()];
                let header = reader.take(place, block);
                cache.install(image, &header, block, stamp);
            }
        }
        let found = Found { clock: before.clock, lsn, as_of: before.as_of };
        if !self.complete(table, shard, index, &found, into)? {
            return Ok(false);
        }
        if table.schema().eager()
            && let Some(Taken::Present(_)) = self.take(table, (shard, row), image, State::Subscribed)
        {
            // It was READ before, and its first push has not come: perhaps the wish has not gone.
            self.core.progress();
        }
        Ok(true)
    }

    /// Takes a slot, if there are slots, and leaves the wishes that come of it.
    fn take<E: Element>(
        &self,
        table: &TableCore<E>,
        (shard, _): (usize, u64),
        image: u64,
        state: State,
    ) -> Option<Taken> {
        let cache = table.cache(shard)?;
        let mut most = 0;
        let mut late = Vec::new();
        // What is pushed from now on is as of what is known now, or later.
        let link = &self.core.links[shard];
        let stamp = Stamp { clock: link.round(), as_of: link.acknowledged() };
        let taken = cache.take(image, state, stamp, |slot, image, wish| {
            if mutant(Mutant::WishesOutOfOrder) {
                return late.push((slot, image, wish));
            }
            most = most.max(self.wish(table, shard, image, slot, wish));
        });
        if mutant(Mutant::WishesOutOfOrder) && !late.is_empty() {
            // Where another worker may come between.
            pause();
            late.into_iter().for_each(|(slot, image, wish)| _ = self.wish(table, shard, image, slot, wish));
        }
        if most >= MANY_WISHES {
            self.core.progress();
        }
        Some(taken)
    }

    /// Leaves a wish for the shard. How many there are now.
    fn wish<E: Element>(
        &self,
        table: &TableCore<E>,
        shard: usize,
        image: u64,
        slot: Slot,
        wish: u32,
    ) -> usize {
        let part = table.part(shard);
        let offset = table.cache(shard).expect("a slot of a cache").offset(slot) as u64;
        let record = SlotRecord { image, slot: offset, table: part.id, wish };
        self.core.wish(shard, Wish { record, table: table.number(), slot })
    }

    /// Gives up a slot whose answer may be lost.
    fn give_up<E: Element>(&self, table: &TableCore<E>, shard: usize, image: u64, slot: Slot) {
        let cache = table.cache(shard).expect("a slot of a cache");
        cache.give_up(slot, image, |slot, image, wish| _ = self.wish(table, shard, image, slot, wish));
    }

    /// A hot row, torn time and again: the server, its one writer, pushes it (invariant 11).
    fn ask<E: Element>(
        &mut self,
        table: &TableCore<E>,
        row: u64,
        (shard, index): (usize, u64),
        place: usize,
        into: &mut [E],
    ) -> Result<u64, Error> {
        self.stats.asked += 1;
        let (core, image) = (self.core.clone(), table.layout().image(index));
        loop {
            let before = self.before(shard);
            // SYNC POINT: before the wish is left. If the connection has been made again since, the answer may be lost.
            let resumptions = core.links[shard].absence.resumptions();
            // Where rows are pushed anyway the first push is the answer: a copy that is not kept up to date has no place
            // in the cache of such a table.
            let eager = table.schema().eager();
            let state = if eager { State::Subscribed } else { State::Asked };
            let stamp = Stamp { clock: before.clock, as_of: before.as_of };
            let slot = match (self.take(table, (shard, row), image, state), table.cache(shard)) {
                (Some(Taken::New(slot)), _) if !eager => Some(slot),
                (Some(Taken::Present(slot)), Some(cache))
                    if !eager && cache.ask_again(slot, image, stamp) =>
                {
                    self.wish(table, shard, image, slot, PUSH_ONCE);
                    Some(slot)
                }
                _ => None,
            };
            if let (Some(slot), Some(cache)) = (slot, table.cache(shard)) {
                let mut answer = None;
                core.wait(For::Memory, || {
                    answer = table.verified(index, into, |data| cache.copy(slot, data)).ok();
                    answer.is_some() || core.links[shard].absence.resumptions() != resumptions
                })?;
                let stamp = cache.stamp(slot);
                let Some(header) = answer else {
                    // What was asked for may come yet, and then to this slot: another one is asked for.
                    self.give_up(table, shard, image, slot);
                    continue;
                };
                cache.answered(slot, image);
                let lsn = header.version.lsn();
                let found = Found { clock: stamp.clock, lsn, as_of: stamp.as_of };
                if self.complete(table, shard, index, &found, into)? {
                    return Ok(found.clock);
                }
            } else {
                // Somebody else's answer, the first push, or a free slot: one of them comes.
                let needed = clock::needed(table.schema().model, self.clock);
                if let Some(clock) = self.read_held(table, shard, index, needed, into)? {
                    return Ok(clock);
                }
                core.progress();
                self.may_read()?;
                self.read_into(table, shard, index, place)?;
                if self.accept(table, row, (shard, index), place, before, into)? {
                    return Ok(before.clock);
                }
            }
        }
    }
}
