//! What a [`ShmConnection`](super::ShmConnection) and the endpoint that polls it share, within one process.
//!
//! | field | written by | read by |
//! |---|---|---|
//! | `requests[n]` | the posting thread, before `posted` says so (release) | the polling thread, after (acquire) |
//! | `posted`: number of requests, and marks | see [`super::claim`] | both |
//! | `retired`: number of requests whose completion was polled | the polling thread | the posting thread, for room |
//! | `cause`: why the connection ended, or 0 | whoever ends it first | both |
//!
//! A request has executed when it is counted in `posted`: what it copies is copied before. The polling thread
//! seals `posted` before it takes the last completions and reports the end. So no request is accepted whose
//! completion nobody would see, and none is refused that has begun.

use std::{
    os::fd::OwnedFd,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use crossbeam_utils::CachePadded;
use rustix::net::{Shutdown, shutdown};

use super::{
    bell::{self, Page},
    claim,
};
use crate::transport::{Completion, ConnectionId, WorkError};

/// [`Request::outcome`] of a request that wants no completion, and of one that succeeded.
const UNSIGNALLED: u32 = 0;
const SUCCESS: u32 = 1;
/// Added to the code of an error.
const FAILED: u32 = 2;

/// [`Link::cause`] when the peer ended the connection, or died.
const PEER_LEFT: u32 = u32::MAX;

/// The outcome of one request.
#[derive(Debug, Default)]
struct Request {
    id: AtomicU64,
    outcome: AtomicU32,
}

/// The state of a connection that its two owners in this process share.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) id: ConnectionId,
    pub(super) slot: u32,
    /// A power of two of them, at least `depth`.
    requests: Box<[Request]>,
    depth: u64,
    posted: CachePadded<AtomicU64>,
    retired: CachePadded<AtomicU64>,
    cause: AtomicU32,
    socket: OwnedFd,
    /// The bell of the endpoint that polls.
    bell: Page,
}

impl Link {
    pub(super) fn new(id: ConnectionId, slot: u32, depth: usize, socket: OwnedFd, bell: Page) -> Self {
        let requests = (0..depth.next_power_of_two()).map(|_| Request::default()).collect();
        let (posted, retired) = Default::default();
        Self {
            id,
            slot,
            requests,
            depth: depth as u64,
            posted,
            retired,
            cause: AtomicU32::new(0),
            socket,
            bell,
        }
    }

    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    pub(super) fn depth(&self) -> u64 {
        self.depth
    }

    /// Requests whose completion has been polled. For the posting thread.
    #[inline]
    pub(super) fn retired(&self) -> u64 {
        self.retired.load(Ordering::Acquire)
    }

    #[inline]
    fn request(&self, number: u64) -> &Request {
        &self.requests[number as usize & (self.requests.len() - 1)]
    }

    /// Begins request number `number`. `false`: the connection's end has been reported already; nothing may happen.
    /// For the posting thread, which has seen that there is room.
    #[inline]
    pub(super) fn begin(&self, number: u64) -> bool {
        claim::begin(&*self.posted, number)
    }

    /// Request number `number`, which had begun, has done nothing and never will.
    #[inline]
    pub(super) fn withdraw(&self, number: u64) {
        claim::withdraw(&*self.posted, number);
    }

    /// Counts request number `number`, which had begun and has executed with `result`.
    #[inline]
    pub(super) fn finish(&self, number: u64, signal: Option<u64>, result: Result<(), WorkError>) {
        let request = self.request(number);
        if let Some(id) = signal {
            request.id.store(id, Ordering::Relaxed);
            let outcome = result.map_or_else(|error| FAILED + code(error), |()| SUCCESS);
            request.outcome.store(outcome, Ordering::Relaxed);
        } else {
            request.outcome.store(UNSIGNALLED, Ordering::Relaxed);
        }
        // SYNC POINT: releases the request, and what it copied, to `complete`.
        claim::finish(&*self.posted, number);
    }

    /// Appends the completions of requests from number `next` on, at most `most` of them; returns the number
    /// of the next request, and whether that was all. For the polling thread.
    #[inline]
    pub(super) fn complete(&self, next: u64, most: usize, into: &mut Vec<Completion>) -> (u64, bool) {
        // SYNC POINT: acquires what `finish` released.
        let posted = claim::executed(&*self.posted);
        let full = into.len().saturating_add(most);
        let mut next = next;
        while next != posted && into.len() < full {
            let request = self.request(next);
            let outcome = request.outcome.load(Ordering::Relaxed);
            if outcome != UNSIGNALLED {
                let id = request.id.load(Ordering::Relaxed);
                let result = if outcome == SUCCESS { Ok(()) } else { Err(error(outcome - FAILED)) };
                into.push(Completion::Work { connection: self.id, id, result });
            }
            next += 1;
        }
        // SYNC POINT: releases the places to `retired`.
        self.retired.store(next, Ordering::Release);
        (next, next == posted)
    }

    /// Lets no request begin any more. `false`: one executes; ask again. For the polling thread.
    pub(super) fn seal(&self) -> bool {
        claim::seal(&*self.posted)
    }

    /// Whether its end is reported. For the posting thread.
    #[inline]
    pub(super) fn is_sealed(&self) -> bool {
        claim::is_sealed(&*self.posted)
    }

    /// Why the connection ended, if it has.
    #[inline]
    pub(super) fn cause(&self) -> Option<WorkError> {
        match self.cause.load(Ordering::Acquire) {
            0 => None,
            PEER_LEFT => Some(WorkError::Disconnected),
            code => Some(error(code)),
        }
    }

    /// Whether it was the peer who ended it.
    pub(super) fn peer_left(&self) -> bool {
        self.cause.load(Ordering::Acquire) == PEER_LEFT
    }

    /// Ends the connection for a cause on this side, unless it has ended: tells the peer and the endpoint.
    pub(super) fn close(&self, cause: WorkError) {
        self.end(code(cause));
    }

    /// Ends the connection because the peer did or died.
    pub(super) fn close_by_peer(&self) {
        self.end(PEER_LEFT);
    }

    fn end(&self, code: u32) {
        if self.cause.compare_exchange(0, code, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            // Fails only when the peer is gone.
            let _ = shutdown(&self.socket, Shutdown::Both);
        }
        bell::poke(&self.bell, self.slot);
    }

    /// Tells the endpoint of this process that there is something.
    #[inline]
    pub(super) fn ring_own(&self) {
        bell::ring(&self.bell, self.slot);
    }
}

/// A [`WorkError`] as a number that is not 0.
fn code(error: WorkError) -> u32 {
    match error {
        WorkError::RemoteAccess => 1,
        WorkError::RemoteInvalid => 2,
        WorkError::RetryExceeded => 3,
        WorkError::ReceiverNotReady => 4,
        WorkError::Flushed => 5,
        WorkError::Disconnected => 6,
        WorkError::Other(status) => status.saturating_add(7).min(PEER_LEFT - FAILED - 1),
    }
}

fn error(code: u32) -> WorkError {
    match code {
        1 => WorkError::RemoteAccess,
        2 => WorkError::RemoteInvalid,
        3 => WorkError::RetryExceeded,
        4 => WorkError::ReceiverNotReady,
        5 => WorkError::Flushed,
        6 => WorkError::Disconnected,
        other => WorkError::Other(other - 7),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_codes_round_trip() {
        for e in [
            WorkError::RemoteAccess,
            WorkError::RemoteInvalid,
            WorkError::RetryExceeded,
            WorkError::ReceiverNotReady,
            WorkError::Flushed,
            WorkError::Disconnected,
            WorkError::Other(0),
            WorkError::Other(99),
        ] {
            assert_eq!(error(code(e)), e);
            assert_ne!(code(e), 0);
        }
    }
}
