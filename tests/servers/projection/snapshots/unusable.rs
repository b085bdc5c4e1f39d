//! Unusable snapshots: the log is applied from its start, and the next snapshot replaces them.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use storied::Version;
use storied::projection::ControlError;
use storied::store::Snapshot;

use super::*;

/// Starts `trial` over a log of 100 events and an unusable snapshot.
///
/// It must apply all events, and leave a snapshot that the next start uses.
async fn assert_built_anew(store: &str, trial: &Trial, link: &Link) {
    let all = log(&(Arc::new(link.clone()) as _), &trial.filter).await.len() as u64;
    let running = trial.start(link).await;
    running.assert_exact(link).await;
    assert_eq!(running.seen(), all, "{store}: it has started from something else");
    running.stop().await;
    let running = trial.start(link).await;
    running.assert_exact(link).await;
    assert_eq!(running.seen(), 0, "{store}: there is no snapshot");
    running.stop().await;
}

/// A log of 100 events, and a snapshot at its end.
async fn with_snapshot(link: &Link, trial: &Trial) -> (StreamId, Snapshot) {
    more(link, 1, 0..100).await;
    let running = trial.start(link).await;
    running.assert_exact(link).await;
    running.stop().await;
    kept(link).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_of_another_revision_or_filter_is_ignored() {
    for (store, link, _dir) in links().await {
        let trial = Trial::every(NEVER);
        with_snapshot(&link, &trial).await;
        let raised = Trial { revision: 2, ..trial.clone() };
        assert_built_anew(store, &raised, &link).await;
        // As after a deployment that was rolled back.
        assert_built_anew(store, &trial, &link).await;
        let filtered = Trial { filter: evens(), ..trial };
        assert_built_anew(store, &filtered, &link).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_undecodable_snapshot_is_ignored() {
    for (store, link, _dir) in links().await {
        let trial = Trial::every(NEVER);
        let (stream, whole) = with_snapshot(&link, &trial).await;
        let cut_off = whole.state.slice(..whole.state.len() - 1);
        for state in [Bytes::from_static(b"\xff\x00"), cut_off, Bytes::from_static(b"\xa0")] {
            link.save_snapshot(&stream, Snapshot { state, ..whole.clone() }).await.unwrap();
            assert_built_anew(store, &trial, &link).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_beyond_the_log_is_ignored() {
    for (store, link, _dir) in links().await {
        let trial = Trial::every(NEVER);
        let (stream, whole) = with_snapshot(&link, &trial).await;
        let beyond = Snapshot { version: Version::new(whole.version.get() + 50), ..whole };
        link.save_snapshot(&stream, beyond.clone()).await.unwrap();
        assert_built_anew(store, &trial, &link).await;

        // It is ignored also after the log has reached that position.
        link.save_snapshot(&stream, beyond).await.unwrap();
        let running = trial.caught_up(&link).await;
        more(&link, 2, 0..100).await;
        running.assert_exact(&link).await;
        running.node.kill();
        assert_built_anew(store, &trial, &link).await;
    }
}

/// A state that refuses to load.
struct Refuses(Shared, bool);

impl SnapshotState for Refuses {
    fn save(&self) -> Result<Vec<u8>, ApplyError> {
        self.0.save()
    }

    fn load(&self, _: &[u8]) -> Result<(), ApplyError> {
        assert!(!self.1, "on purpose");
        Err("it does not look right".into())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_user_code_rejects_is_ignored() {
    for (store, link, _dir) in links().await {
        let trial = Trial::every(NEVER);
        with_snapshot(&link, &trial).await;
        for panics in [false, true] {
            let state = Shared::default();
            let running = trial.start_with(&link, state.clone(), Arc::new(Refuses(state, panics))).await;
            running.assert_exact(&link).await;
            assert_eq!(running.seen(), 100, "{store}");
            running.stop().await;
        }
        trial.assert_kept(&link, store).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_from_before_a_reset_is_ignored() {
    for (store, link, _dir) in links().await {
        let trial = Trial::every(NEVER);
        with_snapshot(&link, &trial).await;
        let running = trial.caught_up(&link).await;
        running.handle.reset().await.unwrap();
        running.assert_exact(&link).await;
        assert_eq!(running.seen(), 100, "{store}");
        running.node.kill();
        assert_built_anew(store, &trial, &link).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_reset_costs_only_the_snapshot() {
    for (store, link, _dir) in links().await {
        let trial = Trial { firm: true, ..Trial::every(NEVER) };
        with_snapshot(&link, &trial).await;
        let running = trial.caught_up(&link).await;
        let refused = running.handle.reset().await.unwrap_err();
        assert!(matches!(refused, ControlError::Refused { .. }), "{store}: {refused}");
        assert!(kept(&link).await.unwrap().1.state.is_empty(), "{store}");
        running.assert_exact(&link).await;
        running.stop().await;
        let running = trial.caught_up(&link).await;
        assert_eq!(running.seen(), 0, "{store}: it is taken again");
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_in_flight_during_a_reset_is_ignored() {
    for (store, link, _dir) in links().await {
        let trial = Trial::every(100);
        link.shelf.stuck.store(true, Ordering::SeqCst);
        more(&link, 1, 0..100).await;
        let running = trial.caught_up(&link).await;
        eventually("it is on its way", || link.shelf.asked.load(Ordering::SeqCst) == 1).await;
        // So that no other snapshot is taken.
        running.handle.pause().await.unwrap();
        let handle = running.handle.clone();
        let reset = tokio::spawn(async move { handle.reset().await });
        // Time for a faulty implementation to fail.
        tokio::time::sleep(Duration::from_millis(50)).await;
        link.shelf.stuck.store(false, Ordering::SeqCst);
        reset.await.unwrap().unwrap();
        eventually("both have come", || link.shelf.saved.lock().unwrap().len() == 2).await;
        let (_, snapshot) = kept(&link).await.unwrap();
        assert!(snapshot.state.is_empty(), "{store}: {snapshot:?}");
        running.handle.resume().await.unwrap();
        running.assert_exact(&link).await;
        running.stop().await;
        assert_true(&link, &trial.filter).await;
    }
}
