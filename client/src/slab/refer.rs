//! Naming a slab: the sections that say where it lies in memory that the server sees.

use fervor_protocol::{
    Element,
    batch::{CELLS, ROWS, SectionHeader},
};

use super::{PIECE_BYTES, Slab, block::Block};

impl<E: Element> Slab<E> {
    /// The sections that name all of it, with the cells brought into named memory. `None`: some of it is elsewhere.
    pub(super) fn refer(&mut self) -> Option<Vec<SectionHeader>> {
        let mut sections = Vec::new();
        let per_block = 1usize << self.geometry.shift;
        for (number, block) in self.blocks.iter().enumerate().take(self.rows.div_ceil(per_block)) {
            let offset = block.offset()?;
            let count = (self.rows - number * per_block).min(per_block);
            let values_at = offset + self.geometry.values_at as u64;
            sections.push(SectionHeader {
                table: 0,
                kind: ROWS,
                count: count as u32,
                total: 0,
                rows_at: offset,
                values_at,
            });
        }
        let mut first = 0;
        while first < self.cells.len() {
            first = self.refer_cells(first, &mut sections)?;
        }
        Some(sections)
    }

    /// Writes rows of cells from the `first` one on into a block, as many as fit, and names it. The next row.
    fn refer_cells(&mut self, first: usize, sections: &mut Vec<SectionHeader>) -> Option<usize> {
        let bytes =
            |rows: usize, cells: usize| (8 * rows + 4 * cells).next_multiple_of(8) + cells * size_of::<E>();
        let (mut rows, mut cells, mut next) = (0, 0, first);
        while let Some(row) = self.cells.get(next) {
            let empty = row.pairs.is_empty();
            if !empty && bytes(rows + 1, cells + row.pairs.len()) > PIECE_BYTES {
                break;
            }
            rows += usize::from(!empty);
            cells += row.pairs.len();
            next += 1;
        }
        if rows == 0 {
            // A row of more cells than a block holds has become a whole one before.
            assert!(next == self.cells.len(), "a row of cells fits a block");
            return Some(next);
        }
        let mut block = Block::new(self.pool.as_ref(), PIECE_BYTES);
        let offset = block.offset()?;
        let values_at = (8 * rows + 4 * cells).next_multiple_of(8);
        let (lists, values) = block.bytes_mut().split_at_mut(values_at);
        let (indices, lists) = lists.split_at_mut(4 * rows);
        let (counts, columns) = lists.split_at_mut(4 * rows);
        let some = self.cells[first..next].iter().filter(|row| !row.pairs.is_empty());
        let (mut at, mut cell) = (0, 0);
        for row in some {
            indices[4 * at..4 * at + 4].copy_from_slice(&row.row.to_le_bytes());
            counts[4 * at..4 * at + 4].copy_from_slice(&(row.pairs.len() as u32).to_le_bytes());
            at += 1;
            for (column, value) in &row.pairs {
                columns[4 * cell..4 * cell + 4].copy_from_slice(&column.to_le_bytes());
                let to = cell * size_of::<E>();
                values[to..to + size_of::<E>()].copy_from_slice(value.as_bytes());
                cell += 1;
            }
        }
        sections.push(SectionHeader {
            table: 0,
            kind: CELLS,
            count: rows as u32,
            total: cells as u32,
            rows_at: offset,
            values_at: offset + values_at as u64,
        });
        self.encoded.push(block);
        Some(next)
    }
}
