//! What a device says without being asked: ports that go down, queue pairs that fail, tables that change.
//!
//! One thread of a transport reads it ([`keeper`](super::keeper)): a device keeps an event, and whoever destroys what it is of waits, until it
//! has been acknowledged. [`take`] acknowledges each one before it returns. What it is of is returned as an address, to be compared, and not
//! to be followed: the object may end as soon as the event is acknowledged.

use std::{
    fmt,
    mem::MaybeUninit,
    sync::atomic::{AtomicU64, Ordering},
};

use rdma_sys::ibv_event_type;

use super::{device::Device, library::Event};

/// What an event means for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A port went down (`PORT_ERR`). Its connections end when their requests are not answered, if it does not come back before.
    PortDown,
    /// A port came up (`PORT_ACTIVE`).
    PortUp,
    /// The addresses of a port changed: GIDs, the LID, partition keys, the subnet manager.
    AddressesChanged,
    /// The device is lost (`DEVICE_FATAL`).
    DeviceLost,
    /// A completion queue is lost: it overran, or its memory is gone.
    CompletionsLost,
    /// A shared receive queue is lost.
    ReceivesLost,
    /// A queue pair failed, or its peer asked for what it may not.
    QueuePairFailed,
    /// A queue pair in the error state will take no more receive buffers (`LAST_WQE_REACHED`).
    LastBuffer,
    /// Nothing that concerns us.
    Other(u32),
}

impl Kind {
    fn of(number: u32) -> Self {
        use ibv_event_type as E;
        let is = |kind: E| number == kind as u32;
        if is(E::IBV_EVENT_PORT_ERR) {
            Self::PortDown
        } else if is(E::IBV_EVENT_PORT_ACTIVE) {
            Self::PortUp
        } else if is(E::IBV_EVENT_GID_CHANGE)
            || is(E::IBV_EVENT_LID_CHANGE)
            || is(E::IBV_EVENT_PKEY_CHANGE)
            || is(E::IBV_EVENT_SM_CHANGE)
            || is(E::IBV_EVENT_CLIENT_REREGISTER)
        {
            Self::AddressesChanged
        } else if is(E::IBV_EVENT_DEVICE_FATAL) {
            Self::DeviceLost
        } else if is(E::IBV_EVENT_CQ_ERR) {
            Self::CompletionsLost
        } else if is(E::IBV_EVENT_SRQ_ERR) {
            Self::ReceivesLost
        } else if is(E::IBV_EVENT_QP_FATAL)
            || is(E::IBV_EVENT_QP_REQ_ERR)
            || is(E::IBV_EVENT_QP_ACCESS_ERR)
            || is(E::IBV_EVENT_PATH_MIG_ERR)
        {
            Self::QueuePairFailed
        } else if is(E::IBV_EVENT_QP_LAST_WQE_REACHED) {
            Self::LastBuffer
        } else {
            Self::Other(number)
        }
    }

    /// Whether the event is of a port, and not of a queue or a queue pair.
    fn of_port(self) -> bool {
        matches!(self, Self::PortDown | Self::PortUp | Self::AddressesChanged | Self::DeviceLost)
    }

    /// Whether it belongs to the usual end of a connection, or to nobody: not worth a line.
    fn is_quiet(self) -> bool {
        matches!(self, Self::LastBuffer | Self::Other(_))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PortDown => f.write_str("a port went down (PORT_ERR)"),
            Self::PortUp => f.write_str("a port came up (PORT_ACTIVE)"),
            Self::AddressesChanged => f.write_str("the addresses of a port changed (GID_CHANGE or the like)"),
            Self::DeviceLost => f.write_str("the device failed (DEVICE_FATAL): its connections end"),
            Self::CompletionsLost => f.write_str("a completion queue failed (CQ_ERR): its connections end"),
            Self::ReceivesLost => f.write_str("a receive queue failed (SRQ_ERR): its connections end"),
            Self::QueuePairFailed => f.write_str("a queue pair failed: its connection ends"),
            Self::LastBuffer => f.write_str("a queue pair took its last buffer (LAST_WQE_REACHED)"),
            Self::Other(number) => write!(f, "event {number}"),
        }
    }
}

/// How often a device has said what, since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceEvents {
    /// A port went down.
    pub port_down: u64,
    /// A port came up.
    pub port_up: u64,
    /// GIDs, the LID, partition keys or the subnet manager changed.
    pub addresses_changed: u64,
    /// The device, a completion queue, a receive queue or a queue pair failed.
    pub failures: u64,
    /// A queue pair took its last receive buffer.
    pub last_buffers: u64,
    /// Anything else.
    pub others: u64,
}

/// The counts, as they are counted.
#[derive(Debug, Default)]
pub(super) struct Counters {
    port_down: AtomicU64,
    port_up: AtomicU64,
    addresses_changed: AtomicU64,
    failures: AtomicU64,
    last_buffers: AtomicU64,
    others: AtomicU64,
}

impl Counters {
    fn count(&self, kind: Kind) {
        let counter = match kind {
            Kind::PortDown => &self.port_down,
            Kind::PortUp => &self.port_up,
            Kind::AddressesChanged => &self.addresses_changed,
            Kind::DeviceLost | Kind::CompletionsLost | Kind::ReceivesLost | Kind::QueuePairFailed => {
                &self.failures
            }
            Kind::LastBuffer => &self.last_buffers,
            Kind::Other(_) => &self.others,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> DeviceEvents {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DeviceEvents {
            port_down: read(&self.port_down),
            port_up: read(&self.port_up),
            addresses_changed: read(&self.addresses_changed),
            failures: read(&self.failures),
            last_buffers: read(&self.last_buffers),
            others: read(&self.others),
        }
    }

    /// Whether the device is one that says when a queue pair has taken its last buffer.
    pub(super) fn has_last_buffers(&self) -> bool {
        self.last_buffers.load(Ordering::Relaxed) > 0
    }
}

/// Takes an event if there is one, acknowledges, counts and logs it. Returns what it means and the address of what it is of (0 for a port).
pub(super) fn take(device: &Device) -> Option<(Kind, usize)> {
    let mut event = MaybeUninit::<Event>::uninit();
    // SAFETY: the context is open, and `event` is a place for the result. The descriptor does not block.
    if unsafe { (device.verbs.ibv_get_async_event)(device.context, event.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: the call has filled it.
    let mut event = unsafe { event.assume_init() };
    let kind = Kind::of(event.kind);
    // SAFETY: either half of the union is plain data; the pointer is not followed.
    let (object, port) =
        unsafe { if kind.of_port() { (0, event.element.port) } else { (event.element.object as usize, 0) } };
    // SAFETY: acknowledged once, after the last use.
    unsafe { (device.verbs.ibv_ack_async_event)(&mut event) };
    device.said.count(kind);
    if !kind.is_quiet() {
        let port = if port > 0 { format!(", port {port}") } else { String::new() };
        eprintln!("fervor: RDMA device {}{port}: {kind}", device.name);
    }
    Some((kind, object))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_an_event() {
        for number in 0..100 {
            let counters = Counters::default();
            counters.count(Kind::of(number));
            let DeviceEvents { port_down, port_up, addresses_changed, failures, last_buffers, others } =
                counters.read();
            assert_eq!(port_down + port_up + addresses_changed + failures + last_buffers + others, 1);
        }
        assert_eq!(Kind::of(10), Kind::PortDown);
        assert_eq!(Kind::of(18), Kind::AddressesChanged);
        assert_eq!(Kind::of(16), Kind::LastBuffer);
        assert_eq!(Kind::of(77), Kind::Other(77));
    }
}
