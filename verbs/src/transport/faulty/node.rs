//! What the objects of one faulty node share: the plan, what is counted, and its death.
//!
//! | field | written by | read by |
//! |---|---|---|
//! | `operations` | any thread of the node, once for each operation | the same |
//! | `dead` | the thread whose operation kills the node, once | every thread, at each of its operations |
//! | `ends` | the thread that made a connection | the one that kills; who asks for a [`Report`]; who connects |

use std::{
    collections::VecDeque,
    fmt, io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::{
    end::{End, Fortune, Message},
    plan::{Fate, Fault, Plan, Point, Report},
};
use crate::{
    address::Address,
    error::Error,
    transport::{Connection, sim::random::Random},
};

/// A thread that is killed in the simulator leaves its locks poisoned, and nothing half done behind them.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An end of a connection, as its two threads and the node share it.
pub(super) type Shared<C> = Arc<Mutex<End<C>>>;

/// See the module.
pub(super) struct Node<C> {
    pub(super) plan: Plan,
    operations: AtomicU64,
    dead: AtomicBool,
    /// Ends the process, or what stands for one.
    kill: Option<Box<dyn Fn() + Send + Sync>>,
    ends: Mutex<Vec<Shared<C>>>,
    fired: Mutex<Vec<usize>>,
    pub(super) late: AtomicU64,
    pub(super) replayed: AtomicU64,
    /// Endpoints made: each has its own chance.
    pub(super) endpoints: AtomicU64,
}

impl<C> fmt::Debug for Node<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.plan)
    }
}

impl<C: Connection> Node<C> {
    pub(super) fn new(plan: Plan, kill: Option<Box<dyn Fn() + Send + Sync>>) -> Self {
        Self {
            plan,
            operations: AtomicU64::new(0),
            dead: AtomicBool::new(false),
            kill,
            ends: Mutex::new(Vec::new()),
            fired: Mutex::new(Vec::new()),
            late: AtomicU64::new(0),
            replayed: AtomicU64::new(0),
            endpoints: AtomicU64::new(0),
        }
    }

    /// An operation is about to be done. `false`: the node is dead, and does no more. The caller holds no lock of an end.
    pub(super) fn operates(&self) -> bool {
        if self.dead.load(Ordering::Acquire) {
            return false;
        }
        let operation = self.operations.fetch_add(1, Ordering::AcqRel);
        let faults = self.plan.faults.iter();
        match { faults }.position(|fault| *fault == Fault::Die { operation }) {
            None => true,
            Some(fault) => {
                self.fire(Some(fault));
                self.die();
                false
            }
        }
    }

    /// The node dies. Where it cannot be ended, its connections are, and whatever it does fails.
    fn die(&self) {
        self.dead.store(true, Ordering::Release);
        if let Some(kill) = &self.kill {
            kill();
        }
        let ends = lock(&self.ends).clone();
        ends.iter().for_each(|end| lock(end).cut());
    }

    pub(super) fn dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// As [`Node::operates`], for a call that does something else than move data.
    ///
    /// # Errors
    /// The node is dead.
    pub(super) fn alive(&self, call: &str) -> Result<(), Error> {
        let dead = || io::Error::other("the node is dead: a fault of its plan");
        if self.dead() { Err(Error::System { call: call.to_owned(), source: dead() }) } else { Ok(()) }
    }

    /// As [`Node::alive`], for a call that counts as an operation.
    pub(super) fn operates_in(&self, call: &str) -> Result<(), Error> {
        self.operates();
        self.alive(call)
    }

    /// A fault has struck.
    pub(super) fn fire(&self, fault: Option<usize>) {
        lock(&self.fired).extend(fault);
    }

    /// Takes in a new connection, made to `address` if it was made from here.
    pub(super) fn enter(&self, inner: C, address: Option<Address>) -> Shared<C> {
        let mut ends = lock(&self.ends);
        let number = ends.len();
        let mut fortune = Fortune::default();
        for (index, fault) in self.plan.faults.iter().enumerate() {
            match *fault {
                Fault::Break { connection, at } if connection == number => {
                    fortune.breaks.push((index, decided(at, self.plan.seed ^ (index as u64) << 32)));
                }
                Fault::Replay { connection, last } if connection == number => {
                    fortune.replay = Some((index, last));
                }
                _ => {}
            }
        }
        let end = Arc::new(Mutex::new(End::new(inner, address, fortune)));
        ends.push(end.clone());
        drop(ends);
        // It died while the connection was made.
        if self.dead() {
            lock(&end).cut();
        }
        end
    }

    /// The messages to be sent again on a connection that is being made to `address`.
    pub(super) fn replay(&self, address: &Address) -> VecDeque<Message> {
        if !self.plan.faults.iter().any(|fault| matches!(fault, Fault::Replay { .. })) {
            return VecDeque::new();
        }
        let ends = lock(&self.ends).clone();
        let replayed = ends.iter().find_map(|end| {
            let mut end = lock(end);
            (end.address.as_ref() == Some(address)).then(|| end.replayed()).flatten()
        });
        let Some((fault, messages)) = replayed else { return VecDeque::new() };
        self.fire(Some(fault));
        messages
    }

    pub(super) fn struck(&self) -> bool {
        !lock(&self.fired).is_empty()
    }

    pub(super) fn report(&self) -> Report {
        Report {
            operations: self.operations.load(Ordering::Acquire),
            connections: lock(&self.ends).iter().map(|end| lock(end).counts).collect(),
            fired: lock(&self.fired).clone(),
            late: self.late.load(Ordering::Acquire),
            replayed: self.replayed.load(Ordering::Acquire),
        }
    }
}

/// The point, with no fate left open.
fn decided(point: Point, seed: u64) -> Point {
    match point {
        Point::Post { kind, nth, fate: Fate::Drawn } => {
            let done = Random::new(seed).one_in(2);
            Point::Post { kind, nth, fate: if done { Fate::Done } else { Fate::Undone } }
        }
        point => point,
    }
}
