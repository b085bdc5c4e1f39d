mod claims;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use self::claims::{Walk, find_end};
use super::{PublisherOptions, PublisherState, PublisherStatus};
use crate::backoff::Backoff;
use crate::bus::{
    BusError, BusPublisher, BusScope, Claim, ClaimedEvent, EventBus, LogBatch, MirrorEnd, Resume,
};
use crate::event::Position;
use crate::feed::{Stretch, read_stretch};
use crate::lease::{HeldLease, LeaseRenewer, Renewals};
use crate::rate_limit::{LogLimit, RateLimit};
use crate::store::{BoxFuture, Checkpoint, CheckpointError, EventStore, LeaseInfo, StoreError};
use crate::supervised::{Inbox, Work};
use crate::telemetry::trace::{self, Destination, Publishing};
use crate::telemetry::{Metrics, Timer};
use crate::time::after;

/// The name of both the lease and the checkpoint.
const NAME: &str = "publisher";

/// How often at most the checkpoint is written, while few events are published. After a crash, what the mirror has got since is
/// compared with the log.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// Number of messages after which it is written in any case: the most that are compared after a crash, but for one read of the log.
const SAVE_AFTER: u64 = 16_384;

/// How often a standby looks whether the lease is free: how long after an orderly stop nobody publishes.
const STANDBY_POLL: Duration = Duration::from_millis(500);

/// How often at most a node hints at what it has committed.
const HINT_EVERY: Duration = Duration::from_millis(2);

/// What the actor supervises.
pub(super) struct PublisherWork {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<dyn EventStore>,
    renewer: LeaseRenewer,
    bus: Arc<dyn EventBus>,
    options: PublisherOptions,
    node: Uuid,
    metrics: Metrics,
    status: watch::Sender<PublisherStatus>,
}

/// Why publishing was interrupted.
#[derive(Debug, thiserror::Error)]
enum Interruption {
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(
        "the mirror goes to position {mirror}, the log only to {log}: the store was restored from an older state, and what \
         comes next would contradict what others have read; give the restored store a mirror of its own (another \
         namespace, or delete the old mirror); if the messages from {first} on were forged, delete them from the stream"
    )]
    Ahead { mirror: Position, log: Position, first: u64 },
    #[error(
        "the last event of the mirror is {mirror} at position {position}, where the log has {}: the store was restored from an \
         older state and has gone on since, or it is a copy; give it a mirror of its own (another namespace, or delete the old \
         mirror); if the messages from {first} on were forged, delete them from the stream",
        log.map_or_else(|| "none".to_owned(), |id| id.to_string())
    )]
    Diverged { position: Position, mirror: Uuid, log: Option<Uuid>, first: u64 },
    #[error(
        "the mirror goes on at position {position}, up to which the log is not stable in this process as yet"
    )]
    Unstable { position: Position },
    #[error("the lease {NAME:?} was lost, or could not be renewed in time")]
    LeaseLost,
}

impl Interruption {
    /// In one word.
    fn kind(&self) -> &'static str {
        match self {
            Self::Bus(error) => error.kind(),
            Self::Store(error) => error.kind(),
            Self::Checkpoint(_) => "checkpoint",
            Self::Ahead { .. } => "ahead",
            Self::Diverged { .. } => "diverged",
            Self::Unstable { .. } => "unstable",
            Self::LeaseLost => "lease_lost",
        }
    }
}

/// A batch on its way to the bus.
struct Sending {
    name: Cow<'static, str>,
    events: usize,
    spans: Publishing,
    timer: Timer,
}

impl PublisherWork {
    pub(super) fn new(
        store: Arc<dyn EventStore>,
        bus: Arc<dyn EventBus>,
        options: PublisherOptions,
        node: Uuid,
        metrics: Metrics,
    ) -> (Self, watch::Receiver<PublisherStatus>) {
        let (status, receiver) = watch::channel(PublisherStatus {
            bus: bus.name(),
            state: PublisherState::Starting,
            published: None,
            head: None,
            last_error: None,
        });
        let renewer = LeaseRenewer::new(store.clone());
        let shared = Shared { store, renewer, bus, options, node, metrics, status };
        (Self { shared: Arc::new(shared) }, receiver)
    }
}

impl Work for PublisherWork {
    type Control = ();

    fn name(&self) -> String {
        NAME.to_owned()
    }

    fn run(&self, inbox: Inbox<()>) -> BoxFuture<'static, ()> {
        Box::pin(run(self.shared.clone(), inbox))
    }

    fn panicked(&self, panic: &str) {
        self.shared.failed(format!("the publisher panicked: {panic}"));
    }

    fn ended(&self) {
        self.shared.set(PublisherState::Stopped);
    }
}

impl Shared {
    fn set(&self, state: PublisherState) {
        self.status.send_if_modified(|status| {
            let news = status.state != state;
            status.state = state;
            news
        });
    }

    /// Tells those who watch that a batch is on its way.
    fn begin(&self, batch: &LogBatch) -> Sending {
        let (name, events) = (self.bus.destination(), batch.events.len());
        let to = Destination { system: trace::system(self.bus.name()), name: &name };
        let spans = Publishing::begin(to, &batch.events);
        Sending { name, events, spans, timer: Timer::start() }
    }

    /// … and that it is not any more.
    fn ended(&self, sending: Sending, error: Option<&Interruption>) {
        let Sending { name, events, spans, timer } = sending;
        let error = error.map(Interruption::kind);
        let to = Destination { system: trace::system(self.bus.name()), name: &name };
        self.metrics.published(to, timer, events, error);
        spans.ended(error);
    }

    fn failed(&self, error: String) {
        self.status.send_modify(|status| {
            status.state = PublisherState::Retrying { error: error.clone() };
            status.last_error = Some(error);
        });
    }
}

async fn run(shared: Arc<Shared>, mut inbox: Inbox<()>) {
    // A copy would publish its own events among those of the original, at the same positions.
    if shared.bus.scope() == BusScope::Shared
        && let Some(reason) = shared.store.info().adoption.problem()
    {
        tracing::error!(bus = shared.bus.name(), reason, "nothing is published");
        shared.status.send_modify(|status| status.last_error = Some(reason.clone()));
        shared.set(PublisherState::Incompatible { reason });
        return inbox.stopping().await;
    }
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
    let (mut fenced, mut foreign) = (None, LogLimit::each_minute());
    loop {
        let Some(lease) = stand_by(&shared, &mut inbox, &mut backoff).await else { return };
        let mut turn = Turn {
            shared: &shared,
            lease,
            epoch: 0,
            saved: Checkpoint::default(),
            end: MirrorEnd::default(),
            save_at: Instant::now(),
            backoff: &mut backoff,
            fenced: &mut fenced,
            foreign: &mut foreign,
        };
        let interruption = turn.publish_all(&mut inbox).await;
        // Given back whatever happened: another node may fare better, and this one can take it again.
        if let Some(lease) = turn.lease.take() {
            lease.release().await;
        }
        let Err(error) = interruption else { return };
        tracing::warn!(bus = shared.bus.name(), %error, "publishing was interrupted and goes on");
        shared.failed(error.to_string());
        let for_others = shared.bus.scope() == BusScope::Shared;
        let hopeless = matches!(
            error,
            Interruption::Bus(BusError::Closed | BusError::Incompatible { .. })
                | Interruption::Ahead { .. }
                | Interruption::Diverged { .. }
        );
        if inbox.is_stopping() && (!for_others || hopeless) {
            return;
        }
        // While stopping too: until the deadline there is still a chance to publish what other nodes wait for.
        pause(&mut inbox, backoff.next()).await;
        // A bus that a person has to change is not tried again at the end: the answer may take as long as the stop may.
        if hopeless && inbox.is_stopping() {
            return;
        }
    }
}

/// Waits, but not when it is to stop: then the next attempt is due at once.
async fn pause(inbox: &mut Inbox<()>, wait: Duration) {
    let stopping = inbox.is_stopping();
    tokio::select! {
        () = sleep(wait) => {}
        () = inbox.stopping(), if !stopping => {}
    }
}

/// Waits until this node is to publish: with the lease, on a bus that needs one. `None` when there is nothing to do any more.
async fn stand_by(
    shared: &Shared,
    inbox: &mut Inbox<()>,
    backoff: &mut Backoff,
) -> Option<Option<HeldLease>> {
    if shared.bus.scope() == BusScope::Process {
        return Some(None);
    }
    let mut appended = shared.store.appended();
    let (mut renewals, mut abandoned) = (Renewals::default(), None);
    loop {
        let (ttl, metrics) = (shared.options.lease, &shared.metrics);
        let taken =
            HeldLease::take(&shared.renewer, NAME, shared.node, ttl, abandoned.as_ref(), metrics).await;
        match taken {
            Ok(Some(lease)) => return Some(Some(lease)),
            // The owner publishes what is committed.
            Ok(None) if inbox.is_stopping() => return None,
            Ok(None) => {
                shared.set(PublisherState::Standby);
                abandoned = unrenewed(shared, &mut renewals).await;
                tokio::select! {
                    () = sleep(STANDBY_POLL) => {}
                    () = hint_at(shared, &mut appended) => {}
                    () = inbox.stopping() => return None,
                }
            }
            Err(_) if inbox.is_stopping() => return None,
            Err(error) => {
                tracing::warn!(%error, "the publisher could not ask for its lease");
                shared.failed(error.to_string());
                pause(inbox, backoff.next()).await;
            }
        }
    }
}

/// The lease as it is now, if it was not renewed for its TTL.
async fn unrenewed(shared: &Shared, renewals: &mut Renewals) -> Option<LeaseInfo> {
    // A store that cannot be reached is noticed where the lease is asked for.
    let leases = shared.store.leases().await.ok()?;
    leases.into_iter().find(|info| info.lease.name == NAME && renewals.is_abandoned(info))
}

/// Tells the node that publishes what this one has committed, for as long as this one stands by.
async fn hint_at(shared: &Shared, appended: &mut watch::Receiver<Position>) {
    while appended.changed().await.is_ok() {
        if let Err(error) = shared.bus.hint(shared.store.info().id).await {
            // The publisher looks by itself.
            tracing::debug!(%error, "nobody could be told of an append");
        }
        sleep(HINT_EVERY).await;
    }
    // The store is being dropped.
    std::future::pending().await
}

/// One time of being the publisher.
struct Turn<'a> {
    shared: &'a Shared,
    /// On a shared bus.
    lease: Option<HeldLease>,
    /// Under which the checkpoint is written.
    epoch: u64,
    /// The checkpoint as it is in the store.
    saved: Checkpoint,
    /// The last confirmed publish.
    end: MirrorEnd,
    /// Not before this is the checkpoint saved again.
    save_at: Instant,
    backoff: &'a mut Backoff,
    /// The checkpoint that this process wrote when a message of another program fenced it: exactly the end of the mirror.
    fenced: &'a mut Option<Checkpoint>,
    /// Messages that are no events of the log.
    foreign: &'a mut LogLimit,
}

impl Turn<'_> {
    /// Publishes until it is to stop (and everything committed by then is published) or something fails.
    async fn publish_all(&mut self, inbox: &mut Inbox<()>) -> Result<(), Interruption> {
        let shared = self.shared;
        let mut publisher = shared.bus.publisher(shared.store.info().id).await?;
        tokio::select! {
            biased;
            () = publisher.wanted() => {}
            // The first to subscribe finds all of it in the store.
            () = self.unheard(inbox) => return Ok(()),
        }
        // From before the first look at the store: an append in between is not slept through.
        let appended = shared.store.appended();
        self.resume(&mut *publisher).await?;
        shared.set(PublisherState::Publishing);
        let ended = self.publish_on(&mut *publisher, appended, inbox).await;
        if let Err(Interruption::Bus(error)) = &ended {
            self.keep(publisher.confirmed(), error).await;
        }
        ended
    }

    async fn publish_on(
        &mut self,
        publisher: &mut dyn BusPublisher,
        mut appended: watch::Receiver<Position>,
        inbox: &mut Inbox<()>,
    ) -> Result<(), Interruption> {
        let shared = self.shared;
        // Where the log ended when the end was asked for.
        let mut last = None;
        let mut poll = shared.options.busy_poll;
        let mut beat_at = Instant::now();
        // What was announced is read without asking how far the log goes by now, which is half of the time that it takes.
        let mut announced = None;
        // Anything can publish hints: reads that find nothing are limited.
        let (mut reads, mut hint_at, mut hinted) = (RateLimit::of_reads(), None::<Instant>, false);
        // While there is more than one stretch, the next one is read while one is published.
        let mut ahead = None;
        loop {
            if last.is_none() && inbox.is_stopping() {
                last = Some(shared.store.frontier().await?);
            }
            let stretch = match ahead.take() {
                Some(stretch) => stretch,
                None => {
                    appended.mark_unchanged();
                    read_stretch(&*shared.store, self.end.position, announced.take()).await?
                }
            };
            let (upto, head, something) = (stretch.upto, stretch.head, !stretch.batches.is_empty());
            if std::mem::take(&mut hinted) && something {
                reads.refund();
            }
            let more = upto < head;
            shared.status.send_if_modified(|status| status.head.replace(head) != Some(head));
            if something {
                if more {
                    appended.mark_unchanged();
                }
                let next = async {
                    let next = match more {
                        true => read_stretch(&*shared.store, upto, Some(head)).await.map(Some),
                        false => Ok(None),
                    };
                    // What is under way is not broken off for it.
                    Ok::<_, Interruption>(next)
                };
                let ((), next) = tokio::try_join!(self.publish(publisher, stretch), next)?;
                ahead = next?;
                beat_at = after(shared.options.heartbeat);
                poll = shared.options.busy_poll;
            }
            if last.is_some_and(|last| self.end.position >= last) {
                return self.save().await;
            }
            let unsaved = self.end.sequence.saturating_sub(self.saved.mark);
            if self.save_at <= Instant::now() || unsaved >= SAVE_AFTER {
                self.save().await?;
            }
            if more {
                continue;
            }
            let poll_at = after(poll);
            loop {
                tokio::select! {
                    biased;
                    () = lost(&mut self.lease) => return Err(Interruption::LeaseLost),
                    () = inbox.stopping(), if last.is_none() => {}
                    // An error says that the store is being dropped; the poll will tell.
                    Ok(()) = appended.changed() => announced = Some(*appended.borrow_and_update()),
                    () = sleep_until(hint_at.unwrap_or(beat_at)), if hint_at.is_some() => {
                        (hint_at, hinted) = (None, true);
                    }
                    () = sleep_until(poll_at) => poll = poll.saturating_mul(2).min(shared.options.idle_poll),
                    () = sleep_until(beat_at) => {
                        tokio::select! {
                            biased;
                            () = lost(&mut self.lease) => return Err(Interruption::LeaseLost),
                            beat = publisher.heartbeat(self.end.position) => beat?,
                        }
                        beat_at = after(shared.options.heartbeat);
                    }
                    // Last: a flood of hints delays nothing else.
                    () = publisher.hinted() => {
                        // Any number of hints until then are one read.
                        let due = *hint_at.get_or_insert_with(|| reads.take());
                        if due > Instant::now() {
                            continue;
                        }
                        (hint_at, hinted) = (None, true);
                    }
                }
                break;
            }
        }
    }

    /// Ends when it is to stop.
    async fn unheard(&self, inbox: &mut Inbox<()>) {
        self.shared.set(PublisherState::Unheard);
        inbox.stopping().await;
    }

    /// Finds out where to go on.
    async fn resume(&mut self, publisher: &mut dyn BusPublisher) -> Result<(), Interruption> {
        let shared = self.shared;
        if let Some(lease) = &self.lease {
            self.saved = shared.store.checkpoint(NAME).await?;
            self.epoch = lease.epoch_above(self.saved.epoch).await?.ok_or(Interruption::LeaseLost)?;
        }
        let known = MirrorEnd { position: self.saved.position, sequence: self.saved.mark };
        self.end = match publisher.resume(known).await? {
            Resume::After(end) => self.confirm(publisher, known, end).await?,
            Resume::AtFrontier => MirrorEnd { position: shared.store.frontier().await?, sequence: 0 },
        };
        // Another process may have published more than the mark of this one allows. Only the event decides whether the log lost it.
        let MirrorEnd { position: end, sequence } = self.end;
        if end > Position::START && shared.store.event_id_at(end).await?.is_none() {
            let log = shared.store.frontier().await?;
            if end > log {
                return Err(Interruption::Ahead { mirror: end, log, first: sequence });
            }
        }
        // Claims the checkpoint: whoever published under an older lease is refused from here on.
        self.save().await?;
        *self.fenced = None;
        shared.status.send_modify(|status| {
            status.published = Some(self.end.position);
        });
        Ok(())
    }

    /// Finds the end of the mirror: the last message that the log confirms.
    async fn confirm(
        &mut self,
        publisher: &mut dyn BusPublisher,
        known: MirrorEnd,
        end: MirrorEnd,
    ) -> Result<MirrorEnd, Interruption> {
        let store = &*self.shared.store;
        let mut claims = publisher.claims().await?;
        let Some(first) = claims.first().copied() else { return Ok(end) };
        // Nothing of this process comes after the end that fenced it.
        let fenced = *self.fenced == Some(self.saved);
        let mut walk = if known.sequence > 0 && first.sequence == known.sequence {
            self.check_checkpoint(known, first).await?;
            claims.remove(0);
            Walk::new(store, known.position, first.event != ClaimedEvent::Missing)
        } else if fenced && known.sequence == 0 {
            Walk::new(store, known.position, true)
        } else if let Some(index) = find_end(store, &claims).await?
            && let Some(Claim { event: ClaimedEvent::Event { position, .. }, .. }) = claims.get(index)
        {
            let position = *position;
            claims.drain(..=index);
            Walk::new(store, position, true)
        } else {
            // Of this log there is nothing; of another one under its id, there may be.
            for claim in claims.iter().rev() {
                if let ClaimedEvent::Event { position, id, .. } = claim.event {
                    return Err(self.lost(position, id, claim.sequence).await?);
                }
            }
            return Ok(end);
        };
        while !claims.is_empty() {
            for claim in claims {
                walk.take(claim).await?;
            }
            claims = publisher.claims().await?;
        }
        if let Some(lost) = walk.lost.filter(|_| !fenced) {
            return Err(self.lost(lost.position, lost.id, lost.first).await?);
        }
        let (ignored, position) = (walk.ignored(), walk.position);
        if ignored > 0
            && let Some(messages) = self.foreign.add(ignored)
        {
            let bus = self.shared.bus.name();
            tracing::warn!(bus, messages, "ignoring messages of another program in the mirror");
        }
        publisher.confirm(position, walk.is_exact);
        Ok(MirrorEnd { position, ..end })
    }

    /// Checks that the log still has the event of the checkpoint, if the mirror has it there.
    async fn check_checkpoint(&self, known: MirrorEnd, claim: Claim) -> Result<(), Interruption> {
        if let ClaimedEvent::Event { position, id, .. } = claim.event
            && position == known.position
            // Another id proves nothing: the last message then may have been of another program.
            && self.shared.store.event_id_at(position).await?.is_none()
        {
            return Err(self.lost(position, id, claim.sequence).await?);
        }
        Ok(())
    }

    /// Why the log does not have an event of the mirror.
    async fn lost(&self, position: Position, id: Uuid, first: u64) -> Result<Interruption, StoreError> {
        let store = &self.shared.store;
        let (log, head) = (store.event_id_at(position).await?, store.frontier().await?);
        Ok(match log {
            None if position > head => Interruption::Ahead { mirror: position, log: head, first },
            log => Interruption::Diverged { position, mirror: id, log, first },
        })
    }

    /// Writes the checkpoint after an error of the bus: the next attempt begins there.
    async fn keep(&mut self, confirmed: Option<MirrorEnd>, error: &BusError) {
        self.end = confirmed.unwrap_or(self.end);
        match self.save().await {
            Ok(()) if matches!(error, BusError::Fenced { .. }) => *self.fenced = Some(self.saved),
            Ok(()) => {}
            Err(error) => tracing::debug!(%error, "the checkpoint of the publisher was not written"),
        }
    }

    async fn publish(
        &mut self,
        publisher: &mut dyn BusPublisher,
        stretch: Stretch,
    ) -> Result<(), Interruption> {
        let status = &self.shared.status;
        for batch in stretch.batches {
            let sending = self.shared.begin(&batch);
            let end = tokio::select! {
                biased;
                // What was under way may be on the bus or not: the next turn asks the bus.
                () = lost(&mut self.lease) => Err(Interruption::LeaseLost),
                end = publisher.publish(batch) => end.map_err(Interruption::Bus),
            };
            self.shared.ended(sending, end.as_ref().err());
            self.end = end?;
            self.backoff.succeeded();
            status.send_modify(|status| status.published = Some(self.end.position));
        }
        Ok(())
    }

    /// Remembers how far publishing got, for a bus that others publish to as well.
    async fn save(&mut self) -> Result<(), Interruption> {
        self.save_at = Instant::now() + SAVE_EVERY;
        if self.lease.is_none() {
            return Ok(());
        }
        let to = Checkpoint { position: self.end.position, epoch: self.epoch, mark: self.end.sequence };
        if to != self.saved {
            self.shared.store.save_checkpoint(NAME, self.saved, to, None).await?;
            self.saved = to;
        }
        Ok(())
    }
}

/// Waits until the lease is lost; for ever if none is needed. Cancel-safe.
async fn lost(lease: &mut Option<HeldLease>) {
    match lease {
        Some(lease) => lease.lost().await,
        None => std::future::pending().await,
    }
}
