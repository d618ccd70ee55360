//! Lanes that a session has announced.

use std::{sync::Arc, time::Instant};

use super::{
    line::{Line, Place},
    shared::BatchPlace,
};
use crate::{
    session::{
        Key, Way,
        wire::{LaneRails, Message, NamedRegion, Verdict, Wanted},
    },
    transport::MAX_REPLY_DATA,
};

/// What lanes have in common that were asked for in one message.
pub(super) struct Batch {
    pub(super) way: Way,
    /// Those that they may go by.
    pub(super) rails: LaneRails,
    /// The regions of the client.
    pub(super) regions: Vec<NamedRegion>,
    pub(super) key: Option<Arc<Key>>,
    pub(super) since: Instant,
    /// Among all messages that asked for lanes.
    pub(super) _place: BatchPlace,
}

/// A lane that a session has announced.
pub(super) struct Expected {
    pub(super) batch: Arc<Batch>,
    place: Place,
    pub(super) number: u32,
    pub(super) wanted: Wanted,
}

impl Expected {
    pub(super) fn new(batch: &Arc<Batch>, place: Place, number: u32, wanted: Wanted) -> Self {
        Self { batch: batch.clone(), place, number, wanted }
    }

    /// Its session.
    pub(super) fn line(&self) -> &Arc<Line> {
        self.place.line()
    }

    /// Says what has become of it. To a session that has ended nobody listens: the lane's own end will tell.
    pub(super) fn answer(self, verdict: Verdict, offer: Vec<u8>, regions: Vec<NamedRegion>, data: &[u8]) {
        let Self { place, number, .. } = self;
        let line = place.line().clone();
        // Before the client hears of it, and asks for the next ones.
        drop(place);
        let _ = line.say(&Message::Answer { number, verdict, offer, regions, data: data.to_vec() });
    }
}

/// What fits of a sentence into private data.
pub(super) fn sentence(text: &str) -> &[u8] {
    let mut length = text.len().min(MAX_REPLY_DATA);
    while !text.is_char_boundary(length) {
        length -= 1;
    }
    &text.as_bytes()[..length]
}
