//! The client's end of a session, and the lanes that it makes.
//!
//! A process has one session with each server, which is begun when the first lane is made, and begun anew after it has ended (a server
//! that was started again, say). Lanes do not end with it: each has its own news of its peer.
//!
//! A lane takes three steps. The client says what it wants, and gets a token; it connects by the lane's provider, with the token in
//! place of private data; the server's program accepts or refuses, and the session carries what it says. If the way does not lead
//! there (a socket that is in another container's folder, a device that the server's address does not belong to), the next best is tried,
//! and the bad one not again in this session. RDMA leads there by several pairs of rails, which are tried one after the other; what fails,
//! the rails remember ([`rails`](super::rails)).

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    sync::PoisonError,
    time::{Duration, Instant},
};

use super::{
    Host, HostAttach, HostConnection,
    connection::{Lane, Route},
    region::PeerRegions,
};
#[cfg(feature = "rdma")]
use crate::rails::OwnAddress;
use crate::{
    address::Address,
    error::Error,
    rails::Rail,
    session::{
        Reason, Way,
        noise::{Cipher, Initiator, Piece, piece},
        wire::{Boot, LaneRails, Message, Offer, Token},
    },
    transport::{MAX_REQUEST_DATA, Transport, host::check_private_data, tcp},
};

/// How long a server may take for its last word on a lane that has been refused.
const LAST_WORD: Duration = Duration::from_secs(2);

/// The session with one server: none, or one that has ended, is begun anew by the next lane.
#[derive(Default)]
pub(super) struct Dialled {
    session: Option<Session>,
    /// Ways that were tried and led nowhere.
    bad: Vec<(Way, String)>,
}

/// An established session.
struct Session {
    socket: TcpStream,
    cipher: Cipher,
    /// Bytes that have come and are no whole frame yet.
    heard: Vec<u8>,
    last: u32,
    same_host: bool,
    offers: Vec<Offer>,
    /// The server's.
    #[cfg_attr(not(feature = "rdma"), expect(dead_code))]
    rails: Vec<Rail>,
}

/// What a connect has been asked for.
#[derive(Clone, Copy)]
struct Asked<'a> {
    host: &'a Host,
    address: &'a Address,
    name: &'a str,
    port: u16,
    deadline: Option<Instant>,
    timeout: Duration,
}

impl Asked<'_> {
    fn left(&self) -> Duration {
        self.deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()))
    }

    fn late(&self) -> Error {
        Error::Timeout {
            what: format!("connecting to `{}`", self.address),
            seconds: self.timeout.as_secs_f64(),
        }
    }

    fn unreachable(&self, reason: impl Into<String>) -> Error {
        Error::Unreachable { address: self.address.to_string(), reason: reason.into() }
    }

    fn no_session(&self, reason: Reason) -> Error {
        Error::NoSession { address: self.address.to_string(), reason: reason.to_string() }
    }
}

/// See [`Transport::connect`].
pub(super) fn connect(
    host: &Host,
    endpoint: &HostAttach,
    address: &Address,
    private_data: &[u8],
    timeout: Duration,
) -> Result<(HostConnection, Vec<u8>), Error> {
    assert!(endpoint.is_of(host), "the endpoint is of another transport");
    let Address::Session { host: name, port, via } = address else {
        return direct(host, endpoint, address, private_data, timeout);
    };
    if !host.0.sessions {
        return Err(Error::WrongProvider { address: address.to_string(), provider: "shm, rdma or tcp" });
    }
    check_private_data(private_data, MAX_REQUEST_DATA)?;
    let deadline = Instant::now().checked_add(timeout);
    let asked = Asked { host, address, name, port: *port, deadline, timeout };
    let dialled = host.0.dialled(address);
    // A panic leaves a session that may have said half of something: the next error ends it.
    let mut dialled = dialled.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(session) = &mut dialled.session
        && !session.lives()
    {
        *dialled = Dialled::default();
    }
    let reused = dialled.session.is_some();
    if !reused {
        dialled.session = Some(Session::begin(&asked)?);
    }
    let mut made = make(&asked, &mut dialled, *via, endpoint, private_data);
    if reused && matches!(made, Err(Failed::NoToken(_))) {
        // It had ended, and nobody has heard of it: the lane has not been asked for.
        *dialled = Dialled { session: Some(Session::begin(&asked)?), bad: Vec::new() };
        made = make(&asked, &mut dialled, *via, endpoint, private_data);
    }
    let made = made.map_err(|failed| match failed {
        Failed::NoToken(error) | Failed::Lane(error) => error,
        Failed::Way(reason) => asked.unreachable(reason),
    });
    if !matches!(made, Ok(_) | Err(Error::Refused { .. } | Error::Limit { .. })) {
        // What the server says of this lane later is nobody's business any more.
        *dialled = Dialled::default();
    }
    made
}

/// Why no lane was made.
enum Failed {
    /// The session did not give a token: the server does not know of the lane.
    NoToken(Error),
    /// The way does not lead there; another one may.
    Way(String),
    /// The lane was refused, or not made in time.
    Lane(Error),
}

/// Makes a lane by the best way that leads there.
fn make(
    asked: &Asked,
    dialled: &mut Dialled,
    via: Option<Way>,
    endpoint: &HostAttach,
    private_data: &[u8],
) -> Result<(HostConnection, Vec<u8>), Failed> {
    let session = dialled.session.as_mut().expect("the caller has begun it");
    let mut reasons = Vec::new();
    for way in Way::ALL.into_iter().filter(|way| via.is_none_or(|via| via == *way)) {
        if let Some((_, reason)) = dialled.bad.iter().find(|(bad, _)| *bad == way) {
            reasons.push(format!("{way}: {reason}"));
            continue;
        }
        let place = match session.place(asked, way) {
            Ok(place) => place,
            Err(reason) => {
                reasons.push(format!("{way}: {reason}"));
                continue;
            }
        };
        let lane = Wanted::new(&place, endpoint, private_data);
        let made = match way {
            Way::Shm => session.lane(asked, Route::Shm, lane),
            Way::Tcp => session.lane(asked, Route::Tcp, lane),
            Way::Rdma => session.by_rails(asked, via.is_some(), lane),
        };
        match made {
            Err(Failed::Way(reason)) => {
                reasons.push(format!("{way}: {reason}"));
                // Of rails some may come back.
                if way != Way::Rdma {
                    dialled.bad.push((way, reason));
                }
            }
            made => return made,
        }
    }
    Err(Failed::Way(format!("no way leads there ({})", reasons.join("; "))))
}

/// A lane that is wanted.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    /// Where it is made.
    place: &'a Address,
    rails: LaneRails,
    /// The address of the own rail.
    #[cfg(feature = "rdma")]
    from: Option<&'a OwnAddress>,
    endpoint: &'a HostAttach,
    private_data: &'a [u8],
}

impl<'a> Wanted<'a> {
    /// One that goes by no rail.
    fn new(place: &'a Address, endpoint: &'a HostAttach, private_data: &'a [u8]) -> Self {
        Self {
            place,
            rails: LaneRails::default(),
            #[cfg(feature = "rdma")]
            from: None,
            endpoint,
            private_data,
        }
    }
}

/// Connects by one provider's own handshake.
fn direct(
    host: &Host,
    endpoint: &HostAttach,
    address: &Address,
    private_data: &[u8],
    timeout: Duration,
) -> Result<(HostConnection, Vec<u8>), Error> {
    let way = match address {
        Address::Shm(_) => Way::Shm,
        Address::Rdma { .. } => Way::Rdma,
        _ => Way::Tcp,
    };
    if host.0.sessions || !host.has(way) {
        let provider = Way::ALL.into_iter().find(|way| host.has(*way)).map_or("fervor", Way::name);
        return Err(Error::WrongProvider { address: address.to_string(), provider });
    }
    let wanted = Wanted::new(address, endpoint, private_data);
    let (route, (lane, reply)) = match way {
        #[cfg(feature = "rdma")]
        Way::Rdma => {
            let rdma = host.0.rails.get(0).ok_or_else(|| host.lane_error(way))?;
            let made = rdma.connect(&endpoint.rail(0)?, address, private_data, timeout)?;
            (Route::Rail(0), (Lane::Rdma(made.0), made.1))
        }
        #[cfg(not(feature = "rdma"))]
        Way::Rdma => return Err(host.lane_error(way)),
        Way::Shm => (Route::Shm, by(host, Route::Shm, &wanted, private_data, timeout)?),
        Way::Tcp => (Route::Tcp, by(host, Route::Tcp, &wanted, private_data, timeout)?),
    };
    Ok((HostConnection::new(host, lane, route, PeerRegions::default())?, reply))
}

/// Connects by a provider that the host has.
fn by(
    host: &Host,
    route: Route,
    wanted: &Wanted,
    private_data: &[u8],
    timeout: Duration,
) -> Result<(Lane, Vec<u8>), Error> {
    let Wanted { place: address, endpoint, .. } = wanted;
    let none = || host.lane_error(route.way());
    match route {
        Route::Shm => {
            let shm = host.0.shm.as_ref().ok_or_else(none)?;
            let made = shm.connect(&endpoint.shm()?, address, private_data, timeout)?;
            Ok((Lane::Shm(made.0), made.1))
        }
        Route::Tcp => {
            let tcp = host.0.tcp.as_ref().ok_or_else(none)?;
            let made = tcp.connect(&endpoint.tcp()?, address, private_data, timeout)?;
            Ok((Lane::Tcp(made.0), made.1))
        }
        #[cfg(feature = "rdma")]
        Route::Rail(rail) => {
            let (rail, rails) = (usize::from(rail), &host.0.rails);
            let (rdma, from) = rails.get(rail).zip(wanted.from).ok_or_else(none)?;
            let made = rdma.connect_at(&endpoint.rail(rail)?, from, address, private_data, timeout)?;
            rails.count(rail);
            Ok((Lane::Rdma(made.0), made.1))
        }
        #[cfg(not(feature = "rdma"))]
        Route::Rail(_) => Err(none()),
    }
}

impl Session {
    /// Connects, shakes hands, and hears what the server offers.
    fn begin(asked: &Asked) -> Result<Self, Error> {
        let addresses = tcp::look_up(asked.address, asked.name, asked.port)?;
        let socket = tcp::dial(&addresses, || asked.left()).map_err(|error| match error.kind() {
            ErrorKind::TimedOut | ErrorKind::WouldBlock => asked.late(),
            _ => asked.unreachable(error.to_string()),
        })?;
        socket.set_nodelay(true).map_err(Error::io("setsockopt(TCP_NODELAY)"))?;
        let (initiator, opening) = Initiator::start(asked.host.0.keys.first());
        (&socket).write_all(&opening).map_err(|error| asked.unreachable(error.to_string()))?;
        let mut heard = Vec::new();
        let answer = hear(&socket, &mut heard, asked)?;
        let cipher = initiator.finish(&answer).map_err(|reason| asked.no_session(reason))?;
        let mut session =
            Self { socket, cipher, heard, last: 0, same_host: false, offers: Vec::new(), rails: Vec::new() };
        let boot: Boot = asked.host.0.boot;
        session.say(asked, &Message::Hello { boot, rails: asked.host.told_rails() })?;
        match session.hear(asked)? {
            Message::Welcome { boot: theirs, offers, rails } => {
                session.same_host = theirs == boot;
                (session.offers, session.rails) = (offers, rails);
                Ok(session)
            }
            other => {
                Err(asked
                    .unreachable(format!("its first message is no welcome, but of kind {}", other.kind())))
            }
        }
    }

    /// Whether the server has not ended it, as far as this side has heard.
    fn lives(&mut self) -> bool {
        if self.socket.set_nonblocking(true).is_err() {
            return false;
        }
        let mut byte = [0];
        // Nothing is due: bytes are answers to lanes that were given up, and are read with the next answer.
        let lives = match self.socket.peek(&mut byte) {
            Ok(count) => count > 0,
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        };
        lives && self.socket.set_nonblocking(false).is_ok()
    }

    fn say(&mut self, asked: &Asked, message: &Message) -> Result<(), Error> {
        let frame = self.cipher.seal(&message.encode());
        // A server that does not read is no reason to wait for ever. 0 would mean that.
        let patience = asked.left().clamp(Duration::from_millis(1), Duration::from_secs(1 << 30));
        self.socket.set_write_timeout(Some(patience)).map_err(Error::io("setsockopt(SO_SNDTIMEO)"))?;
        self.socket.write_all(&frame).map_err(|error| asked.unreachable(error.to_string()))
    }

    fn hear(&mut self, asked: &Asked) -> Result<Message, Error> {
        let frame = hear(&self.socket, &mut self.heard, asked)?;
        let message = self.cipher.open(&frame).map_err(|reason| asked.no_session(reason))?;
        Message::decode(&message)
            .map_err(|error| asked.unreachable(format!("it sent a malformed message: {error}")))
    }

    /// Where a way begins; or why it is none.
    fn place(&self, asked: &Asked, way: Way) -> Result<Address, String> {
        if !asked.host.has(way) {
            return Err(match way {
                Way::Rdma if !asked.host.0.no_rdma.is_empty() => asked.host.0.no_rdma.clone(),
                _ => "this process does not use it".to_owned(),
            });
        }
        // Not by the name: it may lead to another server the next time.
        let server = || self.socket.peer_addr().map_err(|error| error.to_string());
        let offer = self.offers.iter().find(|offer| offer.way == way).ok_or("the server does not use it")?;
        match way {
            Way::Shm if !self.same_host => Err("the server is on another host".to_owned()),
            Way::Shm => Ok(Address::Shm(offer.place.clone().into())),
            Way::Tcp => server().map(|at| Address::Tcp { host: at.ip().to_string(), port: at.port() }),
            Way::Rdma => {
                server().map(|at| Address::Rdma { host: at.ip().to_string(), port: at.port(), from: None })
            }
        }
    }

    /// The lane's answer.
    fn answer(&mut self, asked: &Asked, number: u32) -> Result<(bool, PeerRegions, Vec<u8>), Error> {
        loop {
            match self.hear(asked)? {
                Message::Answer { number: of, accepted, regions, data } if of == number => {
                    return Ok((accepted, PeerRegions::told(regions), data));
                }
                // Of a lane by a way that led nowhere.
                Message::Answer { .. } => {}
                other => {
                    return Err(asked.unreachable(format!(
                        "instead of an answer it sent a message of kind {}",
                        other.kind()
                    )));
                }
            }
        }
    }

    fn token(&mut self, asked: &Asked, route: Route, lane: &Wanted) -> Result<Token, Error> {
        self.last = self.last.wrapping_add(1);
        let (number, way, rails) = (self.last, route.way(), lane.rails);
        let (regions, data) = (asked.host.0.regions.offers(route), lane.private_data.to_vec());
        self.say(asked, &Message::Lane { number, way, rails, regions, data })?;
        loop {
            match self.hear(asked)? {
                Message::Go { number, token } if number == self.last => return Ok(token),
                Message::Answer { number, .. } if number != self.last => {}
                other => {
                    return Err(asked.unreachable(format!(
                        "instead of a token it sent a message of kind {}",
                        other.kind()
                    )));
                }
            }
        }
    }

    /// Makes a lane by the best rails that lead there.
    #[cfg(feature = "rdma")]
    fn by_rails(
        &mut self,
        asked: &Asked,
        insists: bool,
        lane: Wanted,
    ) -> Result<(HostConnection, Vec<u8>), Failed> {
        let theirs = self.rails.clone();
        let mut picks = asked.host.0.rails.picks(&theirs, insists);
        let mut reasons = Vec::new();
        while let Some((pick, from)) = picks.next() {
            let rails = LaneRails { own: pick.own as u8, theirs: pick.theirs };
            let made = self.lane(asked, Route::Rail(rails.own), Wanted { rails, from: Some(&from), ..lane });
            match made {
                Err(Failed::Way(reason)) => reasons.push(format!("{}: {reason}", picks.name(&pick))),
                Err(Failed::Lane(Error::Timeout { .. })) => {}
                // The device refuses: it may be gone.
                Err(Failed::Lane(error @ Error::System { .. })) => {
                    reasons.push(format!("{}: {error}", picks.name(&pick)));
                }
                made => return made,
            }
            picks.failed(&pick);
            if asked.left().is_zero() {
                return Err(Failed::Lane(asked.late()));
            }
        }
        Err(Failed::Way(if reasons.is_empty() { picks.none() } else { reasons.join("; ") }))
    }

    #[cfg(not(feature = "rdma"))]
    fn by_rails(&mut self, asked: &Asked, _: bool, _: Wanted) -> Result<(HostConnection, Vec<u8>), Failed> {
        Err(Failed::Lane(asked.host.lane_error(Way::Rdma)))
    }

    /// Makes a lane.
    fn lane(
        &mut self,
        asked: &Asked,
        route: Route,
        lane: Wanted,
    ) -> Result<(HostConnection, Vec<u8>), Failed> {
        let token = self.token(asked, route, &lane).map_err(Failed::NoToken)?;
        let number = self.last;
        let refused =
            |private_data| Failed::Lane(Error::Refused { address: asked.address.to_string(), private_data });
        match by(asked.host, route, &lane, &token, asked.left()) {
            Ok((lane, _)) => {
                let (accepted, regions, data) = self.answer(asked, number).map_err(Failed::Lane)?;
                if !accepted {
                    return Err(refused(data));
                }
                let made = HostConnection::new(asked.host, lane, route, regions);
                Ok((made.map_err(Failed::Lane)?, data))
            }
            Err(Error::Refused { .. }) => {
                let deadline = Instant::now() + asked.left().min(LAST_WORD);
                let patient = Asked { deadline: Some(deadline), timeout: LAST_WORD, ..*asked };
                match self.answer(&patient, number) {
                    Ok((_, _, private_data)) => Err(refused(private_data)),
                    // The server has heard of no lane: somebody else listens there.
                    Err(Error::Timeout { .. }) => {
                        Err(Failed::Way("who listens there is not the server of this session".to_owned()))
                    }
                    Err(error) => Err(Failed::Lane(error)),
                }
            }
            Err(Error::Unreachable { reason, .. } | Error::NoDevice { reason }) => Err(Failed::Way(reason)),
            // Without a key shared memory is for one user.
            Err(error @ Error::OtherUser { .. }) => Err(Failed::Way(error.to_string())),
            Err(Error::Timeout { .. }) => Err(Failed::Lane(asked.late())),
            Err(error) => Err(Failed::Lane(error)),
        }
    }
}

/// The next frame, of which `heard` may hold a part.
fn hear(mut socket: &TcpStream, heard: &mut Vec<u8>, asked: &Asked) -> Result<Vec<u8>, Error> {
    loop {
        match piece(heard) {
            Piece::Frame(length) => {
                let frame = heard[2..2 + length].to_vec();
                heard.drain(..2 + length);
                return Ok(frame);
            }
            Piece::Refused(reason) => return Err(asked.no_session(reason)),
            Piece::Unfinished => {}
        }
        let left = asked.left();
        if left.is_zero() {
            return Err(asked.late());
        }
        let patience = left.min(Duration::from_secs(1 << 30));
        socket.set_read_timeout(Some(patience)).map_err(Error::io("setsockopt(SO_RCVTIMEO)"))?;
        let mut bytes = [0; 4096];
        match socket.read(&mut bytes) {
            Ok(0) => return Err(asked.unreachable("it closed the connection")),
            Ok(count) => heard.extend_from_slice(&bytes[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(asked.unreachable(error.to_string())),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Now, and not only when a child process that is being started has closed its copy of the socket, too.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}
