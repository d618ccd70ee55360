//! Fervor on real soft-RoCE: programs as a user starts them, between the two devices that `ci/soft-roce` makes. The
//! server listens on rxe1 (10.7.0.2), clients connect from rxe0 (10.7.0.1), and packets really cross the pair.
//!
//! Run by `ci/soft-roce-suite`, one test at a time: they share the devices, and some break the network on purpose. A
//! plain `cargo test` leaves them out; where they run and there is no device, they fail.
//!
//! | module | what it shows |
//! |---|---|
//! | [`guarantee`] | every model keeps its promise |
//! | [`torn`] | raw READs are torn, rows never are |
//! | [`training`] | processes learn as far as without RDMA, also when packets are lost |
//! | [`pages`] | memory lies on huge pages where they are asked for |
//! | [`peers`] | who is killed or vanishes is found out in time, and the others go on |
//! | [`rails`] | two rails are used at once, and a job goes on by one when the other dies |
//! | [`sessions`] | a session leads to RDMA, to shared memory and to TCP |
//! | [`latency`] | latency beside perftest's |
//! | [`program`], [`network`] | the programs, and the network between them |

#![forbid(unsafe_code)]

mod guarantee;
mod latency;
mod network;
mod pages;
mod peers;
mod program;
mod rails;
mod sessions;
mod torn;
mod training;
