//! The one source of chance of a simulation (and of `faulty`), and what a seed makes of the network and the machines.

use std::time::Duration;

/// SplitMix64: small, fast, and good enough to choose among schedules.
#[derive(Debug)]
pub(in crate::transport) struct Random(u64);

impl Random {
    pub(in crate::transport) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(in crate::transport) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`; 0 if there is none.
    pub(in crate::transport) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// True once in `n` times.
    pub(in crate::transport) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// A number from `low` to `high` of which every order of magnitude is equally likely.
    pub(in crate::transport) fn spread(&mut self, low: u64, high: u64) -> u64 {
        let doublings = (high / low.max(1)).max(1).ilog2();
        let base = low << self.below(u64::from(doublings) + 1);
        (base + self.below(base)).min(high)
    }

    /// Mostly below `typical`; once in `rare` times anything up to `longest`.
    pub(in crate::transport) fn tail(&mut self, typical: u64, longest: u64, rare: u64) -> u64 {
        if self.one_in(rare) { self.spread(typical.max(1), longest) } else { self.below(typical) }
    }
}

/// How long packets take. The defaults are those of a RoCE network within a rack.
#[derive(Debug, Clone)]
pub struct Network {
    /// Least time from one NIC to another.
    pub base: Duration,
    /// What is added at random, evenly.
    pub jitter: Duration,
    /// What each 1024 bytes add.
    pub per_kib: Duration,
    /// The longest that a packet may take when something goes wrong (a retransmission).
    pub longest: Duration,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            base: Duration::from_nanos(700),
            jitter: Duration::from_nanos(600),
            per_kib: Duration::from_nanos(80),
            longest: Duration::from_micros(200),
        }
    }
}

impl Network {
    /// Nanoseconds that `bytes` take, once in `rare` times very long.
    pub(super) fn delay(&self, random: &mut Random, bytes: usize, rare: u64) -> u64 {
        let size = bytes as u64 * self.per_kib.as_nanos() as u64 / 1024;
        let jitter = random.tail(self.jitter.as_nanos() as u64, self.longest.as_nanos() as u64, rare);
        self.base.as_nanos() as u64 + size + jitter
    }
}

/// What kind of trouble a seed is after: some seeds delay what others do at once.
#[derive(Debug)]
pub(super) struct Temper {
    /// A post takes effect before the ring once in so many times.
    pub(super) eager: u64,
    /// A cache line lands late once in so many times …
    pub(super) late_line: u64,
    /// … and then up to so many nanoseconds.
    pub(super) latest_line: u64,
    /// A completion shows late once in so many times.
    pub(super) late_completion: u64,
    /// A packet takes long once in so many times.
    pub(super) late_packet: u64,
    /// What the first turns of `relax` typically take, ns.
    pub(super) spin: u64,
    /// A thread is descheduled for long once in so many times.
    pub(super) late_thread: u64,
    /// Other threads run in the middle of a copy of a view, or before a load, once in so many times.
    pub(super) torn_view: u64,
}

impl Temper {
    pub(super) fn new(random: &mut Random) -> Self {
        // A chance of its own, so that what has no views is as it was.
        let torn_view = [2, 8, 32, 256][Random::new(!random.0).below(4) as usize];
        let mut pick = |choices: [u64; 4]| choices[random.below(4) as usize];
        Self {
            eager: pick([1, 2, 4, 16]),
            late_line: pick([1, 4, 16, 128]),
            latest_line: pick([2_000, 50_000, 500_000, 5_000_000]),
            late_completion: pick([2, 8, 32, 256]),
            late_packet: pick([4, 16, 64, 1024]),
            spin: pick([60, 250, 500, 1000]),
            late_thread: pick([16, 64, 256, 4096]),
            torn_view,
        }
    }
}
