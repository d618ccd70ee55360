//! A session, as those see it who have something to say to the client; and a lane that it has announced.

use std::{
    io::Write,
    net::{Shutdown, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use crate::session::{
    Key, Way,
    noise::Cipher,
    wire::{LaneRails, Message, NamedRegion},
};

/// A session, as those see it who have something to say.
pub(super) struct Session(Mutex<End>);

struct End {
    socket: Arc<TcpStream>,
    cipher: Cipher,
}

impl Session {
    pub(super) fn new(socket: Arc<TcpStream>, cipher: Cipher) -> Self {
        Self(Mutex::new(End { socket, cipher }))
    }

    fn end(&self) -> MutexGuard<'_, End> {
        // A panic between cipher and socket leaves a frame unsaid: the next one is not understood, and ends the session.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn say(&self, message: &Message) -> Result<(), String> {
        let mut end = self.end();
        let frame = end.cipher.seal(&message.encode());
        match (&*end.socket).write(&frame) {
            Ok(count) if count == frame.len() => Ok(()),
            Ok(_) => Err("it does not read what it is told".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    pub(super) fn open(&self, frame: &[u8]) -> Result<Message, String> {
        let message = self.end().cipher.open(frame).map_err(|reason| reason.of_client().to_owned())?;
        Message::decode(&message).map_err(|error| error.to_string())
    }

    /// What has become of a lane. A session that cannot be told ends.
    pub(super) fn answer(&self, number: u32, accepted: bool, regions: Vec<NamedRegion>, data: &[u8]) {
        let answer = Message::Answer { number, accepted, regions, data: data.to_vec() };
        if self.say(&answer).is_err() {
            let _ = self.end().socket.shutdown(Shutdown::Both);
        }
    }
}

/// A lane that a session has announced.
pub(super) struct Expected {
    pub(super) session: Arc<Session>,
    pub(super) number: u32,
    pub(super) way: Way,
    /// Those that it may go by.
    pub(super) rails: LaneRails,
    pub(super) regions: Vec<NamedRegion>,
    pub(super) data: Vec<u8>,
    pub(super) key: Option<Arc<Key>>,
    pub(super) since: Instant,
}

impl Expected {
    /// Says what has become of it.
    pub(super) fn answer(&self, accepted: bool, regions: Vec<NamedRegion>, data: &[u8]) {
        self.session.answer(self.number, accepted, regions, data);
    }
}
