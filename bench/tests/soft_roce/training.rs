//! A server and two clients, each a process, train a tiny job by ESSP to the loss that shared memory reaches.

use std::{fmt::Write as _, fs, path::PathBuf, time::Duration};

use fervor_bench::{data::digits, mf};

use crate::{
    network::Lossy,
    program::{Program, Server},
};

const LIMIT: Duration = Duration::from_secs(240);
/// How far two runs of one job may be apart: their updates interleave differently.
const TOLERANCE: f64 = 0.1;

const ESSP: &[&str] = &["essp", "--staleness", "3"];

/// A file that goes away with this.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("fervor-soft-roce-{}-{name}", std::process::id())))
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("the path is UTF-8")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The first pictures of the digits, as a file of ratings.
fn slice(pictures: u32) -> Scratch {
    let mut text = String::new();
    for entry in digits::ratings().entries.iter().filter(|entry| entry.row < pictures) {
        writeln!(text, "{} {} {}", entry.row, entry.column, entry.value).expect("write to a string");
    }
    let file = Scratch::new("digits.txt");
    fs::write(&file.0, text).expect("write a file");
    file
}

/// Trains; over shared memory if there is no server.
fn train(data: &Scratch, epochs: u32, model: &[&str], server: Option<&Server>) -> mf::Report {
    let (json, epochs) = (Scratch::new("report.json"), epochs.to_string());
    let mut arguments = vec!["mf", "--data", data.path(), "--rank", "8", "--clocks-per-epoch", "5"];
    arguments.extend(["--epochs", &epochs, "--clients", "2", "--model"]);
    arguments.extend(model);
    arguments.extend(["--cache", "1048576", "--json", json.path()]);
    if let Some(server) = server {
        arguments.extend(["--server", server.url()]);
    }
    Program::bench(&arguments).finish(LIMIT);
    serde_json::from_slice(&fs::read(&json.0).expect("read the report")).expect("a report is JSON")
}

/// Both ways reach the same loss, far below the first.
fn compare(shm: &mf::Report, rdma: &mf::Report) {
    let loss = |report: &mf::Report| {
        let (first, last) = (report.epochs.first().expect("epochs"), report.epochs.last().expect("epochs"));
        assert!(last.loss < first.loss / 2.0, "it learned nothing: from {} to {}", first.loss, last.loss);
        last.loss
    };
    let (over_shm, over_rdma) = (loss(shm), loss(rdma));
    let apart = (over_rdma / over_shm - 1.0).abs();
    println!(
        "loss {over_rdma:.5e} in {:.1} s over rdma, {over_shm:.5e} in {:.1} s over shm: {:.2} % apart",
        rdma.seconds,
        shm.seconds,
        100.0 * apart
    );
    println!("bytes over rdma: {:?}; clock differentials: {:?}", rdma.bytes, rdma.clock_differential);
    assert!(apart < TOLERANCE, "{over_rdma} over rdma, {over_shm} over shm");
    assert!(rdma.bytes.read > 0 && rdma.bytes.pushed > 0 && rdma.bytes.sent > 0, "{:?}", rdma.bytes);
}

#[test]
fn rdma_reaches_the_loss_of_shm() {
    const EPOCHS: u32 = 10;
    let data = slice(200);
    let shm = train(&data, EPOCHS, ESSP, None);
    compare(&shm, &train(&data, EPOCHS, ESSP, Some(&Server::start(2))));
}

#[test]
fn under_a_value_bound_rdma_reaches_the_loss_of_shm() {
    const EPOCHS: u32 = 5;
    const VAP: &[&str] = &["vap", "--v0", "2"];
    let data = slice(100);
    let shm = train(&data, EPOCHS, VAP, None);
    compare(&shm, &train(&data, EPOCHS, VAP, Some(&Server::start(2))));
}

#[test]
fn lost_packets_are_sent_again() {
    const EPOCHS: u32 = 5;
    let data = slice(100);
    let shm = train(&data, EPOCHS, ESSP, None);
    let server = Server::start(2);
    let lossy = Lossy::new(1);
    let rdma = train(&data, EPOCHS, ESSP, Some(&server));
    let lost = lossy.lost();
    drop(lossy);
    println!("{lost} packets were lost");
    assert!(lost > 0, "no packet was lost: this test has shown nothing");
    compare(&shm, &rdma);
}
