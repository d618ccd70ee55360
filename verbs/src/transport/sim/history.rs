//! What happened: a hash of all of it, and the last of it in words.

use std::{collections::VecDeque, fmt};

/// Records kept for the report of a failure.
const KEPT: usize = 400;

/// One thing that happened.
#[derive(Debug, Clone, Copy)]
struct Record {
    time: u64,
    /// What happened, and the names of the numbers: `name: first, second`.
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
        let record = Record { time, what, numbers };
        match self.last.back_mut() {
            // Of the same thing again and again (a thread that spins) only the last is kept.
            Some(last) if last.what == what && last.numbers[..2] == numbers[..2] => *last = record,
            _ => self.last.push_back(record),
        }
        if self.last.len() > KEPT {
            self.last.pop_front();
        }
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
        for Record { time, what, numbers } in &self.last {
            let (what, names) = what.split_once(": ").unwrap_or((what, ""));
            write!(f, "{:>14.3} µs  {what}", *time as f64 / 1000.0)?;
            for (name, number) in names.split(", ").zip(numbers) {
                write!(f, " {name} {number}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
