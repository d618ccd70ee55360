//! The slabs of a table in one shard, merged row by row while they are written into messages.
//!
//! One batch carries the whole update of a row, unless the update is longer than a message. Each slab is told
//! which batch carries which of its rows *before* that batch is posted (see [`slab`](crate::slab)).
//!
//! Finite updates of several slabs may have a sum that is not finite. Then they are sent separately, one
//! after the other. So the row overflows at the server, and the server does not blame the client for sending
//! infinity.

use std::sync::Arc;

use fervor_protocol::{Element, batch::BatchWriter};
use zerocopy::{FromBytes, IntoBytes};

use crate::slab::{AnySlab, Slab};

/// How far the slabs of a table have been written.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cursor {
    /// Which slab, and which of its rows: the whole ones, then those of cells.
    slab: usize,
    row: usize,
    /// First column of that row that has not been written.
    column: usize,
}

/// The slabs of a table with their element type.
pub struct Merge<'a, E> {
    slabs: Vec<&'a Slab<E>>,
    width: usize,
    /// The shard's number of the table.
    table: u32,
    /// All sums are finite for sure, or need not be.
    safe: bool,
}

/// What contributes to a row: a slab, by number, and its entry for the row.
type Contributor = (usize, u32);

impl<'a, E: Element> Merge<'a, E> {
    /// Of `slabs` of a table with rows of `width` elements. `finite`: sums have to be.
    pub fn new(slabs: &'a [Arc<dyn AnySlab>], width: usize, table: u32, finite: bool) -> Self {
        let typed = |slab: &'a Arc<dyn AnySlab>| {
            slab.as_any().downcast_ref::<Slab<E>>().expect("a table's number stands for its element type")
        };
        let slabs: Vec<_> = slabs.iter().map(typed).collect();
        let safe =
            !finite || slabs.len() < 2 || slabs.iter().map(|slab| slab.greatest()).sum::<f64>() < E::SAFE_SUM;
        Self { slabs, width, table, safe }
    }

    /// The row at the cursor: its index.
    fn row(&self, cursor: &Cursor) -> Option<u32> {
        let slab = self.slabs[cursor.slab];
        match cursor.row.checked_sub(slab.rows()) {
            None => Some(slab.row(cursor.row)),
            Some(at) => {
                let (row, pairs) = slab.cells(at);
                (!pairs.is_empty()).then_some(row)
            }
        }
    }

    /// Appends who contributes to `row`, which slab number `slab` has, to `from`. (To a list of the caller's, since this is done for
    /// each row that is sent.) `false`: an earlier slab's row has carried it already.
    fn contributors(&self, slab: usize, row: u32, from: &mut Vec<Contributor>) -> bool {
        if self.slabs[..slab].iter().any(|earlier| earlier.find(row) != 0) {
            return false;
        }
        let entries = (slab..self.slabs.len()).map(|other| (other, self.slabs[other].find(row)));
        from.extend(entries.filter(|(_, entry)| *entry != 0));
        true
    }

    /// Whether the updates of the row at the cursor go one by one: their sum would not be finite.
    fn is_divided(&self, cursor: &Cursor) -> bool {
        if self.safe {
            return false;
        }
        let Some(row) = self.row(cursor).filter(|_| cursor.column == 0) else { return false };
        let mut sum = vec![E::default(); self.width];
        let having = self.slabs.iter().filter(|slab| slab.add_to(row, 0, &mut sum)).count();
        having > 1 && !E::all_finite(&sum)
    }

    /// Writes the cursor's slab's own update of a row whose updates are divided, alone in a batch: an image must not have the
    /// batch's LSN before all of the batch is in it.
    fn write_alone(&self, cursor: &mut Cursor, writer: &mut BatchWriter<'_>, part: usize) -> bool {
        if writer.sections() > 0 {
            return false;
        }
        let slab = self.slabs[cursor.slab];
        let row = self.row(cursor).expect("a divided row is there");
        let from = [(cursor.slab, slab.find(row))];
        self.write_whole(cursor, writer, part, row, &from);
        *cursor = self.forward(*cursor);
        cursor.slab == self.slabs.len()
    }

    /// The cursor, at the next slab if this one is done.
    fn forward(&self, cursor: Cursor) -> Cursor {
        let slab = self.slabs[cursor.slab];
        let done = cursor.row == slab.rows() + slab.cell_rows();
        if done { Cursor { slab: cursor.slab + 1, ..Cursor::default() } } else { cursor }
    }

    fn goes_with(&self, from: &[Contributor], part: usize) {
        for (slab, entry) in from {
            self.slabs[*slab].goes_with(*entry, part);
        }
    }

    /// Writes rows from the cursor on, as many as there is room for. Whether that was all.
    pub fn write(&self, cursor: &mut Cursor, writer: &mut BatchWriter<'_>, part: usize) -> bool {
        while cursor.slab < self.slabs.len() {
            let slab = self.slabs[cursor.slab];
            let next = self.forward(*cursor);
            if next.slab > cursor.slab {
                *cursor = next;
                continue;
            }
            if self.is_divided(cursor) {
                return self.write_alone(cursor, writer, part);
            }
            let more = if cursor.row < slab.rows() {
                self.write_rows(cursor, writer, part)
            } else {
                self.write_cells(cursor, writer, part)
            };
            if !more {
                return false;
            }
        }
        true
    }

    /// Writes whole rows of the cursor's slab: one section. `false`: there is no more room.
    fn write_rows(&self, cursor: &mut Cursor, writer: &mut BatchWriter<'_>, part: usize) -> bool {
        let row_bytes = self.width * size_of::<E>();
        if !writer.fits_a_message(row_bytes) {
            return self.write_part(cursor, writer, part);
        }
        let slab = self.slabs[cursor.slab];
        let room = writer.room_for_rows(row_bytes);
        // The rows, who contributes to all of them, and where each row's contributors end.
        let (mut rows, mut from, mut ends) = (Vec::new(), Vec::new(), Vec::new());
        while cursor.row < slab.rows() && rows.len() < room && !self.is_divided(cursor) {
            let (row, first) = (slab.row(cursor.row), from.len());
            if self.contributors(cursor.slab, row, &mut from) {
                self.goes_with(&from[first..], part);
                rows.push(row);
                ends.push(from.len());
            }
            cursor.row += 1;
        }
        if !rows.is_empty() {
            let values = writer.rows(self.table, &rows, row_bytes);
            let mut start = 0;
            for (into, end) in values.chunks_exact_mut(row_bytes).zip(ends) {
                let into = <[E]>::mut_from_bytes(into).expect("sections are aligned");
                let contributors = &from[std::mem::replace(&mut start, end)..end];
                let ((first, entry), others) = contributors.split_first().expect("a row has a contributor");
                self.slabs[*first].copy_entry(*entry, into);
                others.iter().for_each(|(slab, entry)| self.slabs[*slab].add_entry(*entry, 0, into));
            }
        }
        cursor.row == slab.rows() || self.is_divided(cursor)
    }

    /// Writes a row that is longer than a message, as far as there is room.
    fn write_part(&self, cursor: &mut Cursor, writer: &mut BatchWriter<'_>, part: usize) -> bool {
        let row = self.row(cursor).expect("whole rows are there");
        let mut from = Vec::new();
        if !self.contributors(cursor.slab, row, &mut from) {
            cursor.row += 1;
            return true;
        }
        let count = writer.room_for_part(size_of::<E>()).min(self.width - cursor.column);
        if count == 0 {
            return false;
        }
        let mut sum = vec![E::default(); self.width];
        from.iter().for_each(|(slab, entry)| self.slabs[*slab].add_entry(*entry, 0, &mut sum));
        for (slab, entry) in &from {
            self.slabs[*slab].range_goes_with(*entry, cursor.column + count, part);
        }
        let values = &sum[cursor.column..cursor.column + count];
        writer.part(self.table, row, cursor.column as u32, count, values.as_bytes());
        cursor.column += count;
        if cursor.column < self.width {
            return false;
        }
        (cursor.row, cursor.column) = (cursor.row + 1, 0);
        true
    }

    /// Writes rows of cells of the cursor's slab: one section, or a whole row in one of its own where another slab has that.
    /// `false`: there is no more room.
    fn write_cells(&self, cursor: &mut Cursor, writer: &mut BatchWriter<'_>, part: usize) -> bool {
        if cursor.column > 0 {
            return self.write_part(cursor, writer, part);
        }
        let slab = self.slabs[cursor.slab];
        let end = slab.rows() + slab.cell_rows();
        let mut section = CellSection::default();
        let (mut more, mut from) = (true, Vec::new());
        while cursor.row < end && !self.is_divided(cursor) {
            from.clear();
            let row = self.row(cursor).filter(|row| self.contributors(cursor.slab, *row, &mut from));
            let Some(row) = row else {
                cursor.row += 1;
                continue;
            };
            if !from.iter().all(|(_, entry)| Slab::<E>::is_cells(*entry)) {
                if section.rows.is_empty() {
                    return self.write_whole(cursor, writer, part, row, &from);
                }
                break;
            }
            let pairs = from.iter().flat_map(|(slab, entry)| self.slabs[*slab].pairs(*entry));
            let count = pairs.clone().count();
            let (rows, columns) = (section.rows.len() + 1, section.columns.len() + count);
            if !writer.has_room_for_cells(rows, columns, size_of::<E>()) {
                if section.rows.is_empty() && writer.sections() == 0 {
                    // More than a message holds: it goes as a whole row, of whose parts it is known what is where.
                    return self.write_whole(cursor, writer, part, row, &from);
                }
                more = false;
                break;
            }
            self.goes_with(&from, part);
            section.add(row, pairs);
            cursor.row += 1;
        }
        if !section.rows.is_empty() {
            writer.cells(self.table, &section.rows, &section.counts, &section.columns, &section.values);
        }
        more
    }

    /// Writes the whole row at the cursor, of which its slab has cells only.
    fn write_whole(
        &self,
        cursor: &mut Cursor,
        writer: &mut BatchWriter<'_>,
        part: usize,
        row: u32,
        from: &[Contributor],
    ) -> bool {
        let row_bytes = self.width * size_of::<E>();
        if !writer.fits_a_message(row_bytes) {
            return self.write_part(cursor, writer, part);
        }
        if writer.room_for_rows(row_bytes) == 0 {
            return false;
        }
        self.goes_with(from, part);
        let into = writer.rows(self.table, &[row], row_bytes);
        let into = <[E]>::mut_from_bytes(into).expect("sections are aligned");
        into.fill(E::default());
        from.iter().for_each(|(slab, entry)| self.slabs[*slab].add_entry(*entry, 0, into));
        cursor.row += 1;
        true
    }
}

/// A section of cells that is being put together.
struct CellSection<E> {
    rows: Vec<u32>,
    counts: Vec<u32>,
    columns: Vec<u32>,
    values: Vec<E>,
}

impl<E> Default for CellSection<E> {
    fn default() -> Self {
        Self { rows: Vec::new(), counts: Vec::new(), columns: Vec::new(), values: Vec::new() }
    }
}

impl<E: Copy> CellSection<E> {
    fn add<'a>(&mut self, row: u32, pairs: impl Iterator<Item = &'a (u32, E)>)
    where
        E: 'a,
    {
        let before = self.columns.len();
        for (column, value) in pairs {
            self.columns.push(*column);
            self.values.push(*value);
        }
        self.rows.push(row);
        self.counts.push((self.columns.len() - before) as u32);
    }
}
