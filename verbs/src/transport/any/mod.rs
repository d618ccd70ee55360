//! Any provider of a real host: those that an address asks for, chosen when the program runs.
//!
//! ```text
//!  shm://…  rdma://…  tcp://…    this way only: the provider's own handshake
//!  fervor://host:port            a session first (`dial`, `door`), then lanes by the best way that leads there
//! ```
//!
//! A [`Host`] has the providers that its addresses need: one, or for `fervor://` all that work on this machine. What is registered is
//! registered with each of them. An endpoint polls one endpoint of each provider that it has connections of. A connection is of one
//! provider (a *lane*), and every call on it a `match`: statically dispatched, with a branch that the processor predicts.
//!
//! A host with sessions may have several providers of RDMA: one for each port that it uses, its *rails*. A region is registered with each of them.
//! The two ends of a session tell each other their rails, and lanes are spread over those that are on a common network. A rail that
//! fails is left out by lanes that are made afterwards; who lost a lane by it makes another one (a client does so within its lease).
//!
//! | file | what it is |
//! |---|---|
//! | `region` | regions with a name of this process, which each lane translates to its provider's |
//! | `endpoint` | one endpoint for connections of several providers: polling, and sleeping until any has something |
//! | `connection` | a lane |
//! | `listener`, `request` | listening, and a peer that wants to connect |
//! | `rails`, `picking` | the ports that the host uses for RDMA; which of them, of both sides, a lane goes by |
//! | `watcher` | a thread that sleeps on the queue of a rail for a polling thread that sleeps elsewhere |
//! | `line`, `peer` | one end of a session, and the lanes that end with it; who the peer is, and whether it is heard |
//! | `dial`, `dialled`, `asked`, `attendant` | the client's end: the ways to a server, making lanes, for what, and the thread that serves its sessions |
//! | `door`, `guests` | the server's end: who comes in, and the thread that serves their sessions |
//! | `announced`, `shared` | lanes that a session announces; what door, guests and listener share |
//! | `pinning` | RDMA that is dropped when memory cannot be pinned |
//!
//! To give an object of one host to an object of another is a bug, and panics.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use attendant::{Attendant, Call};
use line::{Bell, Ear, Line};

#[cfg(feature = "rdma")]
use crate::transport::rdma;
use crate::{
    address::Address,
    error::Error,
    memory::{Exclusive, Memory},
    rails::{Rail, RailName, RailStats},
    session::{
        Key, KeyRing, Way,
        wire::{Boot, LaneRails},
    },
    transport::{Access, Connected, EndpointConfig, LaneSpec, Transport, host, shm, tcp},
};

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

mod announced;
mod asked;
mod attendant;
mod connection;
mod dial;
mod dialled;
mod door;
mod endpoint;
mod guests;
mod line;
mod listener;
mod peer;
#[cfg(any(feature = "rdma", test))]
mod picking;
mod pinning;
#[cfg(feature = "rdma")]
mod rails;
#[cfg(test)]
mod raw;
mod region;
mod request;
#[cfg(test)]
mod session_tests;
mod shared;
#[cfg(test)]
mod suite;
#[cfg(test)]
mod tests;
#[cfg(feature = "rdma")]
mod watcher;

pub use connection::HostConnection;
pub use endpoint::{HostAttach, HostEndpoint};
pub use listener::HostListener;
pub use peer::Peer;
pub use region::{HostExport, HostRegion};
pub use request::HostRequest;

/// A connection id of a provider within a host has so many bits; those above it say which provider, and which rail.
const ID_BITS: u32 = 28;

/// The transport of a real host.
#[derive(Clone)]
pub struct Host(Arc<Inner>);

/// What all objects of a host share.
struct Inner {
    shm: Option<shm::Shm>,
    tcp: Option<tcp::Tcp>,
    #[cfg(feature = "rdma")]
    rails: rails::Rails,
    /// Why there is no RDMA here.
    no_rdma: String,
    /// Regions have names of this process, and peers are told them in sessions. Otherwise there is one provider.
    sessions: bool,
    regions: region::Names,
    keys: KeyRing,
    boot: Boot,
    /// Whether RDMA is still used, if there is some.
    pinning: pinning::Pinning,
    /// The sessions with servers, by their addresses.
    dialled: Mutex<HashMap<Address, Arc<Mutex<dial::Dialled>>>>,
    /// The thread that serves them, from the first one on.
    attendant: Mutex<Option<Attendant>>,
    /// All sessions that have begun.
    lines: Mutex<Vec<Weak<Line>>>,
}

impl Host {
    /// The host that serves all of `addresses`: those of one provider, or of sessions. Sessions use the key in the environment
    /// ([`Key::from_environment`]), if there is one.
    ///
    /// # Errors
    /// [`Error::BadAddress`] for the first address of another kind than the one before it, or of one that only simulations have;
    /// what the provider says when it cannot start; a key that is none.
    pub fn for_addresses(addresses: &[Address]) -> Result<Self, Error> {
        let sessions = addresses.iter().any(|address| matches!(address, Address::Session { .. }));
        let key = if sessions { Key::from_environment()? } else { None };
        Self::with_keys(addresses, key.into_iter().collect())
    }

    /// As [`for_addresses`](Self::for_addresses), with these keys: a client uses the first, a server takes all.
    ///
    /// # Errors
    /// As there; keys for addresses that have no sessions.
    pub fn with_keys(addresses: &[Address], keys: KeyRing) -> Result<Self, Error> {
        let sessions = addresses.iter().any(|address| matches!(address, Address::Session { .. }));
        let devices = if sessions { crate::rails::from_environment()? } else { Vec::new() };
        Self::with_devices(addresses, keys, &devices)
    }

    /// As [`with_keys`](Self::with_keys), with these rails: ports of RDMA devices, or all ports of a device. None: all that there are.
    ///
    /// # Errors
    /// As there; a device that is not there; devices for addresses that have no sessions.
    pub fn with_devices(addresses: &[Address], keys: KeyRing, devices: &[RailName]) -> Result<Self, Error> {
        let refuse =
            |address: &Address, reason: String| Err(Error::BadAddress { url: address.to_string(), reason });
        let Some(first) = addresses.first() else {
            return refuse(&Address::Shm("".into()), "no address was given".to_owned());
        };
        let odd = addresses.iter().find(|a| std::mem::discriminant(*a) != std::mem::discriminant(first));
        if let Some(odd) = odd {
            return refuse(
                odd,
                format!(
                    "it is of another transport than `{first}`, and one program uses one; for several ways in one program write \
                     fervor://host:port for all of them"
                ),
            );
        }
        if !keys.is_empty() && !matches!(first, Address::Session { .. }) {
            return refuse(
                first,
                "a key was given, and only fervor://host:port has sessions that use one".to_owned(),
            );
        }
        if let Some(device) = devices.first()
            && !matches!(first, Address::Session { .. })
        {
            return refuse(
                first,
                format!(
                    "devices were named ({device}), and only fervor://host:port uses several; an rdma:// address is that of its device"
                ),
            );
        }
        let mut inner = Inner::new(keys);
        match first {
            Address::Shm(_) => inner.shm = Some(shm::Shm::new()?),
            Address::Tcp { .. } => inner.tcp = Some(tcp::Tcp::new()),
            Address::Rdma { .. } => inner.with_rdma(first)?,
            Address::Session { .. } => inner.with_ways(addresses, devices)?,
            Address::Sim(_) => return refuse(first, "only simulations have sim:// addresses".to_owned()),
        }
        Ok(Self(Arc::new(inner)))
    }

    /// The RDMA providers: one for each rail.
    #[cfg(feature = "rdma")]
    pub fn rdma(&self) -> impl Iterator<Item = &rdma::Rdma> {
        self.0.rails.iter()
    }

    /// The rails, and what they have done.
    pub fn rails(&self) -> Vec<RailStats> {
        #[cfg(feature = "rdma")]
        return self.0.rails.stats();
        #[cfg(not(feature = "rdma"))]
        return Vec::new();
    }

    /// What peers are told of the rails.
    fn told_rails(&self) -> Vec<Rail> {
        #[cfg(feature = "rdma")]
        return self.0.rails.told();
        #[cfg(not(feature = "rdma"))]
        return Vec::new();
    }

    /// The name of the rail of a route, if it is one by a rail.
    fn rail_name(&self, route: connection::Route) -> Option<&str> {
        match route {
            #[cfg(feature = "rdma")]
            connection::Route::Rail(rail) => Some(self.0.rails.name(rail.into())),
            _ => None,
        }
    }

    /// Whether the host can go that way.
    fn has(&self, way: Way) -> bool {
        match way {
            Way::Shm => self.0.shm.is_some(),
            Way::Tcp => self.0.tcp.is_some(),
            #[cfg(feature = "rdma")]
            Way::Rdma => !self.0.rails.is_empty() && self.0.pinning.dropped().is_none(),
            #[cfg(not(feature = "rdma"))]
            Way::Rdma => false,
        }
    }

    /// Why it cannot.
    fn why_not(&self, way: Way) -> String {
        match way {
            Way::Rdma if !self.0.no_rdma.is_empty() => self.0.no_rdma.clone(),
            Way::Rdma => {
                self.0.pinning.dropped().unwrap_or_else(|| "this process does not use it".to_owned())
            }
            _ => "this process does not use it".to_owned(),
        }
    }

    /// The ways that it can go, for people: `shm, rdma (mlx5_0:1, mlx5_1:1), tcp`.
    pub fn ways(&self) -> String {
        let name = |way: &Way| match way {
            #[cfg(feature = "rdma")]
            Way::Rdma => format!("rdma ({})", self.0.rails.names().join(", ")),
            way => way.to_string(),
        };
        Way::ALL.iter().filter(|way| self.has(**way)).map(name).collect::<Vec<_>>().join(", ")
    }

    /// The processes that this one has sessions with: servers and clients.
    pub fn peers(&self) -> Vec<Peer> {
        let lines = self.0.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter_map(|line| line.upgrade()?.peer()).collect()
    }

    /// A session has begun.
    fn note_peer(&self, line: &Arc<Line>) {
        let mut lines = self.0.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.retain(|line| line.strong_count() > 0);
        lines.push(Arc::downgrade(line));
    }
}

#[cfg(feature = "rdma")]
impl From<rdma::Rdma> for Host {
    /// A host that has RDMA alone, on a device that was chosen.
    fn from(rdma: rdma::Rdma) -> Self {
        Self(Arc::new(Inner { rails: rails::Rails::one(rdma), ..Inner::new(KeyRing::default()) }))
    }
}

impl Inner {
    fn new(keys: KeyRing) -> Self {
        Self {
            shm: None,
            tcp: None,
            #[cfg(feature = "rdma")]
            rails: rails::Rails::default(),
            no_rdma: String::new(),
            sessions: false,
            regions: region::Names::default(),
            keys,
            boot: Boot::default(),
            pinning: pinning::Pinning::default(),
            dialled: Mutex::default(),
            attendant: Mutex::default(),
            lines: Mutex::default(),
        }
    }

    #[cfg(feature = "rdma")]
    fn with_rdma(&mut self, address: &Address) -> Result<(), Error> {
        self.rails = rails::Rails::one(rdma::Rdma::for_address(address)?);
        Ok(())
    }

    #[cfg(feature = "rdma")]
    fn with_rails(&mut self, devices: &[RailName]) -> Result<(), Error> {
        // A variable that says nonsense is an error, whatever other ways there are.
        crate::fabric::Fabric::from_env()?;
        match rails::Rails::open(devices) {
            Ok(rails) => self.rails = rails,
            Err(error) if !devices.is_empty() => return Err(error),
            // It is one way of several; whoever finds that none leads anywhere says why.
            Err(error) => self.no_rdma = error.to_string(),
        }
        Ok(())
    }

    #[cfg(not(feature = "rdma"))]
    fn with_rails(&mut self, devices: &[RailName]) -> Result<(), Error> {
        self.no_rdma = "this program was built without `rdma`".to_owned();
        match devices.first() {
            Some(device) => {
                Err(Error::NoDevice { reason: format!("`{device}` cannot be used: {}", self.no_rdma) })
            }
            None => Ok(()),
        }
    }

    #[cfg(not(feature = "rdma"))]
    fn with_rdma(&mut self, address: &Address) -> Result<(), Error> {
        Err(Error::WrongProvider {
            address: address.to_string(),
            provider: "shm or tcp (built without `rdma`)",
        })
    }

    /// All ways that `addresses` of sessions may go.
    fn with_ways(&mut self, addresses: &[Address], devices: &[RailName]) -> Result<(), Error> {
        let asked = |way| {
            addresses.iter().find(
                |address| matches!(address, Address::Session { via, .. } if via.is_none_or(|via| via == way)),
            )
        };
        self.sessions = true;
        self.boot = boot_id()?;
        if asked(Way::Shm).is_some() {
            // Who has proved by a key who it is may be another user of this host.
            let admit = if self.keys.is_empty() { shm::Admit::SameUser } else { shm::Admit::AnyUser };
            self.shm = Some(shm::Shm::admitting(admit)?);
        }
        if asked(Way::Tcp).is_some() {
            self.tcp = Some(tcp::Tcp::new());
        }
        let Some(Address::Session { via, .. }) = asked(Way::Rdma) else { return Ok(()) };
        self.pinning.insists =
            addresses.iter().any(|address| matches!(address, Address::Session { via: Some(Way::Rdma), .. }));
        self.with_rails(devices)?;
        if *via == Some(Way::Rdma) && !self.no_rdma.is_empty() {
            return Err(Error::NoDevice { reason: self.no_rdma.clone() });
        }
        Ok(())
    }

    /// The session with the server at `address`, begun or not.
    fn dialled(&self, address: &Address) -> Arc<Mutex<dial::Dialled>> {
        // One insertion at a time: a panic leaves nothing half done.
        let mut dialled = self.dialled.lock().unwrap_or_else(PoisonError::into_inner);
        dialled.entry(address.clone()).or_default().clone()
    }

    /// Has the thread for sessions, which is started if there is none.
    fn with_attendant<T>(&self, then: impl FnOnce(&Attendant) -> Result<T, Error>) -> Result<T, Error> {
        let mut attendant = self.attendant.lock().unwrap_or_else(PoisonError::into_inner);
        // One that has panicked has said so, and ended its sessions.
        if !attendant.as_ref().is_some_and(Attendant::works) {
            *attendant = Some(Attendant::start()?);
        }
        then(attendant.as_ref().expect("it was just there"))
    }

    /// Has a session served that `make` makes, for a thread that this bell wakes.
    fn attend(
        &self,
        make: impl FnOnce(&Arc<Bell>) -> Result<(Arc<Call>, Ear), Error>,
    ) -> Result<Arc<Call>, Error> {
        self.with_attendant(|attendant| {
            let (call, ear) = make(attendant.bell())?;
            attendant.attend(call.clone(), ear);
            Ok(call)
        })
    }

    /// Has a session served whose door was closed, as long as it has lanes.
    fn attend_leaving(&self, line: Arc<Line>, ear: Ear) {
        let attended = self.with_attendant(|attendant| {
            attendant.attend_leaving(line.clone(), ear);
            Ok(())
        });
        if let Err(error) = attended {
            shared::say(format_args!("the session with {} ends: {error}", line.name()));
            line.end();
        }
    }

    /// Whether lanes of sessions may come by `way`; or why they cannot.
    fn leads(
        &self,
        way: Way,
        #[cfg_attr(not(feature = "rdma"), expect(unused_variables))] rails: LaneRails,
    ) -> Result<(), String> {
        let there = match way {
            Way::Shm => self.shm.is_some(),
            Way::Tcp => self.tcp.is_some(),
            #[cfg(feature = "rdma")]
            Way::Rdma => {
                self.pinning.dropped().map_or(Ok(()), Err)?;
                if !self.rails.is_empty() {
                    return self.rails.lead(rails.theirs);
                }
                false
            }
            #[cfg(not(feature = "rdma"))]
            Way::Rdma => false,
        };
        if there { Ok(()) } else { Err("the server does not use it".to_owned()) }
    }

    /// What each rail makes of memory: nothing, if it cannot be pinned and need not be.
    #[cfg(feature = "rdma")]
    fn pinned<T>(&self, register: impl Fn(&rdma::Rdma) -> Result<T, Error>) -> Result<Vec<T>, Error> {
        if self.rails.is_empty() {
            return Ok(Vec::new());
        }
        let all = || self.rails.iter().map(register).collect::<Result<Vec<_>, _>>();
        Ok(self.pinning.register(all)?.unwrap_or_default())
    }
}

/// What tells this host, since it was started, from others.
fn boot_id() -> Result<Boot, Error> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).map_err(Error::io(format!("read({path})")))?;
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let mut boot = Boot::default();
    for (byte, pair) in boot.iter_mut().zip(digits.chunks(2)) {
        let pair = str::from_utf8(pair).expect("hexadecimal digits");
        *byte = u8::from_str_radix(pair, 16).expect("hexadecimal digits");
    }
    Ok(boot)
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ways = Way::ALL.into_iter().filter(|way| self.has(*way)).map(Way::name);
        write!(f, "Host({})", ways.collect::<Vec<_>>().join(", "))
    }
}

host::runtime!(Host);

impl Transport for Host {
    type Region = HostRegion;
    type Export = HostExport;
    type Endpoint = HostEndpoint;
    type Attach = HostAttach;
    type Connection = HostConnection;
    type View = shm::ShmView;
    type Listener = HostListener;
    type Request = HostRequest;

    fn has_views(&self) -> bool {
        self.has(Way::Shm)
    }

    fn register(&self, memory: &Memory, access: Access) -> Result<HostRegion, Error> {
        HostRegion::new(self, memory, access)
    }

    fn export(&self, memory: &Exclusive) -> Result<HostExport, Error> {
        HostExport::new(self, memory)
    }

    fn endpoint(&self, config: &EndpointConfig) -> Result<HostEndpoint, Error> {
        HostEndpoint::new(self, config)
    }

    fn listen(&self, address: &Address) -> Result<HostListener, Error> {
        HostListener::new(self, address)
    }

    fn connect_with(
        &self,
        address: &Address,
        lane: LaneSpec<'_, HostAttach>,
        timeout: Duration,
    ) -> Result<(HostConnection, Vec<u8>), Error> {
        let mut made = dial::connect_all(self, address, &[lane], timeout)?;
        Ok(made.pop().expect("all lanes are made, or none"))
    }

    fn connect_all(
        &self,
        address: &Address,
        lanes: &[LaneSpec<'_, HostAttach>],
        timeout: Duration,
    ) -> Result<Vec<Connected<HostConnection>>, Error> {
        dial::connect_all(self, address, lanes, timeout)
    }
}
