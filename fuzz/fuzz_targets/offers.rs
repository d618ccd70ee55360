//! The `rdma` provider: offers, and the messages that they travel in. What must hold is said in `verbs/src/fuzz.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    fervor_verbs::fuzz::offers(data);
});
