//! Peers who are not there for a while: they do not look, they are stopped, or the network between is gone. None of them is dead.

use std::time::Duration;

use super::{
    Posts, Rig, Side,
    pair::{PATIENCE, Pair, Work, bytes, decode, pattern, piece},
    victim::{Role, Survivor, VICTIM_MEMORY},
};
use crate::{
    memory::Memory,
    transport::{
        Access, Completion, Connection, Endpoint, EndpointConfig, Payload, Region, Runtime, Signal, Transport,
    },
};

/// Lets this much time pass.
fn sleep<T: Transport>(transport: &T, time: Duration) {
    let until = transport.now() + time;
    let signal = transport.signal();
    while transport.now() < until {
        signal.wait(signal.epoch(), until.saturating_sub(transport.now()));
    }
}

/// The receiver does not poll for longer than the two seconds in which a dead peer is found out. Meanwhile its peer sends as much as
/// there are buffers, and goes on to WRITE and READ. Then everything is there, in order.
pub(super) fn sender_ahead<R: Rig>(rig: &R) {
    const BUFFERS: u32 = 64;
    const STEPS: u32 = 32;
    const PAUSE: Duration = Duration::from_millis(90);
    let config =
        EndpointConfig { receive_buffers: BUFFERS as usize, receive_size: 256, ..EndpointConfig::default() };
    let mut pair = Pair::alike(rig, &config);
    let theirs = pair.region(Side::Server, 4096, Access::RemoteWrite);
    let own = pair.region(Side::Client, 4096, Access::Local);
    pair.connect();
    let transport = pair.client.transport.clone();
    for step in 0..STEPS {
        let end = pair.end(Side::Client);
        for i in 2 * step..2 * step + 2 {
            if i % 3 == 0 {
                end.write(Payload::Inline(&i.to_le_bytes()), theirs.remote().at(8), Some(i), None)
                    .expect("post");
            } else {
                end.send(Payload::Inline(&i.to_le_bytes()), Some(i), None).expect("post");
            }
        }
        end.write(Payload::Inline(&step.to_le_bytes()), theirs.remote().at(0), None, None).expect("post");
        end.read(&[piece(&own, 0, 4)], theirs.remote().at(0), Some(step.into())).expect("post");
        end.ring().expect("ring");
        let begun = transport.now();
        let mut turn = 0;
        while pair.client.poll() == 0 {
            assert!(transport.now() < begun + PATIENCE, "request {step} waits for a poll of the receiver");
            transport.relax(turn);
            turn += 1;
        }
        // Not by `Pair::work`, which polls both hosts.
        let completion = pair.client.take();
        let expected = u64::from(step);
        assert!(
            matches!(completion, Some(Completion::Work { id, result: Ok(()), .. }) if id == expected),
            "{completion:?}"
        );
        assert_eq!(bytes(&own, 0, 4), step.to_le_bytes());
        sleep(&transport, PAUSE);
    }
    for i in 0..BUFFERS {
        if i % 3 == 0 {
            assert_eq!(pair.immediate(Side::Server), i);
        } else {
            let (_, message, immediate) = pair.message(Side::Server);
            assert_eq!((message.as_slice(), immediate), (i.to_le_bytes().as_slice(), Some(i)));
        }
    }
    // The connection is as good as new.
    for side in [Side::Client, Side::Server] {
        let end = pair.end(side);
        end.send(Payload::Inline(b"here again"), None, Some(100)).expect("post");
        end.ring().expect("ring");
        assert_eq!(pair.message(side.other()).1, b"here again");
        pair.work(side, 100);
    }
    pair.silence();
}

/// How long a process is stopped: less than after which it may be taken for dead.
const STOPPED: Duration = Duration::from_secs(1);

/// A process that is stopped for less than two seconds costs time and nothing else, and holds up nobody but who waits for it.
pub(super) fn stopped_process<R: Rig>(rig: &R) {
    let mut survivor = Survivor::meet(rig, Role::Connects);
    let transport = survivor.transport.clone();
    let memory = Memory::new("survivor", VICTIM_MEMORY).expect("memory");
    let own = transport.register(&memory, Access::Local).expect("register");
    let Completion::Received { buffer, .. } = survivor.next() else { panic!("expected the victim's hello") };
    let remote = decode(survivor.endpoint.message(&buffer));
    survivor.endpoint.release(buffer);
    if !rig.stop(&survivor.victim) {
        return rig.kill(survivor.victim);
    }
    let begun = transport.now();
    let data = pattern(5, 4096);
    memory.write(0, &data);
    let end = &mut survivor.connection;
    for id in 0..30 {
        let posted = match id % 3 {
            0 => end.write(Payload::Gather(&[piece(&own, 0, 4096)]), remote.at(4096), None, Some(id)),
            1 => end.read(&[piece(&own, 8192, 4096)], remote.at(4096), Some(id)),
            _ => end.send(Payload::Gather(&[piece(&own, 0, 200)]), None, Some(id)),
        };
        posted.expect("post");
    }
    end.ring().expect("ring");
    // Others meet and talk, on the same host.
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    pair.connect();
    let mut works: Vec<Work> = Vec::new();
    let mut round = 0_u64;
    while transport.now() < begun + STOPPED {
        let end = pair.end(Side::Client);
        end.send(Payload::Inline(&round.to_le_bytes()), None, None).expect("post");
        end.ring().expect("ring");
        assert_eq!(pair.message(Side::Server).1, round.to_le_bytes());
        survivor.take_works(&mut works);
        round += 1;
        sleep(&transport, Duration::from_millis(1));
    }
    rig.resume(&survivor.victim);
    let mut turn = 0;
    while works.len() < 30 {
        assert!(transport.now() < begun + PATIENCE, "after the stop: {works:?}");
        survivor.take_works(&mut works);
        transport.relax(turn);
        turn += 1;
    }
    assert_eq!(works, (0..30).map(|id| (id, Ok(()))).collect::<Vec<_>>());
    assert!(bytes(&own, 8192, 4096) == data, "the READs did not see the WRITEs before them");
    rig.kill(survivor.victim);
}

impl<R: Rig> Survivor<R> {
    /// The next completion.
    fn next(&mut self) -> Completion {
        let begun = self.transport.now();
        let (mut seen, mut turn) = (Vec::new(), 0);
        while self.endpoint.poll(&mut seen) == 0 {
            assert!(self.transport.now() < begun + PATIENCE, "the victim says nothing");
            self.transport.relax(turn);
            turn += 1;
        }
        assert_eq!(seen.len(), 1, "{seen:?}");
        seen.remove(0)
    }

    /// Takes completed requests, and nothing else.
    fn take_works(&mut self, works: &mut Vec<Work>) {
        let mut seen = Vec::new();
        self.endpoint.poll(&mut seen);
        for completion in seen {
            match completion {
                Completion::Work { id, result, .. } => works.push((id, result)),
                other => panic!("a stopped process is taken for a dead one: {other:?}"),
            }
        }
    }
}

/// For how long the network is gone.
const OUTAGE: Duration = Duration::from_secs(1);
/// Requests on their way meanwhile; each third is a message.
const REQUESTS: u64 = 30;

/// The network between the hosts loses everything for a second. A connection may outlive that, or end. Either way it keeps the rules:
/// requests complete in order, and once; what completed has happened, in order, and nothing twice. And others can be made at once.
pub(super) fn flap<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let theirs = pair.region(Side::Server, 8192, Access::RemoteWrite);
    let own = pair.region(Side::Client, 8192, Access::Local);
    for posts_before_the_cut in [true, false] {
        pair.connect();
        let mut cut = None;
        if !posts_before_the_cut {
            cut = rig.cut();
        }
        let end = pair.end(Side::Client);
        for id in 0..REQUESTS {
            let gather = [piece(&own, 128 * id as usize, 128)];
            let posted = match id % 3 {
                0 => end.write(Payload::Gather(&gather), theirs.remote().at(128 * id), None, Some(id)),
                1 => end.send(Payload::Inline(&id.to_le_bytes()), None, Some(id)),
                _ => end.read(&[piece(&own, 4096, 128)], theirs.remote().at(128 * id), Some(id)),
            };
            posted.expect("post");
        }
        let _ = end.ring();
        if posts_before_the_cut {
            cut = rig.cut();
        }
        let Some(cut) = cut else { return };
        let mut flapped = Flapped::default();
        let until = pair.client.transport.now() + OUTAGE;
        while pair.client.transport.now() < until {
            flapped.look(&mut pair);
            sleep(&pair.client.transport.clone(), Duration::from_millis(1));
        }
        drop(cut);
        pair.until("all requests, or both ends", |pair| {
            flapped.look(pair);
            flapped.is_over().then_some(())
        });
        flapped.check();
        let (client, server) = (pair.to_server.remove(0), pair.to_client.remove(0));
        println!("ended: {:?}, after {} of {REQUESTS} requests", flapped.over, flapped.works.len());
        if flapped.over == [false; 2] {
            let ids = (client.id(), server.id());
            drop(client);
            pair.end_of(Side::Server, ids.1);
            pair.end_of(Side::Client, ids.0);
        }
    }
    pair.connect();
    let end = pair.end(Side::Client);
    end.send(Payload::Inline(b"and on"), None, Some(1)).expect("post");
    end.ring().expect("ring");
    assert_eq!(pair.message(Side::Server).1, b"and on");
    pair.work(Side::Client, 1);
}

/// What came of the requests of a connection whose network was gone.
#[derive(Debug, Default)]
struct Flapped {
    works: Vec<Work>,
    messages: Vec<u64>,
    over: [bool; 2],
}

impl Flapped {
    fn look<R: Rig>(&mut self, pair: &mut Pair<'_, R>) {
        for side in [Side::Client, Side::Server] {
            pair.host(side).poll();
            while let Some(completion) = pair.host(side).take() {
                assert!(!self.over[side as usize], "after the end: {completion:?}");
                match completion {
                    Completion::Work { id, result, .. } => self.works.push((id, result)),
                    Completion::Received { buffer, .. } => {
                        let endpoint = &mut pair.host(side).endpoint;
                        let word = endpoint.message(&buffer).try_into().expect("8 bytes");
                        self.messages.push(u64::from_le_bytes(word));
                        endpoint.release(buffer);
                    }
                    Completion::Disconnected { .. } => self.over[side as usize] = true,
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    fn is_over(&self) -> bool {
        let all = self.works.len() as u64 >= REQUESTS && self.messages.len() as u64 >= REQUESTS / 3;
        self.over == [true; 2] || self.over == [false; 2] && all
    }

    fn check(&self) {
        let ids: Vec<u64> = self.works.iter().map(|work| work.0).collect();
        assert_eq!(ids, (0..REQUESTS).collect::<Vec<_>>(), "each request completes once, in order");
        let good = self.works.iter().take_while(|work| work.1.is_ok()).count();
        assert!(
            self.works[good..].iter().all(|work| work.1.is_err()),
            "a success after a failure: {:?}",
            self.works
        );
        let sent: Vec<u64> = (0..REQUESTS).filter(|id| id % 3 == 1).collect();
        let expected = &sent[..sent.len().min(self.messages.len())];
        assert_eq!(self.messages, expected, "messages arrive in order, and once");
        let completed = sent.iter().filter(|id| **id < good as u64).count();
        assert!(
            self.messages.len() >= completed,
            "{completed} messages completed, {:?} arrived",
            self.messages
        );
    }
}
