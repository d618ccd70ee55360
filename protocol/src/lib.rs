//! Fervor's protocol as pure functions of (state, message, now): no I/O, no time, no threads, no `unsafe`.
//!
//! | module | what it is |
//! |---|---|
//! | [`limits`] | every bound, and the relations between them, proved at compile time |
//! | [`element`] | the element types of a table: `f32`, `f64`, `i32`, `i64` |
//! | [`schema`] | what a table is: name, element, rows, width, model |
//! | [`row`] | the image of a row: header, checksum, stride |
//! | [`route`] | which shard has a row, and where |
//! | [`clock`] | the vector clock and the staleness rule |
//! | [`wire`] | handshake, messages and immediates |
//! | [`batch`] | updates on their way to a shard: encoding, and checking before any is applied |
//! | [`ack`] | acknowledgement words, credits, batch numbers: exactly once |
//! | [`value`] | the value bound of VAP: what of a worker's updates is in transit |
//! | [`pending`] | a client's own updates that a copy of a row may lack: each counted exactly once |
//!
//! # A batch's way, and who knows what when
//!
//! ```text
//!  client                                               shard
//!  inc ... clock()  merge into pending, batch = UNSENT
//!  batch n encoded  pending entries get number n
//!      ── SEND (sequence q, batch n, END_OF_CLOCK c) ─▶ checks all of it, applies it at LSN L,
//!                                                       rows get lsn = L, client.applied = n
//!      ◀─ WRITE ack[q mod R] = (q, L) ───────────────── gives its receive buffer back
//!                                                       vector clock[client] = c
//!                                                       if the minimum rose to C: for each dirty row and
//!      ◀─ WRITE slot = {lsn, included, C, check, data} ─ subscriber a push that says of itself which
//!      ◀─ WRITE with immediate: round C ─────────────── batches of this client it contains
//! ```

#![forbid(unsafe_code)]

pub mod ack;
pub mod batch;
pub mod clock;
pub mod element;
pub mod limits;
pub mod pending;
pub mod route;
pub mod row;
pub mod schema;
pub mod value;
pub mod wire;

pub use element::{Element, ElementType};
pub use schema::{Model, Schema};
