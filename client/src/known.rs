//! What a worker knows of a shard before it reads a copy of a row. It decides what the copy may be trusted
//! for.

/// What a worker knows of a shard before it looks at a copy.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// The clock of the last round that was polled.
    pub clock: u64,
    /// The clock of the last one of which the LSN is known.
    pub sealed: u64,
    /// LSN at which that one was closed, or a later one.
    pub round_lsn: u64,
}

/// What is known of a shard before a READ is posted, for which the READ is then trusted.
#[derive(Debug, Clone, Copy)]
pub struct Before {
    /// Every update stamped below this clock will be in it.
    pub clock: u64,
    /// This client's batches up to this LSN will be in it.
    pub as_of: u64,
}
