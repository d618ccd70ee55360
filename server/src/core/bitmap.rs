//! A set of images of a table: one bit for each image, and levels of bits above that show which words have
//! any bit set.
//!
//! A table may have 10^9 images, of which a batch changes ten. So the words of bits have *summaries*: one bit
//! for each word that is not zero. The words of a summary have a summary too, and so on, until one word is
//! left. The next image of a set is found in as many steps as there are levels (five for 2^30).
//!
//! | call | steps |
//! |---|---|
//! | `insert`, `contains` | one; as many as there are levels for the first of a word |
//! | `first`, `run` | one or two a level, and one for each word of the run |

use std::ops::Range;

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct Bitmap {
    len: u64,
    words: Vec<u64>,
    /// Summaries, the finest first. The last one has one word.
    above: Vec<Vec<u64>>,
}

impl Bitmap {
    /// The empty set of images below `len`.
    pub fn new(len: u64) -> Self {
        let words = |bits: usize| vec![0; bits.div_ceil(64)];
        let first = words(len as usize);
        let mut above = Vec::new();
        let mut finer = first.len();
        while finer > 1 {
            above.push(words(finer));
            finer = finer.div_ceil(64);
        }
        Self { len, words: first, above }
    }

    /// Bytes that a set of images below `len` takes.
    pub fn bytes(len: u64) -> usize {
        let mut bytes = 0;
        let mut bits = len;
        while bits > 1 {
            bits = bits.div_ceil(64);
            bytes += 8 * bits;
        }
        bytes.max(8) as usize
    }

    /// Adds an image.
    #[inline]
    pub fn insert(&mut self, image: u64) {
        let word = &mut self.words[(image / 64) as usize];
        let before = *word;
        *word |= 1 << (image % 64);
        if before == 0 {
            self.summarise(image / 64);
        }
    }

    /// Adds images.
    pub fn insert_range(&mut self, images: Range<u64>) {
        assert!(images.end <= self.len, "{images:?} of {} images", self.len);
        for (word, mask) in masks(images) {
            let before = self.words[word];
            self.words[word] |= mask;
            if before == 0 {
                self.summarise(word as u64);
            }
        }
    }

    /// Removes images.
    pub fn remove_range(&mut self, images: Range<u64>) {
        for (word, mask) in masks(images) {
            self.words[word] &= !mask;
            if self.words[word] == 0 {
                self.forget(word as u64);
            }
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.above.last().unwrap_or(&self.words).first().is_none_or(|top| *top == 0)
    }

    /// Whether an image is there.
    #[cfg(test)]
    pub fn contains(&self, image: u64) -> bool {
        self.words[(image / 64) as usize] >> (image % 64) & 1 == 1
    }

    /// The first image at or after `from`.
    pub fn first(&self, from: u64) -> Option<u64> {
        let levels = self.above.len();
        let mut at = from;
        // Up, until a word has a bit at or after `at`.
        for level in 0..=levels {
            let (word, bit) = ((at / 64) as usize, at % 64);
            let found = self.level(level).get(word).map_or(0, |bits| bits >> bit << bit);
            if found != 0 {
                return Some(self.descend(level, word, found));
            }
            at = at / 64 + 1;
        }
        None
    }

    /// From a word of a level, of which `bits` are looked at, down to the first image under it.
    fn descend(&self, level: usize, word: usize, bits: u64) -> u64 {
        let first = |word: usize, bits: u64| word as u64 * 64 + u64::from(bits.trailing_zeros());
        (0..level)
            .rev()
            .fold(first(word, bits), |at, level| first(at as usize, self.level(level)[at as usize]))
    }

    /// The first run of adjacent images at or after `from`, cut to `most`.
    pub fn run(&self, from: u64, most: u64) -> Option<Range<u64>> {
        let start = self.first(from)?;
        let limit = start.saturating_add(most).min(self.len);
        let mut end = start;
        while end < limit {
            let ones = (self.words[(end / 64) as usize] >> (end % 64)).trailing_ones();
            end += u64::from(ones);
            if ones == 0 || !end.is_multiple_of(64) {
                break;
            }
        }
        Some(start..end.min(limit))
    }

    fn level(&self, level: usize) -> &[u64] {
        level.checked_sub(1).map_or(&self.words, |above| &self.above[above])
    }

    /// `word` has its first bit.
    #[cold]
    fn summarise(&mut self, mut word: u64) {
        for level in &mut self.above {
            let bits = &mut level[(word / 64) as usize];
            let before = *bits;
            *bits |= 1 << (word % 64);
            if before != 0 {
                break;
            }
            word /= 64;
        }
    }

    /// `word` has lost its last bit, or had none.
    fn forget(&mut self, mut word: u64) {
        for level in &mut self.above {
            let bits = &mut level[(word / 64) as usize];
            *bits &= !(1 << (word % 64));
            if *bits != 0 {
                break;
            }
            word /= 64;
        }
    }
}

/// The words of a range of bits, and which of their bits are in it.
fn masks(range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let words = range.start / 64..range.end.div_ceil(64).max(range.start / 64);
    words.map(move |word| {
        let from = range.start.saturating_sub(word * 64);
        let to = (range.end - word * 64).min(64);
        let below = |bit: u64| if bit == 64 { !0 } else { (1u64 << bit) - 1 };
        (word as usize, below(to) & !below(from))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_large_set_is_searched_from_its_top() {
        let mut set = Bitmap::new(1 << 30);
        assert!(set.is_empty() && set.first(0).is_none());
        set.insert((1 << 30) - 1);
        set.insert(77);
        assert_eq!((set.first(0), set.first(78)), (Some(77), Some((1 << 30) - 1)));
        assert_eq!(set.run(78, 9), Some((1 << 30) - 1..1 << 30));
        set.remove_range(0..1 << 30);
        assert!(set.is_empty());
        assert!(Bitmap::bytes(1 << 30) < (1 << 27) + (1 << 22));
    }

    proptest! {
        #[test]
        fn it_is_a_set(len in 1u64..9000, steps in proptest::collection::vec((0u8..4, 0u64..9000, 1u64..200), 1..60)) {
            let mut set = Bitmap::new(len);
            let mut model = BTreeSet::new();
            for (step, at, many) in steps {
                let start = at % len;
                let range = start..(start + many).min(len);
                match step {
                    0 => { set.insert(start); model.insert(start); }
                    1 => { set.insert_range(range.clone()); model.extend(range); }
                    2 => { set.remove_range(range.clone()); model.retain(|image| !range.contains(image)); }
                    _ => {
                        prop_assert_eq!(set.first(start), model.range(start..).next().copied());
                        let run = set.run(start, many);
                        let first = model.range(start..).next().copied();
                        let length = first.map(|first| (first..).take(many as usize).take_while(|image| model.contains(image)).count());
                        prop_assert_eq!(run, first.map(|first| first..first + length.unwrap() as u64));
                    }
                }
                prop_assert_eq!(set.is_empty(), model.is_empty());
                prop_assert_eq!(set.contains(start), model.contains(&start));
            }
            let mut all = vec![];
            let mut from = 0;
            while let Some(run) = set.run(from, u64::MAX) { from = run.end; all.extend(run); }
            prop_assert_eq!(all, model.into_iter().collect::<Vec<_>>());
            set.remove_range(0..len);
            prop_assert!(set.is_empty() && set.words.iter().all(|word| *word == 0));
        }
    }
}
