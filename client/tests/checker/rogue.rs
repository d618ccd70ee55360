//! A client written by hand, beside the honest ones: it sends batches again, as a client does that has lost a
//! connection, and ends with something that a server must refuse.
//!
//! It has columns of its own like any other, so that the honest ones see whether a batch was applied twice or in part. It
//! lets the clock run as far as it likes, so nobody waits for it.

use std::sync::atomic::Ordering;

use fervor_client::{ElementType, Schema};
use fervor_protocol::{
    batch::BatchWriter,
    limits::{ACK_RING, MESSAGE_BYTES},
    row::Layout,
    wire::{Hold, Kind, OpenTable, TableReply},
};
use fervor_verbs::{Address, transport::Transport};
use zerocopy::{FromBytes, IntoBytes};

use super::{
    actor::Number,
    plan::{Farewell, Op, Plan},
};
use crate::support::{Random, raw::Raw};

/// A clock that nobody reaches.
const AHEAD: u64 = 1 << 20;

/// Its connection to one shard.
struct Link<T: Transport> {
    raw: Raw<T>,
    /// The shard's numbers of the tables.
    tables: Vec<u32>,
    /// Batches sent, with the LSN at which each was applied, from the first number on.
    batches: Vec<(Vec<Op>, u64)>,
}

impl<T: Transport> Link<T> {
    fn connect(transport: &T, address: &Address, shard: u16, clients: u16) -> Self {
        let raw = Raw::try_connect(transport, address, |mut hello| {
            (hello.shard, hello.clients) = (shard, clients);
            hello.as_bytes().to_vec()
        });
        Self { raw: raw.unwrap(), tables: Vec::new(), batches: Vec::new() }
    }

    /// Sends a message and waits for its acknowledgement: the LSN. `None`: the server ended the connection.
    fn send(&mut self, message: &[u8]) -> Option<u64> {
        let sent = self.raw.sequence - self.raw.welcome.origin;
        assert!(sent < ACK_RING as u64, "the rogue is short-lived");
        self.raw.send(message);
        let lsn = self.raw.answer(self.raw.sequence);
        self.raw.returned = self.raw.arrived;
        lsn
    }

    fn create(&mut self, plan: &Plan, table: usize, link: usize) {
        let found = &plan.tables[table];
        let schema = Schema {
            name: found.name.clone(),
            element: found.element,
            rows: found.rows,
            width: plan.width(table) as u32,
            model: found.model,
            non_finite: false,
            continuous: found.continuous,
        };
        let shards = (plan.servers * plan.shards) as u32;
        let open = OpenTable { schema, shard: link as u32, shards, hold: Hold::Slots };
        let message = self.raw.message(Kind::CreateTable, 0, &open.encode());
        self.send(&message).expect("an honest request");
        let (kind, _, body) = self.raw.until("a table", |raw| raw.replies.pop());
        assert_eq!(kind, Kind::Table as u8, "{}", String::from_utf8_lossy(&body));
        self.tables.push(TableReply::read_from_bytes(&body).unwrap().table);
    }

    /// The number of the batch before which so many were sent.
    fn number(&self, before: usize) -> u64 {
        self.raw.welcome.origin + before as u64 + 1
    }

    /// Batch `number` with the updates of `ops`, which are all for this link. `bad`: and then one of a row that there is not.
    fn batch(&mut self, plan: &Plan, number: u64, ops: &[Op], clock: Option<u64>, bad: bool) -> Vec<u8> {
        fn push<E: Number>(writer: &mut BatchWriter<'_>, table: u32, row: u64, columns: &[usize], by: i64) {
            let values = vec![E::of(by); columns.len()];
            let columns: Vec<_> = columns.iter().map(|column| *column as u32).collect();
            assert!(writer.has_room_for_cells(1, columns.len(), size_of::<E>()), "it fits");
            writer.cells(table, &[row as u32], &[columns.len() as u32], &columns, &values);
        }
        let links = (plan.servers * plan.shards) as u64;
        let mut buffer = vec![0; MESSAGE_BYTES];
        let mut writer = BatchWriter::new(&mut buffer);
        for op in ops {
            let Op::IncAt { table, row, by } = op else { unreachable!("the rogue adds to columns only") };
            let layout = Layout::new(plan.row_bytes(*table));
            let (id, index) = (self.tables[*table], row / links);
            let first = layout.within(index) / plan.tables[*table].element.size();
            let own = plan.columns(*table, plan.lanes.len() - 1);
            let columns: Vec<_> = own.map(|column| first + column).collect();
            let index = layout.image(index);
            match plan.tables[*table].element {
                ElementType::F32 => push::<f32>(&mut writer, id, index, &columns, *by),
                ElementType::F64 => push::<f64>(&mut writer, id, index, &columns, *by),
                ElementType::I32 => push::<i32>(&mut writer, id, index, &columns, *by),
                ElementType::I64 => push::<i64>(&mut writer, id, index, &columns, *by),
            }
        }
        if bad {
            // Its first element would be that of a row beyond the last one.
            let beyond = Layout::new(plan.row_bytes(0)).images(plan.tables[0].rows) + 1;
            match plan.tables[0].element.size() {
                4 => writer.cells(self.tables[0], &[beyond as u32], &[1], &[0], &[0i32]),
                _ => writer.cells(self.tables[0], &[beyond as u32], &[1], &[0], &[0i64]),
            }
        }
        self.raw.sequence += 1;
        let (sequence, returned) = (self.raw.sequence, self.raw.returned);
        let length = writer.finish(Kind::Batch, sequence, returned, number, clock);
        buffer.truncate(length);
        buffer
    }
}

/// Does what the plan says of the rogue.
pub fn run<T: Transport>(transport: &T, servers: &[Address], plan: &Plan, farewell: Farewell) {
    let mut random = Random(plan.seed ^ 0x0bad);
    let mut links: Vec<Link<T>> = servers
        .iter()
        .flat_map(|address| (0..plan.shards as u16).map(move |shard| (address, shard)))
        .map(|(address, shard)| Link::connect(transport, address, shard, plan.expected()))
        .collect();
    plan.joined.fetch_add(1, Ordering::SeqCst);
    for (number, link) in links.iter_mut().enumerate() {
        (0..plan.tables.len()).for_each(|table| link.create(plan, table, number));
        let (number, clock) = (link.number(0), link.raw.welcome.clock + AHEAD);
        let ahead = link.batch(plan, number, &[], Some(clock), false);
        let lsn = link.send(&ahead).expect("an honest batch");
        link.batches.push((Vec::new(), lsn));
    }
    let me = plan.lanes.len() - 1;
    let count = links.len() as u64;
    for ops in &plan.lanes[me].clocks {
        let Some(Op::IncAt { row: first, .. }) = ops.first() else { continue };
        let link = &mut links[(first % count) as usize];
        for op in ops {
            let Op::IncAt { table, row, by } = op else { unreachable!("the rogue adds to columns only") };
            plan.adding(*table, *row, me, *by);
        }
        let number = link.number(link.batches.len());
        let message = link.batch(plan, number, ops, None, false);
        let lsn = link.send(&message).expect("an honest batch");
        link.batches.push((ops.clone(), lsn));
        // As after a reconnect: it does not know that these have been applied.
        for _ in 0..random.among(0..=2) {
            let last = link.batches.len() as u64 - 1;
            let back = random.among(0..=2.min(last));
            let (ops, lsn) = link.batches[(last - back) as usize].clone();
            let again = link.batch(plan, number - back, &ops, None, false);
            let told = link.send(&again).expect("a batch may come twice");
            assert_eq!(told, lsn, "TWICE: batch {} was applied at another LSN before", number - back);
        }
    }
    let mut turn = 0;
    while !plan.started() {
        transport.relax(turn);
        turn += 1;
    }
    for link in &mut links {
        let number = link.number(link.batches.len());
        match farewell {
            Farewell::Vanish => {}
            Farewell::Leave => {
                let message = link.raw.message(Kind::Leave, 0, &[]);
                link.send(&message).expect("an honest farewell");
            }
            Farewell::BadBatch => {
                // Of the last rows that it added to: they would show it.
                let ops = link.batches.last().expect("one at least").0.clone();
                let bad = link.batch(plan, number, &ops, None, true);
                assert_eq!(link.send(&bad), None, "PART: a bad batch was acknowledged");
            }
            Farewell::Gap => {
                let ops = link.batches.last().expect("one at least").0.clone();
                let gap = link.batch(plan, number + 1, &ops, None, false);
                assert_eq!(link.send(&gap), None, "LOST: a batch is missing, and the next one was taken");
            }
        }
    }
}
