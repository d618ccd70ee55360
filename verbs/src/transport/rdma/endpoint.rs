//! The endpoint: what its one polling thread makes of completions and news.
//!
//! # The end of a connection
//!
//! ```text
//!  error completion, DISCONNECTED event, disconnect(), drop
//!      │  Link::break_off: nothing more is posted
//!      ▼
//!  manager: queue pair → error state, peer told ──▶ news: InError
//!      │  the device flushes what is in its send queue
//!      ▼
//!  polling thread: all requests that ask for a completion have one, and the completion queue has been
//!      │           seen empty since InError; what was posted but never rung completes too
//!      ▼
//!  Disconnected; the link leaves the tables; later receives of its queue pair go back to the receive queue
//! ```

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    hash::{BuildHasherDefault, Hasher},
    mem::MaybeUninit,
    sync::Arc,
    time::Duration,
};

use rdma_sys::{ibv_wc, ibv_wc_flags, ibv_wc_opcode, ibv_wc_status};

use crate::{
    error::Error,
    transport::{
        Attach, Completion, ConnectionId, Endpoint, EndpointConfig, ReceiveBuffer, WorkError,
        rdma::{
            device::Device,
            link::Link,
            manager::Manager,
            queues::{BATCH, News, Queues},
            sending::WorkId,
        },
    },
};

/// A connection, as the polling thread knows it.
struct Entry {
    link: Arc<Link>,
    /// The first error.
    cause: Option<WorkError>,
    /// The queue pair is in the error state, so that nothing new can complete well.
    in_error: bool,
}

/// Connection numbers and queue pair numbers are spread well enough by themselves.
#[derive(Default)]
struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(u32::from(byte));
        }
    }

    fn write_u32(&mut self, number: u32) {
        // The table takes its bits from both ends: a product by an odd constant fills them.
        self.0 = (self.0 ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

type NumberMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

/// An endpoint of the `rdma` provider.
pub struct RdmaEndpoint {
    queues: Arc<Queues>,
    links: NumberMap<ConnectionId, Entry>,
    by_queue_pair: NumberMap<u32, ConnectionId>,
    /// Links that have ended, but have not been reported.
    ending: Vec<ConnectionId>,
    /// Completions that `wait` came upon.
    found: VecDeque<ibv_wc>,
}

impl RdmaEndpoint {
    pub(super) fn new(
        device: &Arc<Device>,
        manager: &Arc<Manager>,
        config: &EndpointConfig,
    ) -> Result<Self, Error> {
        Ok(Self {
            queues: Arc::new(Queues::new(device, manager, config)?),
            links: NumberMap::default(),
            by_queue_pair: NumberMap::default(),
            ending: Vec::new(),
            found: VecDeque::new(),
        })
    }

    /// Reads the news.
    fn catch_up(&mut self) {
        for item in self.queues.take_news() {
            match item {
                News::Joined(link) => {
                    self.by_queue_pair.insert(link.queue_pair_number, link.id);
                    self.links.insert(link.id, Entry { link, cause: None, in_error: false });
                }
                News::InError(id) => {
                    if let Some(entry) = self.links.get_mut(&id) {
                        entry.in_error = true;
                        self.ending.push(id);
                    }
                }
                News::GivenUp(id) => drop(self.forget(id)),
            }
        }
    }

    fn forget(&mut self, id: ConnectionId) -> Option<Entry> {
        let entry = self.links.remove(&id)?;
        self.ending.retain(|&ending| ending != id);
        let number = entry.link.queue_pair_number;
        // Another queue pair may have the number by now.
        if self.by_queue_pair.get(&number) == Some(&id) {
            self.by_queue_pair.remove(&number);
        }
        Some(entry)
    }

    fn complete(&mut self, completion: &ibv_wc, into: &mut Vec<Completion>) {
        match WorkId::decode(completion.wr_id) {
            WorkId::Send { connection, number, signalled } => {
                let Some(entry) = self.links.get_mut(&connection) else { return };
                let tag = entry.link.retire(number);
                let result = work_result(completion.status);
                entry.note(result);
                if signalled {
                    into.push(Completion::Work { connection, id: tag, result });
                }
            }
            WorkId::Receive { buffer } => self.received(completion, buffer, into),
        }
    }

    fn received(&mut self, completion: &ibv_wc, buffer: u32, into: &mut Vec<Completion>) {
        if !self.by_queue_pair.contains_key(&completion.qp_num) {
            // Of a connection that joined after this poll began; or of one that has been reported as over.
            self.catch_up();
        }
        let connection = self.by_queue_pair.get(&completion.qp_num).copied();
        let Some((connection, entry)) = connection.and_then(|id| Some((id, self.links.get_mut(&id)?))) else {
            return self.queues.recycle(buffer);
        };
        if completion.status != ibv_wc_status::IBV_WC_SUCCESS {
            entry.note(received_result(completion.status));
            return self.queues.recycle(buffer);
        }
        let immediate = (completion.wc_flags & ibv_wc_flags::IBV_WC_WITH_IMM.0 != 0).then(|| {
            // SAFETY: the flag says that the union holds an immediate; every bit pattern is one.
            u32::from_be(unsafe { completion.imm_data_invalidated_rkey_union.imm_data })
        });
        if completion.opcode == ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM {
            self.queues.recycle(buffer);
            into.push(Completion::WriteImmediate { connection, immediate: immediate.unwrap_or_default() });
        } else {
            let buffer = ReceiveBuffer { index: buffer, length: completion.byte_len };
            into.push(Completion::Received { connection, buffer, immediate });
        }
    }

    /// Reports connections of which nothing more can come. Only when the completion queue has just been empty.
    fn bury(&mut self, into: &mut Vec<Completion>) {
        for id in self.ending.clone() {
            let Some(entry) = self.links.get(&id) else { continue };
            let awaited = entry.link.close();
            if !entry.in_error || !entry.link.is_flushed(awaited) {
                continue;
            }
            let cause = entry.cause.unwrap_or(WorkError::Disconnected);
            let flushed = |tag| Completion::Work { connection: id, id: tag, result: Err(WorkError::Flushed) };
            into.extend(entry.link.unrung().into_iter().map(flushed));
            into.push(Completion::Disconnected { connection: id, cause });
            self.forget(id);
            self.queues.unreserve();
        }
    }
}

impl Entry {
    /// Keeps the first error, and ends the connection at it.
    fn note(&mut self, result: Result<(), WorkError>) {
        let Err(error) = result else { return };
        if error != WorkError::Flushed {
            self.cause.get_or_insert(error);
        }
        self.link.break_off();
    }
}

/// The status of a request of ours.
fn work_result(status: ibv_wc_status::Type) -> Result<(), WorkError> {
    Err(match status {
        ibv_wc_status::IBV_WC_SUCCESS => return Ok(()),
        ibv_wc_status::IBV_WC_WR_FLUSH_ERR => WorkError::Flushed,
        ibv_wc_status::IBV_WC_REM_ACCESS_ERR => WorkError::RemoteAccess,
        // The second is what rxe says of a message that is too long for a buffer of a shared receive queue.
        ibv_wc_status::IBV_WC_REM_INV_REQ_ERR | ibv_wc_status::IBV_WC_REM_OP_ERR => WorkError::RemoteInvalid,
        ibv_wc_status::IBV_WC_RETRY_EXC_ERR | ibv_wc_status::IBV_WC_RESP_TIMEOUT_ERR => {
            WorkError::RetryExceeded
        }
        ibv_wc_status::IBV_WC_RNR_RETRY_EXC_ERR => WorkError::ReceiverNotReady,
        other => WorkError::Other(other),
    })
}

/// The status of a receive: too long for the buffer is what the sender calls an invalid request.
fn received_result(status: ibv_wc_status::Type) -> Result<(), WorkError> {
    match status {
        ibv_wc_status::IBV_WC_LOC_LEN_ERR => Err(WorkError::RemoteInvalid),
        status => work_result(status),
    }
}

impl RdmaEndpoint {
    /// Has the next completion end a [sleep](RdmaAttach::sleep). `false`: there may be something to poll now.
    pub(in crate::transport) fn arm(&mut self) -> bool {
        // The end of a connection is a matter of moments, and what it waits for may have come already.
        if !self.found.is_empty() || !self.ending.is_empty() || self.queues.has_news() {
            return false;
        }
        self.queues.drain_events();
        self.queues.arm();
        // What completed before the queue was armed announces itself to nobody.
        let mut places = [const { MaybeUninit::uninit() }; BATCH];
        let number = self.queues.take(&mut places);
        // SAFETY: `take` has filled these, and each is read out once.
        self.found.extend(places[..number].iter().map(|place| unsafe { place.assume_init_read() }));
        number == 0
    }
}

impl RdmaAttach {
    /// Sleeps as [`Endpoint::wait`] does, for a polling thread that sleeps elsewhere and has [armed](RdmaEndpoint::arm) the queue. One
    /// thread at a time does so.
    pub(in crate::transport) fn sleep(&self, timeout: Duration) {
        self.0.sleep(timeout);
    }
}

impl Endpoint for RdmaEndpoint {
    type Attach = RdmaAttach;

    fn attach(&self) -> RdmaAttach {
        RdmaAttach(Arc::clone(&self.queues))
    }

    fn poll(&mut self, into: &mut Vec<Completion>) -> usize {
        let before = into.len();
        if self.queues.has_news() {
            self.catch_up();
        }
        while let Some(completion) = self.found.pop_front() {
            self.complete(&completion, into);
        }
        let mut places = [const { MaybeUninit::uninit() }; BATCH];
        let number = self.queues.take(&mut places);
        for place in &places[..number] {
            // SAFETY: `take` has filled it.
            self.complete(unsafe { place.assume_init_ref() }, into);
        }
        if number < BATCH && !self.ending.is_empty() {
            self.bury(into);
        }
        into.len() - before
    }

    fn wait(&mut self, timeout: Duration) {
        if self.arm() {
            self.queues.sleep(timeout);
        }
    }

    fn message(&self, buffer: &ReceiveBuffer) -> &[u8] {
        // SAFETY: from its completion to its release, which takes it by value, the buffer is not in the receive queue.
        unsafe { self.queues.message(buffer.index, buffer.len()) }
    }

    fn release(&mut self, buffer: ReceiveBuffer) {
        self.queues.recycle(buffer.index);
    }
}

impl Drop for RdmaEndpoint {
    fn drop(&mut self) {
        let news = self.queues.close();
        for entry in self.links.values() {
            entry.link.break_off();
        }
        for item in news {
            if let News::Joined(link) = item {
                link.break_off();
            }
        }
    }
}

/// Handle of an [`RdmaEndpoint`] for other threads.
#[derive(Clone)]
pub struct RdmaAttach(pub(super) Arc<Queues>);

impl Attach for RdmaAttach {
    fn wake(&self) {
        self.0.wake();
    }
}

impl fmt::Debug for RdmaEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "endpoint of {} connections on {}", self.links.len(), self.queues.device.name)
    }
}

impl fmt::Debug for RdmaAttach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "handle of an endpoint on {}", self.0.device.name)
    }
}
