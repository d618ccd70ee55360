//! A lane: a connection of one provider, and what that provider calls the peer's regions.

use super::{
    Host, ID_BITS,
    region::{HostRegion, PeerRegions, Pick},
};
#[cfg(feature = "rdma")]
use crate::transport::rdma::RdmaConnection;
use crate::{
    error::Error,
    session::Way,
    transport::{
        Connection, ConnectionId, MAX_SGE, Payload, Post, PostError, RemoteRegion, Sge,
        shm::{ShmConnection, ShmView},
        tcp::TcpConnection,
    },
};

/// A connection of one of the providers.
#[derive(Debug)]
pub(super) enum Lane {
    Shm(ShmConnection),
    Tcp(TcpConnection),
    #[cfg(feature = "rdma")]
    Rdma(RdmaConnection),
}

impl Lane {
    pub(super) fn way(&self) -> Way {
        match self {
            Lane::Shm(_) => Way::Shm,
            Lane::Tcp(_) => Way::Tcp,
            #[cfg(feature = "rdma")]
            Lane::Rdma(_) => Way::Rdma,
        }
    }
}

/// The id within the host of connection `id` of a provider.
#[inline]
pub(super) fn host_id(way: Way, id: ConnectionId) -> ConnectionId {
    ConnectionId((way as u32 - 1) << ID_BITS | id.0)
}

/// One end of a connection.
#[derive(Debug)]
pub struct HostConnection {
    lane: Lane,
    id: ConnectionId,
    regions: PeerRegions,
}

impl HostConnection {
    pub(super) fn new(lane: Lane, regions: PeerRegions) -> Result<Self, Error> {
        let id = on!(&lane, Lane, lane => lane.id());
        if id.0 >> ID_BITS != 0 {
            return Err(Error::Limit {
                what: "the number of connections that the endpoint has had".to_owned(),
                value: id.0.into(),
                limit: (1 << ID_BITS) - 1,
                cure: "; make another endpoint".to_owned(),
            });
        }
        Ok(Self { id: host_id(lane.way(), id), lane, regions })
    }
}

/// The host that a lane is made for has its provider.
impl Host {
    pub(super) fn lane_error(&self, way: Way) -> Error {
        Error::NoSession { address: way.to_string(), reason: self.why_not(way) }
    }
}

#[inline]
fn convert<'a, T>(piece: &Sge<'a, HostRegion>) -> Sge<'a, T>
where
    HostRegion: Pick<T>,
{
    Sge { region: piece.region.pick(), offset: piece.offset, length: piece.length }
}

/// A gather list of one provider's regions, from one of any provider's.
#[inline]
fn with_pieces<T, R>(pieces: &[Sge<'_, HostRegion>], then: impl FnOnce(&[Sge<'_, T>]) -> R) -> R
where
    HostRegion: Pick<T>,
{
    let [first, rest @ ..] = pieces else { return then(&[]) };
    assert!(pieces.len() <= MAX_SGE, "{} pieces in a list; at most {MAX_SGE} are possible", pieces.len());
    let mut converted = [convert(first); MAX_SGE];
    for (to, piece) in converted[1..].iter_mut().zip(rest) {
        *to = convert(piece);
    }
    then(&converted[..pieces.len()])
}

/// As [`with_pieces`], for a payload.
#[inline]
fn with_payload<T, R>(payload: Payload<'_, HostRegion>, then: impl FnOnce(Payload<'_, T>) -> R) -> R
where
    HostRegion: Pick<T>,
{
    match payload {
        Payload::Inline(bytes) => then(Payload::Inline(bytes)),
        Payload::Gather(pieces) => with_pieces(pieces, |pieces| then(Payload::Gather(pieces))),
    }
}

impl Connection for HostConnection {
    type Region = HostRegion;
    // Only `shm` has views.
    type View = ShmView;

    #[inline]
    fn id(&self) -> ConnectionId {
        self.id
    }

    fn provider(&self) -> &'static str {
        self.lane.way().name()
    }

    // The kind is known where it is posted: nothing is left of the `match` there.
    #[inline(always)]
    fn post(&mut self, post: Post<'_, HostRegion>) -> Result<(), PostError> {
        let Self { lane, regions, .. } = self;
        match post {
            Post::Send { payload, immediate, signal } => on!(lane, Lane, lane => {
                with_payload(payload, |payload| lane.post(Post::Send { payload, immediate, signal }))
            }),
            Post::Write { payload, to, immediate, signal } => {
                let to = regions.translate(to);
                on!(lane, Lane, lane => {
                    with_payload(payload, |payload| lane.post(Post::Write { payload, to, immediate, signal }))
                })
            }
            Post::Read { into, from, signal } => {
                let from = regions.translate(from);
                on!(lane, Lane, lane => with_pieces(into, |into| lane.post(Post::Read { into, from, signal })))
            }
        }
    }

    #[inline]
    fn ring(&mut self) -> Result<(), PostError> {
        on!(&mut self.lane, Lane, lane => lane.ring())
    }

    #[inline]
    fn room(&self) -> usize {
        on!(&self.lane, Lane, lane => lane.room())
    }

    fn view(&self, region: RemoteRegion) -> Option<ShmView> {
        let Lane::Shm(lane) = &self.lane else { return None };
        lane.view(self.regions.translate_region(region)?)
    }

    fn ends_with_peer(&self) -> bool {
        on!(&self.lane, Lane, lane => lane.ends_with_peer())
    }

    fn disconnect(&mut self) {
        on!(&mut self.lane, Lane, lane => lane.disconnect());
    }
}
