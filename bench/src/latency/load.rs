//! How many operations are measured, and when each of them begins.

use std::{
    hint::spin_loop,
    thread,
    time::{Duration, Instant},
};

/// Sleep until so long before an operation is due: a thread that sleeps wakes late.
const EARLY: Duration = Duration::from_micros(200);

/// When a measurement ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Until {
    /// After so many operations.
    Count(u64),
    /// After so much time.
    Time(Duration),
}

/// How many operations, and how fast.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Load {
    /// When it ends.
    pub until: Until,
    /// Operations a second in an open loop; none in a closed one.
    pub rate: Option<f64>,
}

impl Load {
    /// So many operations in a closed loop.
    pub fn count(count: u64) -> Self {
        Load { until: Until::Count(count), rate: None }
    }

    /// Operations that are timed together, where a closed loop takes `group`.
    pub fn group(&self, group: u64) -> u64 {
        if self.rate.is_some() { 1 } else { group }
    }

    /// The schedule, which begins now, of operations of which so many are timed together.
    pub fn begin(self, group: u64) -> Schedule {
        Schedule { load: self, group, start: Instant::now(), begun: 0 }
    }
}

/// Says when each operation begins.
#[derive(Debug)]
pub struct Schedule {
    load: Load,
    group: u64,
    start: Instant,
    begun: u64,
}

impl Schedule {
    /// Waits until the next group of operations is due. The time that its latency counts from; none when all are done.
    ///
    /// In an open loop that is the time at which it was due, even if that is long past.
    pub fn next_due(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let due = match self.load.rate {
            None => now,
            Some(rate) => self.start + Duration::from_secs_f64(self.begun as f64 / rate),
        };
        let done = match self.load.until {
            Until::Count(count) => self.begun >= count,
            Until::Time(time) => due - self.start >= time,
        };
        if done {
            return None;
        }
        self.begun += self.group;
        self.load.rate.map_or(Some(due), |_| {
            wait_until(due);
            Some(due)
        })
    }

    /// Operations begun so far.
    pub fn begun(&self) -> u64 {
        self.begun
    }
}

fn wait_until(due: Instant) {
    loop {
        match due.checked_duration_since(Instant::now()) {
            None | Some(Duration::ZERO) => return,
            Some(left) if left > 2 * EARLY => thread::sleep(left - EARLY),
            Some(_) => spin_loop(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_loop_begins_at_once_and_counts_groups() {
        let mut schedule = Load::count(33).begin(16);
        let begins = std::iter::from_fn(|| schedule.next_due()).count();
        assert_eq!((begins, schedule.begun()), (3, 48));
    }

    #[test]
    fn an_open_loop_counts_from_when_an_operation_was_due() {
        // Operations are due each millisecond, and the first takes twenty.
        let load = Load { until: Until::Count(30), rate: Some(1000.0) };
        let mut schedule = load.begin(1);
        let mut latencies = Vec::new();
        while let Some(due) = schedule.next_due() {
            assert!(Instant::now() >= due);
            if latencies.is_empty() {
                thread::sleep(Duration::from_millis(20));
            }
            latencies.push(due.elapsed());
        }
        assert_eq!(latencies.len(), 30);
        // Those that were due in the stall have waited for the rest of it.
        for (number, latency) in latencies.iter().take(19).enumerate() {
            assert!(*latency >= Duration::from_millis(20 - number as u64), "{number}: {latency:?}");
        }
        let spaced = (schedule.begun() - 1) as u32 * Duration::from_millis(1);
        assert!(schedule.start.elapsed() >= spaced);
    }

    #[test]
    fn a_time_ends_both_loops() {
        for rate in [None, Some(500.0)] {
            let time = Duration::from_millis(20);
            let mut schedule = Load { until: Until::Time(time), rate }.begin(1);
            let start = Instant::now();
            let begins = std::iter::from_fn(|| schedule.next_due()).count();
            assert!(rate.is_none() || begins == 10, "{begins}");
            assert!(start.elapsed() >= Duration::from_millis(18));
        }
    }
}
