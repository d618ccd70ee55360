//! Views between nodes of one host: as weak as the contract allows, and no weaker.

use crate::transport::Runtime;
use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use super::*;
use crate::{
    Exclusive,
    transport::{
        Access, Connection as _, Endpoint as _, EndpointConfig, Export as _, Listener as _, Payload,
        PostError, Region as _, RemoteRegion, Request as _, View as _,
        conformance::{Posts, pair::Pair},
        faulty::{Fault, Plan},
    },
};

const WORDS: usize = 32;
const LEN: usize = WORDS * 8;

/// Runs `reader` on a node beside one that has exported `memory` and then runs `owner` until the reader is done.
fn beside<X: Send + 'static>(
    sim: &Sim,
    owner: impl Fn(&mut Exclusive, u64) + Send + 'static,
    reader: impl FnOnce(&Node, &View) -> X + Send + 'static,
) -> X {
    let server = sim.node("server");
    let client = sim.node_on(&server, "client");
    let found = Arc::new(Mutex::new(None));
    let (result, stop) = (Arc::clone(&found), Arc::new(AtomicBool::new(false)));
    let stopped = Arc::clone(&stop);
    let address: Address = "sim://server".parse().unwrap();
    let told = Arc::new(Mutex::new(RemoteRegion::default()));
    let tell = Arc::clone(&told);
    sim.spawn(&server.clone(), "owner", move || {
        let mut memory = Exclusive::new("viewed", LEN).unwrap();
        let export = server.export(&memory).unwrap();
        *tell.lock().unwrap() = export.remote();
        let endpoint = server.endpoint(&EndpointConfig::default()).unwrap();
        let mut listener = server.listen(&"sim://server".parse().unwrap()).unwrap();
        let request = listener.accept(Duration::from_secs(1)).unwrap().expect("a client");
        let _connection = request.accept(&endpoint.attach(), b"").unwrap();
        let mut round = 0;
        while !stopped.load(Ordering::Relaxed) {
            round += 1;
            owner(&mut memory, round);
            server.relax(0);
        }
    });
    sim.spawn(&client.clone(), "reader", move || {
        client.relax(0);
        let endpoint = client.endpoint(&EndpointConfig::default()).unwrap();
        let connection = loop {
            match client.connect(&endpoint.attach(), &address, b"", Duration::from_secs(1)) {
                Ok((connection, _)) => break connection,
                Err(_) => client.relax(40),
            }
        };
        let region = *told.lock().unwrap();
        let view = connection.view(region).expect("the nodes are on one host");
        *result.lock().unwrap() = Some(reader(&client, &view));
        stop.store(true, Ordering::Relaxed);
    });
    sim.run();
    found.lock().unwrap().take().expect("the reader has ended")
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect()
}

/// All words of the memory become `round`.
fn fill(memory: &mut Exclusive, round: u64) {
    memory.bytes_mut().chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&round.to_ne_bytes()));
}

#[test]
fn a_copy_mixes_old_and_new_words_in_any_order() {
    let mut seen = BTreeSet::new();
    for seed in 0..40 {
        let copies = beside(&Sim::new(seed), fill, |client, view| {
            let mut copies = Vec::new();
            for turn in 0..60 {
                let mut bytes = [0; LEN];
                view.copy(0, &mut bytes);
                copies.push(words(&bytes));
                client.relax(turn % 4);
            }
            copies
        });
        for words in copies {
            let torn = words.iter().any(|&word| word != words[0]);
            let newer_first = words[0] > words[WORDS - 1];
            seen.insert((torn, torn && newer_first));
        }
    }
    assert_eq!(seen, BTreeSet::from([(false, false), (true, false), (true, true)]));
}

#[test]
fn most_copies_cost_no_switch_of_threads() {
    let copies = 1_000;
    let events: u64 = (0..20)
        .map(|seed| {
            let sim = Sim::new(seed);
            beside(
                &sim,
                |_, _| (),
                move |_, view| {
                    (0..copies).for_each(|_| view.copy(0, &mut [0; LEN]));
                },
            );
            sim.events()
        })
        .sum();
    assert!(events < 20 * copies, "{events} events for {} copies", 20 * copies);
}

#[test]
fn a_snapshot_is_of_one_version() {
    let (mut whole, mut torn) = (0, 0);
    for seed in 0..40 {
        let rewrite = |memory: &mut Exclusive, round: u64| {
            memory.rewrite(0, 8..LEN, round << 1, |bytes| {
                bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&(round << 1).to_ne_bytes()));
            });
        };
        let (good, bad) = beside(&Sim::new(seed), rewrite, |client, view| {
            let (mut good, mut bad) = (0, 0);
            for turn in 0..60 {
                let mut bytes = [0; LEN - 8];
                match view.snapshot(0, 8, &mut bytes) {
                    Some(version) => {
                        assert!(words(&bytes).iter().all(|&word| word == version));
                        good += 1;
                    }
                    None => bad += 1,
                }
                client.relax(turn % 4);
            }
            (good, bad)
        });
        whole += good;
        torn += bad;
    }
    assert!(whole > torn && torn > 20, "{whole} whole, {torn} torn");
}

#[test]
fn in_a_simulation_of_time_a_copy_costs_time_and_nobody_runs_meanwhile() {
    let settings = Settings { fabric: Some(Fabric::roce_25g()), ..Settings::default() };
    let (short, long) = beside(&Sim::with(1, settings), fill, |client, view| {
        let time = |len: usize| {
            let start = client.now();
            for _ in 0..1_000 {
                let mut bytes = vec![0; len];
                view.copy(0, &mut bytes);
                assert!(words(&bytes).windows(2).all(|pair| pair[0] == pair[1]));
            }
            client.now() - start
        };
        (time(8), time(LEN))
    });
    assert!(
        short > Duration::from_micros(10) && long > short && long < Duration::from_micros(100),
        "{short:?} {long:?}"
    );
}

#[test]
fn a_faulty_node_that_is_dead_still_has_its_views() {
    let inner = SimRig::over(Sim::new(5), true);
    let plans = [Plan::one(Fault::Die { operation: 1 }), Plan::default()];
    let rig = Arc::new(FaultyRig::<SimRig, Nothing>::over(inner, plans));
    let inside = Arc::clone(&rig);
    rig.run(Box::new(move || {
        let mut pair = Pair::alike(&*inside, &EndpointConfig::default());
        let region = pair.region(Side::Server, LEN, Access::RemoteRead);
        pair.connect();
        let view = pair.to_server[0].view(region.remote()).expect("the nodes are on one host");
        let post = pair.to_server[0].send(Payload::Inline(b"dies here"), None, None);
        assert_eq!(post, Err(PostError::Disconnected));
        let id = pair.to_server[0].id();
        pair.end_of(Side::Client, id);
        assert_eq!(view.load(8), u64::from_ne_bytes([0xee; 8]));
        pair.to_server.clear();
        view.copy(0, &mut [0; LEN]);
    }));
}
