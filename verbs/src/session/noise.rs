//! The cipher of a session: a Noise handshake, then messages that only its two ends can read or make.
//!
//! ```text
//!  client                                                    server
//!  OPENING  magic, version, name of the key; Noise e, psk ─▶  refused here: no such key, or another secret
//!           ◀────────────────────────────────── FRAME Noise e, ee           or REFUSAL with a reason
//!  FRAME    first message ────────────────────────────────▶  from here on the server believes the client
//! ```
//!
//! With a key the pattern is `NNpsk0`, without one `NN` (the Noise Protocol Framework, revision 34, sections 7 and 9). Both have
//! a new secret for each session, so what was recorded cannot be read later even by somebody who learns the key. `NN` keeps
//! listeners out, and not somebody who stands between the two ends.
//!
//! **A replayed handshake comes to nothing.** Somebody who sends a recorded first frame again does not have the secret behind it. So
//! he cannot make a message that the answer's new secret lets through; and the server does nothing for a client before one has come.
//!
//! An opening has as many bytes as those of the providers that use TCP, so that one door serves all. What comes before Noise's
//! message in it is the handshake's prologue: whoever changes it on its way makes the handshake fail. A frame is a length (2 bytes)
//! and as many bytes. The length [`REFUSAL`] is followed by one byte, which says why. It is not authenticated: it ends an attempt,
//! and nothing else.

use snow::{Builder, HandshakeState, TransportState};

use super::{
    Reason,
    key::{Key, KeyRing, MAX_KEY_NAME},
};
use crate::transport::host::strangers::OPENING;

/// The first bytes of a session: "FERVORSN".
pub(crate) const MAGIC: [u8; 8] = *b"FERVORSN";
/// Of preamble and messages.
pub(crate) const VERSION: u16 = 2;
/// Bytes of an opening that come before Noise's message.
const PREAMBLE: usize = 8 + 2 + 1 + MAX_KEY_NAME;
/// Bytes of Noise's first message, with a key and without.
const FIRST: usize = 48;
const FIRST_WITHOUT_KEY: usize = 32;
const _: () = assert!(PREAMBLE + FIRST <= OPENING);
/// Longest frame that Noise knows, less what a refusal takes.
const MAX_FRAME: usize = 65_535 - 1;
/// Bytes that the cipher adds to a message.
const TAG: usize = 16;
/// Longest message.
pub(crate) const MAX_MESSAGE: usize = MAX_FRAME - TAG;
/// The length that is none.
const REFUSAL: u16 = u16::MAX;

const WITH_KEY: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
const WITHOUT_KEY: &str = "Noise_NN_25519_ChaChaPoly_BLAKE2s";

/// A handshake for `key`, with `preamble` as its prologue.
fn state(key: Option<&Key>, preamble: &[u8], initiator: bool) -> HandshakeState {
    let pattern = if key.is_some() { WITH_KEY } else { WITHOUT_KEY };
    let fits = "the pattern is valid, and has what it asks for";
    let mut builder = Builder::new(pattern.parse().expect(fits)).prologue(preamble).expect(fits);
    if let Some(key) = key {
        builder = builder.psk(0, key.secret()).expect(fits);
    }
    if initiator { builder.build_initiator() } else { builder.build_responder() }.expect(fits)
}

/// `bytes` as a frame.
fn frame(bytes: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(2 + bytes.len());
    frame.extend((bytes.len() as u16).to_le_bytes());
    frame.extend(bytes);
    frame
}

/// A refusal, as it crosses the wire.
pub(crate) fn refusal(reason: Reason) -> [u8; 3] {
    let [low, high] = REFUSAL.to_le_bytes();
    [low, high, reason as u8]
}

/// What the first bytes of a stream are.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Not all of it has come.
    Unfinished,
    /// A frame of so many bytes, which begins after its length.
    Frame(usize),
    /// A refusal.
    Refused(Reason),
}

/// What the stream begins with.
pub(crate) fn piece(bytes: &[u8]) -> Piece {
    let Some(&[low, high]) = bytes.first_chunk() else { return Piece::Unfinished };
    match (u16::from_le_bytes([low, high]), bytes.get(2)) {
        (REFUSAL, None) => Piece::Unfinished,
        (REFUSAL, Some(&code)) => Piece::Refused(Reason::from_code(code)),
        (length, _) if bytes.len() - 2 < length.into() => Piece::Unfinished,
        (length, _) => Piece::Frame(length.into()),
    }
}

/// The client's end of a handshake.
pub(crate) struct Initiator(HandshakeState);

impl Initiator {
    /// Begins: the bytes to send first.
    pub(crate) fn start(key: Option<&Key>) -> (Self, [u8; OPENING]) {
        let mut opening = [0; OPENING];
        let name = key.map_or("", Key::name);
        opening[..8].copy_from_slice(&MAGIC);
        opening[8..10].copy_from_slice(&VERSION.to_le_bytes());
        opening[10] = name.len() as u8;
        opening[11..11 + name.len()].copy_from_slice(name.as_bytes());
        let (preamble, message) = opening.split_at_mut(PREAMBLE);
        let mut state = state(key, preamble, true);
        let length = state.write_message(&[], message).expect("the opening has room for it");
        assert_eq!(length, if key.is_some() { FIRST } else { FIRST_WITHOUT_KEY });
        (Self(state), opening)
    }

    /// Takes the server's frame.
    pub(crate) fn finish(mut self, answer: &[u8]) -> Result<Cipher, Reason> {
        let mut payload = [0; 128];
        self.0.read_message(answer, &mut payload).map_err(|_| Reason::Forged)?;
        Ok(Cipher(self.0.into_transport_mode().expect("the handshake has two messages")))
    }
}

/// The server's end: takes an opening, and returns the cipher, the bytes to answer, and the key's name.
pub(crate) fn respond(
    keys: &KeyRing,
    opening: &[u8; OPENING],
) -> Result<(Cipher, Vec<u8>, Option<String>), Reason> {
    let (preamble, message) = opening.split_at(PREAMBLE);
    if preamble[..8] != MAGIC {
        return Err(Reason::Malformed);
    }
    if u16::from_le_bytes([preamble[8], preamble[9]]) != VERSION {
        return Err(Reason::Version);
    }
    let name = preamble[11..].get(..preamble[10].into()).ok_or(Reason::Malformed)?;
    let key = match (name.is_empty(), keys.is_empty()) {
        (true, true) => None,
        (true, false) => return Err(Reason::KeyNeeded),
        (false, true) => return Err(Reason::NoKeys),
        (false, false) => {
            let name = str::from_utf8(name).map_err(|_| Reason::Malformed)?;
            Some(keys.find(name).ok_or(Reason::WrongKey)?)
        }
    };
    let (first, rest) = message.split_at(if key.is_some() { FIRST } else { FIRST_WITHOUT_KEY });
    if rest.iter().any(|byte| *byte != 0) {
        return Err(Reason::Malformed);
    }
    let mut state = state(key, preamble, false);
    let mut buffer = [0; 128];
    state.read_message(first, &mut buffer).map_err(|_| Reason::WrongKey)?;
    let length = state.write_message(&[], &mut buffer).expect("an answer has 48 bytes");
    let cipher = Cipher(state.into_transport_mode().expect("the handshake has two messages"));
    Ok((cipher, frame(&buffer[..length]), key.map(|key| key.name().to_owned())))
}

/// Seals what one end says, and opens what the other has said, in order.
pub(crate) struct Cipher(TransportState);

impl Cipher {
    /// `message`, which has [`MAX_MESSAGE`] bytes at most, as a frame.
    pub(crate) fn seal(&mut self, message: &[u8]) -> Vec<u8> {
        assert!(message.len() <= MAX_MESSAGE, "a message of {} bytes", message.len());
        let mut sealed = vec![0; 2 + message.len() + TAG];
        let length = self.0.write_message(message, &mut sealed[2..]).expect("it fits, and 2^64 are possible");
        sealed[..2].copy_from_slice(&(length as u16).to_le_bytes());
        sealed
    }

    /// The message in the bytes of a frame.
    pub(crate) fn open(&mut self, frame: &[u8]) -> Result<Vec<u8>, Reason> {
        let mut message = vec![0; frame.len()];
        let length = self.0.read_message(frame, &mut message).map_err(|_| Reason::Forged)?;
        message.truncate(length);
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(framed: &[u8]) -> &[u8] {
        let Piece::Frame(length) = piece(framed) else { panic!("{framed:?}") };
        &framed[2..2 + length]
    }

    type Met = Result<(Cipher, Cipher, Option<String>), Reason>;

    fn meet(key: Option<&Key>, keys: &KeyRing) -> Met {
        let (initiator, opening) = Initiator::start(key);
        let (server, answer, name) = respond(keys, &opening)?;
        Ok((initiator.finish(body(&answer))?, server, name))
    }

    #[test]
    fn both_ends_of_a_handshake_understand_each_other_and_nobody_else_does() {
        let key = Key::generate("a").unwrap();
        let keys: KeyRing = [key.clone()].into_iter().collect();
        for (key, keys) in [(None, &KeyRing::default()), (Some(&key), &keys)] {
            let (mut client, mut server, name) = meet(key, keys).ok().unwrap();
            assert_eq!(name.as_deref(), key.map(Key::name));
            for text in [&b"one"[..], b"", &[7; MAX_MESSAGE]] {
                let sealed = client.seal(text);
                assert!(text.len() < 3 || !sealed.windows(3).any(|bytes| bytes == &text[..3]));
                assert_eq!(server.open(body(&sealed)).unwrap(), text);
                assert_eq!(client.open(body(&server.seal(text))).unwrap(), text);
            }
            let mut forged = client.seal(b"pay 1");
            forged[4] ^= 1;
            assert_eq!(server.open(body(&forged)), Err(Reason::Forged));
        }
    }

    #[test]
    fn who_has_not_the_key_is_refused_with_the_reason() {
        let (a, b) = (Key::generate("a").unwrap(), Key::generate("b").unwrap());
        let keys: KeyRing = [a.clone()].into_iter().collect();
        let impostor: Key = format!("a{}", &b.line()[1..]).parse().unwrap();
        let reason = |key, keys: &KeyRing| meet(key, keys).err().unwrap();
        assert_eq!(reason(None, &keys), Reason::KeyNeeded);
        assert_eq!(reason(Some(&b), &keys), Reason::WrongKey);
        assert_eq!(reason(Some(&impostor), &keys), Reason::WrongKey);
        assert_eq!(reason(Some(&a), &KeyRing::default()), Reason::NoKeys);
    }

    #[test]
    fn a_changed_opening_fails() {
        let named: KeyRing = [Key::generate("a").unwrap(), Key::generate("b").unwrap()].into_iter().collect();
        for keys in [named, KeyRing::default()] {
            for at in 0..OPENING {
                let (initiator, mut opening) = Initiator::start(keys.first());
                opening[at] ^= 3;
                // Without a key any numbers are as good as the client's: then it is the answer that does not fit.
                let failed = match respond(&keys, &opening) {
                    Err(_) => true,
                    Ok((_, answer, _)) => initiator.finish(body(&answer)).is_err(),
                };
                assert!(failed, "byte {at}");
            }
        }
    }

    #[test]
    fn a_replayed_handshake_comes_to_nothing() {
        let keys: KeyRing = [Key::generate("a").unwrap()].into_iter().collect();
        let (initiator, opening) = Initiator::start(keys.first());
        let (_, answer, _) = respond(&keys, &opening).ok().unwrap();
        let mut client = initiator.finish(body(&answer)).ok().unwrap();
        let said = client.seal(b"let me in");
        // The whole of what the client said, once more: another answer, another secret.
        let (mut server, _, _) = respond(&keys, &opening).ok().unwrap();
        assert_eq!(server.open(body(&said)), Err(Reason::Forged));
    }

    #[test]
    fn pieces_are_found_however_the_stream_is_cut() {
        let framed = frame(b"abc");
        (0..framed.len()).for_each(|cut| assert_eq!(piece(&framed[..cut]), Piece::Unfinished));
        assert_eq!(piece(&[&framed[..], b"more"].concat()), Piece::Frame(3));
        let refused = refusal(Reason::KeyNeeded);
        (0..3).for_each(|cut| assert_eq!(piece(&refused[..cut]), Piece::Unfinished));
        assert_eq!(piece(&refused), Piece::Refused(Reason::KeyNeeded));
    }
}
