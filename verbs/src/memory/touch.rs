//! Touching memory when it is made: in pieces, by several threads, each on a given processor set.
//!
//! A page exists from its first touch on. The kernel takes it from the NUMA node of the thread that touches it, clears it, and maps it. If
//! rows are touched for the first time by the polling thread, that thread pays for it, a fault for each page, and a machine
//! that has not enough memory kills the process in the middle of a job. So a server touches its rows before it begins.
//!
//! **Who touches what.** The threads take pieces in turn from a counter, so no piece has two of them, and a slow thread takes fewer. Each
//! runs on the processors that it is told: that, and no policy, is what places pages on a node. (A policy would need rights that
//! containers lack. One that the process was started with, as by `numactl`, goes before, and should.) Nobody else has the
//! memory yet.
//!
//! **How.** `MADV_POPULATE_WRITE` takes and maps the pages of a piece in one call, and turns what would be a SIGBUS into an error. Linux
//! before 5.14 lacks it. There the pages are taken by `fallocate`, for the same reason, and each is then written to.

use std::{
    fmt, io,
    num::NonZeroUsize,
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use memmap2::Advice;
use rustix::{
    fs::{FallocateFlags, fallocate},
    thread::{CpuSet, sched_setaffinity},
};

use super::{Memory, Shortage};
use crate::error::Error;

/// Bytes of a piece, or one huge page if that is more: some 10 ms of work.
const PIECE: usize = 32 << 20;
/// What is touched by hand is touched once in so many bytes: no page is smaller.
const SMALLEST_PAGE: usize = 4096;

/// How a memory is touched when it is made.
#[derive(Clone, Copy)]
pub struct Touch<'a> {
    /// How many threads do it.
    pub threads: NonZeroUsize,
    /// Processors that they run on: those of the NUMA node that the memory is to lie on. Empty: any.
    pub cores: &'a [usize],
    /// Is told of the bytes of each piece when it has been touched, by whichever thread.
    pub progress: &'a (dyn Fn(usize) + Sync),
}

impl fmt::Debug for Touch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Touch({} threads on {:?})", self.threads, self.cores)
    }
}

/// What takes the pages of a range.
type Populate = fn(&Memory, &Range<usize>) -> io::Result<()>;

impl Touch<'_> {
    /// Touches all of `memory`, which nobody but the caller has.
    pub(super) fn all_of(&self, memory: &Memory) -> Result<(), Error> {
        self.by(memory, populate)
    }

    fn by(&self, memory: &Memory, populate: Populate) -> Result<(), Error> {
        let whole = memory.0.map.len();
        let piece = PIECE.max(memory.huge_page().map_or(0, |page| page.bytes()));
        let next = AtomicUsize::new(0);
        let work = || {
            self.move_here()?;
            loop {
                let start = next.fetch_add(piece, Ordering::Relaxed);
                if start >= whole {
                    return Ok(());
                }
                let range = start..whole.min(start + piece);
                populate(memory, &range).map_err(|said| {
                    // The others need not go on.
                    next.store(whole, Ordering::Relaxed);
                    failed(memory, &range, said)
                })?;
                (self.progress)(range.len());
            }
        };
        let threads = self.threads.get().min(whole.div_ceil(piece));
        thread::scope(|scope| {
            let start = |number| {
                thread::Builder::new()
                    .name(format!("fervor-touch-{number}"))
                    .spawn_scoped(scope, work)
                    .map_err(Error::io(format!("starting thread `fervor-touch-{number}`")))
            };
            let threads: Vec<_> = (0..threads).map(start).collect();
            // All of them are waited for, and the first error counts.
            let ends: Vec<_> = threads.into_iter().map(|thread| thread.map(|t| t.join())).collect();
            ends.into_iter().try_for_each(|end| end?.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    }

    fn move_here(&self) -> Result<(), Error> {
        let cores: Vec<_> = self.cores.iter().filter(|core| **core < CpuSet::MAX_CPU).collect();
        if cores.is_empty() {
            return Ok(());
        }
        let mut set = CpuSet::new();
        cores.iter().for_each(|core| set.set(**core));
        sched_setaffinity(None, &set)
            .map_err(|e| Error::io(format!("moving a thread to processors {:?}", self.cores))(e.into()))
    }
}

fn failed(memory: &Memory, range: &Range<usize>, said: io::Error) -> Error {
    match memory.huge_page() {
        Some(page) => Error::HugePages(Shortage::met(page, memory.len(), said)),
        None => Error::System { call: format!("touching bytes {range:?} of {}", memory.len()), source: said },
    }
}

fn populate(memory: &Memory, range: &Range<usize>) -> io::Result<()> {
    match memory.0.map.advise_range(Advice::PopulateWrite, range.start, range.len()) {
        // The range is one of the mapping: so the kernel does not know the request.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => by_hand(memory, range),
        done => done,
    }
}

fn by_hand(memory: &Memory, range: &Range<usize>) -> io::Result<()> {
    fallocate(memory.as_fd(), FallocateFlags::empty(), range.start as u64, range.len() as u64)?;
    // The last huge page goes on beyond the memory.
    for at in (range.start..range.end.min(memory.len())).step_by(SMALLEST_PAGE) {
        memory.write(at, &[0]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use rustix::fs::fstat;

    use super::*;
    use crate::memory::{MemoryOptions, Pages};

    /// Bytes of the memory that are there.
    fn present(memory: &Memory) -> usize {
        fstat(memory.as_fd()).unwrap().st_blocks as usize * 512
    }

    fn ordinary(len: usize) -> Memory {
        let options = MemoryOptions { pages: Pages::Ordinary, touch: None };
        Memory::with("test", len, &options).unwrap()
    }

    #[test]
    fn each_page_is_there_and_each_byte_is_counted_once() {
        for (populate, name) in [(populate as Populate, "populate"), (by_hand, "by hand")] {
            // Three pieces, the last of which ends within a page.
            let len = 2 * PIECE + 5000;
            let memory = ordinary(len);
            assert_eq!(present(&memory), 0, "{name}");
            let counted = AtomicUsize::new(0);
            let progress = |bytes| {
                counted.fetch_add(bytes, Ordering::Relaxed);
            };
            let touch = Touch { threads: 4.try_into().unwrap(), cores: &[], progress: &progress };
            touch.by(&memory, populate).unwrap();
            assert_eq!((present(&memory), counted.into_inner()), (len.next_multiple_of(4096), len), "{name}");
            assert!([0, PIECE, len - 8].iter().all(|&at| memory.load(at / 8 * 8) == 0), "{name}");
        }
    }

    #[test]
    fn the_first_piece_that_fails_is_the_error() {
        let memory = ordinary(PIECE + 1);
        let refuse: Populate = |_, range| match range.start {
            0 => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
        };
        let touch = Touch { threads: 2.try_into().unwrap(), cores: &[], progress: &|_| () };
        let error = touch.by(&memory, refuse).unwrap_err().to_string();
        assert!(error.contains(&format!("touching bytes {PIECE}..{}", PIECE + 1)), "{error}");
    }

    #[test]
    fn threads_run_where_they_are_told() {
        let core = core_affinity::get_core_ids().unwrap().last().unwrap().id;
        let touch = |core: &[usize], populate| {
            let touch = Touch { threads: 2.try_into().unwrap(), cores: core, progress: &|_| () };
            touch.by(&ordinary(PIECE + 1), populate)
        };
        touch(&[core], |_, _| {
            assert_eq!(core_affinity::get_core_ids().unwrap().len(), 1);
            Ok(())
        })
        .unwrap();
        // No machine has that one.
        let last = CpuSet::MAX_CPU - 1;
        let error = touch(&[last], |_, _| Ok(())).unwrap_err().to_string();
        assert!(error.contains(&format!("to processors [{last}]")), "{error}");
    }
}
