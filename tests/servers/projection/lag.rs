//! The lag is `None` until it is known.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use storied::projection::{InMemoryIndex, PerTarget, ProjectionState, ProjectionStatus, Schedule, WaitError};
use storied::store::ControlChange;
use storied::{AnyEvent, EventStore, MemoryStore, Position, ProjectionHandle, Runtime};
use tokio::sync::watch;

use crate::projection::fixtures::*;

/// Checks every status from the start: none may report a lag of 0 while there are unapplied events.
async fn never_says_live(
    what: &str,
    handle: &ProjectionHandle,
    head: Position,
    mut until: impl FnMut(&ProjectionStatus) -> bool,
) {
    let mut looks = 0;
    let give_up = tokio::time::Instant::now() + PATIENCE;
    loop {
        for _ in 0..100 {
            let status = handle.status();
            looks += 1;
            for one in status.partitions.iter().map(|part| &part.status).chain([&status]) {
                match one.lag() {
                    None => assert_eq!(one.lag_time(), None, "{what}"),
                    Some(lag) => {
                        let least = head.get() - one.position.get();
                        assert!(lag >= least, "{what}: {lag} of {least} at look {looks}");
                        assert_eq!(one.head, Some(head), "{what}");
                        assert_eq!(
                            one.lag_time().is_some_and(|time| time > Duration::ZERO),
                            lag > 0,
                            "{what}"
                        );
                    }
                }
            }
            if until(&status) {
                return;
            }
        }
        assert!(tokio::time::Instant::now() < give_up, "never: {what}: {:?}", handle.status());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_lag_is_reported_before_checkpoint_and_log_are_read() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let mut head = Position::START;
        for stream in 0..40 {
            head = append(&store, stream, 0..10).await;
        }
        let some = |lag: u64| move |status: &ProjectionStatus| status.lag() == Some(lag);
        let all = head.get();
        let node = local_node(&store).await;
        // Events that cannot be applied yet.
        let gate = Gate::closed();
        let handle =
            node.projection(table("gated").hook(gate.hook()), database.open().await, options()).await;
        never_says_live(&format!("{kind}, at work"), &handle, head, some(all)).await;
        gate.open();
        never_says_live(&format!("{kind}, done"), &handle, head, some(0)).await;
        // A schedule that applies nothing without a trigger.
        let manual = options().schedule(Schedule::Manual);
        let handle = node.projection(table("manual"), database.open().await, manual.clone()).await;
        never_says_live(&format!("{kind}, manual"), &handle, head, some(all)).await;
        handle.wait_until_caught_up(Duration::from_millis(100)).await.unwrap_err();
        handle.trigger().await.unwrap();
        never_says_live(&format!("{kind}, triggered"), &handle, head, some(0)).await;
        // Paused before the first run.
        store.control("paused", ControlChange::Pause).await.unwrap();
        let handle = node.projection(table("paused"), database.open().await, options()).await;
        let paused =
            |status: &ProjectionStatus| status.state == ProjectionState::Paused && status.lag() == Some(all);
        never_says_live(&format!("{kind}, paused"), &handle, head, paused).await;
        // An event that cannot be applied.
        let broken = poison(5, &Arc::new(AtomicBool::new(true)));
        let handle = node.projection(table("failing").hook(broken), database.open().await, options()).await;
        let failed = |status: &ProjectionStatus| {
            status.state == ProjectionState::Failed && status.lag() == Some(all - 4)
        };
        never_says_live(&format!("{kind}, failed"), &handle, head, failed).await;
        // On a node that does not own it. It comes before the partitions, whose open transactions
        // lock the database and keep a new node from preparing its tables.
        let second = local_node(&store).await;
        let looker = second.projection(table("manual"), database.open().await, manual).await;
        never_says_live(&format!("{kind}, standby"), &looker, head, some(0)).await;
        // In partitions.
        let (open, wait) = watch::channel(false);
        let pass: Hook = Arc::new(move |_| {
            let mut wait = wait.clone();
            Box::pin(async move {
                let _ = wait.wait_for(|open| *open).await;
                Ok(())
            })
        });
        let make = |pass: &Hook| {
            let pass = pass.clone();
            move |_| table("parts").hook(pass.clone())
        };
        let handle = node
            .projection(PerTarget::new(make(&pass)), database.open().await, options().partitions(4))
            .await;
        never_says_live(&format!("{kind}, parts"), &handle, head, some(all)).await;
        open.send_replace(true);
        never_says_live(&format!("{kind}, parts done"), &handle, head, some(0)).await;
        second.stop(PATIENCE).await.unwrap();
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test]
async fn an_empty_log_is_distinguished_from_an_unread_log() {
    let link = Link::new(&(Arc::new(MemoryStore::new()) as Arc<dyn EventStore>));
    let store: Arc<dyn EventStore> = Arc::new(link.clone());
    let node = local_node(&store).await;
    link.down.store(true, Ordering::SeqCst);
    let handle = node.projection(recorder("memory"), storied::projection::InMemory::new(), options()).await;
    reach(&handle, ProjectionState::Retrying).await;
    let status = handle.status();
    assert_eq!((status.head, status.lag(), status.lag_time()), (None, None, None));
    link.down.store(false, Ordering::SeqCst);
    eventually("it was read", || handle.status().lag() == Some(0)).await;
    assert_eq!(handle.status().head, Some(Position::START));
    node.stop(PATIENCE).await.unwrap();
}

/// Readiness of a whole service: all of 20,000 events are in the index.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_is_ready_when_it_contains_the_log() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    for stream in 0..20 {
        append(&store, stream, 0..1_000).await;
    }
    let count = InMemoryIndex::new("count", |count: &mut u64, _: AnyEvent, _| {
        *count += 1;
        Ok(())
    });
    let runtime = Runtime::builder().store(store).in_memory_index(&count).start().await.unwrap();
    let status = runtime.projection("count").unwrap().status();
    assert!(status.lag() != Some(0) || count.read(|count| *count) == 20_000, "{status:?}");
    count.ready(PATIENCE).await.unwrap();
    assert_eq!(count.read(|count| *count), 20_000);
    assert_eq!(runtime.projection("count").unwrap().status().lag(), Some(0));
    runtime.shutdown().await.unwrap();
}

/// The read model may belong to another event store: only its checkpoint shows that.
#[tokio::test]
async fn a_projection_on_an_empty_log_is_not_live_before_its_checkpoint_is_read() {
    let database = Database::new().await;
    let ours: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    append(&ours, 0, 0..1).await;
    let node = local_node(&ours).await;
    let handle = node.projection(table("table"), database.open().await, options()).await;
    handle.wait_until_caught_up(PATIENCE).await.unwrap();
    node.stop(PATIENCE).await.unwrap();

    let empty: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let node = local_node(&empty).await;
    let handle = node.projection(table("table"), database.open().await, options()).await;
    let error = handle.wait_until_caught_up(PATIENCE).await.unwrap_err();
    assert!(matches!(error, WaitError::Failed { .. }), "{error}");
    // Later, too, and on a node that stands by or takes over.
    let second = local_node(&empty).await;
    let other = second.projection(table("table"), database.open().await, options()).await;
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        for handle in [&handle, &other] {
            handle.wait_until_caught_up(Duration::from_millis(50)).await.unwrap_err();
        }
        // It stays refused after an attempt.
        handle.resume().await.unwrap();
    }
    second.stop(PATIENCE).await.unwrap();
    let handle = node.projection(table("new"), database.open().await, options()).await;
    handle.wait_until_caught_up(PATIENCE).await.unwrap();
    eventually("the lag is known", || handle.status().lag() == Some(0)).await;
    node.stop(PATIENCE).await.unwrap();
}

/// A checkpoint that a standby reads, and that is refused only when its owner claims it.
#[tokio::test]
async fn a_refused_checkpoint_is_no_position() {
    let database = Database::new().await;
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let head = append(&store, 0, 0..5).await;
    let node = local_node(&store).await;
    let handle = node.projection(table("table"), database.open().await, options()).await;
    catch_up(&handle, head).await;
    // As of a log that lost events. The owner loses a race, stands by, and claims it.
    sqlx::query(
        "UPDATE storied_checkpoints SET position = 1000, generation = generation + 1 WHERE position > 0",
    )
    .execute(database.open().await.pool())
    .await
    .unwrap();
    append(&store, 0, 5..6).await;
    reach(&handle, ProjectionState::Failed).await;
    for _ in 0..8 {
        let error = handle.wait_until_caught_up(PATIENCE).await.unwrap_err();
        assert!(matches!(error, WaitError::Failed { .. }), "{error}");
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    node.stop(PATIENCE).await.unwrap();
}
