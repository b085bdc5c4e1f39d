//! The test kit for applications and back ends (feature `testing`).
//!
//! - [`given`]: tests decisions of an aggregate without a runtime:
//!   `given(events).when(command).then(events)`;
//! - [`given_events`]: tests decisions over several streams without a runtime;
//! - [`given_process`]: tests the reactions of a process without a runtime;
//! - [`roundtrip`]: tests that your events can be stored and read, in both codecs;
//! - [`MemoryStore::advance_clock`](crate::MemoryStore::advance_clock): makes timers, scheduled
//!   commands and recurring schedules due;
//! - [`store`]: the conformance suite of event stores.
//!
//! # Paused time
//!
//! Tests with `#[tokio::test(start_paused = true)]` need [`MemoryStore`](crate::MemoryStore) and no
//! bus. A paused clock jumps to the next timeout whenever all tasks wait.
//! SQLite works in its own threads, PostgreSQL and NATS in other processes, so every call to them
//! counts as waiting. Timeouts of commands, leases and connections then expire at once, and
//! commands end in `OutcomeUnknown`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test kit reports failures by panicking"
)]

mod given;
mod given_events;
mod node;
mod roundtrip;
pub mod store;

pub use self::given::{Given, Then, When, given};
pub use self::given_events::{GivenEvents, ThenDecided, WhenDecided, given_events};
pub use self::node::Node;
pub use self::roundtrip::roundtrip;
pub use crate::process::trial::{ProcessTrial, given_process};
#[doc(hidden)]
pub use crate::projection::sealed::Sealed;
