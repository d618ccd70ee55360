//! Completion queues and receive buffers.

use std::collections::BTreeMap;

use super::world::{Event, World};
use crate::transport::{Completion, ConnectionId, EndpointConfig, ReceiveBuffer, WorkError};

/// A completion on its way to the user.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) link: usize,
    pub(super) side: u8,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    Work {
        id: u64,
        result: Result<(), WorkError>,
    },
    /// Request `number` of the peer is a SEND, and its message is in receive buffer `buffer`.
    Received {
        number: u64,
        buffer: u32,
        data: Vec<u8>,
        immediate: Option<u32>,
    },
    /// Request `number` of the peer is a WRITE with immediate.
    WriteImmediate {
        number: u64,
        buffer: u32,
        immediate: u32,
    },
    Disconnected {
        cause: WorkError,
    },
}

#[derive(Debug)]
pub(super) struct EndpointState {
    pub(super) node: usize,
    pub(super) config: EndpointConfig,
    pub(super) alive: bool,
    /// By the time at which they show, and a number that tells those of one time apart.
    pub(super) queue: BTreeMap<(u64, u64), Queued>,
    queued: u64,
    /// Receive buffers that no message is in.
    pub(super) free: Vec<u32>,
    /// Connection ends whose requests wait for a receive buffer.
    pub(super) starved: Vec<(usize, u8)>,
    /// Connection ends with unsignalled requests that are done, and leave the queue with the next poll.
    pub(super) retired: Vec<(usize, u8)>,
    /// Places taken of `config.connections`.
    pub(super) taken: usize,
    pub(super) next_id: u32,
    pub(super) woken: bool,
    pub(super) waiter: Option<usize>,
    /// In a simulation of time: the thread that polled it, and is in `relax`.
    pub(super) relaxing: Option<usize>,
}

impl World {
    pub(super) fn new_endpoint(&mut self, node: usize, config: &EndpointConfig) -> usize {
        self.endpoints.push(EndpointState {
            node,
            config: config.clone(),
            alive: true,
            queue: BTreeMap::new(),
            queued: 0,
            free: (0..config.receive_buffers as u32).collect(),
            starved: Vec::new(),
            retired: Vec::new(),
            taken: 0,
            next_id: 0,
            woken: false,
            waiter: None,
            relaxing: None,
        });
        self.endpoints.len() - 1
    }

    /// Puts a completion of this end into its endpoint's queue, to show some time after all earlier ones of
    /// its kind.
    pub(super) fn complete(&mut self, link: usize, side: u8, what: What) {
        let delay = match self.traffic {
            Some(_) => 0,
            None => self.random.tail(150, 100_000, self.temper.late_completion),
        };
        let now = self.now;
        let end = &mut self.links[link].ends[side as usize];
        let time = match what {
            What::Work { .. } => {
                end.last_work = end.last_work.max(now + delay);
                end.last_work
            }
            What::Received { .. } | What::WriteImmediate { .. } => {
                end.last_receive = end.last_receive.max(now + delay);
                end.last_receive
            }
            What::Disconnected { .. } => end.last_work.max(end.last_receive).max(now + delay),
        };
        let index = end.endpoint;
        let endpoint = &mut self.endpoints[index];
        if !endpoint.alive {
            return;
        }
        endpoint.queued += 1;
        endpoint.queue.insert((time, endpoint.queued), Queued { link, side, what });
        let relaxing = endpoint.relaxing;
        if let Some(waiter) = endpoint.waiter {
            let delay = time - now + self.thread_delay(2_000);
            self.wake(waiter, delay);
        }
        if let Some(thread) = relaxing {
            let delay = self.thread_delay(2_000);
            self.wake(thread, delay);
        }
    }

    /// Takes completions that show by now. Messages go to the endpoint's buffers, `buffers`.
    pub(super) fn poll(
        &mut self,
        index: usize,
        into: &mut Vec<Completion>,
        buffers: &mut [Vec<u8>],
    ) -> usize {
        self.call(40);
        if self.traffic.is_some() {
            let polled = &mut self.threads[self.running].polled;
            if !polled.contains(&index) {
                polled.push(index);
            }
        }
        for (link, side) in std::mem::take(&mut self.endpoints[index].retired) {
            let end = &mut self.links[link].ends[side as usize];
            end.used -= std::mem::take(&mut end.retired);
        }
        let mut most = usize::MAX;
        let mut count = 0;
        while count < most {
            let Some(first) = self.endpoints[index].queue.first_entry() else { break };
            if first.key().0 > self.now {
                break;
            }
            let Queued { link, side, what } = first.remove();
            if count == 0 && self.traffic.is_none() {
                most = 1 + self.random.below(32) as usize;
            }
            let completion = self.hand_out(index, link, side, what, buffers);
            into.push(completion);
            count += 1;
        }
        count
    }

    /// What polling one completion brings about.
    fn hand_out(
        &mut self,
        index: usize,
        link: usize,
        side: u8,
        what: What,
        buffers: &mut [Vec<u8>],
    ) -> Completion {
        let connection = ConnectionId(self.links[link].ends[side as usize].id);
        let peer = 1 - side;
        match what {
            What::Work { id, result } => {
                self.record("polled: link, side, id", [link as u64, u64::from(side), id]);
                self.links[link].ends[side as usize].used -= 1;
                Completion::Work { connection, id, result }
            }
            What::Received { number, buffer, data, immediate } => {
                self.record("polled a message: link, side, number", [link as u64, u64::from(side), number]);
                self.flush(link, peer, number);
                let length = data.len() as u32;
                self.lag += self.traffic.as_ref().map_or(0, |traffic| traffic.handling(data.len()));
                buffers[buffer as usize] = data;
                Completion::Received {
                    connection,
                    buffer: ReceiveBuffer { index: buffer, length },
                    immediate,
                }
            }
            What::WriteImmediate { number, buffer, immediate } => {
                self.record(
                    "polled an immediate: link, side, number",
                    [link as u64, u64::from(side), number],
                );
                self.flush(link, peer, number + 1);
                self.give_back(index, buffer);
                Completion::WriteImmediate { connection, immediate }
            }
            What::Disconnected { cause } => {
                self.record("polled the end: link, side", [link as u64, u64::from(side), 0]);
                // What has reached this NIC is in memory now, and nothing more comes.
                self.flush(link, peer, u64::MAX);
                self.links[link].ends[peer as usize].landings.clear();
                self.links[link].ends[side as usize].finished = true;
                self.leave(link, side);
                Completion::Disconnected { connection, cause }
            }
        }
    }

    /// A connection's place at its endpoint is free again once its end was polled and its handle dropped.
    pub(super) fn leave(&mut self, link: usize, side: u8) {
        let end = &self.links[link].ends[side as usize];
        if end.finished && !end.handle {
            self.endpoints[end.endpoint].taken -= 1;
        }
    }

    /// Gives a receive buffer back; those who starve try again.
    pub(super) fn give_back(&mut self, index: usize, buffer: u32) {
        let endpoint = &mut self.endpoints[index];
        endpoint.free.push(buffer);
        for (link, side) in std::mem::take(&mut endpoint.starved) {
            let delay = self.way(0);
            self.schedule(delay, Event::Retry { link, side });
        }
    }

    /// Takes a receive buffer: any of those that are free.
    pub(super) fn take_buffer(&mut self, index: usize) -> Option<u32> {
        let free = self.endpoints[index].free.len();
        let pick = self.random.below(free as u64) as usize;
        (free > 0).then(|| self.endpoints[index].free.swap_remove(pick))
    }
}
