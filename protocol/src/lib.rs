//! Fervor's protocol as pure functions of (state, message, now): no I/O, no time, no threads, no `unsafe`.
//!
//! | module | what it is |
//! |---|---|
//! | [`limits`] | every bound, and the relations between them, proved at compile time |
//! | [`element`] | the element types of a table: `f32`, `f64`, `i32`, `i64` |
//! | [`schema`] | what a table is: name, element, rows, width, model |
//! | [`row`] | the image of a row: version, checksum, layout |
//! | [`route`] | which shard has a row, and where |
//! | [`clock`] | the vector clock and the staleness rule |
//! | [`wire`] | handshake, messages and immediates |
//! | [`batch`] | updates on their way to a shard: encoding, and checking before any is applied |
//! | [`ack`] | acknowledgement words, credits, batch numbers: exactly once |
//! | [`resume`] | a client that lost a connection and comes back: what is said again, and what is made up for |
//! | [`value`] | the value bound of VAP: what of a worker's updates is in transit |
//! | [`mutants`] | deliberate bugs, for the proof that the checker checks |
//! | [`inclusion`] | which of a client's own batches a copy contains: each counted exactly once |
//!
//! # A batch's way, and who knows what when
//!
//! ```text
//!  client                                               shard
//!  inc ...          a worker's slab
//!  clock()          the slab is handed over, unchanged from now on; batch n
//!      ── SEND (sequence q, batch n, END_OF_CLOCK c) ─▶ checks all of it; it will be applied at LSN L:
//!         the updates, or where they lie                announcement[n] = L, for clients on the same host
//!                                                       rows change, their images get LSN L; client.applied = n
//!      ◀─ WRITE ack[q mod R] = (q, L) ───────────────── gives its receive buffer back
//!                                                       vector clock[client] = c
//!                                                       if the minimum rose to C: clock word = C, for clients on the same host;
//!      ◀─ WRITE image {version, check, data} ────────── runs of dirty images to every mirror, single ones to slots
//!      ◀─ WRITE round word = (C, LSN), immediate C ──── round C is closed
//! ```

#![forbid(unsafe_code)]

pub mod ack;
pub mod batch;
pub mod clock;
pub mod element;
pub mod inclusion;
pub mod limits;
pub mod mutants;
pub mod resume;
pub mod route;
pub mod row;
pub mod schema;
pub mod value;
pub mod wire;

pub use element::{Element, ElementType};
pub use schema::{Model, Schema};
