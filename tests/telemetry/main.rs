//! Every metric and span, read from in-memory exporters, over real servers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test reports by panicking")]
#![allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    reason = "tests are not part of the API"
)]

mod catalogue;
mod connection;
mod meters;
mod node;
mod subscription;
mod traces;
mod work;

#[path = "../support/mod.rs"]
mod support;
