//! Nothing is kept of what is over: of connections that were made, refused or broken, and of senders that were killed.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use super::{
    Holdings, Posts, Rig, Role, Side,
    pair::{Background, Host, PATIENCE, Pair},
    race::all_buffers_are_there,
    victim::SENDERS,
};
use crate::{
    address::Address,
    error::Error,
    transport::{
        Completion, Connection, Endpoint, EndpointConfig, Listener, Payload, Request, Runtime, Signal,
        Transport,
    },
};

/// KiB by which memory may grow while connections come and go: what threads and allocators keep.
const SLACK: u64 = 2048;

/// What becomes of one who connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Nobody listens.
    Nobody,
    /// The server refuses.
    Refused,
    /// The server drops the request.
    Unheard,
    /// It connects, says something, and disconnects.
    ClientLeaves,
    /// The same; then the server drops its end.
    ServerLeaves,
    /// The same; then both drop their ends.
    BothLeave,
}

impl Turn {
    const ALL: [Turn; 8] = {
        use Turn::*;
        [ClientLeaves, ServerLeaves, BothLeave, Refused, ClientLeaves, Unheard, ServerLeaves, Nobody]
    };

    fn of(round: u32) -> Self {
        Self::ALL[round as usize % Self::ALL.len()]
    }
}

/// Two hosts, one of which listens for as long as it is told.
struct Turnstile<R: Rig> {
    client: Host<R::Transport>,
    server: Host<R::Transport>,
    accepted: Arc<Mutex<VecDeque<<R::Transport as Transport>::Connection>>>,
}

/// Private data that tells the server to stop.
const LAST: &[u8] = b"last";

/// Thousands of connections, in every way to end, or not to begin: afterwards the hosts hold what they held before.
pub(super) fn connects<R: Rig>(rig: &R) {
    let config = EndpointConfig {
        receive_buffers: 8,
        receive_size: 64,
        send_depth: 4,
        connections: 4,
        ..EndpointConfig::default()
    };
    let [client, server] = [Side::Client, Side::Server].map(|side| Host::new(rig.host(side), &config));
    let mut listener = server.transport.listen(&rig.address(0)).expect("listen");
    let address = rig.dial(listener.address());
    let accepted = Arc::new(Mutex::new(VecDeque::new()));
    let acceptor = Background::start(&server.transport, {
        let (attach, accepted) = (server.endpoint.attach(), Arc::clone(&accepted));
        move || loop {
            let request = listener.accept(PATIENCE).expect("accept").expect("nobody connects");
            match request.private_data() {
                LAST => return request.reject(b""),
                b"refuse" => request.reject(b"no"),
                b"drop" => drop(request),
                _ => {
                    let connection = request.accept(&attach, b"yes").expect("accept");
                    accepted.lock().expect("the accepted ones").push_back(connection);
                }
            }
        }
    });
    let mut turnstile = Turnstile::<R> { client, server, accepted };
    let rounds = rig.effort().connects;
    let never = rig.dial(&rig.address(1));
    let mut turn = |round| {
        turnstile.turn(Turn::of(round), if Turn::of(round) == Turn::Nobody { &never } else { &address })
    };
    // What is made once, and what is kept for later.
    (0..rounds / 10 + 8).for_each(&mut turn);
    let before = rig.holdings();
    (0..rounds).for_each(&mut turn);
    turnstile.settled(rig, &before);
    let last = turnstile.connect(&address, LAST);
    assert!(
        matches!(last, Err(Error::Refused { .. })),
        "expected a refusal, found {:?}",
        last.map(|_| "a connection")
    );
    acceptor.join();
}

impl<R: Rig> Turnstile<R> {
    fn connect(
        &self,
        address: &Address,
        data: &[u8],
    ) -> Result<<R::Transport as Transport>::Connection, Error> {
        let attach = self.client.endpoint.attach();
        self.client.transport.connect(&attach, address, data, PATIENCE).map(|(connection, _)| connection)
    }

    fn turn(&mut self, turn: Turn, address: &Address) {
        let data: &[u8] = match turn {
            Turn::Refused => b"refuse",
            Turn::Unheard => b"drop",
            _ => b"",
        };
        let mut to_server = match (turn, self.connect(address, data)) {
            (Turn::Nobody, Err(Error::Unreachable { .. })) => return,
            (Turn::Refused | Turn::Unheard, Err(Error::Refused { .. })) => return,
            (Turn::ClientLeaves | Turn::ServerLeaves | Turn::BothLeave, Ok(connection)) => connection,
            (turn, other) => panic!("{turn:?}: found {:?}", other.map(|_| "a connection")),
        };
        to_server.send(Payload::Inline(b"hello"), None, Some(1)).expect("post");
        to_server.ring().expect("ring");
        self.until("the completion", |turnstile| {
            matches!(turnstile.client.take()?, Completion::Work { id: 1, result: Ok(()), .. }).then_some(())
        });
        self.until("the message", |turnstile| {
            let Completion::Received { buffer, .. } = turnstile.server.take()? else {
                panic!("expected a message")
            };
            assert_eq!(turnstile.server.endpoint.message(&buffer), b"hello");
            turnstile.server.endpoint.release(buffer);
            Some(())
        });
        let accepted = Arc::clone(&self.accepted);
        let to_client =
            self.until("the other end", |_| accepted.lock().expect("the accepted ones").pop_front());
        let mut kept = None;
        match turn {
            Turn::ClientLeaves => {
                to_server.disconnect();
                kept = Some((to_server, to_client));
            }
            Turn::ServerLeaves => {
                drop(to_client);
                self.end(Side::Client);
                drop(to_server);
                return self.end(Side::Server);
            }
            _ => drop((to_server, to_client)),
        }
        [Side::Client, Side::Server].into_iter().for_each(|side| self.end(side));
        drop(kept);
    }

    fn end(&mut self, side: Side) {
        self.until("the end", |turnstile| {
            let host = if side == Side::Client { &mut turnstile.client } else { &mut turnstile.server };
            let found = host.take()?;
            assert!(
                matches!(found, Completion::Disconnected { .. }),
                "expected the end at the {side:?}, found {found:?}"
            );
            Some(())
        });
    }

    fn until<X>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<X>) -> X {
        let begun = self.client.transport.now();
        let mut turn = 0;
        loop {
            self.client.poll();
            self.server.poll();
            if let Some(found) = done(self) {
                return found;
            }
            assert!(self.client.transport.now() < begun + PATIENCE, "waited {PATIENCE:?} for {what}");
            self.client.transport.relax(turn);
            turn += 1;
        }
    }

    /// Waits until the hosts hold no more than they held before: some things are given back a little later. (Less is possible: some may not
    /// have been given back when they were counted first.)
    fn settled(&mut self, rig: &R, before: &Holdings) {
        let begun = self.client.transport.now();
        let signal = self.client.transport.signal();
        loop {
            let now = rig.holdings();
            let Some(more) = now.exceeds(before, SLACK) else { return };
            let waited = self.client.transport.now() - begun;
            assert!(waited < PATIENCE, "there are more {more}: {before:?} became {now:?}");
            [&mut self.client, &mut self.server].into_iter().for_each(|host| assert_eq!(host.poll(), 0));
            signal.wait(signal.epoch(), PATIENCE / 1000);
        }
    }
}

/// Senders are killed in the midst of their messages, again and again: each receive buffer of their peer is still there.
pub(super) fn killed_senders<R: Rig>(rig: &R) {
    // Fewer buffers than senders, and none spare: a lost one shows.
    const BUFFERS: usize = 7;
    const PROCESSES: usize = 2;
    let effort = rig.effort();
    let config = EndpointConfig {
        receive_buffers: BUFFERS,
        receive_size: effort.message,
        send_depth: 1,
        connections: PROCESSES * SENDERS + 1,
        ..EndpointConfig::default()
    };
    let small = EndpointConfig {
        send_depth: BUFFERS,
        receive_buffers: 1,
        receive_size: 64,
        ..EndpointConfig::default()
    };
    let mut pair = Pair::new(rig, &small, &config);
    let mut listener = pair.server.transport.listen(&rig.address(1)).expect("listen");
    let address = rig.dial(listener.address());
    let (mut dead, mut messages) = (0, 0);
    while dead < effort.deaths {
        let victims: Vec<_> = (0..PROCESSES).map(|_| rig.start(Role::Sends, &address)).collect();
        let attach = pair.server.endpoint.attach();
        let accept = Background::start(&pair.server.transport, move || {
            let one = |_| {
                let request = listener.accept(PATIENCE).expect("accept").expect("a sender");
                request.accept(&attach, b"").expect("accept")
            };
            let ends: Vec<_> = (0..PROCESSES * SENDERS).map(one).collect();
            (listener, ends)
        });
        // Whoever finds no buffer may have given up before it is killed.
        let mut ended = 0;
        // Each time after another number of messages.
        let enough = messages + SENDERS + dead * 7 % 23;
        println!("{messages} messages, {dead} dead");
        pair.until("messages of the living", |pair| {
            take_in(pair, &mut messages, &mut ended);
            (messages >= enough || ended == PROCESSES * SENDERS).then_some(())
        });
        let (back, ends) = accept.join();
        listener = back;
        for victim in victims {
            rig.kill(victim);
        }
        pair.until("the ends of the dead", |pair| {
            take_in(pair, &mut messages, &mut ended);
            (ended == PROCESSES * SENDERS).then_some(())
        });
        dead += PROCESSES * SENDERS;
        drop(ends);
    }
    assert!(
        messages > dead / 2,
        "{messages} messages of {dead} senders: they did not die in the midst of them"
    );
    pair.connect();
    all_buffers_are_there(&mut pair, Side::Server, BUFFERS);
}

/// Takes what has come from senders: messages, whose buffers it gives back, and their ends.
fn take_in<R: Rig>(pair: &mut Pair<'_, R>, messages: &mut usize, ended: &mut usize) {
    while let Some(completion) = pair.server.take() {
        match completion {
            Completion::Received { buffer, .. } => {
                pair.server.endpoint.release(buffer);
                *messages += 1;
            }
            Completion::Disconnected { .. } => *ended += 1,
            other => panic!("expected messages and ends, found {other:?}"),
        }
    }
}
