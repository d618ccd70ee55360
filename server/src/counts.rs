//! The hot paths of a shard without threads, for counting instructions (callgrind): twice as many rounds cost twice as much, so
//! the difference of two runs is what the rounds cost.

use std::time::Duration;

use fervor_protocol::{
    ElementType, Model, Schema,
    batch::{BatchHeader, BatchWriter},
    limits::{CLIENT_RECEIVES, CONTROL_BYTES, MESSAGE_BYTES},
    wire::{Hello, Hold, Kind, MessageHeader, OpenTable},
};
use fervor_verbs::{
    Address, Error, Exclusive, Memory,
    transport::{
        Access, Completion, Endpoint, EndpointConfig, Listener, Region, Request, Runtime, Thread, Transport,
        any::Host,
    },
};
use zerocopy::IntoBytes;

use crate::{
    core::{ClientId, Due, Limits, Origin, ShardCore, region_header},
    peer::Peer,
    posting::Posting,
    staging::Staging,
};

/// Rows of the table.
pub const ROWS: u32 = 256;
/// Bytes of a row.
pub const ROW_BYTES: usize = 128;
/// Where the numbers of a batch are in its message.
const SEQUENCE: usize = std::mem::offset_of!(MessageHeader, sequence);
const NUMBER: usize = size_of::<MessageHeader>() + std::mem::offset_of!(BatchHeader, number);
const CLOCK: usize = size_of::<MessageHeader>() + std::mem::offset_of!(BatchHeader, clock);
/// Bytes of the images of the table.
const IMAGES: usize = ROWS as usize * (ROW_BYTES + 16);

/// Who holds copies of the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copies {
    /// Nobody: all read in place.
    None,
    /// Somebody READs: the images are sealed.
    Sealed,
    /// So many clients mirror the table.
    Mirrors(u32),
}

/// A shard whose clients are all in this process.
struct Shard {
    core: ShardCore,
    sequence: u64,
    message: Vec<u8>,
}

impl Shard {
    fn new(clients: u32, hold: Hold) -> Self {
        let memory = Exclusive::new("counts", region_header(1) + (1 << 20)).expect("memory");
        let limits = Limits { seats: 1, bookkeeping: 1 << 20, image: 1 << 14 };
        let mut core = ShardCore::new(memory, Origin::default(), limits);
        for client in 0..clients {
            core.join(ClientId(client), 1, (CONTROL_BYTES + IMAGES) as u64).expect("it joins");
            let width = (ROW_BYTES / 4) as u32;
            let schema = Schema {
                name: "t".into(),
                element: ElementType::F32,
                rows: ROWS.into(),
                width,
                model: Model::Essp { staleness: 0 },
                non_finite: false,
                continuous: 0,
            };
            let open = OpenTable { schema, shard: 0, shards: 1, hold };
            let header = MessageHeader::new(Kind::CreateTable, 0, 0, 1, 0);
            let message = [header.as_bytes(), &open.encode()].concat();
            core.handle(ClientId(client), &message, None::<&[u8]>).expect("it opens the table");
        }
        Self { core, sequence: 1, message: message() }
    }

    /// Client 0 adds to all rows, and ends a clock.
    fn add(&mut self) {
        self.sequence += 1;
        let (sequence, batch) = (self.sequence.to_le_bytes(), (self.sequence - 1).to_le_bytes());
        let numbers = [(SEQUENCE, sequence), (NUMBER, batch), (CLOCK, batch)];
        numbers.into_iter().for_each(|(at, number)| self.message[at..at + 8].copy_from_slice(&number));
        self.core.handle(ClientId(0), &self.message, None::<&[u8]>).expect("it is applied");
    }
}

/// A batch that adds to all rows.
fn message() -> Vec<u8> {
    let mut buffer = vec![0; MESSAGE_BYTES];
    let mut writer = BatchWriter::new(&mut buffer);
    let rows: Vec<u32> = (0..ROWS).collect();
    writer.rows(0, &rows, ROW_BYTES).copy_from_slice(vec![1f32; ROWS as usize * ROW_BYTES / 4].as_bytes());
    let length = writer.finish(Kind::Batch, 0, 0, 0, Some(0));
    buffer.truncate(length);
    buffer
}

/// Applies batches of all [`ROWS`] rows, `rounds` times.
pub fn apply(copies: Copies, rounds: u64) {
    let hold = if copies == Copies::None { Hold::InPlace } else { Hold::Slots };
    let mut shard = Shard::new(1, hold);
    (0..rounds).for_each(|_| shard.add());
}

/// The same, and pushes them to clients over shared memory, in runs.
///
/// # Errors
/// There is no place for a socket, or no memory.
pub fn push(clients: u32, rounds: u64) -> Result<(), Error> {
    let folder = std::env::temp_dir().join(format!("fervor-counts-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(Error::io("mkdir"))?;
    let address = Address::Shm(folder.join("s.sock"));
    let host = Host::for_addresses(std::slice::from_ref(&address))?;
    let mut endpoint = host.endpoint(&EndpointConfig { connections: 64, ..EndpointConfig::default() })?;
    let mut theirs = host.endpoint(&EndpointConfig { connections: 64, ..EndpointConfig::default() })?;
    let mut listener = host.listen(&address)?;
    let mut posting = Posting::<Host>::new(Staging::new(&host, 4 << 20)?, 1 << 20);
    let mut ends = Vec::new();
    for _ in 0..clients {
        let region =
            host.register(&Memory::new("counts-region", CONTROL_BYTES + IMAGES)?, Access::RemoteWrite)?;
        let mut hello = Hello::main(0);
        let remote = region.remote();
        (hello.key, hello.address, hello.length) = (remote.key, remote.address, remote.length);
        hello.receives = CLIENT_RECEIVES as u16;
        let (attach, address, transport) = (theirs.attach(), address.clone(), host.clone());
        let (give, take) = std::sync::mpsc::channel();
        let connecting = host.spawn("connecting", None, move || {
            let end = transport.connect(&attach, &address, &[], Duration::from_secs(5));
            let _ = give.send(end);
        })?;
        let request = listener.accept(Duration::from_secs(5))?.expect("it connects");
        let connection = request.accept(&endpoint.attach(), &[])?;
        connecting.join();
        ends.push((take.recv().expect("it has connected")?, region));
        let Ok(peer) = Peer::new(connection, &hello, 8) else { unreachable!("the handshake is good") };
        posting.add(peer);
    }
    let mut shard = Shard::new(clients, Hold::Mirror(CONTROL_BYTES as u64));
    let mut completions = Vec::new();
    for _ in 0..rounds {
        shard.add();
        let mut table = 0;
        while let Some(run) = shard.core.take_run(Due::Round, &mut table, posting.run_bytes()) {
            posting.push_run(&mut shard.core, &run);
        }
        posting.pump(&mut shard.core);
        endpoint.poll(&mut completions);
        for completion in completions.drain(..) {
            if let Completion::Work { connection, id, .. } = completion {
                let _ = connection;
                (0..clients).for_each(|client| posting.completed(ClientId(client), id));
            }
        }
        theirs.poll(&mut completions);
        completions.clear();
    }
    drop((posting, ends));
    std::fs::remove_dir_all(&folder).map_err(Error::io("rmdir"))
}
