//! A shard: its rows and tables, and what a client's message does to them. No transport, no time.
//!
//! ```text
//!             ┌───────────────────────────── ShardCore ─────────────────────────────┐
//!  message ──▶│ handle: check ─▶ announce ─▶ rewrite ─▶ clock   ─────────────────────│──▶ Effects: acknowledge, push to slots, ...
//!             │                                 │ marks dirty                        │
//!  a turn ───▶│ take_run ─▶ deliveries: who gets which bytes ────────────────────────│──▶ WRITEs
//!             │               └─ cannot now: owe ─▶ next_owed ───────────────────────│──▶ WRITEs, later
//!             └─────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`region`] | the memory that peers see: clock word, announcements, images |
//! | [`table`] | one table: its images, who has it open, who holds copies |
//! | [`apply`] | adding a section of a batch to rows |
//! | [`open`] | opening, sealing and freeing tables |
//! | [`pushes`] | what is to be pushed to whom |
//! | [`client`] | one client: numbers, seat, what it is owed |
//! | [`id`] | identifiers of clients and tables |
//! | [`visible`], [`ranking`], [`bitmap`], [`ledger`] | value bounds; continuous pushing; sets of images; bytes of bookkeeping |
//!
//! **A batch, in order.**
//! 1. The shard checks all of the batch, its clock too. A batch that is refused has changed nothing.
//! 2. If the client reads in place, the shard announces the batch's LSN.
//! 3. The images change, one by one, each under its sequence lock.
//! 4. If the shard clock rose, the clock word says so.
//!
//! Then the poller acknowledges the batch, and after that it pushes. A peer can see the shard between two
//! images only in place or by READs, and those promise nothing across rows.
//!
//! **Who writes, who reads.** Only the poller has a `ShardCore`, and it writes through `&mut`. Peers may look
//! at the [`region`] at any time.

use std::{collections::VecDeque, sync::Arc};

use fervor_protocol::{
    ack::Admit,
    batch::{Batch, Section, Source},
    clock::{Departure, VectorClock},
    mutants::{Mutant, mutant, pause},
    wire::{self, DROPPED, Fault, Kind, MemoryHeader, MessageHeader, NOT_SEEN, NamedReply},
};
use fervor_verbs::Exclusive;
use zerocopy::IntoBytes;

mod apply;
mod bitmap;
mod client;
mod id;
mod ledger;
mod open;
mod pushes;
mod ranking;
mod region;
mod table;
mod visible;

#[cfg(test)]
mod tests;

use apply::{NotFinite, Scratch, Values};
use client::Client;
pub use id::{ClientId, TableId};
use ledger::Ledger;
pub use pushes::{CopyKind, Delivery, Due, Run};
pub use ranking::Next;
use region::Region;
use table::Table;

use crate::{access::Grant, reach::Reaches};

/// Bytes of a shard's region before the tables, with so many seats.
pub fn region_header(seats: usize) -> usize {
    Region::header_bytes(seats)
}

/// Most tables that a client may wait for at a time.
pub const MAX_OPENING: usize = 64;

/// Where a shard begins to count. Tests begin near the wraps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Origin {
    /// LSN of the batch before the first.
    pub lsn: u64,
    /// The shard clock.
    pub clock: u64,
    /// Number of the message, and of the batch, before each client's first.
    pub number: u64,
}

/// Bounds of a shard.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Clients that may read in place at a time.
    pub seats: usize,
    /// Bytes for what is remembered of tables and clients.
    pub bookkeeping: usize,
    /// Greatest image, bytes, that can be pushed to a client.
    pub image: usize,
}

/// A place for one image in a client's region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot {
    /// Which table.
    pub table: TableId,
    /// Which image.
    pub image: u64,
    /// Byte offset in the region.
    pub at: u64,
}

/// What a message says about slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotEffect {
    /// The image is to be pushed to it.
    Push(Slot),
    /// No longer.
    Stop(Slot),
    /// Nothing of this table is to be pushed any more.
    StopTable(TableId),
}

/// What a message has led to, besides [answers](ShardCore::take_answer) and a shard clock that [rose](ShardCore::take_risen).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effects {
    /// The message is to be acknowledged as of this LSN.
    pub lsn: u64,
    /// In this order.
    pub slots: Vec<SlotEffect>,
    /// The client has given up slots, or a mirror: it is to be told when no WRITE to them is on its way.
    pub closed: bool,
    /// The client sends nothing more, and goes like this.
    pub left: Option<Departure>,
}

/// See the module.
pub struct ShardCore {
    region: Region,
    tables: Vec<Option<Table>>,
    clients: Vec<Option<Client>>,
    clock: VectorClock,
    lsn: u64,
    origin: Origin,
    limits: Limits,
    ledger: Ledger,
    /// The shard clock rose to this.
    risen: Option<u64>,
    /// It rises no more.
    stopped: bool,
    /// Answers to clients.
    answers: VecDeque<(ClientId, Vec<u8>)>,
    /// Tables of which images are to be sealed.
    sealing: Vec<TableId>,
    /// Number of tables that are value-bounded.
    value_bounded: usize,
    /// All changes up to this LSN have been taken to be pushed, of tables that are pushed in rounds and of those that are
    /// value-bounded.
    round_lsn: u64,
    bounded_lsn: u64,
    next_number: u64,
    /// What the holders of limited keys may READ, where there are such.
    reaches: Option<Arc<Reaches>>,
    /// Kept for its memory.
    batch: Batch,
    scratch: Scratch,
}

impl std::fmt::Debug for ShardCore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shard({} tables, LSN {}, clock {})", self.tables.len(), self.lsn, self.clock.shard())
    }
}

impl ShardCore {
    /// In `memory`, zeroed and exported for READ.
    pub fn new(memory: Exclusive, origin: Origin, limits: Limits) -> Self {
        let mut region = Region::new(memory, limits.seats);
        region.publish_clock(origin.clock);
        Self {
            region,
            tables: Vec::new(),
            clients: Vec::new(),
            clock: VectorClock::starting_at(origin.clock),
            lsn: origin.lsn,
            origin,
            limits,
            ledger: Ledger::new(limits.bookkeeping),
            risen: None,
            stopped: false,
            answers: VecDeque::new(),
            sealing: Vec::new(),
            value_bounded: 0,
            round_lsn: origin.lsn,
            bounded_lsn: origin.lsn,
            next_number: 1,
            reaches: None,
            batch: Batch::default(),
            scratch: Scratch::default(),
        }
    }

    /// Tells `reaches` which tables there are.
    pub fn with_reaches(mut self, reaches: Arc<Reaches>) -> Self {
        self.reaches = Some(reaches);
        self
    }

    /// The shard clock.
    pub fn clock(&self) -> u64 {
        self.clock.shard()
    }

    /// LSN of the last batch applied.
    pub fn lsn(&self) -> u64 {
        self.lsn
    }

    /// The shard clock, if it rose since this was last called.
    pub fn take_risen(&mut self) -> Option<u64> {
        self.risen.take()
    }

    /// The next answer to a client.
    pub fn take_answer(&mut self) -> Option<(ClientId, Vec<u8>)> {
        self.answers.pop_front()
    }

    /// Adds a client, of a job of `job` clients, in a place that nobody has. Its region has `region` bytes. Returns its number, for
    /// people.
    ///
    /// # Errors
    /// The running job has another size.
    pub fn join(&mut self, id: ClientId, job: usize, region: u64) -> Result<u64, Fault> {
        let number = self.next_number;
        self.clock.join(number, job).map_err(|expected| {
            Fault::State(format!(
                "the running job has {expected} clients, and this one says {job}: give all the same number"
            ))
        })?;
        self.put(id, region);
        Ok(number)
    }

    /// Adds a client that only reads, as [`ShardCore::join`] adds one of a job: nobody waits for it
    /// ([`fervor_protocol::clock`]).
    pub fn observe(&mut self, id: ClientId, region: u64) -> u64 {
        let number = self.next_number;
        if mutant(Mutant::ObserverCounted) {
            // Whatever size the job has.
            let _ = (1..=u16::MAX).find(|job| self.clock.join(number, (*job).into()).is_ok());
        }
        self.put(id, region);
        self.client(id).observes = true;
        number
    }

    /// Puts a client in a place that nobody has.
    fn put(&mut self, id: ClientId, region: u64) {
        let number = self.next_number;
        self.next_number += 1;
        let place = id.0 as usize;
        if self.clients.len() <= place {
            self.clients.resize_with(place + 1, || None);
        }
        let before = self.clients[place].replace(Client::new(number, region, self.origin.number));
        assert!(before.is_none(), "place {place} was taken");
    }

    /// Says what a client may do.
    pub fn grant(&mut self, id: ClientId, grant: Grant) {
        self.client(id).grant = grant;
    }

    /// Whether this is what a client may do.
    pub fn has_grant(&self, id: ClientId, grant: &Grant) -> bool {
        self.clients.get(id.0 as usize).and_then(Option::as_ref).is_some_and(|client| client.grant == *grant)
    }

    /// A client holds up nobody any more, and gets nothing. It keeps its place until [`ShardCore::forget`].
    pub fn leave(&mut self, id: ClientId, how: Departure) {
        let client = self.clients.get_mut(id.0 as usize).and_then(Option::as_mut);
        let Some(client) = client.filter(|client| !client.left) else { return };
        client.left = true;
        let number = client.number;
        for table in 0..self.tables.len() as TableId {
            self.close(table, id);
        }
        if how == Departure::Died && mutant(Mutant::DeadStays) {
            return;
        }
        if how == Departure::Left {
            self.stand_up(id);
        }
        let rose = self.clock.leave(number, how);
        self.rise(rose);
    }

    /// Sequence of the last message of a client that has been processed.
    pub fn processed(&self, id: ClientId) -> u64 {
        let client = self.clients.get(id.0 as usize).and_then(Option::as_ref);
        client.map_or(0, |client| client.sequence)
    }

    /// A client comes back on another connection. What was pushed to it may be lost: its mirrors are owed all that was ever
    /// written, and the slots that are returned are to be pushed.
    pub fn resume(&mut self, id: ClientId) -> Vec<Slot> {
        let mut pushed = Vec::new();
        if mutant(Mutant::CopiesNotOwedAgain) {
            return pushed;
        }
        let Self { tables, clients, .. } = self;
        let client = clients[id.0 as usize].as_mut().expect("it has joined");
        for (table_id, table) in (0..).zip(tables) {
            let Some(Table { holders: Some(holders), written, .. }) = table else { continue };
            if let Some(mirror) = holders.mirror(id) {
                mirror.owed.clone_from(written);
                mirror.cursor = 0;
                if !written.is_empty() {
                    client.owed.insert(table_id);
                }
            }
            let slots = holders.slots.iter().filter(|((_, holder), _)| *holder == id);
            pushed.extend(slots.map(|(&(image, _), &at)| Slot { table: table_id, image, at }));
        }
        pushed
    }

    /// Forgets that the last message of a client was processed: only a mutant does.
    pub fn forget_last(&mut self, id: ClientId) {
        let client = self.client(id);
        client.sequence -= 1;
        client.batches.forget_last();
    }

    /// A client is gone: its connection has ended for good.
    pub fn forget(&mut self, id: ClientId) {
        if self.clients.get(id.0 as usize).is_none_or(Option::is_none) {
            return;
        }
        self.leave(id, Departure::Died);
        self.stand_up(id);
        self.clients[id.0 as usize] = None;
    }

    fn stand_up(&mut self, id: ClientId) {
        if let Some(seat) = self.client(id).seat.take() {
            self.region.leave_seat(seat);
        }
    }

    fn client(&mut self, id: ClientId) -> &mut Client {
        self.clients[id.0 as usize].as_mut().expect("it has joined")
    }

    /// The shard clock rises no more: clients that are put out because the server stops have not had their part, and nobody may
    /// go on as if they had.
    pub fn stop_clock(&mut self) {
        self.stopped = true;
    }

    fn rise(&mut self, rose: Option<u64>) {
        if let Some(clock) = rose.filter(|_| !self.stopped) {
            // SYNC POINT: who finds this clock in place sees all images that changed below it.
            self.region.publish_clock(clock);
            self.risen = Some(clock);
        }
    }

    /// Does what a message says. `slabs`: the memory that the client has named, if this server sees it.
    ///
    /// # Errors
    /// What is wrong. The client is to be put out: what its message said before that may have been done, but a batch
    /// is applied as a whole, or not at all (but for values of a reference that are not finite: those rows are left out).
    pub fn handle<S: Source + ?Sized>(
        &mut self,
        id: ClientId,
        message: &[u8],
        slabs: Option<&S>,
    ) -> Result<Effects, Fault> {
        let header = MessageHeader::parse(message)?;
        self.client(id).expect(&header)?;
        let mut effects = Effects { lsn: self.lsn, slots: Vec::new(), closed: false, left: None };
        match header.kind()? {
            Kind::Batch | Kind::Reference => effects.lsn = self.batch(id, &header, message, slabs)?,
            Kind::Slots => {
                for record in wire::slot_records(&header, message)? {
                    self.slot(id, &record, &mut effects)?;
                }
            }
            Kind::CreateTable => self.open(id, &header, message)?,
            Kind::Release => self.release(id, message, &mut effects)?,
            Kind::Memory => self.name_memory(id, &header, message, slabs.is_some())?,
            Kind::Credit => {}
            Kind::Leave => {
                let how = if header.flags & DROPPED != 0 { Departure::Died } else { Departure::Left };
                self.leave(id, how);
                effects.left = Some(how);
            }
            kind @ (Kind::Table | Kind::Refused | Kind::Fault | Kind::Named | Kind::Resumed) => {
                return Err(Fault::Kind(kind as u8));
            }
        }
        self.client(id).sequence = header.sequence;
        Ok(effects)
    }

    fn name_memory(
        &mut self,
        id: ClientId,
        header: &MessageHeader,
        message: &[u8],
        seen: bool,
    ) -> Result<(), Fault> {
        wire::body::<MemoryHeader>(message, "memory")?;
        if std::mem::replace(&mut self.client(id).named, true) {
            return Err(Fault::State("the client names its memory a second time".into()));
        }
        let seat = if seen { self.region.take_seat() } else { None };
        self.client(id).seat = seat;
        let announcements = seat.map_or(NOT_SEEN, |seat| Region::announcements(seat) as u64);
        let reply = wire::reply(Kind::Named, header.sequence, NamedReply { announcements }.as_bytes());
        self.answers.push_back((id, reply));
        Ok(())
    }

    /// Checks and applies a batch, once. Returns the LSN at which it was applied.
    fn batch<S: Source + ?Sized>(
        &mut self,
        id: ClientId,
        header: &MessageHeader,
        message: &[u8],
        slabs: Option<&S>,
    ) -> Result<u64, Fault> {
        let mut batch = std::mem::take(&mut self.batch);
        let values = match slabs {
            Some(slabs) if header.kind == Kind::Reference as u8 => Values::Slabs(slabs),
            _ => Values::Message(message),
        };
        // A client whose key says what it may do knows of the tables alone that it was let open.
        let limited = self.client(id).grant != Grant::default();
        let tables = &self.tables;
        let read = batch.read(header, message, slabs, |table| {
            let table = tables.get(table as usize)?.as_ref()?;
            (!limited || table.openers.contains_key(&id)).then(|| table.shape())
        });
        let result = match read.and_then(|()| self.allowed(id)) {
            Ok(()) => self.admit(id, &batch, &values),
            Err(fault) => {
                if mutant(Mutant::BatchByHalves) {
                    self.lsn += 1;
                    let _ = self.apply(&batch, &values);
                }
                Err(self.explain(fault))
            }
        };
        self.batch = batch;
        result
    }

    /// Checks that the client is no observer: one has no updates, and no clock to end.
    fn allowed(&self, id: ClientId) -> Result<(), Fault> {
        let client = self.clients[id.0 as usize].as_ref().expect("it has joined");
        if client.observes { Err(Fault::State(client.grant.no_updates())) } else { Ok(()) }
    }

    fn admit<S: Source + ?Sized>(
        &mut self,
        id: ClientId,
        batch: &Batch,
        values: &Values<'_, S>,
    ) -> Result<u64, Fault> {
        let (number, client) = (batch.number(), self.client(id).number);
        match self.client(id).batches.admit(number) {
            Admit::Duplicate { lsn } => {
                if mutant(Mutant::ReplayApplied) {
                    self.lsn += 1;
                    let _ = self.apply(batch, values);
                }
                return Ok(lsn);
            }
            Admit::Gap { expected } => {
                return Err(Fault::State(format!("batch number = {number}, but {expected} is next")));
            }
            Admit::Apply => {}
        }
        let rose = match batch.clock() {
            Some(clock) => self.clock.tick(client, clock).map_err(|last| {
                Fault::State(format!("clock = {clock} does not follow the client's last one, {last}"))
            })?,
            None => None,
        };
        if mutant(Mutant::ClockWordEarly) {
            self.rise(rose);
            pause();
        }
        let applied = self.announce_and_apply(id, batch, values);
        self.rise(rose);
        pause();
        applied?;
        Ok(self.lsn - u64::from(mutant(Mutant::AcknowledgedBeforeApplied)))
    }

    /// Applies a batch at the next LSN, of which its client can know before the first image changes.
    fn announce_and_apply<S: Source + ?Sized>(
        &mut self,
        id: ClientId,
        batch: &Batch,
        values: &Values<'_, S>,
    ) -> Result<(), Fault> {
        self.lsn += 1;
        let (lsn, number, seat) = (self.lsn, batch.number(), self.client(id).seat);
        // SYNC POINT: who copies an image that this batch has changed, and looks afterwards, finds the announcement.
        let announce =
            |region: &mut Region| seat.into_iter().for_each(|seat| region.announce(seat, number, lsn));
        if !mutant(Mutant::AnnouncedLate) {
            announce(&mut self.region);
        }
        pause();
        let applied = self.apply(batch, values);
        pause();
        if mutant(Mutant::AnnouncedLate) {
            announce(&mut self.region);
        }
        let (lsn, bounded) = (self.lsn, self.is_value_bounded());
        let client = self.client(id);
        client.batches.applied(number, lsn);
        if bounded {
            client.visible.applied(number, lsn);
        }
        applied
    }

    /// Applies all sections of a checked batch at the present LSN.
    fn apply<S: Source + ?Sized>(&mut self, batch: &Batch, values: &Values<'_, S>) -> Result<(), Fault> {
        let mut result = Ok(());
        for (index, section) in batch.sections().enumerate() {
            self.lsn += u64::from(mutant(Mutant::HalvesAtTwoLsns) && index == 1);
            let Self { region, tables, scratch, lsn, .. } = self;
            let table = tables[section.table as usize].as_mut().expect("it has been checked");
            let added = apply::section(region, table, &section, values, *lsn, scratch);
            if let Err(bad) = added {
                result = result.and(Err(self.not_finite(&section, bad)));
            }
        }
        result
    }

    fn not_finite(&self, section: &Section<'_>, NotFinite(row): NotFinite) -> Fault {
        self.explain(Fault::Table {
            table: section.table,
            fault: Box::new(Fault::NotFinite { row: row.into() }),
        })
    }

    /// A fault that names a table and a row as people do.
    fn explain(&self, fault: Fault) -> Fault {
        let Fault::Table { table: id, fault } = fault else { return fault };
        let Some(table) = self.table(id) else { return Fault::Table { table: id, fault } };
        let name = &table.schema.name;
        Fault::State(match *fault {
            Fault::NotFinite { row } => {
                format!("table `{name}`: NaN or infinity in an update of row {}", table.row(row))
            }
            fault => format!("table `{name}`: {fault}"),
        })
    }

    fn table(&self, id: TableId) -> Option<&Table> {
        self.tables.get(id as usize)?.as_ref()
    }

    fn table_mut(&mut self, id: TableId) -> Option<&mut Table> {
        self.tables.get_mut(id as usize)?.as_mut()
    }
}
