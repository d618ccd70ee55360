//! Every bound of the protocol, with the relations between them proved at compile time.

/// First bytes of every handshake: "FRVR".
pub const MAGIC: u32 = u32::from_le_bytes(*b"FRVR");
/// Version of the protocol. Client and server must agree on it exactly.
pub const VERSION: u16 = 1;

/// Bytes before the data of a row: LSN, included batch, clock, check.
pub const ROW_HEADER: usize = 32;
/// Rows start at multiples of this: a cache line, so that two rows never share one.
pub const ROW_ALIGN: usize = 64;
/// Greatest bytes of data in one row.
pub const MAX_ROW_BYTES: usize = 1 << 20;
/// Greatest number of rows of a table.
pub const MAX_ROWS: u64 = 1 << 32;
/// Longest name of a table, bytes of UTF-8.
pub const MAX_NAME: usize = 64;
/// Most shards over all servers of a job.
pub const MAX_SHARDS: usize = 256;

/// Words in a client's ring of acknowledgements for one shard.
pub const ACK_RING: usize = 64;
/// Bits of the sequence number in an acknowledgement word; the rest is the LSN.
pub const ACK_SEQUENCE_BITS: u32 = 16;
/// Most messages that a client may have on their way to one shard.
pub const MAX_CREDITS: usize = 32;

/// Bytes of a receive buffer of a shard: the greatest message.
pub const MESSAGE_BYTES: usize = 64 << 10;
/// Least that a server may say its greatest message is: a batch of one value, a schema and some slots fit.
pub const LEAST_MESSAGE: usize = 512;
/// Bytes of a receive buffer of a client: the greatest message from a server.
pub const REPLY_BYTES: usize = 512;
/// Receive buffers that a client grants each shard, for replies and immediates.
pub const CLIENT_RECEIVES: usize = 16;
/// Fewest that it may grant: one for everything, and one for the last word.
pub const LEAST_RECEIVES: usize = 2;

/// Bits of an immediate that carry a clock or a sequence number; the two above say which.
pub const IMMEDIATE_BITS: u32 = 30;

// An acknowledgement is never overwritten before it is read: no more messages are out than words are there.
const _: () = assert!(MAX_CREDITS <= ACK_RING);
// The low bits of a sequence number tell the messages apart that may share a word.
const _: () = assert!((ACK_RING as u64) < 1 << ACK_SEQUENCE_BITS);
const _: () = assert!(ROW_ALIGN.is_multiple_of(ROW_HEADER));
// Every column of a row can be named by a record, and a record of one value fits a message.
const _: () = assert!(MAX_ROW_BYTES <= u32::MAX as usize);
