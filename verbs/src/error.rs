//! What can go wrong before data flows: the call, the values, the cure.
//!
//! Faults of a connection that carries data are not here: they are values in a
//! [`Completion`](crate::transport::Completion).

use std::io;

use crate::memory::Shortage;

/// A call of the transport that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A URL that names no server.
    #[error(
        "`{url}` is not an address: {reason} (fervor://host:port, shm:///path/to/socket, rdma://host:port or tcp://host:port)"
    )]
    BadAddress {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// What is given as a pre-shared key is none.
    #[error("bad key: {0}")]
    BadKey(String),
    /// The other end of a session does not talk to this one.
    #[error("`{address}` opens no session: {reason}")]
    NoSession {
        /// The address.
        address: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// The address is of another provider than the one it was given to.
    #[error("`{address}` is not an address of the {provider} transport")]
    WrongProvider {
        /// The address.
        address: String,
        /// The provider that was asked.
        provider: &'static str,
    },
    /// Somebody else listens there.
    #[error("`{address}` is in use: another server listens there; stop it or choose another address")]
    AddressInUse {
        /// The address.
        address: String,
    },
    /// Nobody listens there, or the network does not lead there.
    #[error("cannot reach `{address}`: {reason}; is the server running there?")]
    Unreachable {
        /// The address.
        address: String,
        /// What the system said.
        reason: String,
    },
    /// The listener is a process of another user, or admits only processes of another user.
    #[error(
        "`{address}` is of user {peer}, and this process is of user {own}: shared memory connects processes of one user; \
         run both as the same user, or use tcp://"
    )]
    OtherUser {
        /// The address.
        address: String,
        /// The effective user of this process.
        own: u32,
        /// The user of the listener.
        peer: u32,
    },
    /// The listener refused the connection.
    #[error("`{address}` refused the connection")]
    Refused {
        /// The address.
        address: String,
        /// The private data of the refusal.
        private_data: Vec<u8>,
    },
    /// No answer in time.
    #[error("{what} took longer than {seconds} s")]
    Timeout {
        /// What was waited for.
        what: String,
        /// The limit.
        seconds: f64,
    },
    /// A library that the provider loads at run time is not installed.
    #[error("cannot load {library}: {reason}; install it with `apt-get install {package}`, or use shm://")]
    MissingLibrary {
        /// File name of the library.
        library: &'static str,
        /// What the loader said.
        reason: String,
        /// Package of Debian and Ubuntu that has it.
        package: &'static str,
    },
    /// There is no RDMA device.
    #[error("no RDMA device: {reason}; `fervor-bench devices` lists what there is")]
    NoDevice {
        /// What was looked for.
        reason: String,
    },
    /// Memory cannot be pinned.
    #[error(
        "cannot register {bytes} bytes: the memlock limit is {limit} bytes; raise it with `ulimit -l unlimited` \
         (or `LimitMEMLOCK=infinity` in a systemd unit), or ask for less memory"
    )]
    Memlock {
        /// Size of the region.
        bytes: u64,
        /// The limit in force.
        limit: u64,
    },
    /// Memory was to lie on huge pages, and there are not enough.
    #[error("{0}")]
    HugePages(Shortage),
    /// A value is beyond what the provider or the device can do.
    #[error("{what} is {value}, but at most {limit} is possible{cure}")]
    Limit {
        /// What was asked for.
        what: String,
        /// The value asked for.
        value: u64,
        /// The greatest possible.
        limit: u64,
        /// What to do about it, led by "; ", or empty.
        cure: String,
    },
    /// A system or library call failed in a way that has no better name here.
    #[error("{call} failed: {source}")]
    System {
        /// The call with its arguments.
        call: String,
        /// What it said.
        source: io::Error,
    },
}

impl Error {
    /// The last OS error (`errno`) as the failure of `call`.
    pub fn last_os(call: impl Into<String>) -> Self {
        Self::System { call: call.into(), source: io::Error::last_os_error() }
    }

    /// An I/O error as the failure of `call`.
    pub fn io(call: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let call = call.into();
        move |source| Self::System { call, source }
    }
}
