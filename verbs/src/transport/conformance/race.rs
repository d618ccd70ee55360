//! Handshakes that others disturb: strangers who stop half-way, and ends that part while they still greet each other.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use super::{
    Posts, Rig, Side,
    pair::{Background, End, Host, PATIENCE, Pair},
};
use crate::transport::{
    Completion, Connection, ConnectionId, Endpoint, EndpointConfig, Listener, Payload, PostError, Request,
    Runtime, Transport, WorkError,
};

/// Strangers at the door before anybody else comes.
const STRANGERS: usize = 15;
/// How long the others may take to connect. Were each stranger waited for until its time is over, five seconds, it would not do.
const SOON: Duration = Duration::from_secs(10);

/// Strangers stop at every step of a handshake, all of them at a time, while others connect.
pub(super) fn stalled_strangers<R: Rig>(rig: &R) {
    const OTHERS: usize = 8;
    /// Bytes of private data of the others; no stranger has as many.
    const NAME: usize = 40;
    let config = EndpointConfig { connections: 64, ..EndpointConfig::default() };
    let (client, mut server) =
        (Host::new(rig.host(Side::Client), &config), Host::new(rig.host(Side::Server), &config));
    let mut listener = server.transport.listen(&rig.address(0)).expect("listen");
    let address = rig.dial(listener.address());
    let stop = Arc::new(AtomicBool::new(false));
    // Strangers may have said all that a request needs, and be accepted: it is the provider's business to miss the rest. If they have
    // left by then, to accept them is an error.
    let acceptor = Background::start(&server.transport, {
        let (attach, stop) = (server.endpoint.attach(), Arc::clone(&stop));
        move || {
            let mut accepted = Vec::new();
            while !stop.load(Ordering::Acquire) {
                let Some(request) = listener.accept(Duration::from_millis(20)).expect("accept") else {
                    continue;
                };
                let data = request.private_data().to_vec();
                match request.accept(&attach, &data) {
                    Ok(connection) => accepted.push(connection),
                    Err(error) => assert!(data.len() != NAME, "accept: {error}"),
                }
            }
            accepted
        }
    });
    let steps = (0..).take_while(|&step| rig.stalled(&address, step).is_some()).count();
    let mut strangers: Vec<Box<dyn Send>> = Vec::new();
    let mut connections = Vec::new();
    for turn in 0..OTHERS {
        let more = if turn == 0 { 0..STRANGERS } else { turn..turn + 1 };
        strangers.extend(more.filter_map(|step| rig.stalled(&address, step % steps.max(1))));
        let name = [turn as u8; NAME];
        let attach = client.endpoint.attach();
        let (mut connection, reply) =
            client.transport.connect(&attach, &address, &name, SOON).expect("connect beside strangers");
        assert_eq!(reply, name);
        connection.send(Payload::Inline(&name), None, None).expect("post");
        connection.ring().expect("ring");
        connections.push(connection);
        hears(&mut server, &name);
    }
    drop(strangers);
    stop.store(true, Ordering::Release);
    assert!(acceptor.join().len() >= OTHERS);
}

/// Expects a message, whatever becomes of strangers that were accepted.
fn hears<T: Transport>(server: &mut Host<T>, expected: &[u8]) {
    let begun = server.transport.now();
    let mut turn = 0;
    loop {
        server.poll();
        match server.take() {
            Some(Completion::Received { buffer, .. }) => {
                assert_eq!(server.endpoint.message(&buffer), expected);
                return server.endpoint.release(buffer);
            }
            Some(Completion::Disconnected { .. }) => {}
            Some(other) => panic!("expected a message, found {other:?}"),
            None => assert!(server.transport.now() < begun + PATIENCE, "the message is lost"),
        }
        server.transport.relax(turn);
        turn += 1;
    }
}

/// What an end does as soon as it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum First {
    Posts,
    Disconnects,
    Drops,
}

type ListenerOf<R> = <<R as Rig>::Transport as Transport>::Listener;

/// What came of it, at the end that posted.
type Posted = Option<Result<(), WorkError>>;

const WORDS: &[u8] = b"the first words";

/// Does it, a moment later; returns the end unless it was dropped, and whether a message was taken.
fn begin<T: Transport>(
    transport: &T,
    mut end: T::Connection,
    first: First,
    pause: Duration,
) -> (Option<T::Connection>, bool) {
    let begun = transport.now();
    while transport.now() < begun + pause {
        transport.relax(0);
    }
    match first {
        First::Posts => {
            let posted = end.send(Payload::Inline(WORDS), Some(1), Some(1));
            // Taken, it completes, whatever the ring says.
            let _ = end.ring();
            assert!(matches!(posted, Ok(()) | Err(PostError::Disconnected)), "{posted:?}");
            (Some(end), posted.is_ok())
        }
        First::Disconnects => {
            end.disconnect();
            (Some(end), false)
        }
        First::Drops => (None, false),
    }
}

/// One end disconnects, or is dropped, at the moment of its making, while the other sends its first message: that arrives, whole and
/// before the end, or fails; it is never lost though its completion says that it arrived; and no buffer is lost.
pub(super) fn first_message<R: Rig>(rig: &R) {
    let config = EndpointConfig { receive_buffers: 8, receive_size: 64, ..EndpointConfig::default() };
    let mut pair = Pair::alike(rig, &config);
    let mut listener = Some(pair.server.transport.listen(&rig.address(1)).expect("listen"));
    let (mut arrived, mut failed) = (0, 0);
    for round in 0..rig.effort().rounds.min(240) {
        let firsts = [First::Posts, if round % 3 == 0 { First::Drops } else { First::Disconnects }];
        // Who connects posts, or who accepts does.
        let posts = if round % 2 == 0 { Side::Client } else { Side::Server };
        let [client, server] = if posts == Side::Client { firsts } else { [firsts[1], firsts[0]] };
        // The disconnect is a little later: then some messages arrive, and some do not.
        let mut pauses =
            [round / 2 % 5 * 4, round / 10 % 12 * 24].map(|micros| Duration::from_micros(micros.into()));
        if posts == Side::Server {
            pauses.reverse();
        }
        let (ids, taken) = race(&mut pair, rig, &mut listener, [client, server], pauses);
        let (work, messages) = both_ends(&mut pair, ids, posts);
        assert_eq!(work.is_some(), taken, "round {round}: a post that was taken completes, once");
        match work {
            Some(Ok(())) => assert_eq!(messages, 1, "round {round}: the completed message is lost"),
            Some(Err(_)) => failed += 1,
            None => assert_eq!(messages, 0, "round {round}: a message that was refused has arrived"),
        }
        arrived += messages;
    }
    println!("{arrived} messages arrived, {failed} failed");
    pair.connect();
    for side in [Side::Client, Side::Server] {
        all_buffers_are_there(&mut pair, side, config.receive_buffers);
    }
}

/// Makes a connection of which each end does what it is to do first. Returns the names of the ends, and whether a message was taken.
fn race<R: Rig>(
    pair: &mut Pair<'_, R>,
    rig: &R,
    listener: &mut Option<ListenerOf<R>>,
    firsts: [First; 2],
    pauses: [Duration; 2],
) -> ([ConnectionId; 2], bool) {
    let mut listening = listener.take().expect("it is given back");
    let address = rig.dial(listening.address());
    let accept = Background::start(&pair.server.transport, {
        let (attach, transport) = (pair.server.endpoint.attach(), pair.server.transport.clone());
        move || {
            let request = listening.accept(PATIENCE).expect("accept").expect("nobody connects");
            let end = request.accept(&attach, b"").expect("accept");
            (end.id(), begin(&transport, end, firsts[1], pauses[1]), listening)
        }
    });
    let transport = pair.client.transport.clone();
    let (end, _) =
        transport.connect(&pair.client.endpoint.attach(), &address, b"", PATIENCE).expect("connect");
    let id = end.id();
    let (client, taken) = begin(&transport, end, firsts[0], pauses[0]);
    let (server_id, (server, also), listening) = accept.join();
    *listener = Some(listening);
    let ids = [id, server_id];
    // They are kept until both have ended.
    pair.to_server.extend(client);
    pair.to_client.extend(server);
    (ids, taken || also)
}

/// Polls until both ends have ended. What became of the request, and how many messages came.
fn both_ends<R: Rig>(pair: &mut Pair<'_, R>, ids: [ConnectionId; 2], posts: Side) -> (Posted, u32) {
    let (mut work, mut messages, mut over) = (None, 0, [false; 2]);
    while over != [true; 2] {
        let (side, completion) = pair.until("both ends", |pair| {
            let sides = [Side::Client, Side::Server];
            sides.into_iter().find_map(|side| pair.host(side).take().map(|found| (side, found)))
        });
        assert!(!over[side as usize], "after the end of the {side:?}'s end: {completion:?}");
        match completion {
            Completion::Work { connection, id: 1, result } if side == posts && work.is_none() => {
                assert_eq!(connection, ids[side as usize]);
                work = Some(result);
            }
            Completion::Received { connection, buffer, immediate: Some(1) } if side != posts => {
                assert_eq!(connection, ids[side as usize]);
                let endpoint = &mut pair.host(side).endpoint;
                assert_eq!(endpoint.message(&buffer), WORDS);
                endpoint.release(buffer);
                messages += 1;
            }
            Completion::Disconnected { connection, .. } => {
                assert_eq!(connection, ids[side as usize]);
                over[side as usize] = true;
            }
            other => panic!("at the {side:?}: {other:?}"),
        }
    }
    pair.to_server.clear();
    pair.to_client.clear();
    (work, messages)
}

/// Expects that this side can hold as many messages at a time as it has receive buffers. Releases them.
pub(super) fn all_buffers_are_there<R: Rig>(pair: &mut Pair<'_, R>, side: Side, buffers: usize) {
    let mut held = Vec::new();
    for i in 0..buffers {
        let end: &mut End<R> = match side.other() {
            Side::Client => pair.to_server.last_mut().expect("a connection"),
            Side::Server => pair.to_client.last_mut().expect("a connection"),
        };
        end.send(Payload::Inline(&[i as u8]), None, None).expect("post");
        end.ring().expect("ring");
        let begun = pair.client.transport.now();
        let completion = pair.until("a message", |pair| {
            let found = pair.host(side).take();
            let waited = pair.client.transport.now() - begun;
            assert!(
                found.is_some() || waited < PATIENCE / 2,
                "{} of {buffers} receive buffers are lost",
                buffers - i
            );
            found
        });
        match completion {
            Completion::Received { buffer, .. } => {
                assert_eq!(pair.host(side).endpoint.message(&buffer), [i as u8]);
                held.push(buffer);
            }
            other => panic!("expected a message, found {other:?}"),
        }
    }
    held.into_iter().for_each(|buffer| pair.host(side).endpoint.release(buffer));
}
