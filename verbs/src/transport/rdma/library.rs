//! `libibverbs` and `librdmacm`, loaded when they are first needed.
//!
//! `rdma-sys` declares their functions; a program linked to them would not start on a machine that lacks them.
//! So this module *defines* the functions under their C names, as shims which jump through a table that
//! [`load`] fills by `dlopen` and `dlsym`. The linker finds these definitions before it comes to the libraries, and
//! (`--as-needed`) records no dependency on them.
//!
//! **Who writes, who reads.** [`load`] writes the tables once; the shims read them. Nothing in this crate calls a shim
//! before `load` has said `Ok`: every path to one begins with a [`Device`](super::device::Device) or the list of
//! devices, which call `load` first.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    sync::OnceLock,
};

use rdma_sys::*;

use crate::error::Error;

/// Defines the table of one library, its loader, and the shims.
macro_rules! library {
    ($table:ident, $file:literal, $package:literal;
        $(fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*
    ) => {
        struct $table {
            $($name: unsafe extern "C" fn($($type),*) $(-> $result)?,)*
        }

        impl $table {
            fn get() -> &'static OnceLock<Result<Self, Failure>> {
                static TABLE: OnceLock<Result<$table, Failure>> = OnceLock::new();
                &TABLE
            }

            fn load() -> Result<Self, Failure> {
                let handle = open($file, $package)?;
                Ok(Self {
                    // SAFETY: the symbol is the library's function of that name, whose C prototype is the
                    // one given here (taken from rdma-core's headers); the library is never unloaded.
                    $($name: unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) $(-> $result)?>(
                            symbol(handle, $file, $package, stringify!($name))?,
                        )
                    },)*
                })
            }
        }

        $(
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name($($argument: $type),*) $(-> $result)? {
                let Some(Ok(table)) = $table::get().get() else { not_loaded(stringify!($name)) };
                // SAFETY: the caller keeps the promises of the C function, to which this is a jump.
                unsafe { (table.$name)($($argument),*) }
            }
        )*
    };
}

library! { Verbs, "libibverbs.so.1", "libibverbs1 ibverbs-providers";
    fn ibv_ack_cq_events(cq: *mut ibv_cq, nevents: c_uint);
    fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd;
    fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel;
    fn ibv_create_cq(
        context: *mut ibv_context, cqe: c_int, cq_context: *mut c_void, channel: *mut ibv_comp_channel,
        comp_vector: c_int
    ) -> *mut ibv_cq;
    fn ibv_create_srq(pd: *mut ibv_pd, attr: *mut ibv_srq_init_attr) -> *mut ibv_srq;
    fn ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int;
    fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int;
    fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int;
    fn ibv_destroy_cq(cq: *mut ibv_cq) -> c_int;
    fn ibv_destroy_srq(srq: *mut ibv_srq) -> c_int;
    fn ibv_get_cq_event(channel: *mut ibv_comp_channel, cq: *mut *mut ibv_cq, context: *mut *mut c_void) -> c_int;
    fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char;
    fn ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int;
    fn ibv_query_device(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int;
    fn ibv_query_port(context: *mut ibv_context, port: u8, attr: *mut _compat_ibv_port_attr) -> c_int;
    fn ibv_query_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int, init: *mut ibv_qp_init_attr) -> c_int;
    fn ibv_reg_mr(pd: *mut ibv_pd, address: *mut c_void, length: usize, access: c_int) -> *mut ibv_mr;
}

library! { ConnectionManager, "librdmacm.so.1", "librdmacm1";
    fn rdma_accept(id: *mut rdma_cm_id, param: *mut rdma_conn_param) -> c_int;
    fn rdma_ack_cm_event(event: *mut rdma_cm_event) -> c_int;
    fn rdma_bind_addr(id: *mut rdma_cm_id, address: *mut libc::sockaddr) -> c_int;
    fn rdma_connect(id: *mut rdma_cm_id, param: *mut rdma_conn_param) -> c_int;
    fn rdma_create_event_channel() -> *mut rdma_event_channel;
    fn rdma_create_id(
        channel: *mut rdma_event_channel, id: *mut *mut rdma_cm_id, context: *mut c_void,
        space: rdma_port_space::Type
    ) -> c_int;
    fn rdma_create_qp(id: *mut rdma_cm_id, pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> c_int;
    fn rdma_destroy_event_channel(channel: *mut rdma_event_channel);
    fn rdma_destroy_id(id: *mut rdma_cm_id) -> c_int;
    fn rdma_destroy_qp(id: *mut rdma_cm_id);
    fn rdma_disconnect(id: *mut rdma_cm_id) -> c_int;
    fn rdma_free_devices(list: *mut *mut ibv_context);
    fn rdma_get_cm_event(channel: *mut rdma_event_channel, event: *mut *mut rdma_cm_event) -> c_int;
    fn rdma_get_devices(number: *mut c_int) -> *mut *mut ibv_context;
    fn rdma_get_src_port(id: *mut rdma_cm_id) -> u16;
    fn rdma_listen(id: *mut rdma_cm_id, backlog: c_int) -> c_int;
    fn rdma_migrate_id(id: *mut rdma_cm_id, channel: *mut rdma_event_channel) -> c_int;
    fn rdma_reject(id: *mut rdma_cm_id, data: *const c_void, length: u8) -> c_int;
    fn rdma_resolve_addr(
        id: *mut rdma_cm_id, from: *mut libc::sockaddr, to: *mut libc::sockaddr, timeout_ms: c_int
    ) -> c_int;
    fn rdma_resolve_route(id: *mut rdma_cm_id, timeout_ms: c_int) -> c_int;
    fn rdma_set_option(id: *mut rdma_cm_id, level: c_int, name: c_int, value: *mut c_void, length: usize) -> c_int;
}

// What the crate `ibverbs` has besides: its declarations of these end up here too.
#[cfg(feature = "ibverbs")]
library! { Listing, "libibverbs.so.1", "libibverbs1 ibverbs-providers";
    fn _ibv_query_gid_table(
        context: *mut ibv_context, entries: *mut c_void, number: usize, flags: u32, entry_size: usize
    ) -> isize;
    fn ibv_close_device(context: *mut ibv_context) -> c_int;
    fn ibv_create_qp(domain: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp;
    fn ibv_destroy_qp(qp: *mut ibv_qp) -> c_int;
    fn ibv_free_device_list(list: *mut *mut ibv_device);
    fn ibv_get_device_guid(device: *mut ibv_device) -> u64;
    fn ibv_get_device_index(device: *mut ibv_device) -> c_int;
    fn ibv_get_device_list(number: *mut c_int) -> *mut *mut ibv_device;
    fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context;
}

/// Why a library could not be loaded.
struct Failure {
    library: &'static str,
    package: &'static str,
    reason: String,
}

/// Loads the libraries, the first time that it is called.
///
/// # Errors
/// [`Error::MissingLibrary`].
pub(crate) fn load() -> Result<(), Error> {
    Verbs::get().get_or_init(Verbs::load).as_ref().map_err(Failure::report)?;
    ConnectionManager::get().get_or_init(ConnectionManager::load).as_ref().map_err(Failure::report)?;
    #[cfg(feature = "ibverbs")]
    Listing::get().get_or_init(Listing::load).as_ref().map_err(Failure::report)?;
    Ok(())
}

impl Failure {
    fn report(&self) -> Error {
        Error::MissingLibrary { library: self.library, reason: self.reason.clone(), package: self.package }
    }
}

fn open(library: &'static str, package: &'static str) -> Result<*mut c_void, Failure> {
    let name = CString::new(library).expect("the names above have no NUL");
    // SAFETY: the name is NUL-terminated; the initialisers of these two libraries are safe to run at any time.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        return Err(Failure { library, package, reason: last_error() });
    }
    Ok(handle)
}

/// The function `name` of the library opened as `handle`.
fn symbol(
    handle: *mut c_void,
    library: &'static str,
    package: &'static str,
    name: &str,
) -> Result<*mut c_void, Failure> {
    let name = CString::new(name).expect("an identifier has no NUL");
    // SAFETY: `handle` came from `dlopen` and is never closed; the name is NUL-terminated.
    let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
    if address.is_null() {
        return Err(Failure { library, package, reason: last_error() });
    }
    Ok(address)
}

fn last_error() -> String {
    // SAFETY: `dlerror` returns NULL or a NUL-terminated string that stays until this thread's next `dl…` call.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            "no reason given".to_owned()
        } else {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }
}

/// A shim was called before [`load`]: a bug of this crate, or a foreign caller of the C names.
#[cold]
fn not_loaded(name: &str) -> ! {
    panic!("{name} was called before its library was loaded")
}
