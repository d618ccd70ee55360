//! Fervor's transport: registered memory, connections and completions behind one small contract.
//!
//! This is the only crate of the workspace with `unsafe` code, and it knows nothing of rows, clocks or
//! tables. [`transport`] is the contract, with what a user may assume and no more; every provider
//! (a folder or file of `transport/`) passes the one conformance suite in `transport/conformance`.
//!
//! | module | what it is |
//! |---|---|
//! | [`transport`] | the contract: traits, completions, ordering and ownership rules |
//! | [`memory`] | memory that a NIC or a peer reads or writes; never a slice while others may write it |
//! | [`address`] | `shm:///path`, `rdma://host:port`, `tcp://host:port`, `sim://name` |
//! | [`devices`] | the RDMA devices of this host |
//! | [`session`] | what two processes say before data flows: pre-shared keys, the cipher, the messages |
//! | [`fabric`] | how RDMA packets travel: options, and which port and address a connection uses |
//! | [`rails`] | the ports that one process uses at once |
//! | [`error`] | what can go wrong: the call, the values, the cure |

pub mod address;
mod capabilities;
pub mod devices;
pub mod error;
pub mod fabric;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod interfaces;
pub mod memory;
pub mod rails;
pub mod session;
pub mod transport;

pub use address::Address;
pub use error::Error;
pub use memory::{Exclusive, Memory, Piece};
