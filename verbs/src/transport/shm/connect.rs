//! Connecting, and what both sides make of each other's openings.

use std::{
    fs::symlink_metadata,
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::Path,
    sync::Arc,
    time::Duration,
};

use rustix::{
    event::PollFlags,
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};

use super::{
    admit,
    bell::Page,
    connection::ShmConnection,
    endpoint::{Arrival, Seat, Shared, ShmAttach},
    hear::{Heard, Progress, hear},
    link::Link,
    region::{Offer, RemoteTable},
    ring::{self, Inbox, Outbox},
    wire::{self, Kind, Opening, ready, send_opening},
};
use crate::{
    address::Address,
    error::Error,
    transport::{
        EndpointConfig, LaneSpec, MAX_REQUEST_DATA,
        host::{check_private_data, patience::Patience},
    },
};

/// How often a listener that has said half of its answer is looked at.
const HALF_LOOK: Duration = Duration::from_millis(1);

pub(super) fn new_socket(flags: SocketFlags) -> Result<OwnedFd, Error> {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags | SocketFlags::CLOEXEC, None)
        .map_err(|e| Error::io("socket(AF_UNIX, SOCK_SEQPACKET)")(e.into()))
}

/// The path of an address of this provider, and what the kernel calls it.
pub(super) fn resolve(address: &Address) -> Result<(&Path, SocketAddrUnix), Error> {
    let Address::Shm(path) = address else {
        return Err(Error::WrongProvider { address: address.to_string(), provider: "shm" });
    };
    let name = SocketAddrUnix::new(path.as_path()).map_err(|e| Error::BadAddress {
        url: address.to_string(),
        reason: match e {
            Errno::NAMETOOLONG => "the path of a Unix socket has at most 107 bytes".to_owned(),
            e => e.to_string(),
        },
    })?;
    Ok((path, name))
}

/// What an endpoint tells its peers. `depth` is that of the connection's send queue.
pub(super) fn opening(
    kind: Kind,
    seat: &Seat,
    config: &EndpointConfig,
    depth: usize,
    offers: &[Offer],
    data: &[u8],
) -> Opening {
    Opening {
        kind,
        slot: seat.slot,
        regions: offers.len() as u32,
        region_bytes: offers.iter().map(|offer| offer.length).sum(),
        receive_size: config.receive_size as u64,
        receive_buffers: config.receive_buffers as u64,
        send_depth: depth as u64,
        data: data.to_vec(),
    }
}

/// The capacity of the ring from one side to the other, which both compute.
pub(super) fn capacity(send_depth: u64, receive_buffers: u64, receive_size: u64) -> u64 {
    ring::capacity(send_depth.max(receive_buffers), receive_size)
}

/// Everything about a peer that a connection needs.
pub(super) struct Peer {
    pub(super) opening: Opening,
    pub(super) bell: Page,
    pub(super) regions: RemoteTable,
}

impl Peer {
    pub(super) fn connection(
        self,
        shared: &Shared,
        seat: Seat,
        depth: usize,
        socket: OwnedFd,
        inbox: Inbox,
        outbox: Outbox,
    ) -> Result<ShmConnection, Error> {
        let link = Arc::new(Link::new(seat.id, seat.slot, depth, socket, shared.bell.clone()));
        shared.inner.watch.add(&link)?;
        let Opening { slot: peer_slot, receive_size, .. } = self.opening;
        seat.occupy(Arrival { link: link.clone(), inbox, peer_bell: self.bell.clone(), peer_slot });
        Ok(ShmConnection::new(link, outbox, self.bell, peer_slot, receive_size, self.regions))
    }
}

/// A listener that has been told what is wanted, and has yet to answer: many can be asked before the first answer is awaited.
pub(in crate::transport) struct Calling<'a> {
    shared: Arc<Shared>,
    patience: Patience<'a>,
    seat: Seat,
    depth: usize,
    socket: OwnedFd,
    /// User of the listener.
    user: u32,
    /// What became of saying hello.
    said: Result<(), Error>,
}

impl<'a> Calling<'a> {
    /// Connects, and says hello.
    pub(in crate::transport) fn begin(
        address: &'a Address,
        lane: LaneSpec<'_, ShmAttach>,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let LaneSpec { endpoint, private_data, depth } = lane;
        let shared = endpoint.0.clone();
        let depth = depth.clamp(1, shared.config.send_depth);
        let (_, name) = resolve(address)?;
        check_private_data(private_data, MAX_REQUEST_DATA)?;
        let patience = Patience::new(address, timeout);
        let seat = Seat::reserve(&shared)?;
        let inner = &shared.inner;
        let socket = dial(&name, inner.user, &patience)?;
        // Before the listener gets anything: whose is it?
        let user = admit::user_of_peer(&socket)?;
        if !inner.admit.admits(inner.user, user) {
            return Err(stranger(address, inner.user, user));
        }
        let offers = inner.registry.offers()?;
        let hello = opening(Kind::Hello, &seat, &shared.config, depth, &offers, private_data);
        let users = (inner.user, user);
        let said = send_opening(&socket, &hello, &[shared.bell_file()], &offers, users, patience.deadline);
        Ok(Self { shared, patience, seat, depth, socket, user, said })
    }

    /// Hears the answer.
    pub(in crate::transport) fn finish(self) -> Result<(ShmConnection, Vec<u8>), Error> {
        let Self { shared, patience, seat, depth, socket, user, said } = self;
        let address = patience.address;
        let heard = match said {
            Ok(()) => answer(&socket, &shared, &patience)?,
            Err(error) => parting_words(&socket, &shared, error, &patience)?,
        };
        match heard.opening.kind {
            Kind::Accept => {}
            Kind::Refuse => {
                let private_data = heard.opening.data;
                return Err(Error::Refused { address: address.to_string(), private_data });
            }
            Kind::Forbid => {
                let admitted = heard.opening.admitted_user().unwrap_or(user);
                return Err(stranger(address, shared.inner.user, admitted));
            }
            Kind::Hello => return Err(patience.unreachable("it wants to connect, too")),
        }
        established(&shared, seat, depth, socket, heard, &patience)
    }
}

fn stranger(address: &Address, own: u32, peer: u32) -> Error {
    Error::OtherUser { address: address.to_string(), own, peer }
}

/// A socket that is connected to the listener.
fn dial(name: &SocketAddrUnix, own: u32, patience: &Patience<'_>) -> Result<OwnedFd, Error> {
    let socket = new_socket(SocketFlags::empty())?;
    // The kernel makes a connect wait while the backlog is full, as long as a send may. 0 would mean for
    // ever.
    let limit = patience.timeout.clamp(Duration::from_millis(1), Duration::from_secs(1 << 30));
    set_socket_timeout(&socket, Timeout::Send, Some(limit))
        .map_err(|e| Error::io("setsockopt(SO_SNDTIMEO)")(e.into()))?;
    loop {
        match connect(&socket, name) {
            Ok(()) => return Ok(socket),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Err(patience.late()),
            Err(e) => return Err(undialled(e, own, patience)),
        }
    }
}

/// What it means that nobody could be connected to.
fn undialled(error: Errno, own: u32, patience: &Patience<'_>) -> Error {
    // A socket file of mode 0600 shuts other users out, and says whose it is.
    if error == Errno::ACCESS
        && let Address::Shm(path) = patience.address
        && let Ok(file) = symlink_metadata(path)
        && file.file_type().is_socket()
        && file.uid() != own
    {
        return Error::OtherUser { address: patience.address.to_string(), own, peer: file.uid() };
    }
    patience.unreachable(io::Error::from(error).to_string())
}

/// Waits for the listener's answer.
fn answer(socket: &OwnedFd, shared: &Shared, patience: &Patience<'_>) -> Result<Heard, Error> {
    let mut left = false;
    loop {
        match hear(socket, &shared.inner.mappings) {
            Progress::Complete(heard) => return Ok(heard),
            Progress::Bad(reason) => return Err(patience.unreachable(reason)),
            Progress::Unfinished if left => {
                return Err(patience.unreachable("it left in the middle of its answer"));
            }
            Progress::Silent | Progress::Unfinished if patience.left().is_zero() => {
                return Err(patience.late());
            }
            Progress::Silent => ready(socket, PollFlags::IN, patience.left())?,
            // The socket is ready already, for what is there.
            Progress::Unfinished => left = wire::has_left(socket, HALF_LOOK.min(patience.left()))?,
        }
    }
}

/// What a listener said that has left before it heard all.
fn parting_words(
    socket: &OwnedFd,
    shared: &Shared,
    error: Error,
    patience: &Patience<'_>,
) -> Result<Heard, Error> {
    let Error::System { source, .. } = &error else { return Err(error) };
    match source.kind() {
        io::ErrorKind::WouldBlock => return Err(patience.late()),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {}
        _ => return Err(error),
    }
    match hear(socket, &shared.inner.mappings) {
        Progress::Complete(heard) if heard.opening.kind != Kind::Accept => Ok(heard),
        Progress::Bad(reason) => Err(patience.unreachable(reason)),
        _ => Err(patience.unreachable("it closed the connection")),
    }
}

/// The connection that the listener has accepted.
fn established(
    shared: &Shared,
    seat: Seat,
    depth: usize,
    socket: OwnedFd,
    heard: Heard,
    patience: &Patience<'_>,
) -> Result<(ShmConnection, Vec<u8>), Error> {
    let Heard { mut opening, fds, regions } = heard;
    let private_data = std::mem::take(&mut opening.data);
    let [bell, inbox_file, outbox_file]: [OwnedFd; 3] =
        fds.try_into().map_err(|_| patience.unreachable("it sent no rings"))?;
    let config = &shared.config;
    let buffers = config.receive_buffers as u64;
    let inward = capacity(opening.send_depth, buffers, config.receive_size as u64);
    let outward = capacity(depth as u64, opening.receive_buffers, opening.receive_size);
    let mappings = &shared.inner.mappings;
    let open = |what: &str, file: &OwnedFd, capacity| {
        let wrong = |e: String| patience.unreachable(format!("it sent a bad {what}: {e}"));
        mappings.open_whole(file, ring::file_size(capacity)).map_err(|e| wrong(e.to_string()))
    };
    let bad_ring = |e: ring::Corrupt| patience.unreachable(e.to_string());
    let inbox = Inbox::new(open("ring to this side", &inbox_file, inward)?).map_err(bad_ring)?;
    let outbox = Outbox::new(open("ring from this side", &outbox_file, outward)?).map_err(bad_ring)?;
    let bell = Page::open(mappings, &bell)
        .map_err(|e| patience.unreachable(format!("it sent a bad doorbell: {e}")))?;
    let peer = Peer { opening, bell, regions };
    Ok((peer.connection(shared, seat, depth, socket, inbox, outbox)?, private_data))
}
