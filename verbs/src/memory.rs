//! Memory that a NIC or a peer may read or write.
//!
//! **Why not slices.** A `&[u8]` promises the compiler that nobody writes the bytes, a `&mut [u8]` that
//! nobody else even reads them. A NIC keeps no such promise. So [`Memory`] is only copied into and out of,
//! by instructions that the compiler neither sees through nor moves (`copy`), and by aligned
//! 8-byte atomic words. Whether a copy is *consistent* is not this module's business: the contract of
//! [`transport`](crate::transport) says when it is, and what is read without such a promise proves itself
//! with a checksum.
//!
//! **Who writes, who reads.**
//!
//! | type | written by | read by |
//! |---|---|---|
//! | [`Memory`] | any thread, the NIC, peers with the right | any thread, the NIC, peers with the right |
//! | [`Exclusive`] | its one owner, through `&mut` | its owner; peers, by one-sided READ and by views |
//! | [`Piece`] of an [`Exclusive`] | its one owner, through `&mut` | as the whole |
//!
//! [`Exclusive`] can be a slice because nothing but its owner ever *writes* it: it can be registered for
//! remote read only ([`Transport::export`](crate::transport::Transport::export)), it cannot be the target of a
//! READ, a WRITE or a SEND (it is no [`Region`](crate::transport::Region)), and a reader from outside sees it
//! through a mapping or a NIC of its own, which no reference of this program covers.
//!
//! | module | what it is |
//! |---|---|
//! | `copy` | the copy that keeps words whole |
//! | `pages` | ordinary pages and huge ones, and how many of these there are |
//! | `touch` | taking all pages when a memory is made, in parallel, near the processors that will use them |
//! | `nodes` | NUMA nodes |
//! | `exclusive` | [`Exclusive`]: how one writer tells its readers what is whole |
//! | `seqlock` | the sequence lock between [`Exclusive::rewrite`] and [`View::snapshot`](crate::transport::View::snapshot) |
//! | `atomic` | atomic words, for the model checker and for use |

use std::{
    ffi::CStr,
    fmt,
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, fallocate};

use crate::error::Error;

pub(crate) mod atomic;
pub(crate) mod copy;
mod exclusive;
mod nodes;
mod pages;
pub(crate) mod seqlock;
mod touch;

pub use exclusive::{Exclusive, Piece};
pub use nodes::{Nodes, allowed_cores};
pub use pages::{HugePage, Pages, Pool, Shortage};
pub use touch::Touch;

/// How a memory is made.
#[derive(Debug, Clone, Copy, Default)]
pub struct MemoryOptions<'a> {
    /// Which pages it lies on.
    pub pages: Pages,
    /// How all of it is touched at once. `None`: ordinary pages are taken when each is first touched; huge ones are taken at once,
    /// so that none is missing then, by the calling thread.
    pub touch: Option<Touch<'a>>,
}

struct Mapping {
    map: MmapRaw,
    file: File,
    len: usize,
    huge: Option<HugePage>,
}

/// A piece of memory that can be registered, shared and written from outside. Cheap to clone; freed with
/// the last clone. Zeroed at first, page-aligned.
#[derive(Clone)]
pub struct Memory(Arc<Mapping>);

impl Memory {
    /// Allocates `len` bytes, on huge pages when the machine has enough free. `name` shows in `/proc/PID/maps`.
    ///
    /// # Errors
    /// The system's, when it has no such memory.
    pub fn new(name: &str, len: usize) -> Result<Self, Error> {
        Self::with(name, len, &MemoryOptions::default())
    }

    /// As [`Memory::new`], on small pages, each taken when it is first touched: for memory of which perhaps little is used.
    ///
    /// # Errors
    /// The system's.
    pub fn sparse(name: &str, len: usize) -> Result<Self, Error> {
        Self::with(name, len, &MemoryOptions { pages: Pages::Ordinary, touch: None })
    }

    /// Allocates `len` bytes as `options` say.
    ///
    /// # Errors
    /// [`Error::HugePages`], when there are not as many as were asked for; the system's.
    pub fn with(name: &str, len: usize, options: &MemoryOptions<'_>) -> Result<Self, Error> {
        let len = len.max(1);
        let name = std::ffi::CString::new(name.replace('\0', "?")).expect("no NUL is left");
        if let Some(page) = options.pages.huge(len) {
            match Self::on_huge_pages(&name, len, page, options.touch) {
                Err(Error::HugePages(_)) if options.pages == Pages::Any => (),
                made => return made,
            }
        }
        let memory = Self::map(&name, len, len, None)?;
        if let Some(touch) = options.touch {
            // A wish: where the administrator does not allow it, or the kernel cannot, pages are small.
            let _ = memory.0.map.advise(Advice::HugePage);
            touch.all_of(&memory)?;
        }
        Ok(memory)
    }

    fn on_huge_pages(
        name: &CStr,
        len: usize,
        page: HugePage,
        touch: Option<Touch<'_>>,
    ) -> Result<Self, Error> {
        let short = |said: Error| Error::HugePages(Shortage::met(page, len, said));
        let file_len = len.checked_next_multiple_of(page.bytes()).ok_or_else(|| Error::Limit {
            what: "the size of a memory".to_owned(),
            value: len as u64,
            limit: (usize::MAX - page.bytes()) as u64,
            cure: String::new(),
        })?;
        // The mapping reserves its pages, or fails.
        let memory = Self::map(name, file_len, len, Some(page)).map_err(short)?;
        // A reservation does not hold against a limit of a container: a missing page would be a SIGBUS at first touch.
        match touch {
            Some(touch) => touch.all_of(&memory)?,
            None => fallocate(memory.as_fd(), FallocateFlags::empty(), 0, file_len as u64)
                .map_err(|e| short(Error::io(format!("fallocate(memfd, {file_len})"))(e.into())))?,
        }
        Ok(memory)
    }

    fn map(name: &CStr, file_len: usize, len: usize, huge: Option<HugePage>) -> Result<Self, Error> {
        let flags = huge.map_or(0, HugePage::memfd_flags);
        // SAFETY: `name` is a NUL-terminated string that outlives the call.
        let fd =
            unsafe { libc::memfd_create(name.as_ptr(), flags | libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        if fd < 0 {
            return Err(Error::last_os(format!("memfd_create({name:?})")));
        }
        // SAFETY: `memfd_create` has just returned this descriptor to us, and nobody else owns it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        // A memfd has mode 0777: whoever was given a descriptor that only reads could open it once more for writing.
        // SAFETY: plain system call on a descriptor that `file` keeps open.
        if unsafe { libc::fchmod(file.as_raw_fd(), 0o600) } != 0 {
            return Err(Error::last_os("fchmod(memfd, 0600)"));
        }
        file.set_len(file_len as u64).map_err(Error::io(format!("ftruncate(memfd, {file_len})")))?;
        // A peer maps this file, and would get a SIGBUS if it shrank: it never does, and the peer can check that.
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
        // SAFETY: plain system call on a descriptor that `file` keeps open.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
            return Err(Error::last_os("fcntl(memfd, F_ADD_SEALS)"));
        }
        let map = MmapOptions::new()
            .len(file_len)
            .map_raw(&file)
            .map_err(Error::io(format!("mmap({file_len} bytes)")))?;
        Ok(Self(Arc::new(Mapping { map, file, len, huge })))
    }

    /// The same bytes, mapped at another place: for a thread of this process that reads, as a peer would, what an [`Exclusive`] owns.
    /// No reference to the owner's mapping covers this one.
    pub(crate) fn mapped_again(&self) -> Result<Self, Error> {
        let len = self.0.map.len();
        let file = self.0.file.try_clone().map_err(Error::io("dup(memfd)"))?;
        // To read alone: it may be sealed so that no new mapping can write.
        let map = MmapOptions::new()
            .len(len)
            .map_raw_read_only(&file)
            .map_err(Error::io(format!("mmap({len} bytes)")))?;
        Ok(Self(Arc::new(Mapping { map, file, len: self.0.len, huge: self.0.huge })))
    }

    /// Size in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Never: a memory has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Whether it lies on huge pages.
    pub fn huge_pages(&self) -> bool {
        self.0.huge.is_some()
    }

    /// The size of the huge pages that it lies on, if it does.
    pub fn huge_page(&self) -> Option<HugePage> {
        self.0.huge
    }

    /// Bytes on each NUMA node, as far as they have been touched; empty if the kernel does not say. It looks at each page of this
    /// process.
    pub fn spread(&self) -> Vec<(usize, usize)> {
        nodes::spread(self)
    }

    /// Whether `self` and `other` are clones of one memory.
    pub fn same(&self, other: &Memory) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The aligned 8-byte word at byte `offset`, read whole; acquires what its writer released, if the
    /// writer was a thread of this machine.
    #[inline]
    pub fn load(&self, offset: usize) -> u64 {
        self.word(offset).load(Ordering::Acquire)
    }

    /// Writes the aligned 8-byte word at byte `offset` whole, and releases what was written before it.
    #[inline]
    pub fn store(&self, offset: usize, value: u64) {
        self.word(offset).store(value, Ordering::Release);
    }

    #[inline]
    fn word(&self, offset: usize) -> &AtomicU64 {
        self.check(offset, 8);
        assert!(offset.is_multiple_of(8), "offset {offset} is not aligned to 8 bytes");
        // SAFETY: the 8 bytes lie inside the mapping (`check`), which lives as long as `self`; they are
        // aligned, since mappings are page-aligned and the offset is a multiple of 8; every bit pattern is
        // a `u64`; and no reference but atomic ones is ever made to a `Memory` that is not inside an
        // `Exclusive`, which hands out no clone of it.
        unsafe { AtomicU64::from_ptr(self.0.map.as_mut_ptr().add(offset).cast()) }
    }

    /// Copies bytes `offset..offset + into.len()` out. They may be torn: see the module.
    #[inline(always)]
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.check(offset, into.len());
        // SAFETY: the source lies inside the mapping (`check`); the target is an exclusive slice of the same
        // length, which cannot overlap a mapping that no slice is ever made of.
        unsafe { copy::from_shared(self.0.map.as_ptr().add(offset), into.as_mut_ptr(), into.len()) }
    }

    /// Copies `from` in, to bytes `offset..offset + from.len()`.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) {
        self.check(offset, from.len());
        // SAFETY: as for `read`, with source and target exchanged.
        unsafe { copy::to_shared(from.as_ptr(), self.0.map.as_mut_ptr().add(offset), from.len()) }
    }

    #[inline]
    pub(crate) fn check(&self, offset: usize, len: usize) {
        if offset > self.len() || len > self.len() - offset {
            self.outside(offset, len);
        }
    }

    #[cold]
    #[inline(never)]
    fn outside(&self, offset: usize, len: usize) -> ! {
        let (end, size) = (offset.saturating_add(len), self.len());
        panic!("bytes {offset}..{end} are outside a memory of {size} bytes")
    }

    /// First byte of the mapping, for providers to register or copy from and to.
    #[inline]
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.0.map.as_mut_ptr()
    }

    /// Bytes `offset..offset + len` as the kernel's calls name them: for providers whose payloads it reads.
    pub(crate) fn piece(&self, offset: usize, len: usize) -> libc::iovec {
        self.check(offset, len);
        libc::iovec { iov_base: self.as_ptr().wrapping_add(offset).cast(), iov_len: len }
    }

    /// The memfd behind the mapping, for providers that pass it to a peer.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({} bytes)", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many as there are, and one more, are asked for: where nobody has set any aside, that is one.
    #[test]
    fn too_few_huge_pages_are_an_error_with_the_numbers_or_none_where_any_will_do() {
        for page in [HugePage::Mib2, HugePage::Gib1] {
            let needed = page.pool().map_or(0, |pool| pool.total) + 1;
            let bytes = needed * page.bytes();
            let options = MemoryOptions { pages: Pages::Huge(page), touch: None };
            let Err(Error::HugePages(shortage)) = Memory::with("test", bytes, &options) else {
                panic!("there are {needed} huge pages of {page}")
            };
            assert_eq!((shortage.page, shortage.needed), (page, needed));
            assert!(shortage.said.is_some(), "{shortage}");
            let text = Error::HugePages(shortage).to_string();
            assert!(text.contains(&format!("huge pages of {page}")), "{text}");
            let any = MemoryOptions { pages: Pages::Any, touch: None };
            if page == HugePage::Mib2 {
                assert!(!Memory::with("test", bytes, &any).unwrap().huge_pages());
            }
        }
    }

    #[test]
    fn copies_of_every_length_and_alignment() {
        let memory = Memory::new("test", 600).unwrap();
        let data: Vec<u8> = (0..256).map(|i| i as u8).collect();
        for len in 0..=256 {
            for shift in 0..9 {
                memory.write(0, &[0xee; 600]);
                memory.write(16 + shift, &data[..len]);
                let mut all = [0; 600];
                memory.read(0, &mut all);
                assert_eq!(&all[16 + shift..16 + shift + len], &data[..len], "{len} {shift}");
                assert!(all[..16 + shift].iter().chain(&all[16 + shift + len..]).all(|&b| b == 0xee));
            }
        }
    }

    #[test]
    fn words_are_the_bytes_they_lie_in() {
        let memory = Memory::new("test", 64).unwrap();
        memory.store(8, 0x0807_0605_0403_0201);
        let mut bytes = [0; 10];
        memory.read(7, &mut bytes);
        assert_eq!(bytes, [0, 1, 2, 3, 4, 5, 6, 7, 8, 0]);
        assert_eq!(memory.load(8), 0x0807_0605_0403_0201);
    }

    #[test]
    #[should_panic(expected = "outside a memory of 64 bytes")]
    fn a_read_past_the_end_is_a_bug() {
        Memory::new("test", 64).unwrap().read(60, &mut [0; 5]);
    }

    #[test]
    #[should_panic(expected = "outside a memory of 64 bytes")]
    fn an_offset_that_overflows_is_a_bug() {
        Memory::new("test", 64).unwrap().write(usize::MAX, &[0; 5]);
    }
}
