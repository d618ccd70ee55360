//! Matrix factorisation as a user runs it: parent, server and clients are processes.

mod common;

use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    process::{Child, Stdio},
};

use common::{Folder, Server, bench, by_hand, check_report, eventually, fail, objectives, results, succeed};
use serde_json::Value;

const TINY: [&str; 6] =
    ["mf", "--generate=200x50:5000", "--rank=8", "--clocks-per-epoch=5", "--step=0.02", "--decay=1"];

fn run(more: &[&str]) -> Value {
    results(&[&TINY[..], more].concat())
}

fn losses(results: &Value) -> Vec<f64> {
    objectives(results, "loss")
}

#[test]
fn every_model_trains_and_reports() {
    let models = [("bsp", Some(0)), ("ssp", Some(3)), ("essp", Some(3)), ("async", None), ("vap", None)];
    let both = models.into_iter().flat_map(|model| [(model, false), (model, true)]);
    for ((model, staleness), copies) in both {
        let name = format!("--model={model}");
        let mut arguments = vec![&*name, "--epochs=20", "--workers=2", "--shards=2", "--check"];
        arguments.extend(copies.then_some("--copies"));
        arguments.extend((model == "vap").then_some("--v0=2"));
        let results = run(&arguments);
        assert_eq!(results["application"], "mf");
        assert_eq!(results["data"]["ratings"], 5000);
        check_report(&results, model, staleness, copies);
        let losses = losses(&results);
        assert_eq!(losses.len(), 21, "{model}");
        assert!(losses[20] < 0.5 * losses[0], "{model}: {losses:?}");
    }
}

#[test]
fn one_worker_on_a_server_computes_what_a_plain_thread_computes() {
    let one = ["--clients=1", "--workers=1", "--epochs=6"];
    let plain = losses(&run(&[&one[..], &["--no-server"]].concat()));
    for model in ["bsp", "essp", "async"] {
        let served = losses(&run(&[&one[..], &["--model", model]].concat()));
        assert_eq!(served.len(), plain.len());
        for (served, plain) in served.iter().zip(&plain) {
            // Adding a sum of changes rounds differently from adding each.
            assert!((served - plain).abs() <= 1e-4 * plain, "{model}: {served}, not {plain}");
        }
    }
}

#[test]
fn a_target_ends_the_job() {
    for kind in [&["--no-server"][..], &["--model=essp"]] {
        let results = run(&[kind, &["--epochs=2000", "--target-fraction=0.3"]].concat());
        let losses = losses(&results);
        let target = results["target_loss"].as_f64().expect("a target");
        assert!((target / losses[0] - 0.3).abs() < 1e-9);
        assert!(losses.len() < 1000, "it went on for {} epochs", losses.len());
        let reached = losses.iter().position(|loss| *loss <= target).expect("it was reached");
        assert_eq!(results["seconds_to_target"], results["epochs"][reached]["seconds"]);
    }
    let absolute = run(&["--no-server", "--epochs=3", "--target-loss=1"]);
    assert_eq!(absolute["target_loss"], 1.0);
    assert!(absolute["seconds_to_target"].is_null() && losses(&absolute).len() == 4);
}

#[test]
fn files_are_trained_on_and_factors_written() {
    let folder = Folder::new();
    let lines: String =
        (0..600).map(|i| format!("{},{},{}\n", i % 30, i * 7 % 20, (i % 5) as f32 + 0.5)).collect();
    fs::write(folder.file("ratings.csv"), format!("userId,movieId,rating\n{lines}")).unwrap();
    let out = succeed(&[
        "mf",
        "--data",
        &folder.file("ratings.csv"),
        "--rank=3",
        "--epochs=3",
        "--factors",
        &folder.file("factors.json"),
    ]);
    assert!(out.contains("ratings.csv (MovieLens, plain): 600 ratings of 30 x 20"), "{out}");
    let factors = folder.json("factors.json");
    let factors = factors.as_array().expect("an array");
    assert_eq!(factors.len(), 20);
    assert!(
        factors.iter().all(|factor| factor.as_array().is_some_and(|numbers| numbers.len() == 3)),
        "{factors:?}"
    );
    assert_ne!(factors[0][0], 0.0);
}

#[test]
fn clients_started_by_hand_work_together_on_a_running_server() {
    let folder = Folder::new();
    let server = Server::start(&format!("shm://{}", folder.file("s.sock")), &["--shards=1"]);
    let parts = by_hand(&[&TINY[..], &["--epochs=5"]].concat(), &server).map(|part| losses(&part));
    let plain = losses(&run(&["--no-server", "--epochs=5"]));
    // Epoch 0 is exact: both parts together are the whole.
    assert!((parts[0][0] + parts[1][0] - plain[0]).abs() < 1e-6 * plain[0]);
    assert!(parts.iter().all(|part| part.len() == 6 && part[5] < part[0]), "{parts:?}");

    let again = ["--clients=1", "--server", &server.url, "--client-index=0"];
    let said = fail(&[&TINY[..], &again].concat());
    assert!(said.contains("has run on these servers before"), "{said}");
}

#[test]
fn bad_input_is_refused_with_the_cure() {
    let folder = Folder::new();
    fs::write(folder.file("bad.csv"), "userId,movieId,rating\n1,2,3\n1,2,many\n").unwrap();
    let bad = folder.file("bad.csv");
    for (arguments, message) in [
        (vec!["mf", "--data", &bad], "bad.csv:3: the value `many` is not a number; the line is `1,2,many`"),
        (vec!["mf"], "--digits"),
        (vec!["mf", "--digits", "--generate=1x1:1"], "cannot be used with"),
        (vec!["mf", "--generate=9x9"], "write ROWSxCOLS:RATINGS"),
        (
            vec!["mf", "--digits", "--model=bsp", "--staleness=2"],
            "--staleness 2 goes with --model ssp or essp",
        ),
        (vec!["mf", "--digits", "--step=-1"], "a step is a number above 0"),
        (
            vec!["mf", "--digits", "--server=udp://a:1"],
            "shm:///path/to/socket, rdma://host:port and tcp://host:port",
        ),
        (vec!["mf", "--digits", "--server=shm:///nonexistent/s.sock"], "/nonexistent/s.sock"),
        (vec!["mf", "--digits", "--client-index=0"], "--server"),
        (vec!["mf", "--digits", "--server=shm:///s", "--client-index=2"], "with --clients 2 it is 0 to 1"),
        (vec!["mf", "--digits", "--memory=much"], "much"),
        (vec!["mf", "--digits", "--memory=4K"], "table `mf-"),
    ] {
        let said = fail(&arguments);
        assert!(said.contains(message), "{arguments:?}: {said}");
    }
}

#[test]
fn a_step_that_is_too_large_is_named() {
    for more in [&["--no-server"][..], &[]] {
        let arguments: Vec<&str> =
            ["mf", "--digits", "--step=10"].into_iter().chain(more.iter().copied()).collect();
        let said = fail(&arguments);
        assert!(said.contains("the step is too large, lower --step"), "{said}");
    }
}

/// A job that would run for very long, and the processes that it has started.
fn long_job() -> (Child, Vec<u32>) {
    let job = bench(&TINY)
        .args(["--epochs=1000000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let children = || -> Vec<u32> {
        let path = format!("/proc/{0}/task/{0}/children", job.id());
        let text = fs::read_to_string(path).unwrap_or_default();
        text.split_whitespace().map(|pid| pid.parse().expect("a number")).collect()
    };
    // A server that has become one, and two clients.
    let name = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    eventually("a server and two clients run", || {
        let names: Vec<String> = children().iter().map(name).collect();
        names.len() == 3 && names.iter().any(|name| name.trim() == "fervor-server")
    });
    let children = children();
    (job, children)
}

/// Whether a process is there and not just waiting to be waited for.
fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

#[test]
fn nothing_is_left_over_when_the_parent_is_killed() {
    let (mut job, children) = long_job();
    let prefix = format!("fervor-{}-", job.id());
    let sockets = || -> Vec<_> {
        let entries = fs::read_dir(std::env::temp_dir()).expect("the folder is there");
        entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)).collect()
    };
    eventually("the socket is there", || !sockets().is_empty());
    job.kill().expect("it can be killed");
    eventually("server and clients have ended", || children.iter().all(|pid| !runs(*pid)));
    eventually("the socket is gone", || sockets().is_empty());
    assert_eq!(job.wait().expect("it ended").signal(), Some(9));
}

#[test]
fn a_client_or_server_that_dies_ends_the_job_with_an_error() {
    for (victim, message) in
        [("fervor-server", "fervor-server ended by itself"), ("fervor-bench", "ended without saying why")]
    {
        let (job, children) = long_job();
        let pid = children
            .iter()
            .find(|pid| {
                fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == victim)
            })
            .expect("it runs");
        let pid = rustix::process::Pid::from_raw(*pid as i32).expect("it has a number");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it can be killed");
        let output = job.wait_with_output().expect("the job ends");
        assert!(!output.status.success());
        let error = String::from_utf8_lossy(&output.stderr);
        // Clients may be quicker to say that the server is lost.
        assert!(error.contains(message) || victim == "fervor-server" && error.contains("is lost"), "{error}");
        assert!(children.iter().all(|pid| !runs(*pid)), "a process is left over");
    }
}

#[test]
fn a_run_without_a_server_says_how_many_threads_trained() {
    for (threads, words) in [("--workers=3", "6 plain threads"), ("--workers=1", "2 plain threads")] {
        let out = succeed(&[&TINY[..], &["--no-server", "--epochs=1", threads]].concat());
        assert_eq!(out.matches(words).count(), 2, "in the head and in the table: {out}");
    }
    assert_eq!(run(&["--no-server", "--epochs=1", "--clients=3"])["threads"], 3);
}

#[test]
fn a_checked_job_whose_workers_stop_at_different_times_keeps_its_promise() {
    // Long enough that the workers are in different passes when the target is reached; and clocks go on without those that have left.
    for kind in
        [&["--model=essp"][..], &["--model=ssp", "--staleness=1"], &["--model=bsp"], &["--model=async"]]
    {
        let job = ["--check", "--workers=2", "--shards=2", "--epochs=400", "--target-fraction=0.5"];
        let results = run(&[kind, &job].concat());
        assert!(results["seconds_to_target"].is_number(), "{kind:?}");
    }
}
