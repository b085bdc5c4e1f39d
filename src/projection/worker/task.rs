//! Defines the state of a projection while its task runs.

use std::collections::VecDeque;

use tokio::time::Instant;

use super::batch::Batching;
use super::context::{TaskConfig, VersionedProjection};
use super::live::Follower;
use super::news::News;
use super::operators::Operators;
use super::page_ahead::PageAhead;
use super::rebuild::Rebuild;
use super::retry::Retry;
use super::snapshotting::Snapshotting;
use super::timing::Timing;
use crate::event::{Position, RecordedEvent};
use crate::lease::HeldLease;
use crate::projection::control::Control;
use crate::projection::{Projection, ReadModel};
use crate::store::{Checkpoint, CheckpointKey};
use crate::supervised::Inbox;

/// Maximum number of positions in a page of the store, regardless of matches.
///
/// A scan for rare events is split into pieces. Between them, the projection receives messages,
/// does due work and saves its checkpoint.
pub(super) const SCAN: u64 = 50_000;

/// Source of the next events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Store,
    Feed,
}

/// Events to be applied: all events for this projection between its position and `upto`.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) events: VecDeque<RecordedEvent>,
    pub(super) upto: Position,
}

/// An event that has failed.
#[derive(Debug)]
pub(super) struct Suspect {
    pub(super) position: Position,
    /// Number of attempts.
    pub(super) attempts: u32,
    /// Error of the last attempt.
    pub(super) error: String,
    /// Whether a retry cannot succeed.
    pub(super) permanent: bool,
    /// Whether only its name is unknown, which is no failure here.
    pub(super) unknown_event: bool,
    /// Time of the next attempt.
    pub(super) retry_at: Instant,
}

/// The state of a projection while its task runs.
pub(super) struct ProjectionTask<'a, P, R> {
    pub(super) context: &'a TaskConfig,
    pub(super) instance: &'a mut VersionedProjection<P>,
    /// Key of its checkpoint, which is that of its version.
    pub(super) key: CheckpointKey,
    pub(super) read_model: &'a R,
    pub(super) inbox: Inbox<Control>,
    /// The lease of this node as the owner of a shared read model.
    pub(super) lease: Option<HeldLease>,
    pub(super) news: News,
    pub(super) prepared: bool,
    /// Set if the read model keeps snapshots.
    pub(super) snapshotting: Option<Snapshotting<'a>>,
    /// Whether the read model has the layout and the version of this task.
    pub(super) fits: bool,
    /// Whether there is nothing to rebuild.
    pub(super) dormant: bool,
    pub(super) rebuild: Rebuild,
    pub(super) operators: Operators,
    /// Whether the projection stopped until an operator acts. In memory only: a restart clears it.
    pub(super) failed: bool,
    /// Whether to release the lease: the failure may be this node's only, so another node may
    /// succeed.
    pub(super) release_lease: bool,
    /// The checkpoint of the read model; `None` if it must be read (again).
    pub(super) saved: Option<Checkpoint>,
    /// Position up to which everything is applied.
    ///
    /// Ahead of `saved` only by events of other projections.
    pub(super) applied: Position,
    pub(super) source: Source,
    /// Maximum number of positions in the next page: above [`SCAN`] only to cross a gap in the log.
    pub(super) scan: u64,
    /// The page after the current one: the database reads ahead while the task applies.
    pub(super) ahead: Option<PageAhead>,
    /// Position up to which the store is read before the follower, which may have lost earlier
    /// events.
    pub(super) live_after: Position,
    /// The follower, subscribed before the store is read, so that no event is lost in between.
    ///
    /// `None` while nothing is read.
    pub(super) follower: Option<Follower>,
    pub(super) pending: Option<Pending>,
    /// Position of the event in the user's code, if any.
    pub(super) applying: Option<Position>,
    /// Schedule state: when pending events are applied, and whether to read on.
    pub(super) timing: Timing,
    pub(super) suspect: Option<Suspect>,
    pub(super) batching: Batching,
    /// Backoff for failures of the store and the read model, which no event caused.
    pub(super) retry: Retry,
    /// Time of the next [`tick`](Self::tick).
    pub(super) tick_at: Instant,
    /// Earliest time of the next attempt to acquire the lease, after a lost race or a loss.
    pub(super) acquire_at: Instant,
    /// Time of the next read of the owner's checkpoint, on standby.
    pub(super) read_owner_at: Instant,
    /// Position at the last check for the age of the next event.
    pub(super) age_checked_at: Option<Position>,
}

impl<'a, P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'a, P, R> {
    pub(super) fn new(
        context: &'a TaskConfig,
        instance: &'a mut VersionedProjection<P>,
        read_model: &'a R,
        inbox: Inbox<Control>,
    ) -> Self {
        let now = Instant::now();
        Self {
            context,
            key: context.layout.key(context.partition, instance.version),
            instance,
            read_model,
            inbox,
            lease: None,
            news: News::new(&context.observations, context.permit.as_ref()),
            prepared: false,
            snapshotting: Snapshotting::new(context, read_model),
            fits: false,
            dormant: false,
            rebuild: Rebuild::new(),
            operators: Operators::new(),
            failed: false,
            release_lease: false,
            saved: None,
            applied: Position::START,
            source: Source::Store,
            scan: SCAN,
            ahead: None,
            live_after: Position::START,
            follower: None,
            pending: None,
            applying: None,
            timing: Timing::default(),
            suspect: None,
            batching: Batching::new(&context.options),
            retry: Retry::new(context.options.backoff),
            tick_at: now,
            acquire_at: now,
            read_owner_at: now,
            age_checked_at: None,
        }
    }
}
