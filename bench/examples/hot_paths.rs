//! The hot paths, one at a time, for `ci/instructions`, which counts their instructions under callgrind.
//!
//! ```text
//! hot_paths hit|in-place|miss|inc COUNT     calls the function measured_* so many times, once for each operation
//! hot_paths apply|sealed ROUNDS             applies batches of 256 rows, in so many rounds, without and with checks
//! hot_paths push ROUNDS CLIENTS             the same with checks, and pushes the rows to so many clients in runs
//! ```
//!
//! What a worker does is in functions of their own, so that callgrind can be told to count in them alone; a server and its client are in this
//! process, over shared memory. What a shard does is [`fervor_server::counts`], without threads: twice as many rounds cost
//! what the rounds cost more.
//!
//! All rows have 128 bytes: 32 numbers of type `f32`.

use std::{env, hint::black_box, process, slice};

use fervor_bench::connect::{ReadOptions, client_options};
use fervor_client::{Client, Model, Table, TableOptions, Worker};
use fervor_server::{
    Config, Server,
    counts::{self, Copies},
};
use fervor_verbs::{Address, transport::any::Host};

/// Numbers in a row.
const WIDTH: usize = 32;
/// Rows of the table of a worker's operations.
const ROWS: u64 = 256;

type Row = [f32; WIDTH];

/// A client with a worker and the table.
struct Seat {
    client: Client,
    table: Table<f32>,
    worker: Worker,
}

impl Seat {
    fn new(address: &Address, model: Model, copies: bool) -> Self {
        let client = Client::connect_with(
            &[address.to_string()],
            client_options(1, ReadOptions { copies, ..ReadOptions::default() }),
        )
        .expect("the server is there");
        let table = client.table_with("rows", ROWS, WIDTH, model, TableOptions::default()).expect("it fits");
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
    let mut seat = Seat::new(address, model, copies);
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

fn usage(what: &str) -> ! {
    eprintln!(
        "hot_paths: `{what}`: write hit|in-place|miss|inc COUNT, apply|sealed ROUNDS, or push ROUNDS CLIENTS"
    );
    process::exit(2)
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let number = |text: &String| text.parse().unwrap_or_else(|_| usage(text));
    match &arguments[..] {
        [what, rounds] if what == "apply" => counts::apply(Copies::None, number(rounds)),
        [what, rounds] if what == "sealed" => counts::apply(Copies::Sealed, number(rounds)),
        [what, rounds, clients] if what == "push" => {
            counts::push(number(clients) as u32, number(rounds)).expect("it runs");
        }
        [operation, count] => served(operation, number(count)),
        other => usage(&other.join(" ")),
    }
}

fn served(operation: &str, count: u64) {
    let socket = env::temp_dir().join(format!("fervor-hot-paths-{}.sock", process::id()));
    let address = Address::Shm(socket);
    let host = Host::for_addresses(slice::from_ref(&address)).expect("shared memory works");
    let server = Server::start(&host, &Config::new(address.clone())).expect("the server starts");
    of_a_worker(&address, operation, count);
    server.stop();
}
