//! Handshake and messages.
//!
//! All structs are little-endian as they lie in memory, without implicit padding; sizes are asserted.
//!
//! | message | from | body |
//! |---|---|---|
//! | [`Kind::Batch`] | client | see [`batch`](crate::batch) |
//! | [`Kind::Slots`] | client | [`SlotRecord`]s: subscribe, unsubscribe, push once |
//! | [`Kind::CreateTable`] | client | [`TableHeader`], name |
//! | [`Kind::Credit`] | client | nothing: the header returns receive buffers |
//! | [`Kind::Leave`] | client | nothing: no more messages will come |
//! | [`Kind::Memory`] | client | [`MemoryHeader`]: where the slabs are that references will name |
//! | [`Kind::Reference`] | client | see [`batch`](crate::batch): updates that lie in the client's memory |
//! | [`Kind::Release`] | client | [`ReleaseHeader`]: an open is taken back |
//! | [`Kind::Named`] | server | [`NamedReply`]: whether it sees that memory |
//! | [`Kind::Table`] | server | [`TableReply`] |
//! | [`Kind::Refused`] | server | text: the message with that sequence was refused |
//! | [`Kind::Fault`] | server | text: the connection ends |
//! | [`Kind::Resumed`] | server | nothing: all messages up to that sequence have been processed; see [`resume`](crate::resume) |

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    element::ElementType,
    limits::MAX_NAME,
    schema::{Model, Schema, SchemaError},
};

mod handshake;

pub use handshake::{Hello, Refusal, Role, Welcome};

/// Kind of a message: its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Updates.
    Batch = 1,
    /// Subscriptions.
    Slots = 2,
    /// Create or join a table.
    CreateTable = 3,
    /// Receive buffers are given back.
    Credit = 4,
    /// The client leaves: its last message. See [`DROPPED`].
    Leave = 5,
    /// The client names the memory of its slabs.
    Memory = 6,
    /// Updates that lie in that memory.
    Reference = 7,
    /// The client takes an open back.
    Release = 8,
    /// A table is there.
    Table = 65,
    /// A request was refused.
    Refused = 66,
    /// The connection ends.
    Fault = 67,
    /// The memory has been named.
    Named = 68,
    /// A client that came back goes on where it was.
    Resumed = 69,
}

impl Kind {
    fn from_code(code: u8) -> Option<Self> {
        use Kind::*;
        let all = [
            Batch,
            Slots,
            CreateTable,
            Credit,
            Leave,
            Memory,
            Reference,
            Release,
            Table,
            Refused,
            Fault,
            Named,
            Resumed,
        ];
        all.into_iter().find(|k| *k as u8 == code)
    }
}

/// First bytes of every message.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MessageHeader {
    /// [`Kind`].
    pub kind: u8,
    /// Of the kind.
    pub flags: u8,
    /// Zero.
    pub reserved: u16,
    /// Number of records.
    pub records: u32,
    /// From a client: number of the message, from 1. From a server: the message that it answers.
    pub sequence: u64,
    /// From a client: receive buffers given back since the start.
    pub returned: u64,
}

const _: () = assert!(size_of::<MessageHeader>() == 24);

/// What is wrong with a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It ends too early.
    #[error("the message ends before its {field} (at byte {length})")]
    Short {
        /// What should be there.
        field: &'static str,
        /// Length of the message.
        length: usize,
    },
    /// It goes on after its end.
    #[error("{bytes} bytes follow the last record")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// A field of a record.
    #[error("record {record}: {field} = {value}: {limit} {what}")]
    Field {
        /// Which record, from 0.
        record: u32,
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The limit.
        limit: u64,
        /// What the limit is of.
        what: &'static str,
    },
    /// Something of a table.
    #[error("table {table}: {fault}")]
    Table {
        /// The shard's number of it.
        table: u32,
        /// What.
        fault: Box<Fault>,
    },
    /// A value.
    #[error("NaN or infinity in an update of row {row} of the shard")]
    NotFinite {
        /// The row's index in the shard.
        row: u64,
    },
    /// Its kind.
    #[error("kind = {0} is no kind of message")]
    Kind(u8),
    /// Something that depends on what came before.
    #[error("{0}")]
    State(String),
}

impl MessageHeader {
    /// A header.
    pub fn new(kind: Kind, flags: u8, records: u32, sequence: u64, returned: u64) -> Self {
        Self { kind: kind as u8, flags, reserved: 0, records, sequence, returned }
    }

    /// The header of `message`.
    ///
    /// # Errors
    /// It is too short.
    pub fn parse(message: &[u8]) -> Result<Self, Fault> {
        Self::read_from_prefix(message)
            .map(|(header, _)| header)
            .map_err(|_| Fault::Short { field: "header", length: message.len() })
    }

    /// Its kind.
    ///
    /// # Errors
    /// There is no such kind.
    pub fn kind(&self) -> Result<Kind, Fault> {
        Kind::from_code(self.kind).ok_or(Fault::Kind(self.kind))
    }
}

/// Flag of a [`Kind::Fault`]: the server does not know the client that wants to resume.
pub const UNKNOWN: u8 = 1;

/// Flag of a [`Kind::Leave`]: the client was dropped, and has not had its part in the job. It is as if it had died, but nobody waits for
/// its lease.
pub const DROPPED: u8 = 1;

/// Subscribe: the shard pushes the image now and whenever it has changed at the end of a clock.
pub const SUBSCRIBE: u32 = 0;
/// Unsubscribe: the immediate [`Closed`](crate::ack::Immediate::Closed) tells when the slot is free.
pub const UNSUBSCRIBE: u32 = 1;
/// Push the image once, now.
pub const PUSH_ONCE: u32 = 2;

/// A client's wish for one of its slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SlotRecord {
    /// Which image of the table.
    pub image: u64,
    /// Byte offset of the slot in the client's region.
    pub slot: u64,
    /// The shard's number of the table.
    pub table: u32,
    /// [`SUBSCRIBE`], [`UNSUBSCRIBE`] or [`PUSH_ONCE`].
    pub wish: u32,
}

const _: () = assert!(size_of::<SlotRecord>() == 24);

/// The [`SlotRecord`]s of a message.
///
/// # Errors
/// Its length is not that of the records that it announces.
pub fn slot_records(header: &MessageHeader, message: &[u8]) -> Result<Vec<SlotRecord>, Fault> {
    let body = &message[size_of::<MessageHeader>()..];
    let size = size_of::<SlotRecord>();
    if body.len() as u64 != u64::from(header.records) * size as u64 {
        return Err(Fault::Short { field: "slot records", length: message.len() });
    }
    Ok(body.chunks_exact(size).map(|c| SlotRecord::read_from_bytes(c).expect("chunks of its size")).collect())
}

/// How a client holds the rows of a table that lie in a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// In slots, or not at all: it READs.
    Slots,
    /// As a mirror of all its images, which begins at this byte of the client's region.
    Mirror(u64),
    /// It reads them in place.
    InPlace,
}

/// A schema on the wire; the name follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TableHeader {
    rows: u64,
    continuous: u64,
    base: u64,
    width: u32,
    parameter: u32,
    shard: u32,
    shards: u32,
    element: u8,
    model: u8,
    non_finite: u8,
    name_length: u8,
    hold: u8,
    reserved: [u8; 3],
}

const _: () = assert!(size_of::<TableHeader>() == 48);

/// A request to open a table.
#[derive(Debug, Clone, PartialEq)]
pub struct OpenTable {
    /// What the table is.
    pub schema: Schema,
    /// Number of this shard in the job's order of shards: the rows are dealt out by it.
    pub shard: u32,
    /// How many shards the job has.
    pub shards: u32,
    /// How the client holds the rows.
    pub hold: Hold,
}

impl OpenTable {
    /// The body of the message.
    pub fn encode(&self) -> Vec<u8> {
        let Self { schema, shard, shards, hold } = self;
        let (model, parameter) = schema.model.to_wire();
        let (hold, base) = match *hold {
            Hold::Slots => (0, 0),
            Hold::Mirror(base) => (1, base),
            Hold::InPlace => (2, 0),
        };
        let header = TableHeader {
            rows: schema.rows,
            continuous: schema.continuous,
            base,
            width: schema.width,
            parameter,
            shard: *shard,
            shards: *shards,
            element: schema.element as u8,
            model,
            non_finite: schema.non_finite.into(),
            name_length: schema.name.len() as u8,
            hold,
            reserved: [0; 3],
        };
        [header.as_bytes(), schema.name.as_bytes()].concat()
    }

    /// Reads what [`OpenTable::encode`] wrote, from the whole message.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(message: &[u8]) -> Result<Self, Fault> {
        let body = &message[size_of::<MessageHeader>()..];
        let (header, name) = TableHeader::read_from_prefix(body)
            .map_err(|_| Fault::Short { field: "schema", length: message.len() })?;
        let state = |text: String| Fault::State(text);
        let name = std::str::from_utf8(name).map_err(|_| state("the table's name is not UTF-8".into()))?;
        if name.len() != usize::from(header.name_length) || name.len() > MAX_NAME {
            return Err(state(format!(
                "name_length = {}, but the name has {} bytes",
                header.name_length,
                name.len()
            )));
        }
        let schema = Schema {
            name: name.to_owned(),
            element: ElementType::from_code(header.element)
                .ok_or_else(|| state(format!("element = {} is no element type", header.element)))?,
            rows: header.rows,
            width: header.width,
            model: Model::from_wire(header.model, header.parameter).ok_or_else(|| {
                state(format!("model = {}, {} is no model", header.model, header.parameter))
            })?,
            non_finite: header.non_finite != 0,
            continuous: header.continuous,
        };
        schema.check().map_err(|error: SchemaError| state(error.to_string()))?;
        if header.shard >= header.shards {
            return Err(state(format!(
                "shard = {} of {}: the first shard is 0",
                header.shard, header.shards
            )));
        }
        let hold = match header.hold {
            0 => Hold::Slots,
            1 => Hold::Mirror(header.base),
            2 => Hold::InPlace,
            hold => return Err(state(format!("hold = {hold} is no way to hold a table: 0 to 2 are"))),
        };
        Ok(Self { schema, shard: header.shard, shards: header.shards, hold })
    }
}

/// Answer to [`Kind::CreateTable`]: the mirror, if there is one, is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TableReply {
    /// Byte offset of the table's first image in the shard's region.
    pub offset: u64,
    /// The shard's number of the table.
    pub table: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<TableReply>() == 16);

/// Body of [`Kind::Memory`]: a region of the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemoryHeader {
    /// Its address.
    pub address: u64,
    /// Its length.
    pub length: u64,
    /// The key that lets the shard read it.
    pub key: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<MemoryHeader>() == 24);

/// Answer to [`Kind::Memory`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NamedReply {
    /// Byte offset of the client's ring of announcements in the shard's region; [`NOT_SEEN`] if the server does not see
    /// the memory: no references then.
    pub announcements: u64,
}

/// See [`NamedReply`].
pub const NOT_SEEN: u64 = u64::MAX;

/// Body of [`Kind::Release`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReleaseHeader {
    /// The shard's number of the table.
    pub table: u32,
    /// Zero.
    pub reserved: u32,
}

/// The body of `message`, which is a `T`.
///
/// # Errors
/// It has another length.
pub fn body<T: FromBytes>(message: &[u8], what: &'static str) -> Result<T, Fault> {
    let body = message.get(size_of::<MessageHeader>()..).unwrap_or_default();
    T::read_from_bytes(body).map_err(|_| Fault::Short { field: what, length: message.len() })
}

/// A message from the server: header and body.
pub fn reply(kind: Kind, sequence: u64, body: &[u8]) -> Vec<u8> {
    [MessageHeader::new(kind, 0, 0, sequence, 0).as_bytes(), body].concat()
}

#[cfg(test)]
mod tests;
