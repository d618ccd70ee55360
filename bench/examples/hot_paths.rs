//! The hot paths, one at a time, for `ci/instructions`, which counts their instructions under callgrind.
//!
//! ```text
//! hot_paths hit|in-place|miss|inc COUNT         calls the function measured_* so many times, once for each operation
//! hot_paths apply|push ROWS CLOCKS HOLDERS      has the server apply, and push to so many clients, ROWS rows in each clock
//! ```
//!
//! What a worker does is in functions of their own, so that callgrind can be told to count in them alone. What the server does for a row is
//! found without its functions, which change: the difference between many rows and few in a clock, of all instructions outside the main thread.
//!
//! All rows have 128 bytes: 32 numbers of type `f32`. A server and its clients are in this process, over shared memory.

use std::{env, hint::black_box, process, slice};

use fervor_bench::connect::{ReadOptions, client_options};
use fervor_client::{Client, Model, Table, TableOptions, Worker};
use fervor_server::{Config, Server};
use fervor_verbs::{Address, transport::any::Host};

/// Numbers in a row.
const WIDTH: usize = 32;
/// Rows of the table of a worker's operations.
const ROWS: u64 = 256;
/// Adjacent rows that are updated, and then as many that are not.
const RUN: u64 = 64;

type Row = [f32; WIDTH];

/// A client with a worker and the table.
struct Seat {
    client: Client,
    table: Table<f32>,
    worker: Worker,
}

impl Seat {
    fn new(address: &Address, model: Model, rows: u64, clients: u16, copies: bool) -> Self {
        let client =
            Client::connect_with(&[address.to_string()], client_options(clients, ReadOptions { copies }))
                .expect("the server is there");
        let table = client.table_with("rows", rows, WIDTH, model, TableOptions::default()).expect("it fits");
        let worker = client.worker().expect("there is room for it");
        Seat { client, table, worker }
    }

    fn close(self) {
        drop(self.worker);
        self.client.close().expect("the server is there");
    }
}

#[inline(never)]
fn measured_hit(worker: &mut Worker, table: &Table<f32>, row: u64, into: &mut Row) {
    worker.get(table, row, into).expect("it is read");
}

#[inline(never)]
fn measured_in_place(worker: &mut Worker, table: &Table<f32>, row: u64, into: &mut Row) {
    worker.get(table, row, into).expect("it is read");
}

#[inline(never)]
fn measured_miss(worker: &mut Worker, table: &Table<f32>, row: u64, into: &mut Row) {
    worker.get(table, row, into).expect("it is read");
}

#[inline(never)]
fn measured_inc(worker: &mut Worker, table: &Table<f32>, row: u64, delta: &Row) {
    worker.inc(table, row, delta).expect("it is added");
}

/// Reads all rows until the cache answers for each.
fn fill(seat: &mut Seat) {
    loop {
        let before = seat.worker.stats().misses;
        for row in 0..seat.table.rows() {
            seat.worker.get(&seat.table, row, &mut [0.0; WIDTH]).expect("it is read");
        }
        if seat.worker.stats().misses == before {
            return;
        }
        seat.worker.clock().expect("the server is there");
    }
}

fn of_a_worker(address: &Address, operation: &str, count: u64) {
    let (model, copies) = match operation {
        "hit" => (Model::Essp { staleness: 0 }, true),
        "in-place" => (Model::Essp { staleness: 0 }, false),
        "miss" | "inc" => (Model::Async, true),
        other => usage(other),
    };
    let mut seat = Seat::new(address, model, ROWS, 1, copies);
    if model != Model::Async {
        fill(&mut seat);
    }
    let Seat { worker, table, .. } = &mut seat;
    let mut values: Row = [1.0; WIDTH];
    for number in 0..count {
        let row = number % ROWS;
        match operation {
            "hit" => measured_hit(worker, table, row, &mut values),
            "in-place" => measured_in_place(worker, table, row, &mut values),
            "miss" => measured_miss(worker, table, row, &mut values),
            _ => measured_inc(worker, table, row, &values),
        }
        black_box(&mut values);
        if operation == "inc" && row == ROWS - 1 {
            worker.clock().expect("the server is there");
        }
    }
    seat.close();
}

/// The rows that are updated: `count` of them, in runs.
fn in_runs(count: u64) -> impl Iterator<Item = u64> {
    (0..count).map(|row| row / RUN * 2 * RUN + row % RUN)
}

/// One client updates, and the `holders` have all rows; this thread is the worker of all of them, in turn.
fn of_the_server(address: &Address, push: bool, rows: u64, clocks: u64, holders: u16) {
    let model = if push { Model::Essp { staleness: 0 } } else { Model::Bsp };
    let all = 2 * rows;
    let mut writer = Seat::new(address, model, all, holders + 1, true);
    let mut holders: Vec<Seat> =
        (0..holders).map(|_| Seat::new(address, model, all, holders + 1, true)).collect();
    if push {
        for holder in &mut holders {
            for row in in_runs(rows) {
                holder.worker.get(&holder.table, row, &mut [0.0; WIDTH]).expect("it is read");
            }
        }
    }
    for _ in 0..clocks {
        for row in in_runs(rows) {
            writer.worker.inc(&writer.table, row, &[1.0; WIDTH]).expect("it is added");
        }
        writer.worker.clock().expect("the server is there");
        holders.iter_mut().for_each(|holder| holder.worker.clock().expect("the server is there"));
        // Waits for the round.
        for seat in holders.iter_mut().chain([&mut writer]) {
            let outside = all - 1;
            seat.worker.get(&seat.table, outside, &mut [0.0; WIDTH]).expect("it is read");
        }
    }
    // Nobody waits for a clock any more.
    holders.into_iter().for_each(Seat::close);
    writer.close();
}

fn usage(what: &str) -> ! {
    eprintln!("hot_paths: `{what}`: write hit|in-place|miss|inc COUNT, or apply|push ROWS CLOCKS HOLDERS");
    process::exit(2)
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let number = |text: &String| text.parse().unwrap_or_else(|_| usage(text));
    let socket = env::temp_dir().join(format!("fervor-hot-paths-{}.sock", process::id()));
    let address = Address::Shm(socket);
    let host = Host::for_addresses(slice::from_ref(&address)).expect("shared memory works");
    let server = Server::start(&host, &Config::new(address.clone())).expect("the server starts");
    match &arguments[..] {
        [operation, count] => of_a_worker(&address, operation, number(count)),
        [operation, rows, clocks, holders] if operation == "apply" || operation == "push" => {
            let holders = number(holders) as u16;
            of_the_server(&address, operation == "push", number(rows), number(clocks), holders);
        }
        other => usage(&other.join(" ")),
    }
    server.stop();
}
