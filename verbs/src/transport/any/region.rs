//! Regions of a host, which each of its providers has registered.
//!
//! To a provider a region has a key and an address; to another one, and to each rail of RDMA, it has others. A message that tells a peer of a region may go by
//! any lane. So where there are several providers, a region has a *name*, one for all: its key is a number of this process, and its
//! addresses are those that [`base`] gives to that number: a place with another region's key is outside that region. When a lane is made, each side is told, inside the session, what the lane's provider calls the regions of the
//! other ([`offers`](Names::offers)); posting on the lane translates ([`PeerRegions`]).
//!
//! With one provider, and no session, there is nothing to translate: keys and addresses are the provider's.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use super::{Host, connection::Route};
use crate::{
    error::Error,
    memory::{Exclusive, Memory},
    session::wire::{MAX_REGIONS, NamedRegion},
    transport::{
        Access, Export, Region, RemoteAddress, RemoteRegion, Transport,
        shm::{ShmExport, ShmRegion},
        tcp::{TcpExport, TcpRegion},
    },
};
#[cfg(feature = "rdma")]
use crate::{
    rails::MAX_RAILS,
    transport::rdma::{RdmaExport, RdmaRegion},
};

/// What each provider calls a region, by the code of its [`Route`].
type Called = [Option<RemoteRegion>; Route::COUNT];

/// The address of the first byte of the region of this name.
#[inline]
fn base(name: u32) -> u64 {
    u64::from(name) << 40
}

/// A region that peers may reach, as long as it is registered.
#[derive(Debug)]
struct Named {
    name: u32,
    called: Called,
}

/// The regions of a host that peers may reach.
#[derive(Debug, Default)]
pub(super) struct Names(Mutex<Living>);

#[derive(Debug, Default)]
struct Living {
    last: u32,
    regions: Vec<Weak<Named>>,
}

impl Names {
    fn insert(&self, called: Called) -> Result<Arc<Named>, Error> {
        // Every change leaves a list that is whole.
        let mut living = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        living.regions.retain(|region| region.strong_count() > 0);
        if living.regions.len() >= MAX_REGIONS || living.last == u32::MAX {
            return Err(Error::Limit {
                what: "the number of regions that peers may reach".to_owned(),
                value: living.regions.len() as u64 + 1,
                limit: MAX_REGIONS as u64,
                cure: "; drop some, or use fewer shards".to_owned(),
            });
        }
        // A name is not given again: 0 is none.
        living.last += 1;
        let named = Arc::new(Named { name: living.last, called });
        living.regions.push(Arc::downgrade(&named));
        Ok(named)
    }

    /// What a peer is told of the regions that there are, for a lane by this route.
    pub(super) fn offers(&self, route: Route) -> Vec<NamedRegion> {
        let living = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let offer = |region: &Weak<Named>| {
            let named = region.upgrade()?;
            Some(NamedRegion { name: named.name, region: named.called[route.code() as usize]? })
        };
        living.regions.iter().filter_map(offer).collect()
    }
}

/// What a lane's provider calls the regions of the peer. `None`: what the peer calls them.
#[derive(Debug, Default)]
pub(super) struct PeerRegions(Option<Vec<NamedRegion>>);

impl PeerRegions {
    /// As the peer has told.
    pub(super) fn told(mut regions: Vec<NamedRegion>) -> Self {
        regions.sort_unstable_by_key(|region| region.name);
        Self(Some(regions))
    }

    fn find(&self, name: u32) -> Option<Result<RemoteRegion, ()>> {
        let regions = self.0.as_ref()?;
        let found = match regions.first() {
            // Most peers have one.
            Some(first) if first.name == name => Some(first),
            _ => regions.binary_search_by_key(&name, |region| region.name).ok().map(|at| &regions[at]),
        };
        Some(found.map(|found| found.region).ok_or(()))
    }

    /// What the provider calls a place. One that the peer has not told of becomes one that no region has: the last byte that
    /// there can be, under its own name as a key.
    #[inline]
    pub(super) fn translate(&self, remote: RemoteAddress) -> RemoteAddress {
        match self.find(remote.key) {
            None => remote,
            Some(Ok(region)) => {
                let offset = remote.address.wrapping_sub(base(remote.key));
                RemoteAddress { address: region.address.wrapping_add(offset), key: region.key }
            }
            Some(Err(())) => RemoteAddress { address: u64::MAX, key: remote.key },
        }
    }

    /// As [`translate`](Self::translate), of a part of a region.
    pub(super) fn translate_region(&self, remote: RemoteRegion) -> Option<RemoteRegion> {
        match self.find(remote.key) {
            None => Some(remote),
            Some(found) => found.ok().map(|region| RemoteRegion {
                address: region.address.wrapping_add(remote.address.wrapping_sub(base(remote.key))),
                length: remote.length,
                key: region.key,
            }),
        }
    }
}

/// The object of one provider among those of all.
pub(super) trait Pick<T> {
    /// The object.
    ///
    /// # Panics
    /// When the host has none of that provider, or of that rail.
    fn pick(&self, rail: usize) -> &T;
}

/// Objects of two hosts were used together.
#[cold]
pub(super) fn mixed() -> ! {
    panic!("objects of two transports were used together")
}

/// A registered memory.
#[derive(Clone)]
pub struct HostRegion {
    /// Peers are told of it as long as there is a clone. Before the others: nobody is told of a region that is gone.
    _named: Option<Arc<Named>>,
    shm: Option<ShmRegion>,
    tcp: Option<TcpRegion>,
    /// With each rail.
    #[cfg(feature = "rdma")]
    rails: [Option<RdmaRegion>; MAX_RAILS],
    memory: Memory,
    remote: RemoteRegion,
}

/// What a region is to all: under its name if there are sessions, or as its one provider calls it.
fn remote(host: &Host, called: Called, named: Option<&Arc<Named>>, length: usize) -> RemoteRegion {
    match named {
        Some(named) => RemoteRegion { address: base(named.name), length: length as u64, key: named.name },
        // No peer has a name for it.
        None if host.0.sessions => RemoteRegion { address: 0, length: length as u64, key: 0 },
        None => called.into_iter().flatten().next().expect("a host has a provider"),
    }
}

impl HostRegion {
    pub(super) fn new(host: &Host, memory: &Memory, access: Access) -> Result<Self, Error> {
        let inner = &host.0;
        let shm = inner.shm.as_ref().map(|shm| shm.register(memory, access)).transpose()?;
        let tcp = inner.tcp.as_ref().map(|tcp| tcp.register(memory, access)).transpose()?;
        let mut called = Called::default();
        called[Route::Shm.code() as usize] = shm.as_ref().map(Region::remote);
        called[Route::Tcp.code() as usize] = tcp.as_ref().map(Region::remote);
        #[cfg(feature = "rdma")]
        let mut rails = [const { None }; MAX_RAILS];
        #[cfg(feature = "rdma")]
        for (number, region) in inner.pinned(|rdma| rdma.register(memory, access))?.into_iter().enumerate() {
            called[Route::Rail(number as u8).code() as usize] = Some(region.remote());
            rails[number] = Some(region);
        }
        let reachable = inner.sessions && access != Access::Local;
        let named = reachable.then(|| inner.regions.insert(called)).transpose()?;
        Ok(Self {
            shm,
            tcp,
            #[cfg(feature = "rdma")]
            rails,
            memory: memory.clone(),
            remote: remote(host, called, named.as_ref(), memory.len()),
            _named: named,
        })
    }
}

impl Pick<ShmRegion> for HostRegion {
    #[inline]
    fn pick(&self, _: usize) -> &ShmRegion {
        self.shm.as_ref().unwrap_or_else(|| mixed())
    }
}

impl Pick<TcpRegion> for HostRegion {
    #[inline]
    fn pick(&self, _: usize) -> &TcpRegion {
        self.tcp.as_ref().unwrap_or_else(|| mixed())
    }
}

#[cfg(feature = "rdma")]
impl Pick<RdmaRegion> for HostRegion {
    #[inline]
    fn pick(&self, rail: usize) -> &RdmaRegion {
        self.rails[rail].as_ref().unwrap_or_else(|| mixed())
    }
}

impl Region for HostRegion {
    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn remote(&self) -> RemoteRegion {
        self.remote
    }
}

impl fmt::Debug for HostRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostRegion({:?}, key {})", self.memory, self.remote.key)
    }
}

/// An exported memory.
pub struct HostExport {
    remote: RemoteRegion,
    _named: Option<Arc<Named>>,
    tcp: Option<TcpExport>,
    #[cfg(feature = "rdma")]
    _rails: Vec<RdmaExport>,
    _shm: Option<ShmExport>,
}

impl HostExport {
    pub(super) fn new(host: &Host, memory: &Exclusive) -> Result<Self, Error> {
        let inner = &host.0;
        // `shm` comes last: it seals the memory against further mappings that can write.
        let tcp = inner.tcp.as_ref().map(|tcp| tcp.export(memory)).transpose()?;
        #[cfg(feature = "rdma")]
        let rails = inner.pinned(|rdma| rdma.export(memory))?;
        let shm = inner.shm.as_ref().map(|shm| shm.export(memory)).transpose()?;
        let mut called = Called::default();
        called[Route::Shm.code() as usize] = shm.as_ref().map(Export::remote);
        called[Route::Tcp.code() as usize] = tcp.as_ref().map(Export::remote);
        #[cfg(feature = "rdma")]
        for (number, export) in rails.iter().enumerate() {
            called[Route::Rail(number as u8).code() as usize] = Some(export.remote());
        }
        let named = inner.sessions.then(|| inner.regions.insert(called)).transpose()?;
        Ok(Self {
            remote: remote(host, called, named.as_ref(), memory.len()),
            _named: named,
            tcp,
            #[cfg(feature = "rdma")]
            _rails: rails,
            _shm: shm,
        })
    }
}

impl Export for HostExport {
    fn remote(&self) -> RemoteRegion {
        self.remote
    }

    fn part(&self, offset: u64, length: u64) -> RemoteRegion {
        // Only lanes of `tcp` can be limited. Where there are none, this is a part that no lane reaches.
        let tcp = self.tcp.as_ref().map(|tcp| tcp.part(offset, length));
        tcp.unwrap_or(RemoteRegion { address: 0, length: 0, key: 0 })
    }
}

impl fmt::Debug for HostExport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostExport({:?})", self.remote)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(name: u32, address: u64, key: u32) -> NamedRegion {
        NamedRegion { name, region: RemoteRegion { address, length: 64, key } }
    }

    #[test]
    fn names_are_translated_and_unknown_ones_lead_nowhere() {
        let regions = PeerRegions::told(vec![told(9, 1 << 40, 77), told(2, 0, 5)]);
        let translate = |key, offset| regions.translate(RemoteAddress { address: base(key) + offset, key });
        assert_eq!(translate(9, 8), RemoteAddress { address: (1 << 40) + 8, key: 77 });
        assert_eq!(translate(2, 8), RemoteAddress { address: 8, key: 5 });
        // 77 and 5 are names of the provider's: a peer cannot use them.
        for key in [0, 1, 5, 77] {
            assert_eq!(translate(key, 8).address, u64::MAX, "{key}");
            assert_eq!(regions.translate_region(RemoteRegion { address: 0, length: 1, key }), None);
        }
        // The address of one with the key of another is far outside.
        let mixed = regions.translate(RemoteAddress { address: base(9), key: 2 });
        assert!(mixed.key == 5 && mixed.address >= 1 << 40);
        let part = RemoteRegion { address: base(9) + 16, length: 8, key: 9 };
        let whole = RemoteRegion { address: (1 << 40) + 16, length: 8, key: 77 };
        assert_eq!(regions.translate_region(part), Some(whole));

        let none = PeerRegions::default();
        assert_eq!(
            none.translate(RemoteAddress { address: 3, key: 4 }),
            RemoteAddress { address: 3, key: 4 }
        );
    }

    #[test]
    fn a_region_is_offered_as_long_as_it_lives_and_its_name_is_not_given_again() {
        let names = Names::default();
        let region = RemoteRegion { address: 3, length: 4, key: 5 };
        let mut called = Called::default();
        called[Route::Shm.code() as usize] = Some(region);
        called[Route::Rail(7).code() as usize] = Some(RemoteRegion { key: 6, ..region });
        let first = names.insert(called).unwrap();
        assert_eq!(names.offers(Route::Shm), [NamedRegion { name: 1, region }]);
        assert_eq!(names.offers(Route::Tcp), []);
        assert_eq!(names.offers(Route::Rail(6)), []);
        assert_eq!(names.offers(Route::Rail(7))[0].region.key, 6);
        drop(first);
        assert_eq!(names.offers(Route::Shm), []);
        let kept: Vec<_> = (0..MAX_REGIONS).map(|_| names.insert(Called::default()).unwrap()).collect();
        assert_eq!(kept[0].name, 2);
        let error = names.insert(Called::default()).unwrap_err().to_string();
        assert!(error.contains("2049") && error.contains("2048"), "{error}");
        drop(kept);
        names.insert(Called::default()).unwrap();
    }
}
