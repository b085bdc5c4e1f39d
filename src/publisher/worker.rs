//! The publishing loop: takes the lease, finds the end of the log stream, publishes what follows.

mod claims;
mod interruption;
mod publishing;
mod resume;
mod shared;
mod term;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use self::interruption::Interruption;
use self::shared::{NAME, Shared};
use self::term::PublisherTerm;
use super::options::PublisherOptions;
use super::status::{PublisherState, PublisherStatus};
use crate::backoff::Backoff;
use crate::bus::{BusError, EventBus, LogStreamEnd};
use crate::event::Position;
use crate::feed::Feed;
use crate::lease::{HeldLease, LeaseRenewer, Renewals};
use crate::rate_limit::LogLimit;
use crate::store::{BoxFuture, EventStore, LeaseInfo, PublisherCheckpoint};
use crate::supervised::{Inbox, Work};
use crate::telemetry::Metrics;

/// Poll interval of a standby for a free lease.
/// This is the time without a publisher after an orderly stop.
const STANDBY_POLL: Duration = Duration::from_millis(500);

/// Minimum interval between two hints of a node about its commits.
const HINT_EVERY: Duration = Duration::from_millis(2);

/// The work that the actor supervises.
pub(super) struct PublisherWork {
    shared: Arc<Shared>,
}

impl PublisherWork {
    pub(super) fn new(
        store: Arc<dyn EventStore>,
        feed: Feed,
        bus: Arc<dyn EventBus>,
        options: PublisherOptions,
        node: Uuid,
        metrics: Metrics,
    ) -> (Self, watch::Receiver<PublisherStatus>) {
        let status = PublisherStatus::new(Some(bus.name()), PublisherState::Starting);
        let (status, receiver) = watch::channel(status);
        let renewer = LeaseRenewer::new(store.clone());
        let shared = Shared { store, feed, renewer, bus, options, node, metrics, status };
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

async fn run(shared: Arc<Shared>, mut inbox: Inbox<()>) {
    // A copied store would publish its own events among those of the original, at the same
    // positions.
    if let Some(reason) = shared.store.info().adoption.problem() {
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
            saved: PublisherCheckpoint::default(),
            end: LogStreamEnd::default(),
            save_at: Instant::now(),
            beat_at: Instant::now(),
            backoff: &mut backoff,
            fenced: &mut fenced,
            foreign: &mut foreign,
        };
        let interruption = turn.publish_all(&mut inbox).await;
        // Release the lease after every outcome: another node may succeed, and this node can
        // reacquire it.
        turn.lease.release().await;
        let Err(error) = interruption else { return };
        tracing::warn!(bus = shared.bus.name(), %error, "retrying interrupted publishing");
        shared.failed(error.to_string());
        let hopeless = matches!(
            error,
            Interruption::Bus(BusError::Closed | BusError::Incompatible { .. })
                | Interruption::Ahead { .. }
                | Interruption::Diverged { .. }
        );
        if inbox.is_stopping() && hopeless {
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

/// Waits for the lease, under which this node may publish.
/// Returns `None` if nothing remains to be done.
async fn stand_by(shared: &Shared, inbox: &mut Inbox<()>, backoff: &mut Backoff) -> Option<HeldLease> {
    let mut appended = shared.store.appended();
    let (mut renewals, mut abandoned) = (Renewals::default(), None);
    loop {
        let (ttl, metrics) = (shared.options.lease, &shared.metrics);
        let taken =
            HeldLease::take(&shared.renewer, NAME, shared.node, ttl, abandoned.as_ref(), metrics).await;
        match taken {
            Ok(Some(lease)) => return Some(lease),
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
            // The store announces the append to the publishing node, or its feed polls.
            tracing::debug!(%error, "could not send a hint about an append");
        }
        sleep(HINT_EVERY).await;
    }
    // The store is being dropped.
    std::future::pending().await
}
