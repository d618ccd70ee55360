//! The SSP guarantee over soft-RoCE: four workers of two clients, two shards.

use std::time::Duration;

use crate::program::{Program, Server};

const CLOCKS: &str = "5000";
/// Each takes about a minute on two idle processors, and four times that on busy ones: six threads that poll share two
/// emulated processors, and to change from one to another is what emulation is slowest at.
const LIMIT: Duration = Duration::from_secs(500);

fn holds(model: &[&str]) {
    let server = Server::start(2);
    let job = ["check", "--server", server.url(), "--clocks", CLOCKS, "--clients", "2", "--workers", "2"];
    // A row for each shard, of a few cache lines.
    let size = ["--rows", "2", "--width", "20", "--model"];
    // It ends well only if no read was outside its bounds and no update lost or applied twice.
    println!("{}", Program::bench(&[&job[..], &size, model].concat()).finish(LIMIT));
}

#[test]
fn bsp_keeps_its_promise() {
    holds(&["bsp"]);
}

#[test]
fn ssp_keeps_its_promise() {
    holds(&["ssp", "--staleness", "3"]);
}

#[test]
fn essp_keeps_its_promise() {
    holds(&["essp", "--staleness", "3"]);
}

#[test]
fn vap_keeps_its_promise() {
    holds(&["vap", "--v0", "3"]);
}

#[test]
fn async_keeps_its_promise() {
    holds(&["async"]);
}
