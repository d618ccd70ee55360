//! The client's end of a session, and the lanes that it makes.
//!
//! ```text
//!  ways with a handshake of their own              ways that take offers (`rdma`)
//!  LANES ─▶                                        LANES, an offer for each ─▶
//!        ◀─ GO: a token for each                   ◀─ ANSWER for each, with the server's offer
//!  connects all, with the tokens ─▶                READY ─▶
//!        ◀─ ANSWER for each
//! ```
//!
//! So what is waited for does not depend on how many lanes there are, but for the kernel's handshakes of TCP: those come one after the other,
//! each followed by what is wanted, because the server's door has few places for those who have not spoken. A token opens one lane, in place of private data; what the server's
//! program says goes by the session.

#[cfg(feature = "rdma")]
use std::ops::Range;
use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    HostConnection,
    asked::{Asked, Failed, Made, Spec},
    attendant::{Answer, Call, Unheard},
    connection::{Lane, Route},
    line::{Ear, Line},
    peer::this_process,
    region::PeerRegions,
};
#[cfg(feature = "rdma")]
use super::{
    rails::{Picked, Picks},
    request::tied,
};
#[cfg(feature = "rdma")]
use crate::transport::rdma::RdmaJoining;
use crate::{
    address::Address,
    error::Error,
    rails::Rail,
    session::{
        Way,
        noise::{Initiator, Piece, piece},
        wire::{Boot, LaneRails, Message, Offer, Token, Verdict, Wanted},
    },
    transport::{LaneSpec, shm, tcp},
};

/// A server that was not heard for so long is not asked for anything in the same session: a new one finds it sooner than the kernel tries
/// again, if its network is back. (A session that is set aside goes on as long as it has lanes.)
const STALE: Duration = Duration::from_secs(2);

/// How long a server may take for its last word on a lane that has been refused.
const LAST_WORD: Duration = Duration::from_secs(2);

/// Lanes that are offered in one message, and whose being ready is said in one at most.
#[cfg(feature = "rdma")]
const TOGETHER: usize = 16;

/// An established session.
pub(super) struct Session {
    call: Arc<Call>,
    server: SocketAddr,
    /// Number of the next lane.
    next: u32,
    same_host: bool,
    offers: Vec<Offer>,
    /// The server's.
    #[cfg_attr(not(feature = "rdma"), expect(dead_code))]
    rails: Vec<Rail>,
}

/// Why no more is heard of lanes that were asked for.
fn unheard(asked: &Asked<'_>, why: Unheard) -> Error {
    match why {
        Unheard::Late => asked.patience.late(),
        Unheard::Over(reason) => asked.patience.unreachable(reason),
    }
}

impl Session {
    /// Connects, shakes hands, and hears what the server offers.
    pub(super) fn begin(asked: &Asked<'_>) -> Result<Self, Error> {
        let addresses = tcp::look_up(asked.patience.address, asked.name, asked.port)?;
        let socket = tcp::dial(&addresses, || asked.patience.left()).map_err(|error| match error.kind() {
            ErrorKind::TimedOut | ErrorKind::WouldBlock => asked.patience.late(),
            _ => asked.patience.unreachable(error.to_string()),
        })?;
        let lost = |error: std::io::Error| asked.patience.unreachable(error.to_string());
        socket.set_nodelay(true).map_err(lost)?;
        let server = socket.peer_addr().map_err(lost)?;
        let (initiator, opening) = Initiator::start(asked.host.0.keys.first());
        // Neither this nor the hello is more than an empty socket takes.
        (&socket).write_all(&opening).map_err(lost)?;
        let mut heard = Vec::new();
        let answer = hear(&socket, &mut heard, asked)?;
        let mut cipher = initiator.finish(&answer).map_err(|reason| asked.no_session(reason))?;
        let boot: Boot = asked.host.0.boot;
        let hello = Message::Hello { boot, process: this_process(), rails: asked.host.told_rails() };
        let hello = cipher.seal(&hello.encode());
        (&socket).write_all(&hello).map_err(lost)?;
        let welcome = hear(&socket, &mut heard, asked)?;
        let welcome = cipher.open(&welcome).map_err(|reason| asked.no_session(reason))?;
        let (theirs, process, offers, rails) = match Message::decode(&welcome) {
            Ok(Message::Welcome { boot, process, offers, rails }) => (boot, process, offers, rails),
            Ok(other) => {
                return Err(asked
                    .patience
                    .unreachable(format!("its first message is no welcome, but of kind {}", other.kind())));
            }
            Err(error) => {
                return Err(asked.patience.unreachable(format!("it sent a malformed message: {error}")));
            }
        };
        let serve = |bell: &_| Line::new(socket, cipher, asked.patience.address.to_string(), bell);
        let call = asked.host.0.attend(|bell| {
            let line = serve(bell).map_err(lost)?;
            line.introduce(process);
            Ok((Call::new(line), Ear(heard)))
        })?;
        asked.host.note_peer(&call.line);
        Ok(Self { call, server, next: 0, same_host: theirs == boot, offers, rails })
    }

    /// Whether lanes are better made in a new one. If so it is set aside.
    pub(super) fn is_stale(&self) -> bool {
        if self.call.line.age() >= STALE {
            self.call.set_aside("the server was not heard any more");
        }
        self.call.over().is_some()
    }

    /// Whether a way may lead there; or why it does not.
    pub(super) fn leads(&self, asked: &Asked<'_>, way: Way) -> Result<(), String> {
        if !asked.host.has(way) {
            return Err(asked.host.why_not(way));
        }
        match self.offer(way) {
            None => Err("the server does not use it".to_owned()),
            Some(_) if way == Way::Shm && !self.same_host => Err("the server is on another host".to_owned()),
            Some(_) => Ok(()),
        }
    }

    fn offer(&self, way: Way) -> Option<&Offer> {
        self.offers.iter().find(|offer| offer.way == way)
    }

    /// Makes lanes by a way that may lead there, on which the user may insist.
    pub(super) fn lanes(
        &mut self,
        asked: &Asked<'_>,
        way: Way,
        #[cfg_attr(not(feature = "rdma"), expect(unused_variables))] insists: bool,
        lanes: &[Spec<'_>],
    ) -> Result<Vec<Made>, Failed> {
        match way {
            #[cfg(feature = "rdma")]
            Way::Rdma => self.by_rails(asked, insists, lanes),
            #[cfg(not(feature = "rdma"))]
            Way::Rdma => Err(Failed::Way(asked.host.why_not(way))),
            Way::Shm => {
                let place = self.offer(way).map(|offer| offer.place.clone()).expect("it leads there");
                let place = Address::Shm(place.into());
                let begin = |lane: &Spec<'_>, token: &Token| {
                    let endpoint = lane.endpoint.shm()?;
                    let lane = LaneSpec { endpoint: &endpoint, private_data: token, depth: lane.depth };
                    shm::Calling::begin(&place, lane, asked.patience.left())
                };
                let finish = |calling: shm::Calling<'_>| Ok(Lane::Shm(calling.finish()?.0));
                self.by_tokens(asked, Route::Shm, lanes, begin, finish)
            }
            Way::Tcp => {
                // Not by the name: it may lead to another server the next time.
                let server = self.server;
                let begin = |lane: &Spec<'_>, token: &Token| {
                    let endpoint = lane.endpoint.tcp()?;
                    let lane = LaneSpec { endpoint: &endpoint, private_data: token, depth: lane.depth };
                    let mut calling =
                        tcp::Calling::begin(asked.patience.address, server, lane, asked.patience.left())?;
                    // At once: the door has few places for those who have not said what they want.
                    calling.say()?;
                    Ok(calling)
                };
                let finish = |calling: tcp::Calling<'_>| Ok(Lane::Tcp(calling.finish()?.0));
                self.by_tokens(asked, Route::Tcp, lanes, begin, finish)
            }
        }
    }

    /// Numbers for so many lanes, of which the first is returned. What comes for them is kept from now on.
    fn number(&mut self, asked: &Asked<'_>, count: usize) -> Result<u32, Failed> {
        let first = self.next;
        self.next = first.checked_add(count as u32).filter(|next| *next < u32::MAX).ok_or_else(|| {
            self.call.set_aside("its lanes have no numbers left");
            Failed::NotAsked(asked.patience.unreachable("the session has no numbers left for lanes"))
        })?;
        self.call.want(first..self.next);
        Ok(first)
    }

    /// Asks for lanes.
    fn ask(
        &self,
        asked: &Asked<'_>,
        (route, rails): (Route, LaneRails),
        first: u32,
        lanes: Vec<Wanted>,
    ) -> Result<(), Error> {
        let (way, regions) = (route.way(), asked.host.0.regions.offers(route));
        let said = self.call.line.say(&Message::Lanes { first, way, rails, regions, lanes });
        said.map_err(|reason| asked.patience.unreachable(reason))
    }

    /// The lanes of a way with a handshake of its own, which `begin`s for each, and then `finish`es for each.
    fn by_tokens<C>(
        &mut self,
        asked: &Asked<'_>,
        route: Route,
        lanes: &[Spec<'_>],
        begin: impl Fn(&Spec<'_>, &Token) -> Result<C, Error>,
        finish: impl Fn(C) -> Result<Lane, Error>,
    ) -> Result<Vec<Made>, Failed> {
        let wanted = |lane: &Spec<'_>| Wanted { offer: Vec::new(), data: lane.private_data.to_vec() };
        let first = self.number(asked, lanes.len())?;
        let wanted = lanes.iter().map(wanted).collect();
        self.ask(asked, (route, LaneRails::default()), first, wanted).map_err(Failed::NotAsked)?;
        let tokens = self.call.tokens(asked.patience.deadline).map_err(|why| match why {
            Unheard::Late => Failed::Lane(asked.patience.late()),
            Unheard::Over(reason) => Failed::NotAsked(asked.patience.unreachable(reason)),
        })?;
        let failed = |number: u32, error| self.failed(asked, number, error);
        let mut calling = Vec::with_capacity(lanes.len());
        for (number, (lane, token)) in (first..).zip(lanes.iter().zip(&tokens)) {
            calling.push((number, begin(lane, token).map_err(|error| failed(number, error))?));
        }
        let mut made = Vec::with_capacity(lanes.len());
        for (number, calling) in calling {
            made.push((number, finish(calling).map_err(|error| failed(number, error))?));
        }
        let answered = |(number, lane)| {
            let answer = self.call.answer(number, asked.patience.deadline);
            let answer = answer.map_err(|why| Failed::Lane(unheard(asked, why)))?;
            let Answer { regions, data, .. } = accepted(asked, answer)?;
            let regions = PeerRegions::told(regions);
            let connection = HostConnection::new(asked.host, lane, route, regions).map_err(Failed::Lane)?;
            Ok((connection, data))
        };
        made.into_iter().map(answered).collect()
    }

    /// What it means that lane `number` was not made.
    fn failed(&self, asked: &Asked<'_>, number: u32, error: Error) -> Failed {
        match error {
            Error::Refused { .. } => {
                let deadline = Instant::now() + asked.patience.left().min(LAST_WORD);
                match self.call.answer(number, Some(deadline)) {
                    Ok(answer) => match accepted(asked, answer) {
                        Err(failed) => failed,
                        Ok(_) => {
                            Failed::Lane(asked.patience.unreachable("it refused a lane that it had accepted"))
                        }
                    },
                    // The server has heard of no lane: somebody else listens there.
                    Err(Unheard::Late) => {
                        Failed::Way("who listens there is not the server of this session".to_owned())
                    }
                    Err(why) => Failed::Lane(unheard(asked, why)),
                }
            }
            Error::Unreachable { reason, .. } | Error::NoDevice { reason } => Failed::Way(reason),
            // Without a key shared memory is for one user. Memory that cannot be pinned need not be pinned for other ways.
            error @ (Error::OtherUser { .. } | Error::Memlock { .. }) => Failed::Way(error.to_string()),
            Error::Timeout { .. } => Failed::Lane(asked.patience.late()),
            error => Failed::Lane(error),
        }
    }
}

/// The answer to a lane that was accepted.
fn accepted(asked: &Asked<'_>, answer: Answer) -> Result<Answer, Failed> {
    match answer.verdict {
        Verdict::Accepted => Ok(answer),
        Verdict::Refused => {
            let address = asked.patience.address.to_string();
            Err(Failed::Lane(Error::Refused { address, private_data: answer.data }))
        }
        Verdict::Impossible => Err(Failed::Way(String::from_utf8_lossy(&answer.data).into_owned())),
    }
}

#[cfg(feature = "rdma")]
impl Session {
    /// Lanes of RDMA, by the best rails that lead there. Each has its turn; those that go by the same rails are asked for together.
    fn by_rails(
        &mut self,
        asked: &Asked<'_>,
        insists: bool,
        lanes: &[Spec<'_>],
    ) -> Result<Vec<Made>, Failed> {
        let theirs = self.rails.clone();
        let mut groups: Vec<(Picks<'_>, Picked, Vec<usize>)> = Vec::new();
        for number in 0..lanes.len() {
            let mut picks = asked.host.0.rails.picks(&theirs, insists);
            let Some(picked) = picks.next() else { return Err(Failed::Way(picks.none())) };
            match groups.iter_mut().find(|(_, other, _)| *other == picked) {
                Some((.., numbers)) => numbers.push(number),
                None => groups.push((picks, picked, vec![number])),
            }
        }
        let mut made: Vec<Option<Made>> = lanes.iter().map(|_| None).collect();
        for (picks, picked, numbers) in groups {
            let lanes: Vec<_> = numbers.iter().map(|number| lanes[*number]).collect();
            let heard_of = made.iter().any(Option::is_some);
            let done = self.by_picks(asked, picks, picked, &lanes).map_err(|failed| match failed {
                // The server knows of the others.
                Failed::NotAsked(error) if heard_of => Failed::Lane(error),
                failed => failed,
            })?;
            numbers.into_iter().zip(done).for_each(|(number, lane)| made[number] = Some(lane));
        }
        Ok(made.into_iter().map(|lane| lane.expect("each is of one group")).collect())
    }

    /// Lanes by the rails that were picked, or by the next best that lead there.
    fn by_picks(
        &mut self,
        asked: &Asked<'_>,
        mut picks: Picks<'_>,
        first: Picked,
        lanes: &[Spec<'_>],
    ) -> Result<Vec<Made>, Failed> {
        let (mut next, mut reasons) = (Some(first), Vec::new());
        while let Some(picked) = next {
            match self.by_offers(asked, &picked, lanes) {
                Err(Failed::Way(reason)) => reasons.push(format!("{}: {reason}", picks.name(&picked))),
                Err(Failed::Lane(Error::Timeout { .. })) => {
                    picks.late(&picked);
                    return Err(Failed::Lane(asked.patience.late()));
                }
                made => return made,
            }
            picks.failed(&picked);
            next = picks.next();
        }
        Err(Failed::Way(if reasons.is_empty() { picks.none() } else { reasons.join("; ") }))
    }

    /// Lanes by rails that were picked: the offers of the queue pairs travel in the session. While more queue pairs are made, the server answers the offers of the
    /// first ones.
    fn by_offers(
        &mut self,
        asked: &Asked<'_>,
        picked: &Picked,
        lanes: &[Spec<'_>],
    ) -> Result<Vec<Made>, Failed> {
        let first = self.number(asked, lanes.len())?;
        let mut made = Vec::with_capacity(lanes.len());
        let result = self.offer_all(asked, picked, first, lanes).and_then(|joinings| {
            let mut ready = first;
            for (number, joining) in (first..).zip(joinings) {
                // The server's ends send nothing before they hear this. It is said at once if there is nothing else to do.
                if !self.call.has_answer(number) || number - ready >= TOGETHER as u32 {
                    self.say_ready(ready..number);
                    ready = number;
                }
                made.push(self.by_offer(asked, picked, number, joining)?);
            }
            self.say_ready(ready..self.next);
            Ok(())
        });
        if result.is_err() {
            // The server may have made its ends: it hears that nobody takes them. Those that are tied say so when they are dropped.
            let rest = first + made.len() as u32..self.next;
            rest.for_each(|number| self.call.line.untie(number));
        }
        result.map(|()| made)
    }

    /// Makes queue pairs, and offers them to the server.
    fn offer_all(
        &self,
        asked: &Asked<'_>,
        picked: &Picked,
        first: u32,
        lanes: &[Spec<'_>],
    ) -> Result<Vec<RdmaJoining>, Failed> {
        let line = &self.call.line;
        let mut joinings = Vec::with_capacity(lanes.len());
        for (number, lanes) in (first..).step_by(TOGETHER).zip(lanes.chunks(TOGETHER)) {
            let mut wanted = Vec::with_capacity(lanes.len());
            for (number, lane) in (number..).zip(lanes) {
                let joining = asked.host.0.rails.join(picked, lane.endpoint, lane.depth);
                let joining = joining.map_err(|error| match error {
                    Error::Limit { .. } => Failed::Lane(error),
                    error => Failed::Way(error.to_string()),
                })?;
                wanted.push(Wanted { offer: joining.offer(), data: lane.private_data.to_vec() });
                joinings.push(joining);
                // Before the server can speak of it.
                line.pend(number);
            }
            self.ask(asked, (picked.route(), picked.rails()), number, wanted).map_err(|error| {
                match number == first {
                    true => Failed::NotAsked(error),
                    false => Failed::Lane(error),
                }
            })?;
        }
        Ok(joinings)
    }

    fn say_ready(&self, lanes: Range<u32>) {
        if let Some(count) = u16::try_from(lanes.len()).ok().filter(|count| *count > 0) {
            // To a session that has ended nobody listens: the lanes have ended with it.
            let _ = self.call.line.say(&Message::Ready { first: lanes.start, count });
        }
    }

    fn by_offer(
        &self,
        asked: &Asked<'_>,
        picked: &Picked,
        number: u32,
        mut joining: RdmaJoining,
    ) -> Result<Made, Failed> {
        let answer = self.call.answer(number, asked.patience.deadline);
        let answer = answer.map_err(|why| Failed::Lane(unheard(asked, why)))?;
        let Answer { offer, regions, data, .. } = accepted(asked, answer)?;
        joining.finish(&offer).map_err(|error| Failed::Way(error.to_string()))?;
        let lane = Lane::Rdma(tied(&self.call.line, number, joining));
        let regions = PeerRegions::told(regions);
        let connection =
            HostConnection::new(asked.host, lane, picked.route(), regions).map_err(Failed::Lane)?;
        asked.host.0.rails.count(picked.route());
        Ok((connection, data))
    }
}

/// The next frame of a handshake, of which `heard` may hold a part.
fn hear(mut socket: &TcpStream, heard: &mut Vec<u8>, asked: &Asked<'_>) -> Result<Vec<u8>, Error> {
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
        let left = asked.patience.left();
        if left.is_zero() {
            return Err(asked.patience.late());
        }
        let patience = left.min(Duration::from_secs(1 << 30));
        socket.set_read_timeout(Some(patience)).map_err(Error::io("setsockopt(SO_RCVTIMEO)"))?;
        let mut bytes = [0; 4096];
        match socket.read(&mut bytes) {
            Ok(0) => return Err(asked.patience.unreachable("it closed the connection")),
            Ok(count) => heard.extend_from_slice(&bytes[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(asked.patience.unreachable(error.to_string())),
        }
    }
}
