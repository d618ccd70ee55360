//! The C names of libibverbs that the crate `ibverbs` calls, as jumps through pointers loaded at run time. Only with the feature of that name:
//! a program that asks for it has these names to itself, and still starts where there is no libibverbs.

use std::{
    ffi::{c_char, c_int, c_void},
    sync::OnceLock,
};

use rdma_sys::{
    _compat_ibv_port_attr, ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_mr, ibv_pd, ibv_qp,
    ibv_qp_attr, ibv_qp_init_attr,
};

use super::library;
use crate::error::Error;

macro_rules! names {
    ($(fn $name:ident($($argument:ident: $type:ty),*) $(-> $result:ty)?;)*) => {
        struct Names {
            $($name: unsafe extern "C" fn($($type),*) $(-> $result)?,)*
        }

        impl Names {
            fn load() -> Result<Self, Error> {
                Ok(Self {
                    // SAFETY: the symbol is the library's function of that name, whose C prototype is the
                    // one given here (taken from rdma-core's headers); the library is never unloaded.
                    $($name: unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) $(-> $result)?>(
                            library::find(stringify!($name))?,
                        )
                    },)*
                })
            }
        }

        $(
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name($($argument: $type),*) $(-> $result)? {
                let names = NAMES.get().unwrap_or_else(|| panic!("{} was called before `load`", stringify!($name)));
                // SAFETY: the caller keeps the promises of the C function, to which this is a jump.
                unsafe { (names.$name)($($argument),*) }
            }
        )*
    };
}

static NAMES: OnceLock<Names> = OnceLock::new();

names! {
    fn _ibv_query_gid_table(
        context: *mut ibv_context, entries: *mut c_void, number: usize, flags: u32, entry_size: usize
    ) -> isize;
    fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd;
    fn ibv_close_device(context: *mut ibv_context) -> c_int;
    fn ibv_create_cq(
        context: *mut ibv_context, cqe: c_int, cq_context: *mut c_void, channel: *mut ibv_comp_channel,
        comp_vector: c_int
    ) -> *mut ibv_cq;
    fn ibv_create_qp(domain: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp;
    fn ibv_dealloc_pd(domain: *mut ibv_pd) -> c_int;
    fn ibv_dereg_mr(region: *mut ibv_mr) -> c_int;
    fn ibv_destroy_cq(queue: *mut ibv_cq) -> c_int;
    fn ibv_destroy_qp(qp: *mut ibv_qp) -> c_int;
    fn ibv_free_device_list(list: *mut *mut ibv_device);
    fn ibv_get_device_guid(device: *mut ibv_device) -> u64;
    fn ibv_get_device_index(device: *mut ibv_device) -> c_int;
    fn ibv_get_device_list(number: *mut c_int) -> *mut *mut ibv_device;
    fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char;
    fn ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int;
    fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context;
    fn ibv_query_port(context: *mut ibv_context, port: u8, attr: *mut _compat_ibv_port_attr) -> c_int;
    fn ibv_reg_mr(domain: *mut ibv_pd, address: *mut c_void, length: usize, access: c_int) -> *mut ibv_mr;
}

/// Fills the table. Whoever calls the crate has called this.
///
/// # Errors
/// [`Error::MissingLibrary`].
pub(super) fn load() -> Result<(), Error> {
    if NAMES.get().is_none() {
        let _ = NAMES.set(Names::load()?);
    }
    Ok(())
}
