//! Which processors the polling threads get when nobody says, and how many completion vectors there are.

use fervor_verbs::{Error, transport::any::Host};

/// Over RDMA: one shard for each completion vector of each NIC that is used, pinned to the processors near it (sysfs), as
/// far as this process may use them, and to each processor once. Over shared memory and TCP, where workers or threads that serve sockets
/// live on the same processors: half as many shards as there are, pinned nowhere.
///
/// # Errors
/// The devices cannot be listed.
pub fn default(transport: &Host) -> Result<Vec<Option<usize>>, Error> {
    let allowed = core_affinity::get_core_ids().unwrap_or_default();
    #[cfg(feature = "rdma")]
    if transport.rdma().next().is_some() {
        let devices = fervor_verbs::devices::list()?;
        let mut cores = Vec::new();
        for rdma in transport.rdma() {
            let device = devices.iter().find(|device| device.name == rdma.device_name());
            let near = device.map(|device| device.local_cores.as_slice()).unwrap_or_default();
            let found = allowed.iter().map(|core| core.id).filter(|id| near.contains(id));
            cores.extend(found.take(rdma.completion_vectors().max(1)));
        }
        cores.sort_unstable();
        cores.dedup();
        // A device that names no processors (a virtual one) is near to none in particular.
        return Ok(if cores.is_empty() { vec![None] } else { cores.into_iter().map(Some).collect() });
    }
    let _ = transport;
    Ok(vec![None; (allowed.len() / 2).max(1)])
}

/// Completion vectors of each RDMA device that is used.
pub fn completion_vectors(transport: &Host) -> Vec<usize> {
    #[cfg(feature = "rdma")]
    return transport.rdma().map(|rdma| rdma.completion_vectors()).collect();
    #[cfg(not(feature = "rdma"))]
    {
        let _ = transport;
        Vec::new()
    }
}
