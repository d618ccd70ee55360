//! Who may connect, and what the socket file says.

use std::{
    os::unix::{fs::MetadataExt, process::CommandExt},
    sync::atomic::AtomicBool,
};

use rustix::fs::Mode;

use super::*;

/// Nobody's number, on every Linux.
const NOBODY: u32 = 65534;

/// A transport that takes itself for one of the next user, for whom this process is a stranger.
fn of_next_user(admit: Admit) -> (Shm, u32) {
    let user = rustix::process::geteuid().as_raw() + 1;
    (Shm::of_user(user, admit).unwrap(), user)
}

#[test]
fn a_listener_tells_another_user_whom_it_takes() {
    let (address, _) = socket();
    let (server, theirs) = of_next_user(Admit::SameUser);
    let client = Shm::new().unwrap();
    let own = client.0.user;
    let mut listener = server.listen(&address).unwrap();
    let endpoint = client.endpoint(&EndpointConfig::default()).unwrap();
    // More than a packet: it may find the door shut while it still speaks.
    let memory = Memory::new("test", 64).unwrap();
    let _regions: Vec<_> = (0..1000).map(|_| client.register(&memory, Access::RemoteRead).unwrap()).collect();
    for _ in 0..20 {
        let error = std::thread::scope(|scope| {
            let connecting = scope.spawn(|| client.connect(&endpoint.attach(), &address, b"", PATIENCE));
            while !connecting.is_finished() {
                assert!(listener.accept(Duration::from_millis(1)).unwrap().is_none(), "a stranger came in");
            }
            connecting.join().unwrap().unwrap_err()
        });
        assert!(
            matches!(error, Error::OtherUser { own: o, peer, .. } if o == own && peer == theirs),
            "{error}"
        );
        let text = error.to_string();
        assert!(text.contains(&format!("of user {theirs}, and this process is of user {own}")), "{text}");
    }
    assert_eq!(listener.strangers(), 0);
}

#[test]
fn a_client_says_nothing_to_another_users_listener() {
    let (address, path) = socket();
    let server = Shm::new().unwrap();
    let _listener = server.listen(&address).unwrap();
    let (client, own) = of_next_user(Admit::SameUser);
    let endpoint = client.endpoint(&EndpointConfig { connections: 1, ..EndpointConfig::default() }).unwrap();
    for _ in 0..3 {
        let error = client.connect(&endpoint.attach(), &address, b"secret", PATIENCE).unwrap_err();
        assert!(
            matches!(error, Error::OtherUser { own: o, peer, .. } if o == own && peer == server.0.user),
            "{error}"
        );
    }
    // A listener that looks at what comes: nothing did.
    drop(_listener);
    let spy = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::SEQPACKET, None)
        .unwrap();
    rustix::net::bind(&spy, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&spy, 4).unwrap();
    client.connect(&endpoint.attach(), &address, b"secret", PATIENCE).unwrap_err();
    let peer = rustix::net::accept(&spy).unwrap();
    assert!(matches!(wire::peek(&peer), wire::Received::End), "it said something");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn whoever_admits_all_learns_who_it_is() {
    let (address, path) = socket();
    let (server, _) = of_next_user(Admit::AnyUser);
    let client = Shm::admitting(Admit::AnyUser).unwrap();
    let mut listener = server.listen(&address).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o666);
    let (server_end, client_end) = (
        server.endpoint(&EndpointConfig::default()).unwrap(),
        client.endpoint(&EndpointConfig::default()).unwrap(),
    );
    std::thread::scope(|scope| {
        let connecting =
            scope.spawn(|| client.connect(&client_end.attach(), &address, b"key", PATIENCE).map(|_| ()));
        let request = listener.accept(PATIENCE).unwrap().unwrap();
        assert_eq!(request.user(), client.0.user);
        let _accepted = request.accept(&server_end.attach(), b"").unwrap();
        connecting.join().unwrap().unwrap();
    });
}

#[test]
fn the_socket_is_never_wider_than_its_user() {
    if argument().is_none() {
        // The umask is the whole process's.
        return run_alone("users::the_socket_is_never_wider_than_its_user", "alone");
    }
    let transport = Shm::new().unwrap();
    let any = Shm::admitting(Admit::AnyUser).unwrap();
    for umask in [0, 0o022, 0o077, 0o177, 0o277, 0o777] {
        rustix::process::umask(Mode::from_raw_mode(umask));
        let (address, path) = socket();
        let mode = |path: &PathBuf| std::fs::symlink_metadata(path).unwrap().mode() & 0o777;
        let listener = transport.listen(&address).unwrap();
        assert_eq!(mode(&path), 0o600, "umask {umask:o}");
        drop(listener);
        let listener = any.listen(&address).unwrap();
        assert_eq!(mode(&path), 0o666, "umask {umask:o}");
        drop(listener);
    }
    // Somebody who looks all the time.
    rustix::process::umask(Mode::from_raw_mode(0));
    let (address, path) = socket();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let (mut widest, mut looks) = (0, 0);
            while !stop.load(Ordering::Relaxed) {
                if let Ok(file) = std::fs::symlink_metadata(&path) {
                    widest |= file.mode() & 0o777;
                    looks += 1;
                }
            }
            (widest, looks)
        });
        let mut turn = 0;
        while turn < 2000 {
            drop(transport.listen(&address).unwrap());
            turn += 1;
        }
        let _last = transport.listen(&address).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        stop.store(true, Ordering::Relaxed);
        let (widest, looks) = looking.join().unwrap();
        assert!(looks > 0);
        assert_eq!(widest, 0o600, "seen in {looks} looks");
    });
}

#[test]
fn a_folder_that_is_locked_for_ever_is_an_error() {
    let folder = std::env::temp_dir().join(format!("fervor-locked-{}", std::process::id()));
    std::fs::create_dir(&folder).unwrap();
    let lock = std::fs::File::open(&folder).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let error = Shm::new().unwrap().listen(&Address::Shm(folder.join("s"))).err().unwrap().to_string();
    assert!(error.contains("lock on the directory") && error.contains(folder.to_str().unwrap()), "{error}");
    drop(lock);
    drop(Shm::new().unwrap().listen(&Address::Shm(folder.join("s"))).unwrap());
    std::fs::remove_dir(&folder).unwrap();
}

/// Says that these tests may be left out where they cannot be run.
const ONE_USER: &str = "FERVOR_TESTS_OF_ONE_USER";

/// Whether the test is to go on here: only root can start a process of another user. Otherwise it has been run to its end by the root of
/// a user namespace, who has the users that `/etc/subuid` lends this one.
fn is_root(test: &str) -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    let name = format!("transport::shm::tests::{test}");
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--map-auto", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture"])
        .status();
    let has_run = matches!(&status, Ok(status) if status.success() || status.code() == Some(101));
    if !has_run && std::env::var_os(ONE_USER).is_some() {
        eprintln!("{name}: NOT SHOWN, because there is no other user, and {ONE_USER} is set");
        return false;
    }
    assert!(
        matches!(&status, Ok(status) if status.success()),
        "{name} needs another user's process, and unshare ended with {status:?}. Run it as root; or install newuidmap (package uidmap), \
         give this user a range of 65536 in /etc/subuid and /etc/subgid, and let it make user namespaces; or set {ONE_USER}=1 to leave \
         it out"
    );
    false
}

/// A process of the user `nobody`. This one is root's.
fn as_nobody(test: &str, argument: &str) -> std::process::Child {
    program(test, argument).uid(NOBODY).gid(NOBODY).spawn().unwrap()
}

#[test]
fn a_process_of_another_user_is_kept_out() {
    if let Some(address) = argument() {
        let address: Address = address.parse().unwrap();
        let transport = Shm::new().unwrap();
        let endpoint = transport.endpoint(&EndpointConfig::default()).unwrap();
        let error = transport.connect(&endpoint.attach(), &address, b"", PATIENCE).unwrap_err();
        assert!(matches!(error, Error::OtherUser { own: NOBODY, peer: 0, .. }), "{error}");
        return;
    }
    let test = "users::a_process_of_another_user_is_kept_out";
    if !is_root(test) {
        return;
    }
    // The mode of the socket keeps it out; and where that does not, what the kernel says of its peer.
    for admit in [Admit::SameUser, Admit::AnyUser] {
        let (address, _) = socket();
        let mut listener = Shm::admitting(admit).unwrap().listen(&address).unwrap();
        let mut child = as_nobody(test, &address.to_string());
        assert!(child.wait().unwrap().success());
        assert!(listener.accept(Duration::from_millis(50)).unwrap().is_none());
    }
}

#[test]
fn a_process_of_another_user_gets_nothing_of_a_client() {
    if let Some(address) = argument() {
        let address: Address = address.parse().unwrap();
        let mut listener = Shm::admitting(Admit::AnyUser).unwrap().listen(&address).unwrap();
        assert!(listener.accept(PATIENCE).unwrap().is_none(), "somebody said something");
        return;
    }
    let test = "users::a_process_of_another_user_gets_nothing_of_a_client";
    if !is_root(test) {
        return;
    }
    let (address, path) = socket();
    let mut child = as_nobody(test, &address.to_string());
    let transport = Shm::new().unwrap();
    let endpoint = transport.endpoint(&EndpointConfig::default()).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let error = loop {
        match transport.connect(&endpoint.attach(), &address, b"secret", PATIENCE).unwrap_err() {
            Error::Unreachable { .. } if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5))
            }
            error => break error,
        }
    };
    assert!(matches!(error, Error::OtherUser { own: 0, peer: NOBODY, .. }), "{error}");
    child.kill().unwrap();
    child.wait().unwrap();
    let _ = std::fs::remove_file(path);
}

/// Root lets nobody in on purpose: it reads what it may, and can write nothing more.
#[test]
fn a_process_of_another_user_that_was_let_in_can_only_read_what_may_only_be_read() {
    if let Some(address) = argument() {
        let transport = Shm::admitting(Admit::AnyUser).unwrap();
        let endpoint = transport.endpoint(&EndpointConfig::default()).unwrap();
        let (bell, _file) = bell::Page::create().unwrap();
        drop(bell);
        let hello = wire::Opening {
            kind: wire::Kind::Hello,
            slot: 0,
            regions: 0,
            region_bytes: 0,
            receive_size: 64,
            receive_buffers: 1,
            send_depth: 1,
            data: Vec::new(),
        };
        let path = address.parse::<Address>().unwrap();
        let Address::Shm(path) = path else { panic!() };
        let raw = sockets::stranger(&path);
        wire::send(&raw, &hello.encode(), &[endpoint.attach().0.bell_file()], None).unwrap();
        wire::ready(&raw, rustix::event::PollFlags::IN, PATIENCE).unwrap();
        let (_, fds) = wire::take(&raw).unwrap();
        assert_eq!(fds.len(), 3);
        wire::ready(&raw, rustix::event::PollFlags::IN, PATIENCE).unwrap();
        for (record, fd) in wire::take_regions(&raw, 2).unwrap() {
            use std::os::fd::AsRawFd;
            let again =
                std::fs::OpenOptions::new().write(true).open(format!("/proc/self/fd/{}", fd.as_raw_fd()));
            assert!(again.is_err(), "the mode of the file lets another user in");
            let mappings = mapping::Mappings::new(NOBODY);
            assert!(mappings.open(&fd, 8, false).is_ok());
            assert_eq!(mappings.open(&fd, 8, true).is_ok(), record.writable);
        }
        return;
    }
    let test = "users::a_process_of_another_user_that_was_let_in_can_only_read_what_may_only_be_read";
    if !is_root(test) {
        return;
    }
    let (address, _) = socket();
    let transport = Shm::admitting(Admit::AnyUser).unwrap();
    let mut listener = transport.listen(&address).unwrap();
    let small = |access| transport.register(&Memory::new("test", 4096).unwrap(), access).unwrap();
    let _regions = [small(Access::RemoteRead), small(Access::RemoteWrite)];
    let endpoint = transport.endpoint(&EndpointConfig::default()).unwrap();
    let mut child = as_nobody(test, &address.to_string());
    let request = listener.accept(PATIENCE).unwrap().expect("a request");
    assert_eq!(request.user(), NOBODY);
    let _connection = request.accept(&endpoint.attach(), b"").unwrap();
    assert!(child.wait().unwrap().success());
}
