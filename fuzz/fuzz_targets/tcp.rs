//! The `tcp` provider: openings and frames. What must hold is said in `verbs/src/fuzz.rs`.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    fervor_verbs::fuzz::tcp(data);
});
