//! Memory that two processes map: rings, doorbell pages, and the peer's view of registered regions.
//!
//! The other process may write any byte at any time, so no reference to the bytes is ever made: they are
//! copied by [`copy`](crate::memory::copy), or accessed as atomic words. It cannot take the memory away: see [`super::file`].
//!
//! **What is bounded.** Of a file no more is mapped than was announced, however large it is. A process may have 65,530
//! mappings (`vm.max_map_count`), and needs some for itself, so the peers of a transport get [`MAX_MAPPINGS`] together.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU32, AtomicU64},
    },
};

use memmap2::{MmapOptions, MmapRaw};

use super::file;
use crate::{error::Error, memory::copy::from_shared};

/// Bytes of a page; of the header of every mapping that this module creates.
pub(super) const PAGE: usize = file::PAGE;

/// Most regions and doorbells of peers that a transport has mapped at a time: half of what Linux allows a process.
pub(super) const MAX_MAPPINGS: usize = 1 << 15;

/// A mapping by the device and inode of its file, and whether it is writable.
type Key = (u64, u64, bool);

/// The mappings of peers' regions and doorbells: the connections of this process to one peer
/// share them, so that each page is faulted in once. While a mapping lives, so does its inode: no other file
/// has its number.
#[derive(Debug)]
pub(super) struct Mappings {
    /// The user of this process.
    user: u32,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    mappings: HashMap<Key, Weak<Mapping>>,
    /// The dead are looked for when there are so many.
    sweep: usize,
}

/// A shared mapping of a file, from its first byte on.
#[derive(Debug)]
pub(super) struct Mapping {
    map: MmapRaw,
    writable: bool,
}

impl Mappings {
    /// None yet, of a process of this user.
    pub(super) fn new(user: u32) -> Self {
        Self { user, table: Mutex::default() }
    }

    /// Maps the first `len` bytes of a file that a peer sent, or finds them mapped already. A longer mapping may be the
    /// answer.
    ///
    /// # Errors
    /// What is wrong with the file ([`file::inspect`]); the system's; [`MAX_MAPPINGS`].
    pub(super) fn open(&self, fd: &OwnedFd, len: usize, writable: bool) -> Result<Arc<Mapping>, Error> {
        let file = file::inspect(fd, len, self.user).map_err(refuse)?;
        let key = (file.id.0, file.id.1, writable);
        // Insertions and removals of whole entries: a panic leaves nothing half done.
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mapping) = table.mappings.get(&key).and_then(Weak::upgrade)
            && mapping.len() >= len
        {
            return Ok(mapping);
        }
        table.make_room()?;
        let mapping = Arc::new(Mapping::map(fd, len.next_multiple_of(file.page).min(file.len), writable)?);
        table.mappings.insert(key, Arc::downgrade(&mapping));
        Ok(mapping)
    }

    /// Maps all of a file that a peer sent, which must have exactly `len` bytes.
    pub(super) fn open_whole(&self, fd: &OwnedFd, len: usize) -> Result<Arc<Mapping>, Error> {
        let file = file::inspect(fd, len, self.user).map_err(refuse)?;
        if file.len != len {
            return Err(refuse(format!("it has {} bytes and should have {len}", file.len)));
        }
        Mapping::map(fd, len, true).map(Arc::new)
    }
}

impl Table {
    /// Sees to it that one more mapping is allowed.
    fn make_room(&mut self) -> Result<(), Error> {
        if self.mappings.len() >= self.sweep {
            self.mappings.retain(|_, mapping| mapping.strong_count() > 0);
            self.sweep = (2 * self.mappings.len()).clamp(64, MAX_MAPPINGS);
        }
        if self.mappings.len() < MAX_MAPPINGS {
            return Ok(());
        }
        Err(Error::Limit {
            what: "the number of regions of peers that a transport has mapped".to_owned(),
            value: MAX_MAPPINGS as u64 + 1,
            limit: MAX_MAPPINGS as u64,
            cure: "; let peers register fewer, or end some connections".to_owned(),
        })
    }
}

fn refuse(what: String) -> Error {
    Error::System {
        call: "mapping memory of the peer".to_owned(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidData, what),
    }
}

impl Mapping {
    /// Makes a file of `len` zero bytes, for this process and a peer, and maps it.
    pub(super) fn create(name: &str, len: usize) -> Result<(Arc<Self>, OwnedFd), Error> {
        let fd = file::create(name, len)?;
        Ok((Arc::new(Self::map(&fd, len, true)?), fd))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peers_of_a_transport_share_a_limit_and_the_dead_make_room() {
        let (one, fd) = Mapping::create("test", PAGE).unwrap();
        let mappings = Mappings::new(0);
        let entry = |number| ((u64::MAX, number, false), Arc::downgrade(&one));
        mappings.table.lock().unwrap().mappings.extend((0..MAX_MAPPINGS as u64).map(entry));
        let error = mappings.open(&fd, PAGE, true).unwrap_err();
        assert!(matches!(error, Error::Limit { value: 32_769, limit: 32_768, .. }), "{error}");
        drop(one);
        assert_eq!(mappings.open(&fd, PAGE, true).unwrap().len(), PAGE);
        assert_eq!(mappings.table.lock().unwrap().mappings.len(), 1);
    }

    #[test]
    fn no_more_is_mapped_than_was_announced() {
        let mappings = Mappings::new(0);
        let (_own, fd) = Mapping::create("test", 1 << 30).unwrap();
        assert_eq!(mappings.open(&fd, 1, true).unwrap().len(), PAGE);
        assert_eq!(mappings.open(&fd, PAGE + 1, true).unwrap().len(), 2 * PAGE);
        // A mapping that is long enough serves, and one that is not is replaced.
        let long = mappings.open(&fd, 5 * PAGE, true).unwrap();
        assert!(Arc::ptr_eq(&long, &mappings.open(&fd, 3 * PAGE, true).unwrap()));
        assert!(mappings.open_whole(&fd, PAGE).is_err());
    }
}
