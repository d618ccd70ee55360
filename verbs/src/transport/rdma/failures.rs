//! Which peers of a device did not answer, and how often in a row: whoever makes a connection chooses another way first.
//!
//! A *failure* is a connection that could not be made, or that ended without this end having wished it. (A peer that goes is no failure of
//! the network. But its end, and that of the network, look alike here if the peer finds out first; and to choose another way costs nothing.)
//! What breaks at once with others is one failure: one of a connection that was made before the last failure adds nothing.
//!
//! A peer that did not answer in time is *doubted*: it is left out as after one failure, but it does not come nearer to being given up. It may
//! be slow.
//!
//! After a failure a peer is left out for [`FIRST_PENALTY`], after each further one for twice as long. A connection that held for longer than
//! [`HEALED`] begins a new row.

use std::{
    net::Ipv6Addr,
    time::{Duration, Instant},
};

/// How long a peer is left out after the first failure, and at most.
const FIRST_PENALTY: Duration = Duration::from_secs(2);
const LAST_PENALTY: Duration = Duration::from_secs(120);
/// A connection that held for so long shows that the failures before it are over.
const HEALED: Duration = Duration::from_secs(30);
/// Peers that are remembered.
const PEERS: usize = 1024;

#[derive(Debug, Clone, Copy)]
struct Failure {
    peer: Ipv6Addr,
    times: u32,
    last: Instant,
}

impl Failure {
    fn penalty(&self) -> Duration {
        FIRST_PENALTY.saturating_mul(1 << (self.times - 1).min(10)).min(LAST_PENALTY)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Failures(Vec<Failure>);

impl Failures {
    /// A connection to `peer` has failed, or ended, that was made at `made`.
    pub(super) fn note(&mut self, peer: Ipv6Addr, made: Instant, now: Instant) {
        if let Some(known) = self.0.iter_mut().find(|known| known.peer == peer) {
            if made < known.last {
                return;
            }
            known.times = if now - made >= HEALED { 1 } else { known.times.saturating_add(1) };
            known.last = now;
            return;
        }
        self.remember(peer, now);
    }

    /// `peer` did not answer in time.
    pub(super) fn doubt(&mut self, peer: Ipv6Addr, now: Instant) {
        match self.0.iter_mut().find(|known| known.peer == peer) {
            Some(known) => known.last = now,
            None => self.remember(peer, now),
        }
    }

    fn remember(&mut self, peer: Ipv6Addr, now: Instant) {
        if self.0.len() >= PEERS {
            // The one that was heard of for the last time the longest ago.
            let oldest = (0..self.0.len()).min_by_key(|&at| self.0[at].last).expect("there are many");
            self.0.swap_remove(oldest);
        }
        self.0.push(Failure { peer, times: 1, last: now });
    }

    /// How often in a row connections to `peer` have failed; 0 if that is not known, or long enough ago.
    pub(super) fn times(&self, peer: Ipv6Addr, now: Instant) -> u32 {
        let known = self.0.iter().find(|known| known.peer == peer);
        known.filter(|known| now < known.last + known.penalty()).map_or(0, |known| known.times)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: u16) -> Ipv6Addr {
        Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, number)
    }

    #[test]
    fn penalties_grow_end_and_are_forgiven() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut failures = Failures::default();
        assert_eq!(failures.times(peer(1), at(0.0)), 0);
        failures.note(peer(1), at(0.0), at(1.0));
        assert_eq!([failures.times(peer(1), at(2.9)), failures.times(peer(2), at(1.0))], [1, 0]);
        assert_eq!(failures.times(peer(1), at(3.1)), 0, "it is tried again");
        // Others that broke with the first.
        failures.note(peer(1), at(0.5), at(1.5));
        assert_eq!(failures.times(peer(1), at(2.0)), 1);
        failures.note(peer(1), at(3.1), at(4.0));
        assert_eq!([failures.times(peer(1), at(7.9)), failures.times(peer(1), at(8.1))], [2, 0]);
        // One that held.
        failures.note(peer(1), at(9.0), at(40.0));
        assert_eq!([failures.times(peer(1), at(41.0)), failures.times(peer(1), at(42.1))], [1, 0]);
    }

    #[test]
    fn who_is_slow_is_left_out_and_not_given_up() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut failures = Failures::default();
        for _ in 0..5 {
            failures.doubt(peer(1), now);
        }
        assert_eq!([failures.times(peer(1), now), failures.times(peer(1), now + FIRST_PENALTY)], [1, 0]);
        failures.note(peer(1), now, now);
        failures.doubt(peer(1), later);
        assert_eq!(failures.times(peer(1), later), 2);
    }

    #[test]
    fn the_longest_penalty_and_the_memory_are_bounded() {
        let start = Instant::now();
        let mut failures = Failures::default();
        let mut now = start;
        for _ in 0..100 {
            failures.note(peer(0), now, now);
            now += Duration::from_millis(1);
        }
        assert_eq!(failures.times(peer(0), now + LAST_PENALTY), 0);
        for number in 1..=PEERS as u16 {
            failures.note(peer(number), now, now + Duration::from_millis(number.into()));
        }
        assert_eq!(failures.0.len(), PEERS);
        assert_eq!(failures.times(peer(0), now), 0, "the oldest is forgotten");
        assert_eq!(failures.times(peer(1), now), 1);
    }
}
