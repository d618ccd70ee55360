//! The `shm` provider.
