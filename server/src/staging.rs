//! The memory that pushes are sent from.
//!
//! A push must read stable memory (invariant 5). The row itself is not stable: the next batch may change it
//! while the NIC still gathers. So a row is copied here once, for all its subscribers, and stays until the
//! last of their WRITEs has completed.
//!
//! Entries are freed in any order. A subscriber that is dying does not complete its WRITEs, for up to two
//! seconds. It holds up its own entries only, and no more of them than its quota.
//!
//! Entries are taken as near to the beginning as possible. So a few entries that stay long do not split the
//! free memory into pieces.
//!
//! | field | written | read | until |
//! |---|---|---|---|
//! | bytes of an entry | by the poller, between `reserve` and the first post | by the NIC | `uses` is 0 |
//! | `uses` | by the poller: one per posted WRITE, and one while it is being filled | | |

use fervor_verbs::{
    Error, Memory,
    transport::{Access, Transport},
};

/// Bytes of a chunk; entries are whole chunks.
const CHUNK: usize = 512;

/// A piece of the staging memory, by its first chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry(u32);

impl Entry {
    /// Byte offset in the region.
    pub fn offset(self) -> usize {
        self.0 as usize * CHUNK
    }
}

/// See the module.
#[derive(Debug)]
pub struct Staging<R> {
    region: R,
    /// Per first chunk of an entry: WRITEs that still read it.
    uses: Vec<u32>,
    /// Per first chunk of an entry: its chunks. Zero: the chunk is free, or inside an entry.
    chunks: Vec<u32>,
    /// Before this chunk all are taken.
    first: usize,
    /// Free chunks.
    free: usize,
}

impl<R> Staging<R> {
    /// `bytes` of memory, registered.
    pub fn new<T: Transport<Region = R>>(transport: &T, bytes: usize) -> Result<Self, Error> {
        let memory = Memory::new("fervor-staging", bytes)?;
        Ok(Self::with_region(transport.register(&memory, Access::Local)?, bytes / CHUNK))
    }

    fn with_region(region: R, count: usize) -> Self {
        Self { region, uses: vec![0; count], chunks: vec![0; count], first: 0, free: count }
    }

    /// The registered memory.
    pub fn region(&self) -> &R {
        &self.region
    }

    /// An entry of at least `bytes`, with one use. `None`: there is no room until some WRITEs complete.
    pub fn reserve(&mut self, bytes: usize) -> Option<Entry> {
        let need = bytes.div_ceil(CHUNK).max(1);
        if need > self.free {
            return None;
        }
        let start = self.find(need)?;
        self.chunks[start] = need as u32;
        self.uses[start] = 1;
        self.free -= need;
        if start == self.first {
            self.first += need;
        }
        Some(Entry(start as u32))
    }

    /// First of `need` free chunks in a row.
    fn find(&self, need: usize) -> Option<usize> {
        let (mut start, mut at) = (self.first, self.first);
        while at - start < need {
            match *self.chunks.get(at)? as usize {
                0 => at += 1,
                taken => {
                    at += taken;
                    start = at;
                }
            }
        }
        Some(start)
    }

    /// One more WRITE reads the entry.
    pub fn retain(&mut self, entry: Entry) {
        self.uses[entry.0 as usize] += 1;
    }

    /// One WRITE that read the entry has completed.
    pub fn release(&mut self, entry: Entry) {
        let first = entry.0 as usize;
        self.uses[first] = self.uses[first].checked_sub(1).expect("a release for each use");
        if self.uses[first] == 0 {
            self.free += std::mem::take(&mut self.chunks[first]) as usize;
            self.first = self.first.min(first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_never_overlap_and_all_memory_comes_back() {
        let mut staging = Staging::with_region((), 16);
        let mut live: Vec<(Entry, usize)> = vec![];
        let mut random = 1u32;
        for _ in 0..5000 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let chunks = 1 + (random >> 20) as usize % 5;
            if random >> 30 > 0 {
                let entry = staging.reserve(chunks * CHUNK);
                let taken: usize = live.iter().map(|l| l.1).sum();
                assert!(entry.is_none() || taken + chunks <= 16);
                live.extend(entry.map(|entry| (entry, chunks)));
            } else if !live.is_empty() {
                staging.release(live.swap_remove((random >> 8) as usize % live.len()).0);
            }
            for (i, a) in live.iter().enumerate() {
                for b in &live[..i] {
                    let (a0, b0) = (a.0.0 as usize, b.0.0 as usize);
                    assert!(a0 + a.1 <= b0 || b0 + b.1 <= a0, "{live:?}");
                }
                assert!(a.0.0 as usize + a.1 <= 16);
            }
        }
        for (entry, _) in live {
            staging.release(entry);
        }
        assert_eq!(staging.free, 16);
        assert_eq!(staging.first, 0);
        assert!(staging.reserve(16 * CHUNK).is_some());
    }

    #[test]
    fn an_entry_lives_until_its_last_use() {
        let mut staging = Staging::with_region((), 1);
        let entry = staging.reserve(1).unwrap();
        staging.retain(entry);
        staging.release(entry);
        assert!(staging.reserve(1).is_none());
        staging.release(entry);
        assert!(staging.reserve(1).is_some());
    }
}
