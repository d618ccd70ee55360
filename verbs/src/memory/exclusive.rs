//! Memory with one writer: a shard keeps its rows in it, and a client keeps in it what it tells a server of
//! its own host.
//!
//! Peers READ it, or look at it through a [`View`](crate::transport::View), at any time. The owner tells them
//! in one of these ways what is whole:
//!
//! | the owner calls | and then a peer that | knows |
//! |---|---|---|
//! | [`publish`](Exclusive::publish) | loads the word | all that the owner wrote before |
//! | [`rewrite`](Exclusive::rewrite) | takes a [`snapshot`](crate::transport::View::snapshot) | that its copy is of one version |
//! | `bytes_mut` | copies | nothing: the copy may be torn |

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use memmap2::MmapOptions;

use super::{HugePage, Mapping, Memory, MemoryOptions, seqlock};
use crate::error::Error;

/// Memory with one writer in this program, and remote readers only: what a shard's rows live in.
#[derive(Debug)]
pub struct Exclusive(Memory);

impl Exclusive {
    /// As [`Memory::new`].
    ///
    /// # Errors
    /// The system's, when it has no such memory.
    pub fn new(name: &str, len: usize) -> Result<Self, Error> {
        Memory::new(name, len).map(Self)
    }

    /// As [`Memory::sparse`].
    ///
    /// # Errors
    /// The system's.
    pub fn sparse(name: &str, len: usize) -> Result<Self, Error> {
        Memory::sparse(name, len).map(Self)
    }

    /// As [`Memory::with`].
    ///
    /// # Errors
    /// As there.
    pub fn with(name: &str, len: usize, options: &MemoryOptions<'_>) -> Result<Self, Error> {
        Memory::with(name, len, options).map(Self)
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Never: a memory has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Whether it lies on huge pages.
    pub fn huge_pages(&self) -> bool {
        self.0.huge_pages()
    }

    /// As [`Memory::huge_page`].
    pub fn huge_page(&self) -> Option<HugePage> {
        self.0.huge_page()
    }

    /// As [`Memory::spread`].
    pub fn spread(&self) -> Vec<(usize, usize)> {
        self.0.spread()
    }

    /// The bytes, to read.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping has `len` bytes and lives as long as `self`. Nobody writes them while the
        // slice lives: writers need `&mut self`, and providers register an `Exclusive` for remote read only.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), self.0.len()) }
    }

    /// The bytes, to write. A peer's READ or view may see any mixture of old and new words.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`; `&mut self` makes this the only reference. Remote READs do not go through
        // this mapping's references: a NIC reads physical memory, a peer process reads its own mapping.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr(), self.0.len()) }
    }

    /// Writes the aligned 8-byte word at byte `offset` whole, and releases what was written before: whoever
    /// [loads](crate::transport::View::load) it through a view sees all of that.
    ///
    /// # Panics
    /// When there is no such word.
    #[inline]
    pub fn publish(&mut self, offset: usize, word: u64) {
        self.word(offset).store(word, Ordering::Release);
    }

    /// Changes the bytes of `range` by `change`, under the sequence lock at byte `lock`: an aligned word that is odd
    /// meanwhile, and `version` afterwards. So a [snapshot](crate::transport::View::snapshot) never mixes two versions.
    /// Versions of one lock are even, and each is another than all before it.
    ///
    /// If `change` panics the word stays odd: nobody believes the bytes any more, until they are rewritten.
    ///
    /// # Panics
    /// When there is no such word or range, the word lies in the range, or the version is odd.
    #[inline]
    pub fn rewrite<X>(
        &mut self,
        lock: usize,
        range: Range<usize>,
        version: u64,
        change: impl FnOnce(&mut [u8]) -> X,
    ) -> X {
        assert!(version & seqlock::BUSY == 0, "version {version} is odd: that means busy");
        assert!(range.start <= range.end, "a range that ends before it begins");
        self.0.check(range.start, range.len());
        assert!(range.end <= lock || lock + 8 <= range.start, "the lock at {lock} lies in {range:?}");
        let word = self.word(lock);
        // SAFETY: the range lies inside the mapping (`check`), which lives as long as `self`. `&mut self` is borrowed
        // for as long as the slice lives, so no other slice of these bytes exists; the word does not overlap it
        // (asserted), and is accessed atomically.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr().add(range.start), range.len()) };
        seqlock::write(word, version, || change(bytes))
    }

    /// Takes the memory apart into pieces of `bytes` bytes, the last of which may be shorter: each may have an owner, and a
    /// thread, of its own. Export the memory before; peers then reach all of it.
    ///
    /// # Panics
    /// When `bytes` is no positive multiple of 8: a word would be in two pieces.
    pub fn split(self, bytes: usize) -> Vec<Piece> {
        assert!(bytes > 0 && bytes.is_multiple_of(8), "pieces of {bytes} bytes: no multiple of 8");
        let Self(memory) = self;
        let piece = |offset| Piece { len: bytes.min(memory.len() - offset), memory: memory.clone(), offset };
        (0..memory.len()).step_by(bytes).map(piece).collect()
    }

    /// The word at byte `offset`, for the owner to write.
    #[inline]
    fn word(&self, offset: usize) -> &AtomicU64 {
        self.0.check(offset, 8);
        assert!(offset.is_multiple_of(8), "offset {offset} is not aligned to 8 bytes");
        // SAFETY: the 8 bytes lie inside the mapping (`check`), which lives as long as `self`; they are aligned, since
        // mappings are page-aligned and the offset is a multiple of 8. The callers have `&mut self`, so no slice
        // of these bytes exists but the one that `rewrite` makes, of other bytes.
        unsafe { AtomicU64::from_ptr(self.0.as_ptr().add(offset).cast()) }
    }

    /// The same bytes through a mapping of their own, for a provider whose peers live in this process: what
    /// they read through it, no reference of `bytes_mut` covers.
    pub(crate) fn map_again(&self) -> Result<Memory, Error> {
        let Mapping { file, len, huge, map } = &*self.0.0;
        let again = MmapOptions::new()
            .len(map.len())
            .map_raw(file)
            .map_err(Error::io(format!("mmap({len} bytes, again)")))?;
        let file = file.try_clone().map_err(Error::io("dup(memfd)"))?;
        Ok(Memory(Arc::new(Mapping { map: again, file, len: *len, huge: *huge })))
    }

    /// The memory, for providers to export. It must not be handed on: see [`Memory::word`].
    pub(crate) fn memory(&self) -> &Memory {
        &self.0
    }
}

/// A part of an [`Exclusive`] that was [split](Exclusive::split): with one writer, as the whole was.
#[derive(Debug)]
pub struct Piece {
    memory: Memory,
    offset: usize,
    len: usize,
}

impl Piece {
    /// Its first byte within the whole.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: a piece has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The bytes, to read.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `offset + len` is at most the size of the mapping, which lives as long as `self`. The `Exclusive`
        // is gone, its pieces do not overlap, and `memory` is not handed out: so whoever writes these bytes needs
        // `&mut self`.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr().add(self.offset), self.len) }
    }

    /// The bytes, to write. A peer's READ or view may see any mixture of old and new words.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`; `&mut self` makes this the only reference to these bytes. Peers read through mappings
        // of their own.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr().add(self.offset), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rewrite_leaves_the_new_version_and_the_new_bytes() {
        let mut memory = Exclusive::new("test", 64).unwrap();
        let length = memory.rewrite(8, 16..40, 6, |bytes| {
            bytes.fill(3);
            bytes.len()
        });
        assert_eq!(length, 24);
        let bytes = memory.bytes();
        assert_eq!(u64::from_ne_bytes(bytes[8..16].try_into().unwrap()), 6);
        assert!(bytes[16..40].iter().all(|&b| b == 3) && bytes[40..].iter().all(|&b| b == 0));
        memory.publish(0, 9);
        assert_eq!(memory.bytes()[..8], 9_u64.to_ne_bytes());
    }

    #[test]
    fn a_rewrite_that_panics_leaves_the_lock_odd() {
        let mut memory = Exclusive::new("test", 64).unwrap();
        memory.rewrite(0, 8..16, 4, |_| ());
        let panics = || memory.rewrite(0, 8..16, 6, |_| panic!("expected"));
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(panics)).unwrap_err();
        assert_eq!(memory.bytes()[..8], 5_u64.to_ne_bytes());
    }

    #[test]
    #[should_panic(expected = "lies in")]
    fn a_lock_that_is_rewritten_is_a_bug() {
        Exclusive::new("test", 64).unwrap().rewrite(8, 12..20, 2, |_| ());
    }

    #[test]
    #[should_panic(expected = "is odd")]
    fn an_odd_version_is_a_bug() {
        Exclusive::new("test", 64).unwrap().rewrite(8, 16..20, 3, |_| ());
    }

    #[test]
    fn pieces_are_the_whole_and_do_not_overlap() {
        let pieces = Exclusive::new("test", 1000).unwrap().split(64);
        assert_eq!(pieces.len(), 16);
        let threads: Vec<_> = pieces
            .into_iter()
            .map(|mut piece| {
                std::thread::spawn(move || {
                    let mark = piece.offset() as u8;
                    piece.bytes_mut().fill(mark);
                    piece
                })
            })
            .collect();
        let mut next = 0;
        for piece in threads.into_iter().map(|thread| thread.join().unwrap()) {
            assert_eq!(piece.offset(), next);
            assert!(piece.bytes().iter().all(|&b| b == next as u8));
            next += piece.len();
        }
        assert_eq!(next, 1000);
    }
}
