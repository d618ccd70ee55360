//! The frame round private data.
//!
//! The connection manager pads private data with zeros (to 56 bytes in a request, 196 in a reply, 148 in a refusal), so
//! its length is lost. And anybody may connect to a port. So the data goes in a frame:
//!
//! | bytes | what |
//! |---|---|
//! | 0..3 | `FVR` |
//! | 3 | version of the frame: 1 |
//! | 4 | [`Kind`] |
//! | 5 | 0 |
//! | 6..8 | length of the data, little-endian |
//! | 8.. | the data, and padding |

use crate::transport::{MAX_REPLY_DATA, MAX_REQUEST_DATA};

const MAGIC: [u8; 4] = *b"FVR\x01";
const HEADER: usize = 8;

// What RDMA_PS_TCP leaves in a request, and in the shorter of the two answers, the refusal.
const _: () = assert!(HEADER + MAX_REQUEST_DATA <= 56);
const _: () = assert!(HEADER + MAX_REPLY_DATA <= 148);

/// What a frame says.
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

/// Puts `data` in a frame.
pub(super) fn frame(kind: Kind, data: &[u8]) -> Vec<u8> {
    let limit = if kind == Kind::Request { MAX_REQUEST_DATA } else { MAX_REPLY_DATA };
    assert!(data.len() <= limit, "private data of {} bytes, but at most {limit} are possible", data.len());
    let mut framed = Vec::with_capacity(HEADER + data.len());
    framed.extend_from_slice(&MAGIC);
    framed.extend_from_slice(&[kind as u8, 0]);
    framed.extend_from_slice(&(data.len() as u16).to_le_bytes());
    framed.extend_from_slice(data);
    framed
}

/// Takes the data out of a frame. `None`: this comes from no Fervor, or from one with another frame.
pub(super) fn unframe(framed: &[u8]) -> Option<(Kind, &[u8])> {
    let (header, rest) = framed.split_at_checked(HEADER)?;
    if header[..4] != MAGIC {
        return None;
    }
    let kind = [Kind::Request, Kind::Accept, Kind::Refuse, Kind::Impossible]
        .into_iter()
        .find(|&kind| kind as u8 == header[4])?;
    let length = u16::from_le_bytes([header[6], header[7]]);
    Some((kind, rest.get(..usize::from(length))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_of_every_length_survives_padding() {
        for (kind, limit) in [(Kind::Request, 48), (Kind::Accept, 128), (Kind::Refuse, 128)] {
            for length in 0..=limit {
                let data: Vec<u8> = (0..length as u8).collect();
                let mut framed = frame(kind, &data);
                framed.resize(200, 0);
                assert_eq!(unframe(&framed), Some((kind, &data[..])));
            }
        }
    }

    #[test]
    fn foreign_and_cut_off_data_is_no_frame() {
        let framed = frame(Kind::Accept, &[7; 20]);
        for length in 0..framed.len() {
            assert_eq!(unframe(&framed[..length]), None, "{length}");
        }
        for (byte, value) in [(0, b'G'), (3, 2), (4, 0), (4, 9), (7, 1)] {
            let mut foreign = framed.clone();
            foreign[byte] = value;
            assert_eq!(unframe(&foreign), None, "byte {byte} = {value}");
        }
        assert_eq!(unframe(&[0; 56]), None);
    }
}
