//! Rails: the ports of RDMA devices that one process uses at once.
//!
//! A process with several NICs, or a NIC of several ports, spreads its connections over them. Which ports those are, it is told
//! ([`RailName`], `--devices`, `FERVOR_IB_HCA`) or it finds: all that are active and have an address. Peers tell each other their rails
//! ([`Rail`]), and find out by the addresses which of them are on a common network ([`RailAddress::reaches`]).
//!
//! Nothing here touches a device: what there is, sysfs says ([`devices`](crate::devices)), so that `fervor-bench devices` can print the
//! choice, and tests can make it for machines that are not there.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    str::FromStr,
};

use crate::{
    devices::{DeviceInfo, GidInfo, PortInfo},
    error::Error,
    fabric::{self, Fabric, Way},
};

/// Most rails of a process.
pub const MAX_RAILS: usize = 8;
/// Most addresses of a rail that peers are told.
pub(crate) const MAX_ADDRESSES: usize = 4;
/// Longest name of a rail. (The kernel's names of devices have 63 bytes at most.)
pub(crate) const MAX_NAME: usize = 72;
/// Names the rails of programs that are not told otherwise.
pub const DEVICES_VARIABLE: &str = "FERVOR_IB_HCA";

/// A port of a device, or a device with all its active ports: `mlx5_0:1`, `mlx5_0`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RailName {
    /// Name of the device (as in `/sys/class/infiniband`).
    pub device: String,
    /// Number of the port, from 1 on. `None`: those that are active, or the first one if none is.
    pub port: Option<u8>,
}

impl FromStr for RailName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (device, port) = text.split_once(':').map_or((text, None), |(device, port)| (device, Some(port)));
        if device.is_empty() || device.len() > MAX_NAME - 4 || device.contains('/') {
            return Err(format!("`{text}` names no device: write DEVICE or DEVICE:PORT, as in mlx5_0:1"));
        }
        let port = port.map(|port| match port.parse() {
            Ok(number @ 1..) => Ok(number),
            _ => {
                Err(format!("`{port}` of `{text}` is no number of a port: write DEVICE:PORT, as in mlx5_0:1"))
            }
        });
        Ok(Self { device: device.to_owned(), port: port.transpose()? })
    }
}

impl fmt::Display for RailName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.device)?;
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

/// The rails that the environment names; none if it says nothing.
///
/// # Errors
/// [`Error::System`] with the variable, its value and what it may be.
pub fn from_environment() -> Result<Vec<RailName>, Error> {
    let Some(text) = std::env::var_os(DEVICES_VARIABLE) else { return Ok(Vec::new()) };
    let text = text.to_string_lossy();
    let names: Result<_, String> = text.split(',').map(|name| name.trim().parse()).collect();
    names.map_err(|_| fabric::wrong(DEVICES_VARIABLE, &text, "a list of devices, as in mlx5_0:1,mlx5_1"))
}

/// A port, and whether it becomes a rail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Name of the device.
    pub device: String,
    /// Number of the port.
    pub port: u8,
    /// Or why it is none.
    pub verdict: Result<(), String>,
}

impl Candidate {
    /// As peers and people know it.
    pub fn name(&self) -> String {
        format!("{}:{}", self.device, self.port)
    }
}

/// Which ports of `devices` become rails: those that are told, or else those that are active and have an address; of devices in software
/// only if there is no hardware.
///
/// # Errors
/// [`Error::NoDevice`] for a name that no port has; [`Error::Limit`] for too many of them.
pub fn candidates(
    devices: &[DeviceInfo],
    told: &[RailName],
    fabric: &Fabric,
) -> Result<Vec<Candidate>, Error> {
    for name in told {
        exists(devices, name)?;
    }
    let ports = || devices.iter().flat_map(|device| device.ports.iter().map(move |port| (device, port)));
    let usable = |port: &PortInfo| {
        if port.state != "ACTIVE" {
            return Err(format!("its state is {}", port.state));
        }
        if own_addresses(port, fabric).is_empty() {
            return Err("it has no address that a peer could send to".to_owned());
        }
        Ok(())
    };
    let hardware = ports().any(|(device, port)| !device.software && usable(port).is_ok());
    let mut rails = 0;
    let mut candidates = Vec::new();
    for (device, port) in ports() {
        let mut verdict = if told.is_empty() {
            usable(port).and_then(|()| match device.software && hardware {
                true => Err("it is in software, and there is hardware; to use it, name it".to_owned()),
                false => Ok(()),
            })
        } else if told.iter().any(|name| names(name, device, port)) {
            Ok(())
        } else {
            Err(format!("--devices or {DEVICES_VARIABLE} names others"))
        };
        if verdict.is_ok() {
            rails += 1;
            if rails > MAX_RAILS && told.is_empty() {
                verdict = Err(format!("there are {MAX_RAILS} already, which is the most; name those to use"));
            }
        }
        candidates.push(Candidate { device: device.name.clone(), port: port.number as u8, verdict });
    }
    if rails > MAX_RAILS && !told.is_empty() {
        return Err(Error::Limit {
            what: "the number of ports that are named as rails".to_owned(),
            value: rails as u64,
            limit: MAX_RAILS as u64,
            cure: "; name fewer, with DEVICE:PORT".to_owned(),
        });
    }
    Ok(candidates)
}

fn exists(devices: &[DeviceInfo], name: &RailName) -> Result<(), Error> {
    let Some(device) = devices.iter().find(|device| device.name == name.device) else {
        let all: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
        let reason = format!("there is no device `{}` (there are: {})", name.device, all.join(", "));
        return Err(Error::NoDevice { reason });
    };
    let has = |number| device.ports.iter().any(|port| port.number == u32::from(number));
    match name.port {
        Some(port) if !has(port) => Err(Error::NoDevice {
            reason: format!("{} has no port {port}, but {}", device.name, device.ports.len()),
        }),
        _ => Ok(()),
    }
}

/// Whether a name is that of a port.
fn names(name: &RailName, device: &DeviceInfo, port: &PortInfo) -> bool {
    let active = |port: &PortInfo| port.state == "ACTIVE";
    name.device == device.name
        && match name.port {
            Some(number) => u32::from(number) == port.number,
            None if device.ports.iter().any(active) => active(port),
            None => device.ports.first() == Some(port),
        }
}

/// An address of a rail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RailAddress {
    /// The kind of network.
    pub network: Way,
    /// The address in it.
    pub gid: Ipv6Addr,
    /// So many bits of it are the same for all of its subnet, at most 128. (An IPv4 address is the last 32 bits of a GID.)
    pub prefix: u8,
}

/// How two addresses are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// They are of one subnet.
    Subnet,
    /// They are of different subnets of networks that have routers: there may be a way.
    Routed,
}

impl RailAddress {
    fn subnet_has(&self, gid: Ipv6Addr) -> bool {
        let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
        (self.gid.to_bits() ^ gid.to_bits()) & mask == 0
    }

    /// Whether packets from here may reach `other`.
    pub fn reaches(&self, other: &Self) -> Option<Reach> {
        if self.network != other.network {
            return None;
        }
        if self.subnet_has(other.gid) && other.subnet_has(self.gid) {
            return Some(Reach::Subnet);
        }
        let routed = matches!(self.network, Way::RoceV2Ipv4 | Way::RoceV2Ipv6)
            && !self.gid.is_unicast_link_local()
            && !other.gid.is_unicast_link_local();
        routed.then_some(Reach::Routed)
    }
}

impl fmt::Display for RailAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.gid.to_ipv4_mapped() {
            Some(ip) if self.network == Way::RoceV2Ipv4 => {
                write!(f, "{} {ip}/{}", self.network, self.prefix.saturating_sub(96))
            }
            _ => write!(f, "{} {}/{}", self.network, self.gid, self.prefix),
        }
    }
}

/// An address of a rail of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnAddress {
    /// Its index in the port's table.
    pub index: u8,
    /// What peers are told.
    pub address: RailAddress,
}

/// The addresses of a port that peers are told, the best first: that which [`Fabric::gid_index`] names, or all that lead beyond the link, or,
/// if there are none, those of the link; and those of RoCE version 1 if there are no others.
pub fn own_addresses(port: &PortInfo, fabric: &Fabric) -> Vec<OwnAddress> {
    let named = |gid: &&GidInfo| {
        gid.index < 256 && fabric.gid_index.is_none_or(|index| gid.index == u32::from(index))
    };
    let own = |gid: &GidInfo| {
        let network = Way::of(gid);
        // A subnet of InfiniBand has a prefix of 64 bits. An address without a network is alone.
        let prefix = if network == Way::InfiniBand { 64 } else { gid.prefix.unwrap_or(128).min(128) };
        OwnAddress { index: gid.index as u8, address: RailAddress { network, gid: gid.gid, prefix } }
    };
    let mut found: Vec<_> = port.gids.iter().filter(named).map(own).collect();
    let rank = |own: &OwnAddress| match own.address.network {
        Way::InfiniBand | Way::RoceV2Ipv4 => 0,
        Way::RoceV2Ipv6 if !own.address.gid.is_unicast_link_local() => 1,
        Way::RoceV2Ipv6 => 2,
        Way::RoceV1 => 3,
    };
    found.sort_by_key(rank);
    let best = found.first().map(rank);
    found.retain(|own| rank(own) <= 1 || Some(rank(own)) == best);
    found.truncate(MAX_ADDRESSES);
    found
}

/// A rail, as peers are told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rail {
    /// `mlx5_0:1`.
    pub(crate) name: String,
    /// Rate of the port, millions of bits per second. 0: unknown.
    pub(crate) megabits: u32,
    /// The best first.
    pub(crate) addresses: Vec<RailAddress>,
}

impl fmt::Display for Rail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses: Vec<_> = self.addresses.iter().map(RailAddress::to_string).collect();
        write!(f, "{} ({})", self.name, addresses.join(", "))
    }
}

/// What a rail has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RailStats {
    /// Its name, such as `mlx5_0:1`.
    pub name: String,
    /// Whether its port is active.
    pub active: bool,
    /// Lanes that were made by it.
    pub lanes: u64,
    /// Lanes that ended though this process did not wish it.
    pub lost: u64,
}

impl fmt::Display for RailStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, active, lanes, lost } = self;
        let down = if *active { "" } else { ", down" };
        write!(f, "{name} ({lanes} lanes, {lost} lost{down})")
    }
}

/// The rate of a port in millions of bits per second, from texts such as `100 Gb/sec (4X EDR)`. 0: it is none of these.
#[cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "a program without RDMA has no rails"))]
pub(crate) fn megabits(rate: &str) -> u32 {
    let Some((number, _)) = rate.split_once(" Gb/sec") else { return 0 };
    number.trim().parse::<f64>().map_or(0, |gigabits| (gigabits * 1000.0) as u32)
}

/// An IP address as a GID, and a prefix of its bits.
pub(crate) fn as_gid(ip: IpAddr, prefix: u8) -> (Ipv6Addr, u8) {
    match ip {
        IpAddr::V4(ip) => (ip.to_ipv6_mapped(), prefix.saturating_add(96)),
        IpAddr::V6(ip) => (ip, prefix),
    }
}

#[cfg(test)]
mod tests;
