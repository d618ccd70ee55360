//! Any provider of a real host: the one that an address asks for, chosen when the program runs.
//!
//! Every object is an enum over the providers, and every call a `match` on it: statically dispatched, with a
//! branch that the processor predicts. A [`Host`] is of one provider, and so is all that is made from it. To
//! give an object of one provider to an object of another is a bug, and panics.
//!
//! A further provider is one more line in each of the three macros, and its types in the list of enums.

use std::time::Duration;

#[cfg(feature = "rdma")]
use crate::transport::rdma;
use crate::{
    address::Address,
    error::Error,
    memory::{Exclusive, Memory},
    transport::{
        Access, Attach, Completion, Connection, ConnectionId, Endpoint, EndpointConfig, Export, Listener,
        MAX_SGE, Payload, PostError, ReceiveBuffer, Region, RemoteAddress, RemoteRegion, Request, Sge,
        Transport,
        host::{self, HostSignal, HostThread},
        shm, tcp,
    },
};

/// Declares the enums. [`Pick`] takes the object of a provider out again.
macro_rules! enums {
    ($($(#[$attribute:meta])* $name:ident { $shm:ty, $tcp:ty, $rdma:ty })*) => {$(
        $(#[$attribute])*
        #[derive(Debug)]
        pub enum $name {
            /// Over shared memory.
            Shm($shm),
            /// Over TCP.
            Tcp($tcp),
            /// Over RDMA.
            #[cfg(feature = "rdma")]
            Rdma($rdma),
        }

        impl Pick<$shm> for $name {
            #[inline]
            fn pick(&self) -> &$shm {
                match self {
                    $name::Shm(object) => object,
                    $name::Tcp(_) => mixed(),
                    #[cfg(feature = "rdma")]
                    $name::Rdma(_) => mixed(),
                }
            }
        }

        impl Pick<$tcp> for $name {
            #[inline]
            fn pick(&self) -> &$tcp {
                match self {
                    $name::Tcp(object) => object,
                    $name::Shm(_) => mixed(),
                    #[cfg(feature = "rdma")]
                    $name::Rdma(_) => mixed(),
                }
            }
        }

        #[cfg(feature = "rdma")]
        impl Pick<$rdma> for $name {
            #[inline]
            fn pick(&self) -> &$rdma {
                match self {
                    $name::Rdma(object) => object,
                    $name::Shm(_) | $name::Tcp(_) => mixed(),
                }
            }
        }
    )*};
}

/// `on!(value: Enum, object => expression)`: the expression for the object of whichever provider.
macro_rules! on {
    ($value:expr, $enum:ident, $object:ident => $body:expr) => {
        match $value {
            $enum::Shm($object) => $body,
            $enum::Tcp($object) => $body,
            #[cfg(feature = "rdma")]
            $enum::Rdma($object) => $body,
        }
    };
}

/// As [`on`], with a `Result` that holds an object: it becomes the variant `To` of the same provider.
macro_rules! map {
    ($value:expr, $enum:ident => $to:ident, $object:ident => $body:expr) => {
        match $value {
            $enum::Shm($object) => $body.map($to::Shm),
            $enum::Tcp($object) => $body.map($to::Tcp),
            #[cfg(feature = "rdma")]
            $enum::Rdma($object) => $body.map($to::Rdma),
        }
    };
}

/// Objects of two providers were used together.
#[cold]
fn mixed() -> ! {
    panic!("objects of two transports were used together")
}

/// The object of one provider within an enum over all.
trait Pick<T> {
    /// The object.
    ///
    /// # Panics
    /// When it is of another provider.
    fn pick(&self) -> &T;
}

enums! {
    /// The transport of a real host.
    #[derive(Clone)]
    Host { shm::Shm, tcp::Tcp, rdma::Rdma }

    /// A registered memory.
    #[derive(Clone)]
    HostRegion { shm::ShmRegion, tcp::TcpRegion, rdma::RdmaRegion }

    /// An exported memory.
    HostExport { shm::ShmExport, tcp::TcpExport, rdma::RdmaExport }

    /// A completion queue with receive buffers.
    HostEndpoint { shm::ShmEndpoint, tcp::TcpEndpoint, rdma::RdmaEndpoint }

    /// The handle of a [`HostEndpoint`] for other threads.
    #[derive(Clone)]
    HostAttach { shm::ShmAttach, tcp::TcpAttach, rdma::RdmaAttach }

    /// One end of a connection.
    HostConnection { shm::ShmConnection, tcp::TcpConnection, rdma::RdmaConnection }

    /// A listening address.
    HostListener { shm::ShmListener, tcp::TcpListener, rdma::RdmaListener }

    /// A peer that wants to connect.
    HostRequest { shm::ShmRequest, tcp::TcpRequest, rdma::RdmaRequest }
}

impl Host {
    /// The transport that serves all of `addresses`, which are of one provider.
    ///
    /// # Errors
    /// [`Error::BadAddress`] for the first address of another provider than the one before it, or of one that
    /// only simulations have; what the provider says when it cannot start.
    pub fn for_addresses(addresses: &[Address]) -> Result<Self, Error> {
        let refuse =
            |address: &Address, reason: String| Err(Error::BadAddress { url: address.to_string(), reason });
        let Some(first) = addresses.first() else {
            return refuse(&Address::Shm("".into()), "no address was given".to_owned());
        };
        let odd = addresses.iter().find(|a| std::mem::discriminant(*a) != std::mem::discriminant(first));
        if let Some(odd) = odd {
            return refuse(
                odd,
                format!("it is of another transport than `{first}`, and one program uses one; choose one"),
            );
        }
        match first {
            Address::Shm(_) => shm::Shm::new().map(Host::Shm),
            Address::Tcp { .. } => Ok(Host::Tcp(tcp::Tcp::new())),
            #[cfg(feature = "rdma")]
            Address::Rdma { .. } => rdma::Rdma::for_address(first).map(Host::Rdma),
            #[cfg(not(feature = "rdma"))]
            Address::Rdma { .. } => Err(Error::WrongProvider {
                address: first.to_string(),
                provider: "shm or tcp (built without `rdma`)",
            }),
            Address::Sim(_) => refuse(first, "only simulations have sim:// addresses".to_owned()),
        }
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

impl Transport for Host {
    type Region = HostRegion;
    type Export = HostExport;
    type Endpoint = HostEndpoint;
    type Attach = HostAttach;
    type Connection = HostConnection;
    type View = shm::ShmView;
    type Listener = HostListener;
    type Request = HostRequest;
    type Signal = HostSignal;
    type Thread = HostThread;

    const AWAKE_TURNS: u32 = host::AWAKE_TURNS;

    fn has_views(&self) -> bool {
        match self {
            Host::Shm(_) => true,
            Host::Tcp(_) => false,
            #[cfg(feature = "rdma")]
            Host::Rdma(_) => false,
        }
    }

    fn register(&self, memory: &Memory, access: Access) -> Result<HostRegion, Error> {
        map!(self, Host => HostRegion, t => t.register(memory, access))
    }

    fn export(&self, memory: &Exclusive) -> Result<HostExport, Error> {
        map!(self, Host => HostExport, t => t.export(memory))
    }

    fn endpoint(&self, config: &EndpointConfig) -> Result<HostEndpoint, Error> {
        map!(self, Host => HostEndpoint, t => t.endpoint(config))
    }

    fn listen(&self, address: &Address) -> Result<HostListener, Error> {
        map!(self, Host => HostListener, t => t.listen(address))
    }

    fn connect(
        &self,
        endpoint: &HostAttach,
        address: &Address,
        private_data: &[u8],
        timeout: Duration,
    ) -> Result<(HostConnection, Vec<u8>), Error> {
        let mut reply = Vec::new();
        map!(self, Host => HostConnection, t => {
            t.connect(endpoint.pick(), address, private_data, timeout).map(|(connection, data)| {
                reply = data;
                connection
            })
        })
        .map(|connection| (connection, reply))
    }

    fn now(&self) -> Duration {
        host::now()
    }

    fn relax(&self, turn: u32) {
        host::relax(turn);
    }

    fn signal(&self) -> HostSignal {
        HostSignal::new()
    }

    fn spawn(
        &self,
        name: &str,
        core: Option<usize>,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<HostThread, Error> {
        host::spawn(name, core, body)
    }
}

impl Region for HostRegion {
    fn memory(&self) -> &Memory {
        on!(self, HostRegion, region => region.memory())
    }

    fn remote(&self) -> RemoteRegion {
        on!(self, HostRegion, region => region.remote())
    }
}

impl Export for HostExport {
    fn remote(&self) -> RemoteRegion {
        on!(self, HostExport, export => export.remote())
    }
}

impl Endpoint for HostEndpoint {
    type Attach = HostAttach;

    fn attach(&self) -> HostAttach {
        match self {
            HostEndpoint::Shm(endpoint) => HostAttach::Shm(endpoint.attach()),
            HostEndpoint::Tcp(endpoint) => HostAttach::Tcp(endpoint.attach()),
            #[cfg(feature = "rdma")]
            HostEndpoint::Rdma(endpoint) => HostAttach::Rdma(endpoint.attach()),
        }
    }

    #[inline]
    fn poll(&mut self, into: &mut Vec<Completion>) -> usize {
        on!(self, HostEndpoint, endpoint => endpoint.poll(into))
    }

    fn wait(&mut self, timeout: Duration) {
        on!(self, HostEndpoint, endpoint => endpoint.wait(timeout));
    }

    #[inline]
    fn message(&self, buffer: &ReceiveBuffer) -> &[u8] {
        on!(self, HostEndpoint, endpoint => endpoint.message(buffer))
    }

    #[inline]
    fn release(&mut self, buffer: ReceiveBuffer) {
        on!(self, HostEndpoint, endpoint => endpoint.release(buffer));
    }
}

impl Attach for HostAttach {
    fn wake(&self) {
        on!(self, HostAttach, attach => attach.wake());
    }
}

impl Connection for HostConnection {
    type Region = HostRegion;
    // Only `shm` has views.
    type View = shm::ShmView;

    #[inline]
    fn id(&self) -> ConnectionId {
        on!(self, HostConnection, connection => connection.id())
    }

    #[inline]
    fn send(
        &mut self,
        payload: Payload<'_, HostRegion>,
        immediate: Option<u32>,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        on!(self, HostConnection, connection => with_payload(payload, |p| connection.send(p, immediate, signal)))
    }

    #[inline]
    fn write(
        &mut self,
        payload: Payload<'_, HostRegion>,
        remote: RemoteAddress,
        immediate: Option<u32>,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        on!(self, HostConnection, connection => {
            with_payload(payload, |p| connection.write(p, remote, immediate, signal))
        })
    }

    #[inline]
    fn read(
        &mut self,
        into: &[Sge<'_, HostRegion>],
        remote: RemoteAddress,
        signal: Option<u64>,
    ) -> Result<(), PostError> {
        on!(self, HostConnection, connection => with_pieces(into, |p| connection.read(p, remote, signal)))
    }

    #[inline]
    fn ring(&mut self) -> Result<(), PostError> {
        on!(self, HostConnection, connection => connection.ring())
    }

    #[inline]
    fn room(&self) -> usize {
        on!(self, HostConnection, connection => connection.room())
    }

    fn view(&self, region: RemoteRegion) -> Option<shm::ShmView> {
        match self {
            HostConnection::Shm(connection) => connection.view(region),
            HostConnection::Tcp(_) => None,
            #[cfg(feature = "rdma")]
            HostConnection::Rdma(_) => None,
        }
    }

    fn disconnect(&mut self) {
        on!(self, HostConnection, connection => connection.disconnect());
    }

    fn ends_with_peer(&self) -> bool {
        on!(self, HostConnection, connection => connection.ends_with_peer())
    }
}

impl Listener for HostListener {
    type Request = HostRequest;

    fn accept(&mut self, timeout: Duration) -> Result<Option<HostRequest>, Error> {
        match self {
            HostListener::Shm(listener) => Ok(listener.accept(timeout)?.map(HostRequest::Shm)),
            HostListener::Tcp(listener) => Ok(listener.accept(timeout)?.map(HostRequest::Tcp)),
            #[cfg(feature = "rdma")]
            HostListener::Rdma(listener) => Ok(listener.accept(timeout)?.map(HostRequest::Rdma)),
        }
    }

    fn address(&self) -> &Address {
        on!(self, HostListener, listener => listener.address())
    }
}

impl Request for HostRequest {
    type Attach = HostAttach;
    type Connection = HostConnection;

    fn private_data(&self) -> &[u8] {
        on!(self, HostRequest, request => request.private_data())
    }

    fn accept_with(
        self,
        endpoint: &HostAttach,
        depth: usize,
        private_data: &[u8],
    ) -> Result<HostConnection, Error> {
        map!(self, HostRequest => HostConnection, request => request.accept_with(endpoint.pick(), depth, private_data))
    }

    fn reject(self, private_data: &[u8]) {
        on!(self, HostRequest, request => request.reject(private_data));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scheme_picks_the_provider() {
        let parse = |url: &&str| url.parse::<Address>().unwrap();
        let choose = |urls: &[&str]| Host::for_addresses(&urls.iter().map(parse).collect::<Vec<_>>());
        assert!(matches!(choose(&["shm:///tmp/a", "shm:///tmp/b"]), Ok(Host::Shm(_))));
        assert!(matches!(choose(&["tcp://a:1", "tcp://b:1"]), Ok(Host::Tcp(_))));
        let mixed = choose(&["shm:///tmp/a", "shm:///tmp/b", "rdma://c:1"]).unwrap_err().to_string();
        assert!(mixed.contains("`rdma://c:1`") && mixed.contains("`shm:///tmp/a`"), "{mixed}");
        assert!(choose(&["sim://a"]).unwrap_err().to_string().contains("simulations"));
        assert!(choose(&[]).unwrap_err().to_string().contains("no address"));
    }
}
