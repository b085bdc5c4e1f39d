//! For tests of users' code and of back ends (feature `testing`).

#![allow(clippy::expect_used, clippy::panic, reason = "a test kit reports by panicking")]

mod given;

pub use self::given::{Given, Then, When, given};
