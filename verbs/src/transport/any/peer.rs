//! Who is at the other end of a session, and whether it is heard.
//!
//! A process that has ended is told of by its socket, in milliseconds. One that is stopped, or whose host or network is gone, says
//! nothing. So each end says something once a [`BEAT`], by a thread that does nothing else, and an end that has heard nothing for
//! [`SILENCE`] is *silent*. That is said once, and once that it is heard again; it ends nothing: who was stopped may go on.
//!
//! **An end that was stopped itself accuses nobody.** What a peer said meanwhile lies in the socket. Its silence counts up to the moment
//! *before* the look at the sockets that found nothing of it, and not up to the moment at which the thread gets to count.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::session::wire::{MAX_HOST, Process};

/// Time between two signs of life.
pub(super) const BEAT: Duration = Duration::from_secs(1);
/// A peer that was not heard for so long is silent.
pub(super) const SILENCE: Duration = Duration::from_secs(5);

/// A process that this one has a session with: see [`Host::peers`](super::Host::peers).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Where it is: the URL of a server, the socket address of a client.
    pub address: String,
    /// Its host, as that calls itself.
    pub host: String,
    /// Number of the process there.
    pub process: u32,
    /// Since when it has said nothing, if that is more than five seconds: it is stopped, or its host or its network is gone.
    pub silent: Option<Duration>,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} on {} ({})", self.process, self.host, self.address)
    }
}

/// What this process tells its peers about itself.
pub(super) fn this_process() -> Process {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let mut host: String = name.trim().chars().filter(|char| !char.is_control()).collect();
    while host.len() > MAX_HOST {
        host.pop();
    }
    Process { host, pid: std::process::id() }
}

/// When a peer was heard. Written by the thread that serves the session.
pub(super) struct Pulse(Mutex<Heard>);

struct Heard {
    last: Instant,
    /// It is silent since then.
    silent: Option<Instant>,
}

/// What is to be said of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// It has not been heard for so long.
    Silent(Duration),
    /// It is heard again, after so long.
    Heard(Duration),
}

impl fmt::Display for News {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent(time) => write!(
                f,
                "has said nothing for {:.1} s: it is stopped, or its host or the network to it is gone",
                time.as_secs_f64()
            ),
            Self::Heard(time) => write!(f, "is heard again, after {:.1} s", time.as_secs_f64()),
        }
    }
}

impl Pulse {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Heard { last: Instant::now(), silent: None }))
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It was heard just now.
    pub(super) fn heard(&self, now: Instant) -> Option<News> {
        let mut heard = self.lock();
        heard.last = now;
        heard.silent.take().map(|since| News::Heard(now.saturating_duration_since(since)))
    }

    /// It was not heard in a look that began at `looked`.
    pub(super) fn unheard(&self, looked: Instant) -> Option<News> {
        let mut heard = self.lock();
        let time = looked.saturating_duration_since(heard.last);
        if heard.silent.is_some() || time < SILENCE {
            return None;
        }
        heard.silent = Some(heard.last);
        Some(News::Silent(time))
    }

    /// How long it has been silent, if it is.
    pub(super) fn silent(&self) -> Option<Duration> {
        self.lock().silent.map(|since| since.elapsed())
    }

    /// How long ago it was heard.
    pub(super) fn age(&self) -> Duration {
        self.lock().last.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_said_once_and_its_end_once() {
        let pulse = Pulse::new();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(pulse.heard(start), None);
        assert_eq!(pulse.unheard(at(4)), None);
        assert_eq!(pulse.silent(), None);
        assert_eq!(pulse.unheard(at(6)), Some(News::Silent(Duration::from_secs(6))));
        assert!(pulse.silent().is_some());
        assert_eq!(pulse.unheard(at(7)), None);
        assert_eq!(pulse.heard(at(9)), Some(News::Heard(Duration::from_secs(9))));
        assert_eq!((pulse.heard(at(10)), pulse.silent()), (None, None));
        assert_eq!(pulse.unheard(at(14)), None);
        assert_eq!(pulse.unheard(at(15)), Some(News::Silent(SILENCE)));
    }

    #[test]
    fn the_lines_say_how_long() {
        let text = News::Silent(Duration::from_millis(5100)).to_string();
        assert!(text.contains("nothing for 5.1 s") && text.contains("stopped"), "{text}");
        assert_eq!(News::Heard(Duration::from_secs(9)).to_string(), "is heard again, after 9.0 s");
        assert!(this_process().pid == std::process::id() && this_process().host.len() <= MAX_HOST);
    }
}
