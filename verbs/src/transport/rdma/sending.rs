//! The send queue of a connection: the chain for the next doorbell, and the count of what is in flight.
//!
//! Requests are numbered from 0 (modulo 2^31). `retired <= rung <= posted`:
//!
//! ```text
//!      retired          rung              posted
//! ───────┴────────────────┴──────────────────┴──────▶ number
//!         the NIC's        chained: the next
//!         (in flight)      doorbell's
//! ```
//!
//! A completion of request `s` retires all up to `s`, since a send queue completes in order. Not every request has
//! one, so a hidden one is asked for often enough that the queue always holds a request that will complete: it may be
//! filled up with unsignalled requests, and polling still makes room. The device's queue has [`SPARE`] places more than
//! the user's: for the one keep-alive that may be under way, and for the sentinel, the last request of all. Nobody but this
//! count keeps the queue from overrunning: rxe does so in silence.
//!
//! **Held.** The end that accepts may be posted to before its peer can receive. Then the chain is held: nothing is rung until the peer has
//! said that it is ready. The chain has a place for each request of the queue, so that it may fill up meanwhile.

use std::{collections::HashMap, ffi::c_uint, ptr, sync::Arc, time::Instant};

use rdma_sys::*;

use crate::transport::{
    ConnectionId, MAX_INLINE, MAX_SGE,
    rdma::device::{Device, Registration},
};

/// Requests are numbered modulo 2^31: the other bits of `wr_id` say what they belong to.
const NUMBER_MASK: u32 = (1 << 31) - 1;

/// Places of the device's queue beyond the user's: a keep-alive, and the sentinel.
pub(super) const SPARE: u32 = 2;

/// What a completion's `wr_id` says.
///
/// | bits | of a send | of a receive |
/// |---|---|---|
/// | 63 | 0 | 1 |
/// | 62..32 | connection | 0 |
/// | 31 | whether the user signalled it | 0 |
/// | 30..0 | number of the request | index of the buffer |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WorkId {
    Send { connection: ConnectionId, number: u32, signalled: bool },
    Receive { buffer: u32 },
}

impl WorkId {
    pub(super) fn encode(self) -> u64 {
        match self {
            Self::Send { connection, number, signalled } => {
                u64::from(connection.0) << 32 | u64::from(signalled) << 31 | u64::from(number)
            }
            Self::Receive { buffer } => 1 << 63 | u64::from(buffer),
        }
    }

    pub(super) fn decode(id: u64) -> Self {
        if id >> 63 == 1 {
            return Self::Receive { buffer: id as u32 };
        }
        Self::Send {
            connection: ConnectionId((id >> 32) as u32),
            number: id as u32 & NUMBER_MASK,
            signalled: id >> 31 & 1 == 1,
        }
    }
}

/// One piece of local memory, as the device knows it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub address: u64,
    pub length: u32,
    pub key: u32,
}

/// What to post.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operation {
    pub opcode: ibv_wr_opcode::Type,
    pub remote_address: u64,
    pub remote_key: u32,
    pub immediate: u32,
}

/// Where the bytes of a request are.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bytes<'a> {
    Inline(&'a [u8]),
    Pieces(&'a [Piece]),
}

/// The chain of requests for the next doorbell, and the counts of the send queue.
pub(super) struct SendQueue {
    /// The chain: requests `rung..posted`, in `requests[start..end]`.
    requests: Box<[ibv_send_wr]>,
    pieces: Box<[[ibv_sge; MAX_SGE]]>,
    inline: Box<[[u8; MAX_INLINE]]>,
    /// Whether the user signalled a request, by its number.
    signals: Box<[bool]>,
    start: usize,
    end: usize,
    pub posted: u32,
    rung: u32,
    /// The number after the last rung request that asks for a completion. Such a request has one whatever happens; a
    /// silent one only if it fails.
    awaited: u32,
    /// Requests since the last one with a completion, whether the user's or a hidden one.
    pub silent: u32,
    /// Number of the keep-alive that is under way.
    pub keep_alive: Option<u32>,
    /// Nothing is rung yet: the peer cannot receive.
    pub held: bool,
    /// Nothing is posted any more.
    pub closed: bool,
    /// What the keeper saw last, and since when.
    pub seen: u32,
    pub since: Instant,
    /// Registrations that requests have named.
    kept: HashMap<*const Registration, Arc<Registration>>,
    last_kept: *const Registration,
}

// SAFETY: the raw pointers lead into the boxes beside them, and to registrations that `kept` holds.
unsafe impl Send for SendQueue {}

impl SendQueue {
    pub(super) fn new(slots: usize) -> Self {
        Self {
            // SAFETY: all-zero bytes are a value of this plain C struct (null pointers and zeros).
            requests: (0..slots).map(|_| unsafe { std::mem::zeroed::<ibv_send_wr>() }).collect(),
            pieces: vec![[ibv_sge { addr: 0, length: 0, lkey: 0 }; MAX_SGE]; slots].into(),
            inline: vec![[0; MAX_INLINE]; slots].into(),
            signals: vec![false; slots.next_power_of_two()].into(),
            start: 0,
            end: 0,
            posted: 0,
            rung: 0,
            awaited: 0,
            silent: 0,
            keep_alive: None,
            held: false,
            closed: false,
            seen: 0,
            since: Instant::now(),
            kept: HashMap::new(),
            last_kept: ptr::null(),
        }
    }

    /// The chain, each request linked to the next one, the last to none; and how many they are.
    pub(super) fn linked(&mut self) -> (*mut ibv_send_wr, usize) {
        let chain = &mut self.requests[self.start..self.end];
        let first = chain.as_mut_ptr();
        for index in 1..chain.len() {
            // SAFETY: both places are inside the slice that `first` was just made from.
            unsafe { (*first.add(index - 1)).next = first.add(index) };
        }
        (first, chain.len())
    }

    /// Takes note of whether the user signalled request `number`.
    pub(super) fn note_signal(&mut self, number: u32, signalled: bool) {
        let mask = self.signals.len() - 1;
        self.signals[number as usize & mask] = signalled;
    }

    /// Numbers of the user's signalled requests from number `retired` on.
    pub(super) fn signalled_since(&self, retired: u32) -> impl Iterator<Item = u32> {
        let mask = self.signals.len() - 1;
        (0..distance(retired, self.posted))
            .map(move |ahead| retired.wrapping_add(ahead) & NUMBER_MASK)
            .filter(move |&number| self.signals[number as usize & mask])
    }

    /// The number after the last request that has a completion, whatever happens.
    pub(super) fn awaited(&self) -> u32 {
        self.awaited
    }

    /// The device has taken the first `number` requests of the chain.
    pub(super) fn take(&mut self, number: usize) {
        for request in &self.requests[self.start..self.start + number] {
            self.rung = next(self.rung);
            if request.send_flags & ibv_send_flags::IBV_SEND_SIGNALED.0 != 0 {
                self.awaited = self.rung;
            }
        }
        self.start += number;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    pub(super) fn expire_keep_alive(&mut self, retired: u32) {
        let in_flight = distance(retired, self.posted);
        if self.keep_alive.is_some_and(|number| distance(number, self.posted) > in_flight) {
            self.keep_alive = None;
        }
    }

    pub(super) fn room(&mut self, depth: u32, retired: u32) -> u32 {
        self.expire_keep_alive(retired);
        let in_flight = distance(retired, self.posted) - u32::from(self.keep_alive.is_some());
        depth - in_flight
    }

    pub(super) fn keep(&mut self, registration: &Arc<Registration>, device: &Arc<Device>) {
        let key = Arc::as_ptr(registration);
        if key != self.last_kept {
            assert!(
                Arc::ptr_eq(&registration.device, device),
                "the region was registered by another transport than the connection's"
            );
            self.last_kept = key;
            self.kept.entry(key).or_insert_with(|| Arc::clone(registration));
        }
    }

    /// Puts a request at the end of the chain.
    pub(super) fn chain(
        &mut self,
        id: WorkId,
        operation: Operation,
        bytes: Bytes<'_>,
        completes: bool,
        max_inline: u32,
    ) {
        let slot = self.end;
        let pieces = &mut self.pieces[slot];
        let mut flags = if completes { ibv_send_flags::IBV_SEND_SIGNALED.0 } else { 0 };
        let count = match bytes {
            Bytes::Inline(bytes) => {
                self.inline[slot][..bytes.len()].copy_from_slice(bytes);
                pieces[0] =
                    ibv_sge { addr: self.inline[slot].as_ptr() as u64, length: bytes.len() as u32, lkey: 0 };
                if !bytes.is_empty() {
                    flags |= ibv_send_flags::IBV_SEND_INLINE.0;
                }
                usize::from(!bytes.is_empty())
            }
            Bytes::Pieces(given) => {
                let (mut count, mut total) = (0, 0);
                // Some devices take a length of 0 for 2 GiB.
                for piece in given.iter().filter(|piece| piece.length > 0) {
                    pieces[count] = ibv_sge { addr: piece.address, length: piece.length, lkey: piece.key };
                    total += u64::from(piece.length);
                    count += 1;
                }
                let outgoing = operation.opcode != ibv_wr_opcode::IBV_WR_RDMA_READ;
                if outgoing && (1..=u64::from(max_inline)).contains(&total) {
                    flags |= ibv_send_flags::IBV_SEND_INLINE.0;
                }
                count
            }
        };
        let sg_list = pieces.as_mut_ptr();
        let request = &mut self.requests[slot];
        request.wr_id = id.encode();
        request.next = ptr::null_mut();
        request.sg_list = sg_list;
        request.num_sge = count as i32;
        request.opcode = operation.opcode;
        request.send_flags = flags as c_uint;
        request.imm_data_invalidated_rkey_union.imm_data = operation.immediate.to_be();
        request.wr.rdma = rdma_t { remote_addr: operation.remote_address, rkey: operation.remote_key };
        self.end += 1;
    }
}

/// The number after `number`.
pub(super) fn next(number: u32) -> u32 {
    number.wrapping_add(1) & NUMBER_MASK
}

/// How far `to` is ahead of `from`.
pub(super) fn distance(from: u32, to: u32) -> u32 {
    to.wrapping_sub(from) & NUMBER_MASK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_ids_round_trip() {
        for number in [0, 1, NUMBER_MASK] {
            for connection in [ConnectionId(0), ConnectionId(NUMBER_MASK)] {
                for signalled in [false, true] {
                    let id = WorkId::Send { connection, number, signalled };
                    assert_eq!(WorkId::decode(id.encode()), id);
                }
            }
            let id = WorkId::Receive { buffer: number };
            assert_eq!(WorkId::decode(id.encode()), id);
        }
    }

    #[test]
    fn numbers_go_round() {
        assert_eq!(next(NUMBER_MASK), 0);
        assert_eq!(distance(NUMBER_MASK, 1), 2);
        assert_eq!(distance(5, 5), 0);
    }

    #[test]
    fn the_keep_alive_takes_none_of_the_room() {
        let mut queue = SendQueue::new(5);
        assert_eq!(queue.room(4, 0), 4);
        queue.keep_alive = Some(0);
        queue.posted = 1;
        assert_eq!(queue.room(4, 0), 4);
        queue.posted = 5;
        assert_eq!(queue.room(4, 0), 0);
        // Request 0, the keep-alive, is done: the others are still there.
        assert_eq!(queue.room(4, 1), 0);
        assert_eq!(queue.keep_alive, None);
        assert_eq!(queue.room(4, 3), 2);
    }

    #[test]
    fn signalled_requests_are_remembered_until_they_are_done() {
        let mut queue = SendQueue::new(6);
        queue.posted = NUMBER_MASK;
        for number in 0..6 {
            queue.note_signal(queue.posted, number % 2 == 0);
            queue.posted = next(queue.posted);
        }
        assert_eq!(queue.signalled_since(NUMBER_MASK).collect::<Vec<_>>(), [NUMBER_MASK, 1, 3]);
        assert_eq!(queue.signalled_since(2).collect::<Vec<_>>(), [3]);
        assert_eq!(queue.signalled_since(5).count(), 0);
    }
}
