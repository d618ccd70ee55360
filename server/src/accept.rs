//! The control thread: accepts connections, checks handshakes, and hands connections to the pollers by mail.
//!
//! It makes the system calls that connecting takes, so that the pollers make none. A connection's first
//! message may be polled before its mail arrives; the poller keeps it until then.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::Sender,
    },
    time::Duration,
};

use fervor_protocol::{
    limits::{CLIENT_RECEIVES, LEAST_RECEIVES, MESSAGE_BYTES},
    wire::{Hello, Refusal, Role, Welcome},
};
use fervor_verbs::transport::{Attach, Listener, RemoteRegion, Request, Transport};
use zerocopy::IntoBytes;

use crate::{access::Grant, config::Config, reach::Reaches, share::Share};

/// A connection for a poller.
pub struct Mail<C> {
    pub connection: C,
    /// The handshake of a client's main connection; `None` for a reader's.
    pub hello: Option<Hello>,
    /// What the client may do.
    pub grant: Grant,
    /// A new client's place among those of its key.
    pub place: Option<Place>,
}

/// One of the places that a key has at a shard: free again when this is dropped.
#[derive(Debug)]
pub struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// The way to one poller.
pub struct Door<T: Transport> {
    pub attach: T::Attach,
    pub post: Sender<Mail<T::Connection>>,
    pub share: Arc<Share>,
    pub region: RemoteRegion,
    pub reaches: Arc<Reaches>,
}

/// The control thread's state.
pub struct Control<T: Transport> {
    doors: Vec<Door<T>>,
    id: u64,
    clients: usize,
    /// Most READ lanes of all clients together, to one shard.
    lanes: usize,
    /// Number of the message before each client's first.
    origin: u64,
    /// Clients at a shard, by key: those whose key bounds them. Counted up by this thread alone.
    keys: BTreeMap<(String, u16), Arc<AtomicUsize>>,
    stop: Arc<AtomicBool>,
}

/// How long a stop may go unnoticed.
const TURN: Duration = Duration::from_millis(50);

impl<T: Transport> Control<T> {
    pub fn new(config: &Config, doors: Vec<Door<T>>, stop: Arc<AtomicBool>) -> Self {
        let lanes = config.all_lanes();
        let (clients, origin) = (config.clients, config.origin.number);
        Self { doors, id: config.id, clients, lanes, origin, keys: BTreeMap::new(), stop }
    }

    pub fn run(mut self, listener: &mut T::Listener) {
        while !self.stop.load(Ordering::Acquire) {
            match listener.accept(TURN) {
                Ok(Some(request)) => self.answer(request),
                Ok(None) => {}
                Err(error) => {
                    eprintln!("fervor-server: cannot accept any more connections: {error}");
                    return;
                }
            }
        }
    }

    fn answer(&mut self, mut request: <T::Listener as Listener>::Request) {
        let (hello, role) = match self.check(request.private_data()) {
            Ok(checked) => checked,
            Err(refusal) => return request.reject(&refusal.encode()),
        };
        let grant = match request.key().map_or_else(|| Ok(Grant::default()), Grant::of) {
            Ok(grant) => grant,
            Err(error) => return request.reject(&Refusal::new(&error.to_string()).encode()),
        };
        if grant.is_limited() && !request.limit(&self.doors[usize::from(hello.shard)].reaches.of(&grant)) {
            let text = "a key that is limited to tables comes by TCP alone: connect with ?via=tcp";
            return request.reject(&Refusal::new(text).encode());
        }
        let place = match self.place(&hello, role, &grant) {
            Ok(place) => place,
            Err(refusal) => return request.reject(&refusal.encode()),
        };
        let door = &self.doors[usize::from(hello.shard)];
        let mut welcome = Welcome::new();
        welcome.shards = self.doors.len() as u16;
        welcome.server = self.id;
        welcome.clock = door.share.clock.load(Ordering::Acquire);
        welcome.address = door.region.address;
        welcome.length = door.region.length;
        welcome.key = door.region.key;
        welcome.credits = door.share.credits as u16;
        welcome.observes = grant.observes(&hello).into();
        welcome.message_bytes = MESSAGE_BYTES as u32;
        welcome.lease = u32::try_from(door.share.lease.as_millis()).unwrap_or(u32::MAX);
        welcome.origin = self.origin;
        let (count, depth) = match role {
            Role::Main => (&door.share.clients, usize::MAX),
            // Nothing is posted to a lane.
            Role::Reader => (&door.share.lanes, 1),
        };
        match request.accept_with(&door.attach, depth, welcome.as_bytes()) {
            Ok(connection) => {
                // A client that comes back has been counted.
                if hello.attempt == 0 {
                    count.fetch_add(1, Ordering::Release);
                }
                let hello = (role == Role::Main).then_some(hello);
                // A poller that has ended takes no mail; the connection is dropped, which its client sees.
                let _ = door.post.send(Mail { connection, hello, grant, place });
                door.attach.wake();
            }
            Err(error) => eprintln!("fervor-server: a connection could not be accepted: {error}"),
        }
    }

    /// The place of a new client among those of its key, if that bounds them.
    fn place(&mut self, hello: &Hello, role: Role, grant: &Grant) -> Result<Option<Place>, Refusal> {
        if role != Role::Main || hello.attempt != 0 || grant.clients() == usize::MAX {
            return Ok(None);
        }
        let (key, most) = (grant.key().to_owned(), grant.clients());
        let taken = self.keys.entry((key, hello.shard)).or_default();
        if taken.load(Ordering::Acquire) >= most {
            return Err(Refusal::new(&format!(
                "the key `{}` is for clients={most}, and they are here",
                grant.key()
            )));
        }
        taken.fetch_add(1, Ordering::Release);
        Ok(Some(Place(taken.clone())))
    }

    /// The handshake, if what it asks for is to be had: the shard is there.
    fn check(&self, private_data: &[u8]) -> Result<(Hello, Role), Refusal> {
        let (hello, role) = Hello::parse(private_data)?;
        let door = self.doors.get(usize::from(hello.shard)).ok_or_else(|| {
            Refusal::new(&format!("shard = {}, but the server has {}", hello.shard, self.doors.len()))
        })?;
        if role == Role::Reader && hello.attempt != 0 {
            return Err(Refusal::new(&format!(
                "attempt = {}, but a READ lane is made anew, and does not come back",
                hello.attempt
            )));
        }
        if role == Role::Reader && door.share.lanes.load(Ordering::Acquire) >= self.lanes {
            return Err(Refusal::new(&format!(
                "it has {} READ lanes, and no place for more: start it with more --lanes, or lower ClientOptions::read_lanes",
                self.lanes
            )));
        }
        if role == Role::Main {
            if hello.clients == 0 {
                return Err(Refusal::new("clients = 0: a job has at least one client"));
            }
            if hello.attempt > 0 && hello.identity == 0 {
                return Err(Refusal::new("attempt > 0, but identity = 0: who has none cannot come back"));
            }
            // Only this thread counts up. There are receive buffers for the credits of so many.
            if hello.attempt == 0 && door.share.clients.load(Ordering::Acquire) >= self.clients {
                return Err(Refusal::new(&format!(
                    "it has {} clients, and no place for more: start it with more --clients",
                    self.clients
                )));
            }
            if !(LEAST_RECEIVES..=64 * CLIENT_RECEIVES).contains(&(hello.receives as usize)) {
                return Err(Refusal::new(&format!(
                    "receives = {} is not in {LEAST_RECEIVES}..={}",
                    hello.receives,
                    64 * CLIENT_RECEIVES
                )));
            }
        }
        Ok((hello, role))
    }
}
