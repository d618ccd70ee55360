//! The conformance suite: the contract as tests, written once, run for every provider.
