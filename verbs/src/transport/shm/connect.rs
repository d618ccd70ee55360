//! Listening, connecting, accepting.
//!
//! A socket file that nobody listens on (its server was killed) is replaced, a live one never is: the look
//! and the replacement happen under a lock on the directory, so that two servers that start together do not
//! both win.

use std::{
    collections::VecDeque,
    fmt,
    fs::{File, remove_file, symlink_metadata},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{FlockOperation, flock},
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
        socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};

use super::{
    Inner,
    bell::Page,
    connection::ShmConnection,
    endpoint::{Arrival, Seat, Shared, ShmAttach},
    link::Link,
    mapping::{Mapping, Mappings, PAGE},
    region::{RemoteMapping, RemoteTable},
    ring::{self, Inbox, Outbox},
    wire::{self, Kind, Opening, Received, RegionRecord, ready, send_opening, timespec},
};
use crate::{
    address::Address,
    error::Error,
    transport::{
        EndpointConfig, Listener, MAX_REPLY_DATA, MAX_REQUEST_DATA, Request, host::check_private_data,
    },
};

/// Connections that the kernel keeps for a listener that is busy.
const BACKLOG: i32 = 1024;
/// Strangers that a listener hears out at a time, and for how long.
const MAX_STRANGERS: usize = 256;
const STRANGER_PATIENCE: Duration = Duration::from_secs(2);

/// Pause of a listener that the system has no descriptor for.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(10);

fn new_socket(flags: SocketFlags) -> Result<OwnedFd, Error> {
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags | SocketFlags::CLOEXEC, None)
        .map_err(|e| Error::io("socket(AF_UNIX, SOCK_SEQPACKET)")(e.into()))
}

/// The path of an address of this provider, and what the kernel calls it.
fn resolve(address: &Address) -> Result<(&Path, SocketAddrUnix), Error> {
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

/// The opening of a peer, as it comes in: an [`Opening`] and the regions that it announced.
#[derive(Default)]
struct Incoming {
    opening: Option<(Opening, Vec<OwnedFd>)>,
    regions: Vec<RemoteMapping>,
}

enum Progress {
    Unfinished,
    Complete,
    /// The peer is gone or speaks something else.
    Bad(String),
}

impl Incoming {
    /// Takes what has arrived, without waiting.
    fn advance(&mut self, socket: &OwnedFd, mappings: &Mappings) -> Progress {
        loop {
            let packet = match wire::receive(socket) {
                Received::Packet(packet) => packet,
                Received::Nothing => return Progress::Unfinished,
                Received::End => return Progress::Bad("it closed the connection".to_owned()),
            };
            if let Err(reason) = self.take(packet, mappings) {
                return Progress::Bad(reason);
            }
            if self.opening.as_ref().is_some_and(|(o, _)| self.regions.len() >= o.regions as usize) {
                return Progress::Complete;
            }
        }
    }

    fn take(&mut self, packet: wire::Packet, mappings: &Mappings) -> Result<(), String> {
        let Some((opening, _)) = &self.opening else {
            let opening = Opening::decode(&packet.bytes)
                .ok_or("it does not speak this version of Fervor's protocol for shared memory")?;
            let expected = match opening.kind {
                Kind::Hello => 1,
                Kind::Accept => 3,
                Kind::Refuse => 0,
            };
            if packet.fds.len() != expected || (opening.kind == Kind::Refuse && opening.regions > 0) {
                return Err(format!("it sent {} descriptors instead of {expected}", packet.fds.len()));
            }
            self.opening = Some((opening, packet.fds));
            return Ok(());
        };
        let records = RegionRecord::decode(&packet.bytes).ok_or("it sent a malformed list of regions")?;
        if records.len() != packet.fds.len() || self.regions.len() + records.len() > opening.regions as usize
        {
            return Err("it sent another number of regions than announced".to_owned());
        }
        for (RegionRecord { key, writable, base, length }, fd) in records.into_iter().zip(&packet.fds) {
            let least = usize::try_from(length).map_err(|e| e.to_string())?;
            let mapping = Mapping::open_shared(mappings, fd, least, writable).map_err(|e| e.to_string())?;
            self.regions.push(RemoteMapping { key, base, length, writable, mapping });
        }
        Ok(())
    }
}

/// What an endpoint tells its peers.
fn opening(
    kind: Kind,
    seat: &Seat,
    config: &EndpointConfig,
    depth: usize,
    regions: usize,
    data: &[u8],
) -> Opening {
    Opening {
        kind,
        slot: seat.slot,
        regions: regions as u32,
        receive_size: config.receive_size as u64,
        receive_buffers: config.receive_buffers as u64,
        send_depth: depth as u64,
        data: data.to_vec(),
    }
}

/// Everything about a peer that a connection needs.
struct Peer {
    opening: Opening,
    bell: Page,
    regions: RemoteTable,
}

impl Peer {
    fn connection(
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

/// See [`Transport::connect`](crate::transport::Transport::connect).
pub(super) fn connect_to(
    shared: &Arc<Shared>,
    address: &Address,
    private_data: &[u8],
    timeout: Duration,
) -> Result<(ShmConnection, Vec<u8>), Error> {
    let (_, name) = resolve(address)?;
    check_private_data(private_data, MAX_REQUEST_DATA)?;
    let deadline = Instant::now().checked_add(timeout);
    let left = || deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
    let late =
        || Error::Timeout { what: format!("connecting to `{address}`"), seconds: timeout.as_secs_f64() };
    let unreachable = |reason: String| Error::Unreachable { address: address.to_string(), reason };
    let seat = Seat::reserve(shared)?;

    let socket = new_socket(SocketFlags::empty())?;
    // The kernel makes a connect wait while the backlog is full, as long as a send may. 0 would mean for
    // ever.
    let patience = timeout.clamp(Duration::from_millis(1), Duration::from_secs(1 << 30));
    set_socket_timeout(&socket, Timeout::Send, Some(patience))
        .map_err(|e| Error::io("setsockopt(SO_SNDTIMEO)")(e.into()))?;
    loop {
        match connect(&socket, &name) {
            Ok(()) => break,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Err(late()),
            Err(e) => return Err(unreachable(io::Error::from(e).to_string())),
        }
    }
    let offers = shared.inner.registry.offers();
    let depth = shared.config.send_depth;
    let hello = opening(Kind::Hello, &seat, &shared.config, depth, offers.len(), private_data);
    send_opening(&socket, &hello, &[shared.bell_file()], &offers).map_err(|e| match e {
        Error::System { source, .. } if source.kind() == io::ErrorKind::BrokenPipe => {
            unreachable("it closed the connection".to_owned())
        }
        e => e,
    })?;

    let mut incoming = Incoming::default();
    loop {
        match incoming.advance(&socket, &shared.inner.mappings) {
            Progress::Complete => break,
            Progress::Bad(reason) => return Err(unreachable(reason)),
            Progress::Unfinished if left().is_zero() => return Err(late()),
            Progress::Unfinished => ready(&socket, PollFlags::IN, left())?,
        };
    }
    let Some((opening, fds)) = incoming.opening else {
        return Err(unreachable("it said nothing".to_owned()));
    };
    let private_data = opening.data.clone();
    let fds: [OwnedFd; 3] = match opening.kind {
        Kind::Refuse => return Err(Error::Refused { address: address.to_string(), private_data }),
        Kind::Hello => return Err(unreachable("it wants to connect, too".to_owned())),
        Kind::Accept => fds.try_into().map_err(|_| unreachable("it sent no rings".to_owned()))?,
    };
    let [bell, inbox, outbox] = fds;
    let bad_ring = |_| unreachable("it sent rings of a wrong size".to_owned());
    let inbox = Inbox::new(Mapping::open(&inbox, PAGE, true)?).map_err(bad_ring)?;
    let outbox = Outbox::new(Mapping::open(&outbox, PAGE, true)?).map_err(bad_ring)?;
    // A message that the receiver takes must fit the ring, or its sender would wait for ever.
    if outbox.capacity() < ring::record_size(opening.receive_size)
        || inbox.capacity() < ring::record_size(shared.config.receive_size as u64)
    {
        return Err(bad_ring(ring::Corrupt));
    }
    let peer = Peer {
        opening,
        bell: Page::open(&shared.inner.mappings, &bell)?,
        regions: RemoteTable::new(incoming.regions),
    };
    Ok((peer.connection(shared, seat, depth, socket, inbox, outbox)?, private_data))
}

/// A peer that has connected to the socket and not yet said all.
struct Stranger {
    socket: OwnedFd,
    incoming: Incoming,
    deadline: Instant,
}

/// A listening socket of the `shm` provider.
pub struct ShmListener {
    inner: Arc<Inner>,
    socket: OwnedFd,
    address: Address,
    path: PathBuf,
    /// Device and inode of the socket file: only that one is removed.
    file: (u64, u64),
    strangers: VecDeque<Stranger>,
    complete: VecDeque<ShmRequest>,
}

impl ShmListener {
    pub(super) fn new(inner: &Arc<Inner>, address: &Address) -> Result<Self, Error> {
        let (path, name) = resolve(address)?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        let lock = File::open(folder).map_err(Error::io(format!("open({})", folder.display())))?;
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(|e| Error::io(format!("flock({})", folder.display()))(e.into()))?;
        let socket = new_socket(SocketFlags::NONBLOCK)?;
        match bind(&socket, &name) {
            Err(Errno::ADDRINUSE) => {
                remove_stale(address, path, &name)?;
                bind(&socket, &name)
            }
            other => other,
        }
        .map_err(|e| Error::io(format!("bind({})", path.display()))(e.into()))?;
        listen(&socket, BACKLOG).map_err(|e| Error::io(format!("listen({})", path.display()))(e.into()))?;
        let file = symlink_metadata(path).map_err(Error::io(format!("stat({})", path.display())))?;
        Ok(Self {
            inner: inner.clone(),
            socket,
            address: address.clone(),
            path: path.to_owned(),
            file: (file.dev(), file.ino()),
            strangers: VecDeque::new(),
            complete: VecDeque::new(),
        })
    }

    /// Takes everyone who waits at the socket.
    fn take_strangers(&mut self) -> Result<(), Error> {
        while self.strangers.len() < MAX_STRANGERS {
            match accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => self.strangers.push_back(Stranger {
                    socket,
                    incoming: Incoming::default(),
                    deadline: Instant::now() + STRANGER_PATIENCE,
                }),
                Err(Errno::AGAIN) => return Ok(()),
                // No descriptor is left now; the peer waits, and may come in later.
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    std::thread::sleep(SHORTAGE_PAUSE);
                    return Ok(());
                }
                // It is gone already; the next one may be there.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(e) => {
                    return Err(Error::io(format!("accept({})", self.path.display()))(e.into()));
                }
            }
        }
        Ok(())
    }

    /// Hears all strangers; keeps those who have said all, and drops those who talk nonsense or nothing.
    fn hear_strangers(&mut self) {
        let now = Instant::now();
        for mut stranger in std::mem::take(&mut self.strangers) {
            match stranger.incoming.advance(&stranger.socket, &self.inner.mappings) {
                Progress::Complete => self.complete.extend(ShmRequest::new(stranger, &self.inner.mappings)),
                Progress::Unfinished if now < stranger.deadline => self.strangers.push_back(stranger),
                Progress::Unfinished | Progress::Bad(_) => {}
            }
        }
    }

    /// Waits until the socket, or a stranger, may have something.
    fn sleep(&self, timeout: Duration) -> Result<(), Error> {
        let mut fds = Vec::with_capacity(1 + self.strangers.len());
        if self.strangers.len() < MAX_STRANGERS {
            fds.push(PollFd::new(&self.socket, PollFlags::IN));
        }
        fds.extend(self.strangers.iter().map(|stranger| PollFd::new(&stranger.socket, PollFlags::IN)));
        let now = Instant::now();
        let patience = self.strangers.iter().map(|stranger| stranger.deadline.saturating_duration_since(now));
        let timeout = patience.fold(timeout, Duration::min);
        match poll(&mut fds, timespec(timeout).as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(Error::io("poll(listener)")(e.into())),
        }
    }
}

/// Removes a socket file on which nobody listens; an error if somebody does, or if it is something else.
fn remove_stale(address: &Address, path: &Path, name: &SocketAddrUnix) -> Result<(), Error> {
    let is_socket = symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if !is_socket {
        return Err(Error::System {
            call: format!("bind({})", path.display()),
            source: io::Error::new(
                io::ErrorKind::AlreadyExists,
                "a file that is no socket is there; remove it or choose another path",
            ),
        });
    }
    let probe = new_socket(SocketFlags::NONBLOCK)?;
    match connect(&probe, name) {
        Err(Errno::CONNREFUSED) => {
            remove_file(path).map_err(Error::io(format!("unlink({}), a stale socket", path.display())))
        }
        Err(Errno::NOENT) => Ok(()),
        // Also when its backlog is full (EAGAIN), when it is a socket of another kind (EPROTOTYPE) …
        _ => Err(Error::AddressInUse { address: address.to_string() }),
    }
}

impl Listener for ShmListener {
    type Request = ShmRequest;

    fn accept(&mut self, timeout: Duration) -> Result<Option<ShmRequest>, Error> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            self.take_strangers()?;
            self.hear_strangers();
            if let Some(request) = self.complete.pop_front() {
                return Ok(Some(request));
            }
            let left = deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(None);
            }
            self.sleep(left)?;
        }
    }

    fn address(&self) -> &Address {
        &self.address
    }
}

impl Drop for ShmListener {
    fn drop(&mut self) {
        let ours = symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file);
        if ours {
            // If it cannot be removed, the next server replaces it.
            let _ = remove_file(&self.path);
        }
    }
}

/// A peer that wants to connect.
pub struct ShmRequest {
    /// `None` once it has been answered.
    peer: Option<(Peer, OwnedFd)>,
    private_data: Vec<u8>,
}

impl ShmRequest {
    /// `None`: it is no request.
    fn new(stranger: Stranger, mappings: &Mappings) -> Option<Self> {
        let (opening, fds) = stranger.incoming.opening?;
        let [bell] = <[OwnedFd; 1]>::try_from(fds).ok()?;
        if opening.kind != Kind::Hello {
            return None;
        }
        let bell = Page::open(mappings, &bell).ok()?;
        let private_data = opening.data.clone();
        let peer = Peer { opening, bell, regions: RemoteTable::new(stranger.incoming.regions) };
        Some(Self { peer: Some((peer, stranger.socket)), private_data })
    }

    fn refuse(&mut self, private_data: &[u8]) {
        if let Some((_, socket)) = self.peer.take() {
            // Fails when the peer is gone, and then nobody waits for the answer.
            let _ = send_opening(&socket, &Opening::refusal(private_data), &[], &[]);
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
        let seat = Seat::reserve(shared)?;
        let config = &shared.config;
        let depth = depth.clamp(1, config.send_depth);
        let Some((peer, _)) = &self.peer else { unreachable!("`self` is answered once, and then consumed") };
        let receive_size = config.receive_size as u64;
        let inward = ring::capacity(peer.opening.send_depth.max(config.receive_buffers as u64), receive_size);
        let outward =
            ring::capacity(peer.opening.receive_buffers.max(depth as u64), peer.opening.receive_size);
        let (inbox, inbox_file) = ring::create(inward)?;
        let (outbox, outbox_file) = ring::create(outward)?;
        let own = "a ring just made is of the right size";
        let (inbox, outbox) = (Inbox::new(inbox).expect(own), Outbox::new(outbox).expect(own));
        let offers = shared.inner.registry.offers();
        let accept = opening(Kind::Accept, &seat, config, depth, offers.len(), private_data);
        let fds = [shared.bell_file(), outbox_file.as_fd(), inbox_file.as_fd()];
        // Answered from here on: after a failure half way, the end of the socket is the peer's answer.
        let Some((peer, socket)) = self.peer.take() else { unreachable!("seen above") };
        send_opening(&socket, &accept, &fds, &offers)?;
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
        write!(f, "ShmRequest({} bytes of private data)", self.private_data.len())
    }
}
