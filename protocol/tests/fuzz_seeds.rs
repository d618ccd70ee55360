//! The seeds of the fuzz targets (`fuzz/seeds`) are made here, by the encoders: so they are in the present format, and what a
//! target does with each is known. After a change of the format, write them again:
//!
//! ```text
//! FERVOR_WRITE_SEEDS=1 cargo test -p fervor-protocol --test fuzz_seeds
//! ```

use std::{collections::BTreeMap, fs, path::Path};

use fervor_protocol::{
    ElementType, Model, Schema,
    ack::{Immediate, Told},
    batch::{Batch, BatchWriter, CELLS, PART, ROWS, SectionHeader, Shape, Target},
    wire::{
        self, Hello, Hold, Kind, MemoryHeader, MessageHeader, OpenTable, Refusal, ReleaseHeader, Role,
        SlotRecord, Welcome,
    },
};
use zerocopy::IntoBytes;

/// What `fuzz_targets/batch.rs` takes the tables for: two of each type, the second of which takes NaN and infinity.
fn shape(table: u32) -> Option<Shape> {
    let types = [ElementType::F32, ElementType::F64, ElementType::I32, ElementType::I64];
    let element = *types.get(table as usize / 2)?;
    Some(Shape { element, images: 4, width: WIDTH as u32, non_finite: table % 2 == 1 })
}

const WIDTH: usize = 9;
const F32: u32 = 0;
const F32_ANY: u32 = 1;
const F64: u32 = 2;
const F64_ANY: u32 = 3;
const I32: u32 = 4;
const I64: u32 = 6;

/// A seed of `batch`: how long the message is that names memory (0: it carries its updates), the message, the memory.
fn batch(kind: Kind, clock: Option<u64>, memory: &[u8], fill: impl FnOnce(&mut BatchWriter<'_>)) -> Vec<u8> {
    let mut message = vec![0; 1024];
    let mut writer = BatchWriter::new(&mut message);
    fill(&mut writer);
    let length = writer.finish(kind, 1, 0, 1, clock);
    message.truncate(length);
    let said = if kind == Kind::Reference { u8::try_from(length).expect("a short message") } else { 0 };
    [&[said], &message[..], memory].concat()
}

fn rows() -> Vec<u8> {
    batch(Kind::Batch, Some(4), &[], |writer| {
        writer.rows(F32, &[2, 0], 4 * WIDTH).copy_from_slice([1.0f32; 2 * WIDTH].as_bytes());
        writer.rows(I64, &[3], 8 * WIDTH).copy_from_slice([-7i64; WIDTH].as_bytes());
    })
}

fn cells() -> Vec<u8> {
    batch(Kind::Batch, None, &[], |writer| {
        writer.cells(F64, &[1, 3], &[2, 1], &[0, 8, 5], &[1.0f64, 2.0, -3.0]);
        writer.cells(I32, &[0], &[3], &[3, 4, 4], &[7, 8, 9]);
    })
}

fn mixed() -> Vec<u8> {
    batch(Kind::Batch, Some(9), &[], |writer| {
        writer.rows(F32_ANY, &[1], 4 * WIDTH).copy_from_slice([f32::NAN; WIDTH].as_bytes());
        writer.part(I32, 3, 4, 5, [1i32, 2, 3, 4, 5].as_bytes());
        writer.cells(F64_ANY, &[2], &[1], &[7], &[f64::INFINITY]);
    })
}

fn reference() -> Vec<u8> {
    let mut memory = [0u8; 128];
    // Two rows at 0, whose values are at 8; a part of row 1 at 80, from 88 on; two cells of row 3 at 104, from 120 on.
    memory[..8].copy_from_slice([2u32, 0].as_bytes());
    memory[8..80].copy_from_slice([0.5f32; 2 * WIDTH].as_bytes());
    memory[80..84].copy_from_slice(1u32.as_bytes());
    memory[88..104].copy_from_slice([1.0f64, 2.0].as_bytes());
    memory[104..120].copy_from_slice([3u32, 2, 0, 8].as_bytes());
    memory[120..].copy_from_slice([10i32, 11].as_bytes());
    batch(Kind::Reference, Some(2), &memory, |writer| {
        let section = |table, kind, count, total, rows_at, values_at| SectionHeader {
            table,
            kind,
            count,
            total,
            rows_at,
            values_at,
        };
        writer.refer(section(F32, ROWS, 2, 0, 0, 8));
        writer.refer(section(F64, PART, 2, 7, 80, 88));
        writer.refer(section(I32, CELLS, 1, 2, 104, 120));
    })
}

fn hello() -> Hello {
    let mut hello = Hello::main(1);
    (hello.clients, hello.key, hello.address, hello.length) = (7, 3, 1 << 20, 1 << 28);
    (hello.control, hello.receives) = (4096, 16);
    hello
}

fn welcome() -> Welcome {
    let mut welcome = Welcome::new();
    (welcome.shards, welcome.server, welcome.clock, welcome.origin) = (2, 9, 5, 3);
    (welcome.address, welcome.length, welcome.key, welcome.credits) = (1 << 20, 1 << 28, 7, 8);
    welcome
}

fn slots() -> [SlotRecord; 3] {
    let record = |image, slot, wish| SlotRecord { image, slot, table: 1, wish };
    [record(5, 64, wire::SUBSCRIBE), record(6, 128, wire::UNSUBSCRIBE), record(7, 192, wire::PUSH_ONCE)]
}

fn table(model: Model, continuous: u64, hold: Hold) -> OpenTable {
    let (name, element) = ("L".to_owned(), ElementType::F32);
    let schema = Schema { name, element, rows: 10, width: 4, model, non_finite: true, continuous };
    OpenTable { schema, shard: 0, shards: 2, hold }
}

fn mirrored() -> OpenTable {
    table(Model::Essp { staleness: 3 }, 1_000_000, Hold::Mirror(4096))
}

fn bounded() -> OpenTable {
    table(Model::Vap { v0: 2.5 }, 0, Hold::Slots)
}

const MEMORY: MemoryHeader = MemoryHeader { address: 1 << 32, length: 1 << 24, key: 11, reserved: 0 };
const RELEASE: ReleaseHeader = ReleaseHeader { table: 1, reserved: 0 };
/// What is told after [`LAST`] of its kind.
const CLOSED: Immediate = Immediate::Closed(105);
const LAST: u64 = 99;

/// A message that is no batch.
fn message(kind: Kind, records: usize, body: &[u8]) -> Vec<u8> {
    [MessageHeader::new(kind, 0, records as u32, 1, 0).as_bytes(), body].concat()
}

/// Every file below `fuzz/seeds`. The first byte of a seed of `messages` says which decoder takes it.
fn seeds() -> BTreeMap<String, Vec<u8>> {
    let batches = [("rows", rows()), ("cells", cells()), ("mixed", mixed()), ("reference", reference())];
    let messages = [
        ("hello", 0, hello().as_bytes().to_vec()),
        ("hello-reader", 0, Hello::reader(1).as_bytes().to_vec()),
        ("welcome", 1, welcome().as_bytes().to_vec()),
        ("refusal", 2, Refusal::new("no").encode()),
        ("slots", 3, message(Kind::Slots, slots().len(), slots().as_bytes())),
        ("table-mirror", 3, message(Kind::CreateTable, 0, &mirrored().encode())),
        ("table-bounded", 3, message(Kind::CreateTable, 0, &bounded().encode())),
        ("memory", 3, message(Kind::Memory, 0, MEMORY.as_bytes())),
        ("release", 3, message(Kind::Release, 0, RELEASE.as_bytes())),
        // The target drops the lowest byte of what was told last.
        ("immediate", 4, [CLOSED.encode().to_le_bytes().as_slice(), &(LAST << 8).to_le_bytes()].concat()),
    ];
    let batches = batches.into_iter().map(|(name, seed)| (format!("batch/{name}"), seed));
    let messages = messages
        .into_iter()
        .map(|(name, which, bytes)| (format!("messages/{name}"), [&[which], bytes.as_slice()].concat()));
    batches.chain(messages).collect()
}

#[test]
fn the_files_are_what_the_encoders_write() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds");
    let seeds = seeds();
    let write = std::env::var_os("FERVOR_WRITE_SEEDS").is_some();
    let mut found = BTreeMap::new();
    for target in ["batch", "messages"] {
        let folder = root.join(target);
        if write {
            fs::remove_dir_all(&folder).unwrap();
            fs::create_dir(&folder).unwrap();
            for (path, seed) in seeds.range(format!("{target}/")..format!("{target}0")) {
                fs::write(root.join(path), seed).unwrap();
            }
        }
        for file in fs::read_dir(&folder).unwrap() {
            let file = file.unwrap();
            let name = file.file_name().into_string().unwrap();
            found.insert(format!("{target}/{name}"), fs::read(file.path()).unwrap());
        }
    }
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(&seeds));
    for (path, seed) in &seeds {
        assert!(found[path] == *seed, "fuzz/seeds/{path} is in another format: see the top of this file");
    }
}

/// Checks that a seed of `batch` is accepted, as the updates that it is meant to be.
fn reads(seed: &[u8], clock: Option<u64>, expected: &[(u32, Target<'_>)]) {
    let (&length, rest) = seed.split_first().unwrap();
    let (message, memory) = if length > 0 { rest.split_at(length.into()) } else { (rest, &[][..]) };
    let header = MessageHeader::parse(message).unwrap();
    let mut batch = Batch::default();
    batch.read(&header, message, Some(memory), shape).unwrap();
    assert_eq!(batch.clock(), clock);
    let sections: Vec<_> = batch.sections().map(|section| (section.table, section.target)).collect();
    assert_eq!(sections, expected);
}

#[test]
fn batches_are_accepted() {
    reads(&rows(), Some(4), &[(F32, Target::Rows(&[2, 0])), (I64, Target::Rows(&[3]))]);
    let f64s = Target::Cells { rows: &[1, 3], counts: &[2, 1], columns: &[0, 8, 5] };
    let i32s = Target::Cells { rows: &[0], counts: &[3], columns: &[3, 4, 4] };
    reads(&cells(), None, &[(F64, f64s), (I32, i32s)]);
    let part = Target::Part { row: 3, start: 4, count: 5 };
    let cell = Target::Cells { rows: &[2], counts: &[1], columns: &[7] };
    reads(&mixed(), Some(9), &[(F32_ANY, Target::Rows(&[1])), (I32, part), (F64_ANY, cell)]);
    let part = Target::Part { row: 1, start: 7, count: 2 };
    let cell = Target::Cells { rows: &[3], counts: &[2], columns: &[0, 8] };
    reads(&reference(), Some(2), &[(F32, Target::Rows(&[2, 0])), (F64, part), (I32, cell)]);
}

#[test]
fn messages_are_what_they_are_meant_to_be() {
    let seeds = seeds();
    let seed = |name: &str| &seeds[&format!("messages/{name}")][1..];
    assert_eq!(Hello::parse(seed("hello")), Ok((hello(), Role::Main)));
    assert_eq!(Hello::parse(seed("hello-reader")), Ok((Hello::reader(1), Role::Reader)));
    assert_eq!(Welcome::parse(seed("welcome")), Ok(welcome()));
    assert_eq!(Refusal::parse(seed("refusal")), Refusal::new("no"));
    let header = MessageHeader::parse(seed("slots")).unwrap();
    assert_eq!(wire::slot_records(&header, seed("slots")).unwrap(), slots());
    assert_eq!(OpenTable::decode(seed("table-mirror")), Ok(mirrored()));
    assert_eq!(OpenTable::decode(seed("table-bounded")), Ok(bounded()));
    assert_eq!(wire::body(seed("memory"), "memory"), Ok(MEMORY));
    assert_eq!(wire::body(seed("release"), "release"), Ok(RELEASE));
    let (bits, last) = seed("immediate").split_first_chunk::<4>().unwrap();
    let last = u64::from_le_bytes(last.try_into().unwrap()) >> 8;
    let told = Told { round: last, closed: last, visible: last };
    assert_eq!(Immediate::decode(u32::from_le_bytes(*bits), &told), Ok(CLOSED));
}
