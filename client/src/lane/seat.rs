//! A worker's seat in a lane: what others have polled for it, and what the last worker left there.

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

use fervor_verbs::transport::Transport;

use crate::lock::lock;

/// One worker's part of a lane: the places that its READs go to.
#[repr(align(128))]
pub struct Seat<T: Transport> {
    pub(super) number: usize,
    /// A bit for each place of which the READ has completed, for the worker to take.
    landed: Box<[AtomicU64]>,
    /// What the last worker left, when nobody sits here.
    left: Mutex<Option<Left<T>>>,
}

/// What a worker leaves behind.
pub struct Left<T: Transport> {
    /// Its memory, and the bytes of a place.
    pub scratch: (T::Region, usize),
    /// READs that had not completed.
    pub in_flight: usize,
}

impl<T: Transport> Seat<T> {
    pub(super) fn new(number: usize, places: usize) -> Self {
        let landed = (0..places.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { number, landed, left: Mutex::new(None) }
    }

    /// A READ to `place` has completed, as who sets this has polled.
    pub(super) fn land(&self, place: usize) {
        // SYNC POINT: releases what the poller acquired, the data of the READ, to `take`.
        self.landed[place / 64].fetch_or(1 << (place % 64), Ordering::Release);
    }

    /// Whether others polled something for this seat.
    pub fn has_landed(&self) -> bool {
        self.landed.iter().any(|word| word.load(Ordering::Acquire) != 0)
    }

    /// Takes what others polled for this seat; `each` is told the places. How many.
    #[inline]
    pub fn take(&self, mut each: impl FnMut(usize)) -> usize {
        let mut count = 0;
        for (number, word) in self.landed.iter().enumerate() {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            // SYNC POINT: acquires what `land` released.
            let mut bits = word.swap(0, Ordering::Acquire);
            while bits != 0 {
                each(number * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
                count += 1;
            }
        }
        count
    }

    /// What the last worker left, for the next one, if nothing of it is in flight any more. Somebody sits here from then on.
    pub(super) fn inherit(&self) -> Option<Left<T>> {
        lock(&self.left).take_if(|left| {
            left.in_flight -= self.take(|_| ());
            left.in_flight == 0
        })
    }

    /// The worker goes.
    pub fn leave(&self, left: Left<T>) {
        *lock(&self.left) = Some(left);
    }
}
