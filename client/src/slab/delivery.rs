//! What becomes of the batches that carry slabs.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// Batches that carried some slabs: the LSNs at which they were applied, once that is known.
#[derive(Debug)]
pub struct Delivery {
    /// Number of the first batch.
    pub first: u64,
    /// Per batch one more than its LSN; zero: not acknowledged.
    lsns: Box<[AtomicU64]>,
    /// Number of batches, once all are posted.
    count: AtomicU64,
}

impl Delivery {
    /// Of at most `most` batches, numbered from `first` on.
    pub fn new(first: u64, most: usize) -> Arc<Self> {
        let lsns = (0..most).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self { first, lsns, count: AtomicU64::new(0) })
    }

    /// Batch `part` was applied at `lsn`.
    pub fn acknowledged(&self, part: usize, lsn: u64) {
        // SYNC POINT: whoever sees it may use the memory of the slabs again, once the other parts are there too.
        self.lsns[part].store(lsn + 1, Ordering::Release);
    }

    /// It has come to `count` batches.
    pub fn complete(&self, count: usize) {
        self.count.store(count as u64, Ordering::Release);
    }

    /// LSN at which a batch was applied, if that is known.
    pub fn lsn(&self, part: usize) -> Option<u64> {
        self.lsns[part].load(Ordering::Acquire).checked_sub(1)
    }

    /// The greatest LSN, when all batches are acknowledged: the last one's.
    pub fn greatest(&self) -> Option<u64> {
        let last = self.count.load(Ordering::Acquire).checked_sub(1)?;
        self.lsn(last as usize)
    }

    /// Number of the last batch, when all are posted.
    pub fn last(&self) -> Option<u64> {
        Some(self.first + self.count.load(Ordering::Acquire).checked_sub(1)?)
    }
}
