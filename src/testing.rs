//! What tests of applications and of back ends need; only with the feature `testing`.
//!
//! [`store`]: the suite that every event store passes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test kit tells a test that it failed by panicking"
)]

pub mod store;
