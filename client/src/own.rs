//! A worker's own updates: those of its present clock, and older ones that copies may still lack. `get` adds
//! them to the copy, so a worker always reads its own writes.
//!
//! Only the worker itself uses these updates. So `get` and `inc` take no lock, and share no word that another
//! worker writes, except the LSNs of acknowledgements. For each shard of a table there is the
//! [slab](crate::slab) of the present clock, and the slabs that were handed over before, oldest first.
//!
//! **When a slab may go.** A slab may go when every copy that will be read from now on contains it:
//!
//! | rows are | the slab may go when |
//! |---|---|
//! | read in place, or READ each time | it is acknowledged: the shard has applied all of it, so every later look or READ sees it |
//! | pushed when the clock rises | the last closed round was closed at its LSN or later, or (VAP) it is visible |
//! | kept when they are READ | copies that were READ before it was acknowledged have become too old to be used |
//!
//! In the last case, other workers READ copies into the same cache. The clock that is loaded *after* the slab was found
//! acknowledged is at least the one that any such copy without the slab is trusted for. A clock loaded before could
//! be too low: the slab would go while such a copy is still used.
//!
//! **The floor.** Where copies may be very old, that can take long, or never happen. So if there are more
//! than [`MANY`] slabs and the oldest is acknowledged, it goes anyway, and the *floor* rises to its LSN. A
//! copy with an LSN below the floor may lack an update that is no longer here. It must not be used, unless it
//! is known to be as of the floor or later. So letting a slab go too early costs a READ, and never loses an
//! update.

use std::{any::Any, collections::VecDeque, sync::Arc};

use fervor_protocol::{
    Element,
    ack::acknowledged,
    inclusion::{Contained, contained},
    mutants::{Mutant, mutant, pause},
    value::Transit,
};

use crate::{
    slab::{AnySlab, Pool, Progress, Slab},
    table::TableCore,
};

/// Slabs of a shard beyond which acknowledged ones go though a copy may lack them. (Where bugs are looked for so few that jobs of
/// some clocks get there.)
const MANY: usize = if cfg!(feature = "mutants") { 4 } else { 64 };
/// Slabs that have gone, kept for use again, per shard.
const SPARE: usize = 4;

/// What is known of a copy when it is completed.
#[derive(Debug, Clone, Copy)]
pub struct Copied {
    /// LSN of its image.
    pub lsn: u64,
    /// It contains every batch of this client that was applied at this LSN or before, whether its image says so or not.
    pub as_of: u64,
    /// This client's unacknowledged batches are applied after this LSN. Loaded before the copy is completed.
    pub below: u64,
}

/// Why a copy cannot be completed to what `get` returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Incomplete {
    /// It lacks an update that is no longer held here: it is too old.
    Stale,
    /// Wait until this slab, by number, is acknowledged, and try with the same copy.
    Unknown(usize),
}

/// What lets slabs go. See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Horizon {
    /// When acknowledged.
    pub at_once: bool,
    /// When at or below the LSN of the last closed round.
    pub round_lsn: u64,
    /// When this batch, or a later one, is visible to all.
    pub visible: u64,
    /// When copies that were READ at this clock can no longer be used: the least that the model needs now. Of tables
    /// whose rows are kept when they are READ.
    pub needed: Option<u64>,
}

/// A slab that has been handed over.
#[derive(Debug)]
struct Outstanding<E> {
    slab: Arc<Slab<E>>,
    /// The clock that was known when it was found acknowledged.
    known: Option<u64>,
}

/// A worker's updates of the rows of one shard.
#[derive(Debug)]
pub struct ShardUpdates<E> {
    rows: u64,
    width: usize,
    pool: Option<Arc<Pool>>,
    current: Slab<E>,
    outstanding: VecDeque<Outstanding<E>>,
    floor: u64,
    /// LSN of the last slab that went.
    gone: u64,
    spare: Vec<Arc<Slab<E>>>,
}

impl<E: Element> ShardUpdates<E> {
    /// For a shard with `rows` rows of `width` elements; slabs lie in memory of `pool`, if it is given.
    pub fn new(rows: u64, width: usize, pool: Option<Arc<Pool>>) -> Self {
        Self {
            rows,
            width,
            current: Slab::new(rows, width, pool.clone()),
            pool,
            outstanding: VecDeque::new(),
            floor: 0,
            gone: 0,
            spare: Vec::new(),
        }
    }

    /// The slab of the present clock.
    #[inline]
    pub fn current(&mut self) -> &mut Slab<E> {
        &mut self.current
    }

    /// Whether a copy lacks nothing: all that was added has gone.
    #[inline]
    pub fn is_clean(&self) -> bool {
        self.outstanding.is_empty() && self.current.is_empty()
    }

    /// Ends the clock `stamp` of the worker: the slab, if there is anything in it.
    pub fn hand_over(&mut self, stamp: u64) -> Option<Arc<Slab<E>>> {
        if self.current.is_empty() {
            return None;
        }
        let next = self.take_spare().unwrap_or_else(|| Slab::new(self.rows, self.width, self.pool.clone()));
        let mut slab = std::mem::replace(&mut self.current, next);
        slab.hand_over(stamp);
        let slab = Arc::new(slab);
        self.outstanding.push_back(Outstanding { slab: slab.clone(), known: None });
        Some(slab)
    }

    /// Lets those go that every copy to come contains.
    /// `known` loads the clock that is known.
    pub fn retire(&mut self, horizon: &Horizon, known: &dyn Fn() -> u64) {
        while let Some(first) = self.outstanding.front_mut() {
            let early = || mutant(Mutant::SlabReusedEarly) && first.slab.last_batch().is_some();
            if mutant(Mutant::KnownBeforeAcknowledged) {
                first.known.get_or_insert_with(known);
            }
            pause();
            let Some(lsn) = first.slab.applied().or_else(|| early().then_some(0)) else { break };
            // SYNC POINT: loaded after the slab was found acknowledged. A READ that another worker posted before the shard applied
            // the slab is trusted for the clock that was known then: at most this one.
            let known = *first.known.get_or_insert_with(known);
            let contained = horizon.at_once
                || lsn <= horizon.round_lsn
                || first.slab.last_batch().is_some_and(|batch| batch <= horizon.visible)
                || horizon.needed.is_some_and(|needed| needed > known)
                || mutant(Mutant::SlabDroppedEarly);
            if !contained && self.outstanding.len() <= MANY {
                break;
            }
            if !contained && !mutant(Mutant::FloorForgotten) {
                self.floor = self.floor.max(lsn);
            }
            self.gone = self.gone.max(lsn);
            let gone = self.outstanding.pop_front().expect("it was there");
            if self.spare.len() < SPARE {
                let mut slab = gone.slab;
                if let Some(slab) = Arc::get_mut(&mut slab) {
                    slab.reset();
                }
                self.spare.push(slab);
            }
        }
    }

    /// An empty slab. Who sent one may hold it for a moment longer than it is needed.
    fn take_spare(&mut self) -> Option<Slab<E>> {
        let free = self.spare.iter_mut().rposition(|slab| Arc::get_mut(slab).is_some())?;
        let mut slab = Arc::into_inner(self.spare.remove(free)).expect("nobody else holds it");
        slab.reset();
        Some(slab)
    }

    /// A copy that was READ as of an LSN below this one may lack what is no longer here.
    pub fn gone(&self) -> u64 {
        self.gone
    }

    /// Adds to a copy of the columns of `row` from `start` on what it lacks.
    ///
    /// # Errors
    /// [`Incomplete`]; the copy is as it was.
    pub fn complete(
        &self,
        row: u32,
        start: usize,
        copied: &Copied,
        copy: &mut [E],
    ) -> Result<(), Incomplete> {
        if copied.lsn < self.floor && copied.as_of < self.floor {
            return Err(Incomplete::Stale);
        }
        // Batches are applied in order, so what a copy contains is a beginning of the list, and of the columns of the next.
        let (mut lacking, mut columns) = (self.outstanding.len(), 0);
        for (number, Outstanding { slab, .. }) in self.outstanding.iter().enumerate() {
            let entry = slab.find(row);
            if entry == 0 {
                continue;
            }
            let contains = match slab.progress(entry) {
                Progress::Unsent => Contained::No,
                Progress::Sent(_) => contained(None, copied.below, copied.lsn),
                Progress::Applied(lsn) => contained(Some(lsn), copied.below, copied.lsn),
                Progress::InRanges => {
                    columns = columns_of(slab, entry, copied).ok_or(Incomplete::Unknown(number))?;
                    if columns == self.width { Contained::Yes } else { Contained::No }
                }
            };
            match contains {
                Contained::Yes => columns = 0,
                Contained::Unknown => return Err(Incomplete::Unknown(number)),
                Contained::No => {
                    lacking = number;
                    break;
                }
            }
        }
        let mut lack = self.outstanding.iter().skip(lacking);
        if let Some(Outstanding { slab, .. }) = lack.next() {
            // Rows that go in ranges do not share an image: their columns are all of the copy.
            slab.add_to(row, start + columns, &mut copy[columns..]);
        }
        for Outstanding { slab, .. } in lack {
            // It may have gone in the same batches as the first: then the copy contains as many of its columns. (Of later batches, of
            // which that is not known, it contains none.)
            let entry = if columns > 0 { slab.find(row) } else { 0 };
            let in_ranges = entry > 0 && slab.progress(entry) == Progress::InRanges;
            let columns = if in_ranges { columns_of(slab, entry, copied).unwrap_or(0) } else { 0 };
            slab.add_to(row, start + columns, &mut copy[columns..]);
        }
        self.current.add_to(row, start, copy);
        Ok(())
    }

    /// As [`ShardUpdates::complete`], for a copy that was taken in place from an image with LSN `lsn`: `announced`
    /// loads the word that announces a batch, after the image was copied.
    #[inline]
    pub fn complete_in_place(
        &self,
        row: u32,
        start: usize,
        lsn: u64,
        announced: impl Fn(u64) -> u64,
        copy: &mut [E],
    ) {
        let word = |batch| acknowledged(announced(batch), batch);
        for Outstanding { slab, .. } in &self.outstanding {
            let entry = slab.find(row);
            if entry == 0 {
                continue;
            }
            let mut columns = 0;
            let applied = match slab.progress(entry) {
                Progress::Unsent => None,
                Progress::Applied(lsn) => Some(lsn),
                Progress::Sent(batch) => word(batch).or_else(|| {
                    // Not announced, or so long ago that the word is used again: it was acknowledged before that.
                    match slab.progress(entry) {
                        Progress::Applied(lsn) => Some(lsn),
                        _ => None,
                    }
                }),
                Progress::InRanges => {
                    columns = slab.columns_applied(entry, lsn, word);
                    None
                }
            };
            let contains = applied.is_some_and(|applied| contained(Some(applied), 0, lsn) == Contained::Yes);
            if !contains {
                slab.add_entry(entry, start + columns, &mut copy[columns..]);
            }
        }
        self.current.add_to(row, start, copy);
    }

    /// Whether the `number`-th slab handed over is acknowledged.
    pub fn is_applied(&self, number: usize) -> bool {
        self.outstanding[number].slab.applied().is_some()
    }
}

/// How many columns of an entry that goes in ranges a copy contains. `None`: that is not known yet.
fn columns_of<E: Element>(slab: &Slab<E>, entry: u32, copied: &Copied) -> Option<usize> {
    let mut columns = 0;
    for (end, lsn) in slab.ranges(entry) {
        match contained(lsn, copied.below, copied.lsn) {
            Contained::Yes => columns = end,
            Contained::No => break,
            Contained::Unknown => return None,
        }
    }
    Some(columns)
}

/// A worker's updates of one table, whatever its element type.
pub trait AnyUpdates: Send {
    /// For the typed way in.
    fn as_any(&mut self) -> &mut dyn Any;
    /// Ends the clock `stamp`: the slab of each shard in which something was updated.
    fn hand_over(&mut self, stamp: u64, each: &mut dyn FnMut(usize, Arc<dyn AnySlab>));
    /// Lets slabs go, given what each shard's horizon is.
    fn retire(&mut self, horizon: &mut dyn FnMut(usize) -> Horizon, known: &dyn Fn(usize) -> u64);
    /// Updates not yet visible to all, of a value-bounded table.
    fn transit(&mut self) -> Option<&mut Transit>;
}

/// A worker's updates of one table.
#[derive(Debug)]
pub struct Updates<E: Element> {
    /// Per shard.
    pub shards: Vec<ShardUpdates<E>>,
    transit: Option<Transit>,
}

impl<E: Element> Updates<E> {
    /// Of `table`, with a pool for each shard whose server sees it.
    pub fn new(table: &TableCore<E>, pool: impl Fn(usize) -> Option<Arc<Pool>>) -> Self {
        let layout = table.layout();
        let width = layout.image_bytes() / size_of::<E>();
        let images = |shard| layout.images(table.rows_in(shard));
        let shards = 0..table.shards();
        Self {
            shards: shards.map(|shard| ShardUpdates::new(images(shard), width, pool(shard))).collect(),
            transit: table.schema().model.value_bounded().then(Transit::default),
        }
    }
}

/// A worker's updates of each of the client's tables, or `None` as long as it has not updated it.
pub type WorkerUpdates = Vec<Option<Box<dyn AnyUpdates>>>;

impl<E: Element> AnyUpdates for Updates<E> {
    fn as_any(&mut self) -> &mut dyn Any {
        self
    }

    fn hand_over(&mut self, stamp: u64, each: &mut dyn FnMut(usize, Arc<dyn AnySlab>)) {
        for (shard, updates) in self.shards.iter_mut().enumerate() {
            if let Some(slab) = updates.hand_over(stamp) {
                each(shard, slab);
            }
        }
    }

    fn retire(&mut self, horizon: &mut dyn FnMut(usize) -> Horizon, known: &dyn Fn(usize) -> u64) {
        for (shard, updates) in self.shards.iter_mut().enumerate() {
            if !updates.outstanding.is_empty() {
                updates.retire(&horizon(shard), &|| known(shard));
            }
        }
    }

    fn transit(&mut self) -> Option<&mut Transit> {
        self.transit.as_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slab::Delivery;

    const NOTHING: Horizon = Horizon { at_once: false, round_lsn: 0, visible: 0, needed: None };

    fn clock(updates: &mut ShardUpdates<i64>, stamp: u64, value: i64) -> Arc<Delivery> {
        updates.current().add(3, &[value], false);
        let slab = updates.hand_over(stamp).unwrap();
        let delivery = Delivery::new(stamp + 1, 1);
        delivery.complete(1);
        slab.goes_out(&delivery, false);
        delivery
    }

    fn get(updates: &ShardUpdates<i64>, lsn: u64, as_of: u64, below: u64) -> Result<i64, Incomplete> {
        let mut copy = [0];
        updates.complete(3, 0, &Copied { lsn, as_of, below }, &mut copy).map(|()| copy[0])
    }

    #[test]
    fn a_copy_gets_what_it_lacks_and_waits_for_what_is_unknown() {
        let mut updates = ShardUpdates::<i64>::new(10, 1, None);
        let (first, second) = (clock(&mut updates, 0, 1), clock(&mut updates, 1, 10));
        updates.current().add(3, &[100], false);
        assert_eq!(get(&updates, 0, 0, 0), Ok(111), "at or below what all unknown ones are after");
        assert_eq!(get(&updates, 9, 0, 0), Err(Incomplete::Unknown(0)));
        first.acknowledged(0, 7);
        assert_eq!((get(&updates, 6, 0, 7), get(&updates, 7, 0, 7)), (Ok(111), Ok(110)));
        assert_eq!(get(&updates, 9, 0, 7), Err(Incomplete::Unknown(1)));
        second.acknowledged(0, 9);
        assert_eq!(get(&updates, 9, 0, 9), Ok(100));
    }

    /// Two clocks of a worker go in the same batches, and an update of a row takes two of them.
    #[test]
    fn a_copy_that_has_a_part_of_a_row_has_that_part_of_all_slabs_that_went_with_it() {
        let mut updates = ShardUpdates::<i64>::new(10, 4, None);
        let delivery = Delivery::new(1, 2);
        for (stamp, value) in [(0, 1), (1, 10)] {
            updates.current().add(3, &[value; 4], false);
            updates.hand_over(stamp).unwrap();
            let slab = &updates.outstanding[stamp as usize].slab;
            slab.goes_out(&delivery, true);
            slab.range_goes_with(slab.find(3), 2, 0);
            slab.range_goes_with(slab.find(3), 4, 1);
        }
        delivery.complete(2);
        let get = |lsn, below| {
            let mut copy = [0; 4];
            updates.complete(3, 0, &Copied { lsn, as_of: 0, below }, &mut copy).map(|()| copy)
        };
        assert_eq!(get(6, 6), Ok([11; 4]));
        delivery.acknowledged(0, 7);
        assert_eq!((get(6, 7), get(7, 7)), (Ok([11; 4]), Ok([0, 0, 11, 11])));
        assert_eq!(get(8, 7), Err(Incomplete::Unknown(0)));
        delivery.acknowledged(1, 8);
        assert_eq!(get(8, 8), Ok([0; 4]));
    }

    #[test]
    fn in_place_nothing_is_unknown() {
        let mut updates = ShardUpdates::<i64>::new(10, 1, None);
        let _deliveries = (clock(&mut updates, 0, 1), clock(&mut updates, 1, 10));
        let get = |lsn, words: &[(u64, u64)]| {
            let mut copy = [0];
            let announced = |batch| {
                let word = words.iter().find(|(number, _)| *number == batch);
                word.map_or(0, |(number, lsn)| fervor_protocol::ack::ack_word(*number, *lsn))
            };
            updates.complete_in_place(3, 0, lsn, announced, &mut copy);
            copy[0]
        };
        assert_eq!(get(5, &[]), 11, "somebody else's change");
        assert_eq!((get(5, &[(1, 6)]), get(6, &[(1, 6)]), get(6, &[(1, 6), (2, 7)])), (11, 10, 10));
        assert_eq!(get(7, &[(1, 6), (2, 7)]), 0);
    }

    #[test]
    fn slabs_go_when_their_horizon_says_so() {
        let horizons = [
            (Horizon { at_once: true, ..NOTHING }, true),
            (Horizon { round_lsn: 6, ..NOTHING }, false),
            (Horizon { round_lsn: 7, ..NOTHING }, true),
            (Horizon { visible: 1, ..NOTHING }, true),
            (Horizon { needed: Some(4), ..NOTHING }, false),
            (Horizon { needed: Some(5), ..NOTHING }, true),
        ];
        for (horizon, goes) in horizons {
            let mut updates = ShardUpdates::<i64>::new(10, 1, None);
            let delivery = clock(&mut updates, 0, 1);
            updates.retire(&horizon, &|| 4);
            assert_eq!(updates.outstanding.len(), 1, "not before it is acknowledged");
            delivery.acknowledged(0, 7);
            updates.retire(&horizon, &|| 4);
            assert_eq!(updates.outstanding.is_empty(), goes, "{horizon:?}");
        }
    }

    #[test]
    fn beyond_many_the_oldest_goes_and_copies_that_may_lack_it_are_stale() {
        let mut updates = ShardUpdates::<i64>::new(10, 1, None);
        for stamp in 0..MANY as u64 + 3 {
            clock(&mut updates, stamp, 1).acknowledged(0, stamp + 1);
            updates.retire(&NOTHING, &|| 0);
        }
        assert_eq!((updates.outstanding.len(), updates.floor), (MANY, 3));
        assert_eq!(get(&updates, 2, 2, 99), Err(Incomplete::Stale));
        assert_eq!(get(&updates, 3, 0, 99), Ok(MANY as i64));
        assert_eq!(get(&updates, 0, 3, 99), Ok(MANY as i64), "as of the floor, whatever its image says");
    }
}
