//! The sessions that a server has, all served by one thread.
//!
//! A guest is first *unproven*: it has shown an opening that may have been recorded. Its first message, which only somebody with the
//! session's secret can make, proves it. There are [`UNPROVEN`] unproven guests at most, for [`PATIENCE`] each; whoever has been there for
//! the longest time makes room. Whatever a guest sends that is no message, or not due, ends its session, with one line that says why;
//! and nothing else.
//!
//! The thread reads. Answers to lanes are written by the threads that accept them, so a session's socket and cipher are under a lock
//! ([`Session`]). A guest that does not read what it is told is not waited for: its session ends.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    io::Errno,
    net::sockopt::{self, set_socket_send_buffer_size},
};

use super::{
    announced::{Expected, Session},
    shared::{Alarm, Shared},
};
use crate::{
    error::Error,
    session::{
        Key,
        key::random,
        noise::{Cipher, MAX_MESSAGE, Piece, piece},
        wire::{Message, Token},
    },
};

/// Guests that have not proved who they are.
pub(super) const UNPROVEN: usize = 256;
/// How long they may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause after the system was short of something.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(10);
/// Sessions at a time.
const SESSIONS: usize = 4096;

/// A guest, as the thread sees it.
struct Guest {
    session: Arc<Session>,
    /// For reading: the same socket.
    socket: Arc<TcpStream>,
    name: String,
    key: Option<Arc<Key>>,
    heard: Vec<u8>,
    /// Since when it has not proved who it is; `None` when it has.
    unproven: Option<Instant>,
}

impl Guest {
    /// Takes what it has said. `Err`: its session ends; with the reason, unless it is gone.
    fn hear(&mut self, shared: &Shared) -> Result<(), Option<String>> {
        let mut bytes = [0; 4096];
        loop {
            match (&*self.socket).read(&mut bytes) {
                Ok(0) => return Err(None),
                Ok(count) => self.heard.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(Some(error.to_string())),
            }
            loop {
                let length = match piece(&self.heard) {
                    Piece::Frame(length) => length,
                    // No more than one frame is kept.
                    Piece::Unfinished if self.heard.len() <= MAX_MESSAGE + 64 => break,
                    Piece::Unfinished | Piece::Refused(_) => return Err(Some("it sent no frame".to_owned())),
                };
                let message = self.session.open(&self.heard[2..2 + length]).map_err(Some)?;
                self.heard.drain(..2 + length);
                self.take(shared, message).map_err(Some)?;
            }
        }
    }

    fn take(&mut self, shared: &Shared, message: Message) -> Result<(), String> {
        match message {
            Message::Hello { .. } if self.unproven.is_some() => {
                self.unproven = None;
                let (boot, offers) = (shared.host.0.boot, shared.offers.clone());
                self.session.say(&Message::Welcome { boot, offers, rails: shared.host.told_rails() })
            }
            Message::Lane { number, way, rails, regions, data } if self.unproven.is_none() => {
                let mut token = Token::default();
                random(&mut token).map_err(|error| error.to_string())?;
                let (session, key, since) = (self.session.clone(), self.key.clone(), Instant::now());
                if !shared.expect(token, Expected { session, number, way, rails, regions, data, key, since })
                {
                    return Err("it asks for more lanes at a time than a session may".to_owned());
                }
                self.session.say(&Message::Go { number, token })
            }
            other => Err(format!("it sent a message of kind {} that is not due", other.kind())),
        }
    }
}

/// What others hand to the thread.
struct Arrivals {
    guests: Mutex<Vec<Guest>>,
    bell: OwnedFd,
}

impl Arrivals {
    fn lock(&self) -> MutexGuard<'_, Vec<Guest>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // Fails only if the counter is at its end, and then the thread is awake already.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

/// Where a guest enters.
pub(super) struct Lobby {
    arrivals: Arc<Arrivals>,
    shared: Arc<Shared>,
}

impl Lobby {
    /// A peer whose opening was good: it is answered, and has to prove itself.
    pub(super) fn enter(&self, socket: TcpStream, cipher: Cipher, answer: &[u8], key: Option<String>) {
        let name = socket.peer_addr().map_or_else(|_| "somebody".to_owned(), |address| address.to_string());
        let ready = socket.set_nonblocking(true).and_then(|()| socket.set_nodelay(true));
        // A message is said at once, or not at all.
        let ready = ready.and_then(|()| Ok(set_socket_send_buffer_size(&socket, 2 * MAX_MESSAGE)?));
        // A host that is gone says nothing more, and sessions are silent anyway.
        let ready = ready.and_then(|()| Ok(keep_alive(&socket)?));
        // Of so few bytes, to a socket that has sent nothing, none are left over.
        if let Err(error) = ready.and_then(|()| (&socket).write_all(answer)) {
            return self.shared.log(format_args!("the session with {name} did not begin: {error}"));
        }
        let socket = Arc::new(socket);
        let key = key.map(|name| {
            let key = self.shared.host.0.keys.find(&name).expect("the handshake has found it");
            Arc::new(key.clone())
        });
        let session = Arc::new(Session::new(socket.clone(), cipher));
        let unproven = Some(Instant::now());
        self.arrivals.lock().push(Guest { session, socket, name, key, heard: Vec::new(), unproven });
        self.arrivals.ring();
    }
}

/// Has the kernel find out within a minute that a silent peer's host is gone.
fn keep_alive(socket: &TcpStream) -> rustix::io::Result<()> {
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, Duration::from_secs(30))?;
    sockopt::set_tcp_keepintvl(socket, Duration::from_secs(10))?;
    sockopt::set_tcp_keepcnt(socket, 3)
}

/// The thread of the sessions. It ends when this is dropped.
pub(super) struct Guests {
    arrivals: Arc<Arrivals>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Guests {
    pub(super) fn start(shared: &Arc<Shared>) -> Result<Self, Error> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::io("eventfd")(e.into()))?;
        let arrivals = Arc::new(Arrivals { guests: Mutex::default(), bell });
        let (theirs, door) = (arrivals.clone(), shared.clone());
        let thread = std::thread::Builder::new()
            .name("fervor-guests".to_owned())
            .spawn(move || {
                let _alarm = Alarm(door.clone());
                serve(&theirs, &door);
            })
            .map_err(Error::io("starting thread `fervor-guests`"))?;
        Ok(Self { arrivals, shared: shared.clone(), thread: Some(thread) })
    }

    pub(super) fn lobby(&self) -> Lobby {
        Lobby { arrivals: self.arrivals.clone(), shared: self.shared.clone() }
    }
}

impl Drop for Guests {
    fn drop(&mut self) {
        // The door has said that it stops.
        self.arrivals.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(arrivals: &Arrivals, shared: &Arc<Shared>) {
    let mut guests: Vec<Guest> = Vec::new();
    while !shared.stopped() {
        let readable = sleep(arrivals, &guests, shared.expire());
        // Fails when nobody rang.
        let _ = rustix::io::read(&arrivals.bell, &mut [0; 8]);
        let mut at = 0;
        guests.retain_mut(|guest| {
            let heard = readable.get(at).copied().unwrap_or(false);
            at += 1;
            stays(guest, heard, shared)
        });
        guests.append(&mut arrivals.lock());
        make_room(&mut guests, shared);
    }
    guests.drain(..).for_each(|guest| end(&guest, shared));
}

/// Whether a guest stays; what it has said is taken if there is something.
fn stays(guest: &mut Guest, heard: bool, shared: &Arc<Shared>) -> bool {
    let result = if heard { guest.hear(shared) } else { Ok(()) };
    let result = result.and_then(|()| match guest.unproven {
        Some(since) if since.elapsed() >= PATIENCE => {
            Err(Some("it did not go on with the handshake".to_owned()))
        }
        _ => Ok(()),
    });
    let Err(reason) = result else { return true };
    if let Some(reason) = reason {
        shared.log(format_args!("the session with {} ends: {reason}", guest.name));
    }
    end(guest, shared);
    false
}

fn end(guest: &Guest, shared: &Arc<Shared>) {
    shared.forget(&guest.session);
    let _ = guest.socket.shutdown(Shutdown::Both);
}

/// Sends away whoever has been unproven for the longest time, as long as there are too many; and whoever came last when there are too many
/// sessions.
fn make_room(guests: &mut Vec<Guest>, shared: &Arc<Shared>) {
    let mut surplus = guests.iter().filter(|guest| guest.unproven.is_some()).count().saturating_sub(UNPROVEN);
    // Those who came first are first in the list.
    guests.retain(|guest| {
        let leaves = surplus > 0 && guest.unproven.is_some();
        if leaves {
            surplus -= 1;
            end(guest, shared);
        }
        !leaves
    });
    while guests.len() > SESSIONS {
        let guest = guests.pop().expect("there are many");
        shared.log(format_args!("{} was turned away: there are {SESSIONS} sessions", guest.name));
        end(&guest, shared);
    }
}

/// Waits until somebody rings, or a guest has said something: which ones have.
fn sleep(arrivals: &Arrivals, guests: &[Guest], longest: Duration) -> Vec<bool> {
    let mut fds = Vec::with_capacity(1 + guests.len());
    fds.push(PollFd::new(&arrivals.bell, PollFlags::IN));
    fds.extend(guests.iter().map(|guest| PollFd::from_borrowed_fd(guest.socket.as_fd(), PollFlags::IN)));
    let patience = guests
        .iter()
        .filter_map(|guest| guest.unproven)
        .map(|since| PATIENCE.saturating_sub(since.elapsed()));
    let timeout = patience.fold(longest, Duration::min) + Duration::from_millis(1);
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
    // An early return is allowed: nobody has said anything then.
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) => fds[1..].iter().map(|fd| !fd.revents().is_empty()).collect(),
        Err(Errno::INTR) => vec![false; guests.len()],
        Err(_) => {
            // The system is short of something. Not at once again.
            std::thread::sleep(SHORTAGE_PAUSE);
            vec![false; guests.len()]
        }
    }
}
