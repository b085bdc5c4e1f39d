//! From the log to read models: publisher, bus, feed and projections, with faults between them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test reports by panicking")]
#![allow(missing_docs, missing_debug_implementations, unreachable_pub, reason = "tests are no product")]
#![cfg(feature = "sqlite")]

mod batches;
#[cfg(all(feature = "postgres", feature = "nats"))]
mod conformance;
mod control;
mod copies;
mod deferred;
mod failures;
mod following;
#[cfg(all(feature = "postgres", feature = "nats"))]
mod hazards;
mod in_memory_indexes;
mod lag;
mod nodes;
#[cfg(all(feature = "postgres", feature = "nats"))]
mod orders;
mod outages;
mod page_cache;
mod partitions;
mod publishing;
#[cfg(target_os = "linux")]
mod quiet;
mod rebuild;
mod requests;
mod restarts;
mod schedules;
#[cfg(all(feature = "postgres", feature = "nats"))]
mod snapshots;
#[cfg(all(feature = "postgres", feature = "nats"))]
mod start_positions;
mod support;
mod transactions;

#[cfg(all(feature = "postgres", feature = "nats"))]
#[path = "../support/mod.rs"]
mod harness;
