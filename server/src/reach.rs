//! What the holders of keys that are limited to tables may READ in a shard: the rows of these tables, and nothing else.
//!
//! READs cost no instruction of the poller, so the transport has to refuse them: each connection of such a holder is limited to the
//! [`Reach`] of its key. A part is added to it when a table is made whose name the key may open, before anybody is answered that
//! the table is there.
//!
//! **Memory that is used again.** A table that is dropped leaves memory that another table may get. A READ that was checked before may
//! still be under way then, for as long as its reader likes. So memory that a limited connection could reach is *withheld*: it
//! is given out again only when the connections that could reach it have ended. Who has them can have it withheld for as long, but
//! could as well have kept the table.
//!
//! | what | who writes | who reads |
//! |---|---|---|
//! | the tables | the poller, as it makes and drops them | the control thread, for a new key's reach |
//! | the reaches | the control thread, at the first connection of a key | the poller, for a new table |
//! | the connections of a reach | counted by the `Arc` that each holds; more come by the control thread alone, under the lock | the poller |

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use fervor_verbs::transport::{Export, Reach, RemoteRegion};

use crate::access::Grant;

/// The reaches of one shard.
#[derive(Debug)]
pub struct Reaches {
    export: Arc<dyn Export>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    tables: Vec<(String, Range<usize>)>,
    reaches: Vec<(Grant, Arc<Reach>)>,
    /// What dropped tables have left that may still be READ.
    withheld: Vec<Range<usize>>,
}

impl Reaches {
    /// Of the shard whose memory `export` is.
    pub fn new(export: Arc<dyn Export>) -> Self {
        Self { export, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in between is the end of this shard.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn part(&self, place: &Range<usize>) -> RemoteRegion {
        self.export.part(place.start as u64, place.len() as u64)
    }

    /// The reach of those who have this grant.
    pub fn of(&self, grant: &Grant) -> Arc<Reach> {
        let mut state = self.lock();
        if let Some((_, reach)) = state.reaches.iter().find(|(other, _)| other == grant) {
            return reach.clone();
        }
        let reach = Arc::new(Reach::default());
        let reachable = state.tables.iter().filter(|(name, _)| grant.opens(name).is_ok());
        reachable.for_each(|(_, place)| reach.add(self.part(place)));
        state.reaches.push((grant.clone(), reach.clone()));
        reach
    }

    /// A table has been made.
    pub fn made(&self, name: &str, place: Range<usize>) {
        let mut state = self.lock();
        let may = state.reaches.iter().filter(|(grant, _)| grant.opens(name).is_ok());
        may.for_each(|(_, reach)| reach.add(self.part(&place)));
        state.tables.push((name.to_owned(), place));
    }

    /// A table is dropped. `false`: its memory may still be READ, and will be among [`freed`](Self::freed).
    pub fn dropped(&self, place: &Range<usize>) -> bool {
        let mut state = self.lock();
        state.tables.retain(|(_, other)| other != place);
        let free = self.forget(&state, place);
        if !free {
            state.withheld.push(place.clone());
        }
        free
    }

    /// What was withheld and can be given out again.
    pub fn freed(&self) -> Vec<Range<usize>> {
        let mut state = self.lock();
        let withheld = std::mem::take(&mut state.withheld);
        let (free, withheld) = withheld.into_iter().partition(|place| self.forget(&state, place));
        state.withheld = withheld;
        free
    }

    /// Takes a part out of all reaches, unless somebody has a connection by which it can be READ. Whether nobody has.
    fn forget(&self, state: &State, place: &Range<usize>) -> bool {
        let part = self.part(place);
        let mut free = true;
        for (_, reach) in &state.reaches {
            // Under the lock the number only falls.
            if Arc::strong_count(reach) == 1 {
                reach.remove(part);
            } else {
                free &= !reach.has(part);
            }
        }
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Whole;

    impl Export for Whole {
        fn remote(&self) -> RemoteRegion {
            RemoteRegion { address: 1 << 20, length: 1 << 20, key: 7 }
        }
    }

    fn grant(tables: &str) -> Grant {
        Grant::of(&format!("k {} tables={tables}", "ab".repeat(32)).parse().unwrap()).unwrap()
    }

    fn part(place: &Range<usize>) -> RemoteRegion {
        RemoteRegion { address: (1 << 20) + place.start as u64, length: place.len() as u64, key: 7 }
    }

    #[test]
    fn a_reach_has_the_tables_that_its_key_may_open_whichever_came_first() {
        let reaches = Reaches::new(Arc::new(Whole));
        let places = [0..100, 100..200, 200..300, 300..400];
        reaches.made("a/1", places[0].clone());
        reaches.made("b/1", places[1].clone());
        let a = reaches.of(&grant("a/*"));
        reaches.made("a/2", places[2].clone());
        reaches.made("b/2", places[3].clone());
        let has = |reach: &Reach| places.each_ref().map(|place| reach.has(part(place)));
        assert_eq!(has(&a), [true, false, true, false]);
        assert_eq!(has(&reaches.of(&grant("b/*"))), [false, true, false, true]);
        assert!(Arc::ptr_eq(&a, &reaches.of(&grant("a/*"))));
    }

    #[test]
    fn memory_that_a_connection_can_read_is_withheld_until_it_has_ended() {
        let reaches = Reaches::new(Arc::new(Whole));
        let (own, others) = (0..100, 100..200);
        reaches.made("a/1", own.clone());
        reaches.made("b/1", others.clone());
        let connection = reaches.of(&grant("a/*"));
        assert!(reaches.dropped(&others), "nobody can READ it");
        assert!(!reaches.dropped(&own));
        assert_eq!(reaches.freed(), []);
        drop(connection);
        assert_eq!(reaches.freed().first(), Some(&own));
        assert_eq!(reaches.freed(), []);
        assert!(!reaches.of(&grant("a/*")).has(part(&own)));
        // The same memory, for somebody else's table.
        reaches.made("b/2", own.clone());
        assert!(!reaches.of(&grant("a/*")).has(part(&own)));
    }
}
