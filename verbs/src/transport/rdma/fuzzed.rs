//! The decoders of the `rdma` provider's bootstrap, fed with any bytes. See [`crate::fuzz`].

use super::offer::{MESSAGE, Message, Offer};

/// The first byte says which decoder takes the rest. Whether it was accepted.
pub(crate) fn feed(data: &[u8]) -> bool {
    let Some((&which, data)) = data.split_first() else { return false };
    if which % 2 == 0 {
        let Some(Ok(message)) = data.first_chunk::<MESSAGE>().map(Message::decode) else { return false };
        let offer = Offer::decode(&message.offer);
        assert!(offer.is_err() || offer.is_ok_and(|offer| offer.encode() == message.offer));
        assert_eq!(Message::decode(&message.encode()), Ok(message));
        return true;
    }
    let Ok(offer) = Offer::decode(data) else { return false };
    assert_eq!(offer.encode(), data);
    true
}

/// Seeds, by their names, and whether they are accepted.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>, bool)> {
    use super::offer::Kind;
    use crate::fabric::Way;

    let offer = |way, gid: &str| {
        let (mtu, reads_out, reads_in, lid, queue_pair, first_packet) = (4096, 16, 1, 9, 0x12_3456, 7);
        let gid = gid.parse().expect("a GID");
        Offer { way, mtu, reads_out, reads_in, lid, queue_pair, first_packet, gid }.encode()
    };
    let alone = |way, gid| [&[1][..], &offer(way, gid)].concat();
    let message = |message: Message| [&[0][..], &message.encode()].concat();
    let asked = offer(Way::RoceV2Ipv4, "::ffff:10.7.0.1");
    let said = |kind| message(Message { kind, offer: asked, data: b"private".to_vec() });
    vec![
        ("infiniband", alone(Way::InfiniBand, "fe80::1"), true),
        ("roce-v1", alone(Way::RoceV1, "fe80::1"), true),
        ("roce-v2", alone(Way::RoceV2Ipv4, "::ffff:10.7.0.1"), true),
        ("roce-v2-ipv6", alone(Way::RoceV2Ipv6, "fd00::1"), true),
        ("of-no-ipv4-address", alone(Way::RoceV2Ipv4, "fe80::1"), false),
        ("request", said(Kind::Request), true),
        ("accept", said(Kind::Accept), true),
        ("refuse", message(Message::refusal(Kind::Refuse, b"no")), true),
        ("impossible", message(Message::refusal(Kind::Impossible, b"its MTU is 9")), true),
    ]
}
