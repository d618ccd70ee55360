//! How RDMA packets travel: the options of a fabric, and which port and address of this host a connection uses.
//!
//! Nothing here touches a device: the choice is made from what sysfs says ([`devices`](crate::devices)), so that `fervor-bench devices`
//! can print it, and tests can make it for machines that are not there.
//!
//! **The choice.** A connection is bootstrapped over a TCP socket. The socket's local IP address names a port: the one that has it among its
//! GIDs. RoCE version 2 goes before version 1. Where no port has it (InfiniBand without IPoIB; a bootstrap over a management network), it is
//! the device that the program was told, or the first one that is active. A port of InfiniBand is reached by its LID, one of Ethernet by the
//! first of its RoCE version 2 addresses, IPv4 before IPv6.

use std::{
    env, fmt, io,
    net::{IpAddr, Ipv6Addr},
};

use crate::{
    devices::{DeviceInfo, GidInfo, GidKind, PortInfo},
    error::Error,
};

/// What the packets of all connections of a transport have in common. The defaults are NCCL's, except for the hop limit (NCCL has
/// 255), and for what would break the contract's promise that a dead peer is found out within two seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fabric {
    /// Index in the port's table of GIDs (`FERVOR_IB_GID_INDEX`). `None`: looked up for each connection, so that it follows the address when
    /// the table changes. Both ends of a connection must use the same type of GID.
    pub gid_index: Option<u8>,
    /// Largest payload of a packet, bytes (`FERVOR_IB_MTU`: 256, 512, 1024, 2048 or 4096). `None`: what the port has. The smaller one of
    /// both ends is used.
    pub mtu: Option<u16>,
    /// Traffic class of the packets (`FERVOR_IB_TC`, 0 to 255): on RoCE the TOS byte of IP, that is DSCP times 4. 0, as NCCL.
    pub traffic_class: u8,
    /// Service level (`FERVOR_IB_SL`, 0 to 15). 0, as NCCL. On RoCE it is the priority of the VLAN.
    pub service_level: u8,
    /// Index in the port's table of partition keys (`FERVOR_IB_PKEY`). 0, as NCCL.
    pub pkey_index: u16,
    /// Routers that a packet may pass (`FERVOR_IB_HOP_LIMIT`, 1 to 255). 64: what Linux gives to IP packets (`net.ipv4.ip_default_ttl`).
    pub hop_limit: u8,
    /// Flow label (`FERVOR_IB_FLOW_LABEL`, 0 to 1048575), from which a RoCE device makes the UDP source port, and with it the path among
    /// equal ones. 0: the device chooses.
    pub flow_label: u32,
    /// When an unanswered packet is sent again, as the exponent of `4.096 us * 2^exponent` (`FERVOR_IB_TIMEOUT`, 1 to 31). `None`: 14 on
    /// hardware, 16 on devices in software. NCCL has 20, with which a dead link shows after half a minute.
    pub timeout: Option<u8>,
    /// How often (`FERVOR_IB_RETRY_CNT`, 0 to 7). `None`: 6 on hardware, 3 on devices in software. NCCL has 7, which rxe takes for "for ever".
    pub retry_cnt: Option<u8>,
}

impl Default for Fabric {
    fn default() -> Self {
        Self {
            gid_index: None,
            mtu: None,
            traffic_class: 0,
            service_level: 0,
            pkey_index: 0,
            hop_limit: 64,
            flow_label: 0,
            timeout: None,
            retry_cnt: None,
        }
    }
}

impl Fabric {
    /// The defaults, changed by the environment variables that are set.
    ///
    /// # Errors
    /// [`Error::System`] with the variable, its value and what it may be.
    pub fn from_env() -> Result<Self, Error> {
        Self::from_variables(|name| env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let number = |name: &str, least: u32, most: u32| -> Result<Option<u32>, Error> {
            let Some(text) = variable(name) else { return Ok(None) };
            match text.trim().parse() {
                Ok(value) if (least..=most).contains(&value) => Ok(Some(value)),
                _ => Err(wrong(name, &text, &format!("a number from {least} to {most}"))),
            }
        };
        let byte = |name: &str, least: u32, most: u32| {
            Ok::<_, Error>(number(name, least, most)?.map(|value| u8::try_from(value).expect("at most 255")))
        };
        let mtu = number("FERVOR_IB_MTU", 0, u32::MAX)?.map(|mtu| match mtu {
            256 | 512 | 1024 | 2048 | 4096 => Ok(mtu as u16),
            _ => Err(wrong("FERVOR_IB_MTU", &mtu.to_string(), "256, 512, 1024, 2048 or 4096")),
        });
        let default = Self::default();
        Ok(Self {
            gid_index: byte("FERVOR_IB_GID_INDEX", 0, 255)?,
            mtu: mtu.transpose()?,
            traffic_class: byte("FERVOR_IB_TC", 0, 255)?.unwrap_or(default.traffic_class),
            service_level: byte("FERVOR_IB_SL", 0, 15)?.unwrap_or(default.service_level),
            pkey_index: number("FERVOR_IB_PKEY", 0, 65_535)?.map_or(default.pkey_index, |value| value as u16),
            hop_limit: byte("FERVOR_IB_HOP_LIMIT", 1, 255)?.unwrap_or(default.hop_limit),
            flow_label: number("FERVOR_IB_FLOW_LABEL", 0, (1 << 20) - 1)?.unwrap_or(default.flow_label),
            timeout: byte("FERVOR_IB_TIMEOUT", 1, 31)?,
            retry_cnt: byte("FERVOR_IB_RETRY_CNT", 0, 7)?,
        })
    }

    /// When an unanswered request is sent again: the time, as the exponent of `4.096 us * 2^exponent`, and how often. Then the connection
    /// breaks. (7 times would mean for ever on rxe.)
    ///
    /// A dead peer is to be found out within two seconds, 0.4 s of which may pass until an idle connection asks. A NIC gives up after 0.5 s by
    /// its own clock, and may take up to four times that. rxe gives up after 1.1 s sharp. It gets the longer time at once because it shares the
    /// processors with all that keeps it from answering, and because it breaks connections when it sends READs again for no need.
    pub fn patience(&self, software: bool) -> (u8, u8) {
        let (timeout, retries) = if software { (16, 3) } else { (14, 6) };
        (self.timeout.unwrap_or(timeout), self.retry_cnt.unwrap_or(retries))
    }

    /// The payload of a packet through a port whose active MTU is `active`, bytes.
    pub fn mtu_of(&self, active: u16) -> u16 {
        self.mtu.map_or(active, |wanted| wanted.min(active))
    }
}

pub(crate) fn wrong(name: &str, value: &str, may_be: &str) -> Error {
    let reason = format!("it may be {may_be}; correct it, or unset it");
    Error::System {
        call: format!("reading the environment variable {name}={value}"),
        source: io::Error::new(io::ErrorKind::InvalidInput, reason),
    }
}

/// How a peer finds a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// InfiniBand: by the LID, which the subnet manager gives.
    InfiniBand,
    /// RoCE version 1: Ethernet frames.
    RoceV1,
    /// RoCE version 2 over IPv4.
    RoceV2Ipv4,
    /// RoCE version 2 over IPv6.
    RoceV2Ipv6,
}

impl Way {
    const ALL: [Self; 4] = [Self::InfiniBand, Self::RoceV1, Self::RoceV2Ipv4, Self::RoceV2Ipv6];

    /// Its number on the wire.
    pub(crate) fn code(self) -> u8 {
        1 + self as u8
    }

    /// The one of that number.
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|way| way.code() == code)
    }

    pub(crate) fn of(gid: &GidInfo) -> Self {
        match gid.kind {
            GidKind::InfiniBand => Self::InfiniBand,
            GidKind::RoceV1 => Self::RoceV1,
            GidKind::RoceV2 if gid.gid.to_ipv4_mapped().is_some() => Self::RoceV2Ipv4,
            GidKind::RoceV2 => Self::RoceV2Ipv6,
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InfiniBand => "InfiniBand",
            Self::RoceV1 => "RoCE v1",
            Self::RoceV2Ipv4 => "RoCE v2 over IPv4",
            Self::RoceV2Ipv6 => "RoCE v2 over IPv6",
        })
    }
}

/// The port and the address that a connection uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// Name of the device.
    pub device: String,
    /// Number of the port.
    pub port: u8,
    /// Index of the GID in the port's table.
    pub gid_index: u8,
    /// The GID.
    pub gid: Ipv6Addr,
    /// How peers find it.
    pub way: Way,
    /// Why this one.
    pub why: Reason,
}

/// Why a port and an address were chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The bootstrap socket has this IP address.
    Address(IpAddr),
    /// The bootstrap socket has another address: the best one of the device told, or of the first active one.
    Best,
    /// [`Fabric::gid_index`] says so.
    Index,
    /// The two ends agreed on it in their session.
    Rail,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(ip) => write!(f, "the socket has its address {ip}"),
            Self::Best => f.write_str("the best one; a socket that has another of its addresses takes that"),
            Self::Index => f.write_str("FERVOR_IB_GID_INDEX says so"),
            Self::Rail => f.write_str("it is an address of the rail"),
        }
    }
}

/// Chooses the port of `devices` for a socket whose local address is `ip`; on the device called `told`, if a name is given, and there on its
/// port `port`, if a number is.
///
/// # Errors
/// A sentence that says why there is none.
pub fn choose(
    devices: &[DeviceInfo],
    told: Option<&str>,
    port: Option<u8>,
    ip: IpAddr,
    fabric: &Fabric,
) -> Result<Local, String> {
    let of_device = |device: &&DeviceInfo| told.is_none_or(|name| device.name == name);
    let of_port = |number: u32| port.is_none_or(|wanted| number == u32::from(wanted));
    let ours = || {
        let active = |p: &&PortInfo| p.state == "ACTIVE" && of_port(p.number);
        devices.iter().filter(of_device).flat_map(move |d| d.ports.iter().filter(active).map(move |p| (d, p)))
    };
    let having = |d: &DeviceInfo| d.ports.iter().any(|p| p.gids.iter().any(|g| g.gid == mapped(ip)));
    if fabric.gid_index.is_none() {
        let found = ours()
            .flat_map(|(d, p)| p.gids.iter().filter(|g| g.gid == mapped(ip)).map(move |g| (d, p, g)))
            .max_by_key(|(.., gid)| gid.kind == GidKind::RoceV2);
        if let Some((device, port, gid)) = found {
            return Ok(local(device, port, gid, Reason::Address(ip)));
        }
        if let Some(other) = devices.iter().find(|device| having(device)) {
            return Err(match told {
                Some(name) if other.name != name => {
                    format!("`{ip}` is an address of {}, and not of {name}", other.name)
                }
                _ => format!(
                    "`{ip}` is an address of {}, but not of a port that is active{}",
                    other.name,
                    port.map_or(String::new(), |port| format!(" and has number {port}"))
                ),
            });
        }
    }
    let wanted = |(_, port): &(&DeviceInfo, &PortInfo)| {
        told.is_some() || fabric.gid_index.is_some() || port.link_layer == "InfiniBand"
    };
    let (device, port) = ours()
        .filter(wanted)
        .find(|(device, _)| having(device))
        .or_else(|| ours().find(wanted))
        .ok_or_else(|| match told {
            Some(name) => format!("no port of {name} is active"),
            None => format!(
                "`{ip}` is the address of no RDMA device of this host, and no port of InfiniBand is active; choose an address of a device \
                 with ?from=, or its GID with FERVOR_IB_GID_INDEX"
            ),
        })?;
    port_address(device, port, fabric)
}

/// The address of a port that is chosen without regard to that of a socket: the one that [`Fabric::gid_index`] names, or the best one.
///
/// # Errors
/// A sentence that says why there is none.
pub fn port_address(device: &DeviceInfo, port: &PortInfo, fabric: &Fabric) -> Result<Local, String> {
    let Some(index) = fabric.gid_index else { return best(device, port) };
    let gid = port.gids.iter().find(|gid| gid.index == u32::from(index)).ok_or_else(|| {
        format!("port {} of {} has no GID of index {index} (FERVOR_IB_GID_INDEX)", port.number, device.name)
    })?;
    Ok(local(device, port, gid, Reason::Index))
}

fn best(device: &DeviceInfo, port: &PortInfo) -> Result<Local, String> {
    let rank = |gid: &&GidInfo| match Way::of(gid) {
        Way::InfiniBand | Way::RoceV2Ipv4 => 0,
        // Addresses of the link alone lead nowhere without the name of an interface.
        Way::RoceV2Ipv6 if gid.gid.is_unicast_link_local() => 2,
        Way::RoceV2Ipv6 => 1,
        Way::RoceV1 => 3,
    };
    let gid = port.gids.iter().filter(|gid| gid.index < 256).min_by_key(rank);
    let gid = gid.ok_or_else(|| format!("port {} of {} has no GID", port.number, device.name))?;
    Ok(local(device, port, gid, Reason::Best))
}

fn local(device: &DeviceInfo, port: &PortInfo, gid: &GidInfo, why: Reason) -> Local {
    Local {
        device: device.name.clone(),
        port: port.number as u8,
        gid_index: gid.index as u8,
        gid: gid.gid,
        way: Way::of(gid),
        why,
    }
}

/// An IP address as a GID.
fn mapped(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(index: u32, gid: &str, kind: GidKind) -> GidInfo {
        GidInfo { index, gid: gid.parse().unwrap(), kind, interface: "eth0".into(), prefix: None }
    }

    fn device(name: &str, link_layer: &str, state: &str, gids: Vec<GidInfo>) -> DeviceInfo {
        let port = PortInfo {
            number: 1,
            state: state.into(),
            link_layer: link_layer.into(),
            rate: String::new(),
            gids,
        };
        DeviceInfo {
            name: name.into(),
            guid: String::new(),
            firmware: String::new(),
            software: false,
            numa_node: None,
            local_cores: Vec::new(),
            capabilities: None,
            ports: vec![port],
        }
    }

    /// Two RoCE devices, of which the second has two versions of one address, and one of InfiniBand.
    fn machine() -> Vec<DeviceInfo> {
        let roce = |name, gids| device(name, "Ethernet", "ACTIVE", gids);
        vec![
            roce(
                "mlx5_0",
                vec![
                    gid(0, "fe80::1", GidKind::RoceV1),
                    gid(1, "fe80::1", GidKind::RoceV2),
                    gid(3, "::ffff:10.0.0.1", GidKind::RoceV2),
                ],
            ),
            roce(
                "mlx5_1",
                vec![
                    gid(5, "::ffff:10.0.1.1", GidKind::RoceV2),
                    gid(4, "::ffff:10.0.1.1", GidKind::RoceV1),
                    gid(6, "2001:db8::1", GidKind::RoceV2),
                ],
            ),
            device("ib0", "InfiniBand", "ACTIVE", vec![gid(0, "fe80::2", GidKind::InfiniBand)]),
        ]
    }

    fn pick(told: Option<&str>, ip: &str, fabric: &Fabric) -> Result<(String, u8, Way), String> {
        choose(&machine(), told, None, ip.parse().unwrap(), fabric).map(|l| (l.device, l.gid_index, l.way))
    }

    #[test]
    fn the_address_of_the_socket_names_port_and_gid() {
        let fabric = Fabric::default();
        let on = |device: &str, index, way| Ok((device.to_owned(), index, way));
        assert_eq!(pick(None, "10.0.0.1", &fabric), on("mlx5_0", 3, Way::RoceV2Ipv4));
        assert_eq!(pick(None, "10.0.1.1", &fabric), on("mlx5_1", 5, Way::RoceV2Ipv4));
        assert_eq!(pick(Some("mlx5_1"), "2001:db8::1", &fabric), on("mlx5_1", 6, Way::RoceV2Ipv6));
        // No port has it: InfiniBand by its LID, or the best address of the device told.
        assert_eq!(pick(None, "192.0.2.1", &fabric), on("ib0", 0, Way::InfiniBand));
        assert_eq!(pick(Some("mlx5_0"), "192.0.2.1", &fabric), on("mlx5_0", 3, Way::RoceV2Ipv4));
        let told = Fabric { gid_index: Some(1), ..fabric };
        assert_eq!(pick(Some("mlx5_0"), "10.0.0.1", &told), on("mlx5_0", 1, Way::RoceV2Ipv6));
    }

    #[test]
    fn what_cannot_be_chosen_is_said() {
        let fabric = Fabric::default();
        let said = pick(Some("mlx5_0"), "10.0.1.1", &fabric).unwrap_err();
        assert!(said.contains("10.0.1.1") && said.contains("mlx5_1") && said.contains("mlx5_0"), "{said}");
        let said = pick(Some("mlx5_0"), "10.0.0.1", &Fabric { gid_index: Some(9), ..fabric }).unwrap_err();
        assert!(said.contains("index 9") && said.contains("FERVOR_IB_GID_INDEX"), "{said}");
        let down = [device("mlx5_0", "Ethernet", "DOWN", vec![gid(3, "::ffff:10.0.0.1", GidKind::RoceV2)])];
        let said = choose(&down, None, None, "10.0.0.1".parse().unwrap(), &fabric).unwrap_err();
        assert!(said.contains("mlx5_0") && said.contains("active"), "{said}");
        let said = choose(&[], None, None, "10.0.0.1".parse().unwrap(), &fabric).unwrap_err();
        assert!(said.contains("10.0.0.1"), "{said}");
        let said =
            choose(&machine(), Some("mlx5_0"), Some(2), "10.0.0.1".parse().unwrap(), &fabric).unwrap_err();
        assert!(said.contains("number 2"), "{said}");
    }

    #[test]
    fn variables_are_read_and_wrong_ones_are_named() {
        let read = |name: &'static str, value: &'static str| {
            Fabric::from_variables(move |asked| (asked == name).then(|| value.to_owned()))
        };
        assert_eq!(Fabric::from_variables(|_| None).unwrap(), Fabric::default());
        assert_eq!(read("FERVOR_IB_GID_INDEX", "3").unwrap().gid_index, Some(3));
        assert_eq!(read("FERVOR_IB_MTU", "1024").unwrap().mtu_of(4096), 1024);
        assert_eq!(read("FERVOR_IB_MTU", "4096").unwrap().mtu_of(1024), 1024);
        assert_eq!(read("FERVOR_IB_TC", "106").unwrap().traffic_class, 106);
        assert_eq!(read("FERVOR_IB_SL", "3").unwrap().service_level, 3);
        assert_eq!(read("FERVOR_IB_PKEY", "2").unwrap().pkey_index, 2);
        assert_eq!(read("FERVOR_IB_HOP_LIMIT", "255").unwrap().hop_limit, 255);
        assert_eq!(read("FERVOR_IB_FLOW_LABEL", "1048575").unwrap().flow_label, 0xf_ffff);
        assert_eq!(read("FERVOR_IB_TIMEOUT", "20").unwrap().patience(true), (20, 3));
        assert_eq!(read("FERVOR_IB_RETRY_CNT", "5").unwrap().patience(false), (14, 5));
        for (name, value) in [
            ("FERVOR_IB_GID_INDEX", "256"),
            ("FERVOR_IB_MTU", "1500"),
            ("FERVOR_IB_MTU", "9k"),
            ("FERVOR_IB_TC", "-1"),
            ("FERVOR_IB_SL", "16"),
            ("FERVOR_IB_PKEY", "0x1"),
            ("FERVOR_IB_HOP_LIMIT", "0"),
            ("FERVOR_IB_FLOW_LABEL", "1048576"),
            ("FERVOR_IB_TIMEOUT", "0"),
            ("FERVOR_IB_RETRY_CNT", "8"),
        ] {
            let said = read(name, value).unwrap_err().to_string();
            assert!(said.contains(name) && said.contains(value) && said.contains("it may be"), "{said}");
        }
    }
}
