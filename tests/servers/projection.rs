//! From the log to read models: publisher, bus, feed and projections, with faults between them.

mod batches;
mod conformance;
mod control;
mod copies;
mod deferred;
mod failures;
mod fixtures;
mod following;
mod hazards;
mod in_memory_indexes;
mod lag;
mod nodes;
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
mod snapshots;
mod start_positions;
mod transactions;
