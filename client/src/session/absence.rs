//! A shard that cannot be reached for a while: when to connect again, and when to give up.
//!
//! The thread that holds the engine says that the connection [has ended](Absence::begin). Any thread that waits for something
//! tries to connect again, one at a time, and without the engine: others drive it meanwhile. What it has made is given to
//! the engine, which goes on when the shard says where ([`fervor_protocol::resume`]). If that connection ends, too, the
//! next try follows. The time in which all this has to succeed counts from the first end.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use fervor_protocol::resume::next_attempt;

/// Time between two tries at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// How long the first try may take.
const FIRST_TRY: Duration = Duration::from_millis(250);

/// See the module.
#[derive(Debug, Default)]
pub struct Absence {
    /// The shard cannot be reached: `state` says more.
    absent: AtomicBool,
    state: Mutex<State>,
    /// How often it was over.
    resumptions: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// Number of the last try of all.
    attempt: u16,
    /// Tries since the connection ended.
    tries: u32,
    /// No try is to begin before this moment.
    next: Duration,
    /// When it is given up.
    until: Duration,
    /// A thread is trying, or the engine has got what it made.
    trying: bool,
    /// Why the connection ended, and why the last try failed.
    cause: String,
    failure: Option<String>,
}

/// What a thread that waits is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Nothing.
    Nothing,
    /// Connect, as this attempt, within this time.
    Connect(u16, Duration),
    /// The time is over, with this cause.
    GiveUp(String),
}

impl Absence {
    /// The connection has ended, for this reason; there is time until `now + lease`.
    pub fn begin(&self, now: Duration, lease: Duration, cause: String) {
        let mut state = self.lock();
        state.trying = false;
        if !self.absent.load(Ordering::Relaxed) {
            (state.tries, state.next, state.until) = (0, now, now.saturating_add(lease));
            (state.cause, state.failure) = (cause, None);
            self.absent.store(true, Ordering::Release);
        } else {
            // The one that was made after it.
            state.fail(now, cause);
        }
    }

    /// Whether there is something to be done.
    #[inline]
    pub fn is_absent(&self) -> bool {
        self.absent.load(Ordering::Acquire)
    }

    /// What is to be done; with [`Next::Connect`] it is the caller's to do.
    pub fn next(&self, now: Duration, longest: Duration) -> Next {
        let mut state = self.lock();
        if !self.is_absent() {
            return Next::Nothing;
        }
        if now >= state.until {
            let failure = state.failure.as_ref().map(|failure| format!("; trying to come back: {failure}"));
            return Next::GiveUp(format!(
                "{}, and it could not be reached again in time{}",
                state.cause,
                failure.unwrap_or_default()
            ));
        }
        if state.trying || now < state.next {
            return Next::Nothing;
        }
        state.trying = true;
        state.attempt = next_attempt(state.attempt);
        let time = FIRST_TRY.saturating_mul(1 << state.tries.min(10)).min(longest).min(state.until - now);
        Next::Connect(state.attempt, time)
    }

    /// The try has failed.
    pub fn failed(&self, now: Duration, failure: String) {
        self.lock().fail(now, failure);
    }

    /// The shard goes on.
    pub fn end(&self) {
        let mut state = self.lock();
        state.trying = false;
        self.absent.store(false, Ordering::Release);
        self.resumptions.fetch_add(1, Ordering::Release);
    }

    /// How often the shard has gone on.
    pub fn resumptions(&self) -> u64 {
        self.resumptions.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn fail(&mut self, now: Duration, failure: String) {
        self.trying = false;
        self.next = now + FIRST_PAUSE.saturating_mul(1 << self.tries.min(10)).min(LAST_PAUSE);
        self.tries += 1;
        self.failure = Some(failure);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn one_thread_tries_at_a_time_with_pauses_until_the_lease_is_over() {
        let absence = Absence::default();
        assert_eq!(absence.next(Duration::ZERO, LONG), Next::Nothing);
        let lease = Duration::from_secs(5);
        absence.begin(Duration::from_secs(1), lease, "broken".into());
        let (mut now, mut tries, mut last) = (Duration::from_secs(1), 0, 0);
        loop {
            match absence.next(now, LONG) {
                Next::Nothing => now += Duration::from_millis(1),
                Next::Connect(attempt, time) => {
                    assert!(attempt == last + 1 && now + time <= Duration::from_secs(6));
                    assert_eq!(absence.next(now, LONG), Next::Nothing, "another thread is at it");
                    (tries, last) = (tries + 1, attempt);
                    absence.failed(now, "nobody there".into());
                }
                Next::GiveUp(cause) => {
                    assert!(cause.contains("broken") && cause.contains("nobody there"), "{cause}");
                    break;
                }
            }
        }
        assert!((8..20).contains(&tries), "{tries} tries in 5 s");
        assert_eq!(now, Duration::from_secs(6));
    }

    #[test]
    fn the_end_of_what_was_made_meanwhile_does_not_make_the_time_longer() {
        let absence = Absence::default();
        absence.begin(Duration::ZERO, Duration::from_secs(1), "broken".into());
        assert!(matches!(absence.next(Duration::ZERO, LONG), Next::Connect(1, _)));
        absence.begin(Duration::from_millis(900), Duration::from_secs(1), "broken again".into());
        assert!(matches!(absence.next(Duration::from_millis(950), LONG), Next::Connect(2, _)));
        assert!(matches!(absence.next(Duration::from_secs(1), LONG), Next::GiveUp(_)));
        absence.end();
        assert_eq!((absence.next(Duration::from_secs(2), LONG), absence.resumptions()), (Next::Nothing, 1));
        // Attempts count on, over all times.
        absence.begin(Duration::from_secs(3), Duration::from_secs(1), "broken".into());
        assert!(matches!(absence.next(Duration::from_secs(3), LONG), Next::Connect(3, _)));
    }
}
