//! The task of one projection: ownership of the read model, and the source of its events.

mod apply;
mod batch;
mod catch_up;
mod change;
mod context;
mod control;
mod cutover;
mod failure;
mod floor;
mod live;
mod log_source;
mod memory;
mod news;
mod operator_requests;
mod operators;
mod ownership;
mod page_ahead;
mod page_cache;
mod rebuild;
mod retry;
mod run;
mod schedule;
mod snapshot;
mod snapshotting;
mod task;
mod timing;
mod user_code;
mod version;
mod wait;
mod work;

pub(crate) use self::context::NodeServices;
pub(super) use self::context::VersionedProjection;
pub(super) use self::page_cache::PageCache;
pub(super) use self::work::{ProjectionWork, TaskSpec};
