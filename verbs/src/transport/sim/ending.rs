//! How connections end: by an error, on request, with an endpoint, by the death of a node.
//!
//! When an end breaks, a seeded number of its requests on the way still happen, the next one perhaps in part,
//! and the rest does not (memory rule 5). All that are outstanding complete, and their memory is the user's
//! again; then the end of the connection shows. The other end learns of it some time later, and breaks in turn.

use super::{
    connection::{Kind, gather_chunk, scatter_chunk},
    endpoint::What,
    world::{Event, World},
};
use crate::transport::WorkError;

impl World {
    /// The connection is over, at this end; `notify`: the other end will learn of it.
    pub(super) fn break_end(&mut self, link: usize, side: u8, cause: WorkError, notify: bool) {
        if self.end(link, side).broken.is_some() {
            return;
        }
        self.record("breaks: link, side", [link as u64, u64::from(side), 0]);
        self.decide_fate(link, side, cause);
        let end = &self.links[link].ends[side as usize];
        let first_error = match cause {
            WorkError::RetryExceeded => WorkError::RetryExceeded,
            _ => WorkError::Flushed,
        };
        let mut failed = None;
        let works: Vec<_> = end
            .requests
            .iter()
            .filter_map(|request| {
                let result = match (request.done, failed) {
                    (Some(Ok(())), None) => Ok(()),
                    (Some(Err(error)), _) => Err(error),
                    (_, None) => Err(first_error),
                    (_, Some(())) => Err(WorkError::Flushed),
                };
                failed = failed.or(result.is_err().then_some(()));
                request.signal.map(|id| What::Work { id, result })
            })
            .collect();
        for work in works {
            self.complete(link, side, work);
        }
        // What still happens stays; of the rest, nothing is left.
        let end = self.end(link, side);
        let keep = (end.fate.0 + u64::from(end.fate.1)).max(end.arrived) - end.first;
        end.requests.truncate(keep as usize);
        self.complete(link, side, What::Disconnected { cause });
        if notify {
            let delay = self.way(0);
            self.schedule(delay, Event::Break { link, side: 1 - side, cause: WorkError::Disconnected });
        }
    }

    /// Decides what of the requests on their way still happens, now that the end is broken or dead, and gives
    /// their memory back: what is to be gathered is gathered now, what is to be scattered now or never.
    pub(super) fn decide_fate(&mut self, link: usize, side: u8, cause: WorkError) {
        let Self { random, links, .. } = self;
        let end = &mut links[link].ends[side as usize];
        end.broken = Some(cause);
        let happen = random.below(end.launched - end.arrived + 1);
        end.fate = (end.arrived + happen, random.one_in(2) && end.arrived + happen < end.launched);
        for number in end.arrived..end.fate.0 + u64::from(end.fate.1) {
            let Some(request) = end.request(number).filter(|request| request.kind != Kind::Read) else {
                continue;
            };
            for chunk in 0..request.chunks.len() {
                gather_chunk(request, chunk);
            }
        }
        for request in end.requests.iter().filter(|request| request.scattering && request.done.is_none()) {
            for chunk in 0..request.chunks.len() {
                if random.one_in(2) {
                    scatter_chunk(request, chunk);
                }
            }
        }
    }

    /// This side ends the connection.
    pub(super) fn disconnect(&mut self, link: usize, side: u8) {
        self.call(200);
        self.break_end(link, side, WorkError::Disconnected, true);
    }

    /// The node of this end is dead: its peer finds out within two seconds.
    pub(super) fn die(&mut self, link: usize, side: u8) {
        if self.end(link, side).broken.is_none() {
            self.decide_fate(link, side, WorkError::Disconnected);
        }
        let end = &self.links[link].ends[1 - side as usize];
        if end.broken.is_none() && self.nodes[end.node].alive {
            let detection = self.random.spread(5_000, 1_900_000_000);
            self.schedule(detection, Event::Break { link, side: 1 - side, cause: WorkError::RetryExceeded });
        }
    }
}
