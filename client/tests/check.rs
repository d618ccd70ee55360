//! [`ClientOptions::check`], with a bug switched on for it to find: a copy in the cache is used however old it is.

use fervor_client::{Client, ClientOptions, Error, Model};
use fervor_protocol::mutants::{Mutant, activate};
use fervor_server::Server;
use fervor_verbs::transport::any::Host;
use support::{Folder, config};

mod support;

/// Reads row 5 at clock 0, and again at clock 3. What came of it, and what was counted.
fn late_read(check: bool, model: Model, many: bool) -> (Result<(), Error>, u64) {
    let folder = Folder::new("check");
    let address = folder.address("s.sock");
    let host = Host::for_addresses(std::slice::from_ref(&address)).unwrap();
    let server = Server::start(&host, &config(&address, 1)).unwrap();
    let options = ClientOptions { check, copies: true, ..ClientOptions::default() };
    let client = Client::connect_on(&host, &[address], options).unwrap();
    let table = client.table::<i64>("weights", 8, 4, model).unwrap();
    let mut worker = client.worker().unwrap();
    let mut row = [0; 4];
    worker.get(&table, 5, &mut row).unwrap();
    (0..3).for_each(|_| worker.clock().unwrap());
    let result = match many {
        false => worker.get(&table, 5, &mut row),
        true => worker.get_many(&table, &[5], &mut row),
    };
    let violations = worker.stats().violations;
    drop(worker);
    client.close().unwrap();
    assert!(server.stop());
    (result, violations)
}

/// One test: a bug is switched on for the whole process.
#[test]
fn a_copy_that_is_too_old_is_an_error_only_under_check_and_only_with_a_bug() {
    let model = Model::Ssp { staleness: 1 };
    for many in [false, true] {
        let (result, violations) = late_read(true, model, many);
        assert_eq!((result.is_ok(), violations), (true, 0), "without a bug: {result:?}");

        activate(Some(Mutant::CopyTooOld));
        let (result, violations) = late_read(false, model, many);
        assert_eq!((result.is_ok(), violations), (true, 1), "only counted: {result:?}");
        let (result, violations) = late_read(true, model, many);
        let said = result.expect_err("the copy is too old").to_string();
        assert_eq!(
            said,
            "the staleness bound is violated: worker 1, at clock 3, read row 5 of the table `weights` as of clock 0, but \
             SSP(1) allows nothing before clock 2: this is a bug of Fervor, not of the program"
        );
        assert_eq!(violations, 1);
        // The same copy is within another bound.
        let (result, violations) = late_read(true, Model::Ssp { staleness: 3 }, many);
        assert_eq!((result.is_ok(), violations), (true, 0), "{result:?}");
        activate(None);
    }
}
