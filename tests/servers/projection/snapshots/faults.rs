//! Stores that refuse snapshots, events that cannot be applied, tasks that panic.

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use storied::SnapshotRevision;
use storied::projection::{FailurePolicy, ProjectionState};

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_save_stops_nothing_and_is_retried_later() {
    for (store, link, _dir) in links().await {
        let trial = Trial { options: options().batch_size(10), ..Trial::every(100) };
        link.shelf.full.store(true, Ordering::SeqCst);
        more(&link, 1, 0..199).await;
        let running = trial.caught_up(&link).await;
        eventually("it is tried", || link.shelf.asked.load(Ordering::SeqCst) >= 1).await;
        let head = more(&link, 1, 0..1).await;
        catch_up(&running.handle, head).await;
        assert_eq!(running.handle.status().state, ProjectionState::Following, "{store}");
        assert_eq!(running.handle.status().last_error, None, "{store}");
        link.shelf.full.store(false, Ordering::SeqCst);
        running.stop().await;

        trial.assert_kept(&link, store).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_snapshot_is_saved_at_the_stop() {
    for (store, link, _dir) in links().await {
        let trial = Trial::every(100);
        link.shelf.full.store(true, Ordering::SeqCst);
        more(&link, 1, 0..100).await;
        let running = trial.caught_up(&link).await;
        eventually("it is tried", || link.shelf.asked.load(Ordering::SeqCst) == 1).await;
        link.shelf.full.store(false, Ordering::SeqCst);
        running.stop().await;
        trial.assert_kept(&link, store).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applying_does_not_wait_for_a_snapshot_write() {
    for (store, link, _dir) in links().await {
        let trial = Trial { options: options().batch_size(5), ..Trial::every(1) };
        link.shelf.stuck.store(true, Ordering::SeqCst);
        more(&link, 1, 0..500).await;
        let running = trial.caught_up(&link).await;
        assert_eq!(link.shelf.asked.load(Ordering::SeqCst), 1, "{store}: one at a time");
        link.shelf.stuck.store(false, Ordering::SeqCst);
        running.stop().await;
        trial.assert_kept(&link, store).await;
        assert_true(&link, &trial.filter).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unavailable_store_at_the_start_is_waited_for() {
    for (store, link, _dir) in links().await {
        let trial = Trial::every(NEVER);
        more(&link, 1, 0..100).await;
        let running = trial.caught_up(&link).await;
        running.stop().await;
        link.down.store(true, Ordering::SeqCst);
        let running = trial.start(&link).await;
        reach(&running.handle, ProjectionState::Retrying).await;
        link.down.store(false, Ordering::SeqCst);
        running.assert_exact(&link).await;
        assert_eq!(running.seen(), 0, "{store}: a snapshot is not given up for that");
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parked_events_stay_parked() {
    for (store, link, _dir) in links().await {
        let broken = Arc::new(AtomicBool::new(true));
        let last = more(&link, 1, 1..=100).await;
        let positions = log(&(Arc::new(link.clone()) as _), &Filter::all()).await;
        let (one, two) = (positions[20], positions[60]);
        let (first, second) = (poison(one.get(), &broken), poison(two.get(), &broken));
        let both: Hook = Arc::new(move |event| {
            let (first, second) = (first(event), second(event));
            Box::pin(async {
                first.await?;
                second.await
            })
        });
        let park = options().on_failure(FailurePolicy::Park).max_attempts(1);
        let trial = Trial { hook: both, options: park, ..Trial::every(NEVER) };
        let running = trial.start(&link).await;
        catch_up(&running.handle, last).await;
        let parked = running.handle.parked(10).await.unwrap();
        assert_eq!(parked.iter().map(|event| event.position).collect::<Vec<_>>(), [one, two], "{store}");
        running.stop().await;

        let running = trial.start(&link).await;
        catch_up(&running.handle, last).await;
        let again = running.handle.parked(10).await.unwrap();
        assert_eq!(again.len(), 2, "{store}");
        assert!(again.iter().zip(&parked).all(|(again, before)| {
            (&again.error, again.event_id, again.version) == (&before.error, before.event_id, before.version)
        }));
        assert_eq!(running.seen(), 0, "{store}");
        // One event is applied in the end, the other never.
        broken.store(false, Ordering::SeqCst);
        running.handle.retry_parked(one).await.unwrap();
        let state = running.state();
        running.stop().await;
        let running = trial.start(&link).await;
        catch_up(&running.handle, last).await;
        assert_eq!(running.state(), state, "{store}");
        running.handle.discard_parked(two).await.unwrap();
        running.stop().await;

        let running = trial.start(&link).await;
        catch_up(&running.handle, last).await;
        assert!(running.handle.parked(10).await.unwrap().is_empty(), "{store}");
        assert_eq!((running.state(), running.seen()), (state, 0), "{store}");
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retried_event_is_in_the_next_snapshot() {
    for (store, link, _dir) in links().await {
        let broken = Arc::new(AtomicBool::new(true));
        let last = more(&link, 1, 1..=10).await;
        let one = log(&(Arc::new(link.clone()) as _), &Filter::all()).await[4];
        let park = options().on_failure(FailurePolicy::Park).max_attempts(1);
        let trial = Trial { hook: poison(one.get(), &broken), options: park, ..Trial::every(1) };
        let running = trial.start(&link).await;
        catch_up(&running.handle, last).await;
        running.stop().await;
        let saved = link.shelf.saved.lock().unwrap().len();

        let running = trial.start(&link).await;
        catch_up(&running.handle, last).await;
        broken.store(false, Ordering::SeqCst);
        running.handle.retry_parked(one).await.unwrap();
        eventually("it is kept", || link.shelf.saved.lock().unwrap().len() > saved).await;
        let state = running.state();
        running.node.kill();
        let running = trial.start(&link).await;
        catch_up(&running.handle, last).await;
        assert!(running.handle.parked(10).await.unwrap().is_empty(), "{store}");
        assert_eq!((running.state(), running.seen()), (state, 0), "{store}");
        running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_projection_resumes_there_after_a_restart() {
    for (store, link, _dir) in links().await {
        let broken = Arc::new(AtomicBool::new(true));
        more(&link, 1, 1..=100).await;
        let stuck = log(&(Arc::new(link.clone()) as _), &Filter::all()).await[60];
        let trial = Trial {
            hook: poison(stuck.get(), &broken),
            options: options().max_attempts(2),
            ..Trial::every(NEVER)
        };
        let running = trial.start(&link).await;
        reach(&running.handle, ProjectionState::Failed).await;
        running.stop().await;
        let running = trial.start(&link).await;
        reach(&running.handle, ProjectionState::Failed).await;
        assert_eq!(running.seen(), 2, "{store}");
        broken.store(false, Ordering::SeqCst);
        running.handle.resume().await.unwrap();
        running.assert_exact(&link).await;
        running.stop().await;
        assert_true(&link, &trial.filter).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panicked_task_continues_with_its_state_not_the_snapshot() {
    for (store, link, _dir) in links().await {
        let trial = Trial::every(NEVER);
        more(&link, 1, 0..100).await;
        let running = trial.caught_up(&link).await;
        running.stop().await;

        let (state, seen) = (Shared::default(), Arc::new(AtomicU64::new(0)));
        let sums = Sums {
            filter: Filter::all(),
            hook: hook(|_| Ok(())),
            firm: false,
            resets: 0,
            state: state.clone(),
            seen: seen.clone(),
        };
        let panics = Arc::new(AtomicU64::new(0));
        let inner = InMemory::new().snapshot_every(NEVER, SnapshotRevision(1), state.clone());
        let node = local_node(&(Arc::new(link.clone()) as _)).await;
        let handle = node.projection(sums, Panicky { inner, panics: panics.clone() }, options()).await;
        let head = more(&link, 1, 0..50).await;
        catch_up(&handle, head).await;
        panics.store(1, Ordering::SeqCst);
        let head = more(&link, 1, 0..50).await;
        catch_up(&handle, head).await;
        assert_eq!(panics.load(Ordering::SeqCst), 0, "{store}");
        assert_eq!(seen.load(Ordering::SeqCst), 100, "{store}");
        let expected = fold(&link, &Filter::all(), None).await;
        assert_eq!(*state.read().unwrap(), expected, "{store}");
        node.stop(PATIENCE).await.unwrap();
        trial.assert_kept(&link, store).await;
    }
}

/// A state that cannot be saved.
struct Unsaved(Shared, Mutex<u64>);

impl SnapshotState for Unsaved {
    fn save(&self) -> Result<Vec<u8>, ApplyError> {
        let mut times = self.1.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *times += 1;
        assert!(!(*times).is_multiple_of(2), "on purpose");
        Err("not now".into())
    }

    fn load(&self, snapshot: &[u8]) -> Result<(), ApplyError> {
        self.0.load(snapshot)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_encoding_error_or_panic_stops_nothing() {
    let (_, link, _) = links().await.remove(0);
    let trial = Trial { options: options().batch_size(10), ..Trial::every(10) };
    more(&link, 1, 0..200).await;
    let state = Shared::default();
    let unsaved = Arc::new(Unsaved(state.clone(), Mutex::new(0)));
    let running = trial.start_with(&link, state, unsaved.clone()).await;
    running.assert_exact(&link).await;
    assert_eq!(running.handle.status().last_error, None);
    running.stop().await;
    let times = *unsaved.1.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    assert!((10..=21).contains(&times), "{times}");
    assert_eq!(link.shelf.asked.load(Ordering::SeqCst), 0);
}
