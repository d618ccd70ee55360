//! What the reports of all applications have: where the time went, and how old the data was that reads returned.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use super::messages::Tally;
use crate::report::{self, TextTable};

/// Parts of the workers' time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Time {
    /// Everything else: arithmetic, and reads that hit the cache.
    pub compute: f64,
    /// Waiting for the shard clock.
    pub waiting: f64,
    /// Reading from servers and sending to them.
    pub communication: f64,
}

/// How reads were answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    /// By the client's cache.
    pub hits: u64,
    /// Not by the cache.
    pub misses: u64,
    /// READs of server memory.
    pub reads: u64,
    /// Reads that returned older data than the model allows: always 0.
    pub violations: u64,
}

impl fmt::Display for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cache { hits, misses, reads, violations } = self;
        writeln!(f, "cache: {hits} hits, {misses} misses, {reads} READs")?;
        write!(f, "staleness violations: {violations}")
    }
}

/// What a job cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// Seconds until the last worker was done.
    pub seconds: f64,
    /// Clocks that a worker ended in a second, on average.
    pub clocks_per_second: f64,
    /// Where the workers' time went; the parts add up to 1.
    pub time: Time,
    /// How often a read returned data of a clock this much ahead of the reader's own.
    pub clock_differential: BTreeMap<i64, u64>,
    /// How the reads were answered.
    pub cache: Cache,
}

impl Costs {
    /// Those of the workers that have reported.
    pub fn new<R>(tally: &Tally<R>) -> Self {
        let accesses = tally.accesses();
        let total: f64 = tally.reports.iter().map(|report| report.seconds).sum();
        let clocks: u64 = tally.reports.iter().map(|report| report.clocks).sum();
        // Where updates wait for values, a client's timers may nest: shares are of all that was counted then.
        let counted = total.max(accesses.seconds());
        let share = |part: f64| if counted > 0.0 { part / counted } else { 0.0 };
        let (waiting, communication) = (share(accesses.waiting), share(accesses.communicating));
        Costs {
            seconds: tally.reports.iter().map(|report| report.seconds).fold(0.0, f64::max),
            clocks_per_second: if total > 0.0 { clocks as f64 / total } else { 0.0 },
            time: Time { compute: (1.0 - waiting - communication).max(0.0), waiting, communication },
            clock_differential: accesses.clock_differential,
            cache: Cache {
                hits: accesses.hits,
                misses: accesses.misses,
                reads: accesses.reads,
                violations: accesses.violations,
            },
        }
    }
}

/// A model with its staleness or bound, for people.
pub fn title(model: &str, staleness: Option<u32>, v0: Option<f32>) -> String {
    match (model, staleness) {
        ("none", _) => "plain threads".into(),
        ("vap", _) => format!("vap({})", v0.unwrap_or_default()),
        ("bsp", _) | (_, None) => model.into(),
        (model, Some(staleness)) => format!("{model}({staleness})"),
    }
}

/// The mean of a clock differential; none without reads.
pub fn mean_differential(differential: &BTreeMap<i64, u64>) -> Option<f64> {
    let count: u64 = differential.values().sum();
    let sum: f64 = differential.iter().map(|(&d, &count)| d as f64 * count as f64).sum();
    (count > 0).then(|| sum / count as f64)
}

/// How old the data was that the reads of several runs returned: the share of each clock differential.
pub fn differential_table<'a>(runs: impl IntoIterator<Item = (String, &'a BTreeMap<i64, u64>)>) -> TextTable {
    // Beyond this lie the tails of runs without a bound.
    const SHOWN: i64 = 6;
    let head = (1..SHOWN).map(|lag| format!("-{lag}")).chain([format!("-{SHOWN} and less")]);
    let mut table = TextTable::new(["clock differential".to_owned()].into_iter().chain(head));
    for (title, differential) in runs.into_iter().filter(|(_, differential)| !differential.is_empty()) {
        let total: u64 = differential.values().sum();
        let share = |holds: &dyn Fn(i64) -> bool| {
            let count: u64 = differential.iter().filter(|(d, _)| holds(**d)).map(|(_, n)| n).sum();
            if count == 0 { "-".to_owned() } else { report::percent(count as f64 / total as f64) }
        };
        // A read under Async may even return data of the reader's own clock or a later one.
        let fresh = share(&|d| d >= -1);
        let middle = (2..SHOWN).map(|lag| share(&|d| d == -lag));
        let old = share(&|d| d <= -SHOWN);
        table.row([title, fresh].into_iter().chain(middle).chain([old]));
    }
    table
}
