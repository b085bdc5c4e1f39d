//! Tests with private PostgreSQL and NATS servers, which are killed, paused, restarted and wiped.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test reports by panicking")]
#![allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    reason = "tests are not part of the API"
)]

mod bus;
// Cargo builds the tool for tests if this feature is on.
#[cfg(feature = "cli")]
mod cli;
mod command;
mod guide;
mod migration;
mod options;
mod postgres;
mod private_servers;
mod process;
mod projection;
mod schedule;

#[path = "../support/mod.rs"]
mod support;
