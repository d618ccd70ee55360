//! A server and two clients, each a process, learn by matrix factorisation and LDA, as far as one does without RDMA.

use std::{fmt::Write as _, fs, path::PathBuf, time::Duration};

use fervor_bench::data::digits;
use serde_json::Value;

use crate::{
    network::Lossy,
    program::{Program, Server},
};

/// A job takes seconds on an idle machine, and minutes beside others.
const LIMIT: Duration = Duration::from_secs(400);
/// The demo's target: this part of the loss before the first epoch.
const TARGET: f64 = 0.04;
/// How far below one thread's log-likelihood a run may stay, as its workers see it.
const BELOW: f64 = 0.012;
/// The same when all has settled: the workers saw parts of it, each at its own time.
const SETTLED_BELOW: f64 = 0.03;

const SSP: &[&str] = &["ssp", "--staleness", "3"];
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
fn pictures(number: u32) -> Scratch {
    let mut text = String::new();
    for entry in digits::ratings().entries.iter().filter(|entry| entry.row < number) {
        writeln!(text, "{} {} {}", entry.row, entry.column, entry.value).expect("write to a string");
    }
    let file = Scratch::new("digits.txt");
    fs::write(&file.0, text).expect("write a file");
    file
}

/// Runs a job to its end; what it reports.
fn run(arguments: &[&str]) -> Value {
    let json = Scratch::new("report.json");
    Program::bench(&[arguments, &["--json", json.path()]].concat()).finish(LIMIT);
    let report: Value = serde_json::from_slice(&fs::read(&json.0).expect("read the report")).expect("JSON");
    println!(
        "{} {}: {} epochs in {:.1} s; time: {}; bytes: {}; clock differentials: {}",
        report["application"],
        report["model"],
        report["epochs"].as_array().expect("epochs").len() - 1,
        number(&report["seconds"]),
        report["time"],
        report["bytes"],
        report["clock_differential"]
    );
    report
}

/// Runs `job` by two clients over RDMA, every read checked; what it reports.
fn over_rdma(job: &[&str], model: &[&str], server: &Server) -> Value {
    let place = ["--clients", "2", "--cache", "1048576", "--server", server.url(), "--check", "--model"];
    let report = run(&[job, &place, model].concat());
    let bytes = &report["bytes"];
    assert!(number(&bytes["read"]) > 0.0 && number(&bytes["sent"]) > 0.0, "{bytes}");
    // Under SSP only rows that stay torn are asked for and pushed.
    assert!(model[0] == "ssp" || number(&bytes["pushed"]) > 0.0, "{bytes}");
    report
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

/// Learns the digits to the demo's target, with factors of the demo's size; stops there.
fn factorise(data: &Scratch, model: &[&str], server: &Server) {
    let target = TARGET.to_string();
    // Over shared memory it takes 22 to 29 epochs.
    let job = ["mf", "--data", data.path(), "--rank", "20", "--clocks-per-epoch", "5", "--epochs", "100"];
    let report = over_rdma(&[&job[..], &["--target-fraction", &target]].concat(), model, server);
    let (first, last) = (&report["epochs"][0]["loss"], &report["epochs"].as_array().expect("epochs").last());
    assert!(
        report["seconds_to_target"].is_number(),
        "{model:?} has not come to the target, {target} of the first loss: from {first} to {last:?}"
    );
}

#[test]
fn mf_reaches_the_target_of_the_demo() {
    factorise(&pictures(100), ESSP, &Server::start(2));
}

#[test]
fn mf_reaches_the_target_of_the_demo_under_a_value_bound() {
    factorise(&pictures(100), &["vap", "--v0", "2"], &Server::start(2));
}

#[test]
fn mf_reaches_the_target_of_the_demo_when_packets_are_lost() {
    let data = pictures(50);
    let server = Server::start(2);
    let lossy = Lossy::new(1);
    factorise(&data, ESSP, &server);
    let lost = lossy.lost();
    drop(lossy);
    println!("{lost} packets were lost");
    assert!(lost > 0, "no packet was lost: this test has shown nothing");
}

/// Learns topics until they fit as well as those of one thread, almost; stops there.
fn find_topics(model: &[&str]) {
    let job =
        ["lda", "--generate", "300x200:20000", "--topics", "20", "--beta", "0.05", "--clocks-per-epoch", "5"];
    let one = run(&[&job[..], &["--no-server", "--clients", "1", "--epochs", "80"]].concat());
    let one = number(&one["log_likelihood"]);
    let target = format!("--target-loglikelihood={}", (1.0 + BELOW) * one);
    // A worker of VAP may be far ahead of another, so it goes on until both are there: passes say nothing.
    let job = [&job[..], &["--epochs", "1000", &target]].concat();
    let report = over_rdma(&job, model, &Server::start(2));
    let last = number(&report["log_likelihood"]);
    println!("log-likelihood {last:.5e}, of one thread {one:.5e}: {:+.2} %", 100.0 * (1.0 - last / one));
    assert!(report["seconds_to_target"].is_number(), "{model:?} has not come to {target}: {last}");
    assert!(last > (1.0 + SETTLED_BELOW) * one, "{model:?}: {last}, and of one thread {one}");
}

#[test]
fn lda_comes_as_far_as_one_thread_under_ssp() {
    find_topics(SSP);
}

#[test]
fn lda_comes_as_far_as_one_thread_under_essp() {
    find_topics(ESSP);
}

#[test]
fn lda_comes_as_far_as_one_thread_under_a_value_bound() {
    find_topics(&["vap", "--v0", "1000"]);
}
