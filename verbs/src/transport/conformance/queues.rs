//! Queues that fill up: back-pressure, never loss.

use super::{
    Posts, Rig, Side,
    pair::{Pair, bytes, pattern, piece},
};
use crate::transport::{
    Access, Completion, Connection, Endpoint, EndpointConfig, Payload, PostError, Region, Runtime,
};

pub(super) fn full_send_queue<R: Rig>(rig: &R) {
    let config = EndpointConfig { send_depth: 16, ..EndpointConfig::default() };
    let mut pair = Pair::alike(rig, &config);
    let theirs = pair.region(Side::Server, 4096, Access::RemoteWrite);
    let own = pair.region(Side::Client, 4096, Access::Local);
    pair.connect();
    for round in 0..20_u64 {
        // Without a poll, exactly as many requests are taken as the queue holds.
        for i in 0..16 {
            assert_eq!(pair.end(Side::Client).room(), 16 - i as usize);
            let (end, id) = (pair.end(Side::Client), round * 16 + i);
            let payload = Payload::Inline(&id.to_le_bytes());
            match i % 3 {
                0 => end.send(payload, None, Some(id)),
                1 => end.write(payload, theirs.remote().at(8 * i), None, Some(id)),
                _ => end.read(&[piece(&own, 8 * i as usize, 8)], theirs.remote().at(0), Some(id)),
            }
            .expect("post");
        }
        let end = pair.end(Side::Client);
        let refused = Payload::Inline(b"refused!");
        for _ in 0..2 {
            assert_eq!(end.room(), 0);
            assert_eq!(end.send(refused, Some(9), Some(999)), Err(PostError::Full));
            assert_eq!(end.send(refused, None, None), Err(PostError::Full));
            assert_eq!(
                end.write(refused, theirs.remote().at(2048), Some(9), Some(999)),
                Err(PostError::Full)
            );
            let target = [piece(&own, 2048, 8)];
            assert_eq!(end.read(&target, theirs.remote().at(0), Some(999)), Err(PostError::Full));
            end.ring().expect("ring");
        }
        // All that were taken happen, in order, and nothing of those that were refused.
        for i in 0..16 {
            pair.work(Side::Client, round * 16 + i);
        }
        for i in (0..16).step_by(3) {
            let (_, message, immediate) = pair.message(Side::Server);
            assert_eq!((message.as_slice(), immediate), ((round * 16 + i).to_le_bytes().as_slice(), None));
        }
        assert_eq!(pair.end(Side::Client).room(), 16);
        assert_eq!(bytes(&theirs, 2048, 8), [0xee; 8]);
        assert_eq!(bytes(&own, 2048, 8), [0xee; 8]);
    }
    pair.silence();
}

pub(super) fn unsignalled_chains<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, 8192, Access::RemoteWrite);
    let own = pair.region(Side::Client, 8192, Access::Local);
    pair.connect();
    for round in 0..u64::from(rig.effort().rounds.min(100)) {
        let chain = round as usize % 30;
        let data = pattern(round, 8192);
        own.memory().write(0, &data);
        let end = pair.end(Side::Client);
        for i in 0..chain {
            let payload = [piece(&own, i * 200, 200)];
            end.write(Payload::Gather(&payload), theirs.remote().at(i as u64 * 200), None, None)
                .expect("post");
        }
        end.read(&[piece(&own, 8000, 8)], theirs.remote().at(8000), None).expect("post");
        end.write(Payload::Inline(&[round as u8]), theirs.remote().at(8191), None, Some(round))
            .expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, round);
        // The completion says of every earlier request that it is done: its memory may be used again, and
        // the READ has its bytes.
        assert_eq!(bytes(&own, 8000, 8), bytes(&theirs, 8000, 8), "an unsignalled READ is not complete");
        own.memory().write(0, &[0x33; 8192]);
        let end = pair.end(Side::Client);
        end.read(&[piece(&own, 0, 6000)], theirs.remote().at(0), Some(1000)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, 1000);
        let found = bytes(&own, 0, chain * 200);
        assert!(found == data[..chain * 200], "a WRITE was gathered after its completion");
    }
    pair.silence();
}

/// An end that was accepted with a shallower send queue than its endpoint's: its own posts are bounded by it, what it serves is not.
pub(super) fn shallow_end<R: Rig>(rig: &R) {
    let config = EndpointConfig { send_depth: 16, ..EndpointConfig::default() };
    for (asked, depth) in [(1, 1), (0, 1), (5, 5), (100, 16)] {
        let mut pair = Pair::alike(rig, &config);
        let theirs = pair.region(Side::Server, 4096, Access::RemoteRead);
        let own = pair.region(Side::Client, 4096, Access::RemoteWrite);
        pair.connect_with(asked);
        assert_eq!((pair.end(Side::Client).room(), pair.end(Side::Server).room()), (16, depth));
        for round in 0..u64::from(rig.effort().rounds) {
            own.memory().write(0, &[0; 4096]);
            for i in 0..16 {
                let into = piece(&own, i * 8, 8);
                let end = pair.end(Side::Client);
                end.read(&[into], theirs.remote().at(i as u64 * 8), Some(round << 8 | i as u64))
                    .expect("post");
            }
            pair.end(Side::Client).ring().expect("ring");
            for i in 0..depth as u64 {
                let end = pair.end(Side::Server);
                let remote = own.remote().at(2048 + i * 8);
                end.write(Payload::Inline(&round.to_le_bytes()), remote, None, Some(i)).expect("post");
            }
            let beyond = pair.end(Side::Server).send(Payload::Inline(b"one too many"), None, None);
            assert_eq!(beyond, Err(PostError::Full));
            pair.end(Side::Server).ring().expect("ring");
            (0..16).for_each(|i| pair.work(Side::Client, round << 8 | i));
            (0..depth as u64).for_each(|i| pair.work(Side::Server, i));
            assert_eq!(bytes(&own, 0, 128), [0xee; 128]);
        }
        pair.silence();
    }
}

pub(super) fn unsignalled_without_end<R: Rig>(rig: &R) {
    let config = EndpointConfig { send_depth: 8, ..EndpointConfig::default() };
    let mut pair = Pair::alike(rig, &config);
    let theirs = pair.region(Side::Server, 4096, Access::RemoteWrite);
    let own = pair.region(Side::Client, 4096, Access::Local);
    pair.connect();
    let count = u64::from(rig.effort().rounds) * 4;
    for i in 0..count {
        pair.until("room for an unsignalled request", |pair| {
            let end = pair.end(Side::Client);
            let posted = match i % 4 {
                3 => end.read(&[piece(&own, 512, 8)], theirs.remote().at(8), None),
                _ => end.write(Payload::Inline(&i.to_le_bytes()), theirs.remote().at(i % 4 * 8), None, None),
            };
            end.ring().expect("ring");
            match posted {
                Ok(()) => Some(()),
                Err(PostError::Full) => None,
                Err(PostError::Disconnected) => panic!("the connection broke"),
            }
        });
    }
    pair.until("room for the last request", |pair| {
        let end = pair.end(Side::Client);
        end.read(&[piece(&own, 0, 24)], theirs.remote().at(0), Some(1)).ok()
    });
    pair.end(Side::Client).ring().expect("ring");
    pair.work(Side::Client, 1);
    for place in 0..3 {
        let last = (0..count).rev().find(|i| i % 4 == place).expect("some");
        assert_eq!(own.memory().load(place as usize * 8), last);
    }
    pair.silence();
}

/// Operations in flight on many connections, all posted before anything is polled.
pub(super) fn many_in_flight<R: Rig>(rig: &R) {
    const CONNECTIONS: usize = 20;
    let each = rig.effort().in_flight / CONNECTIONS;
    let config = EndpointConfig {
        send_depth: each,
        connections: CONNECTIONS,
        receive_buffers: 8 * CONNECTIONS,
        receive_size: 64,
        ..EndpointConfig::default()
    };
    let mut pair = Pair::alike(rig, &config);
    let part = each * 8;
    let theirs = pair.region(Side::Server, CONNECTIONS * part, Access::RemoteWrite);
    let own = pair.region(Side::Client, 2 * CONNECTIONS * part, Access::Local);
    (0..CONNECTIONS).for_each(|_| pair.connect());
    let value = |connection: usize, i: usize| (connection * each + i + 1) as u64;
    let source = CONNECTIONS * part;
    for (number, end) in pair.to_server.iter_mut().enumerate() {
        for i in 0..each {
            let id = value(number, i);
            // A READ reads the word that the WRITE before it has written.
            let at = (number * part + i / 2 * 8) as u64;
            let posted = if i % 2 == 0 {
                own.memory().store(source + at as usize, id);
                let payload = [piece(&own, source + at as usize, 8)];
                end.write(Payload::Gather(&payload), theirs.remote().at(at), None, Some(id))
            } else {
                end.read(&[piece(&own, at as usize, 8)], theirs.remote().at(at), Some(id))
            };
            posted.expect("the queue is as deep as asked for");
        }
    }
    pair.to_server.iter_mut().for_each(|end| end.ring().expect("ring"));
    let ids: Vec<_> = pair.to_server.iter().map(Connection::id).collect();
    let mut done = [0; CONNECTIONS];
    for _ in 0..CONNECTIONS * each {
        match pair.next(Side::Client) {
            Completion::Work { connection, id, result: Ok(()) } => {
                let number = ids.iter().position(|&of| of == connection).expect("a connection of ours");
                assert_eq!(id, value(number, done[number]), "connection {number} completed out of order");
                done[number] += 1;
            }
            other => panic!("expected a completion, found {other:?}"),
        }
    }
    assert_eq!(done, [each; CONNECTIONS]);
    for number in 0..CONNECTIONS {
        for i in (1..each).step_by(2) {
            let found = own.memory().load(number * part + i / 2 * 8);
            assert_eq!(found, value(number, i - 1), "READ {i} of connection {number}");
        }
    }
    pair.silence();
}

pub(super) fn shared_receive_buffers<R: Rig>(rig: &R) {
    const CONNECTIONS: usize = 8;
    const CREDITS: usize = 4;
    let config = EndpointConfig {
        receive_buffers: CONNECTIONS * CREDITS,
        receive_size: 512,
        connections: CONNECTIONS,
        ..EndpointConfig::default()
    };
    let mut pair = Pair::alike(rig, &config);
    let own = pair.region(Side::Client, 512, Access::Local);
    own.memory().write(0, &pattern(1, 512));
    (0..CONNECTIONS).for_each(|_| pair.connect());
    let data = pattern(1, 512);
    let per_connection = rig.effort().rounds as usize;
    let (mut posted, mut arrived) = ([0; CONNECTIONS], [0; CONNECTIONS]);
    let ids: Vec<_> = pair.to_client.iter().map(Connection::id).collect();
    while arrived != [per_connection; CONNECTIONS] {
        for (number, end) in pair.to_server.iter_mut().enumerate() {
            while posted[number] < per_connection && posted[number] < arrived[number] + CREDITS {
                let i = posted[number];
                let length = (i * 31 + number * 7) % 513;
                let immediate = (number << 16 | i) as u32;
                let payload = Payload::Gather(&[piece(&own, 0, length)]);
                if end.send(payload, Some(immediate), None).is_err() {
                    break;
                }
                posted[number] += 1;
            }
            end.ring().expect("ring");
        }
        if posted == arrived {
            pair.until_room();
            continue;
        }
        // One connection that uses up all the buffers it can does not take those of others' credits.
        let (connection, message, immediate) = pair.message(Side::Server);
        let number = ids.iter().position(|&of| of == connection).expect("a connection of ours");
        let i = arrived[number];
        assert_eq!(immediate, Some((number << 16 | i) as u32), "out of order on connection {number}");
        assert_eq!(message, &data[..(i * 31 + number * 7) % 513]);
        arrived[number] += 1;
    }
    pair.silence();
}

pub(super) fn late_release<R: Rig>(rig: &R) {
    const BUFFERS: u64 = 16;
    let config =
        EndpointConfig { receive_buffers: BUFFERS as usize, receive_size: 256, ..EndpointConfig::default() };
    let mut pair = Pair::alike(rig, &config);
    let own = pair.region(Side::Client, 256, Access::Local);
    pair.connect();
    for round in 0..u64::from(rig.effort().rounds / 10) {
        let mut held = Vec::new();
        for i in 0..BUFFERS {
            let data = pattern(round * BUFFERS + i, 200 + i as usize);
            own.memory().write(0, &data);
            let end = pair.end(Side::Client);
            end.send(Payload::Gather(&[piece(&own, 0, data.len())]), None, Some(i)).expect("post");
            end.ring().expect("ring");
            pair.work(Side::Client, i);
            match pair.next(Side::Server) {
                Completion::Received { buffer, .. } => held.push((buffer, data)),
                other => panic!("expected a message, found {other:?}"),
            }
            // Nobody writes a buffer between its arrival and its release.
            for (buffer, data) in &held {
                assert!(pair.server.endpoint.message(buffer) == data, "a held message changed");
            }
        }
        // Released in another order than they came.
        while !held.is_empty() {
            let (buffer, _) = held.swap_remove(round as usize % held.len());
            pair.server.endpoint.release(buffer);
        }
    }
    pair.silence();
}

pub(super) fn immediate_credits<R: Rig>(rig: &R) {
    const BUFFERS: u32 = 4;
    let config =
        EndpointConfig { receive_buffers: BUFFERS as usize, receive_size: 64, ..EndpointConfig::default() };
    let mut pair = Pair::alike(rig, &config);
    let theirs = pair.region(Side::Server, 64, Access::RemoteWrite);
    pair.connect();
    let (mut posted, mut arrived) = (0, 0);
    while arrived < rig.effort().rounds {
        while posted < arrived + BUFFERS {
            let payload = Payload::Inline(&posted.to_le_bytes());
            if pair.end(Side::Client).write(payload, theirs.remote().at(8), Some(posted), None).is_err() {
                break;
            }
            posted += 1;
        }
        pair.end(Side::Client).ring().expect("ring");
        if posted == arrived {
            pair.until_room();
            continue;
        }
        assert_eq!(pair.immediate(Side::Server), arrived);
        arrived += 1;
    }
}

pub(super) fn read_depth<R: Rig>(rig: &R) {
    // The server's depth binds the client's READs, and the other way round.
    let few = EndpointConfig { read_depth: 1, send_depth: 64, ..EndpointConfig::default() };
    let many = EndpointConfig { read_depth: 16, send_depth: 64, ..EndpointConfig::default() };
    for (client, server) in [(&few, &many), (&many, &few), (&many, &many)] {
        let mut pair = Pair::new(rig, client, server);
        let theirs = pair.region(Side::Server, 64 * 512, Access::RemoteRead);
        let own = pair.region(Side::Client, 64 * 512, Access::Local);
        let data = pattern(3, 64 * 512);
        theirs.memory().write(0, &data);
        pair.connect();
        let end = pair.end(Side::Client);
        for i in 0..64 {
            let at = theirs.remote().at(i * 512);
            end.read(&[piece(&own, i as usize * 512, 512)], at, Some(i)).expect("post");
        }
        end.ring().expect("ring");
        (0..64).for_each(|i| pair.work(Side::Client, i));
        assert!(bytes(&own, 0, data.len()) == data);
    }
}

/// READs and WRITEs complete though nobody polls the server's endpoint.
pub(super) fn no_poller<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, 4096, Access::RemoteWrite);
    let own = pair.region(Side::Client, 4096, Access::Local);
    pair.connect();
    let transport = pair.client.transport.clone();
    for id in 0..u64::from(rig.effort().rounds) {
        let end = pair.end(Side::Client);
        end.write(Payload::Inline(&id.to_le_bytes()), theirs.remote().at(0), None, None).expect("post");
        end.read(&[piece(&own, 0, 8)], theirs.remote().at(0), Some(id)).expect("post");
        end.ring().expect("ring");
        let deadline = transport.now() + super::pair::PATIENCE;
        let mut turn = 0;
        while pair.client.poll() == 0 {
            assert!(transport.now() < deadline, "a READ waits for the server's poller");
            transport.relax(turn);
            turn += 1;
        }
        pair.work(Side::Client, id);
        assert_eq!(own.memory().load(0), id);
    }
}
