//! What is told to whoever watches: every metric and span, read from exporters in memory, over real servers.

#![cfg(feature = "otel")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test reports by panicking")]
#![allow(missing_docs, missing_debug_implementations, unreachable_pub, reason = "tests are no product")]

mod catalogue;
mod connection;
mod node;
mod subscription;
mod support;
mod traces;

#[path = "../support/mod.rs"]
mod harness;
