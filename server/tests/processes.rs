//! The server program and clients as processes: started, killed, told to stop; over shared memory and over TCP.
//!
//! A client process is this test program again, with [`CHILD`] in its environment.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use fervor_client::{Client, ClientOptions, Error, Model};
use fervor_verbs::{
    Address,
    memory::{HugePage, Nodes},
};
use support::{Folder, Random};

#[path = "../../client/tests/support/mod.rs"]
mod support;

/// Address of the server, for a client process.
const CHILD: &str = "FERVOR_TEST_CHILD";
/// The longest that a client may take to notice that its server is dead, and some time to be scheduled.
const NOTICED: Duration = Duration::from_millis(2500);

/// A server process; killed when dropped.
struct Program {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Program {
    fn command(address: &Address, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fervor-server"));
        command.args(["--listen", &address.to_string()]).args(arguments);
        command.stdout(Stdio::piped());
        command
    }

    /// Starts it, and waits until it is ready.
    fn start(address: &Address, arguments: &[&str]) -> Self {
        Self::started(Self::command(address, arguments))
    }

    fn started(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut text = String::new();
        while !text.contains("ready at") {
            assert!(output.read_line(&mut text).unwrap() > 0, "it ended: {text}");
        }
        assert!(text.contains("receive buffers") && text.contains("total"), "no budget: {text}");
        Self { child, output }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    /// Waits for its end, which comes within `limit`: its status, and the rest of what it printed.
    fn end(&mut self, limit: Duration) -> (ExitStatus, String) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < limit, "it has not ended within {limit:?}");
            thread::sleep(Duration::from_millis(5));
        };
        let mut text = String::new();
        self.output.read_to_string(&mut text).unwrap();
        (status, text)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A server says by which ways it can be reached, before it says that it is ready.
#[test]
fn a_server_says_which_ways_lead_to_it() {
    let address: Address = "fervor://127.0.0.1:0".parse().unwrap();
    let mut child = Program::command(&address, &["--shards", "1", "--memory", "1M"]).spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let before: Vec<String> = lines.take_while(|line| !line.contains("ready at")).collect();
    child.kill().unwrap();
    child.wait().unwrap();
    let line = before.iter().find(|line| line.starts_with("listening at fervor://127.0.0.1:")).unwrap();
    let (_, ways) = line.rsplit_once(": ").unwrap();
    assert!(ways.starts_with("shm, ") && ways.ends_with("tcp") && !line.contains(":0:"), "{line}");
}

fn connect(address: &Address, clients: u16) -> Client {
    let options = ClientOptions { clients, ..ClientOptions::default() };
    Client::connect_with(&[address.to_string()], options).unwrap()
}

#[test]
fn a_server_that_cannot_start_says_why_and_what_to_do() {
    let folder = Folder::new("start");
    let address = folder.address("s.sock");
    let _running = Program::start(&address, &["--memory", "1M"]);
    let nowhere = folder.address("no/such/folder/s.sock");
    let other = folder.address("t.sock");
    let cases: [(&Address, &[&str], &str); 8] = [
        (&address, &[], "is in use: another server listens there; stop it or choose another address"),
        (&other, &["--memory", "100T"], "ask for less --memory"),
        (&other, &["--memory", "1X"], "the unit is K, M, G or T"),
        (&other, &["--memory", "100"], "at least a page per shard"),
        (&other, &["--credits", "0"], "credits = 0: 1 to"),
        (&other, &["--clients", "0"], "clients = 0: 1 to"),
        (&other, &["--cores", "5000"], "5000"),
        (&nowhere, &[], "no/such/folder"),
    ];
    for (address, arguments, text) in cases {
        let output = Program::command(address, arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{arguments:?}: {errors}");
        assert!(errors.contains(text), "{arguments:?}: {errors}\nhas no {text}");
    }
    let output =
        Command::new(env!("CARGO_BIN_EXE_fervor-server")).arg("--listen=udp://localhost:1").output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && errors.contains("the scheme is unknown"), "{errors}");
    // The one that runs has lost nothing by it.
    connect(&address, 1).close().unwrap();
}

#[test]
fn a_plan_says_where_shards_would_run_and_starts_nothing() {
    let folder = Folder::new("plan");
    let address = folder.address("s.sock");
    let arguments = ["--plan", "--cores", "0,0", "--memory", "8M", "--huge-pages", "none"];
    let output = Program::command(&address, &arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("receive buffers") && !text.contains("ready"), "{text}");
    let shards: Vec<Vec<_>> =
        text.lines().rev().take(2).map(|line| line.split_whitespace().collect()).collect();
    let node = Nodes::this().of_core(0).map_or("any".to_owned(), |node| node.to_string());
    for (shard, number) in shards.iter().zip(["1", "0"]) {
        // With the header for 16 clients.
        assert_eq!(shard[..], [number, "0", &node, "4.0", "MiB", "ordinary", "-"], "{text}");
    }
    assert!(Client::connect(&[address.to_string()]).is_err());
}

#[test]
fn huge_pages_that_are_not_there_are_a_warning_with_their_number() {
    let folder = Folder::new("huge");
    let address = folder.address("s.sock");
    let page = HugePage::Mib2;
    // More than there are, whatever the machine has: one, where nobody has set any aside.
    let needed = page.pool().map_or(0, |pool| pool.total) + 1;
    let memory = format!("{}M", 2 * needed);
    let mut command =
        Program::command(&address, &["--memory", &memory, "--huge-pages", "2M", "--shards", "1"]);
    command.stderr(Stdio::piped());
    let mut server = Program::started(command);
    connect(&address, 1).close().unwrap();
    server.signal("-TERM");
    assert!(server.end(Duration::from_secs(20)).0.success());
    let mut errors = String::new();
    server.child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    let expected = match page.pool() {
        Some(_) => format!("huge pages of 2 MiB: {needed} needed, "),
        None => "this machine has no huge pages of 2 MiB".to_owned(),
    };
    assert!(errors.contains(&expected), "{errors}");
    assert!(
        errors.contains("the system said") && errors.contains("shard 0 lies on ordinary pages"),
        "{errors}"
    );
}

#[test]
fn a_killed_server_leaves_its_address_to_the_next_one() {
    let folder = Folder::new("again");
    let address = folder.address("s.sock");
    drop(Program::start(&address, &["--memory", "1M"]));
    let _next = Program::start(&address, &["--memory", "1M"]);
    connect(&address, 1).close().unwrap();
}

/// What each of the clients of a dying server is at when it dies, and what it gets.
fn clients_of_a_dying_server(address: &Address, kill: impl FnOnce(&mut Program), check: fn(&Error)) {
    // Without a lease: what looks like a dead process is one.
    let mut server = Program::start(address, &["--memory", "4M", "--shards", "2", "--lease", "0"]);
    let started = std::sync::Barrier::new(5);
    let killed = std::sync::Barrier::new(5);
    // Returns how long after the kill it had the error.
    let at = |delay: Duration, act: &dyn Fn(&Client) -> Error| {
        let client = connect(address, 4);
        started.wait();
        killed.wait();
        let killed = Instant::now();
        thread::sleep(delay);
        check(&act(&client));
        killed.elapsed() - delay
    };
    let times = thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            // Blocked in a get, since the others do not end their clocks.
            let client = connect(address, 4);
            let table = client.table::<f32>("t", 8, 4, Model::Bsp).unwrap();
            let mut worker = client.worker().unwrap();
            worker.clock().unwrap();
            started.wait();
            let waiter = scope.spawn(move || {
                let error = worker.get(&table, 1, &mut [0.0; 4]).unwrap_err();
                (Instant::now(), error, client)
            });
            thread::sleep(Duration::from_millis(100));
            killed.wait();
            let killed = Instant::now();
            let (end, error, client) = waiter.join().unwrap();
            check(&error);
            assert!(client.worker().is_err() && client.table::<f32>("u", 8, 4, Model::Bsp).is_err());
            end.saturating_duration_since(killed)
        });
        // Idle for a second, then it ends a clock.
        let idle = scope.spawn(|| {
            at(Duration::from_secs(1), &|client| {
                let Err(error) = client.worker().and_then(|mut worker| worker.clock()) else {
                    panic!("a clock of a dead server")
                };
                error
            })
        });
        let clocking = scope.spawn(|| {
            let client = connect(address, 4);
            let mut worker = client.worker().unwrap();
            started.wait();
            killed.wait();
            thread::sleep(Duration::from_secs(1));
            let called = Instant::now();
            check(&worker.clock().unwrap_err());
            called.elapsed()
        });
        let missing = scope.spawn(|| {
            // Each get is a READ: in place it would go on for ever, with what the dead server has left.
            let options = ClientOptions { clients: 4, copies: true, ..ClientOptions::default() };
            let client = Client::connect_with(&[address.to_string()], options).unwrap();
            let table = client.table::<f32>("async", 8, 4, Model::Async).unwrap();
            let mut worker = client.worker().unwrap();
            started.wait();
            let reader = scope.spawn(move || {
                loop {
                    if let Err(error) = worker.get(&table, 1, &mut [0.0; 4]) {
                        return (Instant::now(), error, client);
                    }
                }
            });
            killed.wait();
            let killed = Instant::now();
            let (end, error, _client) = reader.join().unwrap();
            check(&error);
            end.saturating_duration_since(killed)
        });
        started.wait();
        thread::sleep(Duration::from_millis(50));
        kill(&mut server);
        killed.wait();
        [waiting, idle, clocking, missing].map(|client| client.join().unwrap())
    });
    assert!(times.iter().all(|time| *time < NOTICED), "waiting, idle, clocking, missing: {times:?}");
}

/// What a new worker finds.
fn nobody_there(error: &Error) -> bool {
    matches!(error, Error::Transport(text) if text.contains("is the server running there?"))
}

/// An address of this machine that no other process of this test has.
fn over_tcp(number: u32) -> Address {
    let process = std::process::id();
    let host = format!("127.{}.{}.{number}", 1 + process % 250, process / 250 % 250);
    Address::Tcp { host, port: 7471 }
}

fn clients_of_a_killed_server(address: &Address) {
    clients_of_a_dying_server(
        address,
        |server| server.signal("-KILL"),
        |error| assert!(matches!(error, Error::ServerLost { .. }) || nobody_there(error), "{error:?}"),
    );
}

#[test]
fn clients_of_a_killed_server_get_an_error_within_two_seconds_and_never_hang() {
    let folder = Folder::new("killed");
    clients_of_a_killed_server(&folder.address("s.sock"));
}

#[test]
fn so_do_those_over_tcp() {
    clients_of_a_killed_server(&over_tcp(1));
}

fn clients_of_a_stopping_server(address: &Address) {
    clients_of_a_dying_server(
        address,
        |server| {
            server.signal("-TERM");
            let (status, text) = server.end(Duration::from_secs(5));
            assert!(status.success() && text.contains("fervor-server stopped"), "{status}: {text}");
        },
        |error| {
            let told = matches!(error, Error::Fault { reason, .. } if reason == "the server stops");
            assert!(told || nobody_there(error), "{error:?}");
        },
    );
}

#[test]
fn clients_of_a_stopping_server_are_told() {
    let folder = Folder::new("stopped");
    clients_of_a_stopping_server(&folder.address("s.sock"));
}

#[test]
fn those_over_tcp_are_told_too() {
    clients_of_a_stopping_server(&over_tcp(2));
}

#[test]
fn a_server_stops_though_its_clients_never_pause() {
    let folder = Folder::new("busy");
    let address = folder.address("s.sock");
    let mut server = Program::start(&address, &["--memory", "4M", "--shards", "1"]);
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let client = connect(&address, 3);
            thread::spawn(move || {
                let table = client.table::<f32>("t", 8, 4, Model::Async).unwrap();
                let mut worker = client.worker().unwrap();
                loop {
                    worker.inc(&table, 1, &[1.0; 4]).unwrap();
                    if let Err(error) = worker.clock() {
                        return error;
                    }
                }
            })
        })
        .collect();
    thread::sleep(Duration::from_millis(200));
    server.signal("-TERM");
    let (status, _) = server.end(Duration::from_secs(5));
    assert!(status.success());
    for client in clients {
        let error = client.join().unwrap();
        assert!(matches!(&error, Error::Fault { reason, .. } if reason == "the server stops"), "{error:?}");
    }
}

const ROWS: u64 = 80;
/// A batch for one of two shards: 40 rows of 1 KiB, in one message.
const WIDTH: usize = 128;

/// The client process: adds 1 to everything, for ever. Run by the test below alone.
#[test]
#[ignore = "a part of a_client_killed_in_the_middle_leaves_whole_batches"]
fn child() {
    let address: Address = std::env::var(CHILD).expect("started by the other test").parse().unwrap();
    let client = connect(&address, 2);
    let table = client.table::<i64>("t", ROWS, WIDTH, Model::Async).unwrap();
    let mut worker = client.worker().unwrap();
    println!("started");
    loop {
        for row in 0..ROWS {
            worker.inc(&table, row, &[1; WIDTH]).unwrap();
        }
        worker.clock().unwrap();
    }
}

#[test]
fn a_client_killed_in_the_middle_leaves_whole_batches() {
    let folder = Folder::new("child");
    let address = folder.address("s.sock");
    let mut random = Random(1);
    for round in 0..12 {
        let _server = Program::start(&address, &["--memory", "4M", "--shards", "2"]);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--ignored", "--nocapture"])
            .env(CHILD, address.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let client = connect(&address, 2);
        let table = client.table::<i64>("t", ROWS, WIDTH, Model::Async).unwrap();
        let barrier = client.table::<i64>("barrier", 2, 1, Model::Bsp).unwrap();
        let mut worker = client.worker().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut text = String::new();
        while !text.contains("started") {
            assert!(output.read_line(&mut text).unwrap() > 0, "it ended: {text}");
        }
        thread::sleep(Duration::from_micros(random.among(0..=20_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        // The others go on: far beyond what it can have done, its clock no longer counts.
        let start = Instant::now();
        for clock in 1..=20_000 {
            worker.clock().unwrap();
            if clock % 1000 == 0 {
                for row in 0..2 {
                    worker.get(&barrier, row, &mut [0]).unwrap();
                }
            }
        }
        assert!(start.elapsed() < Duration::from_secs(20));
        // Of each shard's rows, all have the same batches, each whole.
        let mut rows = vec![0; ROWS as usize * WIDTH];
        worker.get_many(&table, &(0..ROWS).collect::<Vec<_>>(), &mut rows).unwrap();
        for shard in 0..2 {
            let rows = || rows.chunks_exact(WIDTH).skip(shard).step_by(2);
            let first = rows().next().unwrap()[0];
            assert!(rows().all(|row| row.iter().all(|v| *v == first)), "round {round}: half a batch");
        }
        drop(worker);
        client.close().unwrap();
    }
}
