//! Files: what is handed out is sealed, and what is received is checked.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use rustix::fs::{
    FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat,
    ftruncate, memfd_create, open,
};

use super::*;
use crate::transport::shm::{
    file::{self, SEALS},
    mapping::{Mapping, Mappings, PAGE},
};

/// A memfd of this size with these seals.
fn memfd(len: u64, flags: MemfdFlags, seals: SealFlags) -> rustix::io::Result<OwnedFd> {
    let fd = memfd_create("test", MemfdFlags::ALLOW_SEALING | flags)?;
    ftruncate(&fd, len)?;
    fcntl_add_seals(&fd, seals)?;
    Ok(fd)
}

/// The descriptor that peers get of the only region that a transport offers.
fn handed_out(transport: &Shm) -> OwnedFd {
    let user = transport.0.user;
    transport.0.registry.offers().unwrap()[0].descriptor(user, user).unwrap()
}

#[test]
fn all_that_is_handed_out_is_sealed_and_private() {
    let transport = Shm::new().unwrap();
    let endpoint = transport.endpoint(&EndpointConfig::default()).unwrap();
    let bell = endpoint.attach().0.bell_file().try_clone_to_owned().unwrap();
    let (_ring, ring) = ring::create(1 << 16).unwrap();
    let writable = Shm::new().unwrap();
    let _region = writable.register(&Memory::new("test", 5000).unwrap(), Access::RemoteWrite).unwrap();
    let readable = Shm::new().unwrap();
    let _read_only = readable.register(&Memory::new("test", 5000).unwrap(), Access::RemoteRead).unwrap();
    let exporting = Shm::new().unwrap();
    let rows = Exclusive::new("rows", 5000).unwrap();
    let _export = exporting.export(&rows).unwrap();
    // Again, over another transport: nothing is missing then.
    let _twice = transport.export(&rows).unwrap();
    let files = [bell, ring, handed_out(&writable), handed_out(&readable), handed_out(&exporting)];
    for (number, fd) in files.iter().enumerate() {
        let read_only = number >= 3;
        let seals = fcntl_get_seals(fd).unwrap();
        assert!(seals.contains(SEALS), "file {number}: {seals:?}");
        assert_eq!(seals.contains(SealFlags::FUTURE_WRITE), read_only, "file {number}: {seals:?}");
        fcntl_add_seals(fd, SealFlags::FUTURE_WRITE).expect_err("a peer adds a seal");
        assert_eq!(fstat(fd).unwrap().st_mode & 0o777, 0o600, "file {number}");
        let mappings = Mappings::new(transport.0.user);
        assert_eq!(mappings.open(fd, 1, true).is_ok(), !read_only, "file {number}");
        assert!(mappings.open(fd, 1, false).is_ok(), "file {number}");
    }
}

/// What a process can do that has a descriptor `fd` which reads, and wants to write. Each must fail.
fn try_to_write(fd: RawFd, owner: u32) {
    for path in [format!("/proc/self/fd/{fd}"), format!("/proc/{owner}/fd/{fd}")] {
        // That the file opens does not mean that it can be written.
        let Ok(again) = open(&path, OFlags::RDWR, Mode::empty()) else { continue };
        rustix::io::write(&again, b"x").expect_err("write");
        rustix::io::pwrite(&again, b"x", 64).expect_err("pwrite");
        ftruncate(&again, 0).expect_err("ftruncate");
        ftruncate(&again, 1 << 20).expect_err("ftruncate");
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&again, punch, 0, PAGE as u64).expect_err("punch a hole");
        fallocate(&again, FallocateFlags::ZERO_RANGE, 0, PAGE as u64).expect_err("write zeros");
        memmap2::MmapOptions::new().len(PAGE).map_raw(&again).expect_err("mmap");
        let read_only = memmap2::MmapOptions::new().len(PAGE).map_raw_read_only(&again).unwrap();
        // SAFETY: the range is that mapping, which nobody has a reference to.
        let result = unsafe {
            libc::mprotect(read_only.as_mut_ptr().cast(), PAGE, libc::PROT_READ | libc::PROT_WRITE)
        };
        assert_ne!(result, 0, "mprotect");
        fcntl_add_seals(&again, SealFlags::WRITE).expect_err("F_ADD_SEALS");
    }
}

#[test]
fn what_may_only_be_read_cannot_be_opened_for_writing_by_another_process() {
    if let Some(argument) = argument() {
        let (fd, owner) = argument.split_once(' ').unwrap();
        let fd: RawFd = fd.parse().unwrap();
        // SAFETY: the parent has left this descriptor open for this process, and nothing else here owns it.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        let mapping = Mappings::new(0).open(&file, 8, false).unwrap();
        let mut bytes = [0; 8];
        mapping.read(0, &mut bytes);
        assert_eq!(bytes, [7; 8]);
        return try_to_write(file.as_raw_fd(), owner.parse().unwrap());
    }
    let (a, b) = (Shm::new().unwrap(), Shm::new().unwrap());
    let memory = Memory::new("test", 5000).unwrap();
    let _region = a.register(&memory, Access::RemoteRead).unwrap();
    let mut rows = Exclusive::new("rows", 5000).unwrap();
    let _export = b.export(&rows).unwrap();
    // The owner goes on writing.
    memory.write(0, &[7; 8]);
    rows.bytes_mut()[..8].fill(7);
    for transport in [&a, &b] {
        let fd = handed_out(transport);
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
        let argument = format!("{} {}", fd.as_raw_fd(), std::process::id());
        run_alone("files::what_may_only_be_read_cannot_be_opened_for_writing_by_another_process", &argument);
        try_to_write(fd.as_raw_fd(), std::process::id());
    }
    assert!(memory.load(0) == 0x0707_0707_0707_0707 && rows.bytes()[..8] == [7; 8]);
}

#[test]
fn memory_is_registered_for_reading_or_for_writing() {
    let transport = Shm::new().unwrap();
    for (first, then, words) in [
        (Access::RemoteRead, Access::RemoteWrite, "for remote READ alone"),
        (Access::RemoteWrite, Access::RemoteRead, "for remote WRITE"),
    ] {
        let memory = Memory::new("test", 64).unwrap();
        drop(transport.register(&memory, Access::Local).unwrap());
        drop(transport.register(&memory, first).unwrap());
        let error = transport.register(&memory, then).unwrap_err().to_string();
        assert!(
            error.contains("64 bytes") && error.contains(words) && error.contains("another memory"),
            "{error}"
        );
        transport.register(&memory, first).unwrap();
        transport.register(&memory, Access::Local).unwrap();
    }
}

#[test]
fn a_file_that_could_change_is_not_taken() {
    let plain = MemfdFlags::CLOEXEC;
    let (shrink, grow) = (SealFlags::SHRINK, SealFlags::GROW);
    let good = || memfd(PAGE as u64, plain, SEALS).unwrap();
    let (stream, _other_end) = std::os::unix::net::UnixStream::pair().unwrap();
    let (_, read_only) = Mapping::create("test", PAGE).unwrap();
    let read_only =
        open(format!("/proc/self/fd/{}", read_only.as_raw_fd()), OFlags::RDONLY, Mode::empty()).unwrap();
    let cases: Vec<(OwnedFd, usize, &str)> = vec![
        (std::fs::File::open("/proc/self/exe").unwrap().into(), 1, "it is no memfd"),
        (std::fs::File::open("/dev/zero").unwrap().into(), 1, "it is no memfd"),
        (stream.into(), 1, "it is no memfd"),
        (memfd(64, plain, SealFlags::empty()).unwrap(), 1, "not sealed against shrinking"),
        (memfd(64, plain, grow).unwrap(), 1, "not sealed against shrinking"),
        (memfd(64, plain, shrink).unwrap(), 1, "not sealed against growing"),
        (memfd(64, plain, shrink | grow).unwrap(), 1, "not sealed against further seals"),
        (memfd(0, plain, SEALS).unwrap(), 0, "it has 0 bytes"),
        (good(), PAGE + 1, "it has 4096 bytes and should have 4097"),
        (memfd(PAGE as u64, plain, SEALS | SealFlags::FUTURE_WRITE).unwrap(), 1, "mmap"),
        (read_only, 1, "mmap"),
    ];
    for (fd, least, words) in cases {
        let error = Mappings::new(0).open(&fd, least, true).unwrap_err().to_string();
        assert!(error.contains(words), "{error}: expected {words}");
    }
    assert!(Mappings::new(0).open(&good(), PAGE, true).is_ok());
}

#[test]
fn huge_pages_of_others_are_taken_only_if_they_cannot_be_taken_away() {
    const HUGE: u64 = 2 << 20;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let own = rustix::process::geteuid().as_raw();
    // Without a page, which needs none in the pool.
    let Ok(empty) = memfd(HUGE, flags, SEALS | SealFlags::FUTURE_WRITE) else {
        return eprintln!("this kernel has no huge pages of 2 MiB");
    };
    assert_eq!(file::inspect(&empty, 1, own).unwrap().page, HUGE as usize);
    let error = file::inspect(&empty, 1, own + 1).unwrap_err();
    let words = format!("huge pages of user {own}, who could take them away from user {}", own + 1);
    assert!(error.contains(&words), "{error}");
    // With all its pages, where the machine has some free.
    let whole = memfd_create("test", MemfdFlags::ALLOW_SEALING | flags).unwrap();
    ftruncate(&whole, HUGE).unwrap();
    if fallocate(&whole, FallocateFlags::empty(), 0, HUGE).is_err() {
        return;
    }
    fcntl_add_seals(&whole, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fcntl_add_seals(&whole, SealFlags::FUTURE_WRITE | SealFlags::SEAL).unwrap();
    fallocate(&whole, punch, 0, HUGE).expect_err("a page is taken away");
    file::inspect(&whole, 1, own + 1).unwrap();
}

#[test]
fn writable_memory_on_huge_pages_is_not_handed_to_another_user() {
    let transport = Shm::new().unwrap();
    let memory = Memory::new("test", 4 << 20).unwrap();
    let _region = transport.register(&memory, Access::RemoteWrite).unwrap();
    let offers = transport.0.registry.offers().unwrap();
    let user = transport.0.user;
    offers[0].descriptor(user, user).unwrap();
    // Small pages are what a machine has that was not told to keep huge ones.
    let other = offers[0].descriptor(user, user + 1);
    assert_eq!(other.is_err(), memory.huge_pages(), "{other:?}");
}

#[test]
fn a_transport_that_offers_too_much_says_so() {
    let transport = Shm::new().unwrap();
    let memory = Memory::new("test", 64).unwrap();
    let register = || transport.register(&memory, Access::RemoteWrite).unwrap();
    let mut regions: Vec<_> = (0..region::MAX_REGIONS).map(|_| register()).collect();
    assert_eq!(transport.0.registry.offers().unwrap().len(), 4096);
    regions.push(register());
    let error = transport.0.registry.offers().err().unwrap();
    assert!(matches!(error, Error::Limit { value: 4097, limit: 4096, .. }), "{error}");
    let too_long = EndpointConfig { receive_size: (4 << 20) + 1, ..EndpointConfig::default() };
    let error = transport.endpoint(&too_long).err().unwrap();
    assert!(matches!(error, Error::Limit { value: 4_194_305, limit: 4_194_304, .. }), "{error}");
}
