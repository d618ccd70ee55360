//! What a server does with a peer that does not keep to the protocol: a client written by hand, over shared memory.
//!
//! Beside it there is an honest client in the same job, which must notice nothing: its updates stay exact, and its clock
//! goes on as soon as the other one is out of the vector clock.

use std::{
    thread,
    time::{Duration, Instant},
};

use fervor_client::{Client, ClientOptions, Error, Model, Table, Worker};
use fervor_protocol::{
    Schema,
    ack::{Immediate, ack_offset, acknowledged},
    batch::{BatchWriter, END_OF_CLOCK},
    element::ElementType,
    limits::MESSAGE_BYTES,
    pending::Delta,
    row::{Header, Seal},
    wire::{self, Hello, Kind, PUSH_ONCE, SUBSCRIBE, SlotRecord, UNSUBSCRIBE, Welcome},
};
use fervor_server::{Config, Server};
use fervor_verbs::{
    Address,
    transport::{
        Connection, Endpoint, EndpointConfig, Listener, Payload, Region, RemoteAddress, Request, Transport,
        any::Host,
    },
};
use support::{Folder, config, raw::PATIENCE};
use zerocopy::{FromBytes, IntoBytes};

#[path = "../../client/tests/support/mod.rs"]
mod support;

/// Where slots begin in its region, behind the control block.
const SLOTS: usize = 4096;
const ROWS: u64 = 10;
const WIDTH: usize = 8;

type Raw = support::raw::Raw<Host>;

/// What the client written by hand says of this table, and finds in its slots.
trait Speaks {
    /// A batch that adds `value` to the first column of `row`.
    fn batch(&mut self, number: u64, clock: Option<u64>, row: u64, value: f32) -> Vec<u8>;
    /// The row in the slot at `offset`, once it is whole.
    fn slot(&mut self, offset: usize) -> (Header, Vec<f32>);
}

impl Speaks for Raw {
    fn batch(&mut self, number: u64, clock: Option<u64>, row: u64, value: f32) -> Vec<u8> {
        let mut buffer = vec![0; 4096];
        let mut writer = BatchWriter::new(&mut buffer);
        writer.push(0, row, &Delta::Dense { start: 0, values: vec![value] });
        self.sequence += 1;
        let length = writer.finish(self.sequence, self.returned, number, clock);
        buffer[..length].to_vec()
    }

    fn slot(&mut self, offset: usize) -> (Header, Vec<f32>) {
        self.until("a push", |raw| {
            let mut image = [0; 32 + WIDTH * 4];
            raw.region.memory().read(offset, &mut image);
            let (header, data) = Header::read_from_prefix(&image).unwrap();
            let whole = header.lsn > 0 && Seal::new(WIDTH * 4).verify(&header, data);
            whole.then(|| (header, <[f32]>::ref_from_bytes(data).unwrap().to_vec()))
        })
    }
}

/// A server with one table, and an honest client with one worker.
struct Scene {
    host: Host,
    address: Address,
    table: Table<f32>,
    worker: Worker,
    client: Client,
    server: Server<Host>,
    added: f32,
    _folder: Folder,
}

impl Scene {
    fn new(name: &str, model: Model) -> Self {
        let folder = Folder::new(name);
        let address = folder.address("s.sock");
        let host = Host::for_addresses(std::slice::from_ref(&address)).unwrap();
        let mut config = config(&address, 1);
        config.clients = 4;
        let server = Server::start(&host, &config).unwrap();
        let options = ClientOptions::default();
        let client = Client::connect_on(&host, std::slice::from_ref(&address), options).unwrap();
        let table = client.table("t", ROWS, WIDTH, model).unwrap();
        let worker = client.worker().unwrap();
        Self { host, address, table, worker, client, server, added: 0.0, _folder: folder }
    }

    fn raw(&self) -> Raw {
        Raw::connect(&self.host, &self.address)
    }

    /// The first column of row 0.
    fn value(&mut self) -> f32 {
        let mut row = [0.0; WIDTH];
        self.worker.get(&self.table, 0, &mut row).unwrap();
        row[0]
    }

    /// The honest client works as if it were alone, and nothing but its own updates is there.
    fn undisturbed(&mut self) {
        for _ in 0..2 {
            self.worker.inc(&self.table, 0, &[1.0; WIDTH]).unwrap();
            self.added += 1.0;
            self.worker.clock().unwrap();
            // Under BSP this waits for the shard clock: nobody else may be in the vector clock.
            assert_eq!(self.value(), self.added);
        }
    }

    fn end(self) {
        drop(self.worker);
        self.client.close().unwrap();
        assert!(self.server.stop());
    }
}

/// Bytes of `message` with the one at `at` changed.
fn with(mut message: Vec<u8>, at: usize, byte: u8) -> Vec<u8> {
    message[at] = byte;
    message
}

/// A slot record.
fn record(row: u64, slot: usize, table: u32, wish: u32) -> Vec<u8> {
    SlotRecord { row, slot: slot as u64, table, wish }.as_bytes().to_vec()
}

#[test]
fn handshakes_that_make_no_sense_are_refused_with_the_reason() {
    let mut scene = Scene::new("handshakes", Model::Bsp);
    let field = |change: fn(&mut Hello)| {
        move |mut hello: Hello| {
            change(&mut hello);
            hello.as_bytes().to_vec()
        }
    };
    type Change = Box<dyn FnOnce(Hello) -> Vec<u8>>;
    let cases: Vec<(Change, &str)> = vec![
        (Box::new(|_| vec![]), "not a handshake"),
        (Box::new(|_| vec![7; 48]), "not a handshake"),
        (Box::new(|hello| hello.as_bytes()[..20].to_vec()), "not a handshake"),
        (Box::new(|hello| hello.with_version(77).as_bytes().to_vec()), "server 1, client 77"),
        (Box::new(|hello| with(hello.as_bytes().to_vec(), 6, 9)), "unknown role"),
        (Box::new(field(|hello| hello.shard = 3)), "shard = 3, but the server has 1"),
        (Box::new(field(|hello| hello.clients = 0)), "clients = 0"),
        (Box::new(field(|hello| hello.receives = 1)), "receives = 1 is not in 2..=1024"),
        (Box::new(field(|hello| hello.receives = 1 << 20)), "receives = 1048576"),
    ];
    for (change, text) in cases {
        let refusal = Raw::try_connect(&scene.host, &scene.address, change).err().expect("a refusal");
        assert!(refusal.contains(text), "{refusal}: no {text}");
    }
    // One that does not say where to answer is only hung up on.
    let control = field(|hello| hello.control = hello.length);
    let mut raw = Raw::try_connect(&scene.host, &scene.address, control).unwrap();
    raw.until("the end", |raw| raw.ended.then_some(()));
    // One of a job of another size.
    let clients = field(|hello| hello.clients = 3);
    let mut raw = Raw::try_connect(&scene.host, &scene.address, clients).unwrap();
    let fault = raw.fault();
    assert!(fault.contains("the running job has 1 clients, and this one says 3"), "{fault}");
    scene.undisturbed();
    scene.end();
}

#[test]
fn a_client_tells_what_is_wrong_with_a_server() {
    let folder = Folder::new("servers");
    let mut good = Welcome::new();
    (good.shards, good.credits, good.message_bytes) = (1, 8, MESSAGE_BYTES as u32);
    let good = good.as_bytes().to_vec();
    let answers: Vec<(Option<Vec<u8>>, &str)> = vec![
        (Some(with(good.clone(), 4, 77)), "client 1, server 77"),
        (Some(vec![3; 56]), "not a handshake of Fervor"),
        (Some(good[..30].to_vec()), "not a handshake of Fervor"),
        (Some(with(good.clone(), 44, 200)), "grants 200 messages"),
        (Some(with(good.clone(), 50, 0)), "0 bytes"),
        (Some(with(good, 6, 0)), "0 shards"),
        (None, "no Fervor server"),
    ];
    for (number, (answer, text)) in answers.into_iter().enumerate() {
        let address = folder.address(&format!("{number}.sock"));
        let host = Host::for_addresses(std::slice::from_ref(&address)).unwrap();
        let mut listener = host.listen(&address).unwrap();
        let server = thread::spawn(move || {
            let request = listener.accept(PATIENCE).unwrap().expect("a client");
            let endpoint = host.endpoint(&EndpointConfig::default()).unwrap();
            match answer {
                Some(answer) => drop(request.accept(&endpoint.attach(), &answer)),
                None => request.reject(b"go away"),
            }
        });
        let error = Client::connect(&[address.to_string()]).unwrap_err();
        assert!(error.to_string().contains(text), "{error}: no {text}");
        server.join().unwrap();
    }
}

#[test]
fn a_malformed_message_ends_its_connection_with_the_field_and_changes_nothing() {
    let mut scene = Scene::new("malformed", Model::Bsp);
    scene.undisturbed();
    // A record that is fine, before the one that is not: it must not be applied.
    let two = |raw: &mut Raw, table, row, delta: &Delta<f32>| {
        let mut buffer = vec![0; 4096];
        let mut writer = BatchWriter::new(&mut buffer);
        writer.push(0, 0, &Delta::Dense { start: 0, values: vec![100f32] });
        writer.push(table, row, delta);
        raw.sequence += 1;
        let length = writer.finish(raw.sequence, 0, 1, Some(9));
        buffer[..length].to_vec()
    };
    let one = Delta::Dense { start: 0, values: vec![1f32] };
    let schema = Schema {
        name: "u".into(),
        element: ElementType::F32,
        rows: 5,
        width: 5,
        model: Model::Bsp,
        non_finite: false,
        continuous: 0,
    };
    let create = |raw: &mut Raw, at: usize, byte: u8| {
        let body = with(wire::encode_table(&schema, 0, 1), at, byte);
        raw.message(Kind::CreateTable, 0, &body)
    };
    type Make<'a> = Box<dyn Fn(&mut Raw) -> Vec<u8> + 'a>;
    let mut cases: Vec<(Make<'_>, &str)> = vec![
        (Box::new(|_| vec![]), "before its header (at byte 0)"),
        (Box::new(|raw| raw.batch(1, None, 0, 1.0)[..10].to_vec()), "before its header (at byte 10)"),
        (Box::new(|raw| with(raw.batch(1, None, 0, 1.0), 0, 0)), "kind = 0"),
        (Box::new(|raw| with(raw.batch(1, None, 0, 1.0), 0, 99)), "kind = 99"),
        (Box::new(|raw| raw.message(Kind::Table, 0, &[0; 16])), "kind = 65"),
        (Box::new(|raw| raw.message(Kind::Refused, 0, b"no")), "kind = 66"),
        (Box::new(|raw| raw.message(Kind::Fault, 0, b"no")), "kind = 67"),
        (Box::new(|raw| with(raw.batch(1, None, 0, 1.0), 8, 5)), "sequence = 5, but 1 is next"),
        (Box::new(|raw| with(raw.batch(1, None, 0, 1.0), 8, 0)), "sequence = 0, but 1 is next"),
        (Box::new(|raw| with(raw.batch(1, None, 0, 1.0), 16, 90)), "returned = 90"),
        (Box::new(|raw| raw.batch(2, None, 0, 1.0)), "batch number = 2, but 1 is next"),
        (Box::new(|raw| raw.batch(0, None, 0, 1.0)), "batch number = 0, but 1 is next"),
        (Box::new(|raw| raw.message(Kind::Batch, 1, &[0; 9])), "before its batch header"),
        (Box::new(|raw| raw.message(Kind::Batch, 1, &[1; 20])), "batch number"),
        (Box::new(|raw| two(raw, 5, 0, &one)), "record 1: table = 5"),
        (Box::new(|raw| two(raw, 0, ROWS, &one)), "record 1: row = 10: 10 rows"),
        (Box::new(|raw| two(raw, 0, 1, &Delta::Dense { start: 8, values: vec![1.0] })), "start + count = 9"),
        (Box::new(|raw| two(raw, 0, 1, &Delta::Sparse(vec![(8, 1.0)]))), "column = 8: 8 columns"),
        (Box::new(|raw| two(raw, 0, 1, &Delta::Sparse(vec![(1, f32::NAN)]))), "NaN or infinity"),
        (Box::new(|raw| two(raw, 0, 1, &Delta::Sparse(vec![(1, f32::INFINITY)]))), "NaN or infinity"),
        (Box::new(|raw| [two(raw, 0, 1, &one), vec![0; 16]].concat()), "16 bytes follow"),
        (
            Box::new(|raw| {
                let m = two(raw, 0, 1, &one);
                m[..m.len() - 8].to_vec()
            }),
            "record 1: count = 1",
        ),
        (
            Box::new(|raw| {
                let m = two(raw, 0, 1, &one);
                m[..m.len() - 32].to_vec()
            }),
            "before its record header",
        ),
        (Box::new(|raw| with(two(raw, 0, 1, &one), 4, 3)), "before its record header"),
        (Box::new(|raw| with(two(raw, 0, 1, &one), 92, 1)), "reserved = 1"),
        (Box::new(|raw| raw.message(Kind::Slots, 2, &record(0, SLOTS, 0, SUBSCRIBE))), "slot records"),
        (Box::new(|raw| raw.message(Kind::Slots, 1, &record(0, SLOTS, 7, PUSH_ONCE))), "table = 7"),
        (Box::new(|raw| raw.message(Kind::Slots, 1, &record(ROWS, SLOTS, 0, PUSH_ONCE))), "row = 10"),
        (Box::new(|raw| raw.message(Kind::Slots, 1, &record(0, 1 << 20, 0, PUSH_ONCE))), "slot = 1048576"),
        (
            Box::new(|raw| raw.message(Kind::Slots, 1, &record(0, (1 << 20) - 32, 0, PUSH_ONCE))),
            "slot = 1048544",
        ),
        (Box::new(|raw| raw.message(Kind::Slots, 1, &record(0, SLOTS + 8, 0, PUSH_ONCE))), "slot = 4104"),
        (Box::new(|raw| raw.message(Kind::Slots, 1, &record(0, SLOTS, 0, 9))), "wish = 9"),
        (Box::new(|raw| raw.message(Kind::Slots, 1, &record(0, SLOTS, 0, SUBSCRIBE))), "wish = 0"),
        (Box::new(|raw| raw.message(Kind::CreateTable, 0, &[0; 9])), "before its schema"),
        (Box::new(|raw| create(raw, 32, 9)), "element = 9"),
        (Box::new(|raw| create(raw, 33, 9)), "model = 9"),
        (Box::new(|raw| create(raw, 16, 0)), "elements, not 0"),
        (Box::new(|raw| create(raw, 0, 0)), "rows, not 0"),
        (Box::new(|raw| create(raw, 24, 4)), "shard = 4 of 1"),
        (Box::new(|raw| create(raw, 35, 3)), "name_length = 3, but the name has 1 bytes"),
        (Box::new(|raw| create(raw, 40, 0xff)), "not UTF-8"),
    ];
    for (make, text) in cases.drain(..) {
        let mut raw = scene.raw();
        let message = make(&mut raw);
        raw.send(&message);
        let fault = raw.fault();
        assert!(fault.contains(text), "`{fault}`: no `{text}`");
        // The raw end is still open: the server has put it out of the vector clock by itself.
        scene.undisturbed();
    }
    // After a good message, one that came before.
    let mut raw = scene.raw();
    let good = raw.batch(1, None, 9, 1.0);
    raw.send(&good);
    raw.acknowledgement(1);
    raw.send(&good);
    assert!(raw.fault().contains("sequence = 1, but 2 is next"));
    // After its farewell, anything.
    let mut raw = scene.raw();
    let (leave, more) = (raw.message(Kind::Leave, 0, &[]), raw.batch(1, None, 0, 1.0));
    raw.send(&leave);
    raw.send(&more);
    assert!(raw.fault().contains("kind = 1, but the client has left"));
    scene.undisturbed();
    scene.end();
}

#[test]
fn what_is_out_of_reach_is_not_written_and_a_readers_connection_carries_no_messages() {
    let mut scene = Scene::new("reach", Model::Bsp);
    scene.undisturbed();
    // The rows are exported for READ alone.
    let mut raw = scene.raw();
    let row = RemoteAddress { address: raw.welcome.address + 32, key: raw.welcome.key };
    raw.connection.write(Payload::Inline(&[0xff; 8]), row, None, Some(1)).unwrap();
    let _ = raw.connection.ring();
    raw.until("the end", |raw| raw.ended.then_some(()));
    scene.undisturbed();
    // A message on a connection for READs; one that is longer than any buffer.
    let reader = |_: Hello| Hello::reader(0).as_bytes().to_vec();
    let mut raw = Raw::try_connect(&scene.host, &scene.address, reader).unwrap();
    let message = raw.batch(1, None, 0, 1.0);
    raw.send(&message);
    raw.until("the end", |raw| raw.ended.then_some(()));
    let mut raw = scene.raw();
    raw.send(&vec![1; MESSAGE_BYTES + 8]);
    raw.until("the end", |raw| raw.ended.then_some(()));
    scene.undisturbed();
    scene.end();
}

#[test]
fn a_batch_that_comes_twice_is_applied_once() {
    let mut scene = Scene::new("twice", Model::Async);
    let mut raw = scene.raw();
    let first = raw.batch(1, None, 0, 1.0);
    raw.send(&first);
    let lsn = raw.acknowledgement(1);
    assert_eq!(scene.value(), 1.0);
    // Others' batches in between, so that the present LSN is another one.
    scene.worker.inc(&scene.table, 0, &[10.0; WIDTH]).unwrap();
    scene.worker.clock().unwrap();
    let (second, again, third) =
        (raw.batch(2, Some(1), 0, 1.0), raw.batch(1, None, 0, 1.0), raw.batch(3, None, 0, 1.0));
    for message in [&second, &again, &third] {
        raw.send(message);
    }
    let lsns = [2, 3, 4].map(|sequence| raw.acknowledgement(sequence));
    assert!(lsns[0] > lsn && lsns[2] > lsns[0]);
    assert_eq!(lsns[1], lsn, "the LSN at which it was applied, not a later one");
    let start = Instant::now();
    while scene.value() != 13.0 {
        assert!(start.elapsed() < PATIENCE, "{} after three batches and one of ten", scene.value());
    }
    drop(raw);
    scene.end();
}

/// A few receive buffers are granted and none is given back: the client gets so many messages and no more, and
/// nobody else notices. When it gives them back, the rest comes.
#[test]
fn a_client_that_gives_no_receive_buffers_back_stops_itself_alone() {
    let mut scene = Scene::new("receives", Model::Essp { staleness: 0 });
    let few = |mut hello: Hello| {
        // One of them is kept for the last word.
        hello.receives = 4;
        hello.as_bytes().to_vec()
    };
    let mut raw = Raw::try_connect(&scene.host, &scene.address, few).unwrap();
    // It holds row 0, and lets the clock run as far as it likes.
    let ahead = raw.batch(1, Some(1_000_000), 9, 1.0);
    raw.send(&ahead);
    let subscribe = raw.message(Kind::Slots, 1, &record(0, SLOTS, 0, SUBSCRIBE));
    raw.send(&subscribe);
    raw.acknowledgement(2);
    for clock in 1..=300 {
        scene.worker.inc(&scene.table, 0, &[1.0; WIDTH]).unwrap();
        scene.worker.clock().unwrap();
        assert_eq!(scene.value(), clock as f32);
    }
    raw.poll();
    thread::sleep(Duration::from_millis(50));
    raw.poll();
    assert_eq!(raw.immediates.len(), 3, "{:?}", raw.immediates);
    // Pushes need no receive buffer: its slot is as of the present.
    assert_eq!(raw.slot(SLOTS).1[0], 300.0);
    raw.returned = 3;
    let credit = raw.message(Kind::Credit, 0, &[]);
    raw.send(&credit);
    let present = |raw: &mut Raw| raw.immediates.contains(&Immediate::Round(300)).then_some(());
    raw.until("the round of the present clock", present);
    assert_eq!(raw.immediates.len(), 4, "rounds that could not be closed become one: {:?}", raw.immediates);
    // Requests whose answers find no receive buffer are answered when there is one.
    raw.returned = 4;
    let schema = |name: String| Schema {
        name,
        element: ElementType::I32,
        rows: 1,
        width: 1,
        model: Model::Bsp,
        non_finite: false,
        continuous: 0,
    };
    for number in 0..5 {
        let body = wire::encode_table(&schema(format!("u{number}")), 0, 1);
        let message = raw.message(Kind::CreateTable, 0, &body);
        raw.send(&message);
        let sequence = raw.sequence;
        raw.acknowledgement(sequence);
    }
    raw.until("three answers", |raw| (raw.replies.len() == 3).then_some(()));
    thread::sleep(Duration::from_millis(50));
    raw.poll();
    assert_eq!(raw.replies.len(), 3);
    raw.returned = 7;
    let credit = raw.message(Kind::Credit, 0, &[]);
    raw.send(&credit);
    raw.until("five answers", |raw| (raw.replies.len() == 5).then_some(()));
    assert!(raw.replies.iter().all(|(kind, ..)| *kind == Kind::Table as u8));
    drop(raw);
    scene.end();
}

#[test]
fn a_client_that_sends_more_than_its_credits_is_ended_and_nobody_else_notices() {
    let mut scene = Scene::new("credits", Model::Bsp);
    scene.undisturbed();
    let mut refused = 0;
    for _ in 0..20 {
        let mut raw = scene.raw();
        // 40 messages at one ring, though 8 may be out.
        for number in 1..=40 {
            let message = raw.batch(number, None, 9, 1.0);
            raw.post(&message);
        }
        let _ = raw.connection.ring();
        let end = raw.until("an acknowledgement of all, or the end", |raw| {
            let all = acknowledged(raw.region.memory().load(ack_offset(40)), 40).is_some();
            (all || raw.ended).then_some(raw.ended)
        });
        if end {
            let fault = raw.fault();
            assert!(fault.contains("sequence = ") && fault.contains("credits = 8"), "{fault}");
            refused += 1;
        }
        drop(raw);
        scene.undisturbed();
    }
    // A server that happens to take each message as it comes cannot know.
    assert!(refused > 0, "it never had more than 8 before it");
    scene.end();
}

#[test]
fn a_slot_is_announced_free_after_its_last_push() {
    let mut scene = Scene::new("slots", Model::Essp { staleness: 0 });
    let mut raw = scene.raw();
    let ahead = raw.batch(1, Some(1_000_000), 9, 1.0);
    let subscribe = raw.message(Kind::Slots, 1, &record(0, SLOTS, 0, SUBSCRIBE));
    raw.send(&ahead);
    raw.send(&subscribe);
    raw.acknowledgement(2);
    scene.undisturbed();
    let (header, row) = raw.slot(SLOTS);
    assert_eq!((row[0] as u64, header.included), (header.clock, 1), "it says what it contains: {header:?}");
    // Twice is refused; once given up, it is announced free, and nothing comes any more.
    let give_up = raw.message(Kind::Slots, 1, &record(0, SLOTS, 0, UNSUBSCRIBE));
    raw.send(&give_up);
    raw.until("Closed", |raw| raw.immediates.contains(&Immediate::Closed(3)).then_some(()));
    raw.region.memory().write(SLOTS, &[0xee; 64]);
    scene.undisturbed();
    raw.poll();
    let mut slot = [0; 64];
    raw.region.memory().read(SLOTS, &mut slot);
    assert_eq!(slot, [0xee; 64]);
    let twice = [record(1, SLOTS, 0, SUBSCRIBE), record(1, SLOTS + 64, 0, SUBSCRIBE)].concat();
    let twice = raw.message(Kind::Slots, 2, &twice);
    raw.send(&twice);
    assert!(raw.fault().contains("row = 1 is subscribed already"));
    scene.undisturbed();
    scene.end();
}

#[test]
fn a_row_of_any_table_is_pushed_once_when_asked_for() {
    for (name, model) in
        [("once-async", Model::Async), ("once-bsp", Model::Bsp), ("once-essp", Model::Essp { staleness: 0 })]
    {
        let mut scene = Scene::new(name, model);
        let mut raw = scene.raw();
        let ahead = raw.batch(1, Some(1_000_000), 9, 1.0);
        let ask = raw.message(Kind::Slots, 1, &record(9, SLOTS, 0, PUSH_ONCE));
        raw.send(&ahead);
        raw.send(&ask);
        let (header, row) = raw.slot(SLOTS);
        assert_eq!((header.included, row[0]), (1, 1.0), "{model}");
        scene.undisturbed();
        scene.end();
    }
}

#[test]
fn there_is_a_place_for_so_many_clients_and_for_another_when_one_leaves() {
    let folder = Folder::new("places");
    let address = folder.address("s.sock");
    let host = Host::for_addresses(std::slice::from_ref(&address)).unwrap();
    let server = Server::start(&host, &Config { clients: 2, ..config(&address, 2) }).unwrap();
    let connect = || Client::connect_on(&host, std::slice::from_ref(&address), ClientOptions::default());
    let (first, second) = (connect().unwrap(), connect().unwrap());
    let error = connect().unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error:?}");
    assert!(error.to_string().contains("2 clients") && error.to_string().contains("--clients"), "{error}");
    first.close().unwrap();
    // At once: who has left takes no place, though its connection may not have ended yet.
    let third = connect().unwrap();
    // One that does not take its leave makes place when its connection has ended.
    drop(second);
    let start = Instant::now();
    while let Err(error) = connect() {
        assert!(start.elapsed() < PATIENCE, "{error}");
    }
    third.close().unwrap();
    assert!(server.stop());
}

#[test]
fn flags_beyond_the_known_are_no_clock() {
    // Only END_OF_CLOCK ends a clock: a batch without it leaves the shard clock where it is.
    let mut scene = Scene::new("flags", Model::Bsp);
    let mut raw = scene.raw();
    let quiet = raw.batch(1, None, 9, 1.0);
    raw.send(&quiet);
    raw.acknowledgement(1);
    scene.worker.clock().unwrap();
    thread::sleep(Duration::from_millis(20));
    raw.poll();
    assert!(!raw.immediates.contains(&Immediate::Round(1)));
    let loud = raw.batch(2, Some(1), 9, 1.0);
    assert_eq!(loud[1], END_OF_CLOCK);
    raw.send(&loud);
    raw.until("round 1", |raw| raw.immediates.contains(&Immediate::Round(1)).then_some(()));
    drop(raw);
    scene.end();
}
