//! librdmacm's identifiers and event channels, made safe to hold.
//!
//! **Order of ends.** A [`CmId`] owns its queue pair and an `Arc` of its channel, so they end in the order queue
//! pair, identifier, channel. `rdma_destroy_id` waits until every event of the identifier is acknowledged:
//! [`EventChannel::take`] acknowledges each one before it returns, and runs nothing that could end an identifier while
//! one is open.

use std::{
    ffi::c_int,
    io,
    net::SocketAddr,
    os::fd::BorrowedFd,
    ptr,
    sync::Arc,
    time::{Duration, Instant},
};

use rdma_sys::*;
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::{error::Error, transport::rdma::library};

/// `RDMA_OPTION_ID` and `RDMA_OPTION_ID_ACK_TIMEOUT` of `rdma/rdma_cma.h`, which are macros there.
const OPTION_ID: c_int = 0;
const OPTION_ACK_TIMEOUT: c_int = 3;

/// Waits until one of `fds` is readable, or until `timeout` is over.
pub(super) fn poll_readable(fds: &[BorrowedFd<'_>], timeout: Duration) {
    let mut polled: Vec<PollFd<'_>> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let timeout = Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    // A signal that interrupts the wait is a wake like any other: every caller looks again.
    let _ = rustix::event::poll(&mut polled, Some(&timeout));
}

/// Lets reads of `fd` return at once when there is nothing.
pub(super) fn set_nonblocking(fd: BorrowedFd<'_>) -> Result<(), Error> {
    let flags = rustix::fs::fcntl_getfl(fd).map_err(|e| Error::io("fcntl(F_GETFL)")(e.into()))?;
    rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)
        .map_err(|e| Error::io("fcntl(F_SETFL, O_NONBLOCK)")(e.into()))
}

/// A queue of connection-manager events.
pub(super) struct EventChannel {
    raw: *mut rdma_event_channel,
}

// SAFETY: librdmacm's calls on a channel are thread-safe; the pointer is not changed after `new`.
unsafe impl Send for EventChannel {}
// SAFETY: as for `Send`.
unsafe impl Sync for EventChannel {}

impl EventChannel {
    pub(super) fn new() -> Result<Arc<Self>, Error> {
        library::load()?;
        // SAFETY: the library is loaded.
        let raw = unsafe { rdma_create_event_channel() };
        if raw.is_null() {
            let source = io::Error::last_os_error();
            return Err(match source.raw_os_error() {
                Some(libc::ENODEV | libc::ENOENT | libc::ENOSYS) => {
                    Error::NoDevice { reason: "/dev/infiniband/rdma_cm cannot be opened".to_owned() }
                }
                _ => Error::System { call: "rdma_create_event_channel()".to_owned(), source },
            });
        }
        let channel = Arc::new(Self { raw });
        set_nonblocking(channel.fd())?;
        Ok(channel)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel's descriptor stays open until the channel is destroyed in `drop`.
        unsafe { BorrowedFd::borrow_raw((*self.raw).fd) }
    }

    /// Takes an event if there is one, has `read` look at it, and acknowledges it. `read` must not end an identifier.
    pub(super) fn take<R>(&self, read: impl FnOnce(&rdma_cm_event) -> R) -> Result<Option<R>, Error> {
        let mut event = ptr::null_mut();
        // SAFETY: the channel is open, and `event` is a place for the result.
        if unsafe { rdma_get_cm_event(self.raw, &mut event) } != 0 {
            let source = io::Error::last_os_error();
            return match source.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(Error::System { call: "rdma_get_cm_event()".to_owned(), source }),
            };
        }
        // SAFETY: `rdma_get_cm_event` returned it, and it stays until it is acknowledged.
        let result = read(unsafe { &*event });
        // SAFETY: acknowledged once, after the last use.
        unsafe { rdma_ack_cm_event(event) };
        Ok(Some(result))
    }

    /// As [`take`](Self::take), waiting for an event until `deadline`.
    pub(super) fn wait<R>(
        &self,
        deadline: Instant,
        read: impl Fn(&rdma_cm_event) -> R,
    ) -> Result<Option<R>, Error> {
        loop {
            if let Some(result) = self.take(&read)? {
                return Ok(Some(result));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            poll_readable(&[self.fd()], left);
        }
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: every identifier of the channel held an `Arc` of it, and is gone; all its events are acknowledged.
        unsafe { rdma_destroy_event_channel(self.raw) }
    }
}

/// What both sides say of a connection, besides private data.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parameters {
    /// READs that this side may have in flight.
    pub reads_out: u8,
    /// READs of the peer that this side serves at a time.
    pub reads_in: u8,
    /// Times that an unanswered request is sent again.
    pub retries: u8,
}

/// An identifier of the connection manager, with its queue pair if it has one.
pub(super) struct CmId {
    raw: *mut rdma_cm_id,
    channel: Arc<EventChannel>,
}

// SAFETY: librdmacm's calls on an identifier may come from any thread; `&mut self` keeps them apart where they
// change it.
unsafe impl Send for CmId {}

impl CmId {
    /// A fresh identifier on `channel`.
    pub(super) fn new(channel: &Arc<EventChannel>) -> Result<Self, Error> {
        let mut raw = ptr::null_mut();
        // SAFETY: the channel is open, and `raw` is a place for the result.
        let status =
            unsafe { rdma_create_id(channel.raw, &mut raw, ptr::null_mut(), rdma_port_space::RDMA_PS_TCP) };
        check(status, || "rdma_create_id()".to_owned())?;
        Ok(Self { raw, channel: Arc::clone(channel) })
    }

    /// Takes over an identifier that came with a connection request on `channel`.
    ///
    /// # Safety
    /// `raw` came with a `CONNECT_REQUEST` event of `channel`, and nobody else owns it.
    pub(super) unsafe fn from_request(raw: *mut rdma_cm_id, channel: &Arc<EventChannel>) -> Self {
        Self { raw, channel: Arc::clone(channel) }
    }

    /// Tells this identifier from others that live now.
    pub(super) fn key(&self) -> usize {
        self.raw as usize
    }

    pub(super) fn channel(&self) -> &Arc<EventChannel> {
        &self.channel
    }

    /// The device that the identifier is bound to: NULL if to none.
    pub(super) fn context(&self) -> *mut ibv_context {
        // SAFETY: the identifier lives as long as `self`.
        unsafe { (*self.raw).verbs }
    }

    /// The queue pair: NULL before [`create_queue_pair`](Self::create_queue_pair).
    pub(super) fn queue_pair(&self) -> *mut ibv_qp {
        // SAFETY: the identifier lives as long as `self`.
        unsafe { (*self.raw).qp }
    }

    pub(super) fn bind(&mut self, address: SocketAddr) -> io::Result<()> {
        let mut address = RawAddress::from(address);
        // SAFETY: the identifier lives, and the address is a whole `sockaddr` of its family.
        status(unsafe { rdma_bind_addr(self.raw, address.as_mut_ptr()) })
    }

    pub(super) fn listen(&mut self, backlog: c_int) -> io::Result<()> {
        // SAFETY: the identifier lives.
        status(unsafe { rdma_listen(self.raw, backlog) })
    }

    /// Port that the identifier is bound to.
    pub(super) fn port(&self) -> u16 {
        // SAFETY: the identifier lives.
        u16::from_be(unsafe { rdma_get_src_port(self.raw) })
    }

    pub(super) fn resolve_address(
        &mut self,
        from: Option<SocketAddr>,
        to: SocketAddr,
        limit: Duration,
    ) -> io::Result<()> {
        let mut from = from.map(RawAddress::from);
        let mut to = RawAddress::from(to);
        let from = from.as_mut().map_or(ptr::null_mut(), RawAddress::as_mut_ptr);
        // SAFETY: the identifier lives, and both addresses are whole `sockaddr`s of their families, or NULL.
        status(unsafe { rdma_resolve_addr(self.raw, from, to.as_mut_ptr(), milliseconds(limit)) })
    }

    pub(super) fn resolve_route(&mut self, limit: Duration) -> io::Result<()> {
        // SAFETY: the identifier lives.
        status(unsafe { rdma_resolve_route(self.raw, milliseconds(limit)) })
    }

    /// Sets the time after which an unanswered request is sent again, to `4.096 us * 2^exponent`.
    pub(super) fn set_ack_timeout(&mut self, exponent: u8) -> Result<(), Error> {
        let mut value = exponent;
        // SAFETY: the identifier lives, and the option's value is one byte.
        let result =
            unsafe { rdma_set_option(self.raw, OPTION_ID, OPTION_ACK_TIMEOUT, (&raw mut value).cast(), 1) };
        check(result, || format!("rdma_set_option(ACK_TIMEOUT, {exponent})"))
    }

    /// Makes the queue pair, in state INIT.
    ///
    /// # Safety
    /// The domain and the queues of `attributes` are of the identifier's device, and outlive `self`.
    pub(super) unsafe fn create_queue_pair(
        &mut self,
        domain: *mut ibv_pd,
        attributes: &mut ibv_qp_init_attr,
    ) -> io::Result<()> {
        // SAFETY: the identifier lives; the rest is promised by the caller.
        status(unsafe { rdma_create_qp(self.raw, domain, attributes) })
    }

    pub(super) fn connect(&mut self, parameters: Parameters, data: &[u8]) -> io::Result<()> {
        let mut raw = parameters.raw(data);
        // SAFETY: the identifier lives, and the private data outlives the call, which copies it.
        status(unsafe { rdma_connect(self.raw, &mut raw) })
    }

    pub(super) fn accept(&mut self, parameters: Parameters, data: &[u8]) -> io::Result<()> {
        let mut raw = parameters.raw(data);
        // SAFETY: as for `connect`.
        status(unsafe { rdma_accept(self.raw, &mut raw) })
    }

    /// Refuses. A peer that has gone meanwhile is as good as refused.
    pub(super) fn reject(&mut self, data: &[u8]) {
        let length = u8::try_from(data.len()).expect("framed private data is shorter than 256 bytes");
        // SAFETY: the identifier lives, and the private data outlives the call, which copies it.
        unsafe { rdma_reject(self.raw, data.as_ptr().cast(), length) };
    }

    /// Moves the queue pair to the error state, and tells the peer. On a connection that the peer has ended, it answers.
    pub(super) fn disconnect(&mut self) {
        // SAFETY: the identifier lives. It fails when the connection is not established (any more): then there is
        // nobody to tell, but the queue pair still has to be in the error state.
        let result = unsafe { rdma_disconnect(self.raw) };
        let queue_pair = self.queue_pair();
        if result != 0 && !queue_pair.is_null() {
            // SAFETY: all-zero bytes are a value of this plain C struct.
            let mut attributes: ibv_qp_attr = unsafe { std::mem::zeroed() };
            attributes.qp_state = ibv_qp_state::IBV_QPS_ERR;
            // SAFETY: the queue pair lives as long as the identifier. Any state may go to the error state.
            unsafe { ibv_modify_qp(queue_pair, &mut attributes, ibv_qp_attr_mask::IBV_QP_STATE.0 as c_int) };
        }
    }

    /// Lets the events of this identifier come to `channel` from now on.
    pub(super) fn migrate(&mut self, channel: &Arc<EventChannel>) -> Result<(), Error> {
        // SAFETY: identifier and channel live. All events taken from the old channel are acknowledged.
        let result = unsafe { rdma_migrate_id(self.raw, channel.raw) };
        check(result, || "rdma_migrate_id()".to_owned())?;
        self.channel = Arc::clone(channel);
        Ok(())
    }
}

impl Drop for CmId {
    fn drop(&mut self) {
        // SAFETY: the identifier is ours and ended once, after its queue pair; its channel lives until `self` is gone.
        unsafe {
            if !(*self.raw).qp.is_null() {
                rdma_destroy_qp(self.raw);
            }
            rdma_destroy_id(self.raw);
        }
    }
}

impl Parameters {
    fn raw(self, data: &[u8]) -> rdma_conn_param {
        rdma_conn_param {
            private_data: data.as_ptr().cast(),
            private_data_len: u8::try_from(data.len())
                .expect("framed private data is shorter than 256 bytes"),
            responder_resources: self.reads_in,
            initiator_depth: self.reads_out,
            flow_control: 1,
            retry_count: self.retries,
            // 7: for ever. A receiver that has no buffer just now makes its senders wait; one that is gone
            // does not answer at all, and that is bounded by `retries`.
            rnr_retry_count: 7,
            srq: 1,
            qp_num: 0,
        }
    }
}

fn status(result: c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn check(result: c_int, call: impl FnOnce() -> String) -> Result<(), Error> {
    status(result).map_err(|source| Error::System { call: call(), source })
}

fn milliseconds(limit: Duration) -> c_int {
    limit.as_millis().clamp(1, 60_000) as c_int
}

/// A socket address as C has it.
pub(super) enum RawAddress {
    V4(libc::sockaddr_in),
    V6(libc::sockaddr_in6),
}

impl RawAddress {
    fn as_mut_ptr(&mut self) -> *mut libc::sockaddr {
        match self {
            Self::V4(address) => (&raw mut *address).cast(),
            Self::V6(address) => (&raw mut *address).cast(),
        }
    }
}

impl From<SocketAddr> for RawAddress {
    fn from(address: SocketAddr) -> Self {
        match address {
            SocketAddr::V4(address) => Self::V4(libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
                sin_zero: [0; 8],
            }),
            SocketAddr::V6(address) => Self::V6(libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: address.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                sin6_scope_id: address.scope_id(),
            }),
        }
    }
}
