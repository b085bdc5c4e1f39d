//! The scheduler of a node: acquires the lease, and starts what is due while it holds it.

mod shared;
mod term;

use std::sync::Arc;
use std::time::Duration;

use ractor::{ActorCell, SpawnErr};
use tokio::sync::watch;
use tokio::time::sleep;

pub(crate) use self::shared::SchedulerServices;
use self::shared::Shared;
use self::term::SchedulerTerm;
use super::status::{SchedulerState, SchedulerStatus};
use crate::backoff::Backoff;
use crate::future::BoxFuture;
use crate::lease::{HeldLease, Observation};
use crate::supervised::{Inbox, StopError, Supervised, Work};

/// Name of the lease, and of the actor.
const NAME: &str = "scheduler";

/// TTL of the lease: after this time, another node takes over.
const LEASE: Duration = Duration::from_secs(6);

/// Longest interval at which a standby looks for a free lease.
const STANDBY_POLL: Duration = Duration::from_millis(500);

/// A handle to the scheduler. Cheap to clone; dropping it has no effect.
#[derive(Debug, Clone)]
pub(crate) struct Scheduler {
    actor: Supervised<()>,
    status: watch::Receiver<SchedulerStatus>,
}

impl Scheduler {
    /// Starts the scheduler under `supervisor`.
    pub(crate) async fn spawn(services: SchedulerServices, supervisor: ActorCell) -> Result<Self, SpawnErr> {
        let (status, receiver) = watch::channel(SchedulerStatus::new(SchedulerState::Standby));
        let work = SchedulerWork { shared: Arc::new(Shared { services, status }) };
        Ok(Self { actor: Supervised::spawn(work, Some(supervisor)).await?, status: receiver })
    }

    pub(crate) fn status(&self) -> SchedulerStatus {
        self.status.borrow().clone()
    }

    /// Starts nothing more, waits for the commands in flight, and releases the lease.
    pub(crate) async fn stop(&self, patience: Duration) -> Result<(), StopError> {
        self.actor.stop(patience).await
    }
}

/// The work that the actor supervises.
struct SchedulerWork {
    shared: Arc<Shared>,
}

impl Work for SchedulerWork {
    type Control = ();

    fn name(&self) -> String {
        NAME.to_owned()
    }

    fn run(&self, inbox: Inbox<()>) -> BoxFuture<'static, ()> {
        Box::pin(run(self.shared.clone(), inbox))
    }

    fn panicked(&self, panic: &str) {
        self.shared.failed(format!("the scheduler panicked: {panic}"));
    }

    fn ended(&self) {
        self.shared.set(SchedulerState::Stopped);
    }
}

async fn run(shared: Arc<Shared>, mut inbox: Inbox<()>) {
    // A copied store would execute the commands of the original.
    if let Some(reason) = shared.services.store.info().adoption.problem() {
        tracing::error!(reason, "starting no scheduled command");
        shared.set(SchedulerState::Incompatible { reason });
        return inbox.stopping().await;
    }
    let mut views = shared.services.lease_watcher.watch(LEASE);
    loop {
        let Some(mut lease) = stand_by(&shared, &mut views, &mut inbox).await else { return };
        SchedulerTerm::new(&shared, &lease).run(&mut lease, &mut inbox).await;
        lease.release().await;
        if inbox.is_stopping() {
            return;
        }
        shared.set(SchedulerState::Standby);
    }
}

/// Waits for the lease. Returns `None` if the node stops first.
async fn stand_by(
    shared: &Shared,
    views: &mut watch::Receiver<Observation>,
    inbox: &mut Inbox<()>,
) -> Option<HeldLease> {
    let SchedulerServices { lease_watcher, metrics, node, .. } = &shared.services;
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
    loop {
        let mut wait = STANDBY_POLL;
        let view = views.borrow_and_update().view.clone();
        let has_owner =
            view.as_ref().is_some_and(|view| view.owner(NAME).is_some_and(|owner| owner != *node));
        if let Some(view) = view.filter(|_| !has_owner) {
            let abandoned = view.abandoned(NAME);
            match HeldLease::take(lease_watcher.renewer(), NAME, *node, LEASE, abandoned, metrics).await {
                Ok(Some(lease)) => return Some(lease),
                Ok(None) => shared.set(SchedulerState::Standby),
                Err(error) => {
                    tracing::warn!(%error, "could not acquire the lease of the scheduler");
                    shared.failed(error.to_string());
                    wait = backoff.next();
                }
            }
        } else if has_owner {
            shared.set(SchedulerState::Standby);
        }
        tokio::select! {
            () = sleep(wait) => {}
            // The channel closes with the watcher, which this node holds.
            _ = views.changed() => {}
            () = inbox.stopping() => return None,
        }
    }
}
