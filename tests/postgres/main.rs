//! The PostgreSQL store on real servers: the suite of all stores, and tests specific to PostgreSQL.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(unreachable_pub, reason = "there is nowhere to reach it from")]
#![cfg(feature = "postgres")]

mod bad_input;
mod by_command;
mod by_name;
mod conformance;
mod faults;
mod mark;
mod oracle;
mod outage;
mod plans;
mod pooler;
mod projections;
mod proxy;
mod read_model;
mod rights;
mod settled;
mod standby;
#[path = "../support/mod.rs"]
mod support;
mod tls;
mod tools;
mod wake;
