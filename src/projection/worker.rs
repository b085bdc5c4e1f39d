//! The task of one projection: ownership of the read model, and the source of its events.

mod apply;
mod batch;
mod catch_up;
mod context;
mod control;
mod cutover;
mod failure;
mod floor;
mod live;
mod log_source;
mod memory;
mod operator_requests;
mod ownership;
mod page_cache;
mod schedule;
mod snapshot;
mod version;

use std::collections::VecDeque;
use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::Instrument;

use self::batch::{BatchSize, PageSize};
use self::catch_up::PageAhead;
pub(crate) use self::context::NodeServices;
use self::context::TaskConfig;
pub(super) use self::context::{ProjectionWork, Role, TaskSpec, VersionedProjection};
use self::cutover::{RebuildProgress, SWITCH_AGAIN, Switch};
use self::live::Follower;
use self::ownership::News;
pub(super) use self::page_cache::PageCache;
use self::schedule::Timing;
use self::snapshot::Snapshotting;
use super::control::Control;
use super::{Projection, ProjectionState, ReadModel};
use crate::backoff::Backoff;
use crate::event::{Position, RecordedEvent};
use crate::lease::HeldLease;
use crate::partition::Partition;
use crate::store::{Checkpoint, StoreError};
use crate::supervised::Inbox;
use crate::telemetry::trace;

/// Interval of saving a checkpoint that moved only over events of other projections.
const TICK: Duration = Duration::from_secs(1);

/// The same interval for a partition.
///
/// Shorter, because another node may wait for all partitions, most of which the events do not
/// concern.
const PARTITION_TICK: Duration = Duration::from_millis(200);

/// Minimum of that interval for each partition of a projection.
///
/// The partitions of a node share one database.
const PARTITION_SHARE: Duration = Duration::from_millis(4);

/// Poll interval of the head of the log until it is known.
const HEAD_TICK: Duration = Duration::from_millis(50);

/// Pause before the retry of an operator request; the projection continues meanwhile.
const REQUESTS_AGAIN: Duration = Duration::from_secs(30);

/// Time limit at the shutdown for the current transaction or operator request.
const STOPPING: Duration = Duration::from_secs(5);

/// Maximum number of positions in a page of the store, regardless of matches.
///
/// A scan for rare events is split into pieces. Between them, the projection receives messages,
/// does due work and saves its checkpoint.
const SCAN: u64 = 50_000;

/// Source of the next events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Store,
    Feed,
}

/// Events to be applied: all events for this projection between its position and `upto`.
#[derive(Debug)]
struct Pending {
    events: VecDeque<RecordedEvent>,
    upto: Position,
}

/// An event that has failed.
#[derive(Debug)]
struct Suspect {
    position: Position,
    /// Number of attempts.
    attempts: u32,
    /// Error of the last attempt.
    error: String,
    /// Whether a retry cannot succeed.
    permanent: bool,
    /// Whether only its name is unknown, which is no failure here.
    unknown_event: bool,
    /// Time of the next attempt.
    retry_at: Instant,
}

/// The state of a projection while its task runs.
struct ProjectionTask<'a, P, R> {
    context: &'a TaskConfig,
    instance: &'a mut VersionedProjection<P>,
    /// Name of its checkpoint, which is that of its version.
    row: String,
    read_model: &'a R,
    inbox: Inbox<Control>,
    /// The lease of this node as the owner of a shared read model.
    lease: Option<HeldLease>,
    news: News,
    prepared: bool,
    /// Set if the read model keeps snapshots.
    snapshotting: Option<Snapshotting<'a>>,
    /// Whether the read model has the layout and the version of this task.
    fits: bool,
    /// Whether there is nothing to rebuild.
    dormant: bool,
    /// Set during a cut-over.
    switch: Option<Switch>,
    /// Backoff after a failed cut-over.
    switch_again: Backoff,
    /// Progress of the parts of the rebuild.
    rebuild_progress: Vec<RebuildProgress>,
    /// The persisted pause at the last check; nothing is applied before it is known.
    paused: Option<bool>,
    /// Time of the last pause or resume call: earlier lease views are older than that.
    paused_at: Option<Instant>,
    /// Whether a node changes shared state of the projection; nothing is applied meanwhile.
    change_in_progress: bool,
    /// Epoch of the last processed change of that kind; `None` before the first check.
    seen_epoch: Option<u64>,
    /// Whether there may be operator requests for a reset or a rebuild.
    requests_due: bool,
    /// Whether there may be operator requests to retry parked events.
    retries_due: bool,
    /// Earliest time of the next attempt at resets and rebuilds.
    requests_at: Instant,
    /// Earliest time of the next attempt at retries of parked events.
    retries_at: Instant,
    /// Epochs of this task's own changes that it has not processed yet.
    own_epochs: Vec<u64>,
    /// Whether the projection stopped until an operator acts. In memory only: a restart clears it.
    failed: bool,
    /// Whether to release the lease: the failure may be this node's only, so another node may
    /// succeed.
    release_lease: bool,
    /// The checkpoint of the read model; `None` if it must be read (again).
    saved: Option<Checkpoint>,
    /// Position up to which everything is applied.
    ///
    /// Ahead of `saved` only by events of other projections.
    applied: Position,
    source: Source,
    /// Maximum number of positions in the next page: above [`SCAN`] only to cross a gap in the log.
    scan: u64,
    /// The page after the current one: the database reads ahead while the task applies.
    ahead: Option<PageAhead>,
    /// Position up to which the store is read before the follower, which may have lost earlier
    /// events.
    live_after: Position,
    /// The follower, subscribed before the store is read, so that no event is lost in between.
    ///
    /// `None` while nothing is read.
    follower: Option<Follower>,
    pending: Option<Pending>,
    /// Position of the event in the user's code, if any.
    applying: Option<Position>,
    /// Schedule state: when pending events are applied, and whether to read on.
    timing: Timing,
    suspect: Option<Suspect>,
    /// Number of transactions in a row that became unusable while one without events succeeded.
    unusable: u32,
    /// Number of events in a page of the store.
    page: PageSize,
    /// Number of events in a transaction.
    size: BatchSize,
    /// Backoff for failures of the store and the read model, which no event caused.
    backoff: Backoff,
    /// Earliest time of the next attempt after such a failure.
    wait_until: Instant,
    /// Time of the next [`tick`](Self::tick).
    tick_at: Instant,
    /// Earliest time of the next attempt to acquire the lease, after a lost race or a loss.
    acquire_at: Instant,
    /// Time of the next read of the owner's checkpoint, on standby.
    read_owner_at: Instant,
    /// Position at the last check for the age of the next event.
    age_checked_at: Option<Position>,
}

const LOST: &str = "the lease was lost, or was not renewed in time";

/// Waits for the loss; never returns if there is no lease. Cancel-safe.
async fn lost(loss: Option<impl Future<Output = ()>>) {
    match loss {
        Some(loss) => loss.await,
        None => std::future::pending().await,
    }
}

/// Result of a wait.
enum Heard<T> {
    /// The time is over, or an event occurred that the next round handles.
    Round,
    Control(Control),
    LeaseLost,
    News,
    Input(T),
}

/// Waits for `input`, or for an earlier message, loss or timeout. Cancel-safe if `input` is.
async fn hear<T>(
    inbox: &mut Inbox<Control>,
    lease: &mut Option<HeldLease>,
    news: Option<&mut News>,
    until: Option<Instant>,
    input: impl Future<Output = T>,
) -> Heard<T> {
    tokio::select! {
        biased;
        control = inbox.next() => control.map_or(Heard::Round, Heard::Control),
        () = async {
            match lease {
                Some(lease) => lease.lost().await,
                None => std::future::pending().await,
            }
        } => Heard::LeaseLost,
        () = async {
            match news {
                Some(news) => news.changed().await,
                None => std::future::pending().await,
            }
        } => Heard::News,
        () = async {
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        } => Heard::Round,
        input = input => Heard::Input(input),
    }
}

impl<'a, P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionTask<'a, P, R> {
    fn new(
        context: &'a TaskConfig,
        instance: &'a mut VersionedProjection<P>,
        read_model: &'a R,
        inbox: Inbox<Control>,
    ) -> Self {
        let (first, max) = context.options.backoff;
        let now = Instant::now();
        Self {
            context,
            row: context.layout.row(context.partition, instance.version),
            instance,
            read_model,
            inbox,
            lease: None,
            news: News::new(&context.observations, context.permit.as_ref()),
            prepared: false,
            snapshotting: Snapshotting::new(context, read_model),
            fits: false,
            dormant: false,
            switch: None,
            switch_again: Backoff::new(SWITCH_AGAIN.0, SWITCH_AGAIN.1),
            rebuild_progress: Vec::new(),
            paused: None,
            paused_at: None,
            change_in_progress: false,
            seen_epoch: None,
            requests_due: true,
            retries_due: true,
            requests_at: now,
            retries_at: now,
            own_epochs: Vec::new(),
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
            unusable: 0,
            page: PageSize::new(&context.options),
            size: BatchSize::new(&context.options),
            backoff: Backoff::new(first, max),
            wait_until: now,
            tick_at: now,
            acquire_at: now,
            read_owner_at: now,
            age_checked_at: None,
        }
    }

    async fn run(mut self) {
        let stopping = self.inbox.stop_signal();
        let in_order = tokio::select! {
            biased;
            () = self.work() => true,
            () = async {
                stopping.await;
                sleep(STOPPING).await;
            } => false,
        };
        if in_order {
            // As for any transaction: a hung read model must not delay the shutdown of its node.
            let flushed = timeout(STOPPING, self.flush()).await;
            if flushed.is_err() {
                tracing::warn!(projection = self.context.name, "could not write the last checkpoint in time");
            }
            self.last_snapshot().await;
        } else {
            tracing::warn!(
                projection = self.context.name, limit = ?STOPPING,
                "aborted the work in progress at the shutdown: time limit exceeded; it is repeated after the next start"
            );
        }
        self.give_up_switching().await;
        self.follower = None;
        if let Some(lease) = self.lease.take() {
            lease.release().await;
        }
    }

    /// Works until the task must end.
    async fn work(&mut self) {
        while !self.inbox.is_stopping() {
            if self.news.has_changed() {
                self.look().await;
            }
            if self.tick_at <= Instant::now() {
                self.tick().await;
            }
            self.step().await;
        }
    }

    /// Does the next due step. Short, except for the user's own code.
    async fn step(&mut self) {
        if self.wait_until > Instant::now() {
            return self.idle(self.wait_until).await;
        }
        if std::mem::take(&mut self.release_lease)
            && let Some(lease) = self.lease.take()
        {
            lease.release().await;
        }
        if self.change_in_progress && self.context.role == Role::Live {
            return self.idle(self.tick_at).await;
        }
        // Before the check whether the read model fits, and also if it does not: a reset may make
        // it fit.
        if self.requests_due
            && self.requests_at <= Instant::now()
            && let Err(error) = self.see_to_requests().await
        {
            self.requests_at = self.put_off(&error);
        }
        if self.failed {
            self.context.set(ProjectionState::Failed);
            return self.idle(self.tick_at).await;
        }
        if let Err(error) = self.prepare().await {
            return self.on_unavailable(&error);
        }
        if self.dormant {
            return self.sleep().await;
        }
        if self.read_model.shared() && self.lease.is_none() {
            return self.stand_by().await;
        }
        let Some(saved) = self.saved else { return self.load().await };
        if self.retries_due
            && self.retries_at <= Instant::now()
            && let Err(error) = self.see_to_retries().await
        {
            self.retries_at = self.put_off(&error);
        }
        match self.paused {
            Some(false) => {}
            Some(true) => {
                self.context.set(ProjectionState::Paused);
                return self.idle(self.tick_at).await;
            }
            None => return self.idle(self.tick_at).await,
        }
        match self.is_due().await {
            Ok(true) => {}
            Ok(false) => return self.rest().await,
            Err(error) => return self.on_unavailable(&error),
        }
        if self.holds() {
            return self.follow().await;
        }
        // Not below: if the lease is lost there, the work in progress is dropped, which must not be
        // a control call.
        if let Some(due) = self.left_alone() {
            return self.idle(due).await;
        }
        match self.pending.take() {
            Some(pending) => {
                let events = pending.events.iter().take(self.size.get());
                let span = trace::apply(&self.context.name, events.len(), events);
                // If the database hangs longer than the other nodes wait for this one, abort.
                let loss = self.lease.as_ref().map(HeldLease::loss);
                let limit = self.context.options.transaction_timeout;
                tokio::select! {
                    biased;
                    done = timeout(limit, self.apply_pending(saved, pending).instrument(span)) => {
                        if done.is_err() {
                            self.overran(limit);
                        }
                    }
                    () = lost(loss) => self.step_down(LOST),
                }
            }
            None if self.source == Source::Store => self.read().await,
            None => self.follow().await,
        }
    }

    /// Ensures that the read model exists and has the right layout.
    async fn prepare(&mut self) -> Result<(), StoreError> {
        self.create().await?;
        if !self.fits && self.read_model.shared() {
            self.context.layout.check(self.read_model).await?;
            self.find_version().await?;
        }
        if !self.fits {
            self.fits = true;
            self.context.status.send_modify(|status| status.fits = true);
        }
        Ok(())
    }

    async fn create(&mut self) -> Result<(), StoreError> {
        if !self.prepared {
            self.read_model.prepare(&self.context.store, &self.row).await?;
            self.empty_memory().await?;
            self.load_snapshot().await?;
            self.prepared = true;
            self.context.status.send_modify(|status| status.prepared = true);
        }
        Ok(())
    }

    /// Waits for control messages, a loss of the lease and news, until a deadline.
    async fn idle(&mut self, until: Instant) {
        let until = until.min(self.tick_at);
        let heard = hear(
            &mut self.inbox,
            &mut self.lease,
            Some(&mut self.news),
            Some(until),
            std::future::pending::<()>(),
        )
        .await;
        self.attend(heard).await;
    }

    /// Handles any result other than the input; returns the input.
    async fn attend<T>(&mut self, heard: Heard<T>) -> Option<T> {
        match heard {
            Heard::Input(input) => return Some(input),
            Heard::Round => {}
            Heard::News => self.look().await,
            Heard::Control(control) => self.control(control).await,
            Heard::LeaseLost => self.step_down(LOST),
        }
        None
    }

    /// Does the periodic work.
    async fn tick(&mut self) {
        let others_wait = self.context.partition.is_some() || self.context.role == Role::Rebuild;
        let every = match self.context.status.borrow().head {
            // The lag is unknown until then, although there may be nothing to read.
            None => HEAD_TICK,
            Some(_) if others_wait => {
                let partitions = self.context.partition.map_or(1, Partition::count);
                (PARTITION_SHARE * u32::from(partitions)).clamp(PARTITION_TICK, TICK)
            }
            Some(_) => TICK,
        };
        self.tick_at = Instant::now() + every;
        // The task may have ignored the lease view as too old after its last control call.
        self.look().await;
        let loss = self.lease.as_ref().map(HeldLease::loss);
        tokio::select! {
            biased;
            () = async {
                self.flush().await;
                if let Some(head) = self.context.feed.status().position {
                    self.knows_of(head);
                }
                if self.lease.is_some() || !self.read_model.shared() {
                    self.date().await;
                }
            } => {}
            () = lost(loss) => return self.step_down(LOST),
        }
        let quiet = self.source == Source::Feed && self.pending.is_none();
        let durable = self.follower.as_ref().is_some_and(Follower::is_durable);
        if durable && quiet && self.context.feed.position() > self.applied {
            // The selected events of the bus do not show the end of the log.
            self.source = Source::Store;
        }
        if self.context.role == Role::Rebuild {
            self.consider_switching().await;
        }
    }

    fn moved_to(&self, position: Position) {
        self.context.status.send_if_modified(|status| {
            let news = status.position != position;
            status.moved_to(position, None);
            news
        });
    }

    fn knows_of(&self, head: Position) {
        self.context.status.send_if_modified(|status| {
            let news = Some(head) > status.head;
            status.knows_of(head);
            news
        });
    }

    /// Records the age of the first pending event, which is the oldest unapplied one.
    fn waits_since(&self, pending: &Pending) {
        let Some(first) = pending.events.front() else { return };
        self.context.status.send_if_modified(|status| {
            status.knows_of(first.position);
            status.behind_since = Some(first.recorded_at);
            false
        });
    }

    /// Reads the age of the next event, if it stays unread for a while.
    async fn date(&mut self) {
        let (position, behind) = {
            let status = self.context.status.borrow();
            (status.position, status.lag().is_some_and(|lag| lag > 0))
        };
        if !behind || self.pending.is_some() || self.age_checked_at == Some(position) || self.dormant {
            return;
        }
        match self.context.log.next_recorded_at(position).await {
            Ok(Some(recorded_at)) => {
                self.age_checked_at = Some(position);
                self.context.status.send_if_modified(|status| {
                    status.moved_to(position, Some(recorded_at));
                    false
                });
            }
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(projection = self.context.name, %error, "could not read the age of the next event");
            }
        }
    }

    /// Writes a checkpoint that has moved only over events of other projections.
    async fn flush(&mut self) {
        let Some(saved) = self.saved.filter(|saved| saved.position < self.applied) else { return };
        let to = Checkpoint { position: self.applied, ..saved };
        let row = &self.row;
        let flushed = match self.read_model.begin(row, saved).await {
            Ok(open) => self.read_model.commit(open, row, saved, to, None).await,
            Err(error) => Err(error.into()),
        };
        match flushed {
            Ok(()) => self.saved = Some(to),
            Err(error) => self.on_checkpoint_error(&error),
        }
    }
}
