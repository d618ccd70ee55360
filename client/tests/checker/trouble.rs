//! Trouble of the transport: connections that break and clients that die at a counted operation, completions that are late.
//!
//! Every server and every client of a job is a [`Faulty`] node. Nobody is to notice trouble but the client that it takes a
//! server from: it gets an error that names the server, and the others go on without it. In some jobs trouble *heals*: connections that
//! break are made again, and then nobody is to notice at all.

use std::time::Duration;

use fervor_verbs::transport::faulty::{Fate, Fault, Plan, Point, Shown};

use crate::support::Random;

/// One who has a part in a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Party {
    Server(usize),
    Client(usize),
}

/// What goes wrong at whom.
#[derive(Debug, Clone, Default)]
pub struct Trouble {
    pub at: Vec<(Party, Plan)>,
    /// How long the servers wait for a client whose connection broke: so long that connections that break are made again, and nobody
    /// is to notice anything but time.
    pub lease: Duration,
}

impl Trouble {
    /// One fault at one party.
    pub fn one(party: Party, fault: Fault) -> Self {
        Self { at: vec![(party, Plan::one(fault))], lease: Duration::ZERO }
    }

    /// What a seed makes of a job, of which most have none. With a `rogue`, who does not expect it, servers keep their
    /// connections.
    pub fn draw(seed: u64, clients: usize, servers: usize, shards: usize, rogue: bool) -> Self {
        // Of its own: what else a seed decides stays what it is.
        if Random(seed ^ 0x4ea1_0000).one_in(5) {
            return Self::healing(seed, clients, servers, shards, rogue);
        }
        let mut random = Random(seed ^ 0xfa17_0000);
        if !random.one_in(3) {
            return Self::default();
        }
        let client = Party::Client(random.among(0..=clients as u64 - 1) as usize);
        let server = Party::Server(random.among(0..=servers as u64 - 1) as usize);
        let nth = 1 << random.among(0..=9);
        let nth = random.among(nth / 2..=nth);
        let fate = [Fate::Done, Fate::Undone][random.among(0..=1) as usize];
        let at =
            if random.one_in(3) { Point::Completion { nth } } else { Point::Post { kind: None, nth, fate } };
        let links = (servers * shards) as u64;
        let (party, faults) = match random.among(0..=7) {
            // First it asks each server for its shards; then come those for messages, and then those of its workers.
            0..=2 => {
                let connection = random.among(servers as u64..=servers as u64 + 3 * links) as usize;
                (client, vec![Fault::Break { connection, at }])
            }
            3 | 4 if !rogue => {
                let connection = random.among(0..=4 * links) as usize;
                (server, vec![Fault::Break { connection, at }])
            }
            5 if clients > 1 => (client, vec![Fault::Die { operation: nth * 4 }]),
            _ => {
                let one_in = random.among(2..=32);
                let longest = Duration::from_micros([20, 200, 2000][random.among(0..=2) as usize]);
                let delay = |of| Fault::Delay { of, one_in, longest };
                let party = if random.one_in(2) { client } else { server };
                (party, [Shown::Work, Shown::Arrival, Shown::End].map(delay).to_vec())
            }
        };
        Self { at: vec![(party, Plan { seed, faults })], lease: Duration::ZERO }
    }

    /// Connections of several clients break, some more than once, and are made again.
    fn healing(seed: u64, clients: usize, servers: usize, shards: usize, rogue: bool) -> Self {
        let mut random = Random(seed ^ 0x4ea1_0001);
        let links = servers * shards;
        let plan = |party| {
            let breaks = (0..random.among(0..=3)).map(|_| {
                // Often while tables are being opened.
                let nth = 1 << random.among(0..=7);
                let nth = if random.one_in(2) { random.among(0..=8) } else { random.among(nth / 2..=nth) };
                let fate = [Fate::Done, Fate::Undone][random.among(0..=1) as usize];
                let at = if random.one_in(2) {
                    Point::Completion { nth }
                } else {
                    Point::Post { kind: None, nth, fate }
                };
                // At a client those by which it asks for the shards come first, then those for messages, lanes, and what is made anew.
                let connection = match party {
                    Party::Client(_) => servers + random.among(0..=3 * links as u64) as usize,
                    Party::Server(_) => random.among(0..=4 * (links * clients) as u64) as usize,
                };
                Fault::Break { connection, at }
            });
            let mut faults: Vec<_> = breaks.collect();
            if random.one_in(3) {
                let longest = Duration::from_micros([20, 200, 2000][random.among(0..=2) as usize]);
                let delay = |of| Fault::Delay { of, one_in: 8, longest };
                faults.extend([Shown::Work, Shown::Arrival, Shown::End].map(delay));
            }
            (party, Plan { seed, faults })
        };
        let clients = (0..clients).map(Party::Client);
        // The rogue does not expect that a connection breaks.
        let servers = (0..servers).filter(|_| !rogue).map(Party::Server);
        Self { at: clients.chain(servers).map(plan).collect(), lease: Duration::from_secs(1) }
    }

    /// The plan of a party.
    pub fn of(&self, party: Party) -> Plan {
        let mut plans = self.at.iter().filter(|(whose, _)| *whose == party);
        plans.next().map(|(_, plan)| plan.clone()).unwrap_or_default()
    }

    /// Whether somebody may lose a server, or die.
    pub fn harms(&self) -> bool {
        let heals = !self.lease.is_zero();
        let harm = |fault: &Fault| match fault {
            Fault::Delay { .. } => false,
            Fault::Break { .. } => !heals,
            Fault::Die { .. } | Fault::Replay { .. } => true,
        };
        self.at.iter().any(|(_, plan)| plan.faults.iter().any(harm))
    }

    /// Whether a server dies.
    pub fn kills_a_server(&self) -> bool {
        let dies = |fault: &Fault| matches!(fault, Fault::Die { .. });
        self.at.iter().any(|(party, plan)| matches!(party, Party::Server(_)) && plan.faults.iter().any(dies))
    }
}
