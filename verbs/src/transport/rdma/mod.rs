//! The `rdma` provider: InfiniBand, RoCE and soft-RoCE through librdmacm and libibverbs.
//!
//! | contract | here |
//! |---|---|
//! | transport | one device with a protection domain, and one thread for its connection manager (`manager`) |
//! | region, export | `ibv_reg_mr` (`device`); an export is registered without the right to write, even locally |
//! | endpoint | completion queue with a completion channel, shared receive queue (`queues`; `endpoint`: polling them) |
//! | connection | RC queue pair (`connection`: posting to it; `sending`: its send queue; `link`: what threads share of it, its end) |
//! | listen, connect, accept, reject | librdmacm (`id`, `handshake`), private data in a frame (`frame`) |
//!
//! # Which device
//! Regions, queues and queue pairs belong to a device, and regions and endpoints are made before any address is known.
//! So a transport works on one device: [`Rdma::new`] takes the first active one, [`Rdma::on_device`] one by name, and
//! [`Rdma::for_address`] the one that leads to an address. A way that leads through another device is an error
//! on the side that connects, and a refusal that says so on the side that listens.
//!
//! # Who owns what
//! ```text
//!  RdmaConnection ─▶ Link ─▶ Queues (CQ, SRQ, receive buffers) ─▶ Manager ─▶ thread
//!  RdmaEndpoint ────▶ ┘        └──────────────────────────────▶ Device ─▶ PD, device list
//!  manager's thread ··weak··▶ Link                    Registration ─▶ ┘
//! ```
//! Every arrow is an `Arc`: what verbs demand to be destroyed first is what holds the other. A `Link` ends its
//! queue pair and its identifier before it lets go of the queues and of the registrations that its requests named.
//!
//! # What the device does, and not this code
//! It holds back READs beyond the number agreed on (`max_rd_atomic`); it asks again when the receiver has no buffer (for
//! ever: a peer that is gone does not answer at all); and it gives up on a peer that does not answer, half a second to a
//! second after the request. Idle connections are made to ask by the manager: an empty WRITE three times a second.

use std::{ffi::CStr, fmt, sync::Arc, time::Duration};

use crate::{
    address::Address,
    error::Error,
    memory::{Exclusive, Memory},
    transport::{
        Access, EndpointConfig, NoView, Transport,
        host::{self, HostSignal, HostThread},
    },
};

mod connection;
mod device;
mod endpoint;
mod frame;
mod handshake;
mod id;
mod library;
mod link;
mod manager;
mod queues;
mod sending;

pub use connection::RdmaConnection;
pub use device::{RdmaExport, RdmaRegion};
pub use endpoint::{RdmaAttach, RdmaEndpoint};
pub use handshake::{RdmaListener, RdmaRequest};

pub(crate) use device::capabilities;
pub(crate) use library::load as load_libraries;

use device::Device;
use manager::Manager;

/// How long [`Rdma::for_address`] looks for the way.
const ROUTE_TIMEOUT: Duration = Duration::from_secs(2);

/// The `rdma` transport on one device.
#[derive(Clone)]
pub struct Rdma {
    // Before `device`: the manager's thread uses librdmacm, which the device keeps open.
    manager: Arc<Manager>,
    device: Arc<Device>,
}

impl Rdma {
    /// On the first device with an active port.
    ///
    /// # Errors
    /// [`Error::MissingLibrary`], [`Error::NoDevice`].
    pub fn new() -> Result<Self, Error> {
        Self::on(Device::open(None)?)
    }

    /// On the device called `name` (as in `/sys/class/infiniband`).
    ///
    /// # Errors
    /// [`Error::MissingLibrary`], [`Error::NoDevice`].
    pub fn on_device(name: &str) -> Result<Self, Error> {
        Self::on(Device::open(Some(name))?)
    }

    /// On the device that has `address`, if that is an address of this host; else on the one that leads there.
    /// For a wildcard address, as [`new`](Self::new).
    ///
    /// # Errors
    /// [`Error::MissingLibrary`], [`Error::NoDevice`], [`Error::Unreachable`], [`Error::WrongProvider`].
    pub fn for_address(address: &Address) -> Result<Self, Error> {
        let id = handshake::route(address, ROUTE_TIMEOUT)?;
        let context = id.context();
        if context.is_null() {
            return Self::new();
        }
        // SAFETY: the context belongs to `id`, which lives; a device has a NUL-terminated name.
        let name = unsafe { CStr::from_ptr(rdma_sys::ibv_get_device_name((*context).device)) };
        Self::on_device(&name.to_string_lossy())
    }

    fn on(device: Arc<Device>) -> Result<Self, Error> {
        Ok(Self { manager: Manager::start()?, device })
    }

    /// Name of the device.
    pub fn device_name(&self) -> &str {
        &self.device.name
    }

    /// Completion vectors of the device: an endpoint takes [`EndpointConfig::completion_vector`] modulo this.
    pub fn completion_vectors(&self) -> usize {
        self.device.limits.vectors
    }
}

impl fmt::Debug for Rdma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rdma({})", self.device.name)
    }
}

impl Transport for Rdma {
    type Region = RdmaRegion;
    type Export = RdmaExport;
    type Endpoint = RdmaEndpoint;
    type Attach = RdmaAttach;
    type Connection = RdmaConnection;
    type View = NoView;
    type Listener = RdmaListener;
    type Request = RdmaRequest;
    type Signal = HostSignal;
    type Thread = HostThread;

    const AWAKE_TURNS: u32 = host::AWAKE_TURNS;

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
        RdmaEndpoint::new(&self.device, &self.manager, config)
    }

    fn listen(&self, address: &Address) -> Result<RdmaListener, Error> {
        RdmaListener::new(&self.device, &self.manager, address)
    }

    fn connect(
        &self,
        endpoint: &RdmaAttach,
        address: &Address,
        private_data: &[u8],
        timeout: Duration,
    ) -> Result<(RdmaConnection, Vec<u8>), Error> {
        assert!(Arc::ptr_eq(&endpoint.0.manager, &self.manager), "the endpoint is of another transport");
        handshake::connect(&endpoint.0, address, private_data, timeout)
    }

    fn now(&self) -> Duration {
        host::now()
    }

    fn relax(&self, turn: u32) {
        host::relax(turn);
    }

    fn signal(&self) -> HostSignal {
        HostSignal::new()
    }

    fn spawn(
        &self,
        name: &str,
        core: Option<usize>,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<HostThread, Error> {
        host::spawn(name, core, body)
    }
}
