//! A worker's updates of its present clock: its own memory, no locks. `clock()` merges them into the
//! client's, where those of all workers become one update per row.

use std::{any::Any, sync::Arc};

use fervor_protocol::{Element, pending::Delta};

use crate::{hash::RowMap, table::TableCore};

/// The updates of one table, whatever its element type.
pub trait AnyOplog: Send {
    /// Merges all of them into the client's, and is empty then.
    fn merge(&mut self);
    /// For the typed way in.
    fn as_any(&mut self) -> &mut dyn Any;
}

/// Updates of the rows of one shard.
#[derive(Debug)]
struct ShardLog<E> {
    /// Per row, where its sum is: `values[place * width..]`.
    dense: RowMap<usize>,
    rows: Vec<u64>,
    values: Vec<E>,
    /// Per row, where its pairs are.
    sparse: RowMap<usize>,
    pairs: Vec<(u64, Vec<(u32, E)>)>,
}

/// The updates of one table.
#[derive(Debug)]
pub struct Oplog<E: Element> {
    table: Arc<TableCore<E>>,
    shards: Vec<ShardLog<E>>,
}

impl<E: Element> Oplog<E> {
    pub fn new(table: Arc<TableCore<E>>) -> Self {
        let shard = || ShardLog {
            dense: RowMap::default(),
            rows: Vec::new(),
            values: Vec::new(),
            sparse: RowMap::default(),
            pairs: Vec::new(),
        };
        let shards = (0..table.shards()).map(|_| shard()).collect();
        Self { table, shards }
    }

    /// Adds an update of a whole row.
    pub fn add(&mut self, shard: usize, row: u64, delta: &[E]) {
        let log = &mut self.shards[shard];
        let width = delta.len();
        let next = log.rows.len();
        let place = *log.dense.entry(row).or_insert(next);
        if place == next {
            log.rows.push(row);
            log.values.extend_from_slice(delta);
        } else {
            E::add_all(&mut log.values[place * width..(place + 1) * width], delta);
        }
    }

    /// Adds an update of single elements.
    pub fn add_at(&mut self, shard: usize, row: u64, pairs: &[(u32, E)]) {
        let log = &mut self.shards[shard];
        let next = log.pairs.len();
        let place = *log.sparse.entry(row).or_insert(next);
        if place == next {
            log.pairs.push((row, pairs.to_vec()));
        } else {
            log.pairs[place].1.extend_from_slice(pairs);
        }
    }

    /// Adds what is logged of `row` to a copy of it.
    #[inline]
    pub fn add_to(&self, shard: usize, row: u64, copy: &mut [E]) {
        let log = &self.shards[shard];
        if !log.rows.is_empty() {
            if let Some(&place) = log.dense.get(&row) {
                let width = copy.len();
                E::add_all(copy, &log.values[place * width..(place + 1) * width]);
            }
        }
        if !log.pairs.is_empty() {
            if let Some(&place) = log.sparse.get(&row) {
                for (column, value) in &log.pairs[place].1 {
                    let element = &mut copy[*column as usize];
                    *element = element.plus(*value);
                }
            }
        }
    }
}

impl<E: Element> AnyOplog for Oplog<E> {
    fn merge(&mut self) {
        let width = self.table.schema().width as usize;
        for (shard, log) in self.shards.iter_mut().enumerate() {
            if log.rows.is_empty() && log.pairs.is_empty() {
                continue;
            }
            let mut pending = self.table.pending(shard);
            for (row, values) in log.rows.drain(..).zip(log.values.chunks_exact(width)) {
                pending.merge(&self.table, row, Delta::Dense { start: 0, values: values.to_vec() });
            }
            for (row, pairs) in log.pairs.drain(..) {
                pending.merge(&self.table, row, Delta::Sparse(pairs));
            }
            log.values.clear();
            log.dense.clear();
            log.sparse.clear();
        }
    }

    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}
