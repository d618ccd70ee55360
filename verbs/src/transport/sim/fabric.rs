//! The network model: what a simulation of *time* is made of, instead of one of weak memory.
//!
//! ```text
//!  post, ring ─▶ sender's NIC ──latency + jitter──▶ receiver's NIC ─▶ memory, all of it at once ─▶ completion
//!               one message at a time             one message at a time
//! ```
//!
//! A NIC sends one message at a time, and takes one in at a time: each takes what its bytes take on the wire, but never less
//! than the NIC's time for a message. So a server that pushes to 64 clients takes 64 times as long as for one, and 64
//! clients that send to one server queue up there. A message whose way is free is cut through: its bytes go in while they
//! go out. What threads do costs what the calls of the transport cost, the time for the bytes of the messages that
//! they make and take, and what they say that they compute ([`Node::compute`](super::Node::compute)).

use std::time::Duration;

use super::random::Random;

/// How long things take between and within the nodes of a simulation of time. See the module.
#[derive(Debug, Clone, PartialEq)]
pub struct Fabric {
    /// Its name, for reports.
    pub name: &'static str,
    /// From one NIC to another, for the first bit.
    pub latency: Duration,
    /// What is added at random, evenly; messages of one connection do not overtake each other.
    pub jitter: Duration,
    /// Bits per second of a NIC, each way.
    pub bandwidth: u64,
    /// Least time that a NIC takes for a message.
    pub per_message: Duration,
    /// Bytes of headers of each message on the wire.
    pub headers: usize,
    /// From a completion until the thread that waits for it goes on.
    pub wake: Duration,
    /// What a thread takes to make or to apply each 1024 bytes of a SEND's payload.
    pub per_kib: Duration,
}

impl Fabric {
    /// Ethernet of 1 Gb/s, with a transport in software: the network of many a cluster in 2015.
    pub fn ethernet_1g() -> Self {
        Self {
            name: "1 GbE",
            latency: Duration::from_micros(30),
            jitter: Duration::from_micros(10),
            bandwidth: 1_000_000_000,
            per_message: Duration::from_nanos(1_500),
            headers: 90,
            wake: Duration::from_micros(5),
            per_kib: Duration::from_nanos(600),
        }
    }

    /// RoCE over Ethernet of 25 Gb/s, within a rack.
    pub fn roce_25g() -> Self {
        Self {
            name: "25 GbE RoCE",
            latency: Duration::from_nanos(1_300),
            jitter: Duration::from_nanos(400),
            bandwidth: 25_000_000_000,
            per_message: Duration::from_nanos(50),
            headers: 82,
            wake: Duration::from_nanos(200),
            per_kib: Duration::from_nanos(600),
        }
    }

    /// InfiniBand EDR, 100 Gb/s.
    pub fn infiniband_100g() -> Self {
        Self {
            name: "100 Gb/s InfiniBand",
            latency: Duration::from_nanos(800),
            jitter: Duration::from_nanos(150),
            bandwidth: 100_000_000_000,
            per_message: Duration::from_nanos(20),
            headers: 30,
            wake: Duration::from_nanos(200),
            per_kib: Duration::from_nanos(600),
        }
    }
}

/// What kind of machine a node is. The default computes as fast as it is told, always.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    /// What its computing is multiplied with: 2 takes twice as long.
    pub slowness: f64,
    /// Greatest part by which a stretch of computing is shorter or longer, at random, evenly.
    pub jitter: f64,
    /// How long a pause is in which nothing is computed (another tenant, a collection of garbage).
    pub pause: Duration,
    /// Mean time of computing between two pauses; the intervals are spread evenly from 0 to twice that. Zero: no pauses.
    pub pause_every: Duration,
}

impl Default for Machine {
    fn default() -> Self {
        Self { slowness: 1.0, jitter: 0.0, pause: Duration::ZERO, pause_every: Duration::ZERO }
    }
}

/// A machine at work. Its chance is its own: the same pauses come after the same amounts of computing, whatever the network
/// does meanwhile.
#[derive(Debug)]
pub(super) struct Computing {
    machine: Machine,
    random: Random,
    /// Computing until the next pause, ns.
    left: u64,
}

impl Computing {
    pub(super) fn new(machine: Machine, seed: u64) -> Self {
        let mut computing = Self { machine, random: Random::new(seed), left: 0 };
        computing.left = computing.interval();
        computing
    }

    fn interval(&mut self) -> u64 {
        self.random.below(2 * self.machine.pause_every.as_nanos() as u64)
    }

    /// How long `work` ns of computing take, pauses included.
    pub(super) fn takes(&mut self, work: u64) -> u64 {
        let even = self.random.next() as f64 / u64::MAX as f64;
        let factor = self.machine.slowness * (1.0 + self.machine.jitter * (2.0 * even - 1.0));
        let computed = (work as f64 * factor) as u64;
        let mut paused = 0;
        if !self.machine.pause_every.is_zero() {
            let mut rest = computed;
            while self.left <= rest {
                rest -= self.left;
                paused += self.machine.pause.as_nanos() as u64;
                self.left = self.interval().max(1);
            }
            self.left -= rest;
        }
        computed + paused
    }
}

/// What all NICs of a simulation have sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Messages: SENDs, WRITEs, READs and their answers.
    pub messages: u64,
    /// Bytes of them, without headers.
    pub bytes: u64,
}

/// How long a node has been at work with messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Busy {
    /// Its NIC, with what it sends.
    pub sending: Duration,
    /// Its NIC, with what comes.
    pub receiving: Duration,
    /// Its threads, all together: with calls of the transport, and with the payloads that they make and apply.
    pub threads: Duration,
}

/// A node: until when its NIC is busy, each way, and how long it has been.
#[derive(Debug, Default)]
struct Nic {
    sending: u64,
    receiving: u64,
    busy: Busy,
}

/// A fabric at work.
#[derive(Debug)]
pub(super) struct Traffic {
    pub(super) fabric: Fabric,
    nics: Vec<Nic>,
    pub(super) sent: Sent,
}

impl Traffic {
    pub(super) fn new(fabric: Fabric) -> Self {
        assert!(fabric.bandwidth > 0, "a network of 0 bits per second: nothing would ever arrive");
        Self { fabric, nics: Vec::new(), sent: Sent::default() }
    }

    pub(super) fn latency(&self) -> u64 {
        self.fabric.latency.as_nanos() as u64
    }

    /// How long something takes that is no request.
    pub(super) fn way(&self, random: &mut Random) -> u64 {
        self.latency() + random.below(self.fabric.jitter.as_nanos() as u64)
    }

    pub(super) fn wake(&self) -> u64 {
        self.fabric.wake.as_nanos() as u64
    }

    /// What a thread takes for the payload of a SEND.
    pub(super) fn handling(&self, bytes: usize) -> u64 {
        bytes as u64 * self.fabric.per_kib.as_nanos() as u64 / 1024
    }

    /// How long a NIC is busy with a message.
    fn busy(&self, bytes: usize) -> u64 {
        let bits = 8 * (bytes + self.fabric.headers) as u64;
        (bits * 1_000_000_000 / self.fabric.bandwidth).max(self.fabric.per_message.as_nanos() as u64)
    }

    fn nic(&mut self, node: usize) -> &mut Nic {
        if self.nics.len() <= node {
            self.nics.resize_with(node + 1, Nic::default);
        }
        &mut self.nics[node]
    }

    /// A thread of `node` has been at work for `time`.
    pub(super) fn worked(&mut self, node: usize, time: u64) {
        self.nic(node).busy.threads += Duration::from_nanos(time);
    }

    /// How long `node` has been at work.
    pub(super) fn busy_of(&mut self, node: usize) -> Busy {
        self.nic(node).busy
    }

    /// A message of `bytes` is handed to the NIC of `node` at `time`: when its last bit comes to the other NIC.
    pub(super) fn send(&mut self, random: &mut Random, node: usize, time: u64, bytes: usize) -> u64 {
        self.sent.messages += 1;
        self.sent.bytes += bytes as u64;
        let busy = self.busy(bytes);
        let nic = self.nic(node);
        nic.sending = nic.sending.max(time) + busy;
        nic.busy.sending += Duration::from_nanos(busy);
        let sent = nic.sending;
        sent + self.way(random)
    }

    /// The last bit of a message of `bytes` comes to the NIC of `node` at `time`: until when it has to queue there, if others
    /// were before it.
    pub(super) fn receive(&mut self, node: usize, time: u64, bytes: usize) -> Option<u64> {
        let busy = self.busy(bytes);
        let nic = self.nic(node);
        nic.busy.receiving += Duration::from_nanos(busy);
        let free = nic.receiving + busy;
        nic.receiving = free.max(time);
        (free > time).then_some(free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic() -> (Traffic, Random) {
        let fabric = Fabric { jitter: Duration::ZERO, headers: 0, ..Fabric::ethernet_1g() };
        (Traffic::new(fabric), Random::new(1))
    }

    #[test]
    fn a_nic_sends_one_message_at_a_time() {
        let (mut traffic, mut random) = traffic();
        // 1250 bytes take 10 µs on 1 Gb/s; the last bit comes 30 µs later.
        let arrivals = [0, 0, 100_000].map(|time| traffic.send(&mut random, 3, time, 1250));
        assert_eq!(arrivals, [40_000, 50_000, 140_000]);
        assert_eq!(traffic.send(&mut random, 2, 0, 0), 31_500, "a short one takes a message's time");
        let busy = [2, 3].map(|node| traffic.busy_of(node).sending.as_nanos());
        assert_eq!(busy, [1_500, 30_000], "waiting for something to send is no work");
    }

    #[test]
    fn messages_from_several_senders_queue_up_at_one_receiver() {
        let (mut traffic, _) = traffic();
        assert_eq!(traffic.receive(0, 40_000, 1250), None, "nothing is in the way");
        assert_eq!(traffic.receive(0, 40_000, 1250), Some(50_000));
        assert_eq!(traffic.receive(0, 45_000, 1250), Some(60_000));
        assert_eq!(traffic.receive(1, 45_000, 1250), None, "another NIC");
        assert_eq!(traffic.receive(0, 70_000, 1250), None, "its bits came in while they went out");
        assert_eq!(traffic.receive(0, 70_000, 0), Some(71_500));
        assert_eq!(traffic.busy_of(0).receiving.as_nanos(), 41_500);
    }

    #[test]
    fn a_machine_is_as_slow_and_pauses_as_often_as_it_is_told() {
        let work = 1_000_000;
        let total = |machine: Machine| -> u64 {
            let mut computing = Computing::new(machine, 7);
            (0..1000).map(|_| computing.takes(work)).sum()
        };
        let plain = Machine::default();
        assert_eq!(total(plain.clone()), 1000 * work);
        assert_eq!(total(Machine { slowness: 2.5, ..plain.clone() }), 2500 * work);
        let jittery = total(Machine { jitter: 0.1, ..plain.clone() });
        assert!(jittery != 1000 * work && jittery.abs_diff(1000 * work) < 10 * work, "{jittery}");
        let (pause, pause_every) = (Duration::from_millis(200), Duration::from_millis(10));
        let pauses = (total(Machine { pause, pause_every, ..plain }) - 1000 * work) as f64 / 200e6;
        assert!((85.0..115.0).contains(&pauses), "{pauses} pauses, not about 100");
    }
}
