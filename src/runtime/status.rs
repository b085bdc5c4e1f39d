//! The status of a node.

use std::collections::BTreeMap;

use serde::Serialize;
use uuid::Uuid;

use crate::aggregate::RouterStatus;
use crate::bus::BusState;
use crate::command::{CommandBusStatus, HandlerStatus};
use crate::event::Position;
use crate::feed::FeedStatus;
use crate::process::ProcessStatus;
use crate::projection::ProjectionStatus;
use crate::publisher::PublisherStatus;
use crate::schedule::SchedulerStatus;
use crate::store::{HighWaterStall, LeaseInfo, StoreError, StoreInfo, WriterStatus};

/// The status of a node.
///
/// Serializes as a map of its fields, so that a service can return it as JSON. A field that could
/// not be read is `{"error": "text"}`.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct RuntimeStatus {
    /// The id of the node, new at every start.
    pub node: Uuid,
    /// The store.
    pub store: StoreInfo,
    /// The high-water mark of the log, or the error of reading it.
    #[serde(serialize_with = "crate::serde_forms::value_or_error")]
    pub high_water_mark: Result<Position, StoreError>,
    /// The transaction that holds back the high-water mark, if any. A running append is harmless.
    #[serde(serialize_with = "crate::serde_forms::value_or_error")]
    pub stall: Result<Option<HighWaterStall>, StoreError>,
    /// The group-commit writer.
    pub writer: WriterStatus,
    /// The aggregate types, by category.
    pub aggregates: Vec<RouterStatus>,
    /// The handlers, by name.
    pub handlers: Vec<HandlerStatus>,
    /// The processes, in the order of their registration.
    ///
    /// The progress of a process in the log is that of the projection `process NAME`.
    pub processes: Vec<ProcessStatus>,
    /// The scheduler of commands and recurring schedules.
    pub scheduler: SchedulerStatus,
    /// The connection to the other nodes, for commands.
    pub commands: CommandBusStatus,
    /// The connection to the bus; `None` without a bus.
    pub bus: Option<BusState>,
    /// The publisher.
    pub publisher: PublisherStatus,
    /// The live tail of the log in this process.
    pub feed: FeedStatus,
    /// The projections, by name.
    pub projections: BTreeMap<String, ProjectionStatus>,
    /// The leases and their holders, or the error of reading them.
    #[serde(serialize_with = "crate::serde_forms::value_or_error")]
    pub leases: Result<Vec<LeaseInfo>, StoreError>,
}
