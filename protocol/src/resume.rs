//! Resuming: a client that loses a connection and comes back within its lease loses nothing but time.
//!
//! A client has an *identity*: 64 random bits, made when it connects. It says them to each shard. When the main
//! connection to a shard breaks, the shard keeps the client, *suspended*, for a *lease*. The client connects
//! again and says the same identity. Then both go on where they were.
//!
//! ```text
//!  client                                                      shard
//!  polls Disconnected: nothing of the old connection           polls Disconnected: suspends the client,
//!  changes its memory any more                                 posts nothing more, and its lease begins
//!      ── connect (identity, attempt a) ──────────────────────▶ waits until it has polled its own Disconnected
//!      ◀─ WRITE acknowledgements of its last messages ───────── the exact words, once more
//!      ◀─ SEND Resumed: I have processed all up to q ──────────
//!      ── SEND q + 1, q + 2, ... as they were ────────────────▶
//!      ◀─ WRITE all images that it holds ────────────────────── all are owed
//!      ◀─ answers that it may not have heard; Closed, Visible ─
//!      ◀─ WRITE round word, immediate C ─────────────────────── when nothing is owed
//! ```
//!
//! **1. Who.** The identity is a secret of 64 bits, so nobody takes another's place by chance. Each attempt to
//! connect has a number. A shard takes an attempt only if its number [is later](is_later) than that of all
//! attempts before. So a late attempt that the client has given up cannot put out a newer one. A client that
//! has been put out is not waited for: it may be dead, and then the others would wait for the lease for nothing.
//! Who comes back with an identity that the shard does not know is told so. Anybody can make one up, so there are a few places for
//! that, each for a short time; who finds none is hung up on, and tries again.
//!
//! **2. Messages, exactly once.** The shard processes messages in their order, and knows the number `q` of the last
//! one. A client keeps each message in its buffer until it is acknowledged, and what the message names (slabs) as
//! long. At most `credits` messages are unacknowledged. So two facts are enough: `q`, and the LSNs of the last
//! `credits` messages ([`History`]). The shard writes these acknowledgements again, and then says `q`. They are the
//! words that it wrote before, at the same places, so it does no harm that the client has taken some of them. The
//! client has polled `Resumed`, so it sees the words. It takes them, and has an acknowledgement of all up to `q`, of
//! none beyond ([`unprocessed`]). It sends the others again, which the shard has never seen. So each message is
//! processed once. The batch numbers would catch a message that comes twice all the same.
//!
//! Acknowledgements that came on the old connection are true, whenever they are found. What the client concludes from
//! LSNs ([`inclusion`](crate::inclusion)) knows no connections.
//!
//! **3. Answers** ([`Unheard`]). An answer uses up a receive buffer, and the client says how many it has given back. So the
//! shard knows which answers the client has polled for sure. It sends the others again. The client knows by the number of
//! the request whether it still waits for the answer, and drops one that it has. `Closed` and `Visible` say numbers that
//! only grow. The last ones are said again.
//!
//! **4. Receive buffers** count from zero on the new connection, on both sides. All that came on the old connection was
//! polled before its end, and its buffers were given back. Only the count in a message that is sent again is not what it was.
//!
//! **5. Pushes.** What was on its way on the old connection may have happened, in part and in any order, but only before the
//! client polled the end. The client connects after that. The shard posts on the new connection after it has polled its own end.
//! So no old WRITE follows a new one: an image in client memory does not go back. Between the end and the resumption such
//! memory may hold, image by image, either what it held, or something newer, or something torn. What a reader then
//! concludes is still right:
//! - *Torn*: the check does not fit, and the row is READ.
//! - *Newer than its round*: a claim ("as of clock `C`", "all up to LSN `X` is in it") is a lower bound, from the last round that was
//!   *polled*. What was pushed before that immediate is there. Newer contents keep the bound. Which of the reader's own
//!   batches an image contains is decided by the image's LSN, and if a batch is not acknowledged yet, the reader waits for
//!   that. The acknowledgement comes with the resumption at the latest.
//! - *Not there*: rounds were not polled, so nothing is claimed of them.
//!
//! After the resumption the client is owed all images that it holds: of a mirror all that were ever written, and all subscribed
//! slots. A round is closed only when nothing is owed, as ever. So when the next round is polled, all pushes that were lost
//! have been made up for. For the same reason an answer that says "your mirror is filled" waits until nothing is owed.
//!
//! **6. A row that was asked for once** is the one push that has no holder, so it is not owed again. Its slot may be used
//! for something else as soon as the answer is there. To push it again could overwrite that. So the shard drops such pushes, and the
//! worker that waits gives its slot up, and asks again with another one. A slot that was given up is used
//! again only after `Closed`, as ever.
//!
//! **7. Value bounds.** A suspended client is waited for: what it has not got is not visible to all. Others may stand still for the
//! lease, as they do when the clock needs it.
//!
//! **What is not resumed.** A server that stops says so, and a server that was started again does not know the client: both
//! are errors at once. Nor is a connection resumed that cannot break without its peer (over shared memory).
//! A dead process cannot be told from a broken link: it holds the clock back for the lease. A client that is dropped says so
//! ([`DROPPED`](crate::wire::DROPPED)).

use std::{collections::VecDeque, time::Duration};

use crate::ack::SendWindow;

/// The number of the attempt after `last`. (0 is the first connection, which resumes nothing.)
pub fn next_attempt(last: u16) -> u16 {
    last.wrapping_add(1).max(1)
}

/// Whether attempt `number` was made after attempt `last`: they are less than 2^15 attempts apart.
pub fn is_later(number: u16, last: u16) -> bool {
    (1..1 << 15).contains(&number.wrapping_sub(last))
}

/// How long a client may be gone: as long as both sides allow.
pub fn lease(own: Duration, milliseconds: u32) -> Duration {
    own.min(Duration::from_millis(milliseconds.into()))
}

/// The acknowledgements of a client's last messages: as many as it may not have found.
#[derive(Debug, Clone)]
pub struct History {
    credits: usize,
    last: VecDeque<(u64, u64)>,
}

impl History {
    /// Of a client that may have `credits` messages unacknowledged.
    pub fn new(credits: usize) -> Self {
        Self { credits, last: VecDeque::with_capacity(credits) }
    }

    /// Message `sequence` is acknowledged as of `lsn`.
    pub fn acknowledged(&mut self, sequence: u64, lsn: u64) {
        if self.last.len() == self.credits {
            self.last.pop_front();
        }
        self.last.push_back((sequence, lsn));
    }

    /// Sequences and LSNs, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.last.iter().copied()
    }

    /// Forgets the last one: only a mutant does.
    pub fn forget_last(&mut self) {
        self.last.pop_back();
    }
}

/// What was posted to a client that uses up its receive buffers, as long as the client may not have polled it.
#[derive(Debug, Clone, Default)]
pub struct Unheard {
    /// How many were heard.
    heard: u64,
    /// In the order of the posts; `None`: an immediate, or what is not said again.
    posted: VecDeque<Option<Vec<u8>>>,
}

impl Unheard {
    /// This answer was posted; `None`: something else that uses up a receive buffer.
    pub fn posted(&mut self, answer: Option<Vec<u8>>) {
        self.posted.push_back(answer);
    }

    /// The client has given back `total` receive buffers, no more than were used, and no fewer than before.
    pub fn returned(&mut self, total: u64) {
        let news = (total - self.heard) as usize;
        self.posted.drain(..news);
        self.heard = total;
    }

    /// The answers that are to be sent again, in order. Counting begins anew.
    pub fn take(&mut self) -> impl DoubleEndedIterator<Item = Vec<u8>> + use<> {
        std::mem::take(self).posted.into_iter().flatten()
    }
}

/// The messages that a shard has not processed which says that it has processed all up to `sequence`, after the acknowledgements
/// have been taken: they are to be sent again, from the first to the last.
///
/// # Errors
/// The shard has not acknowledged what it says that it has processed, or more.
pub fn unprocessed(window: &SendWindow, sequence: u64) -> Result<std::ops::RangeInclusive<u64>, String> {
    if window.acknowledged() != sequence {
        return Err(format!(
            "it resumes after message {sequence}, but its last acknowledgement is that of message {}",
            window.acknowledged()
        ));
    }
    Ok(sequence + 1..=window.sent())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ack::{Admit, BatchNumbers, Receives, ack_offset, ack_word, acknowledged};

    #[test]
    fn a_late_attempt_is_not_taken_for_a_newer_one() {
        assert!(is_later(1, 0) && !is_later(1, 1) && !is_later(1, 2));
        let mut last = 0;
        for _ in 0..200_000 {
            let next = next_attempt(last);
            assert!(is_later(next, last) && !is_later(last, next) && next != 0);
            last = next;
        }
    }

    #[test]
    fn the_lease_is_what_both_allow() {
        assert_eq!(lease(Duration::from_secs(3), 10_000), Duration::from_secs(3));
        assert_eq!(lease(Duration::from_secs(30), 10_000), Duration::from_secs(10));
        assert_eq!(lease(Duration::from_secs(30), 0), Duration::ZERO);
    }

    #[test]
    fn a_shard_that_says_other_than_it_acknowledged_is_not_believed() {
        let mut window = SendWindow::new(4);
        (0..3).for_each(|_| _ = window.take());
        window.acknowledge();
        assert_eq!(unprocessed(&window, 1), Ok(2..=3));
        assert!(unprocessed(&window, 2).unwrap_err().contains("message 2"));
        assert!(unprocessed(&window, 0).is_err());
    }

    /// One message of the model: batch or request, by its number.
    #[derive(Debug, Clone)]
    struct Shard {
        sequence: u64,
        numbers: BatchNumbers,
        history: History,
        unheard: Unheard,
        receives: Receives,
        lsn: u64,
        /// How often each batch was applied.
        applied: Vec<u64>,
    }

    proptest! {
        /// A client sends batches; some messages ask for an answer, too. Connections break at any step, with any part of what is on its
        /// way delivered. In the end each batch was applied once, each acknowledgement said the LSN of that, and each
        /// answer was heard.
        #[test]
        fn every_message_is_processed_once_whatever_breaks(
            credits in 1usize..=8,
            steps in proptest::collection::vec((0u8..6, any::<u8>()), 1..400),
        ) {
            let (mut window, mut sent) = (SendWindow::new(credits), VecDeque::<u64>::new());
            let mut shard = Shard {
                sequence: 0,
                numbers: BatchNumbers::default(),
                history: History::new(credits),
                unheard: Unheard::default(),
                receives: Receives::new(4),
                lsn: 0,
                applied: vec![],
            };
            let mut ring = [0u64; crate::limits::ACK_RING];
            // On their way: messages, with the count of buffers given back; acknowledgements; answers.
            let (mut there, mut words, mut answers) = (VecDeque::<(u64, u64)>::new(), VecDeque::<(u64, u64)>::new(), VecDeque::<Vec<u8>>::new());
            let (mut waiting, mut heard) = (VecDeque::<Vec<u8>>::new(), vec![]);
            let (mut polled, mut lsns) = (0u64, vec![]);
            let mut finish = 0;
            let mut steps = steps.into_iter();
            loop {
                let (step, by) = match steps.next() {
                    Some(step) => step,
                    None if finish == 2000 => break,
                    None => { finish += 1; (1 + (finish % 4) as u8, 0) }
                };
                match step {
                    0 => if let Some(sequence) = window.take() {
                        sent.push_back(sequence);
                        there.push_back((sequence, polled));
                    },
                    1 => if let Some((sequence, returned)) = there.pop_front() {
                        prop_assert_eq!(sequence, shard.sequence + 1);
                        shard.receives.update(returned).unwrap();
                        shard.unheard.returned(returned);
                        prop_assert_eq!(shard.numbers.admit(sequence), Admit::Apply);
                        shard.lsn += 1 + u64::from(by % 3);
                        shard.numbers.applied(sequence, shard.lsn);
                        shard.applied.push(shard.lsn);
                        shard.sequence = sequence;
                        shard.history.acknowledged(sequence, shard.lsn);
                        words.push_back((sequence, shard.lsn));
                        if sequence % 3 == 0 { waiting.push_back(sequence.to_le_bytes().to_vec()); }
                    },
                    2 => if let Some((sequence, lsn)) = words.pop_front() {
                        ring[ack_offset(sequence) / 8] = ack_word(sequence, lsn);
                    },
                    3 => while let Some(sequence) = window.awaited() {
                        let Some(lsn) = acknowledged(ring[ack_offset(sequence) / 8], sequence) else { break };
                        window.acknowledge();
                        sent.pop_front();
                        lsns.push(lsn);
                    },
                    4 => {
                        if !waiting.is_empty() && shard.receives.take() {
                            let answer = waiting.pop_front().unwrap();
                            shard.unheard.posted(Some(answer.clone()));
                            answers.push_back(answer);
                        }
                        if let Some(answer) = answers.pop_front() {
                            polled += 1;
                            if !heard.contains(&answer) { heard.push(answer); }
                        }
                        // A message that only gives buffers back.
                        if there.is_empty() && shard.sequence == window.sent() {
                            shard.receives.update(polled).unwrap();
                            shard.unheard.returned(polled);
                        }
                    },
                    _ => {
                        // It breaks. Some words land, in any order; some answers are polled.
                        let lands = words.iter().enumerate().filter(|(at, _)| by >> (at % 8) & 1 == 1);
                        lands.for_each(|(_, (sequence, lsn))| ring[ack_offset(*sequence) / 8] = ack_word(*sequence, *lsn));
                        for _ in 0..by % 3 {
                            if let Some(answer) = answers.pop_front() && !heard.contains(&answer) { heard.push(answer); }
                        }
                        (words, answers, polled) = Default::default();
                        // It resumes.
                        shard.receives = Receives::new(4);
                        shard.unheard.take().rev().for_each(|answer| waiting.push_front(answer));
                        shard.history.iter().for_each(|(sequence, lsn)| ring[ack_offset(sequence) / 8] = ack_word(sequence, lsn));
                        while let Some(lsn) = window.awaited().and_then(|next| acknowledged(ring[ack_offset(next) / 8], next)) {
                            window.acknowledge();
                            sent.pop_front();
                            lsns.push(lsn);
                        }
                        let again = unprocessed(&window, shard.sequence).unwrap();
                        prop_assert!(again.clone().eq(sent.iter().copied()));
                        there = again.map(|sequence| (sequence, 0)).collect();
                    },
                }
            }
            prop_assert!(window.awaited().is_none());
            prop_assert_eq!(shard.applied.len() as u64, window.sent());
            prop_assert_eq!(&lsns, &shard.applied);
            let asked: Vec<_> = (1..=window.sent()).filter(|sequence| sequence % 3 == 0).map(|sequence| sequence.to_le_bytes().to_vec()).collect();
            prop_assert_eq!(heard, asked);
        }
    }
}
