//! What becomes of requests in a simulation of time ([`Fabric`](super::Fabric)): a message is one event.
//!
//! ```text
//!  ring ─▶ launch: gathered ─▶ Arrive ─▶ (Deliver, if the NIC was busy) ─▶ carried out, whole
//!                                          └─ READ: captured ─▶ Return ─▶ (Returned) ─▶ scattered, completed
//!                                             others: acknowledged after the latency
//! ```
//!
//! **Few events.** The acknowledgement of an unsignalled request is none: the request leaves the queue when somebody asks for
//! room after that time. A thread in `relax` is taken to look at the memory of its node and at the endpoints that
//! it has polled since the last time: it sleeps until one of them changes, or for longer each turn. WRITEs of whole rows do not wake it at once, since
//! many of them come together.

use super::{
    chunks::Piece,
    connection::{Kind, Request},
    world::{Event, World},
};
use crate::transport::MAX_INLINE;

/// How long after a WRITE of more than a few words a thread in `relax` looks: others follow it.
const ROWS_TOGETHER: u64 = 10_000;
/// How long a thread sleeps in its first `relax`; each is twice as long as the one before …
const FIRST_RELAX: u64 = 2_000;
/// … so many times.
const DOUBLINGS: u32 = 12;

impl World {
    /// Sends off what may go.
    pub(super) fn launch_timed(&mut self, link: usize, side: u8) {
        // What the posting thread has done since it was scheduled took time.
        let time = self.now + self.lag;
        loop {
            let Self { random, traffic, links, .. } = self;
            let traffic = traffic.as_mut().expect("a simulation of time");
            let end = &mut links[link].ends[side as usize];
            if end.launched == end.rung {
                return;
            }
            let number = end.launched;
            let request = &mut end.requests[(number - end.first) as usize];
            let is_read = request.kind == Kind::Read;
            if is_read && end.reads == end.read_depth {
                return;
            }
            if !is_read {
                gather_all(request);
            }
            let bytes = request.data.len();
            end.launched += 1;
            end.reads += usize::from(is_read);
            end.last_arrival = traffic.send(random, end.node, time, bytes).max(end.last_arrival);
            let arrival = end.last_arrival;
            self.schedule_at(arrival, Event::Arrive { link, side, number });
        }
    }

    /// The last bit of a request is at the peer's NIC. Whether it has to queue there first.
    pub(super) fn queues(&mut self, link: usize, side: u8, number: u64) -> bool {
        let Some(traffic) = &mut self.traffic else { return false };
        let [a, b] = &mut self.links[link].ends;
        let (end, peer) = if side == 0 { (a, b) } else { (b, a) };
        let bytes = end.request(number).map_or(0, |request| request.data.len());
        let Some(free) = traffic.receive(peer.node, self.now, bytes) else { return false };
        self.schedule_at(free, Event::Deliver { link, side, number });
        true
    }

    /// Carries out a READ at the peer, whole, and sends what was read on its way.
    pub(super) fn read_timed(&mut self, link: usize, side: u8, number: u64, length: usize) {
        let peer = self.links[link].ends[1 - side as usize].node;
        let Self { now, random, traffic, links, .. } = self;
        let traffic = traffic.as_mut().expect("a simulation of time");
        let end = &mut links[link].ends[side as usize];
        let request = end.request(number).expect("it has just arrived");
        request.data = vec![0; length];
        let target = request.target.as_ref().expect("set by the caller");
        target.memory.read(target.offset, &mut request.data);
        end.last_return = traffic.send(random, peer, *now, length).max(end.last_return);
        let arrival = end.last_return;
        self.schedule_at(arrival, Event::Return { link, side, number });
    }

    /// What was READ is at the poster's NIC.
    pub(super) fn comes_back(&mut self, link: usize, side: u8, number: u64) {
        let end = &mut self.links[link].ends[side as usize];
        if end.broken.is_some() {
            return;
        }
        let bytes = end.request(number).map_or(0, |request| request.data.len());
        let traffic = self.traffic.as_mut().expect("a simulation of time");
        match traffic.receive(end.node, self.now, bytes) {
            Some(free) => self.schedule_at(free, Event::Returned { link, side, number }),
            None => self.returned(link, side, number),
        }
    }

    /// What was READ is in the poster's memory.
    pub(super) fn returned(&mut self, link: usize, side: u8, number: u64) {
        let end = self.end(link, side);
        if end.broken.is_some() {
            return;
        }
        scatter_all(end.request(number).expect("a READ is scattered before it is retired"));
        self.acknowledge(link, side, number);
    }

    /// A request that is no READ has been carried out.
    pub(super) fn succeed_timed(&mut self, link: usize, side: u8, number: u64, latency: u64) {
        let due = self.now + latency;
        let request = self.end(link, side).request(number).expect("it has just been carried out");
        if request.signal.is_some() {
            self.schedule_at(due, Event::Acknowledge { link, side, number });
        } else {
            request.due = due;
        }
    }

    /// Lets unsignalled requests leave the queue whose acknowledgement has come by now.
    pub(super) fn settle(&mut self, link: usize, side: u8) {
        let time = self.now + self.lag;
        let end = &mut self.links[link].ends[side as usize];
        while end.requests.front().is_some_and(|request| request.due <= time && request.done.is_none()) {
            end.requests.pop_front();
            end.first += 1;
            end.used -= 1;
        }
    }

    /// Memory of `node` has been written.
    pub(super) fn written(&mut self, node: usize, bytes: usize) {
        let wake = self.traffic.as_ref().expect("a simulation of time").wake();
        let delay = if bytes <= MAX_INLINE { wake } else { ROWS_TOGETHER };
        for index in 0..self.nodes[node].relaxing.len() {
            self.wake(self.nodes[node].relaxing[index], delay);
        }
    }

    /// The running thread, of `node`, is in `relax` from now on: for how long, if nothing happens.
    pub(super) fn starts_to_relax(&mut self, node: usize, turn: u32) -> u64 {
        let thread = self.running;
        self.nodes[node].relaxing.push(thread);
        let mut ready = false;
        for &polled in &self.threads[thread].polled {
            let endpoint = &mut self.endpoints[polled];
            endpoint.relaxing = Some(thread);
            ready |= !endpoint.queue.is_empty();
        }
        if ready { 1 } else { FIRST_RELAX << turn.min(DOUBLINGS) }
    }

    /// A thread of `node` has come out of `relax`.
    pub(super) fn has_relaxed(&mut self, node: usize, thread: usize) {
        self.nodes[node].relaxing.retain(|&other| other != thread);
        for polled in std::mem::take(&mut self.threads[thread].polled) {
            self.endpoints[polled].relaxing = None;
        }
    }
}

/// The payload, at once.
fn gather_all(request: &mut Request) {
    let mut at = 0;
    for Piece { memory, offset, length } in &request.local {
        memory.read(*offset, &mut request.data[at..at + length]);
        at += length;
    }
}

/// What was READ, at once.
fn scatter_all(request: &Request) {
    let mut at = 0;
    for Piece { memory, offset, length } in &request.local {
        memory.write(*offset, &request.data[at..at + length]);
        at += length;
    }
}
