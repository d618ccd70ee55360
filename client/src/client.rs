//! Connecting, tables, and the end.

use std::{
    fmt,
    str::FromStr,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fervor_protocol::{
    Element, Model, Schema,
    limits::{CLIENT_RECEIVES, CONTROL_BYTES, MAX_CREDITS, MAX_ROW_BYTES, REPLY_BYTES},
    resume::lease,
    route::Router,
    wire::{Hold, Kind, MemoryHeader, OpenTable, ReleaseHeader, TableReply},
};
use fervor_verbs::{
    Address, Exclusive, Memory,
    rails::RailStats,
    session::Key,
    transport::{
        Access, Connection, Endpoint, EndpointConfig, Export, Region, RemoteRegion, Transport, View,
        any::{Host, Peer},
    },
};
use zerocopy::IntoBytes;

use crate::{
    cache::Cache,
    connect::{connect_mains, find_shards, next_completion_vector},
    error::Error,
    lane::Lanes,
    lock::lock,
    options::ClientOptions,
    session::{
        channel::Answer,
        core::{Clocks, Core, For},
        engine::Engine,
        link::{InPlace, Link},
    },
    slab::{PIECE_BYTES, Pool},
    space::Space,
    table::{AnyTable, Holding, Part, Table, TableCore},
    worker::Worker,
};

/// Fewest slots of a table: under eviction some are on their way out while others are needed.
const FEWEST_SLOTS: usize = 4;
/// Connections that may be under way besides one to each shard.
const SPARE_CONNECTIONS: usize = 8;

/// Counts of what a client has moved, in bytes, and of what went wrong on the way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClientStats {
    /// By one-sided READs of its workers, up to the last clock that each has ended.
    pub bytes_read: u64,
    /// By the servers, into its cache.
    pub bytes_pushed: u64,
    /// In batches and other messages to the servers.
    pub bytes_sent: u64,
    /// How often it went on after the connection to a shard had broken.
    pub resumptions: u64,
}

/// What a table is besides its name, rows, width and model.
#[derive(Debug, Clone, Copy, Default)]
pub struct TableOptions {
    /// Takes updates with NaN and infinity.
    pub non_finite: bool,
    /// Bytes per second that each shard may push of it besides rounds, the most changed rows first, under ESSP and Async;
    /// `u64::MAX`: whatever the network takes. See [`fervor_protocol::Schema::continuous`].
    pub continuous: u64,
    /// Bytes of the client's cache for this table, instead of [`ClientOptions::cache_share`].
    pub cache_bytes: Option<usize>,
}

/// A connection to all servers of a job, shared by the workers of this process.
///
/// [`close`](Client::close) it in the end. If it is dropped instead, with its last worker, it sends what the workers have handed over and
/// says that it goes, for a quarter of a second at most; nobody tells whether all of it arrived.
pub struct Client<T: Transport = Host> {
    core: Arc<Core<T>>,
    /// The way to rows that are READ.
    lanes: Arc<Lanes<T>>,
    /// The part of the region that mirrors and slots lie in.
    space: Mutex<Space>,
    /// A thread is opening a table: others wait, lest one table is held twice.
    opening: AtomicBool,
    /// The memory of slabs is exported as long as there are connections.
    _slabs: Option<T::Export>,
}

impl<T: Transport> fmt::Debug for Client<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.core.links.iter().map(|link| link.address.to_string())).finish()
    }
}

impl Client<Host> {
    /// Connects to the servers at `urls`, as a job of one client. To `fervor://host:port` it goes by the best way that leads there:
    /// shared memory, RDMA or TCP. To `shm:///path/to/socket`, `rdma://host:port` and `tcp://host:port` it goes by that way alone.
    ///
    /// # Errors
    /// A URL that makes no sense; a server that is not there or refuses; no memory for the cache.
    pub fn connect(urls: &[impl AsRef<str>]) -> Result<Self, Error> {
        Self::connect_with(urls, ClientOptions::default())
    }

    /// As [`Client::connect`], with options.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_with(urls: &[impl AsRef<str>], options: ClientOptions) -> Result<Self, Error> {
        let addresses: Vec<_> =
            urls.iter().map(|url| Address::from_str(url.as_ref())).collect::<Result<_, _>>()?;
        if addresses.is_empty() {
            return Err(Error::Servers("no server: give at least one URL, as in fervor://host:port".into()));
        }
        let host = match (&options.key, &*options.devices) {
            (Some(key), []) => Host::with_keys(&addresses, [key.clone()].into_iter().collect())?,
            (None, []) => Host::for_addresses(&addresses)?,
            (key, devices) => {
                let key = key.clone().map_or_else(Key::from_environment, |key| Ok(Some(key)))?;
                Host::with_devices(&addresses, key.into_iter().collect(), devices)?
            }
        };
        Client::connect_on(&host, &addresses, options)
    }

    /// The ports of RDMA devices that it uses, and what they have done.
    pub fn rails(&self) -> Vec<RailStats> {
        self.core.transport.rails()
    }

    /// The servers that it has `fervor://` sessions with, and since when one of them has said nothing, if one is silent: it is stopped, or out
    /// of reach. (That alone ends nothing; standard error has a line about it.)
    pub fn peers(&self) -> Vec<Peer> {
        self.core.transport.peers()
    }
}

impl<T: Transport> Client<T> {
    /// Connects over a transport of the caller's.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_on(transport: &T, addresses: &[Address], options: ClientOptions) -> Result<Self, Error> {
        options.check()?;
        let shards = find_shards(transport, addresses, &options)?;
        let config = EndpointConfig {
            receive_buffers: shards.len() * CLIENT_RECEIVES,
            receive_size: REPLY_BYTES,
            send_depth: 2 * MAX_CREDITS,
            read_depth: 1,
            // Some that are made again while others that were given up have not ended.
            connections: shards.len() + shards.len().min(SPARE_CONNECTIONS),
            completion_vector: next_completion_vector(),
            core: None,
        };
        let endpoint = transport.endpoint(&config)?;
        let controls = (shards.len() * CONTROL_BYTES).next_multiple_of(4096);
        let memory = Memory::new("fervor-cache", controls + options.cache_bytes)?;
        let region = transport.register(&memory, Access::RemoteWrite)?;
        let sees = transport.has_views() && !options.copies;
        let slabs = sees.then(|| slab_memory(transport, options.slab_bytes)).transpose()?;
        // Without a lease it is nobody who could come back.
        let identity = if options.lease.is_zero() { 0 } else { transport.random().max(1) };
        let attach = endpoint.attach();
        let made = connect_mains(transport, &attach, &options, (&region.remote(), identity), &shards)?;
        let (mut connections, mut links) = (Vec::new(), Vec::new());
        for (number, ((address, shard), (connection, welcome))) in shards.into_iter().zip(made).enumerate() {
            // Where no network can break, what ends a connection is the end of the server.
            let breaks = !connection.ends_with_peer();
            let lease = if breaks { lease(options.lease, welcome.lease) } else { Duration::ZERO };
            let link = Link::new(address, shard, welcome, number * CONTROL_BYTES, lease);
            *lock(&link.way) = connection.way();
            connections.push(connection);
            links.push(link);
        }
        let observer = observes(&links)?;
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let space = Space::new(controls, controls + options.cache_bytes);
        let core = Core {
            transport: transport.clone(),
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            identity,
            observer,
            router: Router::new(links.len()),
            attach,
            engine: Mutex::new(Engine::new(transport, endpoint, memory, connections, &links)?),
            signal: transport.signal(),
            wanted: AtomicUsize::new(0),
            handed_over: AtomicBool::new(false),
            clocks: Mutex::new(Clocks::default()),
            pool: slabs.as_ref().map(|slabs| slabs.pool.clone()),
            tables: RwLock::new(Vec::new()),
            bytes_read: AtomicU64::new(0),
            made: Mutex::new(Vec::new()),
            links,
            region,
            options,
        };
        core.join()?;
        let export = slabs.map(|slabs| (slabs.region, slabs.export));
        let client = Self {
            core: Arc::new(core),
            lanes: Arc::default(),
            space: Mutex::new(space),
            opening: AtomicBool::new(false),
            _slabs: None,
        };
        let Some((region, export)) = export else { return Ok(client) };
        client.see(region)?;
        Ok(Self { _slabs: Some(export), ..client })
    }

    /// By which way it reaches each shard now: the server's address, and `shm`, `rdma(mlx5_0:1)`, `tcp` or `sim`.
    pub fn ways(&self) -> Vec<(Address, String)> {
        self.core.links.iter().map(|link| (link.address.clone(), lock(&link.way).clone())).collect()
    }

    /// Finds out which shards' memory is seen from here, and names that of the slabs to them.
    fn see(&self, slabs: RemoteRegion) -> Result<(), Error> {
        for (shard, link) in self.core.links.iter().enumerate() {
            let view = self.core.with_engine(For::Memory, |engine| engine.view(shard, link))?;
            let Some(view) = view else { continue };
            let RemoteRegion { address, length, key } = slabs;
            let body = MemoryHeader { address, length, key, reserved: 0 };
            let refused = |reason: String| Error::Refused { address: link.address.to_string(), reason };
            if let Answer::Named(reply) =
                self.request(shard, Kind::Memory, body.as_bytes())?.map_err(refused)?
                && let Some(place) = InPlace::new(view, reply.announcements)
            {
                // Nothing has been sent or read yet: from here on everything is in place.
                link.place.set(place).expect("it is set once");
            }
        }
        Ok(())
    }

    /// Makes the table `name` with `rows` rows of `width` elements, or joins it if it is there with the same
    /// schema. New tables are zero.
    ///
    /// # Errors
    /// Another schema is there (both are shown); the servers have not enough memory; the cache has not enough for a
    /// few rows; a server is lost.
    pub fn table<E: Element>(
        &self,
        name: &str,
        rows: u64,
        width: usize,
        model: Model,
    ) -> Result<Table<E>, Error> {
        self.table_with(name, rows, width, model, TableOptions::default())
    }

    /// As [`Client::table`], with options.
    ///
    /// # Errors
    /// As [`Client::table`].
    pub fn table_with<E: Element>(
        &self,
        name: &str,
        rows: u64,
        width: usize,
        model: Model,
        options: TableOptions,
    ) -> Result<Table<E>, Error> {
        let refused = |reason: String| Error::Table { name: name.to_owned(), reason };
        let schema = Schema {
            name: name.to_owned(),
            element: E::TYPE,
            rows,
            width: u32::try_from(width).map_err(|_| {
                refused(format!("{width} columns are too many: a row has at most {MAX_ROW_BYTES} bytes"))
            })?,
            model,
            non_finite: options.non_finite,
            continuous: options.continuous,
        };
        schema.check().map_err(|error| refused(error.to_string()))?;
        let _turn = self.turn()?;
        if let Some(table) = find(&self.core.tables.read().unwrap_or_else(PoisonError::into_inner), &schema) {
            return Ok(table);
        }
        let holdings = self.hold(&schema, options.cache_bytes).map_err(refused)?;
        // A mirror is filled after this.
        let rounds: Vec<u64> = self.core.links.iter().map(Link::round).collect();
        let parts = match self.open(&schema, &holdings)? {
            Ok(parts) => parts,
            Err(reason) => {
                self.give_back(&schema, &holdings);
                return Err(refused(reason));
            }
        };
        let mut tables = self.core.tables.write().unwrap_or_else(PoisonError::into_inner);
        let memory = self.core.region.memory();
        let parts = parts.into_iter().zip(holdings).zip(&self.core.links).zip(rounds);
        let parts = parts
            .map(|(((reply, held), link), opened)| Part {
                id: reply.table,
                offset: reply.offset as usize,
                base: link.region().at(reply.offset),
                opened,
                holding: held.make(&schema, memory),
            })
            .collect();
        let table = TableCore::new(schema, self.core.id, tables.len(), parts, memory.clone());
        let table = Arc::new(table);
        tables.push(table.clone());
        Ok(Table(table))
    }

    /// Waits until no other thread opens a table. It is this one's turn until what is returned is dropped.
    fn turn(&self) -> Result<Turn<'_>, Error> {
        let mut taken = false;
        self.core.wait(For::Memory, || {
            // It is asked again after it has said yes: then the flag is up, and it is ours.
            taken = taken
                || self.opening.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok();
            taken
        })?;
        Ok(Turn(&self.opening))
    }

    /// Opens a table at every shard, or at none; the inner error is the refusal of one.
    fn open(&self, schema: &Schema, holdings: &[Held]) -> Result<Result<Vec<TableReply>, String>, Error> {
        let mut opened: Vec<TableReply> = Vec::new();
        for (shard, held) in holdings.iter().enumerate() {
            let (shards, hold) = (holdings.len() as u32, held.hold());
            let request = OpenTable { schema: schema.clone(), shard: shard as u32, shards, hold };
            let reason = match self.request(shard, Kind::CreateTable, &request.encode())? {
                Ok(Answer::Table(reply)) => {
                    opened.push(reply);
                    continue;
                }
                Ok(Answer::Named(_)) => "the server sent an answer of another kind".to_owned(),
                Err(reason) => reason,
            };
            for (shard, reply) in opened.iter().enumerate() {
                let body = ReleaseHeader { table: reply.table, reserved: 0 };
                let send = |engine: &mut Engine<T>| engine.request(shard, Kind::Release, body.as_bytes());
                let sequence = self.core.with_engine(For::Memory, send)?;
                if holdings[shard].space().is_none() {
                    continue;
                }
                // All that was pushed is visible then: the space may be used again.
                let closed = |engine: &mut Engine<T>| (engine.closed(shard) >= sequence).then_some(());
                self.core.with_engine(For::Event, closed)?;
            }
            return Ok(Err(reason));
        }
        Ok(Ok(opened))
    }

    /// How the rows of a table will be held, shard by shard, with space in the region.
    fn hold(&self, schema: &Schema, bytes: Option<usize>) -> Result<Vec<Held>, String> {
        let (layout, links) = (schema.layout(), &self.core.links);
        let stride = layout.stride();
        let mut space = lock(&self.space);
        let share = (self.core.options.cache_bytes as f64 * self.core.options.cache_share) as usize;
        let mut budget = bytes.unwrap_or(share).min(space.free());
        let mut holdings: Vec<Held> = Vec::new();
        for (shard, link) in links.iter().enumerate() {
            if link.place.get().is_some() {
                holdings.push(Held::InPlace);
                continue;
            }
            let images = layout.images(self.core.router.rows_in(shard, schema.rows)).max(1);
            // The shards to come get as much.
            let here = budget / (links.len() - shard);
            // Under Async slots serve hot rows only.
            let wanted = if schema.cached() { images } else { FEWEST_SLOTS as u64 };
            let slots = Cache::fit(
                (here / stride).max(FEWEST_SLOTS).min(wanted.max(FEWEST_SLOTS as u64) as usize),
                images,
            );
            let taken = slots
                .checked_mul(stride)
                .filter(|taken| *taken <= budget)
                .and_then(|taken| space.take(taken));
            let Some(base) = taken else {
                drop(space);
                self.give_back(schema, &holdings);
                return Err(format!(
                    "{budget} bytes of cache are left for it, and its rows take {stride} bytes each. At least {FEWEST_SLOTS} rows \
                     must fit for each shard: raise ClientOptions::cache_bytes ({})",
                    self.core.options.cache_bytes
                ));
            };
            budget -= slots * stride;
            let all = slots as u64 >= images;
            holdings.push(if all && schema.eager() {
                Held::Mirror { base, images }
            } else {
                Held::Slots { base, slots, images }
            });
        }
        Ok(holdings)
    }

    fn give_back(&self, schema: &Schema, holdings: &[Held]) {
        let mut space = lock(&self.space);
        for held in holdings {
            if let Some((base, images)) = held.space() {
                space.give_back(base, images * schema.layout().stride());
            }
        }
    }

    /// Sends a request and waits for the answer; the inner error is the server's refusal.
    fn request(&self, shard: usize, kind: Kind, body: &[u8]) -> Result<Result<Answer, String>, Error> {
        let sequence = self.core.with_engine(For::Memory, |engine| engine.request(shard, kind, body))?;
        self.core.with_engine(For::Event, |engine| engine.answer(shard, sequence))
    }

    /// A new worker, at the client's clock. Make all workers of this process before the first of them ends a clock. A worker that
    /// is made later begins where the slowest one stands, and the others wait for it as for any other.
    ///
    /// # Errors
    /// A server is lost.
    pub fn worker(&self) -> Result<Worker<T>, Error> {
        Worker::new(self.core.clone(), self.lanes.clone())
    }

    /// What the client has moved so far.
    pub fn stats(&self) -> ClientStats {
        let engine = lock(&self.core.engine);
        ClientStats {
            bytes_read: self.core.bytes_read.load(Ordering::Relaxed),
            bytes_pushed: self.core.links.iter().map(|link| engine.bytes_pushed(link)).sum(),
            bytes_sent: engine.bytes_sent,
            resumptions: self.core.links.iter().map(|link| link.absence.resumptions()).sum(),
        }
    }

    /// Waits until all updates of finished clocks have been applied, and leaves the job. Workers are dropped first.
    ///
    /// # Errors
    /// Workers are still there; a server is lost.
    pub fn close(self) -> Result<(), Error> {
        let workers = lock(&self.core.clocks).workers.len();
        if workers > 0 {
            return Err(Error::Workers { workers });
        }
        self.core.drain()?;
        self.core.leave()
    }
}

/// Whether the servers take a client for one that only reads: all of them, or none.
fn observes<V: View>(links: &[Link<V>]) -> Result<bool, Error> {
    let mut observers = links.iter().filter(|link| link.welcome.observes == 1);
    let mut others = links.iter().filter(|link| link.welcome.observes == 0);
    match (observers.next(), others.next()) {
        (Some(reads), Some(updates)) => Err(Error::Servers(format!(
            "the key may only read at {}, and update at {}: give it the same role at all servers of the job, or set \
             ClientOptions::observer",
            reads.address, updates.address
        ))),
        (observer, _) => Ok(observer.is_some()),
    }
}

/// The table among those that a client has open: there is one cache and one list of pending updates for all its workers.
fn find<E: Element>(tables: &[Arc<dyn AnyTable>], schema: &Schema) -> Option<Table<E>> {
    let table = tables.iter().find(|table| table.schema() == schema)?;
    Some(Table(table.clone().as_any().downcast().expect("the schema says the element type")))
}

/// A thread's turn to open a table.
struct Turn<'a>(&'a AtomicBool);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// How the rows of a table in one shard will be held.
#[derive(Debug, Clone, Copy)]
enum Held {
    InPlace,
    Mirror { base: usize, images: u64 },
    Slots { base: usize, slots: usize, images: u64 },
}

impl Held {
    fn hold(&self) -> Hold {
        match *self {
            Self::InPlace => Hold::InPlace,
            Self::Mirror { base, .. } => Hold::Mirror(base as u64),
            Self::Slots { .. } => Hold::Slots,
        }
    }

    /// First byte, and number of images that there is room for.
    fn space(&self) -> Option<(usize, usize)> {
        match *self {
            Self::InPlace => None,
            Self::Mirror { base, images } => Some((base, images as usize)),
            Self::Slots { base, slots, .. } => Some((base, slots)),
        }
    }

    fn make(self, schema: &Schema, memory: &Memory) -> Holding {
        match self {
            Self::InPlace => Holding::InPlace,
            Self::Mirror { base, .. } => Holding::Mirror(base),
            Self::Slots { base, slots, images } => {
                Holding::Slots(Cache::new(memory.clone(), base, schema.layout().stride(), slots, images))
            }
        }
    }
}

/// Memory of slabs that servers on this host may see.
struct SlabMemory<X> {
    pool: Arc<Pool>,
    region: RemoteRegion,
    export: X,
}

fn slab_memory<T: Transport>(transport: &T, bytes: usize) -> Result<SlabMemory<T::Export>, Error> {
    let bytes = (bytes / PIECE_BYTES).max(1) * PIECE_BYTES;
    let memory = Exclusive::sparse("fervor-slabs", bytes)?;
    let export = transport.export(&memory)?;
    Ok(SlabMemory { region: export.remote(), export, pool: Pool::new(memory.split(PIECE_BYTES)) })
}
