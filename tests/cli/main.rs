//! The command-line tool, run as a program against private servers, with text and JSON output.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test reports by panicking")]
#![allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    reason = "tests are not part of the API"
)]

#[path = "../support/mod.rs"]
mod harness;

mod adoption;
mod nats;
mod projections;
mod reading;
mod support;
mod terminal;
