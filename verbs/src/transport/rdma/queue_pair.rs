//! A reliable connected queue pair, from its making to its end: the calls of libibverbs, and what each state needs.
//!
//! ```text
//!  make ─▶ INIT ── connect(offer) ─▶ RTR ─▶ RTS ── fail ─▶ ERR ── drop ─▶ gone
//! ```
//!
//! Every attribute below is needed: the kernel refuses the step if one is left out. In RTR the device answers; in RTS it also asks. In ERR
//! it flushes what is posted and refuses what comes in.

use std::{ffi::c_int, io, sync::Arc};

use rdma_sys::*;

use crate::{
    error::Error,
    fabric::{Local, Way},
    transport::{
        MAX_INLINE, MAX_SGE,
        rdma::{device::Device, offer::Offer},
    },
};

/// `IBV_QP_MIN_RNR_TIMER`: 0.64 ms until a sender whose receiver had no buffer tries again (0 would mean 655 ms).
const RNR_TIMER: u8 = 12;
/// How often a sender whose receiver has no buffer tries again. 7: for ever. A receiver that has no buffer just now makes its senders
/// wait; one that is gone does not answer at all, and that is bounded by the retries.
const RNR_RETRY: u8 = 7;
/// Bytes of a gathered payload that are copied at the doorbell rather than fetched by the NIC, if the device can.
const WANTED_INLINE: u32 = 128;

const _: () = assert!(WANTED_INLINE as usize >= MAX_INLINE);

/// The queues of an endpoint, for a queue pair that is made on them.
#[derive(Clone, Copy)]
pub(super) struct On {
    pub completions: *mut ibv_cq,
    pub receives: *mut ibv_srq,
}

/// A queue pair. Dropped, it is destroyed.
pub(super) struct QueuePair {
    raw: *mut ibv_qp,
    pub number: u32,
    pub max_inline: u32,
    device: Arc<Device>,
}

// SAFETY: verbs calls on a queue pair may come from any thread; the pointer is not changed.
unsafe impl Send for QueuePair {}

impl QueuePair {
    /// Makes one for `requests` requests, in state INIT, on a port.
    ///
    /// # Safety
    /// The queues are of `device`, and outlive the result.
    pub(super) unsafe fn new(device: &Arc<Device>, on: On, requests: u32, port: u8) -> Result<Self, Error> {
        // SAFETY: all-zero bytes are a value of this plain C struct.
        let mut attributes: ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        attributes.send_cq = on.completions;
        attributes.recv_cq = on.completions;
        attributes.srq = on.receives;
        attributes.qp_type = ibv_qp_type::IBV_QPT_RC;
        let cap = ibv_qp_cap {
            max_send_wr: requests,
            max_recv_wr: 0,
            max_send_sge: MAX_SGE as u32,
            max_recv_sge: 0,
            max_inline_data: WANTED_INLINE,
        };
        attributes.cap = cap;
        // SAFETY: domain and queues are of the open device (by the caller's promise).
        let mut raw = unsafe { (device.verbs.ibv_create_qp)(device.domain, &mut attributes) };
        if raw.is_null() {
            attributes.cap = ibv_qp_cap { max_inline_data: MAX_INLINE as u32, ..cap };
            // SAFETY: as above.
            raw = unsafe { (device.verbs.ibv_create_qp)(device.domain, &mut attributes) };
        }
        if raw.is_null() {
            return Err(Error::last_os(format!("ibv_create_qp({}, {requests} requests)", device.name)));
        }
        // SAFETY: the queue pair has just been made.
        let number = unsafe { (*raw).qp_num };
        let pair =
            Self { raw, number, max_inline: attributes.cap.max_inline_data, device: Arc::clone(device) };
        pair.initialise(port)?;
        Ok(pair)
    }

    /// For [`ibv_post_send`], and to be compared with what an event is of.
    pub(super) fn raw(&self) -> *mut ibv_qp {
        self.raw
    }

    fn initialise(&self, port: u8) -> Result<(), Error> {
        let mut attributes = blank();
        attributes.qp_state = ibv_qp_state::IBV_QPS_INIT;
        attributes.pkey_index = self.device.fabric.pkey_index;
        attributes.port_num = port;
        attributes.qp_access_flags =
            (ibv_access_flags::IBV_ACCESS_REMOTE_READ | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE).0;
        let mask = ibv_qp_attr_mask::IBV_QP_STATE
            | ibv_qp_attr_mask::IBV_QP_PKEY_INDEX
            | ibv_qp_attr_mask::IBV_QP_PORT
            | ibv_qp_attr_mask::IBV_QP_ACCESS_FLAGS;
        self.modify(&mut attributes, mask).map_err(
            self.failed("INIT", || format!("port {port}, partition key {}", self.device.fabric.pkey_index)),
        )
    }

    /// Makes it receive from, and send to, the queue pair of `theirs`; `own` is what that was told. On Ethernet the kernel looks for the
    /// peer's hardware address, and may sleep for up to a second until it finds that there is none.
    pub(super) fn connect(&self, local: &Local, own: &Offer, theirs: &Offer) -> Result<(), Error> {
        self.receive(local, own, theirs)?;
        let (timeout, retries) = self.device.fabric.patience(self.device.limits.software);
        let mut attributes = blank();
        attributes.qp_state = ibv_qp_state::IBV_QPS_RTS;
        attributes.timeout = timeout;
        attributes.retry_cnt = retries;
        attributes.rnr_retry = RNR_RETRY;
        attributes.sq_psn = own.first_packet;
        attributes.max_rd_atomic = own.reads_out.min(theirs.reads_in);
        let mask = ibv_qp_attr_mask::IBV_QP_STATE
            | ibv_qp_attr_mask::IBV_QP_TIMEOUT
            | ibv_qp_attr_mask::IBV_QP_RETRY_CNT
            | ibv_qp_attr_mask::IBV_QP_RNR_RETRY
            | ibv_qp_attr_mask::IBV_QP_SQ_PSN
            | ibv_qp_attr_mask::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify(&mut attributes, mask)
            .map_err(self.failed("RTS", || format!("timeout {timeout}, {retries} retries")))
    }

    fn receive(&self, local: &Local, own: &Offer, theirs: &Offer) -> Result<(), Error> {
        let fabric = &self.device.fabric;
        let mtu = own.mtu.min(theirs.mtu);
        let mut attributes = blank();
        attributes.qp_state = ibv_qp_state::IBV_QPS_RTR;
        attributes.path_mtu = mtu.ilog2() - 7;
        attributes.dest_qp_num = theirs.queue_pair;
        attributes.rq_psn = theirs.first_packet;
        attributes.max_dest_rd_atomic = own.reads_in.min(theirs.reads_out);
        attributes.min_rnr_timer = RNR_TIMER;
        attributes.ah_attr.port_num = local.port;
        attributes.ah_attr.sl = fabric.service_level;
        attributes.ah_attr.dlid = theirs.lid;
        // On InfiniBand the LID is enough, but to another subnet. Ethernet has GIDs alone.
        let subnet = |gid: std::net::Ipv6Addr| gid.to_bits() >> 64;
        if local.way != Way::InfiniBand || subnet(local.gid) != subnet(theirs.gid) {
            attributes.ah_attr.is_global = 1;
            attributes.ah_attr.grh = ibv_global_route {
                dgid: ibv_gid { raw: theirs.gid.octets() },
                flow_label: fabric.flow_label,
                sgid_index: local.gid_index,
                hop_limit: fabric.hop_limit,
                traffic_class: fabric.traffic_class,
            };
        }
        let mask = ibv_qp_attr_mask::IBV_QP_STATE
            | ibv_qp_attr_mask::IBV_QP_AV
            | ibv_qp_attr_mask::IBV_QP_PATH_MTU
            | ibv_qp_attr_mask::IBV_QP_DEST_QPN
            | ibv_qp_attr_mask::IBV_QP_RQ_PSN
            | ibv_qp_attr_mask::IBV_QP_MAX_DEST_RD_ATOMIC
            | ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER;
        self.modify(&mut attributes, mask).map_err(self.failed("RTR", || {
            format!(
                "GID {} of index {} to GID {}, LID {}, MTU {mtu}",
                local.gid, local.gid_index, theirs.gid, theirs.lid
            )
        }))
    }

    /// Moves it to the error state. After this the device takes nothing more in, and flushes what is posted. A device that is lost refuses:
    /// then nothing comes in either.
    pub(super) fn fail(&self) {
        let mut attributes = blank();
        attributes.qp_state = ibv_qp_state::IBV_QPS_ERR;
        let _ = self.modify(&mut attributes, ibv_qp_attr_mask::IBV_QP_STATE);
    }

    fn modify(&self, attributes: &mut ibv_qp_attr, mask: ibv_qp_attr_mask) -> io::Result<()> {
        // SAFETY: the queue pair lives as long as `self`; the attributes are a whole struct, in which all that `mask` names are set.
        match unsafe { (self.device.verbs.ibv_modify_qp)(self.raw, attributes, mask.0 as c_int) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno.abs())),
        }
    }

    fn failed(&self, state: &str, with: impl FnOnce() -> String) -> impl FnOnce(io::Error) -> Error {
        let (state, name) = (state.to_owned(), self.device.name.clone());
        move |source| Error::System { call: format!("ibv_modify_qp({name}, to {state}: {})", with()), source }
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: made by `new`, ended once; its queues outlive it (promised to `new`), and so does the device.
        unsafe { (self.device.verbs.ibv_destroy_qp)(self.raw) };
    }
}

fn blank() -> ibv_qp_attr {
    // SAFETY: all-zero bytes are a value of this plain C struct.
    unsafe { std::mem::zeroed() }
}
