//! The gate through which a peer's WRITEs pass, so that they end when the connection does.
//!
//! The WRITEs of a connection are copies made by another process, which notices the end of the connection a
//! little later. Its owner closes the gate before it reports the end, so that memory can be used again from
//! then on, as with a NIC. (A READ that comes late harms nobody.)
//!
//! | word | written by | read by |
//! |---|---|---|
//! | `writing` | the writer: 1 before it looks at `shut`, 0 when it has copied (release) | the owner (acquire) |
//! | `shut` | the owner: 1, once | the writer |
//!
//! Each side writes its own word, passes a sequentially consistent fence, and reads the other's. So at least
//! one of them sees what the other wrote: the writer stays out, or the owner sees that it is inside. A writer
//! that was killed inside is never seen to leave; the owner waits for it no longer than for the last
//! messages.

use std::sync::atomic::Ordering;

use crate::memory::atomic::Word;

/// Whether the gate was open: then the writer is inside until it calls [`leave`].
#[inline]
pub(super) fn enter<W: Word>(writing: &W, shut: &W) -> bool {
    writing.store(1, Ordering::Relaxed);
    // SYNC POINT: with the fence of `close`.
    W::fence(Ordering::SeqCst);
    let open = shut.load(Ordering::Relaxed) == 0;
    if !open {
        leave(writing);
    }
    open
}

/// The writer has copied.
#[inline]
pub(super) fn leave(writing: &impl Word) {
    // SYNC POINT: releases what was written to `close`.
    writing.store(0, Ordering::Release);
}

/// Closes the gate; whether nobody is inside: then what was written is visible, and nothing more will be. To
/// be called again if not.
pub(super) fn close<W: Word>(writing: &W, shut: &W) -> bool {
    shut.store(1, Ordering::Relaxed);
    // SYNC POINT: with the fence of `enter`.
    W::fence(Ordering::SeqCst);
    // SYNC POINT: acquires what `leave` released.
    writing.load(Ordering::Acquire) == 0
}
