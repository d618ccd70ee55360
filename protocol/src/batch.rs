//! Batches: the updates that a client sends to one shard at a time, in one message.
//!
//! ```text
//! Kind::Batch      │ MessageHeader │ BatchHeader │ SectionHeader │ body │ SectionHeader │ body │ ...
//! Kind::Reference  │ MessageHeader │ BatchHeader │ SectionHeader │ SectionHeader │ ...     bodies: in the client's memory
//! ```
//!
//! | section | at `rows_at` (`u32`s) | at `values_at` |
//! |---|---|---|
//! | [`ROWS`] | `count` indices of images in the shard | a whole image for each |
//! | [`CELLS`] | `count` indices, `count` numbers of cells, then `total` columns | an element for each column |
//! | [`PART`] | one index | `count` elements, from column `total` on |
//!
//! What is called a row here is an [image](crate::row): a row, or the block of small rows that share one, with the columns of all of them.
//! **A batch names an image once.** An image has the batch's LSN as soon as the first update of the batch is in it, and who sees that LSN
//! takes all of the batch's for contained. (A row that is longer than a message comes in several batches, each with an LSN of its own.)
//!
//! Bodies start at multiples of 8 bytes: from the start of the message, or (by reference) of the memory that the client has
//! named. The values of a reference are read where they lie, by a server on the same host.
//!
//! **Checked as a whole.** [`Batch::read`] looks at every byte that decides anything (tables, indices, columns, lengths, the clock)
//! before anything is applied, and copies it: what it has copied nobody can change. The values of a message are
//! checked there too. Those of a reference are the client's own memory, which it can change at any time, so they are copied
//! and checked when they are added.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    element::{Element, ElementType},
    limits::{MAX_LISTED, MAX_ROW_BYTES},
    wide,
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

/// Kind of a section: whole rows.
pub const ROWS: u32 = 1;
/// Kind of a section: single elements of rows.
pub const CELLS: u32 = 2;
/// Kind of a section: part of a row that is longer than a message.
pub const PART: u32 = 3;

/// Before each section. See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SectionHeader {
    /// The shard's number of the table.
    pub table: u32,
    /// [`ROWS`], [`CELLS`] or [`PART`].
    pub kind: u32,
    /// Rows, or elements of a part.
    pub count: u32,
    /// Cells, or first column of a part; zero for whole rows.
    pub total: u32,
    /// Byte offset of the indices.
    pub rows_at: u64,
    /// Byte offset of the values.
    pub values_at: u64,
}

const _: () = assert!(size_of::<BatchHeader>() == 16);
const _: () = assert!(size_of::<SectionHeader>() == 32);

/// Bytes before the first section.
pub const HEADERS: usize = size_of::<MessageHeader>() + size_of::<BatchHeader>();
/// Bytes of a section's header.
pub const SECTION: usize = size_of::<SectionHeader>();

/// What a shard knows of a table, to check sections against.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Type of the elements.
    pub element: ElementType,
    /// Images in this shard.
    pub images: u64,
    /// Elements of an image.
    pub width: u32,
    /// Whether NaN and infinity are allowed.
    pub non_finite: bool,
}

impl Shape {
    fn row_bytes(&self) -> u64 {
        u64::from(self.width) * self.element.size() as u64
    }
}

/// Writes a batch into a buffer.
#[derive(Debug)]
pub struct BatchWriter<'a> {
    buffer: &'a mut [u8],
    length: usize,
    sections: u32,
}

impl<'a> BatchWriter<'a> {
    /// Into `buffer`, which has room for the headers.
    pub fn new(buffer: &'a mut [u8]) -> Self {
        assert!(buffer.len() >= HEADERS + SECTION + 16, "no room for a batch");
        Self { buffer, length: HEADERS, sections: 0 }
    }

    /// Number of sections so far.
    pub fn sections(&self) -> u32 {
        self.sections
    }

    /// Bytes that a section's body may have: what is left, or all that an empty message would have.
    fn room(&self, whole: bool) -> usize {
        let used = if whole { HEADERS } else { self.length };
        (self.buffer.len() & !7).saturating_sub(used + SECTION)
    }

    /// How many rows of `row_bytes` bytes a section of whole rows may have now.
    pub fn room_for_rows(&self, row_bytes: usize) -> usize {
        // The indices are filled up to 8 bytes.
        self.room(false).saturating_sub(4) / (4 + row_bytes)
    }

    /// Whether a row of `row_bytes` bytes fits a message at all.
    pub fn fits_a_message(&self, row_bytes: usize) -> bool {
        self.room(true) >= 8 + row_bytes
    }

    /// Whether a row with `cells` cells of `size` bytes fits what is left.
    pub fn has_room_for_cells(&self, rows: usize, cells: usize, size: usize) -> bool {
        (8 * rows + 4 * cells).next_multiple_of(8) + cells * size <= self.room(false)
    }

    /// How many elements of `size` bytes of one row a section may have now.
    pub fn room_for_part(&self, size: usize) -> usize {
        self.room(false).saturating_sub(8) / size
    }

    /// A section of whole rows, for which there is room. Returns where their values go, one row after the other.
    pub fn rows(&mut self, table: u32, rows: &[u32], row_bytes: usize) -> &mut [u8] {
        let header = SectionHeader {
            table,
            kind: ROWS,
            count: rows.len() as u32,
            total: 0,
            rows_at: (self.length + SECTION) as u64,
            values_at: 0,
        };
        self.section(header, &[rows.as_bytes()], rows.len() * row_bytes)
    }

    /// A section of single elements, for which there is room: of each row its index and its number of cells, and the columns and
    /// values of all, row by row.
    pub fn cells<E: Element>(
        &mut self,
        table: u32,
        rows: &[u32],
        counts: &[u32],
        columns: &[u32],
        values: &[E],
    ) {
        let header = SectionHeader {
            table,
            kind: CELLS,
            count: rows.len() as u32,
            total: columns.len() as u32,
            rows_at: (self.length + SECTION) as u64,
            values_at: 0,
        };
        let lists = [rows.as_bytes(), counts.as_bytes(), columns.as_bytes()];
        self.section(header, &lists, size_of_val(values)).copy_from_slice(values.as_bytes());
    }

    /// A section of elements of one row from column `start` on, for which there is room.
    pub fn part(&mut self, table: u32, row: u32, start: u32, count: usize, values: &[u8]) {
        let header = SectionHeader {
            table,
            kind: PART,
            count: count as u32,
            total: start,
            rows_at: (self.length + SECTION) as u64,
            values_at: 0,
        };
        self.section(header, &[row.as_bytes()], values.len()).copy_from_slice(values);
    }

    /// The header of a section whose body lies in the client's memory.
    pub fn refer(&mut self, header: SectionHeader) {
        self.buffer[self.length..self.length + SECTION].copy_from_slice(header.as_bytes());
        self.length += SECTION;
        self.sections += 1;
    }

    /// Whether one more section can be referred to.
    pub fn has_room_to_refer(&self) -> bool {
        self.buffer.len() - self.length >= SECTION
    }

    fn section(&mut self, mut header: SectionHeader, lists: &[&[u8]], values: usize) -> &mut [u8] {
        let mut at = self.length + SECTION;
        for list in lists {
            self.buffer[at..at + list.len()].copy_from_slice(list);
            at += list.len();
        }
        let values_at = at.next_multiple_of(8);
        self.buffer[at..values_at].fill(0);
        header.values_at = values_at as u64;
        self.buffer[self.length..self.length + SECTION].copy_from_slice(header.as_bytes());
        let end = values_at + values;
        self.length = end.next_multiple_of(8);
        self.buffer[end..self.length].fill(0);
        self.sections += 1;
        &mut self.buffer[values_at..end]
    }

    /// Writes the headers and returns the length of the message. `clock`: the batch ends that clock.
    pub fn finish(self, kind: Kind, sequence: u64, returned: u64, number: u64, clock: Option<u64>) -> usize {
        let flags = if clock.is_some() { END_OF_CLOCK } else { 0 };
        let header = MessageHeader::new(kind, flags, self.sections, sequence, returned);
        let batch = BatchHeader { number, clock: clock.unwrap_or(0) };
        self.buffer[..size_of::<MessageHeader>()].copy_from_slice(header.as_bytes());
        self.buffer[size_of::<MessageHeader>()..HEADERS].copy_from_slice(batch.as_bytes());
        self.length
    }
}

/// Where the bodies of a batch's sections lie.
pub trait Source {
    /// Bytes that there are.
    fn len(&self) -> u64;
    /// Whether there is nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Copies bytes `at..at + into.len()` out; they are there.
    fn read(&self, at: u64, into: &mut [u8]);
}

impl Source for [u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read(&self, at: u64, into: &mut [u8]) {
        into.copy_from_slice(&self[at as usize..at as usize + into.len()]);
    }
}

/// A section that has been checked; its lists are in the [`Batch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Checked {
    header: SectionHeader,
    /// First of its indices, counts and columns in [`Batch::lists`].
    first: usize,
}

/// Where a section's body is: entries of its lists, first byte and number of bytes of its values.
#[derive(Debug, Clone, Copy)]
struct Body {
    list: usize,
    values_at: usize,
    values: usize,
}

/// A section of a checked batch: what is to be added to which rows, but for the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section<'a> {
    /// The shard's number of the table.
    pub table: u32,
    /// Which elements of which rows.
    pub target: Target<'a>,
    /// Byte offset of the values in the batch's source: row by row, without gaps.
    pub values_at: u64,
}

/// The elements that a section changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target<'a> {
    /// Whole rows, by index in the shard.
    Rows(&'a [u32]),
    /// Single elements.
    Cells {
        /// The rows.
        rows: &'a [u32],
        /// How many columns of each.
        counts: &'a [u32],
        /// The columns of all, row by row.
        columns: &'a [u32],
    },
    /// Consecutive elements of one row.
    Part {
        /// The row.
        row: u32,
        /// Column of the first one.
        start: u32,
        /// How many.
        count: u32,
    },
}

/// A batch that has been checked. Made once and used again: its lists keep their memory.
#[derive(Debug, Default)]
pub struct Batch {
    number: u64,
    clock: Option<u64>,
    sections: Vec<Checked>,
    lists: Vec<u32>,
}

impl Batch {
    /// Its number.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The clock that it ends.
    pub fn clock(&self) -> Option<u64> {
        self.clock
    }

    /// Takes the batch in `message`, whose header has been read as `header`, in the place of what was here before. Everything is checked
    /// against the shapes of the tables. `slabs` is the memory that the client has named, for a reference.
    ///
    /// # Errors
    /// The first thing that is wrong, with the field, the value and the limit. The batch is not to be used then.
    pub fn read<S: Source + ?Sized>(
        &mut self,
        header: &MessageHeader,
        message: &[u8],
        slabs: Option<&S>,
        shape: impl Fn(u32) -> Option<Shape>,
    ) -> Result<(), Fault> {
        self.sections.clear();
        self.lists.clear();
        let body = message.get(size_of::<MessageHeader>()..).unwrap_or_default();
        let (batch, _) = BatchHeader::read_from_prefix(body)
            .map_err(|_| Fault::Short { field: "batch header", length: message.len() })?;
        self.number = batch.number;
        self.clock = (header.flags & END_OF_CLOCK != 0).then_some(batch.clock);
        let mut at = HEADERS;
        for record in 0..header.records {
            let (section, _) = SectionHeader::read_from_prefix(message.get(at..).unwrap_or_default())
                .map_err(|_| Fault::Short { field: "section header", length: message.len() })?;
            at += SECTION;
            let here = if header.kind == Kind::Reference as u8 {
                let slabs = slabs
                    .ok_or_else(|| Fault::State("a reference, but the client has named no memory".into()))?;
                self.section(record, section, slabs, &shape).map(|_| at)
            } else {
                self.inline(record, section, message, at, &shape)
            };
            let table = section.table;
            at = here.map_err(|fault| Fault::Table { table, fault: Box::new(fault) })?;
        }
        if at < message.len() { Err(Fault::Trailing { bytes: message.len() - at }) } else { Ok(()) }
    }

    /// Checks a section whose body begins at byte `at` of the message, its values too. Returns where it ends.
    fn inline(
        &mut self,
        record: u32,
        header: SectionHeader,
        message: &[u8],
        at: usize,
        shape: &impl Fn(u32) -> Option<Shape>,
    ) -> Result<usize, Fault> {
        if header.rows_at != at as u64 {
            return Err(field(record, "rows_at", header.rows_at, at as u64, "is where it begins"));
        }
        let body = self.section(record, header, message, shape)?;
        let begin = (at + body.list * 4).next_multiple_of(8);
        if body.values_at != begin {
            return Err(field(record, "values_at", header.values_at, begin as u64, "is where they begin"));
        }
        let end = begin + body.values;
        let shape = shape(header.table).expect("it has been looked up");
        if !shape.non_finite && !finite(shape.element, &message[begin..end]) {
            let size = shape.element.size();
            let good =
                message[begin..end].chunks_exact(size).take_while(|value| finite(shape.element, value));
            let row = self.row_of(good.count(), shape.width as usize);
            return Err(Fault::NotFinite { row: row.into() });
        }
        Ok(end.next_multiple_of(8))
    }

    /// The row of the `index`-th value of the last section.
    fn row_of(&self, index: usize, width: usize) -> u32 {
        let Checked { header, first } = self.sections.last().expect("there is one");
        let (lists, rows) = (&self.lists[*first..], header.count as usize);
        let mut end = 0;
        match header.kind {
            ROWS => lists[index / width],
            CELLS => {
                let counts = lists[rows..2 * rows].iter().map(|count| *count as usize);
                let before = counts.take_while(|count| {
                    end += count;
                    end <= index
                });
                lists[before.count()]
            }
            _ => lists[0],
        }
    }

    /// Checks a section and copies its lists.
    fn section<S: Source + ?Sized>(
        &mut self,
        record: u32,
        header: SectionHeader,
        source: &S,
        shape: &impl Fn(u32) -> Option<Shape>,
    ) -> Result<Body, Fault> {
        let SectionHeader { table, kind, count, total, rows_at, values_at } = header;
        let bad = |name, value, limit, what| Err(field(record, name, value, limit, what));
        let Some(shape) = shape(table) else {
            return bad("table", table.into(), 0, "there is no such table");
        };
        let (many, cells) = (u64::from(count), u64::from(total));
        let size = shape.element.size() as u64;
        let (list, values) = match kind {
            ROWS => (many, many * shape.row_bytes()),
            CELLS => (2 * many + cells, cells * size),
            PART => (1, many * size),
            _ => return bad("kind", kind.into(), 0, "there is no such section"),
        };
        if rows_at % 8 != 0 || values_at % 8 != 0 {
            return bad("values_at", values_at, 8, "divides all offsets");
        }
        let inside = |at: u64, length: u64| at.checked_add(length).is_some_and(|end| end <= source.len());
        if !inside(rows_at, list * 4) {
            return bad("count", many, source.len().saturating_sub(rows_at), "bytes are left for its rows");
        }
        if !inside(values_at, values) {
            return bad(
                "count",
                many,
                source.len().saturating_sub(values_at),
                "bytes are left for its values",
            );
        }
        let first = self.lists.len();
        if first as u64 + list > MAX_LISTED {
            return bad("count", many, MAX_LISTED, "indices, counts and columns may be in a batch");
        }
        self.lists.resize(first + list as usize, 0);
        source.read(rows_at, self.lists[first..].as_mut_bytes());
        let rows = if kind == PART { 1 } else { count as usize };
        let lists = &self.lists[first..];
        // The greatest decides: one pass without branches.
        let greatest = lists[..rows].iter().copied().max().map_or(0, |row| u64::from(row) + 1);
        if greatest > shape.images {
            return bad("row", greatest - 1, shape.images, "rows are in this shard");
        }
        let width = u64::from(shape.width);
        match kind {
            CELLS => {
                let sum: u64 = lists[rows..2 * rows].iter().map(|count| u64::from(*count)).sum();
                if sum != cells {
                    return bad("total", cells, sum, "cells have its rows");
                }
                let most = lists[rows..2 * rows].iter().copied().max().unwrap_or(0);
                let limit = MAX_ROW_BYTES as u64 / size;
                if u64::from(most) > limit {
                    return bad("cells", most.into(), limit, "may be of one row");
                }
                let greatest =
                    lists[2 * rows..].iter().copied().max().map_or(0, |column| u64::from(column) + 1);
                if greatest > width {
                    return bad("column", greatest - 1, width, "columns has the table");
                }
            }
            PART if cells + many > width => {
                return bad("start + count", cells + many, width, "columns has the table");
            }
            ROWS if total != 0 => return bad("total", cells, 0, "is the only value"),
            _ => {}
        }
        self.sections.push(Checked { header, first });
        Ok(Body { list: list as usize, values_at: values_at as usize, values: values as usize })
    }

    /// Its sections.
    pub fn sections(&self) -> impl Iterator<Item = Section<'_>> {
        self.sections.iter().map(|Checked { header, first }| {
            let lists = &self.lists[*first..];
            let count = header.count as usize;
            let target = match header.kind {
                ROWS => Target::Rows(&lists[..count]),
                CELLS => Target::Cells {
                    rows: &lists[..count],
                    counts: &lists[count..2 * count],
                    columns: &lists[2 * count..2 * count + header.total as usize],
                },
                _ => Target::Part { row: lists[0], start: header.total, count: header.count },
            };
            Section { table: header.table, target, values_at: header.values_at }
        })
    }
}

fn field(record: u32, field: &'static str, value: u64, limit: u64, what: &'static str) -> Fault {
    Fault::Field { record, field, value, limit, what }
}

/// Whether all of `values`, elements of this type, are finite.
pub fn finite(element: ElementType, values: &[u8]) -> bool {
    wide! {
        fn all<E: Element + KnownLayout>(values: &[u8]) -> bool {
            match <[E]>::ref_from_bytes(values) {
                Ok(values) => E::all_finite(values),
                Err(_) => values.chunks_exact(size_of::<E>()).all(|bytes| {
                    E::read_from_bytes(bytes).expect("chunks have the size of an element").is_finite()
                }),
            }
        }
    }
    match element {
        ElementType::F32 => all::<f32>(values),
        ElementType::F64 => all::<f64>(values),
        ElementType::I32 | ElementType::I64 => true,
    }
}

#[cfg(test)]
mod tests;
