//! One end of an established session: saying and hearing, and the lanes that live and end with it.
//!
//! A thread *serves* the session: it alone reads (with the [`Ear`]), writes a beat once a second, and notices silence and the end. Other
//! threads say things through the same cipher, so socket and cipher are under a lock, and nobody waits under it: what the socket does
//! not take at once is kept, up to [`MAX_UNSAID`] bytes, and the serving thread goes on with it. A peer that does not read what it is
//! told ends its session.
//!
//! | what | written by | read by | under |
//! |---|---|---|---|
//! | `voice` | who says something | the same | its lock |
//! | `lanes` | who makes a lane, the provider's thread at a lane's end, the serving thread | the same | its lock |
//! | `pulse` | the serving thread | whoever asks for the peers | its lock |
//!
//! No thread holds two of these locks at a time, or calls a provider with one. (The bell's lock is taken for a ring, with any of them.)
//!
//! # Lanes of a session
//! A lane that brought its offer in the session ([`Message::Lanes`]) has no socket of its own: the session carries its news. It is *pending*
//! from the moment it is asked for, until its maker [ties](Line::tie) it to the session. What is heard of it before (that it is ready, or
//! has ended) is kept, and done then. When it has ended, the peer is told.
//!
//! **The end of a session ends these lanes**, also if its socket alone broke and both processes live. A session that has ended cannot be told
//! from a process that has died; and of a lane without a session nobody would hear that its peer is ready, has ended it, or is dead. A
//! client that lost its lanes so comes back within its lease, in a new session, as after any other break. The queue pairs are in the
//! error state before the end of any of these lanes is reported: nothing changes memory after that (the keeper of `rdma` sees to it).
//! **Nothing escapes it:** the lanes are taken, and the table closed, under one lock; who ties a lane later finds it closed, and ends it.

use std::{
    collections::HashMap,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    net::sockopt,
};

use super::peer::{News, Peer, Pulse};
use crate::{
    error::Error,
    session::{
        noise::{Cipher, MAX_MESSAGE, Piece, piece},
        wire::{Message, Process},
    },
};

/// Bytes that a peer may have left unread, beside those that the kernel keeps.
const MAX_UNSAID: usize = 256 << 10;
/// Reads of one socket before others have their turn.
const READS: usize = 16;
/// A host that has not acknowledged anything for so long is gone, and the session with it. What says so earlier are its lanes.
const GONE: Duration = Duration::from_secs(30);
/// Pause after the system was short of something.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(10);

/// Wakes a thread that sleeps in [`look`].
pub(super) struct Bell(OwnedFd);

impl Bell {
    pub(super) fn new() -> Result<Arc<Self>, Error> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("eventfd")(e.into()))?;
        Ok(Arc::new(Self(bell)))
    }

    pub(super) fn ring(&self) {
        // Fails only if the counter is at its end, and then the thread is awake already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Before the thread looks at what it may have been woken for.
    fn hush(&self) {
        // Fails when nobody rang.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

/// What a session can do to a lane of its own.
pub(super) trait Leash: Send + Sync {
    /// The peer's end can receive.
    fn ready(&self);
    /// The peer's end has ended, or the session.
    fn end(&self);
}

#[derive(Default)]
struct Lane {
    /// `None` while it is pending.
    leash: Option<Arc<dyn Leash>>,
    ready: bool,
    ended: bool,
}

#[derive(Default)]
struct Lanes {
    open: HashMap<u32, Lane>,
    closed: bool,
}

struct Voice {
    cipher: Cipher,
    unsaid: Vec<u8>,
    over: bool,
    /// Why it ended, if it was the peer's fault and nobody has said so yet.
    fault: Option<String>,
}

/// See the module.
pub(super) struct Line {
    socket: TcpStream,
    voice: Mutex<Voice>,
    lanes: Mutex<Lanes>,
    /// Lanes that are being made: [`Place`]s.
    making: AtomicUsize,
    pulse: Pulse,
    /// Where the peer is.
    at: String,
    process: OnceLock<Process>,
    /// Of the serving thread.
    bell: Mutex<Arc<Bell>>,
}

impl Line {
    /// An end whose peer is at `at`, and which the thread with this bell will serve.
    ///
    /// # Errors
    /// The socket cannot be made ready for it.
    pub(super) fn new(
        socket: TcpStream,
        cipher: Cipher,
        at: String,
        bell: &Arc<Bell>,
    ) -> std::io::Result<Arc<Self>> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        // Most that is said at once goes at once.
        sockopt::set_socket_send_buffer_size(&socket, 2 * MAX_MESSAGE)?;
        sockopt::set_tcp_user_timeout(&socket, GONE.as_millis() as u32)?;
        Ok(Arc::new(Self {
            socket,
            voice: Mutex::new(Voice { cipher, unsaid: Vec::new(), over: false, fault: None }),
            lanes: Mutex::default(),
            making: AtomicUsize::new(0),
            pulse: Pulse::new(),
            at,
            process: OnceLock::new(),
            bell: Mutex::new(bell.clone()),
        }))
    }

    fn voice(&self) -> MutexGuard<'_, Voice> {
        // A panic between cipher and socket leaves a frame unsaid: the next one is not understood, and ends the session.
        self.voice.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lanes(&self) -> MutexGuard<'_, Lanes> {
        // Every change is one insertion, removal or mark.
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another thread serves it from now on, which has this bell.
    pub(super) fn served_by(&self, bell: &Arc<Bell>) {
        *self.bell.lock().unwrap_or_else(PoisonError::into_inner) = bell.clone();
        bell.ring();
    }

    fn ring(&self) {
        self.bell.lock().unwrap_or_else(PoisonError::into_inner).ring();
    }

    /// The peer has said which process it is.
    pub(super) fn introduce(&self, process: Process) {
        // It says so once.
        let _ = self.process.set(process);
    }

    /// Who the peer is; `None` before it has said so, and when the session has ended.
    pub(super) fn peer(&self) -> Option<Peer> {
        let Process { host, pid } = self.process.get().filter(|_| self.lives())?.clone();
        Some(Peer { address: self.at.clone(), host, process: pid, silent: self.pulse.silent() })
    }

    /// How the peer is called in lines about it.
    pub(super) fn name(&self) -> String {
        match self.process.get() {
            Some(process) => {
                let Process { host, pid } = process.clone();
                Peer { address: self.at.clone(), host, process: pid, silent: None }.to_string()
            }
            None => self.at.clone(),
        }
    }

    /// Whether it has not ended, as far as this side has heard.
    pub(super) fn lives(&self) -> bool {
        !self.voice().over
    }

    /// How long ago the peer was heard.
    pub(super) fn age(&self) -> Duration {
        self.pulse.age()
    }

    /// Says something.
    ///
    /// # Errors
    /// The session has ended, or does now.
    pub(super) fn say(&self, message: &Message) -> Result<(), String> {
        let mut voice = self.voice();
        if voice.over {
            return Err("the session has ended".to_owned());
        }
        let frame = voice.cipher.seal(&message.encode());
        voice.unsaid.extend(frame);
        let said = self.go_on(&mut voice);
        if said == Ok(false) {
            // The thread waits until there is room.
            self.ring();
        }
        said.map(drop)
    }

    /// Writes what the socket takes of what is unsaid. Whether that was all.
    fn go_on(&self, voice: &mut Voice) -> Result<bool, String> {
        let mut said = 0;
        let failed = loop {
            match (&self.socket).write(&voice.unsaid[said..]) {
                _ if said == voice.unsaid.len() => break None,
                Ok(count) => said += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break None,
                Err(error) => break Some(error.to_string()),
            }
        };
        voice.unsaid.drain(..said);
        if voice.unsaid.len() > MAX_UNSAID {
            let reason = "it does not read what it is told".to_owned();
            self.hang_up(voice);
            voice.fault = Some(reason.clone());
            return Err(reason);
        }
        if let Some(reason) = failed {
            // Of a peer that is gone there is nothing more to say.
            self.hang_up(voice);
            return Err(reason);
        }
        Ok(voice.unsaid.is_empty())
    }

    /// The serving thread finds the end of the socket, and does the rest.
    fn hang_up(&self, voice: &mut Voice) {
        voice.over = true;
        voice.unsaid = Vec::new();
        // Now, and not only when a child process that is being started has closed its copy of the socket, too.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Ends the session, and its lanes.
    pub(super) fn end(&self) {
        self.hang_up(&mut self.voice());
        let mut lanes = self.lanes();
        lanes.closed = true;
        let open = std::mem::take(&mut lanes.open);
        drop(lanes);
        open.values().filter_map(|lane| lane.leash.as_ref()).for_each(|leash| leash.end());
    }

    /// Says that this end lives. A peer that does not read is not told more of that.
    pub(super) fn beat(&self) {
        if self.voice().unsaid.is_empty() {
            // An end is found by reading.
            let _ = self.say(&Message::Beat);
        }
    }

    /// Goes on with what is unsaid.
    pub(super) fn resume(&self) -> Result<(), String> {
        let mut voice = self.voice();
        if voice.over { Ok(()) } else { self.go_on(&mut voice).map(drop) }
    }

    /// Whether all has been said.
    #[cfg(test)]
    pub(super) fn is_clear(&self) -> bool {
        self.voice().unsaid.is_empty()
    }

    fn open(&self, frame: &[u8]) -> Result<Message, String> {
        let forged =
            |_| "what it sent is not from the other end of the session, or was sent before".to_owned();
        let message = self.voice().cipher.open(frame).map_err(forged)?;
        Message::decode(&message).map_err(|error| format!("it sent a malformed message: {error}"))
    }

    /// The peer was not heard in a look that began at `looked`.
    pub(super) fn unheard(&self, looked: Instant) -> Option<News> {
        self.pulse.unheard(looked)
    }
}

/// Lanes of the session: see the module.
#[cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "lanes of RDMA alone live in a session"))]
impl Line {
    /// A lane is asked for.
    pub(super) fn pend(&self, number: u32) {
        let mut lanes = self.lanes();
        if !lanes.closed {
            lanes.open.insert(number, Lane::default());
        }
    }

    /// A lane is there: what has been heard of it is done, and what will be.
    pub(super) fn tie(&self, number: u32, leash: Arc<dyn Leash>) {
        let mut lanes = self.lanes();
        // It may have ended before, of itself.
        let (ready, ended) = match lanes.open.get_mut(&number) {
            Some(lane) => {
                lane.leash = Some(leash.clone());
                (lane.ready, lane.ended)
            }
            None => (false, true),
        };
        drop(lanes);
        if ended {
            leash.end();
        } else if ready {
            leash.ready();
        }
    }

    /// The peer says that its ends of so many lanes can receive.
    pub(super) fn note_ready(&self, first: u32, count: u16) {
        for number in (first..).take(count.into()) {
            let mark = |lane: &mut Lane| {
                lane.ready = true;
                lane.leash.clone()
            };
            let leash = self.lanes().open.get_mut(&number).and_then(mark);
            leash.iter().for_each(|leash| leash.ready());
        }
    }

    /// The peer says that its end has ended. It may speak of one that has ended here, too.
    pub(super) fn note_ended(&self, number: u32) {
        let mark = |lane: &mut Lane| {
            lane.ended = true;
            lane.leash.clone()
        };
        let leash = self.lanes().open.get_mut(&number).and_then(mark);
        leash.iter().for_each(|leash| leash.end());
    }

    /// A lane comes to nothing, and the peer knows.
    pub(super) fn forget(&self, number: u32) {
        self.lanes().open.remove(&number);
    }

    /// A lane has ended here, or comes to nothing: the peer is told, unless it knows.
    pub(super) fn untie(&self, number: u32) {
        let gone = self.lanes().open.remove(&number);
        if gone.is_some_and(|lane| !lane.ended) {
            // Of a session that has ended, the peer knows.
            let _ = self.say(&Message::Ended { number });
        }
        // Who serves a session that ends with its last lane looks again.
        self.ring();
    }

    /// Whether a lane lives, or is being made.
    pub(super) fn has_lanes(&self) -> bool {
        !self.lanes().open.is_empty()
    }
}

/// The place of a lane among those of a session that are being made.
pub(super) struct Place(Arc<Line>);

impl Place {
    /// `None`: there are `most` already.
    pub(super) fn take(line: &Arc<Line>, most: usize) -> Option<Self> {
        let taken = line.making.fetch_add(1, Ordering::Relaxed);
        let place = Self(line.clone());
        (taken < most).then_some(place)
    }

    pub(super) fn line(&self) -> &Arc<Line> {
        &self.0
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.making.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the serving thread has of a session besides the line: bytes that have come and are no whole frame yet.
#[derive(Default)]
pub(super) struct Ear(pub(super) Vec<u8>);

impl Ear {
    /// Takes what has come, some of it if it is much: hands each message to `take`. News, if the peer had been silent.
    ///
    /// # Errors
    /// The session ends; with the reason, unless the peer is gone.
    pub(super) fn hear(
        &mut self,
        line: &Line,
        mut take: impl FnMut(Message) -> Result<(), String>,
    ) -> Result<Option<News>, Option<String>> {
        let mut news = None;
        // What the handshake left over comes first.
        self.frames(line, &mut take).map_err(Some)?;
        for _ in 0..READS {
            let mut bytes = [0; 4096];
            match (&line.socket).read(&mut bytes) {
                Ok(0) => return Err(line.voice().fault.take()),
                Ok(count) => {
                    news = news.or(line.pulse.heard(Instant::now()));
                    self.0.extend_from_slice(&bytes[..count]);
                    self.frames(line, &mut take).map_err(Some)?;
                    // What comes after that is found by the next look.
                    if count < bytes.len() {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(news),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err(None),
                Err(error) => return Err(Some(error.to_string())),
            }
        }
        Ok(news)
    }

    fn frames(
        &mut self,
        line: &Line,
        take: &mut impl FnMut(Message) -> Result<(), String>,
    ) -> Result<(), String> {
        loop {
            let length = match piece(&self.0) {
                Piece::Frame(length) => length,
                // No more than one frame is kept.
                Piece::Unfinished if self.0.len() <= MAX_MESSAGE + 64 => return Ok(()),
                Piece::Unfinished | Piece::Refused(_) => return Err("it sent no frame".to_owned()),
            };
            let message = line.open(&self.0[2..2 + length])?;
            self.0.drain(..2 + length);
            take(message)?;
        }
    }
}

/// What a look has found of one line.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Found {
    pub(super) readable: bool,
    pub(super) writable: bool,
}

/// Waits until somebody rings, or there is something to read on a line, or room for what is unsaid on one; or for `timeout`. `None`: the system
/// could not look.
pub(super) fn look<'a>(
    bell: &Bell,
    lines: impl Iterator<Item = &'a Line>,
    timeout: Duration,
) -> Option<Vec<Found>> {
    let mut fds = vec![PollFd::new(&bell.0, PollFlags::IN)];
    fds.extend(lines.map(|line| {
        let full = !line.voice().unsaid.is_empty();
        let what = if full { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        PollFd::from_borrowed_fd(line.socket.as_fd(), what)
    }));
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) => {
            if !fds[0].revents().is_empty() {
                bell.hush();
            }
            let found = |fd: &PollFd<'_>| {
                let writable = fd.revents().contains(PollFlags::OUT);
                Found { readable: !(fd.revents() - PollFlags::OUT).is_empty(), writable }
            };
            Some(fds[1..].iter().map(found).collect())
        }
        Err(rustix::io::Errno::INTR) => None,
        Err(_) => {
            // The system is short of something. Not at once again.
            std::thread::sleep(SHORTAGE_PAUSE);
            None
        }
    }
}
