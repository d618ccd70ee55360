//! What a shard knows of one client, except its connection.

use std::collections::BTreeSet;

use fervor_protocol::{
    ack::BatchNumbers,
    limits::IMAGE_ALIGN,
    wire::{Fault, MessageHeader},
};

use crate::access::Grant;

use super::{id::TableId, visible::Visibility};

/// See the module.
#[derive(Debug)]
pub struct Client {
    /// Its entry in the vector clock, never used again.
    pub number: u64,
    /// It only reads, and has no entry there.
    pub observes: bool,
    /// Sequence of its last message.
    pub sequence: u64,
    pub batches: BatchNumbers,
    /// Bytes of its region, which the shard may write.
    region: u64,
    /// Its ring of announcements, if it reads in place.
    pub seat: Option<usize>,
    /// It has named its memory, whether the server sees it or not.
    pub named: bool,
    /// It said that it leaves, or it was put out.
    pub left: bool,
    /// Tables of which its mirrors are owed images.
    pub owed: BTreeSet<TableId>,
    /// Images that it has subscribed to.
    pub subscriptions: usize,
    /// Tables that it has asked for and that are not ready.
    pub opening: usize,
    pub visible: Visibility,
    /// What it may do.
    pub grant: Grant,
}

impl Client {
    /// One whose messages and batches are numbered from the one after `origin` on.
    pub fn new(number: u64, region: u64, origin: u64) -> Self {
        Self {
            number,
            observes: false,
            sequence: origin,
            batches: BatchNumbers::starting_at(origin),
            region,
            seat: None,
            named: false,
            left: false,
            owed: BTreeSet::new(),
            subscriptions: 0,
            opening: 0,
            visible: Visibility::default(),
            grant: Grant::default(),
        }
    }

    /// Checks that the message is the one that should come.
    ///
    /// # Errors
    /// It is another, or none should come any more.
    pub fn expect(&self, header: &MessageHeader) -> Result<(), Fault> {
        let next = self.sequence + 1;
        if header.sequence != next {
            return Err(Fault::State(format!("sequence = {}, but {next} is next", header.sequence)));
        }
        if self.left {
            return Err(Fault::State(format!("kind = {}, but the client has left", header.kind)));
        }
        Ok(())
    }

    /// Whether images may be written to `length` bytes from `offset` of its region on.
    pub fn reaches(&self, offset: u64, length: u64) -> bool {
        let end = offset.checked_add(length);
        offset.is_multiple_of(IMAGE_ALIGN as u64) && end.is_some_and(|end| end <= self.region)
    }
}
