//! The counts in tables of a parameter server.
//!
//! | table | rows | columns | model |
//! |---|---|---|---|
//! | `words` | one for each word | topics | that of the job |
//! | `totals` | 1 | topics | that of the job |
//! | `meet` | [`SHARDS`] | workers | BSP |
//!
//! A worker goes through a part in runs of groups: one `get_many` for the rows of a run, and of each row only the changed
//! counts go back (`inc_at`; a row of which more than half has changed is shorter as a whole). The totals are
//! read at the beginning of a part and their changes sent at its end.
//!
//! **No count that is read is ever below 0**, under any model: a row is the sum of what the workers have added, of each
//! worker all changes up to some moment, and none of them ever takes away more than it has added before.
//!
//! # Start and end
//! Nobody may read before all have added the topics that their tokens begin with; and what is read at the end is to be
//! exact, under any model. Both are done with the third table. A worker that has ended a clock and then gets a row of it
//! has waited until every worker has ended that clock, as far as the shard of that row goes: so it gets a row of each
//! shard. In the column of each worker is 1 from the start, and from its end 2 more than its last clock `c`, so that
//! others know whether it has finished. At clock `c + s + 1` of the greatest such `c`, a read under
//! staleness `s` sees everything; each worker goes on ending clocks until then. Models without a staleness need no more than
//! the meeting: under Async a `get` READs what the shard has applied, and under VAP the rows of a clock have been
//! pushed when its round is closed, as under ESSP.

use std::ops::Range;

use anyhow::{Result, ensure};
use fervor_client::{Client, Error, Model, Table, TableOptions, Worker};
use fervor_verbs::transport::Transport;

use super::{
    counts::Counts,
    sampler::{Prior, Sampler},
};
use crate::job::{Accesses, oracle::Witness};

/// Most shards of a job: consecutive rows of a table are in different shards.
const SHARDS: u64 = 256;
/// Counts that are fetched together: so many rows as have about this many.
const RUN: usize = 1 << 14;

/// Looks on while a worker draws topics: a simulation, which charges time for it and adds up what changes. `()` does not.
pub trait Observer {
    /// The rows of `words` were read; next, topics for `tokens` tokens of them are drawn.
    fn fetched(&mut self, words: &[u64], rows: &[i32], tokens: usize);

    /// The row of `word`, and so the totals, will have these changes.
    fn changed(&mut self, word: u64, changes: &[(u32, i32)]);
}

impl Observer for () {
    fn fetched(&mut self, _words: &[u64], _rows: &[i32], _tokens: usize) {}

    fn changed(&mut self, _word: u64, _changes: &[(u32, i32)]) {}
}

/// The tables of a job.
#[derive(Debug, Clone)]
pub struct Tables {
    words: Table<i32>,
    totals: Table<i32>,
    meet: Table<i64>,
    staleness: u64,
    /// Rows that are fetched together.
    run: usize,
}

impl Tables {
    /// Creates or joins the tables of the job called `job`, which has so many workers.
    ///
    /// # Errors
    /// What the client says, for example that a table does not fit the servers' memory.
    pub fn open<T: Transport>(
        client: &Client<T>,
        job: &str,
        prior: &Prior,
        workers: usize,
        model: Model,
    ) -> Result<Self> {
        Self::open_with(client, job, prior, workers, model, TableOptions::default())
    }

    /// As [`Tables::open`]; what `options` say holds for the counts.
    ///
    /// # Errors
    /// As [`Tables::open`].
    pub fn open_with<T: Transport>(
        client: &Client<T>,
        job: &str,
        prior: &Prior,
        workers: usize,
        model: Model,
        options: TableOptions,
    ) -> Result<Self> {
        let open = |name: &str, rows| {
            client.table_with(&format!("{job}/{name}"), rows, prior.topics, model, options)
        };
        Ok(Tables {
            totals: open("totals", 1)?,
            words: open("words", prior.words as u64)?,
            meet: client.table(&format!("{job}/meet"), SHARDS, workers, Model::Bsp)?,
            staleness: match model {
                Model::Ssp { staleness } | Model::Essp { staleness } => staleness.into(),
                _ => 0,
            },
            run: (RUN / prior.topics).clamp(1, 64),
        })
    }

    /// Fetches so many rows together, instead of about as many as have [`RUN`] counts.
    pub fn in_runs_of(self, rows: usize) -> Self {
        Tables { run: rows, ..self }
    }

    /// Adds the topics that the tokens of `sampler` have, and waits until all workers have done that.
    ///
    /// # Errors
    /// What the client says; another worker has failed; a job of this name has run before.
    pub fn start<T: Transport>(&self, worker: &mut Worker<T>, sampler: &mut Sampler) -> Result<()> {
        let own = sampler.share().worker;
        let mut seen = vec![0; self.meet.width()];
        worker.get(&self.meet, 0, &mut seen)?;
        ensure!(
            seen[own] == 0,
            "a job of this name has run on these servers before: name another with --job"
        );
        sampler.initial(|word, counts| add(worker, &self.words, word.into(), counts))?;
        add(worker, &self.totals, 0, sampler.totals())?;
        let last = self.sign(worker, own, 1)?;
        ensure!(
            last.is_some(),
            "a worker has not started: its client has failed, and its own output says why"
        );
        Ok(())
    }

    /// Adds `sign` to the column of worker `own`, ends the clock, and waits until everyone has ended it. The least
    /// and the greatest number that is in all columns then, if none is 0.
    fn sign<T: Transport>(
        &self,
        worker: &mut Worker<T>,
        own: usize,
        sign: i64,
    ) -> Result<Option<(i64, i64)>, Error> {
        if sign != 0 {
            for row in 0..SHARDS {
                worker.inc_at(&self.meet, row, &[(own as u32, sign)])?;
            }
        }
        worker.clock()?;
        let mut signs = vec![0; self.meet.width()];
        let (mut least, mut greatest) = (i64::MAX, 0);
        for row in 0..SHARDS {
            worker.get(&self.meet, row, &mut signs)?;
            least = signs.iter().fold(least, |least, &sign| least.min(sign));
            greatest = signs.iter().fold(greatest, |greatest, &sign| greatest.max(sign));
        }
        Ok((least > 0).then_some((least, greatest)))
    }

    /// Waits until all workers are here.
    ///
    /// # Errors
    /// What the client says.
    pub fn meet<T: Transport>(&self, worker: &mut Worker<T>) -> Result<(), Error> {
        self.sign(worker, 0, 0).map(drop)
    }

    /// Waits until all workers have called this. What is read then is exact.
    ///
    /// # Errors
    /// What the client says; another worker has failed.
    pub fn settle<T: Transport>(&self, worker: &mut Worker<T>, own: usize) -> Result<()> {
        let mut sign = worker.now() as i64 + 1;
        let greatest = loop {
            match self.sign(worker, own, sign)? {
                None => anyhow::bail!(
                    "a worker has not started: its client has failed, and its own output says why"
                ),
                Some((1, _)) => sign = 0,
                Some((_, greatest)) => break greatest as u64,
            }
        };
        // Of the last clock `c` there is `c + 2`.
        while worker.now() < greatest - 2 + self.staleness + 1 {
            worker.clock()?;
        }
        Ok(())
    }

    /// Draws new topics for all tokens of a part: what a worker does between two clocks.
    ///
    /// # Errors
    /// What the client says.
    pub fn sample<T: Transport>(
        &self,
        worker: &mut Worker<T>,
        sampler: &mut Sampler,
        part: usize,
        observer: &mut impl Observer,
    ) -> Result<(), Error> {
        let width = self.words.width();
        let mut fetched = vec![0; self.run * width];
        worker.get(&self.totals, 0, &mut fetched[..width])?;
        sampler.begin(&fetched[..width]);
        let mut words = Vec::with_capacity(self.run);
        let mut first = sampler.part(part).tokens.start;
        let mut done = 0;
        loop {
            let groups = &sampler.part(part).groups[done..];
            let groups = &groups[..self.run.min(groups.len())];
            if groups.is_empty() {
                break;
            }
            words.clear();
            words.extend(groups.iter().map(|group| u64::from(group.word)));
            let ends = groups.iter().map(|group| group.tokens as usize).collect::<Vec<_>>();
            let rows = &mut fetched[..words.len() * width];
            worker.get_many(&self.words, &words, rows)?;
            observer.fetched(&words, rows, ends.iter().sum());
            for ((&word, tokens), row) in words.iter().zip(ends).zip(rows.chunks_exact_mut(width)) {
                let changes = sampler.word(row, first..first + tokens);
                first += tokens;
                observer.changed(word, changes);
                add(worker, &self.words, word, changes)?;
            }
            done += words.len();
        }
        add(worker, &self.totals, 0, sampler.totals())
    }

    /// Calls `with` for each of `words` and its row.
    ///
    /// # Errors
    /// What the client says.
    pub fn rows<T: Transport>(
        &self,
        worker: &mut Worker<T>,
        words: Range<u32>,
        with: &mut dyn FnMut(u32, &[i32]),
    ) -> Result<(), Error> {
        let width = self.words.width();
        let mut fetched = vec![0; self.run * width];
        for first in words.clone().step_by(self.run) {
            let rows: Vec<u64> = (first..words.end.min(first + self.run as u32)).map(u64::from).collect();
            worker.get_many(&self.words, &rows, &mut fetched[..rows.len() * width])?;
            for (&word, row) in rows.iter().zip(fetched.chunks_exact(width)) {
                with(word as u32, row);
            }
        }
        Ok(())
    }

    /// The topic totals.
    ///
    /// # Errors
    /// What the client says.
    pub fn totals<T: Transport>(&self, worker: &mut Worker<T>) -> Result<Vec<i32>, Error> {
        let mut totals = vec![0; self.totals.width()];
        worker.get(&self.totals, 0, &mut totals)?;
        Ok(totals)
    }
}

/// Adds the `changes` of a row in their shorter form.
fn add<T: Transport>(
    worker: &mut Worker<T>,
    table: &Table<i32>,
    row: u64,
    changes: &[(u32, i32)],
) -> Result<(), Error> {
    match changes.len() {
        0 => Ok(()),
        // A pair is two numbers.
        few if 2 * few < table.width() => worker.inc_at(table, row, changes),
        _ => {
            let mut whole = vec![0; table.width()];
            changes.iter().for_each(|&(topic, change)| whole[topic as usize] = change);
            worker.inc(table, row, &whole)
        }
    }
}

/// The counts as seen by one worker of the parameter server.
#[derive(Debug)]
pub struct Served<'a, T: Transport> {
    tables: &'a Tables,
    worker: Worker<T>,
    /// Its number within the job.
    number: usize,
    witness: Option<Witness<'a>>,
}

impl<'a, T: Transport> Served<'a, T> {
    /// The counts for `worker`, who has this number within the job, and checks what it reads if it has a `witness`.
    pub fn new(tables: &'a Tables, worker: Worker<T>, number: usize, witness: Option<Witness<'a>>) -> Self {
        Served { tables, worker, number, witness }
    }

    /// To be called before each clock that is ended.
    fn tick(&mut self) -> Result<()> {
        self.witness.as_mut().map_or(Ok(()), |witness| witness.tick(&mut self.worker))
    }
}

impl<T: Transport> Counts for Served<'_, T> {
    fn start(&mut self, sampler: &mut Sampler) -> Result<()> {
        self.tick()?;
        self.tables.start(&mut self.worker, sampler)
    }

    fn meet(&mut self) -> Result<()> {
        self.tick()?;
        Ok(self.tables.meet(&mut self.worker)?)
    }

    fn sample(&mut self, sampler: &mut Sampler, part: usize) -> Result<()> {
        if let Some(witness) = &mut self.witness {
            witness.look(&mut self.worker)?;
        }
        Ok(self.tables.sample(&mut self.worker, sampler, part, &mut ())?)
    }

    fn clock(&mut self) -> Result<()> {
        self.tick()?;
        Ok(self.worker.clock()?)
    }

    fn settle(&mut self) -> Result<()> {
        if let Some(witness) = &mut self.witness {
            witness.leave(&mut self.worker)?;
        }
        self.tables.settle(&mut self.worker, self.number)
    }

    fn rows(&mut self, words: Range<u32>, with: &mut dyn FnMut(u32, &[i32])) -> Result<()> {
        Ok(self.tables.rows(&mut self.worker, words, with)?)
    }

    fn totals(&mut self) -> Result<Vec<i32>> {
        Ok(self.tables.totals(&mut self.worker)?)
    }

    fn accesses(&self) -> Accesses {
        self.worker.stats().into()
    }
}
