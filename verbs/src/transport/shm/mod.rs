//! The `shm` provider: connections between processes of one host, through shared memory.
//!
//! ```text
//!  process A                                                         process B
//!  ShmConnection::read/write ──── copy ────▶ B's region (memfd, mapped here)      no instruction of B
//!  ShmView::load/copy ◀───────── copy ──── B's region, the same mapping            no instruction of B, no request
//!  ShmConnection::send ── copy ──▶ ring (memfd) ── copy by B's poll ──▶ receive buffer of B
//!                 └─ ring() ──▶ bell of B's endpoint (memfd): a bit; a futex wake if B sleeps
//!  thread `fervor-shm-watch` ◀── end of the Unix socket: B disconnected or died
//! ```
//!
//! | file | what it is |
//! |---|---|
//! | `ring` | the byte ring of one direction of a connection |
//! | `gate` | ends a peer's WRITEs with the connection |
//! | `bell` | the doorbell of an endpoint: who has something, and does its thread sleep |
//! | `link` | what a connection and the endpoint of its own process share: completions, the end |
//! | `claim` | that a request executes before the end is reported, or not at all |
//! | `connection`, `endpoint` | the posting and the polling side |
//! | `region` | registered regions, own and the peer's |
//! | `view` | the peer's regions, looked at without a request |
//! | `connect`; `listen`, `door`, `strangers` | connecting; listening, the socket file, those who have said half |
//! | `wire`, `hear` | what is said over the socket, and how it is taken |
//! | `admit` | which users connect |
//! | `file`, `mapping` | the memfds that two processes share: sealed, checked, mapped |
//! | `watch` | the thread that notices dead peers |
//!
//! What this provider makes of the freedom that the contract leaves:
//! - Every request executes in the call that posts it; a SEND is complete when it is in the ring.
//!   [`Connection::ring`] rings bells.
//! - A post is also refused as full while the ring to the peer is; [`room`](crate::transport::Connection::room) counts both. The ring holds
//!   what the receiver's buffers or the sender's queue hold, up to 1 MiB, and two of the longest messages in any
//!   case. When there is room again, the endpoint of the sender is woken.
//! - A message without a receive buffer waits in the ring; nothing is lost. If its sender is gone it waits
//!   for a second more.
//! - A SEND longer than the peer's receive buffers is found out by the sender: [`WorkError::RemoteInvalid`].
//! - A connection reaches the regions that were registered when it was made, and not later ones.
//! - Once the end of a connection has been polled, no WRITE of the peer changes memory any more (unless the
//!   peer was stopped in the middle of one for more than a second).
//! - A peer that is alive and does nothing is no error.
//!
//! **What a connection costs,** in each of the two processes: one descriptor (its socket) and two mappings (its rings; the
//! peer's doorbell is mapped once for all connections to one endpoint). A ring is as large as the contract asks, but a page
//! of it is memory only once it has been touched. So a connection that only READs, or has views, takes 8 KiB for both rings
//! and 4 KiB of page tables in each process; one that has sent a message takes 20 KiB.
//!
//! **How many there may be.**
//!
//! | limit | of | why |
//! |---|---|---|
//! | 31,744 connections | an endpoint | the bits in its doorbell, which is one page |
//! | about 21,000 connections | a process | Linux allows 65,530 mappings (`vm.max_map_count`) |
//! | 4,096 regions with a remote right | a transport | each peer maps all of them when it connects |
//! | 32,768 regions of peers, each counted once | a transport | the mappings, again: half of them |
//! | `RLIMIT_NOFILE`, less what else is open | a process | the sockets. [`Shm::new`] raises the soft limit, usually 1,024, to the hard one |
//!
//! So a server thread has room for 1,000 clients of 20 worker connections each, if it may open 20,000 files (`ulimit -Hn`).
//!
//! A connection offers all regions of its transport to the peer. So the clients of one process had better have a transport each:
//! of 1,000 that share one, the last needs 20 ms to connect, and 0.4 ms otherwise.
//!
//! # Trust
//!
//! A *neighbour* is a process of this host. A *stranger* is one that has connected to a listener and not yet said all.
//! A *peer* is one whose request was accepted, or whose listener was connected to. All of them may be hostile.
//!
//! | who | what it can do | what it cannot do | where |
//! |---|---|---|---|
//! | a neighbour of another user | see that the socket is there | connect, or be connected to: it would get no byte and no descriptor. The error names both users. [`Admit::AnyUser`] lifts that | `admit`, `door` |
//! | a stranger | take one of 256 places for 5 s | keep others out; cost more than a socket, however much it announces or sends | `strangers`, `wire` |
//! | a peer, with what it hands over | hand over up to 4,096 regions of 16 TiB together; files of any kind | get anything mapped beyond that, or a file that could shrink, or that this process would have to wait for | `hear`, `file`, `mapping` |
//! | a peer, with what it was handed | read what is registered for READ, write what is registered for WRITE | write what it may only read, by whatever path; keep others from mapping the doorbell | `region`, `file` |
//! | a peer, with its rings and bells | delay its messages; end its connection; make this process look in vain; clear others' bits of the bell, which delays them until the next | make this process unsound, or take its receive buffers | `ring`, `bell` |
//! | a peer that is stopped | keep its connections, until this side ends them | hold up others. If it was stopped in the middle of a WRITE, that may still come after the end (see above) | `gate` |
//!
//! Limits of this: what may trace this process is not kept out (root; processes of the same user, as far as the system lets them).
//! Such a process can also kill it. Memory of a peer's region that nobody has touched is taken when this
//! process reads it, and counts as this process's. The key of a session, not this provider, tells one
//! process of a user from another.
//!
//! [`Connection::ring`]: super::Connection::ring
//! [`WorkError::RemoteInvalid`]: super::WorkError::RemoteInvalid

use std::{sync::Arc, time::Duration};

use rustix::process::geteuid;

use self::{mapping::Mappings, region::Registry, watch::Watch};
use crate::{
    address::Address,
    error::Error,
    memory::{Exclusive, Memory},
    transport::{Access, EndpointConfig, LaneSpec, Transport, host},
};

mod admit;
mod bell;
mod claim;
mod connect;
mod connection;
mod door;
mod endpoint;
mod file;
mod gate;
mod hear;
mod link;
mod listen;
mod mapping;
mod region;
mod ring;
mod strangers;
mod view;
mod watch;
mod wire;

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(test)]
pub(in crate::transport) mod suite;
#[cfg(test)]
mod tests;

pub use admit::Admit;
pub(in crate::transport) use connect::Calling;
pub use connection::ShmConnection;
pub use endpoint::{ShmAttach, ShmEndpoint};
pub use listen::{ShmListener, ShmRequest};
pub use region::{ShmExport, ShmRegion};
pub use view::ShmView;

/// What all objects of a transport share.
#[derive(Debug)]
struct Inner {
    /// The user of this process, and the users that it connects with.
    user: u32,
    admit: Admit,
    registry: Arc<Registry>,
    mappings: Mappings,
    watch: Arc<Watch>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.watch.stop();
    }
}

/// The shared-memory transport.
#[derive(Debug, Clone)]
pub struct Shm(Arc<Inner>);

impl Shm {
    /// A new transport, for processes of the same user. Its regions are offered to the peers of its own connections alone. Lets
    /// this process have as many open files as the system allows it.
    ///
    /// # Errors
    /// The system's, when it has no descriptor left.
    pub fn new() -> Result<Self, Error> {
        Self::admitting(Admit::SameUser)
    }

    /// As [`Shm::new`], for processes of these users. This process is of the effective user that it has now.
    ///
    /// # Errors
    /// As [`Shm::new`].
    pub fn admitting(admit: Admit) -> Result<Self, Error> {
        Self::of_user(geteuid().as_raw(), admit)
    }

    /// As [`Shm::admitting`], of a process that takes itself for one of this user.
    fn of_user(user: u32, admit: Admit) -> Result<Self, Error> {
        host::raise_file_limit();
        Ok(Self(Arc::new(Inner {
            user,
            admit,
            registry: Arc::default(),
            mappings: Mappings::new(user),
            watch: Watch::new()?,
        })))
    }
}

host::runtime!(Shm);

impl Transport for Shm {
    type Region = ShmRegion;
    type Export = ShmExport;
    type Endpoint = ShmEndpoint;
    type Attach = ShmAttach;
    type Connection = ShmConnection;
    type View = ShmView;
    type Listener = ShmListener;
    type Request = ShmRequest;

    fn has_views(&self) -> bool {
        true
    }

    fn register(&self, memory: &Memory, access: Access) -> Result<ShmRegion, Error> {
        ShmRegion::new(&self.0.registry, memory, access)
    }

    fn export(&self, memory: &Exclusive) -> Result<ShmExport, Error> {
        ShmExport::new(&self.0.registry, memory)
    }

    fn endpoint(&self, config: &EndpointConfig) -> Result<ShmEndpoint, Error> {
        ShmEndpoint::new(&self.0, config)
    }

    fn listen(&self, address: &Address) -> Result<ShmListener, Error> {
        ShmListener::new(&self.0, address)
    }

    fn connect_with(
        &self,
        address: &Address,
        lane: LaneSpec<'_, ShmAttach>,
        timeout: Duration,
    ) -> Result<(ShmConnection, Vec<u8>), Error> {
        connect::Calling::begin(address, lane, timeout)?.finish()
    }
}
