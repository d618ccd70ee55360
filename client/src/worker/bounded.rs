//! Updates of value-bounded tables: when a worker may make them, and how they become visible to all. See
//! [`fervor_protocol::value`].

use std::{collections::BTreeSet, sync::atomic::Ordering};

use fervor_protocol::{
    Element,
    mutants::{Mutant, mutant},
    value,
};
use fervor_verbs::transport::Transport;

use super::Worker;
use crate::{error::Error, own::AnyUpdates, session::core::For, table::Table};

impl<T: Transport> Worker<T> {
    /// Waits until an update of `row` keeps the value bound, and counts it as in transit.
    #[cold]
    pub(super) fn admit<E: Element, I: Iterator<Item = (usize, E)>>(
        &mut self,
        table: &Table<E>,
        row: u64,
        update: impl Fn() -> I,
    ) -> Result<(), Error> {
        let width = table.width();
        let bound = value::bound(table.schema().model, self.clock + 1);
        let mut turn = 0;
        loop {
            let core = self.core.clone();
            let visible = |shard: usize| core.links[shard].visible.load(Ordering::Acquire);
            let transit = self.updates(&*table.0)?.transit().expect("the table is value-bounded");
            transit.retire(visible);
            if transit.admits(row, width, update(), bound) || mutant(Mutant::BoundIgnored) {
                transit.add(row, width, update());
                return Ok(());
            }
            let mut before = core.transport.now();
            if turn == 0 {
                self.hand_over()?;
                let sent = core.transport.now();
                self.stats.communicating += sent - before;
                before = sent;
            }
            turn += 1;
            let transit = self.updates(&*table.0)?.transit().expect("the table is value-bounded");
            core.wait(For::Event, || transit.retire(visible))?;
            self.stats.waiting += core.transport.now() - before;
        }
    }

    /// The updates of value-bounded tables, with the tables' numbers.
    pub(super) fn value_bounded(&mut self) -> impl Iterator<Item = (usize, &mut Box<dyn AnyUpdates>)> {
        let all = self.updates.iter_mut().enumerate();
        all.filter_map(|(table, updates)| {
            let updates = updates.as_mut()?;
            updates.transit().is_some().then_some((table, updates))
        })
    }

    /// Has the updates of value-bounded tables made so far sent, and notes after which batches they are visible.
    pub(super) fn hand_over(&mut self) -> Result<(), Error> {
        let (core, stamp) = (self.core.clone(), self.clock);
        for (table, updates) in self.value_bounded() {
            updates.hand_over(stamp, &mut |shard, slab| core.links[shard].hand_over(table, slab));
        }
        let batches = core.flush()?;
        for (_, updates) in self.value_bounded() {
            let transit = updates.transit().expect("the table is value-bounded");
            transit.hand_over(|rows| {
                let shards: BTreeSet<usize> = rows.map(|row| core.router.locate(row).0).collect();
                shards.into_iter().map(|shard| (shard, batches[shard])).collect()
            });
        }
        self.retire();
        Ok(())
    }
}
