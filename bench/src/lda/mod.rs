//! Latent Dirichlet allocation by collapsed Gibbs sampling: topics of documents, the paper's second application.
//!
//! Each token of the documents has a topic, drawn time and again given those of all other tokens. How often each word
//! has each topic, and the sums of that over all words, are tables of integers that all workers read and update;
//! documents, with their tokens' topics, belong to workers. A pass over the tokens is an epoch, and a worker ends a clock
//! several times in it. How the processes of a job hang together: [`job`](crate::job).
//!
//! | module | what it is |
//! |---|---|
//! | [`options`] | the command line |
//! | [`corpus`] | documents: read, recognised, generated |
//! | [`share`] | which worker has which documents, and draws which topics in which clock |
//! | [`sampler`] | the arithmetic |
//! | [`likelihood`] | how well the topics fit |
//! | [`counts`] | what the workers share |
//! | [`served`], [`plain`] | counts in tables, or behind locks of this process |
//! | [`trainer`] | what each worker does |
//! | [`client`] | a client |
//! | [`parent`] | a whole job |
//! | [`report`] | what the user gets |
//!
//! To run workers in another setting (any transport, a clock of one's own): [`Share::new`](share::Share::new),
//! [`Sampler::new`](sampler::Sampler::new) and [`Tables::open`](served::Tables::open); then, for each worker,
//! [`start`](served::Tables::start), [`sample`](served::Tables::sample) between two clocks, and
//! [`settle`](served::Tables::settle) at the end.

pub mod client;
pub mod corpus;
pub mod counts;
pub mod likelihood;
pub mod options;
pub mod parent;
pub mod plain;
pub mod report;
pub mod sampler;
pub mod served;
pub mod share;
pub mod trainer;

pub use options::LdaOptions;
pub use parent::run;
pub use report::Report;

use crate::job::messages;

/// What a worker or client says.
pub type Message = messages::Message<trainer::Outcome>;
/// What they say, added up.
pub type Tally = messages::Tally<trainer::Outcome>;
/// What a worker says of itself at its end.
pub type WorkerReport = messages::WorkerReport<trainer::Outcome>;
