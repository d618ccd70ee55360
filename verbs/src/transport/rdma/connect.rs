//! Listening and connecting: an offer in each direction over a TCP socket, and a byte that says "ready".
//!
//! ```text
//!  connects                                     listens
//!  socket ── request: offer, private data ────▶ a stranger at the door, heard beside others, for five seconds at most
//!                                               Listener::accept yields it; Request::accept makes the queue pair,
//!         ◀── acceptance: offer, private data ─ which can send and receive now, but sends nothing yet
//!  its queue pair can send and receive
//!         ── READY ───────────────────────────▶ the keeper reads it: what was posted meanwhile goes out
//! ```
//!
//! The socket stays open as long as the connection. It tells of the peer's end: of its process, or of the connection alone.
//!
//! **Which device.** The socket's local IP address chooses port and GID ([`crate::fabric`]). If it is an address of another device than the
//! transport's, the side that connects fails, and the side that listens refuses with the reason. (Sessions agree on rails instead.)
//!
//! **Trust.** Whoever reaches the port can connect. A stranger can hold a slot of the door, not the door. On Ethernet the kernel looks for the
//! hardware address of the GID that a peer offers, for a second if there is none. So a peer whose socket comes from the RDMA network
//! must offer the address that its socket comes from.

use std::{
    fmt,
    io::{self, ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::PollFlags,
    io::Errno,
    net::{self, AddressFamily, SocketFlags, SocketType, sockopt},
};

use crate::{
    address::Address,
    error::Error,
    fabric::{self, Fabric, Reason, Way},
    transport::{
        LaneSpec, Listener, MAX_REPLY_DATA, MAX_REQUEST_DATA, Request,
        host::{check_private_data, patience::Patience, strangers::Door},
        rdma::{
            connection::RdmaConnection,
            device::Device,
            endpoint::RdmaAttach,
            joining::{Impossible, Joining, Place},
            keeper::Channel,
            offer::{Kind, MESSAGE, Message, Offer, READY},
            queues::Queues,
            tables::read_tables,
        },
    },
};

/// The socket address of an `rdma://` URL, and the one to connect from.
fn resolve(address: &Address) -> Result<(SocketAddr, Option<SocketAddr>), Error> {
    let Address::Rdma { host, port, from } = address else {
        return Err(Error::WrongProvider { address: address.to_string(), provider: "rdma" });
    };
    let find = |host: &str, port: u16, like: Option<&SocketAddr>| {
        let unreachable = |reason: String| Error::Unreachable { address: address.to_string(), reason };
        let found: Vec<SocketAddr> = (host, port)
            .to_socket_addrs()
            .map_err(|error| unreachable(format!("`{host}` has no address ({error})")))?
            .collect();
        let fits = |candidate: &&SocketAddr| like.is_none_or(|like| like.is_ipv4() == candidate.is_ipv4());
        // Soft-RoCE and most RoCE set-ups speak IPv4.
        let best = found.iter().filter(fits).min_by_key(|candidate| candidate.is_ipv6());
        best.copied()
            .ok_or_else(|| unreachable(format!("`{host}` has no address of the family of the other end")))
    };
    let from = from.as_deref().map(|from| find(from, 0, None)).transpose()?;
    Ok((find(host, *port, from.as_ref())?, from))
}

/// The address of this end of a way: what is told, or what the kernel says. No packet is sent.
fn own_end(address: &Address, to: SocketAddr, from: Option<SocketAddr>) -> Result<IpAddr, Error> {
    if let Some(from) = from {
        return Ok(from.ip());
    }
    let look_up = || {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
        socket.connect(SocketAddr::new(to.ip(), 9))?;
        socket.local_addr()
    };
    look_up().map(|local| local.ip()).map_err(|error| Error::Unreachable {
        address: address.to_string(),
        reason: format!("there is no way ({error})"),
    })
}

/// The name of the device that leads to `address`: of the one that has it, if it is an address of this host. `None`: any one.
pub(super) fn device_for(address: &Address, fabric: &Fabric) -> Result<Option<String>, Error> {
    let (to, from) = resolve(address)?;
    if to.ip().is_unspecified() && from.is_none() {
        return Ok(None);
    }
    let local = own_end(address, to, from)?;
    let devices = read_tables()?;
    let found = fabric::choose(&devices, None, None, local, fabric);
    found.map(|local| Some(local.device)).map_err(|reason| Error::NoDevice { reason })
}

/// A connection that is being made.
struct Dialling<'a>(Patience<'a>);

impl Dialling<'_> {
    /// A socket that is connected, and does not block.
    fn dial(&self, to: SocketAddr, from: SocketAddr) -> Result<TcpStream, Error> {
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = net::socket_with(family, SocketType::STREAM, flags, None)
            .map_err(|e| Error::io("socket()")(e.into()))?;
        net::bind(&socket, &from)
            .map_err(|e| self.0.unreachable(format!("cannot connect from `{}`: {e}", from.ip())))?;
        let begun = net::connect(&socket, &to);
        let socket = TcpStream::from(socket);
        match begun {
            Ok(()) => {}
            Err(Errno::INPROGRESS | Errno::INTR) => loop {
                self.0.wait(&socket, PollFlags::OUT)?;
                if let Some(error) = socket.take_error().map_err(Error::io("getsockopt(SO_ERROR)"))? {
                    return Err(self.0.unreachable(error.to_string()));
                }
                if socket.peer_addr().is_ok() {
                    break;
                }
            },
            Err(e) => return Err(self.0.unreachable(io::Error::from(e).to_string())),
        }
        sockopt::set_tcp_nodelay(&socket, true)
            .map_err(|e| Error::io("setsockopt(TCP_NODELAY)")(e.into()))?;
        Ok(socket)
    }

    fn say(&self, mut socket: &TcpStream, mut words: &[u8]) -> Result<(), Error> {
        while !words.is_empty() {
            match socket.write(words) {
                Ok(count) => words = &words[count..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.0.wait(socket, PollFlags::OUT)?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.0.unreachable(error.to_string())),
            }
        }
        Ok(())
    }

    fn hear(&self, mut socket: &TcpStream) -> Result<Message, Error> {
        let mut answer = [0; MESSAGE];
        let mut heard = 0;
        while heard < MESSAGE {
            match socket.read(&mut answer[heard..]) {
                Ok(0) => return Err(self.0.unreachable("it closed the connection")),
                Ok(count) => heard += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.0.wait(socket, PollFlags::IN)?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.0.unreachable(error.to_string())),
            }
        }
        Message::decode(&answer).map_err(|reason| self.0.unreachable(reason))
    }
}

/// Connects, as [`Transport::connect`](crate::transport::Transport::connect) says.
pub(super) fn connect(
    address: &Address,
    LaneSpec { endpoint, private_data: data, depth }: LaneSpec<'_, RdmaAttach>,
    limit: Duration,
) -> Result<(RdmaConnection, Vec<u8>), Error> {
    let queues = &endpoint.0;
    let (to, from) = resolve(address)?;
    check_private_data(data, MAX_REQUEST_DATA)?;
    let dialling = Dialling(Patience::new(address, limit));
    let ip = own_end(address, to, from)?;
    let local = queues.device.local(ip).map_err(|reason| {
        dialling.0.unreachable(format!(
            "the way there does not lead through {}, the device of this transport: {reason}; choose the local address \
             with ?from=",
            queues.device.name
        ))
    })?;
    let place = Place::reserve(queues)?;
    let socket = dialling.dial(to, SocketAddr::new(ip, 0))?;
    let mut joining = Joining::new(queues, place, local, depth)?;
    let request = Message { kind: Kind::Request, offer: joining.offer(), data: data.to_vec() };
    dialling.say(&socket, &request.encode())?;
    let answer = dialling.hear(&socket)?;
    match answer.kind {
        Kind::Accept => {}
        Kind::Refuse => {
            return Err(Error::Refused { address: address.to_string(), private_data: answer.data });
        }
        Kind::Impossible => return Err(dialling.0.unreachable(String::from_utf8_lossy(&answer.data))),
        Kind::Request => return Err(dialling.0.unreachable("it wants to connect, too")),
    }
    joining.finish(&answer.offer).map_err(|impossible| match impossible {
        Impossible::Offer(reason) => dialling.0.unreachable(reason),
        Impossible::Own(error) => dialling.0.unreachable(error.to_string()),
    })?;
    dialling.say(&socket, &[READY])?;
    Ok((joining.connection(Channel::Socket(socket)), answer.data))
}

/// A listening address of the `rdma` provider.
pub struct RdmaListener {
    door: Door<MESSAGE>,
    address: Address,
    device: Arc<Device>,
}

impl RdmaListener {
    pub(super) fn new(device: &Arc<Device>, address: &Address) -> Result<Self, Error> {
        let (at, _) = resolve(address)?;
        if !at.ip().is_unspecified() {
            device.local(at.ip()).map_err(|reason| Error::NoDevice { reason })?;
        }
        let socket = TcpListener::bind(at).map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => Error::AddressInUse { address: address.to_string() },
            ErrorKind::AddrNotAvailable => {
                Error::NoDevice { reason: format!("`{}` is not an address of this host", at.ip()) }
            }
            _ => Error::io(format!("bind({at})"))(error),
        })?;
        let port = socket.local_addr().map_err(Error::io("getsockname()"))?.port();
        let Address::Rdma { host, .. } = address else { unreachable!("`resolve` takes no other kind") };
        let address = Address::Rdma { host: host.clone(), port, from: None };
        Ok(Self { door: Door::new(socket, address.to_string())?, address, device: Arc::clone(device) })
    }
}

impl Listener for RdmaListener {
    type Request = RdmaRequest;

    fn accept(&mut self, timeout: Duration) -> Result<Option<RdmaRequest>, Error> {
        let deadline = Instant::now().checked_add(timeout);
        while let Some((socket, said)) = self.door.next(deadline)? {
            if let Some(request) = RdmaRequest::new(&self.device, &self.address, socket, &said) {
                return Ok(Some(request));
            }
        }
        Ok(None)
    }

    fn address(&self) -> &Address {
        &self.address
    }
}

/// Says something to a peer to which nothing was said before, so that its socket has room for it. It may be gone.
fn tell(mut socket: &TcpStream, message: &Message) {
    let _ = socket.write_all(&message.encode());
}

/// A peer that wants to connect through the `rdma` provider.
pub struct RdmaRequest {
    /// Until it is accepted or refused.
    socket: Option<TcpStream>,
    /// The addresses of the socket: this end's, and the peer's.
    ips: (IpAddr, IpAddr),
    message: Message,
    address: Address,
    device: Arc<Device>,
}

/// The request of a stranger who has come to `device`, and the addresses of its socket: this end's, and the peer's.
///
/// # Errors
/// A sentence for the peer.
fn understand(
    device: &Device,
    socket: &TcpStream,
    said: &[u8; MESSAGE],
) -> Result<(Message, (IpAddr, IpAddr)), String> {
    let message = Message::decode(said)?;
    if message.kind != Kind::Request {
        return Err(format!("a request was expected, and not a message of kind {:?}", message.kind));
    }
    let (own, theirs) = (socket.local_addr(), socket.peer_addr());
    let (Ok(own), Ok(theirs)) = (own, theirs) else { return Err("its socket has no address".to_owned()) };
    device.local(own.ip()).map_err(|reason| {
        format!("the server works on its device {}, which the way there misses: {reason}", device.name)
    })?;
    Ok((message, (own.ip(), theirs.ip())))
}

impl RdmaRequest {
    /// `None`: it is a stranger, or a peer of another version, and was told why it cannot come in.
    pub(super) fn new(
        device: &Arc<Device>,
        address: &Address,
        socket: TcpStream,
        said: &[u8; MESSAGE],
    ) -> Option<Self> {
        match understand(device, &socket, said) {
            Ok((message, ips)) => {
                let (address, device) = (address.clone(), Arc::clone(device));
                Some(Self { socket: Some(socket), ips, message, address, device })
            }
            Err(reason) => {
                tell(&socket, &Message::refusal(Kind::Impossible, reason.as_bytes()));
                None
            }
        }
    }

    fn refuse(&mut self, kind: Kind, data: &[u8]) {
        if let Some(socket) = self.socket.take() {
            tell(&socket, &Message::refusal(kind, data));
        }
    }
}

/// Answers the offer of a peer whose channel, over TCP, has these addresses: this end's, and the peer's.
pub(super) fn answer(
    queues: &Arc<Queues>,
    (own, from): (IpAddr, IpAddr),
    depth: usize,
    offer: &[u8],
) -> Result<Joining, Impossible> {
    let place = Place::reserve(queues).map_err(Impossible::Own)?;
    let local = queues.device.local(own).map_err(Impossible::Offer)?;
    let theirs = Offer::decode(offer).map_err(Impossible::Offer)?;
    let by_address = matches!(local.why, Reason::Address(_)) && local.way != Way::InfiniBand;
    let from = match from {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    if by_address && theirs.way == local.way && theirs.gid != from {
        return Err(Impossible::Offer(format!(
            "its GID is {}, but its socket comes from {from}; set FERVOR_IB_GID_INDEX at both ends or at none",
            theirs.gid
        )));
    }
    let mut joining = Joining::new(queues, place, local, depth).map_err(Impossible::Own)?;
    joining.answer(offer)?;
    Ok(joining)
}

impl Request for RdmaRequest {
    type Attach = RdmaAttach;
    type Connection = RdmaConnection;

    fn private_data(&self) -> &[u8] {
        &self.message.data
    }

    fn accept_with(
        mut self,
        endpoint: &RdmaAttach,
        depth: usize,
        private_data: &[u8],
    ) -> Result<RdmaConnection, Error> {
        check_private_data(private_data, MAX_REPLY_DATA)?;
        assert!(
            Arc::ptr_eq(&endpoint.0.device, &self.device),
            "the endpoint is of another transport than the listener"
        );
        let failed = |source: io::Error| Error::System {
            call: format!("accepting a peer at `{}`", self.address),
            source,
        };
        let joining = match answer(&endpoint.0, self.ips, depth, &self.message.offer) {
            Ok(joining) => joining,
            // A peer without a place is refused as `self` is dropped.
            Err(Impossible::Own(error @ Error::Limit { .. })) => return Err(error),
            Err(Impossible::Own(error)) => {
                self.refuse(Kind::Impossible, error.to_string().as_bytes());
                return Err(error);
            }
            Err(Impossible::Offer(reason)) => {
                let error = failed(io::Error::new(ErrorKind::InvalidData, reason.as_str()));
                self.refuse(Kind::Impossible, reason.as_bytes());
                return Err(error);
            }
        };
        let socket = self.socket.take().expect("only `accept` and `refuse` take it");
        let answer = Message { kind: Kind::Accept, offer: joining.offer(), data: private_data.to_vec() };
        sockopt::set_tcp_nodelay(&socket, true).map_err(|e| failed(e.into()))?;
        // It has room: nothing was said before.
        (&socket).write_all(&answer.encode()).map_err(failed)?;
        Ok(joining.connection(Channel::Socket(socket)))
    }

    fn reject(mut self, private_data: &[u8]) {
        let most = MAX_REPLY_DATA;
        assert!(private_data.len() <= most, "{} bytes of private data; at most {most}", private_data.len());
        self.refuse(Kind::Refuse, private_data);
    }
}

impl Drop for RdmaRequest {
    fn drop(&mut self) {
        self.refuse(Kind::Refuse, &[]);
    }
}

impl fmt::Debug for RdmaRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a peer that wants to connect to {}", self.address)
    }
}

impl fmt::Debug for RdmaListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "listener at {} on {}", self.address, self.device.name)
    }
}
