//! Peers that are killed, or vanish without a word.

use std::{
    sync::mpsc::{self, Receiver, Sender},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use fervor_client::{Client, ClientOptions, Error, Model, Table, Worker};

use crate::{
    network::Lossy,
    program::{Program, Server},
};

/// A lost peer is found out within two seconds; an emulated and loaded machine gets twice that.
const BOUND: Duration = Duration::from_secs(4);
/// How long an idle client does not call in.
const IDLE: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(60);
/// For how long the network loses everything: queue pairs give up after 1.1 s.
const OUTAGE: Duration = Duration::from_millis(2500);
/// An eager model without slack: who is ahead by one clock waits for the others.
const LOCKSTEP: Model = Model::Essp { staleness: 0 };

/// A client with a worker and a table.
struct Member {
    client: Client,
    table: Table<i64>,
    worker: Worker,
}

fn join(server: &Server, table: &str, model: Model, clients: u16) -> Member {
    let options = ClientOptions { clients, cache_bytes: 1 << 20, ..ClientOptions::default() };
    let client = Client::connect_with(&[server.url()], options).expect("connect");
    let table = client.table::<i64>(table, 4, 8, model).expect("table");
    let worker = client.worker().expect("worker");
    Member { client, table, worker }
}

impl Member {
    fn get(&mut self, row: u64) -> Result<[i64; 8], Error> {
        let mut values = [0; 8];
        self.worker.get(&self.table, row, &mut values).map(|()| values)
    }
}

/// A client's thread, which ends with the error that it runs into.
struct Doomed {
    what: &'static str,
    thread: JoinHandle<(Error, Instant)>,
}

impl Doomed {
    fn start(
        what: &'static str,
        mut member: Member,
        mut body: impl FnMut(&mut Member) -> Result<(), Error> + Send + 'static,
    ) -> Self {
        let thread = thread::spawn(move || {
            loop {
                if let Err(error) = body(&mut member) {
                    break (error, Instant::now());
                }
            }
        });
        Self { what, thread }
    }

    /// Sees to it that it ran into an error soon enough after `since`, when it could have found out.
    fn outcome(self, since: Instant) {
        let deadline = since + PATIENCE;
        while !self.thread.is_finished() {
            assert!(Instant::now() < deadline, "the {} client hangs", self.what);
            thread::sleep(Duration::from_millis(5));
        }
        let (error, at) = self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        assert!(
            at >= since && matches!(error, Error::ServerLost { .. }),
            "the {} client got another error, or too early: {error}",
            self.what
        );
        let after = at - since;
        println!("the {} client learned of it after {after:.2?}: {error}", self.what);
        assert!(after < BOUND, "the {} client learned of it after {after:?} only", self.what);
    }
}

/// Clients of one server: one waits for a clock that does not come, one READs without a pause, and one does not call
/// in until it is told to.
struct Three {
    blocked: Doomed,
    reading: Doomed,
    idle: Doomed,
    wake: Sender<()>,
}

impl Three {
    fn start(server: &Server) -> Self {
        let [mut blocked, mut idle] = [(); 2].map(|()| join(server, "eager", LOCKSTEP, 3));
        let reading = join(server, "async", Model::Async, 3);
        // The idle one has rows in its cache; it does not end its clock, so the other one waits for that.
        idle.get(0).expect("get");
        blocked.worker.clock().expect("clock");
        let (wake, told): (_, Receiver<()>) = mpsc::channel();
        let three = Self {
            blocked: Doomed::start("blocked", blocked, |member| member.get(0).map(drop)),
            reading: Doomed::start("reading", reading, |member| member.get(0).map(drop)),
            idle: Doomed::start("idle", idle, move |member| {
                let _ = told.recv();
                member.worker.clock()
            }),
            wake,
        };
        // All are where they shall be.
        thread::sleep(Duration::from_millis(500));
        three
    }

    /// All of them get an error in time. The idle one has not looked before it is woken.
    fn learn(self, lost: Instant) {
        thread::sleep((lost + IDLE).saturating_duration_since(Instant::now()));
        let woken = Instant::now();
        drop(self.wake);
        self.blocked.outcome(lost);
        self.reading.outcome(lost);
        self.idle.outcome(woken);
    }
}

#[test]
fn a_killed_server_is_an_error_in_time() {
    let mut server = Server::without_lease(2);
    let three = Three::start(&server);
    let lost = server.program.kill();
    three.learn(lost);
}

#[test]
fn a_vanished_server_is_an_error_in_time_and_so_are_vanished_clients() {
    let server = Server::without_lease(2);
    let three = Three::start(&server);
    let lossy = Lossy::new(100);
    three.learn(Instant::now());
    drop(lossy);
    // The server has found out, too: it has places for others, whom nobody holds up.
    let start = Instant::now();
    let mut member = join(&server, "eager", LOCKSTEP, 1);
    for _ in 0..10 {
        member.worker.inc(&member.table, 1, &[1; 8]).expect("inc");
        member.worker.clock().expect("clock");
        member.get(0).expect("get");
    }
    assert_eq!(member.get(1).expect("get"), [10; 8]);
    let Member { client, worker, .. } = member;
    drop(worker);
    client.close().expect("leave");
    println!("a client that came afterwards was done in {:.2?}", start.elapsed());
}

/// A client of a job of two, which makes so many passes.
fn trains(server: &Server, index: &str, model: &[&str], epochs: &str) -> Program {
    let job = ["mf", "--generate", "40x20:400", "--rank", "4", "--clocks-per-epoch", "5", "--epochs", epochs];
    let place = ["--clients", "2", "--client-index", index, "--cache", "1048576", "--server", server.url()];
    Program::bench(&[&job[..], &place, &["--model"], model].concat())
}

/// The pass that a client says it has made.
pub fn epoch(line: &str) -> Option<u32> {
    line.strip_prefix("epoch ")?.split_whitespace().next()?.parse().ok()
}

/// The network loses all packets for longer than a queue pair waits. The clients come back, and the job ends as if nothing had been: every
/// read is checked, and every update counts once.
#[test]
fn a_job_goes_on_after_its_network_was_gone_for_a_while() {
    let mut server = Server::start(2);
    let model = ["essp", "--staleness", "2", "--check"];
    let (mut first, second) = (trains(&server, "0", &model, "60"), trains(&server, "1", &model, "60"));
    while first.wait_for(PATIENCE, epoch) < 3 {}
    let lossy = Lossy::new(100);
    thread::sleep(OUTAGE);
    drop(lossy);
    let start = Instant::now();
    for _ in 0..4 {
        // Each of two clients, at each of two shards.
        server.program.wait_for(PATIENCE, |line| line.contains("is back after").then_some(()));
    }
    println!("all were back {:.2?} after the network was", start.elapsed());
    first.finish(PATIENCE);
    second.finish(PATIENCE);
}

/// Of two clients of a job one is killed: the other one's clock goes on, to the end.
#[test]
fn a_killed_client_holds_nobody_up() {
    let server = Server::without_lease(2);
    let client = |index| trains(&server, index, &["bsp"], "60");
    let (mut first, mut second) = (client("0"), client("1"));
    while first.wait_for(PATIENCE, epoch) < 3 {}
    let killed = second.kill();
    let (mut last, mut pause) = (killed, Duration::ZERO);
    while first.wait_for(PATIENCE, epoch) < 60 {
        pause = pause.max(last.elapsed());
        last = Instant::now();
    }
    println!(
        "the other client was done {:.2?} later; it stood still for {pause:.2?} at most",
        killed.elapsed()
    );
    assert!(pause < BOUND, "the other client stood still for {pause:?}");
    first.finish(PATIENCE);
}
