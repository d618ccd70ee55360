//! Those who have connected to a listener and have not yet said what they want.
//!
//! **Nobody holds the door.** Up to [`MAX_STRANGERS`] are heard side by side; each has [`STRANGER_PATIENCE`] to say all. When there is no
//! place for one more, or no descriptor, whoever has been silent for the longest time gives way. So whoever wants to keep
//! others out has to come back faster than they need to say a few packets, which have usually been said before they are
//! let in.
//!
//! A stranger costs its socket ([`super::wire`] says why no more), and it is looked at only when something has come from it: the
//! sockets are watched for *changes* (edge-triggered), or one that has said half of its opening would be reported as ready for
//! ever.

use std::{
    collections::{BTreeMap, VecDeque},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{Timespec, epoll},
    io::Errno,
};

use super::{
    hear::{Heard, Progress, hear},
    mapping::Mappings,
};
use crate::error::Error;

/// Strangers that a listener hears at a time, and for how long: as those of `tcp`.
pub(super) const MAX_STRANGERS: usize = 256;
pub(super) const STRANGER_PATIENCE: Duration = Duration::from_secs(5);

/// Of the listening socket. Strangers are numbered from 1.
const LISTENING: u64 = 0;

/// One of them.
struct Stranger {
    socket: OwnedFd,
    user: u32,
    deadline: Instant,
    /// When something last came from it.
    heard: Instant,
    /// It is in `ready`.
    ready: bool,
}

/// One who has said all.
pub(super) struct Visitor {
    pub(super) socket: OwnedFd,
    pub(super) user: u32,
    pub(super) heard: Heard,
}

/// All of them.
pub(super) struct Strangers {
    epoll: OwnedFd,
    /// In the order in which they came.
    waiting: BTreeMap<u64, Stranger>,
    /// Those from whom something has come, in turn; and some who are gone.
    ready: VecDeque<u64>,
    last: u64,
}

impl Strangers {
    /// None yet, at this listening socket.
    pub(super) fn new(listening: &OwnedFd) -> Result<Self, Error> {
        let failed = |call: &'static str| move |e: Errno| Error::io(call)(e.into());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed("epoll_create"))?;
        epoll::add(&epoll, listening, epoll::EventData::new_u64(LISTENING), epoll::EventFlags::IN)
            .map_err(failed("epoll_ctl(listener)"))?;
        Ok(Self { epoll, waiting: BTreeMap::new(), ready: VecDeque::new(), last: 0 })
    }

    /// Lets one more in, whose socket is that of a process of this user. It will be heard soon.
    ///
    /// # Errors
    /// The system can watch no more sockets.
    pub(super) fn admit(&mut self, socket: OwnedFd, user: u32) -> Result<(), Error> {
        if self.waiting.len() >= MAX_STRANGERS {
            self.dismiss_longest_silent();
        }
        let now = Instant::now();
        let token = self.last + 1;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        epoll::add(&self.epoll, &socket, epoll::EventData::new_u64(token), flags)
            .map_err(|e| Error::io("epoll_ctl(stranger)")(e.into()))?;
        self.last = token;
        let deadline = now + STRANGER_PATIENCE;
        self.waiting.insert(token, Stranger { socket, user, deadline, heard: now, ready: true });
        self.ready.push_back(token);
        Ok(())
    }

    /// Makes room. `false`: there is nobody.
    pub(super) fn dismiss_longest_silent(&mut self) -> bool {
        let silent = self.waiting.iter().min_by_key(|(_, stranger)| stranger.heard);
        let Some(token) = silent.map(|(&token, _)| token) else { return false };
        self.waiting.remove(&token);
        true
    }

    /// Hears those from whom something has come, up to the first who has said all. Drops those who talk nonsense, have left, or
    /// have taken too long.
    pub(super) fn hear(&mut self, mappings: &Mappings) -> Option<Visitor> {
        while let Some(token) = self.ready.pop_front() {
            let Some(stranger) = self.waiting.get_mut(&token) else { continue };
            stranger.ready = false;
            match hear(&stranger.socket, mappings) {
                Progress::Silent => {}
                Progress::Unfinished => stranger.heard = Instant::now(),
                Progress::Bad(_) => drop(self.waiting.remove(&token)),
                Progress::Complete(heard) => {
                    let Stranger { socket, user, .. } = self.waiting.remove(&token)?;
                    // Its socket lives on, and is watched by somebody else.
                    let _ = epoll::delete(&self.epoll, &socket);
                    return Some(Visitor { socket, user, heard });
                }
            }
        }
        None
    }

    /// Drops those whose time is over.
    pub(super) fn expire(&mut self) {
        let now = Instant::now();
        // All have the same patience, so the first to come is the first to go.
        while self.waiting.first_key_value().is_some_and(|(_, stranger)| stranger.deadline <= now) {
            self.waiting.pop_first();
        }
    }

    /// Waits until something may have come, from a stranger or to the listening socket; at most until somebody's time is over.
    pub(super) fn wait(&mut self, timeout: Duration) -> Result<(), Error> {
        let first = self.waiting.first_key_value();
        let patience = first.map(|(_, stranger)| stranger.deadline.saturating_duration_since(Instant::now()));
        let timeout =
            if self.ready.is_empty() { timeout.min(patience.unwrap_or(timeout)) } else { Duration::ZERO };
        let mut space = [MaybeUninit::<epoll::Event>::uninit(); 64];
        let events = match epoll::wait(&self.epoll, &mut space, Timespec::try_from(timeout).ok().as_ref()) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(()),
            Err(e) => return Err(Error::io("epoll_wait(listener)")(e.into())),
        };
        let gone = epoll::EventFlags::RDHUP | epoll::EventFlags::HUP | epoll::EventFlags::ERR;
        for event in events.iter() {
            let (token, flags) = (event.data.u64(), event.flags);
            let Some(stranger) = self.waiting.get_mut(&token) else { continue };
            if flags.intersects(gone) {
                // Nobody is there to be answered.
                self.waiting.remove(&token);
            } else if !stranger.ready {
                stranger.ready = true;
                self.ready.push_back(token);
            }
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }
}
