//! What becomes of work requests: refusals, errors, completions.

/// Why a post was refused. Nothing has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// The send queue is full: poll, then post again.
    #[error("the send queue is full")]
    Full,
    /// The connection is broken.
    #[error("the connection is broken")]
    Disconnected,
}

/// Why a work request failed, or a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WorkError {
    /// The peer has no such region there, or grants no such right.
    #[error(
        "remote access error: the range is outside the peer's region, or the region does not grant this access"
    )]
    RemoteAccess,
    /// The message did not fit the receiver's buffer, or the request was malformed for the peer.
    #[error("remote invalid request: the message is longer than the receive buffer")]
    RemoteInvalid,
    /// The peer does not answer.
    #[error("the peer does not answer (retries exceeded)")]
    RetryExceeded,
    /// The receiver had no receive buffer for too long.
    #[error("the receiver had no receive buffer (RNR retries exceeded)")]
    ReceiverNotReady,
    /// The connection broke before this request was known to have happened.
    #[error("flushed: the connection broke before this request completed")]
    Flushed,
    /// The peer, or this side, ended the connection.
    #[error("disconnected")]
    Disconnected,
    /// Another status of the provider, by its number (`ibv_wc_status`).
    #[error("work completion status {0}")]
    Other(u32),
}

/// Names a connection within its endpoint; never used again there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(pub u32);

/// A receive buffer with a message in it. Give it back with [`Endpoint::release`](super::Endpoint::release): a buffer that is dropped
/// is lost to the endpoint.
#[derive(Debug)]
#[must_use = "a receive buffer that is not released is lost to the endpoint"]
pub struct ReceiveBuffer {
    pub(crate) index: u32,
    pub(crate) length: u32,
}

impl ReceiveBuffer {
    /// Length of the message, bytes.
    pub fn len(&self) -> usize {
        self.length as usize
    }

    /// Whether the message is empty.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

/// What [`Endpoint::poll`](super::Endpoint::poll) reports.
#[derive(Debug)]
pub enum Completion {
    /// A signalled request is done, and with it every earlier one of the connection.
    Work {
        /// The connection.
        connection: ConnectionId,
        /// The id given at the post.
        id: u64,
        /// Whether it happened.
        result: Result<(), WorkError>,
    },
    /// A SEND arrived.
    Received {
        /// The connection.
        connection: ConnectionId,
        /// The message.
        buffer: ReceiveBuffer,
        /// The immediate of the SEND, if it had one.
        immediate: Option<u32>,
    },
    /// A WRITE with immediate arrived: it and all earlier WRITEs of the connection are visible.
    WriteImmediate {
        /// The connection.
        connection: ConnectionId,
        /// The immediate.
        immediate: u32,
    },
    /// The connection is over; nothing more comes of it.
    Disconnected {
        /// The connection.
        connection: ConnectionId,
        /// Why: the first error, or [`WorkError::Disconnected`].
        cause: WorkError,
    },
}
