//! Running the program, as a user does.

#![allow(dead_code, reason = "each test program uses a part of this")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

/// The program with these arguments.
pub fn bench<S: AsRef<str>>(arguments: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fervor-bench"));
    command.args(arguments.iter().map(AsRef::as_ref)).stdin(Stdio::null());
    command
}

/// Runs it to its end; what it printed.
pub fn succeed<S: AsRef<str>>(arguments: &[S]) -> String {
    let output = bench(arguments).output().expect("the program runs");
    assert!(output.status.success(), "{}", said(&output));
    String::from_utf8(output.stdout).expect("it prints text")
}

/// Runs it to its end, which is a failure; what it said.
pub fn fail<S: AsRef<str>>(arguments: &[S]) -> String {
    let output = bench(arguments).output().expect("the program runs");
    assert!(!output.status.success(), "it did not fail: {}", said(&output));
    let message = String::from_utf8(output.stderr).expect("it prints text");
    assert!(!message.contains("panicked"), "{message}");
    message
}

pub fn said(output: &Output) -> String {
    let [out, error] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{}\n{out}{error}", output.status)
}

/// Runs a job to its end; what it reports.
pub fn results(arguments: &[&str]) -> Value {
    let folder = Folder::new();
    let json = format!("--json={}", folder.file("results.json"));
    succeed(&[arguments, &[&json]].concat());
    folder.json("results.json")
}

/// Runs both clients of a job by hand, on a running server; what they report.
pub fn by_hand(arguments: &[&str], server: &Server) -> [Value; 2] {
    let folder = Folder::new();
    let files = ["0", "1"].map(|index| {
        let file = format!("{index}.json");
        let mut command = bench(arguments);
        command.args(["--clients=2", "--server", &server.url, "--client-index", index]);
        command.args(["--json", &folder.file(&file)]).stdout(Stdio::piped()).stderr(Stdio::piped());
        (file, command.spawn().expect("it starts"))
    });
    files.map(|(file, client)| {
        let output = client.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{}", said(&output));
        folder.json(&file)
    })
}

pub fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

/// The `objective` (`loss`, `log_likelihood`) before the first epoch and after each.
pub fn objectives(results: &Value, objective: &str) -> Vec<f64> {
    let epochs = results["epochs"].as_array().expect("epochs");
    assert!(epochs.iter().enumerate().all(|(number, epoch)| epoch["epoch"] == number), "{epochs:?}");
    let seconds: Vec<f64> = epochs.iter().map(|epoch| number(&epoch["seconds"])).collect();
    assert_eq!(seconds[0], 0.0);
    assert!(seconds.is_sorted(), "{seconds:?}");
    epochs.iter().map(|epoch| number(&epoch[objective])).collect()
}

/// What every report of a job on a server has, under `model` with this staleness, over copies or in place.
pub fn check_report(results: &Value, model: &str, staleness: Option<u64>, copies: bool) {
    assert_eq!(results["model"], model);
    assert_eq!(results["staleness"].as_u64(), staleness, "{model}");
    assert_eq!(results["seed"], 1);
    assert!(results["machine"]["processor"].is_string());

    let differential = results["clock_differential"].as_object().expect("an object");
    let differential: Vec<(i64, u64)> =
        differential.iter().map(|(key, count)| (key.parse().unwrap(), count.as_u64().unwrap())).collect();
    let least = -1 - staleness.unwrap_or(1000) as i64;
    assert!(differential.iter().all(|(key, _)| *key >= least), "{model}: {differential:?}");
    assert!(model != "bsp" || differential.iter().all(|(key, _)| *key == -1), "{differential:?}");

    let cache = &results["cache"];
    let count = |name: &str| cache[name].as_u64().expect("a count");
    let [in_place, hits, misses, read] = ["in_place", "hits", "misses", "reads"].map(count);
    let reads: u64 = differential.iter().map(|(_, count)| count).sum();
    assert_eq!(reads, in_place + hits + misses, "{model}");
    // What is pushed is mirrored as a whole; nothing else is read without a READ, over copies.
    let mirrored = matches!(model, "essp" | "vap");
    let expected = if copies { in_place == 0 && (misses > 0 || mirrored) } else { hits + misses == 0 };
    assert!(expected && read >= misses, "{model}: {cache}");
    assert_eq!(cache["violations"], 0, "{model}");

    let bytes = &results["bytes"];
    assert!(misses == 0 || bytes["read"].as_u64() > Some(0), "{model}: {bytes}");
    assert!(bytes["sent"].as_u64() > Some(0), "{model}: {bytes}");
    // Under the others, hot rows that stay torn are asked for and pushed.
    assert!(!(copies && mirrored) || bytes["pushed"].as_u64() > Some(0), "{bytes}");
    let time = &results["time"];
    let sum: f64 = ["compute", "waiting", "communication"].iter().map(|name| number(&time[name])).sum();
    assert!((sum - 1.0).abs() < 1e-9, "{model}: {time}");
    assert!(number(&results["clocks_per_second"]) > 0.0);
}

/// A folder that goes away.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("fervor-bench-test-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder can be made");
        Folder(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("the path is text").to_owned()
    }

    pub fn json(&self, name: &str) -> Value {
        let text = fs::read_to_string(self.0.join(name)).expect("the file is there");
        serde_json::from_str(&text).expect("it is JSON")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A server of this test's own.
pub struct Server {
    child: Child,
    pub url: String,
}

impl Server {
    /// Starts `fervor-server` and waits until it is ready.
    pub fn start(listen: &str, more: &[&str]) -> Self {
        use std::io::{BufRead as _, BufReader};
        let program = Path::new(env!("CARGO_BIN_EXE_fervor-bench")).with_file_name("fervor-server");
        assert!(program.is_file(), "{} is missing: cargo build -p fervor-server", program.display());
        let mut child = Command::new(program)
            .args(["--listen", listen])
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the server starts");
        let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let url = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix("fervor-server ready at ").map(str::to_owned))
            .expect("the server gets ready");
        thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Server { child, url }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until `what` holds.
pub fn eventually(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "not so after 20 s: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
