//! Acknowledgement words, credits, batch numbers and immediates: how nothing is lost and nothing counted
//! twice.
//!
//! **Messages.** A client numbers its messages to a shard 1, 2, 3 ... (the *sequence*). The shard takes them
//! in order. For each it writes one 8-byte word, the *acknowledgement*, into the client's ring, at `sequence
//! % ACK_RING`. The word has the low bits of the sequence, and the shard's LSN.
//!
//! An aligned word is written whole, and says which message it is for. So the client finds it in memory
//! without a completion, in whatever order the words become visible. It needs no receive buffer. So *an
//! acknowledgement can never wait for a credit*: the two sides cannot end up waiting for each other's
//! credits.
//!
//! **Credits.** A client has at most as many messages on their way as it was granted credits
//! ([`SendWindow`]). The acknowledgement of a message returns the receive buffer that the message used at the
//! shard. In the other direction, each reply and each immediate takes one of the receive buffers that the
//! client granted. Each message of the client says how many of them it has given back since the start
//! ([`Receives`]).
//!
//! **Rounds.** A WRITE with immediate closes the round of clock `C`. It also writes the shard's LSN of that
//! moment into one of two words at the client, together with the low bits of `C`. A later round may have
//! overwritten that word. The low bits let the client notice this ([`round_word`]).
//!
//! **Announcements.** For clients on its own host, a shard keeps rings of the same words in its exported
//! region. They say which batch is applied at which LSN, and are published *before* the first image is
//! changed. See [`inclusion`](crate::inclusion).
//!
//! **Batches.** They are numbered per client and shard, without gaps. [`BatchNumbers`] makes sure that each
//! is applied once.

use crate::{
    limits::{ACK_RING, ACK_SEQUENCE_BITS, CONTROL_PUSHED, CONTROL_ROUNDS, IMMEDIATE_BITS},
    mutants::{Mutant, mutant},
};

const LSN_BITS: u32 = 64 - ACK_SEQUENCE_BITS;

/// Byte offset of the word for message `sequence` in the ring.
pub fn ack_offset(sequence: u64) -> usize {
    (sequence % ACK_RING as u64) as usize * 8
}

/// The word that acknowledges message `sequence`, after which the shard stands at `lsn`. It holds `lsn + 1`,
/// so that no acknowledgement is the zero of a word that was never written.
pub fn ack_word(sequence: u64, lsn: u64) -> u64 {
    assert!(lsn + 1 < 1 << LSN_BITS, "LSN {lsn} has outgrown its {LSN_BITS} bits");
    sequence << LSN_BITS | (lsn + 1)
}

/// The LSN in `word`, if it acknowledges message `sequence`.
pub fn acknowledged(word: u64, sequence: u64) -> Option<u64> {
    if word >> LSN_BITS != sequence & ((1 << ACK_SEQUENCE_BITS) - 1) {
        return None;
    }
    (word & ((1 << LSN_BITS) - 1)).checked_sub(1)
}

/// Byte offset in the control block of the word that tells the LSN of the round of `clock`.
pub fn round_offset(clock: u64) -> usize {
    CONTROL_ROUNDS + 16 * (clock % 2) as usize
}

/// What one WRITE puts into the control block to close the round of `clock` as of `lsn`, after `pushed` bytes of pushes: byte offset
/// and words.
pub fn round_words(clock: u64, lsn: u64, pushed: u64) -> (usize, [u64; 2]) {
    let word = round_word(clock, lsn);
    if clock.is_multiple_of(2) { (CONTROL_ROUNDS, [word, pushed]) } else { (CONTROL_PUSHED, [pushed, word]) }
}

/// The word that tells that the round of `clock` was closed when the shard stood at `lsn`.
pub fn round_word(clock: u64, lsn: u64) -> u64 {
    ack_word(clock, lsn)
}

/// The LSN in `word`, if it is of the round of `clock`.
pub fn round_lsn(word: u64, clock: u64) -> Option<u64> {
    if mutant(Mutant::RoundWordUntagged) {
        return (word & ((1 << LSN_BITS) - 1)).checked_sub(1);
    }
    acknowledged(word, clock)
}

/// The client's side of its messages to one shard: how many may be out.
#[derive(Debug, Clone)]
pub struct SendWindow {
    credits: u64,
    sent: u64,
    acknowledged: u64,
}

impl SendWindow {
    /// With `credits` receive buffers granted.
    pub fn new(credits: usize) -> Self {
        assert!(credits > 0 && credits <= ACK_RING, "{credits} credits do not fit the ring of {ACK_RING}");
        Self { credits: credits as u64, sent: 0, acknowledged: 0 }
    }

    /// The same, with messages numbered from the one after `origin` on.
    pub fn starting_at(credits: usize, origin: u64) -> Self {
        Self { sent: origin, acknowledged: origin, ..Self::new(credits) }
    }

    /// Messages that may be sent now.
    pub fn room(&self) -> u64 {
        self.credits - (self.sent - self.acknowledged)
    }

    /// The receive buffers granted.
    pub fn credits(&self) -> u64 {
        self.credits
    }

    /// The sequence of a message that is sent now, if there is a credit.
    pub fn take(&mut self) -> Option<u64> {
        (self.room() > 0).then(|| {
            self.sent += 1;
            self.sent
        })
    }

    /// The message whose acknowledgement is next, if one is out.
    pub fn awaited(&self) -> Option<u64> {
        (self.acknowledged < self.sent).then_some(self.acknowledged + 1)
    }

    /// The awaited message has been acknowledged.
    pub fn acknowledge(&mut self) {
        assert!(self.acknowledged < self.sent, "nothing is out to be acknowledged");
        self.acknowledged += 1;
    }

    /// Sequence of the last message sent, 0 if none.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Sequence up to which all messages are acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }
}

/// The server's side of what it sends to a client: replies and immediates, each of which takes a receive buffer. One is kept
/// for the last word: a client that is told a fault is no longer listened to, so it could not give back one for that.
#[derive(Debug, Clone)]
pub struct Receives {
    granted: u64,
    used: u64,
    returned: u64,
}

impl Receives {
    /// With `granted` receive buffers of the client, at least [`LEAST_RECEIVES`](crate::limits::LEAST_RECEIVES).
    pub fn new(granted: usize) -> Self {
        Self { granted: granted as u64, used: 0, returned: 0 }
    }

    /// Takes one, if there is one besides the last.
    pub fn take(&mut self) -> bool {
        let free = self.used - self.returned + 1 < self.granted;
        self.used += u64::from(free);
        free
    }

    /// Takes the one that is kept for the last word.
    ///
    /// # Panics
    /// If it has been taken: there is one last word.
    pub fn take_last(&mut self) {
        self.used += 1;
        assert!(self.used - self.returned <= self.granted, "a second last word");
    }

    /// The client says that it has given back `total` since the start.
    ///
    /// # Errors
    /// It cannot have: it was not sent so many, or said more before.
    pub fn update(&mut self, total: u64) -> Result<(), String> {
        if total > self.used || total < self.returned {
            return Err(format!(
                "returned = {total}, but {} receive buffers were used and {} had been returned",
                self.used, self.returned
            ));
        }
        self.returned = total;
        Ok(())
    }
}

/// What to do with a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admit {
    /// It is the next one: apply it.
    Apply,
    /// It has been applied: acknowledge it again, and do nothing.
    Duplicate {
        /// The LSN at which it was applied: a later one would tell the client that copies which contain it do not.
        lsn: u64,
    },
    /// One before it is missing, or it is older than any that could come again: refuse it.
    Gap {
        /// The number that should have come.
        expected: u64,
    },
}

/// The numbers of one client's batches at a shard.
#[derive(Debug, Clone)]
pub struct BatchNumbers {
    origin: u64,
    applied: u64,
    /// LSNs of the last batches, by number: as many as can be out, and so come again.
    lsns: [u64; ACK_RING],
}

impl Default for BatchNumbers {
    fn default() -> Self {
        Self { origin: 0, applied: 0, lsns: [0; ACK_RING] }
    }
}

impl BatchNumbers {
    /// With batches numbered from the one after `origin` on.
    pub fn starting_at(origin: u64) -> Self {
        Self { origin, applied: origin, ..Self::default() }
    }

    /// What to do with batch `number`. Numbers start at 1.
    pub fn admit(&self, number: u64) -> Admit {
        if number > self.origin && number <= self.applied && self.applied - number < ACK_RING as u64 {
            Admit::Duplicate { lsn: self.lsns[number as usize % ACK_RING] }
        } else if number == self.applied + 1 || mutant(Mutant::GapAccepted) {
            Admit::Apply
        } else {
            Admit::Gap { expected: self.applied + 1 }
        }
    }

    /// Batch `number` has been applied at `lsn`.
    pub fn applied(&mut self, number: u64, lsn: u64) {
        assert_eq!(self.admit(number), Admit::Apply);
        self.applied = number;
        self.lsns[number as usize % ACK_RING] = lsn;
    }

    /// Takes the last batch for not applied: only a mutant does.
    pub fn forget_last(&mut self) {
        self.applied = self.applied.saturating_sub(1).max(self.origin);
    }

    /// Number of the last batch applied.
    pub fn last(&self) -> u64 {
        self.applied
    }
}

/// What the immediate of a WRITE says. All earlier WRITEs of the connection are visible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Immediate {
    /// A round is closed: the copies of all subscribed rows contain every update stamped below this clock.
    Round(u64),
    /// Every WRITE caused by messages up to this sequence is visible: slots given up there may be used again.
    Closed(u64),
    /// The client's batches up to this number are visible: at every client that holds a row of them.
    Visible(u64),
}

/// The last numbers that immediates told, by which the next ones are widened.
#[derive(Debug, Clone, Copy, Default)]
pub struct Told {
    /// Clock of the last round.
    pub round: u64,
    /// Sequence of the last `Closed`.
    pub closed: u64,
    /// Batch number of the last `Visible`.
    pub visible: u64,
}

impl Immediate {
    /// Its 32 bits: two that tell the kind, and the low bits of the number.
    pub fn encode(self) -> u32 {
        let (kind, number) = match self {
            Self::Round(clock) => (0, clock),
            Self::Closed(sequence) => (1, sequence),
            Self::Visible(number) => (2, number),
        };
        kind << IMMEDIATE_BITS | (number & ((1 << IMMEDIATE_BITS) - 1)) as u32
    }

    /// The immediate of `bits`, given what was told before: numbers only grow, and by less than 2^30 at a time.
    ///
    /// # Errors
    /// The bits, if they are of no kind.
    pub fn decode(bits: u32, told: &Told) -> Result<Self, u32> {
        let low = u64::from(bits) & ((1 << IMMEDIATE_BITS) - 1);
        let after = |last: u64| last + (low.wrapping_sub(last) & ((1 << IMMEDIATE_BITS) - 1));
        match bits >> IMMEDIATE_BITS {
            0 => Ok(Self::Round(after(told.round))),
            1 => Ok(Self::Closed(after(told.closed))),
            2 => Ok(Self::Visible(after(told.visible))),
            _ => Err(bits),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn batches_are_applied_once_and_in_order() {
        let mut numbers = BatchNumbers::default();
        assert_eq!(numbers.admit(1), Admit::Apply);
        numbers.applied(1, 40);
        assert_eq!(numbers.admit(1), Admit::Duplicate { lsn: 40 });
        assert_eq!(numbers.admit(2), Admit::Apply);
        assert_eq!(numbers.admit(3), Admit::Gap { expected: 2 });
        assert_eq!(numbers.admit(0), Admit::Gap { expected: 2 });
        for number in 2..=1000 {
            numbers.applied(number, number + 40);
        }
        assert_eq!(numbers.admit(1000 - 63), Admit::Duplicate { lsn: 1040 - 63 });
        assert_eq!(numbers.admit(1000 - 64), Admit::Gap { expected: 1001 });
    }

    #[test]
    fn receive_buffers_that_were_not_used_cannot_be_returned() {
        let mut receives = Receives::new(3);
        assert!(receives.take() && receives.take() && !receives.take());
        assert!(receives.update(3).unwrap_err().contains("returned = 3"));
        receives.update(1).unwrap();
        assert!(receives.take() && !receives.take());
        assert!(receives.update(0).is_err());
        receives.take_last();
    }

    proptest! {
        #[test]
        fn a_word_is_for_its_message_alone(sequence in 1u64..1 << 50, lsn in 0u64..(1 << LSN_BITS) - 1, ring in 1u64..1000) {
            let word = ack_word(sequence, lsn);
            prop_assert_eq!(acknowledged(word, sequence), Some(lsn));
            // The next message that uses the same word does not take it for its own.
            prop_assert_eq!(acknowledged(word, sequence + ring * ACK_RING as u64), None);
            prop_assert_eq!(acknowledged(0, sequence), None);
        }

        #[test]
        fn the_window_never_exceeds_its_credits(credits in 1usize..=ACK_RING, steps in proptest::collection::vec(any::<bool>(), 1..500)) {
            let mut window = SendWindow::new(credits);
            let mut out = 0u64;
            for send in steps {
                if send {
                    prop_assert_eq!(window.take().is_some(), out < credits as u64);
                    out = (out + 1).min(credits as u64);
                } else if window.awaited().is_some() {
                    window.acknowledge();
                    out -= 1;
                }
                prop_assert_eq!(window.room(), credits as u64 - out);
            }
        }

        #[test]
        fn immediates_widen(last in 0u64..1 << 50, by in 0u64..1 << IMMEDIATE_BITS) {
            let n = last + by;
            let zero = Told { round: 7, closed: 7, visible: 7 };
            for (told, sent) in [
                (Told { round: last, ..zero }, Immediate::Round(n)),
                (Told { closed: last, ..zero }, Immediate::Closed(n)),
                (Told { visible: last, ..zero }, Immediate::Visible(n)),
            ] {
                prop_assert_eq!(Immediate::decode(sent.encode(), &told), Ok(sent));
            }
            prop_assert!(Immediate::decode(3 << IMMEDIATE_BITS, &zero).is_err());
        }
    }
}
