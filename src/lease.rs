//! Holding a lease: taking it, renewing it in the background, noticing its loss, giving it back; and seeing all of them.

mod board;
mod renewals;
mod renewer;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

pub(crate) use self::board::{Board, Sight, View};
pub(crate) use self::renewals::Renewals;
pub(crate) use self::renewer::LeaseRenewer;
use self::renewer::Renewal;
use crate::invalid_option::{DAY, InvalidOption, within};
use crate::store::{EventStore, Lease, LeaseInfo, StoreError};
use crate::telemetry::Metrics;

/// Checks the duration of a lease. A shorter one is lost when a renewal is a little late; a longer one keeps a successor
/// waiting for days after its holder has died.
pub(crate) fn check(option: &'static str, ttl: Duration) -> Result<(), InvalidOption> {
    within(option, ttl, Duration::from_millis(50)..=DAY)
}

/// A lease that this process holds, as far as it knows. Dropped without [`release`](Self::release) it runs out by itself.
pub(crate) struct HeldLease {
    lease: Lease,
    ttl: Duration,
    store: Arc<dyn EventStore>,
    end: End,
    /// Until when nobody else can have it, by this process's clock: counted from before the store was asked. `None` when
    /// the store said that it is another's.
    sure: watch::Receiver<Option<Instant>>,
    renewal: Renewal,
}

impl HeldLease {
    /// Takes the lease `name` for `owner`, if it is free or `owner`'s already; or if it is still as it was when it was found to be
    /// `abandoned`.
    pub(crate) async fn take(
        renewer: &LeaseRenewer,
        name: &str,
        owner: Uuid,
        ttl: Duration,
        abandoned: Option<&LeaseInfo>,
        metrics: &Metrics,
    ) -> Result<Option<Self>, StoreError> {
        let asked = Instant::now();
        let store = renewer.store();
        let Some(lease) = acquire(&**store, name, owner, ttl, abandoned).await? else { return Ok(None) };
        metrics.lease(name, "acquired");
        let end = End { name: name.to_owned(), change: "lost", metrics: metrics.clone() };
        let (renewal, sure) = renewer.renew(lease.clone(), ttl, asked);
        Ok(Some(Self { lease, ttl, store: store.clone(), end, sure, renewal }))
    }

    /// Grows with every new owner.
    pub(crate) fn epoch(&self) -> u64 {
        self.lease.epoch
    }

    /// The epoch under which its owner claims what was last written under the epoch `found`; `None` when it is another's by
    /// now. Mostly its own, but leases can be lost, or restored from a backup, and count from 1 again while checkpoints
    /// elsewhere do not: then it is one above `found`, so that those who wrote before are still refused.
    pub(crate) async fn epoch_above(&self, found: u64) -> Result<Option<u64>, StoreError> {
        if self.lease.epoch >= found {
            return Ok(Some(self.lease.epoch));
        }
        // Usually somebody else has taken it over and claimed already.
        if !self.store.renew_lease(&self.lease, self.ttl).await? {
            return Ok(None);
        }
        tracing::warn!(
            lease = self.lease.name,
            epoch = self.lease.epoch,
            found,
            "the epoch of a lease is below that of the checkpoint: leases were lost or restored; it is raised above it"
        );
        Ok(Some(found.saturating_add(1)))
    }

    /// Waits until it is lost, or may be. Cancel-safe.
    pub(crate) async fn lost(&mut self) {
        lost(&mut self.sure).await;
    }

    /// The same, for whoever uses this meanwhile.
    pub(crate) fn loss(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut sure = self.sure.clone();
        async move { lost(&mut sure).await }
    }

    /// Gives it back, so that somebody else can have it at once.
    pub(crate) async fn release(self) {
        let Self { lease, store, mut end, renewal, .. } = self;
        // First: otherwise a renewal would find it given back, and report a loss.
        drop(renewal);
        end.change = "released";
        if let Err(error) = store.release_lease(&lease).await {
            tracing::warn!(lease = lease.name, %error, "a lease could not be given back; it runs out by itself");
        }
    }
}

/// Acquires the lease `name`, or takes it over if it is still as it was when it was found to be `abandoned`.
pub(crate) async fn acquire(
    store: &dyn EventStore,
    name: &str,
    owner: Uuid,
    ttl: Duration,
    abandoned: Option<&LeaseInfo>,
) -> Result<Option<Lease>, StoreError> {
    if let Some(lease) = store.acquire_lease(name, owner, ttl).await? {
        return Ok(Some(lease));
    }
    let Some(seen) = abandoned else { return Ok(None) };
    let taken = store.take_over_lease(seen, owner, ttl).await?;
    if taken.is_some() {
        tracing::warn!(
            lease = name, holder = %seen.lease.owner, expires_at = %seen.expires_at, ttl = ?seen.ttl,
            "took over a lease that was not renewed for its TTL: the clock that wrote its expiry was ahead"
        );
    }
    Ok(taken)
}

/// Counts the end: a lease that was not given back is lost, whoever has it next.
struct End {
    name: String,
    change: &'static str,
    metrics: Metrics,
}

impl Drop for End {
    fn drop(&mut self) {
        self.metrics.lease(&self.name, self.change);
    }
}

async fn lost(sure: &mut watch::Receiver<Option<Instant>>) {
    loop {
        let Some(until) = *sure.borrow_and_update() else { return };
        tokio::select! {
            () = sleep_until(until) => {
                // A renewal may have come in at the last moment.
                if sure.borrow().is_none_or(|until| until <= Instant::now()) {
                    return;
                }
            }
            // The renewal ends only with a loss, which is then the last value.
            changed = sure.changed() => if changed.is_err() && sure.borrow().is_some() {
                sleep_until(until).await;
                return;
            },
        }
    }
}
