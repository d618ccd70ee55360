//! Matrix factorisation by stochastic gradient descent, as in the paper: the application that a parameter server is for.
//!
//! A sparse matrix of ratings is approximated by `L R^T`. Rows of the matrix, with their row factors (`L`), belong to
//! workers; the column factors (`R`) are a table that all workers read and update. A pass over the ratings is
//! an epoch, and a worker ends a clock several times in it.
//!
//! How the processes of a job hang together: [`job`](crate::job).
//!
//! | module | what it is |
//! |---|---|
//! | [`options`] | the command line |
//! | [`plan`] | which worker trains on which ratings, in which clock, in which order |
//! | [`sgd`] | the arithmetic |
//! | [`trainer`] | what each worker does |
//! | [`served`], [`plain`] | column factors in a table, or behind locks of this process |
//! | [`client`] | a client |
//! | [`parent`] | a whole job |
//! | [`report`] | what the user gets |

pub mod client;
pub mod options;
pub mod parent;
pub mod plain;
pub mod plan;
pub mod report;
pub mod served;
pub mod sgd;
pub mod trainer;

pub use options::MfOptions;
pub use parent::run;
pub use report::Report;

use crate::job::messages;

/// What a worker or client says; worker 0 may give back the column factors.
pub type Message = messages::Message<Vec<f32>>;
/// What they say, added up.
pub type Tally = messages::Tally<Vec<f32>>;
/// What a worker says of itself at its end.
pub type WorkerReport = messages::WorkerReport<Vec<f32>>;
