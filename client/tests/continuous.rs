//! Continuous pushing, in a simulation of time: what a reader that holds rows sees of another's updates without reading
//! again, in which order, and at what rate. What it must not break is checked by `seeds`.

use std::{
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use fervor_client::{Client, ClientOptions, Model, Table, TableOptions, Worker};
use fervor_protocol::limits::ROW_HEADER;
use fervor_server::Server;
use fervor_verbs::{
    Address,
    transport::{
        Runtime,
        sim::{Fabric, Node, Settings, Sim},
    },
};

mod support;

const ROWS: u64 = 200;
const WIDTH: usize = 64;
/// Of a push.
const BYTES: u64 = (ROW_HEADER + WIDTH * 4) as u64;

/// A client with a table and a worker.
struct Seat {
    sim: Sim,
    node: Node,
    client: Client<Node>,
    table: Table<i32>,
    worker: Worker<Node>,
}

impl Seat {
    /// The first element of each row, by hits alone.
    fn look(&mut self) -> Vec<i32> {
        let before = self.worker.stats();
        let mut copy = [0; WIDTH];
        let mut get = |row| {
            self.worker.get(&self.table, row, &mut copy).unwrap();
            copy[0]
        };
        let seen = (0..ROWS).map(&mut get).collect();
        assert_eq!(self.worker.stats().reads, before.reads, "all rows are held");
        seen
    }

    /// Adds `by` to the first element of `row`, and ends the clock.
    fn add(&mut self, rows: impl Iterator<Item = (u64, i32)>) {
        for (row, by) in rows {
            self.worker.inc_at(&self.table, row, &[(0, by)]).unwrap();
        }
        self.worker.clock().unwrap();
    }

    fn sleep(&self, time: Duration) {
        self.sim.sleep(&self.node, time);
    }
}

/// Runs a writer and a reader that holds all rows of a table, one after the other.
fn run(
    model: Model,
    continuous: u64,
    write: impl FnOnce(&mut Seat) + Send + 'static,
    read: impl FnOnce(&mut Seat) + Send + 'static,
) {
    let sim = Sim::with(1, Settings { fabric: Some(Fabric::roce_25g()), ..Settings::default() });
    let address = Address::Sim("server".into());
    let left = Arc::new(Mutex::new(2));
    let (host, config) = (sim.node("server"), support::config(&address, 1));
    let up = Arc::new(Mutex::new(false));
    sim.clone().spawn(&host.clone(), "main", {
        let (sim, left, up) = (sim.clone(), left.clone(), up.clone());
        move || {
            let server = Server::start(&host, &config).unwrap();
            *up.lock().unwrap() = true;
            while *left.lock().unwrap() > 0 {
                sim.sleep(&host, Duration::from_millis(10));
            }
            assert!(server.stop());
        }
    });
    type Part = Box<dyn FnOnce(&mut Seat) + Send>;
    let parts: [(&str, Part); 2] = [("writer", Box::new(write)), ("reader", Box::new(read))];
    for (name, part) in parts {
        let (sim, node, address) = (sim.clone(), sim.node(name), address.clone());
        let (left, up) = (left.clone(), up.clone());
        sim.clone().spawn(&node.clone(), "main", move || {
            while !*up.lock().unwrap() {
                sim.sleep(&node, Duration::from_micros(100));
            }
            let options = ClientOptions { clients: 2, cache_bytes: 1 << 20, ..ClientOptions::default() };
            let client = Client::connect_on(&node, &[address], options).unwrap();
            let options = TableOptions { continuous, ..TableOptions::default() };
            let table = client.table_with::<i32>("t", ROWS, WIDTH, model, options).unwrap();
            let worker = client.worker().unwrap();
            let mut seat = Seat { sim, node, client, table, worker };
            part(&mut seat);
            let Seat { client, worker, .. } = seat;
            drop(worker);
            client.close().unwrap();
            *left.lock().unwrap() -= 1;
        });
    }
    sim.run();
}

/// Subscribes to all rows, and lets the first pushes come.
fn hold(seat: &mut Seat) {
    let rows: Vec<u64> = (0..ROWS).collect();
    // Who reads a row again that is not there sends the wishes that have not gone.
    for _ in 0..2 {
        seat.worker.get_many(&seat.table, &rows, &mut vec![0; ROWS as usize * WIDTH]).unwrap();
    }
    seat.sleep(Duration::from_millis(5));
    seat.look();
}

const ASYNC: Model = Model::Async;
const ESSP: Model = Model::Essp { staleness: 3 };

#[test]
fn copies_are_fresh_before_the_round_under_essp_and_without_rounds_under_async() {
    for model in [ASYNC, ESSP] {
        let write = |seat: &mut Seat| {
            seat.sleep(Duration::from_millis(50));
            seat.add((0..ROWS).map(|row| (row, 7)));
            seat.sleep(Duration::from_millis(50));
        };
        run(model, u64::MAX, write, move |seat| {
            hold(seat);
            seat.sleep(Duration::from_millis(60));
            // The reader has ended no clock, so the shard clock has not risen.
            assert_eq!(seat.look(), vec![7; ROWS as usize], "{model}");
        });
    }
}

#[test]
fn without_it_copies_change_with_the_round_only() {
    let write = |seat: &mut Seat| {
        seat.sleep(Duration::from_millis(50));
        seat.add((0..ROWS).map(|row| (row, 7)));
        seat.sleep(Duration::from_millis(50));
    };
    run(ESSP, 0, write, |seat| {
        hold(seat);
        seat.sleep(Duration::from_millis(60));
        assert_eq!(seat.look(), vec![0; ROWS as usize]);
        seat.worker.clock().unwrap();
        seat.sleep(Duration::from_millis(5));
        assert_eq!(seat.look(), vec![7; ROWS as usize]);
    });
}

#[test]
fn the_budget_is_kept_the_most_changed_rows_go_first_and_none_waits_for_ever() {
    // A row each millisecond, to both clients: each has a mirror.
    let rate = 2 * BYTES * 1000;
    let write = |seat: &mut Seat| {
        seat.sleep(Duration::from_millis(50));
        // Row 0 changes least. A few ranks only.
        seat.add((0..ROWS).map(|row| (row, 1 << (row / 50))));
        seat.sleep(Duration::from_millis(300));
    };
    run(ASYNC, rate, write, |seat| {
        hold(seat);
        let mut order: Vec<u64> = Vec::new();
        let start = seat.node.now();
        while order.len() < ROWS as usize {
            let seen = seat.look();
            order.extend(
                (0..ROWS).filter(|row| seen[*row as usize] > 0 && !order.contains(row)).collect::<Vec<_>>(),
            );
            assert!(seat.node.now() - start < Duration::from_millis(320), "{} rows in time", order.len());
            seat.sleep(Duration::from_micros(500));
        }
        let took = seat.node.now() - start;
        assert!(took > Duration::from_millis(ROWS - 5), "{took:?} for {ROWS} pushes");
        let high = order[..100].iter().filter(|row| **row >= 100).count();
        assert!(high >= 85, "{high} of the first 100 are of the two highest ranks");
        assert!(order[..100].iter().any(|row| *row < 50), "some are of the lowest");
    });
}

#[test]
fn only_what_is_not_pushed_anyway_can_be_pushed_continuously() {
    let (told, refusals) = mpsc::channel();
    let ask = move |seat: &mut Seat| {
        for model in [Model::Bsp, Model::Ssp { staleness: 1 }, Model::Vap { v0: 1.0 }] {
            let options = TableOptions { continuous: 1, ..TableOptions::default() };
            let refused = seat.client.table_with::<i32>("other", 4, 4, model, options).unwrap_err();
            told.send(refused.to_string()).unwrap();
        }
    };
    run(ASYNC, 1, ask, |_| {});
    let refusals: Vec<String> = refusals.iter().collect();
    for (refusal, model) in refusals.iter().zip(["BSP", "SSP(1)", "VAP(1)"]) {
        assert!(refusal.contains("for ESSP and Async") && refusal.contains(model), "{refusal}");
    }
    assert_eq!(refusals.len(), 3);
}
