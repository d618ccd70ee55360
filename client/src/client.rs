//! Connecting, tables, and the end.

use std::{
    fmt,
    str::FromStr,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fervor_protocol::{
    Element, Model, Schema,
    limits::{CLIENT_RECEIVES, MAX_CREDITS, MAX_SHARDS, REPLY_BYTES},
    route::Router,
    wire::{self, Hello, Kind, Refusal, TableReply, Welcome},
};
use fervor_verbs::{
    Address, Error as TransportError, Memory,
    transport::{Access, Connection, Endpoint, EndpointConfig, Region, Transport, any::Host},
};
use zerocopy::IntoBytes;

use crate::{
    cache::Cache,
    core::{Clocks, Core, For, lock},
    engine::{CONTROL_BYTES, Engine, Link},
    error::Error,
    options::ClientOptions,
    table::{AnyTable, Place, Table, TableCore},
    worker::Worker,
};

/// Fewest slots of a table: under eviction some are on their way out while others are needed.
const FEWEST_SLOTS: usize = 4;

/// Counts of what a client has moved, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClientStats {
    /// By one-sided READs of its workers.
    pub bytes_read: u64,
    /// By the servers, into its cache.
    pub bytes_pushed: u64,
    /// In batches and other messages to the servers.
    pub bytes_sent: u64,
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
pub struct Client<T: Transport = Host> {
    core: Arc<Core<T>>,
    /// Bytes of the region that are given out.
    used: Mutex<usize>,
}

impl<T: Transport> fmt::Debug for Client<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.core.links.iter().map(|link| link.address.to_string())).finish()
    }
}

impl Client<Host> {
    /// Connects to the servers at `urls` (`shm:///path/to/socket` or `rdma://host:port`), as a job of one client.
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
            return Err(Error::Servers("no server: give at least one shm:// or rdma:// URL".into()));
        }
        Client::connect_on(&Host::for_addresses(&addresses)?, &addresses, options)
    }
}

impl<T: Transport> Client<T> {
    /// Connects over a transport of the caller's.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_on(transport: &T, addresses: &[Address], options: ClientOptions) -> Result<Self, Error> {
        let shards = find_shards(transport, addresses, &options)?;
        let config = EndpointConfig {
            receive_buffers: shards.len() * CLIENT_RECEIVES,
            receive_size: REPLY_BYTES,
            send_depth: 2 * MAX_CREDITS,
            read_depth: 1,
            connections: shards.len(),
            completion_vector: 0,
        };
        let endpoint = transport.endpoint(&config)?;
        let controls = (shards.len() * CONTROL_BYTES).next_multiple_of(4096);
        let memory = Memory::new("fervor-cache", controls + options.cache_bytes)?;
        let region = transport.register(&memory, Access::RemoteWrite)?;
        let (mut connections, mut links) = (Vec::new(), Vec::new());
        for (number, (address, shard)) in shards.into_iter().enumerate() {
            let mut hello = Hello::main(shard);
            hello.clients = options.clients;
            hello.key = region.remote().key;
            hello.address = region.remote().address;
            hello.length = region.remote().length;
            hello.control = (number * CONTROL_BYTES) as u64;
            hello.receives = CLIENT_RECEIVES as u32;
            let (connection, welcome) = connect_one(
                transport,
                &endpoint.attach(),
                &address,
                hello.as_bytes(),
                options.connect_timeout,
            )?;
            connections.push(connection);
            links.push(Link::new(address, shard, welcome, number * CONTROL_BYTES));
        }
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let core = Core {
            transport: transport.clone(),
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            router: Router::new(links.len()),
            attach: endpoint.attach(),
            engine: Mutex::new(Engine::new(transport, endpoint, memory, connections, &links)?),
            signal: transport.signal(),
            wanted: AtomicUsize::new(0),
            clocks: Mutex::new(Clocks::default()),
            tables: RwLock::new(Vec::new()),
            bytes_read: AtomicU64::new(0),
            links,
            region,
            options,
        };
        core.join()?;
        Ok(Self { core: Arc::new(core), used: Mutex::new(controls) })
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
            width: u32::try_from(width).map_err(|_| refused(format!("{width} columns are too many")))?,
            model,
            non_finite: options.non_finite,
            continuous: options.continuous,
        };
        schema.check().map_err(|error| refused(error.to_string()))?;
        if let Some(table) = find(&self.core.tables.read().unwrap_or_else(PoisonError::into_inner), &schema) {
            return Ok(table);
        }
        let cache = self.cache(&schema, options.cache_bytes).map_err(refused)?;
        let mut places = Vec::new();
        for shard in 0..self.core.links.len() {
            let body = wire::encode_table(&schema, shard as u32, self.core.links.len() as u32);
            let reply = self.request(shard, Kind::CreateTable, &body)?.map_err(refused)?;
            places.push(Place { id: reply.table, base: self.core.remote(shard).at(reply.offset) });
        }
        let mut tables = self.core.tables.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have been faster.
        if let Some(table) = find(&tables, &schema) {
            return Ok(table);
        }
        let table = Arc::new(TableCore::new(schema, self.core.id, tables.len(), places, cache));
        tables.push(table.clone());
        Ok(Table(table))
    }

    /// Takes slots for a table out of the budget.
    fn cache(&self, schema: &Schema, bytes: Option<usize>) -> Result<Cache, String> {
        let stride = schema.stride();
        let mut used = lock(&self.used);
        let memory = self.core.region.memory();
        let left = memory.len() - *used;
        let all = usize::try_from(schema.rows).unwrap_or(usize::MAX).max(FEWEST_SLOTS);
        // Under Async slots serve hot rows only.
        let wanted = if schema.cached() { all } else { FEWEST_SLOTS };
        let share = (self.core.options.cache_bytes as f64 * self.core.options.cache_share) as usize;
        let budget = bytes.unwrap_or(share).min(left);
        let slots = wanted.min(budget / stride);
        if slots < FEWEST_SLOTS {
            return Err(format!(
                "{budget} bytes of cache are left for it, and its rows take {stride} bytes each, of which at least \
                 {FEWEST_SLOTS} must fit: raise ClientOptions::cache_bytes ({})",
                self.core.options.cache_bytes
            ));
        }
        let base = *used;
        *used += slots * stride;
        Ok(Cache::new(memory.clone(), base, stride, slots, schema.rows))
    }

    /// Sends a request and waits for the answer; the inner error is the server's refusal.
    fn request(&self, shard: usize, kind: Kind, body: &[u8]) -> Result<Result<TableReply, String>, Error> {
        let sequence = self.core.with_engine(For::Memory, |engine| engine.request(shard, kind, body))?;
        self.core.with_engine(For::Event, |engine| engine.reply(shard, sequence))
    }

    /// A new worker, at the client's clock. Make all workers of this process before the first of them ends a clock: one
    /// that comes later holds up the others' progress until it has caught up with none of theirs to see.
    ///
    /// # Errors
    /// A server is lost, or has no place for the worker's connections.
    pub fn worker(&self) -> Result<Worker<T>, Error> {
        Worker::new(self.core.clone())
    }

    /// What the client has moved so far.
    pub fn stats(&self) -> ClientStats {
        let engine = lock(&self.core.engine);
        ClientStats {
            bytes_read: self.core.bytes_read.load(Ordering::Relaxed),
            bytes_pushed: self.core.links.iter().map(|link| engine.bytes_pushed(link)).sum(),
            bytes_sent: engine.bytes_sent,
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

/// The table among those that a client has open: there is one cache and one list of pending updates for all its workers.
fn find<E: Element>(tables: &[Arc<dyn AnyTable>], schema: &Schema) -> Option<Table<E>> {
    let table = tables.iter().find(|table| table.schema() == schema)?;
    Some(Table(table.clone().as_any().downcast().expect("the schema says the element type")))
}

/// The shards of the servers, in the order that all clients of the job see.
fn find_shards<T: Transport>(
    transport: &T,
    addresses: &[Address],
    options: &ClientOptions,
) -> Result<Vec<(Address, u16)>, Error> {
    let config = EndpointConfig {
        receive_buffers: 1,
        receive_size: 64,
        send_depth: 16,
        read_depth: 1,
        connections: addresses.len(),
        completion_vector: 0,
    };
    let endpoint = transport.endpoint(&config)?;
    let mut servers: Vec<(u64, &Address, u16)> = Vec::new();
    for address in addresses {
        let hello = Hello::reader(0);
        let (mut connection, welcome) =
            connect_one(transport, &endpoint.attach(), address, hello.as_bytes(), options.connect_timeout)?;
        connection.disconnect();
        if let Some((_, other, _)) = servers.iter().find(|(server, ..)| *server == welcome.server) {
            return Err(Error::Servers(format!("{other} and {address} are one server: name each once")));
        }
        servers.push((welcome.server, address, welcome.shards));
    }
    servers.sort_unstable_by_key(|(server, ..)| *server);
    let shards: Vec<_> = servers
        .into_iter()
        .flat_map(|(_, address, shards)| (0..shards).map(move |shard| (address.clone(), shard)))
        .collect();
    if shards.is_empty() || shards.len() > MAX_SHARDS {
        return Err(Error::Servers(format!("{} shards: 1 to {MAX_SHARDS} are possible", shards.len())));
    }
    Ok(shards)
}

/// Connects, with a handshake.
pub fn connect_one<T: Transport>(
    transport: &T,
    attach: &T::Attach,
    address: &Address,
    hello: &[u8],
    timeout: Duration,
) -> Result<(T::Connection, Welcome), Error> {
    let refused = |reason: String| Error::Refused { address: address.to_string(), reason };
    let (connection, answer) =
        transport.connect(attach, address, hello, timeout).map_err(|error| match error {
            TransportError::Refused { private_data, .. } => refused(Refusal::parse(&private_data).0),
            error => error.into(),
        })?;
    Ok((connection, Welcome::parse(&answer).map_err(refused)?))
}
