//! A busy data path over shared memory makes no system call: neither posts, nor polls, nor what an owner and its viewers do.
//!
//! A thread that has made its connections installs a seccomp filter on itself, which lets no system call through but the one
//! that ends the thread, and reports each attempt by a signal. Then it works. A filter cannot be taken off again, so the
//! thread ends by that one call.

#![cfg(target_os = "linux")]

use std::{
    io::{self, Write},
    sync::atomic::{AtomicI64, AtomicU32, Ordering},
    time::{Duration, Instant},
};

use fervor_verbs::{
    Address, Exclusive, Memory,
    transport::{
        Access, Completion, Connection, Endpoint, EndpointConfig, Export, Listener, Payload, Post, Region,
        RemoteRegion, Request, Sge, Transport, View,
        any::{Host, HostConnection, HostEndpoint, HostRegion},
    },
};

const WORKER: &str = "worker";
const ROUNDS: u64 = 100_000;
const PATIENCE: Duration = Duration::from_secs(10);
/// An image: its lock, and its data.
const LOCK: usize = 64;
const DATA: std::ops::Range<usize> = 72..136;

/// How far the thread is. Under the filter, an attempt at a system call or a panic ends it.
static STAGE: AtomicU32 = AtomicU32::new(CONNECTING);
const CONNECTING: u32 = 0;
const WORKING: u32 = 1;
/// It tries a system call, to show that the filter is there.
const TRYING: u32 = 2;
const OVER: u32 = 3;
const FAILED: u32 = 4;
/// The number of the last system call that was attempted, and the line of a panic under the filter.
static ATTEMPT: AtomicI64 = AtomicI64::new(-1);
static PANIC: AtomicU32 = AtomicU32::new(0);

/// What the kernel calls instead of carrying out a system call.
extern "C" fn attempted(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: for SIGSYS the kernel passes a valid `siginfo_t`. The number of the system call is behind the address of the
    // instruction (`si_call_addr`), which follows the three `int`s that each signal has and their padding.
    let number = unsafe { *info.cast::<libc::c_int>().add(6) };
    ATTEMPT.store(number.into(), Ordering::Relaxed);
    if STAGE.load(Ordering::Relaxed) == WORKING {
        end(FAILED);
    }
}

/// Ends this thread at once. Nobody joins it, and what it owns is left to the end of the process.
fn end(stage: u32) {
    STAGE.store(stage, Ordering::Release);
    // SAFETY: a plain system call. No destructor runs, as after `mem::forget`.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
}

/// A panic under the filter could not be printed.
fn report_panics_without_system_calls() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if std::thread::current().name() == Some(WORKER) && STAGE.load(Ordering::Relaxed) == WORKING {
            PANIC.store(panic.location().map_or(u32::MAX, |place| place.line()), Ordering::Relaxed);
            end(FAILED);
        }
        usual(panic);
    }));
}

/// From now on no system call of this thread is carried out, but for `exit` and the return from `attempted`.
fn forbid_system_calls() {
    const fn statement(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter { code: code as u16, jt, jf, k }
    }
    let allow_if = |number: libc::c_long, skip: u8| {
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, skip, 0, number as u32)
    };
    let mut filter = [
        // The number of the system call is the first word of what the filter looks at.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        allow_if(libc::SYS_rt_sigreturn, 2),
        allow_if(libc::SYS_exit, 1),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_TRAP),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: `action` is a valid handler that only stores to atomics; `program` is a filter of `len` statements, which the
    // kernel copies. All are plain system calls, of this thread.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = attempted as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()), 0);
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let installed = libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program);
        assert_eq!(installed, 0, "this kernel lets nobody filter: {}", io::Error::last_os_error());
    }
}

/// One end of a connection.
struct Side {
    endpoint: HostEndpoint,
    connection: HostConnection,
    own: HostRegion,
    remote: RemoteRegion,
    seen: Vec<Completion>,
}

impl Side {
    /// Polls until something has come, with polls that find nothing before.
    fn next(&mut self) -> Completion {
        while self.seen.is_empty() {
            self.endpoint.poll(&mut self.seen);
        }
        self.seen.remove(0)
    }

    fn work(&mut self, expected: u64) {
        let completion = self.next();
        assert!(
            matches!(completion, Completion::Work { id, result: Ok(()), .. } if id == expected),
            "{completion:?}"
        );
    }
}

/// All that a client and a server do in a round, by one thread.
fn round(number: u64, client: &mut Side, server: &mut Side, rows: &mut Exclusive, view: &impl View) {
    rows.publish(0, number);
    rows.rewrite(LOCK, DATA, number << 1, |bytes| bytes.fill(number as u8));
    let mut image = [0; DATA.end - DATA.start];
    assert_eq!(view.load(0), number);
    assert_eq!(view.snapshot(LOCK, DATA.start, &mut image), Some(number << 1));
    view.copy(0, &mut [0; 4096]);
    one_way(number, &image, client, server);
    one_way(number, &image, server, client);
}

/// One side reads, writes and sends; the other takes what comes.
fn one_way(number: u64, image: &[u8], from: &mut Side, to: &mut Side) {
    let pieces = [Sge { region: &from.own, offset: 0, length: 1024 }];
    let at = from.remote.at(2048);
    from.connection.post(Post::Read { into: &pieces, from: from.remote.at(0), signal: Some(1) }).unwrap();
    from.connection
        .post(Post::Write { payload: Payload::Gather(&pieces), to: at, immediate: None, signal: None })
        .unwrap();
    from.connection
        .post(Post::Write {
            payload: Payload::Inline(image),
            to: at,
            immediate: Some(number as u32),
            signal: None,
        })
        .unwrap();
    from.connection
        .post(Post::Send { payload: Payload::Gather(&pieces), immediate: None, signal: None })
        .unwrap();
    from.connection
        .post(Post::Send { payload: Payload::Inline(b"the last"), immediate: None, signal: Some(2) })
        .unwrap();
    from.connection.ring().unwrap();
    from.work(1);
    from.work(2);
    assert!(matches!(to.next(), Completion::WriteImmediate { immediate, .. } if immediate == number as u32));
    for length in [1024, 8] {
        let Completion::Received { buffer, .. } = to.next() else { panic!("expected a message") };
        assert_eq!(to.endpoint.message(&buffer).len(), length);
        to.endpoint.release(buffer);
    }
    assert_eq!(to.endpoint.poll(&mut to.seen), 0);
}

/// Connects two hosts, works, and ends the thread.
fn work() {
    let address = Address::Shm(std::env::temp_dir().join(format!("fervor-no-call-{}", std::process::id())));
    let hosts = [(); 2].map(|()| Host::for_addresses(std::slice::from_ref(&address)).unwrap());
    let mut rows = Exclusive::new("rows", 4096).unwrap();
    let export = hosts[1].export(&rows).unwrap();
    let regions = [0, 1].map(|side: usize| {
        hosts[side].register(&Memory::new("region", 4096).unwrap(), Access::RemoteWrite).unwrap()
    });
    let endpoints = [0, 1].map(|side: usize| hosts[side].endpoint(&EndpointConfig::default()).unwrap());
    let mut listener = hosts[1].listen(&address).unwrap();
    let attach = endpoints[1].attach();
    let accepting = std::thread::spawn(move || {
        let request = listener.accept(PATIENCE).unwrap().expect("a client");
        request.accept(&attach, b"").unwrap()
    });
    let (to_server, _) = hosts[0].connect(&endpoints[0].attach(), &address, b"", PATIENCE).unwrap();
    let to_client = accepting.join().unwrap();
    let view = to_server.view(export.remote()).expect("shm has views");
    let [own, theirs] = regions;
    let (mine, others) = (own.remote(), theirs.remote());
    let [endpoint, peer] = endpoints;
    let side =
        |endpoint, connection, own, remote| Side { endpoint, connection, own, remote, seen: Vec::new() };
    let mut client = side(endpoint, to_server, own, others);
    let mut server = side(peer, to_client, theirs, mine);

    // What is allocated once is allocated now.
    for number in 1..=100 {
        round(number, &mut client, &mut server, &mut rows, &view);
    }
    forbid_system_calls();
    STAGE.store(WORKING, Ordering::Release);
    for number in 101..=ROUNDS {
        round(number, &mut client, &mut server, &mut rows, &view);
    }
    STAGE.store(TRYING, Ordering::Release);
    // SAFETY: a plain system call without arguments.
    unsafe { libc::syscall(libc::SYS_getppid) };
    end(OVER);
}

/// Ends this process: the thread that ended in the midst of its work may have had locks of the test program.
fn give_up() -> ! {
    let what = "a_busy_data_path_makes_no_system_call: FAILED in the midst of the work";
    let (attempt, line) = (ATTEMPT.load(Ordering::Relaxed), PANIC.load(Ordering::Relaxed));
    // Not `eprintln`, which the test program keeps for itself.
    let _ =
        writeln!(io::stderr(), "{what}: system call {attempt} (-1: none), panic in line {line} (0: none)");
    std::process::abort()
}

#[test]
fn a_busy_data_path_makes_no_system_call() {
    report_panics_without_system_calls();
    let thread = std::thread::Builder::new().name(WORKER.to_owned()).spawn(work).unwrap();
    let start = Instant::now();
    loop {
        match STAGE.load(Ordering::Acquire) {
            OVER => break,
            FAILED => give_up(),
            _ => {}
        }
        assert!(!thread.is_finished(), "the thread panicked before it was under the filter");
        assert!(start.elapsed() < Duration::from_secs(120), "the work does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(ATTEMPT.load(Ordering::Acquire), libc::SYS_getppid, "the filter saw no system call");
}
