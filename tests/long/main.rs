//! Programs of several processes under load and faults, against an oracle.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test reports by panicking")]
#![allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    reason = "tests are not part of the API"
)]

mod bank;
mod chaos;
mod fulfilment;
mod retail;
mod soak;

#[path = "../support/mod.rs"]
mod support;
