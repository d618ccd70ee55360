//! What code that runs on a transport needs of the machine besides: time, waiting, threads, random numbers. In a simulation they are
//! simulated, too, so that code which takes them from here, and from nowhere else, runs there unchanged.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use crate::error::Error;

/// Time, waiting, threads and random numbers.
pub trait Runtime {
    /// An event count for threads of this process.
    type Signal: Signal;
    /// A running thread.
    type Thread: Thread;

    /// Turns of [`Runtime::relax`] after which a thread that still finds nothing had better sleep: before that, being
    /// woken would cost more than it saves.
    const AWAKE_TURNS: u32;

    /// Time since some fixed moment; never goes back.
    fn now(&self) -> Duration;

    /// 64 bits that no other process can guess. (In a simulation they come from its seed.)
    fn random(&self) -> u64 {
        // The keys come from the system; whoever sees hashes does not learn them.
        RandomState::new().hash_one(0)
    }

    /// One turn of waiting: spins for the first turns (`turn` counts from 0), later yields the processor.
    fn relax(&self, turn: u32);

    /// A new event count.
    fn signal(&self) -> Self::Signal;

    /// Starts a thread, pinned to processor `core` if one is given.
    ///
    /// # Errors
    /// The system's; a core that this process may not use.
    fn spawn(
        &self,
        name: &str,
        core: Option<usize>,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<Self::Thread, Error>;
}

/// An event count: threads of one process wait for a change that another announces.
///
/// ```text
/// waiter:    let seen = signal.epoch(); if !condition() { signal.wait(seen, timeout) }
/// announcer: make_condition_true(); signal.notify()
/// ```
pub trait Signal: Clone + Send + Sync + 'static {
    /// Number of notifications so far.
    fn epoch(&self) -> u64;
    /// Waits until there has been a notification since `epoch` returned `seen`, or for `timeout`.
    fn wait(&self, seen: u64, timeout: Duration);
    /// Lets all waiters go on.
    fn notify(&self);
}

/// A thread started by [`Runtime::spawn`]. Dropped, it goes on by itself.
pub trait Thread: Send + 'static {
    /// Waits for its end. `false`: it panicked.
    fn join(self) -> bool;
}
