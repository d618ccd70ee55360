//! Listening and connecting: an opening in each direction, over a socket that is then a connection.
//!
//! Nobody holds the [door](Door): strangers are heard side by side, and for a short time.

use std::{
    fmt,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener as Socket, TcpStream, ToSocketAddrs},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::PollFlags,
    io::Errno,
    net::{self, AddressFamily, SocketFlags, SocketType, sockopt},
};

use super::{
    connection::TcpConnection,
    endpoint::TcpAttach,
    shared::{Seat, Shared},
    wire::{OPENING, Opening, OpeningKind},
};
use crate::{
    address::Address,
    error::Error,
    transport::{
        LaneSpec, Listener, MAX_REPLY_DATA, MAX_REQUEST_DATA, Reach, Request,
        host::{check_private_data, patience::Patience, strangers::Door},
    },
};

/// A peer whose kernel does not answer for so long is dead. With the time between two beats of the engine it is what the contract
/// allows.
const SILENCE: Duration = Duration::from_millis(1500);

/// The addresses of a `tcp://` URL.
fn resolve(address: &Address) -> Result<Vec<SocketAddr>, Error> {
    let Address::Tcp { host, port } = address else {
        return Err(Error::WrongProvider { address: address.to_string(), provider: "tcp" });
    };
    look_up(address, host, *port)
}

/// The addresses of a host, which `address` names.
pub(in crate::transport) fn look_up(
    address: &Address,
    host: &str,
    port: u16,
) -> Result<Vec<SocketAddr>, Error> {
    let unreachable = |reason: String| Error::Unreachable { address: address.to_string(), reason };
    let found: Vec<_> =
        (host, port).to_socket_addrs().map_err(|error| unreachable(error.to_string()))?.collect();
    if found.is_empty() { Err(unreachable("the name has no address".to_owned())) } else { Ok(found) }
}

/// Makes a socket what a connection needs.
fn prepare(socket: &TcpStream) -> Result<(), Error> {
    socket.set_nonblocking(true).map_err(Error::io("fcntl(O_NONBLOCK)"))?;
    socket.set_nodelay(true).map_err(Error::io("setsockopt(TCP_NODELAY)"))?;
    // That a process has ended is told by its kernel. This finds out that a host is gone.
    sockopt::set_tcp_user_timeout(socket, SILENCE.as_millis() as u32)
        .map_err(|e| Error::io("setsockopt(TCP_USER_TIMEOUT)")(e.into()))
}

fn opening(kind: OpeningKind, shared: &Shared, depth: usize, private_data: &[u8]) -> Opening {
    Opening {
        kind,
        receive_size: shared.config.receive_size as u64,
        send_depth: depth as u64,
        private_data: private_data.to_vec(),
    }
}

/// See [`Transport::connect`](crate::transport::Transport::connect).
pub(super) fn connect_to(
    address: &Address,
    lane: LaneSpec<'_, TcpAttach>,
    timeout: Duration,
) -> Result<(TcpConnection, Vec<u8>), Error> {
    let addresses = resolve(address)?;
    let patience = Patience::new(address, timeout);
    let mut calling = Calling::new(patience, lane, |patience| {
        dial(&addresses, || patience.left()).map_err(|error| match error.kind() {
            ErrorKind::TimedOut | ErrorKind::WouldBlock => patience.late(),
            _ => patience.unreachable(error.to_string()),
        })
    })?;
    calling.say()?;
    calling.finish()
}

/// A connection that is being made. Many listeners can be told what is wanted before the first answer is awaited.
pub(in crate::transport) struct Calling<'a> {
    shared: Arc<Shared>,
    patience: Patience<'a>,
    seat: Seat,
    depth: usize,
    socket: TcpStream,
    opening: Opening,
}

impl<'a> Calling<'a> {
    fn new(
        patience: Patience<'a>,
        lane: LaneSpec<'_, TcpAttach>,
        dial: impl FnOnce(&Patience<'_>) -> Result<TcpStream, Error>,
    ) -> Result<Self, Error> {
        check_private_data(lane.private_data, MAX_REQUEST_DATA)?;
        let shared = lane.endpoint.0.clone();
        let seat = Seat::reserve(&shared)?;
        let depth = lane.depth.clamp(1, shared.config.send_depth);
        let opening = opening(OpeningKind::Hello, &shared, depth, lane.private_data);
        let socket = dial(&patience)?;
        Ok(Self { shared, patience, seat, depth, socket, opening })
    }

    /// Begins to connect to `at`, which `address` names, and waits for nothing.
    pub(in crate::transport) fn begin(
        address: &'a Address,
        at: SocketAddr,
        lane: LaneSpec<'_, TcpAttach>,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let patience = Patience::new(address, timeout);
        Self::new(patience, lane, |patience| {
            let family = if at.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = net::socket_with(family, SocketType::STREAM, flags, None)
                .map_err(|e| Error::io("socket()")(e.into()))?;
            match net::connect(&socket, &at) {
                Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(socket.into()),
                Err(e) => Err(patience.unreachable(io::Error::from(e).to_string())),
            }
        })
    }

    /// Says what is wanted, when the socket is connected.
    pub(in crate::transport) fn say(&mut self) -> Result<(), Error> {
        self.patience.wait(&self.socket, PollFlags::OUT)?;
        if let Some(error) = self.socket.take_error().map_err(Error::io("getsockopt(SO_ERROR)"))? {
            return Err(self.patience.unreachable(error.to_string()));
        }
        // The socket has sent nothing yet, so it has room for that.
        let said = self.socket.write_all(&self.opening.encode());
        said.map_err(|error| self.patience.unreachable(error.to_string()))
    }

    /// Hears the answer.
    pub(in crate::transport) fn finish(self) -> Result<(TcpConnection, Vec<u8>), Error> {
        let Self { shared, patience, seat, depth, mut socket, .. } = self;
        let mut answer = [0; OPENING];
        let mut heard = 0;
        while heard < OPENING {
            patience.wait(&socket, PollFlags::IN)?;
            match socket.read(&mut answer[heard..]) {
                Ok(0) => return Err(patience.unreachable("it closed the connection")),
                Ok(count) => heard += count,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(patience.unreachable(error.to_string())),
            }
        }
        let answer = Opening::decode(&answer).map_err(|reason| patience.unreachable(reason))?;
        let address = patience.address.to_string();
        match answer.kind {
            OpeningKind::Accept => {}
            OpeningKind::Refuse => {
                return Err(Error::Refused { address, private_data: answer.private_data });
            }
            OpeningKind::Hello => return Err(patience.unreachable("it wants to connect, too")),
        }
        prepare(&socket)?;
        let link = seat.occupy(socket, depth, answer.send_depth, None);
        Ok((TcpConnection::new(shared, link), answer.private_data))
    }
}

/// Connects to the first of the addresses that answers.
pub(in crate::transport) fn dial(
    addresses: &[SocketAddr],
    left: impl Fn() -> Duration,
) -> io::Result<TcpStream> {
    let mut last = None;
    for (number, address) in addresses.iter().enumerate() {
        // Each has its share of the time. 0 would be refused as no time.
        let share = left() / (addresses.len() - number) as u32;
        match TcpStream::connect_timeout(address, share.max(Duration::from_millis(1))) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = Some(error),
        }
    }
    Err(last.expect("there is an address"))
}

/// A socket that listens at one of `addresses`, which `address` names, and its port.
pub(in crate::transport) fn bind(
    address: &Address,
    addresses: &[SocketAddr],
) -> Result<(Socket, u16), Error> {
    let socket = Socket::bind(addresses).map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => Error::AddressInUse { address: address.to_string() },
        _ => Error::io(format!("bind({address})"))(error),
    })?;
    let port = socket.local_addr().map_err(Error::io("getsockname"))?.port();
    Ok((socket, port))
}

/// A listening socket of the `tcp` provider.
pub struct TcpListener {
    door: Door<OPENING>,
    address: Address,
}

impl TcpListener {
    pub(super) fn new(address: &Address) -> Result<Self, Error> {
        let addresses = resolve(address)?;
        let (socket, port) = bind(address, &addresses)?;
        let Address::Tcp { host, .. } = address else { unreachable!("`resolve` takes no other kind") };
        let address = Address::Tcp { host: host.clone(), port };
        Ok(Self { door: Door::new(socket, address.to_string())?, address })
    }
}

impl Listener for TcpListener {
    type Request = TcpRequest;

    fn accept(&mut self, timeout: Duration) -> Result<Option<TcpRequest>, Error> {
        let deadline = Instant::now().checked_add(timeout);
        while let Some((socket, opening)) = self.door.next(deadline)? {
            // Whoever talks nonsense is dropped.
            if let Some(request) = TcpRequest::new(socket, &opening) {
                return Ok(Some(request));
            }
        }
        Ok(None)
    }

    fn address(&self) -> &Address {
        &self.address
    }
}

/// A peer that wants to connect.
pub struct TcpRequest {
    /// `None` once it has been answered.
    socket: Option<TcpStream>,
    opening: Opening,
    /// What the peer may reach, if not everything.
    reach: Option<Arc<Reach>>,
}

impl TcpRequest {
    /// `None`: it is no request.
    pub(in crate::transport) fn new(socket: TcpStream, opening: &[u8; OPENING]) -> Option<Self> {
        let opening = Opening::decode(opening).ok()?;
        let good = opening.kind == OpeningKind::Hello && opening.private_data.len() <= MAX_REQUEST_DATA;
        good.then_some(Self { socket: Some(socket), opening, reach: None })
    }

    /// Says the answer. The socket has sent nothing yet, so it has room for that.
    fn answer(mut socket: &TcpStream, opening: &Opening) -> io::Result<()> {
        socket.write_all(&opening.encode())
    }

    fn refuse(&mut self, private_data: &[u8]) {
        if let Some(socket) = self.socket.take() {
            let kind = OpeningKind::Refuse;
            let refusal =
                Opening { kind, receive_size: 0, send_depth: 0, private_data: private_data.to_vec() };
            // Fails when the peer is gone, and then nobody waits for the answer.
            let _ = Self::answer(&socket, &refusal);
        }
    }
}

impl Request for TcpRequest {
    type Attach = TcpAttach;
    type Connection = TcpConnection;

    fn private_data(&self) -> &[u8] {
        &self.opening.private_data
    }

    fn limit(&mut self, reach: &Arc<Reach>) -> bool {
        self.reach = Some(reach.clone());
        true
    }

    fn accept_with(
        mut self,
        endpoint: &TcpAttach,
        depth: usize,
        private_data: &[u8],
    ) -> Result<TcpConnection, Error> {
        check_private_data(private_data, MAX_REPLY_DATA)?;
        let shared = &endpoint.0;
        let seat = Seat::reserve(shared)?;
        let depth = depth.clamp(1, shared.config.send_depth);
        // Answered from here on: after a failure half way, the end of the socket is the peer's answer.
        let socket = self.socket.take().expect("it is answered once, and then consumed");
        prepare(&socket)?;
        Self::answer(&socket, &opening(OpeningKind::Accept, shared, depth, private_data))
            .map_err(Error::io("send(the acceptance)"))?;
        let link = seat.occupy(socket, depth, self.opening.send_depth, self.reach.take());
        Ok(TcpConnection::new(shared.clone(), link))
    }

    fn reject(mut self, private_data: &[u8]) {
        let most = MAX_REPLY_DATA;
        assert!(private_data.len() <= most, "{} bytes of private data; at most {most}", private_data.len());
        self.refuse(private_data);
    }
}

impl Drop for TcpRequest {
    fn drop(&mut self) {
        self.refuse(&[]);
    }
}

impl fmt::Debug for TcpListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpListener({})", self.address)
    }
}

impl fmt::Debug for TcpRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpRequest({} bytes of private data)", self.opening.private_data.len())
    }
}
