//! Trouble of the transport: connections that break and clients that die at a counted operation, completions that are late.
//!
//! Every server and every client of a job is a [`Faulty`] node. Nobody is to notice trouble but the client that it takes a
//! server from: it gets an error that names the server, and the others go on without it.

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
}

impl Trouble {
    /// One fault at one party.
    pub fn one(party: Party, fault: Fault) -> Self {
        Self { at: vec![(party, Plan::one(fault))] }
    }

    /// What a seed makes of a job, of which most have none. With a `rogue`, who does not expect it, servers keep their
    /// connections.
    pub fn draw(seed: u64, clients: usize, servers: usize, shards: usize, rogue: bool) -> Self {
        // Of its own: what else a seed decides stays what it is.
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
        Self { at: vec![(party, Plan { seed, faults })] }
    }

    /// The plan of a party.
    pub fn of(&self, party: Party) -> Plan {
        let mut plans = self.at.iter().filter(|(whose, _)| *whose == party);
        plans.next().map(|(_, plan)| plan.clone()).unwrap_or_default()
    }

    /// Whether somebody may lose a server, or die.
    pub fn harms(&self) -> bool {
        let harm = |fault: &Fault| !matches!(fault, Fault::Delay { .. });
        self.at.iter().any(|(_, plan)| plan.faults.iter().any(harm))
    }

    /// Whether a server dies.
    pub fn kills_a_server(&self) -> bool {
        let dies = |fault: &Fault| matches!(fault, Fault::Die { .. });
        self.at.iter().any(|(party, plan)| matches!(party, Party::Server(_)) && plan.faults.iter().any(dies))
    }
}
