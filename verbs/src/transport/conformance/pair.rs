//! Two hosts and the connections between them, as most cases need them.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use super::{Rig, Side};
use crate::{
    memory::Memory,
    transport::{
        Access, Completion, Connection, ConnectionId, Endpoint, EndpointConfig, Listener, PostError, Region,
        RemoteRegion, Request, Runtime, Sge, Thread, Transport, WorkError,
    },
};

pub(crate) type End<R> = <<R as Rig>::Transport as Transport>::Connection;
pub(crate) type RegionOf<R> = <<R as Rig>::Transport as Transport>::Region;

/// How long a case waits for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A host: its transport, its endpoint, and what was polled but not looked at.
pub(crate) struct Host<T: Transport> {
    pub(crate) transport: T,
    pub(crate) endpoint: T::Endpoint,
    seen: VecDeque<Completion>,
    batch: Vec<Completion>,
}

impl<T: Transport> Host<T> {
    pub(crate) fn new(transport: T, config: &EndpointConfig) -> Self {
        let endpoint = transport.endpoint(config).expect("endpoint");
        Self { transport, endpoint, seen: VecDeque::new(), batch: Vec::new() }
    }

    /// Polls once, and returns how much is there to look at.
    pub(crate) fn poll(&mut self) -> usize {
        let before = self.batch.len();
        let count = self.endpoint.poll(&mut self.batch);
        assert_eq!(self.batch.len() - before, count, "poll appended another number than it returned");
        self.seen.extend(self.batch.drain(..));
        self.seen.len()
    }

    /// The next completion that was polled.
    pub(crate) fn take(&mut self) -> Option<Completion> {
        self.seen.pop_front()
    }
}

/// Two hosts, `Side::Client` and `Side::Server`, and connections between them. Connection number `n` of one
/// is the other end of number `n` of the other.
pub(crate) struct Pair<'r, R: Rig> {
    rig: &'r R,
    pub(crate) client: Host<R::Transport>,
    pub(crate) server: Host<R::Transport>,
    pub(crate) to_server: Vec<End<R>>,
    pub(crate) to_client: Vec<End<R>>,
    listener: Option<<R::Transport as Transport>::Listener>,
}

impl<'r, R: Rig> Pair<'r, R> {
    /// Two hosts without a connection.
    pub(crate) fn new(rig: &'r R, client: &EndpointConfig, server: &EndpointConfig) -> Self {
        Self {
            rig,
            client: Host::new(rig.host(Side::Client), client),
            server: Host::new(rig.host(Side::Server), server),
            to_server: Vec::new(),
            to_client: Vec::new(),
            listener: None,
        }
    }

    /// Two hosts of this configuration.
    pub(crate) fn alike(rig: &'r R, config: &EndpointConfig) -> Self {
        Self::new(rig, config, config)
    }

    /// Makes one more connection. Regions are registered before.
    pub(crate) fn connect(&mut self) {
        self.connect_with(usize::MAX);
    }

    /// The same, with a send queue of so many requests at the server.
    pub(crate) fn connect_with(&mut self, depth: usize) {
        let mut listener = match self.listener.take() {
            Some(listener) => listener,
            None => self.server.transport.listen(&self.rig.address(0)).expect("listen"),
        };
        let address = self.rig.dial(listener.address());
        let attach = self.server.endpoint.attach();
        let accept = Background::start(&self.server.transport, move || {
            let request = listener.accept(PATIENCE).expect("accept").expect("nobody connects");
            let connection = request.accept_with(&attach, depth, b"welcome").expect("accept");
            (listener, connection)
        });
        let client = &self.client;
        let (to_server, answer) = client
            .transport
            .connect(&client.endpoint.attach(), &address, b"hello", PATIENCE)
            .expect("connect");
        assert_eq!(answer, b"welcome");
        let (listener, to_client) = accept.join();
        self.to_server.push(to_server);
        self.to_client.push(to_client);
        self.listener = Some(listener);
    }

    /// Stops listening, until the next [`Pair::connect`].
    pub(crate) fn stop_listening(&mut self) {
        drop(self.listener.take().expect("a listener"));
    }

    pub(crate) fn host(&mut self, side: Side) -> &mut Host<R::Transport> {
        match side {
            Side::Client => &mut self.client,
            Side::Server => &mut self.server,
        }
    }

    /// The end of connection 0 that this side posts to.
    pub(crate) fn end(&mut self, side: Side) -> &mut End<R> {
        match side {
            Side::Client => &mut self.to_server[0],
            Side::Server => &mut self.to_client[0],
        }
    }

    /// New memory of a host, registered and filled with `0xee`.
    pub(crate) fn region(&self, side: Side, len: usize, access: Access) -> RegionOf<R> {
        let host = match side {
            Side::Client => &self.client,
            Side::Server => &self.server,
        };
        let memory = Memory::new("conformance", len).expect("memory");
        memory.write(0, &vec![0xee; len]);
        host.transport.register(&memory, access).expect("register")
    }

    /// Polls both hosts until `done` finds what it looks for in `self`.
    ///
    /// # Panics
    /// When it takes longer than [`PATIENCE`].
    pub(crate) fn until<X>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<X>) -> X {
        let deadline = self.client.transport.now() + PATIENCE;
        let mut turn = 0;
        loop {
            self.client.poll();
            self.server.poll();
            if let Some(found) = done(self) {
                return found;
            }
            assert!(self.client.transport.now() < deadline, "waited {PATIENCE:?} for {what}");
            self.client.transport.relax(turn);
            turn += 1;
        }
    }

    /// Waits until all of the client's connections have room: what has arrived at the server may still be in a send queue.
    pub(crate) fn until_room(&mut self) {
        self.until("room in the send queues", |pair| {
            pair.to_server.iter().all(|end| end.room() > 0).then_some(())
        });
    }

    /// The next completion of this side.
    pub(crate) fn next(&mut self, side: Side) -> Completion {
        self.until("a completion", |pair| pair.host(side).take())
    }

    /// Expects that request `id` is the next to complete at this side, and that it succeeds.
    pub(crate) fn work(&mut self, side: Side, id: u64) {
        match self.next(side) {
            Completion::Work { id: found, result: Ok(()), .. } if found == id => (),
            other => panic!("expected the completion of request {id}, found {other:?}"),
        }
    }

    /// Expects a message next at this side; releases its buffer.
    pub(crate) fn message(&mut self, side: Side) -> (ConnectionId, Vec<u8>, Option<u32>) {
        match self.next(side) {
            Completion::Received { connection, buffer, immediate } => {
                let endpoint = &mut self.host(side).endpoint;
                let message = endpoint.message(&buffer).to_vec();
                assert_eq!((message.len(), message.is_empty()), (buffer.len(), buffer.is_empty()));
                endpoint.release(buffer);
                (connection, message, immediate)
            }
            other => panic!("expected a message, found {other:?}"),
        }
    }

    /// Expects a WRITE with immediate next at this side.
    pub(crate) fn immediate(&mut self, side: Side) -> u32 {
        match self.next(side) {
            Completion::WriteImmediate { immediate, .. } => immediate,
            other => panic!("expected a WRITE with immediate, found {other:?}"),
        }
    }

    /// Expects that connection `connection` ends at this side, and that all that comes before are messages,
    /// immediates and completions of it; returns the latter in order, with the cause of the end.
    pub(crate) fn end_of(&mut self, side: Side, connection: ConnectionId) -> (Vec<Work>, WorkError) {
        let mut works = Vec::new();
        loop {
            match self.next(side) {
                Completion::Work { connection: of, id, result } => {
                    assert_eq!(of, connection);
                    works.push((id, result));
                }
                Completion::Received { connection: of, buffer, .. } => {
                    assert_eq!(of, connection);
                    self.host(side).endpoint.release(buffer);
                }
                Completion::WriteImmediate { connection: of, .. } => assert_eq!(of, connection),
                Completion::Disconnected { connection: of, cause } => {
                    assert_eq!(of, connection);
                    return (works, cause);
                }
            }
        }
    }

    /// Expects that for a while nothing more completes at either side.
    pub(crate) fn silence(&mut self) {
        let start = self.client.transport.now();
        let mut turn = 0;
        while self.client.transport.now() < start + Duration::from_millis(20) {
            self.client.poll();
            self.server.poll();
            for side in [Side::Client, Side::Server] {
                if let Some(more) = self.host(side).take() {
                    panic!("expected no more completions at the {side:?}, found {more:?}");
                }
            }
            self.client.transport.relax(turn);
            turn += 1;
        }
    }

    /// Expects that every kind of post to this side's end of connection 0 is refused as disconnected.
    pub(crate) fn posts_are_refused(&mut self, side: Side, remote: RemoteRegion) {
        let own = self.region(side, 64, Access::Local);
        refused_as_disconnected(self.end(side), &own, remote);
    }
}

/// Expects that every kind of post is refused as disconnected.
pub(crate) fn refused_as_disconnected<C: Connection>(end: &mut C, own: &C::Region, remote: RemoteRegion) {
    use crate::transport::Payload::Inline;
    let piece = [Sge { region: own, offset: 0, length: 8 }];
    assert_eq!(end.send(Inline(b"late"), None, Some(900)), Err(PostError::Disconnected));
    assert_eq!(end.write(Inline(b"late"), remote.at(0), None, Some(901)), Err(PostError::Disconnected));
    assert_eq!(end.write(Inline(b"late"), remote.at(0), Some(1), None), Err(PostError::Disconnected));
    assert_eq!(end.read(&piece, remote.at(0), Some(902)), Err(PostError::Disconnected));
    assert_eq!(end.ring(), Err(PostError::Disconnected));
}

/// The id and the result of a request.
pub(crate) type Work = (u64, Result<(), WorkError>);

/// A helper thread with a result.
pub(crate) struct Background<T: Transport, X> {
    thread: T::Thread,
    result: Arc<Mutex<Option<X>>>,
}

impl<T: Transport, X: Send + 'static> Background<T, X> {
    pub(crate) fn start(transport: &T, body: impl FnOnce() -> X + Send + 'static) -> Self {
        let result = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&result);
        let body = move || {
            let value = body();
            *slot.lock().expect("the slot of the result") = Some(value);
        };
        Self { thread: transport.spawn("helper", None, body).expect("spawn"), result }
    }

    /// Whether it has its result.
    pub(crate) fn is_done(&self) -> bool {
        self.result.lock().expect("the slot of the result").is_some()
    }

    pub(crate) fn join(self) -> X {
        assert!(self.thread.join(), "the helper thread panicked");
        self.result
            .lock()
            .expect("the slot of the result")
            .take()
            .expect("a thread that ended well has a result")
    }
}

/// `len` bytes that look like no other bytes; the same for the same seed.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Bytes of a region.
pub(crate) fn bytes(region: &impl Region, offset: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    region.memory().read(offset, &mut bytes);
    bytes
}

/// One piece: `len` bytes of a region from `offset` on.
pub(crate) fn piece<R>(region: &R, offset: usize, length: usize) -> Sge<'_, R> {
    Sge { region, offset, length }
}

/// A region's name as the bytes of a message.
pub(crate) fn encode(region: RemoteRegion) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[..8].copy_from_slice(&region.address.to_le_bytes());
    bytes[8..16].copy_from_slice(&region.length.to_le_bytes());
    bytes[16..].copy_from_slice(&region.key.to_le_bytes());
    bytes
}

/// A region's name from the bytes of a message.
pub(crate) fn decode(bytes: &[u8]) -> RemoteRegion {
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let key = u32::from_le_bytes(bytes[16..20].try_into().expect("4 bytes"));
    RemoteRegion { address: word(0), length: word(8), key }
}
