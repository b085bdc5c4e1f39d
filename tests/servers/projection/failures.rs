//! Poison events, unavailable stores, and read models that do not fit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use storied::projection::{
    AtLeastOnce, ControlError, FailurePolicy, InMemory, ProjectionState, UnknownNames, WaitError,
};
use storied::store::{Checkpoint, CheckpointKey};
use storied::{EventName, EventStore, Filter, MemoryStore, Metadata, NewEvent, Position, ReadLog};
use tokio::time::Instant;

use crate::projection::fixtures::*;

fn positions(numbers: impl IntoIterator<Item = u64>) -> Vec<Position> {
    numbers.into_iter().map(Position::new).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stops_before_a_poison_event_and_reports_it() {
    for (kind, store, _dir) in stores().await {
        append(&store, 0, 1..=10).await;
        let database = Database::new().await;
        let broken = Arc::new(AtomicBool::new(true));
        let node = local_node(&store).await;
        let memory = recorder("memory").hook(poison(6, &broken));
        let seen = memory.seen.clone();
        let handles = [
            node.projection(memory, InMemory::new(), options()).await,
            node.projection(table("table").hook(poison(6, &broken)), database.open().await, options()).await,
        ];
        let sibling = node.projection(table("sibling"), database.open().await, options()).await;
        for handle in &handles {
            let error = handle.caught_up_to_within(Position::new(10), PATIENCE).await.unwrap_err();
            assert!(matches!(&error, WaitError::Failed { error, .. } if error.contains("poison")), "{error}");
            let status = handle.status();
            assert_eq!(
                (status.state, status.position),
                (ProjectionState::Failed, Position::new(5)),
                "{kind}"
            );
            // The events before it are applied.
            handle.caught_up_to(Position::new(5)).await.unwrap();
        }
        catch_up(&sibling, Position::new(10)).await;
        assert_eq!(seen.positions(), positions(1..=5), "{kind}");
        assert_eq!(database.seen("table").await, positions(1..=5), "{kind}");

        broken.store(false, Ordering::SeqCst);
        for handle in &handles {
            handle.resume().await.unwrap();
            catch_up(handle, Position::new(10)).await;
        }
        assert_eq!(seen.positions(), positions(1..=10), "{kind}");
        assert_eq!(database.seen("table").await, positions(1..=10), "{kind}");
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parks_poison_events_retries_and_discards_them() {
    for (kind, store, _dir) in stores().await {
        append(&store, 0, 1..=10).await;
        let database = Database::new().await;
        let broken = Arc::new(AtomicBool::new(true));
        let both = {
            let broken = broken.clone();
            hook(move |event| match event.position.get() {
                3 | 7 if broken.load(Ordering::SeqCst) => Err("poison".into()),
                _ => Ok(()),
            })
        };
        let options = options().on_failure(FailurePolicy::Park).max_attempts(2);
        let node = local_node(&store).await;
        let (memory, delivered) =
            (recorder("memory").hook(both.clone()), recorder("delivered").hook(both.clone()));
        let seen = [memory.seen.clone(), delivered.seen.clone()];
        let handles = [
            node.projection(memory, InMemory::new(), options.clone()).await,
            node.projection(delivered, AtLeastOnce::new(), options.clone()).await,
            node.projection(table("table").hook(both), database.open().await, options).await,
        ];
        let rest = positions([1, 2, 4, 5, 6, 8, 9, 10]);
        for handle in &handles {
            catch_up(handle, Position::new(10)).await;
            let parked = handle.parked(10).await.unwrap();
            assert_eq!(parked.iter().map(|event| event.position.get()).collect::<Vec<_>>(), [3, 7], "{kind}");
            assert_eq!((parked[0].attempts, parked[0].error.as_str()), (2, "poison"));
            assert_eq!(handle.parked(1).await.unwrap().len(), 1);
            assert_eq!(handle.status().events_parked, 2);

            let refused = handle.retry_parked(Position::new(3)).await.unwrap_err();
            assert!(matches!(refused, ControlError::Refused { .. }), "{refused}");
            let unknown = handle.retry_parked(Position::new(4)).await.unwrap_err();
            assert!(matches!(unknown, ControlError::NotParked { .. }), "{unknown}");
            assert_eq!(handle.parked(10).await.unwrap().len(), 2, "still parked");
        }
        assert_eq!(database.seen("table").await, rest, "{kind}");
        for seen in &seen {
            assert_eq!(seen.positions(), rest, "{kind}");
        }
        broken.store(false, Ordering::SeqCst);
        for handle in &handles {
            handle.retry_parked(Position::new(3)).await.unwrap();
            handle.discard_parked(Position::new(7)).await.unwrap();
            assert!(handle.parked(10).await.unwrap().is_empty());
            let gone = handle.retry_parked(Position::new(3)).await.unwrap_err();
            assert!(matches!(gone, ControlError::NotParked { .. }), "{gone}");
            let gone = handle.discard_parked(Position::new(7)).await.unwrap_err();
            assert!(matches!(gone, ControlError::NotParked { .. }), "{gone}");
        }
        let mut with_retried = rest.clone();
        with_retried.push(Position::new(3));
        assert_eq!(database.seen("table").await, with_retried, "{kind}");
        for seen in &seen {
            assert_eq!(seen.positions(), with_retried, "{kind}");
        }
        node.stop(PATIENCE).await.unwrap();
    }
}

/// Every third event fails twice, by an error or a panic.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_succeeds_after_retries_is_applied_once() {
    for (kind, store, _dir) in stores().await {
        append(&store, 0, 1..=30).await;
        let flaky = || {
            let failures = AtomicU32::new(0);
            hook(move |event| {
                if event.position.get().is_multiple_of(3) && failures.fetch_add(1, Ordering::SeqCst) % 3 < 2 {
                    if event.position.get().is_multiple_of(2) {
                        panic!("on purpose");
                    }
                    return Err("flaky".into());
                }
                Ok(())
            })
        };
        let database = Database::new().await;
        let node = local_node(&store).await;
        let (memory, delivered) = (recorder("memory").hook(flaky()), recorder("delivered").hook(flaky()));
        let seen = [memory.seen.clone(), delivered.seen.clone()];
        let handles = [
            node.projection(memory, InMemory::new(), options()).await,
            node.projection(delivered, AtLeastOnce::new(), options()).await,
            node.projection(table("table").hook(flaky()), database.open().await, options()).await,
        ];
        for handle in &handles {
            catch_up(handle, Position::new(30)).await;
            assert_eq!(handle.status().events_applied, 30);
            assert!(handle.status().last_error.is_some());
        }
        assert_eq!(database.seen("table").await, positions(1..=30), "{kind}");
        for seen in &seen {
            assert_eq!(seen.positions(), positions(1..=30), "{kind}");
        }
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_undecodable_event_is_tried_once() {
    for (kind, store, _dir) in stores().await {
        append(&store, 0, [1]).await;
        append_raw(&store, 0, vec![garbage(&store)]).await;
        let other = NewEvent::encode(&Thing::Never, store.info().codec, &Metadata::default()).unwrap();
        let unknown = NewEvent { name: EventName::new("thing.unheard_of").unwrap(), ..other };
        append_raw(&store, 0, vec![unknown]).await;
        let head = append(&store, 0, [2]).await;
        let attempts = Arc::new(AtomicU32::new(0));
        let decoding = {
            let attempts = attempts.clone();
            hook(move |event| {
                attempts.fetch_add(1, Ordering::SeqCst);
                event.decode::<Thing>()?;
                Ok(())
            })
        };
        let node = local_node(&store).await;
        let options = options().on_failure(FailurePolicy::Park);
        let handle = node.projection(recorder("memory").hook(decoding), InMemory::new(), options).await;
        catch_up(&handle, head).await;
        let parked = handle.parked(10).await.unwrap();
        assert_eq!(parked.len(), 2, "{kind}");
        assert!(parked.iter().all(|event| event.attempts == 1), "{parked:?}");
        assert!(parked[1].error.contains("unheard_of"), "{}", parked[1].error);
        assert_eq!(attempts.load(Ordering::SeqCst), 4, "{kind}");
        node.stop(PATIENCE).await.unwrap();
    }
}

/// A decode error of another event that the projection read does not count for this event.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_is_not_skipped_for_the_name_of_another() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let known = NewEvent::encode(&Thing::Never, store.info().codec, &Metadata::default()).unwrap();
    let unknown = NewEvent { name: EventName::new("thing.unheard_of").unwrap(), ..known };
    append_raw(&store, 0, vec![unknown]).await;
    let head = append(&store, 0, [2]).await;
    let other = store.read_log(ReadLog::after(Position::START).limit(1)).await.unwrap().events.remove(0);
    let attempts = Arc::new(AtomicU32::new(0));
    let looking_up = {
        let attempts = attempts.clone();
        hook(move |event| {
            if event.position == other.position || attempts.fetch_add(1, Ordering::SeqCst) == 0 {
                other.decode::<Thing>()?;
            }
            Ok(())
        })
    };
    let node = local_node(&store).await;
    let recorder = recorder("looking").hook(looking_up);
    let seen = recorder.seen.clone();
    let options = options().unknown_names(UnknownNames::Skip);
    let handle = node.projection(recorder, InMemory::new(), options).await;
    catch_up(&handle, head).await;
    assert_eq!(seen.positions(), positions([2]));
    assert_eq!(attempts.load(Ordering::SeqCst), 2);
    node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unavailable_store_blames_no_event() {
    for (kind, store, _dir) in stores().await {
        append(&store, 0, 0..20).await;
        let link = Link::new(&store);
        link.down.store(true, Ordering::SeqCst);
        let database = Database::new().await;
        let cut: Arc<dyn EventStore> = Arc::new(link.clone());
        let node = local_node(&cut).await;
        let handle =
            node.projection(table("table"), database.open().await, short_lived().max_attempts(1)).await;
        // While there is nothing to apply, only the lease shows that the store is unavailable.
        for _ in 0..3 {
            reach(&handle, ProjectionState::Retrying).await;
            link.down.store(false, Ordering::SeqCst);
            catch_up(&handle, store.high_water_mark().await.unwrap()).await;
            link.down.store(true, Ordering::SeqCst);
            append(&store, 0, 0..5).await;
        }
        link.down.store(false, Ordering::SeqCst);
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        assert_eq!(database.seen("table").await, log(&store, &Filter::all()).await, "{kind}");
        assert_eq!(handle.status().events_parked, 0);
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unavailable_read_model_blames_no_event() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 0..20).await;
    let database = Database::new().await;
    // Another connection holds the write lock for longer than storied waits for it.
    let other = database.open().await;
    let lock = other.pool().begin_with("BEGIN IMMEDIATE").await.unwrap();
    let pool = sqlx::SqlitePool::connect_with(
        sqlx::sqlite::SqliteConnectOptions::new()
            .filename(database.path())
            .busy_timeout(Duration::from_millis(20)),
    )
    .await
    .unwrap();
    let node = local_node(&store).await;
    let model = storied::SqliteReadModel::new(pool);
    let handle = node.projection(table("table"), model, options().max_attempts(1)).await;
    reach(&handle, ProjectionState::Retrying).await;
    lock.rollback().await.unwrap();
    catch_up(&handle, Position::new(20)).await;
    assert_eq!(database.seen("table").await, log(&store, &Filter::all()).await);
    node.stop(PATIENCE).await.unwrap();
}

/// A typical application error.
#[derive(Debug, thiserror::Error)]
enum Wrapped {
    #[error("my read model: {0}")]
    Told(#[from] sqlx::Error),
    #[error("my index: {0}")]
    Away(#[source] storied::projection::TargetUnavailable),
    #[error(transparent)]
    HandedOn(sqlx::Error),
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_inside_a_user_error_blames_no_event() {
    for (kind, store, _dir) in stores().await {
        let head = append(&store, 0, 1..=10).await;
        let database = Database::new().await;
        // SQLITE_BUSY, as sqlx reports it.
        let lock = database.open().await.pool().begin_with("BEGIN IMMEDIATE").await.unwrap();
        let connect = sqlx::sqlite::SqliteConnectOptions::new().filename(database.path());
        let busy =
            sqlx::SqlitePool::connect_with(connect.busy_timeout(Duration::from_millis(1))).await.unwrap();
        let io = || sqlx::Error::Io(std::io::Error::other("disk away"));
        let away = || storied::projection::TargetUnavailable::new("index away");
        // Event 5 fails much more often than the maximum number of attempts, each time differently;
        // the earlier events do not fail.
        let failing = |sql: bool| {
            let (failures, busy) = (Arc::new(AtomicU32::new(0)), busy.clone());
            let failing: Hook = Arc::new(move |event| {
                let failures =
                    if event.position.get() == 5 { failures.fetch_add(1, Ordering::SeqCst) } else { 99 };
                let busy = busy.clone();
                Box::pin(async move {
                    match failures {
                        n if n > 11 => Ok(()),
                        n if n % 4 == 0 && sql => Err(Wrapped::Told(io()).into()),
                        n if n % 4 == 1 && sql => {
                            let error = busy.begin_with("BEGIN IMMEDIATE").await.unwrap_err();
                            Err(Wrapped::HandedOn(error).into())
                        }
                        n if n % 2 == 0 => Err(Wrapped::Away(away()).into()),
                        _ => Err(away().into()),
                    }
                })
            });
            failing
        };
        let models = Database::new().await;
        let node = local_node(&store).await;
        let (memory, delivered) =
            (recorder("memory").hook(failing(false)), recorder("delivered").hook(failing(false)));
        let seen = [memory.seen.clone(), delivered.seen.clone()];
        let options = options().max_attempts(1);
        let handles = [
            node.projection(memory, InMemory::new(), options.clone()).await,
            node.projection(delivered, AtLeastOnce::new(), options.clone()).await,
            node.projection(table("table").hook(failing(true)), models.open().await, options).await,
        ];
        for handle in &handles {
            catch_up(handle, head).await;
            assert!(handle.status().last_error.is_some());
            assert_eq!(handle.status().events_applied, 10);
        }
        let all = log(&store, &Filter::all()).await;
        assert_eq!(models.seen("table").await, all, "{kind}");
        for seen in &seen {
            assert_eq!(seen.positions(), all, "{kind}: earlier events are not applied again");
        }
        lock.rollback().await.unwrap();
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_model_of_another_or_a_younger_log_is_refused() {
    let database = Database::new().await;
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 0..20).await;
    let node = local_node(&store).await;
    let handle = node.projection(table("table"), database.open().await, options()).await;
    catch_up(&handle, Position::new(20)).await;
    node.stop(PATIENCE).await.unwrap();

    let other: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&other, 0, 0..30).await;
    let node = local_node(&other).await;
    let handle = node.projection(table("table"), database.open().await, options()).await;
    let error = handle.caught_up_to_within(Position::new(30), PATIENCE).await.unwrap_err();
    assert!(matches!(error, WaitError::Failed { .. }), "{error}");
    assert_eq!(database.seen("table").await.len(), 20);
    node.stop(PATIENCE).await.unwrap();

    // A checkpoint beyond the end of the log: the log was restored from a backup.
    let ahead = Checkpoint { position: Position::new(99), ..Checkpoint::default() };
    save(&other, CheckpointKey::new("delivered"), Checkpoint::default(), ahead).await.unwrap();
    let node = local_node(&other).await;
    let handle = node.projection(recorder("delivered"), AtLeastOnce::new(), options()).await;
    reach(&handle, ProjectionState::Failed).await;
    assert!(handle.status().last_error.unwrap().contains("position 99"));
    node.stop(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_apply_does_not_delay_the_shutdown() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&store, 0, 0..3).await;
    let gate = Gate::closed();
    let node = local_node(&store).await;
    let handle = node.projection(recorder("stuck").hook(gate.hook()), AtLeastOnce::new(), options()).await;
    gate.reached().await;
    let started = Instant::now();
    let error = node.stop(Duration::from_millis(100)).await.unwrap_err();
    assert!(error.name.contains("stuck"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(handle.status().state, ProjectionState::Stopped);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn panics_of_buses_and_read_models_cost_only_time() {
    for (kind, store, _dir) in stores().await {
        let node = node(&store, Lossy::new(Loss::Panics, 5)).await;
        let recorder = recorder("memory");
        let seen = recorder.seen.clone();
        let model = Panicky { inner: InMemory::new(), panics: Arc::new(AtomicU64::new(2)) };
        let panics = model.panics.clone();
        let handle = node.projection(recorder, model, options()).await;
        // Requested while the task waits for its restart, and answered by the next task.
        append(&store, 0, 1..=3).await;
        eventually("it panicked twice", || panics.load(Ordering::SeqCst) == 0).await;
        handle.pause().await.unwrap();
        handle.resume().await.unwrap();
        Writers::start(&store, 2, 20, 5).done().await;
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        assert_eq!(seen.positions(), log(&store, &Filter::all()).await, "{kind}");
        assert!(handle.status().last_error.is_some_and(|error| error.contains("on purpose")));
        node.stop(PATIENCE).await.unwrap();
    }
}
