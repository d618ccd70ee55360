//! The simulation is not too strong: whatever the contract lets happen does happen, on some seed. A user who
//! relies on more than the contract is found out.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use super::SimRig;
use crate::transport::{
    Access, Completion, Connection, Endpoint, EndpointConfig, Payload, Region, Runtime, WorkError,
    conformance::{
        Posts, Rig, Side,
        pair::{Background, Pair, RegionOf, bytes, piece},
    },
};

type SimPair<'r> = Pair<'r, SimRig>;
type SimRegion = RegionOf<SimRig>;

const SEEDS: u64 = 100;
const LEN: usize = 1024;

/// Runs `scenario` with many seeds, on a fresh connection and a region of `LEN` zeros on each side, and returns
/// what it has found.
fn found<X: Ord + Send + 'static>(
    scenario: impl Fn(&mut SimPair<'_>, &SimRegion, &SimRegion) -> X + Copy + Send + 'static,
) -> BTreeSet<X> {
    let found = Arc::new(Mutex::new(BTreeSet::new()));
    for seed in 0..SEEDS {
        let rig = Arc::new(SimRig::new("weakness", seed));
        let (inside, found) = (Arc::clone(&rig), Arc::clone(&found));
        rig.run(Box::new(move || {
            let mut pair = Pair::alike(&*inside, &EndpointConfig::default());
            let own = pair.region(Side::Client, LEN, Access::RemoteWrite);
            let theirs = pair.region(Side::Server, LEN, Access::RemoteWrite);
            own.memory().write(0, &[0; LEN]);
            theirs.memory().write(0, &[0; LEN]);
            pair.connect();
            let result = scenario(&mut pair, &own, &theirs);
            found.lock().expect("results").insert(result);
        }));
    }
    let mut found = found.lock().expect("results");
    std::mem::take(&mut *found)
}

/// Expects that `scenario` finds what it looks for on some seeds, and not on others.
fn sometimes(scenario: impl Fn(&mut SimPair<'_>, &SimRegion, &SimRegion) -> bool + Copy + Send + 'static) {
    assert_eq!(found(scenario), BTreeSet::from([false, true]), "it happens never, or always");
}

/// What is in the first line, and in the last one.
fn ends(region: &SimRegion) -> (u8, u8) {
    (bytes(region, 0, 1)[0], bytes(region, LEN - 1, 1)[0])
}

/// Turns until `look` has found something, or the completion of request 1 has been polled.
fn before_completion<X>(pair: &mut SimPair<'_>, mut look: impl FnMut() -> Option<X>) -> Option<X> {
    let mut turn = 0;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if pair.client.poll() > 0 {
            return None;
        }
        pair.client.transport.relax(turn);
        turn += 1;
    }
}

#[test]
fn a_read_mixes_old_and_new_lines() {
    sometimes(|pair, own, theirs| {
        let stop = Arc::new(AtomicBool::new(false));
        let writer = Background::start(&pair.server.transport, {
            let (stop, memory) = (Arc::clone(&stop), theirs.memory().clone());
            let transport = pair.server.transport.clone();
            move || {
                let mut value = 0_u8;
                while !stop.load(Ordering::Relaxed) {
                    value = value.wrapping_add(1);
                    memory.write(0, &[value; LEN]);
                    transport.relax(0);
                }
            }
        });
        let end = pair.end(Side::Client);
        end.read(&[piece(own, 0, LEN)], theirs.remote().at(0), Some(1)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, 1);
        stop.store(true, Ordering::Relaxed);
        writer.join();
        let read = bytes(own, 0, LEN);
        assert!(read.chunks(64).all(|line| line.iter().all(|&b| b == line[0])), "a line is torn");
        read.iter().any(|&b| b != read[0])
    });
}

#[test]
fn the_lines_of_a_write_show_in_any_order() {
    let orders = found(|pair, own, theirs| {
        own.memory().write(0, &[7; LEN]);
        let end = pair.end(Side::Client);
        end.write(Payload::Gather(&[piece(own, 0, LEN)]), theirs.remote().at(0), None, None).expect("post");
        end.ring().expect("ring");
        pair.until("a line of the WRITE", |_| Some(ends(theirs)).filter(|&ends| ends != (0, 0)))
    });
    assert_eq!(orders, BTreeSet::from([(7, 0), (0, 7), (7, 7)]));
}

#[test]
fn two_writes_show_in_any_order() {
    let orders = found(|pair, _, theirs| {
        let end = pair.end(Side::Client);
        end.write(Payload::Inline(&[1]), theirs.remote().at(0), None, None).expect("post");
        end.write(Payload::Inline(&[2]), theirs.remote().at(LEN as u64 - 1), None, None).expect("post");
        end.ring().expect("ring");
        pair.until("a WRITE", |_| Some(ends(theirs)).filter(|&ends| ends != (0, 0)))
    });
    assert_eq!(orders, BTreeSet::from([(1, 0), (0, 2), (1, 2)]));
}

#[test]
fn a_write_is_complete_before_it_is_visible() {
    sometimes(|pair, _, theirs| {
        let end = pair.end(Side::Client);
        end.write(Payload::Inline(&[1]), theirs.remote().at(0), None, Some(1)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, 1);
        bytes(theirs, 0, 1) == [0]
    });
}

#[test]
fn a_write_lands_long_after_its_completion() {
    sometimes(|pair, _, theirs| {
        let end = pair.end(Side::Client);
        end.write(Payload::Inline(&[1]), theirs.remote().at(0), None, Some(1)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, 1);
        let until = pair.client.transport.now() + Duration::from_micros(100);
        pair.until("time to pass", |pair| (pair.client.transport.now() >= until).then_some(()));
        bytes(theirs, 0, 1) == [0]
    });
}

#[test]
fn a_read_is_overtaken_by_a_later_write() {
    sometimes(|pair, own, theirs| {
        let end = pair.end(Side::Client);
        end.read(&[piece(own, 0, 8)], theirs.remote().at(0), None).expect("post");
        end.write(Payload::Inline(&[1]), theirs.remote().at(0), None, Some(1)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, 1);
        bytes(own, 0, 1) == [1]
    });
}

#[test]
fn a_read_is_overtaken_by_a_later_message() {
    sometimes(|pair, own, theirs| {
        let end = pair.end(Side::Client);
        end.read(&[piece(own, 0, 8)], theirs.remote().at(0), None).expect("post");
        end.send(Payload::Inline(b"go"), None, Some(1)).expect("post");
        end.ring().expect("ring");
        pair.message(Side::Server);
        theirs.memory().write(0, &[1; 8]);
        pair.work(Side::Client, 1);
        bytes(own, 0, 1) == [1]
    });
}

#[test]
fn two_reads_see_memory_in_either_order() {
    let orders = found(|pair, own, theirs| {
        let end = pair.end(Side::Client);
        end.read(&[piece(own, 0, 8)], theirs.remote().at(0), None).expect("post");
        end.read(&[piece(own, 64, 8)], theirs.remote().at(0), Some(1)).expect("post");
        end.ring().expect("ring");
        let memory = theirs.memory();
        let mut value = 0;
        before_completion(pair, || -> Option<()> {
            value += 1;
            memory.store(0, value);
            None
        });
        own.memory().load(0).cmp(&own.memory().load(64))
    });
    assert_eq!(orders.len(), 3, "first older, equal, second older: {orders:?}");
}

#[test]
fn a_buffer_used_again_before_its_completion_is_sent_changed() {
    sometimes(|pair, own, theirs| {
        own.memory().write(0, &[1; LEN]);
        let end = pair.end(Side::Client);
        end.write(Payload::Gather(&[piece(own, 0, LEN)]), theirs.remote().at(0), Some(1), None)
            .expect("post");
        end.ring().expect("ring");
        own.memory().write(0, &[2; LEN]);
        pair.immediate(Side::Server);
        ends(theirs) != (1, 1)
    });
    // And in part, if it is changed while it is on its way.
    sometimes(|pair, own, theirs| {
        own.memory().write(0, &[1; LEN]);
        let end = pair.end(Side::Client);
        end.write(Payload::Gather(&[piece(own, 0, LEN)]), theirs.remote().at(0), Some(1), None)
            .expect("post");
        end.ring().expect("ring");
        (0..8).for_each(|_| pair.client.transport.relax(0));
        own.memory().write(0, &[2; LEN]);
        pair.immediate(Side::Server);
        let seen = bytes(theirs, 0, LEN);
        seen.contains(&1) && seen.contains(&2)
    });
}

#[test]
fn a_read_fills_its_buffer_before_its_completion_in_any_order() {
    let orders = found(|pair, own, theirs| {
        theirs.memory().write(0, &[9; LEN]);
        let end = pair.end(Side::Client);
        end.read(&[piece(own, 0, LEN)], theirs.remote().at(0), Some(1)).expect("post");
        end.ring().expect("ring");
        before_completion(pair, || Some(ends(own)).filter(|&ends| ends != (0, 0)))
    });
    assert!(orders.is_superset(&BTreeSet::from([Some((9, 0)), Some((0, 9)), Some((9, 9))])), "{orders:?}");
}

#[test]
fn a_completion_shows_long_after_its_effect() {
    sometimes(|pair, own, theirs| {
        theirs.memory().write(0, &[9; 8]);
        let end = pair.end(Side::Client);
        end.read(&[piece(own, 0, 8)], theirs.remote().at(0), Some(1)).expect("post");
        end.ring().expect("ring");
        before_completion(pair, || (bytes(own, 0, 1) == [9]).then_some(()))
            .expect("it shows in memory first");
        let begun = pair.client.transport.now();
        pair.work(Side::Client, 1);
        pair.client.transport.now() - begun > Duration::from_micros(20)
    });
}

#[test]
fn a_post_without_a_ring_may_or_may_not_take_effect() {
    sometimes(|pair, _, theirs| {
        let end = pair.end(Side::Client);
        end.write(Payload::Inline(&[1]), theirs.remote().at(0), None, Some(1)).expect("post");
        let until = pair.client.transport.now() + Duration::from_millis(10);
        pair.until("time to pass", |pair| (pair.client.transport.now() >= until).then_some(()));
        bytes(theirs, 0, 1) == [1]
    });
}

#[test]
fn what_was_on_its_way_when_the_connection_broke_happens_wholly_in_part_or_not() {
    let fates = found(|pair, own, theirs| {
        own.memory().write(0, &[1; LEN]);
        let end = pair.end(Side::Client);
        end.write(Payload::Gather(&[piece(own, 0, LEN)]), theirs.remote().at(0), None, Some(1))
            .expect("post");
        end.ring().expect("ring");
        end.disconnect();
        let (client, server) = (pair.to_server[0].id(), pair.to_client[0].id());
        assert_eq!(pair.end_of(Side::Client, client).0, [(1, Err(WorkError::Flushed))]);
        pair.end_of(Side::Server, server);
        let seen = bytes(theirs, 0, LEN);
        (seen.contains(&0), seen.contains(&1))
    });
    assert_eq!(fates, BTreeSet::from([(true, false), (true, true), (false, true)]));
}

#[test]
fn a_region_registered_late_is_out_of_reach() {
    let results = found(|pair, own, _| {
        let late = pair.region(Side::Server, LEN, Access::RemoteWrite);
        let end = pair.end(Side::Client);
        end.read(&[piece(own, 0, 8)], late.remote().at(0), Some(1)).expect("post");
        end.ring().expect("ring");
        let client = pair.to_server[0].id();
        pair.end_of(Side::Client, client).0 == [(1, Err(WorkError::RemoteAccess))]
    });
    assert_eq!(results, BTreeSet::from([true]));
}

#[test]
fn without_a_receive_buffer_a_sender_waits_or_loses_the_connection() {
    sometimes(|pair, _, _| {
        let count = EndpointConfig::default().receive_buffers;
        for _ in 0..=count {
            pair.end(Side::Client).send(Payload::Inline(b"one too many"), None, None).expect("post");
        }
        pair.end(Side::Client).ring().expect("ring");
        let mut held = Vec::new();
        for _ in 0..count {
            match pair.next(Side::Server) {
                Completion::Received { buffer, .. } => held.push(buffer),
                other => panic!("expected a message, found {other:?}"),
            }
        }
        let until = pair.client.transport.now() + Duration::from_millis(20);
        pair.until("time to pass", |pair| (pair.client.transport.now() >= until).then_some(()));
        for buffer in held {
            pair.server.endpoint.release(buffer);
        }
        match pair.next(Side::Server) {
            Completion::Received { buffer, .. } => {
                pair.server.endpoint.release(buffer);
                true
            }
            Completion::Disconnected { .. } => {
                let client = pair.to_server[0].id();
                assert_eq!(pair.end_of(Side::Client, client).1, WorkError::ReceiverNotReady);
                false
            }
            other => panic!("expected a message or the end, found {other:?}"),
        }
    });
}

#[test]
fn a_late_line_of_an_earlier_write_does_not_undo_a_later_one() {
    // Here the contract is strong; the events are not: a WRITE posted earlier lands later.
    let last = found(|pair, own, theirs| {
        own.memory().write(0, &[1; LEN]);
        let end = pair.end(Side::Client);
        end.write(Payload::Gather(&[piece(own, 0, LEN)]), theirs.remote().at(0), None, None).expect("post");
        end.write(Payload::Inline(&[2; 10]), theirs.remote().at(60), None, Some(1)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, 1);
        let early = bytes(theirs, 60, 10) == [2; 10] && bytes(theirs, 0, 60) == [0; 60];
        let until = pair.client.transport.now() + Duration::from_millis(5);
        pair.until("time to pass", |pair| (pair.client.transport.now() >= until).then_some(()));
        let mut expected = [1; LEN];
        expected[60..70].fill(2);
        assert!(bytes(theirs, 0, LEN) == expected, "a late line undid a later WRITE");
        early
    });
    assert!(last.contains(&true), "no seed let the later WRITE land first");
}
