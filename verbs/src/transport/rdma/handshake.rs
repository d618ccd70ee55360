//! Connecting, listening, accepting, refusing.
//!
//! A handshake is driven by the thread that asked for it, on an event channel of its own; when it is done, the
//! identifier migrates to the manager's channel. The link joins its endpoint before the first message that could make
//! a completion, so the polling thread knows every queue pair that it hears of.

use std::{
    fmt, io,
    net::{SocketAddr, ToSocketAddrs},
    sync::Arc,
    time::{Duration, Instant},
};

use rdma_sys::{rdma_cm_event, rdma_cm_event_type, rdma_cm_id};

use crate::{
    address::Address,
    error::Error,
    transport::{
        Connection, Listener, Request,
        rdma::{
            connection::RdmaConnection,
            device::{Device, Limits},
            endpoint::RdmaAttach,
            frame::{Kind, frame, unframe},
            id::{CmId, EventChannel, Parameters},
            link::Link,
            manager::Manager,
            queues::{News, Queues},
        },
    },
};

/// Connection requests that may wait for [`Listener::accept`].
const BACKLOG: i32 = 256;
/// How long an accepted peer may take to say that it is there. The kernel's connection manager repeats a lost message of a
/// handshake after 4.3 s (`CMA_CM_RESPONSE_TIMEOUT`), so this is enough for two lost ones.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(10);

// What the InfiniBand connection manager says with a refusal (`ib_cm.h`): nobody listens on the port; a peer refused.
const REJECTED_NO_LISTENER: i32 = 8;
const REJECTED_BY_PEER: i32 = 28;

/// When an unanswered request is sent again: the time, as the exponent of `4.096 us * 2^exponent`, and how often. Then the
/// connection breaks. (7 times would mean for ever on rxe.)
///
/// A dead peer is to be found out within two seconds, 0.4 s of which may pass until an idle connection asks. A NIC
/// gives up after 0.5 s by its own clock, and may take up to four times that. rxe gives up after 1.1 s sharp; it gets the
/// longer time at once because it shares the processors with all that keeps it from answering, and because it breaks
/// connections when it sends READs again for no need.
fn patience(limits: &Limits) -> (u8, u8) {
    if limits.software { (16, 3) } else { (14, 6) }
}

/// The socket addresses to try for an address, and the one to connect from.
pub(super) fn resolve(address: &Address) -> Result<(SocketAddr, Option<SocketAddr>), Error> {
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

/// What an event says, copied out of it.
struct Said {
    event: rdma_cm_event_type::Type,
    status: i32,
    data: Vec<u8>,
    reads_out: u8,
    reads_in: u8,
    id: *mut rdma_cm_id,
}

impl Said {
    fn of(event: &rdma_cm_event) -> Self {
        let with_data = matches!(
            event.event,
            rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST
                | rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED
                | rdma_cm_event_type::RDMA_CM_EVENT_REJECTED
        );
        let mut said = Self {
            event: event.event,
            status: event.status,
            data: Vec::new(),
            reads_out: 0,
            reads_in: 0,
            id: event.id,
        };
        if with_data {
            // SAFETY: these events of a reliable connection carry the parameters of one. Their private data, if
            // there are any, have the length given, and stay until the event is acknowledged.
            unsafe {
                let parameters = &event.param.conn;
                said.reads_out = parameters.initiator_depth;
                said.reads_in = parameters.responder_resources;
                if !parameters.private_data.is_null() {
                    let length = usize::from(parameters.private_data_len);
                    said.data = std::slice::from_raw_parts(parameters.private_data.cast(), length).to_vec();
                }
            }
        }
        said
    }
}

/// A handshake's view of its address and its deadline.
struct Handshake<'a> {
    address: &'a Address,
    channel: Arc<EventChannel>,
    deadline: Instant,
    limit: Duration,
}

impl Handshake<'_> {
    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    fn unreachable(&self, reason: impl Into<String>) -> Error {
        Error::Unreachable { address: self.address.to_string(), reason: reason.into() }
    }

    fn failed(&self, call: &str) -> impl FnOnce(io::Error) -> Error {
        let (call, address) = (call.to_owned(), self.address.to_string());
        move |source| match source.raw_os_error() {
            Some(
                libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::ENODEV
                | libc::EADDRNOTAVAIL
                | libc::ECONNREFUSED
                | libc::ETIMEDOUT
                | libc::ECONNRESET,
            ) => Error::Unreachable { address, reason: format!("{call}: {source}") },
            _ => Error::System { call: format!("{call} for {address}"), source },
        }
    }

    /// Waits for the next event.
    fn next(&self) -> Result<Said, Error> {
        self.channel.wait(self.deadline, Said::of)?.ok_or_else(|| Error::Timeout {
            what: format!("a handshake at `{}`", self.address),
            seconds: self.limit.as_secs_f64(),
        })
    }

    /// Waits for `event`; any other one is the failure that it says.
    fn expect(&self, event: rdma_cm_event_type::Type) -> Result<Said, Error> {
        let said = self.next()?;
        if said.event == event { Ok(said) } else { Err(self.failure(&said)) }
    }

    fn failure(&self, said: &Said) -> Error {
        let os = io::Error::from_raw_os_error(said.status.abs());
        match said.event {
            rdma_cm_event_type::RDMA_CM_EVENT_ADDR_ERROR => {
                self.unreachable(format!("its address does not resolve ({os})"))
            }
            rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_ERROR => {
                self.unreachable(format!("there is no route ({os})"))
            }
            rdma_cm_event_type::RDMA_CM_EVENT_REJECTED => self.rejected(said),
            rdma_cm_event_type::RDMA_CM_EVENT_UNREACHABLE => self.unreachable(format!("no answer ({os})")),
            rdma_cm_event_type::RDMA_CM_EVENT_DISCONNECTED => self.unreachable("the peer has gone again"),
            other => self.unreachable(format!("connection manager event {other}, status {}", said.status)),
        }
    }

    fn rejected(&self, said: &Said) -> Error {
        match (said.status, unframe(&said.data)) {
            (_, Some((Kind::Refuse, data))) => {
                Error::Refused { address: self.address.to_string(), private_data: data.to_vec() }
            }
            (_, Some((Kind::Impossible, reason))) => self.unreachable(String::from_utf8_lossy(reason)),
            (REJECTED_NO_LISTENER, _) => self.unreachable("nobody listens on the port"),
            (REJECTED_BY_PEER, _) => {
                Error::Refused { address: self.address.to_string(), private_data: Vec::new() }
            }
            (status, _) => self.unreachable(format!("rejected by the connection manager (reason {status})")),
        }
    }
}

/// The identifier of a device's own way to `address`: bound, or with its address resolved.
pub(super) fn route(address: &Address, limit: Duration) -> Result<CmId, Error> {
    let (to, from) = resolve(address)?;
    let channel = EventChannel::new()?;
    let mut id = CmId::new(&channel)?;
    let local = from.unwrap_or(SocketAddr::new(to.ip(), 0));
    if id.bind(local).is_ok() {
        return Ok(id);
    }
    let mut id = CmId::new(&channel)?;
    let handshake = Handshake { address, channel, deadline: Instant::now() + limit, limit };
    id.resolve_address(from, to, handshake.left()).map_err(handshake.failed("rdma_resolve_addr"))?;
    handshake.expect(rdma_cm_event_type::RDMA_CM_EVENT_ADDR_RESOLVED)?;
    Ok(id)
}

/// Connects, as [`Transport::connect`](crate::transport::Transport::connect) says.
pub(super) fn connect(
    queues: &Arc<Queues>,
    address: &Address,
    data: &[u8],
    limit: Duration,
) -> Result<(RdmaConnection, Vec<u8>), Error> {
    let framed = frame(Kind::Request, data);
    let (to, from) = resolve(address)?;
    let channel = EventChannel::new()?;
    let mut id = CmId::new(&channel)?;
    let handshake = Handshake { address, channel, deadline: Instant::now() + limit, limit };
    id.resolve_address(from, to, handshake.left()).map_err(handshake.failed("rdma_resolve_addr"))?;
    handshake.expect(rdma_cm_event_type::RDMA_CM_EVENT_ADDR_RESOLVED)?;
    if id.context() != queues.device.context {
        return Err(handshake.unreachable(format!(
            "the way there does not lead through {}, the device of this transport; choose the local address with ?from=",
            queues.device.name
        )));
    }
    id.resolve_route(handshake.left()).map_err(handshake.failed("rdma_resolve_route"))?;
    handshake.expect(rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_RESOLVED)?;
    let own = parameters(queues, u8::MAX, u8::MAX);
    queues.reserve()?;
    let joined = Joined::new(queues, id, queues.config.send_depth)?;
    joined.with_cm(|cm| cm.connect(own, &framed))?.map_err(handshake.failed("rdma_connect"))?;
    let said = handshake.expect(rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED)?;
    let Some((Kind::Accept, reply)) = unframe(&said.data) else {
        return Err(
            handshake.unreachable("what answers there is no Fervor server, or one of another version")
        );
    };
    Ok((joined.finish()?, reply.to_vec()))
}

/// The READs in flight that an endpoint offers, at most those that the peer asks for.
fn parameters(queues: &Queues, peer_serves: u8, peer_initiates: u8) -> Parameters {
    let wanted = queues.config.read_depth.min(usize::from(u8::MAX)) as u8;
    Parameters {
        reads_out: wanted.min(queues.device.limits.reads_out).min(peer_serves),
        reads_in: wanted.min(queues.device.limits.reads_in).min(peer_initiates),
        retries: patience(&queues.device.limits).1,
    }
}

/// A link that has joined its endpoint, but is no connection yet. Dropped, it leaves again.
struct Joined(Option<Arc<Link>>);

impl Joined {
    /// Joins at a place that has been reserved.
    fn new(queues: &Arc<Queues>, mut id: CmId, depth: usize) -> Result<Self, Error> {
        let made =
            id.set_ack_timeout(patience(&queues.device.limits).0).and_then(|()| Link::new(queues, id, depth));
        let link = made.inspect_err(|_| queues.unreserve())?;
        queues.manager.watch(&link);
        let joined = Self(Some(link));
        if !queues.tell(News::Joined(Arc::clone(joined.link()))) {
            return Err(gone());
        }
        Ok(joined)
    }

    fn link(&self) -> &Arc<Link> {
        self.0.as_ref().expect("only `finish` takes it, with `self`")
    }

    fn with_cm<R>(&self, act: impl FnOnce(&mut CmId) -> R) -> Result<R, Error> {
        self.link().with_cm(act).ok_or_else(gone)
    }

    /// Hands the established connection to the manager and the user.
    fn finish(mut self) -> Result<RdmaConnection, Error> {
        let reads = self.link().finish_setup()?;
        let manager = Arc::clone(&self.link().queues.manager);
        self.with_cm(|cm| cm.migrate(manager.channel()))??;
        let link = self.0.take().expect("only this function takes it");
        Ok(RdmaConnection::new(link, reads))
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let Some(link) = self.0.take() else { return };
        link.give_up();
        link.queues.tell(News::GivenUp(link.id));
        // At once, not when the endpoint is next polled: whoever tries again may not poll in between.
        link.queues.unreserve();
    }
}

/// The endpoint ended while a connection was being made.
fn gone() -> Error {
    let source = io::Error::new(io::ErrorKind::NotConnected, "the endpoint was dropped meanwhile");
    Error::System { call: "joining an endpoint".to_owned(), source }
}

/// A listening address of the `rdma` provider.
pub struct RdmaListener {
    id: CmId,
    address: Address,
    device: Arc<Device>,
    manager: Arc<Manager>,
}

impl RdmaListener {
    pub(super) fn new(
        device: &Arc<Device>,
        manager: &Arc<Manager>,
        address: &Address,
    ) -> Result<Self, Error> {
        let (at, _) = resolve(address)?;
        let mut id = CmId::new(&EventChannel::new()?)?;
        let failed = |call: &str, source: io::Error| match source.raw_os_error() {
            Some(libc::EADDRINUSE) => Error::AddressInUse { address: address.to_string() },
            Some(libc::EADDRNOTAVAIL | libc::ENODEV) => Error::NoDevice {
                reason: format!("`{}` is the address of no RDMA device of this host", at.ip()),
            },
            _ => Error::System { call: format!("{call}({at})"), source },
        };
        id.bind(at).map_err(|error| failed("rdma_bind_addr", error))?;
        if !id.context().is_null() && id.context() != device.context {
            return Err(Error::NoDevice {
                reason: format!(
                    "`{}` is not an address of {}, the device of this transport",
                    at.ip(),
                    device.name
                ),
            });
        }
        id.listen(BACKLOG).map_err(|error| failed("rdma_listen", error))?;
        let Address::Rdma { host, .. } = address else { unreachable!("`resolve` takes no other kind") };
        let address = Address::Rdma { host: host.clone(), port: id.port(), from: None };
        Ok(Self { id, address, device: Arc::clone(device), manager: Arc::clone(manager) })
    }

    /// What to make of an event. `None`: nothing of it concerns the user.
    fn request(&self, said: Said) -> Result<Option<RdmaRequest>, Error> {
        if said.event != rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST {
            return Ok(None);
        }
        // SAFETY: it came with a request of this channel, and this is the one place that takes it.
        let mut id = unsafe { CmId::from_request(said.id, self.id.channel()) };
        let Some((Kind::Request, data)) = unframe(&said.data) else {
            id.reject(&frame(Kind::Impossible, b"this is a Fervor server of another version"));
            return Ok(None);
        };
        if id.context() != self.device.context {
            let reason =
                format!("the server works on its device {}, which the way there misses", self.device.name);
            id.reject(&frame(Kind::Impossible, &reason.as_bytes()[..reason.len().min(128)]));
            return Ok(None);
        }
        let channel = EventChannel::new()?;
        if id.migrate(&channel).is_err() {
            // The peer has given up meanwhile.
            return Ok(None);
        }
        Ok(Some(RdmaRequest {
            id: Some(id),
            channel,
            data: data.to_vec(),
            reads_out: said.reads_out,
            reads_in: said.reads_in,
            address: self.address.clone(),
            manager: Arc::clone(&self.manager),
        }))
    }
}

impl Listener for RdmaListener {
    type Request = RdmaRequest;

    fn accept(&mut self, timeout: Duration) -> Result<Option<RdmaRequest>, Error> {
        let deadline = Instant::now() + timeout;
        while let Some(said) = self.id.channel().wait(deadline, Said::of)? {
            if let Some(request) = self.request(said)? {
                return Ok(Some(request));
            }
        }
        Ok(None)
    }

    fn address(&self) -> &Address {
        &self.address
    }
}

/// A peer that wants to connect through the `rdma` provider.
pub struct RdmaRequest {
    /// Until it is accepted or refused.
    id: Option<CmId>,
    channel: Arc<EventChannel>,
    data: Vec<u8>,
    reads_out: u8,
    reads_in: u8,
    address: Address,
    /// Keeps the thread running that the connection will need.
    manager: Arc<Manager>,
}

impl Request for RdmaRequest {
    type Attach = RdmaAttach;
    type Connection = RdmaConnection;

    fn private_data(&self) -> &[u8] {
        &self.data
    }

    fn accept_with(
        mut self,
        endpoint: &RdmaAttach,
        depth: usize,
        private_data: &[u8],
    ) -> Result<RdmaConnection, Error> {
        let framed = frame(Kind::Accept, private_data);
        let queues = &endpoint.0;
        assert!(
            Arc::ptr_eq(&queues.manager, &self.manager),
            "the endpoint is of another transport than the listener"
        );
        // Before the identifier is taken out: a peer without a place is refused as `self` is dropped.
        queues.reserve()?;
        let id = self.id.take().expect("only `accept` and `drop` take it");
        let own = parameters(queues, self.reads_out, self.reads_in);
        let handshake = Handshake {
            address: &self.address,
            channel: Arc::clone(&self.channel),
            deadline: Instant::now() + ACCEPT_TIMEOUT,
            limit: ACCEPT_TIMEOUT,
        };
        let joined = Joined::new(queues, id, depth.clamp(1, queues.config.send_depth))?;
        joined.with_cm(|cm| cm.accept(own, &framed))?.map_err(handshake.failed("rdma_accept"))?;
        let said = handshake.next()?;
        match said.event {
            rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED => joined.finish(),
            // A peer that connects and ends the connection at once may be overtaken by its own farewell. Its messages
            // may have arrived: it is a connection, and it ends like one.
            rdma_cm_event_type::RDMA_CM_EVENT_DISCONNECTED => {
                let mut connection = joined.finish()?;
                connection.disconnect();
                Ok(connection)
            }
            _ => Err(handshake.failure(&said)),
        }
    }

    fn reject(mut self, private_data: &[u8]) {
        self.refuse(private_data);
    }
}

impl RdmaRequest {
    fn refuse(&mut self, data: &[u8]) {
        if let Some(mut id) = self.id.take() {
            id.reject(&frame(Kind::Refuse, data));
        }
    }
}

impl Drop for RdmaRequest {
    fn drop(&mut self) {
        self.refuse(&[]);
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
