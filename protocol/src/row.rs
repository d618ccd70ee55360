//! The image of a row: its form in a shard's memory, in a READ or a push, and in a mirror or a slot.
//!
//! ```text
//! byte 0      8        16           16 + data     stride (multiple of 16)
//! │ version   │ check  │ data ...   │ unused      │
//! ```
//!
//! | field | meaning |
//! |---|---|
//! | `version` | LSN of the last batch that changed the image (48 bits), a count that tells rewrites under one LSN apart (15), and whether its owner is rewriting it now (1) |
//! | `check` | proves that version and data belong together |
//!
//! The image holds nothing that depends on its reader: one image is right for everybody. The LSN tells a
//! reader which of its own batches a copy contains ([`inclusion`](crate::inclusion)). The rounds that it has
//! seen closed tell it as of which clock the copy is.
//!
//! **Blocks.** Rows of at most 32 bytes share an image, so that header and padding stay below half of the
//! data. Such a *block* has a power of two of adjacent rows, with at most 64 bytes of data together
//! ([`Layout`]). What is said of a row's image then holds for its block. The LSN is that of the last batch
//! that changed any row of the block.
//!
//! **Why a checksum.** One READ or WRITE delivers cache lines in any order, so a copy may mix two versions.
//! `check` is a 64-bit hash of the data and the version. So a mixture passes for a version once in 2^64
//! times. With 32 bits that would be once an hour at a million torn reads a second.
//!
//! The check is the exclusive or of three terms: a hash of the data, a hash of the version, and a constant of
//! the table. The constant makes the all-zero image valid. So a new table is zeroed memory, and costs nothing
//! to make.
//!
//! **Why a sequence lock too.** A client on the server's host reads the image in place. It loads `version`,
//! copies the image, and loads `version` again. The owner makes `version` odd before it changes the data, and
//! gives it a new even value after. So an unchanged, even version proves the copy without a hash. Images that
//! nobody copies over a network need no check at all.

use twox_hash::XxHash3_64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    limits::{BLOCK_BYTES, COUNT_BITS, IMAGE_ALIGN, ROW_HEADER},
    mutants::{Mutant, mutant},
};

/// How the rows of a table lie in a shard's memory, and in a mirror.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    row_bytes: usize,
    /// Rows of an image are `1 << shift`.
    shift: u32,
    stride: usize,
}

impl Layout {
    /// For rows of `row_bytes` bytes of data, at least one.
    pub const fn new(row_bytes: usize) -> Self {
        assert!(row_bytes > 0, "a row has at least one byte");
        let fit = BLOCK_BYTES / row_bytes;
        let shift = if fit > 1 { fit.ilog2() } else { 0 };
        let stride = (ROW_HEADER + (row_bytes << shift)).next_multiple_of(IMAGE_ALIGN);
        Self { row_bytes, shift, stride }
    }

    /// Bytes of data of a row.
    #[inline]
    pub const fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Bytes of data of an image.
    #[inline]
    pub const fn image_bytes(&self) -> usize {
        self.row_bytes << self.shift
    }

    /// Rows of an image: a power of two.
    #[inline]
    pub const fn rows_per_image(&self) -> u64 {
        1 << self.shift
    }

    /// Bytes from one image to the next.
    #[inline]
    pub const fn stride(&self) -> usize {
        self.stride
    }

    /// Images of `rows` rows.
    #[inline]
    pub const fn images(&self, rows: u64) -> u64 {
        rows.div_ceil(1 << self.shift)
    }

    /// The image of the `index`-th row.
    #[inline]
    pub const fn image(&self, index: u64) -> u64 {
        index >> self.shift
    }

    /// First byte of the `index`-th row within the data of its image.
    #[inline]
    pub const fn within(&self, index: u64) -> usize {
        (index & ((1 << self.shift) - 1)) as usize * self.row_bytes
    }

    /// First byte of an image, from the first image's.
    #[inline]
    pub const fn offset(&self, image: u64) -> usize {
        image as usize * self.stride
    }
}

/// First word of an image. See the module.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct Version(u64);

impl Version {
    /// Of the first rewrite at `lsn`.
    pub const fn new(lsn: u64) -> Self {
        assert!(lsn < 1 << (64 - COUNT_BITS - 1), "the LSN has outgrown its bits");
        Self(lsn << (COUNT_BITS + 1))
    }

    /// The version with these bits.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Its bits.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// LSN of the last batch that changed the image.
    #[inline]
    pub const fn lsn(self) -> u64 {
        self.0 >> (COUNT_BITS + 1)
    }

    /// Whether the image is being rewritten.
    #[inline]
    pub const fn is_busy(self) -> bool {
        self.0 & 1 == 1
    }

    /// The version after this one, of a rewrite at `lsn`. One batch may change an image more than once; the count goes round.
    #[inline]
    pub const fn next(self, lsn: u64) -> Self {
        let first = Self::new(lsn);
        if self.lsn() != lsn {
            return first;
        }
        Self(first.0 | (self.0 + 2) & ((2 << COUNT_BITS) - 2))
    }
}

/// The words before the data of an image. See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// Which version of the image it is.
    pub version: Version,
    /// Proves that version and data belong together.
    pub check: u64,
}

const _: () = assert!(size_of::<Header>() == ROW_HEADER);
const _: () = assert!(std::mem::offset_of!(Header, check) == 8);

/// A header that no image has: what a slot holds until the first push arrives.
pub const UNFILLED: Header = Header { version: Version(0), check: !0 };

/// Makes and verifies the checks of one table's images.
#[derive(Debug, Clone, Copy)]
pub struct Seal {
    /// Makes the check of the all-zero image zero.
    zero: u64,
}

impl Seal {
    /// For images of `image_bytes` bytes of data.
    pub fn new(image_bytes: usize) -> Self {
        Self { zero: XxHash3_64::oneshot(&vec![0; image_bytes]) ^ word(Version(0)) }
    }

    /// The check of `data` in this version.
    #[inline]
    pub fn check(&self, version: Version, data: &[u8]) -> u64 {
        XxHash3_64::oneshot(data) ^ word(version) ^ self.zero
    }

    /// Whether `header` and `data` are of one version.
    #[inline]
    pub fn verify(&self, header: &Header, data: &[u8]) -> bool {
        header.check == self.check(header.version, data)
            || mutant(Mutant::ChecksumIgnored) && header.check != UNFILLED.check
    }
}

/// A hash of a version that costs two multiplications: it only has to differ between versions in all its bits.
#[inline]
fn word(version: Version) -> u64 {
    let product = u128::from(version.0 ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93_u128;
    let folded = product as u64 ^ (product >> 64) as u64;
    folded.wrapping_mul(0xff51_afd7_ed55_8ccd) ^ folded >> 32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn zeroed_memory_is_a_valid_image_and_an_unfilled_slot_is_not() {
        for bytes in [4, 64, 100, 4096] {
            let seal = Seal::new(bytes);
            let zeros = vec![0; bytes];
            assert!(seal.verify(&Header::default(), &zeros));
            assert!(!seal.verify(&UNFILLED, &zeros));
        }
    }

    #[test]
    fn small_rows_share_an_image_and_headers_stay_below_half_of_the_data() {
        for row_bytes in 1..=4096 {
            let layout = Layout::new(row_bytes);
            let data = layout.image_bytes();
            assert!(
                layout.stride() >= ROW_HEADER + data && layout.stride() < ROW_HEADER + data + IMAGE_ALIGN
            );
            assert!(data <= BLOCK_BYTES || layout.rows_per_image() == 1);
            assert!(row_bytes < 4 || layout.stride() <= 2 * data, "{row_bytes}: {layout:?}");
        }
        let four = Layout::new(4);
        assert_eq!((four.rows_per_image(), four.stride(), four.images(17)), (16, 80, 2));
        assert_eq!((four.image(17), four.within(17), four.offset(1)), (1, 4, 80));
        assert_eq!((Layout::new(128).rows_per_image(), Layout::new(128).stride()), (1, 144));
    }

    #[test]
    fn versions_of_one_lsn_differ_and_are_even() {
        let first = Version::default().next(7);
        let second = first.next(7);
        assert_eq!((first.lsn(), second.lsn(), second.next(8)), (7, 7, Version::new(8)));
        assert!(first != second && !first.is_busy() && !second.is_busy());
        assert!(Version::from_bits(second.bits() | 1).is_busy());
    }

    proptest! {
        #[test]
        fn a_mixture_of_two_versions_is_refused(
            a in proptest::collection::vec(any::<u8>(), 200), b in proptest::collection::vec(any::<u8>(), 200),
            lsn in 1u64..1 << 40, lines in 0u32..16,
        ) {
            let seal = Seal::new(200);
            let image = |data: &[u8], lsn| {
                let version = Version::new(lsn);
                [Header { version, check: seal.check(version, data) }.as_bytes(), data].concat()
            };
            let (old, new) = (image(&a, lsn), image(&b, lsn + 1));
            let mut mixed = old.clone();
            for (i, byte) in mixed.iter_mut().enumerate() {
                if lines >> (i / 64) & 1 == 1 { *byte = new[i]; }
            }
            let (header, data) = Header::read_from_prefix(&mixed).unwrap();
            prop_assert_eq!(seal.verify(&header, data), mixed == old || mixed == new);
        }
    }
}
