//! What is said over the socket: one opening in each direction, then frames.
//!
//! ```text
//! opening  │ magic 4 │ version 2 │ kind 1 │ length 1 │ receive size 8 │ send depth 8 │ private data 128 │
//! frame    │ kind 1 │ immediate? 1 │ zero 2 │ immediate 4 │ key 4 │ zero 4 │ length 8 │ address 8 │ payload ...
//! ```
//!
//! | frame | of | key, address | length | payload |
//! |---|---|---|---|---|
//! | `Send` | a requester | | of the payload | the message |
//! | `Write` | a requester | where to | of the payload | the bytes |
//! | `Read` | a requester | where from | of what is wanted | |
//! | `Executed` | a responder | address: how many requests of the peer have been executed | 0 | |
//! | `Reply` | a responder | address: how many were, before this READ | of the payload | the bytes that were READ |
//! | `Refused` | a responder | key: why; address: how many were, before the one that is refused | 0 | |
//!
//! Numbers are little-endian. Requests are executed in the order in which they come, so a number of them says which.

use crate::transport::{MAX_REPLY_DATA, WorkError};

const MAGIC: u32 = 0x4656_5443;
const VERSION: u16 = 1;

/// Bytes of an opening.
pub(super) use crate::transport::host::strangers::OPENING;
const _: () = assert!(24 + MAX_REPLY_DATA <= OPENING);
/// Bytes of a frame before its payload.
pub(super) const FRAME: usize = 32;
/// Requests of a send queue, at most: the other side keeps a note of each that it cannot answer yet.
pub(super) const MAX_SEND_DEPTH: u64 = 1 << 16;
/// Longest payload of a frame: what an address can count on, and no loss to anybody.
pub(super) const MAX_LENGTH: u64 = 1 << 40;

/// What an opening is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpeningKind {
    /// Of the client.
    Hello,
    /// Of the server: the connection is made.
    Accept,
    /// Of the server: it is not.
    Refuse,
}

/// What each side says first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Opening {
    pub(super) kind: OpeningKind,
    /// Bytes of the speaker's receive buffers, and requests of its send queue.
    pub(super) receive_size: u64,
    pub(super) send_depth: u64,
    pub(super) private_data: Vec<u8>,
}

impl Opening {
    pub(super) fn encode(&self) -> [u8; OPENING] {
        let mut bytes = [0; OPENING];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = self.kind as u8;
        bytes[7] = u8::try_from(self.private_data.len()).expect("its length was checked");
        bytes[8..16].copy_from_slice(&self.receive_size.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.send_depth.to_le_bytes());
        bytes[24..][..self.private_data.len()].copy_from_slice(&self.private_data);
        bytes
    }

    /// The opening in `bytes`, or what is wrong with it.
    pub(super) fn decode(bytes: &[u8; OPENING]) -> Result<Self, String> {
        let (magic, version) = (word4(bytes, 0), u16::from_le_bytes([bytes[4], bytes[5]]));
        if magic != MAGIC {
            return Err(format!("it is no Fervor process: it began with {magic:#010x}"));
        }
        if version != VERSION {
            return Err(format!("it speaks version {version} of the tcp transport, this side {VERSION}"));
        }
        let kind = match bytes[6] {
            0 => OpeningKind::Hello,
            1 => OpeningKind::Accept,
            2 => OpeningKind::Refuse,
            other => return Err(format!("its opening is of an unknown kind: {other}")),
        };
        let length = usize::from(bytes[7]);
        if length > MAX_REPLY_DATA {
            return Err(format!(
                "it announced {length} bytes of private data; {MAX_REPLY_DATA} are possible"
            ));
        }
        let send_depth = word8(bytes, 16);
        if send_depth > MAX_SEND_DEPTH {
            return Err(format!("it announced a send queue of {send_depth}; {MAX_SEND_DEPTH} is possible"));
        }
        Ok(Self {
            kind,
            receive_size: word8(bytes, 8),
            send_depth,
            private_data: bytes[24..][..length].to_vec(),
        })
    }
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Send,
    Write,
    Read,
    Executed,
    Reply,
    Refused,
}

impl Kind {
    /// Whether the peer asks for something; else it answers.
    pub(super) fn is_request(self) -> bool {
        matches!(self, Kind::Send | Kind::Write | Kind::Read)
    }
}

/// The head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    pub(super) immediate: Option<u32>,
    pub(super) key: u32,
    pub(super) length: u64,
    pub(super) address: u64,
}

impl Frame {
    /// An answer: `executed` requests have been.
    pub(super) fn answer(kind: Kind, executed: u64, length: u64) -> Self {
        Self { kind, immediate: None, key: 0, length, address: executed }
    }

    /// Bytes of payload that follow.
    pub(super) fn payload(&self) -> u64 {
        match self.kind {
            Kind::Send | Kind::Write | Kind::Reply => self.length,
            Kind::Read | Kind::Executed | Kind::Refused => 0,
        }
    }

    pub(super) fn encode(&self) -> [u8; FRAME] {
        let mut bytes = [0; FRAME];
        bytes[0] = self.kind as u8;
        bytes[1] = u8::from(self.immediate.is_some());
        bytes[4..8].copy_from_slice(&self.immediate.unwrap_or_default().to_le_bytes());
        bytes[8..12].copy_from_slice(&self.key.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.length.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.address.to_le_bytes());
        bytes
    }

    /// The head in `bytes`; `None` if it is malformed.
    pub(super) fn decode(bytes: &[u8; FRAME]) -> Option<Self> {
        let kind = match bytes[0] {
            0 => Kind::Send,
            1 => Kind::Write,
            2 => Kind::Read,
            3 => Kind::Executed,
            4 => Kind::Reply,
            5 => Kind::Refused,
            _ => return None,
        };
        let immediate = match bytes[1] {
            0 => None,
            1 if matches!(kind, Kind::Send | Kind::Write) => Some(word4(bytes, 4)),
            _ => return None,
        };
        let length = word8(bytes, 16);
        let zero = bytes[2..4].iter().chain(&bytes[12..16]).all(|&byte| byte == 0);
        (zero && length <= MAX_LENGTH).then(|| Self {
            kind,
            immediate,
            key: word4(bytes, 8),
            length,
            address: word8(bytes, 24),
        })
    }
}

/// The number that stands for a refusal's reason on the wire.
pub(super) fn encode_refusal(error: WorkError) -> u32 {
    match error {
        WorkError::RemoteAccess => 0,
        _ => 1,
    }
}

/// The reason that it stands for.
pub(super) fn decode_refusal(number: u32) -> WorkError {
    match number {
        0 => WorkError::RemoteAccess,
        _ => WorkError::RemoteInvalid,
    }
}

fn word4(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn word8(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openings_and_frames_round_trip() {
        for kind in [OpeningKind::Hello, OpeningKind::Accept, OpeningKind::Refuse] {
            for length in [0, 1, MAX_REPLY_DATA] {
                let private_data = (0..length).map(|i| i as u8).collect();
                let opening = Opening { kind, receive_size: 4096, send_depth: MAX_SEND_DEPTH, private_data };
                assert_eq!(Opening::decode(&opening.encode()), Ok(opening));
            }
        }
        for kind in [Kind::Send, Kind::Write, Kind::Read, Kind::Executed, Kind::Reply, Kind::Refused] {
            let frame = Frame { kind, immediate: None, key: 7, length: MAX_LENGTH, address: u64::MAX };
            assert_eq!(Frame::decode(&frame.encode()), Some(frame));
            let immediate = Frame { immediate: Some(u32::MAX), ..frame };
            let carries = matches!(kind, Kind::Send | Kind::Write);
            assert_eq!(Frame::decode(&immediate.encode()), carries.then_some(immediate));
        }
    }

    #[test]
    fn what_is_malformed_is_refused_with_the_field() {
        let good = Opening { kind: OpeningKind::Hello, receive_size: 1, send_depth: 1, private_data: vec![] };
        let bad = |at: usize, byte: u8| {
            let mut bytes = good.encode();
            bytes[at] = byte;
            Opening::decode(&bytes).unwrap_err()
        };
        assert!(bad(0, 0x16).contains("no Fervor process"));
        assert!(bad(4, 9).contains("version 9"));
        assert!(bad(6, 3).contains("kind: 3"));
        assert!(bad(7, 129).contains("129 bytes"));
        assert!(bad(18, 2).contains("send queue of 131073"));
        let frame = Frame::answer(Kind::Executed, 3, 0).encode();
        for (at, byte) in [(0, 6), (1, 1), (1, 2), (2, 1), (12, 1), (23, 1)] {
            let mut bytes = frame;
            bytes[at] = byte;
            assert_eq!(Frame::decode(&bytes), None, "byte {at} = {byte}");
        }
    }
}
