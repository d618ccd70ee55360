//! The `faulty` provider: any other one, and what goes wrong on the way, where a plan says so.
//!
//! ```
//! use fervor_verbs::transport::{faulty::*, sim::Sim};
//!
//! let sim = Sim::new(7);
//! // The third connection that this node makes breaks at its first READ, which happens nevertheless.
//! let at = Point::Post { kind: Some(Kind::Read), nth: 0, fate: Fate::Done };
//! let client = Faulty::new(sim.node("client"), Plan::one(Fault::Break { connection: 2, at }));
//! let server = sim.node("server");
//! # drop((client, server));
//! ```
//!
//! A [`Faulty`] is one node: a process, or what stands for one. It stands between the user and the inner provider and changes
//! nothing on the wire, so its peers may be wrapped or not. With an empty plan it does what the inner provider does, call for call.
//!
//! | module | what it is |
//! |---|---|
//! | [`plan`] | what shall go wrong, and what has |
//! | [`node`](self) | what is counted, and death |
//! | [`end`](self) | a connection, and how it breaks |
//! | [`endpoint`](self) | completions: held back, turned into errors |
//!
//! # Why the contract allows it
//!
//! Whatever a plan makes happen could happen without it, on a network and machines as the contract describes them. A user who does
//! not survive it relies on more than the [contract](crate::transport).
//!
//! **A connection breaks** ([`Fault::Break`]). Networks do that at any moment, and a break is told as the contract says:
//! completions in order, errors for what is not known to have happened, then one end. *Rule 5*: every operation not completed
//! may or may not have happened. Both are made to happen: the request at which the break comes is kept back
//! ([`Fate::Undone`]: a packet lost on its way there) or waited for and its success not told ([`Fate::Done`]: a packet lost
//! on its way back; that it happened, and all before it with it, is what rule 5 allows to the last request of a queue). Of those
//! before it that are still on their way the inner provider decides. What has arrived is polled before the end: the
//! receiving NIC has acknowledged it, so the sender may have been told that it happened. Nothing changes memory after the
//! end, since it is the inner provider's end.
//!
//! **A node dies** ([`Fault::Die`]). Processes do that between any two operations. Its peers see what they see of a dead
//! process: either it is one ([`Faulty::mortal`]: `Sim::kill`, `std::process::abort`), or its connections end without another post or
//! ring of it, which is what an operating system does for a dead process; within two seconds in any case. What such a node itself
//! sees is of no meaning; calls fail, so that its threads come to an end.
//!
//! **A completion shows late** ([`Fault::Delay`]). The contract says *after what* a completion comes and never how soon, but for one: a
//! dead peer is found out within two seconds, so ends are not to be held back for long. A completion that shows late has had
//! its effect before, as it always may (rules 2 and 3 say what is visible when it *has* been polled). Those of one
//! connection's requests stay in order, and so do those of what it receives; the end stays the last word. Between requests and
//! arrivals, and between connections, the contract knows no order. Until it shows, a request has its place in the send
//! queue and a message its receive buffer.
//!
//! **Messages come again after a reconnect** ([`Fault::Replay`]). No transport does that: one connection never delivers
//! what was sent on another. Users do, and rule 5 is why: whoever lost a connection and wants its messages to arrive has
//! to send them again, those too that had arrived. The wrapper plays that part. For the receiver it is a new connection
//! with messages on it, of whose content the contract says nothing; the sender's own requests stay as they are, behind them.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use crate::{
    address::Address,
    error::Error,
    memory::{Exclusive, Memory},
    session::Key,
    transport::{
        self, Access, Connection as _, ConnectionId, EndpointConfig, LaneSpec, Payload, Post, PostError,
        Reach, Region as _, RemoteRegion, Sge, Transport,
    },
};

mod end;
mod endpoint;
mod node;
pub mod plan;
#[cfg(any(test, feature = "conformance"))]
pub mod suite;
#[cfg(test)]
mod tests;

pub use endpoint::{Attach, Endpoint};
pub use plan::{Counts, Fate, Fault, Kind, Plan, Point, Report, Shown};

use end::Message;
use node::{Node, Shared, lock};

/// A node over `T` where things go wrong as planned. Clones are the same node. See the module.
pub struct Faulty<T: Transport> {
    inner: T,
    node: Arc<Node<T::Connection>>,
}

impl<T: Transport> Clone for Faulty<T> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), node: self.node.clone() }
    }
}

impl<T: Transport> fmt::Debug for Faulty<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faulty({:?})", self.node)
    }
}

impl<T: Transport> Faulty<T> {
    /// A node of `inner`, with this plan. If it dies, its connections end and its calls fail.
    pub fn new(inner: T, plan: Plan) -> Self {
        Self { inner, node: Arc::new(Node::new(plan, None)) }
    }

    /// As [`Faulty::new`], but [`Fault::Die`] calls `kill`, which ends the node as abruptly as the provider knows (and
    /// the calling thread with it).
    pub fn mortal(inner: T, plan: Plan, kill: impl Fn() + Send + Sync + 'static) -> Self {
        Self { inner, node: Arc::new(Node::new(plan, Some(Box::new(kill)))) }
    }

    /// The node of the inner provider.
    pub fn inner(&self) -> &T {
        &self.inner
    }

    /// What has happened so far.
    pub fn report(&self) -> Report {
        self.node.report()
    }

    /// Whether a fault of the plan has happened; delays are none.
    pub fn struck(&self) -> bool {
        self.node.struck()
    }

    /// Sends again, on a new connection to `address`, what the plan says.
    fn replay(&self, inner: &mut T::Connection, address: &Address) -> Result<(), Error> {
        let messages = self.node.replay(address);
        let length = messages.iter().map(|message| message.bytes.len()).sum();
        if length == 0 {
            return Ok(());
        }
        let region = self.inner.register(&Memory::new("replay", length)?, Access::Local)?;
        let mut offset = 0;
        for Message { bytes, immediate } in messages {
            region.memory().write(offset, &bytes);
            let piece = [Sge { region: &region, offset, length: bytes.len() }];
            // If the new connection is broken already, it tells so by itself.
            let sent = inner.post(Post::Send { payload: Payload::Gather(&piece), immediate, signal: None });
            self.node.replayed.fetch_add(sent.is_ok().into(), Ordering::Relaxed);
            offset += bytes.len();
        }
        let _ = inner.ring();
        Ok(())
    }

    /// A new connection: made known to the endpoint.
    fn connection(
        &self,
        inner: T::Connection,
        attach: &Attach<T>,
        address: Option<&Address>,
    ) -> Connection<T> {
        let (id, provider, way) = (inner.id(), inner.provider(), inner.way());
        let end = self.node.enter(inner, address.cloned());
        attach.enter(id, &end);
        Connection { id, provider, way, end, node: self.node.clone() }
    }
}

impl<T: Transport> Transport for Faulty<T> {
    type Region = T::Region;
    type Export = T::Export;
    type Endpoint = Endpoint<T>;
    type Attach = Attach<T>;
    type Connection = Connection<T>;
    type View = T::View;
    type Listener = Listener<T>;
    type Request = Request<T>;

    fn has_views(&self) -> bool {
        self.inner.has_views()
    }

    fn register(&self, memory: &Memory, access: Access) -> Result<T::Region, Error> {
        self.node.alive("register")?;
        self.inner.register(memory, access)
    }

    fn export(&self, memory: &Exclusive) -> Result<T::Export, Error> {
        self.node.alive("export")?;
        self.inner.export(memory)
    }

    fn endpoint(&self, config: &EndpointConfig) -> Result<Endpoint<T>, Error> {
        self.node.alive("endpoint")?;
        Ok(Endpoint::new(self.inner.endpoint(config)?, &self.node, &self.inner))
    }

    fn listen(&self, address: &Address) -> Result<Listener<T>, Error> {
        self.node.alive("listen")?;
        Ok(Listener { inner: self.inner.listen(address)?, node: self.clone() })
    }

    fn connect_with(
        &self,
        address: &Address,
        LaneSpec { endpoint, private_data, depth }: LaneSpec<'_, Attach<T>>,
        timeout: Duration,
    ) -> Result<(Connection<T>, Vec<u8>), Error> {
        self.node.operates_in("connect")?;
        let lane = LaneSpec { endpoint: &endpoint.inner, private_data, depth };
        let (mut inner, reply) = self.inner.connect_with(address, lane, timeout)?;
        self.replay(&mut inner, address)?;
        Ok((self.connection(inner, endpoint, Some(address)), reply))
    }
}

impl<T: Transport> transport::Runtime for Faulty<T> {
    type Signal = T::Signal;
    type Thread = T::Thread;

    const AWAKE_TURNS: u32 = T::AWAKE_TURNS;

    fn now(&self) -> Duration {
        self.inner.now()
    }

    fn random(&self) -> u64 {
        self.inner.random()
    }

    fn relax(&self, turn: u32) {
        self.inner.relax(turn);
    }

    fn signal(&self) -> T::Signal {
        self.inner.signal()
    }

    fn spawn(
        &self,
        name: &str,
        core: Option<usize>,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<T::Thread, Error> {
        self.inner.spawn(name, core, body)
    }
}

/// One end of a connection of a faulty node.
pub struct Connection<T: Transport> {
    id: ConnectionId,
    provider: &'static str,
    way: String,
    end: Shared<T::Connection>,
    node: Arc<Node<T::Connection>>,
}

impl<T: Transport> fmt::Debug for Connection<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.end.fmt(f)
    }
}

impl<T: Transport> transport::Connection for Connection<T> {
    type Region = T::Region;
    /// The inner provider's: it goes on when the connection is broken or this node dead, as the contract says.
    type View = T::View;

    fn id(&self) -> ConnectionId {
        self.id
    }

    fn provider(&self) -> &'static str {
        self.provider
    }

    fn way(&self) -> String {
        self.way.clone()
    }

    fn post(&mut self, post: Post<'_, T::Region>) -> Result<(), PostError> {
        if !self.node.operates() {
            return Err(PostError::Disconnected);
        }
        let (result, struck) = lock(&self.end).post(post);
        self.node.fire(struck);
        result
    }

    fn ring(&mut self) -> Result<(), PostError> {
        let unrung = lock(&self.end).unrung();
        if unrung && !self.node.operates() {
            return Err(PostError::Disconnected);
        }
        lock(&self.end).ring()
    }

    fn room(&self) -> usize {
        lock(&self.end).room()
    }

    fn view(&self, region: RemoteRegion) -> Option<T::View> {
        lock(&self.end).view(region)
    }

    fn disconnect(&mut self) {
        lock(&self.end).disconnect();
    }

    /// It can break: that is what this is for.
    fn ends_with_peer(&self) -> bool {
        false
    }
}

impl<T: Transport> Drop for Connection<T> {
    fn drop(&mut self) {
        let inner = lock(&self.end).take();
        drop(inner);
    }
}

/// A listening address of a faulty node.
pub struct Listener<T: Transport> {
    inner: T::Listener,
    node: Faulty<T>,
}

impl<T: Transport> transport::Listener for Listener<T> {
    type Request = Request<T>;

    fn accept(&mut self, timeout: Duration) -> Result<Option<Request<T>>, Error> {
        self.node.node.alive("accept")?;
        let request = self.inner.accept(timeout)?;
        self.node.node.alive("accept")?;
        Ok(request.map(|inner| Request { inner, node: self.node.clone() }))
    }

    fn address(&self) -> &Address {
        self.inner.address()
    }
}

/// A peer that wants to connect to a faulty node.
pub struct Request<T: Transport> {
    inner: T::Request,
    node: Faulty<T>,
}

impl<T: Transport> transport::Request for Request<T> {
    type Attach = Attach<T>;
    type Connection = Connection<T>;

    fn private_data(&self) -> &[u8] {
        self.inner.private_data()
    }

    fn key(&self) -> Option<&Key> {
        self.inner.key()
    }

    fn limit(&mut self, reach: &Arc<Reach>) -> bool {
        self.inner.limit(reach)
    }

    fn accept_with(
        self,
        endpoint: &Attach<T>,
        depth: usize,
        private_data: &[u8],
    ) -> Result<Connection<T>, Error> {
        self.node.node.operates_in("accept")?;
        let inner = self.inner.accept_with(&endpoint.inner, depth, private_data)?;
        Ok(self.node.connection(inner, endpoint, None))
    }

    fn reject(self, private_data: &[u8]) {
        self.inner.reject(private_data);
    }
}
