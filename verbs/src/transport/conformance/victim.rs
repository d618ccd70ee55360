//! The process that is killed, or stopped.

use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};

use super::{
    Posts, Rig, Side,
    pair::{Background, PATIENCE, encode},
};
use rustix::process::{Pid, Signal as Sent, WaitOptions, kill_process, waitpid};

use crate::{
    address::Address,
    error::Error,
    memory::Memory,
    transport::{
        Access, Completion, Connection, Endpoint, EndpointConfig, Listener, Payload, Region, Request,
        Runtime, Sge, Transport,
    },
};

/// Environment variable that tells a victim process its role and address.
const VICTIM: &str = "FERVOR_CONFORMANCE_VICTIM";

/// Bytes of the region that a victim offers.
pub(super) const VICTIM_MEMORY: usize = 64 << 10;

/// What a victim does first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It connects to the address.
    Connects,
    /// It listens there and accepts one connection.
    Listens,
    /// It connects to the address [`SENDERS`] times, and sends long messages over all of these connections.
    Sends,
}

/// Connections of a victim that sends.
pub(super) const SENDERS: usize = 8;

impl Role {
    const NAMES: [(Role, &'static str); 3] =
        [(Role::Connects, "connects"), (Role::Listens, "listens"), (Role::Sends, "sends")];

    /// Whose host it is on.
    fn side(self) -> Side {
        if self == Role::Listens { Side::Server } else { Side::Client }
    }
}

/// What the victim's endpoint is made for; a case may send it as many messages as it has buffers.
pub(super) fn config() -> EndpointConfig {
    EndpointConfig { receive_buffers: 64, receive_size: 256, ..EndpointConfig::default() }
}

/// How long a victim lives if nobody kills it.
const LIFE: Duration = Duration::from_secs(60);

/// The life of a victim: it makes one connection, sends the name of its region over it, and then polls (and
/// takes messages in) until it is killed; after a minute it ends by itself. One that [sends](Role::Sends) does that, messages of
/// `message` bytes.
///
/// # Panics
/// When it cannot connect.
pub fn victim<T: Transport>(transport: &T, role: Role, address: &Address, message: usize) {
    if role == Role::Sends {
        return sender(transport, address, message);
    }
    let memory = Memory::new("victim", VICTIM_MEMORY).expect("memory for the victim");
    let region = transport.register(&memory, Access::RemoteWrite).expect("register");
    let mut endpoint = transport.endpoint(&config()).expect("endpoint");
    let attach = endpoint.attach();
    let mut connection = match role {
        Role::Connects | Role::Sends => {
            transport.connect(&attach, address, b"victim", PATIENCE).expect("connect").0
        }
        Role::Listens => {
            let mut listener = transport.listen(address).expect("listen");
            let request = listener.accept(PATIENCE).expect("accept").expect("nobody connects to the victim");
            request.accept(&attach, b"victim").expect("accept")
        }
    };
    connection.send(Payload::Inline(&encode(region.remote())), None, None).expect("send");
    connection.ring().expect("ring");
    let (born, mut turn, mut seen) = (transport.now(), 0, Vec::new());
    while transport.now() < born + LIFE {
        turn = if endpoint.poll(&mut seen) > 0 { 0 } else { turn + 1 };
        for completion in seen.drain(..) {
            if let Completion::Received { buffer, .. } = completion {
                endpoint.release(buffer);
            }
        }
        transport.relax(turn);
    }
}

/// The life of a victim that sends: two messages on each connection are on their way, whatever becomes of those before.
fn sender<T: Transport>(transport: &T, address: &Address, message: usize) {
    let memory = Memory::new("victim", message).expect("memory for the victim");
    let region = transport.register(&memory, Access::Local).expect("register");
    let config = EndpointConfig { receive_buffers: 1, send_depth: 2, ..EndpointConfig::default() };
    let mut endpoint = transport.endpoint(&config).expect("endpoint");
    let attach = endpoint.attach();
    let one = |_| transport.connect(&attach, address, b"victim", PATIENCE).expect("connect").0;
    let mut connections: Vec<_> = (0..SENDERS).map(one).collect();
    let (born, mut turn, mut seen) = (transport.now(), 0, Vec::new());
    while transport.now() < born + LIFE {
        for connection in &mut connections {
            let pieces = [Sge { region: &region, offset: 0, length: message }];
            while connection.send(Payload::Gather(&pieces), None, Some(0)).is_ok() {}
            let _ = connection.ring();
        }
        turn = if endpoint.poll(&mut seen) > 0 { 0 } else { turn + 1 };
        seen.clear();
        transport.relax(turn);
    }
}

/// The `victim` test: what a victim process runs.
///
/// # Panics
/// When it was not started by [`VictimProcess::start`].
pub fn victim_main<R: Rig>() {
    let order = std::env::var(VICTIM).unwrap_or_else(|_| panic!("{VICTIM} is not set: the suite sets it"));
    let (role, address) = order.split_once(' ').expect("role and address");
    let address = address.parse().expect("the address of the suite");
    let role = Role::NAMES.into_iter().find(|(_, name)| *name == role).expect("a role of the suite").0;
    let rig = R::new("victim", 0);
    victim(&rig.host(role.side()), role, &address, rig.effort().message);
}

/// A victim in a process of its own: this test program, run again with its `victim` test alone.
#[derive(Debug)]
pub struct VictimProcess(Child);

impl VictimProcess {
    /// Starts it. `test` is the full name of the `victim` test that `conformance!` made, as in
    /// `transport::shm::tests::victim`.
    ///
    /// # Panics
    /// When the program cannot be started.
    pub fn start(test: &str, role: Role, address: &Address) -> Self {
        let role = Role::NAMES.into_iter().find(|(of, _)| *of == role).expect("all have names").1;
        let program = std::env::current_exe().expect("the path of the test program");
        let child = Command::new(program)
            .args([test, "--exact", "--ignored", "--nocapture"])
            .env(VICTIM, format!("{role} {address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("start the test program again");
        Self(child)
    }

    /// Kills it (SIGKILL) and waits until it is dead.
    ///
    /// # Panics
    /// When it had ended before.
    pub fn kill(mut self) {
        let ended = self.0.try_wait().expect("look after the victim");
        assert!(ended.is_none(), "the victim ended before it was killed: {ended:?}");
        self.0.kill().expect("kill the victim");
        self.0.wait().expect("wait for the victim's death");
    }

    /// Stops it (SIGSTOP), and returns when it has stopped.
    ///
    /// # Panics
    /// When it had ended before.
    pub fn stop(&self) {
        let pid = Pid::from_child(&self.0);
        kill_process(pid, Sent::STOP).expect("stop the victim");
        let (_, status) =
            waitpid(Some(pid), WaitOptions::UNTRACED).expect("wait for the victim").expect("it stops");
        assert!(status.stopped(), "the victim ended before it was stopped: {status:?}");
    }

    /// Lets it go on (SIGCONT).
    ///
    /// # Panics
    /// When the system does not.
    pub fn resume(&self) {
        kill_process(Pid::from_child(&self.0), Sent::CONT).expect("let the victim go on");
    }
}

impl Drop for VictimProcess {
    /// A case that failed leaves no victim behind. After [`VictimProcess::kill`] both calls find it dead.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The surviving side of a connection with a victim.
pub(super) struct Survivor<R: Rig> {
    pub(super) transport: R::Transport,
    pub(super) endpoint: <R::Transport as Transport>::Endpoint,
    pub(super) connection: <R::Transport as Transport>::Connection,
    pub(super) victim: R::Victim,
}

impl<R: Rig> Survivor<R> {
    /// Starts a victim in this role and connects with it.
    pub(super) fn meet(rig: &R, role: Role) -> Self {
        let transport = rig.host(role.side().other());
        let endpoint = transport.endpoint(&config()).expect("endpoint");
        let attach = endpoint.attach();
        let address = rig.address(0);
        match role {
            Role::Sends => unreachable!("whoever receives is a case's business"),
            Role::Connects => {
                let mut listener = transport.listen(&address).expect("listen");
                let dial = rig.dial(listener.address());
                let accept = Background::start(&transport, move || {
                    let request = listener.accept(PATIENCE).expect("accept").expect("no victim connects");
                    request.accept(&attach, &[]).expect("accept")
                });
                let victim = rig.start(role, &dial);
                let connection = accept.join();
                Self { transport, endpoint, connection, victim }
            }
            Role::Listens => {
                let victim = rig.start(role, &address);
                let begun = transport.now();
                let mut turn = 0;
                let connection = loop {
                    match transport.connect(&attach, &rig.dial(&address), &[], PATIENCE) {
                        Ok((connection, _)) => break connection,
                        // It does not listen yet.
                        Err(Error::Unreachable { .. }) if transport.now() < begun + PATIENCE => {
                            transport.relax(turn);
                            turn += 1;
                        }
                        Err(error) => panic!("connect to the victim: {error}"),
                    }
                };
                Self { transport, endpoint, connection, victim }
            }
        }
    }
}
