//! A thread that needs the client's engine itself (to open a table, to leave) gets it, though another one waits for
//! something that does not come for long, and drives the engine meanwhile.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use fervor_client::{Client, ClientOptions, Model};
use fervor_server::Server;
use fervor_verbs::{
    Address,
    transport::{Runtime, Thread, sim::Sim},
};
use support::config;

mod support;

/// Of two clients one computes for this long: the other's worker waits for its clock.
const COMPUTING: Duration = Duration::from_secs(4);

fn a_table_can_be_opened_while_a_worker_waits(seed: u64) {
    let sim = Sim::new(seed);
    let address = Address::Sim("server".into());
    let (up, left) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(2)));
    let host = sim.node("server");
    sim.spawn(&host.clone(), "main", {
        let (sim, address, up, left) = (sim.clone(), address.clone(), up.clone(), left.clone());
        move || {
            let server = Server::start(&host, &config(&address, 1)).unwrap();
            up.store(true, Ordering::SeqCst);
            while left.load(Ordering::SeqCst) > 0 {
                sim.sleep(&host, Duration::from_millis(1));
            }
            assert!(server.stop());
        }
    });
    for busy in [true, false] {
        let node = sim.node(if busy { "busy" } else { "waiting" });
        let (sim2, address, up, left) = (sim.clone(), address.clone(), up.clone(), left.clone());
        sim.spawn(&node.clone(), "main", move || {
            while !up.load(Ordering::SeqCst) {
                sim2.sleep(&node, Duration::from_millis(1));
            }
            let options = ClientOptions { clients: 2, cache_bytes: 1 << 20, ..ClientOptions::default() };
            let client = Client::connect_on(&node, &[address], options).unwrap();
            let table = client.table::<f32>("t", 4, 4, Model::Bsp).unwrap();
            let mut worker = client.worker().unwrap();
            if busy {
                sim2.sleep(&node, COMPUTING);
                worker.clock().unwrap();
                drop(worker);
                client.close().unwrap();
                left.fetch_sub(1, Ordering::SeqCst);
                return;
            }
            let waiting = node
                .spawn("worker", None, {
                    let table = table.clone();
                    move || {
                        worker.clock().unwrap();
                        worker.get(&table, 0, &mut [0.0; 4]).unwrap();
                    }
                })
                .unwrap();
            // By then it sleeps with the engine, time and again.
            sim2.sleep(&node, COMPUTING / 4);
            let before = node.now();
            client.table::<f32>("another", 4, 4, Model::Bsp).unwrap();
            let took = node.now() - before;
            assert!(took < COMPUTING / 4, "seed {seed}: it took {took:?} to open a table");
            assert!(waiting.join());
            client.close().unwrap();
            left.fetch_sub(1, Ordering::SeqCst);
        });
    }
    sim.run();
}

#[test]
fn whoever_needs_the_engine_gets_it_from_one_who_waits() {
    for seed in 0..20 {
        a_table_can_be_opened_while_a_worker_waits(seed);
    }
}
