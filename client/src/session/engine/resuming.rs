//! What the engine does when a connection ends, and when there is another one: see [`fervor_protocol::resume`].

use fervor_protocol::{
    limits::MESSAGE_BYTES,
    resume::unprocessed,
    wire::{MessageHeader, Welcome},
};
use fervor_verbs::transport::{Connection, Payload, Post, Region, Sge, Transport, WorkError};

use super::{Engine, Surroundings};
use crate::session::channel::{Sent, State};

impl<T: Transport> Engine<T> {
    /// The connection to a shard has ended, and nothing of it changes memory any more.
    pub(super) fn broken(&mut self, shard: usize, cause: WorkError, around: &Surroundings<'_, T::View>) {
        let (link, channel) = (&around.links[shard], &mut self.channels[shard]);
        let over = channel.state == State::Over;
        channel.break_off();
        if over {
            channel.state = State::Over;
            return;
        }
        if link.lease.is_zero() {
            return link.lose(cause);
        }
        // Said before, it is an error: nobody tries to come back.
        if link.end.get().is_none() {
            link.absence.begin(self.transport.now(), link.lease, cause.to_string());
        }
    }

    /// A thread has connected to a shard again: the shard will say where it goes on.
    pub fn attach(
        &mut self,
        shard: usize,
        connection: T::Connection,
        welcome: &Welcome,
        around: &Surroundings<'_, T::View>,
    ) {
        let (link, id) = (&around.links[shard], connection.id());
        assert!(self.channels[shard].state == State::Down, "one connection at a time");
        self.channels[shard].attach(connection);
        self.by_id.insert(id, shard);
        if !link.welcome.is_of_same_shard(welcome) {
            link.lose("it was started again: what it had is gone");
            self.disconnect(shard);
        }
        for completion in std::mem::take(&mut self.early) {
            self.complete(completion, around);
        }
    }

    pub(super) fn disconnect(&mut self, shard: usize) {
        self.channels[shard].connection.as_mut().map(T::Connection::disconnect);
    }

    /// A shard goes on, and has processed all messages up to `sequence`: it gets the others again.
    pub(super) fn resumed(&mut self, shard: usize, sequence: u64, around: &Surroundings<'_, T::View>) {
        let link = &around.links[shard];
        // The acknowledgements were posted before the message.
        self.take_acknowledgements(shard, around);
        let channel = &mut self.channels[shard];
        let again = match unprocessed(&channel.window, sequence) {
            Ok(again) => again,
            Err(text) => {
                link.lose(text);
                return self.disconnect(shard);
            }
        };
        channel.completed = sequence;
        channel.told = channel.polled;
        let connection = channel.connection.as_mut().expect("it has just said something");
        for (sequence, Sent { length, .. }) in again.zip(&channel.sent) {
            let buffer = (sequence % channel.window.credits()) as usize;
            let offset = self.buffers[shard] + buffer * MESSAGE_BYTES;
            // What was given back counts from the beginning of the connection.
            let returned = channel.polled.to_le_bytes();
            self.outbox.memory().write(offset + std::mem::offset_of!(MessageHeader, returned), &returned);
            let piece = Sge { region: &self.outbox, offset, length: *length };
            self.bytes_sent += *length as u64;
            // If it breaks again: as in `post`.
            let _ = connection.post(Post::Send {
                payload: Payload::Gather(&[piece]),
                immediate: None,
                signal: Some(sequence),
            });
        }
        let _ = connection.ring();
        channel.state = State::Up;
        link.absence.end();
    }
}
