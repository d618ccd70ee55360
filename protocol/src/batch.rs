//! Batches: the updates that a client sends to one shard at a time, in one message.
//!
//! ```text
//! │ MessageHeader │ BatchHeader │ RecordHeader │ columns (sparse only) │ values │ RecordHeader │ ...
//! ```
//! Records start at multiples of 8 bytes from the start of the message. [`Batch::parse`] and [`Batch::check`]
//! look at every byte before anything is applied; [`Batch::records`] then cannot fail. The message is used where it lies.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    element::{Element, ElementType},
    pending::Delta,
    wire::{Fault, Kind, MessageHeader},
};

/// After the message header.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BatchHeader {
    /// Number of the batch, from 1, without gaps.
    pub number: u64,
    /// With [`END_OF_CLOCK`]: all updates of the client stamped below this clock have now been sent.
    pub clock: u64,
}

/// Flag of a batch's message: it ends a clock of the client.
pub const END_OF_CLOCK: u8 = 1;

/// Before each record.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RecordHeader {
    /// Index of the row in the shard.
    pub row: u64,
    /// The shard's number of the table.
    pub table: u32,
    /// Dense: column of the first value. Sparse: [`SPARSE`].
    pub start: u32,
    /// Number of values.
    pub count: u32,
    /// Zero.
    pub reserved: u32,
}

/// `start` of a sparse record.
pub const SPARSE: u32 = u32::MAX;

const _: () = assert!(size_of::<BatchHeader>() == 16);
const _: () = assert!(size_of::<RecordHeader>() == 24);

/// What a shard knows of a table, to check records against.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Type of the elements.
    pub element: ElementType,
    /// Rows in this shard.
    pub rows: u64,
    /// Elements of a row.
    pub width: u32,
    /// Whether NaN and infinity are allowed.
    pub non_finite: bool,
}

/// Writes a batch into a buffer.
#[derive(Debug)]
pub struct BatchWriter<'a> {
    buffer: &'a mut [u8],
    length: usize,
    records: u32,
}

const HEADERS: usize = size_of::<MessageHeader>() + size_of::<BatchHeader>();

impl<'a> BatchWriter<'a> {
    /// Into `buffer`, which has room for the headers.
    pub fn new(buffer: &'a mut [u8]) -> Self {
        assert!(buffer.len() >= HEADERS + size_of::<RecordHeader>() + 16, "no room for a batch");
        Self { buffer, length: HEADERS, records: 0 }
    }

    /// Number of records so far.
    pub fn records(&self) -> u32 {
        self.records
    }

    /// Appends as much of `delta` as there is room for, and returns the number of its elements that is: all of it or
    /// none, and only of one that no message could hold some. So an update of a row is applied at one LSN, and no
    /// reader sees half of it, unless it is greater than a message.
    pub fn push<E: Element>(&mut self, table: u32, row: u64, delta: &Delta<E>) -> usize {
        let size = size_of::<E>();
        let whole = size_of::<RecordHeader>()
            + match delta {
                Delta::Dense { values, .. } => (values.len() * size).next_multiple_of(8),
                Delta::Sparse(pairs) => {
                    (pairs.len() * 4).next_multiple_of(8) + (pairs.len() * size).next_multiple_of(8)
                }
            };
        let left = self.buffer.len() - self.length;
        if whole > left && whole <= self.buffer.len() - HEADERS {
            return 0;
        }
        let room = left.saturating_sub(size_of::<RecordHeader>()) & !7;
        let record =
            |start, count: usize| RecordHeader { row, table, start, count: count as u32, reserved: 0 };
        match delta {
            Delta::Dense { start, values } => {
                let count = values.len().min(room / size);
                if count == 0 {
                    return 0;
                }
                self.append(record(*start, count).as_bytes());
                self.append(values[..count].as_bytes());
                self.records += 1;
                count
            }
            Delta::Sparse(pairs) => {
                // Columns and values are each padded to 8 bytes.
                let most = if whole <= left { pairs.len() } else { room.saturating_sub(8) / (4 + size) };
                let count = pairs.len().min(most);
                if count == 0 {
                    return 0;
                }
                self.append(record(SPARSE, count).as_bytes());
                for (column, _) in &pairs[..count] {
                    self.put(column.as_bytes());
                }
                self.pad();
                for (_, value) in &pairs[..count] {
                    self.put(value.as_bytes());
                }
                self.pad();
                self.records += 1;
                count
            }
        }
    }

    fn append(&mut self, bytes: &[u8]) {
        self.put(bytes);
        self.pad();
    }

    fn put(&mut self, bytes: &[u8]) {
        self.buffer[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }

    fn pad(&mut self) {
        let end = self.length.next_multiple_of(8);
        self.buffer[self.length..end].fill(0);
        self.length = end;
    }

    /// Writes the headers and returns the length of the message. `clock`: the batch ends that clock.
    pub fn finish(self, sequence: u64, returned: u64, number: u64, clock: Option<u64>) -> usize {
        let flags = if clock.is_some() { END_OF_CLOCK } else { 0 };
        let header = MessageHeader::new(Kind::Batch, flags, self.records, sequence, returned);
        let batch = BatchHeader { number, clock: clock.unwrap_or(0) };
        self.buffer[..size_of::<MessageHeader>()].copy_from_slice(header.as_bytes());
        self.buffer[size_of::<MessageHeader>()..HEADERS].copy_from_slice(batch.as_bytes());
        self.length
    }
}

/// A batch in a receive buffer.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Its number.
    pub number: u64,
    /// The clock that it ends.
    pub clock: Option<u64>,
    records: u32,
    body: &'a [u8],
}

/// One record of a checked batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// The shard's number of the table.
    pub table: u32,
    /// Index of the row in the shard.
    pub row: u64,
    /// The update.
    pub update: Update<'a>,
}

/// The update of a record, as it lies in the message; alignment is not promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Update<'a> {
    /// Consecutive elements.
    Dense {
        /// Column of the first one.
        start: u32,
        /// The values.
        values: &'a [u8],
    },
    /// Single elements.
    Sparse {
        /// Columns, `u32` each.
        columns: &'a [u8],
        /// The values.
        values: &'a [u8],
    },
}

impl Update<'_> {
    /// Adds it to a row of `E`, the table's element type.
    pub fn apply<E: Element>(&self, row: &mut [E]) {
        let value = |bytes: &[u8]| E::read_from_bytes(bytes).expect("chunks have the size of an element");
        match self {
            Update::Dense { start, values } => {
                let start = *start as usize;
                let row = &mut row[start..start + values.len() / size_of::<E>()];
                for (element, bytes) in row.iter_mut().zip(values.chunks_exact(size_of::<E>())) {
                    *element = element.plus(value(bytes));
                }
            }
            Update::Sparse { columns, values } => {
                for (column, bytes) in columns.chunks_exact(4).zip(values.chunks_exact(size_of::<E>())) {
                    let column = u32::read_from_bytes(column).expect("chunks of 4 bytes") as usize;
                    row[column] = row[column].plus(value(bytes));
                }
            }
        }
    }

    /// The greatest magnitude of its values, of element type `E`; infinity if one is not a number.
    pub fn greatest<E: Element>(&self) -> f32 {
        let (Update::Dense { values, .. } | Update::Sparse { values, .. }) = self;
        let values = values.chunks_exact(size_of::<E>());
        values.fold(0.0, |greatest, bytes| {
            let value =
                E::read_from_bytes(bytes).expect("chunks have the size of an element").to_f64() as f32;
            if value.is_nan() { f32::INFINITY } else { value.abs().max(greatest) }
        })
    }
}

impl<'a> Batch<'a> {
    /// The batch in `message`, whose header has been read as `header`.
    ///
    /// # Errors
    /// The message is shorter than a batch.
    pub fn parse(header: &MessageHeader, message: &'a [u8]) -> Result<Self, Fault> {
        let body = message.get(size_of::<MessageHeader>()..).unwrap_or_default();
        let (batch, body) = BatchHeader::read_from_prefix(body)
            .map_err(|_| Fault::Short { field: "batch header", length: message.len() })?;
        let clock = (header.flags & END_OF_CLOCK != 0).then_some(batch.clock);
        Ok(Self { number: batch.number, clock, records: header.records, body })
    }

    /// Checks every record against its table's shape, before any is applied.
    ///
    /// # Errors
    /// The first thing that is wrong, with the field, the value and the limit.
    pub fn check(&self, shape: impl Fn(u32) -> Option<Shape>) -> Result<(), Fault> {
        let mut body = self.body;
        for record in 0..self.records {
            let (header, rest) = RecordHeader::read_from_prefix(body)
                .map_err(|_| Fault::Short { field: "record header", length: body.len() })?;
            let shape = shape(header.table).ok_or(Fault::Field {
                record,
                field: "table",
                value: header.table.into(),
                limit: 0,
                what: "there is no such table",
            })?;
            let field = |field, value, limit, what| Fault::Field { record, field, value, limit, what };
            if header.row >= shape.rows {
                return Err(field("row", header.row, shape.rows, "rows are in this shard"));
            }
            if header.reserved != 0 {
                return Err(field("reserved", header.reserved.into(), 0, "is the only value"));
            }
            let width = u64::from(shape.width);
            let count = u64::from(header.count);
            if header.start != SPARSE && u64::from(header.start) + count > width {
                return Err(field(
                    "start + count",
                    u64::from(header.start) + count,
                    width,
                    "columns has the table",
                ));
            }
            let (update, rest) = split(&header, shape.element.size(), rest).ok_or(field(
                "count",
                count,
                rest.len() as u64,
                "bytes are left of the message",
            ))?;
            if let Update::Sparse { columns, .. } = update {
                for column in columns.chunks_exact(4) {
                    let column = u32::read_from_bytes(column).expect("chunks of 4 bytes").into();
                    if column >= width {
                        return Err(field("column", column, width, "columns has the table"));
                    }
                }
            }
            if !shape.non_finite && !finite(shape.element, update) {
                return Err(field("value", header.row, 0, "NaN or infinity in an update of this row"));
            }
            body = rest;
        }
        if body.is_empty() { Ok(()) } else { Err(Fault::Trailing { bytes: body.len() }) }
    }

    /// A mutant: its first `records` records, as if they were all.
    pub fn first(&self, records: u32) -> Self {
        Self { records, ..*self }
    }

    /// The records of a batch that [`Batch::check`] has accepted, with the element size of each table.
    pub fn records(&self, size: impl Fn(u32) -> usize) -> impl Iterator<Item = Record<'a>> {
        let mut body = self.body;
        (0..self.records).map(move |_| {
            let (header, rest) = RecordHeader::read_from_prefix(body).expect("a checked batch");
            let (update, rest) = split(&header, size(header.table), rest).expect("a checked batch");
            body = rest;
            Record { table: header.table, row: header.row, update }
        })
    }
}

/// Splits a record's update off what follows its header.
fn split<'a>(header: &RecordHeader, size: usize, rest: &'a [u8]) -> Option<(Update<'a>, &'a [u8])> {
    let count = header.count as usize;
    let take = |bytes: &'a [u8], length: usize| -> Option<(&'a [u8], &'a [u8])> {
        let padded = length.checked_next_multiple_of(8)?;
        (padded <= bytes.len()).then(|| (&bytes[..length], &bytes[padded..]))
    };
    if header.start == SPARSE {
        let (columns, rest) = take(rest, count.checked_mul(4)?)?;
        let (values, rest) = take(rest, count.checked_mul(size)?)?;
        Some((Update::Sparse { columns, values }, rest))
    } else {
        let (values, rest) = take(rest, count.checked_mul(size)?)?;
        Some((Update::Dense { start: header.start, values }, rest))
    }
}

fn finite(element: ElementType, update: Update<'_>) -> bool {
    let (Update::Dense { values, .. } | Update::Sparse { values, .. }) = update;
    fn all<E: Element>(values: &[u8]) -> bool {
        let value = |bytes| E::read_from_bytes(bytes).expect("chunks have the size of an element");
        values.chunks_exact(size_of::<E>()).fold(true, |all, bytes| all & value(bytes).is_finite())
    }
    match element {
        ElementType::F32 => all::<f32>(values),
        ElementType::F64 => all::<f64>(values),
        ElementType::I32 | ElementType::I64 => true,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHAPE: Shape = Shape { element: ElementType::F32, rows: 10, width: 8, non_finite: false };

    fn decode(message: &[u8]) -> Result<Batch<'_>, Fault> {
        let header = MessageHeader::parse(message)?;
        let batch = Batch::parse(&header, message)?;
        batch.check(|table| (table == 3).then_some(SHAPE))?;
        Ok(batch)
    }

    fn one(row: u64, table: u32, delta: &Delta<f32>) -> Vec<u8> {
        let mut buffer = vec![0xaa; 1024];
        let mut writer = BatchWriter::new(&mut buffer);
        writer.push(table, row, delta);
        let length = writer.finish(1, 0, 1, None);
        buffer.truncate(length);
        buffer
    }

    #[test]
    fn a_bad_field_is_named_with_its_value() {
        let good = Delta::Dense { start: 0, values: vec![1.0; 8] };
        let long = Delta::Dense { start: 1, values: vec![1.0; 8] };
        let column = Delta::Sparse(vec![(1, 1.0), (8, 1.0)]);
        let nan = Delta::Sparse(vec![(1, f32::NAN)]);
        let cases = [
            (one(10, 3, &good), "row = 10"),
            (one(0, 4, &good), "table = 4"),
            (one(0, 3, &long), "start + count = 9"),
            (one(0, 3, &column), "column = 8"),
            (one(0, 3, &nan), "NaN or infinity"),
            (one(0, 3, &good)[..70].to_vec(), "count = 8"),
            (one(0, 3, &good)[..30].to_vec(), "batch header"),
            ([one(0, 3, &good), vec![0; 8]].concat(), "8 bytes"),
        ];
        for (message, text) in cases {
            let error = decode(&message).unwrap_err().to_string();
            assert!(error.contains(text), "{error}: no {text}");
        }
        assert!(decode(&one(9, 3, &good)).is_ok());
    }

    #[test]
    fn a_row_that_does_not_fit_is_sent_in_parts() {
        let mut buffer = vec![0; HEADERS + 24 + 16];
        let mut writer = BatchWriter::new(&mut buffer);
        assert_eq!(writer.push(3, 0, &Delta::Dense { start: 0, values: vec![1f32; 8] }), 4);
        assert_eq!(writer.push(3, 0, &Delta::Dense { start: 4, values: vec![1f32; 4] }), 0);
        assert_eq!(writer.records(), 1);
    }

    #[test]
    fn an_update_that_fits_a_message_is_never_in_two() {
        let mut buffer = vec![0; HEADERS + 2 * 24 + 48];
        let mut writer = BatchWriter::new(&mut buffer);
        assert_eq!(writer.push(3, 0, &Delta::Dense { start: 0, values: vec![1f32; 8] }), 8);
        assert_eq!(writer.push(3, 1, &Delta::Dense { start: 0, values: vec![1f32; 8] }), 0);
        assert_eq!(writer.push(3, 1, &Delta::Sparse(vec![(0, 1f32), (2, 1.0), (4, 1.0)])), 0);
        assert_eq!(writer.push(3, 1, &Delta::Sparse(vec![(0, 1f32), (2, 1.0)])), 2);
        assert_eq!(writer.records(), 2);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(updates in proptest::collection::vec((0u64..10, any::<bool>(), proptest::collection::vec((0u32..8, -9f32..9.0), 1..8)), 0..20)) {
            let mut buffer = vec![0xaa; 8192];
            let mut writer = BatchWriter::new(&mut buffer);
            let mut expected = vec![[0f32; 8]; 10];
            for (row, dense, pairs) in &updates {
                let delta = if *dense { Delta::Dense { start: 8 - pairs.len() as u32, values: pairs.iter().map(|p| p.1).collect() } }
                    else { Delta::Sparse(pairs.clone()) };
                prop_assert_eq!(writer.push(3, *row, &delta), pairs.len());
                delta.add_to(&mut expected[*row as usize]);
            }
            let length = writer.finish(5, 2, 9, Some(4));
            let batch = decode(&buffer[..length]).unwrap();
            prop_assert_eq!((batch.number, batch.clock), (9, Some(4)));
            let mut rows = vec![[0f32; 8]; 10];
            for record in batch.records(|_| 4) { record.update.apply(&mut rows[record.row as usize]); }
            prop_assert_eq!(rows, expected);
        }

        #[test]
        fn garbage_is_refused_without_a_panic(mut message in proptest::collection::vec(any::<u8>(), 0..200), kind in 0u8..3) {
            if let Some(first) = message.first_mut() { *first = kind; }
            if let Ok(batch) = decode(&message) {
                let mut rows = vec![[0f32; 8]; 10];
                for record in batch.records(|_| 4) { record.update.apply(&mut rows[record.row as usize]); }
            }
        }

        #[test]
        fn a_damaged_batch_is_refused_or_still_in_bounds(at in 0usize..200, byte: u8) {
            let mut message = one(3, 3, &Delta::Sparse(vec![(1, 1.0), (2, 2.0), (7, 3.0)]));
            let at = at % message.len();
            message[at] = byte;
            if let Ok(batch) = decode(&message) {
                let mut rows = vec![[0f32; 8]; 10];
                for record in batch.records(|_| 4) { record.update.apply(&mut rows[record.row as usize]); }
            }
        }
    }
}
