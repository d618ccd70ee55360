//! What the threads of a server's door share with its owner: which lanes are announced, and who has come in.
//!
//! | what | written by | read by | under |
//! |---|---|---|---|
//! | `tokens` | guests: a lane was asked for, a session has ended; who finds a lane takes its token out | the threads of the doors | its lock |
//! | `ready` | the threads of the doors; guests: a lane that has brought its offer | `accept` | its lock |

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    io::Write,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    Host,
    announced::Expected,
    line::Line,
    request::{Caller, Came, HostRequest},
};
use crate::{
    error::Error,
    session::{
        Way,
        wire::{MAX_LANES, Offer, Token},
    },
};

/// How long a lane may take to come in after its session was given the token.
pub(super) const TOKEN_LIFE: Duration = Duration::from_secs(10);
/// Lanes that a session may be making at a time: what a client asks for in one message, by each way that it tries.
pub(super) const MAKING: usize = 4 * MAX_LANES;
/// Lanes that all sessions together may be making, and messages that asked for them: each brings the regions of its client.
const ALL_LANES: usize = 16_384;
const ALL_BATCHES: usize = 1024;

/// What the threads of a door share with its owner.
pub(super) struct Shared {
    pub(super) host: Host,
    offers: Vec<Offer>,
    tokens: Mutex<HashMap<Token, Expected>>,
    batches: Arc<AtomicUsize>,
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
            batches: Arc::default(),
            ready: Mutex::default(),
            knock: Condvar::new(),
            stop: AtomicBool::new(false),
            log: Log::default(),
        }
    }

    /// The ways that lead here now.
    pub(super) fn offers(&self) -> Vec<Offer> {
        self.offers.iter().filter(|offer| self.host.has(offer.way)).cloned().collect()
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

    /// A place for a message that asks for lanes. `None`: there are too many, and nobody who could make room.
    pub(super) fn batch(&self) -> Option<BatchPlace> {
        let room = || self.batches.load(Ordering::Relaxed) < ALL_BATCHES;
        // Whoever has taken the longest makes room.
        while !room() && self.evict_oldest() {}
        room().then(|| {
            self.batches.fetch_add(1, Ordering::Relaxed);
            BatchPlace(self.batches.clone())
        })
    }

    /// Forgets the lanes that were asked for first, of those that have a token. `false`: there are none.
    fn evict_oldest(&self) -> bool {
        let mut tokens = self.tokens();
        let oldest = tokens.values().map(|expected| &expected.batch).min_by_key(|batch| batch.since).cloned();
        if let Some(oldest) = &oldest {
            tokens.retain(|_, expected| !Arc::ptr_eq(&expected.batch, oldest));
        }
        oldest.is_some()
    }

    /// Makes it known that lanes with these tokens will come in.
    pub(super) fn expect(&self, lanes: impl ExactSizeIterator<Item = (Token, Expected)>) {
        let room = ALL_LANES - lanes.len();
        while self.tokens().len() > room && self.evict_oldest() {}
        self.tokens().extend(lanes);
    }

    /// Lets a lane in that needs no token: it has come inside its session.
    pub(super) fn admit(&self, expected: Expected) {
        self.ready().requests.push_back(HostRequest::new(Came::Offered, Some(expected)));
        self.knock.notify_one();
    }

    /// Forgets tokens that were not used in time. How long until that is to be done again.
    pub(super) fn expire(&self) -> Duration {
        let mut tokens = self.tokens();
        tokens.retain(|_, expected| expected.batch.since.elapsed() < TOKEN_LIFE);
        let left = tokens.values().map(|expected| TOKEN_LIFE.saturating_sub(expected.batch.since.elapsed()));
        left.fold(Duration::from_secs(3600), Duration::min)
    }

    /// A session has ended: its lanes are not let in any more.
    pub(super) fn forget(&self, line: &Arc<Line>) {
        self.tokens().retain(|_, expected| !Arc::ptr_eq(expected.line(), line));
    }

    /// A lane has come in.
    pub(super) fn let_in(&self, way: Way, caller: Caller) {
        let expected =
            <Token>::try_from(caller.private_data()).ok().and_then(|token| self.tokens().remove(&token));
        match expected {
            Some(expected) if expected.batch.way == way && expected.batch.since.elapsed() < TOKEN_LIFE => {
                self.ready().requests.push_back(HostRequest::new(Came::By(caller), Some(expected)));
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

/// The place of a message that asks for lanes among all of them.
pub(super) struct BatchPlace(Arc<AtomicUsize>);

impl Drop for BatchPlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
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
