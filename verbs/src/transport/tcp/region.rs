//! Registered regions: what peers may READ and WRITE, and by which key.
//!
//! A key names one registration of one transport. It is never given to two live ones. Keys are drawn, so that a peer which was told
//! none does not guess one. An address counts from the first byte of its region: peers learn nothing of where this process keeps its
//! memory.

use std::{
    collections::HashMap,
    fmt,
    hash::{BuildHasher, Hasher, RandomState},
    sync::{Arc, PoisonError, RwLock},
};

use crate::{
    error::Error,
    memory::{Exclusive, Memory},
    transport::{Access, Export, Region, RemoteRegion, WorkError},
};

/// The live registrations of a transport.
#[derive(Debug, Default)]
pub(super) struct Registry(RwLock<HashMap<u32, (Memory, Access)>>);

impl Registry {
    fn insert(self: &Arc<Self>, memory: &Memory, access: Access) -> Result<Registration, Error> {
        // Every change of the table is one insertion or removal: a panic leaves nothing half done.
        let mut regions = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if regions.len() >= 1 << 24 {
            return Err(Error::Limit {
                what: "the number of registered regions".to_owned(),
                value: regions.len() as u64 + 1,
                limit: 1 << 24,
                cure: "; drop some".to_owned(),
            });
        }
        // At most one key in 256 is taken.
        let key = loop {
            // The standard library's hash maps are keyed with random numbers of the system.
            let key = RandomState::new().build_hasher().finish() as u32;
            if !regions.contains_key(&key) {
                break key;
            }
        };
        regions.insert(key, (memory.clone(), access));
        Ok(Registration { memory: memory.clone(), key, registry: self.clone() })
    }

    /// The memory of `key`, and where `address` is in it, if its `length` bytes from there on are in it and the right is granted.
    pub(super) fn find(
        &self,
        key: u32,
        address: u64,
        length: u64,
        write: bool,
    ) -> Result<(Memory, usize), WorkError> {
        let regions = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let (memory, access) = regions.get(&key).ok_or(WorkError::RemoteAccess)?;
        let granted = match access {
            Access::Local => false,
            Access::RemoteRead => !write,
            Access::RemoteWrite => true,
        };
        let inside = address.checked_add(length).is_some_and(|end| end <= memory.len() as u64);
        if granted && inside { Ok((memory.clone(), address as usize)) } else { Err(WorkError::RemoteAccess) }
    }
}

struct Registration {
    memory: Memory,
    key: u32,
    registry: Arc<Registry>,
}

impl Registration {
    fn remote(&self) -> RemoteRegion {
        RemoteRegion { address: 0, length: self.memory.len() as u64, key: self.key }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.0.write().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// A registered memory of the `tcp` provider.
#[derive(Clone)]
pub struct TcpRegion(Arc<Registration>);

impl TcpRegion {
    pub(super) fn new(registry: &Arc<Registry>, memory: &Memory, access: Access) -> Result<Self, Error> {
        registry.insert(memory, access).map(|registration| Self(Arc::new(registration)))
    }

    /// Whether both name one registration.
    pub(super) fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Region for TcpRegion {
    fn memory(&self) -> &Memory {
        &self.0.memory
    }

    fn remote(&self) -> RemoteRegion {
        self.0.remote()
    }
}

impl fmt::Debug for TcpRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpRegion({:?})", self.0.memory)
    }
}

/// An exported memory of the `tcp` provider.
pub struct TcpExport(Registration);

impl TcpExport {
    pub(super) fn new(registry: &Arc<Registry>, exclusive: &Exclusive) -> Result<Self, Error> {
        // The owner holds slices of its own mapping.
        registry.insert(&exclusive.memory().mapped_again()?, Access::RemoteRead).map(Self)
    }
}

impl Export for TcpExport {
    fn remote(&self) -> RemoteRegion {
        self.0.remote()
    }
}

impl fmt::Debug for TcpExport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpExport({:?})", self.0.memory)
    }
}
