//! What a connect has been asked for, and how it can fail.

use super::{Host, HostAttach, HostConnection};
use crate::{
    error::Error,
    session::Reason,
    transport::{Connected, LaneSpec, host::patience::Patience},
};

/// A connection that was made, with what the server's program has said.
pub(super) type Made = Connected<HostConnection>;
/// What is wanted of a lane.
pub(super) type Spec<'a> = LaneSpec<'a, HostAttach>;

/// What a connect has been asked for.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) host: &'a Host,
    pub(super) name: &'a str,
    pub(super) port: u16,
    pub(super) patience: Patience<'a>,
}

impl Asked<'_> {
    pub(super) fn no_session(&self, reason: Reason) -> Error {
        Error::NoSession { address: self.patience.address.to_string(), reason: reason.to_string() }
    }
}

/// Why no lane was made.
pub(super) enum Failed {
    /// The session had ended before the server could know of the lanes.
    NotAsked(Error),
    /// The way does not lead there; another one may.
    Way(String),
    /// A lane was refused, or not made in time.
    Lane(Error),
}
