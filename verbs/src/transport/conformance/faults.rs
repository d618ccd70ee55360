//! How connections end: on request, by a drop, by the death of a process.

use std::time::Duration;

use super::{
    Posts, Rig, Side,
    pair::{PATIENCE, Pair, Work, bytes, decode, pattern, piece, refused_as_disconnected},
    victim::{Role, Survivor, VICTIM_MEMORY},
};
use crate::{
    memory::Memory,
    transport::{
        Access, Completion, Connection, Endpoint, EndpointConfig, Payload, PostError, Region, RemoteRegion,
        Runtime, Transport, WorkError,
    },
};

/// A dead peer is found out within this time.
const DETECTION: Duration = Duration::from_secs(2);

pub(super) fn disconnect<R: Rig>(rig: &R) {
    for side in [Side::Client, Side::Server] {
        let mut pair = Pair::alike(rig, &EndpointConfig::default());
        let own = pair.region(Side::Client, 64, Access::RemoteWrite);
        pair.connect();
        let (client, server) = (pair.to_server[0].id(), pair.to_client[0].id());
        pair.end(side).disconnect();
        assert_eq!(pair.end_of(Side::Client, client), (vec![], WorkError::Disconnected));
        assert_eq!(pair.end_of(Side::Server, server), (vec![], WorkError::Disconnected));
        for side in [Side::Client, Side::Server] {
            pair.posts_are_refused(side, own.remote());
            // Once more does no harm.
            pair.end(side).disconnect();
        }
        pair.silence();
    }
}

pub(super) fn dropped_connection<R: Rig>(rig: &R) {
    for side in [Side::Client, Side::Server] {
        let mut pair = Pair::alike(rig, &EndpointConfig::default());
        let own = pair.region(Side::Client, 64, Access::RemoteWrite);
        pair.connect();
        let (client, server) = (pair.to_server[0].id(), pair.to_client[0].id());
        match side {
            Side::Client => pair.to_server.clear(),
            Side::Server => pair.to_client.clear(),
        }
        assert_eq!(pair.end_of(side.other(), if side == Side::Client { server } else { client }).0, []);
        pair.posts_are_refused(side.other(), own.remote());
    }
}

pub(super) fn dropped_endpoint<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let own = pair.region(Side::Client, 64, Access::RemoteWrite);
    pair.connect();
    let Pair { mut client, server, mut to_server, to_client, .. } = pair;
    drop(to_client);
    drop(server);
    let deadline = client.transport.now() + PATIENCE;
    let mut turn = 0;
    loop {
        client.poll();
        match client.take() {
            Some(Completion::Disconnected { connection, .. }) => {
                assert_eq!(connection, to_server[0].id());
                break;
            }
            Some(other) => panic!("expected the end of the connection, found {other:?}"),
            None => assert!(client.transport.now() < deadline, "the end of the connection is not seen"),
        }
        client.transport.relax(turn);
        turn += 1;
    }
    refused_as_disconnected(&mut to_server[0], &own, own.remote());
}

/// What has completed at the sender is delivered at the receiver before the end of the connection.
pub(super) fn messages_before_the_end<R: Rig>(rig: &R) {
    for round in 0..rig.effort().rounds.min(50) {
        let mut pair = Pair::alike(rig, &EndpointConfig::default());
        let theirs = pair.region(Side::Server, 64, Access::RemoteWrite);
        pair.connect();
        let end = pair.end(Side::Client);
        for i in 0..10_u8 {
            end.send(Payload::Inline(&[i]), None, None).expect("post");
        }
        end.write(Payload::Inline(&round.to_le_bytes()), theirs.remote().at(0), Some(77), Some(1))
            .expect("post");
        end.ring().expect("ring");
        // The server does not look before the client has disconnected.
        let deadline = pair.client.transport.now() + PATIENCE;
        let mut turn = 0;
        while pair.client.poll() == 0 {
            assert!(pair.client.transport.now() < deadline, "a SEND waits for the receiver's poll");
            pair.client.transport.relax(turn);
            turn += 1;
        }
        pair.work(Side::Client, 1);
        pair.end(Side::Client).disconnect();
        for i in 0..10 {
            assert_eq!(pair.message(Side::Server).1, [i]);
        }
        assert_eq!(pair.immediate(Side::Server), 77);
        assert_eq!(bytes(&theirs, 0, 4), round.to_le_bytes());
        let server = pair.to_client[0].id();
        assert_eq!(pair.end_of(Side::Server, server), (vec![], WorkError::Disconnected));
    }
}

/// Requests that are outstanding when either side disconnects complete, in order, and none twice.
pub(super) fn outstanding<R: Rig>(rig: &R) {
    for round in 0..rig.effort().rounds.min(50) {
        let mut pair = Pair::alike(rig, &EndpointConfig::default());
        let theirs = pair.region(Side::Server, 8192, Access::RemoteWrite);
        let own = pair.region(Side::Client, 8192, Access::Local);
        pair.connect();
        let expected = post_some(&mut pair.to_server[0], &own, theirs.remote(), 0);
        let side = if round % 2 == 0 { Side::Client } else { Side::Server };
        pair.end(side).disconnect();
        let (client, server) = (pair.to_server[0].id(), pair.to_client[0].id());
        let (works, _) = pair.end_of(Side::Client, client);
        check_works(&works, expected);
        pair.end_of(Side::Server, server);
        pair.posts_are_refused(Side::Client, theirs.remote());
        // The memory is the user's again.
        let mark = pattern(9, 8192);
        own.memory().write(0, &mark);
        pair.silence();
        assert!(bytes(&own, 0, 8192) == mark, "memory was written after the end of the connection");
    }
}

pub(super) fn other_connections<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, 64, Access::RemoteWrite);
    (0..3).for_each(|_| pair.connect());
    let (client, server) = (pair.to_server[1].id(), pair.to_client[1].id());
    let stray = theirs.remote().at(1 << 30);
    pair.to_server[1].write(Payload::Inline(b"astray"), stray, None, Some(5)).expect("post");
    pair.to_server[1].ring().expect("ring");
    let (works, _) = pair.end_of(Side::Client, client);
    assert_eq!(works, vec![(5, Err(WorkError::RemoteAccess))]);
    pair.end_of(Side::Server, server);
    for number in [0, 2] {
        let end = &mut pair.to_server[number];
        end.send(Payload::Inline(&[number as u8]), None, Some(6)).expect("post");
        end.ring().expect("ring");
        let expected = (pair.to_client[number].id(), vec![number as u8], None);
        assert_eq!(pair.message(Side::Server), expected);
        pair.work(Side::Client, 6);
    }
    pair.silence();
}

/// Posts requests of all kinds, with ids that count from `first`, until it has posted 30 or the connection
/// refuses them, and rings. Returns the id after the last that was taken.
fn post_some<C: Connection>(end: &mut C, own: &C::Region, remote: RemoteRegion, first: u64) -> u64 {
    let mut id = first;
    let mut sent = 0;
    while id < first + 30 {
        let place = id % 30 * 128;
        let gather = [piece(own, place as usize, 128)];
        let target = [piece(own, 4096 + place as usize, 128)];
        let posted = match id % 4 {
            0 => end.read(&target, remote.at(place), Some(id)),
            1 => end.write(Payload::Gather(&gather), remote.at(place), None, Some(id)),
            2 if sent < 4 => {
                sent += 1;
                end.send(Payload::Gather(&gather), Some(id as u32), Some(id))
            }
            _ => end.write(Payload::Inline(&[1; 64]), remote.at(place), None, Some(id)),
        };
        // An unsignalled one between the others: it has no completion.
        let between = posted.and_then(|()| {
            id += 1;
            end.write(Payload::Inline(b"between"), remote.at(4000), None, None)
        });
        match between {
            Ok(()) => (),
            Err(PostError::Full) => break,
            Err(PostError::Disconnected) => return id,
        }
    }
    let _ = end.ring();
    id
}

/// Expects the completions `0..expected`, each once and in order; after the first error all are errors.
fn check_works(works: &[Work], expected: u64) {
    let ids: Vec<u64> = works.iter().map(|work| work.0).collect();
    assert_eq!(ids, (0..expected).collect::<Vec<_>>(), "each signalled request completes once, in order");
    let failed = works.iter().position(|work| work.1.is_err()).unwrap_or(works.len());
    let after = &works[failed..];
    assert!(after.iter().all(|work| work.1.is_err()), "a success after the first failure: {works:?}");
}

pub(super) fn dead_client_idle<R: Rig>(rig: &R) {
    dead_peer(rig, Role::Connects, false);
}

pub(super) fn dead_client_busy<R: Rig>(rig: &R) {
    dead_peer(rig, Role::Connects, true);
}

pub(super) fn dead_server_idle<R: Rig>(rig: &R) {
    dead_peer(rig, Role::Listens, false);
}

pub(super) fn dead_server_busy<R: Rig>(rig: &R) {
    dead_peer(rig, Role::Listens, true);
}

/// Kills a peer, and expects that within two seconds every outstanding request has completed, and then the
/// connection is over.
fn dead_peer<R: Rig>(rig: &R, role: Role, busy: bool) {
    let mut survivor = Survivor::meet(rig, role);
    let transport = survivor.transport.clone();
    let memory = Memory::new("survivor", VICTIM_MEMORY).expect("memory");
    let own = transport.register(&memory, Access::Local).expect("register");
    let mut seen = Vec::new();
    let mut turn = 0;

    // The victim's hello names its region: the connection works.
    let deadline = transport.now() + PATIENCE;
    let remote = loop {
        survivor.endpoint.poll(&mut seen);
        match seen.pop() {
            Some(Completion::Received { buffer, .. }) => {
                let remote = decode(survivor.endpoint.message(&buffer));
                survivor.endpoint.release(buffer);
                break remote;
            }
            Some(other) => panic!("expected the victim's hello, found {other:?}"),
            None => assert!(transport.now() < deadline, "the victim says nothing"),
        }
        transport.relax(turn);
        turn += 1;
    };

    let mut posted = 0;
    if busy {
        posted = post_some(&mut survivor.connection, &own, remote, 0);
        assert_eq!(posted, 30);
    }
    rig.kill(survivor.victim);
    let killed = transport.now();
    if busy {
        // As many again as the queue takes, to a peer that is no more.
        posted = post_some(&mut survivor.connection, &own, remote, posted);
    }

    let mut works = Vec::new();
    turn = 0;
    let over = 'polling: loop {
        survivor.endpoint.poll(&mut seen);
        for completion in seen.drain(..) {
            match completion {
                Completion::Work { id, result, .. } => works.push((id, result)),
                Completion::Disconnected { connection, .. } => {
                    assert_eq!(connection, survivor.connection.id());
                    break 'polling transport.now();
                }
                other => panic!("expected completions and the end of the connection, found {other:?}"),
            }
        }
        assert!(
            transport.now() < killed + DETECTION,
            "the death is not found out within {DETECTION:?}: {works:?}"
        );
        transport.relax(turn);
        turn += 1;
    };
    check_works(&works, posted);
    refused_as_disconnected(&mut survivor.connection, &own, remote);
    // Exactly one end, and it is the last word.
    while transport.now() < over + Duration::from_millis(50) {
        assert_eq!(survivor.endpoint.poll(&mut seen), 0, "after the end: {seen:?}");
        transport.relax(turn);
    }
}
