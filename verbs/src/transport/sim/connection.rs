//! Connections: what becomes of a request, from its post to its completion and beyond.
//!
//! ```text
//!  post ─▶ launch ─▶ gather …  ─▶ arrive ─▶ acknowledge ─▶ retire ─▶ completion shows
//!                    line by      in order;     WRITE: lands line by line, at any time until something
//!                    line, from   a READ then   of the same connection that was posted later proves it
//!                    the poster's captures      READ: lines captured, then scattered, in any order,
//!                    memory       and scatters  before its acknowledgement
//! ```
//!
//! Requests of one end arrive in the order in which they were posted. What gives the contract's weakness is
//! what comes after: a READ captures its lines later than it arrives, so SENDs and WRITEs behind it overtake
//! it, and READs overtake each other; a WRITE is acknowledged before its lines land; and every completion
//! shows late.
//!
//! How it ends is in [`ending`](super::ending).

use std::collections::VecDeque;

use super::{
    chunks::{Chunk, Landing, Piece, cut, land},
    endpoint::What,
    world::{Event, World},
};
use crate::transport::{Access, PostError, RemoteAddress, WorkError};

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Send,
    Write,
    Read,
}

/// A posted request that has not been retired.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) kind: Kind,
    pub(super) immediate: Option<u32>,
    pub(super) signal: Option<u64>,
    pub(super) remote: RemoteAddress,
    /// Own memory: gathered from, or scattered to.
    pub(super) local: Vec<Piece>,
    /// The payload, as far as it is known.
    pub(super) data: Vec<u8>,
    /// In a simulation of time: when an unsignalled request that was carried out is acknowledged.
    pub(super) due: u64,
    /// Chunks of the present phase.
    pub(super) chunks: Vec<Chunk>,
    /// Chunks of the present phase of a READ that are to come.
    pub(super) left: usize,
    /// Whether all lines of a READ have been captured.
    pub(super) scattering: bool,
    /// What a READ reads.
    pub(super) target: Option<Piece>,
    pub(super) done: Option<Result<(), WorkError>>,
}

/// One end of a connection, and the requests posted to it.
#[derive(Debug)]
pub(super) struct End {
    pub(super) node: usize,
    pub(super) endpoint: usize,
    pub(super) id: u32,
    /// Registrations of this node that the peer may reach: those with a smaller serial.
    pub(super) horizon: u64,
    /// Places in the send queue, and how many are taken.
    pub(super) depth: usize,
    pub(super) used: usize,
    /// Places of unsignalled requests that are done, free after the next poll.
    pub(super) retired: usize,
    /// READs that may be in flight, and are.
    pub(super) read_depth: usize,
    pub(super) reads: usize,
    /// Number of the first of `requests`.
    pub(super) first: u64,
    pub(super) requests: VecDeque<Request>,
    /// Requests below this number: may go, have gone, have reached the peer's host, have been seen to there.
    pub(super) rung: u64,
    pub(super) launched: u64,
    reached: u64,
    pub(super) arrived: u64,
    pub(super) last_arrival: u64,
    pub(super) last_return: u64,
    pub(super) last_work: u64,
    pub(super) last_receive: u64,
    /// Whether the next request waits for a receive buffer.
    starved: bool,
    /// Why the connection is over, at this end.
    pub(super) broken: Option<WorkError>,
    /// After a break: requests below the first number still happen, and the one that has it in part, if `true`.
    pub(super) fate: (u64, bool),
    /// Whether the connection's user still has it.
    pub(super) handle: bool,
    /// Whether its end has been polled.
    pub(super) finished: bool,
    /// WRITEs of this end that have reached the peer's host.
    pub(super) landings: VecDeque<Landing>,
}

/// What a new end is made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) node: usize,
    pub(super) endpoint: usize,
    pub(super) horizon: u64,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) ends: [End; 2],
}

impl End {
    pub(super) fn request(&mut self, number: u64) -> Option<&mut Request> {
        let index = number.checked_sub(self.first)?;
        self.requests.get_mut(index as usize)
    }
}

impl World {
    /// Makes a connection between two places; the client's is side 0.
    pub(super) fn new_link(&mut self, places: [Place; 2]) -> usize {
        let read_depth = places.map(|place| self.endpoints[place.endpoint].config.read_depth);
        let ends = places.map(|Place { node, endpoint, horizon }| {
            let state = &mut self.endpoints[endpoint];
            let id = state.next_id;
            state.next_id += 1;
            End {
                node,
                endpoint,
                id,
                horizon,
                depth: state.config.send_depth,
                used: 0,
                retired: 0,
                read_depth: read_depth[0].min(read_depth[1]).max(1),
                reads: 0,
                first: 0,
                requests: VecDeque::new(),
                rung: 0,
                launched: 0,
                reached: 0,
                arrived: 0,
                last_arrival: 0,
                last_return: 0,
                last_work: 0,
                last_receive: 0,
                starved: false,
                broken: None,
                fate: (0, false),
                handle: true,
                finished: false,
                landings: VecDeque::new(),
            }
        });
        self.links.push(Link { ends });
        self.links.len() - 1
    }

    pub(super) fn end(&mut self, link: usize, side: u8) -> &mut End {
        &mut self.links[link].ends[side as usize]
    }

    pub(super) fn post(&mut self, link: usize, side: u8, request: Request) -> Result<(), PostError> {
        self.call(60);
        let mut eager = false;
        if let Some(traffic) = &self.traffic {
            if request.kind == Kind::Send {
                self.lag += traffic.handling(request.data.len());
            }
            self.settle(link, side);
        } else {
            eager = self.random.one_in(self.temper.eager);
        }
        let end = self.end(link, side);
        if end.broken.is_some() {
            return Err(PostError::Disconnected);
        }
        if end.used >= end.depth {
            return Err(PostError::Full);
        }
        end.used += 1;
        end.requests.push_back(request);
        if eager {
            end.rung = end.first + end.requests.len() as u64;
            self.launch(link, side);
        }
        Ok(())
    }

    pub(super) fn ring(&mut self, link: usize, side: u8) -> Result<(), PostError> {
        self.call(100);
        let end = self.end(link, side);
        if end.broken.is_some() {
            return Err(PostError::Disconnected);
        }
        end.rung = end.first + end.requests.len() as u64;
        self.launch(link, side);
        Ok(())
    }

    /// Sends off what may go. A READ beyond the read depth holds up those behind it.
    fn launch(&mut self, link: usize, side: u8) {
        if self.traffic.is_some() {
            return self.launch_timed(link, side);
        }
        let Self { now, random, temper, network, links, .. } = self;
        let end = &mut links[link].ends[side as usize];
        let mut events = Vec::new();
        while end.launched < end.rung {
            let number = end.launched;
            let request = &mut end.requests[(number - end.first) as usize];
            let is_read = request.kind == Kind::Read;
            if is_read && end.reads == end.read_depth {
                break;
            }
            end.launched += 1;
            end.reads += usize::from(is_read);
            let bytes = if is_read { 0 } else { request.data.len() };
            let delay = 100 + network.delay(random, bytes, temper.late_packet);
            end.last_arrival = end.last_arrival.max(*now + delay);
            let way = end.last_arrival - *now;
            if !is_read {
                request.chunks = cut(&request.local, random);
                let at_once = random.one_in(4);
                for chunk in 0..request.chunks.len() as u32 {
                    if at_once {
                        gather_chunk(request, chunk as usize);
                        continue;
                    }
                    events.push((random.below(way), Event::Gather { link, side, number, chunk }));
                }
            }
            events.push((way, Event::Arrive { link, side, number }));
        }
        for (delay, event) in events {
            self.schedule(delay, event);
        }
    }

    pub(super) fn gather(&mut self, link: usize, side: u8, number: u64, chunk: u32) {
        let end = self.end(link, side);
        // After a break the memory is the user's.
        if end.broken.is_some() {
            return;
        }
        let request = end.request(number).expect("a request is gathered before it arrives");
        gather_chunk(request, chunk as usize);
    }

    /// Request `number` reaches the peer's host.
    pub(super) fn reach(&mut self, link: usize, side: u8, number: u64) {
        if !self.queues(link, side, number) {
            self.deliver(link, side, number);
        }
    }

    /// The peer's host turns to request `number`.
    pub(super) fn deliver(&mut self, link: usize, side: u8, number: u64) {
        let end = self.end(link, side);
        debug_assert_eq!(end.reached, number);
        end.reached = number + 1;
        self.arrive(link, side);
    }

    /// Sees to requests that have reached the peer, in order, until one has to wait.
    fn arrive(&mut self, link: usize, side: u8) {
        loop {
            let end = self.end(link, side);
            if end.arrived == end.reached || end.starved {
                return;
            }
            let number = end.arrived;
            let (fate, torn) = if end.broken.is_some() { end.fate } else { (u64::MAX, false) };
            let peer = &self.links[link].ends[1 - side as usize];
            let deaf = peer.broken.is_some() || !self.nodes[peer.node].alive;
            if !deaf
                && (number < fate || number == fate && torn)
                && !self.see_to(link, side, number, number == fate)
            {
                return;
            }
            self.end(link, side).arrived += 1;
        }
    }

    /// Carries out request `number` at the peer; only in part if `torn`. `false`: it has to wait.
    fn see_to(&mut self, link: usize, side: u8, number: u64, torn: bool) -> bool {
        self.record("arrives: link, side, number", [link as u64, u64::from(side), number]);
        let peer = &self.links[link].ends[1 - side as usize];
        let (node, horizon, endpoint) = (peer.node, peer.horizon, peer.endpoint);
        let end = &mut self.links[link].ends[side as usize];
        let broken = end.broken.is_some();
        let Some(request) = end.request(number) else { return true };
        let (kind, immediate, remote) = (request.kind, request.immediate, request.remote);
        let length = match kind {
            Kind::Read => request.local.iter().map(|piece| piece.length).sum(),
            _ => request.data.len(),
        };
        let needed = if kind == Kind::Read { Access::RemoteRead } else { Access::RemoteWrite };
        let target = match kind {
            Kind::Send => None,
            _ => match self.locate(node, horizon, remote, length, needed) {
                Some(target) => Some(target),
                None => {
                    self.refuse(link, side, number, WorkError::RemoteAccess);
                    return true;
                }
            },
        };
        if kind == Kind::Send && length > self.endpoints[endpoint].config.receive_size {
            self.refuse(link, side, number, WorkError::RemoteInvalid);
            return true;
        }
        if torn && kind != Kind::Write {
            return true;
        }
        let mut buffer = None;
        if !torn && (kind == Kind::Send || immediate.is_some()) {
            buffer = self.take_buffer(endpoint);
            if buffer.is_none() {
                self.starve(link, side, number, endpoint);
                return false;
            }
        }
        let request = self.end(link, side).request(number).expect("looked up above");
        match kind {
            Kind::Read => {
                // A ghost's READ has no one to bring its bytes to.
                if !broken {
                    request.target = target;
                    self.start_read(link, side, number, length);
                }
                return true;
            }
            Kind::Write => {
                let data = std::mem::take(&mut request.data);
                let target = target.expect("located above");
                if let (Some(immediate), Some(buffer)) = (immediate, buffer) {
                    self.start_landing(link, side, number, target, data, false);
                    self.complete(link, 1 - side, What::WriteImmediate { number, buffer, immediate });
                } else {
                    self.start_landing(link, side, number, target, data, torn);
                }
            }
            Kind::Send => {
                let data = std::mem::take(&mut request.data);
                let buffer = buffer.expect("taken above");
                self.complete(link, 1 - side, What::Received { number, buffer, data, immediate });
            }
        }
        if !broken {
            self.succeed(link, side, number);
        }
        true
    }

    /// The memory of `node` that a request names, if it may.
    pub(super) fn locate(
        &self,
        node: usize,
        horizon: u64,
        remote: RemoteAddress,
        length: usize,
        needed: Access,
    ) -> Option<Piece> {
        let region = self.nodes[node].regions.get(&remote.key).filter(|region| region.serial < horizon)?;
        let granted = match needed {
            Access::RemoteWrite => region.access == Access::RemoteWrite,
            _ => region.access != Access::Local,
        };
        let offset = remote.address.checked_sub(region.address)?;
        let within =
            offset <= region.memory.len() as u64 && length as u64 <= region.memory.len() as u64 - offset;
        (granted && within).then(|| Piece { memory: region.memory.clone(), offset: offset as usize, length })
    }

    /// The peer's NIC refuses a request: its end is broken, and the poster will learn why.
    fn refuse(&mut self, link: usize, side: u8, number: u64, error: WorkError) {
        self.break_end(link, 1 - side, WorkError::Disconnected, false);
        let end = self.end(link, side);
        if end.broken.is_some() {
            return;
        }
        end.request(number).expect("a request that arrives has not been retired").done = Some(Err(error));
        let delay = self.way(0);
        self.schedule(delay, Event::Acknowledge { link, side, number });
    }

    fn succeed(&mut self, link: usize, side: u8, number: u64) {
        if let Some(traffic) = &self.traffic {
            let latency = traffic.latency();
            return self.succeed_timed(link, side, number, latency);
        }
        let delay = self.way(0);
        self.schedule(delay, Event::Acknowledge { link, side, number });
    }

    /// A request found no receive buffer: it tries again when there is one, and some day gives up.
    fn starve(&mut self, link: usize, side: u8, number: u64, endpoint: usize) {
        self.end(link, side).starved = true;
        self.endpoints[endpoint].starved.push((link, side));
        let patience = self.random.spread(1_000_000, 500_000_000);
        self.schedule(patience, Event::GiveUp { link, side, number });
    }

    pub(super) fn retry(&mut self, link: usize, side: u8) {
        self.end(link, side).starved = false;
        self.arrive(link, side);
    }

    pub(super) fn give_up(&mut self, link: usize, side: u8, number: u64) {
        let end = self.end(link, side);
        if end.starved && end.arrived == number && end.broken.is_none() {
            let request = end.request(number).expect("a starved request has not been retired");
            request.done = Some(Err(WorkError::ReceiverNotReady));
            self.retire(link, side);
        }
    }

    fn start_landing(
        &mut self,
        link: usize,
        side: u8,
        number: u64,
        target: Piece,
        data: Vec<u8>,
        torn: bool,
    ) {
        if self.traffic.is_some() {
            // What was cut off did not happen.
            if !torn {
                let node = self.links[link].ends[1 - side as usize].node;
                target.memory.write(target.offset, &data);
                self.written(node, data.len());
            }
            return;
        }
        let mut landing = Landing::new(number, target, data, &mut self.random);
        if torn {
            landing.tear(&mut self.random);
        }
        for chunk in 0..landing.chunks.len() as u32 {
            let delay = self.random.tail(400, self.temper.latest_line, self.temper.late_line);
            self.schedule(delay, Event::Land { link, side, number, chunk });
        }
        if landing.left > 0 {
            self.end(link, side).landings.push_back(landing);
        }
    }

    pub(super) fn land(&mut self, link: usize, side: u8, number: u64, chunk: u32) {
        let landings = &mut self.end(link, side).landings;
        if let Ok(index) = landings.binary_search_by_key(&number, |landing| landing.number) {
            land(landings, index, chunk as usize);
            while landings.front().is_some_and(|landing| landing.left == 0) {
                landings.pop_front();
            }
        }
    }

    /// Lets all WRITEs of this end that come before request `number` land.
    pub(super) fn flush(&mut self, link: usize, side: u8, number: u64) {
        let landings = &mut self.end(link, side).landings;
        for index in 0..landings.len() {
            if landings[index].number >= number {
                break;
            }
            for chunk in 0..landings[index].chunks.len() {
                land(landings, index, chunk);
            }
        }
        while landings.front().is_some_and(|landing| landing.left == 0) {
            landings.pop_front();
        }
    }

    /// A READ has arrived: what was written before it is in memory, and its lines are read one by one.
    fn start_read(&mut self, link: usize, side: u8, number: u64, length: usize) {
        if self.traffic.is_some() {
            return self.read_timed(link, side, number, length);
        }
        self.flush(link, side, number);
        let transfer = self.way(length);
        let Self { random, links, .. } = self;
        let request = links[link].ends[side as usize].request(number).expect("it has just arrived");
        request.data = vec![0; length];
        request.chunks =
            cut(std::slice::from_ref(request.target.as_ref().expect("set by the caller")), random);
        request.left = request.chunks.len();
        if request.left == 0 {
            return self.succeed(link, side, number);
        }
        for chunk in 0..request.chunks.len() as u32 {
            let delay = self.random.below(transfer);
            self.schedule(delay, Event::Capture { link, side, number, chunk });
        }
    }

    pub(super) fn capture(&mut self, link: usize, side: u8, number: u64, chunk: u32) {
        let end = &self.links[link].ends[side as usize];
        let peer = &self.links[link].ends[1 - side as usize];
        if end.broken.is_some() || !self.nodes[peer.node].alive {
            return;
        }
        let request = self.end(link, side).request(number).expect("a READ is captured before it is retired");
        let Chunk { offset, at, length, .. } = request.chunks[chunk as usize];
        let target = request.target.as_ref().expect("set when it arrived");
        target.memory.read(offset, &mut request.data[at..at + length]);
        request.left -= 1;
        if request.left > 0 {
            return;
        }
        // All lines are on their way back.
        let way = self.way(0);
        let Self { random, links, .. } = self;
        let request = links[link].ends[side as usize].request(number).expect("just seen");
        request.scattering = true;
        request.chunks = cut(&request.local, random);
        request.left = request.chunks.len();
        for chunk in 0..request.chunks.len() as u32 {
            let delay = way + self.random.tail(300, 20_000, self.temper.late_line);
            self.schedule(delay, Event::Scatter { link, side, number, chunk });
        }
    }

    pub(super) fn scatter(&mut self, link: usize, side: u8, number: u64, chunk: u32) {
        let end = self.end(link, side);
        if end.broken.is_some() {
            return;
        }
        let request = end.request(number).expect("a READ is scattered before it is retired");
        scatter_chunk(request, chunk as usize);
        request.left -= 1;
        if request.left == 0 {
            let delay = self.random.below(200);
            self.schedule(delay, Event::Acknowledge { link, side, number });
        }
    }

    pub(super) fn acknowledge(&mut self, link: usize, side: u8, number: u64) {
        let end = self.end(link, side);
        if end.broken.is_some() {
            return;
        }
        let request = end.request(number).expect("a request is acknowledged once");
        // A refusal has its error already.
        request.done.get_or_insert(Ok(()));
        if request.kind == Kind::Read {
            end.reads -= 1;
            self.launch(link, side);
        }
        self.retire(link, side);
    }

    /// Completes what is done, in order.
    fn retire(&mut self, link: usize, side: u8) {
        let (now, timed) = (self.now, self.traffic.is_some());
        loop {
            let end = self.end(link, side);
            let done = |request: &Request| request.done.or((request.due <= now).then_some(Ok(())));
            match end.requests.front().and_then(done) {
                None => return,
                Some(Err(error)) => return self.break_end(link, side, error, true),
                Some(Ok(())) => (),
            }
            let request = end.requests.pop_front().expect("just seen");
            end.first += 1;
            match request.signal {
                Some(id) => self.complete(link, side, What::Work { id, result: Ok(()) }),
                None if timed => end.used -= 1,
                None => {
                    end.retired += 1;
                    let endpoint = end.endpoint;
                    self.endpoints[endpoint].retired.push((link, side));
                }
            }
        }
    }
}

pub(super) fn gather_chunk(request: &mut Request, chunk: usize) {
    let Chunk { piece, offset, at, length } = request.chunks[chunk];
    request.local[piece].memory.read(offset, &mut request.data[at..at + length]);
}

pub(super) fn scatter_chunk(request: &Request, chunk: usize) {
    let Chunk { piece, offset, at, length } = request.chunks[chunk];
    request.local[piece].memory.write(offset, &request.data[at..at + length]);
}
