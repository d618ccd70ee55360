//! Endpoints: what becomes of completions between the inner endpoint and the user.
//!
//! ```text
//!  inner poll ─▶ early?      its connection is not known yet: it waits for it
//!             ─▶ End         errors of a broken connection; what is not the user's is dropped
//!             ─▶ held until  now, or later if a delay strikes; in order for each connection and kind
//!             ─▶ user
//! ```

use std::{
    collections::BTreeMap,
    mem,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use super::{
    end::End,
    node::{Node, Shared, lock},
    plan::{Fault, Shown},
};
use crate::transport::{
    self, Attach as _, Completion, ConnectionId, Endpoint as _, ReceiveBuffer, Transport, sim::random::Random,
};

/// The connections of an endpoint: entered by who makes them, looked up by who polls.
pub(super) struct Book<C> {
    ends: BTreeMap<ConnectionId, Shared<C>>,
    /// Completions of connections that have not been entered yet.
    early: Vec<Completion>,
}

impl<C> Default for Book<C> {
    fn default() -> Self {
        Self { ends: BTreeMap::new(), early: Vec::new() }
    }
}

fn connection(completion: &Completion) -> ConnectionId {
    match completion {
        Completion::Work { connection, .. }
        | Completion::Received { connection, .. }
        | Completion::WriteImmediate { connection, .. }
        | Completion::Disconnected { connection, .. } => *connection,
    }
}

/// Handle of an [`Endpoint`].
pub struct Attach<T: Transport> {
    pub(super) inner: T::Attach,
    book: Arc<Mutex<Book<T::Connection>>>,
}

impl<T: Transport> Clone for Attach<T> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), book: self.book.clone() }
    }
}

impl<T: Transport> Attach<T> {
    /// Enters a connection.
    pub(super) fn enter(&self, id: ConnectionId, end: &Shared<T::Connection>) {
        let mut book = lock(&self.book);
        book.ends.insert(id, end.clone());
        let expected = book.early.iter().any(|completion| connection(completion) == id);
        drop(book);
        if expected {
            self.inner.wake();
        }
    }
}

impl<T: Transport> transport::Attach for Attach<T> {
    fn wake(&self) {
        self.inner.wake();
    }
}

/// A completion that is to be handed out, and the connection in whose send queue the user takes it to be.
struct Held<C> {
    completion: Completion,
    counted: Option<Shared<C>>,
}

/// A completion queue of a faulty node.
pub struct Endpoint<T: Transport> {
    inner: T::Endpoint,
    node: Arc<Node<T::Connection>>,
    transport: T,
    book: Arc<Mutex<Book<T::Connection>>>,
    random: Random,
    delays: Vec<(Shown, u64, Duration)>,
    polled: Vec<Completion>,
    /// By the time from which on they show, and a number that tells those of one time apart.
    held: BTreeMap<(Duration, u64), Held<T::Connection>>,
    count: u64,
}

impl<T: Transport> Endpoint<T> {
    pub(super) fn new(inner: T::Endpoint, node: &Arc<Node<T::Connection>>, transport: &T) -> Self {
        let number = node.endpoints.fetch_add(1, Ordering::Relaxed);
        let delay = |fault: &Fault| match *fault {
            Fault::Delay { of, one_in, longest } => Some((of, one_in, longest)),
            _ => None,
        };
        Self {
            inner,
            node: node.clone(),
            transport: transport.clone(),
            book: Arc::default(),
            random: Random::new(node.plan.seed ^ (number + 1) << 48),
            delays: node.plan.faults.iter().filter_map(delay).collect(),
            polled: Vec::new(),
            held: BTreeMap::new(),
            count: 0,
        }
    }

    /// For how long a completion of this kind is held back.
    fn delay(&mut self, of: Shown) -> Duration {
        let Self { random, delays, .. } = self;
        let draw = |&(_, one_in, longest): &(Shown, u64, Duration)| {
            let longest = u64::try_from(longest.as_nanos()).unwrap_or(u64::MAX);
            random.one_in(one_in.max(1)).then(|| Duration::from_nanos(random.spread(1.min(longest), longest)))
        };
        delays.iter().filter(|(what, ..)| *what == of).filter_map(draw).max().unwrap_or_default()
    }

    /// Completions whose connection is known by now, oldest first; the others stay.
    fn sort_out(&mut self) -> Vec<(Shared<T::Connection>, Completion)> {
        let mut book = lock(&self.book);
        let mut known = Vec::new();
        let mut all = mem::take(&mut book.early);
        all.append(&mut self.polled);
        for completion in all {
            match book.ends.get(&connection(&completion)) {
                Some(end) => known.push((end.clone(), completion)),
                None => book.early.push(completion),
            }
        }
        known
    }

    /// Takes a completion of a connection in.
    fn take(&mut self, shared: &Shared<T::Connection>, completion: Completion, now: Duration) {
        let over = matches!(completion, Completion::Disconnected { .. });
        // A dead node learns of ends alone: its threads have to end, too.
        let dead = !over && !self.node.operates();
        let of = match completion {
            Completion::Work { .. } => Shown::Work,
            Completion::Received { .. } | Completion::WriteImmediate { .. } => Shown::Arrival,
            Completion::Disconnected { .. } => Shown::End,
        };
        let delay = self.delay(of);
        let mut end = lock(shared);
        match completion {
            Completion::Work { connection, id, result } => {
                let Some((id, result)) = end.complete(id, result) else { return };
                let struck = end.counted();
                end.held += 1;
                let completion = Completion::Work { connection, id, result };
                self.hold(&mut end, of, now, delay, Held { completion, counted: Some(shared.clone()) });
                self.node.fire(struck);
            }
            Completion::Received { buffer, .. } if dead => self.inner.release(buffer),
            Completion::WriteImmediate { .. } if dead => {}
            completion @ (Completion::Received { .. } | Completion::WriteImmediate { .. }) => {
                let struck = end.counted();
                self.hold(&mut end, of, now, delay, Held { completion, counted: None });
                self.node.fire(struck);
            }
            Completion::Disconnected { connection, cause } => {
                let (undone, cause) = end.end(cause);
                if let Some((id, error)) = undone {
                    let completion = Completion::Work { connection, id, result: Err(error) };
                    self.hold(&mut end, Shown::Work, now, Duration::ZERO, Held { completion, counted: None });
                }
                let completion = Completion::Disconnected { connection, cause };
                self.hold(&mut end, of, now, delay, Held { completion, counted: None });
                lock(&self.book).ends.remove(&connection);
            }
        }
    }

    /// Holds a completion back for `delay`, behind what it has to come after.
    fn hold(
        &mut self,
        end: &mut End<T::Connection>,
        of: Shown,
        now: Duration,
        delay: Duration,
        held: Held<T::Connection>,
    ) {
        let [work, arrival] = &mut end.due;
        let due = now + delay;
        let due = match of {
            Shown::Work => {
                *work = due.max(*work);
                *work
            }
            Shown::Arrival => {
                *arrival = due.max(*arrival);
                *arrival
            }
            Shown::End => due.max(*work).max(*arrival),
        };
        self.node.late.fetch_add(u64::from(due > now), Ordering::Relaxed);
        self.held.insert((due, self.count), held);
        self.count += 1;
    }

    /// The time, if it matters.
    fn now(&self) -> Duration {
        if self.delays.is_empty() { Duration::ZERO } else { self.transport.now() }
    }
}

impl<T: Transport> transport::Endpoint for Endpoint<T> {
    type Attach = Attach<T>;

    fn attach(&self) -> Attach<T> {
        Attach { inner: self.inner.attach(), book: self.book.clone() }
    }

    fn poll(&mut self, into: &mut Vec<Completion>) -> usize {
        self.inner.poll(&mut self.polled);
        let now = self.now();
        for (end, completion) in self.sort_out() {
            self.take(&end, completion, now);
        }
        let before = into.len();
        while let Some(first) = self.held.first_entry()
            && first.key().0 <= now
        {
            let Held { completion, counted } = first.remove();
            if let Some(end) = counted {
                lock(&end).held -= 1;
            }
            into.push(completion);
        }
        into.len() - before
    }

    fn wait(&mut self, timeout: Duration) {
        let ready = {
            let book = lock(&self.book);
            book.early.iter().any(|completion| book.ends.contains_key(&connection(completion)))
        };
        let first = self.held.keys().next().map(|key| key.0.saturating_sub(self.now()));
        let timeout = if ready { Duration::ZERO } else { timeout.min(first.unwrap_or(timeout)) };
        self.inner.wait(timeout);
    }

    fn message(&self, buffer: &ReceiveBuffer) -> &[u8] {
        self.inner.message(buffer)
    }

    fn release(&mut self, buffer: ReceiveBuffer) {
        self.inner.release(buffer);
    }
}
