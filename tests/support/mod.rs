//! Private PostgreSQL and NATS servers for tests.
//!
//! Each has its own port and directory, and ends with the test.
//!
//! ```ignore
//! mod support;
//! let mut postgres = support::PostgresServer::start().await;
//! let mut nats = support::NatsServer::start(support::NatsOptions::jetstream()).await;
//! postgres.kill();            // kill -9 of all its processes
//! postgres.restart().await;   // same port, same data
//! ```
//!
//! A server ends when its value is dropped (also by a panic), and when the test process dies in any
//! way: see [`workdir`]. `scripts/test` provides the programs. A missing program fails the test;
//! tests are never skipped.
#![allow(
    dead_code,
    unused_imports,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub,
    reason = "each test binary uses a part of this, and a harness that cannot do its work should panic with the reason"
)]

mod certificates;
pub mod counter;
mod dice;
mod example;
mod faulty_store;
pub mod fulfilment;
pub mod fulfilment_oracle;
mod nats;
mod pgbouncer;
mod ports;
mod postgres;
mod process;
pub mod reminders;
mod subscriber;
mod test_process;
pub mod unstorable;
mod wait;
mod workdir;

pub use certificates::Certificates;
pub use dice::Dice;
pub use example::example;
pub use faulty_store::FaultyStore;
pub use nats::{NatsOptions, NatsServer, oldest_nats_server, too_old_nats_server};
pub use pgbouncer::PgBouncer;
pub use ports::Port;
pub use postgres::PostgresServer;
pub use subscriber::ThreadSubscriber;
pub use test_process::{run_alone, test_process};
pub use wait::{PATIENCE, eventually, eventually_async, eventually_some};
pub use workdir::processes_in;
