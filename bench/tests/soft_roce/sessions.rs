//! One server that all three ways lead to, and clients that take each of them after a session.

use std::time::Duration;

use crate::program::{Program, Server};

/// A job takes a second on an idle machine.
const LIMIT: Duration = Duration::from_secs(200);

/// Trains by way of `url`, every read checked. What it says of its reads.
fn train(url: &str) -> String {
    let job = ["mf", "--generate", "200x100:5000", "--epochs", "3", "--clients", "2", "--check"];
    let said = Program::bench(&[&job[..], &["--server", url]].concat()).finish(LIMIT);
    println!("{url}: {said}");
    let reads = said.lines().find(|line| line.starts_with("reads: "));
    reads.expect("it says how rows were read").to_owned()
}

#[test]
fn a_session_leads_to_rdma_shared_memory_and_tcp() {
    let server = Server::listening("fervor://10.7.0.2:0", 2, "10");
    // On this host the best way is no copy at all.
    let best = train(server.url());
    assert!(best.contains(" 0 hits, 0 misses"), "{best}");
    for via in ["rdma", "tcp"] {
        let reads = train(&format!("{}?via={via}", server.url()));
        assert!(reads.starts_with("reads: 0 in place"), "{via}: {reads}");
    }
}
