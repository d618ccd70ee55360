//! A transport as one rail of several: what peers are told of it, whom it does not reach, and connections at addresses that two sessions have
//! agreed on.

use std::{net::Ipv6Addr, time::Duration};

use super::{Rdma, RdmaAttach, RdmaConnection, RdmaRequest, connect};
use crate::{
    address::Address,
    error::Error,
    rails::{OwnAddress, Rail},
};

impl Rdma {
    /// What peers are told, and the addresses in the order in which they are told.
    pub(in crate::transport) fn rail(&self) -> (Rail, Vec<OwnAddress>) {
        self.device.rail()
    }

    /// Whether the port is active now.
    pub(in crate::transport) fn is_active(&self) -> bool {
        self.device.is_active()
    }

    /// How often in a row, of late, a peer at this address could not be connected to, or was lost.
    pub(in crate::transport) fn failures_of(&self, peer: Ipv6Addr) -> u32 {
        self.device.failures_of(peer)
    }

    /// A peer at this address could not be connected to.
    pub(in crate::transport) fn note_failure(&self, peer: Ipv6Addr) {
        self.device.note_failure(peer);
    }

    /// Connections that were lost.
    pub(in crate::transport) fn lost(&self) -> u64 {
        self.device.lost()
    }

    /// Processors near the device. None: near to none in particular.
    pub(in crate::transport) fn near(&self) -> Vec<usize> {
        self.device.near()
    }

    /// Connects from an address of this rail, by a socket that goes any way.
    ///
    /// # Errors
    /// As [`Transport::connect`](crate::transport::Transport::connect).
    pub(in crate::transport) fn connect_at(
        &self,
        endpoint: &RdmaAttach,
        from: &OwnAddress,
        address: &Address,
        private_data: &[u8],
        timeout: Duration,
    ) -> Result<(RdmaConnection, Vec<u8>), Error> {
        self.check_ours(endpoint);
        connect::connect_at(&endpoint.0, self.device.at(from), address, private_data, timeout)
    }

    /// Accepts, at an address of this rail, a peer that has come for any rail.
    ///
    /// # Errors
    /// As [`Request::accept_with`](crate::transport::Request::accept_with).
    pub(in crate::transport) fn accept_at(
        &self,
        request: RdmaRequest,
        endpoint: &RdmaAttach,
        at: &OwnAddress,
        depth: usize,
    ) -> Result<RdmaConnection, Error> {
        self.check_ours(endpoint);
        request.accept_at(endpoint, self.device.at(at), depth, &[])
    }
}
