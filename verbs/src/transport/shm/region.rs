//! Registered regions: the registry of this process's, and the table of a peer's.
//!
//! A key names one registration of one transport. It is never given to two live registrations, and not given
//! again soon. At connect each side passes all its regions that grant remote access: their keys, bounds and
//! rights, and for each the memfd.
//!
//! **A right is the file's.** A key is only a number in a message: what a peer can do to memory is what its descriptor lets it
//! do. Memory is therefore sealed when it is registered, for good ([`super::file`] says what seals do):
//!
//! | registered for | its file is sealed | handed out |
//! |---|---|---|
//! | [`Access::RemoteRead`], or as the export of an [`Exclusive`] | `F_SEAL_FUTURE_WRITE`, `F_SEAL_SEAL` | opened read-only |
//! | [`Access::RemoteWrite`] | `F_SEAL_SEAL` | opened for both |
//!
//! Whoever may only READ can therefore not write the memory by any descriptor, whoever it is. It follows that one memory
//! cannot be registered for READ now and for WRITE later, or the other way round: that is an error.
//!
//! Memory on huge pages that peers may WRITE is handed to processes of the same user alone: another could punch its pages
//! out, and take them from the pool.

use std::{
    collections::HashMap,
    fmt,
    fs::{File, OpenOptions},
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::fs::{SealFlags, fcntl_get_seals};

use super::{
    file::{self, SEALS},
    mapping::Mapping,
    view::ShmView,
};
use crate::{
    error::Error,
    memory::{Exclusive, Memory},
    transport::{Access, Export, Region, RemoteAddress, RemoteRegion, WorkError},
};

/// Most regions that a peer may offer. A server has one for each shard, of which a job has 256, and a client has two. So this
/// is for a process whose clients share a transport: two thousand of them.
pub(super) const MAX_REGIONS: u32 = 1 << 12;
/// Most bytes of them together: more than any host has memory, and an eighth of what a process can address.
pub(super) const MAX_REGION_BYTES: u64 = 1 << 44;

/// The live registrations of a transport.
#[derive(Debug, Default)]
pub(super) struct Registry(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    regions: HashMap<u32, (Memory, Access)>,
    last: u32,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Table> {
        // Every change of the table is one insertion or removal: a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, memory: &Memory, access: Access) -> Result<u32, Error> {
        let mut table = self.lock();
        if table.regions.len() >= u32::MAX as usize - 1 {
            return Err(Error::Limit {
                what: "the number of registered regions".to_owned(),
                value: u64::from(u32::MAX),
                limit: u64::from(u32::MAX) - 1,
                cure: "; drop some".to_owned(),
            });
        }
        // Keys go round, so that one that was dropped is not soon mistaken for a new one. 0 is no key.
        loop {
            table.last = table.last.wrapping_add(1);
            if table.last != 0 && !table.regions.contains_key(&table.last) {
                break;
            }
        }
        let key = table.last;
        table.regions.insert(key, (memory.clone(), access));
        Ok(key)
    }

    /// What to tell a peer that connects: every region with a remote right.
    ///
    /// # Errors
    /// There are more than a peer takes.
    pub(super) fn offers(&self) -> Result<Vec<Offer>, Error> {
        let offers: Vec<_> = self
            .lock()
            .regions
            .iter()
            .filter(|(_, (_, access))| *access != Access::Local)
            .map(|(&key, (memory, access))| Offer {
                key,
                base: memory.as_ptr().addr() as u64,
                length: memory.len() as u64,
                writable: *access == Access::RemoteWrite,
                memory: memory.clone(),
            })
            .collect();
        let within = |what: &str, value: u64, limit: u64, cure: &str| {
            if value <= limit {
                return Ok(());
            }
            Err(Error::Limit { what: what.to_owned(), value, limit, cure: cure.to_owned() })
        };
        within(
            "the number of regions that a transport offers to each peer",
            offers.len() as u64,
            u64::from(MAX_REGIONS),
            "; give each client of this process a transport of its own",
        )?;
        within(
            "the size of the regions that a transport offers to each peer",
            offers.iter().map(|offer| offer.length).fold(0, u64::saturating_add),
            MAX_REGION_BYTES,
            "; register less memory",
        )?;
        Ok(offers)
    }
}

/// A region as a peer is told of it.
pub(super) struct Offer {
    pub(super) key: u32,
    pub(super) base: u64,
    pub(super) length: u64,
    pub(super) writable: bool,
    memory: Memory,
}

impl Offer {
    /// A descriptor of the memory with no more than the right that is granted, for a process of user `peer`. `own` is the
    /// user of this process.
    pub(super) fn descriptor(&self, own: u32, peer: u32) -> Result<OwnedFd, Error> {
        if self.writable && self.memory.huge_pages() && own != peer {
            return Err(Error::System {
                call: format!("handing memory of user {own} to a process of user {peer}"),
                source: std::io::Error::new(
                    std::io::ErrorKind::PermissionDenied,
                    format!(
                        "that process may write {} bytes on huge pages, and could take the pages away; use small pages",
                        self.length
                    ),
                ),
            });
        }
        let path = format!("/proc/self/fd/{}", self.memory.as_fd().as_raw_fd());
        OpenOptions::new()
            .read(true)
            .write(self.writable)
            .open(&path)
            .map(File::into)
            .map_err(Error::io(format!("open({path})")))
    }
}

/// Seals memory for the right that peers get: see the module.
fn seal(memory: &Memory, access: Access) -> Result<(), Error> {
    let seals = match access {
        Access::Local => return Ok(()),
        Access::RemoteRead => SEALS | SealFlags::FUTURE_WRITE,
        Access::RemoteWrite => SEALS,
    };
    let now =
        fcntl_get_seals(memory.as_fd()).map_err(|e| Error::io("fcntl(memfd, F_GET_SEALS)")(e.into()))?;
    let read_only = access == Access::RemoteRead;
    if now.contains(SealFlags::SEAL) && now.contains(SealFlags::FUTURE_WRITE) != read_only {
        let (before, now) = if read_only { ("WRITE", "READ alone") } else { ("READ alone", "WRITE") };
        return Err(Error::System {
            call: format!("registering {} bytes for remote {now}", memory.len()),
            source: std::io::Error::new(
                std::io::ErrorKind::PermissionDenied,
                format!(
                    "this memory has been registered for remote {before}, and is sealed for that; use another memory"
                ),
            ),
        });
    }
    file::seal(memory.as_fd(), seals)
}

struct Registration {
    memory: Memory,
    key: u32,
    registry: Arc<Registry>,
}

impl Registration {
    fn remote(&self) -> RemoteRegion {
        RemoteRegion {
            address: self.memory.as_ptr().addr() as u64,
            length: self.memory.len() as u64,
            key: self.key,
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.registry.lock().regions.remove(&self.key);
    }
}

/// A registered memory of the `shm` provider.
#[derive(Clone)]
pub struct ShmRegion(Arc<Registration>);

impl ShmRegion {
    pub(super) fn new(registry: &Arc<Registry>, memory: &Memory, access: Access) -> Result<Self, Error> {
        seal(memory, access)?;
        let key = registry.insert(memory, access)?;
        Ok(Self(Arc::new(Registration { memory: memory.clone(), key, registry: registry.clone() })))
    }

    /// Whether both name one registration.
    #[inline]
    pub(super) fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Region for ShmRegion {
    fn memory(&self) -> &Memory {
        &self.0.memory
    }

    fn remote(&self) -> RemoteRegion {
        self.0.remote()
    }
}

impl fmt::Debug for ShmRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShmRegion({:?}, key {})", self.0.memory, self.0.key)
    }
}

/// An exported memory of the `shm` provider.
pub struct ShmExport(Registration);

impl ShmExport {
    pub(super) fn new(registry: &Arc<Registry>, exclusive: &Exclusive) -> Result<Self, Error> {
        let memory = exclusive.memory();
        // The owner's mapping stays writable; no other writable one can be made, by whatever path.
        seal(memory, Access::RemoteRead)?;
        let key = registry.insert(memory, Access::RemoteRead)?;
        Ok(Self(Registration { memory: memory.clone(), key, registry: registry.clone() }))
    }
}

impl Export for ShmExport {
    fn remote(&self) -> RemoteRegion {
        self.0.remote()
    }
}

impl fmt::Debug for ShmExport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ShmExport({:?}, key {})", self.0.memory, self.0.key)
    }
}

/// A region of the peer, mapped here.
#[derive(Debug)]
pub(super) struct RemoteMapping {
    pub(super) key: u32,
    pub(super) base: u64,
    pub(super) length: u64,
    pub(super) writable: bool,
    /// At least `length` bytes, checked when it was mapped.
    pub(super) mapping: Arc<Mapping>,
}

impl RemoteMapping {
    /// Where in the mapping these bytes of the peer begin, if all of them are in the region.
    #[inline]
    fn offset(&self, address: u64, length: u64) -> Option<u64> {
        let offset = address.checked_sub(self.base)?;
        (offset <= self.length && length <= self.length - offset).then_some(offset)
    }
}

/// The regions of the peer that a connection reaches.
#[derive(Debug, Default)]
pub(super) struct RemoteTable {
    /// By key, ascending.
    regions: Vec<RemoteMapping>,
    /// Where the last look-up succeeded: the next is likely there too.
    last: usize,
}

impl RemoteTable {
    pub(super) fn new(mut regions: Vec<RemoteMapping>) -> Self {
        regions.sort_by_key(|region| region.key);
        Self { regions, last: 0 }
    }

    /// First of the `length` bytes at `remote` in this process, if they are the peer's and it grants the
    /// right.
    #[inline]
    pub(super) fn find(
        &mut self,
        remote: RemoteAddress,
        length: usize,
        write: bool,
    ) -> Result<*mut u8, WorkError> {
        if self.regions.get(self.last).is_none_or(|region| region.key != remote.key) {
            self.last = self
                .regions
                .binary_search_by_key(&remote.key, |region| region.key)
                .map_err(|_| WorkError::RemoteAccess)?;
        }
        let region = &self.regions[self.last];
        let offset = region.offset(remote.address, length as u64).ok_or(WorkError::RemoteAccess)?;
        if write && !region.writable {
            return Err(WorkError::RemoteAccess);
        }
        region.mapping.check(offset as usize, length);
        // SAFETY: `offset <= offset + length <= mapping.len()`, just checked: the pointer stays in the
        // mapping.
        Ok(unsafe { region.mapping.as_ptr().add(offset as usize) })
    }

    /// A view of what is named, if it is the peer's: all of it grants READ.
    pub(super) fn view(&self, wanted: RemoteRegion) -> Option<ShmView> {
        let place = self.regions.binary_search_by_key(&wanted.key, |region| region.key).ok()?;
        let region = &self.regions[place];
        let offset = region.offset(wanted.address, wanted.length)?;
        Some(ShmView::new(&region.mapping, offset as usize, wanted.length as usize))
    }
}
