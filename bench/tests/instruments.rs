//! What is measured beside a limit, as a user runs it: `scaling`, `limits`.

mod common;

use std::fs;

use common::{Folder, fail, number, succeed};

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
