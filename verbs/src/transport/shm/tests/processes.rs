//! What needs a process of its own: counting all that it has, and peers that are stopped.

use std::{fs, process::Child};

use rustix::process::{Pid, Signal as Sent, WaitOptions, kill_process, waitpid};

use super::*;

/// What a process has: descriptors, mappings, KiB of memory of its own.
#[derive(Debug, Clone, Copy)]
struct Holdings {
    files: usize,
    mappings: usize,
    kib: u64,
}

impl Holdings {
    fn now() -> Self {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let kib = status.lines().filter(|l| l.starts_with("RssAnon") || l.starts_with("RssShmem"));
        let kib = kib.map(|l| l.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()).sum();
        Self {
            files: fs::read_dir("/proc/self/fd").unwrap().count(),
            mappings: maps
                .lines()
                .filter(|line| line.contains("/memfd:fervor") || line.contains("/memfd:test"))
                .count(),
            kib,
        }
    }
}

/// One connection made and ended, from both sides.
struct Turnstile {
    transports: [Shm; 2],
    ends: [ShmEndpoint; 2],
    listener: ShmListener,
    address: Address,
    path: PathBuf,
}

impl Turnstile {
    fn new() -> Self {
        let (address, path) = socket();
        let transports = [Shm::new().unwrap(), Shm::new().unwrap()];
        let ends = transports.each_ref().map(|t| t.endpoint(&EndpointConfig::default()).unwrap());
        let listener = transports[0].listen(&address).unwrap();
        Self { transports, ends, listener, address, path }
    }

    /// `answer` takes the request.
    fn turn<X: Send>(
        &mut self,
        answer: impl FnOnce(ShmRequest, &ShmAttach) -> X,
    ) -> (X, Result<ShmConnection, Error>) {
        let (to, attach, address) = (&self.transports[1], self.ends[1].attach(), &self.address);
        std::thread::scope(|scope| {
            let connecting = scope.spawn(move || to.connect(&attach, address, b"", PATIENCE).map(|(c, _)| c));
            let request = self.listener.accept(PATIENCE).unwrap().expect("a request");
            (answer(request, &self.ends[0].attach()), connecting.join().unwrap())
        })
    }

    fn connect(&mut self) -> [ShmConnection; 2] {
        let (accepted, connected) = self.turn(|request, attach| request.accept(attach, b"").unwrap());
        [accepted, connected.unwrap()]
    }

    fn end(&mut self, connections: [ShmConnection; 2]) {
        drop(connections);
        for end in &mut self.ends {
            assert!(matches!(next(end), Completion::Disconnected { .. }));
        }
    }
}

#[test]
fn connections_and_strangers_with_many_descriptors_leave_nothing() {
    if argument().is_none() {
        return run_alone(
            "processes::connections_and_strangers_with_many_descriptors_leave_nothing",
            "alone",
        );
    }
    // Ten thousand connections without strangers are a case of the conformance suite.
    const ROUNDS: u32 = 2000;
    let mut turnstile = Turnstile::new();
    let region = |t: &Shm| t.register(&Memory::new("test", 4096).unwrap(), Access::RemoteWrite).unwrap();
    let _regions = turnstile.transports.each_ref().map(region);
    let (_bell, bell) = bell::Page::create().unwrap();
    let mut round = |number: u32| {
        match number % 8 {
            0 => {
                let (refused, error) = turnstile.turn(|request, _| request.reject(b"no"));
                assert!(matches!(error, Err(Error::Refused { .. })), "{refused:?}");
            }
            // Strangers who stop at a step, and leave; with more descriptors than anybody wants.
            1 => {
                use std::os::fd::AsFd;
                let stranger = sockets::stranger(&turnstile.path);
                let many = vec![bell.as_fd(); number as usize / 8 % 100];
                wire::send(&stranger, &hostile::hello(number % 3).encode(), &many, None).unwrap();
                while turnstile.listener.accept(Duration::ZERO).unwrap().is_some() {}
            }
            _ => {
                let mut connections = turnstile.connect();
                connections[0].send(Payload::Inline(b"x"), None, None).unwrap();
                connections[0].ring().unwrap();
                let Completion::Received { buffer, .. } = next(&mut turnstile.ends[1]) else { panic!() };
                turnstile.ends[1].release(buffer);
                turnstile.end(connections);
            }
        }
        assert!(turnstile.listener.accept(Duration::ZERO).unwrap().is_none());
    };
    // What is made once, and what allocators and thread stacks keep.
    (0..ROUNDS / 10).for_each(&mut round);
    let before = Holdings::now();
    (0..ROUNDS).for_each(&mut round);
    let after = Holdings::now();
    assert_eq!((after.files, after.mappings), (before.files, before.mappings), "{before:?} became {after:?}");
    assert!(after.kib <= before.kib + 2048, "{before:?} became {after:?}");
}

/// A process that connects, tells its region, and then only lives, until the connection ends.
fn neighbour(test: &str, address: &Address) -> Child {
    program(test, &address.to_string()).spawn().unwrap()
}

fn live(address: &str) {
    let transport = Shm::new().unwrap();
    let mut endpoint = transport.endpoint(&EndpointConfig::default()).unwrap();
    let region = transport.register(&Memory::new("child", 4096).unwrap(), Access::RemoteWrite).unwrap();
    let (mut connection, _) =
        transport.connect(&endpoint.attach(), &address.parse().unwrap(), b"", PATIENCE).unwrap();
    let RemoteRegion { address, length, key } = region.remote();
    let hello = [address.to_le_bytes(), length.to_le_bytes(), u64::from(key).to_le_bytes()].concat();
    connection.send(Payload::Inline(&hello), None, None).unwrap();
    connection.ring().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut some = Vec::new();
    while Instant::now() < deadline {
        endpoint.poll(&mut some);
        for completion in some.drain(..) {
            match completion {
                Completion::Received { buffer, .. } => endpoint.release(buffer),
                Completion::Disconnected { cause, .. } => return assert_eq!(cause, WorkError::Disconnected),
                other => panic!("{other:?}"),
            }
        }
        endpoint.wait(Duration::from_millis(100));
    }
    panic!("the connection does not end");
}

/// Stops the process, and returns when it has stopped.
fn stop(child: &Child) -> Pid {
    let pid = Pid::from_child(child);
    kill_process(pid, Sent::STOP).unwrap();
    let (_, status) = waitpid(Some(pid), WaitOptions::UNTRACED).unwrap().expect("a child that stops");
    assert!(status.stopped());
    pid
}

#[test]
fn a_stopped_peer_is_no_error_and_holds_nobody_up() {
    if let Some(address) = argument() {
        return live(&address);
    }
    let (address, _) = socket();
    let transport = Shm::new().unwrap();
    let mut endpoint = transport.endpoint(&EndpointConfig::default()).unwrap();
    let own = transport.register(&Memory::new("own", 4096).unwrap(), Access::Local).unwrap();
    let mut listener = transport.listen(&address).unwrap();
    let mut child = neighbour("processes::a_stopped_peer_is_no_error_and_holds_nobody_up", &address);
    let request = listener.accept(PATIENCE).unwrap().expect("a request");
    let mut connection = request.accept(&endpoint.attach(), b"").unwrap();
    let Completion::Received { buffer, .. } = next(&mut endpoint) else { panic!() };
    let word = |at| u64::from_le_bytes(endpoint.message(&buffer)[at..at + 8].try_into().unwrap());
    let remote = RemoteRegion { address: word(0), length: word(8), key: word(16) as u32 };
    endpoint.release(buffer);

    let pid = stop(&child);
    // One-sided requests need nothing of it.
    own.memory().store(0, 42);
    connection.write(Payload::Gather(&piece(&own, 0, 8)), remote.at(0), None, Some(1)).unwrap();
    connection.read(&piece(&own, 8, 8), remote.at(0), Some(2)).unwrap();
    connection.ring().unwrap();
    let mut some = Vec::new();
    endpoint.poll(&mut some);
    assert!(
        matches!(
            some[..],
            [Completion::Work { id: 1, result: Ok(()), .. }, Completion::Work { id: 2, result: Ok(()), .. }]
        ),
        "{some:?}"
    );
    assert_eq!(own.memory().load(8), 42);
    // Messages fill the ring, and then wait.
    let mut sent = 0;
    let full = loop {
        match connection.send(Payload::Gather(&piece(&own, 0, 4096)), None, None) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        connection.ring().unwrap();
        endpoint.poll(&mut some);
    };
    assert!(full == PostError::Full && sent >= 64, "{full} after {sent}");
    // Others connect and talk, at the same endpoint.
    let client = Shm::new().unwrap();
    let client_end = client.endpoint(&EndpointConfig::default()).unwrap();
    let (ours, mut theirs) = std::thread::scope(|scope| {
        let connecting =
            scope.spawn(|| client.connect(&client_end.attach(), &address, b"", PATIENCE).unwrap().0);
        let request = listener.accept(PATIENCE).unwrap().expect("a request");
        (request.accept(&endpoint.attach(), b"").unwrap(), connecting.join().unwrap())
    });
    theirs.send(Payload::Inline(b"hello"), None, None).unwrap();
    theirs.ring().unwrap();
    let Completion::Received { connection: from, buffer, .. } = next(&mut endpoint) else { panic!() };
    assert_eq!((from, endpoint.message(&buffer)), (ours.id(), &b"hello"[..]));
    endpoint.release(buffer);

    connection.disconnect();
    assert!(matches!(next(&mut endpoint), Completion::Disconnected { cause: WorkError::Disconnected, .. }));
    kill_process(pid, Sent::CONT).unwrap();
    assert!(child.wait().unwrap().success(), "it saw the end");
}

#[test]
fn a_stopped_listener_costs_the_time_that_was_given() {
    if let Some(address) = argument() {
        let _listener = Shm::new().unwrap().listen(&address.parse().unwrap()).unwrap();
        loop {
            std::thread::park();
        }
    }
    let (address, path) = socket();
    let mut child = neighbour("processes::a_stopped_listener_costs_the_time_that_was_given", &address);
    let transport = Shm::new().unwrap();
    let endpoint =
        transport.endpoint(&EndpointConfig { connections: 1, ..EndpointConfig::default() }).unwrap();
    let connect = |timeout| transport.connect(&endpoint.attach(), &address, b"", timeout).unwrap_err();
    let deadline = Instant::now() + PATIENCE;
    while matches!(connect(Duration::from_millis(20)), Error::Unreachable { .. }) {
        assert!(Instant::now() < deadline, "the child does not listen");
    }
    stop(&child);
    for _ in 0..5 {
        let error = connect(Duration::from_millis(20));
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let error = connect(PATIENCE);
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    fs::remove_file(path).unwrap();
}
