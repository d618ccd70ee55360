//! A node as a transport: it makes the contract's objects.

use std::{sync::Arc, time::Duration};

use super::{
    ends::{Attach, Connection, Endpoint, Listener, Request},
    handshake::{Answer, Attempt, ListenerState},
    node::{Export, Node, Region, Signal, Thread, at_most, name},
    threads::Wait,
    view::View,
    world::Event,
};
use crate::{
    address::Address,
    error::Error,
    memory::{Exclusive, Memory},
    transport::{Access, EndpointConfig, LaneSpec, MAX_REQUEST_DATA, Runtime, Transport},
};

impl Transport for Node {
    type Region = Region;
    type Export = Export;
    type Endpoint = Endpoint;
    type Attach = Attach;
    type Connection = Connection;
    type View = View;
    type Listener = Listener;
    type Request = Request;

    fn has_views(&self) -> bool {
        true
    }

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
        Ok(Endpoint::new(Attach { node: self.clone(), index }, config.receive_buffers))
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
        Ok(Listener::new(self, address))
    }

    fn connect_with(
        &self,
        address: &Address,
        LaneSpec { endpoint, private_data, depth }: LaneSpec<'_, Attach>,
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
            let end = world.end(link, 0);
            end.depth = end.depth.min(depth.max(1));
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
}

impl Runtime for Node {
    type Signal = Signal;
    type Thread = Thread;

    // Few: each is a step of the simulation, and sleeping is to be explored, too.
    const AWAKE_TURNS: u32 = 32;

    fn now(&self) -> Duration {
        let mut world = self.shared.lock();
        world.call(20);
        // In a simulation of time the calls so far count at once.
        let lag = if world.traffic.is_some() { world.lag } else { 0 };
        Duration::from_nanos(world.now + lag)
    }

    fn random(&self) -> u64 {
        self.shared.lock().random.next()
    }

    fn relax(&self, turn: u32) {
        let mut world = self.shared.lock();
        if world.traffic.is_some() {
            let me = self.shared.current();
            let delay = world.starts_to_relax(self.index, turn);
            self.shared.block(world, Wait::Relax, Some(delay));
            return self.shared.lock().has_relaxed(self.index, me);
        }
        // The first turns spin; later ones give the processor away for longer and longer. (Who spins makes the
        // simulation slow: each turn is a switch of threads.)
        let typical = (world.temper.spin << (turn.min(64) / 8)).min(20_000);
        let delay = world.thread_delay(typical);
        self.shared.block(world, Wait::Relax, Some(delay));
    }

    fn signal(&self) -> Signal {
        Signal::new(self)
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
