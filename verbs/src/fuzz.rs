//! What a peer says before it is believed, decoded from any bytes: the bodies of the targets in `fuzz/`, and the tests that keep their
//! seeds. Each decoder is pure, so a target needs no device and no peer.
//!
//! Nothing panics, whatever the bytes are. What is accepted is what its encoder writes. The seeds (`fuzz/seeds`) are written by the
//! encoders, so they are in the present format. A plain test replays them, each changed in every bit. After a change of the format, write
//! them again:
//!
//! ```text
//! FERVOR_WRITE_SEEDS=1 cargo test -p fervor-verbs --lib fuzz
//! ```

/// The messages of a session, its frames, its handshake. Whether the bytes were accepted.
pub fn session(data: &[u8]) -> bool {
    crate::session::fuzzed::feed(data)
}

/// Openings and frames of the `tcp` provider. Whether the bytes were accepted.
pub fn tcp(data: &[u8]) -> bool {
    crate::transport::tcp::fuzzed::feed(data)
}

/// Offers of the `rdma` provider, and the messages that they travel in. Whether the bytes were accepted.
#[cfg(feature = "rdma")]
pub fn offers(data: &[u8]) -> bool {
    crate::transport::rdma::fuzzed::feed(data)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, path::Path};

    use super::*;

    type Seeds = Vec<(&'static str, Vec<u8>, bool)>;
    type Target = (&'static str, fn(&[u8]) -> bool, Seeds);

    fn targets() -> Vec<Target> {
        vec![
            ("session", session, crate::session::fuzzed::seeds()),
            ("tcp", tcp, crate::transport::tcp::fuzzed::seeds()),
            #[cfg(feature = "rdma")]
            ("offers", offers, crate::transport::rdma::fuzzed::seeds()),
        ]
    }

    #[test]
    fn the_files_are_what_the_encoders_write() {
        let write = std::env::var_os("FERVOR_WRITE_SEEDS").is_some();
        for (target, _, seeds) in targets() {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
            if write {
                let _ = fs::remove_dir_all(&folder);
                fs::create_dir_all(&folder).unwrap();
                seeds.iter().for_each(|(name, bytes, _)| fs::write(folder.join(name), bytes).unwrap());
            }
            let file = |entry: std::io::Result<fs::DirEntry>| {
                let entry = entry.unwrap();
                (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
            };
            let found: BTreeMap<String, Vec<u8>> = fs::read_dir(&folder).unwrap().map(file).collect();
            let made: BTreeMap<String, Vec<u8>> =
                seeds.into_iter().map(|(name, bytes, _)| (name.to_owned(), bytes)).collect();
            assert!(found == made, "fuzz/seeds/{target} is in another format: see the top of this file");
        }
    }

    #[test]
    fn seeds_are_taken_for_what_they_are_and_no_change_of_a_bit_is_too_much() {
        for (target, feed, seeds) in targets() {
            for (name, bytes, accepted) in seeds {
                assert_eq!(feed(&bytes), accepted, "{target}/{name}");
                for bit in 0..bytes.len() * 8 {
                    let mut changed = bytes.clone();
                    changed[bit / 8] ^= 1 << (bit % 8);
                    feed(&changed);
                }
                (0..bytes.len()).for_each(|cut| _ = feed(&bytes[..cut]));
            }
        }
    }
}
