//! Who may connect: the kernel says which user a peer is, and a policy says which users are let in.
//!
//! The kernel notes a process's effective user when it listens, and when it connects (`SO_PEERCRED`). Neither side can say
//! that it is somebody else. Both sides ask before they send anything: a listener would otherwise let anybody in, and a
//! client would hand its memory to whoever was first to make a socket of that name in `/tmp`.
//!
//! Root is no exception, in either direction: a job of root's does not let users in, and a client of root's does not hand
//! its memory to a user. If root wants to join a user's job, it can become that user.
//!
//! A user that has no name in this process's user namespace is shown as 65534. So a process that runs as 65534 inside a
//! namespace takes all of those for itself: do not run as 65534 there.

use std::{
    mem::size_of,
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::fs::Mode;

use crate::error::Error;

/// Which users a transport connects with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Admit {
    /// The effective user of this process alone: see the module.
    #[default]
    SameUser,
    /// Every user of this host who may reach the socket: its file has mode 0666. The caller must find out by other means whom it
    /// deals with before it accepts a request, by a key that the request proves to know, say. To accept it is to let that
    /// process read and write what is registered.
    AnyUser,
}

impl Admit {
    /// Mode of the socket file of a listener.
    pub(super) fn mode(self) -> Mode {
        match self {
            Self::SameUser => Mode::from_raw_mode(0o600),
            Self::AnyUser => Mode::from_raw_mode(0o666),
        }
    }

    /// Whether a process of user `own` connects with one of user `peer`.
    pub(super) fn admits(self, own: u32, peer: u32) -> bool {
        match self {
            Self::SameUser => own == peer,
            Self::AnyUser => true,
        }
    }
}

/// The effective user of the process at the other end of a socket: when it connected, or when it began to listen.
pub(super) fn user_of_peer(socket: &OwnedFd) -> Result<u32, Error> {
    // Not by way of `rustix`: its process id is never 0, and the kernel says 0 of a process in another namespace.
    let mut cred = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the descriptor is open as long as `socket` lives. The kernel writes at most `len` bytes at `cred`, which has that
    // size, and any bytes are a `ucred`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(Error::last_os("getsockopt(SO_PEERCRED)"));
    }
    Ok(cred.uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_no_exception() {
        for (own, peer) in [(0, 1000), (1000, 0), (1000, 1001), (0, 65534)] {
            assert!(!Admit::SameUser.admits(own, peer) && Admit::AnyUser.admits(own, peer));
        }
        assert!(Admit::SameUser.admits(0, 0) && Admit::SameUser.admits(1000, 1000));
    }
}
