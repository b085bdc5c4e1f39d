//! Who owns what, until when.

use std::time::Duration;

use chrono::Utc;
use uuid::Uuid;

use super::Database;
use crate::store::Lease;

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(100);

/// Longer than [`SHORT`].
async fn until_expired() {
    tokio::time::sleep(SHORT * 2).await;
}

/// One that the store's clock says is live is taken over by exactly what was seen of it, and its old owner is fenced.
pub async fn a_lease_is_taken_over_as_it_was_seen(database: Database) {
    let store = database.open().await;
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    let day = Duration::from_secs(24 * 60 * 60);
    let old = store.acquire_lease("l", a, day).await.unwrap().unwrap();
    let seen = store.leases().await.unwrap().remove(0);
    assert_eq!((seen.ttl, &seen.lease), (day, &old));
    assert!(store.renew_lease(&old, LONG).await.unwrap());
    assert_eq!(store.take_over_lease(&seen, b, LONG).await.unwrap(), None, "it was renewed since");
    let seen = store.leases().await.unwrap().remove(0);
    assert_eq!(seen.ttl, LONG);
    let new = store.take_over_lease(&seen, b, LONG).await.unwrap().unwrap();
    assert_eq!(new, Lease { name: "l".into(), owner: b, epoch: 2 });
    assert_eq!(store.take_over_lease(&seen, a, LONG).await.unwrap(), None, "one of two that try at once");
    assert!(!store.renew_lease(&old, LONG).await.unwrap());
    assert!(store.renew_lease(&new, LONG).await.unwrap());
    let missing = crate::store::LeaseInfo { lease: Lease { name: "m".into(), ..old }, ..seen };
    assert_eq!(store.take_over_lease(&missing, b, LONG).await.unwrap(), None);
}

/// The first gets it, others do not; taking one's own again changes nothing.
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

/// After its time anybody may take it, in a higher epoch; its owner may too, in the same one, if nobody else did.
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

/// Given back, it is free without waiting; and no longer one's own.
pub async fn a_released_lease_is_free_at_once(database: Database) {
    let store = database.open().await;
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    let lease = store.acquire_lease("l", a, LONG).await.unwrap().unwrap();
    store.release_lease(&lease).await.unwrap();
    assert!(!store.renew_lease(&lease, LONG).await.unwrap());
    let lease = store.acquire_lease("l", b, LONG).await.unwrap().unwrap();
    assert_eq!((lease.owner, lease.epoch), (b, 2));
    store.release_lease(&lease).await.unwrap();
    store.release_lease(&lease).await.unwrap();
    assert_eq!(store.acquire_lease("l", a, LONG).await.unwrap().unwrap().epoch, 3);
}

/// A renewed lease lasts longer; one that ran out may still be renewed while nobody else wanted it.
pub async fn a_lease_is_renewed(database: Database) {
    let store = database.open().await;
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    let lease = store.acquire_lease("l", a, SHORT).await.unwrap().unwrap();
    assert!(store.renew_lease(&lease, LONG).await.unwrap());
    until_expired().await;
    assert_eq!(store.acquire_lease("l", b, LONG).await.unwrap(), None);
    assert!(store.renew_lease(&lease, SHORT).await.unwrap());
    until_expired().await;
    assert!(store.renew_lease(&lease, LONG).await.unwrap());
    assert_eq!(store.acquire_lease("l", b, LONG).await.unwrap(), None);
}

/// Each lease of a call is renewed or refused by itself, whatever became of the others.
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
    let again = store.acquire_lease("again", a, LONG).await.unwrap().unwrap();
    leases.push(Lease { name: "unknown".into(), owner: a, epoch: 1 });
    leases.push(again.clone());
    let before = Utc::now();
    let renewed = store.renew_leases(&leases, LONG).await.unwrap();
    assert_eq!(renewed, [false, true, false, false, true, false, true]);
    let found = database.open().await.leases().await.unwrap();
    let of = |name: &str| found.iter().find(|info| info.lease.name == name).unwrap();
    assert_eq!((&of("taken").lease, &of("again").lease), (&taken, &again));
    for name in ["idle", "kept", "again"] {
        assert!(of(name).live && of(name).ttl == LONG && of(name).expires_at > before + LONG / 2, "{name}");
        assert_eq!(store.acquire_lease(name, b, LONG).await.unwrap(), None);
    }
    assert!(!of("released").live);
    assert_eq!(store.acquire_lease("released", b, LONG).await.unwrap().unwrap().epoch, 2);
}

/// Who lost a lease without knowing can do nothing with it.
pub async fn zombies_cannot_renew_or_release(database: Database) {
    let store = database.open().await;
    let (a, b) = (Uuid::new_v4(), Uuid::new_v4());
    let old = store.acquire_lease("l", a, SHORT).await.unwrap().unwrap();
    until_expired().await;
    let new = store.acquire_lease("l", b, LONG).await.unwrap().unwrap();
    assert!(!store.renew_lease(&old, LONG).await.unwrap());
    store.release_lease(&old).await.unwrap();
    assert_eq!(store.acquire_lease("l", a, LONG).await.unwrap(), None);
    assert!(store.renew_lease(&new, LONG).await.unwrap());
    // Nor with a later epoch of one's own in mind.
    store.release_lease(&new).await.unwrap();
    let own = store.acquire_lease("l", a, LONG).await.unwrap().unwrap();
    assert!(own.epoch > old.epoch);
    assert!(!store.renew_lease(&old, LONG).await.unwrap());
    let unknown = Lease { name: "unknown".into(), owner: a, epoch: 1 };
    assert!(!store.renew_lease(&unknown, LONG).await.unwrap());
    store.release_lease(&unknown).await.unwrap();
}

/// All of them, by name, with owner, epoch and end.
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
    // Half of its time is slack for a store whose clock is not this machine's.
    assert!(found[0].expires_at > before + LONG / 2 && found[0].expires_at < Utc::now() + LONG * 2);
    assert!(found[1].expires_at <= Utc::now(), "given back is free");
    assert_eq!(found.iter().map(|info| info.live).collect::<Vec<_>>(), [true, false]);
    store.acquire_lease("b", owner, SHORT).await.unwrap().unwrap();
    until_expired().await;
    assert!(!store.leases().await.unwrap()[1].live, "it ran out");
}

/// Of many who want it at the same time, one gets it.
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
