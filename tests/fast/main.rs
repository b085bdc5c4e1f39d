//! Tests without servers: stores in memory and SQLite, codecs, aggregates, examples and documents.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test reports by panicking")]
#![allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    reason = "tests are not part of the API"
)]

mod aggregate;
mod codec;
mod decide;
mod dependencies;
mod docs;
mod examples;
mod group_commit;
mod process;
mod process_faults;
mod projection;
mod retail_domain;
mod runtime;
mod schedule;
mod schedule_faults;
mod steps;
mod store;

#[path = "../support/mod.rs"]
mod support;
