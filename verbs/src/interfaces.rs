//! The IP addresses of this host, and the networks that they are in.

use std::{
    ffi::CStr,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ptr,
};

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Network {
    pub(crate) interface: String,
    pub(crate) ip: IpAddr,
    /// So many leading bits of it are those of the network.
    pub(crate) prefix: u8,
}

/// What `getifaddrs` gives, freed at the end.
struct List(*mut libc::ifaddrs);

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: it came from `getifaddrs`, and is freed once.
        unsafe { libc::freeifaddrs(self.0) }
    }
}

/// The addresses of all interfaces.
pub(crate) fn networks() -> io::Result<Vec<Network>> {
    let mut first = ptr::null_mut();
    // SAFETY: `first` is a place for the result.
    if unsafe { libc::getifaddrs(&mut first) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let list = List(first);
    let mut found = Vec::new();
    let mut next = list.0;
    while !next.is_null() {
        // SAFETY: the entries of the list live until it is freed, and nobody changes them. The addresses of an entry are NULL, or lead to
        // socket addresses of the size that their family says; its name ends with a NUL.
        let (ip, mask, interface) = unsafe {
            let entry = &*next;
            next = entry.ifa_next;
            let name = CStr::from_ptr(entry.ifa_name).to_string_lossy().into_owned();
            (ip(entry.ifa_addr), ip(entry.ifa_netmask), name)
        };
        if let (Some(ip), Some(mask)) = (ip, mask) {
            found.push(Network { interface, ip, prefix: ones(mask) });
        }
    }
    Ok(found)
}

/// The bits that are set in a mask.
fn ones(mask: IpAddr) -> u8 {
    match mask {
        IpAddr::V4(mask) => mask.to_bits().leading_ones() as u8,
        IpAddr::V6(mask) => mask.to_bits().leading_ones() as u8,
    }
}

/// The IP address in a socket address; none in those of other families.
///
/// # Safety
/// It is NULL, or leads to a socket address of the size that its family says.
unsafe fn ip(address: *const libc::sockaddr) -> Option<IpAddr> {
    if address.is_null() {
        return None;
    }
    // SAFETY: every socket address begins with its family.
    match i32::from(unsafe { (*address).sa_family }) {
        libc::AF_INET => {
            // SAFETY: of this family it is one of these (promised by the caller). It may not be aligned.
            let address = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
            Some(Ipv4Addr::from_bits(u32::from_be(address.sin_addr.s_addr)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let address = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
            Some(Ipv6Addr::from(address.sin6_addr.s6_addr).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_network_is_there() {
        let networks = networks().unwrap();
        let loopback = networks.iter().find(|network| network.ip == IpAddr::V4(Ipv4Addr::LOCALHOST));
        let loopback = loopback.unwrap_or_else(|| panic!("no 127.0.0.1 in {networks:?}"));
        assert_eq!((loopback.interface.as_str(), loopback.prefix), ("lo", 8));
    }

    #[test]
    fn masks_are_counted() {
        assert_eq!(ones("255.255.255.0".parse().unwrap()), 24);
        assert_eq!(ones("ffff:ffff:ffff:ffff::".parse().unwrap()), 64);
        assert_eq!(ones("0.0.0.0".parse().unwrap()), 0);
    }
}
