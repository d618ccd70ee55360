//! Copies between the pieces of a list and the peer's memory, which lies in one piece.
//!
//! **A word moves once** (memory rule 1), also where it begins in one piece and ends in the next. To copy each piece by itself would move
//! such a word in two parts. So a part of a word is held back in a word of our own:
//!
//! - [`gather`]: the last bytes of a piece that fill no word of the peer's wait there for the first ones of the next piece.
//! - [`scatter`]: the peer's word that a piece ends in is read whole; the next piece begins with what is left of it.
//!
//! Most pieces end at a word of the peer's, and nothing is held back.

use crate::memory::copy::{from_shared, to_shared};

const WORD: usize = 8;

/// Copies the pieces to `target`, which is shared, one after the other.
///
/// # Safety
/// Each piece is readable for its length, and `target` writable for the sum of all; no piece overlaps it. Others may access both
/// meanwhile.
#[inline]
pub(super) unsafe fn gather(pieces: impl Iterator<Item = (*const u8, usize)>, mut target: *mut u8) {
    // The first `held` bytes belong at `target`: less than there are up to the end of its word.
    let (mut word, mut held) = ([0; WORD], 0);
    for (mut from, mut length) in pieces {
        if held > 0 {
            let missing = WORD - (target.addr() + held) % WORD;
            let count = missing.min(length);
            // SAFETY: `count` bytes of a piece that is as long; they fit behind those held, as no more than a word is held. The
            // pointer stays in the piece, or at its end.
            unsafe {
                from_shared(from, word[held..].as_mut_ptr(), count);
                from = from.add(count);
            }
            (held, length) = (held + count, length - count);
            if count < missing {
                continue;
            }
            // SAFETY: the bytes held are a part of the pieces so far, so `target` has room for them; see above for the pointer.
            unsafe {
                to_shared(word.as_ptr(), target, held);
                target = target.add(held);
            }
        }
        let part = ((target.addr() + length) % WORD).min(length);
        let whole = length - part;
        // SAFETY: the two parts of a piece; `target` has room for the first of them, by the sum of lengths. `word` has room for the
        // other one, which is less than a word.
        unsafe {
            to_shared(from, target, whole);
            target = target.add(whole);
            if part > 0 {
                from_shared(from.add(whole), word.as_mut_ptr(), part);
            }
        }
        held = part;
    }
    if held > 0 {
        // SAFETY: as above.
        unsafe { to_shared(word.as_ptr(), target, held) }
    }
}

/// Copies `total` bytes from `source`, which is shared, to the pieces, one after the other.
///
/// # Safety
/// As [`gather`], with source and target exchanged; `total` is the sum of all lengths.
#[inline]
pub(super) unsafe fn scatter(
    mut source: *const u8,
    mut total: usize,
    pieces: impl Iterator<Item = (*mut u8, usize)>,
) {
    // The last `left` bytes of the first `end` were read, and belong to the next piece. They are no part of `total`.
    let (mut word, mut end, mut left) = ([0; WORD], 0, 0);
    for (mut to, mut length) in pieces {
        if left > 0 {
            let count = left.min(length);
            // SAFETY: `count` bytes that were read; the piece is as long. The pointer stays in the piece, or at its end.
            unsafe {
                to_shared(word[end - left..].as_ptr(), to, count);
                to = to.add(count);
            }
            (left, length) = (left - count, length - count);
        }
        let part = ((source.addr() + length) % WORD).min(length);
        let whole = length - part;
        // SAFETY: `length` bytes of the piece are left to fill, and as many of the source are left to read: they are a part of `total`.
        unsafe {
            from_shared(source, to, whole);
            source = source.add(whole);
        }
        total -= whole;
        if part > 0 {
            // The word that it ends in, as far as it belongs to the list.
            end = (WORD - source.addr() % WORD).min(total);
            // SAFETY: `end` bytes of the source are left to read, and at most a word; `part` of them fit into the piece.
            unsafe {
                from_shared(source, word.as_mut_ptr(), end);
                to_shared(word.as_ptr(), to.add(whole), part);
                source = source.add(end);
            }
            total -= end;
            left = end - part;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A place in memory, at each distance from a word.
    fn place(bytes: &mut [u64; 40], skew: usize) -> *mut u8 {
        bytes.as_mut_ptr().cast::<u8>().wrapping_add(8 + skew)
    }

    proptest! {
        /// Whatever the lengths, all bytes go where they belong, and none beside.
        #[test]
        fn lists_are_copied_as_one(lengths in proptest::collection::vec(0..40_usize, 0..5), skew in 0..8_usize) {
            let total: usize = lengths.iter().sum();
            let data: Vec<u8> = (1..=total).map(|i| i as u8).collect();
            let starts = lengths.iter().scan(0, |at, length| Some(std::mem::replace(at, *at + length)));
            let list: Vec<(usize, usize)> = starts.zip(lengths.iter().copied()).collect();
            let mut shared = [u64::MAX; 40];
            let target = place(&mut shared, skew);
            // SAFETY: the pieces are parts of `data`; the target has 312 bytes less `skew`, and `total` is at most 160.
            unsafe { gather(list.iter().map(|&(at, length)| (data[at..].as_ptr(), length)), target) };
            let bytes: Vec<u8> = shared.iter().flat_map(|word| word.to_ne_bytes()).collect();
            prop_assert_eq!(&bytes[8 + skew..][..total], &data[..]);
            prop_assert!(bytes[..8 + skew].iter().chain(&bytes[8 + skew + total..]).all(|&byte| byte == 0xff));

            let mut back = vec![0xee; total + 1];
            let to = back.as_mut_ptr();
            // SAFETY: the pieces are parts of `back`, one after the other; the source is as above.
            unsafe {
                scatter(target, total, list.iter().map(|&(at, length)| (to.add(at), length)));
            }
            prop_assert_eq!(&back[..total], &data[..]);
            prop_assert_eq!(back[total], 0xee);
        }
    }
}
