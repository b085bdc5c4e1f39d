//! Lease handling of a holder: acquire, renew in the background, detect a loss, release.
//!
//! Also the view of all leases.

mod renewals;
mod renewer;
mod term;
mod watcher;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

pub(crate) use self::renewals::Renewals;
pub(crate) use self::renewer::LeaseRenewer;
use self::renewer::Renewal;
pub(crate) use self::term::CurrentTerm;
use self::term::LeaseTerm;
pub(crate) use self::watcher::{LeaseView, LeaseWatcher, Observation};
use crate::invalid_option::{DAY, InvalidOption, within};
use crate::store::{EventStore, Lease, LeaseInfo, StoreError};
use crate::telemetry::Metrics;

/// Checks the duration of a lease.
///
/// A shorter lease is lost if a renewal is a little late. A longer one makes a successor wait for
/// days after the death of the holder.
pub(crate) fn check(option: &'static str, ttl: Duration) -> Result<(), InvalidOption> {
    within(option, ttl, Duration::from_millis(50)..=DAY)
}

/// A lease held by this process, as far as it knows.
///
/// If dropped without [`release`](Self::release), the lease expires.
pub(crate) struct HeldLease {
    lease: Lease,
    ttl: Duration,
    store: Arc<dyn EventStore>,
    end: End,
    /// Time until which no other owner can have the lease, by this process's clock.
    ///
    /// Counted from before the call to the store. `None` after the store reported another owner.
    sure: watch::Receiver<Option<Instant>>,
    renewal: Renewal,
}

impl HeldLease {
    /// Acquires the lease `name` for `owner`, if it is free or `owner` already holds it.
    ///
    /// Also takes it over if it still equals the `abandoned` observation.
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

    /// Returns the lease as the store has it, except its end.
    pub(crate) fn lease(&self) -> &Lease {
        &self.lease
    }

    /// Returns the fencing token; it grows with every new owner.
    pub(crate) fn epoch(&self) -> u64 {
        self.lease.epoch
    }

    /// Returns the epoch for claiming a checkpoint that was written under the epoch `found`.
    ///
    /// `None` if the lease has another owner by now. Usually the epoch of the lease. If leases were
    /// lost or restored from a backup, they count from 1 again while checkpoints in other databases
    /// do not. Then the result is `found` + 1, so that earlier owners stay fenced (I7).
    pub(crate) async fn epoch_above(&self, found: u64) -> Result<Option<u64>, StoreError> {
        if self.lease.epoch >= found {
            return Ok(Some(self.lease.epoch));
        }
        // Usually another owner has taken the lease over and claimed the checkpoint already.
        if self.store.renew_leases(std::slice::from_ref(&self.lease), self.ttl).await? != [true] {
            return Ok(None);
        }
        tracing::warn!(
            lease = self.lease.name,
            epoch = self.lease.epoch,
            found,
            "raising the epoch of a lease above that of the checkpoint: leases were lost or restored"
        );
        Ok(Some(found.saturating_add(1)))
    }

    /// Returns the term of this lease, which other tasks can check.
    pub(crate) fn term(&self) -> LeaseTerm {
        LeaseTerm::new(self.sure.clone())
    }

    /// Waits until the lease is lost, or may be. Cancel-safe.
    pub(crate) async fn lost(&mut self) {
        lost(&mut self.sure).await;
    }

    /// Returns a future that waits for the loss without borrowing the lease.
    pub(crate) fn loss(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut sure = self.sure.clone();
        async move { lost(&mut sure).await }
    }

    /// Releases the lease, so that another owner can acquire it at once.
    pub(crate) async fn release(self) {
        let Self { lease, store, mut end, renewal, .. } = self;
        // First: otherwise a renewal would find the lease released and report a loss.
        drop(renewal);
        end.change = "released";
        if let Err(error) = store.release_lease(&lease).await {
            tracing::warn!(lease = lease.name, %error, "could not release a lease; it expires");
        }
    }
}

/// Acquires the lease `name`, or takes it over if it still equals the `abandoned` observation.
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
            "took over a lease that was not renewed for its TTL: the clock of its last writer was ahead"
        );
    }
    Ok(taken)
}

/// Counts the end of a lease: a lease that was not released counts as lost.
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
                // A renewal may have arrived at the last moment.
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
