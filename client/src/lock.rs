//! Taking locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A lock that a panicking thread leaves usable: what it guards is consistent between any two statements
/// that can panic, or the panic was this client's own bug and is reported by that thread.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
