//! The door of a listening TCP socket: peers who have connected, but have not yet said what they want.
//!
//! Nobody holds the door. At most [`MAX_STRANGERS`] are heard at a time, side by side, by the thread that asks for the next one. A stranger
//! who has not said the `N` bytes of an opening within [`STRANGER_PATIENCE`] is dropped. When there are too many, whoever came first
//! makes room. So a stranger costs one socket and `N` bytes for five seconds, whatever it does.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read},
    net::{TcpListener, TcpStream},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use crate::error::Error;

/// Bytes of the opening of each protocol that begins on a TCP socket: sessions, and the connections of `rdma` and `tcp`. They have the
/// same length so that one door can hear them all.
pub(crate) const OPENING: usize = 168;

/// Peers that are heard at a time.
const MAX_STRANGERS: usize = 256;
/// How long a peer may take to say what it wants.
pub(in crate::transport) const STRANGER_PATIENCE: Duration = Duration::from_secs(5);
/// Pause after the system has no descriptor left.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(10);

/// A peer that has connected to the socket and not yet said all.
struct Stranger {
    socket: TcpStream,
    heard: Vec<u8>,
    deadline: Instant,
}

impl Stranger {
    /// Whether it has said all of `length` bytes; `Err` when it never will.
    fn hear(&mut self, length: usize) -> Result<bool, ()> {
        let mut buffer = [0; 512];
        while self.heard.len() < length {
            // No byte more: what follows belongs to the connection.
            let left = (length - self.heard.len()).min(buffer.len());
            match self.socket.read(&mut buffer[..left]) {
                Ok(0) => return Err(()),
                Ok(count) => self.heard.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return if Instant::now() < self.deadline { Ok(false) } else { Err(()) };
                }
                Err(_) => return Err(()),
            }
        }
        Ok(true)
    }
}

/// A listening socket, and those who have come in through it. An opening has `N` bytes.
pub(in crate::transport) struct Door<const N: usize = OPENING> {
    socket: TcpListener,
    /// The address, for errors.
    name: String,
    strangers: VecDeque<Stranger>,
    complete: VecDeque<(TcpStream, [u8; N])>,
}

impl<const N: usize> Door<N> {
    /// Opens the door of `socket`, which listens at the address called `name`.
    pub(in crate::transport) fn new(socket: TcpListener, name: String) -> Result<Self, Error> {
        socket.set_nonblocking(true).map_err(Error::io("fcntl(O_NONBLOCK)"))?;
        Ok(Self { socket, name, strangers: VecDeque::new(), complete: VecDeque::new() })
    }

    /// The next peer that has said its opening, with its socket, which does not block. Waits until `deadline` at most; for ever without one.
    pub(in crate::transport) fn next(
        &mut self,
        deadline: Option<Instant>,
    ) -> Result<Option<(TcpStream, [u8; N])>, Error> {
        loop {
            // Those who have said all come first: while there are some, nobody else is let in.
            if let Some(complete) = self.complete.pop_front() {
                return Ok(Some(complete));
            }
            self.take_strangers()?;
            self.hear_strangers();
            if !self.complete.is_empty() {
                continue;
            }
            let left = deadline.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(None);
            }
            self.sleep(left)?;
        }
    }

    /// Takes everyone who waits at the socket.
    fn take_strangers(&mut self) -> Result<(), Error> {
        for _ in 0..MAX_STRANGERS {
            match self.socket.accept() {
                Ok((socket, _)) => {
                    if socket.set_nonblocking(true).is_ok() {
                        let deadline = Instant::now() + STRANGER_PATIENCE;
                        self.strangers.push_back(Stranger { socket, heard: Vec::new(), deadline });
                    }
                    // Whoever came first makes room.
                    if self.strangers.len() > MAX_STRANGERS {
                        self.strangers.pop_front();
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => match Errno::from_io_error(&error) {
                    // No descriptor is left now; the peer waits, and may come in later.
                    Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                        std::thread::sleep(SHORTAGE_PAUSE);
                        return Ok(());
                    }
                    // The peer is gone already, or its network is; the next one may be there.
                    Some(
                        Errno::INTR
                        | Errno::CONNABORTED
                        | Errno::PROTO
                        | Errno::PERM
                        | Errno::HOSTUNREACH
                        | Errno::NETUNREACH
                        | Errno::NETDOWN
                        | Errno::HOSTDOWN
                        | Errno::NOPROTOOPT
                        | Errno::NONET
                        | Errno::OPNOTSUPP
                        | Errno::TIMEDOUT,
                    ) => {}
                    _ => return Err(Error::io(format!("accept({})", self.name))(error)),
                },
            }
        }
        Ok(())
    }

    /// Hears all strangers; keeps those who have said all, and drops those who say nothing.
    fn hear_strangers(&mut self) {
        for mut stranger in std::mem::take(&mut self.strangers) {
            match stranger.hear(N) {
                Ok(true) => {
                    let opening = stranger.heard.try_into().expect("`hear` reads so many bytes");
                    self.complete.push_back((stranger.socket, opening));
                }
                Ok(false) => self.strangers.push_back(stranger),
                Err(()) => {}
            }
        }
    }

    /// Waits until the socket, or a stranger, may have something.
    fn sleep(&self, timeout: Duration) -> Result<(), Error> {
        let mut fds = Vec::with_capacity(1 + self.strangers.len());
        fds.push(PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN));
        fds.extend(
            self.strangers
                .iter()
                .map(|stranger| PollFd::from_borrowed_fd(stranger.socket.as_fd(), PollFlags::IN)),
        );
        let now = Instant::now();
        let patience = self.strangers.iter().map(|stranger| stranger.deadline.saturating_duration_since(now));
        let timeout = patience.fold(timeout, Duration::min).min(Duration::from_secs(3600));
        let timeout =
            rustix::fs::Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(Error::io("poll(listener)")(e.into())),
        }
    }
}

impl<const N: usize> Drop for Door<N> {
    fn drop(&mut self) {
        // Now, and not only when a child process that is being started has closed its copy of the socket, too.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Read);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn door() -> (Door<4>, std::net::SocketAddr) {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = socket.local_addr().unwrap();
        (Door::new(socket, "here".to_owned()).unwrap(), at)
    }

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_secs(20))
    }

    #[test]
    fn the_silent_and_the_slow_hold_up_nobody() {
        let (mut door, at) = door();
        let _silent = TcpStream::connect(at).unwrap();
        let mut slow = TcpStream::connect(at).unwrap();
        slow.write_all(b"ab").unwrap();
        let mut gone = TcpStream::connect(at).unwrap();
        gone.write_all(b"abc").unwrap();
        drop(gone);
        let mut quick = TcpStream::connect(at).unwrap();
        quick.write_all(b"quick").unwrap();
        assert_eq!(door.next(soon()).unwrap().unwrap().1, *b"quic");
        slow.write_all(b"cd").unwrap();
        assert_eq!(door.next(soon()).unwrap().unwrap().1, *b"abcd");
        assert!(door.next(Some(Instant::now())).unwrap().is_none());
    }

    #[test]
    fn who_came_first_makes_room() {
        let (mut door, at) = door();
        let mut silent = Vec::new();
        for _ in 0..=MAX_STRANGERS {
            silent.push(TcpStream::connect(at).unwrap());
            assert!(door.next(Some(Instant::now())).unwrap().is_none());
        }
        let until = Instant::now() + Duration::from_secs(20);
        while door.strangers.len() < MAX_STRANGERS && Instant::now() < until {
            assert!(door.next(Some(Instant::now())).unwrap().is_none());
        }
        assert_eq!(door.strangers.len(), MAX_STRANGERS);
        // The first one finds its socket closed.
        silent[0].set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        assert_eq!(silent[0].read(&mut [0; 1]).unwrap(), 0);
    }
}
