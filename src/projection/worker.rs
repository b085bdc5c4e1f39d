//! The work of one projection: whose it is, where its next events come from.

mod apply;
mod orders;

use std::collections::VecDeque;
use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use ractor::ActorCell;
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use super::control::Control;
use super::{Projection, ProjectionOptions, ProjectionState, ProjectionStatus, ReadModel};
use crate::backoff::Backoff;
use crate::bus::LogBatch;
use crate::event::{Position, RecordedEvent};
use crate::feed::{Feed, FeedFollower, FeedItem, adjacent};
use crate::lease::HeldLease;
use crate::store::{
    BoxFuture, Checkpoint, CheckpointError, EventStore, Filter, LogPage, ReadLog, StoreError,
};
use crate::supervised::{Inbox, Work};

/// How often a projection looks whether it is paused, and writes a checkpoint that only moved over what is not for it.
const TICK: Duration = Duration::from_secs(1);

/// How often at most a standby looks whether the lease is free.
const STANDBY_POLL: Duration = Duration::from_millis(500);

/// How far a page of the store reaches in positions, whatever matches: a scan for events that are rare is made of pieces,
/// between which the projection hears, sees to what is due, and saves its checkpoint.
const SCAN: u64 = 50_000;

/// What the projections of a node share.
#[derive(Clone)]
pub(crate) struct Surroundings {
    pub(crate) store: Arc<dyn EventStore>,
    pub(crate) feed: Feed,
    pub(crate) node: Uuid,
    pub(crate) supervisor: Option<ActorCell>,
}

/// What the actor supervises.
pub(super) struct ProjectionWork<P, R> {
    context: Arc<Context>,
    /// Outlives a task that panics; one task at a time has it.
    subject: Arc<Mutex<Subject<P, R>>>,
}

/// The user's part.
struct Subject<P, R> {
    projection: P,
    read_model: Arc<R>,
}

/// What does not change.
struct Context {
    name: String,
    /// What its checkpoint and its lease are called: nothing of the runtime's own has such a name.
    row: String,
    filter: Filter,
    options: ProjectionOptions,
    store: Arc<dyn EventStore>,
    feed: Feed,
    node: Uuid,
    status: watch::Sender<ProjectionStatus>,
}

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionWork<P, R> {
    pub(super) fn new(
        projection: P,
        filter: Filter,
        read_model: Arc<R>,
        options: ProjectionOptions,
        surroundings: Surroundings,
    ) -> (Self, watch::Receiver<ProjectionStatus>) {
        let (status, receiver) = watch::channel(ProjectionStatus::new());
        let name = projection.name().to_owned();
        let Surroundings { store, feed, node, .. } = surroundings;
        let context = Arc::new(Context { row: row(&name), name, filter, options, store, feed, node, status });
        (Self { context, subject: Arc::new(Mutex::new(Subject { projection, read_model })) }, receiver)
    }
}

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> Work for ProjectionWork<P, R> {
    type Control = Control;

    fn name(&self) -> String {
        format!("projection {}", self.context.name)
    }

    fn run(&self, inbox: Inbox<Control>) -> BoxFuture<'static, ()> {
        let (context, subject) = (self.context.clone(), self.subject.clone());
        Box::pin(async move {
            let mut subject = subject.lock_owned().await;
            let Subject { projection, read_model } = &mut *subject;
            Run::new(&context, projection, &**read_model, inbox).run().await;
        })
    }

    fn panicked(&self, panic: &str) {
        self.context.fail(ProjectionState::Retrying, format!("the projection's task panicked: {panic}"));
    }

    fn ended(&self) {
        self.context.set(ProjectionState::Stopped);
    }
}

impl Context {
    fn set(&self, state: ProjectionState) {
        self.status.send_if_modified(|status| {
            let news = status.state != state;
            status.state = state;
            news
        });
    }

    fn fail(&self, state: ProjectionState, error: String) {
        self.status.send_modify(|status| {
            status.state = state;
            status.last_error = Some(error);
        });
    }
}

/// What the checkpoint of a projection is called.
pub(super) fn row(projection: &str) -> String {
    format!("projection/{projection}")
}

/// Where the next events come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Store,
    Feed,
}

/// Events to be applied: everything for this projection between where it is and `upto`.
#[derive(Debug)]
struct Pending {
    events: VecDeque<RecordedEvent>,
    upto: Position,
}

/// An event that has failed.
#[derive(Debug)]
struct Suspect {
    position: Position,
    /// How often it was tried.
    attempts: u32,
    /// How it failed the last time.
    error: String,
    /// Whether trying again is of no use.
    hopeless: bool,
    /// When it is tried again.
    due: Instant,
}

/// The state of a projection while its task runs.
struct Run<'a, P, R> {
    context: &'a Context,
    projection: &'a mut P,
    read_model: &'a R,
    inbox: Inbox<Control>,
    /// On a shared read model: says that this node is its owner.
    lease: Option<HeldLease>,
    prepared: bool,
    /// As persisted, when it was last looked at; nothing is applied before that is known.
    paused: Option<bool>,
    /// Stands still until somebody acts. In memory only: a restart is such an act.
    failed: bool,
    /// The checkpoint of the read model; `None` when it has to be read (again).
    saved: Option<Checkpoint>,
    /// Everything up to here is applied. Ahead of `saved` by events that were none of this projection's business.
    applied: Position,
    source: Source,
    /// How many positions the next page of the store reaches: more than [`SCAN`] only to get across a hole in the log.
    scan: u64,
    /// Subscribed before the store is read, so that nothing falls between the two; `None` while nothing is read.
    follower: Option<FeedFollower>,
    pending: Option<Pending>,
    suspect: Option<Suspect>,
    /// For failures of the store and the read model, which no event is to blame for.
    backoff: Backoff,
    /// Nothing is tried before this, after such a failure.
    wait_until: Instant,
    /// When [`tick`](Self::tick) is due.
    tick_at: Instant,
    /// When a standby tries for the lease even if it looks taken: clocks differ.
    take_at: Instant,
}

/// What ended a wait.
enum Heard<T> {
    /// The time is over, or something happened that is dealt with at the start of the next round.
    Round,
    Control(Control),
    LeaseLost,
    Input(T),
}

/// Waits for `input`, or for something that comes before it. Cancel-safe if `input` is.
async fn hear<T>(
    inbox: &mut Inbox<Control>,
    lease: &mut Option<HeldLease>,
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
            match until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        } => Heard::Round,
        input = input => Heard::Input(input),
    }
}

impl<'a, P: Projection, R: ReadModel<Transaction = P::Transaction>> Run<'a, P, R> {
    fn new(context: &'a Context, projection: &'a mut P, read_model: &'a R, inbox: Inbox<Control>) -> Self {
        let (first, max) = context.options.backoff;
        let now = Instant::now();
        Self {
            context,
            projection,
            read_model,
            inbox,
            lease: None,
            prepared: false,
            paused: None,
            failed: false,
            saved: None,
            applied: Position::START,
            source: Source::Store,
            scan: SCAN,
            follower: None,
            pending: None,
            suspect: None,
            backoff: Backoff::new(first, max),
            wait_until: now,
            tick_at: now,
            take_at: now,
        }
    }

    async fn run(mut self) {
        while !self.inbox.is_stopping() {
            if self.tick_at <= Instant::now() {
                self.tick().await;
            }
            self.round().await;
        }
        self.flush().await;
        if let Some(lease) = self.lease.take() {
            lease.release().await;
        }
    }

    /// One step of whatever is due. Short, except for the user's own code.
    async fn round(&mut self) {
        if self.wait_until > Instant::now() {
            return self.idle(self.wait_until).await;
        }
        if self.failed {
            self.context.set(ProjectionState::Failed);
            return self.idle(self.tick_at).await;
        }
        if !self.prepared {
            match self.read_model.prepare(&self.context.store, &self.context.row).await {
                Ok(()) => self.is_prepared(),
                Err(error) => return self.outage(&error),
            }
        }
        if self.read_model.shared() && self.lease.is_none() {
            return self.stand_by().await;
        }
        let Some(saved) = self.saved else { return self.load().await };
        match self.paused {
            Some(false) => {}
            Some(true) => {
                self.context.set(ProjectionState::Paused);
                return self.idle(self.tick_at).await;
            }
            None => return self.idle(self.tick_at).await,
        }
        match self.pending.take() {
            Some(pending) => self.apply_pending(saved, pending).await,
            None if self.source == Source::Store => self.read().await,
            None => self.follow().await,
        }
    }

    fn is_prepared(&mut self) {
        self.prepared = true;
        self.context.status.send_modify(|status| status.prepared = true);
    }

    /// Waits for what may come at any time.
    async fn idle(&mut self, until: Instant) {
        let until = until.min(self.tick_at);
        let heard = hear(&mut self.inbox, &mut self.lease, Some(until), std::future::pending::<()>()).await;
        self.attend(heard).await;
    }

    /// Deals with what came before the input; the input otherwise.
    async fn attend<T>(&mut self, heard: Heard<T>) -> Option<T> {
        match heard {
            Heard::Input(input) => return Some(input),
            Heard::Round => {}
            Heard::Control(control) => self.control(control).await,
            Heard::LeaseLost => self.step_down("the lease was lost, or could not be renewed in time"),
        }
        None
    }

    /// What is due every second.
    async fn tick(&mut self) {
        self.tick_at = Instant::now() + TICK;
        match self.context.store.paused(&self.context.name).await {
            Ok(paused) if Some(paused) != self.paused => self.set_paused(paused).await,
            Ok(_) => {}
            Err(error) if self.paused.is_none() => {
                self.outage(&error);
                self.tick_at = self.wait_until;
            }
            Err(error) => {
                let what = "could not look whether the projection is paused";
                tracing::warn!(projection = self.context.name, %error, what);
                self.context
                    .status
                    .send_modify(|status| status.last_error = Some(format!("{what}: {error}")));
            }
        }
        self.flush().await;
        let head = self.context.feed.position();
        self.context.status.send_if_modified(|status| {
            let news = head > status.head;
            status.head = status.head.max(head);
            news
        });
    }

    /// Another node owns the read model, until it does not any more.
    async fn stand_by(&mut self) {
        let (context, ttl) = (self.context, self.context.options.lease);
        if self.take_at <= Instant::now() || self.looks_free().await {
            self.take_at = Instant::now() + ttl / 3;
            match HeldLease::take(&context.store, &context.row, context.node, ttl).await {
                Ok(Some(lease)) => {
                    tracing::info!(
                        projection = context.name,
                        epoch = lease.epoch(),
                        "this node owns the projection now"
                    );
                    self.lease = Some(lease);
                    self.saved = None;
                    return;
                }
                Ok(None) => {}
                Err(error) => return self.outage(&error),
            }
        }
        match self.read_model.checkpoint(&context.row).await {
            Ok(checkpoint) => self.moved_to(checkpoint.position),
            // Whatever it is: the owner may put it right, as by a reset.
            Err(error) => return self.try_later(&error),
        }
        context.set(if self.paused == Some(true) {
            ProjectionState::Paused
        } else {
            ProjectionState::Standby
        });
        self.backoff.succeeded();
        self.idle(Instant::now() + STANDBY_POLL.min(ttl / 6)).await;
    }

    /// Whether the lease was given back or has run out, as far as this node's clock can tell. Reading is cheaper than trying.
    async fn looks_free(&mut self) -> bool {
        match self.context.store.leases().await {
            Ok(leases) => leases
                .iter()
                .find(|info| info.lease.name == self.context.row)
                .is_none_or(|info| info.expires_at <= chrono::Utc::now()),
            Err(error) => {
                tracing::warn!(projection = self.context.name, %error, "could not look who owns the projection");
                false
            }
        }
    }

    /// Somebody else is or may be the owner.
    fn step_down(&mut self, reason: &str) {
        tracing::warn!(
            projection = self.context.name,
            reason,
            "this node does not own the projection any more"
        );
        self.lease = None;
        self.saved = None;
        self.restart();
        self.take_at = Instant::now() + STANDBY_POLL.min(self.context.options.lease / 6);
        self.context.status.send_modify(|status| {
            status.epoch = 0;
            status.state = ProjectionState::Standby;
            status.last_error = Some(reason.to_owned());
        });
    }

    /// Reads the checkpoint and, as a new owner, claims it: who owned it before cannot commit any more.
    async fn load(&mut self) {
        match self.claim().await {
            Ok(checkpoint) => self.begin_at(checkpoint),
            Err(error) => self.refused(&error),
        }
    }

    /// The read model is this node's, and here.
    fn begin_at(&mut self, checkpoint: Checkpoint) {
        self.saved = Some(checkpoint);
        self.applied = checkpoint.position;
        self.context.status.send_modify(|status| {
            status.epoch = if self.lease.is_some() { checkpoint.epoch } else { 0 };
            status.position = checkpoint.position;
            status.head = status.head.max(checkpoint.position);
        });
        self.restart();
    }

    async fn claim(&mut self) -> Result<Checkpoint, CheckpointError> {
        let Context { name, row, store, .. } = self.context;
        let found = self.read_model.checkpoint(row).await?;
        let head = store.frontier().await?;
        if found.position > head {
            return Err(CheckpointError::Store(StoreError::Incompatible {
                expected: format!("a log that reaches position {}, where projection {name} is", found.position),
                found: format!("one that ends at {head}"),
                advice: "the event store lost events, or was restored from a backup: restore the read model of the same time, or reset the projection".into(),
            }));
        }
        let Some(lease) = &self.lease else { return Ok(found) };
        let Some(epoch) = lease.epoch_above(found.epoch).await? else {
            let expected = Checkpoint { epoch: lease.epoch(), ..found };
            return Err(CheckpointError::Stale { name: name.clone(), expected, found });
        };
        let claimed = Checkpoint { epoch, ..found };
        if claimed != found {
            let open = self.read_model.begin(row, found).await?;
            self.read_model.commit(open, row, found, claimed, None).await?;
        }
        Ok(claimed)
    }

    /// Drops what is under way; goes on from what is applied, when it goes on.
    fn restart(&mut self) {
        self.pending = None;
        self.suspect = None;
        self.follower = None;
        self.source = Source::Store;
    }

    /// Reads the next page from the store.
    async fn read(&mut self) {
        let Context { store, filter, options, feed, .. } = self.context;
        self.follower.get_or_insert_with(|| feed.follow());
        let upto = Position::new(self.applied.get().saturating_add(self.scan));
        let read = ReadLog::after(self.applied).upto(upto).filter(filter.clone()).limit(options.batch);
        // No time limit but the store's own: a page that takes longer than a tick would never be read.
        let heard = hear(&mut self.inbox, &mut self.lease, None, store.read_log(read)).await;
        match self.attend(heard).await {
            Some(Ok(page)) => {
                let hole = page.scanned_to == self.applied && page.has_more();
                self.scan = if hole { self.scan.saturating_mul(2) } else { SCAN };
                if page.events.is_empty() {
                    // Otherwise only when they are committed: a database that can be read may still refuse that.
                    self.backoff.succeeded();
                }
                self.source = if page.has_more() { Source::Store } else { Source::Feed };
                self.context.set(match self.source {
                    Source::Store => ProjectionState::CatchingUp,
                    Source::Feed => ProjectionState::Following,
                });
                let LogPage { events, scanned_to, head } = page;
                self.knows_of(head);
                self.enqueue(events.into(), scanned_to);
            }
            Some(Err(error)) => self.outage(&error),
            None => {}
        }
    }

    /// Takes what the feed has.
    async fn follow(&mut self) {
        let Some(follower) = &mut self.follower else { return self.restart() };
        self.context.set(ProjectionState::Following);
        let heard = hear(&mut self.inbox, &mut self.lease, Some(self.tick_at), follower.next()).await;
        let Some(mut item) = self.attend(heard).await else { return };
        let (mut events, mut upto) = (VecDeque::new(), self.applied);
        loop {
            match item {
                FeedItem::Batch(batch) => {
                    self.knows_of(batch.upto);
                    match adjacent(batch, upto) {
                        Some(LogBatch { upto: end, events: batch, .. }) => {
                            let wanted = batch.iter().filter(|event| self.context.filter.matches(event));
                            events.extend(wanted.cloned());
                            upto = end;
                        }
                        None => self.source = Source::Store,
                    }
                }
                FeedItem::Lagged => {
                    tracing::debug!(
                        projection = self.context.name,
                        "fell behind the feed and reads the store"
                    );
                    self.source = Source::Store;
                }
                FeedItem::Closed => {
                    // Only at the end of the runtime, which ends this as well.
                    let error = StoreError::Unavailable { reason: "the feed has ended".into(), source: None };
                    self.source = Source::Store;
                    self.outage(&error);
                }
            }
            // What has gathered meanwhile shares the transaction.
            if self.source == Source::Store || events.len() >= self.context.options.batch {
                break;
            }
            match self.follower.as_mut().and_then(FeedFollower::try_next) {
                Some(next) => item = next,
                None => break,
            }
        }
        self.enqueue(events, upto);
    }

    fn enqueue(&mut self, events: VecDeque<RecordedEvent>, upto: Position) {
        if !events.is_empty() {
            self.pending = Some(Pending { events, upto });
        } else if upto > self.applied {
            // Nothing to write but the checkpoint, and that can wait for the next tick.
            self.applied = upto;
            self.moved_to(upto);
        }
    }

    fn stand_still(&mut self) {
        self.failed = true;
        self.restart();
        self.context.set(ProjectionState::Failed);
    }

    async fn roll_back(&mut self, open: R::Open) {
        // It happens anyway when the connection goes; only later.
        if let Err(error) = self.read_model.rollback(open).await {
            tracing::warn!(projection = self.context.name, %error, "a transaction could not be rolled back at once");
        }
    }

    /// The checkpoint could not be moved.
    fn refused(&mut self, error: &CheckpointError) {
        match error {
            CheckpointError::Stale { .. } => self.step_down(&error.to_string()),
            CheckpointError::Store(error) => {
                // Whether it was moved is found out by reading it.
                self.saved = None;
                self.restart();
                self.outage(error);
            }
        }
    }

    /// The store or the read model failed: tried again later, unless that cannot help.
    fn outage(&mut self, error: &(dyn Error + 'static)) {
        let lasting = matches!(
            error.downcast_ref(),
            Some(StoreError::Incompatible { .. } | StoreError::Invalid { .. } | StoreError::Corrupt { .. })
        );
        if !lasting {
            return self.try_later(error);
        }
        tracing::error!(projection = self.context.name, %error, "the projection stands still");
        self.context.fail(ProjectionState::Failed, error.to_string());
        self.saved = None;
        self.stand_still();
    }

    fn try_later(&mut self, error: &(dyn Error + 'static)) {
        let wait = self.backoff.next();
        self.wait_until = Instant::now() + wait;
        let projection = &self.context.name;
        tracing::warn!(projection, %error, ?wait, "the store or the read model failed and is tried again");
        self.context.fail(ProjectionState::Retrying, error.to_string());
    }

    fn moved_to(&self, position: Position) {
        self.context.status.send_if_modified(|status| {
            let news = status.position != position;
            status.position = position;
            status.head = status.head.max(position);
            news
        });
    }

    fn knows_of(&self, head: Position) {
        self.context.status.send_if_modified(|status| {
            let news = head > status.head;
            status.head = status.head.max(head);
            news
        });
    }

    /// Writes a checkpoint that has moved over nothing but events of others.
    async fn flush(&mut self) {
        let Some(saved) = self.saved.filter(|saved| saved.position < self.applied) else { return };
        let to = Checkpoint { position: self.applied, ..saved };
        let row = &self.context.row;
        let flushed = match self.read_model.begin(row, saved).await {
            Ok(open) => self.read_model.commit(open, row, saved, to, None).await,
            Err(error) => Err(error.into()),
        };
        match flushed {
            Ok(()) => self.saved = Some(to),
            Err(error) => self.refused(&error),
        }
    }
}
