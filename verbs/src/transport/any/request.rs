//! A peer that wants to connect: by a provider's own handshake, or announced by its session.

use std::{fmt, sync::Arc};

#[cfg(feature = "rdma")]
use super::line::{Leash, Line};
use super::{
    HostAttach, HostConnection,
    announced::{Expected, sentence},
    connection::{Lane, Route},
    region::PeerRegions,
};
#[cfg(feature = "rdma")]
use crate::transport::rdma::{RdmaConnection, RdmaJoining, RdmaLeash, RdmaRequest};
use crate::{
    error::Error,
    session::{Key, Way, wire::Verdict},
    transport::{MAX_REPLY_DATA, Reach, Request, host::check_private_data, shm::ShmRequest, tcp::TcpRequest},
};

/// A peer that wants to connect, as a provider knows it.
pub(super) enum Caller {
    Shm(ShmRequest),
    Tcp(TcpRequest),
    #[cfg(feature = "rdma")]
    Rdma(RdmaRequest),
}

impl Caller {
    fn way(&self) -> Way {
        match self {
            Caller::Shm(_) => Way::Shm,
            Caller::Tcp(_) => Way::Tcp,
            #[cfg(feature = "rdma")]
            Caller::Rdma(_) => Way::Rdma,
        }
    }

    pub(super) fn private_data(&self) -> &[u8] {
        on!(self, Caller, caller => caller.private_data())
    }

    fn accept(self, endpoint: &HostAttach, depth: usize, data: &[u8]) -> Result<(Lane, Route), Error> {
        Ok(match self {
            Caller::Shm(caller) => {
                (Lane::Shm(caller.accept_with(&endpoint.shm()?, depth, data)?), Route::Shm)
            }
            Caller::Tcp(caller) => {
                (Lane::Tcp(caller.accept_with(&endpoint.tcp()?, depth, data)?), Route::Tcp)
            }
            #[cfg(feature = "rdma")]
            Caller::Rdma(caller) => {
                (Lane::Rdma(caller.accept_with(&endpoint.rail(0)?, depth, data)?), Route::Rail(0))
            }
        })
    }
}

/// How a lane has come.
pub(super) enum Came {
    /// By a provider's own handshake.
    By(Caller),
    /// Inside its session, with its offer.
    Offered,
}

/// A peer that wants to connect.
pub struct HostRequest {
    /// `None` once it has been answered.
    came: Option<Came>,
    /// What its session has said of it.
    expected: Option<Expected>,
}

impl HostRequest {
    pub(super) fn new(came: Came, expected: Option<Expected>) -> Self {
        Self { came: Some(came), expected }
    }

    fn refuse(&mut self, private_data: &[u8]) {
        match (self.came.take(), self.expected.take()) {
            (None, _) => {}
            (Some(Came::By(caller)), None) => on!(caller, Caller, caller => caller.reject(private_data)),
            // What the program says goes through the session.
            (Some(came), Some(expected)) => {
                expected.line().forget(expected.number);
                expected.answer(Verdict::Refused, Vec::new(), Vec::new(), private_data);
                if let Came::By(caller) = came {
                    on!(caller, Caller, caller => caller.reject(&[]));
                }
            }
            (Some(Came::Offered), None) => unreachable!("{OFFERED}"),
        }
    }
}

const OFFERED: &str = "what comes inside a session is expected";

impl Request for HostRequest {
    type Attach = HostAttach;
    type Connection = HostConnection;

    fn private_data(&self) -> &[u8] {
        match (&self.expected, &self.came) {
            (Some(expected), _) => &expected.wanted.data,
            (None, Some(Came::By(caller))) => caller.private_data(),
            (None, _) => unreachable!("it is answered once, and then consumed"),
        }
    }

    fn key(&self) -> Option<&Key> {
        self.expected.as_ref()?.batch.key.as_deref()
    }

    fn limit(&mut self, reach: &Arc<Reach>) -> bool {
        match self.came.as_mut().expect("it is answered once, and then consumed") {
            Came::By(caller) => on!(caller, Caller, caller => caller.limit(reach)),
            // By a way whose requests no software looks at.
            Came::Offered => false,
        }
    }

    fn accept_with(
        mut self,
        endpoint: &HostAttach,
        depth: usize,
        private_data: &[u8],
    ) -> Result<HostConnection, Error> {
        check_private_data(private_data, MAX_REPLY_DATA)?;
        match (self.came.take().expect("it is answered once, and then consumed"), self.expected.take()) {
            (Came::By(caller), None) => {
                let (lane, route) = caller.accept(endpoint, depth, private_data)?;
                HostConnection::new(endpoint.host(), lane, route, PeerRegions::default())
            }
            (Came::By(caller), Some(expected)) => {
                let accepted = caller.accept(endpoint, depth, &[]);
                let regions = PeerRegions::told(expected.batch.regions.clone());
                let made = |(lane, route)| {
                    Ok((HostConnection::new(endpoint.host(), lane, route, regions)?, endpoint.offers(route)))
                };
                match accepted.and_then(made) {
                    Ok((connection, offers)) => {
                        expected.answer(Verdict::Accepted, Vec::new(), offers, private_data);
                        Ok(connection)
                    }
                    Err(error) => {
                        expected.answer(Verdict::Refused, Vec::new(), Vec::new(), &[]);
                        Err(error)
                    }
                }
            }
            (Came::Offered, Some(expected)) => accept_offered(expected, endpoint, depth, private_data),
            (Came::Offered, None) => unreachable!("{OFFERED}"),
        }
    }

    fn reject(mut self, private_data: &[u8]) {
        let most = MAX_REPLY_DATA;
        assert!(private_data.len() <= most, "{} bytes of private data; at most {most}", private_data.len());
        self.refuse(private_data);
    }
}

/// Accepts a lane that came inside its session.
fn accept_offered(
    expected: Expected,
    endpoint: &HostAttach,
    depth: usize,
    private_data: &[u8],
) -> Result<HostConnection, Error> {
    match join(&expected, endpoint, depth) {
        Ok((connection, route, offer)) => {
            let regions = endpoint.offers(route);
            expected.answer(Verdict::Accepted, offer, regions, private_data);
            Ok(connection)
        }
        Err(error) => {
            expected.line().forget(expected.number);
            match &error {
                // A peer without a place is refused, whichever way it comes.
                Error::Limit { .. } => expected.answer(Verdict::Refused, Vec::new(), Vec::new(), &[]),
                error => {
                    let reason = error.to_string();
                    expected.answer(Verdict::Impossible, Vec::new(), Vec::new(), sentence(&reason));
                }
            }
            Err(error)
        }
    }
}

/// The lane's own end, connected and tied to its session, by which route it goes, and what to tell the peer of it.
#[cfg(feature = "rdma")]
fn join(
    expected: &Expected,
    endpoint: &HostAttach,
    depth: usize,
) -> Result<(HostConnection, Route, Vec<u8>), Error> {
    let (line, number, batch) = (expected.line(), expected.number, &expected.batch);
    let rails = &endpoint.host().0.rails;
    let (joining, rail) = rails.answer(endpoint, depth, batch.rails.theirs, &expected.wanted.offer)?;
    let (offer, route) = (joining.offer(), Route::Rail(rail));
    let lane = Lane::Rdma(tied(line, number, joining));
    // If it cannot be: its end is dropped, and so unties itself.
    let connection =
        HostConnection::new(endpoint.host(), lane, route, PeerRegions::told(batch.regions.clone()))?;
    Ok((connection, route, offer))
}

#[cfg(not(feature = "rdma"))]
fn join(
    expected: &Expected,
    endpoint: &HostAttach,
    _: usize,
) -> Result<(HostConnection, Route, Vec<u8>), Error> {
    Err(endpoint.host().lane_error(expected.batch.way))
}

/// A queue pair whose news its session carries from now on.
#[cfg(feature = "rdma")]
pub(super) fn tied(line: &Arc<Line>, number: u32, joining: RdmaJoining) -> RdmaConnection {
    let told = Arc::downgrade(line);
    let connection = joining.connection_until(move || {
        if let Some(line) = told.upgrade() {
            line.untie(number);
        }
    });
    line.tie(number, Arc::new(connection.leash()));
    connection
}

#[cfg(feature = "rdma")]
impl Leash for RdmaLeash {
    fn ready(&self) {
        self.peer_is_ready();
    }

    fn end(&self) {
        self.disconnect();
    }
}

impl Drop for HostRequest {
    fn drop(&mut self) {
        self.refuse(&[]);
    }
}

impl fmt::Debug for HostRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = match (&self.came, &self.expected) {
            (None, _) => "answered",
            (_, Some(expected)) => expected.batch.way.name(),
            (Some(Came::By(caller)), None) => caller.way().name(),
            (Some(Came::Offered), None) => unreachable!("{OFFERED}"),
        };
        write!(f, "HostRequest({way})")
    }
}
