//! The work of one projection: whose it is, where its next events come from.

mod apply;
mod input;
mod orders;
mod ownership;
mod schedule;
mod version;

use std::collections::VecDeque;
use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use ractor::ActorCell;
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use self::input::Follower;
use self::ownership::News;
use self::schedule::Timing;
use self::version::Switch;
use super::control::Control;
use super::shape::Shape;
use super::{FollowMode, Projection, ProjectionOptions, ProjectionState, ProjectionStatus, ReadModel};
use crate::backoff::Backoff;
use crate::bus::{EventBus, Follow, LogBatch};
use crate::event::{Position, RecordedEvent};
use crate::feed::{Feed, FeedItem, adjacent};
use crate::lease::{Board, HeldLease, Sight};
use crate::partition::Partition;
use crate::store::{
    BoxFuture, Checkpoint, CheckpointError, EventStore, Filter, LogPage, ReadLog, StoreError,
};
use crate::supervised::{Inbox, Work};

/// How often a projection writes a checkpoint that only moved over what is not for it.
const TICK: Duration = Duration::from_secs(1);

/// How often a partition does: on other nodes somebody may wait for all partitions, most of which have nothing to do with what
/// happened.
const PARTITION_TICK: Duration = Duration::from_millis(200);

/// How far a page of the store reaches in positions, whatever matches: a scan for events that are rare is made of pieces,
/// between which the projection hears, sees to what is due, and saves its checkpoint.
const SCAN: u64 = 50_000;

/// What the projections of a node share.
#[derive(Clone)]
pub(crate) struct Surroundings {
    pub(crate) store: Arc<dyn EventStore>,
    pub(crate) feed: Feed,
    pub(crate) node: Uuid,
    pub(crate) bus: Arc<dyn EventBus>,
    pub(crate) board: Board,
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
    instance: Instance<P>,
    read_model: Arc<R>,
}

/// A projection that writes to one version of its read model.
pub(super) struct Instance<P> {
    projection: P,
    /// Which version.
    version: u64,
    /// Makes one that writes to another version, if it is [rebuildable](crate::runtime::Builder::rebuildable).
    make: Option<Box<dyn Fn(u64) -> P + Send + Sync>>,
}

impl<P> Instance<P> {
    pub(super) fn fixed(projection: P) -> Self {
        Self { projection, version: 0, make: None }
    }

    pub(super) fn made(make: impl Fn(u64) -> P + Send + Sync + 'static) -> Self {
        Self { projection: make(0), version: 0, make: Some(Box::new(make)) }
    }
}

/// What a task does for its projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Keeps the version that readers see up to date.
    Live,
    /// Builds the next one beside it, when somebody wants that.
    Rebuild,
}

/// What does not change.
struct Context {
    name: String,
    shape: Shape,
    /// Which part of it this is; `None` is all.
    partition: Option<Partition>,
    role: Role,
    /// The lease of who owns it.
    lease: String,
    filter: Filter,
    options: ProjectionOptions,
    store: Arc<dyn EventStore>,
    feed: Feed,
    node: Uuid,
    bus: Arc<dyn EventBus>,
    board: Board,
    /// What the board shows.
    sight: watch::Receiver<Sight>,
    /// Whether this node is to own the partition.
    permit: Option<watch::Receiver<bool>>,
    status: watch::Sender<ProjectionStatus>,
}

/// What of a projection is to be worked on.
pub(super) struct Part {
    pub(super) shape: Shape,
    pub(super) role: Role,
    /// A partition, and whether this node is to own it; `None` is all, which every node would own.
    pub(super) partition: Option<(Partition, watch::Receiver<bool>)>,
}

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> ProjectionWork<P, R> {
    pub(super) fn new(
        instance: Instance<P>,
        filter: Filter,
        read_model: Arc<R>,
        options: ProjectionOptions,
        part: Part,
        surroundings: Surroundings,
    ) -> (Self, watch::Receiver<ProjectionStatus>) {
        let (status, receiver) = watch::channel(ProjectionStatus::new());
        let Surroundings { store, feed, node, bus, board, .. } = surroundings;
        let (partition, permit) = part.partition.unzip();
        let context = Arc::new(Context {
            name: instance.projection.name().to_owned(),
            lease: part.shape.lease(partition, part.role),
            role: part.role,
            shape: part.shape,
            partition,
            filter,
            sight: board.watch(options.lease),
            options,
            store,
            feed,
            node,
            bus,
            board,
            permit,
            status,
        });
        (Self { context, subject: Arc::new(Mutex::new(Subject { instance, read_model })) }, receiver)
    }
}

impl<P: Projection, R: ReadModel<Transaction = P::Transaction>> Work for ProjectionWork<P, R> {
    type Control = Control;

    fn name(&self) -> String {
        let name = match self.context.partition {
            None => format!("projection {}", self.context.name),
            Some(partition) => format!("partition {partition} of projection {}", self.context.name),
        };
        match self.context.role {
            Role::Live => name,
            Role::Rebuild => format!("{name}, rebuilt"),
        }
    }

    fn run(&self, inbox: Inbox<Control>) -> BoxFuture<'static, ()> {
        let (context, subject) = (self.context.clone(), self.subject.clone());
        Box::pin(async move {
            let mut subject = subject.lock_owned().await;
            let Subject { instance, read_model } = &mut *subject;
            Run::new(&context, instance, &**read_model, inbox).run().await;
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
    /// Whether the event is for this projection, and this part of it.
    fn wants(&self, event: &RecordedEvent) -> bool {
        self.filter.matches(event) && self.is_here(event)
    }

    fn is_here(&self, event: &RecordedEvent) -> bool {
        self.partition.is_none_or(|partition| partition.contains(&event.stream))
    }

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
    instance: &'a mut Instance<P>,
    /// What its checkpoint is called, which is that of its version.
    row: String,
    read_model: &'a R,
    inbox: Inbox<Control>,
    /// On a shared read model: says that this node is its owner.
    lease: Option<HeldLease>,
    news: News,
    prepared: bool,
    /// Whether the read model was found to be in the shape, and the version, that this works on.
    fits: bool,
    /// Nobody wants what this would do: there is nothing to rebuild.
    dormant: bool,
    /// While what was rebuilt takes the place of what is live.
    switch: Option<Switch>,
    /// As persisted, when it was last looked at; nothing is applied before that is known.
    paused: Option<bool>,
    /// When this was last told to pause or to resume: what the board saw before is older than that.
    paused_at: Option<Instant>,
    /// Somebody changes something for all who work on this projection; nothing is applied meanwhile.
    held_up: bool,
    /// The last such change that was heeded; `None` before the first look.
    heeded: Option<u64>,
    /// Stands still until somebody acts. In memory only: a restart is such an act.
    failed: bool,
    /// What failed is this node, as far as is known: another one may do better, so the lease is given back.
    surrender: bool,
    /// The checkpoint of the read model; `None` when it has to be read (again).
    saved: Option<Checkpoint>,
    /// Everything up to here is applied. Ahead of `saved` by events that were none of this projection's business.
    applied: Position,
    source: Source,
    /// How many positions the next page of the store reaches: more than [`SCAN`] only to get across a hole in the log.
    scan: u64,
    /// Subscribed before the store is read, so that nothing falls between the two; `None` while nothing is read.
    follower: Option<Follower>,
    pending: Option<Pending>,
    /// When what is pending is applied, and whether to read on.
    timing: Timing,
    suspect: Option<Suspect>,
    /// For failures of the store and the read model, which no event is to blame for.
    backoff: Backoff,
    /// Nothing is tried before this, after such a failure.
    wait_until: Instant,
    /// When [`tick`](Self::tick) is due.
    tick_at: Instant,
    /// Not before this the lease is tried for: somebody else was quicker, or it was just lost.
    take_at: Instant,
    /// When a standby looks how far the owner is.
    look_at: Instant,
}

/// What ended a wait.
enum Heard<T> {
    /// The time is over, or something happened that is dealt with at the start of the next round.
    Round,
    Control(Control),
    LeaseLost,
    News,
    Input(T),
}

/// Waits for `input`, or for something that comes before it. Cancel-safe if `input` is.
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

impl<'a, P: Projection, R: ReadModel<Transaction = P::Transaction>> Run<'a, P, R> {
    fn new(
        context: &'a Context,
        instance: &'a mut Instance<P>,
        read_model: &'a R,
        inbox: Inbox<Control>,
    ) -> Self {
        let (first, max) = context.options.backoff;
        let now = Instant::now();
        Self {
            context,
            row: context.shape.row(context.partition, instance.version),
            instance,
            read_model,
            inbox,
            lease: None,
            news: News::new(&context.sight, context.permit.as_ref()),
            prepared: false,
            fits: false,
            dormant: false,
            switch: None,
            paused: None,
            paused_at: None,
            held_up: false,
            heeded: None,
            failed: false,
            surrender: false,
            saved: None,
            applied: Position::START,
            source: Source::Store,
            scan: SCAN,
            follower: None,
            pending: None,
            timing: Timing::default(),
            suspect: None,
            backoff: Backoff::new(first, max),
            wait_until: now,
            tick_at: now,
            take_at: now,
            look_at: now,
        }
    }

    async fn run(mut self) {
        while !self.inbox.is_stopping() {
            if self.news.has_changed() {
                self.look().await;
            }
            if self.tick_at <= Instant::now() {
                self.tick().await;
            }
            self.round().await;
        }
        self.flush().await;
        self.give_up_switching().await;
        if let Some(lease) = self.lease.take() {
            lease.release().await;
        }
    }

    /// One step of whatever is due. Short, except for the user's own code.
    async fn round(&mut self) {
        if self.wait_until > Instant::now() {
            return self.idle(self.wait_until).await;
        }
        if std::mem::take(&mut self.surrender)
            && let Some(lease) = self.lease.take()
        {
            lease.release().await;
        }
        if self.failed {
            self.context.set(ProjectionState::Failed);
            return self.idle(self.tick_at).await;
        }
        if self.held_up && self.context.role == Role::Live {
            return self.idle(self.tick_at).await;
        }
        if let Err(error) = self.prepare().await {
            return self.outage(&error);
        }
        if self.dormant {
            return self.sleep().await;
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
        match self.is_due().await {
            Ok(true) => {}
            Ok(false) => return self.rest().await,
            Err(error) => return self.outage(&error),
        }
        if self.holds() {
            return self.follow().await;
        }
        match self.pending.take() {
            Some(pending) => self.apply_pending(saved, pending).await,
            None if self.source == Source::Store => self.read().await,
            None => self.follow().await,
        }
    }

    /// Makes sure that the read model is there, and in the right shape.
    async fn prepare(&mut self) -> Result<(), StoreError> {
        self.create().await?;
        if !self.fits && self.read_model.shared() {
            self.context.shape.check(self.read_model).await?;
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
            self.prepared = true;
            self.context.status.send_modify(|status| status.prepared = true);
        }
        Ok(())
    }

    /// Waits for what may come at any time.
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

    /// Deals with what came before the input; the input otherwise.
    async fn attend<T>(&mut self, heard: Heard<T>) -> Option<T> {
        match heard {
            Heard::Input(input) => return Some(input),
            Heard::Round => {}
            Heard::News => self.look().await,
            Heard::Control(control) => self.control(control).await,
            Heard::LeaseLost => self.step_down("the lease was lost, or could not be renewed in time"),
        }
        None
    }

    /// What is due now and then.
    async fn tick(&mut self) {
        let others_wait = self.context.partition.is_some() || self.context.role == Role::Rebuild;
        self.tick_at = Instant::now() + if others_wait { PARTITION_TICK } else { TICK };
        // What the board showed when this was last told something may have been passed over as too old.
        self.look().await;
        self.flush().await;
        self.knows_of(self.context.feed.position());
        let quiet = self.source == Source::Feed && self.pending.is_none();
        let durable = self.follower.as_ref().is_some_and(Follower::is_durable);
        if durable && quiet && self.context.feed.position() > self.applied {
            // What the bus has picked out does not say how far the rest goes.
            self.source = Source::Store;
        }
        if self.context.role == Role::Rebuild {
            self.consider_switching().await;
        }
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
        let Context { store, filter, options, .. } = self.context;
        if self.follower.is_none() {
            match self.listen() {
                Ok(follower) => self.follower = Some(follower),
                Err(error) => return self.outage(&error),
            }
        }
        let upto = Position::new(self.applied.get().saturating_add(self.scan));
        // Of what a partition reads, only its part makes a transaction.
        let parts = self.context.partition.map_or(1, |partition| usize::from(partition.count()).min(8));
        let limit = options.batch.saturating_mul(parts);
        let read = ReadLog::after(self.applied).upto(upto).filter(filter.clone()).limit(limit);
        // No time limit but the store's own: a page that takes longer than a tick would never be read.
        let heard = hear(&mut self.inbox, &mut self.lease, None, None, store.read_log(read)).await;
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
                let LogPage { mut events, scanned_to, head } = page;
                events.retain(|event| self.context.is_here(event));
                self.knows_of(head);
                self.enqueue(events.into(), scanned_to);
            }
            Some(Err(error)) => self.outage(&error),
            None => {}
        }
    }

    /// From now on.
    fn listen(&self) -> Result<Follower, StoreError> {
        let Context { feed, bus, store, filter, options, role, .. } = self.context;
        let own = *role == Role::Live && self.read_model.shared();
        if options.follow == FollowMode::Feed || !own {
            return Ok(Follower::Feed(feed.follow()));
        }
        let followed = bus.follow(Follow {
            name: self.row.clone(),
            store: store.info().id,
            names: filter.wanted_names().map(|names| names.iter().cloned().collect()),
            categories: filter.wanted_categories().map(|categories| categories.iter().cloned().collect()),
        });
        // The runtime has looked whether this bus can; so it is one that was taken down.
        followed.map(Follower::Durable).map_err(|error| StoreError::Unavailable {
            reason: format!("{} cannot be followed", bus.name()),
            source: Some(Arc::new(error)),
        })
    }

    /// Takes what the feed has.
    async fn follow(&mut self) {
        let Some(follower) = &mut self.follower else { return self.restart() };
        self.context.set(ProjectionState::Following);
        let news = Some(&mut self.news);
        let until = self.timing.until().map_or(self.tick_at, |until| until.min(self.tick_at));
        let heard = hear(&mut self.inbox, &mut self.lease, news, Some(until), follower.next()).await;
        let Some(mut item) = self.attend(heard).await else { return };
        // What is held back already, and what comes now.
        let held = self.pending.take().unwrap_or(Pending { events: VecDeque::new(), upto: self.applied });
        let before = held.events.len();
        let Pending { mut events, mut upto } = held;
        loop {
            match item {
                FeedItem::Batch(batch) => {
                    self.knows_of(batch.upto);
                    match adjacent(batch, upto) {
                        Some(LogBatch { upto: end, events: batch, .. }) => {
                            let wanted = batch.iter().filter(|event| self.context.wants(event));
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
                    // Only at the end of the runtime, which ends this as well, or of the bus.
                    let error = StoreError::Unavailable { reason: "the feed has ended".into(), source: None };
                    self.source = Source::Store;
                    self.follower = None;
                    self.outage(&error);
                }
            }
            // What has gathered meanwhile shares the transaction.
            if self.source == Source::Store || events.len() >= self.context.options.batch {
                break;
            }
            match self.follower.as_mut().and_then(Follower::try_next) {
                Some(next) => item = next,
                None => break,
            }
        }
        if events.len() > before {
            self.timing.arrived(self.context.options.schedule);
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
            self.tell_applied();
        }
    }

    fn tell_applied(&mut self) {
        if let Some(follower) = &mut self.follower {
            follower.applied(self.applied);
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
        self.context.status.send_modify(|status| status.fits = false);
        self.reload();
        self.stand_still();
        self.surrender = true;
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
        let row = &self.row;
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
