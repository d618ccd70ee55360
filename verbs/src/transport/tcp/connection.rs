//! The posting side: a post puts a frame in the queue, [`Connection::ring`] hands the queue to the kernel.

use std::{fmt, sync::Arc};

use super::{
    link::{Link, Posted, Target},
    region::TcpRegion,
    sender::Flush,
    shared::Shared,
    wire::{Frame, Kind, MAX_LENGTH},
};
use crate::transport::{
    Connection, ConnectionId, MAX_INLINE, MAX_SGE, NoView, Payload, Post, PostError, Region, RemoteAddress,
    RemoteRegion, Sge,
};

/// One end of a connection of the `tcp` provider.
pub struct TcpConnection {
    shared: Arc<Shared>,
    link: Arc<Link>,
    /// The regions named so far: they live as long as the connection.
    kept: Vec<TcpRegion>,
    /// Something was posted since the last `ring`.
    news: bool,
}

impl TcpConnection {
    pub(super) fn new(shared: Arc<Shared>, link: Arc<Link>) -> Self {
        Self { shared, link, kept: Vec::new(), news: false }
    }

    /// Keeps the regions of `pieces`, and adds up their bytes.
    ///
    /// # Panics
    /// When a piece is outside of its region, or there are too many.
    fn keep(&mut self, pieces: &[Sge<'_, TcpRegion>]) -> u64 {
        assert!(pieces.len() <= MAX_SGE, "{} pieces in a list; at most {MAX_SGE} are possible", pieces.len());
        let mut length = 0;
        for piece in pieces {
            piece.region.memory().check(piece.offset, piece.length);
            if !self.kept.iter().any(|kept| kept.same(piece.region)) {
                self.kept.push(piece.region.clone());
            }
            length += piece.length as u64;
        }
        assert!(length <= MAX_LENGTH, "a request of {length} bytes; at most {MAX_LENGTH} are possible");
        length
    }

    fn queue(
        &mut self,
        kind: Kind,
        payload: Payload<'_, TcpRegion>,
        remote: RemoteAddress,
        immediate: Option<u32>,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        let length = match payload {
            Payload::Inline(bytes) => {
                assert!(bytes.len() <= MAX_INLINE, "{} bytes inline; at most {MAX_INLINE}", bytes.len());
                bytes.len() as u64
            }
            Payload::Gather(pieces) => self.keep(pieces),
        };
        let frame = Frame { kind, immediate, key: remote.key, length, address: remote.address };
        self.link.post(&frame, Posted { signal, read: None }, |queue| match payload {
            Payload::Inline(bytes) => queue.put_bytes(bytes),
            Payload::Gather(pieces) => {
                for piece in pieces {
                    queue.put_place(piece.region.memory(), piece.offset, piece.length);
                }
            }
        })?;
        self.news = true;
        Ok(())
    }

    fn queue_read(
        &mut self,
        into: &[Sge<'_, TcpRegion>],
        remote: RemoteAddress,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        let length = self.keep(into);
        let mut target = Target::default();
        for (to, piece) in target.pieces.iter_mut().zip(into) {
            *to = Some((piece.region.clone(), piece.offset, piece.length));
        }
        let frame =
            Frame { kind: Kind::Read, immediate: None, key: remote.key, length, address: remote.address };
        self.link.post(&frame, Posted { signal, read: Some(target) }, |_| ())?;
        self.news = true;
        Ok(())
    }
}

impl Connection for TcpConnection {
    type Region = TcpRegion;
    type View = NoView;

    fn id(&self) -> ConnectionId {
        self.link.id
    }

    fn provider(&self) -> &'static str {
        "tcp"
    }

    fn post(&mut self, post: Post<'_, TcpRegion>) -> Result<(), PostError> {
        match post {
            Post::Send { payload, immediate, signal } => {
                self.queue(Kind::Send, payload, RemoteAddress { address: 0, key: 0 }, immediate, signal)
            }
            Post::Write { payload, to, immediate, signal } => {
                self.queue(Kind::Write, payload, to, immediate, signal)
            }
            Post::Read { into, from, signal } => self.queue_read(into, from, signal),
        }
    }

    fn ring(&mut self) -> Result<(), PostError> {
        if self.link.ring(std::mem::take(&mut self.news))? == Flush::More {
            self.shared.go_on(self.link.id);
        }
        Ok(())
    }

    fn room(&self) -> usize {
        self.link.room()
    }

    fn view(&self, _: RemoteRegion) -> Option<NoView> {
        None
    }

    fn disconnect(&mut self) {
        if self.link.break_off() {
            self.shared.leave(self.link.id);
        }
    }
}

impl Drop for TcpConnection {
    fn drop(&mut self) {
        self.disconnect();
    }
}

impl fmt::Debug for TcpConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpConnection({:?}, {:?})", self.link.id, self.link.socket)
    }
}
