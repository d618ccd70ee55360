//! The last operations of all workers of a job, told when it fails.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::plan::Op;

/// Operations kept.
const KEPT: usize = 60;

/// What a worker did.
#[derive(Debug, Clone)]
pub enum What {
    Op(Op),
    /// A `get` returned with this claim, and the first value of each lane.
    Got {
        table: usize,
        row: u64,
        claim: u64,
        sums: Vec<i64>,
    },
    Clock,
    Event(String),
}

#[derive(Debug, Clone)]
struct Note {
    time: Duration,
    lane: usize,
    clock: u64,
    what: What,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Journal {
    notes: Mutex<VecDeque<Note>>,
    /// The last one of each lane: what it waits in, if the job hangs.
    last: Mutex<BTreeMap<usize, Note>>,
    complaints: Mutex<Vec<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Journal {
    /// Notes what `lane` did at its clock `clock`.
    pub fn note(&self, time: Duration, lane: usize, clock: u64, what: What) {
        let mut notes = lock(&self.notes);
        if notes.len() == KEPT {
            notes.pop_front();
        }
        let note = Note { time, lane, clock, what };
        lock(&self.last).insert(lane, note.clone());
        notes.push_back(note);
    }

    /// Runs `body`; if it panics, notes with which words.
    pub fn heed<X>(&self, body: impl FnOnce() -> X) -> X {
        catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
            let text = payload.downcast_ref::<String>().cloned();
            let text = text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            // A thread that is killed unwinds without words.
            lock(&self.complaints).extend(text);
            resume_unwind(payload)
        })
    }

    /// The words of the first panic.
    pub fn complaint(&self) -> Option<String> {
        lock(&self.complaints).first().cloned()
    }
}

impl fmt::Display for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let notes = lock(&self.notes);
        for complaint in &*lock(&self.complaints) {
            writeln!(f, "panicked: {complaint}")?;
        }
        writeln!(f, "last {} operations of the workers:", notes.len())?;
        notes.iter().try_for_each(|note| write!(f, "{note}"))?;
        writeln!(f, "last operation of each worker:")?;
        lock(&self.last).values().try_for_each(|note| write!(f, "{note}"))?;
        Ok(())
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Note { time, lane, clock, what } = self;
        write!(f, "{:>14.3} µs  lane {lane} at clock {clock}: ", time.as_nanos() as f64 / 1000.0)?;
        match what {
            What::Op(op) => writeln!(f, "{op:?}"),
            What::Got { table, row, claim, sums } => {
                writeln!(f, "  got table {table} row {row} as of clock {claim}; sums by lane {sums:?}")
            }
            What::Clock => writeln!(f, "clock()"),
            What::Event(text) => writeln!(f, "{text}"),
        }
    }
}
