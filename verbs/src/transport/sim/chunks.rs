//! Cutting a transfer into the cache lines that move each by itself.

use std::{collections::VecDeque, ops::Range};

use super::random::Random;
use crate::memory::Memory;

/// Bytes of a cache line: what moves whole is an aligned 8-byte word, but no more than a line moves at once.
const LINE: usize = 64;
const WORD: usize = 8;
/// Most chunks of one transfer: a longer one moves several neighbouring lines at once.
const MOST: usize = 64;

/// Some bytes of a memory.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) memory: Memory,
    pub(super) offset: usize,
    pub(super) length: usize,
}

/// Neighbouring lines of one piece, and where they are in the payload.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunk {
    pub(super) piece: usize,
    /// First byte in the memory of the piece.
    pub(super) offset: usize,
    /// First byte in the payload.
    pub(super) at: usize,
    pub(super) length: usize,
}

/// Cuts the pieces where a cache line ends in their memory. A piece that begins inside a word is cut inside words: those are
/// not whole.
pub(super) fn cut(pieces: &[Piece], random: &mut Random) -> Vec<Chunk> {
    let lines: usize = pieces.iter().map(|piece| piece.length.div_ceil(LINE)).sum();
    let group = lines.div_ceil(MOST).max(1) as u64;
    let mut chunks = Vec::with_capacity(lines.min(2 * MOST) + pieces.len());
    let mut at = 0;
    for (index, piece) in pieces.iter().enumerate() {
        let end = piece.offset + piece.length;
        let mut offset = piece.offset;
        let skew = piece.offset % WORD;
        while offset < end {
            let lines = if group == 1 { 1 } else { 1 + random.below(2 * group) as usize };
            let next = ((offset - skew) / LINE * LINE + lines * LINE + skew).min(end);
            chunks.push(Chunk { piece: index, offset, at, length: next - offset });
            at += next - offset;
            offset = next;
        }
    }
    chunks
}

/// A WRITE that has reached the peer's NIC, and of which some lines are not in its memory yet.
#[derive(Debug)]
pub(super) struct Landing {
    /// Number of the WRITE among the requests of its connection's end.
    pub(super) number: u64,
    pub(super) target: Piece,
    pub(super) data: Vec<u8>,
    pub(super) chunks: Vec<Chunk>,
    pub(super) landed: Vec<bool>,
    pub(super) left: usize,
}

impl Landing {
    pub(super) fn new(number: u64, target: Piece, data: Vec<u8>, random: &mut Random) -> Self {
        let chunks = cut(std::slice::from_ref(&target), random);
        let left = chunks.len();
        Self { number, target, data, landed: vec![false; left], chunks, left }
    }

    /// Forgets some of the lines: they never land.
    pub(super) fn tear(&mut self, random: &mut Random) {
        self.chunks.retain(|_| random.one_in(2));
        self.left = self.chunks.len();
        self.landed.truncate(self.left);
    }

    /// Whether it may share bytes with `other`.
    fn overlaps(&self, other: &Landing) -> bool {
        let (a, b) = (&self.target, &other.target);
        a.memory.same(&b.memory) && a.offset < b.offset + b.length && b.offset < a.offset + a.length
    }
}

/// Lets chunk `chunk` of `landings[index]` land, but for the bytes of it on which a WRITE posted later has
/// landed already: in the end, the one posted last wins.
pub(super) fn land(landings: &mut VecDeque<Landing>, index: usize, chunk: usize) {
    let landing = &landings[index];
    if landing.landed[chunk] {
        return;
    }
    let Chunk { offset, at, length, .. } = landing.chunks[chunk];
    let write = |range: Range<usize>| {
        let from = at + range.start - offset;
        landing.target.memory.write(range.start, &landing.data[from..from + range.len()]);
    };
    // What later WRITEs have put there, in the order of memory: the gaps between are written.
    let mut taken: Vec<Range<usize>> = landings
        .range(index + 1..)
        .filter(|later| later.overlaps(landing))
        .flat_map(|later| later.chunks.iter().zip(&later.landed).filter(|(_, landed)| **landed))
        .map(|(other, _)| other.offset..other.offset + other.length)
        .collect();
    taken.sort_unstable_by_key(|range| range.start);
    let (mut next, end) = (offset, offset + length);
    for range in taken {
        if range.start > next {
            write(next..range.start.min(end));
        }
        next = next.max(range.end).min(end);
    }
    write(next..end);
    let landing = &mut landings[index];
    landing.landed[chunk] = true;
    landing.left -= 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(memory: &Memory, offset: usize, length: usize) -> Piece {
        Piece { memory: memory.clone(), offset, length }
    }

    #[test]
    fn chunks_tile_the_pieces_and_end_where_lines_end() {
        let memory = Memory::new("test", 1 << 20).unwrap();
        let mut random = Random::new(1);
        for _ in 0..500 {
            let pieces: Vec<_> = (0..random.below(5))
                .map(|_| {
                    let offset = random.below(1 << 10) as usize;
                    let most = if random.one_in(10) { 1 << 19 } else { 300 };
                    piece(&memory, offset, random.below(most) as usize)
                })
                .collect();
            let chunks = cut(&pieces, &mut random);
            let mut at = 0;
            for (index, piece) in pieces.iter().enumerate() {
                let mut next = piece.offset;
                for chunk in chunks.iter().filter(|chunk| chunk.piece == index) {
                    assert_eq!((chunk.offset, chunk.at), (next, at));
                    assert!(chunk.length > 0);
                    next += chunk.length;
                    at += chunk.length;
                    assert!(
                        next % LINE == piece.offset % WORD || next == piece.offset + piece.length,
                        "cut within a line"
                    );
                }
                assert_eq!(next, piece.offset + piece.length);
            }
        }
    }

    #[test]
    fn in_whatever_order_lines_land_the_last_write_wins() {
        for seed in 0..300 {
            let memory = Memory::new("test", 600).unwrap();
            let mut random = Random::new(seed);
            let mut expected = vec![0; 600];
            let mut landings = VecDeque::new();
            for number in 0..6 {
                let offset = random.below(400) as usize;
                let length = random.below(200) as usize;
                let data = vec![number as u8 + 1; length];
                expected[offset..offset + length].copy_from_slice(&data);
                landings.push_back(Landing::new(number, piece(&memory, offset, length), data, &mut random));
            }
            let mut left: Vec<(usize, usize)> = landings
                .iter()
                .enumerate()
                .flat_map(|(index, landing)| (0..landing.chunks.len()).map(move |chunk| (index, chunk)))
                .collect();
            while !left.is_empty() {
                let (index, chunk) = left.swap_remove(random.below(left.len() as u64) as usize);
                land(&mut landings, index, chunk);
                // Twice is once.
                land(&mut landings, index, chunk);
            }
            let mut found = vec![0; 600];
            memory.read(0, &mut found);
            assert!(found == expected, "seed {seed}");
            assert!(landings.iter().all(|landing| landing.left == 0));
        }
    }
}
