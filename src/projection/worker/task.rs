//! Defines the parts of a projection's task.

use tokio::time::Instant;

use super::batch::Batching;
use super::context::{TaskConfig, VersionedProjection};
use super::news::News;
use super::operators::{Operators, Pause};
use super::rebuild::Rebuild;
use super::retry::Retry;
use super::snapshotting::Snapshotting;
use super::state::State;
use super::takeover::Takeover;
use super::timing::Timing;
use crate::event::Position;
use crate::projection::control::Control;
use crate::projection::{Projection, ReadModel};
use crate::store::CheckpointKey;
use crate::supervised::Inbox;

/// The task of a projection: its [`State`], and all data that outlives a state.
pub(super) struct ProjectionTask<'a, P, R> {
    pub(super) context: &'a TaskConfig,
    pub(super) instance: &'a mut VersionedProjection<P>,
    /// Key of its checkpoint, which is that of its version.
    pub(super) key: CheckpointKey,
    pub(super) read_model: &'a R,
    pub(super) preparation: Preparation,
    pub(super) inbox: Inbox<Control>,
    pub(super) news: News,
    pub(super) state: State,
    pub(super) takeover: Takeover,
    pub(super) operators: Operators,
    pub(super) rebuild: Rebuild,
    /// Set if the read model keeps snapshots.
    pub(super) snapshotting: Option<Snapshotting<'a>>,
    /// Schedule state: when pending events are applied, and whether to read on.
    pub(super) timing: Timing,
    pub(super) batching: Batching,
    /// Backoff for failures of the store and the read model, which no event caused.
    pub(super) retry: Retry,
    /// Time of the next [`tick`](Self::tick).
    pub(super) tick_at: Instant,
    /// Position at the last check for the age of the next event.
    pub(super) age_checked_at: Option<Position>,
}

/// Preparation of the read model, once in the life of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Preparation {
    Needed,
    Done,
}

impl<'a, P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'a, P, R> {
    pub(super) fn new(
        context: &'a TaskConfig,
        instance: &'a mut VersionedProjection<P>,
        read_model: &'a R,
        inbox: Inbox<Control>,
    ) -> Self {
        Self {
            context,
            key: context.layout.key(context.partition, instance.version),
            instance,
            read_model,
            preparation: Preparation::Needed,
            inbox,
            news: News::new(&context.observations, context.permit.as_ref()),
            state: State::starting(),
            takeover: Takeover::new(),
            operators: Operators::new(),
            rebuild: Rebuild::new(),
            snapshotting: Snapshotting::new(context, read_model),
            timing: Timing::default(),
            batching: Batching::new(&context.options),
            retry: Retry::new(context.options.backoff),
            tick_at: Instant::now(),
            age_checked_at: None,
        }
    }

    /// Publishes the state of the task.
    pub(super) fn show(&self) {
        self.context.set(self.state.shown(self.operators.pause == Pause::Paused));
    }
}
