//! A worker's READs: it posts and polls them itself, by its seat in a [lane](crate::lane).
//!
//! No other thread is needed, at the client or at the server (invariant 1). Where workers share a lane, one may have polled what another
//! waits for. A READ's buffer is a *place* in the worker's scratch memory. A place is free again when its READ has
//! completed and its data has been taken.

use std::sync::Arc;

use fervor_protocol::{limits::ROW_HEADER, row::Header};
use fervor_verbs::{
    Memory,
    transport::{Access, Region, RemoteAddress, Sge, Transport},
};
use zerocopy::IntoBytes;

use crate::{
    error::Error,
    lane::{Lane, Left, Read, Seat, Seated, places},
    session::core::Core,
};

/// Bytes of a place, as long as no image is longer.
const PLACE_BYTES: usize = 4096;

/// See the module.
pub struct Reader<T: Transport> {
    lane: Arc<Lane<T>>,
    seat: Arc<Seat<T>>,
    scratch: T::Region,
    places: usize,
    /// Bytes from one place of the scratch memory to the next.
    place_bytes: usize,
    /// READs of which the completion has not been taken: at least so many, after an error.
    in_flight: usize,
    /// Ends of connections of which this worker has been told.
    told: usize,
    /// Shards to which something was posted and not rung for.
    unrung: Vec<usize>,
}

impl<T: Transport> Reader<T> {
    /// Takes a seat.
    ///
    /// # Errors
    /// The transport has no endpoint or no memory left.
    pub fn new(core: &Core<T>) -> Result<Self, Error> {
        let Seated { lane, seat, left } = core.lanes.join(core)?;
        let places = places(&core.options);
        let (scratch, place_bytes) = match left {
            Some(left) => left.scratch,
            None => (scratch(&core.transport, places, PLACE_BYTES)?, PLACE_BYTES),
        };
        Ok(Self { lane, seat, scratch, places, place_bytes, in_flight: 0, told: 0, unrung: Vec::new() })
    }

    /// Rows that can be in flight at a time.
    pub fn places(&self) -> usize {
        self.places
    }

    /// Whether images with `bytes` bytes of data fit the places.
    pub fn fits(&self, bytes: usize) -> bool {
        ROW_HEADER + bytes <= self.place_bytes
    }

    /// Sees to it that images with `bytes` bytes of data fit the places, of which none is in use.
    ///
    /// # Errors
    /// No such memory.
    pub fn fit(&mut self, transport: &T, bytes: usize) -> Result<(), Error> {
        let bytes = (ROW_HEADER + bytes).next_multiple_of(64);
        if bytes > self.place_bytes {
            self.scratch = scratch(transport, self.places, bytes)?;
            self.place_bytes = bytes;
        }
        Ok(())
    }

    /// Posts READs of images with `bytes` bytes of data at a shard, each into its place, which is free, and rings for them, if `ring`
    /// says so. Waits if the workers of the lane have as much on its way to the shard as there is room for.
    ///
    /// # Errors
    /// A server is lost, or has no place for one more connection.
    #[inline]
    pub fn post(
        &mut self,
        core: &Core<T>,
        shard: usize,
        bytes: usize,
        images: impl Iterator<Item = (usize, RemoteAddress)>,
        ring: bool,
    ) -> Result<(), Error> {
        let Self { lane, seat, scratch, place_bytes, in_flight, told, unrung, .. } = self;
        let (region, length) = (&*scratch, ROW_HEADER + bytes);
        let reads = images.map(|(place, remote)| {
            *in_flight += 1;
            Read { place, remote, into: Sge { region, offset: place * *place_bytes, length } }
        });
        lane.post(core, (seat, told), shard, reads, ring)?;
        if !ring && !unrung.contains(&shard) {
            unrung.push(shard);
        }
        Ok(())
    }

    /// Rings for all that was posted.
    ///
    /// # Errors
    /// A server is lost.
    pub fn ring(&mut self, core: &Core<T>) -> Result<(), Error> {
        self.unrung.drain(..).try_for_each(|shard| self.lane.ring(core, shard))
    }

    /// Waits until `count` READs have completed, however long that takes. `each` is told the place of each.
    ///
    /// # Errors
    /// A server is lost.
    pub fn wait(
        &mut self,
        core: &Core<T>,
        mut count: usize,
        mut each: impl FnMut(usize),
    ) -> Result<(), Error> {
        let Self { lane, seat, in_flight, told, .. } = self;
        let mut turn = 0;
        while count > 0 {
            let taken =
                lane.advance(core, seat, turn, || !seat.has_landed(), &mut each) + seat.take(&mut each);
            *in_flight = in_flight.checked_sub(taken).expect("each READ completes once");
            count = count.saturating_sub(taken);
            turn = if taken > 0 { 0 } else { turn.saturating_add(1) };
            if count > 0
                && let Some((shard, cause)) = lane.news(told)
            {
                return Err(core.lost(shard, cause));
            }
        }
        Ok(())
    }

    /// The image that was READ into `place`: the header, and the data into `data`.
    pub fn take(&self, place: usize, data: &mut [u8]) -> Header {
        let mut header = Header::default();
        let offset = place * self.place_bytes;
        self.scratch.memory().read(offset, header.as_mut_bytes());
        self.scratch.memory().read(offset + ROW_HEADER, data);
        header
    }
}

impl<T: Transport> Drop for Reader<T> {
    /// READs may be on their way still: the seat keeps their memory.
    fn drop(&mut self) {
        let scratch = (self.scratch.clone(), self.place_bytes);
        self.seat.leave(Left { scratch, in_flight: self.in_flight });
    }
}

fn scratch<T: Transport>(transport: &T, places: usize, bytes: usize) -> Result<T::Region, Error> {
    let memory = Memory::new("fervor-scratch", places * bytes)?;
    Ok(transport.register(&memory, Access::Local)?)
}
