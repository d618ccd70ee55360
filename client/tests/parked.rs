//! Reads cost the server nothing: a million cache-miss reads over shared memory while the poller is parked do not
//! run a single instruction of it.

use std::{fs, thread, time::Duration};

use fervor_client::{Client, ClientOptions, Model};
use fervor_server::{Config, Server};
use fervor_verbs::{Address, transport::any::Host};

/// Time on a processor (ns) and number of times it was put on one, of this process's thread `name`.
fn scheduled(name: &str) -> String {
    let task = fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| task.unwrap().path())
        .find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name));
    let task = task.unwrap_or_else(|| panic!("no thread {name}"));
    fs::read_to_string(task.join("schedstat")).unwrap().split(' ').step_by(2).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_parked_poller_sleeps_through_a_million_reads() {
    for copies in [false, true] {
        reads(copies);
    }
}

fn reads(copies: bool) {
    const POLLER: &str = "fervor-poll-0";
    let folder = std::env::temp_dir().join(format!("fervor-parked-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let address: Address = format!("shm://{}/s.sock", folder.display()).parse().unwrap();
    let host = Host::for_addresses(std::slice::from_ref(&address)).unwrap();
    let mut config = Config::new(address.clone());
    config.memory = 16 << 20;
    let server = Server::start(&host, &config).unwrap();
    let options = ClientOptions { copies, ..ClientOptions::default() };
    let client = Client::connect_with(&[address.to_string()], options).unwrap();
    let table = client.table::<f32>("t", 1000, 16, Model::Async).unwrap();
    let mut worker = client.worker().unwrap();

    let mut row = [0.0; 16];
    // The first READ makes a connection, of which the poller is told.
    worker.get(&table, 0, &mut row).unwrap();
    let mut before = scheduled(POLLER);
    loop {
        thread::sleep(Duration::from_millis(200));
        let now = scheduled(POLLER);
        if now == before {
            break;
        }
        before = now;
    }
    for i in 1..1_000_000 {
        worker.get(&table, i % 1000, &mut row).unwrap();
    }
    let stats = worker.stats();
    let expected = if copies { (0, 1_000_000) } else { (1_000_000, 0) };
    assert_eq!((stats.in_place, stats.misses), expected);
    assert_eq!(scheduled(POLLER), before, "the poller ran");

    // It is alive: a clock wakes it.
    worker.inc(&table, 1, &[1.0; 16]).unwrap();
    worker.clock().unwrap();
    drop(worker);
    client.close().unwrap();
    assert_ne!(scheduled(POLLER), before);
    assert!(server.stop());
    fs::remove_dir_all(folder).unwrap();
}
