//! How a request executes wholly before the end of its connection is reported, or not at all.
//!
//! A request executes in the call that posts it, in the posting thread. The polling thread reports the end of the
//! connection, and after that nothing of the connection may change memory, nor may a post be refused that has done half its
//! work. So both use one word, which counts the requests:
//!
//! | the word | who makes it so | from |
//! |---|---|---|
//! | `n`: `n` requests have executed | the posting thread ([`finish`]; [`withdraw`]) | `n - 1 \| EXECUTING`; `n \| EXECUTING` |
//! | `n \| EXECUTING`: request `n` executes | the posting thread ([`begin`]), before it copies the first byte | `n` |
//! | `n \| SEALED`: no request will | the polling thread ([`seal`]), before it reports the end | `n` |
//!
//! `begin` and `seal` both replace `n`, so one of them fails. If `begin` does, the post is refused and has done nothing. If
//! `seal` does, the polling thread does not report the end yet; it asks again. A copy takes no longer than its bytes do.
//! While `EXECUTING` is set nobody but the posting thread changes the word, so that it may end with a plain store.

use std::sync::atomic::Ordering;

use crate::memory::atomic::Word;

const SEALED: u64 = 1 << 63;
const EXECUTING: u64 = 1 << 62;

/// Begins request `number`. `false`: the end has been reported, and nothing may happen. For the posting thread, which then
/// calls [`finish`] or [`withdraw`].
#[inline]
pub(super) fn begin(word: &impl Word, number: u64) -> bool {
    // SYNC POINT: acquires nothing that matters; it is ordered with `seal` because both change the same word.
    word.compare_exchange(number, number | EXECUTING, Ordering::Acquire, Ordering::Relaxed).is_ok()
}

/// Request `number` has executed.
#[inline]
pub(super) fn finish(word: &impl Word, number: u64) {
    // SYNC POINT: releases the outcome of the request, and what it copied, to `executed` and `seal`.
    word.store(number + 1, Ordering::Release);
}

/// Request `number` is refused after all. It has done nothing.
#[inline]
pub(super) fn withdraw(word: &impl Word, number: u64) {
    word.store(number, Ordering::Release);
}

/// Requests that have executed. For the polling thread.
#[inline]
pub(super) fn executed(word: &impl Word) -> u64 {
    // SYNC POINT: acquires what `finish` released.
    word.load(Ordering::Acquire) & !(SEALED | EXECUTING)
}

/// Whether no request will begin any more: the end is reported. For the posting thread.
#[inline]
pub(super) fn is_sealed(word: &impl Word) -> bool {
    word.load(Ordering::Relaxed) & SEALED != 0
}

/// Lets no request begin any more. `false`: one executes; ask again. For the polling thread.
pub(super) fn seal(word: &impl Word) -> bool {
    let seen = word.load(Ordering::Relaxed);
    // SYNC POINT: acquires what `finish` released.
    seen & EXECUTING == 0
        && word.compare_exchange(seen, seen | SEALED, Ordering::AcqRel, Ordering::Relaxed).is_ok()
}
