//! The figures: with perftest's columns, beside the limit and beside perftest's own.

use std::fmt;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::Op;
use crate::{limits::Limit, machine::Machine, report::TextTable};

/// The throughput in one setting. The names are those of the JSON file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `hit`, `read` …
    pub op: String,
    /// Bytes of a row.
    pub size: u32,
    /// Worker threads.
    pub workers: u16,
    /// Shards of the server that was started; none for a server that was named.
    pub shards: Option<u32>,
    /// READs in flight, of many-read.
    pub outstanding: Option<u32>,
    /// Rows of a `get_many`, or of a clock.
    pub batch: u32,
    /// Rows that were moved.
    pub iterations: u64,
    /// In how much time.
    pub seconds: f64,
    /// Rows a second.
    pub rows_per_second: f64,
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// Bytes a second in the best tenth of a second.
    pub peak_bytes_per_second: f64,
    /// What one worker could do at best, for a row, if it was measured.
    pub limit: Option<Limit>,
    /// The same by perftest or a stream, if it was measured.
    pub beside: Option<Beside>,
}

/// What perftest or a stream gave, beside our own: bytes a second.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Beside {
    /// Its name.
    pub tool: String,
    /// In turn: ours and its.
    pub rounds: Vec<(f64, f64)>,
    /// Our best.
    pub best_ours: f64,
    /// Its best.
    pub best_theirs: f64,
    /// Our best over its best.
    pub ratio: f64,
}

impl Beside {
    /// Of rounds in turn: ours and that of `tool`.
    pub fn new(tool: &str, rounds: Vec<(f64, f64)>) -> Self {
        let best_of = |of: fn(&(f64, f64)) -> f64| rounds.iter().map(of).fold(0.0, f64::max);
        let (best_ours, best_theirs) = (best_of(|round| round.0), best_of(|round| round.1));
        Self { tool: tool.into(), best_ours, best_theirs, ratio: best_ours / best_theirs, rounds }
    }
}

/// The results of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Throughput {
    /// Where this was measured.
    pub machine: Machine,
    /// For each setting its figures.
    pub rows: Vec<Row>,
}

pub(super) fn judge(rows: &[Row], least: Option<f64>) -> Result<()> {
    let Some(least) = least else { return Ok(()) };
    for row in rows {
        if let Some(Beside { tool, ratio, .. }) = row.beside.as_ref().filter(|beside| beside.ratio < least) {
            bail!(
                "{} of {} bytes moves {ratio:.2} times as much as {tool}: less than {least} times, the --min-ratio",
                row.op,
                row.size
            );
        }
    }
    Ok(())
}

impl fmt::Display for Throughput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.machine)?;
        let mut table = TextTable::new([
            "op",
            "workers",
            "shards",
            "outstanding",
            "#bytes",
            "#iterations",
            "BW peak[MB/sec]",
            "BW average[MB/sec]",
            "MsgRate[Mpps]",
            "of the limit",
        ]);
        let mib = |bytes: f64| format!("{:.2}", bytes / f64::from(1 << 20));
        for row in &self.rows {
            let some = |value: Option<u32>| value.map_or("-".into(), |value| value.to_string());
            let limit = row.limit.as_ref().map(|limit| row.share(limit, self.machine.cores));
            table.row([
                row.op.clone(),
                row.workers.to_string(),
                some(row.shards),
                some(row.outstanding),
                row.size.to_string(),
                row.iterations.to_string(),
                mib(row.peak_bytes_per_second),
                mib(row.bytes_per_second),
                format!("{:.6}", row.rows_per_second / 1e6),
                limit.map_or("-".into(), |share| format!("{share:.2}")),
            ]);
        }
        write!(f, "{table}")?;
        if self.rows.iter().any(|row| row.limit.is_some()) {
            writeln!(
                f,
                "The limit is a copy of each row (see `fervor-bench limits`), or of all rows of one call at once, by each worker \
                 that has a core of its own; for push, by one."
            )?;
        }
        let mut table =
            TextTable::new(["op", "#bytes", "best[MB/sec]", "beside", "best[MB/sec]", "ratio", "rounds"]);
        for row in &self.rows {
            let Some(beside) = &row.beside else { continue };
            table.row([
                row.op.clone(),
                row.size.to_string(),
                mib(beside.best_ours),
                beside.tool.clone(),
                mib(beside.best_theirs),
                format!("{:.2}", beside.ratio),
                beside.rounds.len().to_string(),
            ]);
        }
        if table.rows().len() > 1 { write!(f, "\n{table}") } else { Ok(()) }
    }
}

impl Row {
    /// What part this is of what the machine allows.
    fn share(&self, limit: &Limit, cores: usize) -> f64 {
        let copiers = if self.op == Op::Push.name() { 1 } else { usize::from(self.workers).min(cores) };
        let bytes = limit.bytes.unwrap_or(self.size.into());
        self.bytes_per_second / bytes as f64 * limit.ns / 1e9 / copiers as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_below_the_bound_fails() {
        let beside = Beside::new("ib_read_bw", vec![(80.0, 90.0), (70.0, 100.0)]);
        assert_eq!((beside.best_ours, beside.best_theirs), (80.0, 100.0));
        let row = Row {
            op: "many-read".into(),
            size: 4096,
            workers: 1,
            shards: None,
            outstanding: Some(16),
            batch: 256,
            iterations: 1,
            seconds: 1.0,
            rows_per_second: 1.0,
            bytes_per_second: 4096.0,
            peak_bytes_per_second: 4096.0,
            limit: None,
            beside: Some(beside),
        };
        judge(std::slice::from_ref(&row), None).unwrap();
        judge(std::slice::from_ref(&row), Some(0.8)).unwrap();
        let said = judge(&[row], Some(0.9)).unwrap_err().to_string();
        assert!(said.contains("many-read of 4096 bytes moves 0.80 times as much as ib_read_bw"), "{said}");
    }
}
