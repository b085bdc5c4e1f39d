//! What tests of applications and of back ends need (feature `testing`).
//!
//! - [`given`]: an aggregate's decisions, without a runtime: `given(events).when(command).then(events)`;
//! - [`roundtrip`]: whether events of your own can be stored and read, in both codecs;
//! - [`shapes`]: the conformance list of what events may hold, and what a store makes of it;
//! - [`store`]: the suite that every event store passes.
//!
//! # Paused time
//!
//! Tests with `#[tokio::test(start_paused = true)]` need [`MemoryStore`](crate::MemoryStore) and
//! [`LocalBus`](crate::LocalBus). A paused clock jumps to the next timeout whenever all tasks wait. SQLite works in threads of its
//! own, PostgreSQL and NATS in other processes, so every call to them looks like waiting: timeouts of commands, leases and
//! connections run out at once, and commands end in `OutcomeUnknown`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test kit tells a test that it failed by panicking"
)]

mod given;
mod node;
mod roundtrip;
pub mod shapes;
pub mod store;

pub use self::given::{Given, Then, When, given};
pub use self::node::Node;
pub use self::roundtrip::roundtrip;
