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

use rustix::net::sockopt;

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
        Listener, MAX_REPLY_DATA, MAX_REQUEST_DATA, Reach, Request,
        host::{check_private_data, strangers::Door},
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
    shared: &Arc<Shared>,
    address: &Address,
    private_data: &[u8],
    timeout: Duration,
) -> Result<(TcpConnection, Vec<u8>), Error> {
    let addresses = resolve(address)?;
    check_private_data(private_data, MAX_REQUEST_DATA)?;
    let deadline = Instant::now().checked_add(timeout);
    let left = || deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
    let late =
        || Error::Timeout { what: format!("connecting to `{address}`"), seconds: timeout.as_secs_f64() };
    let unreachable = |reason: String| Error::Unreachable { address: address.to_string(), reason };
    let seat = Seat::reserve(shared)?;
    let depth = shared.config.send_depth;
    let mut socket = dial(&addresses, left).map_err(|error| match error.kind() {
        ErrorKind::TimedOut | ErrorKind::WouldBlock => late(),
        _ => unreachable(error.to_string()),
    })?;
    let said = socket.write_all(&opening(OpeningKind::Hello, shared, depth, private_data).encode());
    said.map_err(|error| unreachable(error.to_string()))?;
    let mut answer = [0; OPENING];
    let mut heard = 0;
    while heard < OPENING {
        let left = left();
        if left.is_zero() {
            return Err(late());
        }
        socket.set_read_timeout(Some(left)).map_err(Error::io("setsockopt(SO_RCVTIMEO)"))?;
        match socket.read(&mut answer[heard..]) {
            Ok(0) => return Err(unreachable("it closed the connection".to_owned())),
            Ok(count) => heard += count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(unreachable(error.to_string())),
        }
    }
    let answer = Opening::decode(&answer).map_err(unreachable)?;
    match answer.kind {
        OpeningKind::Accept => {}
        OpeningKind::Refuse => {
            return Err(Error::Refused { address: address.to_string(), private_data: answer.private_data });
        }
        OpeningKind::Hello => return Err(unreachable("it wants to connect, too".to_owned())),
    }
    prepare(&socket)?;
    let link = seat.occupy(socket, depth, answer.send_depth, None);
    Ok((TcpConnection::new(shared.clone(), link), answer.private_data))
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
