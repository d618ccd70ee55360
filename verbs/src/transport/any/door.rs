//! The server's end of sessions: where peers come in, and how lanes find what their session has said of them.
//!
//! ```text
//!  thread `fervor-door`      TCP socket ─▶ an opening ─▶ a session's: handshake ──────────────▶ guests
//!                                                   └──▶ a lane's of `tcp`: its token ───────▶ ready
//!  thread `fervor-door-shm`  the listener of `shm` ─────▶ a lane's token ──────────────────────▶ ready
//!  thread `fervor-guests`  sessions: HELLO, LANES ─▶ tokens ─▶ GO; a lane of `rdma` ────────────▶ ready
//!  accept()                ready ─▶ a request; what the program answers goes through the session
//! ```
//!
//! One port serves sessions, and lanes of `tcp`: they begin with other bytes. Lanes of `rdma` come inside their sessions.
//!
//! **Nobody holds the door.** Openings are heard side by side, bounded in number and time ([`strangers`]).
//! A guest that has not proved that it has the key is one of [`UNPROVEN`](guests::UNPROVEN) at most, for five seconds. A token is
//! good for one lane of its session, once, for a short time; a session has few at a time, and all together have a bounded number (`shared`). A
//! lane without a good token is dropped at once.

use std::{
    io::{ErrorKind, Write},
    net::TcpStream,
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::UnixStream,
    },
    path::Path,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    Host,
    guests::{self, Guests},
    request::{Caller, HostRequest},
    shared::{Alarm, Shared, say},
};
use crate::{
    address::Address,
    error::Error,
    session::{
        Way,
        key::random,
        noise,
        wire::{Offer, Token},
    },
    transport::{Listener, Transport, host::strangers, shm::ShmListener, tcp},
};

/// How long a stop may go unnoticed.
const TURN: Duration = Duration::from_millis(50);

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
        // Whether it still does is looked at for each client.
        if host.has(Way::Rdma) {
            offers.push(Offer { way: Way::Rdma, place: String::new() });
        }
        if host.has(Way::Tcp) {
            offers.push(Offer { way: Way::Tcp, place: String::new() });
        }
        let shared = Arc::new(Shared::new(host, offers));
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
        self.shared.next(timeout)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.shared.stop();
        // It says why it panicked, as the others do.
        self.guests.take();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.shared.refuse_all();
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

/// Lets a stranger in who has come for a lane by TCP's own opening, if it has a token.
fn lane(shared: &Shared, socket: TcpStream, opening: &[u8; strangers::OPENING]) {
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
