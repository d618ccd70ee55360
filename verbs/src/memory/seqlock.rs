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

#[cfg(all(test, loom))]
mod loom_tests {
    use std::cell::Cell;

    use loom::{
        model::Builder,
        sync::{Arc, atomic::AtomicU64},
        thread,
    };

    use super::*;

    /// What the lock guards: words, written and read without an order of their own, as the bytes of an image are.
    #[derive(Default)]
    struct Image {
        lock: AtomicU64,
        data: [AtomicU64; 2],
    }

    impl Image {
        fn rewrite(&self, version: u64) {
            write(&self.lock, version, || {
                self.data.iter().for_each(|word| word.store(version, Ordering::Relaxed));
            });
        }

        /// The version and the words of a copy, made from this word on.
        fn snapshot(&self, first: usize) -> Option<(u64, [u64; 2])> {
            let copy = Cell::new([0; 2]);
            let look = || self.lock.load(Ordering::Acquire);
            let version = read::<AtomicU64>(look, || {
                let mut words = [0; 2];
                for at in [first, 1 - first] {
                    words[at] = self.data[at].load(Ordering::Relaxed);
                }
                copy.set(words);
            });
            version.map(|version| (version, copy.get()))
        }
    }

    /// A reader copies twice, in the order of the words or against it, while the owner rewrites twice.
    fn snapshots_are_of_one_version(first: usize) {
        let mut builder = Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(move || {
            let image = Arc::new(Image::default());
            let owner = thread::spawn({
                let image = image.clone();
                move || [2, 4].into_iter().for_each(|version| image.rewrite(version))
            });
            let mut last = 0;
            for _ in 0..2 {
                if let Some((version, data)) = image.snapshot(first) {
                    assert_eq!(data, [version; 2], "a mixture");
                    assert!(version % 2 == 0 && version >= last, "{version} after {last}");
                    last = version;
                }
            }
            owner.join().unwrap();
            assert_eq!(image.snapshot(first), Some((4, [4; 2])));
        });
    }

    #[test]
    fn loom_snapshots_are_of_one_version() {
        snapshots_are_of_one_version(0);
        snapshots_are_of_one_version(1);
    }

    /// Whoever has a copy of a version sees what the owner wrote before it: what it announced, say.
    #[test]
    fn loom_what_comes_before_a_version_is_seen_with_it() {
        loom::model(|| {
            let both = Arc::new((AtomicU64::new(0), Image::default()));
            let owner = thread::spawn({
                let both = both.clone();
                move || {
                    both.0.store(7, Ordering::Relaxed);
                    both.1.rewrite(2);
                }
            });
            if both.1.snapshot(0).is_some_and(|(version, _)| version == 2) {
                assert_eq!(both.0.load(Ordering::Relaxed), 7);
            }
            owner.join().unwrap();
        });
    }
}
