//! Which updates of the value-bounded tables are visible to which client. This is the server's half of
//! [`fervor_protocol::value`].
//!
//! After each turn that applied batches, the images that they changed in such tables are pushed to all who
//! hold them. A WRITE's completion does not say that the peer's processor sees it. The completion of a READ
//! that is posted after it does (transport rule 3). So for each client there is at most one READ on its way,
//! the *proof*:
//!
//! ```text
//!   batch at LSN 7 ─▶ pushes to the client ─▶ READ of a word of the client, for LSN 7 ─▶ completed: proved = 7
//! ```
//!
//! | field | meaning |
//! |---|---|
//! | `pushed` | something was pushed, or is owed, since the last proof was posted |
//! | `proof` | a READ is on its way, behind all pushes up to this LSN |
//! | `proved` | all pushes up to this LSN are visible at the client |
//! | `batches` | the client's own batches that it has not been told of: number and LSN |
//!
//! **The visible LSN of the shard** is the least over the clients. A client counts with its `proved`; if
//! nothing is on its way to it, it counts with the LSN up to which all is pushed. The visible LSN never
//! falls: a client that subscribes later fills its copy with what is in the image by then. A batch at or
//! below the visible LSN is visible to all, and an immediate tells its client so.
//!
//! The shard never waits for a client that holds no copy (one that reads in place, or has none). It waits for
//! a client that dies only until the client's connection has ended.
//!
//! **Why a READ of a worker does no harm.** A `get` that READs returns what was in the row at some moment of
//! that call. It keeps no copy of the row: rows of such tables enter caches by pushes alone.

use std::collections::VecDeque;

/// Batches that are remembered one by one. While there are more, the newest ones are told of together.
const MOST_BATCHES: usize = 1024;

/// Of one client; see the module.
#[derive(Debug, Default)]
pub struct Visibility {
    pushed: bool,
    proof: Option<u64>,
    proved: u64,
    batches: VecDeque<(u64, u64)>,
}

impl Visibility {
    /// An image of a value-bounded table was pushed, or is owed.
    pub fn pushed(&mut self) {
        self.pushed = true;
    }

    /// Batch `number` of this client was applied at `lsn`.
    pub fn applied(&mut self, number: u64, lsn: u64) {
        if self.batches.len() == MOST_BATCHES {
            self.batches.pop_back();
        }
        self.batches.push_back((number, lsn));
    }

    /// Whether a proof is to be posted, once all that is owed has been.
    pub fn is_due(&self) -> bool {
        self.pushed && self.proof.is_none()
    }

    /// A proof is on its way, behind all pushes up to `lsn`.
    pub fn proof_posted(&mut self, lsn: u64) {
        self.pushed = false;
        self.proof = Some(lsn);
    }

    /// The proof is here (`ok`), or its connection has ended.
    pub fn proof_done(&mut self, ok: bool) {
        if let Some(lsn) = self.proof.take() {
            if ok {
                self.proved = lsn;
            } else {
                self.pushed = true;
            }
        }
    }

    /// All up to this LSN is visible at the client, of a shard that has pushed all up to `lsn`.
    pub fn proved(&self, lsn: u64) -> u64 {
        if self.pushed || self.proof.is_some() { self.proved } else { lsn }
    }

    /// All up to this LSN is visible at every client. The number of the last batch of this client to which that is news.
    pub fn rise(&mut self, visible: u64) -> Option<u64> {
        let mut last = None;
        while let Some(&(number, lsn)) = self.batches.front()
            && lsn <= visible
        {
            self.batches.pop_front();
            last = Some(number);
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_visible_when_a_proof_behind_its_pushes_is_here() {
        let mut client = Visibility::default();
        client.applied(1, 5);
        client.applied(2, 7);
        client.pushed();
        assert!(client.is_due() && client.proved(5) == 0);
        client.proof_posted(5);
        client.pushed();
        assert!(!client.is_due() && client.proved(7) == 0);
        client.proof_done(true);
        assert_eq!((client.is_due(), client.proved(7)), (true, 5));
        assert_eq!((client.rise(5), client.rise(5)), (Some(1), None));
        client.proof_posted(7);
        client.proof_done(false);
        assert!(client.is_due(), "what did not come proves nothing");
    }

    #[test]
    fn what_is_remembered_of_batches_is_bounded_and_the_last_is_told_of() {
        let mut client = Visibility::default();
        for number in 1..=3000 {
            client.applied(number, number);
        }
        assert_eq!(client.batches.len(), MOST_BATCHES);
        assert_eq!(
            (client.rise(10), client.rise(2999), client.rise(3000)),
            (Some(10), Some(1023), Some(3000))
        );
    }
}
