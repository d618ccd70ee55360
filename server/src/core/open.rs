//! Opening, sealing, closing and freeing tables.
//!
//! ```text
//!  CreateTable ─▶ refused, with the reason
//!             └─▶ opened ─▶ sealed, a piece a turn, if it was not ─▶ mirror filled, run by run ─▶ answered
//! ```
//!
//! When a client is answered, all that it will look at is there: the checks, and all images in its mirror. No
//! single step takes longer for a larger table, except making the sets of its images.
//!
//! **All or nothing.** A client opens a table at all shards. If one shard refuses, the client takes back its
//! opens at the others ([`ShardCore::release`]). If nobody has a table open and nobody has changed it, it is
//! as if it had never been: its memory is free again. A table that was changed stays, for the next job.

use std::ops::Range;

use fervor_protocol::{
    limits::REPLY_BYTES,
    mutants::{Mutant, mutant},
    wire::{self, Fault, Hold, Kind, MessageHeader, OpenTable, ReleaseHeader, TableReply},
};
use zerocopy::IntoBytes;

use super::{
    ClientId, Effects, MAX_OPENING, ShardCore, SlotEffect, TableId,
    bitmap::Bitmap,
    table::{Mirror, SUBSCRIPTION_BYTES, Sealing, Table, extent},
};

impl ShardCore {
    /// Opens a table for a client, and makes it if it is not there.
    ///
    /// # Errors
    /// The message makes no sense. (A table that cannot be is refused in an answer.)
    pub(super) fn open(&mut self, id: ClientId, header: &MessageHeader, message: &[u8]) -> Result<(), Fault> {
        let open = OpenTable::decode(message)?;
        if let Hold::Mirror(base) = open.hold
            && !self.client(id).reaches(base, extent(&open).0.try_into().unwrap_or(u64::MAX))
        {
            return Err(Fault::State(format!("base = {base}: the mirror is outside the client's region")));
        }
        if self.client(id).opening >= MAX_OPENING {
            return Err(Fault::State(format!(
                "{MAX_OPENING} tables are being opened: no more may be at a time"
            )));
        }
        // First: of a table that it may not open, a client learns nothing.
        let granted = self.client(id).grant.opens(&open.schema.name);
        let found = granted.and_then(|()| self.find(&open)?.map_or_else(|| self.make(&open), Ok));
        let opened = found.and_then(|table| {
            let opened = self.hold(table, id, &open);
            if opened.is_err() {
                self.free_if_unused(table);
            }
            opened.map(|()| table)
        });
        match opened {
            Ok(table) => {
                self.client(id).opening += 1;
                self.table_mut(table).expect("it was opened").waiting.push((id, header.sequence));
                self.answer_waiting(table);
            }
            Err(text) => {
                let mut reply = wire::reply(Kind::Refused, header.sequence, text.as_bytes());
                reply.truncate(REPLY_BYTES);
                self.answers.push_back((id, reply));
            }
        }
        Ok(())
    }

    /// The table, if it is there.
    ///
    /// # Errors
    /// One with that name and another schema is; both are shown.
    fn find(&self, open: &OpenTable) -> Result<Option<TableId>, String> {
        let same =
            |table: &Option<Table>| table.as_ref().is_some_and(|table| table.schema.name == open.schema.name);
        let Some(id) = self.tables.iter().position(same) else { return Ok(None) };
        let table = self.tables[id].as_ref().expect("it has a name");
        if table.schema != open.schema {
            return Err(format!(
                "the table exists with another schema: {}; asked for: {}",
                table.schema, open.schema
            ));
        }
        if table.part != (open.shard, open.shards) {
            return Err(format!(
                "the table `{}` was made as shard {} of {}, and is asked for as shard {} of {}: give all clients of a job \
                 the same servers",
                open.schema.name, table.part.0, table.part.1, open.shard, open.shards
            ));
        }
        Ok(Some(id as TableId))
    }

    /// Makes the table: its memory is zero, which is valid.
    ///
    /// # Errors
    /// There is no memory for it, with the cure.
    fn make(&mut self, open: &OpenTable) -> Result<TableId, String> {
        let (bytes, images) = extent(open);
        for place in self.reaches.as_ref().map_or_else(Vec::new, |reaches| reaches.freed()) {
            self.region.give_back(place.start, place.len());
        }
        let offset = usize::try_from(bytes).ok().and_then(|bytes| self.region.allocate(bytes));
        let offset = offset.ok_or_else(|| {
            format!(
                "the table {} needs {bytes} bytes in this shard, which has {} bytes, {} of them free: start the server with more \
                 --memory, or more servers",
                open.schema,
                self.region.memory().len(),
                self.region.free()
            )
        })?;
        let charged = self.ledger.charge(Bitmap::bytes(images), || format!("the table {}", open.schema));
        if let Err(text) = charged {
            self.region.give_back(offset, bytes as usize);
            return Err(text);
        }
        let table = Table::new(open, offset);
        self.value_bounded += usize::from(table.value_bounded());
        let place = self.tables.iter().position(Option::is_none).unwrap_or(self.tables.len());
        if place == self.tables.len() {
            self.tables.push(None);
        }
        if let Some(reaches) = &self.reaches {
            reaches.made(&open.schema.name, offset..offset + bytes as usize);
        }
        self.tables[place] = Some(table);
        Ok(place as TableId)
    }

    /// The client has the table open, and holds it as it says.
    ///
    /// # Errors
    /// It cannot.
    fn hold(&mut self, table_id: TableId, id: ClientId, open: &OpenTable) -> Result<(), String> {
        let Self { tables, ledger, clients, sealing, limits, .. } = self;
        let table = tables[table_id as usize].as_mut().expect("it was found");
        let copies = open.hold != Hold::InPlace;
        if copies && table.stride() > limits.image {
            return Err(format!(
                "a row of the table {} takes {} bytes, but a push to a client has at most {}: start the server with more \
                 --staging",
                open.schema,
                table.stride(),
                limits.image
            ));
        }
        let again = table.openers.contains_key(&id);
        if let (Hold::Mirror(base), false) = (open.hold, again) {
            if !table.schema.eager() {
                return Err(format!(
                    "the table {} is not pushed: nobody would keep a mirror of it",
                    open.schema
                ));
            }
            let holders = if table.holders.is_none() { table.holders_bytes() } else { 0 };
            ledger.charge(holders + Bitmap::bytes(table.images), || {
                format!("a mirror of the table {}", open.schema)
            })?;
            let owed = table.written.clone();
            if !owed.is_empty() {
                clients[id.0 as usize].as_mut().expect("it has joined").owed.insert(table_id);
            }
            let mirrors = &mut table.make_holders().mirrors;
            let place = mirrors.partition_point(|mirror| mirror.client < id);
            mirrors.insert(place, Mirror { client: id, base, owed, cursor: 0 });
        }
        if !table.opened_by(id, open.hold) {
            return Err(format!(
                "the client has the table `{}` open, and holds it in another way",
                open.schema.name
            ));
        }
        if copies && table.sealing == Sealing::No {
            table.sealing = if table.written.is_empty() { Sealing::Yes } else { Sealing::Below(0) };
            if table.sealing != Sealing::Yes {
                sealing.push(table_id);
            }
        }
        Ok(())
    }

    /// Answers those whose tables are ready by now.
    pub(super) fn answer_waiting(&mut self, id: TableId) {
        let Some(table) = self.table_mut(id) else { return };
        let body = TableReply { offset: table.offset as u64, table: id, reserved: 0 };
        let waiting = std::mem::take(&mut table.waiting);
        for (client, sequence) in waiting {
            let table = self.table_mut(id).expect("it is there");
            if table.is_ready_for(client) || mutant(Mutant::MirrorUnfilled) {
                self.answers.push_back((client, wire::reply(Kind::Table, sequence, body.as_bytes())));
                self.client(client).opening -= 1;
            } else {
                table.waiting.push((client, sequence));
            }
        }
    }

    /// Makes checks of images that were written before anybody needed them, of about `bytes` bytes of data. Whether there were any.
    pub fn seal_some(&mut self, mut bytes: usize) -> bool {
        let Some(&id) = self.sealing.first() else { return false };
        let Self { region, tables, .. } = self;
        let table = tables[id as usize].as_mut().expect("tables that are freed are not sealed");
        while let Sealing::Below(from) = table.sealing {
            let Some(run) = table.written.run(from, table.images_in(bytes)) else {
                table.sealing = Sealing::Yes;
                break;
            };
            let place = table.place(&run);
            for image in region.memory().bytes_mut()[place.clone()].chunks_exact_mut(table.stride()) {
                table.make_check(image);
            }
            table.sealing = Sealing::Below(run.end);
            if place.len() >= bytes {
                return true;
            }
            bytes -= place.len();
        }
        self.sealing.remove(0);
        self.answer_waiting(id);
        true
    }

    /// Takes an open back.
    ///
    /// # Errors
    /// The client has no such table open.
    pub(super) fn release(
        &mut self,
        id: ClientId,
        message: &[u8],
        effects: &mut Effects,
    ) -> Result<(), Fault> {
        let ReleaseHeader { table: table_id, .. } = wire::body(message, "table")?;
        let opener = self.table_mut(table_id).and_then(|table| table.openers.get_mut(&id));
        let Some(opener) = opener else {
            return Err(Fault::State(format!(
                "table = {table_id} is released, but the client has not opened it"
            )));
        };
        opener.times -= 1;
        if opener.times == 0 {
            effects.slots.push(SlotEffect::StopTable(table_id));
            // A client that reads in place is pushed nothing, and has nothing to wait for.
            effects.closed = opener.hold != Hold::InPlace;
            self.close(table_id, id);
        }
        Ok(())
    }

    /// A client has the table open no more.
    pub(super) fn close(&mut self, table_id: TableId, id: ClientId) {
        let Self { tables, ledger, clients, .. } = self;
        let Some(table) = tables[table_id as usize].as_mut() else { return };
        if table.openers.remove(&id).is_none() {
            return;
        }
        let client = clients[id.0 as usize].as_mut().expect("it has joined");
        let before = table.waiting.len();
        table.waiting.retain(|(waiting, _)| *waiting != id);
        client.opening -= before - table.waiting.len();
        client.owed.remove(&table_id);
        let (images, holders_bytes) = (table.images, table.holders_bytes());
        if let Some(holders) = &mut table.holders {
            let mirrors = holders.mirrors.len();
            holders.mirrors.retain(|mirror| mirror.client != id);
            ledger.refund((mirrors - holders.mirrors.len()) * Bitmap::bytes(images));
            let slots = holders.slots.len();
            holders.slots.retain(|(_, client), _| *client != id);
            ledger.refund((slots - holders.slots.len()) * SUBSCRIPTION_BYTES);
            client.subscriptions -= slots - holders.slots.len();
            if holders.mirrors.is_empty() && holders.slots.is_empty() {
                table.holders = None;
                ledger.refund(holders_bytes);
            }
        }
        self.free_if_unused(table_id);
    }

    /// Frees a table that nobody has open and nobody has changed.
    fn free_if_unused(&mut self, id: TableId) {
        let Some(table) = self.table(id) else { return };
        if !table.openers.is_empty() || !table.written.is_empty() {
            return;
        }
        let place: Range<usize> = table.offset..table.offset + table.bytes();
        let (images, bounded) = (table.images, table.value_bounded());
        if self.reaches.as_ref().is_none_or(|reaches| reaches.dropped(&place)) {
            self.region.give_back(place.start, place.len());
        }
        self.ledger.refund(Bitmap::bytes(images));
        self.value_bounded -= usize::from(bounded);
        self.tables[id as usize] = None;
        self.sealing.retain(|sealing| *sealing != id);
    }
}
