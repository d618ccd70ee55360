//! Views: memory of a peer of this host, mapped here.

use std::{fmt, sync::atomic::AtomicU64};

use crate::memory::seqlock;

/// Memory of a peer, mapped here: read without a request, a completion, or an instruction of the peer. It is of this
/// host, and of a region that the peer granted remote READ of. See rule 7 of the [contract](super).
///
/// Cheap to clone. It stays readable, and shows what its owner writes, when its connection is over; and is readable when the
/// peer is dead.
///
/// Its calls panic when what they are asked for is outside of it.
pub trait View: Clone + Send + Sync + fmt::Debug + 'static {
    /// Size in bytes.
    fn len(&self) -> usize;

    /// Whether it has no byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The aligned 8-byte word at byte `offset`, whole. What its owner wrote before it
    /// [published](crate::Exclusive::publish) that word is seen by all later calls.
    fn load(&self, offset: usize) -> u64;

    /// Copies bytes `offset..offset + into.len()`. Each aligned word of them is whole; together they may be torn, and
    /// they may be read in any order, also later than a `load` that follows.
    fn copy(&self, offset: usize, into: &mut [u8]);

    /// As [`View::copy`], of bytes that their owner [rewrites](crate::Exclusive::rewrite) under the sequence lock at byte `lock`:
    /// their version, if `into` holds one version and no mixture. `None`: the owner was at them; what is in `into` is of no
    /// use. What the owner wrote before that version is seen by all later calls.
    #[inline]
    fn snapshot(&self, lock: usize, offset: usize, into: &mut [u8]) -> Option<u64> {
        seqlock::read::<AtomicU64>(|| self.load(lock), || self.copy(offset, into))
    }

    /// Says that the byte at `offset` will be read soon. It changes nothing but how long that takes.
    #[inline]
    fn prefetch(&self, _offset: usize) {}

    /// As [`View::snapshot`], of the aligned 8-byte word at byte `offset`: their version, and the word.
    #[inline]
    fn snapshot_word(&self, lock: usize, offset: usize) -> Option<(u64, u64)> {
        let mut word = 0;
        let version = seqlock::read::<AtomicU64>(|| self.load(lock), || word = self.load(offset))?;
        Some((version, word))
    }
}

/// The view of a provider that has none: there is no value of it.
#[derive(Debug, Clone, Copy)]
pub enum NoView {}

impl View for NoView {
    fn len(&self) -> usize {
        match *self {}
    }

    fn load(&self, _: usize) -> u64 {
        match *self {}
    }

    fn copy(&self, _: usize, _: &mut [u8]) {
        match *self {}
    }
}
