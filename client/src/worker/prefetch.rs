//! READs that are started ahead. A later `get` finds them on their way.
//!
//! Each has one of the [reader](crate::reader)'s places until its row is asked for. If that does not happen
//! in the clock in which the worker started the READ, its place goes to the next READ that needs one.
//!
//! **When the copy may be used.** Two conditions must hold:
//! - *It is late enough.* As for any READ, the copy is as of the clock that was known before the READ was
//!   posted.
//! - *It lacks no own update that is gone.* The copy may lack own updates. Those that the worker still has
//!   are added to it. But the worker lets an update go when every copy *that will be READ* contains it, and
//!   this READ was posted before. So the copy must be as of the last update that went.

use std::iter;

use fervor_protocol::Element;
use fervor_verbs::transport::Transport;

use super::{Worker, ahead::Prefetched, known_updates};
use crate::{
    error::Error,
    table::{Holding, Table, TableCore},
};

impl<T: Transport> Worker<T> {
    /// Starts to READ `rows` of `table`, those that are not read in place and of which no copy is here, as far as there is room, and does
    /// not wait for them. A [`get`](Worker::get) or [`get_many`](Worker::get_many) of them finds them on their way, if it follows
    /// before the worker's updates of the table require a later copy.
    ///
    /// # Errors
    /// A row is out of range; a server is lost.
    pub fn prefetch<E: Element>(&mut self, table: &Table<E>, rows: &[u64]) -> Result<(), Error> {
        let table = &*table.0;
        if let Some(&greatest) = rows.iter().max() {
            self.check(table, greatest)?;
        }
        if !self.copies {
            return Ok(());
        }
        self.may_read()?;
        self.hear(table);
        for &row in rows {
            let (shard, index) = self.core.router.locate(row);
            let image = table.layout().image(index);
            let here = match &table.part(shard).holding {
                Holding::InPlace | Holding::Mirror(_) => true,
                Holding::Slots(cache) => cache.find(image).is_some(),
            };
            if here || self.prefetched.iter().any(|one| one.is_of(table, shard, image)) {
                continue;
            }
            if !self.has_room()? {
                break;
            }
            let place = self.free_places(table.layout().image_bytes(), 1)?.next().expect("there is one");
            let before = self.before(shard);
            self.post(table, shard, iter::once((place, image)), false)?;
            let (table, clock) = (table.number(), self.clock);
            self.prefetched.push(Prefetched { table, shard, image, place, before, done: false, clock });
        }
        self.ring_all()
    }

    /// Whether one more READ can be started ahead: one place is left for a row that is READ meanwhile.
    fn has_room(&mut self) -> Result<bool, Error> {
        if self.prefetched.len() + 1 < self.reader()?.places() {
            return Ok(true);
        }
        let Some(old) = self.prefetched.iter().position(|one| one.clock < self.clock) else {
            return Ok(false);
        };
        self.await_prefetched(old)?;
        self.prefetched.swap_remove(old);
        Ok(true)
    }

    /// Places for images with `bytes` bytes of data in which nothing is: at least one, and `wanted` if there are as many.
    pub(super) fn free_places(
        &mut self,
        bytes: usize,
        wanted: usize,
    ) -> Result<impl Iterator<Item = usize>, Error> {
        let reader = self.reader()?;
        let (places, fits) = (reader.places(), reader.fits(bytes));
        if !fits || self.prefetched.len() + wanted.max(1) > places {
            self.forget_prefetched()?;
            let transport = self.core.transport.clone();
            self.reader()?.fit(&transport, bytes)?;
        }
        let taken = |place: &usize| self.prefetched.iter().any(|one| one.place == *place);
        Ok((0..places).filter(move |place| !taken(place)).take(wanted.max(1)))
    }

    /// Waits for READs that were started ahead and drops them: their places are needed.
    fn forget_prefetched(&mut self) -> Result<(), Error> {
        while let Some(at) = self.prefetched.iter().position(|one| !one.done) {
            self.await_prefetched(at)?;
        }
        self.prefetched.clear();
        Ok(())
    }

    /// Waits until the `at`-th READ that was started ahead is done.
    fn await_prefetched(&mut self, at: usize) -> Result<(), Error> {
        while !self.prefetched[at].done {
            self.await_read()?;
        }
        Ok(())
    }

    /// Waits until all READs but those that were started ahead are done: `count`.
    pub(super) fn await_reads(&mut self, mut count: usize) -> Result<(), Error> {
        while count > 0 {
            count = count.checked_sub(self.await_read()?).expect("each READ completes once");
        }
        Ok(())
    }

    /// Waits until a READ is done, or several. How many of them were not started ahead.
    fn await_read(&mut self) -> Result<usize, Error> {
        let (reader, ahead) = (self.reader.as_mut().expect("it has READ"), &mut self.prefetched);
        let mut others = 0;
        reader.wait(&self.core, 1, |place| match ahead.iter_mut().find(|one| one.place == place) {
            Some(one) => one.done = true,
            None => others += 1,
        })?;
        Ok(others)
    }

    /// A row that was READ ahead, if it was, and is as fresh as is needed now. Its clock.
    pub(super) fn take_prefetched<E: Element>(
        &mut self,
        table: &TableCore<E>,
        row: u64,
        (shard, index): (usize, u64),
        needed: u64,
        into: &mut [E],
    ) -> Result<Option<u64>, Error> {
        let image = table.layout().image(index);
        let Some(at) = self.prefetched.iter().position(|one| one.is_of(table, shard, image)) else {
            return Ok(None);
        };
        self.await_prefetched(at)?;
        let Prefetched { place, before, .. } = self.prefetched.swap_remove(at);
        let gone = known_updates(&mut self.updates, table).map_or(0, |updates| updates.shards[shard].gone());
        let fresh = before.clock >= needed && before.as_of >= gone;
        let taken = fresh && self.accept(table, row, (shard, index), place, before, into)?;
        Ok(taken.then_some(before.clock))
    }

    /// The same, of the rows at `missed` of `rows`, of which those that are taken are removed.
    pub(super) fn take_all_prefetched<E: Element>(
        &mut self,
        table: &TableCore<E>,
        rows: &[u64],
        missed: &mut Vec<usize>,
        needed: u64,
        into: &mut [E],
    ) -> Result<(), Error> {
        let width = table.schema().width as usize;
        let mut left = Vec::new();
        for at in missed.drain(..) {
            let copy = &mut into[at * width..(at + 1) * width];
            let place = self.core.router.locate(rows[at]);
            match self.take_prefetched(table, rows[at], place, needed, copy)? {
                Some(clock) => {
                    self.stats.misses += 1;
                    self.count(table, rows[at], 1, clock, needed)?;
                }
                None => left.push(at),
            }
        }
        *missed = left;
        Ok(())
    }
}
