//! A hash for row numbers: they are small and trusted, so one multiplication is enough.

use std::hash::{BuildHasherDefault, Hasher};

/// A map from row numbers. Never iterated over: its order means nothing.
pub type RowMap<V> = std::collections::HashMap<u64, V, BuildHasherDefault<RowHasher>>;

/// Fibonacci hashing: the product's high bits, which the map takes its tags from, depend on all bits.
#[derive(Debug, Default, Clone, Copy)]
pub struct RowHasher(u64);

impl Hasher for RowHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("row numbers are written as u64");
    }

    fn write_u64(&mut self, row: u64) {
        let product = u128::from(row) * 0x9e37_79b9_7f4a_7c15;
        self.0 = product as u64 ^ (product >> 64) as u64;
    }
}
