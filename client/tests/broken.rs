//! The real client and server where something breaks at *every* operation in turn: each connection of a client and of a
//! server, a client that dies, a server that dies, in a small job of the checker that is the same up to that operation.
//!
//! The checker (`checker/`) says what must hold then: the one who lost a server gets an error that names it, and the same
//! one at every further call; the others go on, and their guarantees hold; nothing is applied twice or in part, and
//! nothing that anybody saw is lost. Here it is seen to that every place has its turn, and that the fault really happens there.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use checker::{
    plan::Plan,
    scene::{Outcome, simulate},
    trouble::{Party, Trouble},
};
use fervor_client::{Client, ClientOptions, ElementType, Model, Schema};
use fervor_protocol::{
    batch::BatchWriter,
    wire::{Hold, Kind, OpenTable},
};
use fervor_server::Server;
use fervor_verbs::transport::{
    any::Host,
    faulty::{Counts, Fate, Fault, Faulty, Plan as Faults, Point, Report},
};
use support::{Folder, config, raw::Raw};

mod checker;
mod support;

const MODELS: [Model; 5] = [
    Model::Essp { staleness: 1 },
    Model::Bsp,
    Model::Ssp { staleness: 1 },
    Model::Async,
    Model::Vap { v0: 20.0 },
];
const ME: Party = Party::Client(0);
const SERVER: Party = Party::Server(0);

/// A fault that never comes: a job that expects trouble, and has none.
const NEVER: Fault = Fault::Break { connection: usize::MAX, at: Point::Completion { nth: u64::MAX } };

/// Keeps this thread, and the simulated ones that it starts, which run one at a time, on one processor of all.
fn settle(number: usize) {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    // Where it cannot be had, they are slower, and no more.
    cores.get(number % cores.len().max(1)).copied().map(core_affinity::set_for_current);
}

/// Runs the job of this model; returns how many clients lost a server, or died, too.
fn run(model: Model, party: Party, fault: Fault) -> (Outcome, usize) {
    let plan = Arc::new(Plan { trouble: Trouble::one(party, fault), ..Plan::small(7, model) });
    match simulate(plan.clone()) {
        Ok(outcome) => (outcome, plan.dead.iter().filter(|dead| dead.load(Ordering::SeqCst)).count()),
        Err(failure) => panic!("{}{model}, {party:?}: {fault:?}: {}", failure.report, failure.first),
    }
}

/// What a party did.
fn report(outcome: &Outcome, party: Party) -> &Report {
    // The one server is the first of them.
    match party {
        Party::Server(number) => &outcome.reports[number],
        Party::Client(number) => &outcome.reports[1 + number],
    }
}

/// Every place at which a connection of `party` can break.
fn places(report: &Report) -> Vec<Fault> {
    let of = |(connection, counts): (usize, &Counts)| {
        let posts = (0..counts.posts())
            .flat_map(|nth| [Fate::Done, Fate::Undone].map(|fate| Point::Post { kind: None, nth, fate }));
        let completions = (0..counts.completions).map(|nth| Point::Completion { nth });
        posts.chain(completions).map(move |at| Fault::Break { connection, at }).collect::<Vec<_>>()
    };
    report.connections.iter().enumerate().flat_map(of).collect()
}

/// Breaks each connection of `party` at each place, in jobs of every model.
fn breaks(party: Party) {
    for model in MODELS {
        let (whole, dead) = run(model, party, NEVER);
        assert_eq!(dead, 0);
        let places = places(report(&whole, party));
        assert!(places.len() > 60, "{model}: only {} places", places.len());
        let mut lost = 0;
        for fault in &places {
            let (outcome, dead) = run(model, party, *fault);
            assert_eq!(report(&outcome, party).fired, [0], "{model}: {fault:?} did not happen");
            assert!(dead <= 1, "{model}: {fault:?}: {dead} clients lost a server");
            lost += dead;
        }
        // Not where it comes behind the last use of a connection, or to the one who looks at the sums.
        assert!(lost * 2 > places.len(), "{model}: lost in {lost} of {} jobs", places.len());
    }
}

#[test]
fn a_client_whose_connection_breaks_at_any_operation_is_told_and_the_other_goes_on() {
    settle(0);
    breaks(ME);
}

#[test]
fn a_server_whose_connection_breaks_at_any_operation_goes_on_with_the_others() {
    settle(1);
    breaks(SERVER);
}

/// Breaks each connection of `party` at each place, in jobs whose servers wait for those who come back: all clients do, and nothing is
/// lost, or counted twice.
fn heals(party: Party) {
    for model in MODELS {
        let run = |fault| {
            let trouble = Trouble { lease: Duration::from_secs(1), ..Trouble::one(party, fault) };
            let plan = Arc::new(Plan { trouble, ..Plan::small(7, model) });
            let outcome = simulate(plan.clone());
            assert!(plan.dead.iter().all(|dead| !dead.load(Ordering::SeqCst)));
            outcome.unwrap_or_else(|failure| {
                panic!("{}{model}, {party:?}: {fault:?}: {}", failure.report, failure.first)
            })
        };
        let places = places(report(&run(NEVER), party));
        let mut resumed = 0;
        for fault in &places {
            let outcome = run(*fault);
            assert_eq!(report(&outcome, party).fired, [0], "{model}: {fault:?} did not happen");
            resumed += outcome.tally.resumed;
        }
        // Others are lanes, or come behind the last use of a connection, or are those of the one who looks at the sums.
        assert!(
            resumed as usize * 5 > places.len(),
            "{model}: {resumed} resumptions in {} jobs",
            places.len()
        );
    }
}

#[test]
fn with_a_lease_a_client_whose_connection_breaks_at_any_operation_goes_on() {
    settle(0);
    heals(ME);
}

#[test]
fn with_a_lease_a_server_whose_connection_breaks_at_any_operation_loses_no_client() {
    settle(1);
    heals(SERVER);
}

/// Has `party` die at each of its operations; `deadly` says how many clients are gone then, at least and at most.
fn dies(party: Party, deadly: std::ops::RangeInclusive<usize>) {
    for model in MODELS {
        let (whole, _) = run(model, party, NEVER);
        let operations = report(&whole, party).operations;
        assert!(operations > 50, "{model}: only {operations} operations");
        for operation in 0..operations {
            let (outcome, dead) = run(model, party, Fault::Die { operation });
            assert_eq!(report(&outcome, party).fired, [0], "{model}: it did not die at {operation}");
            assert!(deadly.contains(&dead), "{model}: {dead} clients are gone, operation {operation}");
        }
    }
}

#[test]
fn a_client_that_dies_at_any_operation_holds_up_nobody() {
    settle(0);
    dies(ME, 1..=1);
}

/// All its clients get an error that names it, within two seconds: those that are not done.
#[test]
fn a_server_that_dies_at_any_operation_is_noticed_in_time() {
    settle(1);
    dies(SERVER, 0..=2);
}

/// A client written by hand makes a table of one row, sends batches that add 1 each, and waits for each, until its
/// connection breaks at a post. It connects again, and its last three messages come again, ahead of anything new.
fn comes_again(nth: u64, fate: Fate) {
    let folder = Folder::new("again");
    let address = folder.address("s.sock");
    let host = Host::for_addresses(std::slice::from_ref(&address)).unwrap();
    let server = Server::start(&host, &config(&address, 1)).unwrap();
    let at = Point::Post { kind: None, nth, fate };
    let faults = vec![Fault::Break { connection: 0, at }, Fault::Replay { connection: 0, last: 3 }];
    let faulty = Faulty::new(host.clone(), Faults { seed: 0, faults });
    let mut raw = Raw::connect(&faulty, &address);
    let schema = Schema {
        name: "t".into(),
        element: ElementType::I64,
        rows: 1,
        width: 1,
        model: Model::Async,
        non_finite: false,
        continuous: 0,
    };
    let create = raw.message(
        Kind::CreateTable,
        0,
        &OpenTable { schema, shard: 0, shards: 1, hold: Hold::Slots }.encode(),
    );
    raw.send(&create);
    while raw.answer(raw.sequence).is_some() {
        let mut buffer = vec![0; 4096];
        let mut writer = BatchWriter::new(&mut buffer);
        // Eight rows of one element share an image.
        let image = writer.rows(0, &[0], 64);
        image.fill(0);
        image[..8].copy_from_slice(&1_i64.to_le_bytes());
        raw.sequence += 1;
        let length = writer.finish(Kind::Batch, raw.sequence, 0, raw.sequence - 1, None);
        raw.send(&buffer[..length]);
    }
    let applied = nth - u64::from(fate == Fate::Undone);
    // They are those of a connection that is no more: not this one's first, and so refused.
    let mut again = Raw::connect(&faulty, &address);
    let fault = again.fault();
    assert!(fault.contains(&format!("sequence = {}, but 1 is next", nth - 1)), "{fault}");
    let report = faulty.report();
    assert_eq!((report.fired, report.replayed), (vec![0, 1], 3));
    let client = Client::connect_on(&host, std::slice::from_ref(&address), ClientOptions::default()).unwrap();
    let table = client.table::<i64>("t", 1, 1, Model::Async).unwrap();
    let mut worker = client.worker().unwrap();
    let mut row = [0];
    worker.get(&table, 0, &mut row).unwrap();
    assert_eq!(row, [applied as i64], "each batch once: {at:?}");
    drop(worker);
    client.close().unwrap();
    assert!(server.stop());
}

#[test]
fn messages_that_come_again_after_a_reconnect_are_not_applied_again() {
    for nth in 3..8 {
        for fate in [Fate::Done, Fate::Undone] {
            comes_again(nth, fate);
        }
    }
}
