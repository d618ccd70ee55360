//! A sequence lock: how one writer changes bytes that readers copy at any time.
//!
//! The *lock* is an aligned word that holds the version of the bytes. It is odd while they are being changed.
//!
//! | | written by | read by |
//! |---|---|---|
//! | the lock | the writer: odd before it writes a byte, the new even version after the last | readers: before they copy, and after |
//! | the bytes | the writer, between the two | readers, at any time |
//!
//! A reader believes its copy if it saw the same even version before and after. Why that is right:
//! - *The copy holds nothing newer.* Suppose that it holds a byte of a later change. That byte was written after the
//!   writer's release fence, and read before the reader's acquire fence. So the two fences synchronise, and the
//!   reader's second look finds the odd word of that change, or something later.
//! - *The copy holds nothing older.* The reader's first look acquires the version that it found, and with it every byte
//!   that was written before.
//!
//! Versions never come back, so two equal looks mean that nothing was in between.

use std::sync::atomic::Ordering;

use super::atomic::Word;

/// Set in the lock while the bytes are being changed.
pub(crate) const BUSY: u64 = 1;

/// Changes the bytes by `change`, and gives them this version.
#[inline]
pub(crate) fn write<W: Word, X>(lock: &W, version: u64, change: impl FnOnce() -> X) -> X {
    let old = lock.load(Ordering::Relaxed);
    lock.store(old | BUSY, Ordering::Relaxed);
    // SYNC POINT: with the fence of `read`. Whoever reads a byte that is written from here on sees the odd word.
    W::fence(Ordering::Release);
    let result = change();
    // SYNC POINT: releases the bytes to the first look of `read`.
    lock.store(version, Ordering::Release);
    result
}

/// Copies the bytes by `copy`. Their version, if the copy is theirs alone. `look` loads the lock and acquires what
/// its writer released.
#[inline]
pub(crate) fn read<W: Word>(look: impl Fn() -> u64, copy: impl FnOnce()) -> Option<u64> {
    let version = look();
    if version & BUSY != 0 {
        return None;
    }
    copy();
    // SYNC POINT: with the fence of `write`.
    W::fence(Ordering::Acquire);
    (look() == version).then_some(version)
}
