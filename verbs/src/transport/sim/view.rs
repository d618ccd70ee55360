//! Views between nodes of one host: the peer's memory, read word by word while others run.
//!
//! The contract promises whole words and the order of what was published, and no more. So a copy reads its words in
//! any order, and now and then the scheduler runs other threads between two of them: what they write meanwhile is in a part
//! of the copy. Most copies are of one moment, since each time another thread runs costs a switch of threads; how
//! many are not, the seed says (`Temper::torn_view`). A load, too, may let others run before it looks.
//!
//! A read goes through the memory that was registered; for exported memory that is a mapping of its own.
//!
//! In a simulation of time nobody else runs meanwhile, and a call costs what its bytes cost to copy.

use super::{node::Node, random::Random, threads::Wait, world::World};
use crate::{
    memory::Memory,
    transport::{self, Access, RemoteRegion},
};

/// What a call costs, ns; and how many bytes are copied in one.
const CALL: u64 = 20;
const BYTES_PER_NS: u64 = 16;
/// Most times that other threads run within one copy.
const MOST_BREAKS: u64 = 3;
/// Most parts that a copy is read in; of a long one they are several words.
const MOST_PARTS: usize = 512;
const WORD: usize = 8;

/// A peer's memory as a node of its host sees it.
#[derive(Debug, Clone)]
pub struct View {
    node: Node,
    memory: Memory,
    offset: usize,
    len: usize,
}

impl Node {
    /// Of `region`, as the peer of this side of the connection told of it.
    pub(super) fn view(&self, link: usize, side: u8, region: RemoteRegion) -> Option<View> {
        let mut world = self.shared.lock();
        world.call(1_000);
        let peer = &world.links[link].ends[1 - side as usize];
        let (node, horizon) = (peer.node, peer.horizon);
        if world.nodes[node].host != world.nodes[self.index].host {
            return None;
        }
        let len = usize::try_from(region.length).ok()?;
        let piece = world.locate(node, horizon, region.at(0), len, Access::RemoteRead)?;
        Some(View { node: self.clone(), memory: piece.memory, offset: piece.offset, len })
    }
}

impl View {
    /// Where bytes `offset..offset + len` are in the memory.
    fn at(&self, offset: usize, len: usize) -> usize {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "bytes {offset}..{} are outside a view of {} bytes",
            offset.saturating_add(len),
            self.len
        );
        self.offset + offset
    }

    /// Pays for a call that reads `len` bytes; how often others are to run meanwhile.
    fn pay(&self, len: usize, most_breaks: u64) -> u64 {
        let mut world = self.node.shared.lock();
        world.call(CALL + len as u64 / BYTES_PER_NS);
        if world.traffic.is_some() || most_breaks == 0 {
            return 0;
        }
        let World { random, temper, .. } = &mut *world;
        if random.one_in(temper.torn_view) { 1 + random.below(most_breaks) } else { 0 }
    }

    /// Lets others run.
    fn pause(&self) {
        let mut world = self.node.shared.lock();
        let delay = world.thread_delay(2_000);
        self.node.shared.block(world, Wait::View, Some(delay));
    }
}

impl transport::View for View {
    fn len(&self) -> usize {
        self.len
    }

    fn load(&self, offset: usize) -> u64 {
        let at = self.at(offset, WORD);
        if self.pay(WORD, 1) > 0 {
            self.pause();
        }
        self.memory.load(at)
    }

    fn copy(&self, offset: usize, into: &mut [u8]) {
        let at = self.at(offset, into.len());
        let breaks = self.pay(into.len(), MOST_BREAKS);
        if breaks == 0 {
            return self.memory.read(at, into);
        }
        let mut random = Random::new(self.node.shared.lock().random.next());
        let mut parts = parts(at, into.len());
        for last in (1..parts.len()).rev() {
            parts.swap(last, random.below(last as u64 + 1) as usize);
        }
        // Before the first of them, between two, or behind the last.
        let places: Vec<_> = (0..breaks).map(|_| random.below(parts.len() as u64 + 1) as usize).collect();
        for number in 0..=parts.len() {
            (0..places.iter().filter(|&&place| place == number).count()).for_each(|_| self.pause());
            let Some(&(start, end)) = parts.get(number) else { break };
            self.memory.read(start, &mut into[start - at..end - at]);
        }
    }
}

/// Bytes `at..at + len` of a memory, cut where words end.
fn parts(at: usize, len: usize) -> Vec<(usize, usize)> {
    let words = len.div_ceil(WORD) + 1;
    let step = words.div_ceil(MOST_PARTS) * WORD;
    let mut parts = Vec::with_capacity(len / step + 2);
    let mut start = at;
    while start < at + len {
        let end = ((start / WORD * WORD) + step).min(at + len);
        parts.push((start, end));
        start = end;
    }
    parts
}
