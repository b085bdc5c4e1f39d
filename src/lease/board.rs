//! What a node knows of all leases, and of who is paused: one watcher looks for everybody.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, SemaphorePermit, watch};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::renewals::Renewals;
use super::renewer::LeaseRenewer;
use crate::backoff::Backoff;
use crate::store::{EventStore, LeaseInfo, StoreError};
use crate::supervised::Task;

/// How often it looks at most.
const FASTEST: Duration = Duration::from_millis(10);

/// How often it looks at least: how long after an orderly end nobody owns what was given back.
const SLOWEST: Duration = Duration::from_millis(250);

/// What one more who watches costs the others in patience: 40 questions a second in all.
const EACH: Duration = Duration::from_millis(25);

/// Maximum number of leases of partitions that a node acquires at the same time.
///
/// A lease runs from before the call. 256 calls in the queue of a SQLite store take longer than a TTL, and a renewal waits after them.
const ACQUIRING: usize = 4;

/// A lease as the board has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Posted {
    pub(crate) owner: Uuid,
    pub(crate) epoch: u64,
    /// Whether it is held: live by the store's clock, and renewed.
    pub(crate) live: bool,
    /// The lease as it was seen, if it is live by the store's clock but nothing renews it: then it can be taken over.
    pub(crate) abandoned: Option<LeaseInfo>,
}

/// What the watcher saw last.
#[derive(Debug, Clone)]
pub(crate) struct View {
    /// When it began to look: what happened later may be missing here.
    pub(crate) asked: Instant,
    /// All leases, by name.
    pub(crate) leases: BTreeMap<String, Posted>,
    /// Who is to stand still.
    pub(crate) paused: BTreeSet<String>,
}

impl View {
    /// Who holds the lease, if anybody.
    pub(crate) fn owner(&self, lease: &str) -> Option<Uuid> {
        self.leases.get(lease).filter(|posted| posted.live).map(|posted| posted.owner)
    }

    /// The lease as it was seen, if it can be taken over although the store's clock says that it is live.
    pub(crate) fn abandoned(&self, lease: &str) -> Option<&LeaseInfo> {
        self.leases.get(lease)?.abandoned.as_ref()
    }

    fn same(&self, other: &Self) -> bool {
        self.leases == other.leases && self.paused == other.paused
    }
}

/// The last view, if there was one; and why there is no newer one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sight {
    pub(crate) view: Option<Arc<View>>,
    pub(crate) error: Option<StoreError>,
}

/// The board of one node. Cheap to clone; it ends with the last clone. Nothing is asked of the store before somebody
/// [watches](Self::watch).
#[derive(Debug, Clone)]
pub(crate) struct Board {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    sight: watch::Receiver<Sight>,
    /// How often to look; `None` while nobody wants to know.
    every: watch::Sender<Option<Duration>>,
    hint: Arc<Notify>,
    /// How many watch.
    watchers: AtomicU32,
    renewer: LeaseRenewer,
    acquiring: Semaphore,
    _task: Task,
}

impl Board {
    /// Must be called within a tokio runtime.
    pub(crate) fn start(store: Arc<dyn EventStore>) -> Self {
        let (sender, sight) = watch::channel(Sight::default());
        let every = watch::Sender::new(None);
        let hint = Arc::new(Notify::new());
        let renewer = LeaseRenewer::new(store.clone());
        let task = Task::spawn(look(store, sender, every.subscribe(), hint.clone()));
        let (watchers, acquiring) = (AtomicU32::new(0), Semaphore::new(ACQUIRING));
        Self { inner: Arc::new(Inner { sight, every, hint, watchers, renewer, acquiring, _task: task }) }
    }

    /// What it shows from now on, looked at often enough for leases of `ttl`.
    pub(crate) fn watch(&self, ttl: Duration) -> watch::Receiver<Sight> {
        let wanted = (ttl / 6).clamp(FASTEST, SLOWEST);
        self.inner.every.send_if_modified(|every| {
            let faster = every.is_none_or(|every| wanted < every);
            if faster {
                *every = Some(wanted);
            }
            faster
        });
        self.inner.watchers.fetch_add(1, Ordering::Relaxed);
        self.inner.sight.clone()
    }

    /// How often each of those who watch may ask for something of its own, so that all of them together do not ask too much.
    pub(crate) fn pace(&self) -> Duration {
        (EACH * self.inner.watchers.load(Ordering::Relaxed)).max(SLOWEST)
    }

    /// Renews the leases of the node's projections together.
    pub(crate) fn renewer(&self) -> &LeaseRenewer {
        &self.inner.renewer
    }

    /// Waits for a permit to acquire a lease. Cancel-safe.
    pub(crate) async fn permit_to_acquire(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed.
        self.inner.acquiring.acquire().await.ok()
    }

    /// What it shows now.
    pub(crate) fn view(&self) -> Option<Arc<View>> {
        self.inner.sight.borrow().view.clone()
    }

    /// Somebody here has changed something: worth a look.
    pub(crate) fn hint(&self) {
        self.inner.hint.notify_one();
    }
}

async fn look(
    store: Arc<dyn EventStore>,
    sight: watch::Sender<Sight>,
    mut every: watch::Receiver<Option<Duration>>,
    hint: Arc<Notify>,
) {
    let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(2));
    let mut renewals = Renewals::default();
    loop {
        let Some(wait) = *every.borrow_and_update() else {
            // An error says that nobody is left who could want to know.
            if every.changed().await.is_err() {
                return;
            }
            continue;
        };
        match see(&*store, &mut renewals).await {
            Ok(view) => {
                backoff.succeeded();
                sight.send_if_modified(|sight| {
                    let news = sight.error.take().is_some()
                        || !sight.view.as_ref().is_some_and(|known| known.same(&view));
                    // Also when it only is more recent.
                    sight.view = Some(Arc::new(view));
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
                tracing::warn!(%error, "could not look who owns what");
                sight.send_modify(|sight| sight.error = Some(error));
                sleep(backoff.next()).await;
            }
        }
    }
}

async fn see(store: &dyn EventStore, renewals: &mut Renewals) -> Result<View, StoreError> {
    let asked = Instant::now();
    let leases = store.leases().await?.into_iter().map(|info| {
        let abandoned = renewals.is_abandoned(&info);
        let (owner, epoch, live) = (info.lease.owner, info.lease.epoch, info.live && !abandoned);
        let name = info.lease.name.clone();
        (name, Posted { owner, epoch, live, abandoned: abandoned.then_some(info) })
    });
    let leases = leases.collect();
    Ok(View { asked, leases, paused: store.paused().await? })
}
