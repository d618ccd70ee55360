//! Matrix factorisation by stochastic gradient descent, as in the paper: the application that a parameter server is for.
//!
//! A sparse matrix of ratings is approximated by `L R^T`. Rows of the matrix, with their row factors (`L`), belong to
//! workers; the column factors (`R`) are a table that all workers read and update. A pass over the ratings is
//! an epoch, and a worker ends a clock several times in it.
//!
//! ```text
//!  parent ──spawns──▶ server (embedded)                      none with --server or --no-server
//!    │ └────spawns──▶ client 0 ── worker threads 0, 1, …     stdin: `stop`; stdout: messages
//!    └──────spawns──▶ client 1 ── worker threads …
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`options`] | the command line |
//! | [`plan`] | which worker trains on which ratings, in which clock, in which order |
//! | [`sgd`] | the arithmetic |
//! | [`trainer`] | what each worker does; timing |
//! | [`served`], [`plain`] | column factors in a table, or behind locks of this process |
//! | [`client`] | a client process |
//! | [`parent`] | the process that starts the others, and adds up what they say |
//! | [`messages`] | what they say |
//! | [`report`] | what the user gets |

pub mod client;
pub mod messages;
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
