//! The doorbell of an endpoint: which of its connections have something, and whether its thread sleeps.
//!
//! One page of words, mapped by the endpoint's process and by all its peers. Bit `s % 64` of leaf `s / 64`
//! says "connection `s` has something"; bit `g` of the summary says "a leaf of group `g` has a bit", so that a poll that
//! finds nothing is one load and one that finds something touches only what is ready. There are as many groups as the
//! summary has bits to spare, and leaf `l` is of group `l % 62`: up to 3,968 connections each group has one leaf, and for
//! each further 3,968 it has one more, in another *layer*. The owner looks at the layers that it has connections in; a
//! ringer need not know how many there are.
//!
//! | word | written by | read by |
//! |---|---|---|
//! | leaf | anyone with news sets a bit; the owner takes all (swap) | the owner |
//! | summary, group bits | anyone, after the leaf; the owner takes all, before the leaves | the owner |
//! | summary, `PARKED` | the owner, when all else is 0; cleared by whoever wakes it | anyone with news |
//! | summary, `NOTIFIED` | [`notify`]; the owner clears it | the owner |
//!
//! **No wake is lost,** because group bits and `PARKED` share one word and every change of it is a
//! read-modify-write: the owner parks only by replacing 0 with `PARKED`, so whoever sets a bit later sees
//! `PARKED`, clears it and wakes; whoever set one earlier keeps the owner from parking. The kernel compares
//! the upper half of the word, which holds `PARKED` and no group of the first 32, so clearing `PARKED` also
//! stops a sleep that has not quite begun.
//!
//! **A ringer may be killed between any two steps.** Its death is noticed by the process that owns the bell,
//! which then wakes without asking for `PARKED` ([`poke`]).
//!
//! Peers can write the page, so nothing here is trusted: a stray bit is a look in vain, and a peer that
//! clears the bits of others delays them: until the owner's next wait is over, or their next bell. It cannot keep anybody from
//! mapping the page ([`super::file`]).

use std::{
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rustix::thread::futex;

use super::mapping::{Mapping, Mappings, PAGE};
use crate::{error::Error, memory::atomic::Word};

/// The owner sleeps, or is about to.
pub(super) const PARKED: u64 = 1 << 63;
/// A wake was asked for that no connection explains.
const NOTIFIED: u64 = 1 << 62;
const GROUPS: u64 = NOTIFIED - 1;

const GROUP_COUNT: usize = GROUPS.count_ones() as usize;
/// Leaves of a group: what fits the page.
const LAYERS: usize = 8;
/// Connections that a layer serves, and all of them.
const LAYER_SLOTS: usize = GROUP_COUNT * 64;
pub(super) const SLOTS: usize = LAYERS * LAYER_SLOTS;

/// Layers of a bell for this many connections.
pub(super) fn layers(connections: usize) -> usize {
    connections.div_ceil(LAYER_SLOTS)
}

/// The leaf of a slot, and the bit of its group in the summary.
#[inline]
fn place(slot: u32) -> (usize, u64) {
    let leaf = slot as usize / 64;
    (leaf, 1 << (leaf % GROUP_COUNT))
}

/// The words of a bell, and how to sleep on it.
pub(super) trait Bell {
    type Word: Word;
    fn summary(&self) -> &Self::Word;
    fn leaf(&self, leaf: usize) -> &Self::Word;
    /// Sleeps while `PARKED` is set, at most for `timeout`; may return early.
    fn sleep(&self, timeout: Duration);
    /// Ends a present sleep.
    fn wake(&self);
}

/// Tells the owner that connection `slot` has something, which the caller has written before.
#[inline]
pub(super) fn ring(bell: &impl Bell, slot: u32) {
    let (leaf, group) = place(slot);
    // SYNC POINT: releases the news to `take`.
    bell.leaf(leaf).fetch_or(1 << (slot % 64), Ordering::AcqRel);
    // The group bit is already set: then the owner's next look at the leaf is still to come. (Had that look
    // been before our `fetch_or`, we would have acquired it, and with it the clearing of the group bit
    // before.) If the owner is parked all the same, whoever set the bit is about to wake it; or was killed,
    // so we do.
    let seen = bell.summary().load(Ordering::Relaxed);
    if seen & group != 0 && seen & PARKED == 0 {
        return;
    }
    if bell.summary().fetch_or(group, Ordering::AcqRel) & PARKED != 0 {
        unpark(bell);
    }
}

/// As [`ring`], but wakes the owner even if somebody else seems to have done so.
pub(super) fn poke(bell: &impl Bell, slot: u32) {
    let (leaf, group) = place(slot);
    bell.leaf(leaf).fetch_or(1 << (slot % 64), Ordering::AcqRel);
    bell.summary().fetch_or(group, Ordering::AcqRel);
    unpark(bell);
}

/// Ends a present or the next wait of the owner.
pub(super) fn notify(bell: &impl Bell) {
    if bell.summary().fetch_or(NOTIFIED, Ordering::AcqRel) & PARKED != 0 {
        unpark(bell);
    }
}

fn unpark(bell: &impl Bell) {
    bell.summary().fetch_and(!PARKED, Ordering::AcqRel);
    bell.wake();
}

/// Hands all slots of the first `layers` layers that have something to `each`, at most once each; returns whether
/// [`notify`] was called. For the owner.
#[inline]
pub(super) fn take(bell: &impl Bell, layers: usize, mut each: impl FnMut(u32)) -> bool {
    if bell.summary().load(Ordering::Relaxed) == 0 {
        return false;
    }
    // SYNC POINT: acquires what `ring` released.
    let seen = bell.summary().swap(0, Ordering::AcqRel);
    let mut groups = seen & GROUPS;
    while groups != 0 {
        let group = groups.trailing_zeros() as usize;
        groups &= groups - 1;
        for leaf in (0..layers).map(|layer| layer * GROUP_COUNT + group) {
            // Also where it finds nothing it is a swap: see `ring`.
            let mut slots = bell.leaf(leaf).swap(0, Ordering::AcqRel);
            while slots != 0 {
                each(leaf as u32 * 64 + slots.trailing_zeros());
                slots &= slots - 1;
            }
        }
    }
    seen & NOTIFIED != 0
}

/// Sleeps until a bit is set, [`notify`] is called, or `timeout` is over. For the owner, when it has nothing
/// to do.
pub(super) fn wait(bell: &impl Bell, timeout: Duration) {
    if bell.summary().compare_exchange(0, PARKED, Ordering::AcqRel, Ordering::Acquire).is_ok() {
        bell.sleep(timeout);
    }
    bell.summary().fetch_and(!(PARKED | NOTIFIED), Ordering::AcqRel);
}

const SUMMARY: usize = 0;
// Two cache lines apart: processors fetch lines in pairs.
const LEAVES: usize = 128;
const _: () = assert!(LEAVES + SLOTS / 8 <= PAGE);

/// A bell in shared memory.
#[derive(Debug, Clone)]
pub(super) struct Page(Arc<Mapping>);

impl Page {
    /// A new one, and the file to pass to peers.
    pub(super) fn create() -> Result<(Self, OwnedFd), Error> {
        let (file, fd) = Mapping::create("fervor-doorbell", PAGE)?;
        Ok((Self(file), fd))
    }

    /// A peer's. The connections of this process to one endpoint share it.
    pub(super) fn open(mappings: &Mappings, fd: &OwnedFd) -> Result<Self, Error> {
        mappings.open(fd, PAGE, true).map(Self)
    }
}

impl Bell for Page {
    type Word = std::sync::atomic::AtomicU64;

    #[inline]
    fn summary(&self) -> &Self::Word {
        self.0.word(SUMMARY)
    }

    #[inline]
    fn leaf(&self, leaf: usize) -> &Self::Word {
        self.0.word(LEAVES + 8 * leaf)
    }

    fn sleep(&self, timeout: Duration) {
        let timeout = futex::Timespec::try_from(timeout).ok();
        // An early return, of whatever cause (a signal, a change of the word), is allowed.
        let _ = futex::wait(
            self.0.upper_half(SUMMARY),
            futex::Flags::empty(),
            (PARKED >> 32) as u32,
            timeout.as_ref(),
        );
    }

    fn wake(&self) {
        // Fails for no mapped word.
        let _ = futex::wake(self.0.upper_half(SUMMARY), futex::Flags::empty(), 1);
    }
}
