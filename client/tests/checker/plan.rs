//! What a seed makes of a job, all of it drawn before the run.

use std::{
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fervor_client::{ElementType, Model, ReadLanes};
use fervor_protocol::limits::{ACK_SEQUENCE_BITS, IMMEDIATE_BITS, MAX_CREDITS};
use fervor_server::Origin;
use fervor_verbs::transport::sim::Network;

use super::{
    journal::Journal,
    tables::{TablePlan, tables},
    trouble::{Party, Trouble},
};
use crate::support::Random;

/// The last of the rows that everybody uses.
pub const HOT: u64 = 2;
/// How often each operation of a job that churns is repeated.
const AGAIN: usize = 6;
/// [`Lane::began`] of a worker that has not begun.
pub const NOT_YET: u64 = u64::MAX;

/// What kind of job it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A few rows of many tables and models.
    Few,
    /// Rows whose updates do not fit one message.
    Wide,
    /// Eager tables under pressure: slots change hands all the time while pushes are on their way.
    Busy,
    /// Few slots and short clocks: they are given up as soon as they have been taken.
    Churn,
    /// More rows held by each client than a send queue takes, and all of them changed in each round.
    Crowd,
    /// Long rows that everybody writes and reads without a pause: READs come torn, and the server is asked.
    Storm,
    /// A few rows with a value bound, whose pushes wait behind long rounds of another table: a client's quota of staging has
    /// room for a few rows. One client reads the bounded rows all the time, and the others write them.
    Behind,
}

/// What a worker does next.
#[derive(Debug, Clone)]
pub enum Op {
    Get { table: usize, row: u64 },
    GetMany { table: usize, rows: Vec<u64> },
    Inc { table: usize, row: u64, by: i64 },
    IncAt { table: usize, row: u64, by: i64 },
}

impl Op {
    pub fn table(&self) -> usize {
        let (Op::Get { table, .. }
        | Op::GetMany { table, .. }
        | Op::Inc { table, .. }
        | Op::IncAt { table, .. }) = self;
        *table
    }
}

/// One worker of all: its columns, and all that it does.
#[derive(Debug)]
pub struct Lane {
    pub client: usize,
    /// Operations of each clock. The rogue's: of each batch.
    pub clocks: Vec<Vec<Op>>,
    /// Operations after its last clock: they are handed over when it is dropped.
    pub rest: Vec<Op>,
    /// Per table and clock and row, what it adds before it ends that many clocks.
    stamped: Vec<Vec<Vec<i64>>>,
    /// Per table and row, what it adds in all.
    pub total: Vec<Vec<i64>>,
    /// The clock at which it began, or [`NOT_YET`].
    pub began: AtomicU64,
}

/// The one who dies.
#[derive(Debug, Clone, Copy)]
pub struct Victim {
    pub client: usize,
    /// After it has joined.
    pub after: Duration,
}

/// Where a client is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Place {
    /// On the host of this server; otherwise on one of its own.
    pub beside: Option<usize>,
    /// It insists on copies.
    pub copies: bool,
}

/// A client beside the job that only reads.
#[derive(Debug, Clone, Copy)]
pub struct Watcher {
    pub place: Place,
    /// It calls `clock()` so often, and then no more until the job is over.
    pub clocks: u64,
}

/// How the rogue ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Farewell {
    Leave,
    /// It is gone without a word.
    Vanish,
    /// Good records, then a bad one, in one batch: nothing of it may be applied.
    BadBatch,
    /// A batch is missing: the next one must be refused.
    Gap,
}

/// What a lane has made of a row, and at which of its clocks.
pub type Made = Mutex<(i64, u64)>;

pub struct Plan {
    pub seed: u64,
    pub kind: Kind,
    pub servers: usize,
    pub shards: usize,
    /// Honest ones.
    pub clients: usize,
    pub credits: usize,
    /// Bytes of staging that what is on its way to one client may use; if nothing is said, the default.
    pub quota: Option<usize>,
    pub reads_in_flight: usize,
    /// Of all clients.
    pub read_lanes: ReadLanes,
    pub tables: Vec<TablePlan>,
    /// All workers of all clients, and last the rogue, if there is one.
    pub lanes: Vec<Lane>,
    pub rogue: Option<Farewell>,
    pub victim: Option<Victim>,
    pub watcher: Option<Watcher>,
    /// Clients come when they like, and find a job that runs: how late each is.
    pub late: Option<Vec<Duration>>,
    /// Per table, row and lane, what has been added by now.
    pub added: Vec<Vec<Vec<AtomicI64>>>,
    /// Per table, row and lane, what has been added by calls that have returned: the sum, and the clock of the last.
    pub made: Vec<Vec<Vec<Made>>>,
    /// Where each client is, and whether all servers are on one host.
    pub places: Vec<Place>,
    pub together: bool,
    /// Where clocks, LSNs and numbers begin: near the ends of the bits that the wire has for them, in some jobs.
    pub origin: Origin,
    /// What of the transport goes wrong at servers and clients.
    pub trouble: Trouble,
    /// Whether something of that has happened by now at this party: told by who runs the job.
    pub witness: OnceLock<Box<dyn Fn(Party) -> bool + Send + Sync>>,
    /// Per table, row and lane, the most that another client has seen of it.
    pub seen: Vec<Vec<Vec<AtomicI64>>>,
    /// Clients that have joined, the rogue among them.
    pub joined: AtomicUsize,
    /// Per client (the rogue is the last): it has been killed, or has lost a server; it has closed, and all that it added
    /// is applied.
    pub dead: Vec<AtomicBool>,
    pub closed: Vec<AtomicBool>,
    pub journal: Journal,
}

impl Plan {
    /// With `clocks` clocks at most. `deaths`: clients may be killed.
    pub fn new(seed: u64, clocks: u64, deaths: bool) -> Arc<Self> {
        let mut random = Random(seed);
        let kind = match random.among(0..=12) {
            0 | 1 => Kind::Few,
            2 => Kind::Wide,
            3 | 4 => Kind::Storm,
            5 => Kind::Crowd,
            6..=8 => Kind::Churn,
            9 => Kind::Behind,
            _ => Kind::Busy,
        };
        let clients = match kind {
            Kind::Storm => random.among(3..=4),
            Kind::Behind => random.among(2..=3),
            Kind::Churn => random.among(1..=2),
            _ => random.among(1..=4),
        } as usize;
        let owners: Vec<usize> =
            (0..clients).flat_map(|client| vec![client; workers(kind, client, &mut random)]).collect();
        let rogue = random.one_in(4).then(|| {
            [Farewell::Leave, Farewell::Vanish, Farewell::BadBatch, Farewell::Gap]
                [random.among(0..=3) as usize]
        });
        let lanes_count = owners.len() + usize::from(rogue.is_some());
        let tables = tables(kind, lanes_count, &mut random);
        let most = match kind {
            Kind::Wide | Kind::Storm => random.among(2..=clocks.div_ceil(2)),
            Kind::Churn => random.among(2 * clocks..=4 * clocks),
            Kind::Crowd | Kind::Behind => random.among(2..=clocks.div_ceil(4)),
            Kind::Few | Kind::Busy => random.among(2..=clocks),
        };
        let mut lanes: Vec<_> = owners
            .iter()
            .enumerate()
            .map(|(lane, &client)| match (kind, lane) {
                (Kind::Behind, 1) => Lane::reader(client, &tables, most),
                _ => Lane::worker(client, &tables, kind, most, &mut random),
            })
            .collect();
        // All rows in one shard, where they are many for one queue, or for a few slots.
        let most_shards =
            if matches!(kind, Kind::Storm | Kind::Behind | Kind::Crowd | Kind::Churn) { 1 } else { 3 };
        let (servers, shards) =
            (random.among(1..=most_shards) as usize, random.among(1..=most_shards) as usize);
        if rogue.is_some() {
            lanes.push(Lane::rogue(clients, &tables, servers * shards, &mut random));
        }
        let few = random.among(1..=4) as usize;
        let credits = match random.one_in(2) {
            _ if kind == Kind::Storm => MAX_CREDITS,
            true => 8,
            false => few,
        };
        let dies = random.one_in(4) && clients > 1 && deaths;
        let victim = Victim {
            client: random.among(0..=clients as u64 - 1) as usize,
            after: Duration::from_nanos(random.among(1_000..=2_000_000)),
        };
        let lateness = (0..clients).map(|_| Duration::from_nanos(random.among(0..=2_000_000))).collect();
        let trouble = if deaths {
            Trouble::draw(seed, clients, servers, shards, rogue.is_some())
        } else {
            Trouble::default()
        };
        let mut plan = Self::of(seed, kind, clients, tables, lanes);
        (plan.servers, plan.shards, plan.credits) = (servers, shards, credits);
        plan.reads_in_flight = random.among(1..=16) as usize;
        plan.victim = dies.then_some(victim);
        plan.late = random.one_in(4).then_some(lateness);
        plan.quota = (kind == Kind::Behind).then(|| (random.among(1..=4) as usize) << 12);
        (plan.rogue, plan.trouble) = (rogue, trouble);
        plan.place();
        Arc::new(plan)
    }

    /// A small job without trouble: two clients, one with two workers, and one server with two shards.
    pub fn small(seed: u64, model: Model) -> Self {
        let mut random = Random(seed);
        let (element, rows, each, spacing, slots) = (ElementType::I64, 4, 2, 1, 4);
        let name = "small".to_owned();
        let table = TablePlan { name, model, element, rows, each, spacing, slots, continuous: 0 };
        let tables = vec![table];
        let lane = |client| Lane::worker(client, &tables, Kind::Few, 8, &mut random);
        let lanes = [0, 0, 1].map(lane).into();
        let mut plan = Self { shards: 2, ..Self::of(seed, Kind::Few, 2, tables, lanes) };
        // One of the clients reads in place: which, depends on the model.
        let first = matches!(model, Model::Bsp | Model::Essp { .. });
        plan.places[usize::from(!first)].beside = Some(0);
        plan
    }

    /// A job without trouble, at one server with one shard.
    fn of(seed: u64, kind: Kind, clients: usize, tables: Vec<TablePlan>, lanes: Vec<Lane>) -> Self {
        fn each<X>(tables: &[TablePlan], lanes: &[Lane], x: impl Fn() -> X) -> Vec<Vec<Vec<X>>> {
            let row = || lanes.iter().map(|_| x()).collect();
            tables.iter().map(|table| (0..table.rows).map(|_| row()).collect()).collect()
        }
        let flags = || (0..=clients).map(|_| AtomicBool::new(false)).collect();
        Self {
            seed,
            kind,
            servers: 1,
            shards: 1,
            clients,
            credits: 8,
            quota: None,
            reads_in_flight: 8,
            read_lanes: ReadLanes::Shared(1),
            victim: None,
            watcher: None,
            late: None,
            added: each(&tables, &lanes, || AtomicI64::new(0)),
            made: each(&tables, &lanes, Mutex::default),
            seen: each(&tables, &lanes, || AtomicI64::new(0)),
            tables,
            lanes,
            rogue: None,
            places: vec![Place::default(); clients],
            together: false,
            origin: Origin::default(),
            trouble: Trouble::default(),
            witness: OnceLock::new(),
            joined: AtomicUsize::new(0),
            dead: flags(),
            closed: flags(),
            journal: Journal::default(),
        }
    }

    /// Draws where everybody is, and where counting begins.
    fn place(&mut self) {
        // Of its own: what else a seed decides stays what it is.
        let mut random = Random(self.seed ^ 0x9a7e_0000);
        self.together = random.one_in(2);
        for place in &mut self.places {
            let server = random.among(0..=self.servers as u64 - 1) as usize;
            place.beside = random.one_in(2).then_some(server);
            place.copies = random.one_in(4);
        }
        if random.one_in(3) {
            let mut before = |end: u64| end.saturating_sub(random.among(0..=60));
            self.origin = Origin {
                lsn: before(1 << 20),
                clock: before(1 << IMMEDIATE_BITS),
                number: before(1 << ACK_SEQUENCE_BITS),
            };
        }
        self.read_lanes = match random.among(0..=3) {
            0 | 1 => ReadLanes::Shared(1),
            2 => ReadLanes::Shared(2),
            _ => ReadLanes::PerWorker,
        };
        let mut random = Random(self.seed ^ 0x0b73_0000);
        if random.one_in(5) {
            let server = random.among(0..=self.servers as u64 - 1) as usize;
            let place = Place { beside: random.one_in(3).then_some(server), copies: random.one_in(4) };
            self.watcher = Some(Watcher { place, clocks: random.among(0..=4) });
        }
    }

    /// How many clients each says that the job has: all of them, or one, so that nobody waits for the others, who may not
    /// even come.
    pub fn expected(&self) -> u16 {
        if self.late.is_some() || self.trouble.harms() {
            1
        } else {
            (self.clients + usize::from(self.rogue.is_some())) as u16
        }
    }

    /// Whether the job has started: before, the others would wait for another one in the place of one that dies.
    pub fn started(&self) -> bool {
        let all = self.clients + usize::from(self.rogue.is_some());
        self.expected() == 1 || self.joined.load(Ordering::SeqCst) >= all
    }

    /// Long rows take long only where the network is slow.
    pub fn network(&self) -> Network {
        let usual = Network::default();
        match self.kind {
            Kind::Storm => Network { per_kib: Duration::from_nanos(3000), ..usual },
            Kind::Behind => Network { per_kib: Duration::from_micros(60), ..usual },
            _ => usual,
        }
    }

    /// How many columns a row has.
    pub fn width(&self, table: usize) -> usize {
        self.tables[table].each * self.lanes.len() * self.tables[table].spacing
    }

    pub fn row_bytes(&self, table: usize) -> usize {
        self.width(table) * self.tables[table].element.size()
    }

    /// The columns of `lane`.
    pub fn columns(&self, table: usize, lane: usize) -> impl Iterator<Item = usize> + use<> {
        let (lanes, spacing) = (self.lanes.len(), self.tables[table].spacing);
        (0..self.tables[table].each).map(move |column| (column * lanes + lane) * spacing)
    }

    /// Whether an update of a row of it may take several messages, and so come in parts.
    pub fn in_parts(&self, table: usize) -> bool {
        self.row_bytes(table) > 32 << 10 && self.tables[table].spacing == 1
    }

    /// Notes that `lane` is about to add.
    pub fn adding(&self, table: usize, row: u64, lane: usize, by: i64) {
        self.added[table][row as usize][lane].fetch_add(by, Ordering::SeqCst);
    }

    /// What the lanes have added to `row` by now, with calls that have returned, and their clocks then.
    pub fn made(&self, table: usize, row: u64) -> Vec<(i64, u64)> {
        let made = &self.made[table][row as usize];
        made.iter().map(|made| *made.lock().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    /// The greatest update of `row` in one call.
    pub fn greatest(row: u64) -> i64 {
        3 + 5 * row as i64
    }

    /// Whether nothing is promised of `lane`.
    pub fn unreliable(&self, lane: usize) -> bool {
        let client = self.lanes[lane].client;
        client == self.clients || self.dead[client].load(Ordering::SeqCst) || self.harmed(client)
    }

    /// Whether a fault has happened that may have taken a server from this client.
    pub fn harmed(&self, client: usize) -> bool {
        self.trouble.harms() && (self.struck(Party::Client(client)) || self.server_harmed())
    }

    /// Whether a server has broken a connection, or died.
    pub fn server_harmed(&self) -> bool {
        (0..self.servers).any(|server| self.struck(Party::Server(server)))
    }

    fn struck(&self, party: Party) -> bool {
        self.witness.get().is_some_and(|struck| struck(party))
    }

    /// Notes that another client has seen `sum` of `lane`'s in `row`.
    pub fn saw(&self, table: usize, row: u64, lane: usize, sum: i64) {
        self.seen[table][row as usize][lane].fetch_max(sum, Ordering::SeqCst);
    }

    /// The most that others have seen of `lane`'s in `row`: it is applied, for good.
    pub fn seen(&self, table: usize, row: u64, lane: usize) -> i64 {
        self.seen[table][row as usize][lane].load(Ordering::SeqCst)
    }
}

/// How many workers a client has.
fn workers(kind: Kind, client: usize, random: &mut Random) -> usize {
    // A client sends when its slowest worker ends a clock: those that are to write without a pause are alone.
    match kind {
        Kind::Storm if client > 0 => 1,
        Kind::Behind if client == 0 => 2,
        Kind::Crowd | Kind::Behind => 1,
        Kind::Churn => 3,
        _ => random.among(1..=3) as usize,
    }
}

impl Lane {
    fn worker(client: usize, tables: &[TablePlan], kind: Kind, most: u64, random: &mut Random) -> Self {
        if kind == Kind::Storm && client > 0 {
            // It writes without a pause, and does not read.
            let clocks = (0..most * 40).map(|_| {
                let row = random.among(0..=tables[0].rows - 1);
                vec![Op::IncAt { table: 0, row, by: random.among(1..=3) as i64 + 5 * row as i64 }]
            });
            let clocks = clocks.collect();
            return Self::new(client, tables, clocks, Vec::new());
        }
        // Some are done before the others.
        let clocks =
            (0..random.among(1.max(most / 2)..=most)).map(|_| ops(client, tables, kind, random)).collect();
        let rest = if random.one_in(2) { ops(client, tables, kind, random) } else { Vec::new() };
        Self::new(client, tables, clocks, rest)
    }

    /// Reads the rows of the second table all the time.
    fn reader(client: usize, tables: &[TablePlan], most: u64) -> Self {
        let clock = |_| {
            let first = Op::Get { table: 0, row: 0 };
            let hot = (0..200).map(|number| Op::Get { table: 1, row: number % tables[1].rows });
            [first].into_iter().chain(hot).collect()
        };
        Self::new(client, tables, (0..most).map(clock).collect(), Vec::new())
    }

    /// Its batches, each to one of `links` shards.
    fn rogue(client: usize, tables: &[TablePlan], links: usize, random: &mut Random) -> Self {
        // Its batches are one message each.
        let narrow: Vec<_> = (0..tables.len()).filter(|table| tables[*table].each <= 6).collect();
        let batches = if narrow.is_empty() { 0 } else { random.among(1..=12) };
        let clocks = (0..batches).map(|_| {
            let table = narrow[random.among(0..=narrow.len() as u64 - 1) as usize];
            let first = random.among(0..=tables[table].rows - 1);
            let rows = (first..tables[table].rows).step_by(links).take(1 + random.among(0..=2) as usize);
            rows.map(|row| Op::IncAt { table, row, by: random.among(1..=3) as i64 + 5 * row as i64 })
                .collect()
        });
        let clocks = clocks.collect();
        Self::new(client, tables, clocks, Vec::new())
    }

    fn new(client: usize, tables: &[TablePlan], clocks: Vec<Vec<Op>>, rest: Vec<Op>) -> Self {
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
        Self { client, clocks, rest, stamped, total, began: AtomicU64::new(NOT_YET) }
    }

    /// What it adds to `row` with stamps below `clock`.
    pub fn before(&self, table: usize, row: u64, clock: u64) -> i64 {
        let stamped = &self.stamped[table];
        let clocks = match self.began.load(Ordering::SeqCst) {
            NOT_YET => 0,
            began => clock.saturating_sub(began),
        };
        stamped[(clocks as usize).min(stamped.len() - 1)][row as usize]
    }

    /// Whether there is a clock at whose end it has added `sum` to `row`.
    pub fn sums_to(&self, table: usize, row: u64, sum: i64) -> bool {
        let row = row as usize;
        self.total[table][row] == sum
            || self.stamped[table].binary_search_by_key(&sum, |rows| rows[row]).is_ok()
    }
}

fn ops(client: usize, tables: &[TablePlan], kind: Kind, random: &mut Random) -> Vec<Op> {
    let count = match kind {
        Kind::Busy => random.among(0..=30),
        Kind::Storm => random.among(1..=8),
        Kind::Churn => random.among(1..=3),
        Kind::Crowd | Kind::Behind => random.among(1..=3),
        Kind::Few | Kind::Wide => random.among(0..=9),
    };
    let any = (0..count).map(|_| {
        let table = random.among(0..=tables.len() as u64 - 1) as usize;
        let last = tables[table].rows - 1;
        // Half of the time one of a few rows, which everybody uses.
        let last = if random.one_in(2) { last.min(HOT) } else { last };
        let row = random.among(0..=last);
        // Rows grow at different speeds: the image of another row would be found out.
        let by = (random.among(1..=3) + 5 * row) as i64;
        match random.among(0..=5) {
            0 if kind != Kind::Storm => Op::Inc { table, row, by },
            1 | 2 if kind == Kind::Storm => Op::Get { table, row },
            0..=2 => Op::IncAt { table, row, by },
            3 => {
                let rows = (0..random.among(1..=6)).map(|_| random.among(0..=tables[table].rows - 1));
                Op::GetMany { table, rows: rows.collect() }
            }
            _ => Op::Get { table, row },
        }
    });
    let any: Vec<_> = any.collect();
    // Most rows of the first table, so that there are some that only another lane changes.
    let mut add = || {
        let rows = (0..tables[0].rows).filter(|_| !random.one_in(4)).collect::<Vec<_>>();
        rows.into_iter().map(|row| Op::IncAt { table: 0, row, by: 1 + 5 * row as i64 })
    };
    match kind {
        Kind::Few | Kind::Wide | Kind::Storm => return any,
        Kind::Behind => {
            // One reads all of the first table. The others make updates until the bound has them wait, and are told what is
            // visible while pushes wait. (What they read of the first table has them wait for their clock.)
            let rows = if client == 0 { (0..tables[0].rows).collect() } else { vec![0] };
            let all = [Op::GetMany { table: 0, rows }];
            let hot: Vec<_> = (0..16 * tables[1].rows)
                .map(|number| (client, number % tables[1].rows))
                .map(|(client, row)| match client {
                    0 => Op::Get { table: 1, row },
                    _ => Op::IncAt { table: 1, row, by: 3 + 5 * row as i64 },
                })
                .collect();
            let first = hot.clone().into_iter().chain(all);
            return first.chain(hot.clone()).chain(any).chain(add()).chain(hot).collect();
        }
        // A row is read again at once: perhaps its slot is there, and not its image.
        Kind::Churn => return any.into_iter().flat_map(|op| vec![op; AGAIN]).collect(),
        Kind::Crowd => {
            let all = Op::GetMany { table: 0, rows: (0..tables[0].rows).collect() };
            return [all].into_iter().chain(any).chain(add()).collect();
        }
        Kind::Busy => {}
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
