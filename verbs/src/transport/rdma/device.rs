//! An open device, and what is registered with it.
//!
//! The `ibv_context` belongs to librdmacm, which hands out one per device and process; the device list that is held
//! here keeps it open, and it is never closed by us. All of an `Rdma`'s objects hold an `Arc` of the [`Device`], so
//! the protection domain outlives the queues, queue pairs and regions made in it.

use std::{
    ffi::{CStr, c_int},
    fmt, fs, io,
    sync::Arc,
};

use rdma_sys::*;

use crate::{
    capabilities::Capabilities,
    error::Error,
    memory::{Exclusive, Memory},
    transport::{Access, Export, MAX_SGE, Region, RemoteRegion, rdma::library},
};

/// What the kernel says of its RDMA devices.
const SYSFS: &str = "/sys/class/infiniband";

/// The devices that librdmacm has opened. Their contexts stay open as long as this lives.
struct DeviceList {
    contexts: *mut *mut ibv_context,
    number: usize,
}

impl DeviceList {
    fn new() -> Result<Self, Error> {
        library::load()?;
        let mut number: c_int = 0;
        // SAFETY: the library is loaded, and `number` is a place for the result.
        let contexts = unsafe { rdma_get_devices(&mut number) };
        let list = Self { contexts, number: number.max(0) as usize };
        if contexts.is_null() || number <= 0 {
            return Err(no_device(&io::Error::last_os_error()));
        }
        Ok(list)
    }

    fn contexts(&self) -> &[*mut ibv_context] {
        // SAFETY: `rdma_get_devices` returned an array of this many pointers, which lives until it is freed in `drop`.
        unsafe { std::slice::from_raw_parts(self.contexts, self.number) }
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        if !self.contexts.is_null() {
            // SAFETY: it came from `rdma_get_devices` and is freed once.
            unsafe { rdma_free_devices(self.contexts) }
        }
    }
}

/// The error for a machine on which librdmacm finds no device.
fn no_device(said: &io::Error) -> Error {
    let kernel: Vec<String> = fs::read_dir(SYSFS)
        .map(|dir| dir.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    if kernel.is_empty() {
        return Error::NoDevice { reason: format!("{SYSFS} is empty or missing") };
    }
    if fs::metadata("/dev/infiniband/rdma_cm").is_err() {
        return Error::NoDevice {
            reason: format!(
                "the kernel has {}, but not /dev/infiniband/rdma_cm (load it with `modprobe rdma_ucm`)",
                kernel.join(", ")
            ),
        };
    }
    Error::MissingLibrary {
        library: "the driver in libibverbs",
        reason: format!("the kernel has {}, but librdmacm opens none of them ({said})", kernel.join(", ")),
        package: "ibverbs-providers",
    }
}

fn device_name(context: *mut ibv_context) -> String {
    // SAFETY: the caller's context is open, so its device has a NUL-terminated name.
    unsafe { CStr::from_ptr(ibv_get_device_name((*context).device)) }.to_string_lossy().into_owned()
}

/// What a device can do, as far as Fervor asks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Entries of a completion queue.
    pub completions: u64,
    /// Buffers of a shared receive queue.
    pub receives: u64,
    /// Requests of a send queue.
    pub sends: u64,
    /// READs that one queue pair may have in flight.
    pub reads_out: u8,
    /// READs of the peer that one queue pair serves at a time.
    pub reads_in: u8,
    /// Bytes of one message.
    pub message: u64,
    /// Completion vectors.
    pub vectors: usize,
    /// Whether it is software (rxe): its timers are exact, and it shares the processors with everything else.
    pub software: bool,
}

/// An open device with a protection domain.
pub(super) struct Device {
    pub context: *mut ibv_context,
    pub domain: *mut ibv_pd,
    pub name: String,
    pub limits: Limits,
    _list: DeviceList,
}

// SAFETY: verbs objects may be used from any thread, and by several at a time (`ibv_*` calls are thread-safe);
// the fields are not written after `open`.
unsafe impl Send for Device {}
// SAFETY: as for `Send`.
unsafe impl Sync for Device {}

impl Device {
    /// Opens the device called `name`, or the first one with an active port.
    pub(super) fn open(name: Option<&str>) -> Result<Arc<Self>, Error> {
        let list = DeviceList::new()?;
        let names: Vec<String> = list.contexts().iter().map(|&context| device_name(context)).collect();
        let index = match name {
            Some(name) => names.iter().position(|have| have == name).ok_or_else(|| Error::NoDevice {
                reason: format!("there is no device `{name}` (there are: {})", names.join(", ")),
            })?,
            None => names.iter().position(|name| is_active(name)).ok_or_else(|| Error::NoDevice {
                reason: format!("no port of {} is active", names.join(", ")),
            })?,
        };
        let context = list.contexts()[index];
        let name = names.into_iter().nth(index).expect("the index is of this list");
        let limits = limits(context, &name)?;
        // SAFETY: the context is open.
        let domain = unsafe { ibv_alloc_pd(context) };
        if domain.is_null() {
            return Err(Error::last_os(format!("ibv_alloc_pd({name})")));
        }
        Ok(Arc::new(Self { context, domain, name, limits, _list: list }))
    }

    /// Registers `memory`. The registration keeps the mapping and the device alive.
    pub(super) fn register(self: &Arc<Self>, memory: &Memory, access: Access) -> Result<RdmaRegion, Error> {
        let flags = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE
            | match access {
                Access::Local => ibv_access_flags(0),
                Access::RemoteRead => ibv_access_flags::IBV_ACCESS_REMOTE_READ,
                Access::RemoteWrite => {
                    ibv_access_flags::IBV_ACCESS_REMOTE_READ | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE
                }
            };
        Ok(RdmaRegion(Arc::new(self.registration(memory, flags)?)))
    }

    /// Registers `memory` for remote READ, and so that the device itself refuses to write to it.
    pub(super) fn export(self: &Arc<Self>, memory: &Exclusive) -> Result<RdmaExport, Error> {
        self.registration(memory.memory(), ibv_access_flags::IBV_ACCESS_REMOTE_READ).map(RdmaExport)
    }

    fn registration(
        self: &Arc<Self>,
        memory: &Memory,
        flags: ibv_access_flags,
    ) -> Result<Registration, Error> {
        let (address, length) = (memory.as_ptr(), memory.len());
        // SAFETY: the mapping covers these bytes, and the clone of `memory` in the result keeps it until
        // after `ibv_dereg_mr`. That a device writes them is what `Memory` is made for; of an `Exclusive`'s
        // memory the device only reads (no flag that lets it write).
        let raw = unsafe { ibv_reg_mr(self.domain, address.cast(), length, flags.0 as c_int) };
        if raw.is_null() {
            return Err(registration_error(&self.name, length as u64, io::Error::last_os_error()));
        }
        // SAFETY: `ibv_reg_mr` has just returned it.
        let (local_key, remote_key) = unsafe { ((*raw).lkey, (*raw).rkey) };
        Ok(Registration { raw, local_key, remote_key, memory: memory.clone(), device: Arc::clone(self) })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: everything made in the domain held an `Arc` of this device, and is gone.
        unsafe { ibv_dealloc_pd(self.domain) };
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.name)
    }
}

/// Why a registration failed: the memlock limit, if it is lower than the region.
fn registration_error(device: &str, bytes: u64, said: io::Error) -> Error {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
    match limit {
        // The limit counts all that is pinned, so it may be hit by a region that is smaller than it.
        Some(limit) if matches!(said.raw_os_error(), Some(libc::ENOMEM | libc::EPERM | libc::EAGAIN)) => {
            Error::Memlock { bytes, limit }
        }
        _ => Error::System { call: format!("ibv_reg_mr({device}, {bytes} bytes)"), source: said },
    }
}

/// Whether a port of device `name` is active.
fn is_active(name: &str) -> bool {
    let Ok(ports) = fs::read_dir(format!("{SYSFS}/{name}/ports")) else { return false };
    ports
        .flatten()
        .any(|port| fs::read_to_string(port.path().join("state")).is_ok_and(|state| state.contains("ACTIVE")))
}

/// What each device that librdmacm opens can do, by name. None is no error.
pub(crate) fn capabilities() -> Result<Vec<(String, Capabilities)>, Error> {
    let list = match DeviceList::new() {
        Ok(list) => list,
        Err(Error::NoDevice { .. }) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    list.contexts()
        .iter()
        .map(|&context| {
            let name = device_name(context);
            let device = query(context, &name)?;
            let ports = (1..=device.phys_port_cnt)
                .map(|port| query_port(context, &name, port))
                .collect::<Result<Vec<_>, _>>()?;
            let capabilities = Capabilities {
                completion_vectors: vectors(context),
                queue_pairs: positive(device.max_qp),
                send_queue: positive(device.max_qp_wr),
                completion_queue: positive(device.max_cqe),
                receive_queue: positive(device.max_srq_wr),
                pieces: positive(device.max_sge),
                reads_initiated: positive(device.max_qp_init_rd_atom),
                reads_served: positive(device.max_qp_rd_atom),
                regions: positive(device.max_mr),
                region_bytes: device.max_mr_size,
                message_bytes: ports.iter().map(|port| u64::from(port.max_msg_sz)).collect(),
                // `enum ibv_mtu`: 1 is 256 bytes, 5 is 4096.
                mtu: ports.iter().map(|port| 128 << port.active_mtu.min(5)).collect(),
            };
            Ok((name, capabilities))
        })
        .collect()
}

fn positive(value: c_int) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

fn query(context: *mut ibv_context, name: &str) -> Result<ibv_device_attr, Error> {
    // SAFETY: all-zero bytes are a value of this plain C struct.
    let mut device: ibv_device_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the callers' context is open, and the struct is of the size that the function fills.
    match unsafe { ibv_query_device(context, &mut device) } {
        0 => Ok(device),
        errno => Err(Error::System {
            call: format!("ibv_query_device({name})"),
            source: io::Error::from_raw_os_error(errno),
        }),
    }
}

fn query_port(context: *mut ibv_context, name: &str, number: u8) -> Result<ibv_port_attr, Error> {
    // SAFETY: all-zero bytes are a value of this plain C struct.
    let mut port: ibv_port_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the callers' context is open. The function fills the older, shorter form of the struct, a prefix of it.
    match unsafe { ibv_query_port(context, number, (&raw mut port).cast()) } {
        0 => Ok(port),
        errno => Err(Error::System {
            call: format!("ibv_query_port({name}, {number})"),
            source: io::Error::from_raw_os_error(errno),
        }),
    }
}

fn vectors(context: *mut ibv_context) -> usize {
    // SAFETY: the callers' context is open.
    unsafe { (*context).num_comp_vectors }.max(1) as usize
}

fn limits(context: *mut ibv_context, name: &str) -> Result<Limits, Error> {
    let device = query(context, name)?;
    let port = query_port(context, name, 1)?;
    // SAFETY: the context is open, so its device can be read.
    if unsafe { (*(*context).device).transport_type == ibv_transport_type::IBV_TRANSPORT_IWARP } {
        // An iWARP WRITE carries no immediate, which the contract needs.
        return Err(Error::NoDevice {
            reason: format!("`{name}` is iWARP, which has no WRITE with immediate"),
        });
    }
    let pieces = positive(device.max_sge.min(device.max_sge_rd));
    if pieces < MAX_SGE as u64 {
        return Err(Error::Limit {
            what: format!("the number of pieces of a gather or scatter list on {name}"),
            value: MAX_SGE as u64,
            limit: pieces,
            cure: String::new(),
        });
    }
    Ok(Limits {
        completions: positive(device.max_cqe),
        receives: positive(device.max_srq_wr),
        sends: positive(device.max_qp_wr),
        reads_out: device.max_qp_init_rd_atom.clamp(0, 255) as u8,
        reads_in: device.max_qp_rd_atom.clamp(0, 255) as u8,
        message: u64::from(port.max_msg_sz),
        vectors: vectors(context),
        software: fs::metadata(format!("{SYSFS}/{name}/device")).is_err(),
    })
}

/// A memory that is registered with a device.
pub(super) struct Registration {
    raw: *mut ibv_mr,
    pub local_key: u32,
    remote_key: u32,
    pub memory: Memory,
    pub device: Arc<Device>,
}

// SAFETY: a registration is a set of constants after it is made; `ibv_dereg_mr` may be called by any thread.
unsafe impl Send for Registration {}
// SAFETY: as for `Send`.
unsafe impl Sync for Registration {}

impl Registration {
    fn remote(&self) -> RemoteRegion {
        RemoteRegion {
            address: self.memory.as_ptr() as u64,
            length: self.memory.len() as u64,
            key: self.remote_key,
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: made by `ibv_reg_mr`, ended once. Requests that name it keep an `Arc` of it in their connection.
        unsafe { ibv_dereg_mr(self.raw) };
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} on {}, key {:#x}", self.memory, self.device.name, self.remote_key)
    }
}

/// A registered memory of the `rdma` provider.
#[derive(Debug, Clone)]
pub struct RdmaRegion(pub(super) Arc<Registration>);

impl Region for RdmaRegion {
    fn memory(&self) -> &Memory {
        &self.0.memory
    }

    fn remote(&self) -> RemoteRegion {
        self.0.remote()
    }
}

/// A memory exported for remote READ by the `rdma` provider.
#[derive(Debug)]
pub struct RdmaExport(Registration);

impl Export for RdmaExport {
    fn remote(&self) -> RemoteRegion {
        self.0.remote()
    }
}
