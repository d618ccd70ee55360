//! Endpoints, connections, and how they come to be.

use std::{sync::Arc, time::Duration};

use super::{
    chunks::Piece,
    connection::{Kind, Request as Posted},
    handshake::Answer,
    node::{Node, Region, at_most, name, nanos},
    threads::Wait,
    view::View,
    world::World,
};
use crate::{
    address::Address,
    error::Error,
    transport::{
        self, Completion, ConnectionId, MAX_INLINE, MAX_REPLY_DATA, MAX_SGE, Payload, Post, PostError,
        ReceiveBuffer, RemoteAddress, RemoteRegion, Sge,
    },
};

/// A completion queue of a node, with its receive buffers.
#[derive(Debug)]
pub struct Endpoint {
    attach: Attach,
    /// The message in each receive buffer that the user holds.
    buffers: Vec<Vec<u8>>,
}

impl Endpoint {
    pub(super) fn new(attach: Attach, buffers: usize) -> Self {
        Self { attach, buffers: vec![Vec::new(); buffers] }
    }
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
    pub(super) node: Node,
    pub(super) index: usize,
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
    pub(super) fn new(node: &Node, link: usize, side: u8, world: &World) -> Self {
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

    fn queue(
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
            due: u64::MAX,
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
    type View = View;

    fn id(&self) -> ConnectionId {
        self.id
    }

    fn provider(&self) -> &'static str {
        "sim"
    }

    fn post(&mut self, post: Post<'_, Region>) -> Result<(), PostError> {
        let none = RemoteAddress { address: 0, key: 0 };
        match post {
            Post::Send { payload, immediate, signal } => {
                self.queue(Kind::Send, payload, none, immediate, signal)
            }
            Post::Write { payload, to, immediate, signal } => {
                self.queue(Kind::Write, payload, to, immediate, signal)
            }
            Post::Read { into, from, signal } => {
                self.queue(Kind::Read, Payload::Gather(into), from, None, signal)
            }
        }
    }

    fn ring(&mut self) -> Result<(), PostError> {
        self.node.shared.lock().ring(self.link, self.side)
    }

    fn room(&self) -> usize {
        let mut world = self.node.shared.lock();
        world.settle(self.link, self.side);
        let end = &world.links[self.link].ends[self.side as usize];
        end.depth - end.used
    }

    fn view(&self, region: RemoteRegion) -> Option<View> {
        self.node.view(self.link, self.side, region)
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
    pub(super) fn new(node: &Node, address: &Address) -> Self {
        Self { node: node.clone(), address: address.clone() }
    }

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

    fn accept_with(
        mut self,
        endpoint: &Attach,
        depth: usize,
        private_data: &[u8],
    ) -> Result<Connection, Error> {
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
        let end = world.end(link, 1);
        end.depth = end.depth.min(depth.max(1));
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
