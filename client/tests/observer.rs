//! Clients that only read: nobody waits for them, they wait for nobody, and they read what they are promised.

mod support;

use std::time::Duration;

use fervor_client::{Client, ClientOptions, Error, Model, Worker};
use fervor_server::Server;
use fervor_verbs::{
    Address,
    session::{Key, KeyRing},
    transport::any::Host,
};
use support::config;

const ROWS: u64 = 8;
const CLOCKS: u64 = 20;

fn key(name: &str, rules: &str) -> Key {
    format!("{name} {} {rules}", "5a".repeat(32)).parse().unwrap()
}

/// A server with these keys, reached by `via`.
fn serve(keys: &[Key], via: &str, id: u64) -> Server<Host> {
    let address: Address = format!("fervor://127.0.0.1:0{via}").parse().unwrap();
    let host =
        Host::with_keys(std::slice::from_ref(&address), keys.iter().cloned().collect::<KeyRing>()).unwrap();
    let mut config = config(&address, 2);
    config.id = id;
    // Nobody is to be waited for, whether it is there or not.
    config.lease = Duration::from_secs(600);
    Server::start(&host, &config).unwrap()
}

fn connect(servers: &[&Server<Host>], key: &Key, options: ClientOptions) -> Result<Client, Error> {
    let urls: Vec<String> = servers.iter().map(|server| server.address().to_string()).collect();
    Client::connect_with(&urls, ClientOptions { key: Some(key.clone()), check: true, ..options })
}

/// Reads all rows of the table. Each is as of the worker's clock less the staleness, and no newer than `most`.
fn read(client: &Client, worker: &mut Worker, model: Model, most: u64) {
    let table = client.table::<i64>("t", ROWS, 4, model).unwrap();
    let staleness = model.staleness().map_or(u64::MAX, u64::from);
    for row in 0..ROWS {
        let mut copy = [0; 4];
        worker.get(&table, row, &mut copy).unwrap();
        let least = worker.now().saturating_sub(staleness) as i64;
        assert!(copy[0] >= least && copy[0] <= most as i64, "{model}: {copy:?} at clock {}", worker.now());
        assert_eq!(copy, [copy[0]; 4], "{model}: no snapshot");
    }
    let stats = worker.stats();
    assert!(stats.waiting.is_zero() && stats.violations == 0, "{model}: {stats:?}");
}

/// Adds 1 to all rows in each of so many clocks.
fn train(client: &Client, worker: &mut Worker, model: Model, clocks: u64) {
    let table = client.table::<i64>("t", ROWS, 4, model).unwrap();
    for _ in 0..clocks {
        for row in 0..ROWS {
            worker.inc(&table, row, &[1; 4]).unwrap();
        }
        worker.clock().unwrap();
        // It waits for all clients of the job, if the model says so.
        worker.get(&table, 0, &mut [0; 4]).unwrap();
    }
}

#[test]
fn a_job_goes_on_without_one_who_only_reads() {
    let trainer = key("trainer", "");
    // By its key, and because it wants to.
    for (key, observer) in [(key("reader", "role=read"), false), (trainer.clone(), true)] {
        for (copies, via) in [(false, ""), (true, ""), (true, "?via=tcp")] {
            for model in [Model::Bsp, Model::Ssp { staleness: 1 }, Model::Essp { staleness: 1 }, Model::Async]
            {
                let server = serve(&[trainer.clone(), key.clone()], via, 0);
                // Here before the job, which is of another size than it says.
                let options = ClientOptions { observer, copies, clients: 3, ..ClientOptions::default() };
                let client = connect(&[&server], &key, options).unwrap();
                let mut reader = client.worker().unwrap();
                read(&client, &mut reader, model, 0);
                let job = ClientOptions { copies, ..ClientOptions::default() };
                let first = connect(&[&server], &trainer, job).unwrap();
                let mut worker = first.worker().unwrap();
                train(&first, &mut worker, model, CLOCKS);
                // It has not called `clock()`: its promise is that of its first clock.
                assert_eq!(reader.now(), 0);
                read(&client, &mut reader, model, CLOCKS);
                // Over a wire it hears of rounds some time after they were closed.
                while reader.now() < CLOCKS {
                    reader.clock().unwrap();
                    read(&client, &mut reader, model, CLOCKS);
                }
                assert_eq!(reader.now(), CLOCKS, "no further than the job");
                drop(worker);
                first.close().unwrap();
                // The job is over, and it reads on.
                for _ in 0..5 {
                    reader.clock().unwrap();
                    read(&client, &mut reader, model, CLOCKS);
                }
                assert_eq!(reader.now(), CLOCKS);
                // The next one does not wait for it either.
                let second =
                    connect(&[&server], &trainer, ClientOptions { copies, ..Default::default() }).unwrap();
                train(&second, &mut second.worker().unwrap(), model, 3);
                second.close().unwrap();
                drop(reader);
                client.close().unwrap();
                assert!(server.stop());
            }
        }
    }
}

#[test]
fn who_only_reads_updates_nothing() {
    let reader = key("reader", "role=read");
    let server = serve(std::slice::from_ref(&reader), "", 0);
    let client = connect(&[&server], &reader, ClientOptions::default()).unwrap();
    for model in [Model::Essp { staleness: 1 }, Model::Vap { v0: 2.0 }] {
        let table = client.table::<i64>(&model.to_string(), ROWS, 4, model).unwrap();
        let mut worker = client.worker().unwrap();
        let errors = [
            worker.inc(&table, 0, &[1; 4]),
            worker.inc_at(&table, 0, &[(1, 1)]),
            worker.inc_range(&table, 0, &[1; 8]),
        ];
        for error in errors {
            let text = error.unwrap_err().to_string();
            assert!(text.contains(&model.to_string()) && text.contains("role=read"), "{text}");
        }
        // It has done nothing wrong at the server.
        worker.clock().unwrap();
        worker.get(&table, 0, &mut [0; 4]).unwrap();
    }
    client.close().unwrap();
    assert!(server.stop());
}

#[test]
fn a_key_with_two_roles_is_refused_unless_the_client_only_reads() {
    let (reads, trains) = (key("k", "role=read"), key("k", "role=train"));
    let (first, second) = (serve(&[reads], "", 1), serve(std::slice::from_ref(&trains), "", 2));
    let servers = [&first, &second];
    let error = connect(&servers, &trains, ClientOptions::default()).unwrap_err().to_string();
    for server in servers {
        assert!(error.contains(&server.address().to_string()), "{error}");
    }
    assert!(error.contains("ClientOptions::observer"), "{error}");
    let options = ClientOptions { observer: true, ..ClientOptions::default() };
    connect(&servers, &trains, options).unwrap().close().unwrap();
    assert!(first.stop() && second.stop());
}
