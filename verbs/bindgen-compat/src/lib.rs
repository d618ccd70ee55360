//! What `rdma-sys` 0.3.0 uses of bindgen 0.59, on top of a current bindgen.
//!
//! bindgen 0.59 panics with clang 16 and later (Debian 13 has 19). A current bindgen still has every call of
//! the builder that `rdma-sys` makes, under the same name; only the version number stands in the way. The
//! workspace's `[patch.crates-io]` puts this crate in the place of bindgen 0.59.2.

#![forbid(unsafe_code)]

pub use bindgen_current::*;
