//! The RDMA devices of this machine, for people who choose addresses and cores.

use std::fmt::Write as _;

use anyhow::Result;
use fervor_verbs::{
    devices::{self, Capabilities, DeviceInfo, PortInfo},
    fabric::{self, Fabric},
    rails::{self, Candidate},
};

use crate::report;

/// Lists the devices.
///
/// # Errors
/// When there is a device that cannot be used for lack of a library; the message names the package. When an environment variable of the
/// [`Fabric`] or of the rails is wrong.
pub fn run() -> Result<String> {
    let (devices, fabric) = (devices::list()?, Fabric::from_env()?);
    let rails = rails::candidates(&devices, &rails::from_environment()?, &fabric)?;
    Ok(describe(&devices, &rails, &fabric))
}

fn describe(devices: &[DeviceInfo], rails: &[Candidate], fabric: &Fabric) -> String {
    if devices.is_empty() {
        return "This machine has no RDMA device. Use shm:// URLs, or see ci/soft-roce for devices in software.\n".into();
    }
    let mut text = String::new();
    for device in devices {
        device_lines(&mut text, device, rails, fabric).expect("a String takes everything");
    }
    text
}

fn device_lines(
    text: &mut String,
    device: &DeviceInfo,
    rails: &[Candidate],
    fabric: &Fabric,
) -> std::fmt::Result {
    let DeviceInfo { name, guid, firmware, software, numa_node, local_cores, capabilities, ports } = device;
    write!(text, "{name}  GUID {guid}")?;
    if !firmware.is_empty() {
        write!(text, "  firmware {firmware}")?;
    }
    writeln!(text)?;
    if *software {
        writeln!(text, "  a device in software")?;
    }
    if let Some(node) = numa_node {
        writeln!(text, "  NUMA node {node}")?;
    }
    if !local_cores.is_empty() {
        let cores: Vec<String> = local_cores.iter().map(usize::to_string).collect();
        writeln!(text, "  near cores {}", cores.join(","))?;
    }
    match capabilities {
        Some(Capabilities {
            completion_vectors,
            queue_pairs,
            reads_initiated,
            reads_served,
            region_bytes,
            pieces,
            ..
        }) => {
            writeln!(
                text,
                "  {completion_vectors} completion vectors, {queue_pairs} queue pairs, {pieces} SGEs"
            )?;
            writeln!(text, "  READs in flight: {reads_initiated} out, {reads_served} in")?;
            // Devices in software say the greatest number there is.
            if *region_bytes < 1 << 60 {
                writeln!(text, "  largest region {}", report::bytes(*region_bytes))?;
            }
        }
        None => writeln!(text, "  its limits are not known: libibverbs does not open it")?,
    }
    for port in ports {
        let mtu = capabilities.as_ref().and_then(|c| c.mtu.get(port.number as usize - 1));
        let said = mtu.map_or(String::new(), |mtu| format!(", MTU {mtu}"));
        writeln!(text, "  port {}: {}, {}, {}{said}", port.number, port.state, port.link_layer, port.rate)?;
        for gid in &port.gids {
            let address =
                gid.gid.to_ipv4_mapped().map_or_else(|| gid.gid.to_string(), |ipv4| ipv4.to_string());
            writeln!(
                text,
                "    GID {:>2}  {:<10}  {address}  {}",
                gid.index,
                gid.kind.to_string(),
                gid.interface
            )?;
        }
        rail_line(text, device, port, rails, fabric)?;
        connection_lines(text, device, port, mtu.copied(), fabric)?;
    }
    Ok(())
}

/// Whether `port` would be a rail, and on which networks.
fn rail_line(
    text: &mut String,
    device: &DeviceInfo,
    port: &PortInfo,
    rails: &[Candidate],
    fabric: &Fabric,
) -> std::fmt::Result {
    let of_port = |rail: &&Candidate| rail.device == device.name && u32::from(rail.port) == port.number;
    match rails.iter().find(of_port).map(|rail| (rail.name(), &rail.verdict)) {
        Some((name, Ok(()))) => {
            let addresses = rails::own_addresses(port, fabric);
            let networks: Vec<_> = addresses.iter().map(|own| own.address.to_string()).collect();
            writeln!(text, "    rail {name} of fervor:// programs: {}", networks.join(", "))
        }
        Some((_, Err(reason))) => writeln!(text, "    no rail of fervor:// programs: {reason}"),
        None => Ok(()),
    }
}

/// What a connection through `port` would use, and why.
fn connection_lines(
    text: &mut String,
    device: &DeviceInfo,
    port: &PortInfo,
    mtu: Option<u32>,
    fabric: &Fabric,
) -> std::fmt::Result {
    match fabric::port_address(device, port, fabric) {
        Ok(local) => {
            writeln!(text, "    connections use GID {} ({}): {}", local.gid_index, local.way, local.why)?;
        }
        Err(reason) => return writeln!(text, "    no connections: {reason}"),
    }
    let (timeout, retries) = fabric.patience(device.software);
    let seconds = 4.096e-6 * f64::from(1_u32 << timeout) * f64::from(u32::from(retries) + 1);
    let mtu = mtu.map_or("unknown".into(), |mtu| fabric.mtu_of(mtu as u16).to_string());
    writeln!(
        text,
        "      MTU {mtu}, traffic class {}, service level {}, partition key index {}, hop limit {}, flow label {}",
        fabric.traffic_class, fabric.service_level, fabric.pkey_index, fabric.hop_limit, fabric.flow_label
    )?;
    writeln!(
        text,
        "      timeout 2^{timeout} x 4.096 us, {retries} retries: a silent peer is given up after {seconds:.2} s or more"
    )
}

#[cfg(test)]
mod tests {
    use fervor_verbs::devices::{GidInfo, GidKind, PortInfo};

    use super::*;

    #[test]
    fn a_device_is_described() {
        let gid = GidInfo {
            index: 1,
            gid: "::ffff:10.7.0.1".parse().unwrap(),
            kind: GidKind::RoceV2,
            interface: "v0".into(),
            prefix: Some(120),
        };
        let port = PortInfo {
            number: 1,
            state: "ACTIVE".into(),
            link_layer: "Ethernet".into(),
            rate: "2.5 Gb/sec (1X SDR)".into(),
            gids: vec![gid],
        };
        let device = DeviceInfo {
            name: "rxe0".into(),
            guid: "0011:2233:4455:6677".into(),
            firmware: String::new(),
            software: true,
            numa_node: None,
            local_cores: vec![0, 1],
            capabilities: None,
            ports: vec![port],
        };
        let devices = [device];
        let described = |devices: &[DeviceInfo], fabric: &Fabric| {
            describe(devices, &rails::candidates(devices, &[], fabric).unwrap(), fabric)
        };
        let text = described(&devices, &Fabric::default());
        for part in [
            "rxe0  GUID 0011:2233:4455:6677\n",
            "near cores 0,1",
            "port 1: ACTIVE, Ethernet",
            "RoCE v2     10.7.0.1  v0",
            "connections use GID 1 (RoCE v2 over IPv4): the best one",
            "    rail rxe0:1 of fervor:// programs: RoCE v2 over IPv4 10.7.0.1/24",
            "hop limit 64",
            "timeout 2^16 x 4.096 us, 3 retries: a silent peer is given up after 1.07 s",
        ] {
            assert!(text.contains(part), "{text}");
        }
        let fabric = Fabric { gid_index: Some(3), ..Fabric::default() };
        let text = described(&devices, &fabric);
        for part in [
            "no connections: port 1 of rxe0 has no GID of index 3",
            "no rail of fervor:// programs: it has no address",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(described(&[], &fabric).contains("no RDMA device"));
    }
}
