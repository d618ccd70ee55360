//! What two processes say to each other over the Unix socket before data flows through shared memory.
//!
//! ```text
//!  connecting side                                   listening side
//!  HELLO   slot, sizes, private data; [doorbell] ──▶
//!  REGIONS key, bounds, right …; [memfds] ─────────▶ … Listener::accept returns a Request
//!                                               ◀─── ACCEPT  slot, sizes, private data; [doorbell, ring, ring]
//!                                               ◀─── REGIONS …
//!                                            or ◀─── REFUSE  private data
//! ```
//!
//! The socket is `SOCK_SEQPACKET`: a packet arrives whole, with its descriptors, or not at all. It stays open
//! as long as the connection and carries nothing more: its end is the news that the peer is gone. Everything
//! read here comes from a stranger; what does not parse is an error of that connection alone.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};

use super::region::Offer;
use crate::{
    error::Error,
    transport::{MAX_REPLY_DATA, MAX_REQUEST_DATA},
};

/// "FERVORSH", and the version of everything that two processes share: packets, rings, doorbells.
const MAGIC: u64 = u64::from_le_bytes(*b"FERVORSH");
const VERSION: u32 = 1;

/// Regions in one packet: the kernel takes at most 253 descriptors.
const REGIONS_PER_PACKET: usize = 128;
const MAX_FDS: usize = REGIONS_PER_PACKET;
/// Most regions that a peer may offer; bounds what a stranger makes us allocate.
pub(super) const MAX_REGIONS: u32 = 1 << 16;
const OPENING_BYTES: usize = 56;
const REGION_BYTES: usize = 24;
const MAX_PACKET: usize = REGIONS_PER_PACKET * REGION_BYTES;
const _: () = assert!(MAX_PACKET >= OPENING_BYTES + MAX_REPLY_DATA && MAX_REQUEST_DATA <= MAX_REPLY_DATA);

/// Longest receive buffer, bytes: bounds the rings that a stranger makes us allocate.
pub(super) const MAX_RECEIVE_SIZE: u64 = 1 << 30;

/// Longest wait for a peer that does not read its socket.
const SEND_PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Hello = 1,
    Accept = 2,
    Refuse = 3,
}

/// The first packet of either side. A refusal uses only `kind` and `data`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Opening {
    pub(super) kind: Kind,
    /// The bit to set in the sender's doorbell.
    pub(super) slot: u32,
    /// Regions that follow.
    pub(super) regions: u32,
    pub(super) receive_size: u64,
    pub(super) receive_buffers: u64,
    pub(super) send_depth: u64,
    pub(super) data: Vec<u8>,
}

impl Opening {
    pub(super) fn refusal(data: &[u8]) -> Self {
        Self {
            kind: Kind::Refuse,
            slot: 0,
            regions: 0,
            receive_size: 0,
            receive_buffers: 0,
            send_depth: 0,
            data: data.to_vec(),
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(OPENING_BYTES + self.data.len());
        out.extend(MAGIC.to_le_bytes());
        out.extend(VERSION.to_le_bytes());
        out.extend((self.kind as u32).to_le_bytes());
        out.extend(self.slot.to_le_bytes());
        out.extend(self.regions.to_le_bytes());
        out.extend(self.receive_size.to_le_bytes());
        out.extend(self.receive_buffers.to_le_bytes());
        out.extend(self.send_depth.to_le_bytes());
        out.extend((self.data.len() as u64).to_le_bytes());
        out.extend(&self.data);
        out
    }

    pub(super) fn decode(packet: &[u8]) -> Option<Self> {
        let mut reader = Reader(packet);
        if reader.u64()? != MAGIC || reader.u32()? != VERSION {
            return None;
        }
        let kind = match reader.u32()? {
            1 => Kind::Hello,
            2 => Kind::Accept,
            3 => Kind::Refuse,
            _ => return None,
        };
        let (slot, regions) = (reader.u32()?, reader.u32()?);
        let (receive_size, receive_buffers, send_depth) = (reader.u64()?, reader.u64()?, reader.u64()?);
        let length = reader.u64()?;
        let most = if kind == Kind::Hello { MAX_REQUEST_DATA } else { MAX_REPLY_DATA };
        let sane = length == reader.0.len() as u64
            && reader.0.len() <= most
            && slot < super::bell::SLOTS as u32
            && regions <= MAX_REGIONS
            && receive_size <= MAX_RECEIVE_SIZE;
        sane.then(|| Self {
            kind,
            slot,
            regions,
            receive_size,
            receive_buffers,
            send_depth,
            data: reader.0.to_vec(),
        })
    }
}

/// A region that a peer offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RegionRecord {
    pub(super) key: u32,
    pub(super) writable: bool,
    pub(super) base: u64,
    pub(super) length: u64,
}

impl RegionRecord {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.key.to_le_bytes());
        out.extend(u32::from(self.writable).to_le_bytes());
        out.extend(self.base.to_le_bytes());
        out.extend(self.length.to_le_bytes());
    }

    /// All records of a packet.
    pub(super) fn decode(packet: &[u8]) -> Option<Vec<Self>> {
        let mut reader = Reader(packet);
        let mut records = Vec::new();
        while !reader.0.is_empty() {
            let (key, writable) = (reader.u32()?, reader.u32()?);
            let (base, length) = (reader.u64()?, reader.u64()?);
            base.checked_add(length)?;
            records.push(Self { key, writable: writable != 0, base, length });
        }
        Some(records)
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn u32(&mut self) -> Option<u32> {
        let (value, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*value))
    }

    fn u64(&mut self) -> Option<u64> {
        let (value, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*value))
    }
}

/// Sends an opening and the regions that it announces.
pub(super) fn send_opening(
    socket: &OwnedFd,
    opening: &Opening,
    fds: &[BorrowedFd<'_>],
    regions: &[Offer],
) -> Result<(), Error> {
    send(socket, &opening.encode(), fds)?;
    for chunk in regions.chunks(REGIONS_PER_PACKET) {
        let mut packet = Vec::with_capacity(chunk.len() * REGION_BYTES);
        let mut fds = Vec::with_capacity(chunk.len());
        for offer in chunk {
            let Offer { key, base, length, writable, .. } = *offer;
            RegionRecord { key, writable, base, length }.encode(&mut packet);
            fds.push(offer.descriptor()?);
        }
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send(socket, &packet, &fds)?;
    }
    Ok(())
}

/// Sends one packet.
pub(super) fn send(socket: &OwnedFd, packet: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
    let deadline = Instant::now() + SEND_PATIENCE;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    loop {
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "{} descriptors", fds.len());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match sendmsg(socket, &[IoSlice::new(packet)], &mut control, flags) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let left = deadline.saturating_duration_since(Instant::now());
                ready(socket, PollFlags::OUT, left)?;
                if left.is_zero() {
                    return Err(Error::Timeout {
                        what: "sending to a peer that does not read its socket".to_owned(),
                        seconds: SEND_PATIENCE.as_secs_f64(),
                    });
                }
            }
            Err(error) => return Err(Error::io("sendmsg(peer)")(error.into())),
        }
    }
}

/// Waits until the socket is ready or at its end, or `timeout` is over; or a signal comes.
pub(super) fn ready(socket: &OwnedFd, flags: PollFlags, timeout: Duration) -> Result<(), Error> {
    let mut fds = [PollFd::new(socket, flags)];
    match poll(&mut fds, timespec(timeout).as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(Error::io("poll(socket)")(error.into())),
    }
}

/// For the kernel; `None`, for ever, beyond what it can express.
pub(super) fn timespec(timeout: Duration) -> Option<Timespec> {
    Timespec::try_from(timeout).ok()
}

/// One packet.
#[derive(Debug)]
pub(super) struct Packet {
    pub(super) bytes: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// What there is to receive now.
#[derive(Debug)]
pub(super) enum Received {
    Packet(Packet),
    Nothing,
    /// The peer closed the socket, or sent what cannot be a packet of ours.
    End,
}

/// Receives a packet, if there is one.
pub(super) fn receive(socket: &OwnedFd) -> Received {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Ok(message) => break message,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Received::Nothing,
            Err(_) => return Received::End,
        }
    };
    // Taken in any case, so that they are closed in any case.
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if message.bytes == 0 || message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Received::End;
    }
    bytes.truncate(message.bytes);
    Received::Packet(Packet { bytes, fds })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opening() -> Opening {
        Opening {
            kind: Kind::Accept,
            slot: 7,
            regions: 3,
            receive_size: 4096,
            receive_buffers: 64,
            send_depth: 128,
            data: (0..128).collect(),
        }
    }

    #[test]
    fn openings_round_trip() {
        let opening = opening();
        assert_eq!(Opening::decode(&opening.encode()), Some(opening));
        assert_eq!(Opening::decode(&Opening::refusal(b"").encode()), Some(Opening::refusal(b"")));
    }

    #[test]
    fn an_opening_cut_short_or_too_long_or_changed_in_its_head_is_refused() {
        let good = opening().encode();
        for length in 0..good.len() {
            assert_eq!(Opening::decode(&good[..length]), None, "{length}");
        }
        assert_eq!(Opening::decode(&[&good[..], b"x"].concat()), None);
        for byte in 0..12 {
            let mut bad = good.clone();
            bad[byte] ^= 1;
            assert_eq!(Opening::decode(&bad), None, "byte {byte}");
        }
        let mut hello = opening();
        hello.kind = Kind::Hello;
        assert_eq!(Opening::decode(&hello.encode()), None, "128 bytes are too many for a request");
    }

    #[test]
    fn region_records_round_trip_and_do_not_wrap_around() {
        let record = RegionRecord { key: 1, writable: true, base: 1 << 40, length: 4096 };
        let mut packet = Vec::new();
        record.encode(&mut packet);
        record.encode(&mut packet);
        assert_eq!(packet.len(), 2 * REGION_BYTES);
        assert_eq!(RegionRecord::decode(&packet), Some(vec![record, record]));
        assert_eq!(RegionRecord::decode(&packet[..REGION_BYTES + 5]), None);
        packet.clear();
        RegionRecord { base: u64::MAX, length: 1, ..record }.encode(&mut packet);
        assert_eq!(RegionRecord::decode(&packet), None);
    }
}
