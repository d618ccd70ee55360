//! The messages of a session, as they lie inside the cipher.
//!
//! | message | from | says |
//! |---|---|---|
//! | [`Message::Hello`] | client, first | which process it is, on which host |
//! | [`Message::Welcome`] | server, first | the same, and by which ways it can be reached |
//! | [`Message::Lanes`] | client | it wants lanes: by which way, each for what, and its regions |
//! | [`Message::Go`] | server | with these tokens the lanes will be let in. (Lanes that bring an offer need none.) |
//! | [`Message::Answer`] | server | what became of one lane, and the server's regions |
//! | [`Message::Ready`] | client | its ends of lanes that brought offers can receive now |
//! | [`Message::Ended`] | both | a lane that brought an offer has ended there, or was given up |
//! | [`Message::Leaving`] | server | it makes no more lanes; those that there are go on |
//! | [`Message::Beat`] | both | nothing, once a second: it lives |
//!
//! A number is little-endian; a list or a string is led by its length in 2 bytes. Everything comes from a peer that may be hostile:
//! an error says which field, and what is wrong with it.

use std::fmt;

use super::noise::MAX_MESSAGE;
use crate::transport::{MAX_REPLY_DATA, MAX_REQUEST_DATA, RemoteRegion};

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

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    Hello {
        boot: Boot,
        process: Process,
    },
    Welcome {
        boot: Boot,
        process: Process,
        offers: Vec<Offer>,
    },
    /// The lanes are numbered from `first` on.
    Lanes {
        first: u32,
        way: Way,
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
            Message::Hello { boot, process } => {
                out.push(1);
                out.extend(boot);
                put_process(&mut out, process);
            }
            Message::Welcome { boot, process, offers } => {
                out.push(2);
                out.extend(boot);
                put_process(&mut out, process);
                out.extend((offers.len() as u16).to_le_bytes());
                for Offer { way, place } in offers {
                    out.push(*way as u8);
                    put_bytes(&mut out, place.as_bytes());
                }
            }
            Message::Lanes { first, way, regions, lanes } => {
                out.push(3);
                out.extend(first.to_le_bytes());
                out.push(*way as u8);
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
            1 => Message::Hello { boot: rest.take("boot id")?, process: rest.process()? },
            2 => Message::Welcome {
                boot: rest.take("boot id")?,
                process: rest.process()?,
                offers: rest.offers()?,
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
        let (first, way, regions) = (self.u32("number")?, self.way()?, self.regions()?);
        let count = self.count_lanes(first)?;
        let lane = |_| {
            let offer = self.bytes("offer", MAX_LANE_OFFER)?.to_vec();
            Ok(Wanted { offer, data: self.bytes("private data", MAX_REQUEST_DATA)?.to_vec() })
        };
        let lanes = (0..count).map(lane).collect::<Result<_, _>>()?;
        Ok(Message::Lanes { first, way, regions, lanes })
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
        let process = Process { host: "node-7.rack".to_owned(), pid: u32::MAX };
        let nameless = Process { host: String::new(), pid: 0 };
        let longest = Wanted { offer: vec![4; MAX_LANE_OFFER], data: vec![1; MAX_REQUEST_DATA] };
        let all: Vec<_> = (0..MAX_REGIONS as u32).map(region).collect();
        vec![
            Message::Hello { boot: [7; 16], process: process.clone() },
            Message::Welcome { boot: [8; 16], process: nameless, offers: Vec::new() },
            Message::Welcome {
                boot: [8; 16],
                process,
                offers: Way::ALL.map(|way| Offer { way, place: format!("/tmp/{way}") }).to_vec(),
            },
            Message::Lanes {
                first: 3,
                way: Way::Tcp,
                regions: regions.clone(),
                lanes: vec![longest.clone(), Wanted { offer: Vec::new(), data: Vec::new() }],
            },
            Message::Lanes {
                first: u32::MAX - MAX_LANES as u32,
                way: Way::Rdma,
                regions: all.clone(),
                lanes: vec![longest; MAX_LANES],
            },
            Message::Go { first: 1 << 31, tokens: vec![[9; 16]; 3] },
            Message::Answer {
                number: 0,
                verdict: Verdict::Accepted,
                offer: vec![5; MAX_LANE_OFFER],
                regions,
                data: vec![2; MAX_REPLY_DATA],
            },
            Message::Answer {
                number: 0,
                verdict: Verdict::Refused,
                offer: Vec::new(),
                regions: all,
                data: Vec::new(),
            },
            Message::Ready { first: 7, count: MAX_LANES as u16 },
            Message::Ended { number: u32::MAX },
            Message::Leaving,
            Message::Beat,
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
        assert_eq!(error(&[10]), "kind is 10, which no message has");
        assert_eq!(error(&[1, 1, 2]), "boot id has 2 of 16 bytes");
        let hello = |host: &[u8]| {
            let length = (host.len() as u16).to_le_bytes();
            error(&[&[1][..], &[0; 20], &length, host].concat())
        };
        assert_eq!(hello(&[b'a'; 65]), "host name has length 65, and 64 at most");
        assert_eq!(hello(b"a\x1b[2J"), "host name is \"a\\u{1b}[2J\", which has a control character");
        assert_eq!(hello(&[0xff]), "host name is no text");
        assert_eq!(error(&[3, 0, 0, 0, 0, 4]), "way is 4, which none has");
        assert_eq!(error(&[3, 0, 0, 0, 0, 1, 0xff, 0xff]), "regions has length 65535, and 2048 at most");
        assert_eq!(error(&[3, 0, 0, 0, 0, 1, 2, 0, 1]), "regions have 1 of 48 bytes");
        assert_eq!(error(&[3, 0, 0, 0, 0, 1, 0, 0, 0, 0]), "lanes are none");
        assert_eq!(error(&[3, 0, 0, 0, 0, 1, 0, 0, 129, 0]), "lanes has length 129, and 128 at most");
        let last = u32::MAX.to_le_bytes();
        let over = error(&[&[3][..], &last, &[1, 0, 0, 1, 0]].concat());
        assert_eq!(over, "number is 4294967295, after which there are no 1 more");
        assert_eq!(error(&[3, 0, 0, 0, 0, 1, 0, 0, 1, 0, 65, 0]), "offer has length 65, and 64 at most");
        assert_eq!(
            error(&[3, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 49, 0]),
            "private data has length 49, and 48 at most"
        );
        assert_eq!(error(&[4, 0, 0, 0, 0, 0xff, 0]), "tokens has length 255, and 128 at most");
        assert_eq!(error(&[4, 0, 0, 0, 0, 1, 0, 7]), "token has 1 of 16 bytes");
        assert_eq!(error(&[5, 0, 0, 0, 0, 3]), "verdict is 3, and there are 0 to 2");
        assert_eq!(error(&[6, 0, 0]), "number has 2 of 4 bytes");
        assert_eq!(error(&[6, 0, 0, 0, 0, 0, 0]), "lanes are none");
        assert_eq!(error(&[6, 0, 0, 0, 0, 129, 0]), "lanes has length 129, and 128 at most");
        assert_eq!(error(&[7]), "number has 0 of 4 bytes");
        assert_eq!(error(&[9, 0]), "end is followed by 1 bytes");
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
            which in 0..12_usize, at in any::<prop::sample::Index>(), bits in 1..=255_u8,
        ) {
            let mut bytes = examples()[which].encode();
            *at.get_mut(&mut bytes) ^= bits;
            if let Ok(message) = Message::decode(&bytes) {
                prop_assert_eq!(message.encode(), bytes);
            }
        }
    }
}
