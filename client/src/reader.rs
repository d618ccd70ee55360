//! A worker's READs: it posts and polls them itself, by its seat in a [lane](crate::lane).
//!
//! No other thread is needed, at the client or at the server (invariant 1). Where workers share a lane, one may have polled what another
//! waits for. A READ's buffer is a *place* in the worker's scratch memory. A place is free again when its READ has
//! completed and its data has been taken.
//!
//! When a connection of its lane has ended, and the server is waited for, the worker moves to another lane, with other memory: READs of
//! the old lane may still change the old. It takes along what has completed, and posts again what has not.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use fervor_protocol::{limits::ROW_HEADER, row::Header};
use fervor_verbs::{
    Memory,
    transport::{Access, Region, RemoteAddress, Sge, Transport},
};
use zerocopy::IntoBytes;

use crate::{
    error::Error,
    lane::{Halt, Lane, Lanes, Left, PAUSE, Read, Seat, Seated, places},
    session::core::{Core, For},
};

/// Bytes of a place, as long as no image is longer.
const PLACE_BYTES: usize = 4096;

/// A READ that has not completed.
#[derive(Debug, Clone, Copy)]
struct Flight {
    place: usize,
    shard: usize,
    remote: RemoteAddress,
    length: usize,
}

/// See the module.
pub struct Reader<T: Transport> {
    lanes: Arc<Lanes<T>>,
    lane: Arc<Lane<T>>,
    seat: Arc<Seat<T>>,
    scratch: T::Region,
    places: usize,
    /// Bytes from one place of the scratch memory to the next.
    place_bytes: usize,
    /// READs of which the completion has not been taken. (After an error, some of them may not have been posted.)
    in_flight: Vec<Flight>,
    /// Ends of connections of which this worker has been told.
    told: usize,
    /// When it first moved to another lane, if no READ has completed since.
    moving: Option<Duration>,
    /// Shards to which something was posted and not rung for.
    unrung: Vec<usize>,
}

impl<T: Transport> Reader<T> {
    /// Takes a seat.
    ///
    /// # Errors
    /// The transport has no endpoint or no memory left.
    pub fn new(core: &Core<T>, lanes: &Arc<Lanes<T>>) -> Result<Self, Error> {
        let Seated { lane, seat, left } = lanes.join(core)?;
        let places = places(&core.options);
        let (scratch, place_bytes) = match left {
            Some(left) => left.scratch,
            None => (scratch(&core.transport, places, PLACE_BYTES)?, PLACE_BYTES),
        };
        Ok(Self {
            lanes: lanes.clone(),
            lane,
            seat,
            scratch,
            places,
            place_bytes,
            in_flight: Vec::new(),
            moving: None,
            told: 0,
            unrung: Vec::new(),
        })
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
        let before = self.in_flight.len();
        let length = ROW_HEADER + bytes;
        self.in_flight.extend(images.map(|(place, remote)| Flight { place, shard, remote, length }));
        match self.post_from(core, before, shard, ring) {
            Ok(()) if ring || self.unrung.contains(&shard) => Ok(()),
            Ok(()) => {
                self.unrung.push(shard);
                Ok(())
            }
            Err(halt) => self.go_on(core, halt),
        }
    }

    /// Posts what is in flight to `shard`, from the `first` on.
    #[inline]
    fn post_from(&mut self, core: &Core<T>, first: usize, shard: usize, ring: bool) -> Result<(), Halt> {
        let Self { lane, seat, scratch, place_bytes, in_flight, told, .. } = self;
        let region = &*scratch;
        let flights = in_flight[first..].iter().filter(|flight| flight.shard == shard);
        let reads = flights.map(|&Flight { place, remote, length, .. }| Read {
            place,
            remote,
            into: Sge { region, offset: place * *place_bytes, length },
        });
        lane.post(core, (seat, told), shard, reads, ring)
    }

    /// Moves to another lane, if that is what is to be done, and posts again what is in flight.
    #[cold]
    fn go_on(&mut self, core: &Core<T>, halt: Halt) -> Result<(), Error> {
        let mut outcome = Err(halt);
        loop {
            match outcome {
                Ok(()) => return Ok(()),
                Err(Halt::Failed(error)) => return Err(error),
                Err(Halt::Ended(shard, cause)) => {
                    // Lanes may end as soon as they are made.
                    let now = core.transport.now();
                    let since = *self.moving.get_or_insert(now);
                    if now - since > core.links[shard].lease {
                        return Err(core.lost(shard, cause));
                    }
                    if since < now {
                        core.wait(For::Event, || core.transport.now() >= now + PAUSE)?;
                    }
                }
            }
            core.progress();
            core.alive()?;
            self.move_to_another_lane(core)?;
            let mut shards: Vec<_> = self.in_flight.iter().map(|flight| flight.shard).collect();
            shards.sort_unstable();
            shards.dedup();
            outcome = shards.into_iter().try_for_each(|shard| self.post_from(core, 0, shard, true));
        }
    }

    fn move_to_another_lane(&mut self, core: &Core<T>) -> Result<(), Error> {
        self.lanes.broke.store(true, Ordering::Relaxed);
        // The places of this worker may have to be longer than those of the one who sat there.
        let Seated { lane, seat, left: _ } = self.lanes.join(core)?;
        let scratch = scratch(&core.transport, self.places, self.place_bytes)?;
        let mut place = vec![0; self.place_bytes];
        for offset in (0..self.places).map(|number| number * self.place_bytes) {
            self.scratch.memory().read(offset, &mut place);
            scratch.memory().write(offset, &place);
        }
        let old = std::mem::replace(&mut self.scratch, scratch);
        let left = Left { scratch: (old, self.place_bytes), in_flight: self.in_flight.len() };
        std::mem::replace(&mut self.seat, seat).leave(left);
        (self.lane, self.told) = (lane, 0);
        self.unrung.clear();
        Ok(())
    }

    /// Rings for all that was posted.
    ///
    /// # Errors
    /// A server is lost.
    pub fn ring(&mut self, core: &Core<T>) -> Result<(), Error> {
        let shards = std::mem::take(&mut self.unrung);
        match shards.into_iter().try_for_each(|shard| self.lane.ring(core, shard)) {
            Ok(()) => Ok(()),
            Err(halt) => self.go_on(core, halt),
        }
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
        let mut turn = 0;
        while count > 0 {
            let Self { lane, seat, in_flight, moving, told, .. } = self;
            let mut land = |place| {
                *moving = None;
                let at = in_flight.iter().position(|flight| flight.place == place);
                in_flight.swap_remove(at.expect("each READ completes once"));
                each(place);
            };
            let taken =
                lane.advance(core, seat, turn, || !seat.has_landed(), &mut land) + seat.take(&mut land);
            count = count.saturating_sub(taken);
            turn = if taken > 0 { 0 } else { turn.saturating_add(1) };
            if count > 0
                && let Err(halt) = lane.news(core, told)
            {
                self.go_on(core, halt)?;
                turn = 0;
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
        self.seat.leave(Left { scratch, in_flight: self.in_flight.len() });
    }
}

fn scratch<T: Transport>(transport: &T, places: usize, bytes: usize) -> Result<T::Region, Error> {
    let memory = Memory::new("fervor-scratch", places * bytes)?;
    Ok(transport.register(&memory, Access::Local)?)
}
