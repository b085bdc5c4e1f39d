//! The node's view of all leases and controls: one watcher polls for all tasks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, SemaphorePermit, watch};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::renewals::Renewals;
use super::renewer::LeaseRenewer;
use crate::backoff::Backoff;
use crate::store::{EventStore, LeaseInfo, ProjectionControl, StoreError};
use crate::supervised::Task;

/// Minimum interval between two polls.
const FASTEST: Duration = Duration::from_millis(10);

/// Maximum interval between two polls: the time without an owner after a release.
const SLOWEST: Duration = Duration::from_millis(250);

/// Increase of the poll interval for each watcher: 40 queries per second in total.
const EACH: Duration = Duration::from_millis(25);

/// Maximum number of leases of partitions that a node acquires at the same time.
///
/// A lease runs from before the call. 256 calls in the queue of a SQLite store take longer than a
/// TTL, and a renewal waits after them.
const ACQUIRING: usize = 4;

/// A lease in the view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LeaseEntry {
    pub(crate) owner: Uuid,
    pub(crate) epoch: u64,
    /// Whether the lease is held: live by the store's clock, and renewed.
    pub(crate) live: bool,
    /// The observed lease, if it is live by the store's clock but not renewed: it can be taken
    /// over.
    pub(crate) abandoned: Option<LeaseInfo>,
}

/// Result of the last poll.
#[derive(Debug, Clone)]
pub(crate) struct LeaseView {
    /// Start of the poll: later changes may be missing.
    pub(crate) asked: Instant,
    /// All leases, by name.
    pub(crate) leases: BTreeMap<String, LeaseEntry>,
    /// What operators control, by projection.
    pub(crate) controls: BTreeMap<String, ProjectionControl>,
}

impl LeaseView {
    /// Returns the holder of the lease, if there is one.
    pub(crate) fn owner(&self, lease: &str) -> Option<Uuid> {
        self.leases.get(lease).filter(|posted| posted.live).map(|posted| posted.owner)
    }

    /// Returns the observed lease if it can be taken over although it is live by the store's clock.
    pub(crate) fn abandoned(&self, lease: &str) -> Option<&LeaseInfo> {
        self.leases.get(lease)?.abandoned.as_ref()
    }

    /// Returns what operators control of a projection.
    pub(crate) fn control(&self, projection: &str) -> ProjectionControl {
        self.controls.get(projection).copied().unwrap_or_default()
    }

    fn same(&self, other: &Self) -> bool {
        self.leases == other.leases && self.controls == other.controls
    }
}

/// The last view, if there is one, and the reason why there is no newer one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Observation {
    pub(crate) view: Option<Arc<LeaseView>>,
    pub(crate) error: Option<StoreError>,
}

/// The lease watcher of one node. Cheap to clone; it ends with the last clone.
///
/// It queries the store only after the first call of [`watch`](Self::watch).
#[derive(Debug, Clone)]
pub(crate) struct LeaseWatcher {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    observation: watch::Receiver<Observation>,
    /// Poll interval; `None` while there is no watcher.
    every: watch::Sender<Option<Duration>>,
    hint: Arc<Notify>,
    /// Number of watchers.
    watchers: AtomicU32,
    renewer: LeaseRenewer,
    acquiring: Semaphore,
    _task: Task,
}

impl LeaseWatcher {
    /// Starts the watcher. Must be called within a tokio runtime.
    pub(crate) fn start(store: Arc<dyn EventStore>) -> Self {
        let (sender, observation) = watch::channel(Observation::default());
        let every = watch::Sender::new(None);
        let hint = Arc::new(Notify::new());
        let renewer = LeaseRenewer::new(store.clone());
        let task = Task::spawn(poll_loop(store, sender, every.subscribe(), hint.clone()));
        let (watchers, acquiring) = (AtomicU32::new(0), Semaphore::new(ACQUIRING));
        Self {
            inner: Arc::new(Inner { observation, every, hint, watchers, renewer, acquiring, _task: task }),
        }
    }

    /// Returns the views from now on, polled often enough for leases of `ttl`.
    pub(crate) fn watch(&self, ttl: Duration) -> watch::Receiver<Observation> {
        let wanted = (ttl / 6).clamp(FASTEST, SLOWEST);
        self.inner.every.send_if_modified(|every| {
            let faster = every.is_none_or(|every| wanted < every);
            if faster {
                *every = Some(wanted);
            }
            faster
        });
        self.inner.watchers.fetch_add(1, Ordering::Relaxed);
        self.inner.observation.clone()
    }

    /// Returns the interval at which each watcher may send its own queries.
    ///
    /// It grows with the number of watchers, so that their total load stays bounded.
    pub(crate) fn poll_interval(&self) -> Duration {
        (EACH * self.inner.watchers.load(Ordering::Relaxed)).max(SLOWEST)
    }

    /// Returns the renewer, which renews the leases of the node's projections together.
    pub(crate) fn renewer(&self) -> &LeaseRenewer {
        &self.inner.renewer
    }

    /// Waits for a permit to acquire a lease. Cancel-safe.
    pub(crate) async fn permit_to_acquire(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed.
        self.inner.acquiring.acquire().await.ok()
    }

    /// Returns the current view.
    pub(crate) fn view(&self) -> Option<Arc<LeaseView>> {
        self.inner.observation.borrow().view.clone()
    }

    /// Requests a poll, because a task of this node has changed something.
    pub(crate) fn hint(&self) {
        self.inner.hint.notify_one();
    }
}

async fn poll_loop(
    store: Arc<dyn EventStore>,
    observation: watch::Sender<Observation>,
    mut every: watch::Receiver<Option<Duration>>,
    hint: Arc<Notify>,
) {
    let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(2));
    let mut renewals = Renewals::default();
    loop {
        let Some(wait) = *every.borrow_and_update() else {
            // An error means that no watcher is left.
            if every.changed().await.is_err() {
                return;
            }
            continue;
        };
        match see(&*store, &mut renewals).await {
            Ok(view) => {
                backoff.succeeded();
                observation.send_if_modified(|observation| {
                    let news = observation.error.take().is_some()
                        || !observation.view.as_ref().is_some_and(|known| known.same(&view));
                    // Also if the view differs only by its time.
                    observation.view = Some(Arc::new(view));
                    news
                });
                tokio::select! {
                    () = sleep(wait) => {}
                    () = hint.notified() => {}
                    changed = every.changed() => if changed.is_err() {
                        return;
                    },
                }
            }
            Err(error) => {
                tracing::warn!(%error, "could not poll leases and controls");
                observation.send_modify(|observation| observation.error = Some(error));
                sleep(backoff.next()).await;
            }
        }
    }
}

async fn see(store: &dyn EventStore, renewals: &mut Renewals) -> Result<LeaseView, StoreError> {
    let asked = Instant::now();
    let leases = store.leases().await?.into_iter().map(|info| {
        let abandoned = renewals.is_abandoned(&info);
        let (owner, epoch, live) = (info.lease.owner, info.lease.epoch, info.live && !abandoned);
        let name = info.lease.name.clone();
        (name, LeaseEntry { owner, epoch, live, abandoned: abandoned.then_some(info) })
    });
    let leases = leases.collect();
    Ok(LeaseView { asked, leases, controls: store.controls().await? })
}
