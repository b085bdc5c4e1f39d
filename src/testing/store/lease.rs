//! Leases: ownership, expiry, takeover.

use std::time::Duration;

use chrono::Utc;
use uuid::Uuid;

use super::Database;
use crate::store::{EventStore, Lease};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(100);

/// Waits longer than [`SHORT`].
async fn until_expired() {
    tokio::time::sleep(SHORT * 2).await;
}

async fn renew(store: &dyn EventStore, lease: &Lease, ttl: Duration) -> bool {
    store.renew_leases(std::slice::from_ref(lease), ttl).await.unwrap() == [true]
}

/// Checks the takeover of a live lease.
///
/// It needs the lease unchanged since it was read, and fences the old holder.
pub async fn a_lease_is_taken_over_as_it_was_seen(database: Database) {
    let store = database.open().await;
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    let day = Duration::from_secs(24 * 60 * 60);
    let old = store.acquire_lease("l", a, day).await.unwrap().unwrap();
    let seen = store.leases().await.unwrap().remove(0);
    assert_eq!((seen.ttl, &seen.lease), (day, &old));
    assert!(renew(&*store, &old, LONG).await);
    assert_eq!(
        store.take_over_lease(&seen, b, LONG).await.unwrap(),
        None,
        "the lease was renewed in the meantime"
    );
    let seen = store.leases().await.unwrap().remove(0);
    assert_eq!(seen.ttl, LONG);
    let new = store.take_over_lease(&seen, b, LONG).await.unwrap().unwrap();
    assert_eq!(new, Lease { name: "l".into(), owner: b, epoch: 2 });
    assert_eq!(store.take_over_lease(&seen, a, LONG).await.unwrap(), None, "one of two concurrent takeovers");
    assert!(!renew(&*store, &old, LONG).await);
    assert!(renew(&*store, &new, LONG).await);
    let missing = crate::store::LeaseInfo { lease: Lease { name: "m".into(), ..old }, ..seen };
    assert_eq!(store.take_over_lease(&missing, b, LONG).await.unwrap(), None);
}

/// Checks that only the first node gets the lease. Acquiring it again changes nothing.
pub async fn a_lease_has_one_owner(database: Database) {
    let store = database.open().await;
    let other = database.open().await;
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    let lease = store.acquire_lease("l", a, LONG).await.unwrap().unwrap();
    assert_eq!(lease, Lease { name: "l".into(), owner: a, epoch: 1 });
    assert_eq!(other.acquire_lease("l", b, LONG).await.unwrap(), None);
    assert_eq!(other.acquire_lease("l", a, LONG).await.unwrap(), Some(lease));
    assert_eq!(other.acquire_lease("m", b, LONG).await.unwrap().unwrap().epoch, 1);
}

/// Checks that any node may acquire an expired lease, in a higher epoch.
///
/// Its holder may acquire it in the same epoch, unless another node has acquired it.
pub async fn an_expired_lease_changes_hands(database: Database) {
    let store = database.open().await;
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    store.acquire_lease("l", a, SHORT).await.unwrap().unwrap();
    until_expired().await;
    assert_eq!(store.acquire_lease("l", a, SHORT).await.unwrap().unwrap().epoch, 1);
    until_expired().await;
    let lease = store.acquire_lease("l", b, LONG).await.unwrap().unwrap();
    assert_eq!((lease.owner, lease.epoch), (b, 2));
    assert_eq!(store.acquire_lease("l", a, LONG).await.unwrap(), None);
}

/// Checks that a released lease is free without waiting, and that its former holder has lost it.
pub async fn a_released_lease_is_free_at_once(database: Database) {
    let store = database.open().await;
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    let lease = store.acquire_lease("l", a, LONG).await.unwrap().unwrap();
    store.release_lease(&lease).await.unwrap();
    assert!(!renew(&*store, &lease, LONG).await);
    let lease = store.acquire_lease("l", b, LONG).await.unwrap().unwrap();
    assert_eq!((lease.owner, lease.epoch), (b, 2));
    store.release_lease(&lease).await.unwrap();
    store.release_lease(&lease).await.unwrap();
    assert_eq!(store.acquire_lease("l", a, LONG).await.unwrap().unwrap().epoch, 3);
}

/// Checks that a renewed lease lasts longer.
///
/// An expired lease may be renewed until another node acquires it.
pub async fn a_lease_is_renewed(database: Database) {
    let store = database.open().await;
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    let lease = store.acquire_lease("l", a, SHORT).await.unwrap().unwrap();
    assert!(renew(&*store, &lease, LONG).await);
    until_expired().await;
    assert_eq!(store.acquire_lease("l", b, LONG).await.unwrap(), None);
    assert!(renew(&*store, &lease, SHORT).await);
    until_expired().await;
    assert!(renew(&*store, &lease, LONG).await);
    assert_eq!(store.acquire_lease("l", b, LONG).await.unwrap(), None);
}

/// Checks that a call renews or refuses each lease independently of the others.
pub async fn leases_are_renewed_together(database: Database) {
    let store = database.open().await;
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    assert!(store.renew_leases(&[], LONG).await.unwrap().is_empty());
    let mut leases = Vec::new();
    for name in ["taken", "idle", "released", "again", "kept"] {
        leases.push(store.acquire_lease(name, a, SHORT).await.unwrap().unwrap());
    }
    until_expired().await;
    let taken = store.acquire_lease("taken", b, LONG).await.unwrap().unwrap();
    store.release_lease(&leases[2]).await.unwrap();
    // The same owner in a later epoch: the lease of the earlier one is lost.
    let other = store.acquire_lease("again", b, LONG).await.unwrap().unwrap();
    store.release_lease(&other).await.unwrap();
    let reacquired = store.acquire_lease("again", a, LONG).await.unwrap().unwrap();
    leases.push(Lease { name: "unknown".into(), owner: a, epoch: 1 });
    leases.push(reacquired.clone());
    let before = Utc::now();
    let renewed = store.renew_leases(&leases, LONG).await.unwrap();
    assert_eq!(renewed, [false, true, false, false, true, false, true]);
    let found = database.open().await.leases().await.unwrap();
    let of = |name: &str| found.iter().find(|info| info.lease.name == name).unwrap();
    assert_eq!((&of("taken").lease, &of("again").lease), (&taken, &reacquired));
    for name in ["idle", "kept", "again"] {
        assert!(of(name).live && of(name).ttl == LONG && of(name).expires_at > before + LONG / 2, "{name}");
        assert_eq!(store.acquire_lease(name, b, LONG).await.unwrap(), None);
    }
    assert!(!of("released").live);
    assert_eq!(store.acquire_lease("released", b, LONG).await.unwrap().unwrap().epoch, 2);
}

/// Checks that a stale lease holder can neither renew nor release.
pub async fn stale_holders_cannot_renew_or_release(database: Database) {
    let store = database.open().await;
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    let old = store.acquire_lease("l", a, SHORT).await.unwrap().unwrap();
    until_expired().await;
    let new = store.acquire_lease("l", b, LONG).await.unwrap().unwrap();
    assert!(!renew(&*store, &old, LONG).await);
    store.release_lease(&old).await.unwrap();
    assert_eq!(store.acquire_lease("l", a, LONG).await.unwrap(), None);
    assert!(renew(&*store, &new, LONG).await);
    // A later epoch of the same node is fenced too.
    store.release_lease(&new).await.unwrap();
    let own = store.acquire_lease("l", a, LONG).await.unwrap().unwrap();
    assert!(own.epoch > old.epoch);
    assert!(!renew(&*store, &old, LONG).await);
    let unknown = Lease { name: "unknown".into(), owner: a, epoch: 1 };
    assert!(!renew(&*store, &unknown, LONG).await);
    store.release_lease(&unknown).await.unwrap();
}

/// Checks that all leases are listed by name, with owner, epoch and end.
pub async fn leases_are_listed(database: Database) {
    let store = database.open().await;
    assert!(store.leases().await.unwrap().is_empty());
    let owner = Uuid::new_v4();
    let before = Utc::now();
    let b = store.acquire_lease("b", owner, LONG).await.unwrap().unwrap();
    let a = store.acquire_lease("a", owner, LONG).await.unwrap().unwrap();
    store.release_lease(&b).await.unwrap();
    let found = database.open().await.leases().await.unwrap();
    assert_eq!(found.iter().map(|info| &info.lease).collect::<Vec<_>>(), [&a, &b]);
    // Half of the time is slack for a store with another clock.
    assert!(found[0].expires_at > before + LONG / 2 && found[0].expires_at < Utc::now() + LONG * 2);
    assert!(found[1].expires_at <= Utc::now(), "a released lease is free");
    assert_eq!(found.iter().map(|info| info.live).collect::<Vec<_>>(), [true, false]);
    store.acquire_lease("b", owner, SHORT).await.unwrap().unwrap();
    until_expired().await;
    assert!(!store.leases().await.unwrap()[1].live, "the lease has expired");
}

/// Checks that one of many concurrent callers gets the lease.
pub async fn one_of_many_rivals_gets_a_lease(database: Database) {
    let stores = [database.open().await, database.open().await];
    for epoch in 1..=5 {
        let rivals: Vec<_> = (0..8)
            .map(|rival: usize| {
                let store = stores[rival % 2].clone();
                tokio::spawn(async move { store.acquire_lease("l", Uuid::new_v4(), LONG).await.unwrap() })
            })
            .collect();
        let mut winners = Vec::new();
        for rival in rivals {
            winners.extend(rival.await.unwrap());
        }
        assert_eq!(winners.len(), 1);
        assert_eq!(winners[0].epoch, epoch);
        stores[0].release_lease(&winners[0]).await.unwrap();
    }
}
