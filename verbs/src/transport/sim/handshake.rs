//! Connecting: a client's wish travels to the listener's host (`Knock`), waits there to be looked at, and the
//! answer travels back (`Answer`).

use std::collections::VecDeque;

use super::{
    connection::Place,
    world::{Event, World},
};
use crate::transport::WorkError;

/// Where somebody listens.
#[derive(Debug)]
pub(super) struct ListenerState {
    pub(super) node: usize,
    /// Attempts not looked at.
    pub(super) queue: VecDeque<usize>,
    pub(super) waiter: Option<usize>,
}

/// How a listener's host answers.
#[derive(Debug, Clone)]
pub(super) enum Answer {
    Accepted { link: usize, data: Vec<u8> },
    Refused { data: Vec<u8> },
    Unreachable { reason: &'static str },
}

/// A client's wish to connect.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) address: String,
    pub(super) place: Place,
    pub(super) data: Vec<u8>,
    /// The thread that waits for the answer.
    pub(super) thread: usize,
    /// The listener's node, once it has got there.
    pub(super) host: Option<usize>,
    pub(super) answer: Option<Answer>,
    /// Whether the answer has reached the client.
    pub(super) answered: bool,
    /// Whether the client has given up.
    pub(super) abandoned: bool,
}

impl World {
    /// The wish reaches the listener's host.
    pub(super) fn knock(&mut self, number: usize) {
        self.record("knocks: attempt", [number as u64, 0, 0]);
        let Some(listener) = self.listeners.get_mut(&self.attempts[number].address) else {
            return self.reply(number, Answer::Unreachable { reason: "nobody listens there" });
        };
        listener.queue.push_back(number);
        self.attempts[number].host = Some(listener.node);
        if let Some(waiter) = listener.waiter {
            let delay = self.thread_delay(3_000);
            self.wake(waiter, delay);
        }
    }

    /// Sends an answer on its way.
    pub(super) fn reply(&mut self, number: usize, answer: Answer) {
        let delay = self.way(256);
        self.reply_in(number, answer, delay);
    }

    fn reply_in(&mut self, number: usize, answer: Answer, delay: u64) {
        if let Answer::Accepted { link, .. } = answer {
            // What the server posts at once does not get there before.
            self.links[link].ends[1].last_arrival = self.now + delay;
        }
        self.attempts[number].answer = Some(answer);
        self.schedule(delay, Event::Answer { attempt: number });
    }

    /// The answer reaches the client's host.
    pub(super) fn answer(&mut self, number: usize) {
        self.record("answered: attempt", [number as u64, 0, 0]);
        let attempt = &mut self.attempts[number];
        attempt.answered = true;
        if !attempt.abandoned && self.nodes[attempt.place.node].alive {
            let thread = attempt.thread;
            let delay = self.thread_delay(3_000);
            return self.wake(thread, delay);
        }
        // Nobody waits for it any more: a connection that was made is over.
        if let Some(Answer::Accepted { link, .. }) = attempt.answer {
            let client = &mut self.links[link].ends[0];
            client.broken = Some(WorkError::Disconnected);
            client.handle = false;
            let delay = self.way(0);
            self.schedule(delay, Event::Break { link, side: 1, cause: WorkError::Disconnected });
        }
    }

    /// Somebody stops listening: those who wait to be looked at are refused.
    pub(super) fn stop_listening(&mut self, address: &str) {
        for attempt in self.listeners.remove(address).map(|listener| listener.queue).unwrap_or_default() {
            self.reply(attempt, Answer::Refused { data: Vec::new() });
        }
    }

    /// Kills a node: its threads never run again, its memory is gone for others, and its peers find out.
    pub(super) fn kill(&mut self, node: usize) {
        self.record("node dies: node", [node as u64, 0, 0]);
        self.nodes[node].alive = false;
        self.listeners.retain(|_, listener| listener.node != node);
        for endpoint in self.endpoints.iter_mut().filter(|endpoint| endpoint.node == node) {
            endpoint.alive = false;
            endpoint.queue.clear();
        }
        for number in 0..self.attempts.len() {
            let attempt = &self.attempts[number];
            if attempt.host == Some(node) && attempt.answer.is_none() {
                let delay = self.random.spread(5_000, 1_900_000_000);
                self.reply_in(number, Answer::Unreachable { reason: "the host went away" }, delay);
            }
        }
        for link in 0..self.links.len() {
            for side in 0..2 {
                if self.links[link].ends[side as usize].node == node {
                    self.die(link, side);
                }
            }
        }
        for thread in 0..self.threads.len() {
            if self.threads[thread].node == node {
                self.threads[thread].baton.kill();
                self.wake(thread, 0);
            }
        }
    }
}
