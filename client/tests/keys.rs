//! Servers with keys: who may do what, and that one client reaches each server by its best way.

mod support;

use std::time::{Duration, Instant};

use fervor_client::{Client, ClientOptions, Error, Model};
use fervor_protocol::wire::{Hello, Welcome};
use fervor_server::{Config, Server, checked};
use fervor_verbs::{
    Address, Memory,
    session::{Key, KeyRing},
    transport::{
        Access, Completion, Connection, Endpoint, EndpointConfig, Payload, Post, RemoteRegion, Runtime, Sge,
        Transport, WorkError,
        any::{Host, HostConnection, HostEndpoint, HostRegion},
    },
};
use support::{config, raw::PATIENCE};
use zerocopy::IntoBytes;

fn key(name: &str, rules: &str) -> Key {
    format!("{name} {} {rules}", "5a".repeat(32)).parse().unwrap()
}

/// A server on this host, at a free port.
fn serve(keys: &[Key], via: &str, change: impl Fn(&mut Config)) -> Server<Host> {
    let address: Address = format!("fervor://127.0.0.1:0{via}").parse().unwrap();
    let ring = checked(keys.iter().cloned().collect()).unwrap();
    let host = Host::with_keys(std::slice::from_ref(&address), ring).unwrap();
    let mut config = config(&address, 2);
    change(&mut config);
    Server::start(&host, &config).unwrap()
}

fn connect(key: &Key, servers: &[&Server<Host>], copies: bool) -> Result<Client, Error> {
    let urls: Vec<String> = servers.iter().map(|server| server.address().to_string()).collect();
    let options = ClientOptions { key: Some(key.clone()), copies, ..ClientOptions::default() };
    Client::connect_with(&urls, options)
}

/// Whether a worker of `client` may add to a row of `table`, and does; `Err` is what the server says.
fn add(client: &Client, table: &str, row: u64) -> Result<f32, Error> {
    let table = client.table::<f32>(table, 64, 4, Model::Ssp { staleness: 0 })?;
    let mut worker = client.worker()?;
    worker.inc(&table, row, &[1.0; 4])?;
    worker.clock()?;
    let mut data = [0.0; 4];
    worker.get(&table, row, &mut data)?;
    Ok(data[0])
}

#[test]
fn a_key_says_what_its_holder_may_do() {
    for (copies, via) in [(false, ""), (true, ""), (true, "?via=tcp")] {
        let keys = [key("all", ""), key("reader", "role=read"), key("tenant", "tables=b/*")];
        let server = serve(&keys, via, |_| {});
        let client = connect(&keys[0], &[&server], copies).unwrap();
        assert_eq!(add(&client, "a/L", 3).unwrap(), 1.0);
        client.close().unwrap();

        // It reads, and changes nothing.
        let reader = connect(&keys[1], &[&server], copies).unwrap();
        let table = reader.table::<f32>("a/L", 64, 4, Model::Ssp { staleness: 0 }).unwrap();
        let mut worker = reader.worker().unwrap();
        let mut data = [0.0; 4];
        worker.get(&table, 3, &mut data).unwrap();
        assert_eq!(data, [1.0; 4]);
        drop(worker);
        let error = add(&reader, "a/L", 3).unwrap_err().to_string();
        assert!(error.contains("role=read"), "{error}");
        drop((table, reader));

        // It uses its own tables, and no others.
        let tenant = connect(&keys[2], &[&server], copies).unwrap();
        let error = tenant.table::<f32>("a/L", 64, 4, Model::Ssp { staleness: 0 }).unwrap_err().to_string();
        assert!(error.contains("tables=b/*") && error.contains("`a/L`"), "{error}");
        assert_eq!(add(&tenant, "b/L", 3).unwrap(), 1.0);
        tenant.close().unwrap();

        let client = connect(&keys[0], &[&server], copies).unwrap();
        assert_eq!(add(&client, "a/L", 3).unwrap(), 2.0, "the others have changed nothing");
        client.close().unwrap();
        assert!(server.stop());
    }
}

#[test]
fn who_has_no_key_learns_that_one_is_needed() {
    let server = serve(&[key("all", "")], "", |_| {});
    let wrong: Key = format!("all {}", "6b".repeat(32)).parse().unwrap();
    let error = connect(&wrong, &[&server], false).unwrap_err().to_string();
    assert!(error.contains("another secret"), "{error}");
    let options = ClientOptions::default();
    let host = Host::with_keys(&[server.address().clone()], KeyRing::default()).unwrap();
    let error = Client::connect_on(&host, &[server.address().clone()], options).unwrap_err().to_string();
    assert!(error.contains("FERVOR_KEY_FILE"), "{error}");
    assert!(server.stop());
}

#[test]
fn one_client_reads_in_place_here_and_copies_from_beyond_a_wire() {
    let keys = [key("all", "")];
    let near = serve(&keys, "", |config| config.id = 1);
    let far = serve(&keys, "?via=tcp", |config| config.id = 2);
    let client = connect(&keys[0], &[&near, &far], false).unwrap();
    let mut ways: Vec<_> = client.ways().into_iter().map(|(_, way)| way).collect();
    ways.sort_unstable();
    assert_eq!(ways, ["shm", "shm", "tcp", "tcp"]);
    let table = client.table::<f32>("t", 64, 4, Model::Essp { staleness: 1 }).unwrap();
    let mut worker = client.worker().unwrap();
    for clock in 0..20 {
        for row in 0..64 {
            let mut data = [0.0; 4];
            worker.get(&table, row, &mut data).unwrap();
            assert_eq!(data, [clock as f32; 4], "row {row}");
            worker.inc(&table, row, &[1.0; 4]).unwrap();
        }
        worker.clock().unwrap();
    }
    let stats = worker.stats();
    let copies = stats.hits + stats.misses;
    assert!(stats.in_place > 0 && copies > 0, "{stats:?}");
    assert_eq!(stats.in_place + copies, 20 * 64, "{stats:?}");
    drop(worker);
    client.close().unwrap();
    assert!(near.stop() && far.stop());
}

/// A READ lane made by hand, for what an honest client does not ask for.
struct Spy {
    host: Host,
    endpoint: HostEndpoint,
    connection: HostConnection,
    local: HostRegion,
    rows: RemoteRegion,
}

impl Spy {
    fn new(key: &Key, address: &Address, shard: u16) -> Self {
        let host = Host::with_keys(std::slice::from_ref(address), KeyRing::from_iter([key.clone()])).unwrap();
        let endpoint = host.endpoint(&EndpointConfig::default()).unwrap();
        let local = host.register(&Memory::new("spy", 1 << 20).unwrap(), Access::Local).unwrap();
        let hello = Hello::reader(shard);
        let made = host.connect(&endpoint.attach(), address, hello.as_bytes(), PATIENCE);
        let (connection, welcome) = made.unwrap();
        let Welcome { address, length, key, .. } = Welcome::parse(&welcome).unwrap();
        Self { host, endpoint, connection, local, rows: RemoteRegion { address, length, key } }
    }

    /// Posts, and says what comes of it.
    fn post(
        &mut self,
        length: usize,
        post: impl for<'a> FnOnce(&'a [Sge<'a, HostRegion>]) -> Post<'a, HostRegion>,
    ) -> Result<(), WorkError> {
        let pieces = [Sge { region: &self.local, offset: 0, length }];
        self.connection.post(post(&pieces).with_signal(Some(1))).unwrap();
        self.connection.ring().unwrap();
        let (mut completions, end) = (Vec::new(), self.host.now() + PATIENCE);
        loop {
            self.endpoint.poll(&mut completions);
            for completion in completions.drain(..) {
                if let Completion::Work { result, .. } = completion {
                    return result;
                }
            }
            assert!(self.host.now() < end, "the request does not complete");
            self.host.relax(0);
        }
    }

    fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>, WorkError> {
        let from = self.rows.at(offset);
        self.post(length, |into| Post::Read { into, from, signal: None })?;
        let mut bytes = vec![0; length];
        fervor_verbs::transport::Region::memory(&self.local).read(0, &mut bytes);
        Ok(bytes)
    }

    /// Where four of `value` lie one behind another.
    fn find(&mut self, value: f32) -> Option<u64> {
        let row = [value; 4].map(f32::to_le_bytes).concat();
        let pieces = (0..self.rows.length).step_by(1 << 19);
        let length = self.rows.length;
        pieces.into_iter().find_map(|at| {
            let bytes = self.read(at, (length - at).min(1 << 19) as usize).unwrap();
            Some(at + bytes.windows(row.len()).position(|window| window == row)? as u64)
        })
    }
}

/// Adds `value` to row 3 of a table, and says in which shard it then lies, and where.
fn place(client: &Client, key: &Key, address: &Address, table: &str, value: f32) -> (u16, u64) {
    let table = client.table::<f32>(table, 64, 4, Model::Ssp { staleness: 0 }).unwrap();
    let mut worker = client.worker().unwrap();
    worker.inc(&table, 3, &[value; 4]).unwrap();
    worker.clock().unwrap();
    worker.get(&table, 3, &mut [0.0; 4]).unwrap();
    let found = |shard| Some((shard, Spy::new(key, address, shard).find(value)?));
    (0..2).find_map(found).expect("whoever is not limited can READ all")
}

#[test]
fn whoever_is_limited_to_tables_can_read_no_others_by_any_request() {
    let keys = [key("all", ""), key("tenant", "tables=b/*")];
    let server = serve(&keys, "", |_| {});
    let address = server.address();
    let client = connect(&keys[0], &[&server], false).unwrap();
    let place = |table, value| place(&client, &keys[0], address, table, value);
    let (other, own) = (place("a/L", 1234.5), place("b/L", 4321.25));
    let look = |(shard, at): (u16, u64), length| Spy::new(&keys[1], address, shard).read(at, length);
    let four = |value: f32| Ok([value; 4].map(f32::to_le_bytes).concat());
    assert_eq!(look(own, 16), four(4321.25));
    assert_eq!(look(other, 16), Err(WorkError::RemoteAccess));
    // Neither the shard's own words, nor what lies beside its table.
    assert_eq!(look((own.0, 0), 8), Err(WorkError::RemoteAccess));
    assert_eq!(look(own, 1 << 16), Err(WorkError::RemoteAccess));
    // A table that comes later, by a connection that was there before.
    let mut spies = [0, 1].map(|shard| Spy::new(&keys[1], address, shard));
    let (shard, at) = place("b/M", 77.5);
    assert_eq!(spies[usize::from(shard)].read(at, 16), four(77.5));
    let (shard, at) = place("a/M", 99.5);
    assert_eq!(spies[usize::from(shard)].read(at, 16), Err(WorkError::RemoteAccess));
    // Nobody may WRITE.
    let mut spy = Spy::new(&keys[1], address, own.0);
    let to = spy.rows.at(own.1);
    let wrote = spy.post(8, |pieces| Post::Write {
        payload: Payload::Gather(pieces),
        to,
        immediate: None,
        signal: None,
    });
    assert_eq!(wrote, Err(WorkError::RemoteAccess));

    // It comes by the way on which the server can look at what it asks for, or not at all.
    let tenant = connect(&keys[1], &[&server], false).unwrap();
    assert!(tenant.ways().iter().all(|(_, way)| *way == "tcp"), "{:?}", tenant.ways());
    let options = ClientOptions { key: Some(keys[1].clone()), ..ClientOptions::default() };
    let error = Client::connect_with(&[format!("{address}?via=shm")], options).unwrap_err().to_string();
    assert!(error.contains("shm") && error.contains("does not"), "{error}");
    drop(tenant);
    client.close().unwrap();
    assert!(server.stop());
}

#[test]
fn a_key_may_be_for_a_few_clients_at_a_time() {
    let keys = [key("few", "clients=2"), key("all", "")];
    for via in ["", "?via=tcp"] {
        let server = serve(&keys, via, |config| config.clients = 4);
        let options = || ClientOptions { clients: 9, key: Some(keys[0].clone()), ..ClientOptions::default() };
        let join = || Client::connect_with(&[server.address().to_string()], options());
        let (first, second) = (join().unwrap(), join().unwrap());
        let error = join().unwrap_err().to_string();
        assert!(error.contains("the key `few` is for clients=2"), "{error}");
        // The others find their places.
        let other =
            |clients| ClientOptions { clients, key: Some(keys[1].clone()), ..ClientOptions::default() };
        let third = Client::connect_with(&[server.address().to_string()], other(9)).unwrap();
        // One that leaves makes room, and so does one that is dropped.
        first.close().unwrap();
        let again = join().unwrap();
        assert!(join().is_err());
        drop(again);
        // Over shared memory its end says that it is gone, a moment later.
        let end = Instant::now() + Duration::from_secs(5);
        let again = loop {
            match join() {
                Ok(client) => break client,
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
        };
        for client in [again, second, third] {
            client.close().unwrap();
        }
        assert!(server.stop());
    }
}
