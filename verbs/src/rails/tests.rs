//! Ports that become rails, what peers are told of them, and which reach each other.

use super::*;
use crate::devices::GidKind;

fn gid(index: u32, gid: &str, kind: GidKind, prefix: Option<u8>) -> GidInfo {
    GidInfo { index, gid: gid.parse().unwrap(), kind, interface: "eth0".into(), prefix }
}

fn port(number: u32, state: &str, gids: Vec<GidInfo>) -> PortInfo {
    let (link_layer, rate) = ("Ethernet".to_owned(), "100 Gb/sec (4X EDR)".to_owned());
    PortInfo { number, state: state.into(), link_layer, rate, gids }
}

fn device(name: &str, software: bool, ports: Vec<PortInfo>) -> DeviceInfo {
    DeviceInfo {
        name: name.into(),
        guid: String::new(),
        firmware: String::new(),
        software,
        numa_node: None,
        local_cores: Vec::new(),
        capabilities: None,
        ports,
    }
}

fn v4(index: u32, ip: &str) -> GidInfo {
    gid(index, &format!("::ffff:{ip}"), GidKind::RoceV2, Some(120))
}

/// A NIC of two ports of which one is down, one of one port, one without an address, and one in software.
fn machine() -> Vec<DeviceInfo> {
    vec![
        device(
            "mlx5_0",
            false,
            vec![port(1, "ACTIVE", vec![v4(3, "10.0.0.1")]), port(2, "DOWN", vec![v4(3, "10.0.1.1")])],
        ),
        device("mlx5_1", false, vec![port(1, "ACTIVE", vec![v4(3, "10.0.2.1")])]),
        device("mlx5_2", false, vec![port(1, "ACTIVE", Vec::new())]),
        device("rxe0", true, vec![port(1, "ACTIVE", vec![v4(1, "10.7.0.1")])]),
    ]
}

fn chosen(devices: &[DeviceInfo], told: &[&str]) -> Result<Vec<String>, String> {
    let told: Vec<RailName> = told.iter().map(|name| name.parse().unwrap()).collect();
    let all = candidates(devices, &told, &Fabric::default()).map_err(|error| error.to_string())?;
    Ok(all.iter().filter(|one| one.verdict.is_ok()).map(Candidate::name).collect())
}

#[test]
fn names_are_read_and_bad_ones_are_refused_with_the_cure() {
    for text in ["mlx5_0", "mlx5_0:2"] {
        assert_eq!(text.parse::<RailName>().unwrap().to_string(), text);
    }
    let long = "x".repeat(MAX_NAME);
    for text in ["", ":1", "mlx5_0:", "mlx5_0:0", "mlx5_0:256", "mlx5_0:a", "../mlx5_0", long.as_str()] {
        let error = text.parse::<RailName>().unwrap_err();
        assert!(error.contains(&format!("`{text}`")) && error.contains("mlx5_0:1"), "{text}: {error}");
    }
}

#[test]
fn all_active_ports_of_hardware_are_rails_if_nothing_is_said() {
    assert_eq!(chosen(&machine(), &[]).unwrap(), ["mlx5_0:1", "mlx5_1:1"]);
    // Without hardware, devices in software are.
    assert_eq!(chosen(&machine()[3..], &[]).unwrap(), ["rxe0:1"]);
    assert_eq!(chosen(&[], &[]).unwrap(), [""; 0]);
    let all = candidates(&machine(), &[], &Fabric::default()).unwrap();
    let reasons: Vec<_> = all.into_iter().filter_map(|one| one.verdict.err()).collect();
    assert_eq!(reasons.len(), 3);
    for (reason, part) in reasons.iter().zip(["DOWN", "no address", "in software"]) {
        assert!(reason.contains(part), "{reason}");
    }
}

#[test]
fn those_that_are_named_are_rails_whatever_their_state() {
    assert_eq!(chosen(&machine(), &["mlx5_0:2", "rxe0"]).unwrap(), ["mlx5_0:2", "rxe0:1"]);
    // A device without a port: those that are active; or the first one, which may come up.
    assert_eq!(chosen(&machine(), &["mlx5_0"]).unwrap(), ["mlx5_0:1"]);
    let mut down = machine();
    down[0].ports[0].state = "DOWN".into();
    assert_eq!(chosen(&down, &["mlx5_0"]).unwrap(), ["mlx5_0:1"]);
    assert!(chosen(&machine(), &["mlx5_7"]).unwrap_err().contains("there are: mlx5_0, mlx5_1"));
    assert!(chosen(&machine(), &["mlx5_1:2"]).unwrap_err().contains("mlx5_1 has no port 2"));
}

#[test]
fn there_are_eight_at_most() {
    let one =
        |number| device(&format!("d{number:02}"), false, vec![port(1, "ACTIVE", vec![v4(0, "10.0.0.1")])]);
    let many: Vec<_> = (0..10).map(one).collect();
    assert_eq!(chosen(&many, &[]).unwrap().len(), MAX_RAILS);
    let names: Vec<String> = many.iter().map(|device| device.name.clone()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    assert_eq!(chosen(&many, &names[..MAX_RAILS]).unwrap().len(), MAX_RAILS);
    let error = chosen(&many, &names).unwrap_err();
    assert!(error.contains("10") && error.contains('8'), "{error}");
}

#[test]
fn peers_are_told_addresses_that_lead_somewhere() {
    let told = |gids: Vec<GidInfo>, index| {
        let fabric = Fabric { gid_index: index, ..Fabric::default() };
        let found = own_addresses(&port(1, "ACTIVE", gids), &fabric);
        found.into_iter().map(|own| own.index).collect::<Vec<_>>()
    };
    let all = || {
        vec![
            gid(0, "fe80::1", GidKind::RoceV1, Some(64)),
            gid(1, "fe80::1", GidKind::RoceV2, Some(64)),
            gid(2, "::ffff:10.0.0.1", GidKind::RoceV1, Some(120)),
            gid(3, "2001:db8::1", GidKind::RoceV2, Some(64)),
            v4(4, "10.0.0.1"),
        ]
    };
    assert_eq!(told(all(), None), [4, 3]);
    assert_eq!(told(all(), Some(2)), [2]);
    assert_eq!(told(all()[..3].to_vec(), None), [1], "of the link alone");
    assert_eq!(told([&all()[..1], &all()[2..3]].concat(), None), [0, 2], "of version 1 alone");
    assert_eq!(told((0..9).map(|n| v4(n, "10.0.0.1")).collect(), None).len(), MAX_ADDRESSES);
    assert_eq!(told(Vec::new(), None), [0; 0]);
}

#[test]
fn addresses_reach_those_of_their_subnet_and_of_their_kind() {
    let address = |network, gid: &str, prefix| RailAddress { network, gid: gid.parse().unwrap(), prefix };
    let v4 = |ip: &str, bits: u8| address(Way::RoceV2Ipv4, &format!("::ffff:{ip}"), 96 + bits);
    let near = v4("10.7.0.1", 24);
    assert_eq!(near.reaches(&v4("10.7.0.2", 24)), Some(Reach::Subnet));
    assert_eq!(near.reaches(&v4("10.7.1.2", 24)), Some(Reach::Routed));
    // Each must know the other to be near.
    assert_eq!(near.reaches(&v4("10.7.0.2", 32)), Some(Reach::Routed));
    assert_eq!(v4("10.7.0.1", 16).reaches(&v4("10.7.1.2", 24)), Some(Reach::Routed));
    let v6 = |gid, prefix| address(Way::RoceV2Ipv6, gid, prefix);
    assert_eq!(v6("2001:db8::1", 64).reaches(&v6("2001:db8::2", 64)), Some(Reach::Subnet));
    assert_eq!(v6("fe80::1", 64).reaches(&v6("2001:db8::2", 64)), None);
    assert_eq!(near.reaches(&v6("2001:db8::2", 64)), None, "another kind");
    let ib = |gid| address(Way::InfiniBand, gid, 64);
    assert_eq!(ib("fe80::1").reaches(&ib("fe80::2")), Some(Reach::Subnet));
    assert_eq!(ib("fe80::1").reaches(&ib("fe80:0:0:1::2")), None, "another subnet");
    // Prefixes of 0 and 128 bits, as a peer may tell them.
    assert_eq!(v6("::1", 0).reaches(&v6("::2", 0)), Some(Reach::Subnet));
    assert_eq!(v6("::1", 128).reaches(&v6("::1", 128)), Some(Reach::Subnet));
}

#[test]
fn rates_are_read_as_the_kernel_writes_them() {
    assert_eq!(megabits("100 Gb/sec (4X EDR)"), 100_000);
    assert_eq!(megabits("2.5 Gb/sec (1X SDR)"), 2500);
    assert_eq!(megabits(""), 0);
    assert_eq!(megabits("-1 Gb/sec"), 0);
}
