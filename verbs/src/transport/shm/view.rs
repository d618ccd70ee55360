//! A region of the peer, looked at without a request: a pointer into the mapping that READs go through, too.

use std::{
    fmt,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering, fence},
    },
};

use super::mapping::Mapping;
use crate::{memory::copy::from_shared, transport::View};

/// A view of the `shm` provider.
#[derive(Clone)]
pub struct ShmView {
    /// First byte: here, so that a call need not ask `mapping`.
    first: NonNull<u8>,
    len: usize,
    /// Keeps the bytes mapped.
    mapping: Arc<Mapping>,
}

// SAFETY: the pointer is into memory that `mapping` keeps mapped, whatever thread that is in, and that is only copied from
// and loaded as atomic words.
unsafe impl Send for ShmView {}
// SAFETY: as for `Send`: all calls of several threads only read, as `mapping` says that memory is read.
unsafe impl Sync for ShmView {}

impl ShmView {
    /// Bytes `offset..offset + len` of the mapping.
    pub(super) fn new(mapping: &Arc<Mapping>, offset: usize, len: usize) -> Self {
        mapping.check(offset, len);
        // SAFETY: `offset` is at most the size of the mapping (`check`).
        let first = unsafe { mapping.as_ptr().add(offset) };
        let first = NonNull::new(first).expect("nothing is mapped at 0");
        Self { first, len, mapping: mapping.clone() }
    }

    /// The byte at `offset`, of which `len` lie in the view.
    #[inline(always)]
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        if offset > self.len || len > self.len - offset {
            self.outside(offset, len);
        }
        // SAFETY: `offset` is at most `self.len`, and so many bytes from `first` on are in the mapping (`new`).
        unsafe { self.first.as_ptr().add(offset) }
    }

    #[cold]
    #[inline(never)]
    fn outside(&self, offset: usize, len: usize) -> ! {
        let (end, size) = (offset.saturating_add(len), self.len);
        panic!("bytes {offset}..{end} are outside a view of {size} bytes")
    }
}

impl View for ShmView {
    #[inline]
    fn len(&self) -> usize {
        self.len
    }

    #[inline]
    fn load(&self, offset: usize) -> u64 {
        let word = self.at(offset, 8);
        assert!(word.addr().is_multiple_of(8), "offset {offset} is not aligned to 8 bytes");
        // The mapping may be read-only, and for such memory only relaxed loads are promised to work.
        // SAFETY: the 8 bytes lie in the view (`at`), which is mapped as long as `self` lives, and cannot shrink (sealed).
        // They are aligned (asserted). Nobody in this process makes a reference to them but atomic ones.
        let word = unsafe { AtomicU64::from_ptr(word.cast()) }.load(Ordering::Relaxed);
        // SYNC POINT: acquires what the owner released when it published the word.
        fence(Ordering::Acquire);
        word
    }

    #[cfg(all(target_arch = "x86_64", not(miri)))]
    #[inline]
    fn prefetch(&self, offset: usize) {
        let byte = self.at(offset, 1);
        // SAFETY: a prefetch of any address is allowed, and this one lies in the view (`at`). Every x86-64 has SSE.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(byte.cast()) }
    }

    #[inline(always)]
    fn copy(&self, offset: usize, into: &mut [u8]) {
        let from = self.at(offset, into.len());
        // SAFETY: the source lies in the view (`at`), which is mapped as long as `self` lives, and cannot shrink (sealed);
        // the target is an exclusive slice of the same length, which cannot overlap a mapping that no slice is ever
        // made of.
        unsafe { from_shared(from, into.as_mut_ptr(), into.len()) }
    }
}

impl fmt::Debug for ShmView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShmView({} of {} bytes)", self.len, self.mapping.len())
    }
}
