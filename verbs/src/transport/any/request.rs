//! A peer that wants to connect: by a provider's own handshake, or announced by its session.

use std::{fmt, sync::Arc};

use super::{HostAttach, HostConnection, announced::Expected, connection::Lane, region::PeerRegions};
#[cfg(feature = "rdma")]
use crate::transport::rdma::RdmaRequest;
use crate::{
    error::Error,
    session::{Key, Way},
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

    fn accept(self, endpoint: &HostAttach, depth: usize, data: &[u8]) -> Result<Lane, Error> {
        Ok(match self {
            Caller::Shm(caller) => Lane::Shm(caller.accept_with(&endpoint.shm()?, depth, data)?),
            Caller::Tcp(caller) => Lane::Tcp(caller.accept_with(&endpoint.tcp()?, depth, data)?),
            #[cfg(feature = "rdma")]
            Caller::Rdma(caller) => Lane::Rdma(caller.accept_with(&endpoint.rdma()?, depth, data)?),
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

    fn limit(&mut self, reach: &Arc<Reach>) -> bool {
        let caller = self.caller.as_mut().expect("it is answered once, and then consumed");
        on!(caller, Caller, caller => caller.limit(reach))
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
            return HostConnection::new(
                caller.accept(endpoint, depth, private_data)?,
                PeerRegions::default(),
            );
        };
        let way = caller.way();
        let lane = caller.accept(endpoint, depth, &[]);
        let regions = PeerRegions::told(expected.regions.clone());
        match lane.and_then(|lane| HostConnection::new(lane, regions)) {
            Ok(connection) => {
                // To a session that has ended nobody listens: the lane's own end will tell.
                expected.answer(true, endpoint.offers(way), private_data);
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
