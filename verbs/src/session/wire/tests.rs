//! Messages that are said and heard, cut short, changed and made up.

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
        Message::Hello { boot: [7; 16], process: process.clone(), rails: Vec::new() },
        Message::Welcome { boot: [8; 16], process: nameless, offers: Vec::new(), rails: Vec::new() },
        Message::Welcome {
            boot: [8; 16],
            process,
            offers: Way::ALL.map(|way| Offer { way, place: format!("/tmp/{way}") }).to_vec(),
            rails,
        },
        Message::Lanes {
            first: 3,
            way: Way::Tcp,
            rails: LaneRails::default(),
            regions: regions.clone(),
            lanes: vec![longest.clone(), Wanted { offer: Vec::new(), data: Vec::new() }],
        },
        Message::Lanes {
            first: u32::MAX - MAX_LANES as u32,
            way: Way::Rdma,
            rails: LaneRails { own: 7, theirs: 0b1010_0001 },
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
    assert_eq!(error(&[3, 0, 0, 0, 0, 1, 0, 0, 0xff, 0xff]), "regions has length 65535, and 2048 at most");
    assert_eq!(error(&[3, 0, 0, 0, 0, 1, 0, 0, 2, 0, 1]), "regions have 1 of 48 bytes");
    assert_eq!(error(&[3, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]), "lanes are none");
    assert_eq!(error(&[3, 0, 0, 0, 0, 1, 0, 0, 0, 0, 129, 0]), "lanes has length 129, and 128 at most");
    let last = u32::MAX.to_le_bytes();
    let over = error(&[&[3][..], &last, &[1, 0, 0, 0, 0, 1, 0]].concat());
    assert_eq!(over, "number is 4294967295, after which there are no 1 more");
    assert_eq!(error(&[3, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 65, 0]), "offer has length 65, and 64 at most");
    assert_eq!(
        error(&[3, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 49, 0]),
        "private data has length 49, and 48 at most"
    );
    let rails = |way, own, theirs| error(&[3, 0, 0, 0, 0, way, own, theirs]);
    assert_eq!(rails(2, 8, 1), "rails of lanes begin with number 8, and 8 are possible");
    assert_eq!(rails(2, 0, 0), "rails of lanes are none of the server's");
    assert_eq!(rails(3, 0, 1), "rails of lanes are named, and lanes over tcp have none");
    let rails = |rails: &[u8]| error(&[&[1], &[0; 22][..], rails].concat());
    assert_eq!(rails(&[9, 0]), "rails has length 9, and 8 at most");
    assert_eq!(rails(&[1, 0, 73, 0]), "name of a rail has length 73, and 72 at most");
    assert_eq!(rails(&[1, 0, 2, 0, b'a', b'\n']), "name of a rail is no word");
    assert_eq!(
        rails(&[1, 0, 1, 0, b'a', 0, 0, 0, 0, 5, 0]),
        "addresses of a rail has length 5, and 4 at most"
    );
    let address = |bytes: [u8; 2]| rails(&[&[1, 0, 1, 0, b'a', 0, 0, 0, 0, 1, 0], &bytes[..]].concat());
    assert_eq!(address([5, 64]), "address of a rail is of network 5, which none has");
    assert_eq!(address([1, 129]), "address of a rail has a prefix of 129 bits, and 128 at most");
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
