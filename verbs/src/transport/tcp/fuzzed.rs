//! The decoders of the `tcp` provider, fed with any bytes. See [`crate::fuzz`].

use super::wire::{FRAME, Frame, OPENING, Opening};

/// The first byte says which decoder takes the rest. Whether it was accepted.
pub(crate) fn feed(data: &[u8]) -> bool {
    let Some((&which, data)) = data.split_first() else { return false };
    if which % 2 == 0 {
        let Some(Ok(opening)) = data.first_chunk::<OPENING>().map(Opening::decode) else { return false };
        assert_eq!(Opening::decode(&opening.encode()), Ok(opening));
        return true;
    }
    let Some(frame) = data.first_chunk::<FRAME>().and_then(Frame::decode) else { return false };
    assert_eq!(Frame::decode(&frame.encode()), Some(frame));
    assert!(frame.payload() <= frame.length);
    true
}

/// Seeds, by their names, and whether they are accepted.
#[cfg(test)]
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>, bool)> {
    use super::wire::{Kind, OpeningKind};

    let opening = |kind, data: &[u8]| {
        let opening = Opening { kind, receive_size: 4096, send_depth: 128, private_data: data.to_vec() };
        [&[0][..], &opening.encode()].concat()
    };
    let frame = |kind, immediate| {
        let frame = Frame { kind, immediate, key: 7, length: 64, address: 1 << 33 };
        [&[1][..], &frame.encode()].concat()
    };
    vec![
        ("hello", opening(OpeningKind::Hello, b"who"), true),
        ("accept", opening(OpeningKind::Accept, &[3; 128]), true),
        ("refuse", opening(OpeningKind::Refuse, b""), true),
        ("send", frame(Kind::Send, Some(5)), true),
        ("write", frame(Kind::Write, None), true),
        ("read", frame(Kind::Read, None), true),
        ("read-with-immediate", frame(Kind::Read, Some(5)), false),
        ("executed", frame(Kind::Executed, None), true),
        ("reply", frame(Kind::Reply, None), true),
        ("refused", frame(Kind::Refused, None), true),
    ]
}
