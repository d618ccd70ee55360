//! A worker's updates of its present clock: its own memory, no locks. `clock()` merges them into the
//! client's, where those of all workers become one update per row.

use std::{any::Any, sync::Arc};

use fervor_protocol::{Element, pending::Delta, value::Transit};

use crate::{hash::RowMap, table::TableCore};

/// The updates of one table, whatever its element type.
pub trait AnyOplog: Send {
    /// Merges all of them into the client's, and is empty then.
    fn merge(&mut self);
    /// For the typed way in.
    fn as_any(&mut self) -> &mut dyn Any;
    /// Updates not yet visible to all, of a value-bounded table.
    fn transit(&mut self) -> Option<&mut Transit>;
}

/// Updates of the rows of one shard.
#[derive(Debug)]
struct ShardLog<E> {
    /// Per row of the shard, one more than where its sum is: `values[place * width..]`. Made when the first row is
    /// updated; pages that no row touches cost nothing.
    dense: Vec<u32>,
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
    /// Those not yet visible to all, if the table is value-bounded.
    transit: Option<Transit>,
}

impl<E: Element> Oplog<E> {
    pub fn new(table: Arc<TableCore<E>>) -> Self {
        let shard = || ShardLog {
            dense: Vec::new(),
            rows: Vec::new(),
            values: Vec::new(),
            sparse: RowMap::default(),
            pairs: Vec::new(),
        };
        let shards = (0..table.shards()).map(|_| shard()).collect();
        let transit = table.schema().model.value_bounded().then(Transit::default);
        Self { table, shards, transit }
    }

    /// Adds an update of a whole row.
    pub fn add(&mut self, shard: usize, row: u64, delta: &[E]) {
        let index = (row / self.shards.len() as u64) as usize;
        let log = &mut self.shards[shard];
        let width = delta.len();
        if log.dense.is_empty() {
            log.dense = vec![0; self.table.rows_in(shard)];
        }
        match log.dense[index] as usize {
            0 => {
                log.rows.push(row);
                log.values.extend_from_slice(delta);
                log.dense[index] = log.rows.len() as u32;
            }
            place => E::add_all(&mut log.values[(place - 1) * width..place * width], delta),
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
            let place = log.dense[(row / self.shards.len() as u64) as usize] as usize;
            if place > 0 {
                let width = copy.len();
                E::add_all(copy, &log.values[(place - 1) * width..place * width]);
            }
        }
        // Most have none: they need not ask for the row.
        let place = if log.pairs.is_empty() { None } else { log.sparse.get(&row) };
        if let Some(&place) = place {
            for (column, value) in &log.pairs[place].1 {
                let element = &mut copy[*column as usize];
                *element = element.plus(*value);
            }
        }
    }
}

impl<E: Element> AnyOplog for Oplog<E> {
    fn merge(&mut self) {
        let width = self.table.schema().width as usize;
        let shards = self.shards.len() as u64;
        for (shard, log) in self.shards.iter_mut().enumerate() {
            if log.rows.is_empty() && log.pairs.is_empty() {
                continue;
            }
            let mut pending = self.table.pending(shard);
            for (row, values) in log.rows.drain(..).zip(log.values.chunks_exact(width)) {
                pending.merge_dense(&self.table, row, values);
                log.dense[(row / shards) as usize] = 0;
            }
            for (row, pairs) in log.pairs.drain(..) {
                pending.merge(&self.table, row, Delta::Sparse(pairs));
            }
            log.values.clear();
            log.sparse.clear();
        }
    }

    fn as_any(&mut self) -> &mut dyn Any {
        self
    }

    fn transit(&mut self) -> Option<&mut Transit> {
        self.transit.as_mut()
    }
}
