//! Listening and accepting.
//!
//! A listener lets strangers in ([`super::strangers`]), and returns the first who has said all. Its regions are mapped by then,
//! and nobody else's are: another is heard only when the caller asks again. What the caller does not accept is unmapped.

use std::{
    fmt,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    net::{SocketFlags, accept_with},
};

use super::{
    Inner, admit,
    bell::Page,
    connect::{Peer, capacity, opening, resolve},
    connection::ShmConnection,
    door::Door,
    endpoint::{Seat, ShmAttach},
    hear::Heard,
    mapping::Mappings,
    ring::{self, Inbox, Outbox},
    strangers::{MAX_STRANGERS, Strangers, Visitor},
    wire::{self, Kind, Opening, send_opening},
};
use crate::{
    address::Address,
    error::Error,
    transport::{EndpointConfig, Listener, MAX_REPLY_DATA, Request, host::check_private_data},
};

/// Pause of a listener that the system has no descriptor for.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(10);

/// A listening socket of the `shm` provider.
pub struct ShmListener {
    inner: Arc<Inner>,
    address: Address,
    door: Door,
    strangers: Strangers,
}

impl ShmListener {
    pub(super) fn new(inner: &Arc<Inner>, address: &Address) -> Result<Self, Error> {
        let (path, name) = resolve(address)?;
        let door = Door::open(address, path, &name, inner.admit.mode())?;
        let strangers = Strangers::new(&door.socket)?;
        Ok(Self { inner: inner.clone(), address: address.clone(), door, strangers })
    }

    /// The next who has said all, of those who are there; strangers who wait at the socket are let in and heard, too.
    fn look(&mut self) -> Result<Option<ShmRequest>, Error> {
        self.strangers.wait(Duration::ZERO)?;
        // Not for ever, while more and more come.
        for _ in 0..MAX_STRANGERS {
            while let Some(visitor) = self.strangers.hear(&self.inner.mappings) {
                if let Some(request) = ShmRequest::new(visitor, &self.inner.mappings) {
                    return Ok(Some(request));
                }
            }
            if !self.take_stranger()? {
                break;
            }
        }
        self.strangers.expire();
        Ok(None)
    }

    /// Lets somebody in who waits at the socket. `false`: nobody does, or nobody can be let in now.
    fn take_stranger(&mut self) -> Result<bool, Error> {
        match accept_with(&self.door.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                let Inner { user: own, admit, .. } = *self.inner;
                let user = admit::user_of_peer(&socket)?;
                if admit.admits(own, user) {
                    return Ok(self.strangers.admit(socket, user).is_ok() || self.shortage());
                } else {
                    // A socket that has sent nothing has room for this. If its peer is gone, nobody waits for the answer.
                    let _ =
                        wire::send(&socket, &Opening::prohibition(own).encode(), &[], Some(Instant::now()));
                }
                Ok(true)
            }
            Err(Errno::AGAIN) => Ok(false),
            // It is gone already; the next one may be there.
            Err(Errno::INTR | Errno::CONNABORTED) => Ok(true),
            // No descriptor is left now. The peer waits, and may come in later.
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => Ok(self.shortage()),
            Err(e) => Err(Error::io(format!("accept({})", self.door.path.display()))(e.into())),
        }
    }

    /// Frees something for one more who waits. `false`: there is nothing to free, and a pause was made.
    fn shortage(&mut self) -> bool {
        let freed = self.strangers.dismiss_longest_silent();
        if !freed {
            std::thread::sleep(SHORTAGE_PAUSE);
        }
        freed
    }

    #[cfg(test)]
    pub(super) fn strangers(&self) -> usize {
        self.strangers.len()
    }
}

impl Listener for ShmListener {
    type Request = ShmRequest;

    fn accept(&mut self, timeout: Duration) -> Result<Option<ShmRequest>, Error> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            if let Some(request) = self.look()? {
                return Ok(Some(request));
            }
            let left = deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(None);
            }
            self.strangers.wait(left)?;
        }
    }

    fn address(&self) -> &Address {
        &self.address
    }
}

/// A peer that wants to connect.
pub struct ShmRequest {
    /// `None` once it has been answered.
    peer: Option<(Peer, OwnedFd)>,
    user: u32,
    private_data: Vec<u8>,
}

impl ShmRequest {
    /// `None`: it is no request.
    fn new(visitor: Visitor, mappings: &Mappings) -> Option<Self> {
        let Visitor { socket, user, heard: Heard { mut opening, fds, regions } } = visitor;
        let [bell] = <[OwnedFd; 1]>::try_from(fds).ok()?;
        if opening.kind != Kind::Hello {
            return None;
        }
        let bell = Page::open(mappings, &bell).ok()?;
        let private_data = std::mem::take(&mut opening.data);
        Some(Self { peer: Some((Peer { opening, bell, regions }, socket)), user, private_data })
    }

    /// The effective user of the peer when it connected, as the kernel says.
    pub fn user(&self) -> u32 {
        self.user
    }

    fn refuse(&mut self, private_data: &[u8]) {
        if let Some((_, socket)) = self.peer.take() {
            // A socket that has sent nothing has room for this. If its peer is gone, nobody waits for the answer.
            let _ = wire::send(&socket, &Opening::refusal(private_data).encode(), &[], Some(Instant::now()));
        }
    }
}

impl Request for ShmRequest {
    type Attach = ShmAttach;
    type Connection = ShmConnection;

    fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    fn accept_with(
        mut self,
        endpoint: &ShmAttach,
        depth: usize,
        private_data: &[u8],
    ) -> Result<ShmConnection, Error> {
        check_private_data(private_data, MAX_REPLY_DATA)?;
        let shared = &endpoint.0;
        let offers = shared.inner.registry.offers()?;
        let seat = Seat::reserve(shared)?;
        let depth = depth.clamp(1, shared.config.send_depth);
        let config = &EndpointConfig { send_depth: depth, ..shared.config.clone() };
        let Some((peer, _)) = &self.peer else { unreachable!("`self` is answered once, and then consumed") };
        let buffers = config.receive_buffers as u64;
        let theirs = &peer.opening;
        let (inbox, inbox_file) =
            ring::create(capacity(theirs.send_depth, buffers, config.receive_size as u64))?;
        let (outbox, outbox_file) =
            ring::create(capacity(depth as u64, theirs.receive_buffers, theirs.receive_size))?;
        let own = "a ring just made is of the right size";
        let (inbox, outbox) = (Inbox::new(inbox).expect(own), Outbox::new(outbox).expect(own));
        let accept = opening(Kind::Accept, &seat, config, &offers, private_data);
        let fds = [shared.bell_file(), outbox_file.as_fd(), inbox_file.as_fd()];
        // Answered from here on: after a failure half way, the end of the socket is the peer's answer.
        let Some((peer, socket)) = self.peer.take() else { unreachable!("seen above") };
        // A peer that does not read is not waited for: what this side says fits the socket.
        let users = (shared.inner.user, self.user);
        send_opening(&socket, &accept, &fds, &offers, users, Some(Instant::now()))?;
        peer.connection(shared, seat, depth, socket, inbox, outbox)
    }

    fn reject(mut self, private_data: &[u8]) {
        let most = MAX_REPLY_DATA;
        assert!(private_data.len() <= most, "{} bytes of private data; at most {most}", private_data.len());
        self.refuse(private_data);
    }
}

impl Drop for ShmRequest {
    fn drop(&mut self) {
        self.refuse(&[]);
    }
}

impl fmt::Debug for ShmListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShmListener({})", self.address)
    }
}

impl fmt::Debug for ShmRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShmRequest({} bytes of private data, of user {})", self.private_data.len(), self.user)
    }
}
