//! The connection manager's thread: one per `Rdma`.
//!
//! It takes the events of all connections of the transport (a handshake has a channel of its own until it is done),
//! ends connections on the request of others, and asks idle peers for signs of life. It never waits for anybody:
//! it takes a send queue's lock only if it is free, and identifiers' locks only for a call.
//!
//! **Ends.** The thread holds the [`Core`]; all others hold a [`Manager`], with the last of which the thread is told to
//! stop. The last one may fall on the manager's own thread (it ends a connection whose user has gone meanwhile): then
//! nobody joins it.

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rdma_sys::rdma_cm_event_type;

use crate::{
    error::Error,
    transport::rdma::{
        id::{EventChannel, poll_readable},
        link::Link,
        queues::News,
    },
};

/// How often idle connections are looked for.
const TICK: Duration = Duration::from_millis(100);

struct Core {
    channel: Arc<EventChannel>,
    wake: OwnedFd,
    stop: AtomicBool,
    /// Connections by identifier. A link takes itself out before its identifier ends.
    links: Mutex<HashMap<usize, Weak<Link>>>,
    /// Connections to end.
    ending: Mutex<Vec<usize>>,
}

/// Handle of the manager's thread, which stops with it.
pub(super) struct Manager {
    core: Arc<Core>,
    thread: Option<JoinHandle<()>>,
}

impl Manager {
    pub(super) fn start() -> Result<Arc<Self>, Error> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let core = Arc::new(Core {
            channel: EventChannel::new()?,
            wake: rustix::event::eventfd(0, flags).map_err(|e| Error::io("eventfd()")(e.into()))?,
            stop: AtomicBool::new(false),
            links: Mutex::default(),
            ending: Mutex::default(),
        });
        let run = Arc::clone(&core);
        let thread = thread::Builder::new()
            .name("fervor-rdma-cm".to_owned())
            .spawn(move || run.run())
            .map_err(Error::io("starting the connection manager's thread"))?;
        Ok(Arc::new(Self { core, thread: Some(thread) }))
    }

    /// The channel to which connections migrate.
    pub(super) fn channel(&self) -> &Arc<EventChannel> {
        &self.core.channel
    }

    /// Takes a connection into care.
    pub(super) fn watch(&self, link: &Arc<Link>) {
        lock(&self.core.links).insert(link.key, Arc::downgrade(link));
    }

    /// Knows the identifier no more: it is about to end.
    pub(super) fn forget(&self, key: usize) {
        lock(&self.core.links).remove(&key);
    }

    /// Ends a connection, soon.
    pub(super) fn end(&self, key: usize) {
        lock(&self.core.ending).push(key);
        self.core.wake();
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        // SYNC POINT: the thread looks at this after each wake.
        self.core.stop.store(true, Ordering::Release);
        self.core.wake();
        if let Some(thread) = self.thread.take().filter(|of| of.thread().id() != thread::current().id()) {
            // A panic there has been reported where it happened.
            let _ = thread.join();
        }
    }
}

impl Core {
    fn wake(&self) {
        // It fails only when the counter is full: then the descriptor is readable anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn run(&self) {
        let mut tick = Instant::now() + TICK;
        while !self.stop.load(Ordering::Acquire) {
            let left = tick.saturating_duration_since(Instant::now());
            poll_readable(&[self.channel.fd(), self.wake.as_fd()], left);
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            while let Some(ended) = self.next_event() {
                ended.into_iter().for_each(|link| end(&link));
            }
            let asked = std::mem::take(&mut *lock(&self.ending));
            for key in asked {
                let link = self.link(key);
                link.iter().for_each(end);
            }
            let now = Instant::now();
            if now >= tick {
                tick = now + TICK;
                self.keep_alive(now);
            }
        }
    }

    fn link(&self, key: usize) -> Option<Arc<Link>> {
        lock(&self.links).get(&key).and_then(Weak::upgrade)
    }

    /// Takes an event, and returns the link that it ends, if it does and somebody still holds it. The link is looked up
    /// before the acknowledgement, so the identifier is still the one that the event means.
    #[expect(clippy::option_option, reason = "no event, an event of no consequence, an end")]
    fn next_event(&self) -> Option<Option<Arc<Link>>> {
        let taken = self.channel.take(|event| {
            let over = matches!(
                event.event,
                rdma_cm_event_type::RDMA_CM_EVENT_DISCONNECTED
                    | rdma_cm_event_type::RDMA_CM_EVENT_DEVICE_REMOVAL
                    | rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_ERROR
                    | rdma_cm_event_type::RDMA_CM_EVENT_UNREACHABLE
                    | rdma_cm_event_type::RDMA_CM_EVENT_REJECTED
            );
            if over { self.link(event.id as usize) } else { None }
        });
        // Without events connections still end: their requests fail. So an error here is no reason to panic.
        taken.unwrap_or(None)
    }

    fn keep_alive(&self, now: Instant) {
        let links: Vec<Arc<Link>> = lock(&self.links).values().filter_map(Weak::upgrade).collect();
        for link in links {
            link.keep_alive(now);
        }
    }
}

fn end(link: &Arc<Link>) {
    if link.end() {
        link.queues.tell(News::InError(link.id));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is one insertion, removal or exchange.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
