//! A client written by hand, for what an honest one does not do: it says what it is told to say.

use std::time::Duration;

use fervor_protocol::{
    ack::{Immediate, Told, ack_offset, acknowledged},
    limits::MESSAGE_BYTES,
    wire::{Hello, Kind, MessageHeader, Refusal, Welcome},
};
use fervor_verbs::{
    Address, Error, Memory,
    transport::{
        Access, Completion, Connection, Endpoint, EndpointConfig, Payload, Post, Region, Sge, Transport,
    },
};
use zerocopy::IntoBytes;

/// How long it waits for an answer.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Messages that may lie in its outbox.
const OUTBOX: usize = 64;

/// Its connection to one shard.
pub struct Raw<T: Transport> {
    pub transport: T,
    pub endpoint: T::Endpoint,
    pub connection: T::Connection,
    /// Control block and slots, which the server writes.
    pub region: T::Region,
    outbox: T::Region,
    next: usize,
    pub sequence: u64,
    /// Messages and immediates that came, and how many of their receive buffers it says that it has given back.
    pub arrived: u64,
    pub returned: u64,
    pub welcome: Welcome,
    pub immediates: Vec<Immediate>,
    /// Kind, sequence and body of the answers.
    pub replies: Vec<(u8, u64, Vec<u8>)>,
    pub ended: bool,
}

impl<T: Transport> Raw<T> {
    /// Connects with `change` made to an honest handshake.
    ///
    /// # Errors
    /// The words of the refusal.
    pub fn try_connect(
        transport: &T,
        address: &Address,
        change: impl FnOnce(Hello) -> Vec<u8>,
    ) -> Result<Self, String> {
        Self::with_buffers(transport, address, EndpointConfig::default().receive_buffers, change)
    }

    /// The same, with so many receive buffers, whatever it says that it has.
    ///
    /// # Errors
    /// The words of the refusal.
    pub fn with_buffers(
        transport: &T,
        address: &Address,
        receive_buffers: usize,
        change: impl FnOnce(Hello) -> Vec<u8>,
    ) -> Result<Self, String> {
        let config = EndpointConfig { receive_size: 512, receive_buffers, ..EndpointConfig::default() };
        let endpoint = transport.endpoint(&config).unwrap();
        let region = Memory::new("raw", 1 << 20).unwrap();
        let region = transport.register(&region, Access::RemoteWrite).unwrap();
        let outbox = Memory::new("raw-out", OUTBOX * MESSAGE_BYTES).unwrap();
        let outbox = transport.register(&outbox, Access::Local).unwrap();
        let mut hello = Hello::main(0);
        let remote = region.remote();
        (hello.clients, hello.receives) = (1, 16);
        (hello.key, hello.address, hello.length) = (remote.key, remote.address, remote.length);
        let connected = transport.connect(&endpoint.attach(), address, &change(hello), 2 * PATIENCE);
        let (connection, welcome) = connected.map_err(|error| match error {
            Error::Refused { private_data, .. } => Refusal::parse(&private_data).0,
            error => panic!("{error}"),
        })?;
        let welcome = Welcome::parse(&welcome).unwrap();
        Ok(Self {
            transport: transport.clone(),
            endpoint,
            connection,
            region,
            outbox,
            next: 0,
            sequence: welcome.origin,
            arrived: 0,
            returned: 0,
            welcome,
            immediates: Vec::new(),
            replies: Vec::new(),
            ended: false,
        })
    }

    /// Connects with an honest handshake.
    pub fn connect(transport: &T, address: &Address) -> Self {
        Self::try_connect(transport, address, |hello| hello.as_bytes().to_vec()).unwrap()
    }

    /// Posts bytes, without ringing.
    pub fn post(&mut self, message: &[u8]) {
        let offset = self.next * MESSAGE_BYTES;
        self.next = (self.next + 1) % OUTBOX;
        self.outbox.memory().write(offset, message);
        let piece = [Sge { region: &self.outbox, offset, length: message.len() }];
        // A connection that the server has ended takes nothing more.
        let _ = self.connection.post(Post::Send {
            payload: Payload::Gather(&piece),
            immediate: None,
            signal: None,
        });
    }

    pub fn send(&mut self, message: &[u8]) {
        self.post(message);
        let _ = self.connection.ring();
    }

    /// The next message, with an honest header.
    pub fn message(&mut self, kind: Kind, records: u32, body: &[u8]) -> Vec<u8> {
        self.sequence += 1;
        let header = MessageHeader::new(kind, 0, records, self.sequence, self.returned);
        [header.as_bytes(), body].concat()
    }

    pub fn poll(&mut self) {
        let mut completions = Vec::new();
        self.endpoint.poll(&mut completions);
        for completion in completions {
            match completion {
                Completion::Received { buffer, .. } => {
                    self.arrived += 1;
                    let message = self.endpoint.message(&buffer).to_vec();
                    self.endpoint.release(buffer);
                    let header = MessageHeader::parse(&message).unwrap();
                    let body = message[size_of::<MessageHeader>()..].to_vec();
                    self.replies.push((header.kind, header.sequence, body));
                }
                Completion::WriteImmediate { immediate, .. } => {
                    self.arrived += 1;
                    let (round, origin) = (self.welcome.clock, self.welcome.origin);
                    let told = Told { round, closed: origin, visible: origin };
                    self.immediates.push(Immediate::decode(immediate, &told).unwrap());
                }
                Completion::Disconnected { .. } => self.ended = true,
                Completion::Work { .. } => {}
            }
        }
    }

    /// Polls until `done` gives something.
    pub fn until<X>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<X>) -> X {
        let end = self.transport.now() + PATIENCE;
        let mut turn = 0;
        loop {
            self.poll();
            if let Some(found) = done(self) {
                return found;
            }
            assert!(self.transport.now() < end, "waited in vain for {what}; replies: {:?}", self.replies);
            self.transport.relax(turn);
            turn += 1;
        }
    }

    /// The LSN with which message `sequence` is acknowledged. `None`: the connection has ended.
    pub fn answer(&mut self, sequence: u64) -> Option<u64> {
        self.until("an acknowledgement, or the end", |raw| {
            let lsn = acknowledged(raw.region.memory().load(ack_offset(sequence)), sequence);
            lsn.map(Some).or(raw.ended.then_some(None))
        })
    }

    /// The LSN with which message `sequence` is acknowledged.
    pub fn acknowledgement(&mut self, sequence: u64) -> u64 {
        self.until("an acknowledgement", |raw| {
            acknowledged(raw.region.memory().load(ack_offset(sequence)), sequence)
        })
    }

    /// The text with which the server ends the connection.
    pub fn fault(&mut self) -> String {
        self.until("the end", |raw| raw.ended.then_some(()));
        let fault = self.replies.iter().find(|(kind, ..)| *kind == Kind::Fault as u8);
        fault.map_or_else(String::new, |(_, _, text)| String::from_utf8(text.clone()).unwrap())
    }
}
