//! What is to be pushed to whom: runs of dirty images, slots, and what is owed.
//!
//! The poller takes a *run* of adjacent dirty images, which are clean from then on. It asks for the run's
//! [deliveries](ShardCore::deliveries): which bytes of the run go where, for each holder of copies. For each
//! delivery it either posts the WRITE, or says that the client [is owed](ShardCore::owe) the images.
//!
//! **Why a copy is current.** A copy is as of the last round that its reader knew of before it looked, or
//! newer:
//! - Each push of the round of `C` is posted before the immediate that closes the round, on the same
//!   connection. So when the client has polled the immediate, all these pushes are visible.
//! - An image that was not pushed has not changed.
//! - An image that was subscribed meanwhile was pushed when the subscription was processed, or later.
//! - A mirror was filled after its table was opened, so it is as of the last round before that, or newer.
//!
//! So a copy need not say anything about clocks.
//!
//! **The LSN of a round** is the shard's LSN at the moment when the round's dirty images were taken. All
//! copies of the round's tables contain the batches up to it. Later changes may not have been pushed.

use std::{ops::Range, time::Duration};

use fervor_protocol::{
    mutants::{Mutant, mutant},
    wire::{Fault, Hold, PUSH_ONCE, SUBSCRIBE, SlotRecord, UNSUBSCRIBE},
};

use super::{
    ClientId, Effects, Next, ShardCore, Slot, SlotEffect, TableId,
    table::{SUBSCRIPTION_BYTES, Sealing},
};

/// Adjacent images of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Which table.
    pub table: TableId,
    /// Which images.
    pub images: Range<u64>,
}

/// Why images are pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Batches were applied: those of value-bounded tables.
    Batches,
    /// The shard clock rose: those of all tables that are pushed in rounds.
    Round,
}

/// What kind of copy a client has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyKind {
    /// Of all images.
    Mirror,
    /// Of one.
    Slot,
}

/// Images of a run that go to one client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// To whom.
    pub client: ClientId,
    /// To which kind of copy.
    pub copy: CopyKind,
    /// Which images.
    pub images: Range<u64>,
    /// Byte offset in the client's region.
    pub at: u64,
    /// It is owed images already: this one waits with them.
    pub behind: bool,
}

impl Delivery {
    /// The slot that it goes to.
    pub fn slot(&self, table: TableId) -> Slot {
        Slot { table, image: self.images.start, at: self.at }
    }
}

impl ShardCore {
    /// Does what a client wishes for one of its slots.
    ///
    /// # Errors
    /// What is wrong with the wish, or that there is no bookkeeping for it.
    pub(super) fn slot(
        &mut self,
        id: ClientId,
        record: &SlotRecord,
        effects: &mut Effects,
    ) -> Result<(), Fault> {
        let SlotRecord { image, slot: at, table: table_id, wish } = *record;
        let bad = |text: String| Err(Fault::State(format!("slot record: {text}")));
        let Self { tables, clients, ledger, .. } = self;
        let client = clients[id.0 as usize].as_mut().expect("it has joined");
        let Some(table) = tables.get_mut(table_id as usize).and_then(Option::as_mut) else {
            return bad(format!("table = {table_id}, but there is no such table"));
        };
        let name = &table.schema.name;
        if table.openers.get(&id).is_none_or(|opener| opener.hold == Hold::InPlace) {
            return bad(format!("the client has not opened table {table_id} to hold copies of it"));
        }
        if image >= table.images {
            return bad(format!(
                "image = {image}, but table `{name}` has {} images in this shard",
                table.images
            ));
        }
        if !client.reaches(at, table.image_bytes() as u64) {
            return bad(format!("slot = {at} is outside the client's region"));
        }
        let slot = Slot { table: table_id, image, at };
        match wish {
            SUBSCRIBE if table.schema.eager() => {
                table
                    .subscribe(image, id, at, ledger)
                    .map_err(|text| Fault::State(format!("slot record: {text}")))?;
                client.subscriptions += 1;
                effects.slots.push(SlotEffect::Push(slot));
            }
            // A row of any table may have been asked for once: that is given up in the same way.
            UNSUBSCRIBE => {
                let slots = table.holders.as_mut().map(|holders| &mut holders.slots);
                if let Some(slots) = slots.filter(|slots| slots.get(&(image, id)) == Some(&at)) {
                    slots.remove(&(image, id));
                    ledger.refund(SUBSCRIPTION_BYTES);
                    client.subscriptions -= 1;
                }
                effects.slots.push(SlotEffect::Stop(slot));
                effects.closed = true;
            }
            PUSH_ONCE if mutant(Mutant::AskIgnored) => {}
            PUSH_ONCE => effects.slots.push(SlotEffect::Push(slot)),
            _ => return bad(format!("wish = {wish} of table `{name}`, which is not pushed")),
        }
        Ok(())
    }

    /// Whether there is a value-bounded table.
    pub fn is_value_bounded(&self) -> bool {
        self.value_bounded > 0
    }

    /// The next run of dirty images of up to `bytes` bytes (at least one), of the tables from `from` on that are due. They are clean now.
    pub fn take_run(&mut self, due: Due, from: &mut TableId, bytes: usize) -> Option<Run> {
        while let Some(table) = self.tables.get_mut(*from as usize) {
            if let Some(table) = table
                && (table.value_bounded() || due == Due::Round && table.in_rounds())
            {
                let most = table.images_in(bytes);
                if let Some(holders) = &mut table.holders
                    && let Some(images) = holders.dirty.run(0, most)
                {
                    holders.clean(images.clone());
                    return Some(Run { table: *from, images });
                }
            }
            *from += 1;
        }
        self.bounded_lsn = self.lsn;
        if due == Due::Round {
            self.round_lsn = self.lsn;
        }
        None
    }

    /// The LSN up to which the last round pushed all.
    pub fn round_lsn(&self) -> u64 {
        self.round_lsn
    }

    /// Who gets what of a run. The client of each delivery gets all of it, or [is owed](ShardCore::owe) it.
    pub fn deliveries(&self, run: &Run, into: &mut Vec<Delivery>) {
        into.clear();
        let Some(table) = self.table(run.table) else { return };
        let Some(holders) = &table.holders else { return };
        into.extend(holders.mirrors.iter().map(|mirror| Delivery {
            client: mirror.client,
            copy: CopyKind::Mirror,
            images: run.images.clone(),
            at: mirror.base + table.layout.offset(run.images.start) as u64,
            behind: !mirror.owed.is_empty(),
        }));
        let range = (run.images.start, ClientId(0))..(run.images.end, ClientId(0));
        into.extend(holders.slots.range(range).map(|(&(image, client), &at)| Delivery {
            client,
            copy: CopyKind::Slot,
            images: image..image + 1,
            at,
            behind: false,
        }));
    }

    /// Where a run lies in the shard's region.
    pub fn place(&self, run: &Run) -> Range<usize> {
        self.table(run.table).expect("a run is of a table that is there").place(&run.images)
    }

    /// Bytes of the shard's region.
    pub fn bytes(&self, place: Range<usize>) -> &[u8] {
        self.region.bytes(place)
    }

    /// Whether a table is value-bounded: somebody waits until what was pushed of it is visible.
    pub fn waits_for_visible(&self, table: TableId) -> bool {
        self.table(table).is_some_and(|table| table.value_bounded())
    }

    /// Bytes from one image of a table to the next.
    pub fn stride(&self, table: TableId) -> usize {
        self.table(table).expect("it is there").stride()
    }

    /// Bytes of an image on the wire.
    pub fn image_bytes(&self, table: TableId) -> usize {
        self.table(table).expect("it is there").image_bytes()
    }

    /// A client's mirror cannot take these images now.
    pub fn owe(&mut self, id: ClientId, run: &Run) {
        let mirror = self.table_mut(run.table).and_then(|table| table.holders.as_mut()?.mirror(id));
        if let Some(mirror) = mirror {
            mirror.owed.insert_range(run.images.clone());
            self.client(id).owed.insert(run.table);
        }
    }

    /// Whether a client's mirrors are owed anything.
    pub fn owes(&self, id: ClientId) -> bool {
        self.clients.get(id.0 as usize).and_then(Option::as_ref).is_some_and(|client| !client.owed.is_empty())
    }

    /// A run of up to `bytes` bytes that a client is owed and can have now, and where in its region it goes. (A table that
    /// is being sealed can not be had.)
    pub fn next_owed(&mut self, id: ClientId, bytes: usize) -> Option<(Run, u64)> {
        let Self { tables, clients, .. } = self;
        let client = clients.get(id.0 as usize)?.as_ref()?;
        client.owed.iter().find_map(|&table_id| {
            let table = tables[table_id as usize].as_mut().filter(|table| table.sealing == Sealing::Yes)?;
            let most = table.images_in(bytes);
            let mirror = table.holders.as_mut()?.mirror(id)?;
            let images = mirror.owed.run(mirror.cursor, most).or_else(|| mirror.owed.run(0, most))?;
            let at = mirror.base + table.layout.offset(images.start) as u64;
            Some((Run { table: table_id, images }, at))
        })
    }

    /// What [`ShardCore::next_owed`] gave has been pushed.
    pub fn paid(&mut self, id: ClientId, run: &Run) {
        let table = self.table_mut(run.table).expect("it was there");
        let mirror = table.holders.as_mut().and_then(|holders| holders.mirror(id)).expect("it was owed");
        mirror.owed.remove_range(run.images.clone());
        mirror.cursor = run.images.end;
        if mirror.owed.is_empty() {
            self.client(id).owed.remove(&run.table);
            self.answer_waiting(run.table);
        }
    }

    /// An image of a value-bounded table was pushed to a client, or is owed: proof is needed that it is visible.
    pub fn wants_proof(&mut self, id: ClientId) {
        self.client(id).visible.pushed();
    }

    /// Whether a proof is to be posted to a client.
    pub fn is_proof_due(&self, id: ClientId) -> bool {
        self.clients.get(id.0 as usize).and_then(Option::as_ref).is_some_and(|client| client.visible.is_due())
    }

    /// It has been posted, behind all that was taken to be pushed.
    pub fn proof_posted(&mut self, id: ClientId) {
        let lsn = self.bounded_lsn;
        self.client(id).visible.proof_posted(lsn);
    }

    /// It is here (`ok`), or the client's connection has ended.
    pub fn proof_done(&mut self, id: ClientId, ok: bool) {
        if let Some(client) = self.clients.get_mut(id.0 as usize).and_then(Option::as_mut) {
            client.visible.proof_done(ok);
        }
    }

    /// Calls `tell` with each client of which more batches are visible to all, and the number of the last of them.
    pub fn follow_visible(&mut self, mut tell: impl FnMut(ClientId, u64)) {
        let lsn = self.bounded_lsn;
        let listening = self.clients.iter().flatten().filter(|client| !client.left);
        let visible = listening.map(|client| client.visible.proved(lsn)).min().unwrap_or(lsn);
        for (place, client) in self.clients.iter_mut().enumerate() {
            if let Some(number) = client.as_mut().and_then(|client| client.visible.rise(visible)) {
                tell(ClientId(place as u32), number);
            }
        }
    }

    /// Number of images that a client has subscribed to.
    pub fn subscriptions(&self, id: ClientId) -> usize {
        self.clients.get(id.0 as usize).and_then(Option::as_ref).map_or(0, |client| client.subscriptions)
    }

    /// Whether there is a table that is pushed continuously.
    pub fn ranks_images(&self) -> bool {
        self.tables.iter().flatten().any(|table| table.schema.continuous > 0)
    }

    /// Number of tables, with gaps.
    pub fn tables(&self) -> TableId {
        self.tables.len() as TableId
    }

    /// What may be pushed of a table now, besides rounds.
    pub fn next_ranked(&self, table: TableId, now: Duration) -> Next {
        let holders = self.table(table).and_then(|table| table.holders.as_ref());
        holders
            .and_then(|holders| holders.continuous.as_ref())
            .map_or(Next::Nothing, |ranked| ranked.next(now))
    }

    /// The image that [`ShardCore::next_ranked`] gave is pushed, `bytes` bytes in all: it is clean.
    pub fn take_ranked(&mut self, table: TableId, image: u64, now: Duration, bytes: usize) {
        let holders = self.table_mut(table).and_then(|table| table.holders.as_mut()).expect("it was ranked");
        holders.continuous.as_mut().expect("it was ranked").take(image, now, bytes);
        holders.dirty.remove_range(image..image + 1);
    }
}
