//! The contract's objects, over the [`World`](super::world::World): each call locks it, does its part, and,
//! if it is a scheduling point, waits.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::{
    chunks::Piece,
    connection::{Kind, Place, Request as Posted},
    handshake::{Answer, Attempt, ListenerState},
    random::Random,
    threads::{Shared, State, Wait},
    world::{Event, Registered},
};
use crate::{
    address::Address,
    error::Error,
    memory::{Exclusive, Memory},
    transport::{
        self, Access, Completion, ConnectionId, EndpointConfig, MAX_INLINE, MAX_REPLY_DATA, MAX_REQUEST_DATA,
        MAX_SGE, Payload, PostError, ReceiveBuffer, RemoteAddress, RemoteRegion, Sge,
    },
};

/// A node of a simulation: a process, with memory, threads and a NIC of its own. The `sim` transport.
#[derive(Debug, Clone)]
pub struct Node {
    pub(super) shared: Arc<Shared>,
    pub(super) index: usize,
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The name in a `sim://name`.
fn name(address: &Address) -> Result<&str, Error> {
    match address {
        Address::Sim(name) => Ok(name),
        other => Err(Error::WrongProvider { address: other.to_string(), provider: "sim" }),
    }
}

fn at_most(what: &str, value: usize, limit: usize) -> Result<(), Error> {
    if value <= limit {
        return Ok(());
    }
    let (what, cure) = (what.to_owned(), String::new());
    Err(Error::Limit { what, value: value as u64, limit: limit as u64, cure })
}

impl Node {
    fn new_region(&self, memory: &Memory, access: Access) -> RegionInner {
        let mut world = self.shared.lock();
        world.call(1_000);
        let seed = world.random.next();
        let node = &mut world.nodes[self.index];
        let mut keys = Random::new(seed);
        let key = loop {
            let key = keys.next() as u32;
            if !node.regions.contains_key(&key) {
                break key;
            }
        };
        let address = node.next_address;
        // Pages between two regions belong to none.
        node.next_address += (memory.len() as u64).next_multiple_of(4096) + (1 << 20);
        let serial = node.registrations;
        node.registrations += 1;
        node.regions.insert(key, Registered { memory: memory.clone(), access, address, serial });
        let remote = RemoteRegion { address, length: memory.len() as u64, key };
        RegionInner { node: self.clone(), memory: memory.clone(), remote }
    }

    /// Where a connection made now begins, at this node.
    fn place(&self, world: &super::world::World, endpoint: usize) -> Place {
        Place { node: self.index, endpoint, horizon: world.nodes[self.index].registrations }
    }

    /// Blocks in `wait` until `done` finds what it waits for or the timeout is over.
    fn until<X>(
        &self,
        wait: Wait,
        timeout: Duration,
        mut done: impl FnMut(&mut super::world::World) -> Option<X>,
    ) -> Option<X> {
        let mut world = self.shared.lock();
        let deadline = world.now.saturating_add(nanos(timeout));
        loop {
            if let Some(found) = done(&mut world) {
                return Some(found);
            }
            if world.now >= deadline {
                return None;
            }
            let left = deadline - world.now;
            self.shared.block(world, wait, Some(left));
            world = self.shared.lock();
            if world.threads[self.shared.current()].dying() {
                return None;
            }
        }
    }
}

impl transport::Transport for Node {
    type Region = Region;
    type Export = Export;
    type Endpoint = Endpoint;
    type Attach = Attach;
    type Connection = Connection;
    type Listener = Listener;
    type Request = Request;
    type Signal = Signal;
    type Thread = Thread;

    fn register(&self, memory: &Memory, access: Access) -> Result<Region, Error> {
        Ok(Region(Arc::new(self.new_region(memory, access))))
    }

    fn export(&self, memory: &Exclusive) -> Result<Export, Error> {
        Ok(Export(self.new_region(&memory.map_again()?, Access::RemoteRead)))
    }

    fn endpoint(&self, config: &EndpointConfig) -> Result<Endpoint, Error> {
        let mut world = self.shared.lock();
        world.call(1_000);
        let index = world.new_endpoint(self.index, config);
        let attach = Attach { node: self.clone(), index };
        Ok(Endpoint { attach, buffers: vec![Vec::new(); config.receive_buffers] })
    }

    fn listen(&self, address: &Address) -> Result<Listener, Error> {
        let name = name(address)?;
        let mut world = self.shared.lock();
        world.call(1_000);
        if world.listeners.contains_key(name) {
            return Err(Error::AddressInUse { address: address.to_string() });
        }
        let state = ListenerState { node: self.index, queue: Default::default(), waiter: None };
        world.listeners.insert(name.to_owned(), state);
        Ok(Listener { node: self.clone(), address: address.clone() })
    }

    fn connect(
        &self,
        endpoint: &Attach,
        address: &Address,
        private_data: &[u8],
        timeout: Duration,
    ) -> Result<(Connection, Vec<u8>), Error> {
        let target = name(address)?;
        at_most("the length of the request's private data", private_data.len(), MAX_REQUEST_DATA)?;
        let mut world = self.shared.lock();
        world.call(1_000);
        let thread = self.shared.current();
        let state = &mut world.endpoints[endpoint.index];
        at_most("the number of connections of the endpoint", state.taken + 1, state.config.connections)?;
        state.taken += 1;
        let number = world.attempts.len();
        let place = self.place(&world, endpoint.index);
        world.attempts.push(Attempt {
            address: target.to_owned(),
            place,
            data: private_data.to_vec(),
            thread,
            host: None,
            answer: None,
            answered: false,
            abandoned: false,
        });
        let delay = world.thread_delay(2_000);
        world.schedule(delay, Event::Knock { attempt: number });
        drop(world);
        let answer = self.until(Wait::Connect, timeout, |world| {
            let attempt = &mut world.attempts[number];
            attempt.answered.then(|| attempt.answer.take().expect("it has been answered"))
        });
        let mut world = self.shared.lock();
        if let Some(Answer::Accepted { link, data }) = answer {
            return Ok((Connection::new(self, link, 0, &world), data));
        }
        world.attempts[number].abandoned = true;
        world.endpoints[endpoint.index].taken -= 1;
        let address = address.to_string();
        Err(match answer {
            Some(Answer::Refused { data: private_data }) => Error::Refused { address, private_data },
            Some(Answer::Unreachable { reason }) => Error::Unreachable { address, reason: reason.to_owned() },
            _ => {
                Error::Timeout { what: format!("connecting to `{address}`"), seconds: timeout.as_secs_f64() }
            }
        })
    }

    fn now(&self) -> Duration {
        let mut world = self.shared.lock();
        world.call(20);
        Duration::from_nanos(world.now)
    }

    fn relax(&self, turn: u32) {
        let mut world = self.shared.lock();
        // The first turns spin; later ones give the processor away for longer and longer. (Who spins makes the
        // simulation slow: each turn is a switch of threads.)
        let typical = (world.temper.spin << (turn.min(64) / 8)).min(20_000);
        let delay = world.thread_delay(typical);
        self.shared.block(world, Wait::Relax, Some(delay));
    }

    fn signal(&self) -> Signal {
        Signal { node: self.clone(), state: Arc::default() }
    }

    fn spawn(
        &self,
        name: &str,
        _core: Option<usize>,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<Thread, Error> {
        let index = self.shared.spawn(self.index, name, false, body).map_err(Error::io("spawn"))?;
        Ok(Thread { node: self.clone(), index })
    }
}

struct RegionInner {
    node: Node,
    memory: Memory,
    remote: RemoteRegion,
}

impl Drop for RegionInner {
    fn drop(&mut self) {
        let mut world = self.node.shared.lock();
        world.nodes[self.node.index].regions.remove(&self.remote.key);
    }
}

impl fmt::Debug for RegionInner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of node {}", self.remote, self.node.index)
    }
}

/// Registered memory of a node.
#[derive(Debug, Clone)]
pub struct Region(Arc<RegionInner>);

impl transport::Region for Region {
    fn memory(&self) -> &Memory {
        &self.0.memory
    }

    fn remote(&self) -> RemoteRegion {
        self.0.remote
    }
}

/// Exported memory of a node.
#[derive(Debug)]
pub struct Export(RegionInner);

impl transport::Export for Export {
    fn remote(&self) -> RemoteRegion {
        self.0.remote
    }
}

/// A completion queue of a node, with its receive buffers.
#[derive(Debug)]
pub struct Endpoint {
    attach: Attach,
    /// The message in each receive buffer that the user holds.
    buffers: Vec<Vec<u8>>,
}

impl transport::Endpoint for Endpoint {
    type Attach = Attach;

    fn attach(&self) -> Attach {
        self.attach.clone()
    }

    fn poll(&mut self, into: &mut Vec<Completion>) -> usize {
        self.attach.node.shared.lock().poll(self.attach.index, into, &mut self.buffers)
    }

    fn wait(&mut self, timeout: Duration) {
        let Attach { node, index } = &self.attach;
        let mut world = node.shared.lock();
        let endpoint = &mut world.endpoints[*index];
        let first = endpoint.queue.keys().next().map(|key| key.0);
        let woken = endpoint.woken;
        let ready = first.map(|time| time.saturating_sub(world.now)).unwrap_or(u64::MAX);
        let timeout = nanos(timeout).min(if woken { 0 } else { ready });
        let delay = timeout.saturating_add(world.thread_delay(2_000));
        let me = node.shared.current();
        world.endpoints[*index].waiter = Some(me);
        node.shared.block(world, Wait::Endpoint(*index), Some(delay));
        let mut world = node.shared.lock();
        let endpoint = &mut world.endpoints[*index];
        endpoint.waiter = None;
        endpoint.woken = false;
    }

    fn message(&self, buffer: &ReceiveBuffer) -> &[u8] {
        &self.buffers[buffer.index as usize]
    }

    fn release(&mut self, buffer: ReceiveBuffer) {
        self.buffers[buffer.index as usize] = Vec::new();
        let mut world = self.attach.node.shared.lock();
        world.call(20);
        world.give_back(self.attach.index, buffer.index);
    }
}

impl Drop for Endpoint {
    /// Its connections are over.
    fn drop(&mut self) {
        let mut world = self.attach.node.shared.lock();
        for link in 0..world.links.len() {
            for side in 0..2 {
                if world.links[link].ends[side as usize].endpoint == self.attach.index {
                    world.disconnect(link, side);
                }
            }
        }
        let endpoint = &mut world.endpoints[self.attach.index];
        endpoint.alive = false;
        endpoint.queue.clear();
    }
}

/// Handle of an endpoint.
#[derive(Debug, Clone)]
pub struct Attach {
    node: Node,
    index: usize,
}

impl transport::Attach for Attach {
    fn wake(&self) {
        let mut world = self.node.shared.lock();
        world.call(200);
        let endpoint = &mut world.endpoints[self.index];
        endpoint.woken = true;
        if let Some(waiter) = endpoint.waiter {
            let delay = world.thread_delay(3_000);
            world.wake(waiter, delay);
        }
    }
}

/// One end of a connection of a node.
#[derive(Debug)]
pub struct Connection {
    node: Node,
    link: usize,
    side: u8,
    id: ConnectionId,
    /// The regions that its requests have named: they live as long as it does.
    named: Vec<Region>,
}

impl Connection {
    fn new(node: &Node, link: usize, side: u8, world: &super::world::World) -> Self {
        let id = ConnectionId(world.links[link].ends[side as usize].id);
        Self { node: node.clone(), link, side, id, named: Vec::new() }
    }

    /// The pieces of a list, as the NIC takes them.
    ///
    /// # Panics
    /// When the list is none that may be posted.
    fn pieces(&mut self, list: &[Sge<'_, Region>]) -> Vec<Piece> {
        assert!(list.len() <= MAX_SGE, "a list of {} pieces: at most {MAX_SGE} are possible", list.len());
        list.iter()
            .map(|&Sge { region, offset, length }| {
                let inner = &region.0;
                assert_eq!(inner.node.index, self.node.index, "a region of another node: {region:?}");
                assert!(
                    offset.checked_add(length).is_some_and(|end| end <= inner.memory.len()),
                    "bytes {offset}.. ({length} of them) are outside {region:?}"
                );
                if !self.named.iter().any(|named| Arc::ptr_eq(&named.0, inner)) {
                    self.named.push(region.clone());
                }
                Piece { memory: inner.memory.clone(), offset, length }
            })
            .collect()
    }

    fn post(
        &mut self,
        kind: Kind,
        payload: Payload<'_, Region>,
        remote: RemoteAddress,
        immediate: Option<u32>,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        let (local, data) = match payload {
            Payload::Inline(bytes) => {
                assert!(bytes.len() <= MAX_INLINE, "{} bytes inline: at most {MAX_INLINE}", bytes.len());
                (Vec::new(), bytes.to_vec())
            }
            Payload::Gather(list) => {
                let local = self.pieces(list);
                let length = local.iter().map(|piece| piece.length).sum();
                (local, if kind == Kind::Read { Vec::new() } else { vec![0; length] })
            }
        };
        let request = Posted {
            kind,
            immediate,
            signal,
            remote,
            local,
            data,
            chunks: Vec::new(),
            left: 0,
            scattering: false,
            target: None,
            done: None,
        };
        self.node.shared.lock().post(self.link, self.side, request)
    }
}

impl transport::Connection for Connection {
    type Region = Region;

    fn id(&self) -> ConnectionId {
        self.id
    }

    fn send(
        &mut self,
        payload: Payload<'_, Region>,
        immediate: Option<u32>,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        self.post(Kind::Send, payload, RemoteAddress { address: 0, key: 0 }, immediate, signal)
    }

    fn write(
        &mut self,
        payload: Payload<'_, Region>,
        remote: RemoteAddress,
        immediate: Option<u32>,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        self.post(Kind::Write, payload, remote, immediate, signal)
    }

    fn read(
        &mut self,
        into: &[Sge<'_, Region>],
        remote: RemoteAddress,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        self.post(Kind::Read, Payload::Gather(into), remote, None, signal)
    }

    fn ring(&mut self) -> Result<(), PostError> {
        self.node.shared.lock().ring(self.link, self.side)
    }

    fn room(&self) -> usize {
        let world = self.node.shared.lock();
        let end = &world.links[self.link].ends[self.side as usize];
        end.depth - end.used
    }

    fn disconnect(&mut self) {
        self.node.shared.lock().disconnect(self.link, self.side);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut world = self.node.shared.lock();
        world.disconnect(self.link, self.side);
        world.links[self.link].ends[self.side as usize].handle = false;
        world.leave(self.link, self.side);
    }
}

/// An address that a node listens at.
#[derive(Debug)]
pub struct Listener {
    node: Node,
    address: Address,
}

impl Listener {
    fn name(&self) -> &str {
        name(&self.address).expect("checked when it was made")
    }
}

impl transport::Listener for Listener {
    type Request = Request;

    fn accept(&mut self, timeout: Duration) -> Result<Option<Request>, Error> {
        let me = self.node.shared.current();
        let number = self.node.until(Wait::Accept, timeout, |world| {
            // It is gone if its node is dead.
            let listener = world.listeners.get_mut(self.name())?;
            listener.waiter = Some(me);
            listener.queue.pop_front()
        });
        let world = self.node.shared.lock();
        Ok(number.map(|number| Request {
            node: self.node.clone(),
            number,
            data: world.attempts[number].data.clone(),
            answered: false,
        }))
    }

    fn address(&self) -> &Address {
        &self.address
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut world = self.node.shared.lock();
        // A dead node's address may be another's by now.
        if world.nodes[self.node.index].alive {
            world.stop_listening(self.name());
        }
    }
}

/// A client that wants to connect to a node.
#[derive(Debug)]
pub struct Request {
    node: Node,
    number: usize,
    data: Vec<u8>,
    answered: bool,
}

impl Request {
    fn refuse(&mut self, data: &[u8]) {
        let mut world = self.node.shared.lock();
        world.call(1_000);
        self.answered = true;
        if world.nodes[self.node.index].alive {
            world.reply(self.number, Answer::Refused { data: data.to_vec() });
        }
    }
}

impl transport::Request for Request {
    type Attach = Attach;
    type Connection = Connection;

    fn private_data(&self) -> &[u8] {
        &self.data
    }

    fn accept(mut self, endpoint: &Attach, private_data: &[u8]) -> Result<Connection, Error> {
        // Refused when `self` is dropped with an error.
        at_most("the length of the reply's private data", private_data.len(), MAX_REPLY_DATA)?;
        let mut world = self.node.shared.lock();
        world.call(1_000);
        let state = &mut world.endpoints[endpoint.index];
        at_most("the number of connections of the endpoint", state.taken + 1, state.config.connections)?;
        state.taken += 1;
        self.answered = true;
        let server = self.node.place(&world, endpoint.index);
        let client = world.attempts[self.number].place;
        let link = world.new_link([client, server]);
        let connection = Connection::new(&self.node, link, 1, &world);
        world.reply(self.number, Answer::Accepted { link, data: private_data.to_vec() });
        // The client, and this endpoint's thread, may go on before this one does.
        let delay = world.thread_delay(3_000);
        self.node.shared.block(world, Wait::Accept, Some(delay));
        Ok(connection)
    }

    fn reject(mut self, private_data: &[u8]) {
        let length = private_data.len();
        assert!(length <= MAX_REPLY_DATA, "a refusal with {length} bytes: at most {MAX_REPLY_DATA}");
        self.refuse(private_data);
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if !self.answered {
            self.refuse(&[]);
        }
    }
}

/// The state of an event count: only the running thread looks at it.
#[derive(Debug, Default)]
struct SignalState {
    epoch: u64,
    waiters: Vec<usize>,
}

/// An event count of a node.
#[derive(Debug, Clone)]
pub struct Signal {
    node: Node,
    state: Arc<Mutex<SignalState>>,
}

impl Signal {
    fn state(&self) -> std::sync::MutexGuard<'_, SignalState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl transport::Signal for Signal {
    fn epoch(&self) -> u64 {
        self.state().epoch
    }

    fn wait(&self, seen: u64, timeout: Duration) {
        let me = self.node.shared.current();
        self.node.until(Wait::Signal, timeout, |_| {
            let mut state = self.state();
            if state.epoch == seen && !state.waiters.contains(&me) {
                state.waiters.push(me);
            }
            (state.epoch != seen).then_some(())
        });
        self.state().waiters.retain(|&waiter| waiter != me);
    }

    fn notify(&self) {
        let waiters = {
            let mut state = self.state();
            state.epoch += 1;
            std::mem::take(&mut state.waiters)
        };
        let mut world = self.node.shared.lock();
        world.call(100);
        for waiter in waiters {
            let delay = world.thread_delay(3_000);
            world.wake(waiter, delay);
        }
    }
}

/// A thread of a node.
#[derive(Debug)]
pub struct Thread {
    node: Node,
    index: usize,
}

impl transport::Thread for Thread {
    fn join(self) -> bool {
        let me = self.node.shared.current();
        self.node
            .until(Wait::Join(self.index), Duration::MAX, |world| {
                let thread = &mut world.threads[self.index];
                if let State::Ended { panicked } = thread.state {
                    thread.joined = true;
                    return Some(!panicked);
                }
                if !thread.joiners.contains(&me) {
                    thread.joiners.push(me);
                }
                None
            })
            // This thread is dying itself.
            .unwrap_or(false)
    }
}
