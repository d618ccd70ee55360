//! The state of a simulation, and how it goes on: events in the order of virtual time.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
};

use super::{
    connection::Link,
    endpoint::EndpointState,
    fabric::{Computing, Traffic},
    handshake::{Attempt, ListenerState},
    history::History,
    random::{Network, Random, Temper},
    threads::{Next, State, ThreadState},
};
use crate::{
    memory::Memory,
    transport::{Access, WorkError},
};

/// Calls that a thread may make between two scheduling points: more are a loop that waits without waiting.
const MOST_CALLS: u64 = 5_000_000;

/// Something that happens at a time. Those about requests name the connection, the side that posted, and the
/// number of the request; if it is no longer there, nothing happens.
#[derive(Debug, Clone, Copy)]
pub(super) enum Event {
    /// It is this thread's turn, if it has not had it yet.
    Wake { thread: usize, turn: u64 },
    /// The peer's NIC, which was busy, turns to the request.
    Deliver { link: usize, side: u8, number: u64 },
    /// What was READ, as a whole, reaches the poster's NIC, …
    Return { link: usize, side: u8, number: u64 },
    /// … which was busy, and now turns to it.
    Returned { link: usize, side: u8, number: u64 },
    /// A chunk of the payload is read from the poster's memory.
    Gather { link: usize, side: u8, number: u64, chunk: u32 },
    /// The request reaches the peer's NIC.
    Arrive { link: usize, side: u8, number: u64 },
    /// A chunk of a WRITE becomes visible in the peer's memory.
    Land { link: usize, side: u8, number: u64, chunk: u32 },
    /// A chunk of a READ is read from the peer's memory.
    Capture { link: usize, side: u8, number: u64, chunk: u32 },
    /// A chunk of a READ is written to the poster's memory.
    Scatter { link: usize, side: u8, number: u64, chunk: u32 },
    /// The poster learns how the request ended.
    Acknowledge { link: usize, side: u8, number: u64 },
    /// The request that found no receive buffer tries again.
    Retry { link: usize, side: u8 },
    /// The poster gives up trying.
    GiveUp { link: usize, side: u8, number: u64 },
    /// This side learns that the connection is over.
    Break { link: usize, side: u8, cause: WorkError },
    /// A wish to connect reaches the listener's host.
    Knock { attempt: usize },
    /// The answer to it reaches the client's host.
    Answer { attempt: usize },
}

/// An event in the queue; of two at one time, the one scheduled first comes first.
#[derive(Debug)]
struct Entry {
    time: u64,
    order: u64,
    event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.time, self.order) == (other.time, other.order)
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.time, self.order).cmp(&(other.time, other.order))
    }
}

/// A registered region, as peers find it.
#[derive(Debug)]
pub(super) struct Registered {
    pub(super) memory: Memory,
    pub(super) access: Access,
    pub(super) address: u64,
    /// Counts registrations of the node: a connection reaches those made before it.
    pub(super) serial: u64,
}

#[derive(Debug)]
pub(super) struct NodeState {
    pub(super) name: String,
    /// The machine that it is on: nodes of one see each other's memory.
    pub(super) host: usize,
    pub(super) alive: bool,
    pub(super) regions: BTreeMap<u32, Registered>,
    pub(super) registrations: u64,
    pub(super) next_address: u64,
    pub(super) computing: Computing,
    /// In a simulation of time: its threads that are in `relax`.
    pub(super) relaxing: Vec<usize>,
    /// What each of its threads does first.
    pub(super) prelude: Prelude,
}

/// What a thread does before anything else.
#[derive(Clone, Default)]
pub(super) struct Prelude(pub(super) Option<std::sync::Arc<dyn Fn() + Send + Sync>>);

impl std::fmt::Debug for Prelude {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Prelude({})", if self.0.is_some() { "some" } else { "none" })
    }
}

/// All of a simulation's state.
#[derive(Debug)]
pub(super) struct World {
    pub(super) seed: u64,
    /// Virtual time, ns.
    pub(super) now: u64,
    limit: u64,
    queue: BinaryHeap<Reverse<Entry>>,
    order: u64,
    /// Events that have happened.
    pub(super) steps: u64,
    /// Threads whose time came while another one ran.
    overdue: VecDeque<(usize, u64)>,
    /// What the running thread's calls have cost since its last scheduling point, ns.
    pub(super) lag: u64,
    /// The thread that runs.
    pub(super) running: usize,
    calls: u64,
    pub(super) network: Network,
    /// In a simulation of time, what takes it.
    pub(super) traffic: Option<Traffic>,
    pub(super) random: Random,
    pub(super) temper: Temper,
    pub(super) history: History,
    pub(super) threads: Vec<ThreadState>,
    /// Root threads that have not ended.
    pub(super) roots: usize,
    pub(super) stopping: bool,
    pub(super) failure: Option<String>,
    pub(super) nodes: Vec<NodeState>,
    pub(super) endpoints: Vec<EndpointState>,
    pub(super) links: Vec<Link>,
    pub(super) listeners: BTreeMap<String, ListenerState>,
    pub(super) attempts: Vec<Attempt>,
}

impl World {
    pub(super) fn new(seed: u64, network: Network, traffic: Option<Traffic>, limit: u64) -> Self {
        let mut random = Random::new(seed);
        let temper = Temper::new(&mut random);
        Self {
            seed,
            now: 0,
            limit,
            queue: BinaryHeap::new(),
            order: 0,
            steps: 0,
            overdue: VecDeque::new(),
            lag: 0,
            running: 0,
            calls: 0,
            network,
            traffic,
            random,
            temper,
            history: History::default(),
            threads: Vec::new(),
            roots: 0,
            stopping: false,
            failure: None,
            nodes: Vec::new(),
            endpoints: Vec::new(),
            links: Vec::new(),
            listeners: BTreeMap::new(),
            attempts: Vec::new(),
        }
    }

    /// Lets `event` happen in `delay` ns.
    pub(super) fn schedule(&mut self, delay: u64, event: Event) {
        self.schedule_at(self.now.saturating_add(delay), event);
    }

    /// Lets `event` happen at `time`.
    pub(super) fn schedule_at(&mut self, time: u64, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Entry { time, order: self.order, event }));
    }

    /// Whether `delay` is shorter than a whole run may last.
    pub(super) fn within_limit(&self, delay: u64) -> bool {
        delay <= self.limit
    }

    pub(super) fn record(&mut self, what: &'static str, numbers: [u64; 3]) {
        self.history.record(self.now, what, numbers);
    }

    /// A call of the running thread that is no scheduling point, and takes `cost` ns. Threads wait, but the
    /// NICs do not: now and then what they are due to do happens here.
    pub(super) fn call(&mut self, cost: u64) {
        self.lag += cost;
        self.calls += 1;
        assert!(
            self.calls < MOST_CALLS || self.stopping,
            "a thread has made {MOST_CALLS} calls without a scheduling point: waiting without \
             relax or wait does not end in a simulation"
        );
        if self.traffic.is_none() && self.random.one_in(8) && !self.stopping {
            let until = self.now + std::mem::take(&mut self.lag);
            while let Some(Reverse(entry)) = self.queue.peek() {
                if entry.time > until {
                    break;
                }
                let Reverse(entry) = self.queue.pop().expect("just seen");
                match entry.event {
                    Event::Wake { thread, turn } => self.overdue.push_back((thread, turn)),
                    event => {
                        self.now = self.now.max(entry.time);
                        self.steps += 1;
                        self.execute(event);
                    }
                }
            }
            self.now = until;
        }
    }

    /// What the running thread owes in time, now that it has come to a scheduling point.
    pub(super) fn take_lag(&mut self) -> u64 {
        self.calls = 0;
        std::mem::take(&mut self.lag)
    }

    /// How long until a thread that could run does: about `typical` ns, sometimes much longer.
    pub(super) fn thread_delay(&mut self, typical: u64) -> u64 {
        if let Some(traffic) = &self.traffic {
            return traffic.wake();
        }
        1 + self.random.tail(typical, 3_000_000, self.temper.late_thread)
    }

    /// How long `bytes` take to another node where nothing is serialised.
    pub(super) fn way(&mut self, bytes: usize) -> u64 {
        match &self.traffic {
            Some(traffic) => traffic.way(&mut self.random),
            None => self.network.delay(&mut self.random, bytes, self.temper.late_packet),
        }
    }

    /// Wakes a thread, if it waits, `delay` ns after now; in a simulation of time, once it has paid for its calls.
    pub(super) fn wake(&mut self, thread: usize, delay: u64) {
        let state = &mut self.threads[thread];
        let State::Waiting(_) = state.state else { return };
        let mut time = self.now.saturating_add(delay);
        if self.traffic.is_some() {
            time = time.max(state.busy_until);
            if time >= state.wakes_at {
                return;
            }
            state.wakes_at = time;
        }
        let turn = state.turn;
        self.schedule_at(time, Event::Wake { thread, turn });
    }

    /// Whether this wake-up is for the turn that the thread waits for.
    fn is_due(&self, thread: usize, turn: u64) -> bool {
        let state = &self.threads[thread];
        state.turn == turn && matches!(state.state, State::Waiting(_))
    }

    /// Lets things happen until it is a thread's turn.
    pub(super) fn next(&mut self) -> Next {
        if self.stopping {
            return Next::Over;
        }
        loop {
            if self.failure.is_some() || self.roots == 0 {
                return Next::Over;
            }
            if let Some((thread, turn)) = self.overdue.pop_front() {
                if self.is_due(thread, turn) {
                    return self.resume(thread);
                }
                continue;
            }
            let Some(Reverse(entry)) = self.queue.pop() else {
                self.fail("deadlock: nobody can run, and nothing is on its way".to_owned());
                continue;
            };
            if let Event::Wake { thread, turn } = entry.event {
                // A void wake-up is no reason for time to pass.
                if !self.is_due(thread, turn) {
                    continue;
                }
            }
            if entry.time > self.limit {
                self.fail(format!("it is not over after {} s of virtual time", self.limit as f64 / 1e9));
                continue;
            }
            self.now = self.now.max(entry.time);
            self.steps += 1;
            match entry.event {
                Event::Wake { thread, .. } => return self.resume(thread),
                event => self.execute(event),
            }
        }
    }

    fn resume(&mut self, thread: usize) -> Next {
        let state = &mut self.threads[thread];
        state.state = State::Running;
        state.turn += 1;
        self.running = thread;
        let (turn, node) = (state.turn, state.node);
        self.record("runs: thread, node, turn", [thread as u64, node as u64, turn]);
        Next::Thread(thread)
    }

    /// A thread has ended.
    pub(super) fn ended(&mut self, thread: usize, panic: Option<String>) {
        self.record("ends: thread, panicked", [thread as u64, u64::from(panic.is_some()), 0]);
        let state = &mut self.threads[thread];
        state.state = State::Ended { panicked: panic.is_some() };
        let (root, name) = (state.root, state.name.clone());
        self.roots -= usize::from(root);
        for joiner in std::mem::take(&mut state.joiners) {
            self.threads[thread].joined = true;
            let delay = self.thread_delay(1_000);
            self.wake(joiner, delay);
        }
        if let (true, Some(message)) = (root, panic) {
            self.fail(format!("thread `{name}` panicked: {message}"));
        }
    }

    /// Ends the simulation. The first failure is the one that is told.
    pub(super) fn fail(&mut self, what: String) {
        if self.failure.is_some() {
            return;
        }
        let mut report = format!(
            "simulation with seed {} failed at {:.3} µs: {what}\nthreads:\n",
            self.seed,
            self.now as f64 / 1000.0
        );
        for (number, thread) in self.threads.iter().enumerate() {
            let state = match thread.state {
                State::Running => "runs".to_owned(),
                State::Waiting(wait) => format!("waits in {wait}"),
                State::Ended { panicked: false } => "has ended".to_owned(),
                State::Ended { panicked: true } => "panicked".to_owned(),
            };
            report.push_str(&format!("  {number} `{}` {state}\n", thread.name));
        }
        report.push_str(&format!("last of {} records:\n{}", self.history.count(), self.history));
        self.failure = Some(report);
    }

    fn execute(&mut self, event: Event) {
        match event {
            Event::Wake { .. } => unreachable!("turns of threads are not executed"),
            Event::Gather { link, side, number, chunk } => self.gather(link, side, number, chunk),
            Event::Arrive { link, side, number } => self.reach(link, side, number),
            Event::Deliver { link, side, number } => self.deliver(link, side, number),
            Event::Return { link, side, number } => self.comes_back(link, side, number),
            Event::Returned { link, side, number } => self.returned(link, side, number),
            Event::Land { link, side, number, chunk } => self.land(link, side, number, chunk),
            Event::Capture { link, side, number, chunk } => self.capture(link, side, number, chunk),
            Event::Scatter { link, side, number, chunk } => self.scatter(link, side, number, chunk),
            Event::Acknowledge { link, side, number } => self.acknowledge(link, side, number),
            Event::Retry { link, side } => self.retry(link, side),
            Event::GiveUp { link, side, number } => self.give_up(link, side, number),
            Event::Break { link, side, cause } => self.break_end(link, side, cause, false),
            Event::Knock { attempt } => self.knock(attempt),
            Event::Answer { attempt } => self.answer(attempt),
        }
    }
}
