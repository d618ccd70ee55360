//! What happened: a hash of all of it, and the last of it in words.

use std::{collections::VecDeque, fmt};

/// Records kept for the report of a failure.
const KEPT: usize = 400;

/// One thing that happened.
#[derive(Debug, Clone, Copy)]
struct Record {
    time: u64,
    what: &'static str,
    numbers: [u64; 3],
}

/// Everything recorded goes into the hash; the last records stay for the report.
#[derive(Debug, Default)]
pub(super) struct History {
    hash: u64,
    count: u64,
    last: VecDeque<Record>,
}

impl History {
    pub(super) fn record(&mut self, time: u64, what: &'static str, numbers: [u64; 3]) {
        let mut mix =
            |value: u64| self.hash = (self.hash ^ value).wrapping_mul(0x0100_0000_01b3).rotate_left(29);
        mix(time);
        mix(what.len() as u64 | u64::from(what.as_bytes()[0]) << 8);
        numbers.into_iter().for_each(&mut mix);
        self.count += 1;
        if self.last.len() == KEPT {
            self.last.pop_front();
        }
        self.last.push_back(Record { time, what, numbers });
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Record { time, what, numbers: [a, b, c] } in &self.last {
            writeln!(f, "{:>14.3} µs  {what} {a} {b} {c}", *time as f64 / 1000.0)?;
        }
        Ok(())
    }
}
