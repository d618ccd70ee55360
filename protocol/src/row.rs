//! The image of a row: what lies in a shard's memory, travels in a READ or a push, and lies in a slot.
//!
//! ```text
//! byte 0        8          16       24       32            32 + row bytes     stride (multiple of 64)
//! │ lsn         │ included │ clock  │ check  │ data ...    │ unused           │
//! ```
//!
//! | field | in a shard | in a slot |
//! |---|---|---|
//! | `lsn` | LSN of the last batch that changed the row | of the copy |
//! | `included` | 0 | the copy contains the reader's own batches up to this number, and none after |
//! | `clock` | 0 | the copy contains every update stamped below this clock |
//! | `check` | proves that all of it belongs together | likewise |
//!
//! **Why a checksum.** One READ or WRITE delivers cache lines in any order, so a copy may mix two versions. `check`
//! is a 64-bit hash of the data and the three words before it, so a mixture is taken for a version once in
//! 2^64 times; a 32-bit one would be once an hour at a million torn reads a second. It is a sum (exclusive or) of a hash of the
//! data, a hash of the words, and a constant of the table that makes the all-zero image valid: a new table
//! is zeroed memory and costs nothing to make; and the server makes the header of a push from that of the row
//! without hashing the data again ([`Seal::reseal`]).

use xxhash_rust::xxh3::xxh3_64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    limits::{ROW_ALIGN, ROW_HEADER},
    mutants::{Mutant, mutant},
};

/// Bytes from one row to the next, for rows of `row_bytes` bytes of data.
pub const fn stride(row_bytes: usize) -> usize {
    (ROW_HEADER + row_bytes).next_multiple_of(ROW_ALIGN)
}

/// The words before the data of a row. See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// LSN of the last batch that changed the row.
    pub lsn: u64,
    /// Number of the reader's last batch that the copy contains.
    pub included: u64,
    /// Every update stamped below this clock is in the copy.
    pub clock: u64,
    /// Proves that header and data belong together.
    pub check: u64,
}

const _: () = assert!(size_of::<Header>() == ROW_HEADER);
const _: () = assert!(std::mem::offset_of!(Header, check) == 24);

/// A check that no image has: what a slot holds until the first push arrives.
pub const UNFILLED: Header = Header { lsn: 0, included: 0, clock: 0, check: !0 };

/// Makes and verifies the checks of one table's rows.
#[derive(Debug, Clone, Copy)]
pub struct Seal {
    /// Makes the check of the all-zero image zero.
    zero: u64,
}

impl Seal {
    /// For rows of `row_bytes` bytes of data.
    pub fn new(row_bytes: usize) -> Self {
        Self { zero: xxh3_64(&vec![0; row_bytes]) ^ words(0, 0, 0) }
    }

    /// The header for `data`.
    pub fn seal(&self, data: &[u8], lsn: u64, included: u64, clock: u64) -> Header {
        let check = xxh3_64(data) ^ words(lsn, included, clock) ^ self.zero;
        Header { lsn, included, clock, check }
    }

    /// `header` with another `included` and `clock`, for the same data.
    pub fn reseal(&self, header: Header, included: u64, clock: u64) -> Header {
        let check = header.check
            ^ words(header.lsn, header.included, header.clock)
            ^ words(header.lsn, included, clock);
        Header { lsn: header.lsn, included, clock, check }
    }

    /// Whether `header` and `data` are of one version.
    #[inline]
    pub fn verify(&self, header: &Header, data: &[u8]) -> bool {
        header.check == xxh3_64(data) ^ words(header.lsn, header.included, header.clock) ^ self.zero
            || mutant(Mutant::ChecksumIgnored) && header.check != UNFILLED.check
    }
}

fn words(lsn: u64, included: u64, clock: u64) -> u64 {
    xxh3_64([lsn, included, clock].as_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn zeroed_memory_is_a_valid_row_and_an_unfilled_slot_is_not() {
        for bytes in [4, 64, 100, 4096] {
            let seal = Seal::new(bytes);
            let zeros = vec![0; bytes];
            assert!(seal.verify(&Header::default(), &zeros));
            assert!(!seal.verify(&UNFILLED, &zeros));
            assert_eq!(seal.seal(&zeros, 0, 0, 0), Header::default());
        }
    }

    #[test]
    fn a_stride_is_whole_cache_lines() {
        assert_eq!([1, 32, 33, 96, 97].map(stride), [64, 64, 128, 128, 192]);
    }

    proptest! {
        #[test]
        fn a_mixture_of_two_versions_is_refused(
            a in proptest::collection::vec(any::<u8>(), 200), b in proptest::collection::vec(any::<u8>(), 200),
            lsn in 1u64..1 << 40, lines in 0u32..16,
        ) {
            let seal = Seal::new(200);
            let image = |data: &[u8], lsn| [seal.seal(data, lsn, 3, 4).as_bytes(), data].concat();
            let (old, new) = (image(&a, lsn), image(&b, lsn + 1));
            let mut mixed = old.clone();
            for (i, byte) in mixed.iter_mut().enumerate() {
                if lines >> (i / 64) & 1 == 1 { *byte = new[i]; }
            }
            let header = Header::read_from_bytes(&mixed[..32]).unwrap();
            prop_assert_eq!(seal.verify(&header, &mixed[32..]), mixed == old || mixed == new);
        }

        #[test]
        fn resealing_is_sealing(data in proptest::collection::vec(any::<u8>(), 1..300), lsn: u64, n: u64, c: u64) {
            let seal = Seal::new(data.len());
            prop_assert_eq!(seal.reseal(seal.seal(&data, lsn, 0, 0), n, c), seal.seal(&data, lsn, n, c));
        }
    }
}
