//! The partitions of a projection on one node: their assignment and their total status.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select_all;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use super::assignment::assign_partitions;
use crate::future::BoxFuture;
use crate::lease::{HeldLease, LeaseView, LeaseWatcher, Observation};
use crate::partition::Partition;
use crate::projection::layout::Layout;
use crate::projection::{PartitionStatus, ProjectionState, ProjectionStatus};
use crate::supervised::{Inbox, Work};
use crate::telemetry::Metrics;

/// Minimum interval between two updates of the total status.
const SUM: Duration = Duration::from_millis(10);

/// Increase of that interval for each partition, because the total of many costs more.
const SUM_SHARE: Duration = Duration::from_micros(200);

/// A partition, as seen by its group.
#[derive(Debug)]
pub(in super::super) struct PartitionSlot {
    pub(in super::super) partition: Partition,
    /// Name of its lease.
    pub(in super::super) lease: String,
    /// Whether this node should own the partition.
    pub(in super::super) assigned: watch::Sender<bool>,
    pub(in super::super) status: watch::Receiver<ProjectionStatus>,
}

/// The message type of a group, which receives no messages.
pub(in super::super) enum Never {}

/// The partition group, supervised as one actor.
pub(in super::super) struct PartitionGroup {
    pub(in super::super) name: String,
    pub(in super::super) layout: Layout,
    pub(in super::super) slots: Arc<[PartitionSlot]>,
    pub(in super::super) lease_watcher: LeaseWatcher,
    pub(in super::super) node: Uuid,
    pub(in super::super) lease: Duration,
    pub(in super::super) metrics: Metrics,
    pub(in super::super) status: watch::Sender<ProjectionStatus>,
}

impl Work for Arc<PartitionGroup> {
    type Control = Never;

    fn name(&self) -> String {
        format!("partition group of projection {}", self.name)
    }

    fn run(&self, inbox: Inbox<Never>) -> BoxFuture<'static, ()> {
        let group = self.clone();
        Box::pin(async move { group.balance(inbox).await })
    }

    fn panicked(&self, _: &str) {}

    fn ended(&self) {
        self.status.send_modify(|status| status.state = ProjectionState::Stopped);
    }
}

impl PartitionGroup {
    async fn balance(&self, mut inbox: Inbox<Never>) {
        let mut observations = self.lease_watcher.watch(self.lease);
        observations.mark_changed();
        let mut statuses: Vec<_> = self.slots.iter().map(|slot| slot.status.clone()).collect();
        let pause = SUM.max(SUM_SHARE * u32::try_from(statuses.len()).unwrap_or(u32::MAX));
        let mut membership: Option<HeldLease> = None;
        // Time of the next attempt to join, after a failure of the store or a lost race.
        let mut ask_at = Instant::now();
        while !inbox.is_stopping() {
            let Observation { view, .. } = observations.borrow_and_update().clone();
            self.publish_status(view.as_deref());
            if !self.fits()
                && let Some(membership) = membership.take()
            {
                membership.release().await;
            }
            if membership.is_none() && ask_at <= Instant::now() && self.fits() {
                membership = match &view {
                    Some(view) => self.join(view).await,
                    None => None,
                };
                ask_at = Instant::now() + self.lease_watcher.poll_interval();
            }
            if let Some(view) = &view {
                self.share_out(view, membership.is_some());
            }
            let published_at = Instant::now();
            tokio::select! {
                () = inbox.stopping() => {}
                () = lost(&mut membership) => {
                    tracing::warn!(projection = self.name, "lost the membership for sharing the partitions");
                    membership = None;
                }
                _ = observations.changed() => {}
                () = sleep_until(ask_at), if membership.is_none() && self.fits() => {}
                () = async {
                    // An error means that a partition has ended: its status does not change any
                    // more.
                    let changed = statuses.iter_mut().map(|status| Box::pin(async {
                        if status.changed().await.is_err() {
                            std::future::pending::<()>().await;
                        }
                    }));
                    select_all(changed).await;
                    sleep_until(published_at + pause).await;
                } => {}
            }
        }
        // Release at once, before the partitions: other nodes then acquire the partitions without
        // waiting.
        if let Some(membership) = membership {
            membership.release().await;
        }
    }

    /// Returns whether every partition fits this node, as far as is known.
    fn fits(&self) -> bool {
        self.slots.iter().all(|slot| slot.status.borrow().fits)
    }

    /// Makes this node a member: acquires the first free membership lease.
    async fn join(&self, view: &LeaseView) -> Option<HeldLease> {
        for slot in 0.. {
            let name = self.layout.member(slot);
            if view.owner(&name).is_some_and(|owner| owner != self.node) {
                continue;
            }
            let abandoned = view.abandoned(&name);
            let renewer = self.lease_watcher.renewer();
            let taken =
                HeldLease::take(renewer, &name, self.node, self.lease, abandoned, &self.metrics).await;
            match taken {
                Ok(Some(lease)) => {
                    tracing::info!(
                        projection = self.name,
                        slot,
                        "joined the members that share the partitions"
                    );
                    self.lease_watcher.hint();
                    return Some(lease);
                }
                // Another node was faster.
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(projection = self.name, %error, "could not acquire a membership for the partitions");
                    return None;
                }
            }
        }
        None
    }

    /// Sets the partitions that this node should own.
    fn share_out(&self, view: &LeaseView, member: bool) {
        let owners: Vec<_> = self.owners(view).collect();
        let mut members: BTreeSet<Uuid> = (0..)
            .map_while(|slot| view.leases.get(&self.layout.member(slot)))
            .filter(|posted| posted.live)
            .map(|posted| posted.owner)
            .collect();
        // The lease view may be a little older.
        if member {
            members.insert(self.node);
        } else {
            members.remove(&self.node);
        }
        let wanted = assign_partitions(&owners, &members, self.node, &self.name);
        for (index, slot) in self.slots.iter().enumerate() {
            let assigned = wanted.contains(&index);
            slot.assigned.send_if_modified(|permitted| std::mem::replace(permitted, assigned) != assigned);
        }
    }

    fn owners(&self, view: &LeaseView) -> impl Iterator<Item = Option<Uuid>> {
        self.slots.iter().map(|slot| view.owner(&slot.lease))
    }

    /// Publishes the total status.
    fn publish_status(&self, view: Option<&LeaseView>) {
        let sum = sum(&self.slots, view);
        self.status.send_if_modified(|status| {
            let news = *status != sum;
            *status = sum;
            news
        });
    }
}

/// Returns the total status of all partitions.
pub(in super::super) fn sum(slots: &[PartitionSlot], view: Option<&LeaseView>) -> ProjectionStatus {
    let partitions = slots.iter().map(|slot| PartitionStatus {
        partition: slot.partition,
        owner: view.and_then(|view| view.owner(&slot.lease)),
        status: slot.status.borrow().clone(),
    });
    ProjectionStatus::sum(partitions.collect())
}

/// Waits until the lease is lost; never returns if there is none. Cancel-safe.
async fn lost(lease: &mut Option<HeldLease>) {
    match lease {
        Some(lease) => lease.lost().await,
        None => std::future::pending().await,
    }
}
