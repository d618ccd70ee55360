//! From the rows of a shard to small numbers: where a slab has a row's update.

/// Rows up to which there is a number for each: more are hashed, so that memory follows what is there, not the table.
const DIRECT: u64 = 1 << 18;
/// Places at first.
const FEWEST: usize = 64;
/// No row: never an index, since a table has at most 2^32 - 1 rows beyond the first.
const EMPTY: u64 = 0;

/// A map from rows of a shard to numbers that are not zero. What is not there has zero.
#[derive(Debug)]
pub enum RowIndex {
    /// Per row its number.
    Direct(Box<[u32]>),
    /// Open addressing with linear probing: `row + 1` and the number in one word, in a power of two of places.
    Hashed {
        /// See the variant.
        places: Vec<u64>,
        /// How many are taken.
        taken: usize,
    },
}

impl RowIndex {
    /// For the `rows` rows of a shard.
    pub fn new(rows: u64) -> Self {
        if rows <= DIRECT {
            // Zeroed memory: pages that no row touches cost nothing.
            return Self::Direct(vec![0; rows as usize].into());
        }
        Self::Hashed { places: vec![EMPTY; FEWEST], taken: 0 }
    }

    /// The number of `row`, or zero.
    #[inline]
    pub fn get(&self, row: u32) -> u32 {
        match self {
            Self::Direct(numbers) => numbers[row as usize],
            Self::Hashed { places, .. } => {
                let found = places[find(places, row)];
                if found == EMPTY { 0 } else { found as u32 }
            }
        }
    }

    /// Gives `row` a number, which is not zero.
    #[inline]
    pub fn set(&mut self, row: u32, number: u32) {
        debug_assert!(number != 0, "zero says that there is none");
        match self {
            Self::Direct(numbers) => numbers[row as usize] = number,
            Self::Hashed { places, taken } => {
                let place = find(places, row);
                *taken += usize::from(places[place] == EMPTY);
                places[place] = word(row, number);
                if *taken * 2 > places.len() {
                    grow(places);
                }
            }
        }
    }

    /// Takes all numbers back; `rows` are all that have one.
    pub fn clear(&mut self, rows: impl Iterator<Item = u32>) {
        match self {
            Self::Direct(numbers) => rows.for_each(|row| numbers[row as usize] = 0),
            Self::Hashed { places, taken } => {
                // What a single great clock needed is given back, and need not be cleared each time.
                if places.len() > FEWEST.max(8 * *taken) {
                    *places = vec![EMPTY; FEWEST];
                } else {
                    places.fill(EMPTY);
                }
                *taken = 0;
            }
        }
    }
}

/// `row + 1` above, the number below. The row of 2^32 - 1 wraps to zero above, and its number keeps the word from being empty.
fn word(row: u32, number: u32) -> u64 {
    u64::from(row.wrapping_add(1)) << 32 | u64::from(number)
}

/// Where `row` is, or would be: fewer than all places are taken.
#[inline]
fn find(places: &[u64], row: u32) -> usize {
    let mask = places.len() - 1;
    // Fibonacci hashing: the product's high bits depend on all bits of the row.
    let mut at = (u64::from(row).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize & mask;
    while places[at] != EMPTY && (places[at] >> 32) as u32 != row.wrapping_add(1) {
        at = (at + 1) & mask;
    }
    at
}

fn grow(places: &mut Vec<u64>) {
    let before = std::mem::take(places);
    places.resize(before.len() * 2, EMPTY);
    for found in before.into_iter().filter(|found| *found != EMPTY) {
        let at = find(places, ((found >> 32) as u32).wrapping_sub(1));
        places[at] = found;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn both_kinds_are_maps() {
        for rows in [1000, 1 << 32] {
            let mut index = RowIndex::new(rows);
            let mut model = BTreeMap::new();
            for round in 1..4u32 {
                for i in 0..500u32 {
                    let row = (i.wrapping_mul(2_654_435_761).wrapping_add(round) % 1000)
                        * if rows > 1000 { 4_294_967 } else { 1 };
                    index.set(row, i + round);
                    model.insert(row, i + round);
                }
                for i in 0..1000 {
                    let row = i * if rows > 1000 { 4_294_967 } else { 1 };
                    assert_eq!(index.get(row), model.get(&row).copied().unwrap_or(0), "{row}");
                }
                index.clear(model.keys().copied());
                model.clear();
                assert_eq!(index.get(1), 0);
            }
        }
        let mut index = RowIndex::new(1 << 32);
        index.set(u32::MAX, 7);
        assert_eq!((index.get(u32::MAX), index.get(0)), (7, 0));
    }
}
