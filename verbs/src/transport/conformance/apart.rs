//! Cases that need a process of their own, and what a process holds.
//!
//! Tests of one program run side by side in one process. A case that counts all that its process has, or cuts the network, would
//! see the others', or be seen by them. So it runs this test program once more, with itself alone.

use std::{env, fs, path::Path, process::Command};

/// Environment variable that tells such a process which case it is there for.
const CASE: &str = "FERVOR_CONFORMANCE_APART";

/// Where a case has to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Apart {
    /// Here, beside others.
    Not,
    /// In a process of its own.
    Process,
    /// In a process of its own, whose loopback interface is its own, too.
    Network,
}

/// Whether this process is there for one case alone.
pub(super) fn alone() -> bool {
    env::var_os(CASE).is_some()
}

impl Apart {
    /// Whether the case has run elsewhere; `false` if it is to run here and now.
    pub(super) fn runs_elsewhere(self, module: &str, case: &str) -> bool {
        if self == Apart::Not || env::var(CASE).is_ok_and(|alone| alone == case) {
            return false;
        }
        let program = env::current_exe().expect("the path of the test program");
        let test = test_name(module, case);
        let mut command = self.command(&program);
        let status = command.args([&test, "--exact", "--nocapture"]).env(CASE, case).status();
        let status = status.unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
        assert!(
            status.success(),
            "{test}, in a process of its own, ended with {status}: see what it said above"
        );
        true
    }

    /// The program, where this says.
    fn command(self, program: &Path) -> Command {
        if self != Apart::Network {
            return Command::new(program);
        }
        // Who is not root makes a network as the root of a user namespace.
        let mut command = Command::new("unshare");
        if !rustix::process::geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--net", "--", "sh", "-c", "ip link set lo up && exec \"$@\"", "sh"]).arg(program);
        command
    }
}

/// The name of a test, as the test program knows it: without that of the program.
pub(super) fn test_name(module: &str, test: &str) -> String {
    module.split_once("::").map_or_else(|| test.to_owned(), |(_, path)| format!("{path}::{test}"))
}

/// What is held, for comparison with what was held before.
#[derive(Debug, Clone)]
pub struct Holdings {
    /// What is counted, by name.
    pub counts: Vec<(&'static str, u64)>,
    /// KiB of memory. It is not counted exactly: allocators and thread stacks keep some.
    pub memory: u64,
}

impl Holdings {
    /// All that this process has.
    ///
    /// # Panics
    /// Where there is no `/proc`.
    pub fn of_this_process() -> Self {
        let status = fs::read_to_string("/proc/self/status").expect("read /proc/self/status");
        let number = |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse().ok());
        let field = |name: &str| -> u64 {
            let line = status.lines().find(|line| line.starts_with(name));
            line.and_then(number).unwrap_or_else(|| panic!("no number {name} in /proc/self/status"))
        };
        let count = |folder: &str| fs::read_dir(folder).expect("read a folder of /proc").count() as u64;
        let maps = fs::read_to_string("/proc/self/maps").expect("read /proc/self/maps");
        // Others are the allocator's, and thread stacks.
        let shared = maps.lines().filter(|line| line.contains("/memfd:")).count() as u64;
        let counts = vec![
            ("descriptors", count("/proc/self/fd")),
            ("threads", count("/proc/self/task")),
            ("mappings of shared memory", shared),
        ];
        Self { counts, memory: field("RssAnon:") + field("RssShmem:") }
    }

    /// The first thing of which there is more now than `before`, by more than `slack` KiB in the case of memory.
    pub(super) fn exceeds(&self, before: &Self, slack: u64) -> Option<&'static str> {
        let more = self.counts.iter().zip(&before.counts).find(|(now, before)| now.1 > before.1);
        more.map(|(now, _)| now.0).or((self.memory > before.memory + slack).then_some("KiB of memory"))
    }
}
