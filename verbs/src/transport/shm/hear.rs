//! Hearing a peer out: its opening and the regions that it announced.
//!
//! A side is heard when all that it announced is there, and not before: see [`super::wire`]. Then its packets are taken, checked
//! against what was announced, and its regions mapped, one packet at a time. So 128 descriptors are held at most.

use std::os::fd::OwnedFd;

use super::{
    mapping::Mappings,
    region::{RemoteMapping, RemoteTable},
    wire::{self, Opening, Received, RegionRecord},
};

/// All that a peer has said.
pub(super) struct Heard {
    pub(super) opening: Opening,
    /// Those that came with the opening.
    pub(super) fds: Vec<OwnedFd>,
    pub(super) regions: RemoteTable,
}

/// How far a peer has come.
pub(super) enum Progress {
    /// It has said nothing.
    Silent,
    /// It has begun.
    Unfinished,
    Complete(Heard),
    /// It is gone, or what it says is wrong.
    Bad(String),
}

/// Hears the peer at the other end of a socket out, without waiting.
pub(super) fn hear(socket: &OwnedFd, mappings: &Mappings) -> Progress {
    let first = match wire::peek(socket) {
        Received::Packet(first) => first,
        Received::Nothing => return Progress::Silent,
        Received::End => return Progress::Bad("it closed the connection".to_owned()),
    };
    let heard = Opening::decode(&first).and_then(|opening| {
        let queued = wire::queued(socket).map_err(|e| format!("ioctl(FIONREAD) failed: {e}"))?;
        let announced = opening.announced_bytes();
        if queued > announced {
            return Err(format!("it announces {announced} bytes and sends {queued}"));
        }
        if queued < announced { Ok(None) } else { take(socket, mappings).map(Some) }
    });
    match heard {
        Ok(None) => Progress::Unfinished,
        Ok(Some(heard)) => Progress::Complete(heard),
        Err(reason) => Progress::Bad(reason),
    }
}

/// Takes what the peer has said.
fn take(socket: &OwnedFd, mappings: &Mappings) -> Result<Heard, String> {
    let (first, fds) = wire::take(socket)?;
    let opening = Opening::decode(&first)?;
    if fds.len() != opening.descriptors() {
        return Err(format!("it sent {} descriptors instead of {}", fds.len(), opening.descriptors()));
    }
    let announced = opening.regions as usize;
    let mut regions = Vec::new();
    let mut bytes = 0_u64;
    while regions.len() < announced {
        for (record, fd) in wire::take_regions(socket, announced - regions.len())? {
            let RegionRecord { key, writable, base, length } = record;
            bytes = bytes.saturating_add(length);
            if bytes > opening.region_bytes {
                return Err(format!(
                    "its regions have more than the {} bytes announced",
                    opening.region_bytes
                ));
            }
            let size = usize::try_from(length).map_err(|e| e.to_string())?;
            let mapping = mappings.open(&fd, size, writable).map_err(|e| e.to_string())?;
            regions.push(RemoteMapping { key, base, length, writable, mapping });
        }
    }
    Ok(Heard { opening, fds, regions: RemoteTable::new(regions) })
}
