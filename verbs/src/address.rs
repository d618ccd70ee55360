//! Addresses of servers, written as URLs.

use std::{fmt, path::PathBuf, str::FromStr};

use crate::{error::Error, session::Way};

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// `fervor://host:port`: a session over TCP, and then data by the best way that leads there: shared memory, RDMA or TCP. With
    /// `?via=shm`, `?via=rdma` or `?via=tcp` by that way alone.
    Session {
        /// Name or address of the host.
        host: String,
        /// The port.
        port: u16,
        /// The way that is insisted on.
        via: Option<Way>,
    },
    /// `shm:///path/to/socket`: a Unix socket on this host; data moves through shared memory.
    Shm(PathBuf),
    /// `rdma://host:port`: InfiniBand or RoCE. Connections are made over TCP, at that address. A client may add
    /// `?from=ADDRESS` to choose the local address (and with it the device) that it connects from.
    Rdma {
        /// Name or address of the host.
        host: String,
        /// The TCP port.
        port: u16,
        /// Local address to connect from.
        from: Option<String>,
    },
    /// `tcp://host:port`: TCP, where there is no RDMA.
    Tcp {
        /// Name or address of the host.
        host: String,
        /// The port.
        port: u16,
    },
    /// `sim://name`: a node of a simulation, which lives inside one process.
    Sim(String),
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(url: &str) -> Result<Self, Error> {
        let bad = |reason: &str| Error::BadAddress { url: url.to_owned(), reason: reason.to_owned() };
        let Some((scheme, rest)) = url.split_once("://") else {
            return Err(bad(
                "it has no scheme; write fervor://host:port, shm:///path/to/socket, rdma://host:port or tcp://host:port",
            ));
        };
        match scheme {
            "fervor" => {
                let (endpoint, via) = match rest.split_once("?via=") {
                    Some((endpoint, name)) => match Way::from_name(name) {
                        Some(way) => (endpoint, Some(way)),
                        None => {
                            return Err(bad(
                                "?via= names no way; write ?via=shm, ?via=rdma or ?via=tcp, or leave it out",
                            ));
                        }
                    },
                    None => (rest, None),
                };
                let (host, port) = host_and_port(endpoint)
                    .map_err(|what| bad(&format!("{what}; write fervor://host:port")))?;
                Ok(Address::Session { host, port, via })
            }
            "shm" if rest.starts_with('/') && rest.len() > 1 => Ok(Address::Shm(rest.into())),
            "shm" => Err(bad("the path of a shm URL is absolute: shm:///path/to/socket")),
            "rdma" => {
                let (endpoint, from) = match rest.split_once("?from=") {
                    Some((endpoint, from)) if !from.is_empty() => (endpoint, Some(from.to_owned())),
                    Some(_) => {
                        return Err(bad(
                            "?from= names no address; write ?from=ADDRESS of a local device, or leave it out",
                        ));
                    }
                    None => (rest, None),
                };
                let (host, port) = host_and_port(endpoint)
                    .map_err(|what| bad(&format!("{what}; write rdma://host:port")))?;
                Ok(Address::Rdma { host, port, from })
            }
            "tcp" => {
                let (host, port) =
                    host_and_port(rest).map_err(|what| bad(&format!("{what}; write tcp://host:port")))?;
                Ok(Address::Tcp { host, port })
            }
            "sim" if !rest.is_empty() => Ok(Address::Sim(rest.to_owned())),
            _ => Err(bad(
                "the scheme is unknown; Fervor has fervor://host:port, shm:///path/to/socket, rdma://host:port and tcp://host:port",
            )),
        }
    }
}

/// The two parts of `host:port`, where the host may be `[IPv6]`.
fn host_and_port(text: &str) -> Result<(String, u16), &'static str> {
    let (host, port) = text.rsplit_once(':').ok_or("it has no port")?;
    let port = port.parse().map_err(|_| "the port is not a number from 0 to 65535")?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() { Err("it has no host") } else { Ok((host.to_owned(), port)) }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Session { host, port, via } => {
                write!(f, "fervor://{}:{port}", Bracketed(host))?;
                via.map_or(Ok(()), |via| write!(f, "?via={via}"))
            }
            Address::Shm(path) => write!(f, "shm://{}", path.display()),
            Address::Tcp { host, port } => write!(f, "tcp://{}:{port}", Bracketed(host)),
            Address::Rdma { host, port, from } => {
                write!(f, "rdma://{}:{port}", Bracketed(host))?;
                from.as_ref().map_or(Ok(()), |from| write!(f, "?from={from}"))
            }
            Address::Sim(name) => write!(f, "sim://{name}"),
        }
    }
}

/// A host as a URL has it: an IPv6 address in brackets.
struct Bracketed<'a>(&'a str);

impl fmt::Display for Bracketed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.contains(':') { write!(f, "[{}]", self.0) } else { f.write_str(self.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_round_trip() {
        for url in [
            "fervor://a:7471",
            "fervor://[::1]:7471?via=tcp",
            "shm:///tmp/a",
            "rdma://10.7.0.1:7471",
            "rdma://[::1]:1?from=::2",
            "tcp://a:1",
            "tcp://[::1]:7471",
            "sim://a",
        ] {
            assert_eq!(url.parse::<Address>().unwrap().to_string(), url);
        }
    }

    #[test]
    fn bad_addresses_are_refused_with_the_value_and_the_cure() {
        for url in [
            "",
            "udp://a:1",
            "fervor://a",
            "fervor://a:1?via=udp",
            "shm://a",
            "shm:///",
            "rdma://a",
            "rdma://:1",
            "rdma://a:99999",
            "tcp://a",
            "tcp://:1",
            "tcp://a:b",
            "sim://",
        ] {
            let message = url.parse::<Address>().unwrap_err().to_string();
            assert!(message.contains(&format!("`{url}`")), "{message}");
            assert!(message.contains("://"), "no cure in: {message}");
        }
    }
}
