//! Listening: by one provider's own handshake, or by sessions.

use std::{fmt, time::Duration};

use super::{
    Host,
    door::Door,
    request::{Caller, Came, HostRequest},
};
#[cfg(feature = "rdma")]
use crate::transport::rdma::RdmaListener;
use crate::{
    address::Address,
    error::Error,
    session::Way,
    transport::{Listener, Transport, shm::ShmListener, tcp::TcpListener},
};

/// Where peers come in.
enum Entrance {
    Shm(ShmListener),
    Tcp(TcpListener),
    #[cfg(feature = "rdma")]
    Rdma(RdmaListener),
    Sessions(Door),
}

/// A listening address.
pub struct HostListener(Entrance);

impl HostListener {
    pub(super) fn new(host: &Host, address: &Address) -> Result<Self, Error> {
        let inner = &host.0;
        let provider = || Way::ALL.into_iter().find(|way| host.has(*way)).map_or("fervor", Way::name);
        let wrong = || Error::WrongProvider { address: address.to_string(), provider: provider() };
        let entrance = match address {
            Address::Session { .. } if inner.sessions => Entrance::Sessions(Door::open(host, address)?),
            _ if inner.sessions => {
                return Err(Error::WrongProvider { address: address.to_string(), provider: "fervor" });
            }
            Address::Shm(_) => Entrance::Shm(inner.shm.as_ref().ok_or_else(wrong)?.listen(address)?),
            Address::Tcp { .. } => Entrance::Tcp(inner.tcp.as_ref().ok_or_else(wrong)?.listen(address)?),
            #[cfg(feature = "rdma")]
            Address::Rdma { .. } => Entrance::Rdma(inner.rails.get(0).ok_or_else(wrong)?.listen(address)?),
            _ => return Err(wrong()),
        };
        Ok(Self(entrance))
    }
}

impl Listener for HostListener {
    type Request = HostRequest;

    fn accept(&mut self, timeout: Duration) -> Result<Option<HostRequest>, Error> {
        let caller = match &mut self.0 {
            Entrance::Shm(listener) => listener.accept(timeout)?.map(Caller::Shm),
            Entrance::Tcp(listener) => listener.accept(timeout)?.map(Caller::Tcp),
            #[cfg(feature = "rdma")]
            Entrance::Rdma(listener) => listener.accept(timeout)?.map(Caller::Rdma),
            Entrance::Sessions(door) => return door.next(timeout),
        };
        Ok(caller.map(|caller| HostRequest::new(Came::By(caller), None)))
    }

    fn address(&self) -> &Address {
        match &self.0 {
            Entrance::Shm(listener) => listener.address(),
            Entrance::Tcp(listener) => listener.address(),
            #[cfg(feature = "rdma")]
            Entrance::Rdma(listener) => listener.address(),
            Entrance::Sessions(door) => door.address(),
        }
    }
}

impl fmt::Debug for HostListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostListener({})", self.address())
    }
}
