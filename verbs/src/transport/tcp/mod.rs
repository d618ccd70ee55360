//! The `tcp` provider: connections over TCP, where there is no RDMA: on a laptop, in a cloud, over Ethernet.
//!
//! ```text
//!  process A                                                     process B
//!  TcpConnection::write ── frame ──▶ socket ──▶ thread `fervor-tcp` of B's endpoint ──▶ B's region
//!  TcpConnection::read  ── frame ──▶ socket ──▶      "           ◀── B's region       the poller of B does nothing
//!  thread `fervor-tcp` of A's endpoint ◀── reply, how many are executed ──┘
//!        └──▶ completions ──▶ TcpEndpoint::poll
//! ```
//!
//! | file | what it is |
//! |---|---|
//! | `wire` | openings and frames |
//! | `link` | a connection as its two threads share it: what is in flight, who hands what to the socket |
//! | `outgoing` | what is on its way out, and from where the kernel takes it |
//! | `sender` | which thread hands it to the kernel |
//! | `inbound` | what comes in: requests are executed, answers complete |
//! | `engine` | the thread of an endpoint that serves its sockets |
//! | `shared` | what an endpoint's handles and its engine share |
//! | `connection`, `endpoint` | the posting and the polling side |
//! | `region` | registered regions |
//! | `connect` | listening and connecting |
//!
//! What this provider makes of the freedom that the contract leaves:
//! - A request is executed by the peer's thread, in the order of the posts. Its completion says that this has happened.
//! - [`Connection::ring`] hands posted requests to the kernel, many in one system call. What the kernel does not take goes out when it
//!   does.
//! - A SEND without a receive buffer waits, and what is posted behind it; answers do not. 16 MiB may wait; a peer that takes
//!   nothing more for a second and a half is lost.
//! - A connection reaches regions that are registered later, too.
//! - A peer whose process ends is noticed at once. One whose host is silent is dead after two seconds: to a peer to which nothing
//!   was said for 0.4 s something is said, and its kernel has 1.5 s to answer.
//!
//! **Trust.** Whoever reaches the port can connect, and nothing is encrypted: use it in a network that you trust. A peer reaches the
//! regions whose keys it was told, or guesses, out of 2^32. Whatever it sends, this process stays sound, and keeps a bounded amount
//! for it: it may end that connection.
//!
//! [`Connection::ring`]: super::Connection::ring

use std::{sync::Arc, time::Duration};

use self::region::Registry;
use crate::{
    address::Address,
    error::Error,
    memory::{Exclusive, Memory},
    transport::{Access, EndpointConfig, LaneSpec, NoView, Transport, host},
};

mod connect;
mod connection;
mod endpoint;
mod engine;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;
mod inbound;
mod link;
mod outgoing;
mod region;
mod sender;
mod shared;
#[cfg(test)]
mod suite;
#[cfg(test)]
mod tests;
mod wire;

pub(in crate::transport) use connect::{Calling, bind, dial, look_up};
pub use connect::{TcpListener, TcpRequest};
pub use connection::TcpConnection;
pub use endpoint::{TcpAttach, TcpEndpoint};
pub use region::{TcpExport, TcpRegion};

/// The TCP transport.
#[derive(Debug, Clone)]
pub struct Tcp(Arc<Registry>);

impl Tcp {
    /// A new transport. Its regions can be named by the peers of its own connections alone. Lets this process have as many open
    /// files as the system allows it.
    pub fn new() -> Self {
        host::raise_file_limit();
        Self(Arc::default())
    }
}

impl Default for Tcp {
    fn default() -> Self {
        Self::new()
    }
}

host::runtime!(Tcp);

impl Transport for Tcp {
    type Region = TcpRegion;
    type Export = TcpExport;
    type Endpoint = TcpEndpoint;
    type Attach = TcpAttach;
    type Connection = TcpConnection;
    type View = NoView;
    type Listener = TcpListener;
    type Request = TcpRequest;

    fn has_views(&self) -> bool {
        false
    }

    fn register(&self, memory: &Memory, access: Access) -> Result<TcpRegion, Error> {
        TcpRegion::new(&self.0, memory, access)
    }

    fn export(&self, memory: &Exclusive) -> Result<TcpExport, Error> {
        TcpExport::new(&self.0, memory)
    }

    fn endpoint(&self, config: &EndpointConfig) -> Result<TcpEndpoint, Error> {
        TcpEndpoint::new(&self.0, config)
    }

    fn listen(&self, address: &Address) -> Result<TcpListener, Error> {
        TcpListener::new(address)
    }

    fn connect_with(
        &self,
        address: &Address,
        lane: LaneSpec<'_, TcpAttach>,
        timeout: Duration,
    ) -> Result<(TcpConnection, Vec<u8>), Error> {
        connect::connect_to(address, lane, timeout)
    }
}
