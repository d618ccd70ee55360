//! The files behind shared memory: what is done to one before it is handed out, and what must be true of one that a peer
//! sent before anything else is asked of it.
//!
//! A descriptor is a right, and what a process may do with one is the kernel's business, not that of a message that came
//! with it. So everything here rests on *seals*, which the kernel keeps, and which nobody can break again.
//!
//! | what a neighbour could do with a descriptor | why it cannot |
//! |---|---|
//! | shrink the file: whoever touches the memory gets a SIGBUS | sealed, `F_SEAL_SHRINK` and `F_SEAL_GROW`; an unsealed file is refused |
//! | add a seal: after `F_SEAL_FUTURE_WRITE` on the common doorbell no later client could map it | sealed, `F_SEAL_SEAL`: the last seal is on before the file is handed out |
//! | open a file that it may only read once more, for writing (`/proc/self/fd/N`) | sealed, `F_SEAL_FUTURE_WRITE`: no new mapping writes, nor does `write`, nor `fallocate`. The owner writes through its mapping, which is older than the seal |
//! | the same as another user | moreover the file has mode 0600, where a memfd has 0777 |
//! | send a file of a file system that it serves itself, and never answer | the first question to a received file is for its seals. Of a file that is no memfd the kernel answers by itself; nothing else is asked of such a file |
//! | punch holes into a file that it may write | it may: they read as zeros, which it could have written |
//! | the same on huge pages, of which there may then be none left: a SIGBUS | see below |
//!
//! **Huge pages** come from a pool that can be empty when a page is touched. So a received file on huge pages is refused,
//! unless
//! - it belongs to the user of this process. Who can make such a file can as well send a signal to this process; or
//! - it has all its pages, and `F_SEAL_FUTURE_WRITE`: then it keeps them, because that seal also forbids to punch holes,
//!   through whatever descriptor or mapping (seen with `fallocate` and `MADV_REMOVE`, Linux 6.18).
//!
//! For the same reason a region on huge pages that peers may write is not handed to another user ([`super::region`]).
//!
//! **What seals do not stop.** Whoever may trace this process can write its memory through `/proc/PID/mem`: root, and other
//! processes of its user where the system does not forbid that (`kernel.yama.ptrace_scope`).

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs, ftruncate,
    memfd_create,
};

use crate::error::Error;

/// The seals of every file that is handed out, and of every file that is taken.
pub(super) const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// `f_type` of a file on huge pages.
const HUGETLBFS: u64 = 0x9584_58f6;

/// Bytes of a page, and of a block in `st_blocks`.
pub(super) const PAGE: usize = 4096;
const BLOCK: u64 = 512;

/// Makes a file of `len` zero bytes that every peer of a connection may write.
pub(super) fn create(name: &str, len: usize) -> Result<OwnedFd, Error> {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(|e| Error::io(format!("memfd_create({name})"))(e.into()))?;
    fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(|e| Error::io("fchmod(memfd, 0600)")(e.into()))?;
    ftruncate(&fd, len as u64).map_err(|e| Error::io(format!("ftruncate(memfd, {len})"))(e.into()))?;
    seal(&fd, SEALS)?;
    Ok(fd)
}

/// Sees to it that a file has these seals.
///
/// # Errors
/// It lacks one, and has been sealed against further seals.
pub(super) fn seal(fd: impl AsFd, seals: SealFlags) -> Result<(), Error> {
    let failed = |call: String| move |e: rustix::io::Errno| Error::io(call)(e.into());
    let missing = seals - fcntl_get_seals(&fd).map_err(failed("fcntl(memfd, F_GET_SEALS)".to_owned()))?;
    if missing.is_empty() {
        return Ok(());
    }
    fcntl_add_seals(&fd, missing).map_err(failed(format!("fcntl(memfd, F_ADD_SEALS, {missing:?})")))
}

/// A file that a peer sent, and that may be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Received {
    /// Device and inode: the same for all descriptors of one file.
    pub(super) id: (u64, u64),
    /// Size in bytes; for ever.
    pub(super) len: usize,
    /// Mappings are a multiple of this long.
    pub(super) page: usize,
}

/// Looks at a file that a peer sent, of which `least` bytes are wanted. `user` is the user of this process. The error says
/// what is wrong.
pub(super) fn inspect(fd: impl AsFd, least: usize, user: u32) -> Result<Received, String> {
    // First of all: every other question may be asked of a file system whose server the peer is.
    let seals = fcntl_get_seals(&fd).map_err(|e| format!("it is no memfd ({e})"))?;
    for (seal, name) in
        [(SealFlags::SHRINK, "shrinking"), (SealFlags::GROW, "growing"), (SealFlags::SEAL, "further seals")]
    {
        if !seals.contains(seal) {
            return Err(format!("it is not sealed against {name}"));
        }
    }
    let stat = fstat(&fd).map_err(|e| format!("fstat(memfd) failed: {e}"))?;
    let len = usize::try_from(stat.st_size).map_err(|_| format!("its size is {}", stat.st_size))?;
    if len < least.max(1) {
        return Err(format!("it has {len} bytes and should have {least}"));
    }
    let huge = fstatfs(&fd).map_err(|e| format!("fstatfs(memfd) failed: {e}"))?.f_type as u64 == HUGETLBFS;
    let page = if huge { usize::try_from(stat.st_blksize).unwrap_or(0) } else { PAGE };
    if !page.is_power_of_two() || !len.is_multiple_of(page) && huge {
        return Err(format!("it has {len} bytes on pages of {} bytes", stat.st_blksize));
    }
    let keeps_its_pages =
        seals.contains(SealFlags::FUTURE_WRITE) && stat.st_blocks as u64 * BLOCK >= len as u64;
    if huge && stat.st_uid != user && !keeps_its_pages {
        return Err(format!(
            "it is on huge pages of user {}, who could take them away from user {user}",
            stat.st_uid
        ));
    }
    Ok(Received { id: (stat.st_dev, stat.st_ino), len, page })
}
