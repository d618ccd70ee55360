//! All orders of two clients' messages, with all that a poller may do after each, against a model that adds up what was sent.

use std::collections::BTreeMap;

use super::*;

/// Gives out choices, and then the next ones, until there are no others.
#[derive(Default)]
struct Choices {
    made: Vec<(u8, u8)>,
    next: usize,
}

impl Choices {
    /// A number below `of`.
    fn among(&mut self, of: u8) -> u8 {
        if self.next == self.made.len() {
            self.made.push((0, of));
        }
        let (choice, before) = self.made[self.next];
        assert_eq!(before, of, "a world is the same when it is made again");
        self.next += 1;
        choice
    }

    /// Whether there are others.
    fn advance(&mut self) -> bool {
        self.next = 0;
        while let Some((last, of)) = self.made.pop() {
            if last + 1 < of {
                self.made.push((last + 1, of));
                return true;
            }
        }
        false
    }
}

/// What one of the clients does next.
#[derive(Debug, Clone, Copy)]
enum Step {
    Mirror,
    Slots,
    Subscribe(u64),
    Unsubscribe(u64),
    /// Adds to rows, and ends a clock.
    Add(&'static [u32], Option<u64>),
    Leave,
}

const SLOT: u64 = 1024;

/// The clients' regions, and what is on its way to them.
struct Clients {
    regions: [Vec<u8>; 2],
    /// Slots that wait.
    queue: [Vec<Slot>; 2],
    /// A round to close: clock, LSN.
    rounds: [Option<(u64, u64)>; 2],
    /// Slots that hold an image since the round after their subscription.
    subscribed: [BTreeMap<u64, bool>; 2],
    mirrors: [bool; 2],
    /// Its mirror is filled.
    opened: [bool; 2],
    left: [bool; 2],
}

struct Story {
    world: World,
    clients: Clients,
    /// LSN, row and value of what was applied.
    applied: Vec<(u64, u32, i32)>,
    clocks: [u64; 2],
    seal: Seal,
}

impl Story {
    fn new() -> Self {
        let mut world = World::new(4096);
        world.join(2);
        world.open(0, &essp("t", 3), Hold::InPlace).unwrap();
        world.answers();
        let clients = Clients {
            regions: [vec![0; REGION], vec![0; REGION]],
            queue: [vec![], vec![]],
            rounds: [None; 2],
            subscribed: Default::default(),
            mirrors: [false; 2],
            opened: [false; 2],
            left: [false; 2],
        };
        Self { world, clients, applied: vec![], clocks: [0; 2], seal: Seal::new(64) }
    }

    fn step(&mut self, client: usize, step: Step) {
        let id = client as u32;
        let effects = match step {
            Step::Mirror => {
                self.clients.mirrors[client] = true;
                self.world.open(id, &essp("t", 3), Hold::Mirror(0))
            }
            Step::Slots => self.world.open(id, &essp("t", 3), Hold::Slots),
            Step::Subscribe(image) => {
                self.clients.subscribed[client].insert(image, false);
                self.world.slot(id, image, SLOT + 80 * image, SUBSCRIBE)
            }
            Step::Unsubscribe(image) => {
                self.clients.subscribed[client].remove(&image);
                self.world.slot(id, image, SLOT + 80 * image, UNSUBSCRIBE)
            }
            Step::Add(rows, clock) => {
                let value = 1 << (2 * self.applied.len());
                let lsn = self.world.add(id, clock, rows, value).unwrap();
                self.applied.extend(rows.iter().map(|row| (lsn, *row, value)));
                self.clocks[client] = clock.unwrap_or(self.clocks[client]);
                return self.check_rows();
            }
            Step::Leave => {
                self.clients.left[client] = true;
                self.clients.queue[client].clear();
                self.clients.rounds[client] = None;
                self.world.say(id, Kind::Leave, 0, &[])
            }
        };
        for effect in effects.unwrap().slots {
            match effect {
                SlotEffect::Push(slot) => self.clients.queue[client].push(slot),
                SlotEffect::Stop(slot) => self.clients.queue[client].retain(|other| *other != slot),
                SlotEffect::StopTable(_) => unreachable!("nobody releases"),
            }
        }
        self.check_rows();
    }

    /// A turn of the poller, in which clients can take pushes or not.
    fn turn(&mut self, room: bool) {
        if let Some(clock) = self.world.core.take_risen() {
            let (mut table, mut deliveries) = (0, Vec::new());
            while let Some(run) = self.world.core.take_run(Due::Round, &mut table, 1 << 14) {
                self.world.core.deliveries(&run, &mut deliveries);
                for delivery in &deliveries {
                    let client = delivery.client.0 as usize;
                    match delivery.copy {
                        _ if room && !delivery.behind && self.clients.queue[client].is_empty() => {
                            self.write(client, run.table, delivery.images.clone(), delivery.at);
                        }
                        CopyKind::Mirror => self.world.core.owe(delivery.client, &run),
                        CopyKind::Slot => self.clients.queue[client].push(delivery.slot(run.table)),
                    }
                }
            }
            for client in 0..2 {
                if !self.clients.left[client] {
                    self.clients.rounds[client] = Some((clock, self.world.core.round_lsn()));
                }
            }
        }
        while self.world.core.seal_some(1) {}
    }

    fn write(&mut self, client: usize, table: TableId, images: std::ops::Range<u64>, at: u64) {
        let place = self.world.core.place(&Run { table, images });
        let bytes = self.world.core.bytes(place);
        self.clients.regions[client][at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// Posts all that waits, as far as it goes, and closes rounds.
    fn pump(&mut self, client: usize) {
        let id = ClientId(client as u32);
        while let Some((run, at)) = self.world.core.next_owed(id, 80) {
            self.write(client, run.table, run.images.clone(), at);
            self.world.core.paid(id, &run);
        }
        for slot in std::mem::take(&mut self.clients.queue[client]) {
            self.write(client, slot.table, slot.image..slot.image + 1, slot.at);
        }
        for (client, kind, _) in self.world.answers() {
            assert_eq!(kind, Kind::Table as u8);
            self.clients.opened[client as usize] = self.clients.mirrors[client as usize];
            self.check_copies(client as usize, 0);
        }
        if self.world.core.owes(id) {
            return;
        }
        if let Some((clock, lsn)) = self.clients.rounds[client].take() {
            assert!(clock <= self.world.core.clock());
            self.clients.subscribed[client].values_mut().for_each(|filled| *filled = true);
            self.check_copies(client, lsn);
        }
    }

    /// A mirror, or slots, hold whole images with all that was applied up to `lsn`.
    fn check_copies(&self, client: usize, lsn: u64) {
        let images = (0..3).filter(|_| self.clients.opened[client]).map(|image| (image, 80 * image));
        let slots = self.clients.subscribed[client].iter().filter(|slot| *slot.1);
        for (image, at) in images.chain(slots.map(|(image, _)| (*image, SLOT + 80 * image))) {
            let bytes = &self.clients.regions[client][at as usize..][..80];
            let (header, data) = Header::read_from_prefix(bytes).unwrap();
            assert!(self.seal.verify(&header, data), "client {client}, image {image}");
            let has = i32::read_from_prefix(data).unwrap().0;
            assert_eq!(has, self.sum(image as u32, header.version.lsn()), "the LSN says what is in it");
            let last = self.applied.iter().rfind(|update| update.0 <= lsn && u64::from(update.1) == image);
            assert!(last.is_none_or(|last| last.0 <= header.version.lsn()), "client {client}, image {image}");
        }
    }

    /// What was added to a row up to an LSN.
    fn sum(&self, row: u32, lsn: u64) -> i32 {
        self.applied.iter().filter(|update| update.0 <= lsn && update.1 == row).map(|update| update.2).sum()
    }

    fn check_rows(&self) {
        for row in 0..3 {
            assert_eq!(self.world.value(row.into()), self.sum(row, u64::MAX));
            let last = self.applied.iter().filter(|update| update.1 == row).map(|update| update.0).max();
            assert_eq!(self.world.image(0, row.into()).0.version.lsn(), last.unwrap_or(0));
        }
        let live = (0..2).filter(|client| !self.clients.left[*client]).map(|client| self.clocks[client]);
        let least = live.min().unwrap_or(0);
        assert!(self.world.word(0) == least || self.clients.left.contains(&true));
        assert_eq!(self.world.word(0), self.world.core.clock());
    }
}

/// Plays all orders of two scripts, each message followed by nothing, by a turn that finds room, by one that does not, or by the posts of one
/// client. How many stories there are.
fn all_orders(scripts: [&[Step]; 2]) -> usize {
    let mut choices = Choices::default();
    let mut stories = 0;
    loop {
        let mut story = Story::new();
        let mut at = [0; 2];
        while at[0] < scripts[0].len() || at[1] < scripts[1].len() {
            let client = match (at[0] < scripts[0].len(), at[1] < scripts[1].len()) {
                (true, true) => choices.among(2) as usize,
                (first, _) => usize::from(!first),
            };
            story.step(client, scripts[client][at[client]]);
            at[client] += 1;
            match choices.among(4) {
                0 => {}
                1 => story.turn(true),
                2 => story.turn(false),
                _ => story.pump(client),
            }
        }
        for _ in 0..2 {
            story.turn(true);
            (0..2).for_each(|client| story.pump(client));
        }
        assert!((0..2).all(|client| story.clients.rounds[client].is_none()), "all rounds are closed");
        stories += 1;
        if !choices.advance() {
            return stories;
        }
    }
}

#[test]
fn a_mirror_and_in_place() {
    let writes = [Step::Add(&[0, 1], None), Step::Add(&[1], Some(1)), Step::Add(&[2], Some(2))];
    let mirror = [Step::Mirror, Step::Add(&[1, 2], Some(1)), Step::Add(&[0], Some(2))];
    assert_eq!(all_orders([&writes, &mirror]), 20 * 4096);
}

#[test]
fn slots_that_come_and_go() {
    let writes = [Step::Add(&[0, 1], Some(1)), Step::Add(&[1, 2], Some(2))];
    let slots = [Step::Slots, Step::Subscribe(1), Step::Add(&[1], Some(2)), Step::Unsubscribe(1)];
    assert_eq!(all_orders([&writes, &slots]), 15 * 4096);
}

#[test]
fn one_that_leaves_holds_nobody_up() {
    let writes = [Step::Add(&[0, 1], Some(1)), Step::Add(&[1, 2], Some(2))];
    let mirror = [Step::Mirror, Step::Add(&[1], None), Step::Leave];
    assert_eq!(all_orders([&writes, &mirror]), 10 * 1024);
}
