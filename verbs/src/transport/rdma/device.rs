//! An open device, and what is registered with it.
//!
//! Each [`Device`] opens its device for itself, and closes it when it ends. All of an `Rdma`'s objects hold an `Arc` of it, so that
//! the protection domain and the context outlive the queues, queue pairs and regions made in them.

use std::{
    ffi::{CStr, c_int},
    fmt, io,
    net::{IpAddr, Ipv6Addr},
    os::fd::BorrowedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rdma_sys::*;

use crate::{
    capabilities::Capabilities,
    devices::{DeviceInfo, SYSFS},
    error::Error,
    fabric::{self, Fabric, Local},
    memory::{Exclusive, Memory},
    rails::{self, OwnAddress, Rail},
    transport::{
        Access, Export, MAX_SGE, Region, RemoteRegion,
        rdma::{
            events::Counters,
            failures::Failures,
            library::{Verbs, verbs},
            tables::{self, FRESH, Tables, read_tables, recent_tables},
        },
    },
};

/// For how long a port's state is believed, unless the device says that it changed: many lanes are made at once, and to ask takes a lock of
/// the kernel's.
const ASKED: Duration = Duration::from_millis(50);

/// The devices that libibverbs knows. A device that has been opened outlives the list.
struct DeviceList {
    verbs: &'static Verbs,
    devices: *mut *mut ibv_device,
    number: usize,
}

impl DeviceList {
    fn new() -> Result<Self, Error> {
        let verbs = verbs()?;
        let mut number: c_int = 0;
        // SAFETY: `number` is a place for the result.
        let devices = unsafe { (verbs.ibv_get_device_list)(&mut number) };
        let list = Self { verbs, devices, number: number.max(0) as usize };
        if devices.is_null() || number <= 0 {
            return Err(no_device(&io::Error::last_os_error()));
        }
        Ok(list)
    }

    fn devices(&self) -> &[*mut ibv_device] {
        // SAFETY: `ibv_get_device_list` returned an array of this many pointers, which lives until it is freed in `drop`.
        unsafe { std::slice::from_raw_parts(self.devices, self.number) }
    }

    fn name(&self, device: *mut ibv_device) -> String {
        // SAFETY: the device is of this list, and has a NUL-terminated name.
        unsafe { CStr::from_ptr((self.verbs.ibv_get_device_name)(device)) }.to_string_lossy().into_owned()
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        if !self.devices.is_null() {
            // SAFETY: it came from `ibv_get_device_list` and is freed once.
            unsafe { (self.verbs.ibv_free_device_list)(self.devices) }
        }
    }
}

/// The error for a machine on which libibverbs finds no device.
fn no_device(said: &io::Error) -> Error {
    let kernel: Vec<String> =
        recent_tables().map_or_else(|_| Vec::new(), |all| all.iter().map(|one| one.name.clone()).collect());
    if kernel.is_empty() {
        return Error::NoDevice { reason: format!("{SYSFS} is empty or missing") };
    }
    Error::MissingLibrary {
        library: "the driver in libibverbs",
        reason: format!("the kernel has {}, but libibverbs finds none of them ({said})", kernel.join(", ")),
        package: "ibverbs-providers",
    }
}

/// An open device.
struct Context {
    verbs: &'static Verbs,
    raw: *mut ibv_context,
}

impl Context {
    fn open(list: &DeviceList, device: *mut ibv_device) -> Result<Self, Error> {
        // SAFETY: the device is of the list, which lives.
        let raw = unsafe { (list.verbs.ibv_open_device)(device) };
        if raw.is_null() {
            return Err(Error::last_os(format!("ibv_open_device({})", list.name(device))));
        }
        Ok(Self { verbs: list.verbs, raw })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: everything made in the context is gone: in a `Device` it is the last field but plain data, and the device's `drop` has ended
        // the domain; elsewhere nothing is made in it. It is closed once.
        unsafe { (self.verbs.ibv_close_device)(self.raw) };
    }
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
    /// Ports, which are numbered from 1.
    pub ports: u8,
    /// Bytes of one message.
    pub message: u64,
    /// Completion vectors.
    pub vectors: usize,
    /// Whether it is software (rxe): its timers are exact, and it shares the processors with everything else.
    pub software: bool,
}

/// An open device with a protection domain.
pub(super) struct Device {
    pub verbs: &'static Verbs,
    pub context: *mut ibv_context,
    pub domain: *mut ibv_pd,
    pub name: String,
    /// The port that the program was told to use.
    port: Option<u8>,
    pub fabric: Fabric,
    pub limits: Limits,
    /// What the device has said.
    pub said: Counters,
    /// What sysfs said of all devices, and when.
    tables: Mutex<(Tables, Instant)>,
    /// The tables have changed since they were read.
    stale: AtomicBool,
    /// Whether the port was active, and when that was asked.
    active: Mutex<Option<(bool, Instant)>>,
    /// Peers that did not answer.
    failures: Mutex<Failures>,
    /// Connections that were lost.
    lost: AtomicU64,
    open: Context,
}

// SAFETY: verbs objects may be used from any thread, and by several at a time (`ibv_*` calls are thread-safe);
// the pointers are not written after `open`.
unsafe impl Send for Device {}
// SAFETY: as for `Send`.
unsafe impl Sync for Device {}

impl Device {
    /// Opens the device called `name` (`mlx5_0`, or `mlx5_0:2` for its second port), or the first one with an active port.
    pub(super) fn open(name: Option<&str>, fabric: Fabric) -> Result<Arc<Self>, Error> {
        let (name, port) = match name.and_then(|name| name.split_once(':')) {
            Some((device, port)) => match port.parse() {
                Ok(port) => (Some(device), Some(port)),
                Err(_) => {
                    let reason =
                        format!("`{port}` of `{device}:{port}` is no number of a port; write DEVICE:PORT");
                    return Err(Error::NoDevice { reason });
                }
            },
            None => (name, None),
        };
        let list = DeviceList::new()?;
        let names: Vec<String> = list.devices().iter().map(|&device| list.name(device)).collect();
        let tables = recent_tables()?;
        let index = match name {
            Some(name) => names.iter().position(|have| have == name).ok_or_else(|| Error::NoDevice {
                reason: format!("there is no device `{name}` (there are: {})", names.join(", ")),
            })?,
            None => names.iter().position(|name| is_active(&tables, name)).ok_or_else(|| {
                Error::NoDevice { reason: format!("no port of {} is active", names.join(", ")) }
            })?,
        };
        let context = Context::open(&list, list.devices()[index])?;
        let name = names.into_iter().nth(index).expect("the index is of this list");
        let software = tables.iter().any(|device| device.name == name && device.software);
        let limits = limits(&context, &name, software)?;
        if port.is_some_and(|port| port == 0 || port > limits.ports) {
            return Err(Error::NoDevice {
                reason: format!("{name} has ports 1 to {}, and no {}", limits.ports, port.unwrap_or(0)),
            });
        }
        // SAFETY: the context is open.
        let domain = unsafe { (context.verbs.ibv_alloc_pd)(context.raw) };
        if domain.is_null() {
            return Err(Error::last_os(format!("ibv_alloc_pd({name})")));
        }
        Ok(Arc::new(Self {
            verbs: context.verbs,
            context: context.raw,
            domain,
            name,
            port,
            fabric,
            limits,
            said: Counters::default(),
            tables: Mutex::new((tables, Instant::now())),
            stale: AtomicBool::new(false),
            active: Mutex::default(),
            failures: Mutex::default(),
            lost: AtomicU64::new(0),
            open: context,
        }))
    }

    /// The port and the address for a connection whose bootstrap socket has the local address `ip`.
    ///
    /// # Errors
    /// A sentence that says why there is none.
    pub(super) fn local(&self, ip: IpAddr) -> Result<Local, String> {
        let choose =
            |tables: &[DeviceInfo]| fabric::choose(tables, Some(&self.name), self.port, ip, &self.fabric);
        if !self.stale.swap(false, Ordering::AcqRel) {
            let (tables, read) = self.tables.lock().unwrap_or_else(PoisonError::into_inner).clone();
            // An address that is not in them may have come meanwhile, before the device said so.
            if let Ok(local) = choose(&tables)
                && (local.why != fabric::Reason::Best || read.elapsed() < FRESH)
            {
                return Ok(local);
            }
        }
        let tables = read_tables().map_err(|error| error.to_string())?;
        let chosen = choose(&tables);
        *self.tables.lock().unwrap_or_else(PoisonError::into_inner) = (tables, Instant::now());
        chosen
    }

    /// What peers may be told of the port that the program was told to use (the first one, if none), as a rail.
    pub(super) fn rail(&self) -> (Rail, Vec<OwnAddress>) {
        let number = self.port.unwrap_or(1);
        if self.stale.swap(false, Ordering::AcqRel)
            && let Ok(tables) = recent_tables()
        {
            *self.tables.lock().unwrap_or_else(PoisonError::into_inner) = (tables, Instant::now());
        }
        let (tables, _) = self.tables.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let device = tables.iter().find(|device| device.name == self.name);
        let port = device.and_then(|device| device.ports.iter().find(|port| port.number == number.into()));
        let addresses = port.map(|port| rails::own_addresses(port, &self.fabric)).unwrap_or_default();
        let told = Rail {
            name: format!("{}:{number}", self.name),
            megabits: port.map_or(0, |port| rails::megabits(&port.rate)),
            addresses: addresses.iter().map(|own| own.address).collect(),
        };
        (told, addresses)
    }

    /// Processors near the device. None: near to none in particular.
    pub(super) fn near(&self) -> Vec<usize> {
        let (tables, _) = self.tables.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let device = tables.iter().find(|device| device.name == self.name);
        device.map(|device| device.local_cores.clone()).unwrap_or_default()
    }

    /// An address of the rail, for a connection.
    pub(super) fn at(&self, own: &OwnAddress) -> Local {
        Local {
            device: self.name.clone(),
            port: self.port.unwrap_or(1),
            gid_index: own.index,
            gid: own.address.gid,
            way: own.address.network,
            why: fabric::Reason::Rail,
        }
    }

    /// Whether the port is active, as the device has just said.
    pub(super) fn is_active(&self) -> bool {
        let mut known = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        match *known {
            Some((active, asked)) if asked.elapsed() < ASKED => active,
            _ => {
                let asked = Instant::now();
                let port = query_port(&self.open, &self.name, self.port.unwrap_or(1));
                let active = port.is_ok_and(|port| port.state == ibv_port_state::IBV_PORT_ACTIVE);
                *known = Some((active, asked));
                active
            }
        }
    }

    fn failures(&self) -> MutexGuard<'_, Failures> {
        // Every change is that of one entry.
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection to `peer` that was made at `made` has ended, and nobody here wished it.
    pub(super) fn note_lost(&self, peer: Ipv6Addr, made: Instant) {
        self.lost.fetch_add(1, Ordering::Relaxed);
        self.failures().note(peer, made, Instant::now());
    }

    /// No connection to `peer` could be made.
    pub(super) fn note_failure(&self, peer: Ipv6Addr) {
        let now = Instant::now();
        self.failures().note(peer, now, now);
    }

    /// `peer` did not answer in time.
    pub(super) fn note_doubt(&self, peer: Ipv6Addr) {
        self.failures().doubt(peer, Instant::now());
    }

    /// How often in a row connections to `peer` have failed, of late.
    pub(super) fn failures_of(&self, peer: Ipv6Addr) -> u32 {
        self.failures().times(peer, Instant::now())
    }

    /// Connections that ended though nobody here wished it.
    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// The tables of GIDs have changed.
    pub(super) fn forget_tables(&self) {
        tables::forget();
        *self.active.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.stale.store(true, Ordering::Release);
    }

    /// Whether the device says when a queue pair has taken its last buffer. InfiniBand demands it; rxe does so from some kernel on.
    pub(super) fn says_last_buffer(&self) -> bool {
        !self.limits.software || self.said.has_last_buffers()
    }

    /// LID and MTU (bytes) of a port.
    pub(super) fn port(&self, number: u8) -> Result<(u16, u16), Error> {
        let port = query_port(&self.open, &self.name, number)?;
        Ok((port.lid, mtu_bytes(port.active_mtu)))
    }

    /// Readable when the device has said something. It does not block.
    pub(super) fn events_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open as long as `self` lives.
        unsafe { BorrowedFd::borrow_raw((*self.context).async_fd) }
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
        let raw = unsafe { (self.verbs.ibv_reg_mr)(self.domain, address.cast(), length, flags.0 as c_int) };
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
        unsafe { (self.verbs.ibv_dealloc_pd)(self.domain) };
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
fn is_active(tables: &[DeviceInfo], name: &str) -> bool {
    tables.iter().any(|device| device.name == name && device.ports.iter().any(|port| port.state == "ACTIVE"))
}

/// What each device that libibverbs opens can do, by name. None is no error.
pub(crate) fn capabilities() -> Result<Vec<(String, Capabilities)>, Error> {
    let list = match DeviceList::new() {
        Ok(list) => list,
        Err(Error::NoDevice { .. }) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    list.devices()
        .iter()
        .filter_map(|&device| Some((list.name(device), Context::open(&list, device).ok()?)))
        .map(|(name, context)| {
            let device = query(&context, &name)?;
            let ports = (1..=device.phys_port_cnt)
                .map(|port| query_port(&context, &name, port))
                .collect::<Result<Vec<_>, _>>()?;
            let capabilities = Capabilities {
                completion_vectors: vectors(&context),
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
                mtu: ports.iter().map(|port| u32::from(mtu_bytes(port.active_mtu))).collect(),
            };
            Ok((name, capabilities))
        })
        .collect()
}

/// `enum ibv_mtu`: 1 is 256 bytes, 5 is 4096.
fn mtu_bytes(number: ibv_mtu::Type) -> u16 {
    128 << number.clamp(1, 5)
}

fn positive(value: c_int) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

fn query(context: &Context, name: &str) -> Result<ibv_device_attr, Error> {
    // SAFETY: all-zero bytes are a value of this plain C struct.
    let mut device: ibv_device_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the context is open, and the struct is of the size that the function fills.
    match unsafe { (context.verbs.ibv_query_device)(context.raw, &mut device) } {
        0 => Ok(device),
        errno => Err(Error::System {
            call: format!("ibv_query_device({name})"),
            source: io::Error::from_raw_os_error(errno),
        }),
    }
}

fn query_port(context: &Context, name: &str, number: u8) -> Result<ibv_port_attr, Error> {
    // SAFETY: all-zero bytes are a value of this plain C struct.
    let mut port: ibv_port_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the context is open. The function fills the older, shorter form of the struct, a prefix of it.
    match unsafe { (context.verbs.ibv_query_port)(context.raw, number, (&raw mut port).cast()) } {
        0 => Ok(port),
        errno => Err(Error::System {
            call: format!("ibv_query_port({name}, {number})"),
            source: io::Error::from_raw_os_error(errno),
        }),
    }
}

fn vectors(context: &Context) -> usize {
    // SAFETY: the context is open.
    unsafe { (*context.raw).num_comp_vectors }.max(1) as usize
}

fn limits(context: &Context, name: &str, software: bool) -> Result<Limits, Error> {
    let device = query(context, name)?;
    let port = query_port(context, name, 1)?;
    // SAFETY: the context is open, so its device can be read.
    if unsafe { (*(*context.raw).device).transport_type == ibv_transport_type::IBV_TRANSPORT_IWARP } {
        // Its connections are made by rdma_cm alone, and its WRITEs carry no immediate, which the contract needs.
        return Err(Error::NoDevice {
            reason: format!("`{name}` is iWARP, and Fervor works on InfiniBand and RoCE"),
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
        ports: device.phys_port_cnt,
        message: u64::from(port.max_msg_sz),
        vectors: vectors(context),
        software,
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
        unsafe { (self.device.verbs.ibv_dereg_mr)(self.raw) };
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
