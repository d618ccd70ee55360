//! The farewell of a client that is dropped without being closed.
//!
//! Over a network a shard cannot tell a process that has died from a broken connection, so it keeps a client whose connection ends for
//! its lease, and the others wait. A client that is dropped is neither: its process runs. So it says that it goes. First what its
//! workers handed over is sent. The farewell is the last message, so the shard has applied all of that when it lets the others go on.
//!
//! It is an attempt. It takes at most [`LONGEST`], and connects to nobody again. What has not been sent by then is lost, and the shard waits for
//! the lease, as for a client that has died. The same holds while a thread panics: a panic is on its way out through the client's own
//! code, and is not to be stopped there. Where a connection ends with the process alone, or there is no lease, its end says enough.

use std::{sync::atomic::Ordering, thread, time::Duration};

use fervor_protocol::wire::DROPPED;
use fervor_verbs::transport::{Endpoint, Transport};

use super::{
    core::{Core, NAP},
    engine::Engine,
    link::Link,
};

/// The longest time that dropping a client takes: many round trips of a network that works.
const LONGEST: Duration = Duration::from_millis(250);

impl<T: Transport> Drop for Core<T> {
    fn drop(&mut self) {
        say(self);
    }
}

/// Says it to all shards that would wait. Nobody else uses the client any more.
fn say<T: Transport>(core: &Core<T>) {
    if thread::panicking() {
        return;
    }
    let Some(mut engine) = core.try_engine() else { return };
    let waits = |engine: &Engine<T>, shard: usize, link: &Link<T::View>| {
        !link.lease.is_zero() && link.end.get().is_none() && engine.reaches(shard)
    };
    let shards = || core.links.iter().enumerate();
    // Those that were told in time, by `close`, wait for nothing.
    if !shards().any(|(shard, link)| waits(&engine, shard, link) && !engine.has_left(shard)) {
        return;
    }
    let asked: Vec<u64> = core.links.iter().map(Link::ask_flush).collect();
    let end = core.transport.now() + LONGEST;
    let mut turn = 0;
    loop {
        let work = core.turn(&mut engine);
        let mut done = true;
        for (shard, link) in shards() {
            if !waits(&engine, shard, link) {
                continue;
            }
            if !engine.has_left(shard) && link.flushed.load(Ordering::Acquire) >= asked[shard] {
                engine.leave(shard, DROPPED);
            }
            done &= engine.has_left(shard) && engine.drained(shard);
        }
        if done || core.transport.now() >= end {
            return;
        }
        if work > 0 {
            turn = 0;
        } else if turn < T::AWAKE_TURNS {
            core.transport.relax(turn);
            turn += 1;
        } else {
            engine.endpoint.wait(NAP);
        }
    }
}
