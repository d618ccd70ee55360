//! The decoders of a session, fed with any bytes. See [`crate::fuzz`].

use super::{
    key::{Key, KeyRing},
    noise::{self, Initiator, Piece, piece},
    wire::Message,
};
use crate::transport::host::strangers::OPENING;

/// A key that is known to whoever reads this.
fn keys() -> KeyRing {
    let key: Key = format!("fuzz {}", "5a".repeat(32)).parse().expect("a key");
    [key].into_iter().collect()
}

/// The first byte says which decoder takes the rest. Whether it was accepted.
pub(crate) fn feed(data: &[u8]) -> bool {
    let Some((&which, data)) = data.split_first() else { return false };
    match which % 4 {
        0 => {
            let Ok(message) = Message::decode(data) else { return false };
            // No two texts say the same.
            assert_eq!(message.encode(), data);
            true
        }
        1 => {
            let found = piece(data);
            match found {
                Piece::Unfinished => assert!(data.len() < usize::from(u16::MAX)),
                Piece::Refused(_) => assert_eq!(data[..2], [0xff; 2]),
                Piece::Frame(length) => {
                    let end = 2 + length;
                    assert!(end <= data.len());
                    // What follows a frame does not change it, and no part of one is one.
                    assert_eq!(piece(&data[..end]), Piece::Frame(length));
                    assert_eq!(piece(&data[..end - 1]), Piece::Unfinished);
                }
            }
            found != Piece::Unfinished
        }
        // What a server takes a stranger's opening for.
        2 => {
            let Some(opening) = data.first_chunk::<OPENING>() else { return false };
            let named = noise::respond(&keys(), opening);
            let nameless = noise::respond(&KeyRing::default(), opening);
            assert!(named.is_err() || nameless.is_err(), "an opening names a key, or it does not");
            let accepted = [named, nameless].into_iter().flatten().next();
            if let Some((_, answer, _)) = &accepted {
                assert_eq!(piece(answer), Piece::Frame(answer.len() - 2));
            }
            accepted.is_some()
        }
        // What a client takes an answer for; its secret is new, so none is right.
        _ => {
            let (initiator, _) = Initiator::start(keys().first());
            assert!(initiator.finish(data).is_err());
            false
        }
    }
}

/// Seeds, by their names, and whether they are accepted.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>, bool)> {
    use super::{
        Reason,
        wire::{LaneRails, NamedRegion, Offer, Process, Verdict, Wanted, Way},
    };
    use crate::{
        fabric,
        rails::{Rail, RailAddress},
        transport::RemoteRegion,
    };

    let region = RemoteRegion { address: 1 << 40, length: 1 << 30, key: 7 };
    let regions = vec![NamedRegion { name: 1, region }, NamedRegion { name: 2, region }];
    let offers = Way::ALL.map(|way| Offer { way, place: format!("/tmp/{way}") }).to_vec();
    let process = Process { host: "node-7".to_owned(), pid: 4711 };
    let gid = "::ffff:10.7.0.1".parse().expect("a GID");
    let address = RailAddress { network: fabric::Way::RoceV2Ipv4, gid, prefix: 120 };
    let rail =
        |port| Rail { name: format!("mlx5_0:{port}"), megabits: 100_000, addresses: vec![address; port] };
    let rails = vec![rail(1), rail(2)];
    let wanted = Wanted { offer: vec![4; 32], data: b"private".to_vec() };
    let message = |message: Message| [vec![0], message.encode()].concat();
    // The same ones each time: without a key any first numbers are as good as others.
    let mut opening = [0; OPENING];
    opening[..8].copy_from_slice(&noise::MAGIC);
    opening[8..10].copy_from_slice(&noise::VERSION.to_le_bytes());
    let numbers = 11 + super::key::MAX_KEY_NAME;
    opening[numbers..numbers + 32].copy_from_slice(&std::array::from_fn::<u8, 32, _>(|i| i as u8 + 9));
    let mut named = opening;
    named[10] = 4;
    named[11..15].copy_from_slice(b"fuzz");
    vec![
        (
            "hello",
            message(Message::Hello { boot: [7; 16], process: process.clone(), rails: rails.clone() }),
            true,
        ),
        ("welcome", message(Message::Welcome { boot: [8; 16], process, offers, rails }), true),
        (
            "lanes",
            message(Message::Lanes {
                first: 3,
                way: Way::Rdma,
                rails: LaneRails { own: 1, theirs: 0b101 },
                regions: regions.clone(),
                lanes: vec![wanted; 2],
            }),
            true,
        ),
        ("go", message(Message::Go { first: 1 << 31, tokens: vec![[9; 16]; 2] }), true),
        (
            "answer",
            message(Message::Answer {
                number: 3,
                verdict: Verdict::Accepted,
                offer: vec![5; 32],
                regions,
                data: vec![2; 9],
            }),
            true,
        ),
        ("ready", message(Message::Ready { first: 7, count: 3 }), true),
        ("ended", message(Message::Ended { number: 7 }), true),
        ("beat", message(Message::Beat), true),
        ("frame", b"\x01\x03\0abcmore".to_vec(), true),
        ("refusal", [&[1][..], &noise::refusal(Reason::KeyNeeded)].concat(), true),
        ("opening", [&[2][..], &opening].concat(), true),
        // The name of a key is easily had.
        ("opening-with-a-name", [&[2][..], &named].concat(), false),
        ("noise-answer", [vec![3], vec![5; 48]].concat(), false),
    ]
}
