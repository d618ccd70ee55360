//! Starting a server of our own, and making sure that it ends with us.
//!
//! The server is the program `fervor-server` from the folder of this one. Who ends it: the drop of
//! [`EmbeddedServer`] (SIGTERM, so that it drains and removes its socket); or, if this process dies in whatever
//! way, the kernel, which sends it SIGTERM on the death of its parent. That is asked for by [`with_parent`],
//! which runs in the new process before it becomes the server.

use std::{
    collections::VecDeque,
    convert::Infallible,
    ffi::OsString,
    io::{BufRead, BufReader, Read},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use clap::Args;
use fervor_server::parse_size;
use fervor_verbs::session::KEY_FILE_VARIABLE;
use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};

/// The subcommand that calls [`with_parent`].
pub const WITH_PARENT: &str = "with-parent";
/// The line of a server that accepts starts so; its URL follows.
const READY: &str = "fervor-server ready at ";
/// How long a server may take to start, besides what its memory takes.
const START: Duration = Duration::from_secs(30);
/// What it touches in a second at least, on however slow and busy a machine.
const TOUCHED_A_SECOND: usize = 64 << 20;
/// How long it may take to stop before it is killed.
const STOP: Duration = Duration::from_secs(10);
/// Lines of its output that are kept for an error message.
const KEPT: usize = 20;

/// Options for a server of our own.
#[derive(Debug, Clone, Args)]
pub struct EmbeddedOptions {
    /// Shards of the server that is started
    #[arg(long, default_value_t = 1, conflicts_with_all = ["server"], value_parser = clap::value_parser!(u32).range(1..=256))]
    pub shards: u32,
    /// Memory of the server that is started
    #[arg(long, default_value = "512M", value_name = "SIZE", conflicts_with_all = ["server"])]
    pub memory: String,
}

/// Where a server is started, and with which keys.
#[derive(Debug, Clone, Copy, Default)]
pub struct Setting<'a> {
    /// In this network namespace, as `ip netns` knows it, instead of that of this process.
    pub host: Option<&'a str>,
    /// With the keys of this file.
    pub key_file: Option<&'a Path>,
}

/// The words that run `program` on a host: in its network namespace, if one is named.
pub fn on_host(host: Option<&str>, program: &Path) -> Vec<OsString> {
    let namespace = host.map(|host| ["ip", "netns", "exec", host].map(OsString::from));
    namespace.into_iter().flatten().chain([program.as_os_str().to_owned()]).collect()
}

/// A running server that stops when this is dropped.
#[derive(Debug)]
pub struct EmbeddedServer {
    child: Child,
    url: String,
    output: Output,
    /// They read its output, to its end.
    readers: Vec<JoinHandle<()>>,
}

impl EmbeddedServer {
    /// Starts a server for `clients` clients with `lanes` READ lanes each, on a socket in the temporary folder, and waits
    /// until it accepts.
    ///
    /// # Errors
    /// When there is no server program, or it does not start; with its last words.
    pub fn start(options: &EmbeddedOptions, clients: u16, lanes: u16) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let socket = std::env::temp_dir().join(format!("fervor-{}-{number}.sock", std::process::id()));
        Self::start_at(&format!("shm://{}", socket.display()), options, clients, lanes)
    }

    /// As [`EmbeddedServer::start`], at an address.
    ///
    /// # Errors
    /// As there.
    pub fn start_at(listen: &str, options: &EmbeddedOptions, clients: u16, lanes: u16) -> Result<Self> {
        Self::start_in(Setting::default(), listen, options, clients, lanes)
    }

    /// As [`EmbeddedServer::start_at`], in a setting.
    ///
    /// # Errors
    /// As there.
    pub fn start_in(
        setting: Setting<'_>,
        listen: &str,
        options: &EmbeddedOptions,
        clients: u16,
        lanes: u16,
    ) -> Result<Self> {
        let program = program()?;
        let own = std::env::current_exe().context("cannot find the own program")?;
        let mut command = Command::new(own);
        setting.key_file.map(|keys| command.env(KEY_FILE_VARIABLE, keys));
        let mut child = command
            .args([WITH_PARENT, &std::process::id().to_string()])
            .args(on_host(setting.host, &program))
            .args(["--listen", listen])
            .args(["--shards", &options.shards.to_string(), "--memory", &options.memory])
            .args(["--clients", &clients.to_string(), "--lanes", &lanes.to_string()])
            // In a process group of its own, so that an interrupt from the terminal is left to us.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let output = Output::default();
        let (sender, ready) = mpsc::channel();
        let readers = vec![
            output.follow(child.stdout.take().context("no stdout")?, Some(sender)),
            output.follow(child.stderr.take().context("no stderr")?, None),
        ];
        let mut server = EmbeddedServer { child, url: String::new(), output, readers };
        // A size that is none is the server's to refuse.
        let size = parse_size(&options.memory).unwrap_or(0);
        let patience = START + Duration::from_secs((size / TOUCHED_A_SECOND) as u64);
        match ready.recv_timeout(patience) {
            Ok(url) => server.url = url,
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let status = server.child.wait().context("cannot wait for the server")?;
                return Err(server.ended(status));
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!(
                    "{} was not ready after {patience:?}; it said:\n{}",
                    program.display(),
                    server.output.text()
                )
            }
        }
        Ok(server)
    }

    /// Where it listens.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The number of its process.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Looks whether it still runs.
    ///
    /// # Errors
    /// When it does not; with its last words.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait().context("cannot wait for the server")? {
            None => Ok(()),
            Some(status) => Err(self.ended(status)),
        }
    }

    fn ended(&mut self, status: ExitStatus) -> anyhow::Error {
        // Its last words may still be in the pipes.
        self.readers.drain(..).for_each(|reader| drop(reader.join()));
        anyhow!("fervor-server ended by itself ({status}); it said:\n{}", self.output.text())
    }
}

impl Drop for EmbeddedServer {
    fn drop(&mut self) {
        let deadline = Instant::now() + STOP;
        // A process that was waited for is gone, and its number may be another's.
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                eprintln!("fervor-server did not stop within {STOP:?} and was killed");
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The last lines of a process's output.
#[derive(Debug, Clone, Default)]
struct Output(Arc<Mutex<VecDeque<String>>>);

impl Output {
    /// Reads `pipe` to its end; sends the URL of the line that says that the server is ready.
    fn follow(
        &self,
        pipe: impl Read + Send + 'static,
        ready: Option<mpsc::Sender<String>>,
    ) -> JoinHandle<()> {
        let lines = self.0.clone();
        thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(|line| line.ok()) {
                if let Some((url, sender)) = line.strip_prefix(READY).zip(ready.as_ref()) {
                    let _ = sender.send(url.trim().to_owned());
                }
                let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                if lines.len() == KEPT {
                    lines.pop_front();
                }
                lines.push_back(line);
            }
        })
    }

    fn text(&self) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(|line| format!("  {line}\n")).collect()
    }
}

/// The server program: in the folder of this program, or, for a test program, in the folder above.
///
/// # Errors
/// It is not there.
pub fn program() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find the own program")?;
    let folders = own.ancestors().skip(1).take(2);
    let candidates: Vec<PathBuf> = folders.map(|folder| folder.join("fervor-server")).collect();
    candidates.iter().find(|path| path.is_file()).cloned().with_context(|| {
        format!(
            "there is no server program {}: build it with `cargo build -p fervor-server` (--release if this \
             is a release), or name a running server with --server",
            candidates[0].display()
        )
    })
}

/// Becomes `command`, such that it gets SIGTERM when `parent`, the process that started this one, dies.
/// Returns only when that fails.
///
/// # Errors
/// When the command cannot be run, or the parent is dead already.
pub fn with_parent(parent: u32, command: &[String]) -> Result<Infallible> {
    let (program, arguments) = command.split_first().context("no program is named")?;
    set_parent_process_death_signal(Some(Signal::TERM)).context("prctl(PR_SET_PDEATHSIG) failed")?;
    // It may have died before that call.
    let now = getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    ensure!(now == Some(parent), "process {parent}, which started {program}, is gone");
    Err(Command::new(program).args(arguments).exec()).with_context(|| format!("cannot run {program}"))
}
