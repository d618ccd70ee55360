//! A worker's own connections for READs: one for each shard. The worker posts and polls these READs itself.
//!
//! No other thread is involved, at the client or at the server (invariant 1). A READ's buffer is a *place* in
//! the scratch memory. A place is free again when its READ has completed and its data has been taken.

use std::time::Duration;

use fervor_protocol::{limits::ROW_HEADER, row::Header, wire::Hello};
use fervor_verbs::{
    Memory,
    transport::{
        Access, Completion, Connection, ConnectionId, Endpoint, EndpointConfig, PostError, Region,
        RemoteAddress, Sge, Transport,
    },
};
use zerocopy::IntoBytes;

use crate::{connect::connect_one, error::Error, session::core::Core};

const NAP: Duration = Duration::from_millis(1);

/// See the module.
pub struct Reader<T: Transport> {
    endpoint: T::Endpoint,
    connections: Vec<T::Connection>,
    ids: Vec<ConnectionId>,
    scratch: T::Region,
    places: usize,
    /// Bytes from one place of the scratch memory to the next.
    place_bytes: usize,
    completions: Vec<Completion>,
}

impl<T: Transport> Reader<T> {
    /// Connects to every shard.
    ///
    /// # Errors
    /// A server is lost, or has no place for one more.
    pub fn connect(core: &Core<T>) -> Result<Self, Error> {
        let places = core.options.reads_in_flight.max(1);
        let config = EndpointConfig {
            receive_buffers: 1,
            receive_size: 64,
            send_depth: places.max(16),
            read_depth: places.min(16),
            connections: core.links.len(),
            completion_vector: 0,
        };
        let endpoint = core.transport.endpoint(&config)?;
        let mut reader = Self {
            scratch: scratch(&core.transport, places, 4096)?,
            connections: Vec::new(),
            ids: Vec::new(),
            places,
            place_bytes: 4096,
            completions: Vec::new(),
            endpoint,
        };
        for link in &core.links {
            let hello = Hello::reader(link.shard);
            let attach = reader.endpoint.attach();
            let (connection, _) = connect_one(
                &core.transport,
                &attach,
                &link.address,
                hello.as_bytes(),
                core.options.connect_timeout,
            )?;
            reader.ids.push(connection.id());
            reader.connections.push(connection);
        }
        Ok(reader)
    }

    /// Rows that can be in flight at a time.
    pub fn places(&self) -> usize {
        self.places
    }

    /// Whether images with `bytes` bytes of data fit the places.
    pub fn fits(&self, bytes: usize) -> bool {
        ROW_HEADER + bytes <= self.place_bytes
    }

    /// Sees to it that images with `bytes` bytes of data fit the places, of which none is in use.
    ///
    /// # Errors
    /// No such memory.
    pub fn fit(&mut self, transport: &T, bytes: usize) -> Result<(), Error> {
        let bytes = (ROW_HEADER + bytes).next_multiple_of(64);
        if bytes > self.place_bytes {
            self.scratch = scratch(transport, self.places, bytes)?;
            self.place_bytes = bytes;
        }
        Ok(())
    }

    /// Posts the READ of an image with `bytes` bytes of data into `place`.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn post(
        &mut self,
        shard: usize,
        place: usize,
        remote: RemoteAddress,
        bytes: usize,
    ) -> Result<(), PostError> {
        let piece =
            Sge { region: &self.scratch, offset: place * self.place_bytes, length: ROW_HEADER + bytes };
        self.connections[shard].read(&[piece], remote, Some(place as u64))
    }

    /// Rings for what was posted to `shard`.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn ring(&mut self, shard: usize) -> Result<(), PostError> {
        self.connections[shard].ring()
    }

    /// Waits until `count` READs have completed, however long that takes. `each` is told the place of each.
    ///
    /// # Errors
    /// A server is lost.
    pub fn wait(
        &mut self,
        core: &Core<T>,
        mut count: usize,
        mut each: impl FnMut(usize),
    ) -> Result<(), Error> {
        let mut turn = 0;
        while count > 0 {
            if self.endpoint.poll(&mut self.completions) == 0 {
                if turn < T::AWAKE_TURNS {
                    core.transport.relax(turn);
                } else {
                    self.endpoint.wait(NAP);
                }
                turn = turn.saturating_add(1);
                continue;
            }
            for completion in self.completions.drain(..) {
                match completion {
                    Completion::Work { id, result: Ok(()), .. } => {
                        count = count.saturating_sub(1);
                        each(id as usize);
                    }
                    // The cause follows.
                    Completion::Work { result: Err(_), .. } => {}
                    Completion::Disconnected { connection, cause } => {
                        let shard = self.ids.iter().position(|id| *id == connection).expect("one of ours");
                        return Err(core.lost(shard, cause));
                    }
                    // The server sends nothing here.
                    Completion::Received { buffer, .. } => self.endpoint.release(buffer),
                    Completion::WriteImmediate { .. } => {}
                }
            }
        }
        Ok(())
    }

    /// The image that was READ into `place`: the header, and the data into `data`.
    pub fn take(&self, place: usize, data: &mut [u8]) -> Header {
        let mut header = Header::default();
        let offset = place * self.place_bytes;
        self.scratch.memory().read(offset, header.as_mut_bytes());
        self.scratch.memory().read(offset + ROW_HEADER, data);
        header
    }
}

fn scratch<T: Transport>(transport: &T, places: usize, bytes: usize) -> Result<T::Region, Error> {
    let memory = Memory::new("fervor-scratch", places * bytes)?;
    Ok(transport.register(&memory, Access::Local)?)
}
