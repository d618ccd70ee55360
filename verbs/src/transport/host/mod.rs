//! What every provider on a real host shares: time, waiting, event counts and threads.
//!
//! | item | what it is |
//! |---|---|
//! | [`now`] | the system's monotonic time |
//! | [`relax`] | one turn of waiting: spin, later yield |
//! | [`HostSignal`] | an event count whose announcer makes no system call while nobody waits |
//! | [`HostThread`], [`spawn`] | threads, pinned on request |
//! | `strangers` | a listening TCP socket whose door nobody holds |
//! | `patience` | how long a call that connects may wait, and what it says then |

use std::{hint, io, sync::mpsc, thread::JoinHandle, time::Duration};

use core_affinity::CoreId;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{error::Error, transport::Thread};

pub(super) mod patience;
mod signal;
pub(crate) mod strangers;

pub use signal::HostSignal;

/// Turns of [`relax`] that keep the processor. 64 pauses are about a microsecond: what an answer from
/// another processor of this host takes.
const SPIN_TURNS: u32 = 64;

/// Turns before a thread had better sleep: about a millisecond of yielding when nobody else wants the
/// processor. A sleeper's processor halts, and on a virtual machine it takes 50 microseconds to come back.
pub const AWAKE_TURNS: u32 = 4096;

/// Processors that the kernel's fixed-size set (`cpu_set_t`) can name.
const MAX_CORES: usize = libc::CPU_SETSIZE as usize;

/// The system's monotonic clock, since some moment before this process; never goes back.
///
/// Not an [`Instant`](std::time::Instant): each READ takes the time twice, and the checks of that type's arithmetic cost more than the clock.
pub fn now() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one `timespec`, to `time`, which lives as long as the call.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    assert_eq!(failed, 0, "Linux has this clock");
    // It begins when the system starts, so no part of it is negative.
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// One turn of waiting (`turn` counts from 0): the first ones spin, the others yield the processor, so that
/// more pollers than processors still make progress.
pub fn relax(turn: u32) {
    if turn < SPIN_TURNS {
        hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

/// A running thread of this process.
#[derive(Debug)]
pub struct HostThread(JoinHandle<()>);

impl Thread for HostThread {
    fn join(self) -> bool {
        self.0.join().is_ok()
    }
}

/// Starts a thread, pinned to processor `core` if one is given.
///
/// # Errors
/// The system's, when it has no thread left; a processor that this process may not use. `body` has not run
/// then.
pub fn spawn(
    name: &str,
    core: Option<usize>,
    body: impl FnOnce() + Send + 'static,
) -> Result<HostThread, Error> {
    let (report, pinned) = mpsc::sync_channel(1);
    let start = move || {
        // Not from `core_affinity::get_core_ids`: that list lacks the isolated processors, which are the
        // ones that a poller is best pinned to.
        let ok = core.is_none_or(|id| id < MAX_CORES && core_affinity::set_for_current(CoreId { id }));
        // The spawner waits for this report, so the send cannot fail.
        let _ = report.send(ok);
        if ok {
            body();
        }
    };
    let handle = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(start)
        .map_err(Error::io(format!("starting thread `{name}`")))?;
    if pinned.recv() == Ok(true) {
        return Ok(HostThread(handle));
    }
    let _ = handle.join();
    Err(Error::System {
        call: format!("pinning thread `{name}` to processor {}", core.unwrap_or_default()),
        source: io::Error::new(
            io::ErrorKind::InvalidInput,
            "this process may not use that processor (`taskset -pc PID` lists those that it may)",
        ),
    })
}

/// Gives a provider of real hosts its [`Runtime`](crate::transport::Runtime).
macro_rules! runtime {
    ($provider:ty) => {
        impl $crate::transport::Runtime for $provider {
            type Signal = $crate::transport::host::HostSignal;
            type Thread = $crate::transport::host::HostThread;

            const AWAKE_TURNS: u32 = $crate::transport::host::AWAKE_TURNS;

            fn now(&self) -> std::time::Duration {
                $crate::transport::host::now()
            }

            fn relax(&self, turn: u32) {
                $crate::transport::host::relax(turn);
            }

            fn signal(&self) -> Self::Signal {
                Self::Signal::new()
            }

            fn spawn(
                &self,
                name: &str,
                core: Option<usize>,
                body: impl FnOnce() + Send + 'static,
            ) -> Result<Self::Thread, $crate::error::Error> {
                $crate::transport::host::spawn(name, core, body)
            }
        }
    };
}
pub(in crate::transport) use runtime;

/// Raises the soft limit of open files to the hard one.
pub(super) fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        // If it cannot be raised it stays as it is, and who comes to it is told.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    }
}

/// The error for private data of more than `limit` bytes.
pub(super) fn check_private_data(data: &[u8], limit: usize) -> Result<(), Error> {
    if data.len() <= limit {
        return Ok(());
    }
    Err(Error::Limit {
        what: "the length of the private data".to_owned(),
        value: data.len() as u64,
        limit: limit as u64,
        cure: "; send the rest in a message".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn time_never_goes_back() {
        let mut last = now();
        for turn in 0..1000 {
            relax(turn);
            let next = now();
            assert!(next >= last);
            last = next;
        }
    }

    #[test]
    fn a_pinned_thread_runs_on_its_processor() {
        let cores = core_affinity::get_core_ids().unwrap();
        let core = cores.last().unwrap().id;
        let (report, seen) = mpsc::channel();
        let thread = spawn("pinned", Some(core), move || {
            report.send(rustix::thread::sched_getcpu()).unwrap();
        })
        .unwrap();
        assert!(thread.join());
        assert_eq!(seen.recv(), Ok(core));
    }

    #[test]
    fn a_processor_that_is_not_there_is_refused_and_the_body_does_not_run() {
        static RAN: AtomicBool = AtomicBool::new(false);
        for core in [MAX_CORES - 1, MAX_CORES, usize::MAX] {
            let error = spawn("nowhere", Some(core), || RAN.store(true, Ordering::SeqCst)).unwrap_err();
            let message = error.to_string();
            assert!(message.contains(&format!("`nowhere` to processor {core} failed")), "{message}");
        }
        assert!(!RAN.load(Ordering::SeqCst));
    }

    #[test]
    fn a_panic_is_reported_by_join() {
        assert!(!spawn("panics", None, || panic!("on purpose")).unwrap().join());
    }
}
