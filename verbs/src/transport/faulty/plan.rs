//! What shall go wrong: a list of faults, each at a point that is counted, never at a time that is measured.
//!
//! Everything counts from 0. What a plan leaves to chance is drawn from its seed, so the same plan over the same provider
//! does the same; over `sim`, where all else is replayed too, it does exactly the same.

use std::time::Duration;

use crate::transport::Post;

/// What shall go wrong at one node, a process or what stands for one.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Decides what faults leave open.
    pub seed: u64,
    /// The faults. [`Report::fired`] names them by their place here.
    pub faults: Vec<Fault>,
}

impl Plan {
    /// One fault.
    pub fn one(fault: Fault) -> Self {
        Self { seed: 0, faults: vec![fault] }
    }
}

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A connection breaks, as it does when the network between two hosts that live does.
    Break {
        /// Which of the node's connections, in the order in which it connected or accepted.
        connection: usize,
        /// When.
        at: Point,
    },
    /// The node dies instead of doing its operation of this number: a post, a ring for something posted, the
    /// taking of a completion, a connect or an accept.
    Die {
        /// Number of the operation.
        operation: u64,
    },
    /// Completions of the node show late.
    Delay {
        /// Which.
        of: Shown,
        /// One in so many is late, at random.
        one_in: u64,
        /// How late at most, in the time of the provider. Every order of magnitude is as likely.
        longest: Duration,
    },
    /// The last SENDs of a connection are sent again, ahead of anything new, on the next one that the node makes to the
    /// same address after this one has ended. The connection is one of those that connected.
    Replay {
        /// Which of the node's connections.
        connection: usize,
        /// How many SENDs at most: there must be receive buffers for them besides those for what is new.
        last: usize,
    },
}

/// A point in the life of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// At a post.
    Post {
        /// Of this kind; of any, if none is said.
        kind: Option<Kind>,
        /// Number of the post among those (refused ones are not counted).
        nth: u64,
        /// What becomes of it.
        fate: Fate,
    },
    /// Behind a completion, which is handed out.
    Completion {
        /// Number of the completion, of whatever kind.
        nth: u64,
    },
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A SEND.
    Send,
    /// A WRITE, with an immediate or without.
    Write,
    /// A READ.
    Read,
}

impl Kind {
    pub(super) fn of<R>(post: &Post<'_, R>) -> Self {
        match post {
            Post::Send { .. } => Kind::Send,
            Post::Write { .. } => Kind::Write,
            Post::Read { .. } => Kind::Read,
        }
    }
}

/// What becomes of the request at which a connection breaks. It is taken, and completes with an error, in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It never happens. Those before it may.
    Undone,
    /// It happens, and all before it. That it did is lost.
    Done,
    /// The seed decides.
    Drawn,
}

/// A kind of completion, by what it waits behind: those of one kind and connection stay in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// [`Completion::Work`](crate::transport::Completion::Work).
    Work,
    /// [`Completion::Received`](crate::transport::Completion::Received) and
    /// [`Completion::WriteImmediate`](crate::transport::Completion::WriteImmediate).
    Arrival,
    /// [`Completion::Disconnected`](crate::transport::Completion::Disconnected): it is the last one in any case.
    End,
}

/// What has happened at a node so far: where a plan can strike, and whether it has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Operations, as [`Fault::Die`] counts them.
    pub operations: u64,
    /// The connections, in their order.
    pub connections: Vec<Counts>,
    /// The faults that have happened, by their place in the plan. (Delays do not show here, but in `late`.)
    pub fired: Vec<usize>,
    /// Completions that were held back.
    pub late: u64,
    /// SENDs that were sent again.
    pub replayed: u64,
}

/// What one connection has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// SENDs posted.
    pub sends: u64,
    /// WRITEs posted.
    pub writes: u64,
    /// READs posted.
    pub reads: u64,
    /// Completions of all kinds, but for its end.
    pub completions: u64,
}

impl Counts {
    /// Posts of all kinds.
    pub fn posts(&self) -> u64 {
        self.sends + self.writes + self.reads
    }
}
