//! Finding the shards of a job, and connecting to one.

use std::time::Duration;

use fervor_protocol::{
    limits::{CLIENT_RECEIVES, CONTROL_BYTES, MAX_SHARDS},
    wire::{Hello, Refusal, Welcome},
};
use fervor_verbs::{
    Address, Error as TransportError,
    transport::{Connection, Endpoint, EndpointConfig, RemoteRegion, Transport},
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
        completion_vector: 0,
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
    (hello.key, hello.address, hello.length) = (region.key, region.address, region.length);
    hello.control = control as u32;
    hello.receives = CLIENT_RECEIVES as u16;
    hello.identity = identity;
    hello
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
    attempt(transport, attach, address, hello, timeout).map_err(|unmade| match unmade {
        Unmade::Gone(cause) => cause.into(),
        Unmade::Refused(error) => error,
    })
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
    let refused = |reason: String| Unmade::Refused(Error::Refused { address: address.to_string(), reason });
    let (connection, answer) =
        transport.connect(attach, address, hello, timeout).map_err(|error| match error {
            TransportError::Refused { private_data, .. } => refused(Refusal::parse(&private_data).0),
            TransportError::Unreachable { .. } | TransportError::Timeout { .. } => Unmade::Gone(error),
            error => Unmade::Refused(error.into()),
        })?;
    Ok((connection, Welcome::parse(&answer).map_err(refused)?))
}
