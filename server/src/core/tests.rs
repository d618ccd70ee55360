//! The core by itself: one message at a time, and all orders of a few.

use fervor_protocol::{
    Element, ElementType, Model, Schema,
    ack::{ack_offset, ack_word, acknowledged},
    batch::{BatchWriter, SectionHeader},
    clock::Departure,
    limits::ROW_HEADER,
    row::{Header, Seal},
    wire::{
        Hold, Kind, MemoryHeader, MessageHeader, NOT_SEEN, NamedReply, OpenTable, PUSH_ONCE, ReleaseHeader,
        SUBSCRIBE, SlotRecord, TableReply, UNSUBSCRIBE,
    },
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::*;

mod applying;
mod opening;
mod orders;

/// Bytes of a client's region.
const REGION: usize = 4096;
const NOBODY: Option<&[u8]> = None;

fn schema(name: &str, element: ElementType, rows: u64, width: u32, model: Model) -> Schema {
    Schema { name: name.into(), element, rows, width, model, non_finite: false, continuous: 0 }
}

/// ESSP rows of 16 `i32`: an image each.
fn essp(name: &str, rows: u64) -> Schema {
    schema(name, ElementType::I32, rows, 16, Model::Essp { staleness: 1 })
}

/// A core, and what its clients say.
struct World {
    core: ShardCore,
    /// Messages sent, and batches, by client.
    sequences: [u64; 4],
    batches: [u64; 4],
}

impl World {
    fn new(bytes: usize) -> Self {
        Self::with(bytes, Origin::default(), 1 << 20)
    }

    fn with(bytes: usize, origin: Origin, bookkeeping: usize) -> Self {
        let memory = Exclusive::new("test", region_header(4) + bytes).unwrap();
        let core = ShardCore::new(memory, origin, Limits { seats: 4, bookkeeping, image: 2048 });
        Self { core, sequences: [origin.number; 4], batches: [origin.number; 4] }
    }

    fn join(&mut self, clients: u32) {
        for client in 0..clients {
            self.core.join(ClientId(client), clients as usize, REGION as u64).unwrap();
        }
    }

    fn say(&mut self, client: u32, kind: Kind, records: u32, body: &[u8]) -> Result<Effects, Fault> {
        let sequence = self.sequences[client as usize] + 1;
        let header = MessageHeader::new(kind, 0, records, sequence, 0);
        let effects = self.core.handle(ClientId(client), &[header.as_bytes(), body].concat(), NOBODY)?;
        self.sequences[client as usize] = sequence;
        Ok(effects)
    }

    /// The message of the next batch of a client.
    fn message(
        &mut self,
        client: u32,
        clock: Option<u64>,
        fill: impl FnOnce(&mut BatchWriter<'_>),
    ) -> Vec<u8> {
        let mut buffer = vec![0; 8192];
        let mut writer = BatchWriter::new(&mut buffer);
        fill(&mut writer);
        let (sequence, batch) = (self.sequences[client as usize] + 1, self.batches[client as usize] + 1);
        let length = writer.finish(Kind::Batch, sequence, 0, batch, clock);
        buffer.truncate(length);
        buffer
    }

    fn batch(
        &mut self,
        client: u32,
        clock: Option<u64>,
        fill: impl FnOnce(&mut BatchWriter<'_>),
    ) -> Result<u64, Fault> {
        let message = self.message(client, clock, fill);
        let effects = self.core.handle(ClientId(client), &message, NOBODY)?;
        self.sequences[client as usize] += 1;
        self.batches[client as usize] += 1;
        Ok(effects.lsn)
    }

    /// Adds `value` to all of some rows of 16 `i32`.
    fn add(&mut self, client: u32, clock: Option<u64>, rows: &[u32], value: i32) -> Result<u64, Fault> {
        let values = vec![value; 16 * rows.len()];
        self.batch(client, clock, |writer| writer.rows(0, rows, 64).copy_from_slice(values.as_bytes()))
    }

    fn open(&mut self, client: u32, schema: &Schema, hold: Hold) -> Result<Effects, Fault> {
        let open = OpenTable { schema: schema.clone(), shard: 0, shards: 1, hold };
        self.say(client, Kind::CreateTable, 0, &open.encode())
    }

    fn slot(&mut self, client: u32, image: u64, at: u64, wish: u32) -> Result<Effects, Fault> {
        self.say(client, Kind::Slots, 1, SlotRecord { image, slot: at, table: 0, wish }.as_bytes())
    }

    /// The answers that came, by client: kind and body.
    fn answers(&mut self) -> Vec<(u32, u8, Vec<u8>)> {
        let mut all = Vec::new();
        while let Some((client, answer)) = self.core.take_answer() {
            let header = MessageHeader::parse(&answer).unwrap();
            all.push((client.0, header.kind, answer[size_of::<MessageHeader>()..].to_vec()));
        }
        all
    }

    /// The text of the one refusal that came.
    fn refusal(&mut self) -> String {
        let answers = self.answers();
        assert!(answers.len() == 1 && answers[0].1 == Kind::Refused as u8, "{answers:?}");
        String::from_utf8(answers[0].2.clone()).unwrap()
    }

    /// An image as it is.
    fn image(&self, table: TableId, image: u64) -> (Header, Vec<u8>) {
        let place = self.core.place(&Run { table, images: image..image + 1 });
        let (header, data) = Header::read_from_prefix(self.core.bytes(place)).unwrap();
        (header, data[..self.core.image_bytes(table) - ROW_HEADER].to_vec())
    }

    /// First element of a row of 16 `i32`.
    fn value(&self, row: u64) -> i32 {
        i32::read_from_prefix(&self.image(0, row).1).unwrap().0
    }

    fn word(&self, offset: usize) -> u64 {
        u64::read_from_bytes(self.core.bytes(offset..offset + 8)).unwrap()
    }
}

#[test]
fn a_batch_is_refused_as_a_whole_and_changes_nothing() {
    let mut world = World::new(4096);
    world.join(2);
    world.open(0, &essp("t", 3), Hold::Slots).unwrap();
    world.open(1, &essp("t", 3), Hold::Slots).unwrap();
    world.add(0, Some(1), &[1], 5).unwrap();
    let bad = [
        (None, 0, vec![0, 3], "table `t`: record 0: row = 3"),
        (Some(1), 0, vec![0], "clock = 1 does not follow the client's last one, 1"),
        (Some(u64::MAX), 0, vec![0], "does not follow"),
        (None, 7, vec![0], "table 7: record 0: table = 7"),
    ];
    let before: Vec<_> = (0..3).map(|image| world.image(0, image)).collect();
    for (clock, table, rows, text) in bad {
        let fill = |writer: &mut BatchWriter<'_>| writer.rows(table, &rows, 64).fill(1);
        let fault = world.batch(0, clock, fill).unwrap_err().to_string();
        assert!(fault.contains(text), "{fault}: no {text}");
        assert_eq!(before, (0..3).map(|image| world.image(0, image)).collect::<Vec<_>>());
        assert_eq!((world.core.lsn(), world.word(0)), (1, 0));
    }
    world.batches[0] += 1;
    let fault = world.add(0, None, &[0], 1).unwrap_err().to_string();
    assert!(fault.contains("batch number = 3, but 2 is next"), "{fault}");
    // The honest one is not held up.
    world.core.leave(ClientId(0), Departure::Died);
    world.add(1, Some(4), &[0], 1).unwrap();
    assert_eq!((world.core.take_risen(), world.word(0)), (Some(4), 4));
}

#[test]
fn an_observer_holds_up_nobody_and_sends_no_batch() {
    let mut world = World::new(4096);
    // Of no job, and so before and beside one.
    assert_eq!(world.core.observe(ClientId(1), REGION as u64), 1);
    assert_eq!(world.core.join(ClientId(0), 1, REGION as u64), Ok(2));
    assert_eq!(world.core.observe(ClientId(2), REGION as u64), 3);
    world.open(0, &essp("t", 3), Hold::Slots).unwrap();
    world.open(1, &essp("t", 3), Hold::Mirror(64)).unwrap();
    world.add(0, Some(1), &[1], 5).unwrap();
    assert_eq!((world.core.take_risen(), world.word(0)), (Some(1), 1));
    // Neither updates nor the end of a clock: it has none.
    for rows in [&[][..], &[1]] {
        let fault = world.add(1, Some(2), rows, 5).unwrap_err().to_string();
        assert!(fault.contains("it only reads"), "{fault}");
    }
    assert_eq!((world.value(1), world.core.take_risen()), (5, None));
    world.core.leave(ClientId(1), Departure::Died);
    world.core.leave(ClientId(2), Departure::Left);
    world.add(0, Some(2), &[1], 5).unwrap();
    assert_eq!(world.core.take_risen(), Some(2));
}

#[test]
fn a_batch_that_comes_twice_is_acknowledged_as_it_was() {
    let mut world = World::new(4096);
    world.join(1);
    world.open(0, &essp("t", 3), Hold::Slots).unwrap();
    let first = world.add(0, Some(1), &[1], 5).unwrap();
    world.add(0, Some(2), &[1], 5).unwrap();
    world.batches[0] = 0;
    assert_eq!(world.add(0, Some(1), &[1], 5), Ok(first));
    assert_eq!((world.value(1), world.core.lsn()), (10, 2));
}

#[test]
fn announcements_are_for_those_whose_memory_is_seen() {
    let origin = Origin { lsn: (1 << 30) - 1, clock: (1 << 30) - 1, number: (1 << 16) - 1 };
    let mut world = World::with(4096, origin, 1 << 20);
    world.join(2);
    let memory = MemoryHeader { address: 1, length: 2, key: 3, reserved: 0 };
    world.say(0, Kind::Memory, 0, memory.as_bytes()).unwrap();
    let header = MessageHeader::new(Kind::Memory, 0, 0, world.sequences[1] + 1, 0);
    let message = [header.as_bytes(), memory.as_bytes()].concat();
    world.core.handle(ClientId(1), &message, Some(&[0u8; 64][..])).unwrap();
    world.sequences[1] += 1;
    let rings: Vec<_> =
        world.answers().iter().map(|answer| NamedReply::read_from_bytes(&answer.2).unwrap()).collect();
    assert_eq!(rings[0].announcements, NOT_SEEN);
    let ring = rings[1].announcements as usize;
    assert_eq!(ring, region_header(0).min(128));
    world.open(1, &essp("t", 3), Hold::InPlace).unwrap();
    for _ in 0..3 {
        let number = world.batches[1] + 1;
        let lsn = world.add(1, None, &[2], 1).unwrap();
        assert_eq!(acknowledged(world.word(ring + ack_offset(number)), number), Some(lsn));
        assert_eq!(world.word(ring + ack_offset(number)), ack_word(number, lsn));
    }
    assert_eq!((world.word(0), world.core.lsn()), (origin.clock, origin.lsn + 3));
    let again = world.say(1, Kind::Memory, 0, memory.as_bytes()).unwrap_err().to_string();
    assert!(again.contains("a second time"), "{again}");
}

#[test]
fn what_comes_out_of_order_or_after_the_farewell_is_a_fault() {
    let mut world = World::new(4096);
    world.join(1);
    world.sequences[0] = 4;
    let fault = world.say(0, Kind::Credit, 0, &[]).unwrap_err().to_string();
    assert!(fault.contains("sequence = 5, but 1 is next"), "{fault}");
    world.sequences[0] = 0;
    for kind in [Kind::Table, Kind::Refused, Kind::Fault, Kind::Named] {
        assert_eq!(world.say(0, kind, 0, &[]), Err(Fault::Kind(kind as u8)));
    }
    assert_eq!(world.say(0, Kind::Leave, 0, &[]).unwrap().left, Some(Departure::Left));
    let fault = world.say(0, Kind::Credit, 0, &[]).unwrap_err().to_string();
    assert!(fault.contains("kind = 4, but the client has left"), "{fault}");
    world.core.forget(ClientId(0));
    world.core.join(ClientId(0), 3, 64).unwrap();
    let dropped = MessageHeader::new(Kind::Leave, DROPPED, 0, 1, 0);
    let effects = world.core.handle(ClientId(0), dropped.as_bytes(), NOBODY).unwrap();
    assert_eq!(effects.left, Some(Departure::Died), "another may take its place in the job");
    world.core.join(ClientId(2), 3, 64).unwrap();
    assert!(world.core.join(ClientId(1), 2, 64).unwrap_err().to_string().contains("has 3 clients"));
}

#[test]
fn a_server_that_stops_puts_everybody_out_and_lets_nobody_go_on() {
    let mut world = World::new(4096);
    world.join(2);
    world.open(0, &essp("t", 3), Hold::InPlace).unwrap();
    world.add(0, Some(1), &[1], 1).unwrap();
    world.core.stop_clock();
    (0..2).for_each(|client| world.core.leave(ClientId(client), Departure::Died));
    assert_eq!((world.word(0), world.core.take_risen()), (0, None));
}

#[test]
fn batches_are_visible_when_no_copy_is_without_them() {
    let mut world = World::new(4096);
    world.join(3);
    let table = schema("v", ElementType::I32, 3, 16, Model::Vap { v0: 1.0 });
    world.open(0, &table, Hold::Mirror(0)).unwrap();
    world.open(1, &table, Hold::InPlace).unwrap();
    world.add(1, None, &[0], 1).unwrap();
    let told = |world: &mut World| {
        let mut told = Vec::new();
        world.core.follow_visible(|client, number| told.push((client.0, number)));
        told
    };
    assert_eq!(told(&mut world), [], "it has not been pushed");
    let run = world.core.take_run(Due::Batches, &mut 0, 1 << 14).unwrap();
    assert_eq!(run, Run { table: 0, images: 0..1 });
    world.core.wants_proof(ClientId(0));
    assert_eq!(world.core.take_run(Due::Batches, &mut 0, 1 << 14), None);
    assert_eq!(told(&mut world), []);
    world.core.proof_posted(ClientId(0));
    world.core.proof_done(ClientId(0), true);
    assert_eq!(told(&mut world), [(1, 1)]);
    // Those who read in place, or hold nothing, are not waited for.
    world.core.leave(ClientId(0), Departure::Left);
    world.add(1, None, &[0], 1).unwrap();
    assert_eq!(world.core.take_run(Due::Batches, &mut 0, 1 << 14), None, "nobody holds copies");
    assert_eq!(told(&mut world), [(1, 2)]);
}
