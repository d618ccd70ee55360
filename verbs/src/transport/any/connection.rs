//! A lane: a connection of one provider, and what that provider calls the peer's regions.

use super::{
    Host, ID_BITS,
    region::{HostRegion, PeerRegions, Pick},
};
#[cfg(feature = "rdma")]
use crate::transport::rdma::RdmaConnection;
use crate::{
    error::Error,
    rails::MAX_RAILS,
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

/// A way, and by which of this end's rails, if there are some: which of the host's providers a lane is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    Shm,
    Tcp,
    #[cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "a program without RDMA has no rails"))]
    Rail(u8),
}

impl Route {
    /// So many there are.
    pub(super) const COUNT: usize = 2 + MAX_RAILS;

    /// Its number, from 0 on.
    #[inline]
    pub(super) const fn code(self) -> u32 {
        match self {
            Route::Shm => 0,
            Route::Tcp => 1,
            Route::Rail(rail) => 2 + rail as u32,
        }
    }

    pub(super) fn way(self) -> Way {
        match self {
            Route::Shm => Way::Shm,
            Route::Tcp => Way::Tcp,
            Route::Rail(_) => Way::Rdma,
        }
    }

    /// Which rail it is; 0 for others, which have none.
    #[inline]
    fn rail(self) -> usize {
        if let Route::Rail(rail) = self { rail.into() } else { 0 }
    }
}

const _: () = assert!(Route::COUNT <= 1 << (u32::BITS - ID_BITS));

/// The id within the host of connection `id` of a provider.
#[inline]
pub(super) fn host_id(route: Route, id: ConnectionId) -> ConnectionId {
    ConnectionId(route.code() << ID_BITS | id.0)
}

/// One end of a connection.
#[derive(Debug)]
pub struct HostConnection {
    lane: Lane,
    route: Route,
    id: ConnectionId,
    regions: PeerRegions,
    /// By which rail, in words.
    name: Option<String>,
}

impl HostConnection {
    pub(super) fn new(host: &Host, lane: Lane, route: Route, regions: PeerRegions) -> Result<Self, Error> {
        let id = on!(&lane, Lane, lane => lane.id());
        if id.0 >> ID_BITS != 0 {
            return Err(Error::Limit {
                what: "the number of connections that the endpoint has had".to_owned(),
                value: id.0.into(),
                limit: (1 << ID_BITS) - 1,
                cure: "; make another endpoint".to_owned(),
            });
        }
        let name = host.rail_name(route).map(|rail| format!("rdma({rail})"));
        Ok(Self { id: host_id(route, id), lane, route, regions, name })
    }
}

/// The host that a lane is made for has its provider.
impl Host {
    pub(super) fn lane_error(&self, way: Way) -> Error {
        Error::NoSession { address: way.to_string(), reason: self.why_not(way) }
    }
}

#[inline]
fn convert<'a, T>(piece: &Sge<'a, HostRegion>, rail: usize) -> Sge<'a, T>
where
    HostRegion: Pick<T>,
{
    Sge { region: piece.region.pick(rail), offset: piece.offset, length: piece.length }
}

/// A gather list of one provider's regions, from one of any provider's.
#[inline]
fn with_pieces<T, R>(pieces: &[Sge<'_, HostRegion>], rail: usize, then: impl FnOnce(&[Sge<'_, T>]) -> R) -> R
where
    HostRegion: Pick<T>,
{
    let [first, rest @ ..] = pieces else { return then(&[]) };
    assert!(pieces.len() <= MAX_SGE, "{} pieces in a list; at most {MAX_SGE} are possible", pieces.len());
    let mut converted = [convert(first, rail); MAX_SGE];
    for (to, piece) in converted[1..].iter_mut().zip(rest) {
        *to = convert(piece, rail);
    }
    then(&converted[..pieces.len()])
}

/// As [`with_pieces`], for a payload.
#[inline]
fn with_payload<T, R>(
    payload: Payload<'_, HostRegion>,
    rail: usize,
    then: impl FnOnce(Payload<'_, T>) -> R,
) -> R
where
    HostRegion: Pick<T>,
{
    match payload {
        Payload::Inline(bytes) => then(Payload::Inline(bytes)),
        Payload::Gather(pieces) => with_pieces(pieces, rail, |pieces| then(Payload::Gather(pieces))),
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
        self.route.way().name()
    }

    fn way(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.provider().to_owned())
    }

    // The kind is known where it is posted: nothing is left of the `match` there.
    #[inline(always)]
    fn post(&mut self, post: Post<'_, HostRegion>) -> Result<(), PostError> {
        let Self { lane, regions, route, .. } = self;
        let rail = route.rail();
        match post {
            Post::Send { payload, immediate, signal } => on!(lane, Lane, lane => {
                with_payload(payload, rail, |payload| lane.post(Post::Send { payload, immediate, signal }))
            }),
            Post::Write { payload, to, immediate, signal } => {
                let to = regions.translate(to);
                on!(lane, Lane, lane => {
                    with_payload(payload, rail, |payload| lane.post(Post::Write { payload, to, immediate, signal }))
                })
            }
            Post::Read { into, from, signal } => {
                let from = regions.translate(from);
                on!(lane, Lane, lane => with_pieces(into, rail, |into| lane.post(Post::Read { into, from, signal })))
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
