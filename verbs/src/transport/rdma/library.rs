//! `libibverbs`, loaded when it is first needed: a table of pointers to its functions.
//!
//! `rdma-sys` declares the functions, and we use its types alone. A program that calls a declared function is linked to the library, and does
//! not start on a machine that lacks it; one that defines functions of these names takes them away from everybody else in the program. A
//! pointer from `dlsym` does neither. The few functions that C has inline (`ibv_post_send`, `ibv_poll_cq` and the like) jump through the
//! device's own table, and need no library.
//!
//! **Who writes, who reads.** The table is written once, by whoever asks first. An open [`Device`](super::device::Device) holds a reference to
//! it, so nothing that belongs to a device needs to ask again.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    sync::OnceLock,
};

use rdma_sys::{
    _compat_ibv_port_attr, ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_device_attr, ibv_mr,
    ibv_pd, ibv_qp, ibv_qp_attr, ibv_qp_init_attr, ibv_srq, ibv_srq_init_attr,
};

use crate::error::Error;

const LIBRARY: &str = "libibverbs.so.1";
const PACKAGE: &str = "libibverbs1 ibverbs-providers";

/// Defines the table of the library and its loader.
macro_rules! library {
    ($(fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        /// The functions of libibverbs that Fervor calls, as they are called in C.
        pub(super) struct Verbs {
            $(pub(super) $name: unsafe extern "C" fn($($type),*) $(-> $result)?,)*
        }

        impl Verbs {
            fn load() -> Result<Self, String> {
                let handle = open()?;
                Ok(Self {
                    // SAFETY: the symbol is the library's function of that name, whose C prototype is the
                    // one given here (taken from rdma-core's headers); the library is never unloaded.
                    $($name: unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) $(-> $result)?>(
                            symbol(handle, stringify!($name))?,
                        )
                    },)*
                })
            }
        }
    };
}

library! {
    fn ibv_ack_async_event(event: *mut Event);
    fn ibv_ack_cq_events(cq: *mut ibv_cq, nevents: c_uint);
    fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd;
    fn ibv_close_device(context: *mut ibv_context) -> c_int;
    fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel;
    fn ibv_create_cq(
        context: *mut ibv_context, cqe: c_int, cq_context: *mut c_void, channel: *mut ibv_comp_channel,
        comp_vector: c_int
    ) -> *mut ibv_cq;
    fn ibv_create_qp(pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp;
    fn ibv_create_srq(pd: *mut ibv_pd, attr: *mut ibv_srq_init_attr) -> *mut ibv_srq;
    fn ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int;
    fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int;
    fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int;
    fn ibv_destroy_cq(cq: *mut ibv_cq) -> c_int;
    fn ibv_destroy_qp(qp: *mut ibv_qp) -> c_int;
    fn ibv_destroy_srq(srq: *mut ibv_srq) -> c_int;
    fn ibv_free_device_list(list: *mut *mut ibv_device);
    fn ibv_get_async_event(context: *mut ibv_context, event: *mut Event) -> c_int;
    fn ibv_get_cq_event(channel: *mut ibv_comp_channel, cq: *mut *mut ibv_cq, context: *mut *mut c_void) -> c_int;
    fn ibv_get_device_list(number: *mut c_int) -> *mut *mut ibv_device;
    fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char;
    fn ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int;
    fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context;
    fn ibv_query_device(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int;
    fn ibv_query_port(context: *mut ibv_context, port: u8, attr: *mut _compat_ibv_port_attr) -> c_int;
    fn ibv_reg_mr(pd: *mut ibv_pd, address: *mut c_void, length: usize, access: c_int) -> *mut ibv_mr;
}

/// `struct ibv_async_event`. That of `rdma-sys` has a Rust enum in it, for which a number that it does not know is undefined behaviour.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Event {
    /// A pointer to a queue or a queue pair, or the number of a port.
    pub(super) element: EventElement,
    /// `enum ibv_event_type`.
    pub(super) kind: c_uint,
}

/// What an event is of. Which one it is follows from its kind.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) union EventElement {
    /// A completion queue, a receive queue, or a queue pair.
    pub(super) object: *mut c_void,
    /// A port.
    pub(super) port: c_int,
}

/// The table. It is loaded when it is first asked for.
///
/// # Errors
/// [`Error::MissingLibrary`].
pub(super) fn verbs() -> Result<&'static Verbs, Error> {
    static TABLE: OnceLock<Result<Verbs, String>> = OnceLock::new();
    TABLE.get_or_init(Verbs::load).as_ref().map_err(|reason| Error::MissingLibrary {
        library: LIBRARY,
        reason: reason.clone(),
        package: PACKAGE,
    })
}

fn open() -> Result<*mut c_void, String> {
    let name = CString::new(LIBRARY).expect("the name has no NUL");
    // SAFETY: the name is NUL-terminated; the initialisers of this library are safe to run at any time.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() { Err(last_error()) } else { Ok(handle) }
}

/// The function `name` of the library opened as `handle`.
fn symbol(handle: *mut c_void, name: &str) -> Result<*mut c_void, String> {
    let name = CString::new(name).expect("an identifier has no NUL");
    // SAFETY: `handle` came from `dlopen` and is never closed; the name is NUL-terminated.
    let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
    if address.is_null() { Err(last_error()) } else { Ok(address) }
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

/// The function called `name`.
///
/// # Errors
/// [`Error::MissingLibrary`].
#[cfg(feature = "ibverbs")]
pub(super) fn find(name: &str) -> Result<*mut c_void, Error> {
    let found = open().and_then(|handle| symbol(handle, name));
    found.map_err(|reason| Error::MissingLibrary { library: LIBRARY, reason, package: PACKAGE })
}

/// Loads what [`devices`](crate::devices) needs.
///
/// # Errors
/// [`Error::MissingLibrary`].
pub(crate) fn load() -> Result<(), Error> {
    verbs()?;
    #[cfg(feature = "ibverbs")]
    super::names::load()?;
    Ok(())
}
