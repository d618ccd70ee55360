//! What the threads of a server's door share with its owner: which lanes are announced, and who has come in.
//!
//! | what | written by | read by | under |
//! |---|---|---|---|
//! | `tokens` | guests: a lane was asked for, a session has ended; who finds a lane takes its token out | the threads of the doors | its lock |
//! | `ready` | the threads of the doors | `accept` | its lock |

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    io::Write,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    Host,
    announced::{Expected, Session},
    request::{Caller, HostRequest},
};
use crate::{
    error::Error,
    session::{
        Way,
        wire::{Offer, Token},
    },
};

/// How long a lane may take to come in after its session was given the token.
pub(super) const TOKEN_LIFE: Duration = Duration::from_secs(10);
/// Lanes that a session may be making at a time (a client makes one after the other), and all sessions together.
pub(super) const TOKENS: usize = 8;
pub(super) const ALL_TOKENS: usize = 1024;
/// What the threads of a door share with its owner.
pub(super) struct Shared {
    pub(super) host: Host,
    pub(super) offers: Vec<Offer>,
    tokens: Mutex<HashMap<Token, Expected>>,
    ready: Mutex<Ready>,
    /// There is something in `ready`.
    knock: Condvar,
    stop: AtomicBool,
    log: Log,
}

#[derive(Default)]
struct Ready {
    requests: VecDeque<HostRequest>,
    /// Why nobody comes in any more.
    error: Option<Error>,
}

impl Shared {
    /// Of a host that listens for sessions.
    pub(super) fn new(host: &Host, offers: Vec<Offer>) -> Self {
        Self {
            host: host.clone(),
            offers,
            tokens: Mutex::default(),
            ready: Mutex::default(),
            knock: Condvar::new(),
            stop: AtomicBool::new(false),
            log: Log::default(),
        }
    }

    /// The door is to be closed.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    /// Refuses those who have come in and were not asked for, now that no more come.
    pub(super) fn refuse_all(&self) {
        let unanswered = std::mem::take(&mut self.ready().requests);
        drop(unanswered);
    }

    /// The next lane that has come in.
    pub(super) fn next(&self, timeout: Duration) -> Result<Option<HostRequest>, Error> {
        let wait = |ready: &mut Ready| ready.requests.is_empty() && ready.error.is_none();
        let (mut ready, _) = self
            .knock
            .wait_timeout_while(self.ready(), timeout.min(Duration::from_secs(1 << 30)), wait)
            .unwrap_or_else(PoisonError::into_inner);
        match (ready.requests.pop_front(), ready.error.take()) {
            (Some(request), error) => {
                ready.error = error;
                Ok(Some(request))
            }
            (None, Some(error)) => Err(error),
            (None, None) => Ok(None),
        }
    }

    fn tokens(&self) -> MutexGuard<'_, HashMap<Token, Expected>> {
        // Every change is one insertion or removal.
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ready(&self) -> MutexGuard<'_, Ready> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Makes it known that a lane with this token will come in. `false`: its session has too many of them.
    pub(super) fn expect(&self, token: Token, expected: Expected) -> bool {
        let mut tokens = self.tokens();
        if tokens.len() >= ALL_TOKENS {
            // Whoever has taken the longest makes room.
            let oldest = tokens.iter().min_by_key(|(_, other)| other.since).map(|(token, _)| *token);
            tokens.remove(&oldest.expect("there are many"));
        }
        if tokens.values().filter(|other| Arc::ptr_eq(&other.session, &expected.session)).count() >= TOKENS {
            return false;
        }
        tokens.insert(token, expected);
        true
    }

    /// Forgets tokens that were not used in time. How long until that is to be done again.
    pub(super) fn expire(&self) -> Duration {
        let mut tokens = self.tokens();
        tokens.retain(|_, expected| expected.since.elapsed() < TOKEN_LIFE);
        let left = tokens.values().map(|expected| TOKEN_LIFE.saturating_sub(expected.since.elapsed()));
        left.fold(Duration::from_secs(3600), Duration::min)
    }

    /// A session has ended: its lanes are not let in any more.
    pub(super) fn forget(&self, session: &Arc<Session>) {
        self.tokens().retain(|_, expected| !Arc::ptr_eq(&expected.session, session));
    }

    /// A lane has come in.
    pub(super) fn let_in(&self, way: Way, caller: Caller) {
        let expected =
            <Token>::try_from(caller.private_data()).ok().and_then(|token| self.tokens().remove(&token));
        match expected {
            Some(expected) if expected.way == way && expected.since.elapsed() < TOKEN_LIFE => {
                self.ready().requests.push_back(HostRequest::new(caller, Some(expected)));
                self.knock.notify_one();
            }
            _ => self.log(format_args!("a lane over {way} without a token of a session was turned away")),
        }
    }

    /// Nobody comes in any more.
    pub(super) fn fail(&self, error: Error) {
        self.ready().error.get_or_insert(error);
        self.knock.notify_one();
    }

    /// Writes a line about a peer, unless there are too many.
    pub(super) fn log(&self, line: fmt::Arguments<'_>) {
        self.log.line(line);
    }
}

/// Lines about peers on the standard error, so many a second at most: peers do not fill disks.
#[derive(Default)]
struct Log(Mutex<(Option<Instant>, u32, u32)>);

impl Log {
    const EACH_SECOND: u32 = 20;

    fn line(&self, line: fmt::Arguments<'_>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, lines, kept) = &mut *state;
        if since.is_none_or(|since| since.elapsed() >= Duration::from_secs(1)) {
            if *kept > 0 {
                say(format_args!("{kept} more lines like these in the second before"));
            }
            (*since, *lines, *kept) = (Some(Instant::now()), 0, 0);
        }
        if *lines < Self::EACH_SECOND {
            *lines += 1;
            say(line);
        } else {
            *kept += 1;
        }
    }
}

/// Nobody may read what is said.
pub(super) fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "fervor: {line}");
}

/// Tells those who wait at the door when a thread of it has panicked.
pub(super) struct Alarm(pub(super) Arc<Shared>);

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let source = std::io::Error::other("a thread of the door panicked; its message is above");
            self.0.fail(Error::System { call: "accepting".to_owned(), source });
        }
    }
}
