//! The same by perftest, the yardstick of the RDMA world: `ib_read_lat` for a miss, `ib_write_lat` for an update.
//!
//! The two are measured in turns (A B A B …) and the best median of each is compared, since the medians of one and the same
//! program differ from run to run by more than what is to be told apart. `ib_read_lat` gives whole round trips, `ib_write_lat`
//! half ones: an update becomes visible by a SEND and then a WRITE, one way each.

use std::{
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, value_parser};
use serde::{Deserialize, Serialize};

use super::{Op, figures::Figures};

/// First TCP port that perftest's ends find each other on.
const PORT: u16 = 18_515;
/// How long its server may take to listen.
const START: Duration = Duration::from_secs(20);

/// Options of measuring beside perftest.
#[derive(Debug, Clone, Args)]
pub struct PerftestOptions {
    /// Measure in turns with perftest (misses beside ib_read_lat, updates beside ib_write_lat), and give the ratio
    #[arg(long, requires = "server")]
    pub beside_perftest: bool,
    /// How many turns; the best median of each counts
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Fail if the ratio of the best medians is greater
    #[arg(long, value_name = "RATIO", requires = "beside_perftest")]
    pub max_ratio: Option<f64>,
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

impl PerftestOptions {
    /// Refuses operations that perftest has nothing like.
    pub(super) fn validate(&self, ops: &[Op]) -> Result<()> {
        let comparable = !ops.is_empty() && !ops.contains(&Op::Hit);
        ensure!(
            !self.beside_perftest || comparable,
            "--beside-perftest goes with --op miss and --op visible"
        );
        Ok(())
    }

    /// Compares the ratios with the gate.
    pub(super) fn judge(&self, figures: &[Figures]) -> Result<()> {
        let Some(most) = self.max_ratio else { return Ok(()) };
        for figures in figures {
            if let Some(Beside { tool, ratio, .. }) =
                figures.beside.as_ref().filter(|beside| beside.ratio > most)
            {
                bail!(
                    "{} of {} bytes takes {ratio:.2} times as long as {tool}: more than {most} times",
                    figures.op,
                    figures.size
                );
            }
        }
        Ok(())
    }
}

/// What perftest gave, beside our own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Beside {
    /// Its program.
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

/// A perftest program, ready to be run.
#[derive(Debug)]
pub struct Perftest {
    tool: &'static str,
    server: Vec<String>,
    client: Vec<String>,
    port: u16,
}

impl Perftest {
    /// The program that is like `op`, if it is asked for.
    ///
    /// # Errors
    /// When there is none like it.
    pub fn new(options: &PerftestOptions, op: Op, size: u32, count: u64) -> Result<Option<Self>> {
        if !options.beside_perftest {
            return Ok(None);
        }
        let tool = match op {
            Op::Miss => "ib_read_lat",
            Op::Visible => "ib_write_lat",
            Op::Hit => bail!("perftest has nothing like a hit"),
        };
        let arguments = |own: &str| -> Vec<String> {
            let common = format!("-F -s {size} -n {count}");
            common.split_whitespace().chain(own.split_whitespace()).map(Into::into).collect()
        };
        let (server, client) = (arguments(&options.perftest_server), arguments(&options.perftest_client));
        Ok(Some(Perftest { tool, server, client, port: PORT }))
    }

    /// Its name.
    pub fn tool(&self) -> &'static str {
        self.tool
    }

    /// Runs it once; its median (`t_typical`) in nanoseconds.
    ///
    /// # Errors
    /// When it is not there, fails, or says something unexpected; with what it said.
    pub fn median_ns(&mut self) -> Result<f64> {
        // The port of the run before may not be free yet.
        self.port += 1;
        let mut server = Server(self.command(&self.server).spawn().with_context(|| self.missing())?);
        let start = Instant::now();
        let output = loop {
            let output = self.command(&self.client).output().with_context(|| self.missing())?;
            if output.status.success() {
                break output;
            }
            let ended = server.0.try_wait().with_context(|| format!("cannot wait for {}", self.tool))?;
            if ended.is_some() || start.elapsed() > START {
                bail!("{} failed: {}", self.tool, said(&output));
            }
            thread::sleep(Duration::from_millis(100));
        };
        let text = String::from_utf8_lossy(&output.stdout);
        typical_us(&text)
            .map(|microseconds| microseconds * 1e3)
            .with_context(|| format!("{} gave no t_typical: {}", self.tool, said(&output)))
    }

    fn command(&self, arguments: &[String]) -> Command {
        let mut command = Command::new(self.tool);
        command.args(["-p", &self.port.to_string()]).args(arguments);
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
    fn the_best_median_of_each_counts() {
        let beside = Beside::new("ib_read_lat", &[(30.0, 40.0), (24.0, 20.0), (50.0, 25.0)]);
        assert_eq!((beside.best_ours_ns, beside.best_theirs_ns, beside.ratio), (24.0, 20.0, 1.2));
    }
}
