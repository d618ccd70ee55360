//! The endpoint: what its one polling thread makes of completions and news.
//!
//! [`keeper`](super::keeper) has the steps at the end of a connection. Here an [`Entry`] goes through them, as the news say. A step that says "polls until
//! the queue is empty" needs a *look* at the completion queue that began after the news were read, and found fewer completions than it
//! had place for. Looks are numbered for that.

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
            keeper::Keeper,
            link::Link,
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
    step: Step,
}

/// How far a connection is on the way to its end. The number is that of the last look that began before the news were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Open,
    /// The queue pair is in the error state: its requests are being flushed.
    Failed(u64),
    /// The keeper waits for the last buffer.
    Settling,
    /// The last buffer has been taken.
    Settled(u64),
    /// The keeper destroys the queue pair.
    Destroying,
    /// There is no queue pair any more.
    Gone(u64),
}

impl Step {
    /// Whether a look may bring it further.
    fn needs_look(self) -> bool {
        matches!(self, Self::Failed(_) | Self::Settled(_) | Self::Gone(_))
    }
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
    /// Looks at the completion queue that have begun.
    looks: u64,
    /// Buffers to be given back to the device.
    spare: Vec<u32>,
    /// Completions that `wait` came upon.
    found: VecDeque<ibv_wc>,
}

impl RdmaEndpoint {
    pub(super) fn new(
        device: &Arc<Device>,
        keeper: &Arc<Keeper>,
        config: &EndpointConfig,
    ) -> Result<Self, Error> {
        Ok(Self {
            queues: Arc::new(Queues::new(device, keeper, config)?),
            links: NumberMap::default(),
            by_queue_pair: NumberMap::default(),
            ending: Vec::new(),
            looks: 0,
            spare: Vec::new(),
            found: VecDeque::new(),
        })
    }

    /// Reads the news.
    fn catch_up(&mut self) {
        for item in self.queues.take_news() {
            match item {
                News::Joined(link) => {
                    self.by_queue_pair.insert(link.queue_pair_number, link.id);
                    self.links.insert(link.id, Entry { link, cause: None, step: Step::Open });
                }
                News::Failed(id) => {
                    self.step(id, Step::Failed(self.looks));
                    self.ending.push(id);
                }
                News::Settled(id) => self.step(id, Step::Settled(self.looks)),
                News::Gone(id) => self.step(id, Step::Gone(self.looks)),
                News::GivenUp(id) => drop(self.forget(id)),
            }
        }
    }

    fn step(&mut self, id: ConnectionId, step: Step) {
        if let Some(entry) = self.links.get_mut(&id) {
            entry.step = step;
        }
    }

    /// Gives a buffer back to the device, with others.
    fn give_back(&mut self, buffer: u32) {
        self.spare.push(buffer);
        if self.spare.len() >= self.queues.chain() {
            self.queues.recycle(&self.spare);
            self.spare.clear();
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
            return self.give_back(buffer);
        };
        if completion.status != ibv_wc_status::IBV_WC_SUCCESS {
            entry.note(received_result(completion.status));
            return self.give_back(buffer);
        }
        let immediate = (completion.wc_flags & ibv_wc_flags::IBV_WC_WITH_IMM.0 != 0).then(|| {
            // SAFETY: the flag says that the union holds an immediate; every bit pattern is one.
            u32::from_be(unsafe { completion.imm_data_invalidated_rkey_union.imm_data })
        });
        if completion.opcode == ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM {
            self.give_back(buffer);
            into.push(Completion::WriteImmediate { connection, immediate: immediate.unwrap_or_default() });
        } else {
            let buffer = ReceiveBuffer { index: buffer, length: completion.byte_len };
            into.push(Completion::Received { connection, buffer, immediate });
        }
    }

    /// Takes connections a step further to their end, after a look that found the completion queue empty.
    fn bury(&mut self, into: &mut Vec<Completion>) {
        let looked = |since: u64| self.looks > since;
        let lost = self.queues.are_lost();
        let keeper = &self.queues.keeper;
        let mut over = Vec::new();
        for &id in &self.ending {
            let Some(entry) = self.links.get_mut(&id) else { continue };
            let link = &entry.link;
            match entry.step {
                Step::Failed(since) if looked(since) && (lost || link.is_flushed(link.awaited())) => {
                    if !lost && self.queues.device.says_last_buffer() {
                        entry.step = Step::Settling;
                        keeper.settle(link.key);
                    } else {
                        entry.step = Step::Destroying;
                        keeper.destroy(link.key);
                    }
                }
                Step::Settled(since) if looked(since) => {
                    entry.step = Step::Destroying;
                    keeper.destroy(link.key);
                }
                Step::Gone(since) if looked(since) => over.push(id),
                _ => {}
            }
        }
        for id in over {
            let entry = self.forget(id).expect("it has just been there");
            if let Some((peer, made)) = entry.link.lost_peer() {
                self.queues.device.note_lost(peer, made);
            }
            let flushed = |tag| Completion::Work { connection: id, id: tag, result: Err(WorkError::Flushed) };
            into.extend(entry.link.left_over().into_iter().map(flushed));
            let cause = entry.cause.unwrap_or(WorkError::Disconnected);
            into.push(Completion::Disconnected { connection: id, cause });
            self.queues.unreserve();
        }
    }

    /// Whether a look may take a connection further to its end.
    fn awaits_look(&self) -> bool {
        self.ending.iter().any(|id| self.links.get(id).is_some_and(|entry| entry.step.needs_look()))
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
        // What a step at the end of a connection waits for is a matter of moments, and may have come already.
        if !self.found.is_empty() || self.awaits_look() || self.queues.has_news() {
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
        self.looks += 1;
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
        self.give_back(buffer.index);
    }
}

impl Drop for RdmaEndpoint {
    fn drop(&mut self) {
        let news = self.queues.close();
        let joined = news.into_iter().filter_map(|item| match item {
            News::Joined(link) => Some(link),
            _ => None,
        });
        let links = self.links.drain().map(|(_, entry)| entry.link).chain(joined);
        for link in links {
            link.break_off();
            self.queues.keeper.abandon(link.key);
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
