//! The server's end of sessions: where peers come in, and how lanes find what their session has said of them.
//!
//! ```text
//!  thread `fervor-door`      TCP socket ─▶ an opening ─▶ a session's: handshake ──────────────▶ guests
//!                                                   └──▶ a lane's of `tcp` or `rdma`: its token ─▶ ready
//!  thread `fervor-door-shm`  the listener of `shm` ─────▶ a lane's token ──────────────────────▶ ready
//!  thread `fervor-guests`  sessions: HELLO, LANE ─▶ token ─▶ GO                                 (see `guests`)
//!  accept()                ready ─▶ a request; what the program answers goes through the session
//! ```
//!
//! One port serves sessions, and lanes of `tcp` and `rdma`: they begin with other bytes.
//!
//! **Nobody holds the door.** Openings are heard side by side, bounded in number and time ([`strangers`]).
//! A guest that has not proved that it has the key is one of [`UNPROVEN`](guests::UNPROVEN) at most, for five seconds. A token is
//! good for one lane of its session, once, for [`TOKEN_LIFE`]; a session has [`TOKENS`] at most, and all together [`ALL_TOKENS`]. A
//! lane without a good token is dropped at once.
//!
//! | what | written by | read by | under |
//! |---|---|---|---|
//! | `tokens` | guests: a lane was asked for, a session has ended; who finds a lane takes its token out | the threads of the doors | its lock |
//! | `ready` | the threads of the doors | `accept` | its lock |

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    io::{ErrorKind, Write},
    net::TcpStream,
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::UnixStream,
    },
    path::Path,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    Host,
    guests::{self, Guests, Session},
    listener::{Caller, HostRequest},
};
#[cfg(feature = "rdma")]
use crate::transport::rdma;
use crate::{
    address::Address,
    error::Error,
    session::{
        Key, Way,
        key::random,
        noise,
        wire::{NamedRegion, Offer, Token},
    },
    transport::{Listener, Transport, host::strangers, shm::ShmListener, tcp},
};

/// How long a lane may take to come in after its session was given the token.
const TOKEN_LIFE: Duration = Duration::from_secs(10);
/// Lanes that a session may be making at a time (a client makes one after the other), and all sessions together.
const TOKENS: usize = 8;
const ALL_TOKENS: usize = 1024;
/// How long a stop may go unnoticed.
const TURN: Duration = Duration::from_millis(50);

/// A lane that a session has announced.
pub(super) struct Expected {
    pub(super) session: Arc<Session>,
    pub(super) number: u32,
    pub(super) way: Way,
    pub(super) regions: Vec<NamedRegion>,
    pub(super) data: Vec<u8>,
    pub(super) key: Option<Arc<Key>>,
    pub(super) since: Instant,
}

impl Expected {
    /// Says what has become of it.
    pub(super) fn answer(&self, accepted: bool, regions: Vec<NamedRegion>, data: &[u8]) {
        self.session.answer(self.number, accepted, regions, data);
    }
}

/// What the threads of a door share with its owner.
pub(super) struct Shared {
    pub(super) host: Host,
    pub(super) offers: Vec<Offer>,
    /// As `rdma` calls it, for its errors.
    #[cfg(feature = "rdma")]
    address: Address,
    tokens: Mutex<HashMap<Token, Expected>>,
    ready: Mutex<Ready>,
    /// There is something in `ready`.
    knock: Condvar,
    stop: AtomicBool,
    log: Log,
}

#[derive(Default)]
struct Ready {
    requests: VecDeque<HostRequest>,
    /// Why nobody comes in any more.
    error: Option<Error>,
}

impl Shared {
    fn tokens(&self) -> MutexGuard<'_, HashMap<Token, Expected>> {
        // Every change is one insertion or removal.
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ready(&self) -> MutexGuard<'_, Ready> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Makes it known that a lane with this token will come in. `false`: its session has too many of them.
    pub(super) fn expect(&self, token: Token, expected: Expected) -> bool {
        let mut tokens = self.tokens();
        if tokens.len() >= ALL_TOKENS {
            // Whoever has taken the longest makes room.
            let oldest = tokens.iter().min_by_key(|(_, other)| other.since).map(|(token, _)| *token);
            tokens.remove(&oldest.expect("there are many"));
        }
        if tokens.values().filter(|other| Arc::ptr_eq(&other.session, &expected.session)).count() >= TOKENS {
            return false;
        }
        tokens.insert(token, expected);
        true
    }

    /// Forgets tokens that were not used in time. How long until that is to be done again.
    pub(super) fn expire(&self) -> Duration {
        let mut tokens = self.tokens();
        tokens.retain(|_, expected| expected.since.elapsed() < TOKEN_LIFE);
        let left = tokens.values().map(|expected| TOKEN_LIFE.saturating_sub(expected.since.elapsed()));
        left.fold(Duration::from_secs(3600), Duration::min)
    }

    /// A session has ended: its lanes are not let in any more.
    pub(super) fn forget(&self, session: &Arc<Session>) {
        self.tokens().retain(|_, expected| !Arc::ptr_eq(&expected.session, session));
    }

    /// A lane has come in.
    fn let_in(&self, way: Way, caller: Caller) {
        let expected =
            <Token>::try_from(caller.private_data()).ok().and_then(|token| self.tokens().remove(&token));
        match expected {
            Some(expected) if expected.way == way && expected.since.elapsed() < TOKEN_LIFE => {
                self.ready().requests.push_back(HostRequest::new(caller, Some(expected)));
                self.knock.notify_one();
            }
            _ => self.log(format_args!("a lane over {way} without a token of a session was turned away")),
        }
    }

    /// Nobody comes in any more.
    fn fail(&self, error: Error) {
        self.ready().error.get_or_insert(error);
        self.knock.notify_one();
    }

    /// Writes a line about a peer, unless there are too many.
    pub(super) fn log(&self, line: fmt::Arguments<'_>) {
        self.log.line(line);
    }
}

/// Lines about peers on the standard error, so many a second at most: peers do not fill disks.
#[derive(Default)]
struct Log(Mutex<(Option<Instant>, u32, u32)>);

impl Log {
    const EACH_SECOND: u32 = 20;

    fn line(&self, line: fmt::Arguments<'_>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, lines, kept) = &mut *state;
        if since.is_none_or(|since| since.elapsed() >= Duration::from_secs(1)) {
            if *kept > 0 {
                say(format_args!("{kept} more lines like these in the second before"));
            }
            (*since, *lines, *kept) = (Some(Instant::now()), 0, 0);
        }
        if *lines < Self::EACH_SECOND {
            *lines += 1;
            say(line);
        } else {
            *kept += 1;
        }
    }
}

/// Nobody may read what is said.
fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "fervor: {line}");
}

/// Tells those who wait at the door when a thread of it has panicked.
pub(super) struct Alarm(pub(super) Arc<Shared>);

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let source = std::io::Error::other("a thread of the door panicked; its message is above");
            self.0.fail(Error::System { call: "accepting".to_owned(), source });
        }
    }
}

/// The door of a server that has sessions.
pub(super) struct Door {
    address: Address,
    shared: Arc<Shared>,
    guests: Option<Guests>,
    threads: Vec<JoinHandle<()>>,
}

impl Door {
    /// Listens at `address`, and at what else the host's ways need.
    pub(super) fn open(host: &Host, address: &Address) -> Result<Self, Error> {
        let Address::Session { host: name, port, via } = address else {
            unreachable!("the caller has looked")
        };
        let addresses = tcp::look_up(address, name, *port)?;
        let (socket, port) = tcp::bind(address, &addresses)?;
        let address = Address::Session { host: name.clone(), port, via: *via };
        let door = strangers::Door::new(socket, address.to_string())?;
        let mut offers = Vec::new();
        let mut shm = None;
        if host.has(Way::Shm) {
            match listen_shm(host) {
                Ok(listener) => shm = Some(listener),
                Err(error) if *via == Some(Way::Shm) => return Err(error),
                // There are other ways.
                Err(error) => say(format_args!("clients of this host cannot use shared memory: {error}")),
            }
        }
        if let Some(listener) = &shm {
            let Address::Shm(path) = listener.address() else { unreachable!("it is of `shm`") };
            offers.push(Offer { way: Way::Shm, place: path.display().to_string() });
        }
        if host.has(Way::Rdma) {
            offers.push(Offer { way: Way::Rdma, place: String::new() });
        }
        if host.has(Way::Tcp) {
            offers.push(Offer { way: Way::Tcp, place: String::new() });
        }
        let shared = Arc::new(Shared {
            host: host.clone(),
            offers,
            #[cfg(feature = "rdma")]
            address: Address::Rdma { host: name.clone(), port, from: None },
            tokens: Mutex::default(),
            ready: Mutex::default(),
            knock: Condvar::new(),
            stop: AtomicBool::new(false),
            log: Log::default(),
        });
        let guests = Guests::start(&shared)?;
        let lobby = guests.lobby();
        let mut opened = Self { address, shared, guests: Some(guests), threads: Vec::new() };
        opened.start("fervor-door", move |shared| hear(&shared, door, &lobby))?;
        if let Some(listener) = shm {
            opened.start("fervor-door-shm", move |shared| lead(&shared, Way::Shm, listener, Caller::Shm))?;
        }
        Ok(opened)
    }

    fn start(&mut self, name: &str, body: impl FnOnce(Arc<Shared>) + Send + 'static) -> Result<(), Error> {
        let shared = self.shared.clone();
        let guarded = move || {
            let _alarm = Alarm(shared.clone());
            body(shared);
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(guarded);
        self.threads.push(thread.map_err(Error::io(format!("starting thread `{name}`")))?);
        Ok(())
    }

    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// The next lane that has come in.
    pub(super) fn next(&self, timeout: Duration) -> Result<Option<HostRequest>, Error> {
        let wait = |ready: &mut Ready| ready.requests.is_empty() && ready.error.is_none();
        let ready = self.shared.ready();
        let (mut ready, _) = self
            .shared
            .knock
            .wait_timeout_while(ready, timeout.min(Duration::from_secs(1 << 30)), wait)
            .unwrap_or_else(PoisonError::into_inner);
        match (ready.requests.pop_front(), ready.error.take()) {
            (Some(request), error) => {
                ready.error = error;
                Ok(Some(request))
            }
            (None, Some(error)) => Err(error),
            (None, None) => Ok(None),
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        // It says why it panicked, as the others do.
        self.guests.take();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // Requests that nobody has asked for are refused, now that no more come.
        let unanswered = std::mem::take(&mut self.shared.ready().requests);
        drop(unanswered);
    }
}

/// The socket of `shm`, at a path that only those learn who have a session: whoever listened there in the server's place would be
/// shown the client's memory.
fn listen_shm(host: &Host) -> Result<ShmListener, Error> {
    let shm = host.0.shm.as_ref().expect("the caller has looked");
    let folder = std::env::temp_dir();
    remove_stale(&folder);
    let mut name = Token::default();
    random(&mut name)?;
    let name: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
    shm.listen(&Address::Shm(folder.join(format!("{PREFIX}{name}{SUFFIX}"))))
}

const PREFIX: &str = "fervor-";
const SUFFIX: &str = ".sock";

/// Removes sockets that servers of this user have left that were killed.
fn remove_stale(folder: &Path) {
    let user = rustix::process::geteuid().as_raw();
    for file in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = file.file_name();
        let middle = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX));
        let ours = middle
            .is_some_and(|middle| middle.len() == 32 && middle.bytes().all(|b| b.is_ascii_hexdigit()))
            && file.metadata().is_ok_and(|data| data.uid() == user && data.file_type().is_socket());
        // To one that lives, this kind of socket does not connect: the error is another one then.
        let refused =
            |path| matches!(UnixStream::connect(path), Err(e) if e.kind() == ErrorKind::ConnectionRefused);
        if ours && refused(file.path()) {
            // Another server may be doing the same.
            let _ = std::fs::remove_file(file.path());
        }
    }
}

/// The thread of the TCP socket.
fn hear(shared: &Shared, mut door: strangers::Door, lobby: &guests::Lobby) {
    while !shared.stopped() {
        match door.next(Some(Instant::now() + TURN)) {
            Ok(Some((socket, opening))) => welcome(shared, socket, &opening, lobby),
            Ok(None) => {}
            Err(error) => return shared.fail(error),
        }
    }
}

/// Hears what a stranger has come for.
fn welcome(shared: &Shared, socket: TcpStream, opening: &[u8; strangers::OPENING], lobby: &guests::Lobby) {
    let from = || socket.peer_addr().map_or_else(|_| "somebody".to_owned(), |address| address.to_string());
    if !opening.starts_with(&noise::MAGIC) {
        return lane(shared, socket, opening);
    }
    match noise::respond(&shared.host.0.keys, opening) {
        Ok((cipher, answer, key)) => lobby.enter(socket, cipher, &answer, key),
        Err(reason) => {
            shared.log(format_args!("{} was turned away: {}", from(), reason.of_client()));
            // Of three bytes, to a socket that has sent nothing, none are left over.
            let _ = (&socket).write(&noise::refusal(reason));
        }
    }
}

/// Lets a stranger in who has come for a lane by TCP's or RDMA's own opening, if it has a token.
fn lane(shared: &Shared, socket: TcpStream, opening: &[u8; strangers::OPENING]) {
    #[cfg(feature = "rdma")]
    if rdma::Rdma::is_meant(opening)
        && let Some(rdma) = &shared.host.0.rdma
    {
        // Who cannot come in by this way was told why, and tries another.
        if let Some(caller) = rdma.request(&shared.address, socket, opening) {
            shared.let_in(Way::Rdma, Caller::Rdma(caller));
        }
        return;
    }
    match tcp::TcpRequest::new(socket, opening) {
        Some(caller) if shared.host.has(Way::Tcp) => shared.let_in(Way::Tcp, Caller::Tcp(caller)),
        _ => shared.log(format_args!("a peer that does not speak Fervor's protocols was turned away")),
    }
}

/// The thread of another provider's listener.
fn lead<L: Listener>(shared: &Shared, way: Way, mut listener: L, caller: impl Fn(L::Request) -> Caller) {
    while !shared.stopped() {
        match listener.accept(TURN) {
            Ok(Some(request)) => shared.let_in(way, caller(request)),
            Ok(None) => {}
            Err(error) => return shared.fail(error),
        }
    }
}
