//! A program with the `rdma` provider starts where there is no libibverbs or no device, and says so. It leaves
//! the names of libibverbs to others.

use std::{env, fs, process::Command};

use fervor_verbs::{
    Error, devices,
    transport::{EndpointConfig, Transport, rdma::Rdma},
};

const CHILD: &str = "FERVOR_TEST_WITHOUT_LIBRARIES";

/// Runs `test` of this program again where the loader finds an empty file in the place of `library`: it looks no further.
fn without(library: &str, test: &str) {
    let folder = env::temp_dir().join(format!("fervor-without-{library}-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(library), "").unwrap();
    let child = Command::new(env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env("LD_LIBRARY_PATH", &folder)
        .env(CHILD, library)
        .output()
        .unwrap();
    fs::remove_dir_all(&folder).unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&child.stderr)
    );
}

fn expect_missing(result: Result<(), Error>, library: &str) {
    let error = result.expect_err("the library is not there");
    assert!(matches!(error, Error::MissingLibrary { .. }), "{error}");
    let said = error.to_string();
    let package = "apt-get install libibverbs1 ibverbs-providers";
    assert!(said.contains(library) && said.contains(package), "{said}");
}

#[test]
fn the_error_names_the_package() {
    if let Ok(library) = env::var(CHILD) {
        for _ in 0..2 {
            expect_missing(Rdma::new().map(drop), &library);
            expect_missing(Rdma::for_address(&"rdma://127.0.0.1:1".parse().unwrap()).map(drop), &library);
            expect_missing(devices::list().map(drop), &library);
        }
        return;
    }
    without("libibverbs.so.1", "the_error_names_the_package");
}

#[test]
fn a_machine_without_devices_says_so() {
    let listed = devices::list().expect("the libraries are installed: the build needs their headers");
    match Rdma::new() {
        Ok(_) => assert!(!listed.is_empty()),
        Err(error) => assert!(matches!(error, Error::NoDevice { .. }), "{error}"),
    }
    if listed.is_empty() {
        for result in [Rdma::on_device("mlx5_0"), Rdma::for_address(&"rdma://127.0.0.1:1".parse().unwrap())] {
            let error = result.expect_err("there is no device");
            assert!(error.to_string().contains("no RDMA device"), "{error}");
        }
    }
}

/// A function of this program that has the name of one of libibverbs. If Fervor defined the name, this program would not link; if it called the name,
/// it would call this.
#[unsafe(no_mangle)]
extern "C" fn ibv_create_srq() -> ! {
    panic!("Fervor took a function of this program for one of libibverbs")
}

#[test]
fn the_names_of_the_library_are_left_to_others() {
    // Keeps the function in the program.
    assert!(std::hint::black_box(ibv_create_srq as extern "C" fn() -> !) as usize != 0);
    match Rdma::new() {
        Ok(rdma) => drop(rdma.endpoint(&EndpointConfig::default()).expect("an endpoint")),
        Err(error) => assert!(matches!(error, Error::NoDevice { .. }), "{error}"),
    }
}
