//! The slabs of several workers, sent over a wire as one update per row, in as few messages as they fit.
//!
//! Workers of one client often update the same rows. If each worker's updates were sent separately, the bytes
//! would grow with the number of workers. So the slabs of a clock are merged, row by row, while they are
//! written into messages. The thread that drives the engine does this, since only that thread may send. The
//! slabs do not change any more by then, so no worker waits for it. [`merge`](crate::merge) says how rows are
//! merged.

use std::sync::Arc;

use fervor_protocol::batch::{BatchWriter, HEADERS, SECTION};

use crate::{
    merge::Cursor,
    session::link::Outgoing,
    slab::{AnySlab, Delivery},
    table::AnyTable,
};

/// Slabs of one table.
#[derive(Debug)]
struct Group {
    table: usize,
    slabs: Vec<Arc<dyn AnySlab>>,
    cursor: Cursor,
}

/// Slabs that are being sent. See the module.
#[derive(Debug)]
pub struct Combining {
    groups: Vec<Group>,
    delivery: Arc<Delivery>,
    parts: usize,
    /// The clock that the last batch ends.
    pub clock: Option<u64>,
    /// The ticket up to which everything is posted when this is.
    pub flushed: u64,
}

impl Combining {
    /// Of these slabs, in batches from number `first` on, in messages of at most `message` bytes.
    pub fn new(taken: Vec<Outgoing>, first: u64, message: usize, clock: Option<u64>, flushed: u64) -> Self {
        let mut groups: Vec<Group> = Vec::new();
        for Outgoing { table, slab, .. } in taken {
            match groups.iter_mut().find(|group| group.table == table) {
                Some(group) => group.slabs.push(slab),
                None => groups.push(Group { table, slabs: vec![slab], cursor: Cursor::default() }),
            }
        }
        let most = groups.iter().map(|group| most_batches(&group.slabs, message)).sum::<usize>() + 1;
        let delivery = Delivery::new(first, most);
        for slab in groups.iter().flat_map(|group| &group.slabs) {
            slab.goes_out(&delivery, true);
        }
        Self { groups, delivery, parts: 0, clock, flushed }
    }

    /// Writes the next batch. Returns its delivery and its part of it, and whether it is the last one.
    pub fn write(
        &mut self,
        writer: &mut BatchWriter<'_>,
        tables: &[Arc<dyn AnyTable>],
        shard: usize,
    ) -> (Arc<Delivery>, usize, bool) {
        let part = self.parts;
        self.parts += 1;
        let mut done = true;
        for group in &mut self.groups {
            done = tables[group.table].write(shard, &group.slabs, &mut group.cursor, writer, part);
            if !done {
                break;
            }
        }
        (self.delivery.clone(), part, done)
    }

    /// All batches are posted.
    pub fn posted(&self) {
        self.delivery.complete(self.parts);
    }
}

/// More batches than the slabs can take: every message but the last of a table is filled up to one row.
fn most_batches(slabs: &[Arc<dyn AnySlab>], message: usize) -> usize {
    let room = message - HEADERS - SECTION - 32;
    let (mut greatest, mut bytes, mut rows) = (0, 0, 0);
    for slab in slabs {
        let extent = slab.extent();
        (greatest, bytes, rows) = (greatest.max(extent.0), bytes + extent.1, rows + extent.2);
    }
    // Sections of whole rows and of cells may take turns; each pays for a header, as a row does at most.
    if greatest + SECTION <= room / 2 {
        2 + (bytes + rows * (SECTION + 16)) / (room / 2 - SECTION)
    } else {
        rows * (2 + greatest / room.saturating_sub(SECTION).max(8)) + 1
    }
}

#[cfg(test)]
mod tests;
