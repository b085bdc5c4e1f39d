//! The publishing loop: takes the lease, finds the end of the log stream, publishes what follows.

mod claims;
mod interruption;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use self::claims::{Walk, find_end};
use self::interruption::Interruption;
use super::options::PublisherOptions;
use super::status::{PublisherState, PublisherStatus};
use crate::backoff::Backoff;
use crate::bus::{
    BusError, BusPublisher, BusScope, Claim, ClaimedEvent, EventBus, LogBatch, LogStreamEnd, Resume,
};
use crate::event::Position;
use crate::feed::{LogChunk, read_chunk};
use crate::lease::{HeldLease, LeaseRenewer, Renewals};
use crate::rate_limit::{LogLimit, RateLimit};
use crate::store::{BoxFuture, Checkpoint, EventStore, LeaseInfo, StoreError};
use crate::supervised::{Inbox, Work};
use crate::telemetry::trace::{self, Destination, Publishing};
use crate::telemetry::{Metrics, Timer};
use crate::time::after;

/// Name of the lease and of the checkpoint.
const NAME: &str = "publisher";

/// Minimum interval between two checkpoint writes while few events are published.
/// After a crash, the messages that the log stream got since are compared with the log.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// Number of messages after which the checkpoint is written in any case.
/// At most this many messages plus one read of the log are compared after a crash.
const SAVE_AFTER: u64 = 16_384;

/// Poll interval of a standby for a free lease.
/// This is the time without a publisher after an orderly stop.
const STANDBY_POLL: Duration = Duration::from_millis(500);

/// Minimum interval between two hints of a node about its commits.
const HINT_EVERY: Duration = Duration::from_millis(2);

/// The work that the actor supervises.
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

/// A batch that is being published.
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

    /// Starts the span and the timer of a batch.
    fn begin(&self, batch: &LogBatch) -> Sending {
        let (name, events) = (self.bus.destination(), batch.events.len());
        let to = Destination { system: trace::system(self.bus.name()), name: &name };
        let spans = Publishing::begin(to, &batch.events);
        Sending { name, events, spans, timer: Timer::start() }
    }

    /// Ends the span and records the metrics of a batch.
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
    // A copied store would publish its own events among those of the original, at the same
    // positions.
    if shared.bus.scope() == BusScope::Shared
        && let Some(reason) = shared.store.info().adoption.problem()
    {
        tracing::error!(bus = shared.bus.name(), reason, "publishing nothing to other nodes");
        shared.status.send_modify(|status| status.last_error = Some(reason.clone()));
        shared.set(PublisherState::Incompatible { reason });
        return inbox.stopping().await;
    }
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
    let (mut fenced, mut foreign) = (None, LogLimit::each_minute());
    loop {
        let Some(lease) = stand_by(&shared, &mut inbox, &mut backoff).await else { return };
        let mut turn = PublisherTerm {
            shared: &shared,
            lease,
            epoch: 0,
            saved: Checkpoint::default(),
            end: LogStreamEnd::default(),
            save_at: Instant::now(),
            backoff: &mut backoff,
            fenced: &mut fenced,
            foreign: &mut foreign,
        };
        let interruption = turn.publish_all(&mut inbox).await;
        // Release the lease after every outcome: another node may succeed, and this node can
        // reacquire it.
        if let Some(lease) = turn.lease.take() {
            lease.release().await;
        }
        let Err(error) = interruption else { return };
        tracing::warn!(bus = shared.bus.name(), %error, "retrying interrupted publishing");
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
        // While stopping, too: until the deadline, a retry may publish events that other nodes wait
        // for.
        pause(&mut inbox, backoff.next()).await;
        // While stopping, do not retry a failure that needs an operator: the answer may take as
        // long as the stop may.
        if hopeless && inbox.is_stopping() {
            return;
        }
    }
}

/// Sleeps, but at most until the stop request: the next attempt is then due at once.
async fn pause(inbox: &mut Inbox<()>, wait: Duration) {
    let stopping = inbox.is_stopping();
    tokio::select! {
        () = sleep(wait) => {}
        () = inbox.stopping(), if !stopping => {}
    }
}

/// Waits until this node may publish: under the lease, if the bus needs one.
/// Returns `None` if nothing remains to be done.
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
            // The lease holder publishes the committed events.
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
                tracing::warn!(%error, "could not acquire the publisher lease");
                shared.failed(error.to_string());
                pause(inbox, backoff.next()).await;
            }
        }
    }
}

/// Returns the current lease if its holder has not renewed it for its TTL.
async fn unrenewed(shared: &Shared, renewals: &mut Renewals) -> Option<LeaseInfo> {
    // Acquiring the lease reports an unavailable store.
    let leases = shared.store.leases().await.ok()?;
    leases.into_iter().find(|info| info.lease.name == NAME && renewals.is_abandoned(info))
}

/// Sends hints about the commits of this node to the publishing node, while this node stands by.
async fn hint_at(shared: &Shared, appended: &mut watch::Receiver<Position>) {
    while appended.changed().await.is_ok() {
        if let Err(error) = shared.bus.hint(shared.store.info().id).await {
            // The publisher polls the store as well.
            tracing::debug!(%error, "could not send a hint about an append");
        }
        sleep(HINT_EVERY).await;
    }
    // The store is being dropped.
    std::future::pending().await
}

/// One term as the publisher.
struct PublisherTerm<'a> {
    shared: &'a Shared,
    /// The lease, on a shared bus.
    lease: Option<HeldLease>,
    /// Epoch under which the checkpoint is written.
    epoch: u64,
    /// The checkpoint in the store.
    saved: Checkpoint,
    /// End of the last confirmed publish.
    end: LogStreamEnd,
    /// Earliest time of the next checkpoint write.
    save_at: Instant,
    backoff: &'a mut Backoff,
    /// Checkpoint that this process wrote when a message of another program fenced it.
    /// It is exactly the end of the log stream.
    fenced: &'a mut Option<Checkpoint>,
    /// Counter of messages that are not events of the log.
    foreign: &'a mut LogLimit,
}

impl PublisherTerm<'_> {
    /// Publishes until a failure or a stop. A stop publishes every event committed by then.
    async fn publish_all(&mut self, inbox: &mut Inbox<()>) -> Result<(), Interruption> {
        let shared = self.shared;
        let mut publisher = shared.bus.publisher(shared.store.info().id).await?;
        tokio::select! {
            biased;
            () = publisher.wanted() => {}
            // The first subscriber finds every event in the store.
            () = self.unheard(inbox) => return Ok(()),
        }
        // Subscribe before the first read of the store, so that an append in between wakes the
        // publisher.
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
        // End of the log at the time of the stop request.
        let mut last = None;
        let mut poll = shared.options.busy_poll;
        let mut beat_at = Instant::now();
        // An announced position is read without a query for the end of the log. This query is half
        // of the read time.
        let mut announced = None;
        // Any program can publish hints, so reads that find nothing are rate limited.
        let (mut reads, mut hint_at, mut hinted) = (RateLimit::of_reads(), None::<Instant>, false);
        // If the log has more than one chunk to publish, the next one is read while one is
        // published.
        let mut ahead = None;
        loop {
            if last.is_none() && inbox.is_stopping() {
                last = Some(shared.store.high_water_mark().await?);
            }
            let chunk = match ahead.take() {
                Some(chunk) => chunk,
                None => {
                    appended.mark_unchanged();
                    read_chunk(&*shared.store, self.end.position, announced.take()).await?
                }
            };
            let (upto, head, something) = (chunk.upto, chunk.head, !chunk.batches.is_empty());
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
                        true => read_chunk(&*shared.store, upto, Some(head)).await.map(Some),
                        false => Ok(None),
                    };
                    // A failed read must not cancel the publish in flight.
                    Ok::<_, Interruption>(next)
                };
                let ((), next) = tokio::try_join!(self.publish(publisher, chunk), next)?;
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
                    // An error means that the store is being dropped; the poll reports it.
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
                    // Last branch: a flood of hints delays nothing else.
                    () = publisher.hinted() => {
                        // All hints until then cause one read.
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

    /// Waits for the stop request.
    async fn unheard(&self, inbox: &mut Inbox<()>) {
        self.shared.set(PublisherState::Unheard);
        inbox.stopping().await;
    }

    /// Determines where to continue.
    async fn resume(&mut self, publisher: &mut dyn BusPublisher) -> Result<(), Interruption> {
        let shared = self.shared;
        if let Some(lease) = &self.lease {
            self.saved = shared.store.checkpoint(NAME).await?;
            self.epoch = lease.epoch_above(self.saved.epoch).await?.ok_or(Interruption::LeaseLost)?;
        }
        let known = LogStreamEnd { position: self.saved.position, sequence: self.saved.mark };
        self.end = match publisher.resume(known).await? {
            Resume::After(end) => self.confirm(publisher, known, end).await?,
            Resume::AtHighWaterMark => {
                LogStreamEnd { position: shared.store.high_water_mark().await?, sequence: 0 }
            }
        };
        // Another process may have published beyond the high-water mark of this process. Only the
        // event shows whether the log has lost it.
        let LogStreamEnd { position: end, sequence } = self.end;
        if end > Position::START && shared.store.event_id_at(end).await?.is_none() {
            let log = shared.store.high_water_mark().await?;
            if end > log {
                return Err(Interruption::Ahead { log_stream: end, log, first: sequence });
            }
        }
        // I7: this save claims the checkpoint. From here on, the store refuses a publisher with an
        // older lease.
        self.save().await?;
        *self.fenced = None;
        shared.status.send_modify(|status| {
            status.published = Some(self.end.position);
        });
        Ok(())
    }

    /// Finds the end of the log stream: the last message that the log confirms.
    async fn confirm(
        &mut self,
        publisher: &mut dyn BusPublisher,
        known: LogStreamEnd,
        end: LogStreamEnd,
    ) -> Result<LogStreamEnd, Interruption> {
        let store = &*self.shared.store;
        let mut claims = publisher.claims().await?;
        let Some(first) = claims.first().copied() else { return Ok(end) };
        // This process published nothing after the end at which it was fenced.
        let fenced = *self.fenced == Some(self.saved) && known.sequence == self.saved.mark;
        let mut walk = if known.sequence > 0 && first.sequence == known.sequence {
            if self.is_recreated(known, first).await? {
                let known = LogStreamEnd::default();
                let Resume::After(end) = publisher.resume(known).await? else { return Ok(end) };
                return Box::pin(self.confirm(publisher, known, end)).await;
            }
            claims.remove(0);
            Walk::new(store, known.position, first.event != ClaimedEvent::Missing)
        // Else the claims are the last ones only: they do not follow the checkpoint.
        } else if fenced && known.sequence == 0 && first.sequence == 1 {
            Walk::new(store, known.position, true)
        } else if let Some(index) = find_end(store, &claims).await?
            && let Some(Claim { event: ClaimedEvent::Event { position, .. }, .. }) = claims.get(index)
        {
            let position = *position;
            claims.drain(..=index);
            Walk::new(store, position, true)
        } else {
            // The log stream has nothing of this log. It may have events of another log under the
            // same store id.
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
            tracing::warn!(bus, messages, "ignoring messages of another program in the log stream");
        }
        publisher.confirm(position, walk.is_exact);
        Ok(LogStreamEnd { position, ..end })
    }

    /// Whether the log stream was recreated since the checkpoint: it has a later event there.
    /// Fails if the log has lost the event of the checkpoint.
    async fn is_recreated(&self, known: LogStreamEnd, claim: Claim) -> Result<bool, Interruption> {
        let ClaimedEvent::Event { position, id, .. } = claim.event else { return Ok(false) };
        // An earlier event or another id proves nothing: the last message may have been of another
        // program.
        if position < known.position {
            return Ok(false);
        }
        let log = self.shared.store.event_id_at(position).await?;
        if position == known.position && log.is_none() {
            return Err(self.lost(position, id, claim.sequence).await?);
        }
        Ok(position > known.position && log == Some(id))
    }

    /// Determines why the log does not have an event of the log stream.
    async fn lost(&self, position: Position, id: Uuid, first: u64) -> Result<Interruption, StoreError> {
        let store = &self.shared.store;
        let (log, head) = (store.event_id_at(position).await?, store.high_water_mark().await?);
        Ok(match log {
            None if position > head => Interruption::Ahead { log_stream: position, log: head, first },
            log => Interruption::Diverged { position, log_stream: id, log, first },
        })
    }

    /// Writes the checkpoint after an error of the bus. The next attempt starts there.
    async fn keep(&mut self, confirmed: Option<LogStreamEnd>, error: &BusError) {
        self.end = confirmed.unwrap_or(self.end);
        match self.save().await {
            Ok(()) if matches!(error, BusError::Fenced { .. }) => *self.fenced = Some(self.saved),
            Ok(()) => {}
            Err(error) => tracing::debug!(%error, "could not write the publisher checkpoint"),
        }
    }

    async fn publish(
        &mut self,
        publisher: &mut dyn BusPublisher,
        chunk: LogChunk,
    ) -> Result<(), Interruption> {
        let status = &self.shared.status;
        for batch in chunk.batches {
            let sending = self.shared.begin(&batch);
            let end = tokio::select! {
                biased;
                // The outcome of the publish in flight is unknown: the next term asks the bus.
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

    /// Saves the checkpoint, if the bus is shared.
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

/// Waits until the lease is lost; never returns without a lease. Cancel-safe.
async fn lost(lease: &mut Option<HeldLease>) {
    match lease {
        Some(lease) => lease.lost().await,
        None => std::future::pending().await,
    }
}
