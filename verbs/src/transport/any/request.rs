//! A peer that wants to connect: by a provider's own handshake, or announced by its session.

use std::fmt;

use super::{
    HostAttach, HostConnection,
    announced::Expected,
    connection::{Lane, Route},
    region::PeerRegions,
};
#[cfg(feature = "rdma")]
use crate::transport::rdma::RdmaRequest;
use crate::{
    error::Error,
    session::{Key, Way, wire::LaneRails},
    transport::{MAX_REPLY_DATA, Request, host::check_private_data, shm::ShmRequest, tcp::TcpRequest},
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

    /// Accepts it: one that a session has announced by one of the rails that it has asked for.
    fn accept(
        self,
        endpoint: &HostAttach,
        depth: usize,
        data: &[u8],
        #[cfg_attr(not(feature = "rdma"), expect(unused_variables))] rails: Option<LaneRails>,
    ) -> Result<(Lane, Route), Error> {
        Ok(match self {
            Caller::Shm(caller) => {
                (Lane::Shm(caller.accept_with(&endpoint.shm()?, depth, data)?), Route::Shm)
            }
            Caller::Tcp(caller) => {
                (Lane::Tcp(caller.accept_with(&endpoint.tcp()?, depth, data)?), Route::Tcp)
            }
            #[cfg(feature = "rdma")]
            Caller::Rdma(caller) => match rails {
                Some(rails) => endpoint.host().0.rails.accept(caller, endpoint, depth, rails.theirs)?,
                None => (Lane::Rdma(caller.accept_with(&endpoint.rail(0)?, depth, data)?), Route::Rail(0)),
            },
        })
    }
}

/// A peer that wants to connect.
pub struct HostRequest {
    /// `None` once it has been answered.
    caller: Option<Caller>,
    /// What its session has said of it.
    expected: Option<Expected>,
}

impl HostRequest {
    pub(super) fn new(caller: Caller, expected: Option<Expected>) -> Self {
        Self { caller: Some(caller), expected }
    }

    fn refuse(&mut self, private_data: &[u8]) {
        let Some(caller) = self.caller.take() else { return };
        match self.expected.take() {
            // What the program says goes through the session.
            Some(expected) => {
                expected.answer(false, Vec::new(), private_data);
                on!(caller, Caller, caller => caller.reject(&[]));
            }
            None => on!(caller, Caller, caller => caller.reject(private_data)),
        }
    }
}

impl Request for HostRequest {
    type Attach = HostAttach;
    type Connection = HostConnection;

    fn private_data(&self) -> &[u8] {
        match (&self.expected, &self.caller) {
            (Some(expected), _) => &expected.data,
            (None, Some(caller)) => caller.private_data(),
            (None, None) => unreachable!("it is answered once, and then consumed"),
        }
    }

    fn key(&self) -> Option<&Key> {
        self.expected.as_ref()?.key.as_deref()
    }

    fn accept_with(
        mut self,
        endpoint: &HostAttach,
        depth: usize,
        private_data: &[u8],
    ) -> Result<HostConnection, Error> {
        check_private_data(private_data, MAX_REPLY_DATA)?;
        let caller = self.caller.take().expect("it is answered once, and then consumed");
        let Some(expected) = self.expected.take() else {
            let (lane, route) = caller.accept(endpoint, depth, private_data, None)?;
            return HostConnection::new(endpoint.host(), lane, route, PeerRegions::default());
        };
        let lane = caller.accept(endpoint, depth, &[], Some(expected.rails));
        let regions = PeerRegions::told(expected.regions.clone());
        let made = |(lane, route)| Ok((HostConnection::new(endpoint.host(), lane, route, regions)?, route));
        match lane.and_then(made) {
            Ok((connection, route)) => {
                // To a session that has ended nobody listens: the lane's own end will tell.
                expected.answer(true, endpoint.offers(route), private_data);
                Ok(connection)
            }
            Err(error) => {
                expected.answer(false, Vec::new(), &[]);
                Err(error)
            }
        }
    }

    fn reject(mut self, private_data: &[u8]) {
        let most = MAX_REPLY_DATA;
        assert!(private_data.len() <= most, "{} bytes of private data; at most {most}", private_data.len());
        self.refuse(private_data);
    }
}

impl Drop for HostRequest {
    fn drop(&mut self) {
        self.refuse(&[]);
    }
}

impl fmt::Debug for HostRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = self.caller.as_ref().map_or("answered", |caller| caller.way().name());
        write!(f, "HostRequest({way})")
    }
}
