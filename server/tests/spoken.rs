//! What a server does for a client, message by message: the client is written by hand, over shared memory.

use std::{
    thread,
    time::{Duration, Instant},
};

use fervor_client::Model;
use fervor_protocol::{
    Schema,
    ack::{Immediate, round_lsn, round_offset},
    batch::{BatchWriter, END_OF_CLOCK, PART, SectionHeader},
    limits::{CONTROL_PUSHED, MESSAGE_BYTES, ROW_HEADER},
    row::{Header, Seal},
    wire::{
        Hold, Kind, MemoryHeader, NOT_SEEN, NamedReply, PUSH_ONCE, ReleaseHeader, SUBSCRIBE, TableReply,
        UNSUBSCRIBE,
    },
};
use fervor_server::Server;
use fervor_verbs::transport::{
    Region,
    any::Host,
    faulty::{Faulty, Plan},
};
use scene::{
    IMAGE, Raw, SLOTS, Scene, Speaks, WIDTH, record, schema,
    support::{Folder, config, raw::PATIENCE},
};
use zerocopy::{FromBytes, IntoBytes};

mod scene;

#[test]
fn a_batch_that_comes_twice_is_applied_once() {
    let mut scene = Scene::new("twice", Model::Async);
    let mut raw = scene.raw();
    let first = raw.batch(1, None, 0, 1.0);
    raw.send(&first);
    let lsn = raw.acknowledgement(1);
    assert_eq!(scene.value(), 1.0);
    // Others' batches in between, so that the present LSN is another one.
    scene.worker.inc(&scene.table, 0, &[10.0; WIDTH]).unwrap();
    scene.worker.clock().unwrap();
    let (second, again, third) =
        (raw.batch(2, Some(1), 0, 1.0), raw.batch(1, None, 0, 1.0), raw.batch(3, None, 0, 1.0));
    for message in [&second, &again, &third] {
        raw.send(message);
    }
    let lsns = [2, 3, 4].map(|sequence| raw.acknowledgement(sequence));
    assert!(lsns[0] > lsn && lsns[2] > lsns[0]);
    assert_eq!(lsns[1], lsn, "the LSN at which it was applied, not a later one");
    let start = Instant::now();
    while scene.value() != 13.0 {
        assert!(start.elapsed() < PATIENCE, "{} after three batches and one of ten", scene.value());
    }
    drop(raw);
    scene.end();
}

#[test]
fn flags_beyond_the_known_are_no_clock() {
    // Only END_OF_CLOCK ends a clock: a batch without it leaves the shard clock where it is.
    let mut scene = Scene::new("flags", Model::Bsp);
    let mut raw = scene.raw();
    let quiet = raw.batch(1, None, 9, 1.0);
    raw.send(&quiet);
    raw.acknowledgement(1);
    scene.worker.clock().unwrap();
    thread::sleep(Duration::from_millis(20));
    raw.poll();
    assert!(!raw.immediates.contains(&Immediate::Round(1)));
    let loud = raw.batch(2, Some(1), 9, 1.0);
    assert_eq!(loud[1], END_OF_CLOCK);
    raw.send(&loud);
    raw.until("round 1", |raw| raw.immediates.contains(&Immediate::Round(1)).then_some(()));
    drop(raw);
    scene.end();
}

#[test]
fn a_slot_is_announced_free_after_its_last_push() {
    let mut scene = Scene::new("slots", Model::Essp { staleness: 0 });
    let mut raw = scene.raw();
    raw.open(scene.model, Hold::Slots);
    let ahead = raw.batch(1, Some(1_000_000), 9, 1.0);
    let subscribe = raw.message(Kind::Slots, 1, &record(0, SLOTS, 0, SUBSCRIBE));
    raw.send(&ahead);
    raw.send(&subscribe);
    raw.acknowledgement(3);
    scene.undisturbed();
    raw.until("the second round", |raw| raw.immediates.contains(&Immediate::Round(2)).then_some(()));
    let (header, row) = raw.slot(SLOTS);
    assert_eq!(row[0], 2.0);
    let told = round_lsn(raw.region.memory().load(round_offset(2)), 2);
    assert_eq!(told, Some(header.version.lsn()), "nothing was applied after it");
    assert!(raw.region.memory().load(CONTROL_PUSHED) >= 2 * (ROW_HEADER + IMAGE) as u64);
    // Once given up, it is announced free, and nothing comes any more.
    let give_up = raw.message(Kind::Slots, 1, &record(0, SLOTS, 0, UNSUBSCRIBE));
    raw.send(&give_up);
    raw.until("Closed", |raw| raw.immediates.contains(&Immediate::Closed(4)).then_some(()));
    raw.region.memory().write(SLOTS, &[0xee; 64]);
    scene.undisturbed();
    raw.poll();
    let mut slot = [0; 64];
    raw.region.memory().read(SLOTS, &mut slot);
    assert_eq!(slot, [0xee; 64]);
    // Twice is refused.
    let twice = [record(1, SLOTS, 0, SUBSCRIBE), record(1, SLOTS + 128, 0, SUBSCRIBE)].concat();
    let twice = raw.message(Kind::Slots, 2, &twice);
    raw.send(&twice);
    assert!(raw.fault().contains("image = 1 of table `t` is subscribed already"));
    scene.undisturbed();
    scene.end();
}

#[test]
fn a_row_of_any_table_is_pushed_once_when_asked_for() {
    for (name, model) in
        [("once-async", Model::Async), ("once-bsp", Model::Bsp), ("once-essp", Model::Essp { staleness: 0 })]
    {
        let mut scene = Scene::new(name, model);
        let mut raw = scene.raw();
        raw.open(model, Hold::Slots);
        let ahead = raw.batch(1, Some(1_000_000), 9, 1.0);
        let ask = raw.message(Kind::Slots, 1, &record(9, SLOTS, 0, PUSH_ONCE));
        raw.send(&ahead);
        raw.send(&ask);
        assert_eq!(raw.slot(SLOTS).1[0], 1.0, "{model}");
        scene.undisturbed();
        scene.end();
    }
}

/// Adjacent rows of 128 bytes.
const MANY: usize = 1000;
const STRIDE: usize = ROW_HEADER + 128;

/// Adds 1 to all of [`MANY`] rows, in four batches from `number` on, the last of which ends `clock`.
fn add_to_all(raw: &mut Raw, number: u64, clock: u64) {
    let mut buffer = vec![0; MESSAGE_BYTES];
    for (part, first) in (0..MANY as u32).step_by(MANY / 4).enumerate() {
        let mut writer = BatchWriter::new(&mut buffer);
        let rows: Vec<u32> = (first..first + MANY as u32 / 4).collect();
        writer.rows(0, &rows, 128).copy_from_slice(vec![1f32; rows.len() * 32].as_bytes());
        raw.sequence += 1;
        let clock = (part == 3).then_some(clock);
        let length = writer.finish(Kind::Batch, raw.sequence, raw.returned, number + part as u64, clock);
        raw.send(&buffer[..length]);
        raw.acknowledgement(raw.sequence);
    }
}

/// Whether all of a mirror's rows are whole, and hold this value.
fn mirror_has(raw: &Raw, value: f32) -> bool {
    (0..MANY).all(|row| {
        let mut image = [0; STRIDE];
        raw.region.memory().read(SLOTS + row * STRIDE, &mut image);
        let (header, data) = Header::read_from_prefix(&image).unwrap();
        assert!(Seal::new(128).verify(&header, data), "row {row}");
        <[f32]>::ref_from_bytes(data).unwrap() == [value; 32]
    })
}

/// A mirror is filled before its table is opened. After that its images come in runs: what is pushed is 1.125 times the data, in
/// at most 16 WRITEs, the round's own among them.
#[test]
fn a_mirror_is_filled_and_then_pushed_in_runs() {
    let folder = Folder::new("runs");
    let address = folder.address("s.sock");
    let host = Host::for_addresses(std::slice::from_ref(&address)).unwrap();
    // Nothing goes wrong there: it counts.
    let counting = Faulty::new(host.clone(), Plan::default());
    let server = Server::start(&counting, &config(&address, 1)).unwrap();
    let schema = Schema { rows: MANY as u64, width: 32, ..schema(Model::Essp { staleness: 0 }) };
    let mut raw = Raw::connect(&host, &address);
    raw.ask(schema.clone(), Hold::Slots);
    add_to_all(&mut raw, 1, 1);
    let mut other = Raw::connect(&host, &address);
    assert_eq!(other.ask(schema, Hold::Mirror(SLOTS as u64)).0, Kind::Table);
    assert!(mirror_has(&other, 1.0), "it is filled when it is open");
    // It lets the clock run as far as it likes.
    let ahead = other.batch(1, Some(1_000_000), 9, 0.0);
    other.send(&ahead);
    other.acknowledgement(2);
    other.returned = other.arrived;
    let pushed = |raw: &Raw| raw.region.memory().load(CONTROL_PUSHED);
    let written = || counting.report().connections[1].writes;
    for clock in 2..=4 {
        let (before, writes) = (pushed(&other), written());
        add_to_all(&mut raw, 4 * clock - 3, clock);
        other.until("the round", |raw| raw.immediates.contains(&Immediate::Round(clock)).then_some(()));
        assert!(mirror_has(&other, clock as f32));
        let bytes = (pushed(&other) - before) as usize;
        assert!(
            clock == 2 || bytes.div_ceil(1000) == MANY * STRIDE / 1000,
            "{bytes} bytes for 128,000 of data"
        );
        // 113 images are a run of 16 KiB, and all of them 9 runs.
        let writes = written() - writes;
        assert!((9..=16).contains(&writes), "{writes} WRITEs for a round of {MANY} adjacent rows");
    }
    drop((raw, other));
    assert!(server.stop());
}

/// A reference to two elements of row 7, whose index is at `rows_at`.
fn refer(raw: &mut Raw, number: u64, rows_at: u64) -> Vec<u8> {
    let mut buffer = vec![0; 256];
    let mut writer = BatchWriter::new(&mut buffer);
    let values_at = rows_at + 8;
    writer.refer(SectionHeader { table: 0, kind: PART, count: 2, total: 0, rows_at, values_at });
    raw.sequence += 1;
    let length = writer.finish(Kind::Reference, raw.sequence, raw.returned, number, None);
    buffer[..length].to_vec()
}

/// Says where its memory is, with a key that may be wrong. Whether the server sees it.
fn name_memory(raw: &mut Raw, wrong: u32) -> bool {
    let remote = raw.region.remote();
    let key = remote.key ^ wrong;
    let memory = MemoryHeader { address: remote.address, length: remote.length, key, reserved: 0 };
    let message = raw.message(Kind::Memory, 0, memory.as_bytes());
    raw.send(&message);
    let (kind, _, body) = raw.until("an answer", |raw| raw.replies.pop());
    assert_eq!(kind, Kind::Named as u8);
    NamedReply::read_from_bytes(&body).unwrap().announcements != NOT_SEEN
}

#[test]
fn a_client_on_this_host_names_its_memory_and_refers_to_it() {
    const AT: usize = 8192;
    let mut scene = Scene::new("refer", Model::Async);
    let mut row = || {
        let mut row = [0.0; WIDTH];
        scene.worker.get(&scene.table, 7, &mut row).unwrap();
        [row[0], row[1], row[2]]
    };
    let mut raw = Raw::connect(&scene.host, &scene.address);
    assert!(name_memory(&mut raw, 0));
    raw.region.memory().write(AT, [7u32, 0].as_bytes());
    raw.region.memory().write(AT + 8, [2f32; 2].as_bytes());
    let good = refer(&mut raw, 1, AT as u64);
    raw.send(&good);
    raw.acknowledgement(2);
    assert_eq!(row(), [2.0, 2.0, 0.0]);
    // What is not a number is found when it is added; all that the batch has for that row is left out.
    raw.region.memory().write(AT + 12, f32::NAN.as_bytes());
    let bad = refer(&mut raw, 2, AT as u64);
    raw.send(&bad);
    assert!(raw.fault().contains("table `t`: NaN or infinity in an update of row 7"));
    assert_eq!(row(), [2.0, 2.0, 0.0]);
    // Outside of what it has named there is nothing, and what the server may not read it does not see.
    let mut raw = Raw::connect(&scene.host, &scene.address);
    assert!(name_memory(&mut raw, 0));
    let outside = refer(&mut raw, 1, 1 << 20);
    raw.send(&outside);
    assert!(raw.fault().contains("count = 2: 0 bytes are left for its rows"));
    let mut raw = Raw::connect(&scene.host, &scene.address);
    assert!(!name_memory(&mut raw, 0x5555));
    let unseen = refer(&mut raw, 1, AT as u64);
    raw.send(&unseen);
    assert!(raw.fault().contains("named no memory"));
    scene.end();
}

#[test]
fn an_open_is_taken_back_and_its_name_is_free() {
    let scene = Scene::new("release", Model::Bsp);
    let mut raw = scene.raw();
    let other = |rows| Schema { name: "u".into(), rows, ..schema(Model::Essp { staleness: 0 }) };
    let (kind, body) = raw.ask(other(10), Hold::Mirror(SLOTS as u64));
    assert_eq!(kind, Kind::Table);
    let table = TableReply::read_from_bytes(&body).unwrap().table;
    assert_eq!(raw.ask(other(11), Hold::Slots).0, Kind::Refused);
    let release = raw.message(Kind::Release, 0, ReleaseHeader { table, reserved: 0 }.as_bytes());
    raw.send(&release);
    // No WRITE to the mirror is on its way any more.
    raw.until("Closed", |raw| raw.immediates.contains(&Immediate::Closed(3)).then_some(()));
    assert_eq!(raw.ask(other(11), Hold::Slots).0, Kind::Table);
    drop(raw);
    scene.end();
}
