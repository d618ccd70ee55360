//! A connection, and how it breaks.
//!
//! ```text
//!            post n, undone: it is kept back          ┌─────┐  the inner end is polled
//!  ┌───────┐ completion n ──────────────────────────▶ │ Cut │ ──▶ what was kept back fails, then the end
//!  │ Whole │ the node dies                            └─────┘
//!  └───────┘                 ┌──────────┐ it has happened ▲
//!            post n, done ─▶ │ Awaiting │ ────────────────┘ its completion becomes an error
//!                            └──────────┘
//! ```
//!
//! The connection of the inner provider is disconnected where the picture enters `Cut`, and gives the rest: it completes
//! what is outstanding, tells both sides, and sees to it that nothing changes memory after that. Posts are refused from
//! the fault on.
//!
//! An [`End`] is shared by the connection's thread, which posts, and the endpoint's thread, which polls. Its lock is held for
//! calls that neither block nor let others run.

use std::{collections::VecDeque, mem, time::Duration};

use super::plan::{Counts, Fate, Kind, Point};
use crate::{
    address::Address,
    transport::{Connection, Payload, Post, PostError, Region, RemoteRegion, WorkError},
};

/// The inner id of a request that the user did not signal, and whose completion is waited for.
const UNSIGNALLED: u64 = u64::MAX;

/// A SEND, to be sent again.
#[derive(Debug, Clone)]
pub(super) struct Message {
    pub(super) bytes: Vec<u8>,
    pub(super) immediate: Option<u32>,
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Whole,
    /// Request `ordinal` is to happen yet.
    Awaiting {
        ordinal: u64,
    },
    Cut,
}

/// The part of a plan that concerns one connection.
#[derive(Debug, Default)]
pub(super) struct Fortune {
    /// Where it breaks, and which fault of the plan that is. No fate is left open.
    pub(super) breaks: Vec<(usize, Point)>,
    /// How many of its last SENDs will be wanted, and which fault of the plan that is.
    pub(super) replay: Option<(usize, usize)>,
}

/// One end of a connection. See the module.
#[derive(Debug)]
pub(super) struct End<C> {
    /// The inner one, until it is dropped.
    inner: Option<C>,
    /// Where it was made to, if it was made from here.
    pub(super) address: Option<Address>,
    fortune: Fortune,
    pub(super) counts: Counts,
    state: State,
    /// Requests that the inner connection completes, oldest first: the number of the post, and the id that the user gave.
    signalled: VecDeque<(u64, Option<u64>)>,
    /// Number of the next post.
    ordinal: u64,
    /// The request that was kept back; its id, if it is signalled.
    undone: Option<Option<u64>>,
    /// Something was posted since the last ring.
    unrung: bool,
    /// Completions of its requests that were taken from the inner endpoint and not handed out yet: to the user they still
    /// are in the send queue.
    pub(super) held: usize,
    /// Until when completions are held back: of its requests, of what arrives.
    pub(super) due: [Duration; 2],
    /// The last SENDs, as many as will be wanted.
    sends: VecDeque<Message>,
    /// The plan broke it, and nobody has been told yet by an error.
    cause: Option<WorkError>,
    /// Its end has been polled.
    pub(super) over: bool,
}

/// What a call of an [`End`] has brought about: the fault that struck, by its place in the plan.
pub(super) type Struck = Option<usize>;

impl<C: Connection> End<C> {
    pub(super) fn new(inner: C, address: Option<Address>, fortune: Fortune) -> Self {
        Self {
            inner: Some(inner),
            address,
            fortune,
            counts: Counts::default(),
            state: State::Whole,
            signalled: VecDeque::new(),
            ordinal: 0,
            undone: None,
            unrung: false,
            held: 0,
            due: [Duration::ZERO; 2],
            sends: VecDeque::new(),
            cause: None,
            over: false,
        }
    }

    /// Takes the inner connection away, to be dropped.
    pub(super) fn take(&mut self) -> Option<C> {
        self.inner.take()
    }

    /// Requests that may be posted.
    pub(super) fn room(&self) -> usize {
        self.inner.as_ref().map_or(0, Connection::room).saturating_sub(self.held)
    }

    pub(super) fn post(&mut self, post: Post<'_, C::Region>) -> (Result<(), PostError>, Struck) {
        if self.state != State::Whole {
            return (Err(PostError::Disconnected), None);
        }
        if self.held > 0 && self.room() == 0 {
            return (Err(PostError::Full), None);
        }
        let (ordinal, signal, kind) = (self.ordinal, post.signal(), Kind::of(&post));
        let struck = self.strikes_at(kind).filter(|_| !self.over);
        let message = self.message(&post);
        if let Some((fault, Fate::Undone)) = struck {
            if self.room() == 0 {
                return (Err(PostError::Full), None);
            }
            self.taken(kind, message);
            self.undone = Some(signal);
            self.cut();
            return (Ok(()), Some(fault));
        }
        let id = signal.or(struck.map(|_| UNSIGNALLED));
        let inner = self.inner.as_mut().expect("it is there until it is dropped");
        let result = inner.post(post.with_signal(id));
        if let Err(error) = result {
            return (Err(error), None);
        }
        self.taken(kind, message);
        if id.is_some() {
            self.signalled.push_back((ordinal, signal));
        }
        if struck.is_some() {
            // What breaks before this is done has done less than it was to: the inner connection tells.
            let _ = self.inner.as_mut().expect("it was there").ring();
            self.state = State::Awaiting { ordinal };
        }
        (Ok(()), struck.map(|(fault, _)| fault))
    }

    /// A request is taken.
    fn taken(&mut self, kind: Kind, message: Option<Message>) {
        let count = match kind {
            Kind::Send => &mut self.counts.sends,
            Kind::Write => &mut self.counts.writes,
            Kind::Read => &mut self.counts.reads,
        };
        *count += 1;
        self.ordinal += 1;
        self.unrung = true;
        if let (Some(message), Some((_, last))) = (message, self.fortune.replay) {
            self.sends.push_back(message);
            if self.sends.len() > last {
                self.sends.pop_front();
            }
        }
    }

    /// The message of a SEND, if it may be wanted.
    fn message(&self, post: &Post<'_, C::Region>) -> Option<Message> {
        self.fortune.replay?;
        let Post::Send { payload, immediate, .. } = *post else { return None };
        let bytes = match payload {
            Payload::Inline(bytes) => bytes.to_vec(),
            Payload::Gather(pieces) => {
                let mut bytes = vec![0; pieces.iter().map(|piece| piece.length).sum()];
                let mut at = 0;
                for piece in pieces {
                    piece.region.memory().read(piece.offset, &mut bytes[at..at + piece.length]);
                    at += piece.length;
                }
                bytes
            }
        };
        Some(Message { bytes, immediate })
    }

    /// The fault that strikes at the next post, if it is of this kind, and the fate of the request.
    fn strikes_at(&self, next: Kind) -> Option<(usize, Fate)> {
        let Counts { sends, writes, reads, .. } = self.counts;
        self.fortune.breaks.iter().find_map(|&(fault, point)| {
            let Point::Post { kind, nth, fate } = point else { return None };
            let before = match kind {
                None => self.counts.posts(),
                Some(kind) if kind != next => return None,
                Some(Kind::Send) => sends,
                Some(Kind::Write) => writes,
                Some(Kind::Read) => reads,
            };
            (before == nth).then_some((fault, fate))
        })
    }

    /// Whether a ring would do something.
    pub(super) fn unrung(&self) -> bool {
        self.unrung
    }

    pub(super) fn ring(&mut self) -> Result<(), PostError> {
        self.unrung = false;
        if self.state != State::Whole {
            return Err(PostError::Disconnected);
        }
        self.inner.as_mut().expect("it is there until it is dropped").ring()
    }

    /// The inner connection's view.
    pub(super) fn view(&self, region: RemoteRegion) -> Option<C::View> {
        self.inner.as_ref()?.view(region)
    }

    /// The user ends the connection.
    pub(super) fn disconnect(&mut self) {
        if let Some(inner) = &mut self.inner {
            inner.disconnect();
        }
    }

    /// The connection breaks.
    pub(super) fn cut(&mut self) {
        if self.state == State::Cut {
            return;
        }
        self.state = State::Cut;
        self.cause = Some(WorkError::RetryExceeded);
        self.disconnect();
    }

    /// Request `id` of the inner connection is complete. What that is to the user: the id that it gave, if it is to hear of
    /// it, and the result.
    pub(super) fn complete(
        &mut self,
        id: u64,
        result: Result<(), WorkError>,
    ) -> Option<(u64, Result<(), WorkError>)> {
        let (ordinal, signal) =
            self.signalled.pop_front().expect("the inner provider completes what was posted");
        assert_eq!(
            signal.unwrap_or(UNSIGNALLED),
            id,
            "the inner provider completes in the order of the posts"
        );
        let mut result = result;
        if self.state == (State::Awaiting { ordinal }) {
            self.cut();
            // It happened, and nobody will know.
            result = result.and(Err(WorkError::Flushed));
        }
        if result == Err(WorkError::Flushed) {
            result = Err(self.cause.take().unwrap_or(WorkError::Flushed));
        }
        signal.map(|id| (id, result))
    }

    /// A completion, not of the end, is about to be handed out.
    pub(super) fn counted(&mut self) -> Struck {
        let nth = self.counts.completions;
        self.counts.completions += 1;
        let here = |&&(_, point): &&(usize, Point)| point == Point::Completion { nth };
        let (fault, _) = *self.fortune.breaks.iter().find(here)?;
        if self.over || self.state != State::Whole {
            return None;
        }
        self.cut();
        Some(fault)
    }

    /// The inner connection has ended. What was kept back fails: its id, if it is signalled, and the error; and the cause of the end.
    pub(super) fn end(&mut self, cause: WorkError) -> (Option<(u64, WorkError)>, WorkError) {
        self.over = true;
        let broken = self.state != State::Whole;
        let undone = self.undone.take().flatten();
        let undone = undone.map(|id| (id, self.cause.take().unwrap_or(WorkError::Flushed)));
        let own = broken && cause == WorkError::Disconnected;
        (undone, if own { WorkError::RetryExceeded } else { cause })
    }

    /// The fault by which its last SENDs are to be sent again, and they, if it has ended; once.
    pub(super) fn replayed(&mut self) -> Option<(usize, VecDeque<Message>)> {
        let (fault, _) = self.fortune.replay.take_if(|_| self.over || self.state != State::Whole)?;
        Some((fault, mem::take(&mut self.sends)))
    }
}
