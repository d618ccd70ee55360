//! Which shard has a row, and where in the shard it is.
//!
//! Rows are dealt out to the shards in turn. Neighbouring rows are often alike in popularity, so this spreads
//! popular rows over the shards. Shards are ordered by server id, and within a server by their number there.
//! All clients of a job see this order alike, whatever order they name the servers in.

/// The shards of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Router {
    shards: u64,
    /// The shards are `1 << shift`: a division would cost as much as all else of a `get` that finds its row.
    shift: Option<u32>,
}

impl Router {
    /// For `shards` shards, at least one.
    pub fn new(shards: usize) -> Self {
        assert!(shards > 0, "a job has at least one shard");
        Self { shards: shards as u64, shift: shards.is_power_of_two().then(|| shards.ilog2()) }
    }

    /// Shard of `row`, and the index of the row in it.
    #[inline]
    pub fn locate(&self, row: u64) -> (usize, u64) {
        match self.shift {
            Some(shift) => ((row & (self.shards - 1)) as usize, row >> shift),
            None => ((row % self.shards) as usize, row / self.shards),
        }
    }

    /// The row that is the `index`-th of `shard`.
    pub fn row(&self, shard: usize, index: u64) -> u64 {
        index * self.shards + shard as u64
    }

    /// Number of the `rows` rows of a table that lie in `shard`.
    pub fn rows_in(&self, shard: usize, rows: u64) -> u64 {
        (rows + self.shards - 1 - shard as u64) / self.shards
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_row_has_one_place(shards in 1usize..20, rows in 0u64..500) {
            let router = Router::new(shards);
            let mut counts = vec![0; shards];
            for row in 0..rows {
                let (shard, index) = router.locate(row);
                prop_assert_eq!(router.row(shard, index), row);
                prop_assert_eq!(index, counts[shard]);
                counts[shard] += 1;
            }
            for (shard, count) in counts.into_iter().enumerate() {
                prop_assert_eq!(count, router.rows_in(shard, rows));
            }
        }
    }
}
