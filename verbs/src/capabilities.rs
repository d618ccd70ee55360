//! What an RDMA device can do: asked by its provider, listed by [`devices`](crate::devices).

/// What a device can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Completion vectors: interrupts that endpoints can be spread over.
    pub completion_vectors: usize,
    /// Queue pairs, and so connections.
    pub queue_pairs: u64,
    /// Requests of a send queue.
    pub send_queue: u64,
    /// Entries of a completion queue.
    pub completion_queue: u64,
    /// Buffers of a shared receive queue.
    pub receive_queue: u64,
    /// Pieces of a gather list.
    pub pieces: u64,
    /// READs in flight of a queue pair that it initiates.
    pub reads_initiated: u64,
    /// READs in flight of a queue pair that it serves.
    pub reads_served: u64,
    /// Registered regions.
    pub regions: u64,
    /// Bytes of the largest region.
    pub region_bytes: u64,
    /// Bytes of the largest message, per port.
    pub message_bytes: Vec<u64>,
    /// Bytes of a packet's payload, per port.
    pub mtu: Vec<u32>,
}
