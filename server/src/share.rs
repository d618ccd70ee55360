//! What the control thread and a poller tell each other, besides the mail.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize},
    time::Duration,
};

/// What the control thread and a poller share.
pub struct Share {
    /// The shard clock, for the handshake. Written by the poller alone.
    pub clock: AtomicU64,
    /// Tells the poller to finish.
    pub stop: AtomicBool,
    /// Clients that may still send: counted by the control thread, discounted by the poller.
    pub clients: AtomicUsize,
    /// Connections for READs, of all clients together: counted by the control thread, discounted by the poller.
    pub lanes: AtomicUsize,
    /// Messages that each client may have on their way.
    pub credits: usize,
    /// How long a client is kept whose connection broke.
    pub lease: Duration,
    /// How often clients came back: counted by the poller.
    pub resumptions: AtomicU64,
}
