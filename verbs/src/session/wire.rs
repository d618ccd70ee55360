//! The messages of a session, as they lie inside the cipher.
//!
//! | message | from | says |
//! |---|---|---|
//! | [`Message::Hello`] | client, first | which host it is on, and its rails |
//! | [`Message::Welcome`] | server, first | which host it is on, by which ways it can be reached, and its rails |
//! | [`Message::Lane`] | client | it wants a lane: by which way (and which rails, if it is RDMA), for what, and its regions |
//! | [`Message::Go`] | server | with this token the lane will be let in |
//! | [`Message::Answer`] | server | what became of the lane, and the server's regions |
//!
//! A number is little-endian; a list or a string is led by its length in 2 bytes. Everything comes from a peer that may be hostile:
//! an error says which field, and what is wrong with it.

use std::{fmt, net::Ipv6Addr};

use super::noise::MAX_MESSAGE;
use crate::{
    fabric::Way as Network,
    rails::{MAX_ADDRESSES, MAX_NAME, MAX_RAILS, Rail, RailAddress},
    transport::{MAX_REPLY_DATA, MAX_REQUEST_DATA, RemoteRegion},
};

/// Most regions that one side may name.
pub(crate) const MAX_REGIONS: usize = 2048;
/// Bytes of a named region.
const REGION: usize = 4 + 4 + 8 + 8;
const _: () = assert!(MAX_REGIONS * REGION + MAX_REPLY_DATA + 64 <= MAX_MESSAGE);
/// Longest place of an offer, and most offers.
const MAX_PLACE: usize = 512;
const MAX_OFFERS: usize = 8;

/// Names a lane that is being made: whoever connects with it is let in, once.
pub(crate) type Token = [u8; 16];
/// Names a host, from one start of its kernel to the next.
pub(crate) type Boot = [u8; 16];

/// A way by which a lane can go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Way {
    /// Through shared memory of one host.
    Shm = 1,
    /// RDMA.
    Rdma = 2,
    /// TCP.
    Tcp = 3,
}

impl Way {
    /// All of them, the best first.
    pub const ALL: [Way; 3] = [Way::Shm, Way::Rdma, Way::Tcp];

    /// Its name in URLs.
    pub fn name(self) -> &'static str {
        match self {
            Way::Shm => "shm",
            Way::Rdma => "rdma",
            Way::Tcp => "tcp",
        }
    }

    /// The way of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|way| way.name() == name)
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A way that leads to the server, and where it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) way: Way,
    /// For `shm` the path of a socket. Empty where the place is that of the session.
    pub(crate) place: String,
}

/// A region: how its owner's process names it to all peers, and what a lane's provider calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NamedRegion {
    pub(crate) name: u32,
    pub(crate) region: RemoteRegion,
}

/// The rails that a lane by RDMA may go by. Zeros for one by another way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct LaneRails {
    /// Number of the client's.
    pub(crate) own: u8,
    /// Those of the server: a bit for each.
    pub(crate) theirs: u8,
}

const _: () = assert!(MAX_RAILS <= u8::BITS as usize);

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    Hello { boot: Boot, rails: Vec<Rail> },
    Welcome { boot: Boot, offers: Vec<Offer>, rails: Vec<Rail> },
    Lane { number: u32, way: Way, rails: LaneRails, regions: Vec<NamedRegion>, data: Vec<u8> },
    Go { number: u32, token: Token },
    Answer { number: u32, accepted: bool, regions: Vec<NamedRegion>, data: Vec<u8> },
}

/// What is wrong with a message: the field, and how.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {fault}")]
pub(crate) struct Malformed {
    field: &'static str,
    fault: String,
}

fn malformed<T>(field: &'static str, fault: impl Into<String>) -> Result<T, Malformed> {
    Err(Malformed { field, fault: fault.into() })
}

impl Message {
    /// Its name, for errors: what is in it may be long, or a secret.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Message::Hello { .. } => "hello",
            Message::Welcome { .. } => "welcome",
            Message::Lane { .. } => "lane",
            Message::Go { .. } => "go",
            Message::Answer { .. } => "answer",
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Message::Hello { boot, rails } => {
                out.push(1);
                out.extend(boot);
                put_rails(&mut out, rails);
            }
            Message::Welcome { boot, offers, rails } => {
                out.push(2);
                out.extend(boot);
                out.extend((offers.len() as u16).to_le_bytes());
                for Offer { way, place } in offers {
                    out.push(*way as u8);
                    put_bytes(&mut out, place.as_bytes());
                }
                put_rails(&mut out, rails);
            }
            Message::Lane { number, way, rails, regions, data } => {
                out.push(3);
                out.extend(number.to_le_bytes());
                out.extend([*way as u8, rails.own, rails.theirs]);
                put_regions(&mut out, regions);
                put_bytes(&mut out, data);
            }
            Message::Go { number, token } => {
                out.push(4);
                out.extend(number.to_le_bytes());
                out.extend(token);
            }
            Message::Answer { number, accepted, regions, data } => {
                out.push(5);
                out.extend(number.to_le_bytes());
                out.push((*accepted).into());
                put_regions(&mut out, regions);
                put_bytes(&mut out, data);
            }
        }
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut rest = Rest(bytes);
        let message = match rest.take::<1>("kind")?[0] {
            1 => Message::Hello { boot: rest.take("boot id")?, rails: rest.rails()? },
            2 => {
                Message::Welcome { boot: rest.take("boot id")?, offers: rest.offers()?, rails: rest.rails()? }
            }
            3 => Message::Lane {
                number: rest.u32("number")?,
                way: rest.way()?,
                rails: rest.lane_rails()?,
                regions: rest.regions()?,
                data: rest.bytes("private data", MAX_REQUEST_DATA)?.to_vec(),
            },
            4 => Message::Go { number: rest.u32("number")?, token: rest.take("token")? },
            5 => Message::Answer {
                number: rest.u32("number")?,
                accepted: match rest.take::<1>("verdict")?[0] {
                    0 => false,
                    1 => true,
                    other => return malformed("verdict", format!("is {other}, which is neither 0 nor 1")),
                },
                regions: rest.regions()?,
                data: rest.bytes("private data", MAX_REPLY_DATA)?.to_vec(),
            },
            other => return malformed("kind", format!("is {other}, which no message has")),
        };
        match rest.0.len() {
            0 => Ok(message),
            more => malformed("end", format!("is followed by {more} bytes")),
        }
    }
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u16).to_le_bytes());
    out.extend(bytes);
}

fn put_regions(out: &mut Vec<u8>, regions: &[NamedRegion]) {
    assert!(regions.len() <= MAX_REGIONS, "{} regions", regions.len());
    out.extend((regions.len() as u16).to_le_bytes());
    for NamedRegion { name, region } in regions {
        out.extend(name.to_le_bytes());
        out.extend(region.key.to_le_bytes());
        out.extend(region.address.to_le_bytes());
        out.extend(region.length.to_le_bytes());
    }
}

fn put_rails(out: &mut Vec<u8>, rails: &[Rail]) {
    assert!(rails.len() <= MAX_RAILS, "{} rails", rails.len());
    out.extend((rails.len() as u16).to_le_bytes());
    for Rail { name, megabits, addresses } in rails {
        put_bytes(out, name.as_bytes());
        out.extend(megabits.to_le_bytes());
        out.extend((addresses.len() as u16).to_le_bytes());
        for RailAddress { network, gid, prefix } in addresses {
            out.extend([network.code(), *prefix]);
            out.extend(gid.octets());
        }
    }
}

/// What of a message has not been read.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], Malformed> {
        match self.0.split_first_chunk() {
            Some((bytes, rest)) => {
                self.0 = rest;
                Ok(*bytes)
            }
            None => malformed(field, format!("has {} of {N} bytes", self.0.len())),
        }
    }

    fn u16(&mut self, field: &'static str) -> Result<u16, Malformed> {
        self.take(field).map(u16::from_le_bytes)
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, Malformed> {
        self.take(field).map(u32::from_le_bytes)
    }

    fn u64(&mut self, field: &'static str) -> Result<u64, Malformed> {
        self.take(field).map(u64::from_le_bytes)
    }

    /// A length of at most `most`.
    fn length(&mut self, field: &'static str, most: usize) -> Result<usize, Malformed> {
        let length = usize::from(self.u16(field)?);
        if length <= most {
            Ok(length)
        } else {
            malformed(field, format!("has length {length}, and {most} at most"))
        }
    }

    fn bytes(&mut self, field: &'static str, most: usize) -> Result<&'a [u8], Malformed> {
        let length = self.length(field, most)?;
        match self.0.split_at_checked(length) {
            Some((bytes, rest)) => {
                self.0 = rest;
                Ok(bytes)
            }
            None => malformed(field, format!("has {} of {length} bytes", self.0.len())),
        }
    }

    fn way(&mut self) -> Result<Way, Malformed> {
        let code = self.take::<1>("way")?[0];
        let found = Way::ALL.into_iter().find(|way| *way as u8 == code);
        found.map_or_else(|| malformed("way", format!("is {code}, which none has")), Ok)
    }

    fn offers(&mut self) -> Result<Vec<Offer>, Malformed> {
        let offer = |rest: &mut Self| {
            let way = rest.way()?;
            let place = str::from_utf8(rest.bytes("place", MAX_PLACE)?).map(str::to_owned);
            place.map_or_else(|_| malformed("place", "is no text"), |place| Ok(Offer { way, place }))
        };
        (0..self.length("offers", MAX_OFFERS)?).map(|_| offer(self)).collect()
    }

    fn rails(&mut self) -> Result<Vec<Rail>, Malformed> {
        let rail = |rest: &mut Self| {
            let name = rest.bytes("name of a rail", MAX_NAME)?;
            // It is printed.
            let printable = name.iter().all(|byte| byte.is_ascii_graphic());
            let name = str::from_utf8(name).ok().filter(|_| printable).map(str::to_owned);
            let name = name.map_or_else(|| malformed("name of a rail", "is no word"), Ok)?;
            let megabits = rest.u32("rate of a rail")?;
            let addresses = rest.length("addresses of a rail", MAX_ADDRESSES)?;
            let addresses = (0..addresses).map(|_| rest.rail_address()).collect::<Result<_, _>>()?;
            Ok(Rail { name, megabits, addresses })
        };
        (0..self.length("rails", MAX_RAILS)?).map(|_| rail(self)).collect()
    }

    fn rail_address(&mut self) -> Result<RailAddress, Malformed> {
        let [code, prefix] = self.take("address of a rail")?;
        let Some(network) = Network::from_code(code) else {
            return malformed("address of a rail", format!("is of network {code}, which none has"));
        };
        if prefix > 128 {
            return malformed("address of a rail", format!("has a prefix of {prefix} bits, and 128 at most"));
        }
        let gid = Ipv6Addr::from(self.take::<16>("address of a rail")?);
        Ok(RailAddress { network, gid, prefix })
    }

    fn lane_rails(&mut self) -> Result<LaneRails, Malformed> {
        let [own, theirs] = self.take("rails of a lane")?;
        if usize::from(own) < MAX_RAILS {
            Ok(LaneRails { own, theirs })
        } else {
            malformed("rails of a lane", format!("begin with number {own}, and {MAX_RAILS} are possible"))
        }
    }

    fn regions(&mut self) -> Result<Vec<NamedRegion>, Malformed> {
        let count = self.length("regions", MAX_REGIONS)?;
        if self.0.len() < count * REGION {
            return malformed("regions", format!("have {} of {} bytes", self.0.len(), count * REGION));
        }
        let region = |rest: &mut Self| {
            Ok(NamedRegion {
                name: rest.u32("region")?,
                region: RemoteRegion {
                    key: rest.u32("region")?,
                    address: rest.u64("region")?,
                    length: rest.u64("region")?,
                },
            })
        };
        (0..count).map(|_| region(self)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn examples() -> Vec<Message> {
        let region = |name| NamedRegion {
            name,
            region: RemoteRegion { address: 1 << 40, length: u64::MAX, key: 0xffff_0000 | name },
        };
        let regions: Vec<_> = (0..3).map(region).collect();
        let address = |n: u8| RailAddress {
            network: Network::from_code(1 + n).unwrap(),
            gid: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, n.into()),
            prefix: 128 - n,
        };
        let rail = |n: u8| Rail {
            name: format!("{}:{n}", "x".repeat(MAX_NAME - 2)),
            megabits: u32::MAX - u32::from(n),
            addresses: (0..n % 5).map(address).collect(),
        };
        let rails: Vec<_> = (0..MAX_RAILS as u8).map(rail).collect();
        vec![
            Message::Hello { boot: [7; 16], rails: Vec::new() },
            Message::Welcome { boot: [8; 16], offers: Vec::new(), rails: Vec::new() },
            Message::Welcome {
                boot: [8; 16],
                offers: Way::ALL.map(|way| Offer { way, place: format!("/tmp/{way}") }).to_vec(),
                rails,
            },
            Message::Lane {
                number: 3,
                way: Way::Rdma,
                rails: LaneRails { own: 7, theirs: 0b1010_0001 },
                regions: regions.clone(),
                data: vec![1; MAX_REQUEST_DATA],
            },
            Message::Go { number: 1 << 31, token: [9; 16] },
            Message::Answer { number: 0, accepted: true, regions, data: vec![2; MAX_REPLY_DATA] },
            Message::Answer {
                number: 0,
                accepted: false,
                regions: (0..MAX_REGIONS as u32).map(region).collect(),
                data: Vec::new(),
            },
        ]
    }

    #[test]
    fn messages_round_trip_and_no_part_of_one_is_another() {
        for message in examples() {
            let bytes = message.encode();
            assert!(bytes.len() <= MAX_MESSAGE);
            assert_eq!(Message::decode(&bytes), Ok(message));
            let step = 1 + bytes.len() / 500;
            (0..bytes.len())
                .step_by(step)
                .for_each(|cut| assert!(Message::decode(&bytes[..cut]).is_err(), "{cut}"));
            let error = Message::decode(&[&bytes[..], &[0]].concat()).unwrap_err().to_string();
            assert_eq!(error, "end is followed by 1 bytes");
        }
    }

    #[test]
    fn an_error_names_the_field_and_the_value() {
        let error = |bytes: &[u8]| Message::decode(bytes).unwrap_err().to_string();
        assert_eq!(error(&[]), "kind has 0 of 1 bytes");
        assert_eq!(error(&[9]), "kind is 9, which no message has");
        assert_eq!(error(&[1, 1, 2]), "boot id has 2 of 16 bytes");
        assert_eq!(error(&[3, 0, 0, 0, 0, 4]), "way is 4, which none has");
        assert_eq!(
            error(&[3, 0, 0, 0, 0, 2, 8, 1]),
            "rails of a lane begin with number 8, and 8 are possible"
        );
        assert_eq!(
            error(&[3, 0, 0, 0, 0, 1, 0, 0, 0xff, 0xff]),
            "regions has length 65535, and 2048 at most"
        );
        assert_eq!(error(&[3, 0, 0, 0, 0, 1, 0, 0, 2, 0, 1]), "regions have 1 of 48 bytes");
        let hello = |rails: &[u8]| error(&[&[1], &[0; 16][..], rails].concat());
        assert_eq!(hello(&[9, 0]), "rails has length 9, and 8 at most");
        assert_eq!(hello(&[1, 0, 73, 0]), "name of a rail has length 73, and 72 at most");
        assert_eq!(hello(&[1, 0, 2, 0, b'a', b'\n']), "name of a rail is no word");
        assert_eq!(
            hello(&[1, 0, 1, 0, b'a', 0, 0, 0, 0, 5, 0]),
            "addresses of a rail has length 5, and 4 at most"
        );
        let address = |bytes: [u8; 2]| hello(&[&[1, 0, 1, 0, b'a', 0, 0, 0, 0, 1, 0], &bytes[..]].concat());
        assert_eq!(address([5, 64]), "address of a rail is of network 5, which none has");
        assert_eq!(address([1, 129]), "address of a rail has a prefix of 129 bits, and 128 at most");
        assert_eq!(error(&[5, 0, 0, 0, 0, 2]), "verdict is 2, which is neither 0 nor 1");
    }

    proptest! {
        #[test]
        fn whatever_comes_is_a_message_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(message) = Message::decode(&bytes) {
                prop_assert_eq!(message.encode(), bytes);
            }
        }

        #[test]
        fn a_changed_message_is_a_message_or_an_error(
            which in 0..7_usize, at in any::<prop::sample::Index>(), bits in 1..=255_u8,
        ) {
            let mut bytes = examples()[which].encode();
            *at.get_mut(&mut bytes) ^= bits;
            if let Ok(message) = Message::decode(&bytes) {
                prop_assert_eq!(message.encode(), bytes);
            }
        }
    }
}
