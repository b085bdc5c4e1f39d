//! The handles of the tasks that run a projection, and of the group of its partitions.

use std::sync::Arc;

use tokio::sync::watch;

use super::ProjectionStatus;
use super::control::Control;
use super::partition::{Never, PartitionGroup};
use crate::supervised::Supervised;

/// A task of a projection or of a partition.
pub(super) struct Working {
    pub(super) actor: Supervised<Control>,
    pub(super) status: watch::Receiver<ProjectionStatus>,
}

/// The group of the partitions.
#[derive(Clone)]
pub(super) struct Grouped {
    pub(super) group: Arc<PartitionGroup>,
    pub(super) actor: Supervised<Never>,
    /// Total status of all partitions.
    pub(super) status: watch::Receiver<ProjectionStatus>,
}
