//! Payloads of every size, by every operation: the right bytes arrive, and no others change.

use super::{
    Posts, Rig, Side,
    pair::{Pair, bytes, pattern, piece},
};
use crate::{
    memory::{Exclusive, Memory},
    transport::{
        Access, Connection, EndpointConfig, Export, MAX_INLINE, MAX_SGE, Payload, Region, Sge, Transport,
        View, WorkError,
    },
};

const SIZES: [usize; 6] = [0, 1, 7, 64, 4096, 1 << 20];
/// Where payloads begin in a region: not aligned, so that bytes before and after can be checked.
const AT: usize = 83;
const ROOM: usize = (1 << 20) + 4096;

/// Expects `expected` at `AT`, and `0xee` around it.
fn check(region: &impl Region, expected: &[u8]) {
    assert!(bytes(region, 0, AT).iter().all(|&b| b == 0xee), "bytes before the payload changed");
    assert!(bytes(region, AT, expected.len()) == expected, "the payload of {} bytes differs", expected.len());
    let after = AT + expected.len();
    let tail = region.memory().len() - after;
    assert!(bytes(region, after, tail).iter().all(|&b| b == 0xee), "bytes after the payload changed");
}

pub(super) fn read<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, ROOM, Access::RemoteRead);
    let own = pair.region(Side::Client, ROOM, Access::Local);
    pair.connect();
    for (id, size) in SIZES.into_iter().enumerate() {
        let data = pattern(id as u64, size);
        own.memory().write(0, &vec![0xee; ROOM]);
        theirs.memory().write(24, &data);
        let end = pair.end(Side::Client);
        end.read(&[piece(&own, AT, size)], theirs.remote().at(24), Some(id as u64)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, id as u64);
        check(&own, &data);
        assert!(bytes(&theirs, 24, size) == data, "a READ changed what it read");
    }
    pair.silence();
}

pub(super) fn write<R: Rig>(rig: &R) {
    write_from(rig, Side::Client);
}

pub(super) fn from_server_to_client<R: Rig>(rig: &R) {
    write_from(rig, Side::Server);
}

fn write_from<R: Rig>(rig: &R, side: Side) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(side.other(), ROOM, Access::RemoteWrite);
    let own = pair.region(side, ROOM, Access::Local);
    pair.connect();
    for (id, size) in SIZES.into_iter().enumerate() {
        let data = pattern(id as u64, size);
        theirs.memory().write(0, &vec![0xee; ROOM]);
        own.memory().write(9, &data);
        let end = pair.end(side);
        end.write(Payload::Gather(&[piece(&own, 9, size)]), theirs.remote().at(AT as u64), None, Some(7))
            .expect("post");
        // The READ behind it proves that it is visible (memory rule 3).
        end.read(&[piece(&own, ROOM - 8, 8)], theirs.remote().at(0), Some(8)).expect("post");
        end.ring().expect("ring");
        pair.work(side, 7);
        pair.work(side, 8);
        check(&theirs, &data);
    }
    pair.silence();
}

pub(super) fn write_with_immediate<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, ROOM, Access::RemoteWrite);
    let own = pair.region(Side::Client, ROOM, Access::Local);
    pair.connect();
    for (id, size) in SIZES.into_iter().enumerate() {
        let data = pattern(id as u64, size);
        theirs.memory().write(0, &vec![0xee; ROOM]);
        own.memory().write(9, &data);
        let immediate = u32::MAX - id as u32;
        let end = pair.end(Side::Client);
        let payload = [piece(&own, 9, size)];
        end.write(Payload::Gather(&payload), theirs.remote().at(AT as u64), Some(immediate), Some(7))
            .expect("post");
        end.ring().expect("ring");
        assert_eq!(pair.immediate(Side::Server), immediate);
        check(&theirs, &data);
        pair.work(Side::Client, 7);
    }
    pair.silence();
}

pub(super) fn send<R: Rig>(rig: &R) {
    let config = EndpointConfig { receive_buffers: 4, receive_size: 1 << 20, ..EndpointConfig::default() };
    let mut pair = Pair::alike(rig, &config);
    let own = pair.region(Side::Client, ROOM, Access::Local);
    pair.connect();
    for immediate in [None, Some(0), Some(u32::MAX)] {
        for (id, size) in SIZES.into_iter().enumerate() {
            let data = pattern(id as u64, size);
            own.memory().write(9, &data);
            let end = pair.end(Side::Client);
            end.send(Payload::Gather(&[piece(&own, 9, size)]), immediate, Some(id as u64)).expect("post");
            end.ring().expect("ring");
            let (connection, message, found) = pair.message(Side::Server);
            assert_eq!(connection, pair.to_client[0].id());
            assert_eq!(found, immediate);
            assert!(message == data, "the message of {size} bytes differs");
            pair.work(Side::Client, id as u64);
        }
    }
    pair.silence();
}

pub(super) fn inline<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, 4096, Access::RemoteWrite);
    pair.connect();
    for size in 0..=MAX_INLINE {
        theirs.memory().write(0, &[0xee; 4096]);
        let data = pattern(size as u64, size);
        let mut scratch = data.clone();
        let end = pair.end(Side::Client);
        end.write(Payload::Inline(&scratch), theirs.remote().at(AT as u64), None, None).expect("post");
        // Copied at the post: what becomes of the bytes from here on is nobody's business.
        scratch.fill(0x55);
        scratch.copy_from_slice(&data);
        end.send(Payload::Inline(&scratch), Some(size as u32), None).expect("post");
        scratch.fill(0xaa);
        let word = (size as u64).to_le_bytes();
        end.write(Payload::Inline(&word), theirs.remote().at(1024), Some(1), Some(size as u64))
            .expect("post");
        end.ring().expect("ring");
        let (_, message, immediate) = pair.message(Side::Server);
        assert_eq!((message, immediate), (data.clone(), Some(size as u32)));
        assert_eq!(pair.immediate(Side::Server), 1);
        pair.work(Side::Client, size as u64);
        assert_eq!(bytes(&theirs, 1024, 8), word);
        theirs.memory().write(1024, &[0xee; 8]);
        check(&theirs, &data);
    }
    pair.silence();
}

/// Pieces that tile `0..SUM` of the payload, as (offset in the region, length).
const PIECES: [(usize, usize); MAX_SGE] = [(4000, 1), (5, 300), (1000, 0), (2048, 77)];

pub(super) fn gathered<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, 8192, Access::RemoteWrite);
    let own =
        [pair.region(Side::Client, 4096, Access::Local), pair.region(Side::Client, 4096, Access::Local)];
    pair.connect();
    for count in 0..=MAX_SGE {
        let mut expected = Vec::new();
        let mut pieces = Vec::new();
        for (i, &(offset, length)) in PIECES[..count].iter().enumerate() {
            // Pieces may be of different regions.
            let region = &own[i % 2];
            let data = pattern((count * 10 + i) as u64, length);
            region.memory().write(offset, &data);
            expected.extend_from_slice(&data);
            pieces.push(piece(region, offset, length));
        }
        theirs.memory().write(0, &[0xee; 8192]);
        let end = pair.end(Side::Client);
        end.send(Payload::Gather(&pieces), None, None).expect("post");
        let remote = theirs.remote().at(AT as u64);
        end.write(Payload::Gather(&pieces), remote, Some(count as u32), Some(1)).expect("post");
        end.ring().expect("ring");
        assert_eq!(pair.message(Side::Server).1, expected);
        assert_eq!(pair.immediate(Side::Server), count as u32);
        check(&theirs, &expected);
        pair.work(Side::Client, 1);
    }
}

pub(super) fn scattered<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, 4096, Access::RemoteRead);
    let own =
        [pair.region(Side::Client, 4096, Access::Local), pair.region(Side::Client, 4096, Access::Local)];
    pair.connect();
    let data = pattern(99, 4096);
    theirs.memory().write(0, &data);
    for count in 0..=MAX_SGE {
        own.iter().for_each(|region| region.memory().write(0, &[0xee; 4096]));
        let pieces: Vec<Sge<'_, _>> =
            (0..count).map(|i| piece(&own[i % 2], PIECES[i].0, PIECES[i].1)).collect();
        let end = pair.end(Side::Client);
        end.read(&pieces, theirs.remote().at(11), Some(count as u64)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, count as u64);
        let mut expected = [vec![0xee; 4096], vec![0xee; 4096]];
        let mut from = 11;
        for (i, &(offset, length)) in PIECES[..count].iter().enumerate() {
            expected[i % 2][offset..offset + length].copy_from_slice(&data[from..from + length]);
            from += length;
        }
        for (region, expected) in own.iter().zip(&expected) {
            assert!(bytes(region, 0, 4096) == *expected, "{count} pieces: not scattered as listed");
        }
    }
}

pub(super) fn export<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let mut rows = Exclusive::new("rows", 64 << 10).expect("memory");
    let export = pair.server.transport.export(&rows).expect("export");
    assert_eq!(export.remote().length, 64 << 10);
    let own = pair.region(Side::Client, 4096, Access::Local);
    pair.connect();
    for round in 0..20 {
        let data = pattern(round, 4096);
        let at = 64 * round as usize;
        rows.bytes_mut()[at..at + 4096].copy_from_slice(&data);
        let end = pair.end(Side::Client);
        end.read(&[piece(&own, 0, 4096)], export.remote().at(at as u64), Some(round)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, round);
        assert!(bytes(&own, 0, 4096) == data, "round {round}: the READ did not see the rows");
    }
    assert!(rows.bytes()[19 * 64..19 * 64 + 4096] == pattern(19, 4096));
}

/// A region lives as long as a connection that has named it, though its user has dropped it.
pub(super) fn dropped_region<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, 8192, Access::RemoteWrite);
    let own = pair.region(Side::Client, 8192, Access::Local);
    pair.connect();
    for round in 0..rig.effort().rounds.min(100) {
        let data = pattern(u64::from(round), 8192);
        let fleeting = pair.region(Side::Client, 8192, Access::Local);
        fleeting.memory().write(0, &data);
        let end = pair.end(Side::Client);
        let payload = [piece(&fleeting, 0, 8192)];
        end.write(Payload::Gather(&payload), theirs.remote().at(0), None, None).expect("post");
        drop(fleeting);
        end.read(&[piece(&own, 0, 8192)], theirs.remote().at(0), Some(1)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, 1);
        assert!(bytes(&own, 0, 8192) == data, "round {round}: what was sent is not what was in the region");
    }
}

/// Regions of more than 4 GiB, of which few pages are used: no offset, on neither side, is cut to 32 bits.
pub(super) fn beyond_4_gib<R: Rig>(rig: &R) {
    const LINE: usize = 4 << 30;
    const LEN: usize = LINE + (1 << 20);
    const SIZE: usize = 4096;
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let region = |host: &R::Transport, access| {
        host.register(&Memory::sparse("far", LEN).expect("memory"), access).expect("register")
    };
    let own = region(&pair.client.transport, Access::Local);
    let theirs = region(&pair.server.transport, Access::RemoteWrite);
    assert_eq!(theirs.remote().length, LEN as u64);
    pair.connect();
    // Above the line, across it, and up to the last byte; from places that are as far.
    for (id, at) in [LINE + 24, LINE - 1000, LEN - SIZE].into_iter().enumerate() {
        let (data, from, into) = (pattern(id as u64, SIZE), LEN - 3 * SIZE - 5, LINE + 40_003 + at % 977);
        own.memory().write(from, &data);
        let end = pair.end(Side::Client);
        let remote = theirs.remote().at(at as u64);
        end.write(Payload::Gather(&[piece(&own, from, SIZE)]), remote, None, None).expect("post");
        end.read(&[piece(&own, into, SIZE)], remote, Some(id as u64)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, id as u64);
        assert!(bytes(&theirs, at, SIZE) == data, "a WRITE to offset {at:#x}");
        assert!(bytes(&own, into, SIZE) == data, "a READ from offset {at:#x}");
        for (side, region, place) in [("their", &theirs, at), ("own", &own, into), ("own", &own, from)] {
            let low = place % LINE;
            let clear = low == place || bytes(region, low, SIZE).iter().all(|&byte| byte == 0);
            assert!(clear, "what is at {place:#x} of {side} memory is at {low:#x}, too");
        }
        if let Some(view) = pair.end(Side::Client).view(theirs.remote()) {
            let mut seen = vec![0; SIZE];
            view.copy(at, &mut seen);
            assert!(seen == data, "a view at offset {at:#x}");
        }
        theirs.memory().write(at, &[0; SIZE]);
        own.memory().write(into, &[0; SIZE]);
    }
    // One byte more than there is.
    let end = pair.end(Side::Client);
    let over = theirs.remote().at((LEN - SIZE + 1) as u64);
    end.write(Payload::Gather(&[piece(&own, 0, SIZE)]), over, None, Some(9)).expect("post");
    end.ring().expect("ring");
    let client = pair.to_server[0].id();
    assert_eq!(pair.end_of(Side::Client, client).0, [(9, Err(WorkError::RemoteAccess))]);
}
