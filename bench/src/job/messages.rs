//! What the processes of a job tell their parent, as lines of JSON, and the tally the parent keeps.
//!
//! ```text
//!  client ──stdout: one Message a line──▶ parent      epochs, progress, and at the end reports
//!  client ◀──stdin: `stop`, or its end──  parent      the target is reached, or the parent is gone
//! ```
//!
//! Workers do not wait for each other when they report. An epoch counts once every worker of the job has
//! reported it: its loss is the sum of theirs, its time that of the slowest.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::accesses::Accesses;

/// A line from a client process (or from the threads of this one). `R` is what a worker may give back at its end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message<R> {
    /// So many more ratings or tokens have been trained on.
    Progress {
        /// Number since the last report.
        count: u64,
    },
    /// A worker has finished an epoch.
    Epoch {
        /// The worker's number within the job.
        worker: usize,
        /// The epoch; 0 is before the first.
        epoch: usize,
        /// Seconds that it has trained.
        seconds: f64,
        /// Its part of the objective: of the loss, of the log-likelihood.
        objective: f64,
    },
    /// A worker is done.
    Worker(WorkerReport<R>),
    /// A client is done, after all of its workers.
    Client {
        /// What it moved.
        bytes: Bytes,
        /// By which ways it reached the shards at the end.
        ways: Vec<String>,
        /// What each rail of it has done.
        rails: Vec<String>,
    },
    /// A client cannot go on.
    Failed {
        /// Why.
        reason: String,
    },
}

/// What a worker says of itself at its end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerReport<R> {
    /// The worker's number within the job.
    pub worker: usize,
    /// Seconds it trained.
    pub seconds: f64,
    /// Clocks it ended while it trained.
    pub clocks: u64,
    /// What its accesses have cost.
    pub accesses: Accesses,
    /// What it was asked to give back.
    pub result: Option<R>,
}

/// Bytes that a client moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// By READ, from the servers.
    pub read: u64,
    /// By the servers' eager pushes.
    pub pushed: u64,
    /// In updates, to the servers.
    pub sent: u64,
}

/// An epoch that every worker has finished.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Epoch {
    /// Its number; 0 is before the first.
    pub epoch: usize,
    /// Seconds from the start until the slowest worker had finished it.
    pub seconds: f64,
    /// The objective: the sum of what the workers said.
    pub objective: f64,
}

/// What the messages of a job add up to.
#[derive(Debug)]
pub struct Tally<R> {
    workers: usize,
    open: BTreeMap<usize, (usize, Epoch)>,
    /// The finished epochs, in order.
    pub epochs: Vec<Epoch>,
    /// The reports of workers that are done.
    pub reports: Vec<WorkerReport<R>>,
    /// What the clients that are done moved.
    pub bytes: Bytes,
    /// By which ways they reached shards at the end, and how many of these.
    pub ways: BTreeMap<String, usize>,
    /// What the rails of each have done.
    pub rails: Vec<String>,
    /// Ratings or tokens trained on.
    pub count: u64,
}

impl<R> Tally<R> {
    /// For a job with this many workers.
    pub fn new(workers: usize) -> Self {
        Tally {
            workers,
            open: BTreeMap::new(),
            epochs: Vec::new(),
            reports: Vec::new(),
            bytes: Bytes::default(),
            ways: BTreeMap::new(),
            rails: Vec::new(),
            count: 0,
        }
    }

    /// Takes note of a message; gives back the epoch that it finished.
    pub fn add(&mut self, message: Message<R>) -> Option<&Epoch> {
        match message {
            Message::Progress { count } => self.count += count,
            Message::Epoch { epoch, seconds, objective, .. } => {
                return self.add_epoch(epoch, seconds, objective);
            }
            Message::Worker(report) => self.reports.push(report),
            Message::Client { bytes, ways, rails } => {
                ways.into_iter().for_each(|way| *self.ways.entry(way).or_default() += 1);
                self.rails.extend(rails);
                self.bytes.read += bytes.read;
                self.bytes.pushed += bytes.pushed;
                self.bytes.sent += bytes.sent;
            }
            Message::Failed { .. } => {}
        }
        None
    }

    fn add_epoch(&mut self, epoch: usize, seconds: f64, objective: f64) -> Option<&Epoch> {
        let (reported, sum) =
            self.open.entry(epoch).or_insert((0, Epoch { epoch, seconds: 0.0, objective: 0.0 }));
        *reported += 1;
        sum.seconds = sum.seconds.max(seconds);
        sum.objective += objective;
        if *reported < self.workers {
            return None;
        }
        // A worker reports its epochs in order, so they finish in order.
        let (_, epoch) = self.open.remove(&epoch)?;
        self.epochs.push(epoch);
        self.epochs.last()
    }

    /// What the accesses of all workers have cost together.
    pub fn accesses(&self) -> Accesses {
        let mut sum = Accesses::default();
        self.reports.iter().for_each(|report| sum.add(&report.accesses));
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(worker: usize, epoch: usize, seconds: f64, objective: f64) -> Message<Vec<f32>> {
        Message::Epoch { worker, epoch, seconds, objective }
    }

    #[test]
    fn an_epoch_counts_when_every_worker_has_reported_it() {
        let mut tally = Tally::new(2);
        assert_eq!(tally.add(epoch(0, 0, 0.0, 1.0)), None);
        assert_eq!(tally.add(epoch(0, 1, 2.0, 3.0)), None);
        assert_eq!(tally.add(epoch(0, 2, 9.0, 1.0)), None);
        assert_eq!(tally.add(epoch(1, 0, 0.0, 5.0)).unwrap().objective, 6.0);
        assert_eq!(
            *tally.add(epoch(1, 1, 1.5, 4.0)).unwrap(),
            Epoch { epoch: 1, seconds: 2.0, objective: 7.0 }
        );
        // Worker 0's epoch 2 stays out: worker 1 stopped before it.
        assert_eq!(tally.epochs.iter().map(|e| e.epoch).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn reports_and_bytes_add_up() {
        let mut tally = Tally::new(2);
        for (worker, waiting) in [(0, 0.5), (1, 0.25)] {
            let accesses = Accesses {
                waiting,
                hits: 10,
                clock_differential: BTreeMap::from([(-1, 3), (worker as i64, 1)]),
                ..Accesses::default()
            };
            tally.add(Message::Worker(WorkerReport {
                worker,
                seconds: 1.0,
                clocks: 5,
                accesses,
                result: None::<Vec<f32>>,
            }));
            let (ways, rails) =
                (vec!["tcp".into(), format!("rdma(a:{worker})")], vec![format!("a:{worker}")]);
            tally.add(Message::Client { bytes: Bytes { read: 1, pushed: 2, sent: 3 }, ways, rails });
            tally.add(Message::Progress { count: 7 });
        }
        assert_eq!(tally.bytes, Bytes { read: 2, pushed: 4, sent: 6 });
        assert_eq!(tally.count, 14);
        let ways: Vec<_> = tally.ways.iter().map(|(way, shards)| (way.as_str(), *shards)).collect();
        assert_eq!(ways, [("rdma(a:0)", 1), ("rdma(a:1)", 1), ("tcp", 2)]);
        assert_eq!(tally.rails, ["a:0", "a:1"]);
        let sum = tally.accesses();
        assert_eq!((sum.waiting, sum.hits), (0.75, 20));
        assert_eq!(sum.clock_differential, BTreeMap::from([(-1, 6), (0, 1), (1, 1)]));
    }

    #[test]
    fn messages_survive_a_line_of_json() {
        let accesses = Accesses { clock_differential: BTreeMap::from([(-4, 2)]), ..Accesses::default() };
        let report =
            WorkerReport { worker: 3, seconds: 0.1, clocks: 9, accesses, result: Some(vec![0.1, -2.5e-7]) };
        for message in [
            Message::Progress { count: 5 },
            epoch(1, 2, 0.123456789, 1234567.875),
            Message::Worker(report),
            Message::Client {
                bytes: Bytes { read: u64::MAX, pushed: 0, sent: 1 },
                ways: vec!["shm".into()],
                rails: Vec::new(),
            },
            Message::Failed { reason: "two\nlines and a \"quote\"".into() },
        ] {
            let line = serde_json::to_string(&message).unwrap();
            assert!(!line.contains('\n'), "{line}");
            assert_eq!(serde_json::from_str::<Message<Vec<f32>>>(&line).unwrap(), message, "{line}");
        }
    }
}
