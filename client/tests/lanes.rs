//! READ lanes: how many connections a server has, and that every READ comes to the worker that posted it, however many workers share a
//! lane: over shared memory, TCP and in the simulator.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fervor_client::{Client, ClientOptions, Error, Model, ReadLanes, Table};
use fervor_server::{Config, Server};
use fervor_verbs::{
    Address,
    transport::{
        Thread, Transport,
        any::Host,
        sim::{Fabric, Node, Settings, Sim},
    },
};
use support::{Folder, Random, config};

mod support;

/// Rows of a table.
const ROWS: u64 = 400;
/// Elements of a short row, and of one that is longer than a worker's places are at first.
const WIDTHS: [usize; 2] = [4, 600];

/// What each element of the tables is.
fn value(row: u64, column: usize) -> i64 {
    (row * 1000) as i64 + column as i64 + 1
}

fn options(read_lanes: ReadLanes) -> ClientOptions {
    ClientOptions {
        copies: true,
        read_lanes,
        cache_bytes: 1 << 20,
        slab_bytes: 8 << 20,
        ..ClientOptions::default()
    }
}

/// No cache keeps the rows: each read is a READ.
fn open<T: Transport>(client: &Client<T>) -> [Table<i64>; 2] {
    WIDTHS.map(|width| client.table(&format!("width {width}"), ROWS, width, Model::Async).unwrap())
}

/// Fills the tables. All of it has been applied when this returns.
fn fill<T: Transport>(transport: &T, servers: &[Address]) {
    let client = Client::connect_on(transport, servers, options(ReadLanes::default())).unwrap();
    let tables = open(&client);
    let mut worker = client.worker().unwrap();
    for table in &tables {
        for row in 0..ROWS {
            let values: Vec<_> = (0..table.width()).map(|column| value(row, column)).collect();
            worker.inc(table, row, &values).unwrap();
        }
    }
    worker.clock().unwrap();
    drop(worker);
    client.close().unwrap();
}

/// One thread of those who read: workers that come and go, and leave READs on their way behind.
fn read<T: Transport>(
    client: &Client<T>,
    tables: &[Table<i64>; 2],
    seed: u64,
    rounds: u64,
) -> Result<(), Error> {
    let mut random = Random(seed);
    for _ in 0..rounds {
        let mut worker = client.worker()?;
        for _ in 0..random.among(1..=20) {
            // Long ones now and then.
            let table = &tables[usize::from(random.one_in(8))];
            let count = random.among(1..=40);
            let rows: Vec<u64> = (0..count).map(|_| random.among(0..=ROWS - 1)).collect();
            let mut values = vec![0; rows.len() * table.width()];
            if random.one_in(3) {
                worker.prefetch(table, &rows[..rows.len() / 2])?;
            }
            if random.one_in(2) {
                worker.get_many(table, &rows, &mut values)?;
            } else {
                for (row, values) in rows.iter().zip(values.chunks_exact_mut(table.width())) {
                    worker.get(table, *row, values)?;
                }
            }
            for (row, values) in rows.iter().zip(values.chunks_exact(table.width())) {
                for (column, found) in values.iter().enumerate() {
                    assert_eq!(*found, value(*row, column), "row {row}, column {column}");
                }
            }
        }
        worker.prefetch(&tables[0], &[1, 2, 3, 4, 5])?;
        assert_eq!(worker.stats().hits + worker.stats().in_place, 0);
    }
    Ok(())
}

/// `workers` threads read all the time from `servers`, with these lanes.
fn hammer<T: Transport>(
    transport: &T,
    servers: &[Address],
    lanes: ReadLanes,
    workers: u64,
    rounds: u64,
    seed: u64,
) {
    let client = Arc::new(Client::connect_on(transport, servers, options(lanes)).unwrap());
    let tables = open(&client);
    let threads: Vec<_> = (0..workers)
        .map(|number| {
            let (client, tables) = (client.clone(), tables.clone());
            let body = move || read(&client, &tables, seed << 8 | number, rounds).unwrap();
            transport.spawn("reader", None, body).unwrap()
        })
        .collect();
    assert!(threads.into_iter().all(Thread::join), "{lanes}: a reader failed");
    Arc::into_inner(client).unwrap().close().unwrap();
}

/// Servers on this machine, at `addresses`; `body` is given the addresses at which they are reached.
fn with_servers(
    addresses: &[Address],
    change: impl Fn(&mut Config),
    body: impl FnOnce(&Host, &[Address], Vec<Server<Host>>),
) {
    let host = Host::for_addresses(addresses).unwrap();
    let start = |(number, address): (usize, &Address)| {
        let mut config = config(address, 1);
        (config.id, config.lanes) = (number as u64, 32);
        change(&mut config);
        Server::start(&host, &config).unwrap()
    };
    let servers: Vec<_> = addresses.iter().enumerate().map(start).collect();
    let reached: Vec<_> = servers.iter().map(|server| server.address().clone()).collect();
    body(&host, &reached, servers);
}

/// More workers than lanes; with one lane more READs than its send queue takes.
fn hammer_here(addresses: &[Address]) {
    with_servers(
        addresses,
        |_| {},
        |host, addresses, servers| {
            fill(host, addresses);
            for (lanes, workers) in
                [(ReadLanes::Shared(1), 8), (ReadLanes::Shared(3), 7), (ReadLanes::PerWorker, 3)]
            {
                hammer(host, addresses, lanes, workers, 12, 1);
            }
            assert!(servers.into_iter().all(Server::stop));
        },
    );
}

#[test]
fn every_read_comes_to_its_worker_over_shared_memory() {
    let folder = Folder::new("lanes");
    hammer_here(&[folder.address("0.sock"), folder.address("1.sock")]);
}

#[test]
fn every_read_comes_to_its_worker_over_tcp() {
    hammer_here(&["tcp://127.0.0.1:0".parse().unwrap()]);
}

#[test]
fn every_read_comes_to_its_worker_in_the_simulator() {
    for seed in 0..12 {
        let lanes = [ReadLanes::Shared(1), ReadLanes::Shared(2), ReadLanes::PerWorker][seed as usize % 3];
        let sim = Sim::new(seed);
        let (servers, up) = (serve(&sim, 1, 2, |config| config.lanes = 8), Arc::new(AtomicUsize::new(0)));
        let node = sim.node("client");
        let addresses = servers.addresses.clone();
        let (done, inside) = (servers.done.clone(), sim.clone());
        sim.spawn(&node.clone(), "main", move || {
            servers.wait(&inside, &node);
            fill(&node, &addresses);
            hammer(&node, &addresses, lanes, 6, 3, seed);
            done.fetch_add(1, Ordering::SeqCst);
            up.fetch_add(1, Ordering::SeqCst);
        });
        sim.run();
    }
}

/// A server that is lost is lost for all workers of a lane, whichever polls its end, also for those who wait for another server.
#[test]
fn a_lost_server_is_told_to_all_workers_of_a_lane() {
    for tcp in [false, true] {
        let folder = Folder::new("lanes");
        let address = |name| if tcp { "tcp://127.0.0.1:0".parse().unwrap() } else { folder.address(name) };
        with_servers(
            &[address("0.sock"), address("1.sock")],
            |_| {},
            |host, addresses, mut servers| {
                fill(host, addresses);
                let client = Client::connect_on(host, addresses, options(ReadLanes::Shared(1))).unwrap();
                let tables = open(&client);
                let (stopped, begun) = (AtomicUsize::new(0), AtomicUsize::new(0));
                std::thread::scope(|scope| {
                    for seed in 0..5 {
                        let (client, tables, stopped, begun) = (&client, &tables, &stopped, &begun);
                        scope.spawn(move || {
                            let error = (0..).find_map(|round| {
                                begun.fetch_add(usize::from(round == 1), Ordering::SeqCst);
                                read(client, tables, seed << 32 | round, 1).err()
                            });
                            stopped.fetch_add(1, Ordering::SeqCst);
                            let error = error.unwrap();
                            let lost = matches!(error, Error::ServerLost { .. } | Error::Fault { .. });
                            assert!(lost, "worker {seed}: {error}");
                        });
                    }
                    while begun.load(Ordering::SeqCst) < 5 {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    assert_eq!(stopped.load(Ordering::SeqCst), 0);
                    assert!(servers.pop().unwrap().stop());
                });
                assert_eq!(stopped.load(Ordering::SeqCst), 5);
                assert!(servers.into_iter().all(Server::stop));
            },
        );
    }
}

#[test]
fn more_lanes_than_the_server_takes_are_refused_with_the_cure() {
    let folder = Folder::new("lanes");
    let change = |config: &mut Config| (config.clients, config.lanes) = (1, 1);
    with_servers(&[folder.address("0.sock")], change, |host, addresses, servers| {
        let client = Client::connect_on(host, addresses, options(ReadLanes::PerWorker)).unwrap();
        let table = client.table::<i64>("t", 1, 1, Model::Async).unwrap();
        let mut workers: Vec<_> = (0..20).map(|_| client.worker().unwrap()).collect();
        let refused = workers.iter_mut().find_map(|worker| worker.get(&table, 0, &mut [0]).err());
        let text = refused.unwrap().to_string();
        assert!(text.contains("10 READ lanes") && text.contains("--lanes"), "{text}");
        // Those of the workers that go make room.
        workers.truncate(2);
        let mut again = client.worker().unwrap();
        while let Err(error) = again.get(&table, 0, &mut [0]) {
            assert!(error.to_string().contains("READ lanes"), "{error}");
            std::thread::sleep(Duration::from_millis(1));
        }
        drop((workers, again));
        client.close().unwrap();
        assert!(servers.into_iter().all(Server::stop));

        let none =
            Client::connect_on(host, addresses, options(ReadLanes::Shared(0))).unwrap_err().to_string();
        assert!(none.contains("read_lanes is Shared(0)"), "{none}");
    });
}

/// Servers in a simulation, which run until `done` says that all of `clients` clients are.
struct Served {
    addresses: Vec<Address>,
    nodes: Vec<Node>,
    up: Arc<AtomicUsize>,
    done: Arc<AtomicUsize>,
}

impl Served {
    /// Waits until they listen.
    fn wait(&self, sim: &Sim, node: &Node) {
        while self.up.load(Ordering::SeqCst) < self.addresses.len() {
            sim.sleep(node, Duration::from_millis(1));
        }
    }
}

/// One server of `shards` shards.
fn serve(sim: &Sim, clients: usize, shards: usize, change: impl Fn(&mut Config)) -> Served {
    let address = Address::Sim("server".into());
    let node = sim.node("server");
    let (up, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let served = Served {
        addresses: vec![address.clone()],
        nodes: vec![node.clone()],
        up: up.clone(),
        done: done.clone(),
    };
    let mut config = config(&address, shards);
    change(&mut config);
    let inside = sim.clone();
    sim.spawn(&node.clone(), "main", move || {
        let server = Server::start(&node, &config).unwrap();
        up.fetch_add(1, Ordering::SeqCst);
        while done.load(Ordering::SeqCst) < clients {
            inside.sleep(&node, Duration::from_millis(10));
        }
        assert!(server.stop());
    });
    served
}

/// Connections at a server of 16 shards when all workers have READ from all shards.
fn connections(clients: usize, workers: usize, read_lanes: ReadLanes) -> usize {
    const SHARDS: usize = 16;
    let sim = Sim::with(1, Settings { fabric: Some(Fabric::roce_25g()), ..Settings::default() });
    let served = Arc::new(serve(&sim, clients, SHARDS, |config| {
        (config.clients, config.lanes, config.credits) = (clients, workers, 1);
        config.staging = Config::default_staging(clients);
        config.memory = 1 << 20;
    }));
    let (ready, counted) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    for number in 0..clients {
        let (sim, node) = (sim.clone(), sim.node(&format!("client {number}")));
        let (served, ready, counted) = (served.clone(), ready.clone(), counted.clone());
        sim.clone().spawn(&node.clone(), "main", move || {
            served.wait(&sim, &node);
            let options = ClientOptions { clients: clients as u16, ..options(read_lanes) };
            let client = Client::connect_on(&node, &served.addresses, options).unwrap();
            let table = client.table::<i64>("t", 256, 1, Model::Async).unwrap();
            let mut all: Vec<_> = (0..workers).map(|_| client.worker().unwrap()).collect();
            let rows: Vec<u64> = (0..256).collect();
            for worker in &mut all {
                worker.get_many(&table, &rows, &mut vec![0; 256]).unwrap();
            }
            ready.fetch_add(1, Ordering::SeqCst);
            while ready.load(Ordering::SeqCst) < clients {
                sim.sleep(&node, Duration::from_millis(1));
            }
            counted.fetch_max(sim.connections(&served.nodes[0]), Ordering::SeqCst);
            // Who counts later may count less.
            drop(all);
            client.close().unwrap();
            served.done.fetch_add(1, Ordering::SeqCst);
        });
    }
    sim.run();
    counted.load(Ordering::SeqCst)
}

#[test]
fn a_server_has_at_most_4096_connections_of_64_clients_with_16_workers() {
    // Besides the main one to each shard, three that 16 workers share.
    assert_eq!(connections(64, 16, ReadLanes::default()), 64 * 16 * (1 + 3));
    assert_eq!(connections(3, 2, ReadLanes::default()), 3 * 16 * (1 + 2));
    assert_eq!(connections(3, 5, ReadLanes::PerWorker), 3 * 16 * (1 + 5));
}
