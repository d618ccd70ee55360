//! What a server does with a peer that does not keep to the protocol: a client written by hand, over shared memory.
//!
//! Beside it there is an honest client in the same job, which must notice nothing: its updates stay exact, and its clock
//! goes on as soon as the other one is out of the vector clock.

use std::{
    thread,
    time::{Duration, Instant},
};

use fervor_client::{Client, ClientOptions, Error, Model};
use fervor_protocol::{
    Schema,
    ack::{Immediate, ack_offset, acknowledged},
    batch::BatchWriter,
    limits::MESSAGE_BYTES,
    wire::{Hello, Hold, Kind, OpenTable, PUSH_ONCE, ReleaseHeader, SUBSCRIBE, Welcome},
};
use fervor_server::{Config, Server};
use fervor_verbs::transport::{
    Connection, Endpoint, EndpointConfig, Listener, Payload, Post, Region, RemoteAddress, Request, Transport,
    any::Host,
};
use scene::{
    ROWS, Raw, SLOTS, Scene, Speaks, WIDTH, record, schema,
    support::{Folder, config, raw::PATIENCE},
};
use zerocopy::IntoBytes;

mod scene;

/// Bytes of `message` with the one at `at` changed.
fn with(mut message: Vec<u8>, at: usize, byte: u8) -> Vec<u8> {
    message[at] = byte;
    message
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
        (Box::new(|hello| hello.with_version(77).as_bytes().to_vec()), "server 4, client 77"),
        (Box::new(|hello| with(hello.as_bytes().to_vec(), 6, 9)), "unknown role"),
        (Box::new(field(|hello| hello.shard = 3)), "shard = 3, but the server has 1"),
        (Box::new(field(|hello| hello.clients = 0)), "clients = 0"),
        (Box::new(field(|hello| hello.receives = 1)), "receives = 1 is not in 2..=1024"),
        (Box::new(field(|hello| hello.receives = 1025)), "receives = 1025"),
    ];
    for (change, text) in cases {
        let refusal = Raw::try_connect(&scene.host, &scene.address, change).err().expect("a refusal");
        assert!(refusal.contains(text), "{refusal}: no {text}");
    }
    // One that does not say where to answer is only hung up on.
    let control = field(|hello| hello.control = hello.length as u32);
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
        (Some(with(good.clone(), 4, 77)), "client 4, server 77"),
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
    // A section that is fine, before the one that is not: it must not be applied.
    type Fill<'a> = &'a dyn Fn(&mut BatchWriter<'_>);
    let two = |raw: &mut Raw, fill: Fill<'_>| {
        let mut buffer = vec![0; 4096];
        let mut writer = BatchWriter::new(&mut buffer);
        writer.part(0, 0, 0, 1, 100f32.as_bytes());
        fill(&mut writer);
        raw.sequence += 1;
        let length = writer.finish(Kind::Batch, raw.sequence, 0, 1, Some(9));
        buffer[..length].to_vec()
    };
    let one = |table, row| move |writer: &mut BatchWriter<'_>| writer.part(table, row, 0, 1, 1f32.as_bytes());
    let cell = |column, value: f32| {
        move |writer: &mut BatchWriter<'_>| writer.cells(0, &[3], &[1], &[column], &[value])
    };
    // Where the second section's header is.
    const SECOND: usize = 88;
    let create = |raw: &mut Raw, at: usize, byte: u8| {
        let schema = Schema { name: "u".into(), ..schema(Model::Bsp) };
        let open = OpenTable { schema, shard: 0, shards: 1, hold: Hold::Slots };
        raw.message(Kind::CreateTable, 0, &with(open.encode(), at, byte))
    };
    let mirror = |raw: &mut Raw, base| {
        let open = OpenTable { schema: schema(Model::Bsp), shard: 0, shards: 1, hold: Hold::Mirror(base) };
        raw.message(Kind::CreateTable, 0, &open.encode())
    };
    let slot = |raw: &mut Raw, record: Vec<u8>| {
        raw.open(Model::Bsp, Hold::Slots);
        raw.message(Kind::Slots, 1, &record)
    };
    let release = ReleaseHeader { table: 0, reserved: 0 };
    type Make<'a> = Box<dyn Fn(&mut Raw) -> Vec<u8> + 'a>;
    let mut cases: Vec<(Make<'_>, &str)> = vec![
        (Box::new(|_| vec![]), "before its header (at byte 0)"),
        (Box::new(|raw| raw.batch(1, None, 0, 1.0)[..10].to_vec()), "before its header (at byte 10)"),
        (Box::new(|raw| with(raw.batch(1, None, 0, 1.0), 0, 0)), "kind = 0"),
        (Box::new(|raw| with(raw.batch(1, None, 0, 1.0), 0, 99)), "kind = 99"),
        (Box::new(|raw| raw.message(Kind::Table, 0, &[0; 16])), "kind = 65"),
        (Box::new(|raw| raw.message(Kind::Refused, 0, b"no")), "kind = 66"),
        (Box::new(|raw| raw.message(Kind::Fault, 0, b"no")), "kind = 67"),
        (Box::new(|raw| raw.message(Kind::Named, 0, b"no")), "kind = 68"),
        (Box::new(|raw| with(raw.batch(1, None, 0, 1.0), 8, 5)), "sequence = 5, but 1 is next"),
        (Box::new(|raw| with(raw.batch(1, None, 0, 1.0), 8, 0)), "sequence = 0, but 1 is next"),
        (Box::new(|raw| with(raw.batch(1, None, 0, 1.0), 16, 90)), "returned = 90"),
        (Box::new(|raw| raw.batch(2, None, 0, 1.0)), "batch number = 2, but 1 is next"),
        (Box::new(|raw| raw.batch(0, None, 0, 1.0)), "batch number = 0, but 1 is next"),
        (Box::new(|raw| raw.batch(1, Some(0), 0, 1.0)), "clock = 0 does not follow the client's last one"),
        (Box::new(|raw| raw.batch(1, Some(u64::MAX), 0, 1.0)), "does not follow the client's last one"),
        (Box::new(|raw| raw.message(Kind::Batch, 1, &[0; 9])), "before its batch header"),
        (Box::new(|raw| raw.message(Kind::Batch, 1, &[1; 20])), "before its section header"),
        (Box::new(|raw| two(raw, &one(5, 0))), "table 5: record 1: table = 5"),
        (Box::new(|raw| two(raw, &one(0, ROWS as u32))), "table `t`: record 1: row = 10: 10 rows"),
        (Box::new(|raw| two(raw, &|writer| writer.part(0, 1, 15, 2, &[0; 8]))), "start + count = 17"),
        (Box::new(|raw| two(raw, &cell(16, 1.0))), "column = 16: 16 columns"),
        (Box::new(|raw| two(raw, &cell(1, f32::NAN))), "table `t`: NaN or infinity in an update of row 3"),
        (Box::new(|raw| two(raw, &cell(1, f32::INFINITY))), "NaN or infinity in an update of row 3"),
        (Box::new(|raw| [two(raw, &one(0, 1)), vec![0; 16]].concat()), "16 bytes follow"),
        (
            Box::new(|raw| {
                let message = two(raw, &one(0, 1));
                message[..message.len() - 8].to_vec()
            }),
            "record 1: count = 1",
        ),
        (Box::new(|raw| two(raw, &one(0, 1))[..SECOND + 8].to_vec()), "before its section header"),
        (Box::new(|raw| with(two(raw, &one(0, 1)), 4, 3)), "before its section header"),
        (Box::new(|raw| with(two(raw, &one(0, 1)), SECOND + 4, 9)), "record 1: kind = 9"),
        (Box::new(|raw| with(two(raw, &one(0, 1)), SECOND + 16, 8)), "record 1: rows_at = 8"),
        (Box::new(|raw| with(two(raw, &one(0, 1)), SECOND + 24, 8)), "record 1: values_at = 8"),
        (Box::new(|raw| with(raw.batch(1, None, 0, 1.0), 0, Kind::Reference as u8)), "named no memory"),
        (Box::new(|raw| raw.message(Kind::Slots, 2, &record(0, SLOTS, 0, SUBSCRIBE))), "slot records"),
        (Box::new(|raw| raw.message(Kind::Slots, 1, &record(0, SLOTS, 7, PUSH_ONCE))), "table = 7"),
        (
            Box::new(|raw| raw.message(Kind::Slots, 1, &record(0, SLOTS, 0, PUSH_ONCE))),
            "has not opened table 0",
        ),
        (Box::new(|raw| slot(raw, record(ROWS, SLOTS, 0, PUSH_ONCE))), "image = 10"),
        (Box::new(|raw| slot(raw, record(0, 1 << 20, 0, PUSH_ONCE))), "slot = 1048576"),
        (Box::new(|raw| slot(raw, record(0, (1 << 20) - 64, 0, PUSH_ONCE))), "slot = 1048512"),
        (Box::new(|raw| slot(raw, record(0, SLOTS + 8, 0, PUSH_ONCE))), "slot = 4104"),
        (Box::new(|raw| slot(raw, record(0, SLOTS, 0, 9))), "wish = 9"),
        (Box::new(|raw| slot(raw, record(0, SLOTS, 0, SUBSCRIBE))), "wish = 0"),
        (Box::new(|raw| raw.message(Kind::CreateTable, 0, &[0; 9])), "before its schema"),
        (Box::new(|raw| create(raw, 40, 9)), "element = 9"),
        (Box::new(|raw| create(raw, 41, 9)), "model = 9"),
        (Box::new(|raw| create(raw, 24, 0)), "elements, not 0"),
        (Box::new(|raw| create(raw, 0, 0)), "rows, not 0"),
        (Box::new(|raw| create(raw, 32, 4)), "shard = 4 of 1"),
        (Box::new(|raw| create(raw, 43, 3)), "name_length = 3, but the name has 1 bytes"),
        (Box::new(|raw| create(raw, 44, 7)), "hold = 7"),
        (Box::new(|raw| create(raw, 48, 0xff)), "not UTF-8"),
        (Box::new(|raw| mirror(raw, 1 << 20)), "base = 1048576: the mirror is outside the client's region"),
        (Box::new(|raw| raw.message(Kind::Release, 0, &[0; 3])), "before its table"),
        (Box::new(|raw| raw.message(Kind::Release, 0, release.as_bytes())), "has not open"),
        (Box::new(|raw| raw.message(Kind::Memory, 0, &[0; 5])), "before its memory"),
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
    raw.connection
        .post(Post::Write { payload: Payload::Inline(&[0xff; 8]), to: row, immediate: None, signal: Some(1) })
        .unwrap();
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
    raw.open(scene.model, Hold::Slots);
    let ahead = raw.batch(1, Some(1_000_000), 9, 1.0);
    raw.send(&ahead);
    let subscribe = raw.message(Kind::Slots, 1, &record(0, SLOTS, 0, SUBSCRIBE));
    raw.send(&subscribe);
    raw.acknowledgement(3);
    for clock in 1..=300 {
        scene.worker.inc(&scene.table, 0, &[1.0; WIDTH]).unwrap();
        scene.worker.clock().unwrap();
        assert_eq!(scene.value(), clock as f32);
    }
    raw.poll();
    thread::sleep(Duration::from_millis(50));
    raw.poll();
    assert_eq!(raw.immediates.len(), 2, "{:?}", raw.immediates);
    // Pushes need no receive buffer: its slot is as of the present.
    assert_eq!(raw.slot(SLOTS).1[0], 300.0);
    raw.returned = 3;
    let credit = raw.message(Kind::Credit, 0, &[]);
    raw.send(&credit);
    let present = |raw: &mut Raw| raw.immediates.contains(&Immediate::Round(300)).then_some(());
    raw.until("the round of the present clock", present);
    assert_eq!(raw.immediates.len(), 3, "rounds that could not be closed become one: {:?}", raw.immediates);
    // Requests whose answers find no receive buffer are answered when there is one.
    raw.returned = 4;
    for number in 0..5 {
        let schema = Schema { name: format!("u{number}"), ..schema(Model::Bsp) };
        let open = OpenTable { schema, shard: 0, shards: 1, hold: Hold::Slots };
        let message = raw.message(Kind::CreateTable, 0, &open.encode());
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

/// Answers that nobody takes are few, however many requests come.
#[test]
fn a_client_that_takes_no_answers_is_ended_before_they_are_many() {
    const REQUESTS: u64 = 5_000;
    let mut scene = Scene::new("answers", Model::Bsp);
    let few = |mut hello: Hello| {
        hello.receives = 2;
        hello.as_bytes().to_vec()
    };
    let mut raw = Raw::try_connect(&scene.host, &scene.address, few).unwrap();
    let mut sent = 0;
    for _ in 0..REQUESTS {
        // Refused each time: it is there with another schema.
        let schema = Schema { width: 3, ..schema(Model::Bsp) };
        let open = OpenTable { schema, shard: 0, shards: 1, hold: Hold::Slots };
        let message = raw.message(Kind::CreateTable, 0, &open.encode());
        raw.send(&message);
        let sequence = raw.sequence;
        if raw.answer(sequence).is_none() {
            break;
        }
        sent += 1;
    }
    assert!(sent < 100, "{sent} requests were taken, and nobody takes the answers");
    let fault = raw.fault();
    assert!(fault.contains("64 answers wait for receive buffers"), "{fault}");
    scene.undisturbed();
    scene.end();
}

/// Subscriptions are counted against the server's bookkeeping, and come back when the client goes.
#[test]
fn subscriptions_are_bounded_by_the_bookkeeping() {
    const BOOKKEEPING: usize = 64 << 10;
    let folder = Folder::new("subscriptions");
    let address = folder.address("s.sock");
    let host = Host::for_addresses(std::slice::from_ref(&address)).unwrap();
    let config = Config { bookkeeping: BOOKKEEPING, ..config(&address, 1) };
    let server = Server::start(&host, &config).unwrap();
    let essp = Model::Essp { staleness: 1 };
    for _ in 0..3 {
        let mut raw = Raw::connect(&host, &address);
        let (kind, _) = raw.ask(Schema { rows: 100_000, ..schema(essp) }, Hold::Slots);
        assert_eq!(kind, Kind::Table);
        let mut subscribed = 0;
        loop {
            let some = subscribed..subscribed + 100;
            let records: Vec<u8> = some.flat_map(|image| record(image, SLOTS, 0, SUBSCRIBE)).collect();
            let message = raw.message(Kind::Slots, 100, &records);
            raw.send(&message);
            let sequence = raw.sequence;
            if raw.answer(sequence).is_none() {
                break;
            }
            subscribed += 100;
        }
        // The sets of the table's images take a part of it, too.
        let most = BOOKKEEPING as u64 / 96;
        assert!((most / 3..=most).contains(&subscribed), "{subscribed} of {most}");
        let fault = raw.fault();
        assert!(fault.contains("bookkeeping") && fault.contains("fewer slots"), "{fault}");
    }
    assert!(server.stop());
}
