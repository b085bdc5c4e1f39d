//! The services and the status of a scheduler.

use std::sync::{Arc, Weak};

use tokio::sync::watch;
use uuid::Uuid;

use super::super::status::{SchedulerState, SchedulerStatus};
use crate::command::Dispatcher;
use crate::lease::LeaseWatcher;
use crate::store::EventStore;
use crate::telemetry::Metrics;

/// The components that the scheduler uses.
pub(crate) struct SchedulerServices {
    pub(crate) store: Arc<dyn EventStore>,
    pub(crate) commands: Weak<Dispatcher>,
    pub(crate) lease_watcher: LeaseWatcher,
    pub(crate) metrics: Metrics,
    pub(crate) node: Uuid,
}

/// The state that the parts of a scheduler share.
pub(super) struct Shared {
    pub(super) services: SchedulerServices,
    pub(super) status: watch::Sender<SchedulerStatus>,
}

impl Shared {
    pub(super) fn set(&self, state: SchedulerState) {
        self.status.send_if_modified(|status| {
            let changed = status.state != state;
            status.state = state;
            changed
        });
    }

    pub(super) fn failed(&self, error: String) {
        self.status.send_modify(|status| {
            status.last_error = Some(error.clone());
            status.state = SchedulerState::Retrying { error };
        });
    }
}
