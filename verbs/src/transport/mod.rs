//! The transport contract: about ten calls, the same for every provider.
//!
//! ```text
//!  Transport ──register/export──▶ Region        memory that can be named in a work request
//!      ├──────endpoint──────────▶ Endpoint      one completion queue + one shared pool of receive buffers;
//!      │                            │           owned by one polling thread
//!      │                            └─attach──▶ Attach   handle of other threads: connect, accept, wake
//!      ├──────listen────────────▶ Listener ──▶ Request ──accept(attach)──▶ Connection
//!      └──────connect(attach)───▶ Connection    a reliable, ordered queue pair; owned by one posting thread
//!                                      └─view──▶ View   memory of a peer of this host: read without a request
//!  Runtime ── now, relax, random; signal ──▶ Signal; spawn ──▶ Thread
//! ```
//!
//! # What a user may assume, and no more
//!
//! **Memory.**
//! 1. Suppose that a READ or a WRITE begins at a multiple of 8 in the peer's memory. Then each aligned 8-byte
//!    word there is read or written whole, and once, wherever the payload lies in the poster's memory, and
//!    wherever its list is cut into pieces. (If it begins elsewhere, a device may move words of its own that lie
//!    across the peer's.) Nothing larger is whole. Inside one READ or WRITE, cache lines come in any order, and a READ may mix old and new lines.
//! 2. Code that only looks at memory may see two WRITEs of one connection in either order. Completions give
//!    an order: when the receiver has polled the completion of a SEND or of a WRITE with immediate
//!    ([`Completion::Received`], [`Completion::WriteImmediate`]), every earlier WRITE of that connection is
//!    visible.
//! 3. The completion of a WRITE at its sender means that the WRITE reached the peer's NIC. It does not mean
//!    that the peer's CPU sees it. The completion of a READ posted after it on the same connection proves
//!    that it is visible.
//! 4. Two READs in flight together may see memory in either order. To order them, wait for the first.
//! 5. After an error on a connection, every operation not completed may or may not have happened.
//! 6. A thread writes to its own memory, and then posts. Somebody learns of that post (by a message, an
//!    immediate, a WRITE), and then posts a READ. That READ sees what the thread wrote, or something later.
//! 7. A [`View`] reads each aligned 8-byte word whole, and nothing larger. The owner publishes a word with
//!    [`Exclusive::publish`], or as the version at the end of a [`rewrite`](Exclusive::rewrite). Whoever has
//!    loaded that word sees what the owner wrote before it. Rule 6 holds for views, too. Nothing else is
//!    ordered, and what was copied may be torn.
//!
//! **Work requests.** Those of one connection execute in the order in which they were posted, except that
//! later SENDs and WRITEs may overtake a READ. A post may take effect at any time from the call on. It takes
//! effect at the latest after [`Connection::ring`]: post many, ring once. A post that has an id is
//! `signalled`: there is one [`Completion::Work`] with that id. It says the same of every unsignalled post
//! before it on that connection. The send queue holds [`EndpointConfig::send_depth`] requests. A post beyond
//! that is refused with [`PostError::Full`], and nothing happens: poll, then post again. The provider sees to
//! it that unsignalled requests leave the queue too, as the endpoint is polled.
//!
//! **Buffers.** Memory named in a request belongs to the transport from the post until the request's
//! completion, or that of a later signalled request of the same connection. A payload given as
//! [`Payload::Inline`] is copied at the post. The provider keeps a registered region alive as long as a
//! connection that has named it. A receive buffer belongs to the user from [`Completion::Received`] to
//! [`Endpoint::release`], and nobody writes it in between.
//!
//! **Receiving.** Each SEND uses up one receive buffer of the receiver's endpoint. Each WRITE with immediate
//! uses up one receive *credit* of it: a buffer that the provider takes, and gives back by itself when the
//! completion is polled. All connections of the endpoint share the buffers. If a receiver has no buffer left,
//! its sender may wait or lose the connection. The user's protocol must see to it that this does not happen,
//! by credits. A SEND longer than [`EndpointConfig::receive_size`] breaks the connection.
//!
//! **Remote access.** A connection reaches the regions of its peer that were registered when the connection
//! was made. It reaches later ones only if the provider can do that. A memory has one remote right: a provider
//! may refuse to register for WRITE what it once registered for READ alone, or the other way round. An access
//! out of bounds, or without the right, is an error at the initiator: nothing is read or written, and the connection is broken.
//! A listener can [limit](Request::limit) what a peer may READ to parts of what is exported, where the provider looks at each request
//! in software.
//! [`Connection::view`] gives a view of what a connection may READ, if both ends are on one host and the
//! provider can map memory. The view outlives the connection.
//!
//! **Errors.** A connection breaks by a failed request, a dead peer, [`Connection::disconnect`], or the drop
//! of the peer's end. Then every outstanding signalled request completes, with an error unless it is known to
//! have happened. After those comes exactly one [`Completion::Disconnected`], the last completion of that
//! connection. Once it has been polled, nothing of that connection changes memory any more. A message whose
//! SEND has completed without an error is polled before its receiver polls the end, whichever side disconnects.
//! A dead peer is found out within two seconds, on idle connections too, provided that the endpoint is polled.
//! A peer that does not poll is not dead, however long that takes, nor is a process that is stopped for a second.
//! A network that loses everything for a second may break a connection, or only delay it. Posts on a broken
//! connection are refused with [`PostError::Disconnected`].
//!
//! **Threads and time.** User code reads the time, waits, sleeps and starts threads through the transport and
//! its objects alone. These calls may let other threads run: [`Runtime::relax`], [`Transport::connect`] and its
//! like, [`Endpoint::wait`], [`Signal::wait`], [`Listener::accept`], [`Request::accept`], [`Thread::join`],
//! [`View::load`], [`View::copy`], [`View::snapshot`]. A thread that is in one of them must hold no lock that
//! another takes without `try_lock`. Calls of a view never wait. The other calls neither block nor let others
//! run. A thread that waits without any of these calls never stops waiting in a simulation.
//!
//! # Wrong order does not compile
//!
//! What this program compiles, line by line, no longer does in another order:
//!
//! ```
//! use fervor_verbs::transport::*;
//! fn right<T: Transport>(request: T::Request, region: &T::Region, endpoint: &mut T::Endpoint, buffer: ReceiveBuffer) {
//!     let pieces = [Sge { region, offset: 0, length: 8 }];
//!     let mut connection = request.accept(&endpoint.attach(), b"welcome").unwrap();
//!     connection.post(Post::Send { payload: Payload::Gather(&pieces), immediate: None, signal: None }).unwrap();
//!     let first = endpoint.message(&buffer).first().copied();
//!     endpoint.release(buffer);
//!     assert!(first.is_some());
//! }
//! ```
//! A receive buffer that was given back belongs to the NIC:
//! ```compile_fail,E0382
//! use fervor_verbs::transport::*;
//! fn wrong<E: Endpoint>(endpoint: &mut E, buffer: ReceiveBuffer) {
//!     endpoint.release(buffer);
//!     endpoint.message(&buffer);
//! }
//! ```
//! and what was in it cannot be held on to:
//! ```compile_fail,E0502
//! use fervor_verbs::transport::*;
//! fn wrong<E: Endpoint>(endpoint: &mut E, buffer: ReceiveBuffer) -> u8 {
//!     let message = endpoint.message(&buffer);
//!     endpoint.release(buffer);
//!     message[0]
//! }
//! ```
//! A peer is answered once:
//! ```compile_fail,E0382
//! use fervor_verbs::transport::*;
//! fn wrong<T: Transport>(request: T::Request, endpoint: &T::Endpoint) {
//!     let connection = request.accept(&endpoint.attach(), b"welcome");
//!     request.reject(b"go away");
//! }
//! ```
//! A connection that is not established has nothing to post to:
//! ```compile_fail,E0599
//! use fervor_verbs::transport::*;
//! fn wrong<T: Transport>(mut request: T::Request) {
//!     request.post(Post::Send { payload: Payload::Inline(b"too early"), immediate: None, signal: None });
//! }
//! ```
//! Exported rows have one writer: they are no region, so no work request of their owner can name them,
//! ```compile_fail,E0308
//! use fervor_verbs::transport::*;
//! fn wrong<T: Transport>(connection: &mut T::Connection, export: &T::Export) {
//!     let pieces = [Sge { region: export, offset: 0, length: 8 }];
//!     connection.post(Post::Send { payload: Payload::Gather(&pieces), immediate: None, signal: None });
//! }
//! ```
//! and a row that is being read cannot be written meanwhile:
//! ```compile_fail,E0502
//! use fervor_verbs::Exclusive;
//! fn wrong(rows: &mut Exclusive) -> u8 {
//!     let row = &rows.bytes()[..64];
//!     rows.bytes_mut()[0] = 1;
//!     row[0]
//! }
//! ```

use std::{fmt, sync::Arc, time::Duration};

use crate::{
    address::Address,
    error::Error,
    memory::{Exclusive, Memory},
    session::Key,
};

pub mod any;
mod completion;
#[cfg(any(test, feature = "conformance"))]
pub mod conformance;
pub mod faulty;
pub mod host;
mod post;
#[cfg(feature = "rdma")]
pub mod rdma;
mod reach;
mod runtime;
pub mod shm;
pub mod sim;
pub mod tcp;
mod view;

pub use completion::{Completion, ConnectionId, PostError, ReceiveBuffer, WorkError};
pub use post::{Payload, Post, Sge};
pub use reach::Reach;
pub use runtime::{Runtime, Signal, Thread};
pub use view::{NoView, View};

/// Longest private data of a connection request, bytes.
pub const MAX_REQUEST_DATA: usize = 48;
/// Longest private data of an acceptance or a refusal, bytes.
pub const MAX_REPLY_DATA: usize = 128;
/// Longest payload that every provider takes inline, bytes.
pub const MAX_INLINE: usize = 64;
/// Most pieces of a gather list.
pub const MAX_SGE: usize = 4;

/// What peers may do to a registered region. Local access is always allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing: a source of SENDs and WRITEs, a target of own READs.
    Local,
    /// READ.
    RemoteRead,
    /// READ and WRITE.
    RemoteWrite,
}

/// How a peer names a region: sent to it in a message, used in its work requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RemoteRegion {
    /// Address of the first byte, as the owner's NIC knows it.
    pub address: u64,
    /// Size in bytes.
    pub length: u64,
    /// The key (`rkey`) that grants the access.
    pub key: u32,
}

impl RemoteRegion {
    /// The place `offset` bytes into the region.
    pub fn at(&self, offset: u64) -> RemoteAddress {
        RemoteAddress { address: self.address.wrapping_add(offset), key: self.key }
    }
}

/// A place in a peer's region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteAddress {
    /// Address as the owner's NIC knows it.
    pub address: u64,
    /// The key (`rkey`).
    pub key: u32,
}

/// A registered memory. Clones name the same registration, which ends with the last of them.
pub trait Region: Clone + Send + Sync + fmt::Debug + 'static {
    /// The memory.
    fn memory(&self) -> &Memory;
    /// What to tell peers.
    fn remote(&self) -> RemoteRegion;
}

/// The registration of an [`Exclusive`]: for remote READ alone. No [`Region`], so that no work request
/// of this process can name it.
pub trait Export: Send + Sync + fmt::Debug + 'static {
    /// What to tell peers.
    fn remote(&self) -> RemoteRegion;

    /// `length` bytes of it from `offset` on, for the [`Reach`] of limited connections.
    fn part(&self, offset: u64, length: u64) -> RemoteRegion {
        let RemoteRegion { address, key, .. } = self.remote();
        RemoteRegion { address: address + offset, length, key }
    }
}

/// What an endpoint is made for. All of it is allocated at once.
#[derive(Debug, Clone)]
pub struct EndpointConfig {
    /// Receive buffers, shared by all connections; also the number of SENDs and WRITEs with immediate that
    /// may be on their way to this endpoint.
    pub receive_buffers: usize,
    /// Bytes of each receive buffer.
    pub receive_size: usize,
    /// Requests in the send queue of each connection.
    pub send_depth: usize,
    /// READs in flight of each connection that it may initiate, and may be asked to serve.
    pub read_depth: usize,
    /// Most connections at a time.
    pub connections: usize,
    /// Completion vector (interrupt) of the queue, for providers that have several: modulo their number.
    pub completion_vector: usize,
    /// The processor that the polling thread is pinned to: of several NICs those near it are better. `None`: it is not, or does not matter.
    pub core: Option<usize>,
}

impl Default for EndpointConfig {
    fn default() -> Self {
        Self {
            receive_buffers: 64,
            receive_size: 4096,
            send_depth: 128,
            read_depth: 16,
            connections: 16,
            completion_vector: 0,
            core: None,
        }
    }
}

/// A way to move data between processes. Cheap to clone: clones share everything.
pub trait Transport: Runtime + Clone + Send + Sync + 'static {
    /// Registered memory.
    type Region: Region;
    /// Exported memory.
    type Export: Export;
    /// A completion queue with receive buffers.
    type Endpoint: Endpoint<Attach = Self::Attach>;
    /// Handle of an endpoint for other threads.
    type Attach: Attach;
    /// One end of a connection.
    type Connection: Connection<Region = Self::Region, View = Self::View>;
    /// A peer's memory, mapped here.
    type View: View;
    /// A listening address.
    type Listener: Listener<Request = Self::Request>;
    /// A peer that wants to connect.
    type Request: Request<Attach = Self::Attach, Connection = Self::Connection>;

    /// Whether connections may have [views](Connection::view): not over a wire.
    fn has_views(&self) -> bool;

    /// Registers `memory` with `access` for peers.
    ///
    /// # Errors
    /// [`Error::Memlock`] when the memory cannot be pinned; another remote right before.
    fn register(&self, memory: &Memory, access: Access) -> Result<Self::Region, Error>;

    /// Registers `memory` for remote READ. It must be kept as long as the export.
    ///
    /// # Errors
    /// [`Error::Memlock`] when the memory cannot be pinned.
    fn export(&self, memory: &Exclusive) -> Result<Self::Export, Error>;

    /// Makes an endpoint.
    ///
    /// # Errors
    /// [`Error::Limit`] when the device has less than the configuration asks for.
    fn endpoint(&self, config: &EndpointConfig) -> Result<Self::Endpoint, Error>;

    /// Listens at `address`. For `rdma` and `tcp`, port 0 picks a free one: see [`Listener::address`].
    ///
    /// # Errors
    /// [`Error::AddressInUse`], [`Error::WrongProvider`].
    fn listen(&self, address: &Address) -> Result<Self::Listener, Error>;

    /// Connects `endpoint` to the listener at `address`, with at most [`MAX_REQUEST_DATA`] bytes for it, and
    /// returns the connection with the private data of the acceptance, of the length given there. Blocks.
    ///
    /// # Errors
    /// [`Error::Refused`] with the refusal's private data; [`Error::Unreachable`]; [`Error::Timeout`].
    fn connect(
        &self,
        endpoint: &Self::Attach,
        address: &Address,
        private_data: &[u8],
        timeout: Duration,
    ) -> Result<(Self::Connection, Vec<u8>), Error> {
        self.connect_with(address, LaneSpec::new(endpoint, private_data), timeout)
    }

    /// As [`connect`](Self::connect), as `lane` says.
    ///
    /// # Errors
    /// As there.
    fn connect_with(
        &self,
        address: &Address,
        lane: LaneSpec<'_, Self::Attach>,
        timeout: Duration,
    ) -> Result<(Self::Connection, Vec<u8>), Error>;

    /// Makes all of `lanes`, in their order, or none: what was made before one fails is dropped, and its peer is told. A provider that can
    /// asks for many at once, and then waits once; others make one after the other. `timeout` is for each: many that are asked for together
    /// may take longer, up to a minute.
    ///
    /// # Errors
    /// That of the first that fails.
    fn connect_all(
        &self,
        address: &Address,
        lanes: &[LaneSpec<'_, Self::Attach>],
        timeout: Duration,
    ) -> Result<Vec<Connected<Self::Connection>>, Error> {
        lanes.iter().map(|lane| self.connect_with(address, *lane, timeout)).collect()
    }
}

/// A connection that was made, and the private data of its acceptance.
pub type Connected<C> = (C, Vec<u8>);

/// What a connection is asked for with: see [`Transport::connect_all`].
#[derive(Debug)]
pub struct LaneSpec<'a, A> {
    /// The endpoint that it joins.
    pub endpoint: &'a A,
    /// What the listener is told: at most [`MAX_REQUEST_DATA`] bytes.
    pub private_data: &'a [u8],
    /// Requests in its send queue: at least 1, and at most the endpoint's [`EndpointConfig::send_depth`]. An end that posts little
    /// needs less memory so.
    pub depth: usize,
}

impl<'a, A> LaneSpec<'a, A> {
    /// With a send queue as deep as the endpoint allows.
    pub fn new(endpoint: &'a A, private_data: &'a [u8]) -> Self {
        Self { endpoint, private_data, depth: usize::MAX }
    }

    /// With a send queue of so many requests.
    pub fn with_depth(self, depth: usize) -> Self {
        Self { depth, ..self }
    }
}

impl<A> Clone for LaneSpec<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<A> Copy for LaneSpec<'_, A> {}

/// One completion queue with one shared pool of receive buffers. One thread polls it.
pub trait Endpoint: Send + 'static {
    /// Handle for other threads.
    type Attach: Attach;

    /// The handle.
    fn attach(&self) -> Self::Attach;

    /// Takes what has completed, up to some number, appends it to `into` and returns how much that was.
    /// Never blocks and, when there is nothing, makes no system call.
    fn poll(&mut self, into: &mut Vec<Completion>) -> usize;

    /// Sleeps until there may be something to poll, [`Attach::wake`] is called (also shortly before), or
    /// `timeout` is over.
    fn wait(&mut self, timeout: Duration);

    /// The message in a receive buffer.
    fn message(&self, buffer: &ReceiveBuffer) -> &[u8];

    /// Gives a receive buffer back.
    fn release(&mut self, buffer: ReceiveBuffer);
}

/// Handle of an [`Endpoint`] for other threads.
pub trait Attach: Clone + Send + Sync + 'static {
    /// Ends a present or the next [`Endpoint::wait`].
    fn wake(&self);
}

/// One end of a reliable, ordered connection (a queue pair). One thread posts to it. Dropped, it disconnects.
pub trait Connection: Send + fmt::Debug + 'static {
    /// The regions that its requests name.
    type Region: Region;
    /// Memory of the peer, mapped here.
    type View: View;

    /// Its name in the completions of its endpoint.
    fn id(&self) -> ConnectionId;

    /// Name of the provider that carries it: `rdma`, `shm`, `tcp` or `sim`.
    fn provider(&self) -> &'static str;

    /// The provider, and what of it, for people: `rdma(mlx5_0:1)`.
    fn way(&self) -> String {
        self.provider().to_owned()
    }

    /// Posts a work request.
    ///
    /// # Errors
    /// [`PostError`]; nothing has happened then.
    fn post(&mut self, post: Post<'_, Self::Region>) -> Result<(), PostError>;

    /// Hands all posted requests to the NIC: one doorbell for many.
    ///
    /// # Errors
    /// [`PostError::Disconnected`]; the requests complete in error.
    fn ring(&mut self) -> Result<(), PostError>;

    /// Requests, of whatever kind and length, that may be posted now before the queue is full.
    fn room(&self) -> usize;

    /// A view of memory of the peer: of all of `region`, or of a part of it. `None`: the peer is on another host,
    /// this provider cannot map its memory, or this connection may not READ all of it.
    fn view(&self, region: RemoteRegion) -> Option<Self::View>;

    /// Ends the connection; both sides get [`Completion::Disconnected`].
    fn disconnect(&mut self);

    /// Whether nothing can end it but this side and the peer: no network lies between them that could break. Its end means that
    /// the peer's process has died, or has ended it.
    fn ends_with_peer(&self) -> bool {
        false
    }
}

/// A listening address. Dropped, it stops listening; accepted connections go on.
pub trait Listener: Send + 'static {
    /// What it yields.
    type Request: Send;

    /// Waits for a peer that wants to connect, for `timeout` at most.
    ///
    /// # Errors
    /// The system's; the listener is of no use then.
    fn accept(&mut self, timeout: Duration) -> Result<Option<Self::Request>, Error>;

    /// Where it listens, with the port that was picked.
    fn address(&self) -> &Address;
}

/// A peer that wants to connect. Dropped, it is refused without a word.
pub trait Request: Send + 'static {
    /// Handle of the endpoint to join.
    type Attach;
    /// What comes of it.
    type Connection;

    /// The private data that the peer gave, of the length that it gave.
    fn private_data(&self) -> &[u8];

    /// The key by which the peer has proved who it is; `None` where there are no keys.
    fn key(&self) -> Option<&Key> {
        None
    }

    /// Limits the connection before it is accepted: of all memory of this side the peer can READ what is in `reach` when it asks, and WRITE
    /// none. `false`: this provider cannot do that, and nothing has changed.
    #[must_use = "where the provider cannot limit it, the peer may READ everything"]
    fn limit(&mut self, _reach: &Arc<Reach>) -> bool {
        false
    }

    /// Accepts, as a connection of `endpoint`; it can be posted to at once. Completions of it may be polled
    /// by the endpoint's thread before this returns.
    ///
    /// # Errors
    /// [`Error::Limit`] when the endpoint has no place left; the peer is refused then.
    fn accept(self, endpoint: &Self::Attach, private_data: &[u8]) -> Result<Self::Connection, Error>
    where
        Self: Sized,
    {
        self.accept_with(endpoint, usize::MAX, private_data)
    }

    /// As [`Request::accept`], with a send queue of `depth` requests, at least 1 and at most the endpoint's
    /// [`EndpointConfig::send_depth`]: an end that only serves its peer's READs needs less memory so.
    ///
    /// # Errors
    /// As [`Request::accept`].
    fn accept_with(
        self,
        endpoint: &Self::Attach,
        depth: usize,
        private_data: &[u8],
    ) -> Result<Self::Connection, Error>;

    /// Refuses, with at most [`MAX_REPLY_DATA`] bytes of private data.
    fn reject(self, private_data: &[u8]);
}
