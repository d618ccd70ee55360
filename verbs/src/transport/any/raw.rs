//! A client of tests that says what it likes.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use crate::{
    rails::Rail,
    session::{
        Key, KeyRing, Way,
        noise::{Cipher, Initiator, Piece, piece, respond},
        wire::{LaneRails, Message, Offer, Process, Token, Wanted},
    },
    transport::host::strangers::OPENING,
};

const PATIENCE: Duration = Duration::from_secs(20);

/// The first message of process 42 of host `far`, which has one rail.
pub(super) fn hello() -> Message {
    let rail = Rail { name: "far0:1".to_owned(), megabits: 100, addresses: Vec::new() };
    let process = Process { host: "far".to_owned(), pid: 42 };
    Message::Hello { boot: [1; 16], process, rails: vec![rail] }
}

/// Asks for a lane with an offer.
pub(super) fn offering(first: u32, way: Way, rails: LaneRails) -> Message {
    let wanted = Wanted { offer: vec![1], data: Vec::new() };
    Message::Lanes { first, way, rails, regions: Vec::new(), lanes: vec![wanted] }
}

/// Asks for so many lanes by a way without rails.
pub(super) fn lanes(first: u32, way: Way, count: usize) -> Message {
    let wanted = Wanted { offer: Vec::new(), data: b"raw".to_vec() };
    Message::Lanes {
        first,
        way,
        rails: LaneRails::default(),
        regions: Vec::new(),
        lanes: vec![wanted; count],
    }
}

/// A client that says what it likes.
pub(super) struct Raw {
    pub(super) socket: TcpStream,
    pub(super) cipher: Cipher,
    heard: Vec<u8>,
}

impl Raw {
    pub(super) fn shake_hands(at: SocketAddr, key: Option<&Key>) -> Self {
        let mut socket = TcpStream::connect(at).unwrap();
        let (initiator, opening) = Initiator::start(key);
        socket.write_all(&opening).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut heard = Vec::new();
        let answer = Self::frame(&mut socket, &mut heard).unwrap();
        Self { socket, cipher: initiator.finish(&answer).ok().unwrap(), heard }
    }

    /// A raw client, and the socket and the cipher of its server.
    pub(super) fn pair(listener: &TcpListener) -> (Self, (TcpStream, Cipher)) {
        let connecting = listener.local_addr().unwrap();
        std::thread::scope(|scope| {
            let client = scope.spawn(move || Self::shake_hands(connecting, None));
            let (mut socket, _) = listener.accept().unwrap();
            let mut opening = [0; OPENING];
            socket.read_exact(&mut opening).unwrap();
            let (cipher, answer, _) = respond(&KeyRing::default(), &opening).ok().unwrap();
            socket.write_all(&answer).unwrap();
            (client.join().unwrap(), (socket, cipher))
        })
    }

    pub(super) fn frame(socket: &mut TcpStream, heard: &mut Vec<u8>) -> Option<Vec<u8>> {
        loop {
            if let Piece::Frame(length) = piece(heard) {
                let frame = heard[2..2 + length].to_vec();
                heard.drain(..2 + length);
                return Some(frame);
            }
            let mut bytes = [0; 4096];
            match socket.read(&mut bytes) {
                Ok(0) | Err(_) => return None,
                Ok(count) => heard.extend_from_slice(&bytes[..count]),
            }
        }
    }

    pub(super) fn say(&mut self, message: &Message) {
        let frame = self.cipher.seal(&message.encode());
        self.socket.write_all(&frame).unwrap();
    }

    /// Nothing but beats is left out. `None`: the session has ended.
    pub(super) fn hear(&mut self) -> Option<Message> {
        loop {
            let frame = Self::frame(&mut self.socket, &mut self.heard)?;
            match Message::decode(&self.cipher.open(&frame).unwrap()).unwrap() {
                Message::Beat => {}
                message => return Some(message),
            }
        }
    }

    /// A session with nothing asked for yet.
    pub(super) fn welcomed(at: SocketAddr, key: Option<&Key>) -> Self {
        let mut raw = Self::shake_hands(at, key);
        assert!(!raw.offers().is_empty());
        raw
    }

    /// Says hello, as process 42 of host `far`, and hears which ways there are.
    pub(super) fn offers(&mut self) -> Vec<Offer> {
        self.say(&hello());
        match self.hear() {
            Some(Message::Welcome { offers, .. }) => offers,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn ask(&mut self, number: u32, way: Way) -> Token {
        self.say(&lanes(number, way, 1));
        match self.hear() {
            Some(Message::Go { first, tokens }) if first == number && tokens.len() == 1 => tokens[0],
            other => panic!("{other:?}"),
        }
    }
}
