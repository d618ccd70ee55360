//! What is measured beside a limit, as a user runs it: `scaling`, `limits`, `throughput`.

mod common;

use std::fs;

use common::{Folder, fail, number, succeed};
use fervor_verbs::memory::HugePage;

#[test]
fn scaling_runs_every_setting_beside_plain_threads() {
    let folder = Folder::new();
    let [json, svg] =
        ["json", "svg"].map(|kind| format!("--{kind}={}", folder.file(&format!("scaling.{kind}"))));
    let tiny = ["scaling", "--generate=200x50:5000", "--rank=8", "--epochs=3", "--rounds=2", "--workers=2"];
    let out = succeed(&[&tiny[..], &["--models=essp,bsp", "--shards=1,2", &json, &svg]].concat());
    assert!(out.contains("essp(3)") && out.contains("medians of 2 rounds"), "{out}");

    let results = folder.json("scaling.json");
    assert!(results["machine"]["processor"].is_string());
    let rows = results["rows"].as_array().expect("rows");
    let of = |model: &str, shards: u64, clients: u64, workers: u64| {
        let found: Vec<_> = rows
            .iter()
            .filter(|row| {
                row["model"] == model
                    && row["shards"] == shards
                    && row["clients"] == clients
                    && row["workers"] == workers
            })
            .collect();
        assert_eq!(found.len(), 1, "{model}, {shards} shards, {clients} x {workers}");
        found[0]
    };
    assert_eq!(rows.len(), 12);
    for model in ["essp(3)", "bsp"] {
        for shards in [1, 2] {
            for (clients, workers) in [(1, 1), (2, 1), (1, 2)] {
                let row = of(model, shards, clients, workers);
                assert_eq!(row["job"], "mf");
                let [seconds, plain, ratio, waiting, communication] =
                    ["seconds", "plain_seconds", "ratio", "waiting", "communication"]
                        .map(|name| number(&row[name]));
                assert!(seconds > 0.0 && (ratio - seconds / plain).abs() < 1e-9, "{row}");
                assert!(waiting >= 0.0 && communication > 0.0 && waiting + communication <= 1.0, "{row}");
            }
        }
    }
    // As many plain threads, once for all settings.
    let plain = |clients, workers| number(&of("bsp", 2, clients, workers)["plain_seconds"]);
    assert_eq!(plain(2, 1), plain(1, 2));

    let svg = fs::read_to_string(folder.file("scaling.svg")).expect("it was written");
    assert!(svg.contains("one plain thread") && svg.contains("bsp, one client, 2 shards"));
}

#[test]
fn scaling_fails_above_its_bound_and_refuses_nonsense() {
    let tiny = ["scaling", "--generate=200x50:5000", "--rank=8", "--epochs=1", "--rounds=1", "--workers=1"];
    let said = fail(&[&tiny[..], &["--max-ratio=0.001"]].concat());
    assert!(said.contains("times as long as plain threads, more than 0.001"), "{said}");
    for (arguments, message) in [
        (&["--max-ratio=0"][..], "--max-ratio 0: a ratio is a number above 0"),
        (&["--models=vap"], "--models vap: its bound depends on the job"),
        (&["--shards=0"], "`0` is no number of shards: write 1 to 256, or auto"),
        (&["--generate=9"], "mf, 1 plain thread"),
    ] {
        let said = fail(&[&["scaling", "--workers=1"][..], arguments].concat());
        assert!(said.contains(message), "{arguments:?}: {said}");
    }
}

#[test]
fn a_start_is_timed_beside_filling_as_much_memory() {
    let folder = Folder::new();
    let json = format!("--json={}", folder.file("start.json"));
    let tiny = ["start", "--memory=3M", "--shards=2", "--rounds=2"];
    let out = succeed(&[&tiny[..], &[&json]].concat());
    assert!(out.contains("3.0 MiB in 2 shards, ordinary pages; medians of 2 rounds"), "{out}");
    let started = folder.json("start.json");
    assert!(
        ["start", "heap", "shared", "again"].iter().all(|what| number(&started[*what]) > 0.0),
        "{started}"
    );

    let said = fail(&[&tiny[..], &["--max-ratio=0.000001"]].concat());
    assert!(said.contains("times as long as filling as much memory, more than 0.000001"), "{said}");
    let said = fail(&[&tiny[..], &["--max-ratio=0"]].concat());
    assert!(said.contains("--max-ratio 0: a ratio is a number above 0"), "{said}");
    let said = fail(&[&tiny[..], &["--huge-pages=3M"]].concat());
    assert!(said.contains("`3M` is no size of huge pages"), "{said}");
}

/// Figures of ordinary pages are never taken for those of huge ones.
#[test]
fn a_start_on_huge_pages_that_are_not_there_has_no_figures() {
    let page = HugePage::Mib2;
    let more = page.pool().map_or(0, |pool| pool.total) + 1;
    let said = fail(&["start", "--huge-pages=2M", "--rounds=1", &format!("--memory={}M", 2 * more)]);
    assert!(
        said.contains("huge pages of 2 MiB") && said.contains("shard 0 lies on ordinary pages"),
        "{said}"
    );
}

#[test]
fn limits_are_figures_of_this_machine() {
    let folder = Folder::new();
    let json = format!("--json={}", folder.file("limits.json"));
    let out = succeed(&["limits", "--no-perftest", "--size=64,4096", &json]);
    assert!(out.contains("a load that waits for the one before, over 16.0 KiB"), "{out}");
    assert!(out.contains("left out: perftest: --no-perftest"), "{out}");
    let limits = folder.json("limits.json");
    assert!(limits["machine"]["processor"].is_string());
    let limits = limits["limits"].as_array().expect("limits");
    assert!(limits.iter().all(|limit| number(&limit["ns"]) > 0.0), "{limits:?}");
    let copies = |bytes: u64| limits.iter().filter(|limit| limit["bytes"] == bytes).count();
    assert_eq!((copies(64), copies(4096), copies(512)), (2, 2, 0));
    assert!(fail(&["limits", "--size=0"]).contains("--size 0: write 1 to"));
}

#[test]
fn throughput_has_a_row_for_each_setting() {
    let folder = Folder::new();
    let json = format!("--json={}", folder.file("throughput.json"));
    let quick =
        ["throughput", "--duration=0.2", "--size=64", "--workers=1,2", "--outstanding=1,8", "--batch=32"];
    let out = succeed(&[&quick[..], &["--shards=2", &json]].concat());
    assert!(out.contains("BW average[MB/sec]") && out.contains("MsgRate[Mpps]"), "{out}");
    let results = folder.json("throughput.json");
    let rows = results["rows"].as_array().expect("rows");
    // Two numbers of workers; READs of many rows with two depths.
    assert_eq!(rows.len(), 2 * 10);
    for op in ["hit", "in-place", "read", "many-hit", "many-in-place", "range", "many-read", "inc", "push"] {
        let of = rows.iter().filter(|row| row["op"] == op);
        assert_eq!(of.count(), if op == "many-read" { 4 } else { 2 }, "{op}");
    }
    for row in rows {
        let [seconds, rows, bytes, peak] =
            ["seconds", "rows_per_second", "bytes_per_second", "peak_bytes_per_second"]
                .map(|name| number(&row[name]));
        let iterations = number(&row["iterations"]);
        assert!(iterations > 0.0 && (rows - iterations / seconds).abs() < 1e-6 * rows, "{row}");
        assert!((bytes - 64.0 * rows).abs() < 1e-6 * bytes && peak > 0.0, "{row}");
        assert!(number(&row["limit"]["ns"]) > 0.0 && row["shards"] == 2, "{row}");
    }
}

#[test]
fn pushes_over_tcp_are_set_beside_a_stream() {
    let folder = Folder::new();
    let json = format!("--json={}", folder.file("stream.json"));
    let measured = ["throughput", "--op=push", "--beside-stream", "--rounds=2", "--duration=0.3", &json];
    let out = succeed(&[&measured[..], &["--size=4096"]].concat());
    assert!(out.contains("TCP stream"), "{out}");
    let results = folder.json("stream.json");
    let beside = &results["rows"][0]["beside"];
    let [ours, theirs, ratio] = ["best_ours", "best_theirs", "ratio"].map(|name| number(&beside[name]));
    assert!(ours > 0.0 && theirs > 0.0 && (ratio - ours / theirs).abs() < 1e-9, "{beside}");
    assert_eq!(beside["rounds"].as_array().map(Vec::len), Some(2));
}

#[test]
fn throughput_refuses_nonsense_with_the_cure() {
    for (arguments, message) in [
        (&["--size=6"][..], "--size 6: an element has 4 bytes"),
        (&["--duration=0"], "--duration 0: write a number of seconds above 0"),
        (
            &["--op=hit", "--beside-perftest", "--server=rdma://x:1"],
            "--op read, --op many-read and --op push",
        ),
        (&["--op=read", "--beside-perftest"], "Start one with `fervor-server --listen rdma://ADDRESS:7471`"),
        (&["--min-ratio=1"], "--min-ratio goes with --beside-perftest or --beside-stream"),
        (&["--op=read", "--beside-stream"], "a stream has nothing like --op read"),
        (&["--op=inc", "--size=4", "--server=shm:///nonexistent/s.sock"], "/nonexistent/s.sock"),
    ] {
        let said = fail(&[&["throughput"][..], arguments].concat());
        assert!(said.contains(message), "{arguments:?}: {said}");
    }
}
