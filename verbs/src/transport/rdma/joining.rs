//! A queue pair on its way to a connection: bytes in, bytes out, and no socket.
//!
//! ```text
//!  end that asks                              end that answers
//!  Joining::new ── offer() ─────────────────▶ Joining::new, answer(offer)
//!       finish(answer) ◀────────── the answer ─┘   a connection, held
//!       a connection ── it is ready ────────▶ release: what was posted meanwhile goes out
//! ```
//!
//! **Order.** The end that answers can send and receive before it answers. A message to a queue pair that cannot receive yet would be
//! lost, and sent again much later, or break the connection. So its posts are *held* in the chain of its send queue until the other end says that
//! it is ready. `accept` need not wait for that, and a peer that never says it holds up nobody: its connection ends after five seconds.
//!
//! A link joins its endpoint before its queue pair can receive, so the polling thread knows every queue pair that it hears of.

use std::{
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{
    error::Error,
    fabric::{Local, Way},
    transport::rdma::{
        connection::RdmaConnection,
        keeper::Channel,
        link::Link,
        offer::{OFFER, Offer},
        queues::{News, Queues},
    },
};

/// A place among the connections of an endpoint. Dropped, it is free again.
pub(super) struct Place(Option<Arc<Queues>>);

impl Place {
    /// # Errors
    /// [`Error::Limit`] when none is left.
    pub(super) fn reserve(queues: &Arc<Queues>) -> Result<Self, Error> {
        queues.reserve()?;
        Ok(Self(Some(Arc::clone(queues))))
    }

    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(queues) = &self.0 {
            queues.unreserve();
        }
    }
}

/// A link that has joined its endpoint, but is no connection yet. Dropped, it leaves again.
pub(super) struct Joining {
    link: Option<Arc<Link>>,
    place: Option<Place>,
    local: Local,
    own: Offer,
    /// It answers, and the other end has yet to say that it is ready.
    held: bool,
}

impl Joining {
    /// Makes a queue pair on the port that `local` names, at a place that has been reserved. Its send queue has `depth` requests, or
    /// as many as those of the endpoint if that is fewer.
    pub(super) fn new(queues: &Arc<Queues>, place: Place, local: Local, depth: usize) -> Result<Self, Error> {
        let device = &queues.device;
        let (lid, mtu) = device.port(local.port)?;
        let link = Link::new(queues, local.port, depth.clamp(1, queues.config.send_depth))?;
        let reads = |most: u8| queues.config.read_depth.min(usize::from(most)) as u8;
        let own = Offer {
            way: local.way,
            mtu: device.fabric.mtu_of(mtu),
            reads_out: reads(device.limits.reads_out),
            reads_in: reads(device.limits.reads_in),
            lid,
            queue_pair: link.queue_pair_number,
            first_packet: first_packet(),
            gid: local.gid,
        };
        let told = queues.tell(News::Joined(Arc::clone(&link)));
        let joining = Self { link: Some(link), place: Some(place), local, own, held: false };
        if told { Ok(joining) } else { Err(gone()) }
    }

    /// What the other end needs to know. After [`answer`](Self::answer), with what was agreed on.
    pub(super) fn offer(&self) -> [u8; OFFER] {
        self.own.encode()
    }

    /// Connects to the end whose offer this is. [`offer`](Self::offer) is the answer to it. What is posted is held until that end is ready.
    pub(super) fn answer(&mut self, offer: &[u8]) -> Result<(), Impossible> {
        self.held = true;
        let theirs = Offer::decode(offer).map_err(Impossible::Offer)?;
        self.connect(&theirs, theirs.way, self.own.way)
    }

    /// Connects to the end that gave this answer to our offer.
    pub(super) fn finish(&mut self, answer: &[u8]) -> Result<(), Impossible> {
        let theirs = Offer::decode(answer).map_err(Impossible::Offer)?;
        self.connect(&theirs, self.own.way, theirs.way)
    }

    fn connect(&mut self, theirs: &Offer, asks: Way, answers: Way) -> Result<(), Impossible> {
        if asks != answers {
            return Err(Impossible::Offer(format!(
                "one end is at {asks}, the other at {answers}; choose alike addresses (?from=, FERVOR_IB_GID_INDEX)"
            )));
        }
        // Both ends count with the smaller numbers.
        self.own.reads_out = self.own.reads_out.min(theirs.reads_in);
        self.own.reads_in = self.own.reads_in.min(theirs.reads_out);
        let link = self.link.as_ref().expect("only `connection` takes it, with `self`");
        link.connect(&self.local, &self.own, theirs, self.held).map_err(Impossible::Own)
    }

    /// Hands the connected queue pair to the keeper, with the channel that tells of the peer's end, and to the user.
    pub(super) fn connection(mut self, channel: Channel) -> RdmaConnection {
        let link = self.link.take().expect("only this function takes it");
        self.place.take().expect("only this function takes it").keep();
        link.queues.keeper.watch(&link, channel, self.held);
        RdmaConnection::new(link, (self.own.reads_out, self.own.reads_in))
    }
}

impl Drop for Joining {
    fn drop(&mut self) {
        let Some(link) = self.link.take() else { return };
        // By the thread that made it: no polling thread.
        link.destroy();
        link.queues.tell(News::GivenUp(link.id));
        // Its place is free at once, and not when the endpoint is next polled: whoever tries again may not poll in between.
    }
}

/// Why a queue pair cannot be connected.
#[derive(Debug)]
pub(super) enum Impossible {
    /// Because of what the other end offers: a sentence for both.
    Offer(String),
    /// Because of this end.
    Own(Error),
}

/// A queue pair for a connection that a program bootstraps over a channel of its own: its session tells the two ends what [`offer`](Self::offer)
/// returns. Dropped, it is destroyed.
pub struct RdmaJoining(pub(super) Joining);

impl RdmaJoining {
    /// What the other end needs to know: to be told to it as the offer, or as the answer to its offer.
    pub fn offer(&self) -> Vec<u8> {
        self.0.offer().to_vec()
    }

    /// At the end that answers: connects to the end whose offer this is. Tell that end what [`offer`](Self::offer) returns now, and call
    /// [`RdmaConnection::peer_is_ready`] when it has said that it has [finished](Self::finish).
    ///
    /// # Errors
    /// A sentence for both ends, that names what is wrong with the offer; or what the device said.
    pub fn answer(&mut self, offer: &[u8]) -> Result<(), Error> {
        self.0.answer(offer).map_err(Impossible::report)
    }

    /// At the end that asked: connects to the end that gave this answer. Then tell it that this end is ready.
    ///
    /// # Errors
    /// As [`answer`](Self::answer).
    pub fn finish(&mut self, answer: &[u8]) -> Result<(), Error> {
        self.0.finish(answer).map_err(Impossible::report)
    }

    /// The connection. Whoever keeps the channel calls [`disconnect`](crate::transport::Connection::disconnect) at its end.
    pub fn connection(self) -> RdmaConnection {
        self.connection_until(|| {})
    }

    /// The connection. When it has ended, and its queue pair is in the error state, `told` is called, by a thread that must not wait for anybody.
    pub fn connection_until(self, told: impl FnOnce() + Send + 'static) -> RdmaConnection {
        self.0.connection(Channel::Other(Box::new(told)))
    }
}

impl fmt::Debug for RdmaJoining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0.own)
    }
}

impl Impossible {
    pub(super) fn report(self) -> Error {
        match self {
            Self::Own(error) => error,
            Self::Offer(reason) => Error::System {
                call: "connecting queue pairs".to_owned(),
                source: io::Error::new(io::ErrorKind::InvalidData, reason),
            },
        }
    }
}

/// The number of the first packet: another one for each queue pair, so that stray packets of an earlier one are not taken for its own.
fn first_packet() -> u32 {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let time =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.subsec_nanos());
    (time ^ count.wrapping_mul(0x9e37_79b9)) & 0xff_ffff
}

/// The endpoint ended while a connection was being made.
fn gone() -> Error {
    let source = io::Error::new(io::ErrorKind::NotConnected, "the endpoint was dropped meanwhile");
    Error::System { call: "joining an endpoint".to_owned(), source }
}
