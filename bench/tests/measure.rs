//! Latency, the check of the guarantee, and the demo, as a user runs them.

mod common;

use std::{
    fs,
    io::Read as _,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use common::{Folder, Server, bench, fail, succeed};
use hdrhistogram::{
    Histogram,
    serialization::{
        Deserializer,
        interval_log::{IntervalLogIterator, LogEntry},
    },
};

#[test]
fn each_operation_gives_one_set_of_figures() {
    let ops = [
        ("hit", 3200, true),
        ("in-place", 3200, true),
        ("miss", 1000, true),
        ("many", 200, true),
        ("inc", 3200, true),
        ("clock", 1000, false),
        ("visible", 200, true),
        ("barrier", 200, true),
    ];
    for (op, count, limited) in ops {
        let folder = Folder::new();
        let arguments = [
            "latency".into(),
            format!("--op={op}"),
            "--size=64".into(),
            format!("--iterations={count}"),
            format!("--json={}", folder.file("figures.json")),
            format!("--hlog={}", folder.file("figures.hlog")),
        ];
        let out = succeed(&arguments);
        assert!(out.contains("t_typical[usec]") && out.contains("99.9% percentile[usec]"), "{out}");
        let figures = folder.json("figures.json");
        assert_eq!(
            (&figures["op"], &figures["size"], &figures["count"]),
            (&op.into(), &64.into(), &count.into())
        );
        let at = |name: &str| figures[name].as_u64().unwrap_or_else(|| panic!("{name}: {figures}"));
        let ladder = ["min_ns", "p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns"].map(at);
        assert!(ladder.is_sorted() && ladder[0] > 0, "{ladder:?}");
        // Between cores there is a limit only where there are two.
        let one_core = std::thread::available_parallelism().is_ok_and(|cores| cores.get() == 1);
        let between = matches!(op, "visible" | "barrier");
        assert_eq!(figures["limit"]["ns"].is_number(), limited && !(between && one_core), "{figures}");

        let mut text = String::new();
        fs::File::open(folder.file("figures.hlog")).unwrap().read_to_string(&mut text).unwrap();
        let (tag, histogram) = only_interval(&text);
        assert_eq!(tag, format!("{op}-64"));
        assert_eq!(histogram.value_at_quantile(0.5), at("p50_ns"));
        assert_eq!(histogram.len() * at("group"), count);
    }
}

#[test]
fn strangers_besiege_a_server_and_leave_nothing_behind() {
    for way in ["shm", "tcp"] {
        let via = format!("--via={way}");
        let few = ["flood", "--half-open=40", "--garbage=20", "--seconds=0.5", "--rounds=1", &via]
            .map(String::from);
        let out = succeed(&few);
        let row: Vec<&str> =
            out.lines().find(|line| line.starts_with(way)).expect("a row").split_whitespace().collect();
        let [_, without, with, _, opened, _, "held", garbage, "0", before, "->", after, ..] = row[..] else {
            panic!("{out}")
        };
        assert!([without, with].iter().all(|time| time.parse::<f64>().unwrap() > 0.0), "{out}");
        assert!(opened.trim_end_matches(',').parse::<u32>().unwrap() >= 40, "{out}");
        assert!(garbage.parse::<u32>().unwrap() > 0, "{out}");
        assert_eq!(before, after, "sockets: {out}");
    }
    let much = [
        "flood",
        "--half-open=1",
        "--garbage=1000000",
        "--seconds=0.2",
        "--rounds=1",
        "--via=tcp",
        "--check",
    ];
    let error = fail(&much.map(String::from));
    assert!(error.contains("of 1000000 handshakes of garbage"), "{error}");
}

#[test]
fn a_sweep_is_figures_values_and_a_picture_that_can_be_compared() {
    let folder = Folder::new();
    let file = |name: &str| folder.file(name);
    let run = |name: &str, more: &[String]| {
        let hlog = format!("--hlog={}", file(&format!("{name}.hlog")));
        let arguments: Vec<String> =
            ["latency", "--op=inc,miss", "--size=2..16", "--count=200", "--no-limits"].map(Into::into).into();
        succeed(&[&arguments[..], &[hlog], more].concat())
    };
    run("before", &[]);
    let more = [
        format!("--csv={}", file("after.csv")),
        format!("--svg={}", file("after.svg")),
        format!("--svg-with={}", file("before.hlog")),
    ];
    assert!(!run("after", &more).contains("what the limit is"));

    let csv = fs::read_to_string(file("after.csv")).unwrap();
    let firsts: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').take(3).collect()).collect();
    assert_eq!(firsts[0], ["op", "bytes", "iterations"]);
    assert_eq!(firsts[1..4], [["inc", "4", "208"], ["inc", "8", "208"], ["inc", "16", "208"]]);
    assert_eq!(firsts.len(), 7);
    let svg = fs::read_to_string(file("after.svg")).unwrap();
    assert!(svg.contains("before: miss-16") && svg.contains("inc-4"), "{svg}");

    let compared = file("compared.svg");
    let out = succeed(&["compare", &file("before.hlog"), &file("after.hlog"), &format!("--svg={compared}")]);
    assert!(out.contains("before") && out.contains("after") && out.matches("miss-8").count() == 5, "{out}");
    assert!(fs::read_to_string(compared).unwrap().contains("after: inc-4"));
    let said = fail(&["compare", &file("before.hlog"), &file("after.hlog"), "--max-ratio=0.0001"]);
    assert!(said.contains("more than 0.0001 times"), "{said}");
}

#[test]
fn an_open_loop_begins_when_it_is_due() {
    let folder = Folder::new();
    let json = format!("--json={}", folder.file("figures.json"));
    let out = succeed(&["latency", "--op=hit", "--size=64", "--rate=2000", "--duration=0.25", &json]);
    assert!(out.contains("2000 operations were due in a second"), "{out}");
    let figures = folder.json("figures.json");
    assert_eq!(
        (&figures["group"], &figures["count"], &figures["rate"]),
        (&1.into(), &500.into(), &2000.0.into())
    );
}

/// The reader finds everything in its cache, and so does not notice by itself that the server is gone.
#[test]
fn a_reader_that_waits_notices_that_its_server_is_gone() {
    let folder = Folder::new();
    let server = Server::start(&format!("shm://{}", folder.file("s.sock")), &[]);
    let mut command =
        bench(&["latency", "--op=visible", "--size=64", "--duration=60", "--server", &server.url]);
    let client = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    thread::sleep(Duration::from_millis(700));
    drop(server);
    let killed = Instant::now();
    let output = client.wait_with_output().expect("it ends");
    assert!(killed.elapsed() < Duration::from_secs(5), "it took {:?}", killed.elapsed());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("s.sock"), "{said}");
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
        (&["latency", "--size=63"][..], "a multiple of 4"),
        (&["latency", "--size=1..2"], "none of its sizes is a multiple of 4"),
        (&["latency", "--rate=0"], "--rate 0: write a number above 0"),
        (&["latency", "--duration=1", "--iterations=100"], "cannot be used with"),
        (&["compare", "/nonexistent/a.hlog", "/nonexistent/b.hlog"], "cannot read /nonexistent/a.hlog"),
        (
            &["latency", "--op=hit", "--beside-perftest", "--server=shm:///x"],
            "--op miss, --op visible and --op barrier",
        ),
        (
            &["latency", "--op=miss", "--beside-perftest"],
            "Start one with `fervor-server --listen rdma://ADDRESS:7471`",
        ),
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
