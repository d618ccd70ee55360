//! A host of several ways: who may come in, by which way, and what others can do to it.

use super::*;

fn parse(url: &str) -> Address {
    url.parse().unwrap()
}

#[test]
fn the_scheme_picks_the_providers() {
    let choose = |urls: &[&str]| Host::for_addresses(&urls.iter().map(|url| parse(url)).collect::<Vec<_>>());
    let ways = |urls: &[&str]| {
        let host = choose(urls).unwrap();
        [Way::Shm, Way::Tcp].map(|way| host.has(way))
    };
    assert_eq!(ways(&["shm:///tmp/a", "shm:///tmp/b"]), [true, false]);
    assert_eq!(ways(&["tcp://a:1", "tcp://b:1"]), [false, true]);
    assert_eq!(ways(&["fervor://127.0.0.1:1"]), [true, true]);
    assert_eq!(ways(&["fervor://127.0.0.1:1?via=tcp"]), [false, true]);
    assert_eq!(ways(&["fervor://127.0.0.1:1?via=tcp", "fervor://127.0.0.1:2?via=shm"]), [true, true]);
    let mixed = choose(&["shm:///tmp/a", "shm:///tmp/b", "rdma://c:1"]).unwrap_err().to_string();
    assert!(mixed.contains("`rdma://c:1`") && mixed.contains("`shm:///tmp/a`"), "{mixed}");
    assert!(mixed.contains("fervor://"), "no cure in: {mixed}");
    assert!(choose(&["sim://a"]).unwrap_err().to_string().contains("simulations"));
    assert!(choose(&[]).unwrap_err().to_string().contains("no address"));
    let keys: KeyRing = [Key::generate("a").unwrap()].into_iter().collect();
    let unused = Host::with_keys(&[parse("tcp://a:1")], keys).unwrap_err().to_string();
    assert!(unused.contains("`tcp://a:1`") && unused.contains("fervor://"), "{unused}");
}
