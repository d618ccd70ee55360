//! Memory that two processes map: rings, doorbell pages, and the peer's view of registered regions.
//!
//! The other process may write any byte at any time, so no reference to the bytes is ever made: they are
//! copied by [`copy`](crate::memory::copy), or accessed as atomic words. It cannot take the memory away:
//! every file is sealed against shrinking, and one that is not is refused ([`Mapping::open`]).

use std::{
    collections::HashMap,
    fs::File,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU32, AtomicU64},
    },
};

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};

use crate::{error::Error, memory::copy::from_shared};

/// Bytes of a page; of the header of every mapping that this module creates.
pub(super) const PAGE: usize = 4096;

/// The mappings of peers' regions and doorbells, by device, inode and right: the connections of this process to one peer
/// share them, so that each page is faulted in once. While a mapping lives, so does its inode: no other file
/// has its number.
#[derive(Debug, Default)]
pub(super) struct Mappings(Mutex<HashMap<(u64, u64, bool), Weak<Mapping>>>);

/// A shared mapping of a whole file.
#[derive(Debug)]
pub(super) struct Mapping {
    map: MmapRaw,
    writable: bool,
}

impl Mapping {
    /// Makes a file of `len` zero bytes, which can neither shrink nor grow, and maps it.
    pub(super) fn create(name: &str, len: usize) -> Result<(Arc<Self>, OwnedFd), Error> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| Error::io(format!("memfd_create({name})"))(e.into()))?;
        let file = File::from(fd);
        file.set_len(len as u64).map_err(Error::io(format!("ftruncate(memfd, {len})")))?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)
            .map_err(|e| Error::io("fcntl(memfd, F_ADD_SEALS)")(e.into()))?;
        let fd = OwnedFd::from(file);
        Ok((Arc::new(Self::map(&fd, len, true)?), fd))
    }

    /// As [`open`](Self::open), but finds the mapping again if the file has been mapped so in `mappings` and
    /// still is.
    pub(super) fn open_shared(
        mappings: &Mappings,
        fd: &OwnedFd,
        least: usize,
        writable: bool,
    ) -> Result<Arc<Self>, Error> {
        let file = fstat(fd).map_err(|e| Error::io("fstat(memfd)")(e.into()))?;
        let key = (file.st_dev, file.st_ino, writable);
        // Insertions and removals of whole entries: a panic leaves nothing half done.
        let mut mappings = mappings.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mapping) = mappings.get(&key).and_then(Weak::upgrade)
            && mapping.len() >= least
        {
            return Ok(mapping);
        }
        let mapping = Self::open(fd, least, writable)?;
        mappings.retain(|_, mapping| mapping.strong_count() > 0);
        mappings.insert(key, Arc::downgrade(&mapping));
        Ok(mapping)
    }

    /// Maps all of a file that a peer sent, which must have at least `least` bytes and be sealed against
    /// shrinking.
    pub(super) fn open(fd: &OwnedFd, least: usize, writable: bool) -> Result<Arc<Self>, Error> {
        let refuse = |what: String| Error::System {
            call: "mapping memory of the peer".to_owned(),
            source: std::io::Error::new(std::io::ErrorKind::InvalidData, what),
        };
        let seals = fcntl_get_seals(fd).map_err(|e| refuse(format!("it is no memfd ({e})")))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(refuse("it is not sealed against shrinking".to_owned()));
        }
        let len = fstat(fd).map_err(|e| Error::io("fstat(memfd)")(e.into()))?.st_size;
        match usize::try_from(len) {
            Ok(len) if len >= least.max(1) => Ok(Arc::new(Self::map(fd, len, writable)?)),
            _ => Err(refuse(format!("it has {len} bytes and should have {least}"))),
        }
    }

    fn map(fd: &OwnedFd, len: usize, writable: bool) -> Result<Self, Error> {
        let file = fd.as_fd();
        let mut options = MmapOptions::new();
        options.len(len);
        let map = if writable { options.map_raw(&file) } else { options.map_raw_read_only(&file) };
        Ok(Self { map: map.map_err(Error::io(format!("mmap({len} bytes)")))?, writable })
    }

    /// Size in bytes.
    pub(super) fn len(&self) -> usize {
        self.map.len()
    }

    /// First byte. What is made of it obeys the rule of this module.
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// The aligned 8-byte word at byte `offset`.
    #[inline]
    pub(super) fn word(&self, offset: usize) -> &AtomicU64 {
        self.check(offset, 8);
        assert!(offset.is_multiple_of(8) && self.writable, "no atomic word at {offset}");
        // SAFETY: the 8 bytes lie inside the mapping (`check`), which lives as long as `self`, is writable
        // (asserted), cannot shrink (sealed), and is page-aligned, so that a multiple of 8 is aligned. Nobody
        // makes any but atomic references to it.
        unsafe { AtomicU64::from_ptr(self.as_ptr().add(offset).cast()) }
    }

    /// Where the kernel sees the upper half of the word at byte `offset`, as a futex: to be handed to the
    /// kernel, never read or written, since the protocol accesses the whole word.
    pub(super) fn upper_half(&self, offset: usize) -> &AtomicU32 {
        let _in_bounds_and_aligned = self.word(offset);
        let upper = if cfg!(target_endian = "little") { 4 } else { 0 };
        // SAFETY: half of the word that `word` has just vouched for; half of an aligned word is aligned.
        unsafe { AtomicU32::from_ptr(self.as_ptr().add(offset + upper).cast()) }
    }

    /// Copies bytes `offset..offset + into.len()` out. They may be torn.
    pub(super) fn read(&self, offset: usize, into: &mut [u8]) {
        self.check(offset, into.len());
        // SAFETY: the source lies inside the mapping (`check`), which cannot shrink; the target is an
        // exclusive slice of the same length, which cannot overlap a mapping that no slice is ever made of.
        unsafe { from_shared(self.as_ptr().add(offset), into.as_mut_ptr(), into.len()) }
    }

    /// Panics unless bytes `offset..offset + len` are inside the mapping.
    #[inline]
    pub(super) fn check(&self, offset: usize, len: usize) {
        assert!(
            offset <= self.len() && len <= self.len() - offset,
            "bytes {offset}..{} are outside a mapping of {} bytes",
            offset.saturating_add(len),
            self.len()
        );
    }
}
