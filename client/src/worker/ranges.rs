//! Ranges of adjacent rows, for dense layers: one call for many rows, at the speed of copying them.

use fervor_protocol::Element;
use fervor_verbs::transport::Transport;

use super::{Worker, wrong_length};
use crate::{error::Error, table::Table};

/// Rows of which the numbers are made at a time.
const ROWS: usize = 256;

impl<T: Transport> Worker<T> {
    /// Reads the rows from `first` on, as many as `into` is long, one after the other. Each row is as [`Worker::get`] would read it.
    ///
    /// # Errors
    /// As [`Worker::get`]; `into` is not whole rows long.
    pub fn get_range<E: Element>(
        &mut self,
        table: &Table<E>,
        first: u64,
        into: &mut [E],
    ) -> Result<(), Error> {
        let width = table.width();
        let count = self.check_range(table, first, into.len())?;
        if !self.copies {
            return self.read_many_in_place(&*table.0, count as usize, |at| first + at as u64, into);
        }
        let all: Vec<u64> = (first..first + count).collect();
        for (rows, into) in all.chunks(ROWS).zip(into.chunks_mut(ROWS * width)) {
            self.get_many(table, rows, into)?;
        }
        Ok(())
    }

    /// Adds `deltas` to the rows from `first` on, one after the other: as [`Worker::inc`] of each.
    ///
    /// # Errors
    /// As [`Worker::inc`]; `deltas` is not whole rows long. What comes before a row that is refused has been added.
    pub fn inc_range<E: Element>(&mut self, table: &Table<E>, first: u64, deltas: &[E]) -> Result<(), Error> {
        let count = self.check_range(table, first, deltas.len())?;
        for (row, delta) in (first..first + count).zip(deltas.chunks_exact(table.width())) {
            self.inc(table, row, delta)?;
        }
        Ok(())
    }

    /// Number of rows in a range of `length` elements from row `first` on.
    fn check_range<E: Element>(&self, table: &Table<E>, first: u64, length: usize) -> Result<u64, Error> {
        let (core, width) = (&*table.0, table.width());
        if !length.is_multiple_of(width) {
            return Err(wrong_length(core, length, length.next_multiple_of(width)));
        }
        let count = (length / width) as u64;
        if count > 0 {
            self.check(core, first.saturating_add(count - 1))?;
        }
        Ok(count)
    }
}
