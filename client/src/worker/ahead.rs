//! A READ that was started before its row was asked for ([`prefetch`](super::prefetch)).

use fervor_protocol::Element;

use crate::{known::Before, table::TableCore};

/// A READ that has been started and not been asked for.
#[derive(Debug)]
pub(super) struct Prefetched {
    pub table: usize,
    pub shard: usize,
    pub image: u64,
    pub place: usize,
    pub before: Before,
    pub done: bool,
    /// The worker's clock when it was started.
    pub clock: u64,
}

impl Prefetched {
    /// Whether it is of this image of a shard.
    pub fn is_of<E: Element>(&self, table: &TableCore<E>, shard: usize, image: u64) -> bool {
        (self.table, self.shard, self.image) == (table.number(), shard, image)
    }
}
