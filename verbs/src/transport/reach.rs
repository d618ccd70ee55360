//! What a peer may READ by connections that are [limited](super::Request::limit).

use std::sync::{PoisonError, RwLock};

use super::RemoteRegion;

/// Parts of exported memory: what a peer may READ where it may not READ all that is exported. Parts can be added and taken away at any
/// time. A READ that has been checked may still be under way when its part is taken away: memory is to be used for something else
/// only when the limited connections have ended.
#[derive(Debug, Default)]
pub struct Reach(RwLock<Vec<RemoteRegion>>);

impl Reach {
    /// Adds a part, as [`Export::part`](super::Export::part) names it.
    pub fn add(&self, part: RemoteRegion) {
        // One insertion or removal: a panic leaves nothing half done.
        self.0.write().unwrap_or_else(PoisonError::into_inner).push(part);
    }

    /// Takes a part away that was added.
    pub fn remove(&self, part: RemoteRegion) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).retain(|other| *other != part);
    }

    /// Whether this part was added, and not taken away.
    pub fn has(&self, part: RemoteRegion) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains(&part)
    }

    /// Whether all of `length` bytes from `address` on, in the region of `key`, are within one part.
    pub(super) fn covers(&self, key: u32, address: u64, length: u64) -> bool {
        let covers = |part: &RemoteRegion| {
            let within = |from: u64| from <= part.length && length <= part.length - from;
            part.key == key && address.checked_sub(part.address).is_some_and(within)
        };
        self.0.read().unwrap_or_else(PoisonError::into_inner).iter().any(covers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_within_one_part_is_covered() {
        let reach = Reach::default();
        assert!(!reach.covers(1, 100, 0));
        let part = |address, length| RemoteRegion { address, length, key: 1 };
        reach.add(part(100, 50));
        reach.add(part(150, 10));
        reach.add(part(u64::MAX - 5, 5));
        for (address, length, expected) in [
            (100, 50, true),
            (100, 51, false),
            (99, 1, false),
            (120, 0, true),
            (150, 10, true),
            (149, 2, false),
            (160, 0, true),
            (161, 0, false),
            (100, u64::MAX, false),
            (u64::MAX - 5, 5, true),
            (u64::MAX - 1, u64::MAX, false),
            (0, u64::MAX, false),
        ] {
            assert_eq!(reach.covers(1, address, length), expected, "{address}, {length}");
            assert!(!reach.covers(2, address, length));
        }
        reach.remove(part(100, 50));
        assert!(!reach.covers(1, 100, 1) && reach.covers(1, 150, 10));
    }
}
