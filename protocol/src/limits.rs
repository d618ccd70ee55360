//! Every bound of the protocol, with the relations between them proved at compile time.

/// First bytes of every handshake: "FRVR".
pub const MAGIC: u32 = u32::from_le_bytes(*b"FRVR");
/// Version of the protocol. Client and server must agree on it exactly.
pub const VERSION: u16 = 4;

/// Bytes before the data of an image: version, check.
pub const ROW_HEADER: usize = 16;
/// Images start at multiples of this.
pub const IMAGE_ALIGN: usize = 16;
/// Rows share an image as long as their data is no longer than this.
pub const BLOCK_BYTES: usize = 64;
/// Bits of a version that tell apart the rewrites of an image under one LSN.
pub const COUNT_BITS: u32 = 15;
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
/// Most indices, counts and columns in one batch, which a shard copies while it checks them. (A message has room for fewer; a
/// reference could name any number.)
pub const MAX_LISTED: u64 = 1 << 24;
/// Receive buffers that a client grants each shard, for replies and immediates.
pub const CLIENT_RECEIVES: usize = 16;
/// Fewest that it may grant: one for everything, and one for the last word.
pub const LEAST_RECEIVES: usize = 2;

/// Bytes of a client's control block for one shard: the acknowledgement ring, then three words.
///
/// ```text
/// │ ring of acknowledgements │ round of an even clock │ bytes pushed │ round of an odd clock │
/// ```
///
/// So one WRITE of two words closes a round of either kind, and tells the bytes pushed.
pub const CONTROL_BYTES: usize = (ACK_RING + 8) * 8;
/// Byte offset in the control block of the words that tell the LSN at which a round was closed.
pub const CONTROL_ROUNDS: usize = ACK_RING * 8;
/// Byte offset in the control block of the count of bytes pushed.
pub const CONTROL_PUSHED: usize = CONTROL_ROUNDS + 8;
/// Byte offset in the control block of a word that is used by a mutant alone.
pub const CONTROL_SPARE: usize = CONTROL_ROUNDS + 24;
/// Bytes at the start of a shard's region before the rings of announcements: the shard clock, on a cache line of its own.
pub const REGION_HEADER: usize = 128;
/// Bytes of a ring of announcements.
pub const ANNOUNCE_BYTES: usize = ACK_RING * 8;
/// A clock may rise by less than this at a time.
pub const MAX_CLOCK_JUMP: u64 = 1 << IMMEDIATE_BITS;

/// Bits of an immediate that carry a clock or a sequence number; the two above say which.
pub const IMMEDIATE_BITS: u32 = 30;

// An acknowledgement is never overwritten before it is read: no more messages are out than words are there.
const _: () = assert!(MAX_CREDITS <= ACK_RING);
// The low bits of a sequence number tell the messages apart that may share a word.
const _: () = assert!((ACK_RING as u64) < 1 << ACK_SEQUENCE_BITS);
// A version has the LSN of an acknowledgement, the count and the busy bit.
const _: () = assert!(64 - ACK_SEQUENCE_BITS + COUNT_BITS < 64);
const _: () = assert!(IMAGE_ALIGN.is_multiple_of(ROW_HEADER) && BLOCK_BYTES.is_multiple_of(8));
const _: () = assert!(CONTROL_BYTES.is_multiple_of(64) && CONTROL_SPARE + 8 <= CONTROL_BYTES);
// Every column of a row can be named by a record, and a record of one value fits a message.
const _: () = assert!(MAX_ROW_BYTES <= u32::MAX as usize);
