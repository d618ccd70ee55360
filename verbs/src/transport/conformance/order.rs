//! What is visible when: the memory rules, as far as a test can see them broken.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use super::{
    Posts, Rig, Side,
    pair::{Background, End, Host, PATIENCE, Pair, RegionOf, bytes, pattern, piece},
};
use crate::transport::{
    Access, Completion, Connection, Endpoint, EndpointConfig, Payload, PostError, Region, RemoteAddress,
    Runtime, Sge, Signal,
};

/// Rounds in flight at once: each has a part of the target region of its own.
const PARTS: usize = 8;
const PART: usize = 64 << 10;
/// WRITEs of one round, as (offset within the part, length); the last is the one that closes.
const WRITES: [(usize, usize); 5] = [(60_000, 8), (0, 4096), (8192, 40_000), (5000, 1), (56_000, 64)];

pub(super) fn immediates_close_writes<R: Rig>(rig: &R) {
    rounds_closed(rig, |end, payload, remote, round| {
        end.write(payload, remote, Some(round), Some(u64::from(round)))
    });
}

pub(super) fn messages_close_writes<R: Rig>(rig: &R) {
    rounds_closed(rig, |end, payload, remote, round| {
        end.write(payload, remote, None, None)?;
        end.send(Payload::Inline(b"closed"), Some(round), Some(u64::from(round)))
    });
}

/// Rounds of WRITEs, closed by `close`: when the close is polled, all of the round must be there. Up to
/// `PARTS` rounds are on their way at once.
fn rounds_closed<R: Rig>(
    rig: &R,
    close: impl Fn(&mut End<R>, Payload<'_, RegionOf<R>>, RemoteAddress, u32) -> Result<(), PostError>,
) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, PARTS * PART, Access::RemoteWrite);
    let own = pair.region(Side::Client, PARTS * PART, Access::Local);
    pair.connect();
    let rounds = rig.effort().rounds;
    let (mut posted, mut completed, mut checked) = (0, 0, 0);
    while checked < rounds || completed < rounds {
        // A part is used again once its last round is both checked and complete.
        while posted < rounds && posted < checked.min(completed) + PARTS as u32 {
            let part = posted as usize % PARTS * PART;
            own.memory().write(part, &pattern(u64::from(posted), PART));
            let end = pair.end(Side::Client);
            for (i, (offset, length)) in WRITES.into_iter().enumerate() {
                let payload = [piece(&own, part + offset, length)];
                let remote = theirs.remote().at((part + offset) as u64);
                if i + 1 < WRITES.len() {
                    end.write(Payload::Gather(&payload), remote, None, None).expect("post");
                } else {
                    close(end, Payload::Gather(&payload), remote, posted).expect("post");
                }
            }
            end.ring().expect("ring");
            posted += 1;
        }
        let (side, completion) = pair.until("a round to be closed", |pair| {
            let sides = [Side::Server, Side::Client];
            sides.into_iter().find_map(|side| pair.host(side).take().map(|found| (side, found)))
        });
        let immediate = match completion {
            Completion::Work { id, result: Ok(()), .. } if side == Side::Client => {
                assert_eq!(id, u64::from(completed));
                completed += 1;
                continue;
            }
            Completion::WriteImmediate { immediate, .. } => immediate,
            Completion::Received { buffer, immediate, .. } => {
                pair.server.endpoint.release(buffer);
                immediate.expect("the immediate of the message")
            }
            other => panic!("expected the close of a round, found {other:?}"),
        };
        assert_eq!(immediate, checked, "the rounds arrived out of order");
        let part = checked as usize % PARTS * PART;
        let expected = pattern(u64::from(checked), PART);
        for (offset, length) in WRITES {
            assert!(
                bytes(&theirs, part + offset, length) == expected[offset..offset + length],
                "round {checked}: the WRITE of {length} bytes at {offset} is not visible"
            );
        }
        checked += 1;
    }
}

/// A thread of the server's host looks at memory when it is told that the READ is complete: it must see the WRITEs.
pub(super) fn reads_prove_writes<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, 64 << 10, Access::RemoteWrite);
    let own = pair.region(Side::Client, 64 << 10, Access::Local);
    pair.connect();
    let rounds = u64::from(rig.effort().rounds);
    let signal = pair.server.transport.signal();
    let (proved, looked) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let looker = Background::start(&pair.server.transport.clone(), {
        let (signal, proved, looked, theirs) =
            (signal.clone(), Arc::clone(&proved), Arc::clone(&looked), theirs.clone());
        move || {
            for round in 1..=rounds {
                loop {
                    let seen = signal.epoch();
                    if proved.load(Ordering::Acquire) >= round {
                        break;
                    }
                    signal.wait(seen, PATIENCE);
                }
                let expected = pattern(round, 16 << 10);
                assert_eq!(theirs.memory().load(0), round, "a WRITE before the READ is not visible");
                assert!(bytes(&theirs, 4096, 16 << 10) == expected, "a long WRITE is not visible");
                looked.store(round, Ordering::Release);
                signal.notify();
            }
        }
    });
    for round in 1..=rounds {
        own.memory().write(4096, &pattern(round, 16 << 10));
        let end = pair.end(Side::Client);
        let long = [piece(&own, 4096, 16 << 10)];
        end.write(Payload::Gather(&long), theirs.remote().at(4096), None, None).expect("post");
        end.write(Payload::Inline(&round.to_le_bytes()), theirs.remote().at(0), None, None).expect("post");
        end.read(&[piece(&own, 0, 8)], theirs.remote().at(32 << 10), Some(round)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, round);
        proved.store(round, Ordering::Release);
        signal.notify();
        pair.until("the looker", |_| (looked.load(Ordering::Acquire) == round).then_some(()));
    }
    looker.join();
}

pub(super) fn last_write_wins<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, 4096, Access::RemoteWrite);
    let own = pair.region(Side::Client, 4096, Access::Local);
    pair.connect();
    let mut value = 0_u64;
    for round in 0..rig.effort().rounds {
        let mut expected = bytes(&theirs, 0, 512);
        for _ in 0..20 {
            value += 1;
            // Overlapping places, not aligned to anything.
            let at = (value * 37 % 400) as usize;
            let data = pattern(value, 40);
            expected[at..at + 40].copy_from_slice(&data);
            let end = pair.end(Side::Client);
            end.write(Payload::Inline(&data), theirs.remote().at(at as u64), None, None).expect("post");
        }
        let end = pair.end(Side::Client);
        end.read(&[piece(&own, 0, 512)], theirs.remote().at(0), Some(u64::from(round))).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, u64::from(round));
        assert_eq!(bytes(&own, 0, 512), expected, "a READ did not see the WRITEs before it");
        assert_eq!(bytes(&theirs, 0, 512), expected, "an earlier WRITE won");
    }
}

pub(super) fn messages_and_immediates<R: Rig>(rig: &R) {
    let config = EndpointConfig { receive_buffers: 32, receive_size: 64, ..EndpointConfig::default() };
    let mut pair = Pair::alike(rig, &config);
    let theirs = pair.region(Side::Server, 64, Access::RemoteWrite);
    pair.connect();
    let (count, window) = (rig.effort().rounds, 32);
    let (mut posted, mut arrived) = (0, 0);
    while arrived < count {
        while posted < count && posted < arrived + window {
            let data = posted.to_le_bytes();
            let end = pair.end(Side::Client);
            let result = match posted % 3 {
                0 => end.send(Payload::Inline(&data), None, None),
                1 => end.send(Payload::Inline(&data), Some(!posted), None),
                _ => end.write(Payload::Inline(&data), theirs.remote().at(0), Some(!posted), None),
            };
            if result.is_err() {
                break;
            }
            posted += 1;
        }
        pair.end(Side::Client).ring().expect("ring");
        if posted == arrived {
            pair.until_room();
            continue;
        }
        if arrived % 3 == 2 {
            assert_eq!(pair.immediate(Side::Server), !arrived);
        } else {
            let (_, message, immediate) = pair.message(Side::Server);
            assert_eq!(message, arrived.to_le_bytes());
            assert_eq!(immediate, (arrived % 3 == 1).then_some(!arrived));
        }
        arrived += 1;
    }
}

/// Both halves of each word are the same number: a torn word shows.
fn word(value: u64) -> u64 {
    let half = value & 0xffff_ffff;
    half << 32 | half
}

fn assert_whole(word: u64) {
    assert_eq!(word >> 32, word & 0xffff_ffff, "the word {word:#018x} is torn");
}

const WORDS: usize = 256;

/// Starts a thread of the server's host that turns `body` until told to stop.
fn racer<R: Rig>(
    pair: &Pair<'_, R>,
    mut body: impl FnMut(u64) + Send + 'static,
) -> (Arc<AtomicBool>, Background<R::Transport, ()>) {
    let stop = Arc::new(AtomicBool::new(false));
    let transport = pair.server.transport.clone();
    let thread = Background::start(&pair.server.transport, {
        let stop = Arc::clone(&stop);
        move || {
            let mut turn = 0;
            while !stop.load(Ordering::Acquire) {
                body(turn);
                turn += 1;
                // Turn 0 of `relax` spins: the race stays hot, and a simulation goes on.
                transport.relax(0);
            }
        }
    });
    (stop, thread)
}

pub(super) fn words_are_read_whole<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, WORDS * 8, Access::RemoteRead);
    let own = pair.region(Side::Client, WORDS * 8, Access::Local);
    (0..WORDS).for_each(|i| theirs.memory().store(i * 8, 0));
    pair.connect();
    let (stop, racer) = racer(&pair, {
        let theirs = theirs.clone();
        move |turn| (0..WORDS).for_each(|i| theirs.memory().store(i * 8, word(turn)))
    });
    pair.until("the racer to write", |_| (theirs.memory().load(0) != 0).then_some(()));
    let mut newest = 0;
    for round in 0..u64::from(rig.effort().rounds) {
        let end = pair.end(Side::Client);
        end.read(&[piece(&own, 0, WORDS * 8)], theirs.remote().at(0), Some(round)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, round);
        for i in 0..WORDS {
            let word = own.memory().load(i * 8);
            assert_whole(word);
            newest = newest.max(word & 0xffff_ffff);
        }
    }
    stop.store(true, Ordering::Release);
    racer.join();
    assert!(newest > 0, "the READs never saw a word of the racing writer");
}

pub(super) fn words_are_written_whole<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, WORDS * 8, Access::RemoteWrite);
    let own = pair.region(Side::Client, WORDS * 8, Access::Local);
    (0..WORDS).for_each(|i| theirs.memory().store(i * 8, 0));
    pair.connect();
    let newest = Arc::new(AtomicU64::new(0));
    let (stop, racer) = racer(&pair, {
        let (theirs, newest) = (theirs.clone(), Arc::clone(&newest));
        move |_| {
            for i in 0..WORDS {
                let word = theirs.memory().load(i * 8);
                assert_whole(word);
                newest.fetch_max(word & 0xffff_ffff, Ordering::Relaxed);
            }
        }
    });
    let rounds = u64::from(rig.effort().rounds);
    for round in 1..=rounds {
        (0..WORDS).for_each(|i| own.memory().store(i * 8, word(round)));
        let end = pair.end(Side::Client);
        let payload = [piece(&own, 0, WORDS * 8)];
        end.write(Payload::Gather(&payload), theirs.remote().at(0), None, Some(round)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, round);
    }
    pair.until("the racer to see the last word", |_| {
        (newest.load(Ordering::Relaxed) == rounds).then_some(())
    });
    stop.store(true, Ordering::Release);
    racer.join();
}

/// Words of the case below, and where payloads of them begin in private memory: at no multiple of 8.
const FEW: usize = 4;
const ODD: usize = 13;

/// Words are whole in the peer's memory whatever the alignment of the own side. The peer's first byte is at a word: soft-RoCE
/// moves 8 bytes at a time from the first one on.
pub(super) fn words_of_odd_payloads_are_whole<R: Rig>(rig: &R) {
    odd_payloads_written(rig);
    odd_payloads_read(rig);
}

fn odd_payloads_written<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, (FEW + 2) * 8, Access::RemoteWrite);
    let own = pair.region(Side::Client, ODD + (FEW + 2) * 8, Access::Local);
    pair.connect();
    let newest = Arc::new(AtomicU64::new(0));
    let (stop, racer) = racer(&pair, {
        let (theirs, newest) = (theirs.clone(), Arc::clone(&newest));
        move |_| {
            for i in (0..64 * FEW).map(|i| i % FEW) {
                let word = theirs.memory().load(8 + i * 8);
                assert_whole(word);
                newest.fetch_max(word & 0xffff_ffff, Ordering::Relaxed);
            }
        }
    });
    let rounds = u64::from(rig.effort().rounds);
    for round in 1..=rounds {
        // All bytes of a word change, so that a torn one shows.
        let byte = if round == rounds { 0xff } else { round % 251 };
        let bytes = [byte as u8; ODD + (FEW + 1) * 8];
        own.memory().write(0, &bytes);
        // To the middle of the word behind: the words before it are whole.
        let payload = [piece(&own, ODD, FEW * 8 + 4)];
        let end = pair.end(Side::Client);
        end.write(Payload::Gather(&payload), theirs.remote().at(8), None, None).expect("post");
        for i in 0..FEW {
            let inline = Payload::Inline(&bytes[i + 1..i + 9]);
            end.write(inline, theirs.remote().at(8 + i as u64 * 8), None, None).expect("post");
        }
        end.write(Payload::Gather(&payload), theirs.remote().at(8), None, Some(round)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, round);
    }
    pair.until("the racer to see the last word", |_| {
        (newest.load(Ordering::Relaxed) == 0xffff_ffff).then_some(())
    });
    stop.store(true, Ordering::Release);
    racer.join();
}

fn odd_payloads_read<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, (FEW + 2) * 8, Access::RemoteRead);
    let own = pair.region(Side::Client, ODD + (FEW + 2) * 8, Access::Local);
    pair.connect();
    let (stop, racer) = racer(&pair, {
        let theirs = theirs.clone();
        move |turn| {
            for i in 0..64 * FEW as u64 {
                let byte = (turn + i / FEW as u64) % 251;
                theirs.memory().store(8 + i as usize % FEW * 8, u64::from_ne_bytes([byte as u8; 8]));
            }
        }
    });
    let fresh = u64::from_ne_bytes([0xee; 8]);
    pair.until("the racer to write", |_| (theirs.memory().load(8) != fresh).then_some(()));
    for round in 0..u64::from(rig.effort().rounds) {
        let end = pair.end(Side::Client);
        let into = [piece(&own, ODD, FEW * 8 + 4)];
        end.read(&into, theirs.remote().at(8), Some(round)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, round);
        for i in 0..FEW {
            let word = bytes(&own, ODD + i * 8, 8);
            assert!(word.iter().all(|&byte| byte == word[0]), "the word {word:?} is torn");
        }
    }
    stop.store(true, Ordering::Release);
    racer.join();
}

/// Lengths of the pieces of a list. All but the last end inside a word.
const PIECES: [usize; 4] = [3, 14, 1, 22];
const LISTED: usize = 5;
const _: () = assert!(PIECES[0] + PIECES[1] + PIECES[2] + PIECES[3] == LISTED * 8);

/// The pieces, each at a place of its own in private memory.
fn in_pieces<R>(region: &R) -> [Sge<'_, R>; PIECES.len()] {
    let places = [1, 64, 150, 201];
    std::array::from_fn(|i| piece(region, places[i], PIECES[i]))
}

/// Words are whole in the peer's memory that begin in one piece of a list and end in the next.
pub(super) fn words_in_two_pieces_are_whole<R: Rig>(rig: &R) {
    lists_written(rig);
    lists_read(rig);
}

fn lists_written<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, (LISTED + 2) * 8, Access::RemoteWrite);
    let own = pair.region(Side::Client, 256, Access::Local);
    pair.connect();
    let (stop, watcher) = racer(&pair, {
        let theirs = theirs.clone();
        move |_| {
            for i in 0..64 * LISTED {
                let word = theirs.memory().load(8 + i % LISTED * 8).to_ne_bytes();
                assert!(word.iter().all(|&byte| byte == word[0]), "the word {word:?} is torn by a WRITE");
            }
        }
    });
    for round in 0..u64::from(rig.effort().rounds) {
        own.memory().write(0, &[(round % 251) as u8; 256]);
        let end = pair.end(Side::Client);
        for signal in [None, None, None, Some(round)] {
            let payload = Payload::Gather(&in_pieces(&own));
            end.write(payload, theirs.remote().at(8), None, signal).expect("post");
        }
        end.ring().expect("ring");
        pair.work(Side::Client, round);
    }
    stop.store(true, Ordering::Release);
    watcher.join();
}

fn lists_read<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, (LISTED + 2) * 8, Access::RemoteRead);
    let own = pair.region(Side::Client, 256, Access::Local);
    pair.connect();
    let rounds = u64::from(rig.effort().rounds);
    let (stop, writer) = racer(&pair, {
        let theirs = theirs.clone();
        move |turn| {
            for i in 0..64 * LISTED {
                let byte = (turn + (i / LISTED) as u64) % 251;
                theirs.memory().store(8 + i % LISTED * 8, u64::from_ne_bytes([byte as u8; 8]));
            }
        }
    });
    let (mut changed, mut last, mut round) = (0, [0; 8], 0);
    let begun = pair.client.transport.now();
    while round < rounds || changed < 2 {
        assert!(pair.client.transport.now() < begun + PATIENCE, "the READs never race with the writer");
        let end = pair.end(Side::Client);
        end.read(&in_pieces(&own), theirs.remote().at(8), Some(round)).expect("post");
        end.ring().expect("ring");
        pair.work(Side::Client, round);
        let all: Vec<u8> =
            in_pieces(&own).iter().flat_map(|sge| bytes(&own, sge.offset, sge.length)).collect();
        for word in all.chunks_exact(8) {
            assert!(word.iter().all(|&byte| byte == word[0]), "the word {word:?} is torn by a READ");
        }
        changed += u64::from(all[..8] != last);
        last.copy_from_slice(&all[..8]);
        round += 1;
    }
    stop.store(true, Ordering::Release);
    writer.join();
}

/// Bytes that the third party READs.
const LEN: usize = 2000;

/// Rule 6 of three parties: an owner writes its memory and tells somebody; who is told sends a third party, which has an endpoint and a
/// connection of its own, to READ it.
pub(super) fn third_party<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let mut third = Host::new(rig.host(Side::Client), &EndpointConfig::default());
    let theirs = pair.region(Side::Server, LEN, Access::RemoteRead);
    let told = pair.region(Side::Client, 64, Access::RemoteWrite);
    let own = pair.region(Side::Client, LEN, Access::Local);
    told.memory().store(0, 0);
    pair.connect();
    std::mem::swap(&mut pair.client, &mut third);
    pair.connect();
    std::mem::swap(&mut pair.client, &mut third);
    let rounds = u64::from(rig.effort().rounds.min(500));
    let (learned, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let reader = Background::start(&pair.client.transport, {
        let end = pair.to_server.pop().expect("the third party's connection");
        let (remote, learned, done) = (theirs.remote().at(0), Arc::clone(&learned), Arc::clone(&done));
        move || third_reads::<R>(third, end, &own, remote, rounds, [&learned, &done])
    });
    for round in 1..=rounds {
        theirs.memory().write(0, &pattern(round, LEN));
        let end = pair.end(Side::Server);
        let word = Payload::Inline(&round.to_le_bytes());
        match round % 3 {
            0 => end.send(word, None, None),
            1 => end.write(word, told.remote().at(8), Some(round as u32), None),
            _ => end.write(word, told.remote().at(0), None, None),
        }
        .expect("post");
        end.ring().expect("ring");
        match round % 3 {
            0 => assert_eq!(pair.message(Side::Client).1, round.to_le_bytes()),
            1 => assert_eq!(pair.immediate(Side::Client), round as u32),
            _ => pair.until("the word that was written", |_| (told.memory().load(0) == round).then_some(())),
        }
        learned.store(round, Ordering::Release);
        pair.until("the third party", |_| (done.load(Ordering::Acquire) == round).then_some(()));
    }
    reader.join();
}

/// What the third party does: it READs when a round has been learned of, finds what was written before, and says that it is done.
fn third_reads<R: Rig>(
    mut third: Host<R::Transport>,
    mut end: End<R>,
    own: &RegionOf<R>,
    remote: RemoteAddress,
    rounds: u64,
    [learned, done]: [&AtomicU64; 2],
) {
    let transport = third.transport.clone();
    let (begun, mut turn) = (transport.now(), 0);
    for round in 1..=rounds {
        let mut wait = || {
            assert!(transport.now() < begun + 3 * PATIENCE, "the third party waits in round {round}");
            transport.relax(turn);
            turn += 1;
        };
        while learned.load(Ordering::Acquire) < round {
            wait();
        }
        end.read(&[piece(own, 0, LEN)], remote, Some(round)).expect("post");
        end.ring().expect("ring");
        while third.poll() == 0 {
            wait();
        }
        let completion = third.take();
        assert!(
            matches!(completion, Some(Completion::Work { id, result: Ok(()), .. }) if id == round),
            "{completion:?}"
        );
        assert!(bytes(own, 0, LEN) == pattern(round, LEN), "round {round}: the READ saw something older");
        done.store(round, Ordering::Release);
    }
}
