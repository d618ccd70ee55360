//! Threads: waiting, waking, and time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    Posts, Rig, Side,
    pair::{Background, Host, PATIENCE, Pair, RegionOf, piece},
};
use crate::transport::{
    Access, Attach, Completion, Connection, Endpoint, EndpointConfig, Payload, PostError, Region,
    RemoteRegion, Runtime, Signal, Thread, Transport,
};

/// Lets this much time pass.
fn sleep<T: Transport>(transport: &T, time: Duration) {
    let until = transport.now() + time;
    let signal = transport.signal();
    while transport.now() < until {
        signal.wait(signal.epoch(), until.saturating_sub(transport.now()));
    }
}

/// Each kind of arrival ends a wait: a message, an immediate, a completion, the end of a connection.
pub(super) fn wait_ends_on_arrival<R: Rig>(rig: &R) {
    for kind in 0..4 {
        let mut pair = Pair::alike(rig, &EndpointConfig::default());
        let theirs = pair.region(Side::Server, 64, Access::RemoteWrite);
        pair.connect();
        for round in 0..5 {
            if kind == 3 && round > 0 {
                break;
            }
            let Pair { server, to_server, client, .. } = &mut pair;
            let (transport, begun) = (server.transport.clone(), server.transport.now());
            let end = to_server.remove(0);
            let remote = theirs.remote().at(0);
            let poster = Background::start(&client.transport, {
                let transport = client.transport.clone();
                move || {
                    let mut end = end;
                    sleep(&transport, Duration::from_millis(20));
                    match kind {
                        0 => end.send(Payload::Inline(b"wake up"), None, None).expect("post"),
                        1 => end.write(Payload::Inline(b"wake up"), remote, Some(1), None).expect("post"),
                        2 => end.write(Payload::Inline(b"wake up"), remote, None, Some(1)).expect("post"),
                        _ => end.disconnect(),
                    }
                    if kind != 3 {
                        end.ring().expect("ring");
                    }
                    end
                }
            });
            let waiter = if kind == 2 { client } else { server };
            while waiter.poll() == 0 {
                waiter.endpoint.wait(PATIENCE);
                let took = transport.now() - begun;
                assert!(took < PATIENCE / 4, "kind {kind}: the wait did not end on the arrival: {took:?}");
            }
            while waiter.take().is_some() {}
            to_server.push(poster.join());
        }
    }
}

pub(super) fn wait_times_out<R: Rig>(rig: &R) {
    let mut host = Host::new(rig.host(Side::Server), &EndpointConfig::default());
    let begun = host.transport.now();
    host.endpoint.wait(Duration::ZERO);
    let mut waits = 0;
    while host.transport.now() < begun + Duration::from_millis(100) {
        host.endpoint.wait(Duration::from_millis(10));
        assert_eq!(host.poll(), 0);
        waits += 1;
    }
    assert!(waits <= 1000, "it does not sleep: {waits} waits of 10 ms within 100 ms");
    assert!(host.transport.now() < begun + Duration::from_secs(5), "a wait of 10 ms does not end");
}

pub(super) fn wake<R: Rig>(rig: &R) {
    let mut host = Host::new(rig.host(Side::Server), &EndpointConfig::default());
    let transport = host.transport.clone();
    // Before the wait, from this thread and from another: the next wait ends at once.
    for foreign in [false, true] {
        let attach = host.endpoint.attach();
        if foreign {
            Background::start(&transport, move || attach.wake()).join();
        } else {
            attach.wake();
        }
        let begun = transport.now();
        host.endpoint.wait(PATIENCE);
        assert!(transport.now() - begun < PATIENCE / 4, "a wake before the wait is lost");
    }
    // During the wait, many times; the waiter answers each, so that none hides another.
    let rounds = u64::from(rig.effort().rounds);
    let (asked, answered) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let waker = Background::start(&transport, {
        let (asked, answered) = (Arc::clone(&asked), Arc::clone(&answered));
        let (transport, attach) = (transport.clone(), host.endpoint.attach());
        move || {
            for round in 1..=rounds {
                asked.store(round, Ordering::Release);
                attach.wake();
                let mut turn = 0;
                while answered.load(Ordering::Acquire) < round {
                    transport.relax(turn);
                    turn += 1;
                }
                if round % 50 == 0 {
                    sleep(&transport, Duration::from_millis(3));
                }
            }
        }
    });
    for round in 1..=rounds {
        let begun = transport.now();
        while asked.load(Ordering::Acquire) < round {
            host.endpoint.wait(PATIENCE);
            assert!(transport.now() - begun < PATIENCE / 4, "wake {round} is lost");
        }
        answered.store(round, Ordering::Release);
    }
    waker.join();
}

/// Two threads hand a turn back and forth, many times, each waiting for the other by signal alone.
pub(super) fn signals<R: Rig>(rig: &R) {
    let transport = rig.host(Side::Server);
    let rounds = u64::from(rig.effort().rounds) * 2;
    let (signal, turn) = (transport.signal(), Arc::new(AtomicU64::new(0)));
    let player = |mine: u64| {
        let (signal, turn, transport) = (signal.clone(), Arc::clone(&turn), transport.clone());
        move || {
            for round in 0..rounds {
                let begun = transport.now();
                loop {
                    let seen = signal.epoch();
                    if turn.load(Ordering::Acquire) == round * 2 + mine {
                        break;
                    }
                    signal.wait(seen, PATIENCE);
                    let waited = transport.now() - begun;
                    assert!(waited < PATIENCE / 2, "round {round}: a notification is lost");
                }
                turn.fetch_add(1, Ordering::AcqRel);
                signal.notify();
            }
        }
    };
    let before = signal.epoch();
    let other = Background::start(&transport, player(1));
    player(0)();
    other.join();
    assert_eq!(signal.epoch() - before, 2 * rounds, "the epoch counts the notifications");
    // A notification before the wait counts, and several waiters all go on.
    let seen = signal.epoch();
    signal.notify();
    let begun = transport.now();
    signal.wait(seen, PATIENCE);
    assert!(transport.now() - begun < PATIENCE / 4, "a notification before the wait is lost");
    let seen = signal.epoch();
    let waiters: Vec<_> = (0..3)
        .map(|_| {
            let (signal, transport) = (signal.clone(), transport.clone());
            Background::start(&transport.clone(), move || {
                let begun = transport.now();
                signal.wait(seen, PATIENCE);
                assert!(transport.now() - begun < PATIENCE / 2, "a waiter was not woken");
            })
        })
        .collect();
    sleep(&transport, Duration::from_millis(5));
    signal.notify();
    waiters.into_iter().for_each(Background::join);
}

pub(super) fn signal_times_out<R: Rig>(rig: &R) {
    let transport = rig.host(Side::Server);
    let signal = transport.signal();
    for timeout in [Duration::ZERO, Duration::from_millis(20)] {
        let begun = transport.now();
        signal.wait(signal.epoch(), timeout);
        let took = transport.now() - begun;
        assert!(took >= timeout && took < timeout + Duration::from_secs(3), "{timeout:?} took {took:?}");
    }
}

pub(super) fn join<R: Rig>(rig: &R) {
    let transport = rig.host(Side::Server);
    let done = Arc::new(AtomicBool::new(false));
    let good = transport.spawn("good", None, {
        let (done, transport) = (Arc::clone(&done), transport.clone());
        move || {
            sleep(&transport, Duration::from_millis(5));
            done.store(true, Ordering::Release);
        }
    });
    assert!(good.expect("spawn").join(), "a thread that ended well");
    assert!(done.load(Ordering::Acquire), "join returned before the end of the thread");
    // No message of a panic hook: it is not a failure.
    let bad = transport.spawn("bad", None, || std::panic::resume_unwind(Box::new("a panic")));
    assert!(!bad.expect("spawn").join(), "a thread that panicked");
    // Dropped, it goes on by itself.
    let goes_on = Arc::new(AtomicBool::new(false));
    let dropped = transport.spawn("dropped", None, {
        let goes_on = Arc::clone(&goes_on);
        move || goes_on.store(true, Ordering::Release)
    });
    drop(dropped.expect("spawn"));
    let deadline = transport.now() + PATIENCE;
    while !goes_on.load(Ordering::Acquire) {
        assert!(transport.now() < deadline, "a thread whose handle was dropped did not go on");
        sleep(&transport, Duration::from_millis(1));
    }
    // The thread that runs this may run on some core: so may another.
    // SAFETY: it takes no argument and only tells where this thread runs.
    let core = unsafe { libc::sched_getcpu() };
    let core = usize::try_from(core).expect("sched_getcpu");
    assert!(transport.spawn("pinned", Some(core), || ()).expect("spawn on a core").join());
}

pub(super) fn time<R: Rig>(rig: &R) {
    let transport = rig.host(Side::Server);
    let latest = Arc::new(AtomicU64::new(0));
    let rounds = u64::from(rig.effort().rounds) * 10;
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let (latest, transport) = (Arc::clone(&latest), transport.clone());
            Background::start(&transport.clone(), move || {
                for round in 0..rounds {
                    // What another thread has read before is not in this thread's future.
                    let before = latest.load(Ordering::Acquire);
                    let now = transport.now().as_nanos() as u64;
                    assert!(now >= before, "time went back from {before} ns to {now} ns");
                    latest.fetch_max(now, Ordering::AcqRel);
                    transport.relax(round as u32 % 40);
                }
            })
        })
        .collect();
    let (begun, mut turn) = (transport.now(), 0);
    while transport.now() == begun {
        transport.relax(turn);
        turn += 1;
        assert!(turn < 1_000_000, "time stands still");
    }
    threads.into_iter().for_each(Background::join);
}

/// Threads that post, each on a connection of its own, and rounds of each that may be on their way: each has a word of its own.
const POSTERS: usize = 4;
const WORDS: u64 = 8;

/// How far a poster's requests have come, as the polling thread sees it.
#[derive(Default)]
struct Progress {
    completed: AtomicU64,
    arrived: AtomicU64,
}

/// Several threads post on connections of one endpoint, each as fast as it can, while one other thread polls it.
pub(super) fn many_post<R: Rig>(rig: &R) {
    let config = EndpointConfig {
        receive_buffers: POSTERS * WORDS as usize,
        receive_size: 64,
        send_depth: 16,
        ..EndpointConfig::default()
    };
    let mut pair = Pair::alike(rig, &config);
    let theirs = pair.region(Side::Server, POSTERS * WORDS as usize * 8, Access::RemoteWrite);
    let own = pair.region(Side::Client, POSTERS * WORDS as usize * 16, Access::Local);
    (0..POSTERS).for_each(|_| pair.connect());
    let sides = [Side::Client, Side::Server];
    let ids = [
        pair.to_server.iter().map(Connection::id).collect::<Vec<_>>(),
        pair.to_client.iter().map(Connection::id).collect(),
    ];
    let progress: Arc<[Progress; POSTERS]> = Arc::default();
    let rounds = u64::from(rig.effort().rounds.min(1000));
    let posters: Vec<_> = std::mem::take(&mut pair.to_server)
        .into_iter()
        .enumerate()
        .map(|(number, end)| {
            let (transport, progress) = (pair.client.transport.clone(), Arc::clone(&progress));
            let (own, remote) = (own.clone(), theirs.remote());
            Background::start(&transport.clone(), move || {
                poster::<R>(&transport, end, number, rounds, &own, remote, &progress[number])
            })
        })
        .collect();
    let count = |progress: &AtomicU64, found: u64, what: &str| {
        let expected = progress.load(Ordering::Acquire);
        assert_eq!(found, expected, "{what} of a connection are out of order, or twice, or lost");
        progress.store(expected + 1, Ordering::Release);
    };
    for _ in 0..2 * rounds * POSTERS as u64 {
        let (side, completion) = pair.until("a completion of any of the threads", |pair| {
            sides.into_iter().find_map(|side| pair.host(side).take().map(|found| (side, found)))
        });
        let of =
            |connection| ids[side as usize].iter().position(|&id| id == connection).expect("one of ours");
        match completion {
            Completion::Work { connection, id, result: Ok(()) } if side == Side::Client => {
                count(&progress[of(connection)].completed, id, "completions");
            }
            Completion::Received { connection, buffer, .. } if side == Side::Server => {
                let message = pair.server.endpoint.message(&buffer);
                let found = u64::from_le_bytes(message.try_into().expect("8 bytes"));
                count(&progress[of(connection)].arrived, found, "messages");
                pair.server.endpoint.release(buffer);
            }
            other => panic!("at the {side:?}: {other:?}"),
        }
    }
    // Their ends are alive until here.
    let ends: Vec<_> = posters.into_iter().map(Background::join).collect();
    pair.silence();
    drop(ends);
}

/// What each of them does in a round: a message, a WRITE of the round's number, and a READ of it, which alone has an id.
fn poster<R: Rig>(
    transport: &R::Transport,
    mut end: <R::Transport as Transport>::Connection,
    number: usize,
    rounds: u64,
    own: &RegionOf<R>,
    remote: RemoteRegion,
    progress: &Progress,
) -> <R::Transport as Transport>::Connection {
    let begun = transport.now();
    let mut turn = 0;
    let mut wait = |what: &str| {
        assert!(transport.now() < begun + 3 * PATIENCE, "poster {number} waits for {what}");
        transport.relax(turn);
        turn += 1;
    };
    let place = |round: u64| (number as u64 * WORDS + round % WORDS) as usize * 8;
    let into = |round: u64| POSTERS * WORDS as usize * 8 + place(round);
    // The last ones only look.
    for round in 0..rounds + WORDS {
        if let Some(before) = round.checked_sub(WORDS) {
            while progress.completed.load(Ordering::Acquire).min(progress.arrived.load(Ordering::Acquire))
                <= before
            {
                wait("a round to be over");
            }
            let found = own.memory().load(into(before));
            assert_eq!(found, before, "poster {number} READ another's word, or an old one");
        }
        if round >= rounds {
            continue;
        }
        own.memory().store(place(round), round);
        let word = remote.at(place(round) as u64);
        let mut step = 0;
        while step < 3 {
            let posted = match step {
                0 => end.send(Payload::Inline(&round.to_le_bytes()), None, None),
                1 => end.write(Payload::Gather(&[piece(own, place(round), 8)]), word, None, None),
                _ => end.read(&[piece(own, into(round), 8)], word, Some(round)),
            };
            match posted {
                Ok(()) => step += 1,
                Err(PostError::Full) => wait("room"),
                Err(PostError::Disconnected) => {
                    panic!("poster {number}: the connection broke in round {round}")
                }
            }
        }
        end.ring().expect("ring");
    }
    end
}
