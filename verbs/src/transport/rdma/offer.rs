//! What two ends tell each other before there is a queue pair between them: pure data, from bytes and to bytes.
//!
//! [`Offer`] is what a queue pair needs to know of the other one. It travels in a [`Message`] of the provider's own bootstrap, or in whatever
//! channel a program has. All numbers are little-endian.
//!
//! | bytes of an offer | what |
//! |---|---|
//! | 0 | [`Way`]: 1 InfiniBand, 2 RoCE v1, 3 RoCE v2 over IPv4, 4 over IPv6 |
//! | 1 | path MTU: `log2(bytes) - 7`, 1 to 5 |
//! | 2, 3 | READs that this end may have in flight, and those of the other end that it serves |
//! | 4..6 | LID |
//! | 6..8 | 0 |
//! | 8..12 | number of the queue pair (24 bits) |
//! | 12..16 | number of its first packet (24 bits) |
//! | 16..32 | GID |
//!
//! | bytes of a message | what |
//! |---|---|
//! | 0..4 | `FVR` and the version, 2 |
//! | 4 | [`Kind`] |
//! | 5 | 0 |
//! | 6..8 | length of the private data |
//! | 8..40 | the offer; zeros in a refusal |
//! | 40.. | the private data, and zeros up to [`MESSAGE`] |
//!
//! A request is answered by an acceptance or a refusal. The end that asked says [`READY`] when its queue pair can receive.

use std::net::Ipv6Addr;

use crate::{
    fabric::Way,
    transport::{MAX_REPLY_DATA, MAX_REQUEST_DATA, host::strangers::OPENING},
};

/// Bytes of an offer.
pub(super) const OFFER: usize = 32;
/// Bytes of a message.
pub(super) const MESSAGE: usize = OPENING;
const _: () = assert!(HEADER + OFFER + MAX_REPLY_DATA <= MESSAGE);
/// The last word of a bootstrap.
pub(super) const READY: u8 = b'R';

const MAGIC: [u8; 4] = *b"FVR\x02";
const HEADER: usize = 8;
const BITS_24: u32 = (1 << 24) - 1;

/// What a queue pair needs to know of the one that it is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Offer {
    pub way: Way,
    /// Largest payload of a packet, bytes.
    pub mtu: u16,
    /// READs that this end may have in flight.
    pub reads_out: u8,
    /// READs of the other end that this one serves at a time.
    pub reads_in: u8,
    pub lid: u16,
    pub queue_pair: u32,
    /// Number of the first packet that this end sends.
    pub first_packet: u32,
    pub gid: Ipv6Addr,
}

impl Offer {
    pub(super) fn encode(&self) -> [u8; OFFER] {
        let mut bytes = [0; OFFER];
        bytes[0] = self.way.code();
        bytes[1] = (self.mtu.ilog2() - 7) as u8;
        (bytes[2], bytes[3]) = (self.reads_out, self.reads_in);
        bytes[4..6].copy_from_slice(&self.lid.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.queue_pair.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.first_packet.to_le_bytes());
        bytes[16..].copy_from_slice(&self.gid.octets());
        bytes
    }

    /// # Errors
    /// A sentence that names the field that is wrong, and its value.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let bytes: &[u8; OFFER] =
            bytes.try_into().map_err(|_| format!("an offer has {OFFER} bytes, and not {}", bytes.len()))?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let number = |at: usize, what: &str| match word(at) {
            value @ 0..=BITS_24 => Ok(value),
            value => Err(format!("its {what} is {value}, which has more than 24 bits")),
        };
        let way = Way::from_code(bytes[0])
            .ok_or_else(|| format!("its kind of network is {}, and there are 1 to 4", bytes[0]))?;
        if !(1..=5).contains(&bytes[1]) {
            return Err(format!("its path MTU is {}, and there are 1 (256 bytes) to 5 (4096)", bytes[1]));
        }
        if bytes[2] == 0 || bytes[3] == 0 {
            return Err(format!(
                "its READs in flight are {} out and {} in: a READ would never complete",
                bytes[2], bytes[3]
            ));
        }
        if bytes[6..8] != [0, 0] {
            return Err(format!("its reserved bytes are {:?}, and not 0", &bytes[6..8]));
        }
        let gid: [u8; 16] = bytes[16..].try_into().expect("16 bytes");
        let offer = Self {
            way,
            mtu: 128 << bytes[1],
            reads_out: bytes[2],
            reads_in: bytes[3],
            lid: u16::from_le_bytes([bytes[4], bytes[5]]),
            queue_pair: number(8, "queue pair number")?,
            first_packet: number(12, "packet number")?,
            gid: Ipv6Addr::from(gid),
        };
        match way {
            Way::InfiniBand if offer.lid == 0 => {
                Err("its LID is 0: no subnet manager has given it one".to_owned())
            }
            Way::RoceV2Ipv4 if offer.gid.to_ipv4_mapped().is_none() => {
                Err(format!("its GID {} is no IPv4 address", offer.gid))
            }
            _ if offer.gid.is_unspecified() || offer.gid.is_multicast() => {
                Err(format!("its GID {} is the address of no port", offer.gid))
            }
            _ => Ok(offer),
        }
    }
}

/// What a message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A request to connect.
    Request = 1,
    /// An acceptance.
    Accept = 2,
    /// The user's refusal.
    Refuse = 3,
    /// The provider's refusal: the data is a sentence that says why.
    Impossible = 4,
}

/// A message of the bootstrap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub kind: Kind,
    /// Of a request and of an acceptance.
    pub offer: [u8; OFFER],
    pub data: Vec<u8>,
}

impl Message {
    /// A refusal, of either kind.
    pub(super) fn refusal(kind: Kind, data: &[u8]) -> Self {
        Self { kind, offer: [0; OFFER], data: data[..data.len().min(MAX_REPLY_DATA)].to_vec() }
    }

    fn limit(kind: Kind) -> usize {
        if kind == Kind::Request { MAX_REQUEST_DATA } else { MAX_REPLY_DATA }
    }

    pub(super) fn encode(&self) -> [u8; MESSAGE] {
        let length = self.data.len();
        let limit = Self::limit(self.kind);
        assert!(length <= limit, "{length} bytes of private data, but at most {limit} are possible");
        let mut bytes = [0; MESSAGE];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = self.kind as u8;
        bytes[6..8].copy_from_slice(&(length as u16).to_le_bytes());
        bytes[HEADER..HEADER + OFFER].copy_from_slice(&self.offer);
        bytes[HEADER + OFFER..][..length].copy_from_slice(&self.data);
        bytes
    }

    /// # Errors
    /// A sentence that names the field that is wrong, and its value.
    pub(super) fn decode(bytes: &[u8; MESSAGE]) -> Result<Self, String> {
        if bytes[..3] != MAGIC[..3] {
            return Err("what it says is not Fervor's".to_owned());
        }
        if bytes[3] != MAGIC[3] {
            return Err(format!("it speaks version {}, and this end version {}", bytes[3], MAGIC[3]));
        }
        let kind = [Kind::Request, Kind::Accept, Kind::Refuse, Kind::Impossible]
            .into_iter()
            .find(|&kind| kind as u8 == bytes[4])
            .ok_or_else(|| format!("its kind of message is {}, and there are 1 to 4", bytes[4]))?;
        let length = usize::from(u16::from_le_bytes([bytes[6], bytes[7]]));
        let limit = Self::limit(kind);
        if length > limit {
            return Err(format!("its private data has {length} bytes, and at most {limit} are possible"));
        }
        let offer = bytes[HEADER..HEADER + OFFER].try_into().expect("so many bytes");
        Ok(Self { kind, offer, data: bytes[HEADER + OFFER..][..length].to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer() -> Offer {
        Offer {
            way: Way::RoceV2Ipv4,
            mtu: 4096,
            reads_out: 16,
            reads_in: 1,
            lid: 0,
            queue_pair: 0x12_3456,
            first_packet: BITS_24,
            gid: "::ffff:10.7.0.1".parse().unwrap(),
        }
    }

    #[test]
    fn offers_round_trip() {
        for mtu in [256, 512, 1024, 2048, 4096] {
            let offer = Offer { mtu, ..offer() };
            assert_eq!(Offer::decode(&offer.encode()), Ok(offer));
        }
        let gid = "fe80::1".parse().unwrap();
        for way in [Way::InfiniBand, Way::RoceV1, Way::RoceV2Ipv6] {
            let offer = Offer { way, lid: 77, gid, ..offer() };
            assert_eq!(Offer::decode(&offer.encode()), Ok(offer));
        }
    }

    #[test]
    fn a_wrong_field_is_named() {
        for (byte, value, field) in [
            (0, 0, "network"),
            (0, 5, "network"),
            (0, 1, "LID"),
            (1, 0, "MTU"),
            (1, 6, "MTU"),
            (2, 0, "READs"),
            (3, 0, "READs"),
            (7, 1, "reserved"),
            (11, 1, "queue pair number"),
            (15, 1, "packet number"),
            (16, 1, "GID"),
        ] {
            let mut bytes = offer().encode();
            bytes[byte] = value;
            let said = Offer::decode(&bytes).unwrap_err();
            assert!(said.contains(field), "byte {byte} = {value}: {said}");
        }
        for length in [0, OFFER - 1] {
            assert!(Offer::decode(&offer().encode()[..length]).unwrap_err().contains("bytes"));
        }
    }

    #[test]
    fn messages_round_trip() {
        for (kind, limit) in [(Kind::Request, 48), (Kind::Accept, 128), (Kind::Refuse, 128)] {
            for length in 0..=limit {
                let data: Vec<u8> = (0..length as u8).collect();
                let message = Message { kind, offer: offer().encode(), data };
                assert_eq!(Message::decode(&message.encode()), Ok(message));
            }
        }
    }

    #[test]
    fn foreign_messages_are_refused_with_the_field() {
        let bytes = Message { kind: Kind::Request, offer: [0; OFFER], data: vec![7; 20] }.encode();
        for (byte, value, field) in [
            (0, b'G', "Fervor"),
            (3, 1, "version 1"),
            (4, 0, "kind"),
            (4, 9, "kind"),
            (6, 49, "49 bytes"),
            (7, 1, "bytes"),
        ] {
            let mut foreign = bytes;
            foreign[byte] = value;
            let said = Message::decode(&foreign).unwrap_err();
            assert!(said.contains(field), "byte {byte} = {value}: {said}");
        }
    }

    /// Whatever the bytes are, nothing panics, and what is taken is what was said.
    #[test]
    fn any_bytes_are_an_error_or_what_they_say() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut taken = 0;
        for _ in 0..100_000 {
            let mut bytes = [0; MESSAGE];
            bytes.fill_with(|| random() as u8);
            bytes[..4].copy_from_slice(&MAGIC);
            bytes[4] = 1 + (random() % 4) as u8;
            bytes[6..8].copy_from_slice(&((random() % 200) as u16).to_le_bytes());
            // Fields that are seldom right by chance.
            bytes[HEADER] = (random() % 6) as u8;
            bytes[HEADER + 1] = (random() % 7) as u8;
            bytes[HEADER + 6..HEADER + 8].fill(0);
            (bytes[HEADER + 11], bytes[HEADER + 15]) = (0, 0);
            let Ok(message) = Message::decode(&bytes) else { continue };
            let Ok(offer) = Offer::decode(&message.offer) else { continue };
            taken += 1;
            assert_eq!(offer.encode(), message.offer);
            assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
        assert!(taken > 1000, "{taken} of 100000 were taken");
    }

    /// Every byte, each bit of it: nothing panics, and what is taken is what was said.
    #[test]
    fn any_change_of_a_bit_is_an_error_or_another_message() {
        let good = Message { kind: Kind::Accept, offer: offer().encode(), data: vec![3; 9] }.encode();
        for bit in 0..MESSAGE * 8 {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            if let Ok(message) = Message::decode(&bytes)
                && let Ok(offer) = Offer::decode(&message.offer)
            {
                assert_eq!(offer.encode(), message.offer);
            }
        }
    }
}
