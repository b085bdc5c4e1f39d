//! Commands: one process and NATS have the same behaviour; failures of processes and servers.

mod attempts;
mod cluster;
mod conformance;
mod deduplication;
mod domain;
mod hazards;
mod nodes;
mod panics;
mod processes;
mod replies;
mod sizes;
mod wire;
