//! The client's way to a server: a session, and lanes by the best way that leads there.
//!
//! A process has one session with each server, which is begun when the first lane is made, and begun anew after it has ended (a server
//! that was started again, say).
//!
//! Lanes are asked for together, and made all or none. If a way does not lead there (a socket that is in another container's folder, a device
//! that the server's address does not belong to), the next best is tried, and the bad one not again in this session. RDMA leads there by
//! several pairs of rails, which are tried one after the other; what fails, the rails remember ([`rails`](super::rails)).

use std::{sync::PoisonError, time::Duration};

use super::{
    Host, HostConnection,
    asked::{Asked, Failed, Made, Spec},
    connection::{Lane, Route},
    dialled::Session,
    region::PeerRegions,
};
use crate::{
    address::Address,
    error::Error,
    session::{Way, wire::MAX_LANES},
    transport::{
        LaneSpec, MAX_REQUEST_DATA, Transport,
        host::{check_private_data, patience::Patience},
    },
};

/// The longest time that lanes wait for together, if one alone would not wait longer.
const LONGEST: Duration = Duration::from_secs(60);

/// The session with one server: none, or one that has ended, is begun anew by the next lane.
#[derive(Default)]
pub(super) struct Dialled {
    session: Option<Session>,
    /// Ways that were tried and led nowhere.
    bad: Vec<(Way, String)>,
}

/// See [`Transport::connect_all`].
pub(super) fn connect_all(
    host: &Host,
    address: &Address,
    lanes: &[Spec<'_>],
    timeout: Duration,
) -> Result<Vec<Made>, Error> {
    assert!(lanes.iter().all(|lane| lane.endpoint.is_of(host)), "the endpoint is of another transport");
    lanes.iter().try_for_each(|lane| check_private_data(lane.private_data, MAX_REQUEST_DATA))?;
    let Address::Session { host: name, port, via } = address else {
        return lanes.iter().map(|lane| direct(host, address, *lane, timeout)).collect();
    };
    if !host.0.sessions {
        return Err(Error::WrongProvider { address: address.to_string(), provider: "shm, rdma or tcp" });
    }
    // What many wait for together takes longer than what one waits for.
    let together = timeout.saturating_mul(lanes.len().max(1) as u32).min(timeout.max(LONGEST));
    let asked = Asked { host, name, port: *port, patience: Patience::new(address, together) };
    let dialled = host.0.dialled(address);
    // A panic leaves a session in which lanes were asked for that nobody takes: they end in time.
    let mut dialled = dialled.lock().unwrap_or_else(PoisonError::into_inner);
    let mut made = Vec::with_capacity(lanes.len());
    for lanes in lanes.chunks(MAX_LANES) {
        made.append(&mut some(&asked, &mut dialled, *via, lanes)?);
    }
    Ok(made)
}

/// As [`connect_all`], for as many lanes as are asked for in one message.
fn some(
    asked: &Asked<'_>,
    dialled: &mut Dialled,
    via: Option<Way>,
    lanes: &[Spec<'_>],
) -> Result<Vec<Made>, Error> {
    if dialled.session.as_ref().is_some_and(Session::is_stale) {
        *dialled = Dialled::default();
    }
    let reused = dialled.session.is_some();
    if !reused {
        dialled.session = Some(Session::begin(asked)?);
    }
    let mut made = make(asked, dialled, via, lanes);
    if reused && matches!(made, Err(Failed::NotAsked(_))) {
        // It had ended, and nobody had heard of it: the server does not know of these lanes.
        *dialled = Dialled { session: Some(Session::begin(asked)?), bad: Vec::new() };
        made = make(asked, dialled, via, lanes);
    }
    made.map_err(|failed| match failed {
        Failed::NotAsked(error) | Failed::Lane(error) => error,
        Failed::Way(reason) => asked.patience.unreachable(reason),
    })
}

/// Makes lanes by the best way that leads there.
fn make(
    asked: &Asked<'_>,
    dialled: &mut Dialled,
    via: Option<Way>,
    lanes: &[Spec<'_>],
) -> Result<Vec<Made>, Failed> {
    let session = dialled.session.as_mut().expect("the caller has begun it");
    let mut reasons = Vec::new();
    for way in Way::ALL.into_iter().filter(|way| via.is_none_or(|via| via == *way)) {
        let bad = dialled.bad.iter().find(|(bad, _)| *bad == way).map(|(_, reason)| reason.clone());
        let leads = bad.map_or_else(|| session.leads(asked, way), Err);
        let reason = match leads.map(|()| session.lanes(asked, way, via.is_some(), lanes)) {
            Ok(Err(Failed::Way(reason))) => {
                // Of rails some may come back.
                if way != Way::Rdma {
                    dialled.bad.push((way, reason.clone()));
                }
                reason
            }
            Ok(made) => return made,
            Err(reason) => reason,
        };
        reasons.push(format!("{way}: {reason}"));
    }
    Err(Failed::Way(format!("no way leads there ({})", reasons.join("; "))))
}

/// Connects by one provider's own handshake.
fn direct(host: &Host, address: &Address, lane: Spec<'_>, timeout: Duration) -> Result<Made, Error> {
    let way = match address {
        Address::Shm(_) => Way::Shm,
        Address::Rdma { .. } => Way::Rdma,
        _ => Way::Tcp,
    };
    let none = || host.lane_error(way);
    if host.0.sessions || !host.has(way) {
        let provider = Way::ALL.into_iter().find(|way| host.has(*way)).map_or("fervor", Way::name);
        return Err(Error::WrongProvider { address: address.to_string(), provider });
    }
    let LaneSpec { endpoint, private_data, depth } = lane;
    let (route, lane, reply) = match way {
        Way::Shm => {
            let spec = LaneSpec { endpoint: &endpoint.shm()?, private_data, depth };
            let made = host.0.shm.as_ref().ok_or_else(none)?.connect_with(address, spec, timeout)?;
            (Route::Shm, Lane::Shm(made.0), made.1)
        }
        Way::Tcp => {
            let spec = LaneSpec { endpoint: &endpoint.tcp()?, private_data, depth };
            let made = host.0.tcp.as_ref().ok_or_else(none)?.connect_with(address, spec, timeout)?;
            (Route::Tcp, Lane::Tcp(made.0), made.1)
        }
        #[cfg(feature = "rdma")]
        Way::Rdma => {
            let spec = LaneSpec { endpoint: &endpoint.rail(0)?, private_data, depth };
            let made = host.0.rails.get(0).ok_or_else(none)?.connect_with(address, spec, timeout)?;
            (Route::Rail(0), Lane::Rdma(made.0), made.1)
        }
        #[cfg(not(feature = "rdma"))]
        Way::Rdma => return Err(none()),
    };
    Ok((HostConnection::new(host, lane, route, PeerRegions::default())?, reply))
}
