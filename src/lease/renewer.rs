//! Renewal of the leases that a node holds: one store call for all leases with the same TTL.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use crate::store::{EventStore, Lease};
use crate::supervised::Task;

/// The renewals of one node on one event store. Cheap to clone.
#[derive(Clone)]
pub(crate) struct LeaseRenewer {
    store: Arc<dyn EventStore>,
    /// One group for each TTL. A group ends with its last lease.
    groups: Arc<Mutex<HashMap<Duration, Weak<Group>>>>,
}

/// The leases with one TTL, and the task that renews them.
struct Group {
    held: Arc<Held>,
    task: Task,
}

#[derive(Default)]
struct Held {
    leases: Mutex<Leases>,
}

#[derive(Default)]
struct Leases {
    by_id: BTreeMap<u64, Renewed>,
    next_id: u64,
}

/// A lease to be renewed.
struct Renewed {
    lease: Lease,
    /// End of the lease by this process's clock, counted from before the last successful call. `None` after a loss.
    until: watch::Sender<Option<Instant>>,
}

/// The renewal of one lease; ends when it is dropped.
pub(super) struct Renewal {
    id: u64,
    group: Arc<Group>,
}

impl LeaseRenewer {
    pub(crate) fn new(store: Arc<dyn EventStore>) -> Self {
        Self { store, groups: Arc::default() }
    }

    pub(super) fn store(&self) -> &Arc<dyn EventStore> {
        &self.store
    }

    /// Renews a lease that was taken at `taken_at`, at least every third of its TTL. Must be called within a tokio runtime.
    ///
    /// The receiver has the end of the lease by this process's clock, or `None` after a loss.
    pub(super) fn renew(
        &self,
        lease: Lease,
        ttl: Duration,
        taken_at: Instant,
    ) -> (Renewal, watch::Receiver<Option<Instant>>) {
        let (sender, until) = watch::channel(Some(taken_at + ttl));
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|_, group| group.strong_count() > 0);
        let running = groups.get(&ttl).and_then(Weak::upgrade).filter(|group| !group.task.is_finished());
        let group = running.unwrap_or_else(|| {
            let held = Arc::<Held>::default();
            let task = Task::spawn(renew(self.store.clone(), held.clone(), ttl, taken_at + ttl / 3));
            let group = Arc::new(Group { held, task });
            groups.insert(ttl, Arc::downgrade(&group));
            group
        });
        let id = group.held.insert(Renewed { lease, until: sender });
        (Renewal { id, group }, until)
    }
}

impl fmt::Debug for LeaseRenewer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseRenewer").finish_non_exhaustive()
    }
}

impl Drop for Renewal {
    fn drop(&mut self) {
        self.group.held.leases().by_id.remove(&self.id);
    }
}

impl Held {
    fn leases(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, renewed: Renewed) -> u64 {
        let mut leases = self.leases();
        let id = leases.next_id;
        leases.next_id += 1;
        leases.by_id.insert(id, renewed);
        id
    }

    fn list(&self) -> (Vec<u64>, Vec<Lease>) {
        self.leases().by_id.iter().map(|(id, renewed)| (*id, renewed.lease.clone())).unzip()
    }

    /// The store has renewed the lease, or another owner has it. Ignores one that is not renewed any more.
    fn answered(&self, id: u64, renewed: bool, until: Instant) {
        let mut leases = self.leases();
        let Some(held) = leases.by_id.get(&id) else { return };
        if renewed {
            held.until.send_replace(Some(until));
            return;
        }
        let Lease { name, epoch, .. } = &held.lease;
        tracing::warn!(lease = name, epoch, "a lease was taken over by another node");
        held.until.send_replace(None);
        leases.by_id.remove(&id);
    }

    /// Removes the leases that have run out.
    fn expire(&self, now: Instant) {
        self.leases().by_id.retain(|_, held| {
            let live = held.until.borrow().is_some_and(|until| now < until);
            if !live {
                held.until.send_replace(None);
            }
            live
        });
    }
}

async fn renew(store: Arc<dyn EventStore>, held: Arc<Held>, ttl: Duration, mut next: Instant) {
    loop {
        sleep_until(next).await;
        let (ids, leases) = held.list();
        let asked = Instant::now();
        // All of them, also those that are not due yet: they are then due together.
        // An answer that takes longer is worth as little as none: better ask again.
        let answer = match leases.is_empty() {
            true => Ok(Ok(Vec::new())),
            false => timeout(ttl / 3, store.renew_leases(&leases, ttl)).await,
        };
        next = match answer {
            Ok(Ok(renewed)) => {
                for (id, renewed) in ids.into_iter().zip(renewed) {
                    held.answered(id, renewed, asked + ttl);
                }
                asked + ttl / 3
            }
            Ok(Err(error)) => {
                tracing::warn!(leases = leases.len(), %error, "leases could not be renewed");
                Instant::now() + ttl / 10
            }
            Err(_) => {
                tracing::warn!(
                    leases = leases.len(),
                    "the store did not answer when leases were to be renewed"
                );
                Instant::now() + ttl / 10
            }
        };
        held.expire(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::store::MemoryStore;

    const TTL: Duration = Duration::from_secs(6);

    async fn take(store: &Arc<dyn EventStore>, name: &str) -> Lease {
        store.acquire_lease(name, Uuid::nil(), TTL).await.unwrap().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn one_task_renews_the_leases_with_one_ttl() {
        let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let renewer = LeaseRenewer::new(store.clone());
        let began = Instant::now();
        let (a, until_a) = renewer.renew(take(&store, "a").await, TTL, began);
        tokio::time::sleep(TTL / 6).await;
        let (b, until_b) = renewer.renew(take(&store, "b").await, TTL, Instant::now());
        let (other, _) = renewer.renew(take(&store, "other").await, TTL * 2, began);
        assert!(Arc::ptr_eq(&a.group, &b.group) && !Arc::ptr_eq(&a.group, &other.group));
        tokio::time::sleep(TTL / 4).await;
        // Both at a third of the TTL of the first.
        assert_eq!(*until_a.borrow(), Some(began + TTL / 3 + TTL));
        assert_eq!(*until_b.borrow(), *until_a.borrow());
        drop(a);
        tokio::time::sleep(TTL).await;
        assert_eq!(*until_a.borrow(), Some(began + TTL / 3 + TTL));
        assert_eq!(*until_b.borrow(), Some(began + TTL / 3 * 4 + TTL));
        let task = Arc::downgrade(&b.group);
        drop(b);
        assert!(task.upgrade().is_none(), "it ends with its last lease");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_lease_does_not_end_the_others() {
        let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
        let renewer = LeaseRenewer::new(store.clone());
        let lost = take(&store, "lost").await;
        let (_lost, until_lost) = renewer.renew(lost.clone(), TTL, Instant::now());
        let (_kept, until_kept) = renewer.renew(take(&store, "kept").await, TTL, Instant::now());
        store.release_lease(&lost).await.unwrap();
        store.acquire_lease("lost", Uuid::max(), TTL).await.unwrap().unwrap();
        for _ in 0..4 {
            tokio::time::sleep(TTL / 2).await;
            assert_eq!(*until_lost.borrow(), None);
            assert!(until_kept.borrow().is_some_and(|until| until > Instant::now() + TTL / 3));
        }
    }
}
