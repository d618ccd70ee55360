//! A client that takes nothing any more holds up nobody, at any width of rows: in the simulator, where WRITEs to a dead node are on
//! their way until it is found to be dead.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fervor_protocol::{
    ElementType, Model, Schema,
    ack::Immediate,
    batch::BatchWriter,
    limits::MESSAGE_BYTES,
    row::{Header, Seal},
    wire::{Hold, Kind, OpenTable},
};
use fervor_server::{Config, Server};
use fervor_verbs::{
    Address,
    transport::{
        Region, Runtime,
        sim::{Node, Sim},
    },
};
use support::raw::Raw;
use zerocopy::{FromBytes, IntoBytes};

#[path = "../../client/tests/support/mod.rs"]
mod support;

/// Where the mirror begins, behind the control block.
const MIRROR: usize = 4096;
const CLOCKS: u64 = 12;

/// Opens the table, of which the client has a mirror.
fn open(raw: &mut Raw<Node>, rows: u64, width: u32) {
    let schema = Schema {
        name: "t".into(),
        element: ElementType::F32,
        rows,
        width,
        model: Model::Essp { staleness: 0 },
        non_finite: false,
        continuous: 0,
    };
    let open = OpenTable { schema, shard: 0, shards: 1, hold: Hold::Mirror(MIRROR as u64) };
    let message = raw.message(Kind::CreateTable, 0, &open.encode());
    raw.send(&message);
    let (kind, ..) = raw.until("an answer", |raw| raw.replies.pop());
    assert_eq!(kind, Kind::Table as u8);
}

/// Adds 1 to the first element of each row, and ends a clock.
fn add(raw: &mut Raw<Node>, number: u64, rows: u64, clock: u64) {
    let mut buffer = vec![0; MESSAGE_BYTES];
    let mut writer = BatchWriter::new(&mut buffer);
    (0..rows).for_each(|row| writer.part(0, row as u32, 0, 1, 1f32.as_bytes()));
    raw.sequence += 1;
    let length = writer.finish(Kind::Batch, raw.sequence, raw.returned, number, Some(clock));
    raw.send(&buffer[..length]);
    raw.acknowledgement(raw.sequence);
}

/// Two clients mirror a table. One lets the clock run, and dies; the other gets its rounds as before.
fn dies(seed: u64, rows: u64, row_bytes: usize) {
    let sim = Sim::new(seed);
    let address = Address::Sim("server".into());
    let (left, joined) = (Arc::new(AtomicUsize::new(1)), Arc::new(AtomicUsize::new(0)));
    let server = sim.node("server");
    sim.spawn(&server.clone(), "main", {
        let (sim, left, address) = (sim.clone(), left.clone(), address.clone());
        move || {
            let mut config = Config::new(address);
            (config.clients, config.memory) = (2, 8 << 20);
            config.staging = Config::default_staging(2);
            let running = Server::start(&server, &config).unwrap();
            while left.load(Ordering::SeqCst) > 0 {
                sim.sleep(&server, Duration::from_micros(300));
            }
            assert!(running.stop());
        }
    });
    let nodes = [0, 1].map(|number| sim.node(&format!("client-{number}")));
    for (number, node) in nodes.clone().into_iter().enumerate() {
        let (inside, left, joined, address) = (sim.clone(), left.clone(), joined.clone(), address.clone());
        let dying = nodes[0].clone();
        sim.spawn(&node.clone(), "main", move || {
            inside.sleep(&node, Duration::from_millis(1));
            let mut raw = Raw::connect(&node, &address);
            open(&mut raw, rows, (row_bytes / 4) as u32);
            if number == 0 {
                add(&mut raw, 1, rows, 1 << 20);
                joined.fetch_add(1, Ordering::SeqCst);
                loop {
                    inside.sleep(&node, Duration::from_secs(1));
                }
            }
            while joined.load(Ordering::SeqCst) == 0 {
                inside.sleep(&node, Duration::from_micros(100));
            }
            inside.kill(&dying);
            let start = node.now();
            for clock in 1..=CLOCKS {
                add(&mut raw, clock, rows, clock);
                raw.until("a round", |raw| raw.immediates.contains(&Immediate::Round(clock)).then_some(()));
                raw.returned = raw.arrived;
            }
            let took = node.now() - start;
            assert!(took < Duration::from_secs(1), "{took:?} for {CLOCKS} rounds: it waited for the dead");
            let mut image = vec![0; 16 + row_bytes];
            raw.region.memory().read(MIRROR, &mut image);
            let (header, data) = Header::read_from_prefix(&image).unwrap();
            assert!(Seal::new(row_bytes).verify(&header, data));
            assert_eq!(f32::read_from_prefix(data).unwrap().0, CLOCKS as f32 + 1.0);
            left.fetch_sub(1, Ordering::SeqCst);
        });
    }
    if let Err(report) = sim.try_run() {
        panic!("{rows} rows of {row_bytes} bytes, seed {seed}: {report}");
    }
}

#[test]
fn one_that_takes_nothing_holds_up_nobody_at_any_width() {
    // The region of a client written by hand has 1 MiB.
    for (rows, row_bytes) in [(1000, 128), (20, 36 << 10), (3, 300 << 10), (1, (1 << 20) - 8192)] {
        (0..3).for_each(|seed| dies(seed, rows, row_bytes));
    }
}
