//! The memory that peers READ, or look at in place: the shard clock, the announcements, the tables.
//!
//! ```text
//! │ clock word, to 128 │ 64 announcements of seat 0 │ ... of seat 1 │ ... │ images of tables ...
//! ```
//!
//! | what | written by the poller | when a peer looks at it, and what it learns |
//! |---|---|---|
//! | clock word | after the last batch below the clock has been applied | before a row: the row is as of that clock, or later |
//! | announcement of batch `n` | before the first image changes for it | after a row: if there is no announcement, the row does not contain `n` |
//! | image | under its sequence lock; with its check if its table is sealed | in place the lock shows that it is whole, elsewhere the check does |
//!
//! Only the poller writes any of it. Peers have the right to READ, and no other.
//!
//! **Seats.** A client that names its memory gets a *seat* with a ring of announcements. A client whose
//! connection the shard has ended may not have noticed that yet, and may still look at its old ring. It must
//! not find another client's announcements there. So a seat that was given back is the last to be given out
//! again, and its ring is wiped then.

use std::{collections::VecDeque, ops::Range};

use fervor_protocol::{
    ack::{ack_offset, ack_word},
    limits::{ANNOUNCE_BYTES, REGION_HEADER},
};
use fervor_verbs::Exclusive;

/// Tables begin at multiples of this.
const PAGE: usize = 4096;

/// See the module.
#[derive(Debug)]
pub struct Region {
    memory: Exclusive,
    /// What no table has, in order, never adjacent.
    free: Vec<Range<usize>>,
    seats: VecDeque<usize>,
}

impl Region {
    /// Bytes before the tables, for so many seats.
    pub fn header_bytes(seats: usize) -> usize {
        (REGION_HEADER + seats * ANNOUNCE_BYTES).next_multiple_of(PAGE)
    }

    /// In `memory`, zeroed, with so many seats.
    pub fn new(memory: Exclusive, seats: usize) -> Self {
        let start = Self::header_bytes(seats).min(memory.len());
        let free = vec![Range { start, end: memory.len() }];
        Self { memory, free, seats: (0..seats).collect() }
    }

    /// The memory itself.
    pub fn memory(&mut self) -> &mut Exclusive {
        &mut self.memory
    }

    /// Bytes that no table has.
    pub fn free(&self) -> usize {
        self.free.iter().map(Range::len).sum()
    }

    /// Takes `bytes` bytes for a table, all zero. `None`: there are not so many in one piece.
    pub fn allocate(&mut self, bytes: usize) -> Option<usize> {
        let place = self.free.iter().position(|free| free.len() >= bytes)?;
        let free = &mut self.free[place];
        let offset = free.start;
        free.start = (offset + bytes).next_multiple_of(PAGE).min(free.end);
        if free.start == free.end {
            self.free.remove(place);
        }
        Some(offset)
    }

    /// Gives back what a table had. Its bytes are zero, as nobody has changed them.
    pub fn give_back(&mut self, offset: usize, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let end = (offset + bytes).next_multiple_of(PAGE).min(self.memory.len());
        let place = self.free.partition_point(|free| free.start < offset);
        self.free.insert(place, offset..end);
        for left in [Some(place), place.checked_sub(1)].into_iter().flatten() {
            if left + 1 < self.free.len() && self.free[left].end == self.free[left + 1].start {
                self.free[left].end = self.free.remove(left + 1).end;
            }
        }
    }

    /// A ring of announcements for a client.
    pub fn take_seat(&mut self) -> Option<usize> {
        let seat = self.seats.pop_front()?;
        for word in 0..ANNOUNCE_BYTES / 8 {
            self.memory.publish(Self::announcements(seat) + word * 8, 0);
        }
        Some(seat)
    }

    /// The client is gone.
    pub fn leave_seat(&mut self, seat: usize) {
        self.seats.push_back(seat);
    }

    /// Byte offset of a seat's ring.
    pub fn announcements(seat: usize) -> usize {
        REGION_HEADER + seat * ANNOUNCE_BYTES
    }

    /// Batch `number` of the client in `seat` is applied at `lsn`.
    pub fn announce(&mut self, seat: usize, number: u64, lsn: u64) {
        self.memory.publish(Self::announcements(seat) + ack_offset(number), ack_word(number, lsn));
    }

    /// All batches below `clock` have been applied.
    pub fn publish_clock(&mut self, clock: u64) {
        self.memory.publish(0, clock);
    }

    /// Bytes, as they are now.
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.memory.bytes()[range]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(region: &Region, offset: usize) -> u64 {
        u64::from_le_bytes(region.bytes(offset..offset + 8).try_into().unwrap())
    }

    #[test]
    fn what_is_given_back_is_one_piece_again() {
        let mut region = Region::new(Exclusive::new("test", 16 * PAGE).unwrap(), 3);
        let all = region.free();
        assert_eq!(all, 15 * PAGE);
        let tables: Vec<_> =
            [1, PAGE, PAGE + 1, 3 * PAGE].map(|bytes| (region.allocate(bytes).unwrap(), bytes)).into();
        assert_eq!(tables.iter().map(|table| table.0 / PAGE).collect::<Vec<_>>(), [1, 2, 3, 5]);
        assert_eq!(region.allocate(9 * PAGE), None);
        for index in [1, 3, 0, 2] {
            region.give_back(tables[index].0, tables[index].1);
        }
        assert_eq!((region.free.len(), region.free()), (1, all));
        assert_eq!(region.allocate(all), Some(PAGE));
        assert_eq!(region.allocate(1), None);
    }

    #[test]
    fn a_seat_is_wiped_and_given_out_as_late_as_can_be() {
        let mut region = Region::new(Exclusive::new("test", 2 * PAGE).unwrap(), 2);
        let first = region.take_seat().unwrap();
        region.announce(first, 65, 7);
        assert_eq!(word(&region, Region::announcements(first) + 8), ack_word(65, 7));
        region.leave_seat(first);
        let second = region.take_seat().unwrap();
        assert_ne!(second, first);
        assert_eq!((region.take_seat(), region.take_seat()), (Some(first), None));
        assert_eq!(word(&region, Region::announcements(first) + 8), 0);
    }
}
