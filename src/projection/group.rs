//! The partitions of a projection on one node: which of them it should own, and how all of them are doing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select_all;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use super::balance::wanted;
use super::shape::Shape;
use super::{PartitionStatus, ProjectionState, ProjectionStatus};
use crate::future::BoxFuture;
use crate::lease::{Board, HeldLease, Sight, View};
use crate::partition::Partition;
use crate::supervised::{Inbox, Work};
use crate::telemetry::Metrics;

/// How often at most the sum of the partitions' states is told.
const SUM: Duration = Duration::from_millis(10);

/// What each partition adds to that: the sum of many costs more.
const SUM_SHARE: Duration = Duration::from_micros(200);

/// A partition, as its group sees it.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) partition: Partition,
    /// The name of its lease.
    pub(super) lease: String,
    /// Whether this node is to own it.
    pub(super) permit: watch::Sender<bool>,
    pub(super) status: watch::Receiver<ProjectionStatus>,
}

/// Nothing is ever told to a group.
pub(super) enum Never {}

/// What the actor supervises.
pub(super) struct Group {
    pub(super) name: String,
    pub(super) shape: Shape,
    pub(super) seats: Arc<[Seat]>,
    pub(super) board: Board,
    pub(super) node: Uuid,
    pub(super) lease: Duration,
    pub(super) metrics: Metrics,
    pub(super) status: watch::Sender<ProjectionStatus>,
}

impl Work for Arc<Group> {
    type Control = Never;

    fn name(&self) -> String {
        format!("balance of projection {}", self.name)
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

impl Group {
    async fn balance(&self, mut inbox: Inbox<Never>) {
        let mut sight = self.board.watch(self.lease);
        sight.mark_changed();
        let mut statuses: Vec<_> = self.seats.iter().map(|seat| seat.status.clone()).collect();
        let pause = SUM.max(SUM_SHARE * u32::try_from(statuses.len()).unwrap_or(u32::MAX));
        let mut membership: Option<HeldLease> = None;
        // After a failure of the store, or when somebody else was quicker.
        let mut ask_at = Instant::now();
        while !inbox.is_stopping() {
            let Sight { view, .. } = sight.borrow_and_update().clone();
            self.tell(view.as_deref());
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
                ask_at = Instant::now() + self.board.pace();
            }
            if let Some(view) = &view {
                self.share_out(view, membership.is_some());
            }
            let told = Instant::now();
            tokio::select! {
                () = inbox.stopping() => {}
                () = lost(&mut membership) => {
                    tracing::warn!(projection = self.name, "this node does not count for the partitions any more");
                    membership = None;
                }
                _ = sight.changed() => {}
                () = sleep_until(ask_at), if membership.is_none() && self.fits() => {}
                () = async {
                    // An error says that a partition has ended: nothing changes there any more.
                    let changed = statuses.iter_mut().map(|status| Box::pin(async {
                        if status.changed().await.is_err() {
                            std::future::pending::<()>().await;
                        }
                    }));
                    select_all(changed).await;
                    sleep_until(told + pause).await;
                } => {}
            }
        }
        // At once, and before the partitions are given back: others then take them without waiting.
        if let Some(membership) = membership {
            membership.release().await;
        }
    }

    /// Whether every partition could work here, as far as is known.
    fn fits(&self) -> bool {
        self.seats.iter().all(|seat| seat.status.borrow().fits)
    }

    /// Makes this node one of those that share the partitions: takes the first membership that nobody holds.
    async fn join(&self, view: &View) -> Option<HeldLease> {
        for slot in 0.. {
            let name = self.shape.member(slot);
            if view.owner(&name).is_some_and(|owner| owner != self.node) {
                continue;
            }
            let abandoned = view.abandoned(&name);
            let renewer = self.board.renewer();
            let taken =
                HeldLease::take(renewer, &name, self.node, self.lease, abandoned, &self.metrics).await;
            match taken {
                Ok(Some(lease)) => {
                    tracing::info!(
                        projection = self.name,
                        slot,
                        "this node takes its share of the partitions"
                    );
                    self.board.hint();
                    return Some(lease);
                }
                // Somebody else was quicker.
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(projection = self.name, %error, "could not say that this node takes partitions");
                    return None;
                }
            }
        }
        None
    }

    /// Says which partitions this node is to own.
    fn share_out(&self, view: &View, member: bool) {
        let owners: Vec<_> = self.owners(view).collect();
        let mut members: BTreeSet<Uuid> = (0..)
            .map_while(|slot| view.leases.get(&self.shape.member(slot)))
            .filter(|posted| posted.live)
            .map(|posted| posted.owner)
            .collect();
        // What the board shows may be a little older.
        if member {
            members.insert(self.node);
        } else {
            members.remove(&self.node);
        }
        let wanted = wanted(&owners, &members, self.node, &self.name);
        for (index, seat) in self.seats.iter().enumerate() {
            let permit = wanted.contains(&index);
            seat.permit.send_if_modified(|permitted| std::mem::replace(permitted, permit) != permit);
        }
    }

    fn owners(&self, view: &View) -> impl Iterator<Item = Option<Uuid>> {
        self.seats.iter().map(|seat| view.owner(&seat.lease))
    }

    /// Tells how all of them are doing.
    fn tell(&self, view: Option<&View>) {
        let sum = sum(&self.seats, view);
        self.status.send_if_modified(|status| {
            let news = *status != sum;
            *status = sum;
            news
        });
    }
}

/// How all partitions are doing.
pub(super) fn sum(seats: &[Seat], view: Option<&View>) -> ProjectionStatus {
    let partitions = seats.iter().map(|seat| PartitionStatus {
        partition: seat.partition,
        owner: view.and_then(|view| view.owner(&seat.lease)),
        status: seat.status.borrow().clone(),
    });
    ProjectionStatus::sum(partitions.collect())
}

/// Waits until it is lost; for ever if there is none. Cancel-safe.
async fn lost(lease: &mut Option<HeldLease>) {
    match lease {
        Some(lease) => lease.lost().await,
        None => std::future::pending().await,
    }
}
