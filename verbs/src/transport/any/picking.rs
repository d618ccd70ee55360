//! Which rails a lane goes by: pure functions of what both sides have told, what is known of pairs of rails, and whose turn it is.
//!
//! ```text
//!  client: pick   ── its own rail, and those of the server's that may be the other end ──▶ server: choose ── its rail
//! ```
//!
//! The client knows which pairs have failed it. The server knows which of its rails are near the memory that the lane is for, and
//! which are down. So each picks its own end.
//!
//! **The order.** Of all pairs, the best are those that no failure is known of. Of these, the best are of one subnet; others are tried where
//! networks have routers. Slow ports are left out beside ports that are more than twice as fast. What is left is dealt out in turn. A pair
//! that has failed is used when there is no other: the one that failed the least often. After [`GIVE_UP`] failures in a row it is not, unless
//! the user insists on RDMA. Then the next best way, TCP, is better than another try.

use std::net::Ipv6Addr;

use crate::rails::{MAX_RAILS, OwnAddress, Rail, RailAddress, Reach};

/// Failures in a row after which another way is better.
pub(super) const GIVE_UP: u32 = 3;

/// A rail of the client that picks.
pub(super) struct Own<'a> {
    pub(super) rail: &'a Rail,
    /// Its port is active.
    pub(super) active: bool,
}

/// What the client picks: its own rail and the address of it by number, and the server's rails (a bit each) that may be the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pick {
    pub(super) own: usize,
    pub(super) address: usize,
    pub(super) theirs: u8,
}

/// A pair of rails that may carry a lane.
#[derive(Debug, Clone, Copy)]
struct Pair {
    own: usize,
    address: usize,
    theirs: usize,
    /// Failures in a row, and how the addresses are connected: less is better.
    rank: (u32, Reach),
    megabits: u32,
}

/// The best pair of addresses of two rails: which of the own one, and how they are connected.
fn meet(own: &Rail, theirs: &Rail) -> Option<(Reach, usize, Ipv6Addr)> {
    let pairs = own.addresses.iter().enumerate().flat_map(|(number, from)| {
        theirs.addresses.iter().filter_map(move |to| Some((from.reaches(to)?, number, to.gid)))
    });
    // The first of the best: the order in which addresses are told is one of preference.
    pairs.min_by_key(|(reach, ..)| *reach)
}

/// Picks the client's end of a lane. `failures` are those in a row of the own rail of this number with a server's address; `tried` has the
/// pairs (a bit for each of the server's rails, for each own one) that were of no use just now.
pub(super) fn pick(
    own: &[Own<'_>],
    theirs: &[Rail],
    failures: impl Fn(usize, Ipv6Addr) -> u32,
    tried: &[u8; MAX_RAILS],
    insists: bool,
    turn: u32,
) -> Option<Pick> {
    let mut pairs = Vec::new();
    for (number, mine) in own.iter().enumerate().filter(|(_, mine)| mine.active) {
        for (other, their) in theirs.iter().enumerate().filter(|(other, _)| tried[number] >> other & 1 == 0) {
            let Some((reach, address, gid)) = meet(mine.rail, their) else { continue };
            let (own, theirs, rank) = (number, other, (failures(number, gid), reach));
            // 0 is unknown: no reason to leave it out.
            let known = [mine.rail.megabits, their.megabits].into_iter().filter(|rate| *rate > 0);
            pairs.push(Pair { own, address, theirs, rank, megabits: known.min().unwrap_or(0) });
        }
    }
    let best = pairs.iter().map(|pair| pair.rank).min()?;
    if best.0 >= GIVE_UP && !insists {
        return None;
    }
    pairs.retain(|pair| pair.rank == best);
    let fastest = pairs.iter().map(|pair| pair.megabits).max().unwrap_or(0);
    pairs.retain(|pair| pair.megabits == 0 || pair.megabits >= fastest / 2);
    // They are in the order of the own rails.
    let mut owns: Vec<usize> = pairs.iter().map(|pair| pair.own).collect();
    owns.dedup();
    let own = owns[turn as usize % owns.len()];
    pairs.retain(|pair| pair.own == own);
    let address = pairs[0].address;
    let theirs =
        pairs.iter().filter(|pair| pair.address == address).fold(0, |bits, pair| bits | 1 << pair.theirs);
    Some(Pick { own, address, theirs })
}

/// A rail of the server that chooses.
pub(super) struct Mine<'a> {
    pub(super) addresses: &'a [OwnAddress],
    pub(super) active: bool,
    /// Failures in a row with the client's address.
    pub(super) failures: u32,
    /// It is near the core of the thread that the lane is for. `None`: that is not known.
    pub(super) near: Option<bool>,
}

/// Chooses the server's end of a lane, among those that the client has asked for (a bit each), to a client at `peer`: the rail by number, and
/// its address.
pub(super) fn choose(
    mine: &[Mine<'_>],
    asked: u8,
    peer: &RailAddress,
    turn: u32,
) -> Option<(usize, OwnAddress)> {
    let asked_for = |(number, mine): &(usize, &Mine<'_>)| asked >> number & 1 == 1 && mine.active;
    let ranked = mine.iter().enumerate().filter(asked_for).filter_map(|(number, mine)| {
        let reached = mine.addresses.iter().filter_map(|own| Some((own.address.reaches(peer)?, *own)));
        let (reach, own) = reached.min_by_key(|(reach, _)| *reach)?;
        Some(((mine.failures, reach, mine.near == Some(false)), number, own))
    });
    let ranked: Vec<_> = ranked.collect();
    let best = ranked.iter().map(|(rank, ..)| *rank).min()?;
    let best: Vec<_> = ranked.into_iter().filter(|(rank, ..)| *rank == best).collect();
    let (_, number, own) = best[turn as usize % best.len()];
    Some((number, own))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::Way;

    const NONE_TRIED: [u8; MAX_RAILS] = [0; MAX_RAILS];

    fn v4(ip: &str) -> RailAddress {
        let gid = format!("::ffff:{ip}").parse().unwrap();
        RailAddress { network: Way::RoceV2Ipv4, gid, prefix: 120 }
    }

    fn ib(host: u16) -> RailAddress {
        let gid = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, host);
        RailAddress { network: Way::InfiniBand, gid, prefix: 64 }
    }

    fn rail(addresses: &[RailAddress]) -> Rail {
        Rail { name: "mlx5_0:1".into(), megabits: 100_000, addresses: addresses.to_vec() }
    }

    /// The picks of turns 0, 1, ...: own rail and the server's.
    fn picks(own: &[Rail], theirs: &[Rail], failures: impl Fn(usize, Ipv6Addr) -> u32) -> Vec<(usize, u8)> {
        let own: Vec<_> = own.iter().map(|rail| Own { rail, active: true }).collect();
        let one = |turn| pick(&own, theirs, &failures, &NONE_TRIED, false, turn);
        (0..4).filter_map(one).map(|pick| (pick.own, pick.theirs)).collect()
    }

    fn clean(_: usize, _: Ipv6Addr) -> u32 {
        0
    }

    #[test]
    fn rails_of_a_common_network_are_used_in_turn() {
        // Each rail is a network of its own.
        let own = [rail(&[v4("10.0.0.1")]), rail(&[v4("10.0.1.1")])];
        let theirs = [rail(&[v4("10.0.1.2")]), rail(&[v4("10.0.0.2")])];
        assert_eq!(picks(&own, &theirs, clean), [(0, 0b10), (1, 0b01), (0, 0b10), (1, 0b01)]);
        // One network of all.
        let (own, theirs) = ([rail(&[ib(1)]), rail(&[ib(2)])], [rail(&[ib(3)]), rail(&[ib(4)])]);
        assert_eq!(picks(&own, &theirs, clean), [(0, 0b11), (1, 0b11), (0, 0b11), (1, 0b11)]);
        // A rail without a partner is not used, and kinds are not mixed.
        let own = [rail(&[ib(1)]), rail(&[v4("10.0.0.1")])];
        assert_eq!(picks(&own, &[rail(&[ib(3)])], clean), [(0, 1); 4]);
        assert_eq!(picks(&own[1..], &[rail(&[ib(3)])], clean), []);
        assert_eq!(picks(&[], &[], clean), []);
    }

    #[test]
    fn an_address_is_picked_that_the_other_side_has_a_partner_of() {
        let v6 =
            |text: &str| RailAddress { network: Way::RoceV2Ipv6, gid: text.parse().unwrap(), prefix: 64 };
        let mine = rail(&[v4("10.0.0.1"), v6("2001:db8::1")]);
        let own = [Own { rail: &mine, active: true }];
        let picked = |theirs: &[Rail]| pick(&own, theirs, clean, &NONE_TRIED, false, 0).unwrap();
        assert_eq!(picked(&[rail(&[v6("2001:db8::2")])]).address, 1);
        assert_eq!(picked(&[rail(&[v6("2001:db8::2"), v4("10.0.0.2")])]).address, 0);
        // The subnet goes before the order.
        assert_eq!(picked(&[rail(&[v4("10.9.0.2"), v6("2001:db8::2")])]).address, 1);
        assert_eq!(picked(&[rail(&[v4("10.9.0.2")])]), Pick { own: 0, address: 0, theirs: 1 });
    }

    #[test]
    fn what_failed_is_left_out_and_used_when_there_is_nothing_else() {
        let own = [rail(&[v4("10.0.0.1")]), rail(&[v4("10.0.1.1")])];
        let theirs = [rail(&[v4("10.0.0.2")]), rail(&[v4("10.0.1.2")])];
        let dead = |times: [u32; 2]| {
            let of = move |own: usize, gid: Ipv6Addr| match gid.octets()[14] {
                subnet if usize::from(subnet) == own => times[own],
                _ => GIVE_UP,
            };
            picks(&own, &theirs, of)
        };
        assert_eq!(dead([0, 1]), [(0, 1); 4]);
        assert_eq!(dead([1, 0]), [(1, 2); 4]);
        assert_eq!(dead([2, 1]), [(1, 2); 4], "the one that failed less often");
        assert_eq!(dead([1, 1]), [(0, 1), (1, 2), (0, 1), (1, 2)]);
        assert_eq!(dead([GIVE_UP; 2]), [], "TCP is better");
        let own: Vec<_> = own.iter().map(|rail| Own { rail, active: true }).collect();
        assert!(pick(&own, &theirs, |_, _| 9, &NONE_TRIED, true, 0).is_some(), "the user insists");
    }

    #[test]
    fn ports_that_are_down_and_pairs_that_were_tried_are_left_out() {
        let (first, second) = (rail(&[ib(1)]), rail(&[ib(2)]));
        let theirs = [rail(&[ib(3)]), rail(&[ib(4)])];
        let own = [Own { rail: &first, active: false }, Own { rail: &second, active: true }];
        let mut tried = NONE_TRIED;
        let one = |tried: &[u8; MAX_RAILS], turn| pick(&own, &theirs, clean, tried, true, turn);
        assert_eq!(one(&tried, 0), Some(Pick { own: 1, address: 0, theirs: 0b11 }));
        tried[1] = 0b01;
        assert_eq!(one(&tried, 1), Some(Pick { own: 1, address: 0, theirs: 0b10 }));
        tried[1] = 0b11;
        assert_eq!(one(&tried, 0), None);
    }

    #[test]
    fn slow_ports_are_left_out_beside_fast_ones() {
        let with = |megabits, host| Rail { megabits, ..rail(&[ib(host)]) };
        let theirs = [with(200_000, 9)];
        assert_eq!(picks(&[with(10_000, 1), with(200_000, 2)], &theirs, clean), [(1, 1); 4]);
        assert_eq!(picks(&[with(100_000, 1), with(200_000, 2)], &theirs, clean)[..2], [(0, 1), (1, 1)]);
        assert_eq!(picks(&[with(0, 1), with(200_000, 2)], &theirs, clean)[..2], [(0, 1), (1, 1)]);
        // Alone it is used.
        assert_eq!(picks(&[with(10_000, 1)], &theirs, clean), [(0, 1); 4]);
    }

    #[test]
    fn the_server_chooses_a_rail_that_is_near_up_and_asked_for() {
        let addresses =
            [[OwnAddress { index: 0, address: ib(1) }], [OwnAddress { index: 3, address: ib(2) }]];
        let mine = |up: [bool; 2], failures: [u32; 2], near: [Option<bool>; 2]| {
            let one = |n: usize| Mine {
                addresses: &addresses[n],
                active: up[n],
                failures: failures[n],
                near: near[n],
            };
            [one(0), one(1)]
        };
        let chosen = |mine: &[Mine<'_>], asked| -> Vec<usize> {
            (0..3).filter_map(|turn| choose(mine, asked, &ib(7), turn)).map(|(number, _)| number).collect()
        };
        let unknown = [None; 2];
        assert_eq!(chosen(&mine([true; 2], [0; 2], unknown), 0b11), [0, 1, 0]);
        assert_eq!(chosen(&mine([true; 2], [0; 2], unknown), 0b10), [1; 3]);
        assert_eq!(chosen(&mine([true; 2], [0; 2], [Some(false), Some(true)]), 0b11), [1; 3]);
        assert_eq!(
            chosen(&mine([true; 2], [0; 2], [Some(false), Some(true)]), 0b01),
            [0; 3],
            "far, but asked for"
        );
        assert_eq!(chosen(&mine([true, false], [0; 2], [Some(false), Some(true)]), 0b11), [0; 3]);
        assert_eq!(chosen(&mine([true; 2], [0, 1], [Some(false), Some(true)]), 0b11), [0; 3]);
        assert_eq!(chosen(&mine([false; 2], [0; 2], unknown), 0b11), [0; 0]);
        assert_eq!(choose(&mine([true; 2], [0; 2], unknown), 0b11, &v4("10.0.0.1"), 0), None, "another kind");
        assert_eq!(choose(&mine([true; 2], [0; 2], unknown), 0b10, &ib(7), 0).unwrap().1.index, 3);
    }
}
