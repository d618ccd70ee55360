//! Those who are put out: they are told why, nobody listens to them any more, and their connection ends when they have taken that.
//!
//! Who takes nothing would keep its place for as long as it likes. So it has [`LAST_WORD`], and is hung up on after that.
//!
//! One kind has no place among the clients: a *stranger*, who says that it comes back, with an identity that is not known here (or not any
//! more). Anybody can make one up, as often as he likes. So there are [`STRANGERS`] places for them in all. Who finds none is hung up on
//! without a word. An honest one, that comes back to a server that was started again, tries once more.

use std::{collections::VecDeque, time::Duration};

use fervor_protocol::{
    clock::Departure,
    limits::REPLY_BYTES,
    wire::{Hello, Kind, MessageHeader, UNKNOWN},
};
use fervor_verbs::transport::{Connection, ConnectionId, Transport};
use zerocopy::IntoBytes;

use super::Poller;
use crate::{core::ClientId, peer::Peer};

/// How long who is put out may take to hear why: many round trips of a network that works. It needs a receive buffer for it, and
/// no thread that polls.
const LAST_WORD: Duration = Duration::from_secs(2);
/// Strangers that are told at a time.
const STRANGERS: usize = 8;

/// See the module.
#[derive(Debug, Default)]
pub struct Parting {
    /// Connections of those who were told, and when they are hung up on: in the order of both.
    told: VecDeque<(Duration, ConnectionId)>,
    strangers: usize,
}

impl Parting {
    /// When the next one is hung up on.
    pub fn next_end(&self) -> Option<Duration> {
        self.told.front().map(|(end, _)| *end)
    }

    /// A connection of one who was told has ended: there is nobody to hang up on.
    pub fn ended(&mut self, connection: ConnectionId) {
        self.told.retain(|(_, told)| *told != connection);
    }

    /// The connection of a stranger has ended.
    pub fn stranger_gone(&mut self) {
        self.strangers -= 1;
    }
}

impl<T: Transport> Poller<T> {
    /// Tells a client what it did wrong, listens to it no more, and ends the connection when it has been told.
    pub(super) fn condemn(&mut self, id: ClientId, text: &str) {
        self.condemn_as(id, 0, text);
    }

    fn condemn_as(&mut self, id: ClientId, flags: u8, text: &str) {
        let Some(peer) = self.posting.peer(id).filter(|peer| !peer.condemned) else { return };
        eprintln!("fervor-server: client {}: {text}", peer.number);
        peer.condemned = true;
        let header = MessageHeader::new(Kind::Fault, flags, 0, 0, 0);
        let mut last_word = [header.as_bytes(), text.as_bytes()].concat();
        last_word.truncate(REPLY_BYTES);
        peer.outbound.condemn(last_word);
        let connection = peer.connection_id();
        self.parting.told.extend(connection.map(|connection| (self.transport.now() + LAST_WORD, connection)));
        self.posting.list(id);
        self.core.leave(id, Departure::Died);
    }

    /// Tells somebody who cannot come back.
    pub(super) fn refuse(&mut self, mut connection: T::Connection, hello: &Hello, text: &str) {
        let number = connection.id();
        if self.parting.strangers == STRANGERS {
            connection.disconnect();
            return self.keep_as_lane(connection);
        }
        match Peer::new(connection, hello, self.share.credits) {
            Ok(mut peer) => {
                (peer.counted, peer.identity) = (false, 0);
                self.parting.strangers += 1;
                let id = self.posting.add(peer);
                self.clients.insert(number, id);
                self.condemn_as(id, UNKNOWN, text);
            }
            Err((_, mut connection)) => {
                connection.disconnect();
                self.keep_as_lane(connection);
            }
        }
    }

    /// Hangs up on those who have not taken their last word in time. How many.
    pub(super) fn hang_up(&mut self) -> usize {
        if self.parting.told.is_empty() {
            return 0;
        }
        let (now, mut over) = (self.transport.now(), 0);
        while let Some((end, connection)) = self.parting.told.front().copied()
            && end <= now
        {
            self.parting.told.pop_front();
            let peer = self.clients.get(&connection).copied().and_then(|id| self.posting.peer(id));
            if let Some(peer) = peer.filter(|peer| peer.condemned) {
                eprintln!("fervor-server: client {} does not take that: it is hung up on", peer.number);
                peer.disconnect();
                over += 1;
            }
        }
        over
    }
}
