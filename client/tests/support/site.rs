//! Servers over shared memory, for the time of a test.

use fervor_client::{Client, ClientOptions, Error};
use fervor_server::{Config, Server};
use fervor_verbs::{Address, transport::any::Host};

use super::{Folder, config};

/// One server or several, and the way to them.
pub struct Site {
    pub host: Host,
    pub addresses: Vec<Address>,
    servers: Vec<Server<Host>>,
    _folder: Folder,
}

impl Site {
    /// One server of `shards` shards, as [`config`] has it.
    pub fn new(test: &str, shards: usize) -> Self {
        Self::with(test, 1, shards, |_, _| {})
    }

    /// `servers` servers of `shards` shards each, of which `change` changes the configurations, by number.
    pub fn with(test: &str, servers: usize, shards: usize, change: impl Fn(usize, &mut Config)) -> Self {
        let folder = Folder::new(test);
        let addresses: Vec<_> =
            (0..servers).map(|number| folder.address(&format!("{number}.sock"))).collect();
        let host = Host::for_addresses(&addresses).unwrap();
        let start = |(number, address)| {
            let mut config = config(address, shards);
            config.id = number as u64;
            change(number, &mut config);
            Server::start(&host, &config).unwrap()
        };
        let servers = addresses.iter().enumerate().map(start).collect();
        Self { host, addresses, servers, _folder: folder }
    }

    /// A client of all of them, which may be refused.
    pub fn try_client(&self, options: ClientOptions) -> Result<Client, Error> {
        Client::connect_on(&self.host, &self.addresses, options)
    }

    /// A client of all of them.
    pub fn client(&self, options: ClientOptions) -> Client {
        self.try_client(options).unwrap()
    }

    /// Stops them: none may have panicked.
    pub fn stop(self) {
        assert!(self.servers.into_iter().all(Server::stop));
    }
}

/// Of a client that reads in place, or copies.
pub fn options(copies: bool) -> ClientOptions {
    ClientOptions { copies, ..ClientOptions::default() }
}
