//! The posting end of a connection: turns regions and offsets into what the device knows.

use std::{
    fmt,
    sync::{Arc, Weak},
};

use rdma_sys::ibv_wr_opcode;

use crate::transport::{
    Connection, ConnectionId, MAX_INLINE, MAX_SGE, NoView, Payload, Post, PostError, RemoteAddress,
    RemoteRegion, Sge,
    rdma::{
        device::RdmaRegion,
        link::Link,
        sending::{Bytes, Operation, Piece},
    },
};

/// A connection of the `rdma` provider.
pub struct RdmaConnection {
    link: Arc<Link>,
    reads_out: u8,
    reads_in: u8,
}

impl RdmaConnection {
    pub(super) fn new(link: Arc<Link>, (reads_out, reads_in): (u8, u8)) -> Self {
        Self { link, reads_out, reads_in }
    }

    /// READs that this end may have in flight, as agreed on with the peer. The device holds back those beyond.
    pub fn reads_in_flight(&self) -> u8 {
        self.reads_out
    }

    /// READs of the peer that this end serves at a time, as agreed on with the peer.
    pub fn reads_served(&self) -> u8 {
        self.reads_in
    }

    /// Whoever has bootstrapped this connection over a channel of its own has heard from the peer that it is ready: what was posted so far goes
    /// out. Connections of [`Listener`](crate::transport::Listener) and [`Transport::connect`](crate::transport::Transport::connect) need
    /// no such call.
    pub fn peer_is_ready(&self) {
        self.link.queues.keeper.ready(self.link.key);
    }

    /// What others can do to it who hear news of its peer.
    pub fn leash(&self) -> RdmaLeash {
        RdmaLeash(Arc::downgrade(&self.link))
    }

    fn hand_over(
        &self,
        operation: Operation,
        payload: Payload<'_, RdmaRegion>,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        match payload {
            Payload::Inline(bytes) => {
                assert!(
                    bytes.len() <= MAX_INLINE,
                    "{} bytes inline, but at most {MAX_INLINE} are possible",
                    bytes.len()
                );
                self.link.post(operation, Bytes::Inline(bytes), std::iter::empty(), signal)
            }
            Payload::Gather(sges) => {
                let mut pieces = [Piece { address: 0, length: 0, key: 0 }; MAX_SGE];
                assert!(sges.len() <= MAX_SGE, "{} pieces, but at most {MAX_SGE} are possible", sges.len());
                for (piece, sge) in pieces.iter_mut().zip(sges) {
                    *piece = self.piece(sge);
                }
                let pieces = &pieces[..sges.len()];
                self.link.post(operation, Bytes::Pieces(pieces), sges.iter().map(|sge| &sge.region.0), signal)
            }
        }
    }

    fn piece(&self, sge: &Sge<'_, RdmaRegion>) -> Piece {
        let registration = &sge.region.0;
        let size = registration.memory.len();
        assert!(
            sge.offset <= size && sge.length <= size - sge.offset,
            "bytes {}..{} are outside a region of {size} bytes",
            sge.offset,
            sge.offset.saturating_add(sge.length)
        );
        Piece {
            address: registration.memory.as_ptr() as u64 + sge.offset as u64,
            length: u32::try_from(sge.length).expect("a piece is shorter than 4 GiB"),
            key: registration.local_key,
        }
    }
}

impl Connection for RdmaConnection {
    type Region = RdmaRegion;
    type View = NoView;

    fn id(&self) -> ConnectionId {
        self.link.id
    }

    fn provider(&self) -> &'static str {
        "rdma"
    }

    fn post(&mut self, post: Post<'_, RdmaRegion>) -> Result<(), PostError> {
        use ibv_wr_opcode::*;
        let none = RemoteAddress { address: 0, key: 0 };
        let (opcode, remote, payload, immediate, signal) = match post {
            Post::Send { payload, immediate: None, signal } => (IBV_WR_SEND, none, payload, 0, signal),
            Post::Send { payload, immediate: Some(immediate), signal } => {
                (IBV_WR_SEND_WITH_IMM, none, payload, immediate, signal)
            }
            Post::Write { payload, to, immediate: None, signal } => {
                (IBV_WR_RDMA_WRITE, to, payload, 0, signal)
            }
            Post::Write { payload, to, immediate: Some(immediate), signal } => {
                (IBV_WR_RDMA_WRITE_WITH_IMM, to, payload, immediate, signal)
            }
            Post::Read { into, from, signal } => (IBV_WR_RDMA_READ, from, Payload::Gather(into), 0, signal),
        };
        let (remote_address, remote_key) = (remote.address, remote.key);
        self.hand_over(Operation { opcode, remote_address, remote_key, immediate }, payload, signal)
    }

    fn ring(&mut self) -> Result<(), PostError> {
        self.link.ring()
    }

    fn room(&self) -> usize {
        self.link.room()
    }

    fn view(&self, _: RemoteRegion) -> Option<NoView> {
        None
    }

    fn disconnect(&mut self) {
        self.link.leave();
    }
}

impl Drop for RdmaConnection {
    fn drop(&mut self) {
        self.link.leave();
    }
}

impl fmt::Debug for RdmaConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, READs in flight: {} own, {} of the peer", self.link, self.reads_out, self.reads_in)
    }
}

/// What can be done to a connection by whoever keeps the channel over which it was bootstrapped, and hears there of its peer.
#[derive(Clone)]
pub struct RdmaLeash(Weak<Link>);

impl RdmaLeash {
    /// See [`RdmaConnection::peer_is_ready`].
    pub fn peer_is_ready(&self) {
        if let Some(link) = self.0.upgrade() {
            link.queues.keeper.ready(link.key);
        }
    }

    /// The peer's end, or the channel, has ended: so does the connection. Its queue pair goes to the error state before the end is reported.
    pub fn disconnect(&self) {
        if let Some(link) = self.0.upgrade() {
            link.break_off();
        }
    }
}

impl fmt::Debug for RdmaLeash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RdmaLeash")
    }
}
