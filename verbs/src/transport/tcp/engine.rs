//! The thread that serves the sockets of one endpoint: it stands in for a NIC.
//!
//! It sleeps on an `epoll` of all of them. What a socket brings is executed at once (`inbound`), whether the endpoint is polled or not;
//! what that completes is published when the bytes at hand are taken in. It waits for nobody: a socket that takes no more is tried again
//! when it says so, one without receive buffers when the bell rings.
//!
//! **What the peer is told, and when.** What it READs goes out at once. That its requests have been executed can wait: as long as more
//! comes, but for no more than [`UNSAID`] bytes, or a quarter of its send queue. Else each look at the socket would cost both sides a
//! message, and who sends fast is looked at often. So a connection of which something was read is looked at once more before its peer is
//! told: with the `epoll` that comes next anyway. A read that gets less than it could take has emptied the socket: what comes after it
//! makes the `epoll` say so.
//!
//! **The end** of a connection is published here and nowhere else. So after it nothing of the connection changes memory: whatever does
//! is this thread. The socket is kept for [`FAREWELL`] more, unread bytes thrown away: were it closed with some left, the kernel would
//! throw away what is still on its way to the peer.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{ErrorKind, Read},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::{event::epoll, io::Errno};

use super::{
    inbound::{Inbound, Stop},
    link::{Event, Link, cause},
    sender::Flush,
    shared::{Orders, Shared},
    wire::FRAME,
};
use crate::{
    error::Error,
    transport::{ConnectionId, WorkError},
};

/// Bytes that are read at a time.
const CHUNK: usize = 256 << 10;
/// Bytes that one connection sends before the others are served.
const SERVED: usize = 1 << 20;
/// Bytes after which a peer is told that they have been taken.
const UNSAID: usize = 512 << 10;
/// How long a peer may take to take the last words.
const FAREWELL: Duration = Duration::from_secs(1);
/// Longest sleep while some peer does.
const FAREWELL_LOOK: Duration = Duration::from_millis(20);
/// A peer to which nothing was said for so long is said something.
const BEAT: Duration = Duration::from_millis(400);
/// Of the bell; connections are numbered from 1.
const BELL: u64 = 0;

/// A connection as the engine sees it.
#[derive(Debug)]
struct Served {
    link: Arc<Link>,
    inbound: Inbound,
    /// Bytes of which the rest has not come.
    carry: Vec<u8>,
    /// It is in `ready`.
    listed: bool,
    /// There may be something to send now.
    flush: bool,
    /// It is in `unsaid`: its peer is to be told what has been executed.
    late: bool,
    /// Requests of which the peer was told, or is about to be, and bytes that have come since.
    said: u64,
    unsaid: usize,
    /// The turn in which something was read.
    read_in: u64,
    /// The peer sends nothing more, says the kernel.
    ended: bool,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// A request of the peer is refused, which it is being told until then.
    Refusing(Instant),
    /// The end is published. The socket is closed when the peer has closed its own, and then at the latest.
    Over(Instant),
}

/// What is left of a connection after a visit.
enum Visit {
    /// The socket has no more now.
    Idle,
    More,
    Gone(WorkError),
    Stop(Stop),
}

/// See the module.
pub(super) struct Engine {
    shared: Arc<Shared>,
    epoll: OwnedFd,
    served: BTreeMap<u64, Served>,
    ready: VecDeque<u64>,
    unsaid: Vec<u64>,
    turn: u64,
    buffer: Vec<u8>,
    events: Vec<Event>,
    /// When the peers are to be said something.
    beat: Instant,
    /// Who was resumed first the last time.
    resumed: u64,
}

impl Engine {
    /// Starts the thread.
    pub(super) fn start(shared: &Arc<Shared>) -> Result<JoinHandle<()>, Error> {
        let failed = |call: &'static str| move |e: Errno| Error::io(call)(e.into());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed("epoll_create"))?;
        epoll::add(&epoll, &shared.bell, epoll::EventData::new_u64(BELL), epoll::EventFlags::IN)
            .map_err(failed("epoll_ctl(eventfd)"))?;
        let engine = Self {
            shared: shared.clone(),
            epoll,
            served: BTreeMap::new(),
            ready: VecDeque::new(),
            unsaid: Vec::new(),
            turn: 0,
            buffer: vec![0; CHUNK],
            events: Vec::new(),
            beat: Instant::now(),
            resumed: 0,
        };
        std::thread::Builder::new()
            .name("fervor-tcp".to_owned())
            .spawn(move || engine.run())
            .map_err(Error::io("starting thread `fervor-tcp`"))
    }

    fn run(mut self) {
        let mut space = [MaybeUninit::<epoll::Event>::uninit(); 64];
        loop {
            self.turn += 1;
            let Ok((events, _)) = epoll::wait(&self.epoll, &mut space, self.patience().as_ref()) else {
                continue; // a signal
            };
            let mut rung = false;
            for event in events.iter() {
                match event.data.u64() {
                    BELL => rung = true,
                    token => self.woken(token, event.flags),
                }
            }
            if rung && !self.obey() {
                return self.leave_all();
            }
            for _ in 0..self.ready.len() {
                let Some(token) = self.ready.pop_front() else { break };
                self.visit(token);
            }
            self.speak();
            self.bid_farewell();
            self.keep_alive();
        }
    }

    /// How long to sleep.
    fn patience(&self) -> Option<rustix::fs::Timespec> {
        let closing = || self.served.values().any(|served| served.phase != Phase::Open);
        let time = match () {
            () if !self.ready.is_empty() || !self.unsaid.is_empty() => Duration::ZERO,
            () if self.served.is_empty() => return None,
            () if closing() => FAREWELL_LOOK,
            () => self.beat.saturating_duration_since(Instant::now()),
        };
        Some(rustix::fs::Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() })
    }

    /// Says something where nothing was said: else a host that is gone would not be missed.
    fn keep_alive(&mut self) {
        let now = Instant::now();
        if now >= self.beat {
            self.beat = now + BEAT;
            for (token, served) in &mut self.served {
                if served.phase == Phase::Open && served.link.beat(SERVED) == Flush::More {
                    served.flush = true;
                    list(&mut self.ready, *token, served);
                }
            }
        }
    }

    /// A socket has something, or room, or ended.
    fn woken(&mut self, token: u64, flags: epoll::EventFlags) {
        let Some(served) = self.served.get_mut(&token) else { return };
        let over = matches!(served.phase, Phase::Over(_));
        served.ended |=
            flags.intersects(epoll::EventFlags::RDHUP | epoll::EventFlags::HUP | epoll::EventFlags::ERR);
        if flags.contains(epoll::EventFlags::OUT) && !over {
            served.flush |= served.link.has_room(SERVED) == Flush::More;
        }
        if served.flush || flags.intersects(!epoll::EventFlags::OUT) {
            list(&mut self.ready, token, served);
        }
    }

    /// Does what others ask for. `false`: the endpoint is gone.
    fn obey(&mut self) -> bool {
        let mut count = [0; 8];
        // It counts how often the bell was rung, and is 0 again.
        let _ = rustix::io::read(&self.shared.bell, &mut count);
        let (arrivals, leaving, sending, closed) = {
            let mut orders = self.shared.orders();
            let Orders { arrivals, leaving, sending, closed, .. } = &mut *orders;
            // Together: whoever arrives later than that sees that the endpoint is closed.
            (std::mem::take(arrivals), std::mem::take(leaving), std::mem::take(sending), *closed)
        };
        arrivals.into_iter().for_each(|link| self.welcome(link));
        for ConnectionId(id) in leaving {
            if let Some(served) = self.served.get(&id.into())
                && !matches!(served.phase, Phase::Over(_))
            {
                self.end(id.into(), WorkError::Disconnected, None);
            }
        }
        for ConnectionId(id) in sending {
            if let Some(served) = self.served.get_mut(&id.into()) {
                served.flush = true;
                list(&mut self.ready, id.into(), served);
            }
        }
        let waiting = self.served.iter().filter(|(_, served)| served.inbound.is_waiting());
        let mut waiting: Vec<u64> = waiting.map(|(token, _)| *token).collect();
        // Each is the first one in turn.
        let next = waiting.partition_point(|token| *token <= self.resumed);
        let first = next % waiting.len().max(1);
        waiting.rotate_left(first);
        self.resumed = waiting.first().copied().unwrap_or_default();
        waiting.into_iter().for_each(|token| self.resume(token));
        !closed
    }

    fn welcome(&mut self, link: Arc<Link>) {
        let token = u64::from(link.id.0);
        let flags =
            epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        let added = epoll::add(&self.epoll, &link.socket, epoll::EventData::new_u64(token), flags);
        let served = Served {
            link,
            inbound: Inbound::new(),
            carry: Vec::new(),
            listed: false,
            flush: false,
            late: false,
            said: 0,
            unsaid: 0,
            read_in: 0,
            ended: false,
            phase: Phase::Open,
        };
        self.served.insert(token, served);
        match added {
            Ok(()) => list(&mut self.ready, token, self.served.get_mut(&token).expect("it was inserted")),
            Err(error) => self.end(token, WorkError::Other(error.raw_os_error() as u32), None),
        }
    }

    /// A receive buffer may be free.
    fn resume(&mut self, token: u64) {
        let Some(served) = self.served.get_mut(&token) else { return };
        if served.phase != Phase::Open {
            return;
        }
        match served.inbound.resume(&self.shared, &served.link, &mut self.events) {
            Ok(rest) => {
                if !rest.is_empty() {
                    served.carry = rest;
                }
                // It may not have been read for a while.
                list(&mut self.ready, token, served);
                self.after(token, Visit::Idle);
            }
            Err(stop) => self.after(token, Visit::Stop(stop)),
        }
    }

    /// Takes in what a socket has, once.
    fn visit(&mut self, token: u64) {
        let Some(served) = self.served.get_mut(&token) else { return };
        served.listed = false;
        let visit = match served.phase {
            Phase::Open => {
                let before = served.unsaid;
                let visit = served.read(&self.shared, &mut self.buffer, &mut self.events);
                if served.unsaid > before {
                    served.read_in = self.turn;
                }
                visit
            }
            // Thrown away.
            Phase::Refusing(_) | Phase::Over(_) => {
                read_some(&served.link, &mut self.buffer).map_or_else(|v| v, |_| Visit::More)
            }
        };
        self.after(token, visit);
    }

    fn after(&mut self, token: u64, visit: Visit) {
        self.shared.publish(&mut self.events);
        let Some(served) = self.served.get_mut(&token) else { return };
        if served.phase == Phase::Open {
            served.flush |= std::mem::take(&mut served.inbound.replied);
            if served.flush || served.is_to_be_told() {
                served.tell();
            } else if served.said != served.link.executed_so_far() && !served.late {
                served.late = true;
                self.unsaid.push(token);
            }
            if served.flush {
                list(&mut self.ready, token, served);
            }
        }
        match (visit, served.phase) {
            (Visit::Idle, _) => {}
            (Visit::More, _) => list(&mut self.ready, token, served),
            (Visit::Gone(_), Phase::Over(_)) => drop(self.served.remove(&token)),
            (Visit::Gone(cause), _) => self.end(token, cause, None),
            (Visit::Stop(Stop::Refuse(error)), _) => {
                served.link.refuse(error);
                served.phase = Phase::Refusing(Instant::now() + FAREWELL);
                self.bid_farewell();
            }
            (Visit::Stop(Stop::Refused(error)), _) => self.end(token, error, Some(error)),
            (Visit::Stop(Stop::Corrupt), _) => self.end(token, WorkError::RemoteInvalid, None),
        }
    }

    /// Tells the peers of which nothing more has come.
    fn speak(&mut self) {
        let (turn, served, ready) = (self.turn, &mut self.served, &mut self.ready);
        self.unsaid.retain(|token| {
            let Some(served) = served.get_mut(token).filter(|served| served.phase == Phase::Open) else {
                return false;
            };
            served.late = served.read_in == turn && served.said != served.link.executed_so_far();
            if !served.late {
                served.tell();
                if served.flush {
                    list(ready, *token, served);
                }
            }
            served.late
        });
    }

    /// Publishes the end of a connection.
    fn end(&mut self, token: u64, cause: WorkError, refused: Option<WorkError>) {
        let Some(served) = self.served.get_mut(&token) else { return };
        served.link.end(cause, refused, &mut self.events);
        if let Some(buffer) = served.inbound.abandon() {
            self.shared.give_back(std::iter::once(buffer));
        }
        // Its place is free when its end can be polled.
        self.shared.vacate();
        self.shared.publish(&mut self.events);
        served.phase = Phase::Over(Instant::now() + FAREWELL);
        // Whoever does not listen any more, and whose bytes are not awaited, is forgotten at the first look.
        list(&mut self.ready, token, served);
    }

    /// Looks after those who are at their end.
    fn bid_farewell(&mut self) {
        if self.served.values().all(|served| served.phase == Phase::Open) {
            return;
        }
        let now = Instant::now();
        let (mut told, mut over, mut late) = (Vec::new(), Vec::new(), Vec::new());
        for (token, served) in &mut self.served {
            match served.phase {
                Phase::Open => {}
                Phase::Refusing(until) => match served.link.flush(SERVED) {
                    Flush::Done if served.link.has_sent_all() => told.push(*token),
                    _ if now >= until => told.push(*token),
                    Flush::More => list(&mut self.ready, *token, served),
                    Flush::Done | Flush::Blocked => {}
                },
                Phase::Over(until) if now >= until => late.push(*token),
                Phase::Over(_) => over.push(*token),
            }
        }
        // Those that have gone first are forgotten first, when there are many.
        let many = over.len().saturating_sub(self.shared.config.connections);
        late.extend(over.drain(..many));
        told.into_iter().for_each(|token| self.end(token, WorkError::Disconnected, None));
        late.into_iter().for_each(|token| drop(self.served.remove(&token)));
    }

    /// The endpoint is gone, and with it all connections.
    fn leave_all(&mut self) {
        for served in self.served.values() {
            if !matches!(served.phase, Phase::Over(_)) {
                served.link.end(WorkError::Disconnected, None, &mut self.events);
            }
        }
    }
}

impl Served {
    /// Whether so much has been executed that its peer is to hear of it.
    fn is_to_be_told(&self) -> bool {
        let requests = self.link.executed_so_far() - self.said;
        requests > 0 && (self.unsaid >= UNSAID || requests >= self.link.peer_depth / 4)
    }

    /// Sends what waits, and how many requests have been executed.
    fn tell(&mut self) {
        (self.said, self.unsaid) = (self.link.executed_so_far(), 0);
        self.flush = self.link.flush(SERVED) == Flush::More;
    }

    fn read(&mut self, shared: &Shared, buffer: &mut [u8], events: &mut Vec<Event>) -> Visit {
        if self.inbound.is_full() {
            // It is visited again when there is a receive buffer, or at its end: what it has not read is not executed then.
            return if self.ended { Visit::Gone(WorkError::Disconnected) } else { Visit::Idle };
        }
        let kept = self.carry.len();
        buffer[..kept].copy_from_slice(&self.carry);
        let count = match read_some(&self.link, &mut buffer[kept..]) {
            Ok(count) => count,
            Err(visit) => return visit,
        };
        let bytes = &buffer[..kept + count];
        self.unsaid += count;
        let emptied = kept + count < buffer.len() && !self.ended;
        match self.inbound.take(shared, &self.link, bytes, events) {
            Ok(taken) => {
                self.carry.clear();
                self.carry.extend_from_slice(&bytes[taken..]);
                debug_assert!(self.carry.len() < FRAME);
                if emptied { Visit::Idle } else { Visit::More }
            }
            Err(stop) => Visit::Stop(stop),
        }
    }
}

/// Reads what there is, or says why there is nothing.
fn read_some(link: &Link, buffer: &mut [u8]) -> Result<usize, Visit> {
    loop {
        return match (&link.socket).read(buffer) {
            Ok(0) => Err(Visit::Gone(WorkError::Disconnected)),
            Ok(count) => Ok(count),
            Err(error) => match error.kind() {
                ErrorKind::Interrupted => continue,
                ErrorKind::WouldBlock => Err(Visit::Idle),
                _ => Err(Visit::Gone(cause(&error))),
            },
        };
    }
}

fn list(ready: &mut VecDeque<u64>, token: u64, served: &mut Served) {
    if !served.listed {
        served.listed = true;
        ready.push_back(token);
    }
}
