//! The RDMA devices of this host: what `fervor-bench devices` prints, and what helps to choose cores and addresses.
//!
//! | what | from where |
//! |---|---|
//! | names, ports, state, rate, link layer, NUMA node, nearby cores | sysfs (`/sys/class/infiniband`) |
//! | limits, completion vectors, MTU | libibverbs (feature `rdma`) |
//! | IP networks of GIDs | the addresses of the interfaces (`getifaddrs`) |
//! | GIDs with their RoCE version | the crate `ibverbs` with the feature of that name; otherwise, and for devices that it cannot open (those whose first port is down), sysfs |

use std::{fmt, fs, io, net::Ipv6Addr, path::Path};

pub use crate::capabilities::Capabilities;
use crate::{error::Error, interfaces, rails::as_gid};

pub(crate) const SYSFS: &str = "/sys/class/infiniband";

/// An RDMA device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name, as `Rdma::on_device` takes it.
    pub name: String,
    /// Node GUID.
    pub guid: String,
    /// Firmware version; empty for most software devices.
    pub firmware: String,
    /// Whether it is software (rxe): its timers are exact, and it shares the processors with everything else.
    pub software: bool,
    /// NUMA node that it is attached to. `None`: not on a bus, or there is only one.
    pub numa_node: Option<usize>,
    /// Processors of that node: where its polling threads are best pinned. Empty if unknown.
    pub local_cores: Vec<usize>,
    /// What libibverbs says. `None`: it was built without, or its driver does not open the device.
    pub capabilities: Option<Capabilities>,
    /// Its ports, from 1 on.
    pub ports: Vec<PortInfo>,
}

/// A port of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortInfo {
    /// Its number, from 1 on.
    pub number: u32,
    /// State, such as `ACTIVE` or `DOWN`.
    pub state: String,
    /// `InfiniBand` or `Ethernet`.
    pub link_layer: String,
    /// Rate, such as `100 Gb/sec (4X EDR)`.
    pub rate: String,
    /// Its addresses; empty entries of the table are left out.
    pub gids: Vec<GidInfo>,
}

/// An entry of a port's table of addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GidInfo {
    /// Its index in the table.
    pub index: u32,
    /// The address.
    pub gid: Ipv6Addr,
    /// What packets from it look like.
    pub kind: GidKind,
    /// Network interface that it belongs to; empty for InfiniBand.
    pub interface: String,
    /// Bits of it that are the same for all of its IP network. (An IPv4 address is the last 32 bits of a GID.) `None`: it is no address of
    /// its interface.
    pub prefix: Option<u8>,
}

/// What packets from a GID look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GidKind {
    /// InfiniBand.
    InfiniBand,
    /// RoCE version 1: Ethernet frames, not routed.
    RoceV1,
    /// RoCE version 2: UDP packets, over IPv4 or IPv6.
    RoceV2,
}

impl fmt::Display for GidKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InfiniBand => "InfiniBand",
            Self::RoceV1 => "RoCE v1",
            Self::RoceV2 => "RoCE v2",
        })
    }
}

/// The RDMA devices of this host, by name. None is no error.
///
/// # Errors
/// [`Error::MissingLibrary`] when Fervor was built with `rdma`, but could not use a device for lack of a library.
pub fn list() -> Result<Vec<DeviceInfo>, Error> {
    #[cfg(feature = "rdma")]
    crate::transport::rdma::load_libraries()?;
    let devices = from_sysfs().map_err(Error::io(format!("reading {SYSFS}")))?;
    #[cfg(feature = "rdma")]
    let devices = with_capabilities(devices)?;
    #[cfg(feature = "ibverbs")]
    let devices = with_prefixes(by_ibverbs::with_gids(devices)?).map_err(Error::io("getifaddrs()"))?;
    Ok(devices)
}

#[cfg(feature = "rdma")]
fn with_capabilities(mut devices: Vec<DeviceInfo>) -> Result<Vec<DeviceInfo>, Error> {
    if devices.is_empty() {
        return Ok(devices);
    }
    for (name, capabilities) in crate::transport::rdma::capabilities()? {
        if let Some(device) = devices.iter_mut().find(|device| device.name == name) {
            device.capabilities = Some(capabilities);
        }
    }
    Ok(devices)
}

/// What sysfs says, by name.
pub(crate) fn from_sysfs() -> io::Result<Vec<DeviceInfo>> {
    with_prefixes(from_folder(Path::new(SYSFS))?)
}

/// Notes to which IP network each GID belongs.
fn with_prefixes(mut devices: Vec<DeviceInfo>) -> io::Result<Vec<DeviceInfo>> {
    if devices.is_empty() {
        return Ok(devices);
    }
    let networks = interfaces::networks()?;
    for gid in devices.iter_mut().flat_map(|device| &mut device.ports).flat_map(|port| &mut port.gids) {
        let found = networks.iter().filter(|network| network.interface == gid.interface);
        let mut found = found.map(|network| as_gid(network.ip, network.prefix));
        gid.prefix = found.find(|(address, _)| *address == gid.gid).map(|(_, prefix)| prefix);
    }
    Ok(devices)
}

fn from_folder(root: &Path) -> io::Result<Vec<DeviceInfo>> {
    let mut names = entries(root)?;
    names.sort();
    names.into_iter().map(|name| device(&root.join(&name), name)).collect()
}

/// Names in a folder; none if there is no such folder.
fn entries(folder: &Path) -> io::Result<Vec<String>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// A file's text; empty if the device has no such file, or (as empty GID entries do) refuses to be read.
fn text(path: &Path) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// The part after the number in texts such as `4: ACTIVE`.
fn after_colon(text: String) -> String {
    text.split_once(": ").map_or(text.clone(), |(_, rest)| rest.to_owned())
}

fn device(folder: &Path, name: String) -> io::Result<DeviceInfo> {
    let mut ports: Vec<u32> = entries(&folder.join("ports"))?.iter().filter_map(|n| n.parse().ok()).collect();
    ports.sort_unstable();
    Ok(DeviceInfo {
        guid: text(&folder.join("node_guid")),
        firmware: text(&folder.join("fw_ver")),
        software: !folder.join("device").exists(),
        // -1 says that there is no node.
        numa_node: text(&folder.join("device/numa_node")).parse().ok(),
        local_cores: cores(&text(&folder.join("device/local_cpulist"))),
        capabilities: None,
        ports: ports
            .into_iter()
            .map(|number| port(&folder.join("ports").join(number.to_string()), number))
            .collect::<io::Result<_>>()?,
        name,
    })
}

fn port(folder: &Path, number: u32) -> io::Result<PortInfo> {
    let mut indices: Vec<u32> =
        entries(&folder.join("gids"))?.iter().filter_map(|n| n.parse().ok()).collect();
    indices.sort_unstable();
    Ok(PortInfo {
        number,
        state: after_colon(text(&folder.join("state"))),
        link_layer: text(&folder.join("link_layer")),
        rate: text(&folder.join("rate")),
        gids: indices.into_iter().filter_map(|index| gid(folder, index)).collect(),
    })
}

/// The entry `index` of a port's table, if there is something in it.
fn gid(port: &Path, index: u32) -> Option<GidInfo> {
    let attribute = |name: &str| text(&port.join(name).join(index.to_string()));
    let gid: Ipv6Addr = attribute("gids").parse().ok()?;
    // Most entries are empty, and there may be a thousand: nothing more of them is read.
    if gid == Ipv6Addr::UNSPECIFIED {
        return None;
    }
    let kind = match attribute("gid_attrs/types").as_str() {
        "RoCE v2" => GidKind::RoceV2,
        // The kernel calls both this: on Ethernet it is RoCE version 1.
        "IB/RoCE v1" if text(&port.join("link_layer")) == "Ethernet" => GidKind::RoceV1,
        "IB/RoCE v1" => GidKind::InfiniBand,
        _ => return None,
    };
    Some(GidInfo { index, gid, kind, interface: attribute("gid_attrs/ndevs"), prefix: None })
}

/// The processors of a list such as `0-3,8`.
pub(crate) fn cores(list: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        Some(from.parse().ok()?..=to.parse().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

#[cfg(feature = "ibverbs")]
mod by_ibverbs {
    //! GID tables by the crate `ibverbs`. Its functions of libibverbs are those that the `rdma` provider loads.

    use std::{net::Ipv6Addr, path::Path};

    use super::{DeviceInfo, GidInfo, GidKind, text};
    use crate::error::Error;

    /// `enum ibv_gid_type` of `infiniband/verbs.h`.
    fn kind(number: u32) -> Option<GidKind> {
        [GidKind::InfiniBand, GidKind::RoceV1, GidKind::RoceV2].get(number as usize).copied()
    }

    /// Puts the GIDs of each device that opens in the place of those from sysfs.
    pub(super) fn with_gids(mut devices: Vec<DeviceInfo>) -> Result<Vec<DeviceInfo>, Error> {
        if devices.is_empty() {
            return Ok(devices);
        }
        let list = ibverbs::devices().map_err(Error::io("ibv_get_device_list()"))?;
        for found in list.iter() {
            let Some(name) = found.name() else { continue };
            let Some(device) = devices.iter_mut().find(|d| d.name.as_bytes() == name.to_bytes()) else {
                continue;
            };
            // Refused for a device whose first port is down: its table is not valid then.
            let Ok(context) = found.open() else { continue };
            for port in &mut device.ports {
                port.gids.clear();
            }
            for entry in context.gid_table() {
                let port = device.ports.iter_mut().find(|port| port.number == entry.port_num);
                let (Some(port), Some(kind)) = (port, kind(entry.gid_type)) else { continue };
                let bits = u128::from(entry.gid.subnet_prefix()) << 64 | u128::from(entry.gid.interface_id());
                let interface = interface(entry.ndev_ifindex);
                port.gids.push(GidInfo {
                    index: entry.gid_index,
                    gid: Ipv6Addr::from_bits(bits),
                    kind,
                    interface,
                    prefix: None,
                });
            }
        }
        Ok(devices)
    }

    /// Name of the network interface of this number; empty for 0.
    fn interface(number: u32) -> String {
        let of_number = |name: &String| {
            text(&Path::new("/sys/class/net").join(name).join("ifindex")).parse() == Ok(number)
        };
        let names = super::entries(Path::new("/sys/class/net")).unwrap_or_default();
        names.into_iter().find(of_number).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder like that of a machine with an Ethernet device of which one port is down.
    fn machine() -> std::path::PathBuf {
        let root = std::env::temp_dir().join(format!("fervor-devices-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        let files = [
            ("mlx5_0/node_guid", "0001:0203:0405:0607\n"),
            ("mlx5_0/fw_ver", "16.35.2000\n"),
            ("mlx5_0/device/numa_node", "1\n"),
            ("mlx5_0/device/local_cpulist", "8-10,24\n"),
            ("mlx5_0/ports/1/state", "4: ACTIVE\n"),
            ("mlx5_0/ports/1/link_layer", "Ethernet\n"),
            ("mlx5_0/ports/1/rate", "100 Gb/sec (4X EDR)\n"),
            ("mlx5_0/ports/1/gids/0", "fe80:0000:0000:0000:0202:c9ff:fe00:0001\n"),
            ("mlx5_0/ports/1/gid_attrs/types/0", "IB/RoCE v1\n"),
            ("mlx5_0/ports/1/gid_attrs/ndevs/0", "eth0\n"),
            ("mlx5_0/ports/1/gids/3", "0000:0000:0000:0000:0000:ffff:0a07:0001\n"),
            ("mlx5_0/ports/1/gid_attrs/types/3", "RoCE v2\n"),
            ("mlx5_0/ports/1/gid_attrs/ndevs/3", "eth0\n"),
            ("mlx5_0/ports/1/gids/4", "0000:0000:0000:0000:0000:0000:0000:0000\n"),
            ("mlx5_0/ports/2/state", "1: DOWN\n"),
            ("mlx5_0/ports/2/link_layer", "Ethernet\n"),
            ("rxe0/node_guid", "0011:2233:4455:6677\n"),
        ];
        for (path, content) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        root
    }

    #[test]
    fn sysfs_is_read_as_the_kernel_writes_it() {
        let root = machine();
        let devices = from_folder(&root).unwrap();
        fs::remove_dir_all(&root).unwrap();
        let names: Vec<_> = devices.iter().map(|device| device.name.as_str()).collect();
        assert_eq!(names, ["mlx5_0", "rxe0"]);
        let device = &devices[0];
        assert_eq!((device.numa_node, device.local_cores.as_slice()), (Some(1), &[8, 9, 10, 24][..]));
        assert_eq!((device.firmware.as_str(), device.ports.len()), ("16.35.2000", 2));
        assert_eq!((device.software, devices[1].software), (false, true));
        let [first, second] = &device.ports[..] else { panic!("two ports") };
        assert_eq!((first.state.as_str(), second.state.as_str()), ("ACTIVE", "DOWN"));
        let gids: Vec<_> = first.gids.iter().map(|gid| (gid.index, gid.kind, gid.gid.to_string())).collect();
        let expected = [
            (0, GidKind::RoceV1, "fe80::202:c9ff:fe00:1".to_owned()),
            (3, GidKind::RoceV2, "::ffff:10.7.0.1".to_owned()),
        ];
        assert_eq!(gids, expected);
        assert_eq!((devices[1].numa_node, devices[1].ports.len()), (None, 0));
    }

    #[test]
    fn a_machine_without_devices_has_none() {
        assert_eq!(from_folder(Path::new("/nowhere/infiniband")).unwrap(), []);
    }

    #[test]
    fn lists_of_processors() {
        assert_eq!(cores("0-3,8"), [0, 1, 2, 3, 8]);
        assert_eq!(cores("5"), [5]);
        assert_eq!(cores(""), [0; 0]);
    }
}
