//! A client that only reads, beside the job: it calls `clock()` a few times, and then no more until the job is over.
//!
//! If anybody waited for it, the job would hang. Its own reads keep their promise as any worker's do, and wait for nobody. It has no
//! columns.

use std::sync::{Arc, atomic::Ordering};

use fervor_client::{Client, ClientOptions, Error, Table, Worker, WorkerStats};
use fervor_verbs::{Address, transport::Transport};

use super::{
    actor::{Number, claim, open},
    plan::{HOT, Plan, Watcher},
};
use crate::on;

/// From its beginning until `job_is_over` has returned, which is called once; what its worker counted.
///
/// # Errors
/// It has lost a server.
pub fn run<T: Transport>(
    transport: &T,
    servers: &[Address],
    plan: &Arc<Plan>,
    watcher: Watcher,
    job_is_over: impl FnOnce(),
) -> Result<WorkerStats, Error> {
    let options = ClientOptions {
        observer: true,
        // It belongs to no job, whatever size that has.
        clients: 9,
        cache_bytes: 8 << 20,
        read_lanes: plan.read_lanes,
        copies: watcher.place.copies,
        ..ClientOptions::default()
    };
    let client = Client::connect_on(transport, servers, options)?;
    let tables = open(&client, plan)?;
    let mut worker = client.worker()?;
    let read_all = |worker: &mut Worker<T>| {
        tables.iter().enumerate().try_for_each(|(number, any)| {
            on!(any, table => (0..=HOT.min(table.rows() - 1)).try_for_each(|row| read(plan, worker, number, table, row)))
        })
    };
    for _ in 0..watcher.clocks {
        read_all(&mut worker)?;
        let before = worker.now();
        worker.clock()?;
        assert!(worker.now() >= before, "seed {}: the clock goes back", plan.seed);
    }
    read_all(&mut worker)?;
    job_is_over();
    read_all(&mut worker)?;
    worker.clock()?;
    read_all(&mut worker)?;
    let stats = worker.stats();
    assert!(stats.waiting.is_zero(), "seed {}: who only reads has waited {:?}", plan.seed, stats.waiting);
    drop(worker);
    client.close()?;
    Ok(stats)
}

/// Reads a row and checks it.
fn read<T: Transport, E: Number>(
    plan: &Plan,
    worker: &mut Worker<T>,
    number: usize,
    table: &Table<E>,
    row: u64,
) -> Result<(), Error> {
    let (before, clock, model) = (worker.stats(), worker.now(), plan.tables[number].model);
    let mut copy = vec![E::default(); table.width()];
    worker.get(table, row, &mut copy)?;
    let (as_of, most_claimed) = claim(&before, worker);
    let place = format!(
        "seed {}: who only reads, at clock {clock}, table {number} ({model}), row {row} as of clock {as_of}",
        plan.seed
    );
    let needed = model.staleness().map_or(0, |s| clock.saturating_sub(s.into()));
    assert!(most_claimed >= needed, "{place}: STALE: clock {needed} is needed");
    for (other, lane) in plan.lanes.iter().enumerate() {
        let columns: Vec<i64> = plan.columns(number, other).map(|column| copy[column].count()).collect();
        let what = || format!("{place}, columns of lane {other}: {:?}", &columns[..columns.len().min(20)]);
        let least = if plan.unreliable(other) { 0 } else { lane.before(number, row, as_of) };
        let most = plan.added[number][row as usize][other].load(Ordering::SeqCst);
        assert!(columns.iter().all(|c| *c >= least), "MISSING: {}: not {least}..={most}", what());
        assert!(columns.iter().all(|c| *c <= most), "TOO MUCH: {}: not {least}..={most}", what());
        plan.saw(number, row, other, *columns.iter().min().expect("a lane has a column"));
        let whole = plan.in_parts(number) || columns.iter().all(|c| *c == columns[0]);
        assert!(whole, "TORN: {}: no snapshot", what());
    }
    Ok(())
}
