//! A worker at work, and what is checked of each `get`.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, atomic::Ordering},
};

use fervor_client::{
    Client, Element, ElementType, Error, Model, Table, TableOptions, Worker, WorkerStats, value_bound,
};
use fervor_protocol::row::Layout;
use fervor_verbs::transport::Transport;

use super::{
    journal::What,
    plan::{Op, Plan},
    tables::TablePlan,
};
#[cfg(feature = "mutants")]
use crate::support::Random;

/// An element that counts exactly.
pub trait Number: Element {
    fn of(count: i64) -> Self;
    fn count(self) -> i64;
}

macro_rules! number {
    ($($type:ty)*) => {$(
        impl Number for $type {
            fn of(count: i64) -> Self {
                count as $type
            }
            fn count(self) -> i64 {
                self as i64
            }
        }
    )*};
}
number!(f32 f64 i32 i64);

/// A table of whichever type.
#[derive(Clone)]
pub enum Any {
    F32(Table<f32>),
    F64(Table<f64>),
    I32(Table<i32>),
    I64(Table<i64>),
}

/// Does the same with a table of whichever type.
#[macro_export]
macro_rules! on {
    ($any:expr, $table:ident => $body:expr) => {
        match $any {
            $crate::checker::actor::Any::F32($table) => $body,
            $crate::checker::actor::Any::F64($table) => $body,
            $crate::checker::actor::Any::I32($table) => $body,
            $crate::checker::actor::Any::I64($table) => $body,
        }
    };
}

/// Opens the tables, with caches of few slots.
pub fn open<T: Transport>(client: &Client<T>, plan: &Plan) -> Result<Vec<Any>, Error> {
    let open = |(number, table): (usize, &TablePlan)| {
        let width = plan.width(number);
        // At least the fewest slots that there may be, in each shard; pieces of the cache begin at cache lines.
        let stride = Layout::new(plan.row_bytes(number)).stride();
        let shards = plan.servers * plan.shards;
        let each = (table.slots.div_ceil(shards).max(4) * stride).next_multiple_of(64);
        let options = TableOptions {
            cache_bytes: Some(each * shards),
            continuous: table.continuous,
            ..TableOptions::default()
        };
        fn with<E: Element, T: Transport>(
            client: &Client<T>,
            table: &TablePlan,
            width: usize,
            options: TableOptions,
        ) -> Result<Table<E>, Error> {
            client.table_with(&table.name, table.rows, width, table.model, options)
        }
        Ok(match table.element {
            ElementType::F32 => Any::F32(with(client, table, width, options)?),
            ElementType::F64 => Any::F64(with(client, table, width, options)?),
            ElementType::I32 => Any::I32(with(client, table, width, options)?),
            ElementType::I64 => Any::I64(with(client, table, width, options)?),
        })
    };
    plan.tables.iter().enumerate().map(open).collect()
}

/// What a row was seen as: the claim, and each lane's sum.
type Seen = (u64, Vec<i64>);

/// What a worker knows of the moment before a `get`.
struct Before {
    stats: WorkerStats,
    closed: Vec<bool>,
    /// Per row, what each lane has made, if the table is value-bounded.
    made: BTreeMap<u64, Vec<(i64, u64)>>,
}

/// The clock that the `get`s of `worker` since `before` claim to be good for, the least of theirs: at least, and at most.
pub fn claim<T: Transport>(before: &WorkerStats, worker: &Worker<T>) -> (u64, u64) {
    let after = worker.stats().clock_differential;
    let new = |(differential, count): &(&i64, &u64)| {
        before.clock_differential.get(differential).is_none_or(|earlier| earlier < *count)
    };
    let differential = *after.iter().find(new).expect("every get counts its differential").0;
    // They are rounded up in size, to a power of two.
    let (least, most) = match differential {
        ..-64 => (differential, differential / 2 - 1),
        65.. => (differential / 2 + 1, differential),
        _ => (differential, differential),
    };
    // No clock is below 0.
    let clock = |differential| u64::try_from(differential + 1 + worker.now() as i64).unwrap_or(0);
    (clock(least), clock(most))
}

/// A worker at work.
pub struct Actor<T: Transport> {
    pub transport: T,
    pub plan: Arc<Plan>,
    pub lane: usize,
    pub worker: Worker<T>,
    pub tables: Vec<Any>,
    /// Per table and row, what it has added.
    own: Vec<Vec<i64>>,
    /// Its client has no other worker, so nothing goes back: per table and row, what was seen last.
    alone: Option<Vec<Vec<Seen>>>,
}

impl<T: Transport> Actor<T> {
    pub fn new(transport: &T, plan: &Arc<Plan>, lane: usize, worker: Worker<T>, tables: Vec<Any>) -> Self {
        let lanes = plan.lanes.len();
        plan.lanes[lane].began.store(worker.now(), Ordering::SeqCst);
        let alone = plan.lanes.iter().filter(|other| other.client == plan.lanes[lane].client).count() == 1;
        let seen = |table: &TablePlan| vec![(0, vec![0; lanes]); table.rows as usize];
        Self {
            transport: transport.clone(),
            plan: plan.clone(),
            lane,
            worker,
            tables,
            own: plan.tables.iter().map(|table| vec![0; table.rows as usize]).collect(),
            alone: alone.then(|| plan.tables.iter().map(seen).collect()),
        }
    }

    /// Does all that the plan says, or all until it loses a server. Returns what the worker counted.
    pub fn run(mut self) -> (WorkerStats, Result<(), Error>) {
        self.expose();
        let result = self.work();
        if let Err(error) = &result {
            self.note(What::Event(format!("lost: {error}")));
            self.lost(error);
        }
        (self.worker.stats(), result)
    }

    fn work(&mut self) -> Result<(), Error> {
        let plan = self.plan.clone();
        for ops in &plan.lanes[self.lane].clocks {
            ops.iter().try_for_each(|op| self.act(op))?;
            let clock = self.worker.now();
            self.note(What::Clock);
            self.worker.clock()?;
            assert_eq!(self.worker.now(), clock + 1, "seed {}: a clock goes up by one", plan.seed);
        }
        plan.lanes[self.lane].rest.iter().try_for_each(|op| self.act(op))
    }

    /// A call has failed. Every further call that needs a server fails alike; what a `get` still returns is right.
    fn lost(&mut self, error: &Error) {
        let plan = self.plan.clone();
        let place = format!("seed {}: lane {}", plan.seed, self.lane);
        assert!(matches!(error, Error::ServerLost { .. }), "{place}: {error}");
        for (table, found) in plan.tables.iter().enumerate() {
            for row in 0..found.rows.min(6) {
                let again = self.act(&Op::Get { table, row });
                let alike = again.err().is_none_or(|again| matches!(again, Error::ServerLost { .. }));
                assert!(alike, "{place}: {error}, and then something else");
            }
        }
        let again = self.worker.clock();
        assert!(
            matches!(again, Err(Error::ServerLost { .. })),
            "{place}: {error}, and a clock comes to {again:?}"
        );
    }

    /// Lets other threads come between where the client's code says so, now and then.
    #[cfg(feature = "mutants")]
    fn expose(&self) {
        let mut random = Random(self.plan.seed ^ (self.lane as u64) << 32);
        let rarely = [2, 8, 32, u64::MAX][(self.plan.seed % 4) as usize];
        let transport = self.transport.clone();
        fervor_protocol::mutants::on_pause(Box::new(move || {
            if random.one_in(rarely) {
                transport.relax(0);
            }
        }));
    }

    /// Only with the feature `mutants` does the client's code have places where others may come between.
    #[cfg(not(feature = "mutants"))]
    fn expose(&self) {}

    fn note(&self, what: What) {
        self.plan.journal.note(self.transport.now(), self.lane, self.worker.now(), what);
    }

    fn act(&mut self, op: &Op) -> Result<(), Error> {
        self.note(What::Op(op.clone()));
        let any = self.tables[op.table()].clone();
        on!(&any, found => self.act_on(op, op.table(), found))
    }

    fn act_on<E: Number>(&mut self, op: &Op, number: usize, table: &Table<E>) -> Result<(), Error> {
        let width = table.width();
        match op {
            Op::Get { row, .. } => {
                let before = self.before(number, &[*row]);
                let mut copy = vec![E::default(); width];
                self.worker.get(table, *row, &mut copy)?;
                let claim = self.claim(&before);
                self.check(number, *row, &copy, claim, &before);
            }
            Op::GetMany { rows, .. } => {
                let before = self.before(number, rows);
                let mut copies = vec![E::default(); width * rows.len()];
                self.worker.get_many(table, rows, &mut copies)?;
                // Which row has which claim is not told: all have the least at least.
                let claim = self.claim(&before);
                for (row, copy) in rows.iter().zip(copies.chunks_exact(width)) {
                    self.check(number, *row, copy, claim, &before);
                }
            }
            Op::Inc { row, by, .. } => {
                let mut delta = vec![E::default(); width];
                self.plan.columns(number, self.lane).for_each(|column| delta[column] = E::of(*by));
                self.plan.adding(number, *row, self.lane, *by);
                self.worker.inc(table, *row, &delta)?;
                self.made(number, *row, *by);
            }
            Op::IncAt { row, by, .. } => {
                // In two parts: a column may come more than once.
                let columns = || self.plan.columns(number, self.lane);
                let parts = [by - 1, 1].map(E::of);
                let pairs: Vec<_> = parts
                    .into_iter()
                    .flat_map(|part| columns().map(move |column| (column as u32, part)))
                    .collect();
                self.plan.adding(number, *row, self.lane, *by);
                self.worker.inc_at(table, *row, &pairs)?;
                self.made(number, *row, *by);
            }
        }
        Ok(())
    }

    /// It has added.
    fn made(&mut self, table: usize, row: u64, by: i64) {
        self.own[table][row as usize] += by;
        let made = (self.own[table][row as usize], self.worker.now());
        let place = &self.plan.made[table][row as usize][self.lane];
        *place.lock().unwrap_or_else(PoisonError::into_inner) = made;
    }

    fn before(&self, table: usize, rows: &[u64]) -> Before {
        let bounded = matches!(self.plan.tables[table].model, Model::Vap { .. });
        let made = rows.iter().filter(|_| bounded).map(|row| (*row, self.plan.made(table, *row)));
        let closed = self.plan.closed.iter().map(|closed| closed.load(Ordering::SeqCst));
        Before { made: made.collect(), closed: closed.collect(), stats: self.worker.stats() }
    }

    /// The clock that the `get`s since `before` claim to be good for, the least of theirs: at least, and at most. (Great differentials are
    /// only known roughly: those of a worker far behind the job, or far ahead of it.)
    fn claim(&self, before: &Before) -> (u64, u64) {
        claim(&before.stats, &self.worker)
    }

    fn check<E: Number>(
        &mut self,
        table: usize,
        row: u64,
        copy: &[E],
        (claim, most_claimed): (u64, u64),
        before: &Before,
    ) {
        let plan = self.plan.clone();
        let model = plan.tables[table].model;
        let clock = self.worker.now();
        let value = |column: usize| copy[column].count();
        let first = |lane| value(plan.columns(table, lane).next().expect("a lane has a column"));
        let sums: Vec<i64> = (0..plan.lanes.len()).map(first).collect();
        self.note(What::Got { table, row, claim, sums: sums.clone() });
        let place = format!(
            "seed {}: lane {} at clock {clock}, table {table} ({model}), row {row} as of clock {claim}",
            plan.seed, self.lane
        );
        let needed = model.staleness().map_or(0, |s| clock.saturating_sub(s.into()));
        assert!(most_claimed >= needed, "{place}: STALE: clock {needed} is needed");
        assert_eq!(self.worker.stats().violations, 0, "{place}: STALE: the worker itself says so");
        let nobodys = (0..copy.len()).filter(|column| column % plan.tables[table].spacing != 0);
        for column in nobodys {
            assert_eq!(value(column), 0, "{place}: FOREIGN: column {column} is nobody's");
        }
        for (other, lane) in plan.lanes.iter().enumerate() {
            let columns: Vec<i64> = plan.columns(table, other).map(value).collect();
            let what =
                || format!("{place}, columns of lane {other}: {:?}", &columns[..columns.len().min(20)]);
            if other == self.lane {
                let own = self.own[table][row as usize];
                assert!(columns.iter().all(|c| *c == own), "OWN: {}: own, each once: {own}", what());
                continue;
            }
            // Copies of an Async table that are pushed may be old.
            let fresh = model == Model::Async && plan.tables[table].continuous == 0;
            let closed = fresh && before.closed[lane.client];
            let least = match (closed, plan.unreliable(other)) {
                (true, _) => lane.total[table][row as usize],
                (false, true) => 0,
                (false, false) => lane.before(table, row, claim),
            };
            let most = plan.added[table][row as usize][other].load(Ordering::SeqCst);
            assert!(columns.iter().all(|c| *c >= least), "MISSING: {}: not {least}..={most}", what());
            assert!(columns.iter().all(|c| *c <= most), "TOO MUCH: {}: not {least}..={most}", what());
            // Nobody waits for a client to see something that has lost the connection, whether it knows that or not.
            let promised = !plan.unreliable(other) && !plan.harmed(plan.lanes[self.lane].client);
            if let (Some(made), true) = (before.made.get(&row), promised) {
                let (made, at) = made[other];
                let bound = value_bound(model, at + 1).max(Plan::greatest(row) as f64);
                let seen = columns.iter().all(|c| *c as f64 + bound >= made as f64);
                assert!(seen, "VALUE: {}: of {made} by clock {at} with bound {bound}", what());
            }
            if lane.client != plan.lanes[self.lane].client {
                // It has been applied; a client sees of its own what it has not even sent.
                plan.saw(table, row, other, *columns.iter().min().expect("a lane has a column"));
            }
            if !plan.in_parts(table) {
                assert!(columns.iter().all(|c| *c == columns[0]), "TORN: {}: no snapshot", what());
                // Under a value bound updates go when they must, and of one that gives up when they can, also within a clock.
                assert!(
                    !before.made.is_empty()
                        || plan.harmed(lane.client)
                        || lane.sums_to(table, row, columns[0]),
                    "PART: {}: no sum at the end of a clock",
                    what()
                );
            }
        }
        if let Some(seen) = &mut self.alone {
            let (last_claim, last) = &mut seen[table][row as usize];
            let gets = |stats: &WorkerStats| stats.in_place + stats.hits + stats.misses;
            // READs that are in flight together may pass each other. A first push may be on its way while a READ
            // overtakes it; and a push may know of a clock before its round is closed, which a READ does not.
            if gets(&self.worker.stats()) == gets(&before.stats) + 1 && !plan.tables[table].pushed() {
                assert!(most_claimed >= *last_claim, "BACK: {place}, after clock {last_claim}");
                let forward = last.iter().zip(&sums).all(|(last, now)| last <= now);
                assert!(
                    forward || plan.in_parts(table),
                    "BACK: {place}: sums by lane {sums:?} after {last:?}"
                );
                (*last_claim, *last) = (claim, sums);
            }
        }
    }
}
