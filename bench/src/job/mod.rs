//! A training job: the processes that every application of it consists of, and what they tell each other.
//!
//! ```text
//!  parent ──spawns──▶ server (embedded)                      none with --server or --no-server
//!    │ └────spawns──▶ client 0 ── worker threads 0, 1, …     stdin: `stop`; stdout: messages
//!    └──────spawns──▶ client 1 ── worker threads …
//! ```
//!
//! An application ([`mf`](crate::mf), [`lda`](crate::lda)) brings its data, its tables and what a worker does; the rest is here.
//!
//! | module | what it is |
//! |---|---|
//! | [`options`] | the part of the command line that says who works where |
//! | [`parent`] | the process that starts the others, and adds up what they say |
//! | [`client`] | a client process and its threads |
//! | [`epochs`] | what each worker does; timing |
//! | [`messages`] | what they say |
//! | [`accesses`] | what the accesses to shared state cost a worker |
//! | [`oracle`] | what `--check` checks besides what the client says of itself |
//! | [`report`] | what all reports have |

pub mod accesses;
pub mod client;
pub mod epochs;
pub mod messages;
pub mod options;
pub mod oracle;
pub mod parent;
pub mod report;

pub use accesses::{Accesses, Shared};
pub use options::JobOptions;

use std::ops::Range;

/// Cuts items of these sizes into `workers` contiguous ranges of about equal sums.
pub fn ranges(sizes: &[u64], workers: usize) -> Vec<Range<usize>> {
    let total: u64 = sizes.iter().sum();
    let mut firsts = Vec::with_capacity(workers + 1);
    let mut before = 0;
    for (item, size) in sizes.iter().enumerate() {
        // An item opens the next range when its middle lies beyond the range's share.
        while firsts.len() < workers
            && (2 * before + size) * workers as u64 >= 2 * total * firsts.len() as u64
        {
            firsts.push(item);
        }
        before += size;
    }
    firsts.resize(workers + 1, sizes.len());
    firsts[0] = 0;
    firsts.windows(2).map(|pair| pair[0]..pair[1]).collect()
}
