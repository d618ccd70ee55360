//! The thread that serves the sessions of a host with its servers: `fervor-sessions`, one for each host, from the first session on.
//!
//! It reads what the servers say, hands answers to those who wait for them, writes a beat to each once a second, and says so when one is
//! silent. So no worker and no polling thread has to do anything for a session to live, and a server that dies while nobody waits for it is
//! noticed, too. The thread also serves the sessions of a door that was closed, as long as they have lanes.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    line::{Bell, Ear, Found, Line, look},
    peer::BEAT,
    shared::say,
};
use crate::{
    error::Error,
    session::wire::{Message, NamedRegion, Token, Verdict},
};

/// The client's end of a session, as the thread that serves it and those who make lanes share it.
pub(super) struct Call {
    pub(super) line: Arc<Line>,
    inbox: Mutex<Inbox>,
    /// There is something new in the inbox.
    news: Condvar,
}

/// What has come for those who make lanes. One thread makes some at a time, so there are answers to one range of numbers; what comes for others
/// is of lanes that were given up.
#[derive(Default)]
struct Inbox {
    wanted: Range<u32>,
    tokens: Option<Vec<Token>>,
    answers: HashMap<u32, Answer>,
    /// Why nothing more comes.
    over: Option<String>,
}

/// What has become of a lane.
pub(super) struct Answer {
    pub(super) verdict: Verdict,
    #[cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "only lanes of RDMA have one"))]
    pub(super) offer: Vec<u8>,
    pub(super) regions: Vec<NamedRegion>,
    pub(super) data: Vec<u8>,
}

/// Why nothing is heard of a lane.
pub(super) enum Unheard {
    /// It takes too long.
    Late,
    /// The session is of no more use, for this reason.
    Over(String),
}

impl Call {
    pub(super) fn new(line: Arc<Line>) -> Arc<Self> {
        Arc::new(Self { line, inbox: Mutex::default(), news: Condvar::new() })
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        // Every change leaves an inbox that is whole.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why it makes no more lanes, if it does not.
    pub(super) fn over(&self) -> Option<String> {
        self.inbox().over.clone()
    }

    /// From now on what comes for these lanes is kept, and nothing else.
    pub(super) fn want(&self, lanes: Range<u32>) {
        let mut inbox = self.inbox();
        (inbox.wanted, inbox.tokens) = (lanes, None);
        inbox.answers.clear();
    }

    /// Waits until `take` finds what it looks for.
    fn wait<T>(
        &self,
        deadline: Option<Instant>,
        mut take: impl FnMut(&mut Inbox) -> Option<T>,
    ) -> Result<T, Unheard> {
        let mut inbox = self.inbox();
        loop {
            if let Some(found) = take(&mut inbox) {
                return Ok(found);
            }
            if let Some(reason) = &inbox.over {
                return Err(Unheard::Over(reason.clone()));
            }
            let left = deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Err(Unheard::Late);
            }
            let left = left.min(Duration::from_secs(1 << 30));
            inbox = self.news.wait_timeout(inbox, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The tokens of the lanes that are wanted.
    pub(super) fn tokens(&self, deadline: Option<Instant>) -> Result<Vec<Token>, Unheard> {
        self.wait(deadline, |inbox| inbox.tokens.take())
    }

    /// What has become of lane `number`, one of those that are wanted.
    pub(super) fn answer(&self, number: u32, deadline: Option<Instant>) -> Result<Answer, Unheard> {
        self.wait(deadline, |inbox| inbox.answers.remove(&number))
    }

    /// Whether the answer to lane `number` is there.
    #[cfg(feature = "rdma")]
    pub(super) fn has_answer(&self, number: u32) -> bool {
        self.inbox().answers.contains_key(&number)
    }

    /// Takes what the server says.
    fn take(&self, message: Message) -> Result<(), String> {
        match message {
            Message::Beat => {}
            Message::Ended { number } => self.line.note_ended(number),
            Message::Go { first, tokens } => {
                let mut inbox = self.inbox();
                if first == inbox.wanted.start {
                    if tokens.len() != inbox.wanted.len() {
                        let count = inbox.wanted.len();
                        return Err(format!("it sent {} tokens for {count} lanes", tokens.len()));
                    }
                    inbox.tokens = Some(tokens);
                }
            }
            Message::Answer { number, verdict, offer, regions, data } => {
                let mut inbox = self.inbox();
                if inbox.wanted.contains(&number) {
                    inbox.answers.insert(number, Answer { verdict, offer, regions, data });
                }
            }
            Message::Leaving => self.close("it has stopped listening"),
            other => return Err(format!("it sent a message of kind {} that is not due", other.kind())),
        }
        self.news.notify_all();
        Ok(())
    }

    /// It makes no more lanes.
    fn close(&self, reason: &str) {
        self.inbox().over.get_or_insert_with(|| reason.to_owned());
        self.news.notify_all();
    }

    /// It makes no more lanes. Those that there are go on; it ends with them.
    pub(super) fn set_aside(&self, reason: &str) {
        self.close(reason);
    }

    /// Ends it, and its lanes.
    fn end(&self, reason: &str) {
        self.line.end();
        self.close(reason);
    }
}

/// A session that the thread serves.
enum Served {
    /// With a server.
    Call(Arc<Call>),
    /// With a client, from a door that was closed: as long as it has lanes.
    Leaving(Arc<Line>),
}

impl Served {
    fn line(&self) -> &Arc<Line> {
        match self {
            Self::Call(call) => &call.line,
            Self::Leaving(line) => line,
        }
    }

    /// Whether it may make lanes yet.
    fn makes_lanes(&self) -> bool {
        matches!(self, Self::Call(call) if call.over().is_none())
    }

    fn take(&self, message: Message) -> Result<(), String> {
        match (self, message) {
            (Self::Call(call), message) => return call.take(message),
            (Self::Leaving(line), Message::Ready { first, count }) => line.note_ready(first, count),
            (Self::Leaving(line), Message::Ended { number }) => line.note_ended(number),
            // It may ask for lanes before it hears that there are none any more: it makes a new session then.
            (Self::Leaving(_), Message::Beat | Message::Lanes { .. }) => {}
            (Self::Leaving(_), other) => {
                return Err(format!("it sent a message of kind {} that is not due", other.kind()));
            }
        }
        Ok(())
    }

    fn end(&self, reason: &str) {
        match self {
            Self::Call(call) => call.end(reason),
            Self::Leaving(line) => line.end(),
        }
    }
}

/// A session in the thread's care. It ends with this.
struct Care {
    served: Served,
    ear: Ear,
}

impl Care {
    /// Goes on with the session. `false`: it has ended.
    fn serve(&mut self, found: Found) -> bool {
        let Self { served, ear } = self;
        let line = served.line().clone();
        let said = if found.writable { line.resume().map_err(Some) } else { Ok(()) };
        let heard = said.and_then(|()| {
            if found.readable { ear.hear(&line, |message| served.take(message)) } else { Ok(None) }
        });
        match heard {
            Ok(news) => {
                news.iter().for_each(|news| say(format_args!("{} {news}", line.name())));
                line.has_lanes() || served.makes_lanes()
            }
            Err(reason) => {
                if let Some(reason) = &reason {
                    say(format_args!("the session with {} ends: {reason}", line.name()));
                }
                served.end(reason.as_deref().unwrap_or("it closed the connection"));
                false
            }
        }
    }
}

impl Drop for Care {
    fn drop(&mut self) {
        self.served.end("this process has ended the session");
    }
}

struct Shared {
    bell: Arc<Bell>,
    stop: AtomicBool,
    fresh: Mutex<Vec<Care>>,
}

impl Shared {
    fn fresh(&self) -> MutexGuard<'_, Vec<Care>> {
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread. It ends when this is dropped, and all its sessions.
pub(super) struct Attendant {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Attendant {
    pub(super) fn start() -> Result<Self, Error> {
        let (stop, fresh) = (AtomicBool::new(false), Mutex::default());
        let shared = Arc::new(Shared { bell: Bell::new()?, stop, fresh });
        let theirs = shared.clone();
        let thread = std::thread::Builder::new()
            .name("fervor-sessions".to_owned())
            .spawn(move || serve(&theirs))
            .map_err(Error::io("starting thread `fervor-sessions`"))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Whether the thread is there. (It may have panicked.)
    pub(super) fn works(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// What wakes it.
    pub(super) fn bell(&self) -> &Arc<Bell> {
        &self.shared.bell
    }

    /// Serves a session from now on. `ear` has what was heard already.
    pub(super) fn attend(&self, call: Arc<Call>, ear: Ear) {
        self.give(Care { served: Served::Call(call), ear });
    }

    /// Serves a session with a client as long as it has lanes.
    pub(super) fn attend_leaving(&self, line: Arc<Line>, ear: Ear) {
        line.served_by(&self.shared.bell);
        self.give(Care { served: Served::Leaving(line), ear });
    }

    fn give(&self, care: Care) {
        self.shared.fresh().push(care);
        self.shared.bell.ring();
    }
}

impl Drop for Attendant {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.bell.ring();
        if let Some(thread) = self.thread.take() {
            // It says why it panicked.
            let _ = thread.join();
        }
    }
}

fn serve(shared: &Shared) {
    let mut cares: Vec<Care> = Vec::new();
    let mut beat = Instant::now() + BEAT;
    while !shared.stop.load(Ordering::SeqCst) {
        let looked = Instant::now();
        let left = match cares.is_empty() {
            true => Duration::from_secs(3600),
            false => beat.saturating_duration_since(looked) + Duration::from_millis(1),
        };
        let lines = cares.iter().map(|care| &**care.served.line());
        let found = look(&shared.bell, lines, left);
        let all = found.is_some();
        let mut found = found.into_iter().flatten();
        cares.retain_mut(|care| care.serve(found.next().unwrap_or_default()));
        for mut care in shared.fresh().drain(..) {
            // What the handshake has left over.
            if care.serve(Found { readable: true, writable: false }) {
                cares.push(care);
            }
        }
        if Instant::now() >= beat {
            beat = Instant::now() + BEAT;
            for line in cares.iter().map(|care| care.served.line()) {
                line.beat();
                let news = if all { line.unheard(looked) } else { None };
                news.iter().for_each(|news| say(format_args!("{} {news}", line.name())));
            }
        }
    }
}
