//! For tests of users' code and of back ends (feature `testing`).

#![allow(clippy::expect_used, clippy::panic, reason = "a test kit reports by panicking")]

mod given;
mod node;

pub use self::given::{Given, Then, When, given};
pub use self::node::Node;
