//! Which processors the polling threads get when nobody says, and how many completion vectors there are.

use fervor_verbs::{Error, transport::any::Host};

/// Over RDMA: one shard for each completion vector of the NIC, pinned to the processors near it (sysfs), as
/// far as this process may use them. Over shared memory and TCP, where workers or threads that serve sockets live
/// on the same processors: half as many shards as there are, pinned nowhere.
///
/// # Errors
/// The devices cannot be listed.
pub fn default(transport: &Host) -> Result<Vec<Option<usize>>, Error> {
    let allowed = core_affinity::get_core_ids().unwrap_or_default();
    #[cfg(feature = "rdma")]
    if let Some(rdma) = transport.rdma() {
        let devices = fervor_verbs::devices::list()?;
        let near = devices.into_iter().find(|device| device.name == rdma.device_name());
        let near = near.map(|device| device.local_cores).unwrap_or_default();
        let mut cores: Vec<_> = allowed.iter().map(|core| core.id).filter(|id| near.contains(id)).collect();
        cores.truncate(rdma.completion_vectors().max(1));
        // A device that names no processors (a virtual one) is near to none in particular.
        return Ok(if cores.is_empty() { vec![None] } else { cores.into_iter().map(Some).collect() });
    }
    let _ = transport;
    Ok(vec![None; (allowed.len() / 2).max(1)])
}

/// Completion vectors of the RDMA device, if there is one.
pub fn completion_vectors(transport: &Host) -> Option<usize> {
    #[cfg(feature = "rdma")]
    return transport.rdma().map(|rdma| rdma.completion_vectors());
    #[cfg(not(feature = "rdma"))]
    {
        let _ = transport;
        None
    }
}
