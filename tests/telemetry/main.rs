//! Every metric and span, read from in-memory exporters, over real servers.

#![cfg(feature = "otel")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test reports by panicking")]
#![allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    reason = "tests are not part of the API"
)]

mod catalogue;
mod connection;
mod node;
mod subscription;
mod support;
mod traces;

#[path = "../support/mod.rs"]
mod harness;
