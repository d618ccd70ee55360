//! The thread that notices dead peers: one per transport, started with the first connection, asleep on all
//! sockets of its connections. A socket's end means that the peer disconnected or that its process died (the
//! kernel closes what a killed process had open); the thread then ends the connection and wakes its endpoint.

use std::{
    collections::HashMap,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread,
};

use rustix::{
    event::{EventfdFlags, epoll, eventfd},
    io::Errno,
};

use super::link::Link;
use crate::error::Error;

/// Of the eventfd that ends the thread.
const STOP: u64 = 0;

/// The watched connections.
#[derive(Debug)]
pub(super) struct Watch {
    epoll: OwnedFd,
    stop: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    started: bool,
    last_token: u64,
    links: HashMap<u64, Weak<Link>>,
}

impl Watch {
    pub(super) fn new() -> Result<Arc<Self>, Error> {
        let failed = |call: &'static str| move |e: Errno| Error::io(call)(e.into());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed("epoll_create"))?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed("eventfd"))?;
        epoll::add(&epoll, &stop, epoll::EventData::new_u64(STOP), epoll::EventFlags::IN)
            .map_err(failed("epoll_ctl(eventfd)"))?;
        Ok(Arc::new(Self { epoll, stop, state: Mutex::default() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Changes are single insertions and removals: a panic leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches the socket of `link`.
    pub(super) fn add(self: &Arc<Self>, link: &Arc<Link>) -> Result<(), Error> {
        let mut state = self.lock();
        if !state.started {
            let watch = self.clone();
            thread::Builder::new()
                .name("fervor-shm-watch".to_owned())
                .spawn(move || watch.run())
                .map_err(Error::io("starting thread `fervor-shm-watch`"))?;
            state.started = true;
        }
        state.links.retain(|_, link| link.strong_count() > 0);
        state.last_token += 1;
        let token = state.last_token;
        state.links.insert(token, Arc::downgrade(link));
        // An end that came already is reported at once.
        let flags = epoll::EventFlags::RDHUP | epoll::EventFlags::ONESHOT;
        epoll::add(&self.epoll, link.socket(), epoll::EventData::new_u64(token), flags).map_err(|e| {
            state.links.remove(&token);
            Error::io("epoll_ctl(socket)")(e.into())
        })
    }

    /// Ends the thread, when the transport and all its connections are gone.
    pub(super) fn stop(&self) {
        // Fails only if the counter is at its end, and then the thread is awake already.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }

    fn run(&self) {
        let mut space = [MaybeUninit::<epoll::Event>::uninit(); 64];
        loop {
            let Ok((events, _)) = epoll::wait(&self.epoll, &mut space, None) else {
                continue; // a signal
            };
            for event in events.iter() {
                let token = event.data.u64();
                if token == STOP {
                    return;
                }
                let link = self.lock().links.remove(&token);
                if let Some(link) = link.and_then(|link| link.upgrade()) {
                    link.close_by_peer();
                }
            }
        }
    }
}
