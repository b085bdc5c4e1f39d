//! Idle tasks use no CPU time. Each test runs on one thread and measures its CPU time.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use storied::projection::{AtLeastOnce, PerTarget, ProjectionState, Schedule};
use storied::{EventStore, MemoryStore};

use crate::projection::fixtures::*;

/// Returns the CPU time of this thread.
fn run_for() -> Duration {
    let schedstat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(schedstat.split(' ').next().unwrap().parse().unwrap())
}

/// A busy loop uses more than this in a second, on any machine.
async fn assert_quiet(what: &str) {
    let before = run_for();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let took = run_for() - before;
    println!("{what}: {took:?} in a second");
    assert!(took < Duration::from_millis(60), "{what}: {took:?}");
}

/// A node regains the ownership after another node has applied its held-back events.
#[tokio::test]
async fn held_back_events_are_dropped_with_the_ownership() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let link = Link::new(&store);
    let linked: Arc<dyn EventStore> = Arc::new(link.clone());
    let (one, two) = (local_node(&linked).await, local_node(&store).await);
    let held = Schedule::Debounced { quiet: Duration::from_secs(3), cap: Duration::from_secs(60) };
    let first = one.projection(recorder("held"), AtLeastOnce::new(), short_lived().schedule(held)).await;
    reach(&first, ProjectionState::Following).await;
    let second = two.projection(recorder("held"), AtLeastOnce::new(), short_lived()).await;
    reach(&second, ProjectionState::Standby).await;
    let head = append(&store, 0, [1]).await;
    let appended = tokio::time::Instant::now();
    eventually("it holds the event back", || first.status().lag() > Some(0)).await;
    link.mute.store(true, Ordering::SeqCst);
    reach(&second, ProjectionState::Following).await;
    catch_up(&second, head).await;
    link.mute.store(false, Ordering::SeqCst);
    two.stop(PATIENCE).await.unwrap();
    reach(&first, ProjectionState::Following).await;
    // The wait of the held-back events is over.
    tokio::time::sleep_until(appended + Duration::from_millis(3_500)).await;
    assert_quiet("an owner with nothing to do").await;
    one.stop(PATIENCE).await.unwrap();
}

#[tokio::test]
async fn a_group_whose_read_model_does_not_fit_waits() {
    let store: Arc<dyn EventStore> = Arc::new(MemoryStore::new());
    let node = local_node(&store).await;
    let four = node
        .projection(PerTarget::new(|_| recorder("cut")), AtLeastOnce::new(), options().partitions(4))
        .await;
    catch_up(&four, append(&store, 0, [1]).await).await;
    node.stop(PATIENCE).await.unwrap();
    let node = local_node(&store).await;
    let two = node
        .projection(PerTarget::new(|_| recorder("cut")), AtLeastOnce::new(), options().partitions(2))
        .await;
    reach(&two, ProjectionState::Failed).await;
    assert_quiet("two partitions of four").await;
    node.kill();
}
