//! What two processes say to each other over the Unix socket before data flows through shared memory.
//!
//! ```text
//!  connecting side                                        listening side
//!  connect, asks the kernel whose the listener is         accept, asks the kernel whose the peer is
//!                                                    ◀─── FORBID  user: this listener takes only that one's processes
//!  HELLO   slot, sizes, private data; [doorbell] ───────▶
//!  REGIONS key, bounds, right …; [memfds] ──────────────▶ … Listener::accept returns a Request
//!                                                    ◀─── ACCEPT  slot, sizes, private data; [doorbell, ring, ring]
//!                                                    ◀─── REGIONS …
//!                                                 or ◀─── REFUSE  private data
//! ```
//!
//! The socket is `SOCK_SEQPACKET`: a packet arrives whole, with its descriptors, or not at all. It stays open
//! as long as the connection and carries nothing more: its end is the news that the peer is gone. Everything
//! read here comes from a stranger; what does not parse is an error of that connection alone.
//!
//! **A stranger costs a socket, and nothing more.** The first packet of a side says how many regions follow, so it says how
//! many bytes there will be. It is looked at without being taken ([`peek`]). The rest is taken when all of it is there
//! ([`queued`]), in one go. Until then packets and descriptors wait in the kernel, on the account of the process that sent
//! them: in its socket's send buffer, and as its files. So nothing is allocated, no descriptor held and nothing mapped for
//! somebody who says half of what it announced. It follows that all that a side says must fit a send buffer
//! ([`SEND_BUFFER`]).

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, ioctl_fionread},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, RecvMsg, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg, sockopt::set_socket_send_buffer_size,
    },
};

use super::region::{MAX_REGION_BYTES, MAX_REGIONS, Offer};
use crate::{
    error::Error,
    transport::{MAX_REPLY_DATA, MAX_REQUEST_DATA},
};

/// "FERVORSH", and the version of everything that two processes share: packets, rings, doorbells, seals.
const MAGIC: u64 = u64::from_le_bytes(*b"FERVORSH");
const VERSION: u32 = 2;

/// Longest receive buffer, bytes: 64 of the longest messages of Fervor's protocol. Bounds the rings, of which each holds two of them.
pub(super) const MAX_RECEIVE_SIZE: u64 = 1 << 22;

/// Regions in one packet: the kernel takes at most 253 descriptors.
const REGIONS_PER_PACKET: usize = 128;
const MAX_FDS: usize = REGIONS_PER_PACKET;
const OPENING_BYTES: usize = 64;
const REGION_BYTES: usize = 24;
const MAX_PACKET: usize = REGIONS_PER_PACKET * REGION_BYTES;
const MAX_OPENING: usize = OPENING_BYTES + MAX_REPLY_DATA;
const _: () = assert!(MAX_PACKET >= MAX_OPENING && MAX_REQUEST_DATA <= MAX_REPLY_DATA);

/// What the kernel counts of a packet: its bytes, rounded up to the next size that it allocates, and what it keeps beside them.
const PACKET_COST: usize = 2 * MAX_PACKET;
/// The send buffer of each socket: room for an opening and the most regions. Linux allows 208 KiB without being asked.
pub(super) const SEND_BUFFER: usize = (2 + MAX_REGIONS as usize / REGIONS_PER_PACKET) * PACKET_COST;
const _: () = assert!(SEND_BUFFER <= 212_992);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Hello = 1,
    Accept = 2,
    Refuse = 3,
    Forbid = 4,
}

/// The first packet of either side. A refusal uses only `kind` and `data`; so does a prohibition, whose data is the user
/// that the listener admits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Opening {
    pub(super) kind: Kind,
    /// The bit to set in the sender's doorbell.
    pub(super) slot: u32,
    /// Regions that follow.
    pub(super) regions: u32,
    /// Their lengths together.
    pub(super) region_bytes: u64,
    pub(super) receive_size: u64,
    pub(super) receive_buffers: u64,
    pub(super) send_depth: u64,
    pub(super) data: Vec<u8>,
}

impl Opening {
    pub(super) fn refusal(data: &[u8]) -> Self {
        Self::answer(Kind::Refuse, data)
    }

    /// The listener admits only processes of this user.
    pub(super) fn prohibition(user: u32) -> Self {
        Self::answer(Kind::Forbid, &user.to_le_bytes())
    }

    fn answer(kind: Kind, data: &[u8]) -> Self {
        Self {
            kind,
            slot: 0,
            regions: 0,
            region_bytes: 0,
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
        out.extend(self.region_bytes.to_le_bytes());
        out.extend(self.receive_size.to_le_bytes());
        out.extend(self.receive_buffers.to_le_bytes());
        out.extend(self.send_depth.to_le_bytes());
        out.extend((self.data.len() as u64).to_le_bytes());
        out.extend(&self.data);
        out
    }

    /// Bytes of this packet and of those that it announces.
    pub(super) fn announced_bytes(&self) -> u64 {
        OPENING_BYTES as u64 + self.data.len() as u64 + u64::from(self.regions) * REGION_BYTES as u64
    }

    /// Descriptors that come with the packet.
    pub(super) fn descriptors(&self) -> usize {
        match self.kind {
            Kind::Hello => 1,
            Kind::Accept => 3,
            Kind::Refuse | Kind::Forbid => 0,
        }
    }

    /// The user that a prohibition names.
    pub(super) fn admitted_user(&self) -> Option<u32> {
        let data = (self.kind == Kind::Forbid).then_some(&self.data)?;
        Some(u32::from_le_bytes(data.as_slice().try_into().ok()?))
    }

    /// The error says what is wrong, for a sentence that begins with the peer.
    pub(super) fn decode(packet: &[u8]) -> Result<Self, String> {
        let mut reader = Reader(packet);
        let mut fields = || {
            let head = (reader.u64()?, reader.u32()?, reader.u32()?, reader.u32()?, reader.u32()?);
            Some((head, [reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?]))
        };
        let alien = || "it does not speak this version of Fervor's protocol for shared memory".to_owned();
        let ((magic, version, kind, slot, regions), numbers) = fields().ok_or_else(alien)?;
        if magic != MAGIC || version != VERSION {
            return Err(alien());
        }
        let kind = match kind {
            1 => Kind::Hello,
            2 => Kind::Accept,
            3 => Kind::Refuse,
            4 => Kind::Forbid,
            _ => return Err(format!("its first packet is of kind {kind}, which does not exist")),
        };
        let [region_bytes, receive_size, receive_buffers, send_depth, length] = numbers;
        let data = reader.0;
        if length != data.len() as u64 {
            return Err(format!("it announces {length} bytes of private data and sends {}", data.len()));
        }
        let most = if kind == Kind::Hello { MAX_REQUEST_DATA } else { MAX_REPLY_DATA };
        for (what, value, limit) in [
            ("bytes of private data", length, most as u64),
            ("as the number of its connection", slot.into(), super::bell::SLOTS as u64 - 1),
            ("regions", regions.into(), MAX_REGIONS.into()),
            ("bytes of regions", region_bytes, MAX_REGION_BYTES),
            ("bytes as the size of its receive buffers", receive_size, MAX_RECEIVE_SIZE),
        ] {
            if value > limit {
                return Err(format!("it announces {value} {what}, but at most {limit} is possible"));
            }
        }
        let data = data.to_vec();
        let opening =
            Self { kind, slot, regions, region_bytes, receive_size, receive_buffers, send_depth, data };
        if opening.descriptors() == 0 && regions > 0 {
            return Err(format!("it refuses, and announces {regions} regions"));
        }
        if kind == Kind::Forbid && opening.admitted_user().is_none() {
            return Err(format!("it admits a user whose number has {length} bytes"));
        }
        Ok(opening)
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
            if writable > 1 || length == 0 {
                return None;
            }
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

/// Sends an opening and the regions that it announces, to a process of user `peer`, and waits until `deadline` if they find no
/// room. `own` is the user of this process.
pub(super) fn send_opening(
    socket: &OwnedFd,
    opening: &Opening,
    fds: &[BorrowedFd<'_>],
    regions: &[Offer],
    (own, peer): (u32, u32),
    deadline: Option<Instant>,
) -> Result<(), Error> {
    // Less is allowed where the system's limit is lower. Then it is enough for fewer regions.
    set_socket_send_buffer_size(socket, SEND_BUFFER)
        .map_err(|e| Error::io("setsockopt(SO_SNDBUF)")(e.into()))?;
    send(socket, &opening.encode(), fds, deadline)?;
    for chunk in regions.chunks(REGIONS_PER_PACKET) {
        let mut packet = Vec::with_capacity(chunk.len() * REGION_BYTES);
        let mut fds = Vec::with_capacity(chunk.len());
        for offer in chunk {
            let Offer { key, base, length, writable, .. } = *offer;
            RegionRecord { key, writable, base, length }.encode(&mut packet);
            fds.push(offer.descriptor(own, peer)?);
        }
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        send(socket, &packet, &fds, deadline)?;
    }
    Ok(())
}

/// Sends one packet; waits until `deadline`, or for ever, if it finds no room.
///
/// # Errors
/// [`io::ErrorKind::WouldBlock`] when it found none; the system's.
pub(super) fn send(
    socket: &OwnedFd,
    packet: &[u8],
    fds: &[BorrowedFd<'_>],
    deadline: Option<Instant>,
) -> Result<(), Error> {
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
                let left = deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
                if left.is_zero() {
                    let what = "the peer does not read what this side says, and the socket has no room for it \
                                (see net.core.wmem_max)";
                    let source = io::Error::new(io::ErrorKind::WouldBlock, what);
                    return Err(Error::System { call: "sendmsg(peer)".to_owned(), source });
                }
                ready(socket, PollFlags::OUT, left)?;
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

/// Whether the peer leaves within `timeout`.
pub(super) fn has_left(socket: &OwnedFd, timeout: Duration) -> Result<bool, Error> {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    match poll(&mut fds, timespec(timeout).as_ref()) {
        Ok(count) => Ok(count > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(Error::io("poll(socket)")(error.into())),
    }
}

/// For the kernel; `None`, for ever, beyond what it can express.
pub(super) fn timespec(timeout: Duration) -> Option<Timespec> {
    Timespec::try_from(timeout).ok()
}

/// What there is to look at, or to take.
#[derive(Debug)]
pub(super) enum Received<T> {
    Packet(T),
    Nothing,
    /// The peer closed the socket, or sent what cannot be a packet of ours.
    End,
}

/// The first packet that has not been taken, if there is one. It stays where it is, with its descriptors.
pub(super) fn peek(socket: &OwnedFd) -> Received<Vec<u8>> {
    // One byte more than an opening has, so that a longer one is seen to be longer.
    let mut bytes = vec![0; MAX_OPENING + 1];
    let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
    match receive_into(socket, &mut bytes, &mut RecvAncillaryBuffer::default(), flags) {
        Ok(Some(message)) if message.bytes > 0 => {
            bytes.truncate(message.bytes);
            Received::Packet(bytes)
        }
        Ok(None) => Received::Nothing,
        _ => Received::End,
    }
}

/// Bytes of all packets that have not been taken.
pub(super) fn queued(socket: &OwnedFd) -> Result<u64, Errno> {
    ioctl_fionread(socket)
}

/// Takes a packet and its descriptors.
pub(super) fn take(socket: &OwnedFd) -> Result<(Vec<u8>, Vec<OwnedFd>), String> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = receive_into(socket, &mut bytes, &mut control, flags);
    // Taken in any case, so that they are closed in any case.
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    let message = match message {
        Ok(Some(message)) if message.bytes > 0 => message,
        Ok(Some(_)) => return Err("it closed the connection".to_owned()),
        Ok(None) => return Err("it sent fewer packets than announced".to_owned()),
        Err(e) => return Err(format!("recvmsg failed: {e}")),
    };
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Err(format!("it sent a packet of more than {MAX_PACKET} bytes"));
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(format!(
            "its descriptors were lost: it sent more than {MAX_FDS} in a packet, or this process has too many files open"
        ));
    }
    bytes.truncate(message.bytes);
    Ok((bytes, fds))
}

/// `None`: there is nothing.
fn receive_into(
    socket: &OwnedFd,
    bytes: &mut [u8],
    control: &mut RecvAncillaryBuffer<'_>,
    flags: RecvFlags,
) -> Result<Option<RecvMsg>, Errno> {
    loop {
        match recvmsg(socket, &mut [IoSliceMut::new(bytes)], control, flags) {
            Ok(message) => return Ok(Some(message)),
            // Said once, before what was sent: the peer has left without reading all. It may have said why.
            Err(Errno::INTR | Errno::CONNRESET) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

/// Takes the records of at most one packet, of the `left` regions that are to come, and their descriptors.
pub(super) fn take_regions(
    socket: &OwnedFd,
    left: usize,
) -> Result<impl Iterator<Item = (RegionRecord, OwnedFd)> + use<>, String> {
    let count = left.min(REGIONS_PER_PACKET);
    let (packet, fds) = take(socket)?;
    let records = RegionRecord::decode(&packet).ok_or("it sent a malformed list of regions")?;
    if records.len() != count || fds.len() != count {
        let (records, fds) = (records.len(), fds.len());
        return Err(format!(
            "it sent {records} regions and {fds} descriptors in a packet, instead of {count}"
        ));
    }
    Ok(records.into_iter().zip(fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opening() -> Opening {
        Opening {
            kind: Kind::Accept,
            slot: 7,
            regions: 3,
            region_bytes: 12288,
            receive_size: 4096,
            receive_buffers: 64,
            send_depth: 128,
            data: (0..128).collect(),
        }
    }

    #[test]
    fn openings_round_trip() {
        let opening = opening();
        assert_eq!(Opening::decode(&opening.encode()), Ok(opening));
        assert_eq!(Opening::decode(&Opening::refusal(b"").encode()), Ok(Opening::refusal(b"")));
    }

    #[test]
    fn an_opening_cut_short_or_too_long_or_changed_in_its_head_is_refused() {
        let good = opening().encode();
        for length in 0..good.len() {
            assert!(Opening::decode(&good[..length]).is_err(), "{length}");
        }
        assert!(Opening::decode(&[&good[..], b"x"].concat()).is_err());
        for byte in 0..12 {
            let mut bad = good.clone();
            bad[byte] ^= 1;
            assert!(Opening::decode(&bad).is_err(), "byte {byte}");
        }
        let mut hello = opening();
        hello.kind = Kind::Hello;
        assert!(Opening::decode(&hello.encode()).is_err(), "128 bytes are too many for a request");
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
