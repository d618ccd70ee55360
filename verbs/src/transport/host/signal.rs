//! An event count for the threads of one process.
//!
//! ```text
//! waiter:    lock; waiters += 1;  while epoch == seen { sleep }  waiters -= 1; unlock
//! announcer: epoch += 1;  if waiters > 0 { lock; unlock; wake all }
//! ```
//!
//! Both sides write one counter and then read the other, all sequentially consistent, so at least one of them
//! sees the other: either the waiter sees the new epoch and does not sleep, or the announcer sees a waiter.
//! It then takes the lock, which a waiter gives up only by falling asleep or by leaving, so the wake is not
//! lost between the waiter's look at the epoch and its sleep.

use std::{
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::transport::Signal;

#[derive(Debug, Default)]
struct Shared {
    epoch: AtomicU64,
    waiters: AtomicUsize,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, ()> {
        // The lock guards no data that a panic could leave half done.
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The event count of a real host. Clones are the same event count.
#[derive(Debug, Clone, Default)]
pub struct HostSignal(Arc<Shared>);

impl HostSignal {
    /// A new event count, at epoch 0.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Signal for HostSignal {
    fn epoch(&self) -> u64 {
        self.0.epoch.load(Ordering::SeqCst)
    }

    fn wait(&self, seen: u64, timeout: Duration) {
        if self.epoch() != seen {
            return;
        }
        let deadline = Instant::now().checked_add(timeout);
        let mut guard = self.0.lock();
        self.0.waiters.fetch_add(1, Ordering::SeqCst);
        while self.epoch() == seen {
            let left = deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                break;
            }
            guard = self.0.changed.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        self.0.waiters.fetch_sub(1, Ordering::SeqCst);
    }

    fn notify(&self) {
        self.0.epoch.fetch_add(1, Ordering::SeqCst);
        if self.0.waiters.load(Ordering::SeqCst) > 0 {
            drop(self.0.lock());
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_past_notification_does_not_wait() {
        let signal = HostSignal::new();
        let seen = signal.epoch();
        signal.clone().notify();
        assert_ne!(signal.epoch(), seen);
        signal.wait(seen, Duration::MAX);
    }

    #[test]
    fn a_wait_ends_when_its_time_is_over() {
        let signal = HostSignal::new();
        signal.wait(signal.epoch(), Duration::from_millis(5));
        assert_eq!(signal.epoch(), 0);
    }

    #[test]
    fn no_notification_is_lost() {
        const ROUNDS: u64 = 20_000;
        let (ping, pong) = (HostSignal::new(), HostSignal::new());
        let (ping2, pong2) = (ping.clone(), pong.clone());
        let other = std::thread::spawn(move || {
            for round in 0..ROUNDS {
                // A lost wake would leave both sides waiting for ever.
                while ping2.epoch() == round {
                    ping2.wait(round, Duration::MAX);
                }
                pong2.notify();
            }
        });
        for round in 0..ROUNDS {
            ping.notify();
            while pong.epoch() == round {
                pong.wait(round, Duration::MAX);
            }
        }
        other.join().unwrap();
        assert_eq!((ping.epoch(), pong.epoch()), (ROUNDS, ROUNDS));
    }
}
