//! The rails of a host: its RDMA providers, one for each port that it uses.
//!
//! Whoever makes a lane by RDMA asks for [`Picks`], one after the other, until one leads there. What did not lead there, and which
//! peers were lost, the rail itself remembers (`rdma::failures`): so a dead one is left out by lanes that are made afterwards, and used again
//! when it is back. Which rails a lane goes by is decided in [`super::picking`].
//!
//! **Trust.** A client may offer any address. On Ethernet the kernel looks for its hardware address, for a second if there is none, and the
//! thread that accepts waits as long. So a peer that is let in can slow down those who come after it; it has to be let in by a session first.

use std::{
    net::Ipv6Addr,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use super::{
    HostAttach,
    connection::Route,
    picking::{self, Mine, Own, Pick},
};
use crate::{
    error::Error,
    fabric::Fabric,
    rails::{self, MAX_RAILS, OwnAddress, Rail, RailAddress, RailName, RailStats},
    session::wire::LaneRails,
    transport::rdma::{self, Rdma, RdmaJoining},
};

struct Opened {
    rdma: Rdma,
    name: String,
    lanes: AtomicU64,
    near: Vec<usize>,
}

impl Opened {
    fn new(rdma: Rdma) -> Self {
        let (name, near) = (rdma.rail().0.name, rdma.near());
        Self { rdma, name, lanes: AtomicU64::new(0), near }
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Rails {
    opened: Vec<Opened>,
    /// Whose turn it is.
    turn: AtomicU32,
}

impl Rails {
    /// One rail: the device of an `rdma://` address.
    pub(super) fn one(rdma: Rdma) -> Self {
        Self { opened: vec![Opened::new(rdma)], turn: AtomicU32::new(0) }
    }

    /// Those that are told, or all that there are.
    ///
    /// # Errors
    /// There is none, with the reason for each port; one that is told cannot be opened.
    pub(super) fn open(told: &[RailName]) -> Result<Self, Error> {
        rdma::load_libraries()?;
        let fabric = Fabric::from_env()?;
        let devices = rdma::read_tables()?;
        let (mut opened, mut reasons) = (Vec::new(), Vec::new());
        for candidate in rails::candidates(&devices, told, &fabric)? {
            let name = candidate.name();
            if let Err(reason) = candidate.verdict {
                reasons.push(format!("{name}: {reason}"));
                continue;
            }
            match Rdma::with_fabric(Some(&name), fabric) {
                Ok(rdma) => opened.push(Opened::new(rdma)),
                Err(error) if !told.is_empty() => return Err(error),
                // The others may do.
                Err(error) => reasons.push(format!("{name}: {error}")),
            }
        }
        if opened.is_empty() {
            let reason = match reasons.len() {
                0 => "there is no RDMA device".to_owned(),
                _ => format!("no port can be used ({})", reasons.join("; ")),
            };
            return Err(Error::NoDevice { reason });
        }
        Ok(Self { opened, turn: AtomicU32::new(Self::first_turn()) })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.opened.is_empty()
    }

    /// The provider of a rail by number.
    pub(super) fn get(&self, rail: usize) -> Option<&Rdma> {
        self.opened.get(rail).map(|opened| &opened.rdma)
    }

    /// All providers.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Rdma> {
        self.opened.iter().map(|opened| &opened.rdma)
    }

    /// Name of a rail.
    pub(super) fn name(&self, rail: usize) -> &str {
        self.opened.get(rail).map_or("?", |opened| &opened.name)
    }

    /// What peers are told.
    pub(super) fn told(&self) -> Vec<Rail> {
        self.iter().map(|rdma| rdma.rail().0).collect()
    }

    pub(super) fn stats(&self) -> Vec<RailStats> {
        let stats = |opened: &Opened| RailStats {
            name: opened.name.clone(),
            active: opened.rdma.is_active(),
            lanes: opened.lanes.load(Ordering::Relaxed),
            lost: opened.rdma.lost(),
        };
        self.opened.iter().map(stats).collect()
    }

    /// A lane was made by this route.
    pub(super) fn count(&self, route: Route) {
        if let Route::Rail(rail) = route {
            self.opened[usize::from(rail)].lanes.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Names of all rails.
    pub(super) fn names(&self) -> Vec<&str> {
        self.opened.iter().map(|opened| &*opened.name).collect()
    }

    /// Clients of one server begin with different rails.
    fn first_turn() -> u32 {
        std::process::id()
    }

    fn next_turn(&self) -> u32 {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }

    /// Ways to a server by its rails, one after the other.
    pub(super) fn picks<'a>(&'a self, theirs: &'a [Rail], insists: bool) -> Picks<'a> {
        Picks { rails: self, theirs, insists, tried: [0; MAX_RAILS], turn: self.next_turn() }
    }

    /// The end of a lane that asks, by rails that were picked.
    pub(super) fn join(
        &self,
        picked: &Picked,
        endpoint: &HostAttach,
        depth: usize,
    ) -> Result<RdmaJoining, Error> {
        let own = picked.pick.own;
        self.opened[own].rdma.join_at(&endpoint.rail(own)?, &picked.from, depth)
    }

    /// The end that answers the offer of a peer who asks for any of `asked` of our rails (a bit each); and which rail that is.
    pub(super) fn answer(
        &self,
        endpoint: &HostAttach,
        depth: usize,
        asked: u8,
        offer: &[u8],
    ) -> Result<(RdmaJoining, u8), Error> {
        let chosen = rdma::peer_of(offer).and_then(|(network, gid)| {
            let peer = RailAddress { network, gid, prefix: 128 };
            let chosen = self.choose(&peer, asked, endpoint.core());
            chosen.map(|(rail, at)| (rail, at, gid)).ok_or_else(|| self.none_leads_to(&peer, asked))
        });
        let (rail, at, peer) = chosen.map_err(|reason| Error::NoDevice { reason })?;
        let rdma = &self.opened[rail].rdma;
        let joining = rdma.answer_at(&endpoint.rail(rail)?, &at, depth, offer).inspect_err(|error| {
            // It says nothing of the network that there is no place.
            if !matches!(error, Error::Limit { .. }) {
                rdma.note_failure(peer);
            }
        })?;
        self.count(Route::Rail(rail as u8));
        Ok((joining, rail as u8))
    }

    fn choose(&self, peer: &RailAddress, asked: u8, core: Option<usize>) -> Option<(usize, OwnAddress)> {
        let addresses: Vec<_> = self.iter().map(|rdma| rdma.rail().1).collect();
        let pairs = self.opened.iter().zip(&addresses);
        let mine: Vec<_> = pairs
            .map(|(opened, addresses)| Mine {
                addresses,
                active: opened.rdma.is_active(),
                failures: opened.rdma.failures_of(peer.gid),
                near: opened.near(core),
            })
            .collect();
        picking::choose(&mine, asked, peer, self.next_turn())
    }

    /// Whether lanes may come by any of `asked` of our rails (a bit each).
    ///
    /// # Errors
    /// A sentence that says why not.
    pub(super) fn lead(&self, asked: u8) -> Result<(), String> {
        match self.asked_for(asked).any(|opened| opened.rdma.is_active()) {
            true => Ok(()),
            false => Err(format!("the server has no such rail that is up: {}", self.states(asked))),
        }
    }

    fn asked_for(&self, asked: u8) -> impl Iterator<Item = &Opened> {
        let asked_for = move |(number, _): &(usize, &Opened)| asked >> number & 1 == 1;
        self.opened.iter().enumerate().filter(asked_for).map(|(_, opened)| opened)
    }

    /// What rails are that a peer asks for, for people.
    fn states(&self, asked: u8) -> String {
        let of = |opened: &Opened| {
            let state = if opened.rdma.is_active() { "" } else { ", which is down" };
            format!("{}{state}", opened.rdma.rail().0)
        };
        let states: Vec<_> = self.asked_for(asked).map(of).collect();
        match states.is_empty() {
            true => format!("it has {}, and was asked for others", self.opened.len()),
            false => states.join("; "),
        }
    }

    fn none_leads_to(&self, peer: &RailAddress, asked: u8) -> String {
        let states = self.states(asked);
        format!("none of the server's rails leads to {} {}: {states}", peer.network, peer.gid)
    }
}

impl Opened {
    /// Whether it is near a core, if either is known.
    fn near(&self, core: Option<usize>) -> Option<bool> {
        if self.near.is_empty() { None } else { core.map(|core| self.near.contains(&core)) }
    }
}

/// Ways to a server by rails, one after the other.
pub(super) struct Picks<'a> {
    rails: &'a Rails,
    theirs: &'a [Rail],
    insists: bool,
    tried: [u8; MAX_RAILS],
    turn: u32,
}

/// The rails that a lane is to go by: what the server is told, and the own address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Picked {
    pick: Pick,
    from: OwnAddress,
}

impl Picked {
    pub(super) fn route(&self) -> Route {
        Route::Rail(self.pick.own as u8)
    }

    /// As the server is told.
    pub(super) fn rails(&self) -> LaneRails {
        LaneRails { own: self.pick.own as u8, theirs: self.pick.theirs }
    }
}

impl Picks<'_> {
    /// The best of those that were not tried.
    pub(super) fn next(&mut self) -> Option<Picked> {
        let own: Vec<_> = self.rails.iter().map(|rdma| (rdma.rail(), rdma.is_active())).collect();
        let known: Vec<_> = own.iter().map(|((rail, _), active)| Own { rail, active: *active }).collect();
        let failures = |own: usize, peer: Ipv6Addr| self.rails.opened[own].rdma.failures_of(peer);
        let pick = picking::pick(&known, self.theirs, failures, &self.tried, self.insists, self.turn)?;
        self.tried[pick.own] |= pick.theirs;
        let (_, addresses) = &own[pick.own].0;
        Some(Picked { pick, from: addresses[pick.address] })
    }

    /// The name of the own rail of what was picked.
    pub(super) fn name(&self, picked: &Picked) -> &str {
        self.rails.name(picked.pick.own)
    }

    /// What was picked did not lead to the server.
    pub(super) fn failed(&self, picked: &Picked) {
        self.note(picked, Rdma::note_failure);
    }

    /// The server did not answer in time, for whatever reason.
    pub(super) fn late(&self, picked: &Picked) {
        self.note(picked, Rdma::note_doubt);
    }

    fn note(&self, Picked { pick, .. }: &Picked, note: impl Fn(&Rdma, Ipv6Addr)) {
        let asked_for = self.theirs.iter().enumerate().filter(|(number, _)| pick.theirs >> number & 1 == 1);
        for address in asked_for.flat_map(|(_, rail)| &rail.addresses) {
            note(&self.rails.opened[pick.own].rdma, address.gid);
        }
    }

    /// Why there is none.
    pub(super) fn none(&self) -> String {
        let own = self.rails.iter().map(|rdma| {
            let down = if rdma.is_active() { "" } else { " is down" };
            format!("{}{down}", rdma.rail().0)
        });
        let own: Vec<_> = own.collect();
        let theirs: Vec<_> = self.theirs.iter().map(Rail::to_string).collect();
        format!(
            "no port here leads to one of the server's, or too many connections by those that do have failed (here: {}; there: {})",
            own.join(", "),
            theirs.join(", ")
        )
    }
}
