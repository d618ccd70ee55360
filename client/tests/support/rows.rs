//! Jobs on one table in which every worker adds to a row of its own, so that what another one sees of that row tells which
//! of its updates it has. Over shared memory with real threads, and in the simulator, which delivers the worst that the
//! transport's contract allows.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fervor_client::{Client, ClientOptions, Model, Table, Worker};
use fervor_server::Server;
use fervor_verbs::{
    Address,
    transport::{
        Thread, Transport,
        any::Host,
        sim::{Node, Sim},
    },
};

use super::{Folder, config};

/// A job of equal clients.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    pub clients: usize,
    /// Workers of each.
    pub each: usize,
    /// Elements of a row.
    pub width: usize,
    pub model: Model,
    /// Whether a copy that is too old is an error.
    pub check: bool,
    /// Whether copies are insisted on, though the server is on the same host.
    pub copies: bool,
}

impl Job {
    fn connect<T: Transport>(
        &self,
        transport: &T,
        server: &Address,
        options: ClientOptions,
    ) -> (Client<T>, Table<i64>) {
        let client = Client::connect_on(transport, std::slice::from_ref(server), options).unwrap();
        let rows = (self.clients * self.each) as u64;
        let table = client.table::<i64>("t", rows, self.width, self.model).unwrap();
        (client, table)
    }

    /// Client number `number`: each of its workers does `work`, given its number in the job, in a thread of its own.
    pub fn client<T: Transport, W>(&self, transport: &T, server: &Address, number: usize, work: W)
    where
        W: Fn(Worker<T>, &Table<i64>, usize) + Clone + Send + 'static,
    {
        let (clients, check, copies) = (self.clients as u16, self.check, self.copies);
        let options = ClientOptions { clients, check, copies, ..ClientOptions::default() };
        let (client, table) = self.connect(transport, server, options);
        // All of them before one begins: a worker that joined later would begin at a later clock.
        let workers: Vec<_> = (0..self.each).map(|_| client.worker().unwrap()).collect();
        let threads: Vec<_> = (number * self.each..)
            .zip(workers)
            .map(|(me, worker)| {
                let (table, work) = (table.clone(), work.clone());
                transport.spawn("worker", None, move || work(worker, &table, me)).unwrap()
            })
            .collect();
        for thread in threads {
            assert!(thread.join(), "{}: a worker failed", self.model);
        }
        client.close().unwrap();
    }

    /// Everything was applied, once: a new client reads of every worker what it has `added`.
    pub fn sums<T: Transport>(&self, transport: &T, server: &Address, added: impl Fn(usize) -> u64) {
        let (client, table) = self.connect(transport, server, ClientOptions::default());
        let mut worker = client.worker().unwrap();
        let numbers: Vec<u64> = (0..table.schema().rows).collect();
        let mut rows = vec![0; numbers.len() * self.width];
        worker.get_many(&table, &numbers, &mut rows).unwrap();
        for (number, row) in rows.chunks(self.width).enumerate() {
            let added = added(number) as i64;
            assert_eq!(row, vec![added; self.width], "{}: nothing lost, nothing twice", self.model);
        }
        drop(worker);
        client.close().unwrap();
    }
}

/// A server of two shards, and so many clients beside each other on this machine, over shared memory; then `after`.
pub fn over_shared_memory(
    clients: usize,
    client: impl Fn(&Host, &Address, usize) + Sync,
    after: impl FnOnce(&Host, &Address),
) {
    let folder = Folder::new("rows");
    on_this_machine(&folder.address("s.sock"), clients, client, after);
}

/// The same, with a server at this address.
pub fn on_this_machine(
    address: &Address,
    clients: usize,
    client: impl Fn(&Host, &Address, usize) + Sync,
    after: impl FnOnce(&Host, &Address),
) {
    let host = Host::for_addresses(std::slice::from_ref(address)).unwrap();
    let server = Server::start(&host, &config(address, 2)).unwrap();
    let address = server.address().clone();
    std::thread::scope(|scope| {
        for number in 0..clients {
            let (host, address, client) = (&host, &address, &client);
            scope.spawn(move || client(host, address, number));
        }
    });
    after(&host, &address);
    assert!(server.stop());
}

/// The same in the simulator, each a node of its own; every second client is on the server's host. The hash of the history.
pub fn simulated(
    seed: u64,
    clients: usize,
    client: impl Fn(&Node, &Address, usize) + Send + Sync + 'static,
    after: impl FnOnce(&Node, &Address) + Send + 'static,
) -> u64 {
    let sim = Sim::new(seed);
    let address = Address::Sim("server".into());
    let up = Arc::new(AtomicBool::new(false));
    let left = Arc::new(AtomicUsize::new(clients));
    let host = sim.node("server");
    let server = host.clone();
    sim.spawn(&host.clone(), "main", {
        let (sim, address, up, left) = (sim.clone(), address.clone(), up.clone(), left.clone());
        move || {
            let server = Server::start(&host, &config(&address, 2)).unwrap();
            up.store(true, Ordering::SeqCst);
            while left.load(Ordering::SeqCst) > 0 {
                sim.sleep(&host, Duration::from_millis(1));
            }
            after(&host, &address);
            assert!(server.stop());
        }
    });
    let client = Arc::new(client);
    for number in 0..clients {
        let name = format!("client-{number}");
        let host = if number % 2 == 1 { sim.node_on(&server, &name) } else { sim.node(&name) };
        sim.spawn(&host.clone(), "main", {
            let (sim, address, up, left) = (sim.clone(), address.clone(), up.clone(), left.clone());
            let client = client.clone();
            move || {
                while !up.load(Ordering::SeqCst) {
                    sim.sleep(&host, Duration::from_millis(1));
                }
                client(&host, &address, number);
                left.fetch_sub(1, Ordering::SeqCst);
            }
        });
    }
    if let Err(report) = sim.try_run() {
        panic!("seed {seed}: {report}");
    }
    sim.hash()
}
