//! The `rdma` provider: InfiniBand, RoCE and soft-RoCE through libibverbs.
//!
//! | contract | here |
//! |---|---|
//! | transport | an open device with a protection domain, and one thread that keeps its connections (`keeper`) |
//! | region, export | `ibv_reg_mr` (`device`); an export is registered without the right to write, even locally |
//! | endpoint | completion queue with a completion channel, shared receive queue (`queues`; `endpoint`: polling them) |
//! | connection | RC queue pair (`queue_pair`; `connection`: posting to it; `sending`: its send queue; `link`: what threads share of it) |
//! | listen, connect, accept, reject | TCP sockets (`connect`) over which two ends tell each other what their queue pairs need (`offer`, `joining`) |
//!
//! There is no connection manager: a queue pair is moved to its states by `ibv_modify_qp`. So InfiniBand needs no IPoIB, and the offers may as
//! well travel over a channel of the program's own: [`Rdma::join`].
//!
//! # Which device
//! Regions, queues and queue pairs belong to a device, and regions and endpoints are made before any address is known.
//! So a transport works on one device: [`Rdma::new`] takes the first active one, [`Rdma::on_device`] one by name, and
//! [`Rdma::for_address`] the one that leads to an address. Port and GID are chosen for each connection, by the local address of
//! its socket ([`fabric`](crate::fabric)). A socket whose address belongs to another device is an error
//! on the side that connects, and a refusal that says so on the side that listens.
//!
//! A process that uses several ports has a transport for each, and asks it for connections at addresses of that port that both sides
//! have agreed on (`rail`). Each transport remembers which peers it lost (`failures`).
//!
//! # Who owns what
//! ```text
//!  RdmaConnection ─▶ Link ─▶ Queues (CQ, SRQ, receive buffers) ─▶ Keeper ─▶ thread
//!  RdmaEndpoint ────▶ ┘        └──────────────────────────────▶ Device ─▶ PD, context
//!  keeper's thread ─▶ Link, until its queue pair is gone        Registration ─▶ ┘
//! ```
//! Every arrow is an `Arc`: what verbs demand to be destroyed first is what holds the other. A `Link` ends its
//! queue pair before it lets go of the queues and of the registrations that its requests named.
//!
//! # What the device does, and not this code
//! It holds back READs beyond the number agreed on (`max_rd_atomic`); it asks again when the receiver has no buffer (for
//! ever: a peer that is gone does not answer at all); and it gives up on a peer that does not answer, half a second to a
//! second after the request. Idle connections are made to ask by the keeper: an empty WRITE three times a second.

use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

use crate::{
    address::Address,
    error::Error,
    fabric::Fabric,
    memory::{Exclusive, Memory},
    transport::{Access, EndpointConfig, LaneSpec, NoView, Transport, host},
};

mod connect;
mod connection;
mod device;
mod endpoint;
mod events;
mod failures;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;
mod joining;
mod keeper;
mod library;
mod link;
#[cfg(feature = "ibverbs")]
mod names;
mod offer;
mod queue_pair;
mod queues;
mod rail;
mod sending;
mod tables;

pub use connect::{RdmaListener, RdmaRequest};
pub use connection::{RdmaConnection, RdmaLeash};
pub use device::{RdmaExport, RdmaRegion};
pub use endpoint::{RdmaAttach, RdmaEndpoint};
pub use events::DeviceEvents;
pub use joining::RdmaJoining;

pub(crate) use device::capabilities;
pub(crate) use library::load as load_libraries;
pub(in crate::transport) use rail::peer_of;
pub(in crate::transport) use tables::read_tables;

use device::Device;
use joining::{Impossible, Joining, Place};
use keeper::Keeper;

/// The `rdma` transport on one device.
#[derive(Clone)]
pub struct Rdma {
    keeper: Arc<Keeper>,
    device: Arc<Device>,
}

impl Rdma {
    /// On the first device with an active port.
    ///
    /// # Errors
    /// [`Error::MissingLibrary`], [`Error::NoDevice`]; a wrong [variable](Fabric::from_env).
    pub fn new() -> Result<Self, Error> {
        Self::with_fabric(None, Fabric::from_env()?)
    }

    /// On the device called `name` (as in `/sys/class/infiniband`): `mlx5_0`, or `mlx5_0:2` for connections through its second port alone.
    ///
    /// # Errors
    /// [`Error::MissingLibrary`], [`Error::NoDevice`]; a wrong [variable](Fabric::from_env).
    pub fn on_device(name: &str) -> Result<Self, Error> {
        Self::with_fabric(Some(name), Fabric::from_env()?)
    }

    /// On the device that has `address`, if that is an address of this host; else on the one that leads there.
    /// For a wildcard address, as [`new`](Self::new).
    ///
    /// # Errors
    /// [`Error::MissingLibrary`], [`Error::NoDevice`], [`Error::Unreachable`], [`Error::WrongProvider`]; a wrong [variable](Fabric::from_env).
    pub fn for_address(address: &Address) -> Result<Self, Error> {
        library::verbs()?;
        let fabric = Fabric::from_env()?;
        Self::with_fabric(connect::device_for(address, &fabric)?.as_deref(), fabric)
    }

    /// On a device by name, as [`on_device`](Self::on_device), or on the first active one, with options of one's own.
    ///
    /// # Errors
    /// [`Error::MissingLibrary`], [`Error::NoDevice`].
    pub fn with_fabric(device: Option<&str>, fabric: Fabric) -> Result<Self, Error> {
        let device = Device::open(device, fabric)?;
        // A socket for each connection.
        host::raise_file_limit();
        Ok(Self { keeper: Keeper::start(&device)?, device })
    }

    /// Name of the device.
    pub fn device_name(&self) -> &str {
        &self.device.name
    }

    /// Completion vectors of the device: an endpoint takes [`EndpointConfig::completion_vector`] modulo this.
    pub fn completion_vectors(&self) -> usize {
        self.device.limits.vectors
    }

    /// What the device has said since it was opened.
    pub fn events(&self) -> DeviceEvents {
        self.device.said.read()
    }

    /// Makes a queue pair for a connection of `endpoint` that is bootstrapped over a channel of the program's own, whose local address is `ip`.
    ///
    /// # Errors
    /// [`Error::Limit`] when the endpoint has no place left; [`Error::NoDevice`] when `ip` belongs to another device.
    pub fn join(&self, endpoint: &RdmaAttach, ip: IpAddr) -> Result<RdmaJoining, Error> {
        self.join_with(endpoint, ip, usize::MAX)
    }

    /// As [`join`](Self::join), with a send queue of `depth` requests, at least 1 and at most the endpoint's.
    ///
    /// # Errors
    /// As [`join`](Self::join).
    pub fn join_with(&self, endpoint: &RdmaAttach, ip: IpAddr, depth: usize) -> Result<RdmaJoining, Error> {
        self.check_ours(endpoint);
        let place = Place::reserve(&endpoint.0)?;
        let local = self.device.local(ip).map_err(|reason| Error::NoDevice { reason })?;
        Joining::new(&endpoint.0, place, local, depth).map(RdmaJoining)
    }

    /// Answers an offer that came over a channel of the program's own, which goes over TCP between `ips`: this end's address, and the peer's. As
    /// [`join_with`](Self::join_with) and [`RdmaJoining::answer`]. On Ethernet the peer must offer the address that its channel comes from.
    ///
    /// # Errors
    /// As those.
    pub fn answer(
        &self,
        endpoint: &RdmaAttach,
        ips: (IpAddr, IpAddr),
        depth: usize,
        offer: &[u8],
    ) -> Result<RdmaJoining, Error> {
        self.check_ours(endpoint);
        connect::answer(&endpoint.0, ips, depth, offer).map(RdmaJoining).map_err(Impossible::report)
    }

    fn check_ours(&self, endpoint: &RdmaAttach) {
        assert!(Arc::ptr_eq(&endpoint.0.keeper, &self.keeper), "the endpoint is of another transport");
    }
}

impl fmt::Debug for Rdma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rdma({})", self.device.name)
    }
}

host::runtime!(Rdma);

impl Transport for Rdma {
    type Region = RdmaRegion;
    type Export = RdmaExport;
    type Endpoint = RdmaEndpoint;
    type Attach = RdmaAttach;
    type Connection = RdmaConnection;
    type View = NoView;
    type Listener = RdmaListener;
    type Request = RdmaRequest;

    fn has_views(&self) -> bool {
        false
    }

    fn register(&self, memory: &Memory, access: Access) -> Result<RdmaRegion, Error> {
        self.device.register(memory, access)
    }

    fn export(&self, memory: &Exclusive) -> Result<RdmaExport, Error> {
        self.device.export(memory)
    }

    fn endpoint(&self, config: &EndpointConfig) -> Result<RdmaEndpoint, Error> {
        RdmaEndpoint::new(&self.device, &self.keeper, config)
    }

    fn listen(&self, address: &Address) -> Result<RdmaListener, Error> {
        RdmaListener::new(&self.device, address)
    }

    fn connect_with(
        &self,
        address: &Address,
        lane: LaneSpec<'_, RdmaAttach>,
        timeout: Duration,
    ) -> Result<(RdmaConnection, Vec<u8>), Error> {
        self.check_ours(lane.endpoint);
        connect::connect(address, lane, timeout)
    }
}
