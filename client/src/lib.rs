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
//! | [`worker`] | `get`, `inc`, `clock`; rows in place, copies, ranges |
//! | [`own`], [`slab`] | a worker's own updates, which copies may lack, in the form in which they are sent |
//! | [`merge`] | the slabs of several workers, made one update per row |
//! | [`known`] | what is known of a shard before a copy is read |
//! | [`table`] | a table: where its rows are, and how they are held |
//! | [`cache`] | slots, which workers read without locks and the server writes |
//! | [`session`] | what the threads share: connections, the engine that drives them, clocks, waiting |
//! | [`lane`], [`reader`] | READs: connections that workers share, and what one worker READs |
//!
//! **Invariants.** A `get` that reads in place or hits makes no system call and takes no lock (but for a row longer than a message,
//! while its update is on its way), and writes no word that another worker reads, but for the mark of a slot that it is used. A `get` that misses is one
//! READ, posted by the calling thread, and polled by it or by another worker that waits. An `inc` touches the worker's own memory alone, but when it needs more of it. There is no
//! thread of the client's own: whoever waits drives the engine.

#![forbid(unsafe_code)]

mod cache;
mod client;
mod connect;
mod error;
mod hash;
mod known;
mod lane;
mod lock;
mod merge;
mod options;
mod own;
mod reader;
mod session;
mod slab;
mod space;
mod table;
mod worker;

pub use client::{Client, ClientStats, TableOptions};
pub use error::Error;
pub use fervor_protocol::{Element, ElementType, Model, Schema, value::bound as value_bound};
pub use options::{ClientOptions, ReadLanes};
pub use table::Table;
pub use worker::{Worker, WorkerStats};
