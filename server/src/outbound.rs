//! What waits to be posted to one client, and what goes first. It knows neither connections nor images.
//!
//! | order | what | why there |
//! |---|---|---|
//! | 1 | acknowledgements | they give credits back. They also tell a client which of its own updates a round contains, so they come before any push |
//! | 2 | answers | they are few, and somebody waits. (After a resumption that is the first one; the others wait for all that is owed, as a round does) |
//! | 3 | owed runs of mirrors, then slots | |
//! | 4 | `Closed` | it says that slots are free. That is so when all earlier WRITEs of this connection to them are visible |
//! | 5 | a proof, `Visible` | a READ behind all pushes |
//! | 6 | `Round` | last, and only when nothing is owed and no slot waits: it says that all of the round is there |
//!
//! | needs | acknowledgement | answer | push | proof | immediate |
//! |---|---|---|---|---|---|
//! | a request of the send queue | any | beyond the [`RESERVE`] | beyond it | beyond it | the last two are left for others |
//! | staging memory | | yes | yes | yes | |
//! | a receive buffer of the client | | yes | | | yes |
//!
//! So an acknowledgement waits for nothing but the send queue, which empties by itself.
//!
//! **A client that comes back** ([`fervor_protocol::resume`]) is told once more what it may not have heard. So what was posted is
//! remembered: the last acknowledgements, the answers until their receive buffers are given back, the last `Closed` and `Visible`.
//!
//! **Bounds.** Acknowledgements are bounded by the client's credits, answers by [`MAX_ANSWERS`], slots by its
//! subscriptions and [`MAX_ASKED`]. A client that exceeds one is at fault, and is told the numbers.

use std::collections::{BTreeSet, VecDeque};

use fervor_protocol::{
    ack::{Immediate, Receives},
    mutants::{Mutant, mutant},
    resume::{History, Unheard},
    wire::{self, Fault, Kind, MessageHeader},
};

use crate::core::{Slot, TableId};

/// Requests that pushes and answers leave free in the send queue for acknowledgements and immediates.
pub const RESERVE: usize = 8;
/// Answers that may wait for receive buffers of the client.
pub const MAX_ANSWERS: usize = 64;
/// Slots that may wait besides the subscribed ones.
pub const MAX_ASKED: usize = 4096;

/// What there is room for now, and what else is to go.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Free requests of the send queue.
    pub requests: usize,
    /// Whether staging memory can be had.
    pub staging: bool,
    /// Whether mirrors of the client are owed images.
    pub owed: bool,
    /// Whether some of those can be pushed now.
    pub payable: bool,
    /// Whether the client's copies are to be proved visible.
    pub proof: bool,
}

impl Room {
    /// Room for nothing.
    pub const NONE: Self = Self { requests: 0, staging: false, owed: false, payable: false, proof: false };
}

/// What to post next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// An acknowledgement of the message with this sequence, as of this LSN.
    Acknowledgement { sequence: u64, lsn: u64 },
    /// The first of the answers.
    Answer,
    /// A run that a mirror is owed.
    Owed,
    /// An image, to a slot.
    Slot(Slot),
    /// A READ that proves all pushes so far visible.
    Proof,
    /// An immediate that says this, and no more.
    Immediate(Immediate),
    /// The immediate of this clock, with the LSN of its round.
    Round { clock: u64, lsn: u64 },
}

/// See the module.
#[derive(Debug)]
pub struct Outbound {
    receives: Receives,
    credits: usize,
    acknowledgements: VecDeque<(u64, u64)>,
    answers: VecDeque<Vec<u8>>,
    slots: BTreeSet<Slot>,
    /// The slot that was pushed last: the next one is behind it, round and round.
    last_slot: Option<Slot>,
    closed: Option<u64>,
    visible: Option<u64>,
    round: Option<(u64, u64)>,
    /// The one answer that is left is the last word.
    condemned: bool,
    /// What was said that a client which comes back may not have heard.
    history: History,
    unheard: Unheard,
    last_closed: Option<u64>,
    last_visible: Option<u64>,
    /// The answer that a client which came back gets before anything else but acknowledgements.
    resumed: Option<Vec<u8>>,
    /// It has come back, and not all that it lost is made up for.
    refilling: bool,
}

impl Outbound {
    /// To a client that grants so many receive buffers, and may have `credits` messages unacknowledged.
    pub fn new(receives: usize, credits: usize) -> Self {
        Self {
            receives: Receives::new(receives),
            credits,
            acknowledgements: VecDeque::new(),
            answers: VecDeque::new(),
            slots: BTreeSet::new(),
            last_slot: None,
            closed: None,
            visible: None,
            round: None,
            condemned: false,
            history: History::new(credits),
            unheard: Unheard::default(),
            last_closed: None,
            last_visible: None,
            resumed: None,
            refilling: false,
        }
    }

    /// The client has come back, grants so many receive buffers, and has had all messages up to `sequence` processed: says again what
    /// it may not have heard. `slots`: those that are to be pushed.
    pub fn resume(&mut self, receives: usize, sequence: u64, slots: impl IntoIterator<Item = Slot>) {
        self.receives = Receives::new(receives);
        for answer in self.unheard.take().rev() {
            self.answers.push_front(answer);
        }
        self.acknowledgements = self.history.iter().collect();
        self.resumed = Some(wire::reply(Kind::Resumed, sequence, &[]));
        // What was asked for once is asked for again.
        self.slots = slots.into_iter().collect();
        (self.closed, self.visible) = (self.last_closed, self.last_visible);
        self.refilling = !mutant(Mutant::AnswersBeforeRefill);
    }

    /// Forgets that the last message was acknowledged: only a mutant does. Whether there was one.
    pub fn forget_last(&mut self) -> bool {
        let any = self.history.iter().next().is_some();
        self.history.forget_last();
        any
    }

    /// A message of the client is here.
    ///
    /// # Errors
    /// It is beyond the client's credits (messages whose acknowledgements are posted are not counted); it gives back what was
    /// not used; too many answers wait.
    pub fn admit(&mut self, header: &MessageHeader) -> Result<(), Fault> {
        let out = self.acknowledgements.len() + 1;
        if out > self.credits {
            return Err(Fault::State(format!(
                "sequence = {} is the {out}th message that is not acknowledged: credits = {}",
                header.sequence, self.credits
            )));
        }
        self.receives.update(header.returned).map_err(Fault::State)?;
        self.unheard.returned(header.returned);
        if self.answers.len() >= MAX_ANSWERS {
            return Err(Fault::State(format!(
                "{} answers wait for receive buffers, of which returned = {}: at most {MAX_ANSWERS} may",
                self.answers.len(),
                header.returned
            )));
        }
        Ok(())
    }

    /// Message `sequence` is acknowledged as of `lsn`.
    pub fn acknowledge(&mut self, sequence: u64, lsn: u64) {
        self.acknowledgements.push_back((sequence, lsn));
        self.history.acknowledged(sequence, lsn);
    }

    /// An answer, at most [`fervor_protocol::limits::REPLY_BYTES`] long.
    pub fn answer(&mut self, answer: Vec<u8>) {
        self.answers.push_back(answer);
    }

    /// The first answer, which is posted now.
    pub fn first_answer(&self) -> &[u8] {
        self.resumed.as_ref().or(self.answers.front()).map_or(&[], Vec::as_slice)
    }

    /// An image waits for its slot.
    pub fn push_slot(&mut self, slot: Slot) {
        self.slots.insert(slot);
    }

    /// It waits no more.
    pub fn stop_slot(&mut self, slot: &Slot) {
        self.slots.remove(slot);
    }

    /// No slot of this table waits any more.
    pub fn stop_table(&mut self, table: TableId) {
        self.slots.retain(|slot| slot.table != table);
    }

    /// Number of slots that wait.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Slots given up by messages up to this one are to be told free.
    pub fn close(&mut self, sequence: u64) {
        self.closed = Some(sequence);
        self.last_closed = self.closed;
    }

    /// The client's batches up to this number are visible.
    pub fn tell_visible(&mut self, number: u64) {
        self.visible = Some(number);
        self.last_visible = self.visible;
    }

    /// A round is to be closed. It takes the place of one that could not be yet.
    pub fn close_round(&mut self, clock: u64, lsn: u64) {
        self.round = Some((clock, lsn));
    }

    /// Nothing goes any more but the last word.
    pub fn condemn(&mut self, last_word: Vec<u8>) {
        self.condemned = true;
        self.resumed = None;
        self.answers.clear();
        self.answers.push_back(last_word);
        self.stop();
    }

    /// The client sends nothing more, and is pushed nothing more.
    pub fn stop(&mut self) {
        self.slots.clear();
        (self.closed, self.visible, self.round) = (None, None, None);
    }

    /// Whether the next answer is the last word.
    pub fn is_last_word(&self) -> bool {
        self.condemned
    }

    /// Whether anything waits, but for what mirrors are owed.
    pub fn is_busy(&self) -> bool {
        !self.acknowledgements.is_empty()
            || !self.answers.is_empty()
            || self.resumed.is_some()
            || !self.slots.is_empty()
            || self.closed.is_some()
            || self.visible.is_some()
            || self.round.is_some()
    }

    /// What goes next, if there is room for it.
    pub fn next(&self, room: Room) -> Option<Item> {
        if let Some(&(sequence, lsn)) = self.acknowledgements.front() {
            return (room.requests > 0).then_some(Item::Acknowledgement { sequence, lsn });
        }
        let staged = room.requests > RESERVE && room.staging;
        if staged && self.resumed.is_some() && self.can_tell() {
            return Some(Item::Answer);
        }
        let all_posted = !room.owed && self.slots.is_empty();
        let answers = !self.answers.is_empty() && (all_posted || !self.refilling);
        if staged && (self.condemned && !self.answers.is_empty() || answers && self.can_tell()) {
            return Some(Item::Answer);
        }
        if staged && room.payable {
            return Some(Item::Owed);
        }
        if staged && !self.slots.is_empty() {
            return self.next_slot().map(Item::Slot);
        }
        if room.proof && all_posted && staged {
            return Some(Item::Proof);
        }
        if room.requests <= 2 || !self.can_tell() {
            return None;
        }
        if let Some(sequence) = self.closed {
            return Some(Item::Immediate(Immediate::Closed(sequence)));
        }
        if let Some(number) = self.visible {
            return Some(Item::Immediate(Immediate::Visible(number)));
        }
        let (clock, lsn) = self.round?;
        (all_posted || mutant(Mutant::RoundBeforeQueue)).then_some(Item::Round { clock, lsn })
    }

    /// It has been posted.
    pub fn posted(&mut self, item: Item) {
        match item {
            Item::Acknowledgement { .. } => drop(self.acknowledgements.pop_front()),
            Item::Answer if self.resumed.is_some() => {
                self.receives.take();
                self.unheard.posted(None);
                self.resumed = None;
            }
            Item::Answer => {
                if self.condemned {
                    self.receives.take_last();
                } else {
                    self.receives.take();
                }
                let answer = self.answers.pop_front();
                self.unheard.posted(answer);
            }
            Item::Slot(slot) => {
                self.slots.remove(&slot);
                self.last_slot = Some(slot);
            }
            Item::Immediate(immediate) => {
                self.receives.take();
                self.unheard.posted(None);
                match immediate {
                    Immediate::Closed(_) => self.closed = None,
                    Immediate::Visible(_) => self.visible = None,
                    Immediate::Round(_) => self.round = None,
                }
            }
            Item::Round { .. } => {
                self.receives.take();
                self.unheard.posted(None);
                self.round = None;
                // It is the last of what was made up for.
                self.refilling = false;
            }
            Item::Owed | Item::Proof => {}
        }
    }

    fn can_tell(&self) -> bool {
        self.receives.clone().take()
    }

    fn next_slot(&self) -> Option<Slot> {
        use std::ops::Bound::{Excluded, Unbounded};
        let behind = self.last_slot.and_then(|last| self.slots.range((Excluded(last), Unbounded)).next());
        behind.or_else(|| self.slots.first()).copied()
    }
}

#[cfg(test)]
mod tests {
    use fervor_protocol::wire::Kind;

    use super::*;

    const ROOM: Room = Room { requests: 100, staging: true, owed: false, payable: false, proof: false };

    fn slot(image: u64) -> Slot {
        Slot { table: 0, image, at: 64 * image }
    }

    /// Everything that goes, in order, with mirrors that are owed `owed` runs.
    fn all(outbound: &mut Outbound, mut owed: usize, mut proof: bool) -> Vec<Item> {
        let mut items = Vec::new();
        while let Some(item) = outbound.next(Room { owed: owed > 0, payable: owed > 0, proof, ..ROOM }) {
            outbound.posted(item);
            owed -= usize::from(item == Item::Owed);
            proof &= item != Item::Proof;
            items.push(item);
        }
        items
    }

    fn full() -> Outbound {
        let mut outbound = Outbound::new(16, 8);
        outbound.close_round(9, 70);
        outbound.tell_visible(3);
        outbound.close(5);
        outbound.push_slot(slot(2));
        outbound.push_slot(slot(1));
        outbound.answer(vec![1]);
        outbound.acknowledge(4, 60);
        outbound.acknowledge(5, 61);
        outbound
    }

    #[test]
    fn acknowledgements_go_first_and_the_round_last() {
        let mut outbound = full();
        assert!(outbound.is_busy());
        let expected = [
            Item::Acknowledgement { sequence: 4, lsn: 60 },
            Item::Acknowledgement { sequence: 5, lsn: 61 },
            Item::Answer,
            Item::Owed,
            Item::Owed,
            Item::Slot(slot(1)),
            Item::Slot(slot(2)),
            Item::Proof,
            Item::Immediate(Immediate::Closed(5)),
            Item::Immediate(Immediate::Visible(3)),
            Item::Round { clock: 9, lsn: 70 },
        ];
        assert_eq!(all(&mut outbound, 2, true), expected);
        assert!(!outbound.is_busy());
    }

    #[test]
    fn a_round_waits_for_what_is_owed_and_for_slots() {
        let mut outbound = Outbound::new(16, 8);
        outbound.close_round(9, 70);
        assert_eq!(outbound.next(Room { owed: true, ..ROOM }), None, "it is owed, and cannot be had yet");
        outbound.push_slot(slot(1));
        assert_eq!(outbound.next(Room { staging: false, ..ROOM }), None);
        assert_eq!(outbound.next(Room { requests: RESERVE, ..ROOM }), None);
        outbound.stop_slot(&slot(1));
        outbound.close_round(11, 80);
        assert_eq!(outbound.next(ROOM), Some(Item::Round { clock: 11, lsn: 80 }));
    }

    #[test]
    fn what_needs_a_receive_buffer_waits_for_it_and_holds_up_nothing_else() {
        let mut outbound = Outbound::new(2, 8);
        for image in 0..3 {
            outbound.answer(vec![0]);
            outbound.push_slot(slot(image));
        }
        let first = all(&mut outbound, 0, false);
        assert_eq!(first, [Item::Answer, Item::Slot(slot(0)), Item::Slot(slot(1)), Item::Slot(slot(2))]);
        outbound.close_round(1, 1);
        assert_eq!(outbound.next(ROOM), None, "one buffer is kept for the last word");
        outbound.admit(&MessageHeader::new(Kind::Credit, 0, 0, 1, 1)).unwrap();
        assert_eq!(outbound.next(ROOM), Some(Item::Answer));
        outbound.condemn(vec![9]);
        assert_eq!(outbound.first_answer(), [9]);
        assert_eq!(all(&mut outbound, 0, false), [Item::Answer]);
    }

    #[test]
    fn with_a_full_send_queue_only_acknowledgements_go() {
        let mut outbound = full();
        for requests in [1, 2, RESERVE] {
            let room = Room { requests, owed: true, payable: true, proof: true, ..ROOM };
            assert!(matches!(outbound.next(room), Some(Item::Acknowledgement { .. })));
        }
        assert_eq!(outbound.next(Room { requests: 0, ..ROOM }), None);
        outbound.posted(Item::Acknowledgement { sequence: 4, lsn: 60 });
        outbound.posted(Item::Acknowledgement { sequence: 5, lsn: 61 });
        assert_eq!(outbound.next(Room { requests: 2, ..ROOM }), None);
        assert_eq!(
            outbound.next(Room { requests: 3, ..ROOM }),
            Some(Item::Immediate(Immediate::Closed(5))),
            "which needs no staging, and so no room for it"
        );
    }

    #[test]
    fn a_client_that_comes_back_is_told_again_what_it_may_not_have_heard() {
        let mut outbound = Outbound::new(16, 2);
        for sequence in 1..=3 {
            outbound.acknowledge(sequence, 60 + sequence);
            outbound.answer(vec![sequence as u8]);
        }
        outbound.close(2);
        outbound.tell_visible(7);
        outbound.close_round(9, 70);
        outbound.push_slot(slot(1));
        let posted = all(&mut outbound, 0, false);
        assert_eq!(posted.len(), 3 + 3 + 1 + 3);
        // It has given back the buffer of the first answer.
        outbound.admit(&MessageHeader::new(Kind::Credit, 0, 0, 4, 1)).unwrap();
        outbound.answer(vec![4]);
        // What was asked for once waits for nobody.
        outbound.push_slot(slot(5));
        outbound.resume(16, 3, [slot(2)]);
        outbound.close_round(11, 80);
        let mut texts = Vec::new();
        let mut items = Vec::new();
        let mut owed = true;
        while let Some(item) = outbound.next(Room { owed, payable: owed, ..ROOM }) {
            if item == Item::Answer {
                texts.push(outbound.first_answer().to_vec());
            }
            owed &= item != Item::Owed;
            outbound.posted(item);
            items.push(item);
        }
        let expected = [
            // Of the last two messages: more cannot be out.
            Item::Acknowledgement { sequence: 2, lsn: 62 },
            Item::Acknowledgement { sequence: 3, lsn: 63 },
            Item::Answer,
            Item::Owed,
            Item::Slot(slot(2)),
            Item::Answer,
            Item::Answer,
            Item::Answer,
            Item::Immediate(Immediate::Closed(2)),
            Item::Immediate(Immediate::Visible(7)),
            Item::Round { clock: 11, lsn: 80 },
        ];
        assert_eq!(items, expected);
        assert_eq!(texts, [wire::reply(Kind::Resumed, 3, &[]), vec![2], vec![3], vec![4]]);
        // Receive buffers count anew.
        outbound.admit(&MessageHeader::new(Kind::Credit, 0, 0, 4, 7)).unwrap();
        assert!(outbound.admit(&MessageHeader::new(Kind::Credit, 0, 0, 5, 8)).is_err());
    }

    #[test]
    fn slots_take_turns() {
        let mut outbound = Outbound::new(16, 8);
        (0..3).for_each(|image| outbound.push_slot(slot(image)));
        let mut order = Vec::new();
        for _ in 0..5 {
            let Some(Item::Slot(next)) = outbound.next(ROOM) else { panic!("slots wait") };
            outbound.posted(Item::Slot(next));
            order.push(next.image);
            outbound.push_slot(next);
        }
        assert_eq!(order, [0, 1, 2, 0, 1]);
        outbound.stop_table(0);
        assert!(!outbound.is_busy());
    }

    #[test]
    fn a_client_beyond_its_credits_or_that_takes_no_answers_is_told_the_numbers() {
        let header = |sequence| MessageHeader::new(Kind::Credit, 0, 0, sequence, 0);
        let mut outbound = Outbound::new(16, 2);
        for sequence in 1..=2 {
            outbound.admit(&header(sequence)).unwrap();
            outbound.acknowledge(sequence, 0);
        }
        let fault = outbound.admit(&header(3)).unwrap_err().to_string();
        assert!(fault.contains("sequence = 3 is the 3th") && fault.contains("credits = 2"), "{fault}");
        let mut outbound = Outbound::new(2, 8);
        (0..MAX_ANSWERS).for_each(|_| outbound.answer(vec![0; 30]));
        let fault = outbound.admit(&header(1)).unwrap_err().to_string();
        assert!(fault.contains("64 answers wait") && fault.contains("returned = 0"), "{fault}");
    }
}
