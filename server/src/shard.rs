//! A shard: rows, tables, LSN and vector clock, and what a message does to them.
//!
//! **Who writes, who reads.** The poller writes rows through `&mut`; peers READ them at any moment and find out by
//! the checksum whether they got one version. The order in which a row's bytes change is therefore of no
//! importance. A batch is checked as a whole, then applied row by row under one LSN; nobody can see the
//! shard between two rows but by READs, which promise nothing across rows.

use std::fmt;

use fervor_protocol::{
    Element, ElementType, Schema,
    batch::{Batch, Record, Shape, Update},
    clock::VectorClock,
    limits::ROW_HEADER,
    mutants::{Mutant, mutant},
    route::Router,
    row::{Header, Seal},
    wire::Fault,
};
use fervor_verbs::Exclusive;
use zerocopy::{FromBytes, IntoBytes};

use crate::continuous::Continuous;

/// A shard's number of a table.
pub type TableId = u32;

/// A client's slot for a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subscriber {
    pub client: u64,
    pub slot: u64,
    /// Whether a push to it waits in its peer's queue.
    pub queued: bool,
}

/// One table's rows in this shard.
#[derive(Debug)]
pub struct Table {
    schema: Schema,
    shards: (u32, u32),
    /// Byte offset of the first row.
    pub offset: usize,
    pub stride: usize,
    pub row_bytes: usize,
    pub rows: u64,
    pub seal: Seal,
    /// Rows changed since the last round, each once, and a mark for each. Eager tables only, unless `continuous` ranks them.
    dirty: Vec<u64>,
    marks: Vec<u64>,
    /// The rows changed since they were last pushed, if they are pushed between rounds.
    pub continuous: Option<Continuous>,
    /// Per row, who holds it. Eager tables only.
    pub subscribers: Vec<Vec<Subscriber>>,
}

impl Table {
    pub fn shape(&self) -> Shape {
        Shape {
            element: self.schema.element,
            rows: self.rows,
            width: self.schema.width,
            non_finite: self.schema.non_finite,
        }
    }

    pub fn eager(&self) -> bool {
        self.schema.eager()
    }

    /// Whether a round pushes all that has changed.
    pub fn in_rounds(&self) -> bool {
        self.schema.model.eager()
    }

    /// Whether it is pushed after each batch, and clients are told when that is visible.
    pub fn value_bounded(&self) -> bool {
        self.schema.model.value_bounded()
    }

    /// Byte offset of a row in the shard's region.
    pub fn row_offset(&self, row: u64) -> usize {
        self.offset + row as usize * self.stride
    }

    fn mark<E: Element>(&mut self, row: u64, update: &Update<'_>) {
        if let Some(continuous) = &mut self.continuous {
            return continuous.ranking.changed(row, update.greatest::<E>());
        }
        let (word, bit) = ((row / 64) as usize, 1 << (row % 64));
        if self.marks[word] & bit == 0 {
            self.marks[word] |= bit;
            self.dirty.push(row);
        }
    }

    /// A mutant: as if the row had not changed.
    pub fn forget(&mut self, row: u64) {
        if let Some(continuous) = &mut self.continuous {
            return continuous.ranking.remove(row);
        }
        self.marks[(row / 64) as usize] &= !(1 << (row % 64));
        self.dirty.retain(|dirty| *dirty != row);
    }

    /// The rows changed since this was last called.
    pub fn take_dirty(&mut self) -> Vec<u64> {
        if let Some(continuous) = &mut self.continuous {
            return continuous.ranking.drain();
        }
        for row in &self.dirty {
            self.marks[(row / 64) as usize] = 0;
        }
        std::mem::take(&mut self.dirty)
    }
}

/// See the module.
pub struct Shard {
    memory: Exclusive,
    used: usize,
    pub tables: Vec<Table>,
    pub clock: VectorClock,
    lsn: u64,
    value_bounded: bool,
}

impl fmt::Debug for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shard({} tables, LSN {}, clock {})", self.tables.len(), self.lsn, self.clock.shard())
    }
}

impl Shard {
    pub fn new(memory: Exclusive) -> Self {
        Self {
            memory,
            used: 0,
            tables: Vec::new(),
            clock: VectorClock::default(),
            lsn: 0,
            value_bounded: false,
        }
    }

    /// Whether there is a value-bounded table.
    pub fn value_bounded(&self) -> bool {
        self.value_bounded
    }

    /// LSN of the last batch applied.
    pub fn lsn(&self) -> u64 {
        self.lsn
    }

    /// Makes the table, or joins one with the same schema.
    ///
    /// # Errors
    /// Why not, for the client: another schema (both are shown), or no memory (with the cure).
    pub fn create(&mut self, schema: Schema, shard: u32, shards: u32) -> Result<(TableId, usize), String> {
        if let Some(id) = self.tables.iter().position(|table| table.schema.name == schema.name) {
            let table = &self.tables[id];
            if table.schema != schema {
                return Err(format!(
                    "the table exists with another schema: {}; asked for: {schema}",
                    table.schema
                ));
            }
            if table.shards != (shard, shards) {
                return Err(format!(
                    "the table `{}` was made as shard {} of {}, and is asked for as shard {shard} of {shards}: \
                     give all clients of a job the same servers",
                    schema.name, table.shards.0, table.shards.1
                ));
            }
            return Ok((id as TableId, table.offset));
        }
        let rows = Router::new(shards as usize).rows_in(shard as usize, schema.rows);
        let stride = schema.stride();
        let bytes = (rows as u128) * stride as u128;
        let free = self.memory.len() - self.used;
        if bytes > free as u128 {
            return Err(format!(
                "the table {schema} needs {bytes} bytes in this shard, of whose {} bytes {free} are free: start the \
                 server with more --memory, or more servers",
                self.memory.len()
            ));
        }
        let offset = self.used;
        self.used += (bytes as usize).next_multiple_of(4096).min(free);
        let pushed = if schema.eager() { rows } else { 0 };
        self.value_bounded |= schema.model.value_bounded();
        self.tables.push(Table {
            shards: (shard, shards),
            offset,
            stride,
            row_bytes: schema.row_bytes(),
            rows,
            seal: Seal::new(schema.row_bytes()),
            dirty: Vec::new(),
            marks: vec![0; pushed.div_ceil(64) as usize],
            continuous: (schema.continuous > 0).then(|| Continuous::new(rows, schema.continuous)),
            subscribers: vec![Vec::new(); pushed as usize],
            schema,
        });
        Ok((self.tables.len() as TableId - 1, offset))
    }

    /// Checks all of `batch`.
    ///
    /// # Errors
    /// What is wrong. Nothing has changed.
    pub fn check(&self, batch: &Batch<'_>) -> Result<(), Fault> {
        batch.check(|table| self.tables.get(table as usize).map(Table::shape))
    }

    /// Applies a checked batch, at a new LSN.
    pub fn apply(&mut self, batch: &Batch<'_>) {
        self.lsn += 1;
        let tables = &self.tables;
        let sizes: Vec<usize> = tables.iter().map(|table| table.schema.element.size()).collect();
        for (number, record) in batch.records(|table| sizes[table as usize]).enumerate() {
            self.lsn += u64::from(mutant(Mutant::HalvesAtTwoLsns) && number == 1);
            let table = &mut self.tables[record.table as usize];
            let at = table.row_offset(record.row);
            let image = &mut self.memory.bytes_mut()[at..at + ROW_HEADER + table.row_bytes];
            match table.schema.element {
                ElementType::F32 => update::<f32>(image, &record, table, self.lsn),
                ElementType::F64 => update::<f64>(image, &record, table, self.lsn),
                ElementType::I32 => update::<i32>(image, &record, table, self.lsn),
                ElementType::I64 => update::<i64>(image, &record, table, self.lsn),
            }
        }
    }

    /// A row as it is now: header and data.
    pub fn row(&self, table: TableId, row: u64) -> (Header, &[u8]) {
        let table = &self.tables[table as usize];
        let at = table.row_offset(row);
        let image = &self.memory.bytes()[at..at + ROW_HEADER + table.row_bytes];
        let (header, data) = Header::read_from_prefix(image).expect("an image begins with a header");
        (header, data)
    }
}

fn update<E: Element>(image: &mut [u8], record: &Record<'_>, table: &mut Table, lsn: u64) {
    let (header, data) = image.split_at_mut(ROW_HEADER);
    let row = <[E]>::mut_from_bytes(data).expect("rows are aligned to cache lines");
    record.update.apply(row);
    header.copy_from_slice(table.seal.seal(data, lsn, 0, 0).as_bytes());
    if table.eager() {
        table.mark::<E>(record.row, &record.update);
    }
}

#[cfg(test)]
mod tests {
    use fervor_protocol::{Model, batch::BatchWriter, pending::Delta, wire::MessageHeader};

    use super::*;

    fn schema(name: &str, rows: u64) -> Schema {
        Schema {
            name: name.into(),
            element: ElementType::F32,
            rows,
            width: 4,
            model: Model::Essp { staleness: 1 },
            non_finite: false,
            continuous: 0,
        }
    }

    fn message(updates: &[(u64, f32)]) -> Vec<u8> {
        let mut buffer = vec![0; 4096];
        let mut writer = BatchWriter::new(&mut buffer);
        for (row, value) in updates {
            writer.push(0, *row, &Delta::Sparse(vec![(1, *value)]));
        }
        let length = writer.finish(1, 0, 1, None);
        buffer.truncate(length);
        buffer
    }

    #[test]
    fn a_bad_record_anywhere_leaves_the_shard_unchanged() {
        let mut shard = Shard::new(Exclusive::new("test", 4096).unwrap());
        shard.create(schema("a", 10), 0, 1).unwrap();
        let good = message(&[(3, 1.0), (4, 2.0)]);
        let bad = message(&[(3, 1.0), (10, 2.0)]);
        for (message, fine) in [(&good, true), (&bad, false)] {
            let batch = Batch::parse(&MessageHeader::parse(message).unwrap(), message).unwrap();
            assert_eq!(shard.check(&batch).is_ok(), fine);
            if fine {
                shard.apply(&batch);
            }
        }
        let (header, data) = shard.row(0, 3);
        assert_eq!(header.lsn, 1);
        assert_eq!(<[f32]>::ref_from_bytes(data).unwrap(), [0.0, 1.0, 0.0, 0.0]);
        assert!(shard.tables[0].seal.verify(&header, data));
        assert_eq!(shard.tables[0].take_dirty(), [3, 4]);
        assert!(shard.tables[0].take_dirty().is_empty());
    }

    #[test]
    fn a_table_joins_or_says_why_not() {
        let mut shard = Shard::new(Exclusive::new("test", 4096).unwrap());
        assert_eq!(shard.create(schema("a", 10), 0, 1), Ok((0, 0)));
        assert_eq!(shard.create(schema("a", 10), 0, 1), Ok((0, 0)));
        let other = shard.create(schema("a", 11), 0, 1).unwrap_err();
        assert!(other.contains("10 rows") && other.contains("11 rows"), "{other}");
        assert!(shard.create(schema("a", 10), 0, 2).unwrap_err().contains("same servers"));
        let large = shard.create(schema("b", 1 << 20), 0, 1).unwrap_err();
        assert!(large.contains("67108864 bytes") && large.contains("--memory"), "{large}");
    }
}
