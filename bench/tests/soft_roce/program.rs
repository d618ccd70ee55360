//! Programs under test: started, listened to, and killed at the latest when they go out of scope.

use std::{
    io::{BufRead as _, BufReader, Read},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread,
    time::{Duration, Instant},
};

/// How long a server may take to start: emulated, beside other programs.
const START: Duration = Duration::from_secs(60);
/// How often a program that says nothing is looked after.
const LOOK: Duration = Duration::from_millis(10);

/// A running program, and what it says.
pub struct Program {
    name: String,
    child: Child,
    lines: Receiver<String>,
    said: Vec<String>,
}

impl Program {
    /// Starts `fervor-bench` with `arguments`.
    pub fn bench(arguments: &[&str]) -> Self {
        Self::start(Path::new(env!("CARGO_BIN_EXE_fervor-bench")), arguments)
    }

    fn start(program: &Path, arguments: &[&str]) -> Self {
        let name = program.file_name().expect("a program has a name").to_string_lossy().into_owned();
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
        let (sender, lines) = mpsc::channel();
        follow(child.stdout.take().expect("it is piped"), sender.clone());
        follow(child.stderr.take().expect("it is piped"), sender);
        Self { name, child, lines, said: Vec::new() }
    }

    /// Waits for a line for which `found` is something, for `limit` at most.
    pub fn wait_for<R>(&mut self, limit: Duration, found: impl Fn(&str) -> Option<R>) -> R {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    let result = found(&line);
                    self.said.push(line);
                    if let Some(result) = result {
                        return result;
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.fail(&format!("did not say it in {limit:?}")),
                Err(RecvTimeoutError::Disconnected) => self.fail("ended without saying it"),
            }
        }
    }

    /// Waits for its end, for `limit` at most.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait for a child") {
                return status;
            }
            if Instant::now() > deadline {
                self.fail(&format!("was not done in {limit:?}"));
            }
            thread::sleep(LOOK);
        }
    }

    /// Waits for its end, which must be a good one, and returns all it has said.
    pub fn finish(mut self, limit: Duration) -> String {
        let status = self.wait(limit);
        if !status.success() {
            self.fail(&format!("failed ({status})"));
        }
        self.said.extend(self.lines.iter());
        self.said.join("\n")
    }

    /// Kills it (SIGKILL), and returns the moment before.
    pub fn kill(&mut self) -> Instant {
        let ended = self.child.try_wait().expect("wait for a child");
        if let Some(status) = ended {
            self.fail(&format!("ended before it was killed ({status})"));
        }
        let now = Instant::now();
        self.child.kill().expect("kill a child");
        self.child.wait().expect("wait for a child");
        now
    }

    fn fail(&self, what: &str) -> ! {
        // What it said is printed as it is dropped.
        panic!("{} {what}", self.name);
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Both fail for a program that has ended and been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            self.said.extend(self.lines.iter());
            eprintln!("{} said:\n{}", self.name, self.said.join("\n"));
        }
    }
}

/// Sends each line of `pipe`.
fn follow(pipe: impl Read + Send + 'static, lines: Sender<String>) {
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            // Nobody may listen any more; the pipe is read all the same, so that the program does not hang.
            let _ = lines.send(line);
        }
    });
}

/// A `fervor-server` on rxe1.
pub struct Server {
    pub program: Program,
    url: String,
}

impl Server {
    /// Starts it with so many shards, and waits until it accepts. Who loses a connection has ten seconds to come back.
    pub fn start(shards: u16) -> Self {
        Self::rdma(shards, "10")
    }

    /// As [`Server::start`]; who loses a connection is gone.
    pub fn without_lease(shards: u16) -> Self {
        Self::rdma(shards, "0")
    }

    fn rdma(shards: u16, lease: &str) -> Self {
        let mut server = Self::listening("rdma://10.7.0.2:0", shards, lease);
        server.url += "?from=10.7.0.1";
        server
    }

    /// As [`Server::start`], at a URL on rxe1, with a lease in seconds.
    pub fn listening(listen: &str, shards: u16, lease: &str) -> Self {
        Self::with(listen, shards, lease, &[])
    }

    /// As [`Server::listening`], with more options.
    pub fn with(listen: &str, shards: u16, lease: &str, more: &[&str]) -> Self {
        let path = Path::new(env!("CARGO_BIN_EXE_fervor-bench")).with_file_name("fervor-server");
        let shards = shards.to_string();
        let place = ["--insecure", "--listen", listen, "--lease", lease];
        let size = ["--memory", "64M", "--clients", "4", "--shards", &shards];
        let arguments = [&place[..], &size, more].concat();
        let mut program = Program::start(&path, &arguments);
        let url = program.wait_for(START, |line| {
            line.strip_prefix("fervor-server ready at ").map(|url| url.trim().to_owned())
        });
        Self { program, url }
    }

    /// What its clients connect to, from rxe0.
    pub fn url(&self) -> &str {
        &self.url
    }
}
