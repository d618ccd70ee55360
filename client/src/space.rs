//! Space in the client's region, given out in pieces and taken back.

/// Pieces begin at multiples of this.
const ALIGN: usize = 64;

/// The free parts of a range, in order, none next to another.
#[derive(Debug)]
pub struct Space {
    free: Vec<(usize, usize)>,
}

impl Space {
    /// All bytes of `from..to` are free.
    pub fn new(from: usize, to: usize) -> Self {
        Self { free: vec![(from, to)] }
    }

    /// The most bytes that a piece can have.
    pub fn free(&self) -> usize {
        self.free.iter().map(|(from, to)| to - from).max().unwrap_or(0)
    }

    /// A piece of `bytes` bytes: the first one that fits.
    pub fn take(&mut self, bytes: usize) -> Option<usize> {
        let bytes = bytes.next_multiple_of(ALIGN);
        let at = self.free.iter().position(|(from, to)| to - from >= bytes)?;
        let from = self.free[at].0;
        self.free[at].0 += bytes;
        if self.free[at].0 == self.free[at].1 {
            self.free.remove(at);
        }
        Some(from)
    }

    /// Takes a piece back.
    pub fn give_back(&mut self, from: usize, bytes: usize) {
        let to = from + bytes.next_multiple_of(ALIGN);
        let at = self.free.partition_point(|part| part.0 < from);
        self.free.insert(at, (from, to));
        if at + 1 < self.free.len() && self.free[at].1 == self.free[at + 1].0 {
            self.free[at].1 = self.free.remove(at + 1).1;
        }
        if at > 0 && self.free[at - 1].1 == self.free[at].0 {
            self.free[at - 1].1 = self.free.remove(at).1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_whole_again() {
        let mut space = Space::new(4096, 8192);
        let pieces: Vec<_> = [100, 64, 1000].map(|bytes| (space.take(bytes).unwrap(), bytes)).into();
        assert_eq!(pieces[0].0, 4096);
        assert_eq!(pieces[1].0, 4096 + 128);
        assert!(space.take(4096).is_none());
        for order in [[0, 1, 2], [1, 0, 2], [2, 0, 1]] {
            let mut space = Space::new(0, 4096);
            let pieces: Vec<_> = [100, 64, 1000].map(|bytes| (space.take(bytes).unwrap(), bytes)).into();
            for piece in order {
                let (from, bytes) = pieces[piece];
                space.give_back(from, bytes);
            }
            assert_eq!(space.free, [(0, 4096)]);
        }
    }
}
