//! Running perftest, the yardstick of the RDMA world, beside our own measurements.
//!
//! A measurement and perftest take turns (A B A B …), and the best of each are compared, since the medians of one program differ from run
//! to run by more than what is to be told apart.
//!
//! `ib_read_lat` prints whole round trips; `ib_write_lat` and `ib_send_lat` print half ones, so one message one way. Bandwidths are in MiB/s,
//! which perftest calls `MB/sec`.

use std::{
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU16, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, value_parser};
use serde::{Deserialize, Serialize};

/// First TCP port that perftest's ends find each other on.
const PORT: u16 = 18_515;
/// How long its server may take to listen.
const START: Duration = Duration::from_secs(20);

/// What perftest's two ends are started with.
#[derive(Debug, Clone, Args)]
pub struct Ends {
    /// Arguments of perftest's server
    #[arg(long, value_name = "ARGUMENTS", default_value = "-d rxe1 -x 1", allow_hyphen_values = true)]
    pub perftest_server: String,
    /// Arguments of perftest's client
    #[arg(
        long,
        value_name = "ARGUMENTS",
        default_value = "-d rxe0 -x 1 10.7.0.2",
        allow_hyphen_values = true
    )]
    pub perftest_client: String,
}

/// Options of measuring beside perftest.
#[derive(Debug, Clone, Args)]
pub struct PerftestOptions {
    /// Take turns with the perftest program that measures the same, and show the ratio. Needs --server
    #[arg(long)]
    pub beside_perftest: bool,
    /// Number of turns of each program. The best turn of each counts
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// The ends of perftest.
    #[command(flatten)]
    pub ends: Ends,
}

impl PerftestOptions {
    /// Refuses what has no server that perftest's network leads to.
    ///
    /// # Errors
    /// Says how to start one.
    pub fn validate(&self, servers: &[String]) -> Result<()> {
        ensure!(
            !self.beside_perftest || !servers.is_empty(),
            "--beside-perftest compares over a network, so it needs a server there. Start one with `fervor-server --listen \
             rdma://ADDRESS:7471` where perftest's server is to run, and name it here with --server rdma://ADDRESS:7471 (in \
             ci/soft-roce, ADDRESS is 10.7.0.2)"
        );
        Ok(())
    }
}

/// A program of perftest between two ends.
#[derive(Debug)]
pub struct Perftest<'a> {
    tool: &'static str,
    ends: &'a Ends,
}

/// What a program that measures bandwidth says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bandwidth {
    /// The highest, bytes per second.
    pub peak: f64,
    /// The mean, bytes per second.
    pub average: f64,
    /// Messages per second.
    pub rate: f64,
}

impl<'a> Perftest<'a> {
    /// A program: `ib_read_lat` …
    pub fn new(tool: &'static str, ends: &'a Ends) -> Self {
        Perftest { tool, ends }
    }

    /// Runs a latency program once; its median (`t_typical`) in nanoseconds.
    ///
    /// # Errors
    /// When it is not there, fails, or says something unexpected; with what it said.
    pub fn median_ns(&self, size: u32, count: u64) -> Result<f64> {
        let output = self.run(&format!("-F -s {size} -n {count}"))?;
        typical_us(&String::from_utf8_lossy(&output.stdout))
            .map(|microseconds| microseconds * 1e3)
            .with_context(|| format!("{} gave no t_typical: {}", self.tool, said(&output)))
    }

    /// Runs a bandwidth program once, with so many operations outstanding.
    ///
    /// # Errors
    /// As [`Perftest::median_ns`].
    pub fn bandwidth(&self, size: u32, count: u64, outstanding: u32) -> Result<Bandwidth> {
        let depth = match self.tool {
            // The depth of a queue pair for READs is that of the device, and at most this many are in flight.
            "ib_read_bw" => format!("-o {} -t {outstanding}", outstanding.min(16)),
            _ => format!("-t {outstanding}"),
        };
        let output = self.run(&format!("-F -s {size} -n {count} {depth}"))?;
        bandwidth(&String::from_utf8_lossy(&output.stdout))
            .with_context(|| format!("{} gave no bandwidth: {}", self.tool, said(&output)))
    }

    fn run(&self, common: &str) -> Result<Output> {
        // The port of a run before may not be free yet.
        static NEXT: AtomicU16 = AtomicU16::new(PORT);
        let port = NEXT.fetch_add(1, Relaxed);
        let mut server = Server(
            self.command(port, common, &self.ends.perftest_server).spawn().with_context(|| self.missing())?,
        );
        let start = Instant::now();
        loop {
            let mut client = self.command(port, common, &self.ends.perftest_client);
            let output = client.output().with_context(|| self.missing())?;
            if output.status.success() {
                return Ok(output);
            }
            let ended = server.0.try_wait().with_context(|| format!("cannot wait for {}", self.tool))?;
            if ended.is_some() || start.elapsed() > START {
                bail!("{} failed: {}", self.tool, said(&output));
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    fn command(&self, port: u16, common: &str, own: &str) -> Command {
        let mut command = Command::new(self.tool);
        command.args(["-p", &port.to_string()]);
        command.args(common.split_whitespace()).args(own.split_whitespace());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn missing(&self) -> String {
        format!("cannot run {}: install the package perftest", self.tool)
    }
}

/// Perftest's server: ends by itself after one client, and with us in any case.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // Fails for one that has ended, which is what it should have done.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn said(output: &Output) -> String {
    let text = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).trim().to_owned());
    format!("{} ({})", text.join("\n").trim(), output.status)
}

/// The number below `t_typical` in perftest's table.
fn typical_us(text: &str) -> Option<f64> {
    let mut lines = text.lines().skip_while(|line| !line.contains("t_typical"));
    // Names have no blanks in them but for their units, `[usec]`, which stick to them.
    let column = lines.next()?.split_whitespace().position(|name| name.starts_with("t_typical"))?;
    lines.next()?.split_whitespace().nth(column)?.parse().ok()
}

/// The numbers below `BW peak`, `BW average` and `MsgRate`.
fn bandwidth(text: &str) -> Option<Bandwidth> {
    let mut lines = text.lines().skip_while(|line| !line.contains("BW average"));
    let in_mib = lines.next()?.contains("BW average[MB/sec]");
    let numbers: Vec<f64> =
        lines.next()?.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    match numbers[..] {
        [_, _, peak, average, rate] if in_mib => {
            let mib = f64::from(1 << 20);
            Some(Bandwidth { peak: peak * mib, average: average * mib, rate: rate * 1e6 })
        }
        _ => None,
    }
}

/// What perftest gave, beside our own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Beside {
    /// Its programs.
    pub tool: String,
    /// In turn: our median and its, nanoseconds.
    pub rounds: Vec<(f64, f64)>,
    /// Our best.
    pub best_ours_ns: f64,
    /// Its best.
    pub best_theirs_ns: f64,
    /// Our best over its best.
    pub ratio: f64,
}

impl Beside {
    /// The best of all `rounds`: (ours, theirs).
    pub fn new(tool: &str, rounds: &[(f64, f64)]) -> Self {
        let best_ours_ns = rounds.iter().map(|round| round.0).fold(f64::INFINITY, f64::min);
        let best_theirs_ns = rounds.iter().map(|round| round.1).fold(f64::INFINITY, f64::min);
        let ratio = best_ours_ns / best_theirs_ns;
        Beside { tool: tool.into(), rounds: rounds.to_vec(), best_ours_ns, best_theirs_ns, ratio }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_found_in_what_perftest_prints() {
        let text = "\
---------------------------------------------------------------------------------------
                    RDMA_Read Latency Test
 Dual-port       : OFF\t\tDevice         : rxe0
---------------------------------------------------------------------------------------
 #bytes #iterations    t_min[usec]    t_max[usec]  t_typical[usec]    t_avg[usec]    t_stdev[usec]   99% percentile[usec]   99.9% percentile[usec]
 64      1000          22.10          175.41       24.37    \t       25.61       \t5.55   \t\t53.10   \t\t175.41
---------------------------------------------------------------------------------------
";
        assert_eq!(typical_us(text), Some(24.37));
        assert_eq!(typical_us("no table"), None);
        assert_eq!(typical_us(" #bytes t_typical[usec]\n"), None);
    }

    #[test]
    fn the_bandwidth_is_found_in_what_perftest_prints() {
        let text = "\
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
 4096       1000             120.50             100.00\t\t   0.025600
---------------------------------------------------------------------------------------
";
        let mib = f64::from(1 << 20);
        let expected = Bandwidth { peak: 120.5 * mib, average: 100.0 * mib, rate: 25_600.0 };
        assert_eq!(bandwidth(text), Some(expected));
        assert_eq!(bandwidth(&text.replace("MB/sec", "Gb/sec")), None);
        assert_eq!(bandwidth("no table"), None);
    }

    #[test]
    fn the_best_median_of_each_counts() {
        let beside = Beside::new("ib_read_lat", &[(30.0, 40.0), (24.0, 20.0), (50.0, 25.0)]);
        assert_eq!((beside.best_ours_ns, beside.best_theirs_ns, beside.ratio), (24.0, 20.0, 1.2));
    }
}
