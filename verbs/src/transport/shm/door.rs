//! The socket file of a listener: who may see it, and whose it is.
//!
//! **Its mode is right from the first moment.** `bind` gives the file the mode of the socket's own inode, less the umask. So
//! `fchmod` on the socket, before `bind`, makes it 0600, and no moment is left in which somebody else could connect. (The umask
//! would do it, too, but belongs to the whole process.) A umask that takes more away is mended afterwards, through a
//! descriptor of that very file: in a folder where others may write, the name could be another file's by then.
//!
//! **A socket file that nobody listens on** (its server was killed) is replaced, a live one never is: the look
//! and the replacement happen under a lock on the directory, so that two servers that start together do not
//! both win. Anybody who may read the directory can hold that lock, so nobody waits for it for ever.

use std::{
    fs::{File, OpenOptions, remove_file, set_permissions, symlink_metadata},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::{FlockOperation, Mode, fchmod, flock},
    io::Errno,
    net::{SocketAddrUnix, SocketFlags, bind, connect, listen},
};

use super::connect::new_socket;
use crate::{address::Address, error::Error};

/// Connections that the kernel keeps for a listener that is busy.
const BACKLOG: i32 = 1024;

/// How long others may hold the lock on the directory, and how often it is tried.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_LOOK: Duration = Duration::from_millis(5);

/// A socket that listens, and its file, which is removed with it.
pub(super) struct Door {
    pub(super) socket: OwnedFd,
    pub(super) path: PathBuf,
    /// Device and inode of the socket file: only that one is removed.
    file: (u64, u64),
}

impl Door {
    /// Listens at `path`, with a file of this mode.
    pub(super) fn open(
        address: &Address,
        path: &Path,
        name: &SocketAddrUnix,
        mode: Mode,
    ) -> Result<Self, Error> {
        let _lock = lock(path.parent().unwrap_or(Path::new("/")))?;
        let failed = |call: &str| {
            let call = format!("{call}({})", path.display());
            move |e: Errno| Error::io(call)(e.into())
        };
        let socket = new_socket(SocketFlags::NONBLOCK)?;
        fchmod(&socket, mode).map_err(failed("fchmod"))?;
        match bind(&socket, name) {
            Err(Errno::ADDRINUSE) => {
                remove_stale(address, path, name)?;
                bind(&socket, name)
            }
            other => other,
        }
        .map_err(failed("bind"))?;
        let file = complete_mode(path, mode)?;
        listen(&socket, BACKLOG).map_err(failed("listen"))?;
        Ok(Self { socket, path: path.to_owned(), file })
    }
}

/// Gives the socket file the rights of `mode` that the umask took away; returns its device and inode.
fn complete_mode(path: &Path, mode: Mode) -> Result<(u64, u64), Error> {
    let failed = |call: &str| Error::io(format!("{call}({})", path.display()));
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed("open"))?;
    let found = file.metadata().map_err(failed("stat"))?;
    if !found.file_type().is_socket() {
        let source =
            io::Error::other("the socket that was just made there has been replaced by another file");
        return Err(Error::System { call: format!("bind({})", path.display()), source });
    }
    if found.mode() & 0o777 != mode.as_raw_mode() {
        let same_file = format!("/proc/self/fd/{}", file.as_raw_fd());
        let rights = std::fs::Permissions::from_mode(mode.as_raw_mode());
        set_permissions(same_file, rights).map_err(failed("chmod"))?;
    }
    Ok((found.dev(), found.ino()))
}

/// Locks a directory until the file is dropped.
fn lock(folder: &Path) -> Result<File, Error> {
    let file = File::open(folder).map_err(Error::io(format!("open({})", folder.display())))?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(LOCK_LOOK),
            Err(Errno::AGAIN) => {
                return Err(Error::Timeout {
                    what: format!(
                        "waiting for the lock on the directory {} (`lsof` shows who holds it; or listen in another directory)",
                        folder.display()
                    ),
                    seconds: LOCK_PATIENCE.as_secs_f64(),
                });
            }
            Err(e) => return Err(Error::io(format!("flock({})", folder.display()))(e.into())),
        }
    }
}

/// Removes a socket file on which nobody listens; an error if somebody does, or if it is something else.
fn remove_stale(address: &Address, path: &Path, name: &SocketAddrUnix) -> Result<(), Error> {
    let is_socket = symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if !is_socket {
        return Err(Error::System {
            call: format!("bind({})", path.display()),
            source: io::Error::new(
                io::ErrorKind::AlreadyExists,
                "a file that is no socket is there; remove it or choose another path",
            ),
        });
    }
    let probe = new_socket(SocketFlags::NONBLOCK)?;
    match connect(&probe, name) {
        Err(Errno::CONNREFUSED) => {
            remove_file(path).map_err(Error::io(format!("unlink({}), a stale socket", path.display())))
        }
        Err(Errno::NOENT) => Ok(()),
        // Also when its backlog is full (EAGAIN), when it is a socket of another kind (EPROTOTYPE), or when it is another
        // user's (EACCES) …
        _ => Err(Error::AddressInUse { address: address.to_string() }),
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let ours = symlink_metadata(&self.path).is_ok_and(|file| (file.dev(), file.ino()) == self.file);
        if ours {
            // If it cannot be removed, the next server replaces it.
            let _ = remove_file(&self.path);
        }
    }
}
