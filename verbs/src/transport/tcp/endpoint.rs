//! The polling side: what the engine found, and the receive buffers.

use std::{fmt, sync::Arc, thread::JoinHandle, time::Duration};

use super::{engine::Engine, link::Event, region::Registry, shared::Shared, wire::MAX_SEND_DEPTH};
use crate::{
    error::Error,
    transport::{Attach, Completion, Endpoint, EndpointConfig, ReceiveBuffer},
};

/// Completions that one poll returns at most.
const POLL_BATCH: usize = 64;
/// Bytes of a receive buffer that a length in a completion can tell.
const MAX_RECEIVE_SIZE: u64 = u32::MAX as u64;

/// The endpoint of the `tcp` provider.
pub struct TcpEndpoint {
    shared: Arc<Shared>,
    engine: Option<JoinHandle<()>>,
    /// Buffers with messages, by index.
    messages: Vec<Option<Vec<u8>>>,
    /// Indices of `messages` that are `None`.
    places: Vec<u32>,
    /// Kept for its memory.
    spent: Vec<Vec<u8>>,
}

/// The handle of a [`TcpEndpoint`] for other threads.
#[derive(Clone)]
pub struct TcpAttach(pub(super) Arc<Shared>);

impl TcpEndpoint {
    pub(super) fn new(registry: &Arc<Registry>, config: &EndpointConfig) -> Result<Self, Error> {
        let within = |what: &str, value: usize, limit: u64| {
            if value as u64 <= limit {
                return Ok(());
            }
            Err(Error::Limit { what: what.to_owned(), value: value as u64, limit, cure: String::new() })
        };
        within("`receive_size` of the endpoint", config.receive_size, MAX_RECEIVE_SIZE)?;
        within("`receive_buffers` of the endpoint", config.receive_buffers, 1 << 24)?;
        within("`send_depth` of the endpoint", config.send_depth, MAX_SEND_DEPTH)?;
        let config = EndpointConfig { send_depth: config.send_depth.max(1), ..config.clone() };
        let (messages, places) = (
            (0..config.receive_buffers).map(|_| None).collect(),
            (0..config.receive_buffers as u32).collect(),
        );
        let shared = Arc::new(Shared::new(registry, config)?);
        let engine = Engine::start(&shared)?;
        Ok(Self { shared, engine: Some(engine), messages, places, spent: Vec::new() })
    }

    /// Has `wake` called whenever there is something to poll, for a polling thread that sleeps elsewhere. Called once.
    pub(in crate::transport) fn wake_besides(&self, wake: impl Fn() + Send + Sync + 'static) {
        self.shared.wake_besides(wake);
    }

    /// Whether there may be something to poll.
    pub(in crate::transport) fn has_events(&self) -> bool {
        self.shared.has_events()
    }

    fn complete(&mut self, event: Event) -> Completion {
        match event {
            Event::Work { link, id, result } => {
                link.retire();
                Completion::Work { connection: link.id, id, result }
            }
            Event::Received { connection, buffer, length, immediate } => {
                let index = self.places.pop().expect("there are as many places as buffers");
                self.messages[index as usize] = Some(buffer);
                let buffer = ReceiveBuffer { index, length: length as u32 };
                Completion::Received { connection, buffer, immediate }
            }
            Event::WriteImmediate { connection, buffer, immediate } => {
                self.spent.push(buffer);
                Completion::WriteImmediate { connection, immediate }
            }
            Event::End { connection, cause } => Completion::Disconnected { connection, cause },
        }
    }
}

impl Endpoint for TcpEndpoint {
    type Attach = TcpAttach;

    fn attach(&self) -> TcpAttach {
        TcpAttach(self.shared.clone())
    }

    fn poll(&mut self, into: &mut Vec<Completion>) -> usize {
        if !self.shared.has_events() {
            return 0;
        }
        let shared = self.shared.clone();
        let count = shared.take_events(POLL_BATCH, |event| into.push(self.complete(event)));
        if !self.spent.is_empty() {
            shared.give_back(self.spent.drain(..));
        }
        count
    }

    fn wait(&mut self, timeout: Duration) {
        self.shared.wait(timeout);
    }

    fn message(&self, buffer: &ReceiveBuffer) -> &[u8] {
        let message = self.messages.get(buffer.index as usize).and_then(Option::as_ref);
        &message.expect("a receive buffer of another endpoint")[..buffer.length as usize]
    }

    fn release(&mut self, buffer: ReceiveBuffer) {
        let message = self.messages.get_mut(buffer.index as usize).and_then(Option::take);
        self.places.push(buffer.index);
        self.shared.give_back(std::iter::once(message.expect("a receive buffer of another endpoint")));
    }
}

impl Attach for TcpAttach {
    fn wake(&self) {
        self.0.wake();
    }
}

impl Drop for TcpEndpoint {
    fn drop(&mut self) {
        self.shared.close();
        if let Some(engine) = self.engine.take() {
            // It ends at once: it waits for nobody. It says why it panicked.
            let _ = engine.join();
        }
    }
}

impl fmt::Debug for TcpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TcpEndpoint({:?})", self.shared.config)
    }
}

impl fmt::Debug for TcpAttach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TcpAttach")
    }
}
