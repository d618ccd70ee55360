//! How long a call may wait that connects to an address, and what it says when that is over.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::{address::Address, error::Error};

/// See the module.
#[derive(Debug, Clone, Copy)]
pub(in crate::transport) struct Patience<'a> {
    pub(in crate::transport) address: &'a Address,
    /// `None`: never.
    pub(in crate::transport) deadline: Option<Instant>,
    pub(in crate::transport) timeout: Duration,
}

impl<'a> Patience<'a> {
    /// For `timeout` from now on.
    pub(in crate::transport) fn new(address: &'a Address, timeout: Duration) -> Self {
        Self { address, deadline: Instant::now().checked_add(timeout), timeout }
    }

    pub(in crate::transport) fn left(&self) -> Duration {
        self.deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()))
    }

    pub(in crate::transport) fn late(&self) -> Error {
        let what = format!("connecting to `{}`", self.address);
        Error::Timeout { what, seconds: self.timeout.as_secs_f64() }
    }

    pub(in crate::transport) fn unreachable(&self, reason: impl Into<String>) -> Error {
        Error::Unreachable { address: self.address.to_string(), reason: reason.into() }
    }

    /// Waits until `socket` is ready for `what`.
    ///
    /// # Errors
    /// [`late`](Self::late), or the system's.
    pub(in crate::transport) fn wait(&self, socket: impl AsFd, what: PollFlags) -> Result<(), Error> {
        loop {
            let left = self.left().min(Duration::from_secs(3600));
            if left.is_zero() {
                return Err(self.late());
            }
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&socket, what)], Some(&left)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(Error::io("poll(socket)")(e.into())),
            }
        }
    }
}
