//! The handshake: what a client says when it connects, and what a server answers.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::limits::{LEAST_MESSAGE, MAGIC, MAX_CREDITS, MESSAGE_BYTES, VERSION};

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// A client's messages, and the shard's pushes to it. The first one of a client.
    Main = 0,
    /// READs of one worker.
    Reader = 1,
}

/// Private data of a connection request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Hello {
    magic: u32,
    version: u16,
    role: u8,
    /// 1: the client only reads, an [observer](crate::clock); 0: it takes part in the job, if its key allows that.
    pub observes: u8,
    /// The shard of this server that is wanted.
    pub shard: u16,
    /// Clients in the job.
    pub clients: u16,
    /// Key of the region that the shard may write.
    pub key: u32,
    /// The region's address.
    pub address: u64,
    /// The region's length.
    pub length: u64,
    /// The client's identity, by which it may [resume](crate::resume); 0: it will not.
    pub identity: u64,
    /// Byte offset in the region of this shard's control block.
    pub control: u32,
    /// Receive buffers granted to the shard.
    pub receives: u16,
    /// Number of the attempt to resume; 0: the client is new.
    pub attempt: u16,
}

const _: () = assert!(size_of::<Hello>() == 48);

impl Hello {
    /// A reader's.
    pub fn reader(shard: u16) -> Self {
        Self {
            magic: MAGIC,
            version: VERSION,
            role: Role::Reader as u8,
            observes: 0,
            shard,
            clients: 0,
            key: 0,
            address: 0,
            length: 0,
            identity: 0,
            control: 0,
            receives: 0,
            attempt: 0,
        }
    }

    /// A client's main connection; the fields that are public are to be filled in.
    pub fn main(shard: u16) -> Self {
        Self { role: Role::Main as u8, ..Self::reader(shard) }
    }

    /// With another version, for tests of the refusal.
    pub fn with_version(self, version: u16) -> Self {
        Self { version, ..self }
    }

    /// Reads a handshake.
    ///
    /// # Errors
    /// Why it is refused: to be sent back as the private data of the refusal.
    pub fn parse(data: &[u8]) -> Result<(Self, Role), Refusal> {
        let (hello, _) =
            Self::read_from_prefix(data).map_err(|_| Refusal::new("not a handshake of Fervor"))?;
        if hello.magic != MAGIC {
            return Err(Refusal::new("not a handshake of Fervor"));
        }
        if hello.version != VERSION {
            let text = format!(
                "protocol versions differ: server {VERSION}, client {}; install the same",
                hello.version
            );
            return Err(Refusal::new(&text));
        }
        if hello.observes > 1 {
            return Err(Refusal::new(&format!(
                "observes = {} in the handshake: 0 or 1 is possible",
                hello.observes
            )));
        }
        match hello.role {
            0 => Ok((hello, Role::Main)),
            1 => Ok((hello, Role::Reader)),
            _ => Err(Refusal::new("the handshake has an unknown role")),
        }
    }
}

/// Private data of an acceptance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Welcome {
    magic: u32,
    version: u16,
    /// Shards of this server.
    pub shards: u16,
    /// Of this server: equal in all its answers, different from other servers'.
    pub server: u64,
    /// The shard clock.
    pub clock: u64,
    /// Address of the shard's region, for READs.
    pub address: u64,
    /// Length of the shard's region.
    pub length: u64,
    /// Key of the shard's region.
    pub key: u32,
    /// Messages that the client may have out.
    pub credits: u16,
    /// 1: the client only reads: it said so, or its key does; 0: it takes part in the job.
    pub observes: u8,
    reserved: u8,
    /// Bytes of the greatest message.
    pub message_bytes: u32,
    /// How long the server keeps a client whose connection broke, milliseconds.
    pub lease: u32,
    /// The client's messages and batches are numbered from the next number on.
    pub origin: u64,
}

const _: () = assert!(size_of::<Welcome>() == 64);

impl Welcome {
    /// For the least that a server can grant; the other public fields are zero.
    pub fn new() -> Self {
        Self {
            magic: MAGIC,
            version: VERSION,
            shards: 0,
            server: 0,
            clock: 0,
            address: 0,
            length: 0,
            key: 0,
            credits: 1,
            observes: 0,
            reserved: 0,
            message_bytes: LEAST_MESSAGE as u32,
            lease: 0,
            origin: 0,
        }
    }

    /// Reads an acceptance.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(data: &[u8]) -> Result<Self, String> {
        let (welcome, _) =
            Self::read_from_prefix(data).map_err(|_| "the answer is not a handshake of Fervor".to_owned())?;
        if welcome.magic != MAGIC {
            return Err("the answer is not a handshake of Fervor".into());
        }
        if welcome.version != VERSION {
            return Err(format!(
                "protocol versions differ: client {VERSION}, server {}; install the same",
                welcome.version
            ));
        }
        if welcome.credits == 0 || welcome.credits as usize > MAX_CREDITS {
            return Err(format!(
                "it grants {} messages on their way: 1 to {MAX_CREDITS} are possible",
                welcome.credits
            ));
        }
        if welcome.observes > 1 {
            return Err(format!("observes = {} in its answer: 0 or 1 is possible", welcome.observes));
        }
        if (welcome.message_bytes as usize) < LEAST_MESSAGE || welcome.message_bytes as usize > MESSAGE_BYTES
        {
            return Err(format!(
                "its messages have up to {} bytes: {LEAST_MESSAGE} to {MESSAGE_BYTES} are possible",
                welcome.message_bytes
            ));
        }
        Ok(welcome)
    }
}

impl Welcome {
    /// Whether `other` is of the same shard of the same run of a server.
    pub fn is_of_same_shard(&self, other: &Self) -> bool {
        Self { clock: 0, ..*self } == Self { clock: 0, ..*other }
    }
}

impl Default for Welcome {
    fn default() -> Self {
        Self::new()
    }
}

/// Why a connection is refused: text, in the private data of the refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal(pub String);

impl Refusal {
    /// With `text`, cut to what fits.
    pub fn new(text: &str) -> Self {
        let mut end = text.len().min(MAX_REFUSAL);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Self(text[..end].to_owned())
    }

    /// The private data.
    pub fn encode(&self) -> Vec<u8> {
        [&MAGIC.to_le_bytes(), self.0.as_bytes()].concat()
    }

    /// The text in the private data of a refusal.
    pub fn parse(data: &[u8]) -> Self {
        match data.strip_prefix(&MAGIC.to_le_bytes()[..]) {
            Some(text) => Self(String::from_utf8_lossy(text).into_owned()),
            None => Self(
                "it gave no reason: it has no place for another connection (start it with more --clients or \
                 --lanes), or it is no Fervor server"
                    .into(),
            ),
        }
    }
}

/// Longest text of a refusal, bytes.
const MAX_REFUSAL: usize = 120;
