//! What is outside of a region, or not granted, is refused: an error, nothing read or written, and the
//! connection is broken on both sides. Other connections go on.

use super::{
    Posts, Rig, Side,
    pair::{End, Pair, RegionOf, bytes, pattern, piece},
    victim,
};
use crate::{
    memory::Exclusive,
    transport::{
        Access, Connection, EndpointConfig, Export, Payload, Region, RemoteAddress, RemoteRegion, Transport,
        WorkError,
    },
};

/// Not a multiple of a page, so that a check by pages would show.
const LEN: usize = 10_000;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Bad {
    Read,
    Write,
    WriteInline,
    WriteImmediate,
}

const READS: [Bad; 1] = [Bad::Read];
const WRITES: [Bad; 3] = [Bad::Write, Bad::WriteInline, Bad::WriteImmediate];

/// Pairs of places and lengths of which some byte is outside of `region`.
fn outside(region: RemoteRegion) -> Vec<(RemoteAddress, usize)> {
    let key = region.key;
    vec![
        (region.at(0_u64.wrapping_sub(8)), 8),
        (region.at(0_u64.wrapping_sub(4)), 8),
        (region.at(LEN as u64), 1),
        (region.at(LEN as u64 - 8), 9),
        (region.at(1), LEN),
        (region.at(1 << 40), 8),
        (region.at(0_u64.wrapping_sub(LEN as u64)), LEN),
        (RemoteAddress { address: u64::MAX - 3, key }, 8),
        (RemoteAddress { address: u64::MAX - 7, key }, 8),
    ]
}

fn post<R: Rig>(end: &mut End<R>, bad: Bad, own: &RegionOf<R>, at: RemoteAddress, len: usize) {
    let gather = [piece(own, 0, len)];
    let short = pattern(5, len.min(32));
    match bad {
        Bad::Read => end.read(&gather, at, Some(2)),
        Bad::Write => end.write(Payload::Gather(&gather), at, None, Some(2)),
        // An inline payload is short: of a long one, only the part that is outside.
        Bad::WriteInline if len > 32 => {
            let skip = (len - 32) as u64;
            let at = RemoteAddress { address: at.address.wrapping_add(skip), ..at };
            end.write(Payload::Inline(&short), at, None, Some(2))
        }
        Bad::WriteInline => end.write(Payload::Inline(&short), at, None, Some(2)),
        Bad::WriteImmediate => end.write(Payload::Gather(&gather), at, Some(4), Some(2)),
    }
    .expect("post");
}

/// Posts each of `posts` to each of `places`, each time on a new connection, and expects that it is refused.
/// `regions` are the server's, to be looked at.
fn refused<R: Rig>(
    pair: &mut Pair<'_, R>,
    posts: &[Bad],
    places: &[(RemoteAddress, usize)],
    regions: &[&RegionOf<R>],
    good: &RegionOf<R>,
) {
    let own = pair.region(Side::Client, LEN + 16, Access::Local);
    for &(at, len) in places {
        for &bad in posts {
            pair.connect();
            own.memory().write(0, &[0x77; LEN + 16]);
            let before: Vec<Vec<u8>> = regions.iter().map(|r| bytes(*r, 0, r.memory().len())).collect();
            // What comes before it happens; what comes after does not (memory rule 5 would allow that).
            let end = pair.end(Side::Client);
            end.write(Payload::Inline(b"good"), good.remote().at(0), None, Some(1)).expect("post");
            post::<R>(end, bad, &own, at, len);
            end.ring().expect("ring");
            let (client, server) = (pair.to_server[0].id(), pair.to_client[0].id());
            let (works, cause) = pair.end_of(Side::Client, client);
            let expected = vec![(1, Ok(())), (2, Err(WorkError::RemoteAccess))];
            assert_eq!(works, expected, "{bad:?} of {len} bytes at {at:?}");
            assert_eq!(cause, WorkError::RemoteAccess, "{bad:?} of {len} bytes at {at:?}");
            let (works, _) = pair.end_of(Side::Server, server);
            assert_eq!(works, []);
            pair.posts_are_refused(Side::Client, good.remote());
            pair.posts_are_refused(Side::Server, good.remote());
            for (region, before) in regions.iter().zip(before) {
                let after = bytes(*region, 0, before.len());
                assert!(after == before, "{bad:?} of {len} bytes at {at:?} wrote something");
            }
            assert_eq!(bytes(&own, 0, LEN + 16), [0x77; LEN + 16], "{bad:?} of {len} bytes at {at:?} read");
            pair.to_server.clear();
            pair.to_client.clear();
        }
    }
    pair.silence();
}

pub(super) fn reads_outside<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let good = pair.region(Side::Server, 64, Access::RemoteWrite);
    let theirs = pair.region(Side::Server, LEN, Access::RemoteRead);
    let places = outside(theirs.remote());
    refused(&mut pair, &READS, &places, &[&theirs], &good);
}

pub(super) fn writes_outside<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let good = pair.region(Side::Server, 64, Access::RemoteWrite);
    let theirs = pair.region(Side::Server, LEN, Access::RemoteWrite);
    let places = outside(theirs.remote());
    refused(&mut pair, &WRITES, &places, &[&theirs], &good);
}

pub(super) fn reads_without_the_right<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let good = pair.region(Side::Server, 64, Access::RemoteWrite);
    let local = pair.region(Side::Server, LEN, Access::Local);
    let places = [(local.remote().at(0), 8), (local.remote().at(0), LEN)];
    refused(&mut pair, &READS, &places, &[&local], &good);
}

pub(super) fn writes_without_the_right<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let good = pair.region(Side::Server, 64, Access::RemoteWrite);
    let local = pair.region(Side::Server, LEN, Access::Local);
    let readable = pair.region(Side::Server, LEN, Access::RemoteRead);
    let rows = Exclusive::new("rows", LEN).expect("memory");
    let export = pair.server.transport.export(&rows).expect("export");
    let places = [(local.remote().at(0), 8), (readable.remote().at(64), 4096), (export.remote().at(0), 8)];
    refused(&mut pair, &WRITES, &places, &[&local, &readable], &good);
    assert!(rows.bytes().iter().all(|&b| b == 0), "a WRITE changed an export");
}

pub(super) fn wrong_keys<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let good = pair.region(Side::Server, 64, Access::RemoteWrite);
    let theirs = pair.region(Side::Server, LEN, Access::RemoteWrite);
    let at = theirs.remote().at(64);
    let keys = [!at.key, at.key ^ 0x0100_0000, at.key.wrapping_add(1_000_003), 0xffff_ffff];
    let places: Vec<_> = keys.into_iter().map(|key| (RemoteAddress { key, ..at }, 8)).collect();
    refused(&mut pair, &READS, &places, &[&theirs], &good);
    refused(&mut pair, &WRITES, &places, &[&theirs], &good);
    // A key of another region does not open this one either.
    let crossed = [(RemoteAddress { key: good.remote().key, ..at }, 8)];
    refused(&mut pair, &READS, &crossed, &[&theirs], &good);
}

pub(super) fn too_long_messages<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &victim::config());
    let own = pair.region(Side::Client, LEN, Access::Local);
    let limit = victim::config().receive_size;
    for length in [limit + 1, limit + 64, LEN] {
        pair.connect();
        let end = pair.end(Side::Client);
        end.send(Payload::Gather(&[piece(&own, 0, limit)]), None, Some(1)).expect("post");
        end.send(Payload::Gather(&[piece(&own, 0, length)]), None, Some(2)).expect("post");
        end.ring().expect("ring");
        let (_, message, _) = pair.message(Side::Server);
        assert_eq!(message.len(), limit, "a message as long as the buffer fits");
        let (client, server) = (pair.to_server[0].id(), pair.to_client[0].id());
        let (works, cause) = pair.end_of(Side::Client, client);
        assert_eq!(works, vec![(1, Ok(())), (2, Err(WorkError::RemoteInvalid))]);
        assert_eq!(cause, WorkError::RemoteInvalid);
        pair.end_of(Side::Server, server);
        pair.posts_are_refused(Side::Client, own.remote());
        pair.to_server.clear();
        pair.to_client.clear();
    }
}
