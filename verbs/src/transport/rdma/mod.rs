//! The `rdma` provider.
