//! Tests of every bus: the promises of the port, against real servers that are killed, paused,
//! restarted and wiped.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test reports by panicking")]
#![allow(missing_docs, missing_debug_implementations, unreachable_pub, reason = "tests are no product")]

mod certificates;
mod claims;
mod cluster;
mod compose;
mod conformance;
mod durable;
mod events;
mod faults;
mod follower;
mod foreign;
mod forged;
mod hazards;
mod hints;
mod limits;
mod link;
mod log_stream;
mod login;
mod nats_md;
mod oracle;
mod permissions;
mod raw;
mod server_errors;
mod storage;
mod subjects;
mod support;
mod wire;

#[path = "../support/mod.rs"]
mod harness;
