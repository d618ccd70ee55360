//! The checker: random workloads whose every `get` is checked exactly, in the simulator and over shared memory.
//!
//! | module | what it is |
//! |---|---|
//! | [`plan`] | what a seed makes of a job: clients, workers, deaths; and what everybody will add |
//! | [`tables`] | its tables |
//! | [`actor`] | a worker at work, and what is checked of each `get` |
//! | [`watcher`] | a client that only reads, and calls `clock()` a few times or never: nobody waits for it, and its reads keep their promise |
//! | [`rogue`] | a client written by hand: batches that come twice, batches that are bad or missing |
//! | [`trouble`] | what goes wrong of the transport, and at whom |
//! | [`scene`] | servers, clients and the end of a job; one seed from start to end |
//! | [`journal`] | the last operations of all workers, for the report of a failure |
//!
//! **How it knows.** Each worker has columns of its own in every row and adds whole numbers to them. What it will add is
//! drawn before the run, so for any clock it is known how much of it a reader must see, and which sums there can be at
//! all. A `get` says which clock `C` it claims to be good for (by its clock differential); it is checked against that
//! claim, not only against the bound of the model, so that a wrong claim is found where it is made:
//!
//! | whose columns | at least | at most | and it is |
//! |---|---|---|---|
//! | own | all that was added | the same | |
//! | others' | what is stamped `< C`; the model wants `C >= c - s` | what has been added by now | a sum at the end of a clock |
//! | others', under a value bound | what they had added before, less the bound | as above | |
//! | others' who have closed, under Async | all that they ever added | the same | |
//! | of one that was killed | nothing; at the end, what anybody saw | what it had added | a sum at the end of a clock |
//! | of one that lost a server | as above | as above | |
//! | the rogue's | nothing | what it had sent | a sum at the end of a batch |
//! | nobody's | 0 | 0 | |
//!
//! All columns of one worker are added to alike, so in a row whose updates fit a message they are equal: rows are
//! snapshots, and the image of another row would be found out, since rows grow at different speeds. Where rows are
//! not pushed, the only worker of a client sees neither sums nor claims go back. At the end a new client finds the sums: nothing lost, nothing twice.

// Each test uses a part of it.
#![allow(dead_code)]

pub mod actor;
pub mod journal;
pub mod plan;
pub mod rogue;
pub mod scene;
pub mod tables;
pub mod trouble;
pub mod watcher;
