//! Latency and throughput beside perftest's, on the same two devices, in turns.

use std::time::Duration;

use crate::program::{Program, Server};

const LIMIT: Duration = Duration::from_secs(240);

fn beside_perftest(operation: &str, more: &[&str]) {
    let server = Server::start(1);
    let arguments = ["latency", "--beside-perftest", "--server", server.url(), "--op", operation];
    println!("\n{}", Program::bench(&[&arguments[..], more].concat()).finish(LIMIT));
}

/// A `get` that misses is one READ, and hardly more. Runs of one and the same program differ by up to 1.75 here.
#[test]
fn a_miss_takes_at_most_twice_a_bare_read() {
    let sizes = ["--size", "64", "--size", "512", "--size", "4096", "--count", "500"];
    beside_perftest("miss", &[&sizes[..], &["--max-ratio", "2"]].concat());
}

/// Given without a bound: two clients and a server, which all poll, share two emulated processors.
#[test]
fn an_update_becomes_visible() {
    beside_perftest("visible", &["--size", "64", "--count", "100", "--rounds", "3"]);
}

/// Given without a bound, for the same reason.
#[test]
fn rows_are_read_and_pushed() {
    let server = Server::start(1);
    let arguments =
        ["throughput", "--beside-perftest", "--server", server.url(), "--op", "read,many-read,push"];
    let more = ["--size", "4096", "--batch", "64", "--duration", "0.5", "--rounds", "2"];
    let said = Program::bench(&[&arguments[..], &more].concat()).finish(LIMIT);
    println!("\n{said}");
    assert!(said.contains("ib_read_bw") && said.contains("ib_write_bw"));
}
