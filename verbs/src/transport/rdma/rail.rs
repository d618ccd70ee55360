//! A transport as one rail of several: what peers are told of it, whom it does not reach, and connections at addresses that two sessions have
//! agreed on.

use std::net::Ipv6Addr;

use super::{
    Rdma, RdmaAttach, RdmaJoining,
    joining::{Joining, Place},
    offer::Offer,
};
use crate::{
    error::Error,
    fabric::Way,
    rails::{OwnAddress, Rail},
};

/// The kind of network and the address at which a peer wants to be reached whose offer this is.
///
/// # Errors
/// A sentence that names what is wrong with the offer.
pub(in crate::transport) fn peer_of(offer: &[u8]) -> Result<(Way, Ipv6Addr), String> {
    Offer::decode(offer).map(|offer| (offer.way, offer.gid))
}

impl Rdma {
    /// What peers are told, and the addresses in the order in which they are told.
    pub(in crate::transport) fn rail(&self) -> (Rail, Vec<OwnAddress>) {
        self.device.rail()
    }

    /// Whether the port is active.
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

    /// A peer at this address did not answer in time.
    pub(in crate::transport) fn note_doubt(&self, peer: Ipv6Addr) {
        self.device.note_doubt(peer);
    }

    /// Connections that were lost.
    pub(in crate::transport) fn lost(&self) -> u64 {
        self.device.lost()
    }

    /// Processors near the device. None: near to none in particular.
    pub(in crate::transport) fn near(&self) -> Vec<usize> {
        self.device.near()
    }

    /// As [`join_with`](Self::join_with), at an address of this rail.
    ///
    /// # Errors
    /// As there.
    pub(in crate::transport) fn join_at(
        &self,
        endpoint: &RdmaAttach,
        from: &OwnAddress,
        depth: usize,
    ) -> Result<RdmaJoining, Error> {
        self.check_ours(endpoint);
        let place = Place::reserve(&endpoint.0)?;
        Joining::new(&endpoint.0, place, self.device.at(from), depth).map(RdmaJoining)
    }

    /// Answers an offer, at an address of this rail. (On Ethernet the kernel looks for the hardware address of the GID that is offered, for up
    /// to a second if there is none.)
    ///
    /// # Errors
    /// As [`join_at`](Self::join_at) and [`RdmaJoining::answer`].
    pub(in crate::transport) fn answer_at(
        &self,
        endpoint: &RdmaAttach,
        at: &OwnAddress,
        depth: usize,
        offer: &[u8],
    ) -> Result<RdmaJoining, Error> {
        let mut joining = self.join_at(endpoint, at, depth)?;
        joining.answer(offer)?;
        Ok(joining)
    }
}
