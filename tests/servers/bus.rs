//! Tests of every bus: the promises of the port, against real servers that are killed, paused,
//! restarted and wiped.

mod begins_ahead;
mod certificates;
mod claims;
mod cluster;
mod compose;
mod conformance;
mod durable;
mod events;
mod faults;
mod fixtures;
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
mod wire;
