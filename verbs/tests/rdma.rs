//! The conformance suite over RDMA, between the two soft-RoCE devices that `ci/soft-roce` makes: the client works on
//! rxe0 (10.7.0.1), the server on rxe1 (10.7.0.2), and packets really cross the pair. Once more as a [`Host`] that is
//! [`faulty`](fervor_verbs::transport::faulty): with nothing planned, and with completions that are late. Over sessions, whose two ends
//! work on rxe1: the device of the address that is connected to. And a part of it on a network that loses, doubles and reorders packets.
//!
//! Run by `ci/soft-roce-suite`. A plain `cargo test` leaves it out; where it runs and there is no device, it fails.

use std::{
    fs,
    io::Write,
    marker::PhantomData,
    net::{IpAddr, SocketAddr, TcpStream},
    process::Command,
    sync::OnceLock,
};

use fervor_verbs::{
    Address,
    session::{Key, KeyRing, Way},
    transport::{
        Endpoint, EndpointConfig, Transport,
        any::Host,
        conformance::{self, Effort, Holdings, ProcessRig, Side, Subject},
        faulty::suite::{FaultyRig, Late, Nothing},
        rdma::Rdma,
    },
};

/// The client's address, and the server's.
const CLIENT: &str = "10.7.0.1";
const SERVER: &str = "10.7.0.2";

/// The provider, or what holds it.
trait Over: Transport {
    fn of(rdma: Rdma) -> Self;
}

impl Over for Rdma {
    fn of(rdma: Rdma) -> Self {
        rdma
    }
}

impl Over for Host {
    fn of(rdma: Rdma) -> Self {
        Host::from(rdma)
    }
}

type RdmaRig<T> = ProcessRig<Hosts<T>>;

/// Two of them, one on each device.
struct Hosts<T>(PhantomData<T>);

impl<T: Over> Subject for Hosts<T> {
    type Transport = T;
    const MODULE: &'static str = module_path!();
    const VIEWS: bool = false;
    const LOOPBACK: bool = false;

    fn host(side: Side) -> T {
        let device = if side == Side::Client { "rxe0" } else { "rxe1" };
        T::of(Rdma::on_device(device).unwrap_or_else(|error| panic!("{device}: {error}")))
    }

    fn address(rig: u32, number: u32) -> Address {
        let port = u16::try_from(20_000 + rig % 1000 * 8 + number).expect("few addresses");
        Address::Rdma { host: SERVER.to_owned(), port, from: None }
    }

    fn dial(listening: &Address) -> Address {
        let Address::Rdma { host, port, .. } = listening else {
            panic!("{listening} is not of this provider")
        };
        Address::Rdma { host: host.clone(), port: *port, from: Some(CLIENT.to_owned()) }
    }

    fn effort() -> Effort {
        let deaths = std::env::var("FERVOR_TEST_DEATHS").map_or(200, |text| text.parse().expect("a number"));
        Effort { rounds: 100, connects: 300, deaths, ..Effort::default() }
    }

    fn stalled(address: &Address, step: usize) -> Option<Box<dyn Send>> {
        stalled(address, step)
    }

    fn cut() -> Option<Box<dyn Send>> {
        Some(Box::new(Network::new("loss 100%")))
    }

    /// To register memory is to pin all of it, and both hosts have some here.
    fn holdings() -> Holdings {
        let mut holdings = Holdings::of_this_process();
        let output = Command::new("rdma").args(["resource", "show"]).output().expect("run rdma");
        assert!(output.status.success(), "rdma resource show: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).expect("text");
        let words: Vec<&str> = text.split_whitespace().collect();
        for name in ["qp", "cq", "mr", "pd"] {
            let numbers = words.windows(2).filter(|pair| pair[0] == name);
            let numbers: Vec<u64> = numbers.map(|pair| pair[1].parse().expect("a number")).collect();
            assert_eq!(numbers.len(), 2, "of each of two devices: {text}");
            holdings.counts.push((name, numbers.iter().sum()));
        }
        holdings
    }
}

/// See [`Subject::stalled`].
fn stalled(address: &Address, step: usize) -> Option<Box<dyn Send>> {
    /// Bytes of an opening.
    const MESSAGE: usize = 168;
    let Address::Rdma { host, port, .. } = address else { panic!("{address} is not of this provider") };
    // One for all strangers of this process.
    static STRANGERS: OnceLock<Rdma> = OnceLock::new();
    let client = STRANGERS.get_or_init(|| Rdma::on_device("rxe0").expect("rxe0"));
    let endpoint = client.endpoint(&EndpointConfig::default()).expect("endpoint");
    let own: IpAddr = CLIENT.parse().expect("an address");
    let joining = client.join(&endpoint.attach(), own).expect("join");
    let mut request = [0; MESSAGE];
    request[..8].copy_from_slice(b"FVR\x02\x01\0\x08\0");
    request[8..40].copy_from_slice(&joining.offer());
    request[40..48].copy_from_slice(b"stranger");
    // In the magic number, in the offer, before the last byte; and after it: then it is accepted, and never says that it is ready.
    let said = *[0, 3, 20, MESSAGE - 1, MESSAGE].get(step)?;
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None);
    let socket = socket.expect("socket");
    rustix::net::bind(&socket, &SocketAddr::new(own, 0)).expect("bind");
    let server: IpAddr = host.parse().expect("an address");
    rustix::net::connect(&socket, &SocketAddr::new(server, *port)).expect("connect");
    let mut socket = TcpStream::from(socket);
    // It may have been shown the door by now.
    let _ = socket.write_all(&request[..said]);
    Some(Box::new((socket, joining, endpoint)))
}

/// A rule of netem for both ends of the wire, for as long as this lives.
struct Network;

impl Network {
    fn new(rule: &str) -> Self {
        // From here on it is taken away again, even if only one end has it.
        let network = Self;
        for end in ["v0", "v1"] {
            let rule = rule.split(' ');
            let status = Command::new("tc")
                .args(["qdisc", "replace", "dev", end, "root", "netem"])
                .args(rule)
                .status()
                .expect("run tc");
            assert!(status.success(), "tc: {status}");
        }
        network
    }

    /// Packets that were lost on both ends so far.
    fn lost(&self) -> u64 {
        let lost = |end: &&str| {
            let output =
                Command::new("tc").args(["-s", "qdisc", "show", "dev", end]).output().expect("run tc");
            let said = String::from_utf8(output.stdout).expect("text");
            let number =
                said.split_once("dropped ").and_then(|(_, rest)| rest.split(',').next()?.parse::<u64>().ok());
            number.unwrap_or_else(|| panic!("tc does not say how many were dropped: {said}"))
        };
        ["v0", "v1"].iter().map(lost).sum()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for end in ["v0", "v1"] {
            let status = Command::new("tc").args(["qdisc", "del", "dev", end, "root"]).status();
            if !status.as_ref().is_ok_and(|status| status.success()) {
                eprintln!("{end} stays as it was made: {status:?}");
            }
        }
    }
}

fervor_verbs::conformance!(RdmaRig<Rdma>, pinned);

mod faulty {
    use super::*;

    fervor_verbs::conformance!(FaultyRig<RdmaRig<Host>, Nothing>, pinned);
}

mod late {
    use super::*;

    fervor_verbs::conformance!(FaultyRig<RdmaRig<Host>, Late>, pinned);
}

mod sessions {
    use super::*;

    /// Two hosts that go to each other by sessions, and insist on RDMA.
    struct Sessions;

    impl Subject for Sessions {
        type Transport = Host;
        const MODULE: &'static str = module_path!();
        const VIEWS: bool = false;
        const LOOPBACK: bool = false;

        fn host(_: Side) -> Host {
            // The same for a victim in a process of its own.
            let key: Key = format!("suite {}", "5a".repeat(32)).parse().expect("a key");
            let keys: KeyRing = [key].into_iter().collect();
            // One rail: an endpoint has places and buffers for each, and the suite counts them.
            let device = ["rxe1".parse().expect("a device")];
            let host = Host::with_devices(&[Self::address(0, 0)], keys, &device);
            host.unwrap_or_else(|error| panic!("{error}"))
        }

        fn address(rig: u32, number: u32) -> Address {
            let port = u16::try_from(29_000 + rig % 1000 * 8 + number).expect("few addresses");
            Address::Session { host: SERVER.to_owned(), port, via: Some(Way::Rdma) }
        }

        fn effort() -> Effort {
            Hosts::<Host>::effort()
        }

        /// Strangers that say nothing, or a part of an opening. Those who go further: `any/suite.rs`, where messages can be made.
        fn stalled(address: &Address, step: usize) -> Option<Box<dyn Send>> {
            let Address::Session { host, port, .. } = address else { panic!("{address} has no sessions") };
            let said = *["", "F"].get(step)?;
            let mut socket = TcpStream::connect((host.as_str(), *port)).expect("connect");
            // It may have been shown the door by now.
            let _ = socket.write_all(said.as_bytes());
            Some(Box::new(socket))
        }

        fn holdings() -> Holdings {
            Hosts::<Host>::holdings()
        }
    }

    fervor_verbs::conformance!(ProcessRig<Sessions>, pinned);
}

/// The cases for a network that is not as it should be: those that break no connection themselves. Where packets are lost, a connection may
/// break (a request is sent again a few times, not for ever), so a payload of a MiB is not among them.
const ON_A_BAD_NETWORK: &[&str] = &[
    "payloads_gathered",
    "payloads_read_scattered",
    "payloads_of_dropped_regions_arrive",
    "order_writes_are_visible_when_an_immediate_is_polled",
    "order_writes_are_visible_when_a_message_is_polled",
    "order_a_completed_read_proves_earlier_writes",
    "order_the_last_write_wins",
    "order_messages_and_immediates_keep_theirs",
    "order_words_in_two_pieces_are_whole",
    "order_a_third_party_reads_what_it_learned_of",
    "queues_full_send_queue_refuses_and_loses_nothing",
    "queues_unsignalled_without_end",
    "queues_receive_buffers_are_shared",
    "queues_late_release_loses_nothing",
    "queues_immediates_give_their_credit_back",
    "queues_reads_beyond_the_read_depth_wait",
    "threads_many_post_while_one_polls",
    "faults_completed_messages_come_before_the_end",
    "faults_outstanding_operations_complete",
];

/// What a device counts.
fn counter(device: &str, name: &str) -> u64 {
    let path = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/{name}");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.trim().parse().expect("a number")
}

#[test]
fn a_network_that_loses_doubles_and_reorders_packets_costs_time_and_nothing_else() {
    const COUNTERS: [&str; 4] =
        ["duplicate_request", "out_of_seq_request", "rcvd_seq_err", "completer_retry_err"];
    let counted = || COUNTERS.map(|name| counter("rxe0", name) + counter("rxe1", name));
    let before = counted();
    let network = Network::new("limit 100000 delay 300us reorder 97% 25% duplicate 1% loss 0.3%");
    for case in ON_A_BAD_NETWORK {
        println!("{case} on a bad network");
        conformance::run::<RdmaRig<Rdma>>(module_path!(), case);
    }
    let lost = network.lost();
    let after = counted();
    println!("{lost} packets lost; {COUNTERS:?} from {before:?} to {after:?}");
    assert!(lost > 0, "no packet was lost: this test has shown nothing");
    assert!(after[0] > before[0], "no request came twice: this test has shown little");
    assert!(after[1] > before[1], "no request came out of order: this test has shown little");
}
