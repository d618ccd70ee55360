//! The `sim` provider.
