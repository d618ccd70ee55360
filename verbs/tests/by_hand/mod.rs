//! Queue pairs made by hand, in one batch: what the making of lanes is measured against. Two threads, one for each end, tell each other in one
//! message what all their queue pairs need, and nothing else is done.

use std::{
    ptr,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use rdma_sys::*;

/// Queue pairs that a shared completion queue of soft-RoCE has entries for.
const ENTRIES: i32 = 8192;

/// The open device, and what queue pairs need of it.
struct Side {
    context: *mut ibv_context,
    domain: *mut ibv_pd,
    queue: *mut ibv_cq,
    receives: *mut ibv_srq,
    gid: ibv_gid,
    gid_index: u8,
    pairs: Vec<*mut ibv_qp>,
}

impl Side {
    fn open(name: &str, gid_index: u8) -> Self {
        // SAFETY: calls of libibverbs as its manual pages say, each with what the one before has returned, which is checked.
        unsafe {
            let mut count = 0;
            let list = __ibv_get_device_list(&mut count);
            assert!(!list.is_null());
            let found = (0..count as usize)
                .map(|at| *list.add(at))
                .find(|device| std::ffi::CStr::from_ptr(ibv_get_device_name(*device)).to_str() == Ok(name));
            let context = ibv_open_device(found.expect("the device"));
            ibv_free_device_list(list);
            assert!(!context.is_null());
            let domain = ibv_alloc_pd(context);
            let queue = ibv_create_cq(context, ENTRIES, ptr::null_mut(), ptr::null_mut(), 0);
            assert!(!domain.is_null() && !queue.is_null());
            let mut of_receives: ibv_srq_init_attr = std::mem::zeroed();
            (of_receives.attr.max_wr, of_receives.attr.max_sge) = (8, 1);
            let receives = ibv_create_srq(domain, &mut of_receives);
            assert!(!receives.is_null());
            let mut gid = ibv_gid { raw: [0; 16] };
            assert_eq!(ibv_query_gid(context, 1, gid_index.into(), &mut gid), 0);
            Self { context, domain, queue, receives, gid, gid_index, pairs: Vec::new() }
        }
    }

    /// Makes queue pairs in INIT: their numbers.
    fn make(&mut self, number: usize) -> Vec<u32> {
        let one = |_| {
            // SAFETY: all-zero bytes are a value of these C structs; domain and queues are of the open device.
            unsafe {
                let mut wanted: ibv_qp_init_attr = std::mem::zeroed();
                (wanted.send_cq, wanted.recv_cq, wanted.srq) = (self.queue, self.queue, self.receives);
                wanted.qp_type = ibv_qp_type::IBV_QPT_RC;
                wanted.cap.max_send_wr = 3;
                wanted.cap.max_send_sge = 4;
                wanted.cap.max_inline_data = 128;
                let pair = ibv_create_qp(self.domain, &mut wanted);
                assert!(!pair.is_null());
                let mut attributes: ibv_qp_attr = std::mem::zeroed();
                attributes.qp_state = ibv_qp_state::IBV_QPS_INIT;
                attributes.port_num = 1;
                attributes.qp_access_flags =
                    (ibv_access_flags::IBV_ACCESS_REMOTE_READ | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE).0;
                let mask = ibv_qp_attr_mask::IBV_QP_STATE
                    | ibv_qp_attr_mask::IBV_QP_PKEY_INDEX
                    | ibv_qp_attr_mask::IBV_QP_PORT
                    | ibv_qp_attr_mask::IBV_QP_ACCESS_FLAGS;
                assert_eq!(ibv_modify_qp(pair, &mut attributes, mask.0 as i32), 0);
                self.pairs.push(pair);
                (*pair).qp_num
            }
        };
        (0..number).map(one).collect()
    }

    /// Moves all to RTR and RTS, each to the one of that number.
    fn connect(&self, numbers: &[u32]) {
        for (&pair, &number) in self.pairs.iter().zip(numbers) {
            // SAFETY: as above; the queue pair is one of ours.
            unsafe {
                let mut attributes: ibv_qp_attr = std::mem::zeroed();
                attributes.qp_state = ibv_qp_state::IBV_QPS_RTR;
                attributes.path_mtu = ibv_mtu::IBV_MTU_1024;
                attributes.dest_qp_num = number;
                attributes.max_dest_rd_atomic = 16;
                attributes.min_rnr_timer = 12;
                attributes.ah_attr.port_num = 1;
                attributes.ah_attr.is_global = 1;
                attributes.ah_attr.grh.dgid = self.gid;
                attributes.ah_attr.grh.sgid_index = self.gid_index;
                attributes.ah_attr.grh.hop_limit = 64;
                let mask = ibv_qp_attr_mask::IBV_QP_STATE
                    | ibv_qp_attr_mask::IBV_QP_AV
                    | ibv_qp_attr_mask::IBV_QP_PATH_MTU
                    | ibv_qp_attr_mask::IBV_QP_DEST_QPN
                    | ibv_qp_attr_mask::IBV_QP_RQ_PSN
                    | ibv_qp_attr_mask::IBV_QP_MAX_DEST_RD_ATOMIC
                    | ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER;
                assert_eq!(ibv_modify_qp(pair, &mut attributes, mask.0 as i32), 0);
                attributes.qp_state = ibv_qp_state::IBV_QPS_RTS;
                (attributes.timeout, attributes.retry_cnt, attributes.rnr_retry) = (14, 6, 7);
                attributes.max_rd_atomic = 16;
                let mask = ibv_qp_attr_mask::IBV_QP_STATE
                    | ibv_qp_attr_mask::IBV_QP_TIMEOUT
                    | ibv_qp_attr_mask::IBV_QP_RETRY_CNT
                    | ibv_qp_attr_mask::IBV_QP_RNR_RETRY
                    | ibv_qp_attr_mask::IBV_QP_SQ_PSN
                    | ibv_qp_attr_mask::IBV_QP_MAX_QP_RD_ATOMIC;
                assert_eq!(ibv_modify_qp(pair, &mut attributes, mask.0 as i32), 0);
            }
        }
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // SAFETY: all of it is ours, and ended once, queue pairs first.
        unsafe {
            self.pairs.iter().for_each(|&pair| assert_eq!(ibv_destroy_qp(pair), 0));
            ibv_destroy_srq(self.receives);
            ibv_destroy_cq(self.queue);
            ibv_dealloc_pd(self.domain);
            ibv_close_device(self.context);
        }
    }
}

/// How long `number` queue pairs take. (Not their ends, and not the opening of the device.)
pub fn batch(number: usize) -> Duration {
    let (to_server, from_client): (Sender<Vec<u32>>, Receiver<_>) = channel();
    let (to_client, from_server): (Sender<Vec<u32>>, Receiver<_>) = channel();
    let (ready, started) = channel();
    // GID 1 is the IPv4 address of the device.
    let server = thread::spawn(move || {
        let mut side = Side::open("rxe1", 1);
        ready.send(()).unwrap();
        let theirs = from_client.recv().unwrap();
        let numbers = side.make(number);
        side.connect(&theirs);
        to_client.send(numbers).unwrap();
        // Until the other end is done.
        let _ = from_client.recv();
    });
    let mut side = Side::open("rxe1", 1);
    started.recv().unwrap();
    let begun = Instant::now();
    to_server.send(side.make(number)).unwrap();
    side.connect(&from_server.recv().unwrap());
    let took = begun.elapsed();
    drop((side, to_server));
    server.join().unwrap();
    took
}
