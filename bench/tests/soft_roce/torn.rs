//! A READ of memory that is being written is torn; a row that a `get` returns never is.

use std::{
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

use fervor_client::{Client, ClientOptions, Model};
use fervor_verbs::{
    Address, Exclusive, Memory,
    transport::{
        Access, Completion, Connection as _, Endpoint as _, EndpointConfig, Export as _, Listener as _, Post,
        Region as _, RemoteRegion, Request as _, Sge, Transport as _, rdma::Rdma,
    },
};

use crate::program::Server;

const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that are READ at a time.
const BYTES: usize = 4096;

/// Ends the writer, also when the reader panics.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// That the device tears is what makes the next test one: here is no row and no checksum, only bytes.
#[test]
fn raw_reads_are_torn() {
    const READS: u32 = 2000;
    let device = |name| Rdma::on_device(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    let (near, far) = (device("rxe0"), device("rxe1"));
    let address = Address::Rdma { host: "10.7.0.2".into(), port: 0, from: None };
    let mut listener = far.listen(&address).expect("listen");
    let &Address::Rdma { port, .. } = listener.address() else { unreachable!("it listens at {address}") };
    let mut shared = Exclusive::new("torn", BYTES).expect("memory");
    let export = far.export(&shared).expect("export");
    let stop = &AtomicBool::new(false);
    let (mut torn, mut changes) = (0, 0);
    thread::scope(|scope| {
        let _stop = Stop(stop);
        scope.spawn(move || {
            let RemoteRegion { address, length, key } = export.remote();
            let mut told = [address.to_le_bytes(), length.to_le_bytes()].concat();
            told.extend(key.to_le_bytes());
            let mut endpoint = far.endpoint(&EndpointConfig::default()).expect("endpoint");
            let request = listener.accept(PATIENCE).expect("accept").expect("nobody connects");
            let connection = request.accept(&endpoint.attach(), &told).expect("accept");
            let mut seen = Vec::new();
            for value in 0u64.. {
                if stop.load(SeqCst) {
                    break;
                }
                shared.bytes_mut().fill(value as u8);
                if value % 1024 == 0 {
                    endpoint.poll(&mut seen);
                }
            }
            drop(connection);
        });
        let mut endpoint = near.endpoint(&EndpointConfig::default()).expect("endpoint");
        let there = Address::Rdma { host: "10.7.0.2".into(), port, from: Some("10.7.0.1".into()) };
        let (mut connection, told) =
            near.connect(&endpoint.attach(), &there, &[], PATIENCE).expect("connect");
        let word = |at: usize| u64::from_le_bytes(told[at..at + 8].try_into().expect("8 bytes"));
        let key = u32::from_le_bytes(told[16..20].try_into().expect("4 bytes"));
        let remote = RemoteRegion { address: word(0), length: word(8), key };
        let memory = Memory::new("torn-copy", BYTES).expect("memory");
        let region = near.register(&memory, Access::Local).expect("register");
        let (mut copy, mut seen, mut last) = (vec![0; BYTES], Vec::new(), 0);
        for _ in 0..READS {
            connection
                .post(Post::Read {
                    into: &[Sge { region: &region, offset: 0, length: BYTES }],
                    from: remote.at(0),
                    signal: Some(0),
                })
                .expect("read");
            connection.ring().expect("ring");
            let deadline = Instant::now() + PATIENCE;
            while endpoint.poll(&mut seen) == 0 {
                assert!(Instant::now() < deadline, "a READ does not complete");
                thread::yield_now();
            }
            for completion in seen.drain(..) {
                assert!(matches!(completion, Completion::Work { result: Ok(()), .. }), "{completion:?}");
            }
            region.memory().read(0, &mut copy);
            torn += u32::from(copy.iter().any(|byte| *byte != copy[0]));
            changes += u32::from(copy[0] != last);
            last = copy[0];
        }
    });
    println!(
        "{torn} of {READS} raw READs of {BYTES} bytes were torn; the memory had changed before {changes}"
    );
    assert!(torn > 0, "no READ was torn: nothing here shows that checksums are needed");
}

/// A server applies updates to one wide row without a pause, and a client READs it for every `get` (Async).
#[test]
fn rows_are_never_torn() {
    const WIDTH: usize = 8192;
    const GETS: u32 = 1000;
    /// Columns of an update: few, so that batches are small, and far apart, so that the row is long in the changing.
    const STEP: usize = 128;
    let server = Server::start(1);
    let connect = || {
        let options = ClientOptions { clients: 2, ..ClientOptions::default() };
        let client = Client::connect_with(&[server.url()], options).expect("connect");
        let table = client.table::<i64>("wide", 1, WIDTH, Model::Async).expect("table");
        let worker = client.worker().expect("worker");
        (client, table, worker)
    };
    let stop = &AtomicBool::new(false);
    let (mut writing, mut reading) = (connect(), connect());
    thread::scope(|scope| {
        let _stop = Stop(stop);
        let writer = scope.spawn(move || {
            let (_, table, worker) = &mut writing;
            let update: Vec<_> = (0..WIDTH).step_by(STEP).map(|column| (column as u32, 1)).collect();
            let mut updates = 0;
            while !stop.load(SeqCst) {
                worker.inc_at(table, 0, &update).expect("inc");
                worker.clock().expect("clock");
                updates += 1;
            }
            updates
        });
        let (_, table, worker) = &mut reading;
        let (mut row, mut last, mut changes) = (vec![0i64; WIDTH], 0, 0);
        let start = Instant::now();
        while worker.stats().misses < GETS.into() || (worker.stats().torn == 0 && start.elapsed() < PATIENCE)
        {
            worker.get(table, 0, &mut row).expect("get");
            let value = row[0];
            let right =
                |(column, element): (usize, &i64)| *element == if column % STEP == 0 { value } else { 0 };
            assert!(row.iter().enumerate().all(right), "torn: the first element is {value}, of {row:?}");
            assert!(value >= last, "the row went back from {last} to {value}");
            changes += u32::from(value > last);
            last = value;
        }
        let stats = worker.stats();
        stop.store(true, SeqCst);
        let updates: u64 = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        println!(
            "{} gets of a row of {} bytes, {changes} of them of a changed row, beside {updates} updates: \
             {} of {} READs were torn, {} rows were asked for, none was returned torn",
            stats.misses,
            WIDTH * 8,
            stats.torn,
            stats.reads,
            stats.asked
        );
        assert!(stats.torn > 0, "no READ was torn in {:?}: this test has shown nothing", start.elapsed());
        assert!(changes > 0, "the row never changed");
    });
}
