//! Random workloads, checked exactly: tables of all models and element types, caches of a few slots so that rows
//! are given up and subscribed again all the time, rows whose updates do not fit one message, several servers, clients
//! and workers. In the simulator, and over shared memory with real threads.
//!
//! Each worker has columns of its own in every row and adds whole numbers to them. What it will add is drawn before the
//! run, so for any clock it is known how much of it a reader must see. A `get` at clock `c` is checked against:
//!
//! | whose columns | at least | at most |
//! |---|---|---|
//! | own | all that was added | the same |
//! | others' | what is stamped `<= c - s - 1` (Async: nothing) | what has been added by now |
//!
//! All columns of one worker are added to alike, so in a row whose updates fit a message they are equal: rows are
//! snapshots. At the end a new client finds the sums.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fervor_client::{Client, ClientOptions, Element, ElementType, Model, Table, TableOptions, Worker};
use fervor_server::Server;
use fervor_verbs::{
    Address,
    transport::{Thread, Transport, any::Host, sim::Sim},
};
use support::{Folder, Random, config};

mod support;

/// An element that counts exactly.
trait Number: Element {
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

#[derive(Debug)]
struct TablePlan {
    name: String,
    model: Model,
    element: ElementType,
    rows: u64,
    /// Columns of each lane: those whose number is the lane's modulo the number of lanes.
    each: usize,
    slots: usize,
}

/// The last of the rows that everybody uses.
const HOT: u64 = 2;

/// What a worker does next.
#[derive(Debug, Clone)]
enum Op {
    Get { table: usize, row: u64 },
    GetMany { table: usize, rows: Vec<u64> },
    Inc { table: usize, row: u64, by: i64 },
    IncAt { table: usize, row: u64, by: i64 },
}

/// One worker of all: its columns, and all that it does.
#[derive(Debug)]
struct Lane {
    client: usize,
    /// Operations of each clock.
    clocks: Vec<Vec<Op>>,
    /// Operations after its last clock: they are handed over when it is dropped.
    rest: Vec<Op>,
    /// Per table and clock and row, what it adds before it ends that many clocks.
    stamped: Vec<Vec<Vec<i64>>>,
    /// Per table and row, what it adds in all.
    total: Vec<Vec<i64>>,
}

#[derive(Debug)]
struct Plan {
    seed: u64,
    servers: usize,
    shards: usize,
    clients: usize,
    credits: usize,
    reads_in_flight: usize,
    tables: Vec<TablePlan>,
    lanes: Vec<Lane>,
    /// Per table, row and lane, what has been added by now.
    added: Vec<Vec<Vec<AtomicI64>>>,
}

impl Plan {
    /// With `clocks` clocks at most.
    fn new(seed: u64, clocks: u64) -> Arc<Self> {
        let mut random = Random(seed);
        let clients = random.among(1..=4) as usize;
        let owners: Vec<usize> =
            (0..clients).flat_map(|client| vec![client; random.among(1..=3) as usize]).collect();
        // Two kinds: a few rows of many kinds; or eager tables under pressure, where slots change hands all the time while
        // pushes are on their way.
        let busy = random.one_in(2);
        let wide = !busy && random.one_in(3);
        let tables: Vec<_> = (0..random.among(1..=if busy { 2 } else { 4 }))
            .map(|number| {
                let wide = wide && number == 0;
                let element = [ElementType::F32, ElementType::F64, ElementType::I32, ElementType::I64]
                    [random.among(0..=3) as usize];
                let staleness = random.among(0..=3) as u32;
                let rows = match (wide, busy) {
                    (true, _) => random.among(1..=3),
                    (_, true) => random.among(6..=20),
                    (_, false) => random.among(1..=40),
                };
                // A wide row has more than 64 KiB: its dense updates take several messages.
                let least = (66 << 10) / element.size() / owners.len() + 1;
                TablePlan {
                    name: format!("table-{number}"),
                    model: match random.among(0..=9) {
                        0 => Model::Bsp,
                        1..=3 => Model::Ssp { staleness },
                        4 => Model::Async,
                        _ => Model::Essp { staleness },
                    },
                    element,
                    rows,
                    each: if wide { least } else { random.among(1..=6) as usize },
                    slots: random.among(4..=if busy { 9 } else { rows.max(4) + 2 }) as usize,
                }
            })
            .collect();
        let most = random.among(2..=clocks);
        let lanes: Vec<_> =
            owners.iter().map(|&client| Lane::new(client, &tables, busy, most, &mut random)).collect();
        let added = tables.iter().map(|table| {
            let row = || owners.iter().map(|_| AtomicI64::new(0)).collect();
            (0..table.rows).map(|_| row()).collect()
        });
        Arc::new(Self {
            seed,
            servers: random.among(1..=3) as usize,
            shards: random.among(1..=3) as usize,
            clients,
            credits: if random.one_in(2) { 8 } else { random.among(1..=4) as usize },
            reads_in_flight: random.among(1..=16) as usize,
            added: added.collect(),
            tables,
            lanes,
        })
    }

    fn width(&self, table: usize) -> usize {
        self.tables[table].each * self.lanes.len()
    }

    fn wide(&self, table: usize) -> bool {
        self.width(table) * self.tables[table].element.size() > 32 << 10
    }
}

impl Lane {
    fn new(client: usize, tables: &[TablePlan], busy: bool, most: u64, random: &mut Random) -> Self {
        // Some are done before the others.
        let clocks: Vec<_> =
            (0..random.among(1.max(most / 2)..=most)).map(|_| ops(tables, busy, random)).collect();
        let rest = if random.one_in(2) { ops(tables, busy, random) } else { Vec::new() };
        let mut total: Vec<_> = tables.iter().map(|table| vec![0; table.rows as usize]).collect();
        let mut stamped: Vec<_> = total.iter().map(|rows: &Vec<i64>| vec![rows.clone()]).collect();
        for ops in clocks.iter().chain([&rest]) {
            for op in ops {
                if let Op::Inc { table, row, by } | Op::IncAt { table, row, by } = op {
                    total[*table][*row as usize] += by;
                }
            }
            for (stamped, total) in stamped.iter_mut().zip(&total) {
                stamped.push(total.clone());
            }
        }
        // What is added after the last clock has no stamp that anybody may count on.
        for stamped in &mut stamped {
            stamped.pop();
        }
        Self { client, clocks, rest, stamped, total }
    }

    /// What it adds to `row` before it ends `clocks` clocks.
    fn before(&self, table: usize, row: u64, clocks: u64) -> i64 {
        let stamped = &self.stamped[table];
        stamped[(clocks as usize).min(stamped.len() - 1)][row as usize]
    }
}

fn ops(tables: &[TablePlan], busy: bool, random: &mut Random) -> Vec<Op> {
    let any = (0..if busy { random.among(0..=30) } else { random.among(0..=9) }).map(|_| {
        let table = random.among(0..=tables.len() as u64 - 1) as usize;
        let last = tables[table].rows - 1;
        // Half of the time one of a few rows, which everybody uses.
        let last = if random.one_in(2) { last.min(HOT) } else { last };
        let row = random.among(0..=last);
        // Rows grow at different speeds: the image of another row would be found out.
        let by = (random.among(1..=3) + 5 * row) as i64;
        match random.among(0..=5) {
            0 => Op::Inc { table, row, by },
            1 | 2 => Op::IncAt { table, row, by },
            3 => {
                let rows = (0..random.among(1..=6)).map(|_| random.among(0..=tables[table].rows - 1));
                Op::GetMany { table, rows: rows.collect() }
            }
            _ => Op::Get { table, row },
        }
    });
    let any: Vec<_> = any.collect();
    if !busy {
        return any;
    }
    // At the bounds of the models: first everybody reads what everybody has changed last.
    let hot = |op: fn(usize, u64) -> Op| {
        tables
            .iter()
            .enumerate()
            .flat_map(move |(table, plan)| (0..=HOT.min(plan.rows - 1)).map(move |row| op(table, row)))
    };
    let first = hot(|table, row| Op::Get { table, row });
    let last = hot(|table, row| Op::IncAt { table, row, by: 1 + 5 * row as i64 });
    first.chain(any).chain(last).collect()
}

/// A table of whichever type.
#[derive(Clone)]
enum Any {
    F32(Table<f32>),
    F64(Table<f64>),
    I32(Table<i32>),
    I64(Table<i64>),
}

macro_rules! on {
    ($any:expr, $table:ident => $body:expr) => {
        match $any {
            Any::F32($table) => $body,
            Any::F64($table) => $body,
            Any::I32($table) => $body,
            Any::I64($table) => $body,
        }
    };
}

/// A worker at work.
struct Actor<T: Transport> {
    plan: Arc<Plan>,
    lane: usize,
    worker: Worker<T>,
    tables: Vec<Any>,
    /// Per table and row, what it has added.
    own: Vec<Vec<i64>>,
}

impl<T: Transport> Actor<T> {
    fn run(mut self) {
        let plan = self.plan.clone();
        for ops in &plan.lanes[self.lane].clocks {
            ops.iter().for_each(|op| self.act(op));
            self.worker.clock().unwrap();
        }
        plan.lanes[self.lane].rest.iter().for_each(|op| self.act(op));
    }

    fn act(&mut self, op: &Op) {
        let (Op::Get { table, .. }
        | Op::GetMany { table, .. }
        | Op::Inc { table, .. }
        | Op::IncAt { table, .. }) = op;
        let any = self.tables[*table].clone();
        on!(&any, found => self.act_on(op, *table, found));
    }

    fn act_on<E: Number>(&mut self, op: &Op, number: usize, table: &Table<E>) {
        let (lanes, width) = (self.plan.lanes.len(), table.width());
        let mine = |column: usize| column % lanes == self.lane;
        match op {
            Op::Get { row, .. } => {
                let mut copy = vec![E::default(); width];
                self.worker.get(table, *row, &mut copy).unwrap();
                self.check(number, *row, &copy);
            }
            Op::GetMany { rows, .. } => {
                let mut copies = vec![E::default(); width * rows.len()];
                self.worker.get_many(table, rows, &mut copies).unwrap();
                for (row, copy) in rows.iter().zip(copies.chunks_exact(width)) {
                    self.check(number, *row, copy);
                }
            }
            Op::Inc { row, by, .. } => {
                let delta: Vec<E> =
                    (0..width).map(|column| E::of(if mine(column) { *by } else { 0 })).collect();
                self.adding(number, *row, *by);
                self.worker.inc(table, *row, &delta).unwrap();
            }
            Op::IncAt { row, by, .. } => {
                // In two parts: a column may come more than once.
                let columns = || (0..width as u32).filter(|column| mine(*column as usize));
                let parts = [by - 1, 1].map(E::of);
                let pairs: Vec<_> =
                    parts.into_iter().flat_map(|part| columns().map(move |column| (column, part))).collect();
                self.adding(number, *row, *by);
                self.worker.inc_at(table, *row, &pairs).unwrap();
            }
        }
    }

    fn adding(&mut self, table: usize, row: u64, by: i64) {
        self.own[table][row as usize] += by;
        self.plan.added[table][row as usize][self.lane].fetch_add(by, Ordering::SeqCst);
    }

    fn check<E: Number>(&self, table: usize, row: u64, copy: &[E]) {
        let plan = &self.plan;
        let model = plan.tables[table].model;
        let clock = self.worker.now();
        let lanes = plan.lanes.len();
        for (other, lane) in plan.lanes.iter().enumerate() {
            let columns: Vec<i64> = copy.iter().skip(other).step_by(lanes).map(|v| v.count()).collect();
            let what = || {
                format!(
                    "seed {}: lane {} at clock {clock}, table {table} ({model}), row {row}, columns of lane {other}: {:?}",
                    plan.seed,
                    self.lane,
                    &columns[..columns.len().min(20)]
                )
            };
            if other == self.lane {
                let own = self.own[table][row as usize];
                assert!(columns.iter().all(|c| *c == own), "{}: own, each once: {own}", what());
                continue;
            }
            let stale = model.staleness().map(|s| clock.saturating_sub(s.into()));
            let least = stale.map_or(0, |clocks| lane.before(table, row, clocks));
            let most = plan.added[table][row as usize][other].load(Ordering::SeqCst);
            assert!(columns.iter().all(|c| (least..=most).contains(c)), "{}: not {least}..={most}", what());
            if !plan.wide(table) {
                assert!(columns.iter().all(|c| *c == columns[0]), "{}: no snapshot", what());
            }
        }
    }
}

/// Opens the tables, with caches of few slots.
fn open<T: Transport>(client: &Client<T>, plan: &Plan) -> Vec<Any> {
    let open = |(number, table): (usize, &TablePlan)| {
        let width = plan.width(number);
        let stride = (32 + width * table.element.size()).next_multiple_of(64);
        let options = TableOptions { cache_bytes: Some(table.slots * stride), ..TableOptions::default() };
        fn with<E: Element, T: Transport>(
            client: &Client<T>,
            table: &TablePlan,
            width: usize,
            options: TableOptions,
        ) -> Table<E> {
            client.table_with(&table.name, table.rows, width, table.model, options).unwrap()
        }
        match table.element {
            ElementType::F32 => Any::F32(with(client, table, width, options)),
            ElementType::F64 => Any::F64(with(client, table, width, options)),
            ElementType::I32 => Any::I32(with(client, table, width, options)),
            ElementType::I64 => Any::I64(with(client, table, width, options)),
        }
    };
    plan.tables.iter().enumerate().map(open).collect()
}

fn client<T: Transport>(transport: &T, servers: &[Address], plan: &Arc<Plan>, number: usize) {
    let options = ClientOptions {
        clients: plan.clients as u16,
        cache_bytes: 2 << 20,
        reads_in_flight: plan.reads_in_flight,
        ..ClientOptions::default()
    };
    let client = Client::connect_on(transport, servers, options).unwrap();
    let tables = open(&client, plan);
    let lanes = plan.lanes.iter().enumerate().filter(|(_, lane)| lane.client == number);
    let actors: Vec<_> = lanes
        .map(|(lane, _)| Actor {
            plan: plan.clone(),
            lane,
            worker: client.worker().unwrap(),
            tables: tables.clone(),
            own: plan.tables.iter().map(|table| vec![0; table.rows as usize]).collect(),
        })
        .collect();
    let threads: Vec<_> = actors
        .into_iter()
        .map(|actor| transport.spawn("worker", None, move || actor.run()).unwrap())
        .collect();
    for thread in threads {
        assert!(thread.join(), "seed {}: a worker failed", plan.seed);
    }
    client.close().unwrap();
}

/// A new client finds the sums.
fn sums<T: Transport>(transport: &T, servers: &[Address], plan: &Arc<Plan>) {
    let client = Client::connect_on(transport, servers, ClientOptions::default()).unwrap();
    let tables = open(&client, plan);
    let mut worker = client.worker().unwrap();
    for (number, any) in tables.iter().enumerate() {
        on!(any, table => {
            let mut copy = vec![Default::default(); table.width()];
            for row in 0..table.rows() {
                worker.get(table, row, &mut copy).unwrap();
                let sum = |column: usize| plan.lanes[column % plan.lanes.len()].total[number][row as usize];
                for (column, value) in copy.iter().enumerate() {
                    let value = Number::count(*value);
                    assert_eq!(value, sum(column), "seed {}: table {number}, row {row}, column {column}", plan.seed);
                }
            }
        });
    }
    drop(worker);
    client.close().unwrap();
}

fn start<T: Transport>(transport: &T, address: &Address, plan: &Plan, number: usize) -> Server<T> {
    let mut config = config(address, plan.shards);
    config.credits = plan.credits;
    config.id = number as u64;
    config.staging = 2 << 20;
    Server::start(transport, &config).unwrap()
}

fn simulated(seed: u64, clocks: u64) {
    let plan = Plan::new(seed, clocks);
    let sim = Sim::new(seed);
    let addresses: Vec<_> = (0..plan.servers).map(|n| Address::Sim(format!("server-{n}"))).collect();
    let left = Arc::new(Mutex::new(plan.clients));
    let up = Arc::new(AtomicUsize::new(0));
    let done = Arc::new(AtomicBool::new(false));
    for number in 0..plan.servers {
        let host = sim.node(&format!("server-{number}"));
        let (sim2, addresses, plan) = (sim.clone(), addresses.clone(), plan.clone());
        let (left, up, done) = (left.clone(), up.clone(), done.clone());
        sim.spawn(&host.clone(), "main", move || {
            let server = start(&host, &addresses[number], &plan, number);
            up.fetch_add(1, Ordering::SeqCst);
            if number == 0 {
                while *left.lock().unwrap() > 0 {
                    sim2.sleep(&host, Duration::from_millis(1));
                }
                sums(&host, &addresses, &plan);
                done.store(true, Ordering::SeqCst);
            }
            while !done.load(Ordering::SeqCst) {
                sim2.sleep(&host, Duration::from_millis(1));
            }
            assert!(server.stop());
        });
    }
    for number in 0..plan.clients {
        let host = sim.node(&format!("client-{number}"));
        let (sim2, addresses, plan) = (sim.clone(), addresses.clone(), plan.clone());
        let (left, up) = (left.clone(), up.clone());
        sim.spawn(&host.clone(), "main", move || {
            while up.load(Ordering::SeqCst) < plan.servers {
                sim2.sleep(&host, Duration::from_millis(1));
            }
            client(&host, &addresses, &plan, number);
            *left.lock().unwrap() -= 1;
        });
    }
    if let Err(report) = sim.try_run() {
        panic!("workload of seed {seed} and {clocks} clocks: {report}");
    }
}

/// `FERVOR_SEEDS=FROM..TO` runs others than CI does.
fn seeds(usual: std::ops::Range<u64>) -> std::ops::Range<u64> {
    let Ok(text) = std::env::var("FERVOR_SEEDS") else { return usual };
    let (from, to) = text.split_once("..").expect("FERVOR_SEEDS=FROM..TO");
    from.parse().expect("a number")..to.parse().expect("a number")
}

#[test]
fn random_workloads_in_the_simulator() {
    for seed in seeds(0..60) {
        simulated(seed, 40);
    }
}

#[test]
fn random_workloads_over_shared_memory() {
    for seed in seeds(1000..1020) {
        let plan = Plan::new(seed, 200);
        let folder = Folder::new("workload");
        let addresses: Vec<_> = (0..plan.servers).map(|n| folder.address(&format!("{n}.sock"))).collect();
        let host = Host::for_addresses(&addresses).unwrap();
        let servers: Vec<_> =
            addresses.iter().enumerate().map(|(n, address)| start(&host, address, &plan, n)).collect();
        let clients: Vec<_> = (0..plan.clients)
            .map(|number| {
                let (host, addresses, plan) = (host.clone(), addresses.clone(), plan.clone());
                std::thread::spawn(move || client(&host, &addresses, &plan, number))
            })
            .collect();
        for client in clients {
            client.join().unwrap();
        }
        sums(&host, &addresses, &plan);
        for server in servers {
            assert!(server.stop());
        }
    }
}
