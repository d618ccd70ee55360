//! Fervor's client: tables whose rows are read by one-sided RDMA READ or from a cache that the servers push into.
//!
//! ```no_run
//! use fervor_client::{Client, Model};
//!
//! # fn main() -> Result<(), fervor_client::Error> {
//! let client = Client::connect(&["shm:///tmp/fervor.sock"])?;
//! let table = client.table::<f32>("L", 1000, 32, Model::Essp { staleness: 3 })?;
//! let mut worker = client.worker()?;
//! let mut row = [0.0; 32];
//! for _ in 0..10 {
//!     worker.get(&table, 7, &mut row)?;
//!     worker.inc(&table, 7, &[0.5; 32])?;
//!     worker.clock()?;
//! }
//! drop(worker);
//! client.close()
//! # }
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`client`] | connecting, tables, the end |
//! | [`worker`] | `get`, `inc`, `clock`, and what happens at a miss |
//! | [`table`] | a table: where its rows are, and which updates copies may lack |
//! | [`cache`] | slots, which workers read without locks and the server writes |
//! | [`oplog`] | a worker's updates of its present clock |
//! | [`engine`] | the endpoint for messages: batches, acknowledgements, immediates |
//! | [`core`] | what the threads share, and how they wait |
//! | [`reader`] | a worker's READs |
//!
//! **Invariants.** A `get` that hits makes no system call and takes no lock unless the copy lacks own updates. A `get` that
//! misses is one READ, posted and polled by the calling thread. There is no thread of the client's own: whoever waits
//! drives the engine.

#![forbid(unsafe_code)]

mod cache;
mod client;
mod core;
mod engine;
mod error;
mod hash;
mod oplog;
mod options;
mod reader;
mod table;
mod worker;

pub use client::{Client, ClientStats, TableOptions};
pub use error::Error;
pub use fervor_protocol::{Element, ElementType, Model, Schema, value::bound as value_bound};
pub use options::ClientOptions;
pub use table::Table;
pub use worker::{Worker, WorkerStats};
