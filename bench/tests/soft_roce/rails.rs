//! Two rails of each process: both are used, and when one dies for good the job goes on by the other.
//!
//! The server has rxe1 and rxe3, the clients rxe0 and rxe2. rxe0 reaches rxe1 alone, and rxe2 rxe3: two networks. Their sessions go through
//! loopback, as through a network for management that lives on.

use std::time::{Duration, Instant};

use crate::{
    network::Second,
    peers::epoch,
    program::{Program, Server},
};

const PATIENCE: Duration = Duration::from_secs(120);
/// A dead rail is found out within two seconds; an emulated and loaded machine gets more.
const BOUND: Duration = Duration::from_secs(8);

/// A client of a job of two, which checks every read.
fn trains(server: &Server, index: &str) -> Program {
    let job = [
        "mf",
        "--generate",
        "40x20:400",
        "--rank",
        "4",
        "--clocks-per-epoch",
        "5",
        "--epochs",
        "60",
        "--check",
    ];
    let place = ["--clients", "2", "--client-index", index, "--cache", "1048576", "--server", server.url()];
    let model = ["--model", "essp", "--staleness", "2", "--devices", "rxe0,rxe2"];
    Program::bench(&[&job[..], &place, &model].concat())
}

/// Trains by two rails, one of which is broken by `kill` for good.
fn goes_on_by_the_other(kill: impl FnOnce(&Second)) {
    let second = Second::up();
    let rails = ["--devices", "rxe1,rxe3"];
    let mut server = Server::with("fervor://127.0.0.1:0?via=rdma", 2, "10", &rails);
    let (mut first, other) = (trains(&server, "0"), trains(&server, "1"));
    while first.wait_for(PATIENCE, epoch) < 3 {}
    // It takes a moment itself.
    let dead = Instant::now();
    kill(&second);
    // Each of the two clients was connected to one of the two shards by the rail that died.
    for _ in 0..2 {
        server.program.wait_for(PATIENCE, |line| line.contains("is back after").then_some(()));
    }
    let took = dead.elapsed();
    for said in [first.finish(PATIENCE), other.finish(PATIENCE)] {
        let line = |start: &str| {
            let found = said.lines().find_map(|line| line.strip_prefix(start));
            found.unwrap_or_else(|| panic!("no line `{start}` in:\n{said}")).to_owned()
        };
        assert_eq!(line("connections to shards: "), "rdma(rxe0:1) x 2", "{said}");
        let rails = line("rails: ");
        println!("{rails}");
        // What each rail has done: so many lanes, and so many of them lost.
        let counts = |rail: &str| -> [u32; 2] {
            let (_, after) = rails.split_once(&format!("{rail} (")).expect("it is a rail");
            let mut numbers = after.split([' ', ',']).filter_map(|word| word.parse().ok());
            [numbers.next().expect("lanes"), numbers.next().expect("lost ones")]
        };
        let ([lanes, _], [dead_lanes, dead_lost]) = (counts("rxe0:1"), counts("rxe2:1"));
        assert!(lanes > 0 && dead_lanes > 0 && dead_lost > 0, "both were used, and one died: {rails}");
    }
    println!("both were back {took:.2?} after the rail had died");
    assert!(took < BOUND, "they were back after {took:?}");
}

/// Its port goes down at both ends.
#[test]
fn a_job_goes_on_when_one_of_two_rails_is_taken_down_for_good() {
    goes_on_by_the_other(Second::take_down);
}

/// Its ports stay up, and nothing comes through.
#[test]
fn a_job_goes_on_when_one_of_two_rails_falls_silent_for_good() {
    goes_on_by_the_other(Second::silence);
}
