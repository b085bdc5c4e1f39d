//! Commands: one process and NATS have the same behaviour; failures of processes and servers.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test reports by panicking")]
#![allow(missing_docs, missing_debug_implementations, unreachable_pub, reason = "tests are no product")]

mod attempts;
mod conformance;
mod deduplication;
mod domain;
mod hazards;
mod nodes;
mod panics;
mod processes;
mod replies;
mod sizes;
mod support;
mod wire;

#[path = "../faults/mod.rs"]
mod faults;
#[path = "../support/mod.rs"]
mod harness;
