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
