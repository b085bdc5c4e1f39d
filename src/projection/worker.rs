//! The work of one projection: whose it is, where its next events come from.

mod apply;
mod batch;
mod context;
mod floor;
mod input;
mod log_source;
mod memory;
mod orders;
mod ownership;
mod page_cache;
mod reading;
mod requests;
mod schedule;
mod snapshot;
mod switch;
mod trouble;
mod version;

use std::collections::VecDeque;
use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::Instrument;

use self::batch::{BatchSize, PageSize};
use self::context::Context;
pub(crate) use self::context::Surroundings;
pub(super) use self::context::{Instance, Part, ProjectionWork, Role};
use self::input::Follower;
use self::ownership::News;
pub(super) use self::page_cache::PageCache;
use self::reading::PageAhead;
use self::schedule::Timing;
use self::snapshot::Snapshotting;
use self::switch::{Pace, SWITCH_AGAIN, Switch};
use super::control::Control;
use super::{Projection, ProjectionState, ReadModel};
use crate::backoff::Backoff;
use crate::event::{Position, RecordedEvent};
use crate::lease::HeldLease;
use crate::partition::Partition;
use crate::store::{Checkpoint, StoreError};
use crate::supervised::Inbox;
use crate::telemetry::trace;

/// How often a projection writes a checkpoint that only moved over what is not for it.
const TICK: Duration = Duration::from_secs(1);

/// How often a partition does: on other nodes somebody may wait for all partitions, most of which have nothing to do with what
/// happened.
const PARTITION_TICK: Duration = Duration::from_millis(200);

/// Minimum interval between two such checkpoints for each partition of a projection: the partitions of a node share one database.
const PARTITION_SHARE: Duration = Duration::from_millis(4);

/// Interval between two looks at the head of the log until it is known.
const HEAD_TICK: Duration = Duration::from_millis(50);

/// How long what was asked of the nodes is left alone after it could not be done for now: the projection goes on meanwhile.
const REQUESTS_AGAIN: Duration = Duration::from_secs(30);

/// How long what is under way may take once the task is to end: a transaction, or an operator's request.
const STOPPING: Duration = Duration::from_secs(5);

/// How far a page of the store reaches in positions, whatever matches: a scan for events that are rare is made of pieces,
/// between which the projection hears, sees to what is due, and saves its checkpoint.
const SCAN: u64 = 50_000;

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
    /// Whether only its name is not known, and that is no failure here.
    strange: bool,
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
    /// If the read model keeps snapshots.
    snapshotting: Option<Snapshotting<'a>>,
    /// Whether the read model was found to be in the shape, and the version, that this works on.
    fits: bool,
    /// Nobody wants what this would do: there is nothing to rebuild.
    dormant: bool,
    /// While what was rebuilt takes the place of what is live.
    switch: Option<Switch>,
    /// How long it is left alone when that has failed.
    switch_again: Backoff,
    /// How the parts of what is rebuilt get on.
    paces: Vec<Pace>,
    /// As persisted, when it was last looked at; nothing is applied before that is known.
    paused: Option<bool>,
    /// When this was last told to pause or to resume: what the board saw before is older than that.
    paused_at: Option<Instant>,
    /// Somebody changes something for all who work on this projection; nothing is applied meanwhile.
    held_up: bool,
    /// The last such change that was heeded; `None` before the first look.
    heeded: Option<u64>,
    /// Somebody without the projection's code may have asked for something: for a reset or a rebuild …
    requests_due: bool,
    /// … or for parked events to be tried again.
    retries_due: bool,
    /// Not before this what was asked for is tried (again), …
    requests_at: Instant,
    /// … nor parked events.
    retries_at: Instant,
    /// The changes for all that this made itself, and has not heeded yet.
    ours: Vec<u64>,
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
    /// The page that comes after the one that is being applied: while this decodes and applies, the database works ahead.
    ahead: Option<PageAhead>,
    /// The store is read up to here before the follower, which may have lost or skipped what is up to here.
    live_after: Position,
    /// Subscribed before the store is read, so that nothing falls between the two; `None` while nothing is read.
    follower: Option<Follower>,
    pending: Option<Pending>,
    /// The event that the user's code has at the moment, if any.
    applying: Option<Position>,
    /// When what is pending is applied, and whether to read on.
    timing: Timing,
    suspect: Option<Suspect>,
    /// How many events a page of the store has, …
    page: PageSize,
    /// … and how many go into a transaction.
    size: BatchSize,
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
    /// Where it was when it last looked how old what comes next is.
    dated: Option<Position>,
}

const LOST: &str = "the lease was lost, or could not be renewed in time";

/// Waits for it; for ever if there is none. Cancel-safe.
async fn lost(loss: Option<impl Future<Output = ()>>) {
    match loss {
        Some(loss) => loss.await,
        None => std::future::pending().await,
    }
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
            snapshotting: Snapshotting::new(context, read_model),
            fits: false,
            dormant: false,
            switch: None,
            switch_again: Backoff::new(SWITCH_AGAIN.0, SWITCH_AGAIN.1),
            paces: Vec::new(),
            paused: None,
            paused_at: None,
            held_up: false,
            heeded: None,
            requests_due: true,
            retries_due: true,
            requests_at: now,
            retries_at: now,
            ours: Vec::new(),
            failed: false,
            surrender: false,
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
            page: PageSize::new(&context.options),
            size: BatchSize::new(&context.options),
            backoff: Backoff::new(first, max),
            wait_until: now,
            tick_at: now,
            take_at: now,
            look_at: now,
            dated: None,
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
            // As for any transaction: a read model that hangs does not hold up the end of its node.
            let flushed = timeout(STOPPING, self.flush()).await;
            if flushed.is_err() {
                tracing::warn!(
                    projection = self.context.name,
                    "the last checkpoint could not be written in time"
                );
            }
            self.last_snapshot().await;
        } else {
            tracing::warn!(
                projection = self.context.name, limit = ?STOPPING,
                "what was under way at the shutdown took too long and was given up; it is done again after the next start"
            );
        }
        self.give_up_switching().await;
        self.follower = None;
        if let Some(lease) = self.lease.take() {
            lease.release().await;
        }
    }

    /// Works until the task is to end.
    async fn work(&mut self) {
        while !self.inbox.is_stopping() {
            if self.news.has_changed() {
                self.look().await;
            }
            if self.tick_at <= Instant::now() {
                self.tick().await;
            }
            self.round().await;
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
        if self.held_up && self.context.role == Role::Live {
            return self.idle(self.tick_at).await;
        }
        // Before it is looked whether the read model fits, and also if it does not: a reset may be what makes it fit.
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
            return self.outage(&error);
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
            Err(error) => return self.outage(&error),
        }
        if self.holds() {
            return self.follow().await;
        }
        // Not below: who loses the lease there drops what is under way, which is not to be an order.
        if let Some(due) = self.left_alone() {
            return self.idle(due).await;
        }
        match self.pending.take() {
            Some(pending) => {
                let events = pending.events.iter().take(self.size.get());
                let span = trace::apply(&self.context.name, events.len(), events);
                // Nobody waits for a database that hangs longer than another node waits for this one.
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
            self.empty_memory().await?;
            self.load_snapshot().await?;
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
            Heard::LeaseLost => self.step_down(LOST),
        }
        None
    }

    /// What is due now and then.
    async fn tick(&mut self) {
        let others_wait = self.context.partition.is_some() || self.context.role == Role::Rebuild;
        let every = match self.context.status.borrow().head {
            // The lag is unknown until then, though nothing may have to be read.
            None => HEAD_TICK,
            Some(_) if others_wait => {
                let partitions = self.context.partition.map_or(1, Partition::count);
                (PARTITION_SHARE * u32::from(partitions)).clamp(PARTITION_TICK, TICK)
            }
            Some(_) => TICK,
        };
        self.tick_at = Instant::now() + every;
        // What the board showed when this was last told something may have been passed over as too old.
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
            // What the bus has picked out does not say how far the rest goes.
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

    /// What is pending is the oldest that is not applied.
    fn waits_since(&self, pending: &Pending) {
        let Some(first) = pending.events.front() else { return };
        self.context.status.send_if_modified(|status| {
            status.knows_of(first.position);
            status.behind_since = Some(first.recorded_at);
            false
        });
    }

    /// Looks how old what comes next is, if it stays unread for a while.
    async fn date(&mut self) {
        let (position, behind) = {
            let status = self.context.status.borrow();
            (status.position, status.lag().is_some_and(|lag| lag > 0))
        };
        if !behind || self.pending.is_some() || self.dated == Some(position) || self.dormant {
            return;
        }
        match self.context.log.next_recorded_at(position).await {
            Ok(Some(recorded_at)) => {
                self.dated = Some(position);
                self.context.status.send_if_modified(|status| {
                    status.moved_to(position, Some(recorded_at));
                    false
                });
            }
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(projection = self.context.name, %error, "how long it is behind could not be looked up");
            }
        }
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
