//! Work requests: what a connection is asked to do.

use super::RemoteAddress;
#[cfg(doc)]
use super::{MAX_INLINE, MAX_SGE};

/// One piece of a gather (or, for a READ, scatter) list.
#[derive(Debug)]
pub struct Sge<'a, R> {
    /// The region.
    pub region: &'a R,
    /// First byte within the region.
    pub offset: usize,
    /// Number of bytes.
    pub length: usize,
}

impl<R> Clone for Sge<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<R> Copy for Sge<'_, R> {}

/// What a SEND or a WRITE carries.
#[derive(Debug)]
pub enum Payload<'a, R> {
    /// These bytes, copied at the post; at most [`MAX_INLINE`].
    Inline(&'a [u8]),
    /// Registered memory, gathered when the request executes; at most [`MAX_SGE`] pieces.
    Gather(&'a [Sge<'a, R>]),
}

impl<R> Clone for Payload<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<R> Copy for Payload<'_, R> {}

/// A work request. `signal` is the id of its own [`Completion::Work`](super::Completion::Work); `None`: the completion of a later
/// request says the same of it.
#[derive(Debug)]
pub enum Post<'a, R> {
    /// SEND: the payload goes to a receive buffer of the peer's endpoint.
    Send {
        /// The message.
        payload: Payload<'a, R>,
        /// A number that the receiver gets beside it.
        immediate: Option<u32>,
        /// The id of its completion.
        signal: Option<u64>,
    },
    /// WRITE: the payload goes to memory of the peer.
    Write {
        /// The bytes.
        payload: Payload<'a, R>,
        /// Where they go.
        to: RemoteAddress,
        /// A number that the receiver is told when they are there; it uses up a receive credit.
        immediate: Option<u32>,
        /// The id of its completion.
        signal: Option<u64>,
    },
    /// READ: memory of the peer comes here.
    Read {
        /// Where it goes; at most [`MAX_SGE`] pieces.
        into: &'a [Sge<'a, R>],
        /// Where it lies.
        from: RemoteAddress,
        /// The id of its completion.
        signal: Option<u64>,
    },
}

impl<R> Clone for Post<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<R> Copy for Post<'_, R> {}

impl<R> Post<'_, R> {
    /// The id of its completion.
    pub fn signal(&self) -> Option<u64> {
        match self {
            Post::Send { signal, .. } | Post::Write { signal, .. } | Post::Read { signal, .. } => *signal,
        }
    }

    /// The same, with another id, or without one.
    pub fn with_signal(mut self, id: Option<u64>) -> Self {
        match &mut self {
            Post::Send { signal, .. } | Post::Write { signal, .. } | Post::Read { signal, .. } => {
                *signal = id
            }
        }
        self
    }
}
