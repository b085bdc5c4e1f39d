//! Memory that outlives the runtime that folds into it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use storied::projection::{ApplyError, InMemory, InMemoryIndex, ProjectionState, TargetUnavailable};
use storied::runtime::{Builder, StartError};
use storied::{
    AnyEvent, EventStore, MemoryStore, Projection, ProjectionOptions, RecordedEvent, Runtime,
    SnapshotRevision,
};

use crate::projection::fixtures::*;

type Numbers = Vec<u64>;

fn number(event: &RecordedEvent) -> Result<u64, ApplyError> {
    let (Thing::Even { n } | Thing::Odd { n }) = event.decode()? else { return Err("no number".into()) };
    Ok(n)
}

fn numbers() -> InMemoryIndex<Numbers> {
    InMemoryIndex::new("numbers", |numbers: &mut Numbers, _: AnyEvent, event| {
        numbers.push(number(event)?);
        Ok(())
    })
}

/// A user's own projection that shares its memory with readers.
#[derive(Clone, Default)]
struct Shared(Arc<RwLock<Numbers>>);

impl Projection for Shared {
    const NAME: &'static str = "shared";
    type Event = AnyEvent;
    type Transaction = ();

    async fn apply(&mut self, _: AnyEvent, event: &RecordedEvent, _: &mut ()) -> Result<(), ApplyError> {
        self.0.write().unwrap().push(number(event)?);
        Ok(())
    }

    async fn reset(&mut self, _: &mut ()) -> Result<(), ApplyError> {
        self.0.write().unwrap().clear();
        Ok(())
    }
}

/// A projection that cannot be emptied.
struct Endless(Arc<Mutex<Numbers>>);

impl Projection for Endless {
    const NAME: &'static str = "endless";
    type Event = AnyEvent;
    type Transaction = ();

    async fn apply(&mut self, _: AnyEvent, event: &RecordedEvent, _: &mut ()) -> Result<(), ApplyError> {
        self.0.lock().unwrap().push(number(event)?);
        Ok(())
    }
}

/// A projection whose `reset` fails: for a moment, or by its own fault.
struct FailingReset {
    transient: bool,
    attempts: Arc<AtomicU64>,
}

impl Projection for FailingReset {
    const NAME: &'static str = "failing";
    type Event = AnyEvent;
    type Transaction = ();

    async fn apply(&mut self, _: AnyEvent, _: &RecordedEvent, _: &mut ()) -> Result<(), ApplyError> {
        Ok(())
    }

    async fn reset(&mut self, _: &mut ()) -> Result<(), ApplyError> {
        match (self.attempts.fetch_add(1, Ordering::SeqCst), self.transient) {
            (0, true) => Err(TargetUnavailable::new("not now").into()),
            (_, true) => Ok(()),
            (_, false) => Err("it is broken".into()),
        }
    }
}

fn on(store: &Arc<dyn EventStore>) -> Builder {
    Runtime::builder().store(store.clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_runtime_begins_with_empty_memory() {
    for every in [None, Some(1), Some(1_000)] {
        for (kind, store, _dir) in stores().await {
            let index = match every {
                None => numbers(),
                Some(events) => numbers().snapshot_every(events, SnapshotRevision(1)),
            };
            let shared = Shared::default();
            let model = || match every {
                None => InMemory::new(),
                Some(events) => InMemory::new().snapshot_every(events, SnapshotRevision(1), shared.0.clone()),
            };
            for run in 1..=4_u64 {
                append(&store, 0, [run]).await;
                let builder = on(&store).in_memory_index(&index).projection(shared.clone(), model());
                let runtime = builder.start().await.unwrap();
                let expected: Numbers = (1..=run).collect();
                index.ready(PATIENCE).await.unwrap();
                assert_eq!(index.read(Numbers::clone), expected, "{kind}, {every:?}");
                runtime.projection("shared").unwrap().wait_until_caught_up(PATIENCE).await.unwrap();
                assert_eq!(*shared.0.read().unwrap(), expected, "{kind}, {every:?}");
                match run {
                    // Torn down in the background.
                    2 => drop(runtime),
                    _ => runtime.shutdown().await.unwrap(),
                }
            }
            // The saved snapshot is correct, too.
            let other = match every {
                None => numbers(),
                Some(events) => numbers().snapshot_every(events, SnapshotRevision(1)),
            };
            let runtime = on(&store).in_memory_index(&other).start().await.unwrap();
            other.ready(PATIENCE).await.unwrap();
            assert_eq!(other.read(Numbers::clone), [1, 2, 3, 4], "{kind}, {every:?}");
            runtime.shutdown().await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_runtime_at_a_time_folds_into_a_memory() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, [1]).await;
    let (index, shared) = (numbers(), Shared::default());
    let in_use = |error: StartError, name: &str| {
        assert!(matches!(&error, StartError::StateInUse { name: found } if found == name), "{error}");
    };
    let first = on(&store).in_memory_index(&index).start().await.unwrap();
    in_use(on(&store).in_memory_index(&index).start().await.unwrap_err(), "numbers");
    // Also over another log, and as a clone.
    in_use(
        Runtime::builder()
            .store(MemoryStore::new())
            .in_memory_index(&index.clone())
            .start()
            .await
            .unwrap_err(),
        "numbers",
    );
    append(&store, 0, [2]).await;
    index.ready(PATIENCE).await.unwrap();
    assert_eq!(index.read(Numbers::clone), [1, 2]);
    first.shutdown().await.unwrap();
    let kept = || InMemory::new().snapshot_every(1_000, SnapshotRevision(1), shared.0.clone());
    let second = on(&store).in_memory_index(&index).projection(shared.clone(), kept()).start().await.unwrap();
    in_use(on(&store).projection(shared.clone(), kept()).start().await.unwrap_err(), "shared");
    second.projection("shared").unwrap().wait_until_caught_up(PATIENCE).await.unwrap();
    assert_eq!(*shared.0.read().unwrap(), [1, 2]);
    second.shutdown().await.unwrap();
    // A failed start holds no claim.
    let invalid = ProjectionOptions::new().max_attempts(0);
    let builder =
        on(&store).in_memory_index(&index).projection_with(Shared::default(), InMemory::new(), invalid);
    builder.start().await.unwrap_err();
    on(&store).in_memory_index(&index).start().await.unwrap().shutdown().await.unwrap();
}

#[tokio::test]
async fn memory_that_cannot_be_emptied_is_not_folded_into() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, [1]).await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let runtime = on(&store).projection(Endless(seen.clone()), InMemory::new()).start().await.unwrap();
    let handle = runtime.projection("endless").unwrap();
    reach(handle, ProjectionState::Failed).await;
    let error = handle.wait_until_caught_up(PATIENCE).await.unwrap_err().to_string();
    assert!(error.contains("endless") && error.contains("Projection::reset"), "{error}");
    assert_eq!(*seen.lock().unwrap(), Numbers::new());
    runtime.shutdown().await.unwrap();
}

/// The event store is not the subject of such an error, and a retry does not help.
#[tokio::test]
async fn a_failing_reset_of_memory_is_the_projections_own_error() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, [1]).await;
    let start = async |transient| {
        let projection = FailingReset { transient, attempts: Arc::default() };
        on(&store).projection(projection, InMemory::new()).start().await.unwrap()
    };
    let runtime = start(false).await;
    let handle = runtime.projection("failing").unwrap();
    reach(handle, ProjectionState::Failed).await;
    let error = handle.status().last_error.unwrap();
    assert!(error.contains("it is broken") && !error.contains("unavailable"), "{error}");
    runtime.shutdown().await.unwrap();

    let runtime = start(true).await;
    runtime.projection("failing").unwrap().wait_until_caught_up(PATIENCE).await.unwrap();
    runtime.shutdown().await.unwrap();
}

/// An `apply` that blocks its thread outlives its runtime: the next run waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_apply_of_the_previous_runtime_folds_nothing_into_the_next() {
    for (kind, store, _dir) in stores().await {
        append(&store, 0, 0..4).await;
        let seen = Seen::default();
        let start = async || {
            let blocks = hook(|_| {
                std::thread::sleep(Duration::from_millis(100));
                Ok(())
            });
            let recorder = recorder::<()>("slow").hook(blocks).into(&seen);
            on(&store).projection(recorder, InMemory::new()).start().await.unwrap()
        };
        let expected = [1, 2, 3, 4].map(storied::Position::new);
        for dropped in [true, false, true] {
            let runtime = start().await;
            tokio::time::sleep(Duration::from_millis(150)).await;
            match dropped {
                true => drop(runtime),
                false => drop(runtime.shutdown_within(Duration::from_millis(10)).await.unwrap_err()),
            }
            let runtime = start().await;
            runtime.projection("slow").unwrap().wait_until_caught_up(PATIENCE).await.unwrap();
            assert_eq!(seen.positions(), expected, "{kind}, dropped: {dropped}");
            runtime.shutdown().await.unwrap();
            assert_eq!(seen.positions(), expected, "{kind}, dropped: {dropped}");
        }
    }
}
