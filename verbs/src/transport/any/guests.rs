//! The sessions that a server has, all served by one thread.
//!
//! A guest is first *unproven*: it has shown an opening that may have been recorded. Its first message, which only somebody with the
//! session's secret can make, proves it. There are [`UNPROVEN`] unproven guests at most, for [`PATIENCE`] each; whoever has been there for
//! the longest time makes room. Whatever a guest sends that is no message, or not due, ends its session, with one line that says why;
//! and nothing else.
//!
//! The thread reads, and writes a beat to each guest once a second. Answers to lanes are written by the threads that accept them ([`Line`]).
//! When the door is closed, sessions that have lanes of their own go on, served by the host's thread ([`attendant`](super::attendant)).

use std::{
    io::Write,
    net::TcpStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    announced::{Batch, Expected, sentence},
    line::{Bell, Ear, Found, Line, Place, look},
    peer::{BEAT, this_process},
    shared::{Alarm, MAKING, Shared},
};
use crate::{
    error::Error,
    session::{
        Key, Way,
        key::random,
        noise::Cipher,
        wire::{Message, Offer, Token, Verdict},
    },
};

/// Guests that have not proved who they are.
pub(super) const UNPROVEN: usize = 256;
/// How long they may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Sessions at a time.
const SESSIONS: usize = 4096;

/// A guest, as the thread sees it.
struct Guest {
    line: Arc<Line>,
    ear: Ear,
    standing: Standing,
}

/// What is known of a guest.
struct Standing {
    key: Option<Arc<Key>>,
    /// How many rails it has told of.
    rails: usize,
    /// Since when it has not proved who it is; `None` when it has.
    unproven: Option<Instant>,
}

impl Guest {
    /// Takes what it has said. `Err`: its session ends; with the reason, unless it is gone.
    fn hear(&mut self, shared: &Shared) -> Result<(), Option<String>> {
        let Self { line, ear, standing } = self;
        let news = ear.hear(line, |message| take(shared, line, standing, message))?;
        news.iter().for_each(|news| shared.log(format_args!("{} {news}", line.name())));
        Ok(())
    }
}

/// Does what a message asks for.
fn take(shared: &Shared, line: &Arc<Line>, standing: &mut Standing, message: Message) -> Result<(), String> {
    let Standing { key, rails: told, unproven } = standing;
    let key = key.as_ref();
    match message {
        Message::Hello { process, rails, .. } if unproven.is_some() => {
            (*unproven, *told) = (None, rails.len());
            line.introduce(process);
            shared.host.note_peer(line);
            let (boot, process) = (shared.host.0.boot, this_process());
            let goes = |offer: &Offer| may_go(key, offer.way);
            let rails = shared.host.told_rails();
            let offers = shared.offers().into_iter().filter(goes).collect();
            line.say(&Message::Welcome { boot, process, offers, rails })
        }
        Message::Lanes { first, way, rails, regions, lanes } if unproven.is_none() => {
            if !may_go(key, way) {
                return Err(format!(
                    "its key is limited, and it asks for a lane over {way}, which cannot be"
                ));
            }
            if way == Way::Rdma && usize::from(rails.own) >= *told {
                let own = rails.own;
                return Err(format!(
                    "it asks for a lane by its rail {own}, and has told of {told} (from 0 on)"
                ));
            }
            let busy = || "the server is being asked for too many lanes at a time".to_owned();
            let place = shared.batch().ok_or_else(busy)?;
            let (key, since) = (key.cloned(), Instant::now());
            let batch = Arc::new(Batch { way, rails, regions, key, since, _place: place });
            let expect = |(number, wanted)| {
                let greedy = "it asks for more lanes at a time than a session may";
                let place = Place::take(line, MAKING).ok_or(greedy)?;
                Ok(Expected::new(&batch, place, number, wanted))
            };
            let lanes = (first..).zip(lanes).map(expect).collect::<Result<Vec<_>, &str>>()?;
            announce(shared, line, first, lanes)
        }
        Message::Ready { first, count } if unproven.is_none() => {
            line.note_ready(first, count);
            Ok(())
        }
        Message::Ended { number } if unproven.is_none() => {
            line.note_ended(number);
            Ok(())
        }
        Message::Beat if unproven.is_none() => Ok(()),
        other => Err(format!("it sent a message of kind {} that is not due", other.kind())),
    }
}

/// Whether the holder of `key` may have lanes by this way.
fn may_go(key: Option<&Arc<Key>>, way: Way) -> bool {
    way.limits() || !key.is_some_and(|key| key.is_limited())
}

/// Lets lanes in that have brought an offer, or gives them tokens.
fn announce(shared: &Shared, line: &Arc<Line>, first: u32, lanes: Vec<Expected>) -> Result<(), String> {
    let (way, rails) = (lanes[0].batch.way, lanes[0].batch.rails);
    if lanes.iter().any(|lane| way.takes_offers() == lane.wanted.offer.is_empty()) {
        return Err(
            "it asks for lanes that lack an offer, or have one that their way does not take".to_owned()
        );
    }
    if let Err(reason) = shared.host.0.leads(way, rails) {
        for lane in lanes {
            lane.answer(Verdict::Impossible, Vec::new(), Vec::new(), sentence(&reason));
        }
        return Ok(());
    }
    if way.takes_offers() {
        for lane in lanes {
            line.pend(lane.number);
            shared.admit(lane);
        }
        return Ok(());
    }
    let mut tokens = vec![Token::default(); lanes.len()];
    random(tokens.as_flattened_mut()).map_err(|error| error.to_string())?;
    shared.expect(tokens.iter().copied().zip(lanes));
    line.say(&Message::Go { first, tokens })
}

/// What others hand to the thread.
struct Arrivals {
    guests: Mutex<Vec<Guest>>,
    bell: Arc<Bell>,
}

impl Arrivals {
    fn lock(&self) -> MutexGuard<'_, Vec<Guest>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
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
        // Of so few bytes, to a socket that has sent nothing, none are left over.
        let said = socket.set_nonblocking(true).and_then(|()| (&socket).write_all(answer));
        let line = said.and_then(|()| Line::new(socket, cipher, name.clone(), &self.arrivals.bell));
        let line = match line {
            Ok(line) => line,
            Err(error) => {
                return self.shared.log(format_args!("the session with {name} did not begin: {error}"));
            }
        };
        let key = key.map(|name| {
            let key = self.shared.host.0.keys.find(&name).expect("the handshake has found it");
            Arc::new(key.clone())
        });
        let unproven = Some(Instant::now());
        self.arrivals.lock().push(Guest {
            line,
            ear: Ear::default(),
            standing: Standing { key, rails: 0, unproven },
        });
        self.arrivals.bell.ring();
    }
}

/// The thread of the sessions. It ends when this is dropped.
pub(super) struct Guests {
    arrivals: Arc<Arrivals>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Guests {
    pub(super) fn start(shared: &Arc<Shared>) -> Result<Self, Error> {
        let arrivals = Arc::new(Arrivals { guests: Mutex::default(), bell: Bell::new()? });
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
        self.arrivals.bell.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(arrivals: &Arrivals, shared: &Arc<Shared>) {
    let mut guests: Vec<Guest> = Vec::new();
    let mut beat = Instant::now() + BEAT;
    while !shared.stopped() {
        let looked = Instant::now();
        let found = sleep(arrivals, &guests, beat, shared.expire());
        let all = found.is_some();
        let mut found = found.into_iter().flatten();
        guests.retain_mut(|guest| stays(guest, found.next().unwrap_or_default(), shared));
        guests.append(&mut arrivals.lock());
        make_room(&mut guests, shared);
        if Instant::now() >= beat {
            beat = Instant::now() + BEAT;
            guests.iter().filter(|guest| guest.standing.unproven.is_none()).for_each(|guest| {
                guest.line.beat();
                let news = if all { guest.line.unheard(looked) } else { None };
                news.iter().for_each(|news| shared.log(format_args!("{} {news}", guest.line.name())));
            });
        }
    }
    for guest in guests {
        shared.forget(&guest.line);
        // Its lanes are not those of the door.
        if guest.standing.unproven.is_none()
            && guest.line.say(&Message::Leaving).is_ok()
            && guest.line.has_lanes()
        {
            shared.host.0.attend_leaving(guest.line, guest.ear);
        } else {
            guest.line.end();
        }
    }
}

/// Whether a guest stays; what it has said is taken if there is something.
fn stays(guest: &mut Guest, found: Found, shared: &Arc<Shared>) -> bool {
    let said = if found.writable { guest.line.resume().map_err(Some) } else { Ok(()) };
    let result = said.and_then(|()| if found.readable { guest.hear(shared) } else { Ok(()) });
    let result = result.and_then(|()| match guest.standing.unproven {
        Some(since) if since.elapsed() >= PATIENCE => {
            Err(Some("it did not go on with the handshake".to_owned()))
        }
        _ => Ok(()),
    });
    let Err(reason) = result else { return true };
    if let Some(reason) = reason {
        shared.log(format_args!("the session with {} ends: {reason}", guest.line.name()));
    }
    end(guest, shared);
    false
}

fn end(guest: &Guest, shared: &Arc<Shared>) {
    shared.forget(&guest.line);
    guest.line.end();
}

/// Sends away whoever has been unproven for the longest time, as long as there are too many; and whoever came last when there are too many
/// sessions.
fn make_room(guests: &mut Vec<Guest>, shared: &Arc<Shared>) {
    let mut surplus =
        guests.iter().filter(|guest| guest.standing.unproven.is_some()).count().saturating_sub(UNPROVEN);
    // Those who came first are first in the list.
    guests.retain(|guest| {
        let leaves = surplus > 0 && guest.standing.unproven.is_some();
        if leaves {
            surplus -= 1;
            end(guest, shared);
        }
        !leaves
    });
    while guests.len() > SESSIONS {
        let guest = guests.pop().expect("there are many");
        shared.log(format_args!("{} was turned away: there are {SESSIONS} sessions", guest.line.name()));
        end(&guest, shared);
    }
}

/// Waits until somebody rings, or a guest has said something or can be told more: which ones, if the system could look. At most until the
/// next `beat` is due, and for `longest`.
fn sleep(arrivals: &Arrivals, guests: &[Guest], beat: Instant, longest: Duration) -> Option<Vec<Found>> {
    let patience = guests
        .iter()
        .filter_map(|guest| guest.standing.unproven)
        .map(|since| PATIENCE.saturating_sub(since.elapsed()));
    let mut timeout = patience.fold(longest, Duration::min);
    if !guests.is_empty() {
        timeout = timeout.min(beat.saturating_duration_since(Instant::now()));
    }
    let lines = guests.iter().map(|guest| &*guest.line);
    look(&arrivals.bell, lines, timeout + Duration::from_millis(1))
}
