//! Servers with keys: who may do what, and that one client reaches each server by its best way.

mod support;

use fervor_client::{Client, ClientOptions, Error, Model};
use fervor_server::{Config, Server};
use fervor_verbs::{
    Address,
    session::{Key, KeyRing},
    transport::any::Host,
};
use support::config;

fn key(name: &str, rules: &str) -> Key {
    format!("{name} {} {rules}", "5a".repeat(32)).parse().unwrap()
}

/// A server on this host, at a free port.
fn serve(keys: &[Key], via: &str, change: impl Fn(&mut Config)) -> Server<Host> {
    let address: Address = format!("fervor://127.0.0.1:0{via}").parse().unwrap();
    let ring: KeyRing = keys.iter().cloned().collect();
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
