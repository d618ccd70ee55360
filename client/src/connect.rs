//! Finding the shards of a job, and connecting to one.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use fervor_protocol::{
    limits::{CLIENT_RECEIVES, CONTROL_BYTES, MAX_SHARDS},
    wire::{Hello, Refusal, Welcome},
};
use fervor_verbs::{
    Address, Error as TransportError,
    transport::{Connection, Endpoint, EndpointConfig, LaneSpec, RemoteRegion, Transport},
};
use zerocopy::IntoBytes;

use crate::{error::Error, options::ClientOptions};

/// The shards of the servers, in the order that all clients of the job see.
///
/// # Errors
/// A server is not there, or named twice; too many shards.
pub fn find_shards<T: Transport>(
    transport: &T,
    addresses: &[Address],
    options: &ClientOptions,
) -> Result<Vec<(Address, u16)>, Error> {
    let config = EndpointConfig {
        receive_buffers: 1,
        receive_size: 64,
        send_depth: 16,
        read_depth: 1,
        connections: addresses.len(),
        completion_vector: next_completion_vector(),
        core: None,
    };
    let endpoint = transport.endpoint(&config)?;
    let mut servers: Vec<(u64, &Address, u16)> = Vec::new();
    for address in addresses {
        let hello = Hello::reader(0);
        let (mut connection, welcome) =
            connect_one(transport, &endpoint.attach(), address, hello.as_bytes(), options.connect_timeout)?;
        connection.disconnect();
        if let Some((_, other, _)) = servers.iter().find(|(server, ..)| *server == welcome.server) {
            return Err(Error::Servers(format!("{other} and {address} are one server: name each once")));
        }
        servers.push((welcome.server, address, welcome.shards));
    }
    servers.sort_unstable_by_key(|(server, ..)| *server);
    let shards: Vec<_> = servers
        .into_iter()
        .flat_map(|(_, address, shards)| (0..shards).map(move |shard| (address.clone(), shard)))
        .collect();
    if shards.is_empty() || shards.len() > MAX_SHARDS {
        return Err(Error::Servers(format!(
            "the servers have {} shards together: 1 to {MAX_SHARDS} are possible; name fewer or more servers",
            shards.len()
        )));
    }
    Ok(shards)
}

/// The completion vector of the next endpoint: each endpoint of this process has its interrupts at another processor, and another process
/// begins elsewhere.
pub fn next_completion_vector() -> usize {
    static MADE: AtomicUsize = AtomicUsize::new(0);
    (std::process::id() as usize).wrapping_add(MADE.fetch_add(1, Ordering::Relaxed))
}

/// The handshake of a client's main connection to a shard, with its identity and the memory that the shard may write.
pub fn main_hello(
    options: &ClientOptions,
    region: &RemoteRegion,
    identity: u64,
    (shard, control): (u16, usize),
) -> Hello {
    const _: () =
        assert!(CLIENT_RECEIVES <= u16::MAX as usize && MAX_SHARDS * CONTROL_BYTES <= u32::MAX as usize);
    let mut hello = Hello::main(shard);
    hello.clients = options.clients;
    hello.observes = options.observer.into();
    (hello.key, hello.address, hello.length) = (region.key, region.address, region.length);
    hello.control = control as u32;
    hello.receives = CLIENT_RECEIVES as u16;
    hello.identity = identity;
    hello
}

/// The main connections of a client to all shards, in their order: all those to one server at once.
///
/// # Errors
/// A server is not there, or refuses. What was made is dropped then.
pub fn connect_mains<T: Transport>(
    transport: &T,
    attach: &T::Attach,
    options: &ClientOptions,
    (region, identity): (&RemoteRegion, u64),
    shards: &[(Address, u16)],
) -> Result<Vec<(T::Connection, Welcome)>, Error> {
    let mut made = Vec::with_capacity(shards.len());
    for server in shards.chunk_by(|(one, _), (other, _)| one == other) {
        let address = &server[0].0;
        let numbers = made.len()..;
        let hello = |(number, (_, shard)): (usize, &(Address, u16))| {
            main_hello(options, region, identity, (*shard, number * CONTROL_BYTES))
        };
        let hellos: Vec<Hello> = numbers.zip(server).map(hello).collect();
        let lanes: Vec<_> = hellos.iter().map(|hello| LaneSpec::new(attach, hello.as_bytes())).collect();
        let connected = transport.connect_all(address, &lanes, options.connect_timeout);
        for (connection, answer) in connected.map_err(|error| failed(address, error))? {
            let welcome = Welcome::parse(&answer).map_err(|reason| refused(address, reason))?;
            made.push((connection, welcome));
        }
    }
    Ok(made)
}

/// Connects, with a handshake.
///
/// # Errors
/// Nobody is there, or refuses.
pub fn connect_one<T: Transport>(
    transport: &T,
    attach: &T::Attach,
    address: &Address,
    hello: &[u8],
    timeout: Duration,
) -> Result<(T::Connection, Welcome), Error> {
    attempt(transport, attach, address, hello, timeout).map_err(Error::from)
}

/// Why a connection was not made.
pub enum Unmade {
    /// The server does not answer.
    Gone(TransportError),
    /// It refuses, or this side cannot.
    Refused(Error),
}

/// Connects to a shard for READs.
///
/// # Errors
/// The server is gone, or refuses.
pub fn connect_lane<T: Transport>(
    transport: &T,
    attach: &T::Attach,
    address: &Address,
    shard: u16,
    timeout: Duration,
) -> Result<T::Connection, Unmade> {
    attempt(transport, attach, address, Hello::reader(shard).as_bytes(), timeout)
        .map(|(connection, _)| connection)
}

fn attempt<T: Transport>(
    transport: &T,
    attach: &T::Attach,
    address: &Address,
    hello: &[u8],
    timeout: Duration,
) -> Result<(T::Connection, Welcome), Unmade> {
    let made = transport.connect(attach, address, hello, timeout);
    let (connection, answer) = made.map_err(|error| match error {
        TransportError::Unreachable { .. } | TransportError::Timeout { .. } => Unmade::Gone(error),
        error => Unmade::Refused(failed(address, error)),
    })?;
    let welcome = Welcome::parse(&answer).map_err(|reason| Unmade::Refused(refused(address, reason)))?;
    Ok((connection, welcome))
}

impl From<Unmade> for Error {
    fn from(unmade: Unmade) -> Self {
        match unmade {
            Unmade::Gone(cause) => cause.into(),
            Unmade::Refused(error) => error,
        }
    }
}

fn refused(address: &Address, reason: String) -> Error {
    Error::Refused { address: address.to_string(), reason }
}

/// What it means that nothing was connected.
fn failed(address: &Address, error: TransportError) -> Error {
    match error {
        TransportError::Refused { private_data, .. } => refused(address, Refusal::parse(&private_data).0),
        error => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_that_follow_each_other_have_different_vectors() {
        let vectors: Vec<_> = (0..4).map(|_| next_completion_vector() % 1024).collect();
        let different: std::collections::BTreeSet<_> = vectors.iter().collect();
        assert_eq!(different.len(), 4, "{vectors:?}");
    }
}
