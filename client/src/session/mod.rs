//! What a client's threads share: the connections to the shards, what is on its way to them, and how to wait.
//!
//! | module | what it is |
//! |---|---|
//! | [`absence`] | for each shard, when to connect again after a connection has ended |
//! | [`link`] | for each shard, the words by which threads tell each other things; no connection |
//! | [`channel`] | for each shard, the connection: messages out, acknowledgements and answers in |
//! | [`combine`] | the slabs of several workers, made one update per row, in messages |
//! | [`engine`] | the endpoint, and what a thread does with it when it waits or ends a clock |
//! | [`farewell`] | what a client that is dropped says |
//! | [`core`] | all of it together, clocks of the workers, waiting |

pub mod absence;
pub mod channel;
pub mod combine;
pub mod core;
pub mod engine;
pub mod farewell;
pub mod link;
