//! Views: what may be looked at, what is seen there, and for how long.
//!
//! A rig says whether its hosts have views of each other ([`Rig::views`]). Where they have none, each case checks that
//! they really have none, and that asking does no harm.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    Posts, Rig, Side,
    pair::{Background, End, PATIENCE, Pair, bytes, decode, pattern, piece},
    victim::{Role, Survivor, VICTIM_MEMORY},
};
use crate::{
    memory::{Exclusive, Memory},
    transport::{
        Access, Completion, Connection, Endpoint, EndpointConfig, Export, Payload, Region, RemoteRegion,
        Runtime, Transport, View,
    },
};

type ViewOf<R> = <<R as Rig>::Transport as Transport>::View;

/// Not a multiple of a page, so that a check by pages would show.
const LEN: usize = 10_000;

/// The view of all of `region`: there if the rig promises it, and not if not.
fn view<R: Rig>(rig: &R, end: &End<R>, region: RemoteRegion) -> Option<ViewOf<R>> {
    let view = end.view(region);
    assert_eq!(view.is_some(), rig.views(), "the rig says otherwise: {view:?}");
    if let Some(view) = &view {
        assert_eq!(view.len() as u64, region.length);
    }
    view
}

/// Bytes that are copied through a view.
fn copied(view: &impl View, offset: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0x77; len];
    view.copy(offset, &mut bytes);
    bytes
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("8 bytes")))
}

fn fill(bytes: &mut [u8], word: u64) {
    bytes.chunks_exact_mut(8).for_each(|bytes| bytes.copy_from_slice(&word.to_ne_bytes()));
}

/// Whoever may READ may look, at no more; and who may not is told by `None`, which breaks nothing.
pub(super) fn bounds_and_rights<R: Rig>(rig: &R) {
    for side in [Side::Client, Side::Server] {
        let mut pair = Pair::alike(rig, &EndpointConfig::default());
        let readable = pair.region(side.other(), LEN, Access::RemoteRead);
        let writable = pair.region(side.other(), LEN, Access::RemoteWrite);
        let local = pair.region(side.other(), LEN, Access::Local);
        let rows = Exclusive::new("rows", LEN).expect("memory");
        let export = pair.host(side.other()).transport.export(&rows).expect("export");
        let own = pair.region(side, LEN, Access::Local);
        let data = pattern(3, LEN);
        readable.memory().write(0, &data);
        pair.connect();
        let end = pair.end(side);
        for region in [readable.remote(), writable.remote(), export.remote()] {
            view(rig, end, region);
        }
        let region = readable.remote();
        let part =
            |offset: u64, length: u64| RemoteRegion { address: region.at(offset).address, length, ..region };
        if let Some(view) = view(rig, end, region) {
            for (offset, len) in [(0, LEN), (0, 0), (LEN, 0), (1, 4096), (LEN - 9, 9), (17, 64)] {
                assert!(copied(&view, offset, len) == data[offset..offset + len], "{len} bytes at {offset}");
            }
            assert_eq!(view.load(64).to_ne_bytes(), data[64..72]);
            let outside: [&dyn Fn(); 6] = [
                &|| view.copy(LEN - 8, &mut [0; 9]),
                &|| view.copy(LEN + 1, &mut []),
                &|| view.copy(usize::MAX - 3, &mut [0; 8]),
                &|| _ = view.load(LEN),
                &|| _ = view.load(usize::MAX - 7),
                &|| _ = view.load(4),
            ];
            for (number, outside) in outside.into_iter().enumerate() {
                assert!(catch_unwind(AssertUnwindSafe(outside)).is_err(), "call {number} is a bug");
            }
        }
        if let Some(view) = view(rig, end, part(24, 100)) {
            assert!(copied(&view, 0, 100) == data[24..124]);
            let outside = AssertUnwindSafe(|| view.copy(60, &mut [0; 41]));
            assert!(catch_unwind(outside).is_err(), "a view of a part is of no more");
        }
        for (offset, length) in
            [(0_u64.wrapping_sub(8), 8), (LEN as u64, 1), (1, LEN as u64), (8, u64::MAX - 4), (1 << 40, 8)]
        {
            assert!(end.view(part(offset, length)).is_none(), "{length} bytes at {offset} are not all there");
        }
        assert!(end.view(local.remote()).is_none(), "memory that the peer keeps for itself");
        assert!(end.view(RemoteRegion { key: !region.key, ..region }).is_none(), "a key of nothing");
        assert!(end.view(RemoteRegion { key: writable.remote().key, ..region }).is_none(), "another's key");
        // All that broke nothing.
        end.read(&[piece(&own, 0, LEN)], region.at(0), Some(1)).expect("post");
        end.ring().expect("ring");
        pair.work(side, 1);
        assert!(bytes(&own, 0, LEN) == data);
    }
}

/// What the owner of exported memory does in a thread of its own, until told to stop.
struct Owner<R: Rig> {
    stop: Arc<AtomicBool>,
    thread: Background<R::Transport, Exclusive>,
}

impl<R: Rig> Owner<R> {
    /// Calls `turn` with the memory and 1, 2, 3 ….
    fn start(
        pair: &Pair<'_, R>,
        mut memory: Exclusive,
        turn: impl Fn(&mut Exclusive, u64) + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, transport) = (Arc::clone(&stop), pair.server.transport.clone());
        let thread = Background::start(&pair.server.transport, move || {
            let mut round = 0;
            while !stopped.load(Ordering::Acquire) {
                round += 1;
                turn(&mut memory, round);
                // Turn 0 of `relax` spins: the race stays hot, and a simulation goes on.
                transport.relax(0);
            }
            memory
        });
        Self { stop, thread }
    }

    /// Stops it, and returns the memory as it left it.
    fn stop(self) -> Exclusive {
        self.stop.store(true, Ordering::Release);
        self.thread.join()
    }
}

/// What was written before a word was published is seen by who has loaded the word.
pub(super) fn published<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let memory = Exclusive::new("rows", LEN).expect("memory");
    let export = pair.server.transport.export(&memory).expect("export");
    pair.connect();
    let Some(view) = view(rig, pair.end(Side::Client), export.remote()) else { return };
    let data = 8..LEN / 8 * 8;
    let owner = Owner::start(&pair, memory, {
        let data = data.clone();
        move |memory, round| {
            fill(&mut memory.bytes_mut()[data.clone()], round);
            memory.publish(0, round);
        }
    });
    let (mut last, rounds) = (0, u64::from(rig.effort().rounds));
    pair.until("the owner to publish often", |_| {
        let published = view.load(0);
        assert!(published >= last, "{published} was published after {last}");
        last = published;
        let copy = copied(&view, data.start, data.len());
        let old = words(&copy).find(|&word| word < published);
        assert_eq!(old, None, "a word that is older than {published}, which was published");
        (published >= rounds).then_some(())
    });
    let memory = owner.stop();
    assert!(copied(&view, 0, LEN) == memory.bytes(), "nobody writes any more");
}

/// What was written before a message was posted is seen by who has polled the message.
pub(super) fn announced<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let mut memory = Exclusive::new("rows", LEN).expect("memory");
    let export = pair.server.transport.export(&memory).expect("export");
    pair.connect();
    let Some(view) = view(rig, pair.end(Side::Client), export.remote()) else { return };
    for round in 0..rig.effort().rounds.min(300) {
        let data = pattern(u64::from(round), LEN);
        memory.bytes_mut().copy_from_slice(&data);
        let end = pair.end(Side::Server);
        end.send(Payload::Inline(b"look"), Some(round), None).expect("post");
        end.ring().expect("ring");
        assert_eq!(pair.message(Side::Client).2, Some(round));
        assert!(copied(&view, 0, LEN) == data, "round {round}: the view shows something older");
    }
}

/// A snapshot is of one version, however its owner races with it.
pub(super) fn snapshots<R: Rig>(rig: &R) {
    // From a few words, which the owner is at for a moment, to many.
    for len in [16, 72, 1024, 4096] {
        let mut pair = Pair::alike(rig, &EndpointConfig::default());
        let memory = Exclusive::new("rows", 8 + len).expect("memory");
        let export = pair.server.transport.export(&memory).expect("export");
        pair.connect();
        let Some(view) = view(rig, pair.end(Side::Client), export.remote()) else { return };
        let transport = pair.server.transport.clone();
        let owner = Owner::start(&pair, memory, move |memory, round| {
            memory.rewrite(0, 8..8 + len, round << 1, |bytes| fill(bytes, round << 1));
            // Now and then there is time for a whole copy.
            (0..round % (2 + len as u64 / 32)).for_each(|_| transport.relax(0));
        });
        let (mut last, mut newer, mut copy) = (0, 0, vec![0; len]);
        let wanted = u64::from(rig.effort().rounds).min(100);
        pair.until("many snapshots", |_| {
            for _ in 0..64 {
                let Some(version) = view.snapshot(0, 8, &mut copy) else { continue };
                assert!(version >= last, "version {version} came after {last}");
                newer += u64::from(version > last);
                last = version;
                let other = words(&copy).find(|&word| word != version);
                assert_eq!(other, None, "a word of another version than {version}, among {len} bytes");
                if let Some((version, word)) = view.snapshot_word(0, len) {
                    assert_eq!(word, version, "a word of another version");
                    assert!(version >= last, "version {version} came after {last}");
                }
            }
            (newer >= wanted).then_some(())
        });
        owner.stop();
    }
}

/// A view is there when its connection is over, and all that it was made from is gone.
pub(super) fn after_the_end<R: Rig>(rig: &R) {
    let mut pair = Pair::alike(rig, &EndpointConfig::default());
    let mut memory = Exclusive::new("rows", LEN).expect("memory");
    let export = pair.server.transport.export(&memory).expect("export");
    let data = pattern(1, LEN);
    memory.bytes_mut().copy_from_slice(&data);
    pair.connect();
    let Some(view) = view(rig, pair.end(Side::Client), export.remote()) else { return };
    let (client, server) = (pair.to_server[0].id(), pair.to_client[0].id());
    pair.end(Side::Server).disconnect();
    pair.end_of(Side::Client, client);
    pair.end_of(Side::Server, server);
    assert!(copied(&view, 0, LEN) == data, "the connection is over");
    // The owner is not.
    memory.publish(8, 12);
    assert_eq!(view.load(8), 12);
    let data = copied(&view, 0, LEN);
    drop(export);
    drop(memory);
    drop(pair);
    let clone = view.clone();
    drop(view);
    assert!(copied(&clone, 0, LEN) == data, "everything else is gone");
    assert_eq!(clone.load(8), 12);
}

/// A view is there when the peer is dead.
pub(super) fn after_death<R: Rig>(rig: &R) {
    let Survivor { transport, mut endpoint, mut connection, victim } = Survivor::meet(rig, Role::Listens);
    let memory = Memory::new("survivor", VICTIM_MEMORY).expect("memory");
    let own = transport.register(&memory, Access::Local).expect("register");
    let (mut seen, mut turn, begun) = (Vec::new(), 0, transport.now());
    let mut next = |endpoint: &mut <R::Transport as Transport>::Endpoint| loop {
        endpoint.poll(&mut seen);
        if let Some(completion) = seen.pop() {
            return completion;
        }
        assert!(transport.now() < begun + PATIENCE, "waited {PATIENCE:?} for a completion");
        transport.relax(turn);
        turn += 1;
    };
    let Completion::Received { buffer, .. } = next(&mut endpoint) else {
        panic!("expected the victim's hello")
    };
    let remote = decode(endpoint.message(&buffer));
    endpoint.release(buffer);
    let view = view(rig, &connection, remote);
    connection.write(Payload::Inline(b"its last"), remote.at(64), None, None).expect("post");
    connection.read(&[piece(&own, 0, 8)], remote.at(0), Some(1)).expect("post");
    connection.ring().expect("ring");
    let completion = next(&mut endpoint);
    assert!(matches!(completion, Completion::Work { id: 1, result: Ok(()), .. }), "{completion:?}");
    rig.kill(victim);
    let check = |view: &ViewOf<R>| {
        assert_eq!(copied(view, 64, 8), b"its last");
        assert_eq!(view.load(64).to_ne_bytes(), *b"its last");
    };
    view.iter().for_each(check);
    while !matches!(next(&mut endpoint), Completion::Disconnected { .. }) {}
    view.iter().for_each(check);
}
