//! An oracle for `--check`: does a job read what its consistency model promises, by the application's own count of clocks?
//!
//! A client reports the clock of every copy that it returns, but a check that believes these reports shows nothing when they are
//! wrong. So a checked job has one more table, of `i64` and of the job's model. Each worker has a few rows of it, and in each clock
//! it adds 1 to them. The value of a row is then the number of its worker's clocks that a reader sees. A worker that has ended
//! `c` clocks, under staleness `s`, must see
//!
//! | in the rows of | |
//! |---|---|
//! | its own | exactly `c` |
//! | another worker | at least `c - s`, or that this worker has left |
//! | another worker, where the model has no staleness (Async, VAP) | at least 0 |
//!
//! A worker that leaves adds [`LEFT`] to its rows, since the clock of the others goes on without it. Rows are dealt to the shards in turn, and
//! each worker has [`SPREAD`] consecutive ones, so that several shards are checked for each pair of workers.

use anyhow::{Result, bail};
use fervor_client::{Client, Table, Worker};
use fervor_verbs::transport::Transport;

use super::options::{JobOptions, SPREAD};

/// What a worker that leaves adds to its rows: more than it could count.
const LEFT: i64 = 1 << 40;

/// The table of a job.
#[derive(Debug)]
pub struct Oracle {
    table: Table<i64>,
    model: String,
    staleness: Option<u64>,
    workers: usize,
}

impl Oracle {
    /// Creates or joins the table of the job called `job`, if the job is checked.
    ///
    /// # Errors
    /// What the client says.
    pub fn open<T: Transport>(client: &Client<T>, job: &str, options: &JobOptions) -> Result<Option<Self>> {
        if !options.check {
            return Ok(None);
        }
        let (workers, model) = (options.all_workers(), &options.model);
        let rows = (workers * SPREAD) as u64;
        let table = client.table_with(&format!("{job}/check"), rows, 1, model.model(), model.table())?;
        let staleness = model.bounded_by().map(u64::from);
        Ok(Some(Oracle { table, model: model.to_string(), staleness, workers }))
    }

    /// What worker number `own` of the job knows.
    pub fn witness(&self, own: usize) -> Witness<'_> {
        let rows = self.workers * SPREAD;
        Witness { oracle: self, own, clocks: 0, rows: (0..rows as u64).collect(), values: vec![0; rows] }
    }
}

/// One worker, which counts its clocks and checks what it reads.
#[derive(Debug)]
pub struct Witness<'a> {
    oracle: &'a Oracle,
    own: usize,
    /// Clocks that it has ended.
    clocks: u64,
    rows: Vec<u64>,
    values: Vec<i64>,
}

impl Witness<'_> {
    /// Reads all rows and checks them.
    ///
    /// # Errors
    /// A row does not have what the model promises; what the client says.
    pub fn look<T: Transport>(&mut self, worker: &mut Worker<T>) -> Result<()> {
        worker.get_many(&self.oracle.table, &self.rows, &mut self.values)?;
        match violation(&self.values, self.own, self.clocks, self.oracle.staleness) {
            None => Ok(()),
            Some(violation) => bail!("the promise of {} is broken: {violation}", self.oracle.model),
        }
    }

    /// Counts a clock. To be called right before the worker ends it.
    ///
    /// # Errors
    /// What the client says.
    pub fn tick<T: Transport>(&mut self, worker: &mut Worker<T>) -> Result<()> {
        self.add(worker, 1)?;
        self.clocks += 1;
        Ok(())
    }

    /// Says that the worker counts no more clocks. To be called before it ends one more.
    ///
    /// # Errors
    /// What the client says.
    pub fn leave<T: Transport>(&mut self, worker: &mut Worker<T>) -> Result<()> {
        self.add(worker, LEFT)
    }

    fn add<T: Transport>(&self, worker: &mut Worker<T>, value: i64) -> Result<()> {
        let first = self.own * SPREAD;
        (first..first + SPREAD)
            .try_for_each(|row| worker.inc(&self.oracle.table, row as u64, &[value]))
            .map_err(Into::into)
    }
}

/// What is wrong with the `values` of all rows, read by worker `own` after it has ended `clocks` clocks.
fn violation(values: &[i64], own: usize, clocks: u64, staleness: Option<u64>) -> Option<String> {
    let (exact, least) =
        (clocks as i64, staleness.map_or(0, |staleness| clocks.saturating_sub(staleness) as i64));
    values.iter().enumerate().find_map(|(row, &seen)| {
        let worker = row / SPREAD;
        if worker == own {
            return (seen != exact).then(|| {
                format!("worker {own} has ended {exact} clocks, and in row {row}, which is its own, it read {seen}")
            });
        }
        (seen < least).then(|| {
            format!(
                "worker {own} has ended {exact} clocks and must see at least {least} of worker {worker}, but in row {row} it \
                 read {seen}"
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use fervor_client::{ClientOptions, Model};
    use fervor_server::{Config, Server};
    use fervor_verbs::{Address, transport::any::Host};

    use super::*;

    /// The rows of workers that are seen to have ended so many clocks.
    fn seen(clocks: &[i64]) -> Vec<i64> {
        clocks.iter().flat_map(|clocks| [*clocks; SPREAD]).collect()
    }

    #[test]
    fn what_a_model_promises_is_accepted() {
        for (clocks, staleness, values) in [
            (0, Some(0), [0, 0, 0]),
            (9, Some(0), [9, 9, 9]),
            (9, Some(0), [9, 9, 12]),
            (9, Some(3), [6, 9, 6]),
            (2, Some(3), [0, 2, 0]),
            (9, None, [0, 9, 0]),
            (9, Some(0), [LEFT + 2, 9, 9]),
        ] {
            assert_eq!(violation(&seen(&values), 1, clocks, staleness), None, "{values:?}");
        }
    }

    #[test]
    fn every_kind_of_violation_is_found_and_names_both_numbers() {
        for (clocks, staleness, values, words) in [
            (9, Some(0), [8, 9, 9], ["at least 9 of worker 0", "read 8"]),
            (9, Some(3), [5, 9, 9], ["at least 6 of worker 0", "read 5"]),
            (9, Some(3), [9, 9, 0], ["at least 6 of worker 2", "read 0"]),
            (9, Some(3), [9, 8, 9], ["has ended 9 clocks", "its own, it read 8"]),
            (9, Some(3), [9, 10, 9], ["has ended 9 clocks", "its own, it read 10"]),
            (9, None, [-1, 9, 9], ["at least 0 of worker 0", "read -1"]),
            (9, None, [0, 7, 0], ["has ended 9 clocks", "its own, it read 7"]),
        ] {
            let found = violation(&seen(&values), 1, clocks, staleness).expect("a violation");
            assert!(words.iter().all(|word| found.contains(word)), "{values:?}: {found}");
        }
        // One row of many, whichever.
        for row in 0..3 * SPREAD {
            let mut values = seen(&[5, 5, 5]);
            values[row] -= 1;
            let found = violation(&values, 2, 5, Some(0)).expect("a violation");
            assert!(found.contains(&format!("in row {row}")), "{found}");
        }
    }

    /// A table that promises less than the oracle takes it to stands for a server or client that breaks its promise.
    #[test]
    fn a_promise_that_is_broken_is_found_whatever_the_client_claims() {
        let socket = std::env::temp_dir().join(format!("fervor-oracle-{}.sock", std::process::id()));
        let address: Address = format!("shm://{}", socket.display()).parse().unwrap();
        let host = Host::for_addresses(std::slice::from_ref(&address)).unwrap();
        let server = Server::start(&host, &Config::new(address)).unwrap();
        let clients: Vec<_> = (0..2)
            .map(|_| {
                let options = ClientOptions { clients: 2, check: true, ..ClientOptions::default() };
                Client::connect_with(&[server.address().to_string()], options).unwrap()
            })
            .collect();
        let oracles: Vec<_> = clients
            .iter()
            .map(|client| Oracle {
                table: client.table("check", 2 * SPREAD as u64, 1, Model::Async).unwrap(),
                model: "ssp(3)".into(),
                staleness: Some(3),
                workers: 2,
            })
            .collect();
        let mut workers: Vec<_> = clients.iter().map(|client| client.worker().unwrap()).collect();
        let mut witnesses: Vec<_> =
            oracles.iter().enumerate().map(|(own, oracle)| oracle.witness(own)).collect();
        // Worker 1 stands still after its first clock: worker 0 may end three more, and reads nothing too old in the fourth.
        let clock = |witness: &mut Witness<'_>, worker: &mut Worker| {
            witness.tick(worker).unwrap();
            worker.clock().unwrap();
        };
        clock(&mut witnesses[1], &mut workers[1]);
        let start = std::time::Instant::now();
        loop {
            let mut value = [0];
            workers[0].get(&oracles[0].table, 2 * SPREAD as u64 - 1, &mut value).unwrap();
            if value == [1] {
                break;
            }
            assert!(start.elapsed().as_secs() < 20, "the update has not arrived");
        }
        for _ in 0..4 {
            clock(&mut witnesses[0], &mut workers[0]);
            witnesses[0].look(&mut workers[0]).unwrap();
        }
        clock(&mut witnesses[0], &mut workers[0]);
        let error = witnesses[0].look(&mut workers[0]).unwrap_err().to_string();
        assert!(
            error.contains("the promise of ssp(3) is broken: worker 0 has ended 5 clocks and must see at least 2 of worker 1"),
            "{error}"
        );
        // Once it has left it may be behind.
        witnesses[1].leave(&mut workers[1]).unwrap();
        workers[1].clock().unwrap();
        while witnesses[0].look(&mut workers[0]).is_err() {
            assert!(start.elapsed().as_secs() < 20, "the update has not arrived");
        }
    }
}
