//! The messages of a session, as they lie inside the cipher.
//!
//! | message | from | says |
//! |---|---|---|
//! | [`Message::Hello`] | client, first | which process it is, on which host, and its rails |
//! | [`Message::Welcome`] | server, first | the same, and by which ways it can be reached |
//! | [`Message::Lanes`] | client | it wants lanes: by which way (and which rails, if it is RDMA), each for what, and its regions |
//! | [`Message::Go`] | server | with these tokens the lanes will be let in. (Lanes that bring an offer need none.) |
//! | [`Message::Answer`] | server | what became of one lane, and the server's regions |
//! | [`Message::Ready`] | client | its ends of lanes that brought offers can receive now |
//! | [`Message::Ended`] | both | a lane that brought an offer has ended there, or was given up |
//! | [`Message::Leaving`] | server | it makes no more lanes; those that there are go on |
//! | [`Message::Beat`] | both | nothing, once a second: it lives |
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
/// Most lanes that one message may ask for.
pub(crate) const MAX_LANES: usize = 128;
/// Longest offer of a lane: what a provider's own bootstrap would say of one end.
pub(crate) const MAX_LANE_OFFER: usize = 64;
const _: () = assert!(
    MAX_REGIONS * REGION + MAX_LANES * (2 + MAX_LANE_OFFER + 2 + MAX_REQUEST_DATA) + 64 <= MAX_MESSAGE
);
/// Longest name of a host.
pub(crate) const MAX_HOST: usize = 64;

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

    /// Whether its lanes can be [limited](crate::transport::Request::limit): where this process looks at each request of the peer.
    pub fn limits(self) -> bool {
        self == Way::Tcp
    }

    /// Whether the two ends of a lane by this way tell each other in the session what their providers need. Others have handshakes of their own.
    pub(crate) fn takes_offers(self) -> bool {
        self == Way::Rdma
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

/// Which process one end of a session is, for those who read about it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Process {
    /// Name of its host, as that host calls itself; without control characters.
    pub(crate) host: String,
    /// Number of the process there.
    pub(crate) pid: u32,
}

/// A lane that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// What its provider needs to know of the client's end; empty if the provider has a handshake of its own.
    pub(crate) offer: Vec<u8>,
    /// Private data.
    pub(crate) data: Vec<u8>,
}

/// What became of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The server's program does not want it. The private data is what it says.
    Refused = 0,
    /// It is there. The offer is the provider's answer, if the lane brought one.
    Accepted = 1,
    /// It cannot go by this way. The private data is a sentence that says why.
    Impossible = 2,
}

/// The rails that lanes by RDMA may go by. Zeros for those by another way.
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
    Hello {
        boot: Boot,
        process: Process,
        rails: Vec<Rail>,
    },
    Welcome {
        boot: Boot,
        process: Process,
        offers: Vec<Offer>,
        rails: Vec<Rail>,
    },
    /// The lanes are numbered from `first` on.
    Lanes {
        first: u32,
        way: Way,
        rails: LaneRails,
        regions: Vec<NamedRegion>,
        lanes: Vec<Wanted>,
    },
    Go {
        first: u32,
        tokens: Vec<Token>,
    },
    Answer {
        number: u32,
        verdict: Verdict,
        offer: Vec<u8>,
        regions: Vec<NamedRegion>,
        data: Vec<u8>,
    },
    Ready {
        first: u32,
        count: u16,
    },
    Ended {
        number: u32,
    },
    Leaving,
    Beat,
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
            Message::Lanes { .. } => "lanes",
            Message::Go { .. } => "go",
            Message::Answer { .. } => "answer",
            Message::Ready { .. } => "ready",
            Message::Ended { .. } => "ended",
            Message::Leaving => "leaving",
            Message::Beat => "beat",
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Message::Hello { boot, process, rails } => {
                out.push(1);
                out.extend(boot);
                put_process(&mut out, process);
                put_rails(&mut out, rails);
            }
            Message::Welcome { boot, process, offers, rails } => {
                out.push(2);
                out.extend(boot);
                put_process(&mut out, process);
                out.extend((offers.len() as u16).to_le_bytes());
                for Offer { way, place } in offers {
                    out.push(*way as u8);
                    put_bytes(&mut out, place.as_bytes());
                }
                put_rails(&mut out, rails);
            }
            Message::Lanes { first, way, rails, regions, lanes } => {
                out.push(3);
                out.extend(first.to_le_bytes());
                out.extend([*way as u8, rails.own, rails.theirs]);
                put_regions(&mut out, regions);
                assert!((1..=MAX_LANES).contains(&lanes.len()), "{} lanes", lanes.len());
                out.extend((lanes.len() as u16).to_le_bytes());
                for Wanted { offer, data } in lanes {
                    put_bytes(&mut out, offer);
                    put_bytes(&mut out, data);
                }
            }
            Message::Go { first, tokens } => {
                out.push(4);
                out.extend(first.to_le_bytes());
                out.extend((tokens.len() as u16).to_le_bytes());
                out.extend(tokens.as_flattened());
            }
            Message::Answer { number, verdict, offer, regions, data } => {
                out.push(5);
                out.extend(number.to_le_bytes());
                out.push(*verdict as u8);
                put_bytes(&mut out, offer);
                put_regions(&mut out, regions);
                put_bytes(&mut out, data);
            }
            Message::Ready { first, count } => {
                out.push(6);
                out.extend(first.to_le_bytes());
                out.extend(count.to_le_bytes());
            }
            Message::Ended { number } => {
                out.push(7);
                out.extend(number.to_le_bytes());
            }
            Message::Leaving => out.push(8),
            Message::Beat => out.push(9),
        }
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut rest = Rest(bytes);
        let message = match rest.take::<1>("kind")?[0] {
            1 => {
                Message::Hello { boot: rest.take("boot id")?, process: rest.process()?, rails: rest.rails()? }
            }
            2 => Message::Welcome {
                boot: rest.take("boot id")?,
                process: rest.process()?,
                offers: rest.offers()?,
                rails: rest.rails()?,
            },
            3 => rest.lanes()?,
            4 => Message::Go { first: rest.u32("number")?, tokens: rest.tokens()? },
            5 => Message::Answer {
                number: rest.u32("number")?,
                verdict: rest.verdict()?,
                offer: rest.bytes("offer", MAX_LANE_OFFER)?.to_vec(),
                regions: rest.regions()?,
                data: rest.bytes("private data", MAX_REPLY_DATA)?.to_vec(),
            },
            6 => {
                let first = rest.u32("number")?;
                Message::Ready { first, count: rest.count_lanes(first)? as u16 }
            }
            7 => Message::Ended { number: rest.u32("number")? },
            8 => Message::Leaving,
            9 => Message::Beat,
            other => return malformed("kind", format!("is {other}, which no message has")),
        };
        match rest.0.len() {
            0 => Ok(message),
            more => malformed("end", format!("is followed by {more} bytes")),
        }
    }
}

fn put_process(out: &mut Vec<u8>, process: &Process) {
    out.extend(process.pid.to_le_bytes());
    put_bytes(out, process.host.as_bytes());
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

    fn verdict(&mut self) -> Result<Verdict, Malformed> {
        match self.take::<1>("verdict")?[0] {
            0 => Ok(Verdict::Refused),
            1 => Ok(Verdict::Accepted),
            2 => Ok(Verdict::Impossible),
            other => malformed("verdict", format!("is {other}, and there are 0 to 2")),
        }
    }

    fn process(&mut self) -> Result<Process, Malformed> {
        let pid = self.u32("process number")?;
        match str::from_utf8(self.bytes("host name", MAX_HOST)?) {
            Ok(host) if host.chars().any(char::is_control) => {
                malformed("host name", format!("is {host:?}, which has a control character"))
            }
            Ok(host) => Ok(Process { host: host.to_owned(), pid }),
            Err(_) => malformed("host name", "is no text"),
        }
    }

    /// The number of lanes that are numbered from `first` on.
    fn count_lanes(&mut self, first: u32) -> Result<usize, Malformed> {
        match self.length("lanes", MAX_LANES)? {
            0 => malformed("lanes", "are none"),
            count if first.checked_add(count as u32).is_none() => {
                malformed("number", format!("is {first}, after which there are no {count} more"))
            }
            count => Ok(count),
        }
    }

    fn lanes(&mut self) -> Result<Message, Malformed> {
        let (first, way) = (self.u32("number")?, self.way()?);
        let rails = self.lane_rails(way)?;
        let regions = self.regions()?;
        let count = self.count_lanes(first)?;
        let lane = |_| {
            let offer = self.bytes("offer", MAX_LANE_OFFER)?.to_vec();
            Ok(Wanted { offer, data: self.bytes("private data", MAX_REQUEST_DATA)?.to_vec() })
        };
        let lanes = (0..count).map(lane).collect::<Result<_, _>>()?;
        Ok(Message::Lanes { first, way, rails, regions, lanes })
    }

    fn tokens(&mut self) -> Result<Vec<Token>, Malformed> {
        (0..self.length("tokens", MAX_LANES)?).map(|_| self.take("token")).collect()
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

    fn lane_rails(&mut self, way: Way) -> Result<LaneRails, Malformed> {
        let [own, theirs] = self.take("rails of lanes")?;
        let rails = LaneRails { own, theirs };
        let fault = match way == Way::Rdma {
            true if usize::from(own) >= MAX_RAILS => {
                format!("begin with number {own}, and {MAX_RAILS} are possible")
            }
            true if theirs == 0 => "are none of the server's".to_owned(),
            false if rails != LaneRails::default() => format!("are named, and lanes over {way} have none"),
            _ => return Ok(rails),
        };
        malformed("rails of lanes", fault)
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
mod tests;
