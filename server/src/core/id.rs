//! The identifiers by which a shard names its clients and its tables.

/// A client's place in a shard, for as long as its connection lasts; then another client may get it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId(pub u32);

/// A shard's number of a table.
pub type TableId = u32;
