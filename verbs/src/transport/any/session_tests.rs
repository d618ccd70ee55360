//! What a session is for its two ends: lanes made together, lanes that end with it, and who is silent.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Instant,
};

use rustix::process::{Pid, Signal, kill_process};

use super::{
    line::{Bell, Ear, Leash, Line},
    raw::Raw,
    tests::{PATIENCE, Server, client, key, next, parse},
    *,
};
use crate::{
    session::wire::{LaneRails, MAX_LANES, Message},
    transport::{Completion, Connection, Endpoint, Listener, Payload, Request, conformance::Posts},
};

/// What becomes of `count` lanes of a client's that are asked for at once, of which the server's program refuses number `refused`.
fn connect_many(
    server: &mut Server,
    (host, endpoint): &(Host, HostEndpoint),
    count: usize,
    refused: Option<usize>,
) -> Result<Vec<Connected<HostConnection>>, Error> {
    let (address, attach) = (server.address(), endpoint.attach());
    let data: Vec<[u8; 2]> = (0..count as u16).map(u16::to_le_bytes).collect();
    std::thread::scope(|scope| {
        let lanes: Vec<_> =
            data.iter().map(|data| LaneSpec { endpoint: &attach, private_data: data, depth: 3 }).collect();
        let connecting = scope.spawn(move || host.connect_all(&address, &lanes, PATIENCE));
        while !connecting.is_finished() {
            let Some(request) = server.listener.accept(Duration::from_millis(20)).unwrap() else { continue };
            let data = <[u8; 2]>::try_from(request.private_data()).unwrap();
            if refused == Some(usize::from(u16::from_le_bytes(data))) {
                request.reject(b"not you");
            } else {
                server.connections.push(request.accept(&server.endpoint.attach(), &data).unwrap());
            }
        }
        connecting.join().unwrap()
    })
}

#[test]
fn many_lanes_are_made_at_once_in_their_order() {
    for (via, provider) in [("", "shm"), ("?via=tcp", "tcp")] {
        let mut server = Server::roomy(via);
        let mut client = client(&[], &[server.address()]);
        client.1 = client.0.endpoint(&Server::room()).unwrap();
        // More than one message asks for.
        let count = MAX_LANES + 7;
        let mut made = connect_many(&mut server, &client, count, None).unwrap();
        assert_eq!((made.len(), server.connections.len()), (count, count));
        for (number, (lane, said)) in made.iter().enumerate() {
            assert_eq!((&said[..], lane.provider()), (&(number as u16).to_le_bytes()[..], provider));
            assert_eq!(lane.room(), 3, "{via}: the depth that was asked for");
        }
        // Each is the lane that it says it is.
        let last = &mut made[count - 1].0;
        last.send(Payload::Inline(b"last"), None, None).unwrap();
        last.ring().unwrap();
        let Completion::Received { connection, buffer, .. } = next(&mut server.endpoint, 1).remove(0) else {
            panic!()
        };
        let from = server.connections.iter().position(|other| other.id() == connection);
        assert_eq!(server.endpoint.message(&buffer), b"last");
        server.endpoint.release(buffer);
        assert!(from.is_some());
        // One session has made them all.
        assert_eq!((client.0.peers().len(), server.host.peers().len()), (1, 1));
        assert!(connect_many(&mut server, &client, 0, None).unwrap().is_empty());
    }
}

#[test]
fn lanes_are_all_made_or_none() {
    for via in ["", "?via=tcp"] {
        let mut server = Server::roomy(via);
        let client = client(&[], &[server.address()]);
        match connect_many(&mut server, &client, 5, Some(3)).unwrap_err() {
            Error::Refused { private_data, .. } => assert_eq!(private_data, b"not you"),
            other => panic!("{other}"),
        }
        // Those that were accepted end.
        let accepted = server.connections.len();
        let ends = next(&mut server.endpoint, accepted);
        assert!(ends.iter().all(|end| matches!(end, Completion::Disconnected { .. })), "{ends:?}");
        // The session goes on.
        server.connections.clear();
        assert_eq!(connect_many(&mut server, &client, 5, None).unwrap().len(), 5);
        assert_eq!(client.0.peers().len(), 1);
    }
}

/// A lane that notes what its session does to it.
#[derive(Default)]
struct Noted(Mutex<Vec<&'static str>>);

impl Leash for Noted {
    fn ready(&self) {
        self.0.lock().unwrap().push("ready");
    }

    fn end(&self) {
        self.0.lock().unwrap().push("end");
    }
}

impl Noted {
    fn seen(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// An end whose peer is a raw client.
fn line() -> (Arc<Line>, Raw) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (raw, line) = Raw::pair(&listener);
    let (socket, cipher) = line;
    (Line::new(socket, cipher, "raw".to_owned(), &Bell::new().unwrap()).unwrap(), raw)
}

#[test]
fn lanes_hear_of_their_peers_and_end_with_their_session() {
    let (line, mut raw) = line();
    let lanes: Vec<Arc<Noted>> = (0..5).map(|_| Arc::default()).collect();
    let tie = |number: usize| line.tie(number as u32, lanes[number].clone());
    (0..5).for_each(|number| line.pend(number));
    // News that come before the lane is there are not lost.
    line.note_ready(0, 1);
    line.note_ended(1);
    (0..4).for_each(tie);
    assert_eq!((lanes[0].seen(), lanes[1].seen()), (vec!["ready"], vec!["end"]));
    line.note_ready(2, 1);
    line.note_ended(3);
    assert_eq!((lanes[2].seen(), lanes[3].seen()), (vec!["ready"], vec!["end"]));
    line.note_ended(99);
    // The peer is told of an end that it does not know of.
    [1, 3, 2].into_iter().for_each(|number| line.untie(number));
    assert_eq!(raw.hear(), Some(Message::Ended { number: 2 }));
    assert!(line.has_lanes());
    line.end();
    assert_eq!((lanes[0].seen(), lanes[2].seen()), (vec!["end"], vec![]));
    // One that was pending ends when it comes.
    tie(4);
    assert_eq!(lanes[4].seen(), ["end"]);
    assert!(!line.has_lanes() && !line.lives() && raw.hear().is_none());
    assert!(line.say(&Message::Beat).is_err());
}

#[test]
fn a_peer_that_reads_nothing_ends_its_session_and_holds_up_nobody() {
    let (line, raw) = line();
    let begun = Instant::now();
    let message = Message::Lanes {
        first: 0,
        way: Way::Tcp,
        rails: LaneRails::default(),
        regions: Vec::new(),
        lanes: vec![crate::session::wire::Wanted { offer: vec![0; 64], data: vec![0; 48] }; MAX_LANES],
    };
    let mut said = 0_usize;
    let reason = loop {
        match line.say(&message) {
            Ok(()) => said += 1,
            Err(reason) => break reason,
        }
        assert!(said < 100_000, "it keeps all that is said");
    };
    assert!(reason.contains("does not read") && begun.elapsed() < PATIENCE, "{reason}");
    assert!(said > 10 && !line.lives());
    // The thread that serves the session learns why.
    assert_eq!(Ear::default().hear(&line, |_| Ok(())), Err(Some(reason)));
    drop(raw);
}

#[test]
fn what_is_not_read_at_once_is_said_later() {
    let (line, mut raw) = line();
    let message = Message::Go { first: 7, tokens: vec![[5; 16]; MAX_LANES] };
    // More than the kernel takes, and less than is kept.
    let mut count = 0;
    while line.resume().is_ok() && line.is_clear() {
        line.say(&message).unwrap();
        count += 1;
    }
    for _ in 0..10 {
        line.say(&message).unwrap();
    }
    let reading = std::thread::spawn(move || {
        for _ in 0..count + 10 {
            assert_eq!(raw.hear(), Some(Message::Go { first: 7, tokens: vec![[5; 16]; MAX_LANES] }));
        }
        raw
    });
    let until = Instant::now() + PATIENCE;
    while !line.is_clear() && Instant::now() < until {
        line.resume().unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(reading.join().is_ok() && line.is_clear());
    let mut ear = Ear::default();
    assert!(ear.hear(&line, |_| Ok(())).is_err(), "the peer is gone");
}

const CHILD: &str = "FERVOR_TEST_SESSION_WITH";

/// A process with a server of its own, and a session with ours: says where it listens, and then what it hears.
fn child(test: &str, server: &Address) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([&format!("transport::any::session_tests::{test}"), "--exact", "--nocapture"])
        .env(CHILD, server.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start this program again")
}

/// What the child does: it lives until its standard input ends.
fn be_child(server: &str) {
    let mut own = Server::start(&[key("a")], "");
    let client = client(&[key("a")], &[parse(server), own.address()]);
    let endpoint = &client.1;
    let lane = client.0.connect(&endpoint.attach(), &parse(server), b"hello", PATIENCE).unwrap();
    println!("listening at {}", own.address());
    own.accept(PATIENCE);
    let mut line = String::new();
    let _ = std::io::stdin().read_line(&mut line);
    drop(lane);
    // Nobody reads what a test says at its end.
    std::process::exit(0);
}

fn address_of(child: &mut Child) -> Address {
    let out = BufReader::new(child.stdout.take().unwrap());
    let said = out.lines().map(Result::unwrap).find_map(|line| {
        let at = line.find("listening at ")?;
        Some(line[at + "listening at ".len()..].to_owned())
    });
    parse(&said.expect("the child says where it listens"))
}

/// Waits until all of the host's peers are silent, or none.
fn await_silence(host: &Host, silent: bool) {
    let until = Instant::now() + 3 * PATIENCE;
    while host.peers().iter().any(|peer| peer.silent.is_some() != silent) {
        assert!(Instant::now() < until, "{:?}", host.peers());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A process that is stopped is found out by both ends, costs nobody his connection, and is heard again.
#[test]
fn a_stopped_process_is_silent_until_it_goes_on() {
    if let Ok(server) = std::env::var(CHILD) {
        return be_child(&server);
    }
    let mut server = Server::start(&[key("a")], "");
    let mut child = child("a_stopped_process_is_silent_until_it_goes_on", &server.address());
    assert_eq!(server.accept(PATIENCE), 1);
    let address = address_of(&mut child);
    let (host, endpoint) = client(&[key("a")], std::slice::from_ref(&address));
    let (mut lane, _) = host.connect(&endpoint.attach(), &address, b"hello", PATIENCE).unwrap();
    let [ours, theirs] = [host.peers(), server.host.peers()];
    for peers in [&ours, &theirs] {
        assert_eq!((peers.len(), peers[0].process, peers[0].silent), (1, child.id(), None));
        assert!(!peers[0].host.is_empty());
    }
    assert_eq!(ours[0].address, address.to_string());
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::STOP).unwrap();
    await_silence(&host, true);
    await_silence(&server.host, true);
    assert!(host.peers()[0].silent >= Some(peer::SILENCE));
    kill_process(pid, Signal::CONT).unwrap();
    await_silence(&host, false);
    await_silence(&server.host, false);
    // Nothing has ended.
    lane.send(Payload::Inline(b"still there"), None, None).unwrap();
    lane.ring().unwrap();
    assert_eq!((host.peers().len(), server.host.peers().len()), (1, 1));
    // One that is killed is noticed without any beat.
    child.kill().unwrap();
    child.wait().unwrap();
    let until = Instant::now() + PATIENCE;
    while host.peers().len() + server.host.peers().len() > 0 {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The line that a server writes of a silent client, and the one when it is heard again.
#[test]
fn a_silent_peer_costs_one_line_and_its_return_another() {
    if let Ok(server) = std::env::var(CHILD) {
        return be_child(&server);
    }
    let mut server = Server::start(&[key("a")], "");
    let mut child = child("a_silent_peer_costs_one_line_and_its_return_another", &server.address());
    server.accept(PATIENCE);
    let Address::Session { host, port, .. } = address_of(&mut child) else { panic!() };
    let at = (host.parse::<std::net::Ipv4Addr>().unwrap(), port).into();
    let mut raw = Raw::welcomed(at, Some(&key("a")));
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let of_raw = |line: &String| line.contains("process 42 on far (127.");
    let silent = lines.find(of_raw).unwrap();
    assert!(silent.contains("has said nothing for ") && silent.starts_with("fervor: "), "{silent}");
    raw.say(&Message::Beat);
    let heard = lines.find(of_raw).unwrap();
    assert!(heard.contains("is heard again, after "), "{heard}");
    drop((raw, child.stdin.take()));
    assert!(child.wait().unwrap().success());
    assert_eq!(lines.filter(of_raw).count(), 0, "one line each");
}
