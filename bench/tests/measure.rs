//! Latency, the check of the guarantee, and the demo, as a user runs them.

mod common;

use std::{fs, io::Read as _};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use common::{Folder, fail, succeed};
use hdrhistogram::{
    Histogram,
    serialization::{
        Deserializer,
        interval_log::{IntervalLogIterator, LogEntry},
    },
};

#[test]
fn each_operation_gives_one_set_of_figures() {
    for (op, count) in [("hit", 3200), ("miss", 1000), ("visible", 200)] {
        let folder = Folder::new();
        let arguments = [
            "latency".into(),
            format!("--op={op}"),
            "--size=64".into(),
            format!("--count={count}"),
            format!("--json={}", folder.file("figures.json")),
            format!("--hlog={}", folder.file("figures.hlog")),
        ];
        let out = succeed(&arguments);
        assert!(out.contains("p99.9") && out.contains(op), "{out}");
        let figures = folder.json("figures.json");
        assert_eq!(
            (&figures["op"], &figures["size"], &figures["count"]),
            (&op.into(), &64.into(), &count.into())
        );
        let at = |name: &str| figures[name].as_u64().unwrap_or_else(|| panic!("{name}: {figures}"));
        let ladder = ["p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns"].map(at);
        assert!(ladder.is_sorted() && ladder[0] > 0, "{ladder:?}");

        let mut text = String::new();
        fs::File::open(folder.file("figures.hlog")).unwrap().read_to_string(&mut text).unwrap();
        let (tag, histogram) = only_interval(&text);
        assert_eq!(tag, format!("{op}-64"));
        assert_eq!(histogram.value_at_quantile(0.5), at("p50_ns"));
        assert_eq!(histogram.len() * at("group"), count);
    }
}

/// The one interval of a log: its tag and its histogram.
fn only_interval(log: &str) -> (String, Histogram<u64>) {
    let mut found =
        IntervalLogIterator::new(log.as_bytes()).filter_map(|entry| match entry.expect("a sound log") {
            LogEntry::Interval(interval) => {
                let packed = BASE64_STANDARD.decode(interval.encoded_histogram()).expect("sound base64");
                let histogram =
                    Deserializer::new().deserialize(&mut packed.as_slice()).expect("a sound histogram");
                Some((interval.tag().expect("a tag").as_str().to_owned(), histogram))
            }
            _ => None,
        });
    let only = found.next().expect("an interval");
    assert!(found.next().is_none());
    only
}

#[test]
fn several_operations_and_sizes_are_an_array() {
    let folder = Folder::new();
    let json = format!("--json={}", folder.file("figures.json"));
    succeed(&["latency", "--op=miss", "--size=8", "--size=4096", "--count=200", &json]);
    let figures = folder.json("figures.json");
    let sizes: Vec<_> =
        figures.as_array().expect("an array").iter().map(|one| one["size"].as_u64()).collect();
    assert_eq!(sizes, [Some(8), Some(4096)]);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    for (arguments, message) in [
        (&["latency", "--size=63"][..], "a multiple of 8"),
        (&["latency", "--op=hit", "--beside-perftest", "--server=shm:///x"], "--op miss and --op visible"),
        (&["latency", "--op=miss", "--beside-perftest"], "--server"),
        (&["latency", "--op=miss", "--max-ratio=2"], "--beside-perftest"),
        (&["check", "--width=3"], "4 workers need as many elements"),
        (&["check", "--server=shm:///nonexistent/s.sock"], "/nonexistent/s.sock"),
    ] {
        let said = fail(arguments);
        assert!(said.contains(message), "{arguments:?}: {said}");
    }
}

#[test]
fn every_model_keeps_its_guarantee() {
    for model in ["bsp", "ssp", "essp", "async"] {
        let out = succeed(&[
            "check",
            "--model",
            model,
            "--clocks=5000",
            "--clients=2",
            "--workers=2",
            "--shards=2",
        ]);
        // 4 workers, 5000 clocks, 4 rows before and 1 after the updates, 40 elements each.
        assert!(out.contains(model) && out.contains(" 4000000 "), "{out}");
    }
}

#[test]
fn the_demo_draws_curves_and_factors() {
    let folder = Folder::new();
    let out = folder.file("out");
    let said = succeed(&["demo", "--out", &out, "--epochs=5", "--rank=4"]);
    for model in ["bsp", "ssp(3)", "essp(3)", "async"] {
        assert!(said.contains(model), "{said}");
    }
    let read = |name: &str| fs::read_to_string(format!("{out}/{name}")).expect("it was written");
    let curves = read("convergence.svg");
    assert!(
        curves.starts_with("<svg") && curves.contains("essp(3)") && curves.matches("<polyline").count() >= 8
    );
    assert!(read("factors.svg").contains("4 learned factors"));
    let results: serde_json::Value = serde_json::from_str(&read("results.json")).expect("it is JSON");
    assert_eq!(results.as_array().map(Vec::len), Some(4));
}
