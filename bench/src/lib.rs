//! Fervor's applications and measurements: what shows that the parameter server works, and how well.
//!
//! Everything here uses the client as any user would. The programs it starts (servers, other clients) are real
//! processes, which end with this one. Figures go to the terminal as tables and to files as JSON; each
//! says on which machine it was measured.
//!
//! | module | what it is |
//! |---|---|
//! | [`check`] | the guarantee of the consistency models, at scale |
//! | [`connect`] | how all of these connect to servers |
//! | [`connecting`] | how long it takes until all are connected |
//! | [`start`] | how long it takes until a server's memory is there |
//! | [`flood`] | how a job fares while strangers besiege its server |
//! | [`data`] | ratings: read, recognised, generated |
//! | [`job`] | processes and threads of a training job |
//! | [`lda`] | topics of documents, with the parameter server and without |
//! | [`mf`] | matrix factorisation, with the parameter server and without |
//! | [`scaling`] | a job with 1, 2, 4 … workers, beside plain threads |
//! | [`demo`] | the digits under all models, with curves and pictures |
//! | [`paper`] | the paper's experiments on simulated clusters, on this machine and on hosts of a slow network, as one page |
//! | [`devices`] | the RDMA devices of this machine |
//! | [`latency`] | what each operation takes, one by one |
//! | [`compare`] | latencies of several runs side by side |
//! | [`throughput`] | how many rows a second |
//! | [`limits`], [`perftest`], [`stream`] | what the machine and its network allow |
//! | [`model`] | consistency models on the command line |
//! | [`server`] | starting and stopping a server of our own |
//! | [`machine`], [`report`], [`figures`] | where it was measured; tables and files; curves and bars |

#![forbid(unsafe_code)]

pub mod check;
pub mod compare;
pub mod connect;
pub mod connecting;
pub mod data;
pub mod demo;
pub mod devices;
pub mod figures;
pub mod flood;
pub mod job;
pub mod latency;
pub mod lda;
pub mod limits;
pub mod machine;
pub mod mf;
pub mod model;
pub mod paper;
pub mod perftest;
pub mod report;
pub mod scaling;
pub mod server;
pub mod start;
pub mod stream;
pub mod throughput;
