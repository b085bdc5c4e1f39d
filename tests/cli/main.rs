//! The command-line tool, as a program that is run: against private servers, for people and for programs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test reports by panicking")]
#![allow(missing_docs, missing_debug_implementations, unreachable_pub, reason = "tests are no product")]

#[path = "../support/mod.rs"]
mod harness;

mod adoption;
mod nats;
mod projections;
mod reading;
mod support;
mod terminal;
