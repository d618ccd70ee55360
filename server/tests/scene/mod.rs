//! A server with one table, an honest client, and beside it a client written by hand.

#![allow(dead_code)] // Each test uses a part of it.

use fervor_client::{Client, ClientOptions, Model, Table, Worker};
use fervor_protocol::{
    Schema,
    batch::BatchWriter,
    element::ElementType,
    limits::ROW_HEADER,
    row::{Header, Seal},
    wire::{Hold, Kind, OpenTable, SlotRecord, TableReply},
};
use fervor_server::Server;
use fervor_verbs::{
    Address,
    transport::{Region, any::Host},
};
use support::{Folder, config};
use zerocopy::{FromBytes, IntoBytes};

#[path = "../../../client/tests/support/mod.rs"]
pub mod support;

/// Where slots begin in its region, behind the control block.
pub const SLOTS: usize = 4096;
pub const ROWS: u64 = 10;
pub const WIDTH: usize = 16;
/// Bytes of data of an image: of one row.
pub const IMAGE: usize = WIDTH * 4;

pub type Raw = support::raw::Raw<Host>;

/// What the client written by hand says of this table, and finds in its slots.
pub trait Speaks {
    /// A batch that adds `value` to the first column of `row`.
    fn batch(&mut self, number: u64, clock: Option<u64>, row: u64, value: f32) -> Vec<u8>;
    /// It opens a table: kind and body of the answer.
    fn ask(&mut self, schema: Schema, hold: Hold) -> (Kind, Vec<u8>);
    /// It opens the table, and is answered.
    fn open(&mut self, model: Model, hold: Hold) -> TableReply;
    /// The image in the slot at `offset`, once it is whole.
    fn slot(&mut self, offset: usize) -> (Header, Vec<f32>);
}

impl Speaks for Raw {
    fn batch(&mut self, number: u64, clock: Option<u64>, row: u64, value: f32) -> Vec<u8> {
        let mut buffer = vec![0; 4096];
        let mut writer = BatchWriter::new(&mut buffer);
        writer.part(0, row as u32, 0, 1, value.as_bytes());
        self.sequence += 1;
        let length = writer.finish(Kind::Batch, self.sequence, self.returned, number, clock);
        buffer[..length].to_vec()
    }

    fn ask(&mut self, schema: Schema, hold: Hold) -> (Kind, Vec<u8>) {
        let open = OpenTable { schema, shard: 0, shards: 1, hold };
        let message = self.message(Kind::CreateTable, 0, &open.encode());
        self.send(&message);
        let (kind, _, body) = self.until("an answer", |raw| raw.replies.pop());
        (if kind == Kind::Table as u8 { Kind::Table } else { Kind::Refused }, body)
    }

    fn open(&mut self, model: Model, hold: Hold) -> TableReply {
        let (kind, body) = self.ask(schema(model), hold);
        assert_eq!(kind, Kind::Table);
        TableReply::read_from_bytes(&body).unwrap()
    }

    fn slot(&mut self, offset: usize) -> (Header, Vec<f32>) {
        self.until("a push", |raw| {
            let mut image = [0; ROW_HEADER + IMAGE];
            raw.region.memory().read(offset, &mut image);
            let (header, data) = Header::read_from_prefix(&image).unwrap();
            let whole = header.version.lsn() > 0 && Seal::new(IMAGE).verify(&header, data);
            whole.then(|| (header, <[f32]>::ref_from_bytes(data).unwrap().to_vec()))
        })
    }
}

/// The table of the scene.
pub fn schema(model: Model) -> Schema {
    Schema {
        name: "t".into(),
        element: ElementType::F32,
        rows: ROWS,
        width: WIDTH as u32,
        model,
        non_finite: false,
        continuous: 0,
    }
}

/// A slot record.
pub fn record(image: u64, slot: usize, table: u32, wish: u32) -> Vec<u8> {
    SlotRecord { image, slot: slot as u64, table, wish }.as_bytes().to_vec()
}

/// A server with one table, and an honest client with one worker.
pub struct Scene {
    pub host: Host,
    pub address: Address,
    pub table: Table<f32>,
    pub worker: Worker,
    client: Client,
    server: Server<Host>,
    pub model: Model,
    added: f32,
    _folder: Folder,
}

impl Scene {
    pub fn new(name: &str, model: Model) -> Self {
        let folder = Folder::new(name);
        let address = folder.address("s.sock");
        let host = Host::for_addresses(std::slice::from_ref(&address)).unwrap();
        let mut config = config(&address, 1);
        config.clients = 4;
        let server = Server::start(&host, &config).unwrap();
        let options = ClientOptions { copies: true, ..ClientOptions::default() };
        let client = Client::connect_on(&host, std::slice::from_ref(&address), options).unwrap();
        let table = client.table("t", ROWS, WIDTH, model).unwrap();
        let worker = client.worker().unwrap();
        Self { host, address, table, worker, client, server, model, added: 0.0, _folder: folder }
    }

    pub fn raw(&self) -> Raw {
        Raw::connect(&self.host, &self.address)
    }

    /// The first column of row 0.
    pub fn value(&mut self) -> f32 {
        let mut row = [0.0; WIDTH];
        self.worker.get(&self.table, 0, &mut row).unwrap();
        row[0]
    }

    /// The honest client works as if it were alone, and nothing but its own updates is there.
    pub fn undisturbed(&mut self) {
        for _ in 0..2 {
            self.worker.inc(&self.table, 0, &[1.0; WIDTH]).unwrap();
            self.added += 1.0;
            self.worker.clock().unwrap();
            // Under BSP this waits for the shard clock: nobody else may be in the vector clock.
            assert_eq!(self.value(), self.added);
        }
    }

    pub fn end(self) {
        drop(self.worker);
        self.client.close().unwrap();
        assert!(self.server.stop());
    }
}
