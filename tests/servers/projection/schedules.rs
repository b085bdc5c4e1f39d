//! Schedules: when projections apply waiting events.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use storied::projection::{InMemory, ProjectionState, Schedule};
use storied::{EventStore, Filter, Position};
use tokio::time::Instant;

use crate::projection::fixtures::*;

/// Time at which each event was applied.
#[derive(Clone, Default)]
struct Times(Arc<Mutex<Vec<Instant>>>);

impl Times {
    fn hook(&self) -> Hook {
        let times = self.clone();
        hook(move |_| {
            times.0.lock().unwrap().push(Instant::now());
            Ok(())
        })
    }

    /// Number of groups of events that were applied with less than `gap` in between.
    fn runs(&self, gap: Duration) -> usize {
        let times = self.0.lock().unwrap();
        times.windows(2).filter(|pair| pair[1] - pair[0] >= gap).count() + usize::from(!times.is_empty())
    }
}

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// The purpose of the cap: a steady stream of events without a quiet period.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_debounce_is_capped_under_steady_traffic() {
    for (kind, store, _dir) in stores().await {
        let times = Times::default();
        let node = local_node(&store).await;
        let options = options().schedule(Schedule::Debounced { quiet: millis(200), cap: millis(500) });
        let projection = recorder("debounced").hook(times.hook());
        let handle = node.projection(projection, InMemory::new(), options).await;
        reach(&handle, ProjectionState::Following).await;
        let (mut appended, began) = (Vec::new(), Instant::now());
        while began.elapsed() < millis(3_000) {
            appended.push(Instant::now());
            append(&store, 0, [1]).await;
            tokio::time::sleep(millis(50)).await;
        }
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        let applied = times.0.lock().unwrap().clone();
        assert_eq!(applied.len(), appended.len(), "{kind}");
        let waited =
            appended.iter().zip(&applied).map(|(appended, applied)| *applied - *appended).max().unwrap();
        // The rest is for a machine that is busy with other tests.
        assert!(waited < millis(2_000), "{kind}: {waited:?}");
        let runs = times.runs(millis(30));
        assert!(runs >= 3 && runs < appended.len() / 3, "{kind}: {runs} runs for {} events", appended.len());

        // A quiet period is respected.
        times.0.lock().unwrap().clear();
        let began = Instant::now();
        for _ in 0..5 {
            append(&store, 0, [1]).await;
        }
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        assert!(began.elapsed() >= millis(200), "{kind}");
        assert_eq!(times.runs(millis(100)), 1, "{kind}");
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_period_is_kept_and_a_full_batch_is_applied_at_once() {
    for (kind, store, _dir) in stores().await {
        let times = Times::default();
        let node = local_node(&store).await;
        let options = options().schedule(Schedule::Every(millis(400))).batch_size(100);
        let projection = recorder("periodic").hook(times.hook());
        let handle = node.projection(projection, InMemory::new(), options).await;
        reach(&handle, ProjectionState::Following).await;
        let began = Instant::now();
        while began.elapsed() < millis(2_000) {
            append(&store, 0, [1]).await;
            tokio::time::sleep(millis(20)).await;
        }
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        let runs = times.runs(millis(100));
        assert!((2..=8).contains(&runs), "{kind}: {runs}");
        let began = Instant::now();
        append(&store, 0, 0..100).await;
        catch_up(&handle, store.high_water_mark().await.unwrap()).await;
        println!("{kind}: a full batch after {:?}", began.elapsed());
        node.stop(PATIENCE).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trigger_applies_the_log_and_the_projection_waits_again() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let options = options().schedule(Schedule::Manual);
        let (one, two) = (local_node(&store).await, local_node(&store).await);
        let first = one.projection(table("table"), database.open().await, options.clone()).await;
        reach(&first, ProjectionState::Waiting).await;
        let second = two.projection(table("table"), database.open().await, options).await;
        reach(&second, ProjectionState::Standby).await;
        let head = append(&store, 0, 0..20).await;
        assert!(first.caught_up_to_within(head, millis(300)).await.is_err(), "{kind}");
        assert!(database.seen("table").await.is_empty(), "{kind}");
        // From a node that does not own it.
        second.trigger().await.unwrap();
        catch_up(&second, head).await;
        reach(&first, ProjectionState::Waiting).await;
        append(&store, 0, 0..20).await;
        assert_eq!(first.status().position, head, "{kind}");
        second.reset().await.unwrap();
        reach(&first, ProjectionState::Waiting).await;
        eventually("it is empty", || first.status().position == Position::START).await;
        assert!(second.caught_up_to_within(head, millis(300)).await.is_err(), "{kind}");
        assert!(database.seen("table").await.is_empty(), "{kind}");
        first.trigger().await.unwrap();
        let head = store.high_water_mark().await.unwrap();
        catch_up(&first, head).await;
        assert_eq!(database.seen("table").await, log(&store, &Filter::all()).await, "{kind}");
        one.stop(PATIENCE).await.unwrap();
        two.stop(PATIENCE).await.unwrap();
    }
}

/// An event that was acknowledged just before may be hidden by an append that is still in flight.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trigger_covers_the_log_at_the_time_the_owner_notices() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let options = options().schedule(Schedule::Manual);
        let link = Link::new(&store);
        let linked: Arc<dyn EventStore> = Arc::new(link.clone());
        let (one, two) = (local_node(&store).await, local_node(&linked).await);
        let first = one.projection(table("table"), database.open().await, options.clone()).await;
        reach(&first, ProjectionState::Waiting).await;
        let second = two.projection(table("table"), database.open().await, options).await;
        reach(&second, ProjectionState::Standby).await;
        let head = append(&store, 0, 0..20).await;
        link.unstable.store(10, Ordering::SeqCst);
        second.trigger().await.unwrap();
        catch_up(&first, head).await;
        reach(&first, ProjectionState::Waiting).await;
        assert_eq!(database.seen("table").await, log(&store, &Filter::all()).await, "{kind}");
        one.stop(PATIENCE).await.unwrap();
        two.stop(PATIENCE).await.unwrap();
    }
}

/// A trigger affects every node, now and after its next start.
///
/// A reset affects one node, which then waits for the next trigger.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trigger_reaches_every_in_memory_node() {
    for (kind, store, _dir) in stores().await {
        let start = async || {
            let node = local_node(&store).await;
            let recorder = recorder("recorded");
            let seen = recorder.seen.clone();
            let options = options().schedule(Schedule::Manual);
            let handle = node.projection(recorder, InMemory::new(), options).await;
            (node, handle, seen)
        };
        let ((one, first, ours), (two, second, theirs)) = (start().await, start().await);
        let head = append(&store, 0, 0..10).await;
        reach(&first, ProjectionState::Waiting).await;
        assert!(ours.positions().is_empty(), "{kind}");
        second.trigger().await.unwrap();
        for handle in [&first, &second] {
            catch_up(handle, head).await;
        }
        append(&store, 0, 0..10).await;
        one.stop(PATIENCE).await.unwrap();
        let (one, first, ours) = start().await;
        catch_up(&first, head).await;
        second.reset().await.unwrap();
        for handle in [&first, &second] {
            reach(handle, ProjectionState::Waiting).await;
        }
        tokio::time::sleep(millis(500)).await;
        assert_eq!(theirs.positions(), [], "{kind}");
        assert_eq!(ours.positions().len(), 10, "{kind}: no farther than it was triggered to");
        first.trigger().await.unwrap();
        let head = store.high_water_mark().await.unwrap();
        for (handle, seen) in [(&first, &ours), (&second, &theirs)] {
            catch_up(handle, head).await;
            assert_eq!(seen.positions(), log(&store, &Filter::all()).await, "{kind}");
        }
        one.stop(PATIENCE).await.unwrap();
        two.stop(PATIENCE).await.unwrap();
    }
}

/// From a node that does not own it, and after a restart of both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conditional_trigger_fires_if_a_matching_event_waits() {
    for (kind, store, _dir) in stores().await {
        let database = Database::new().await;
        let options = options().schedule(Schedule::Manual);
        for round in 1..=2 {
            let (one, two) = (local_node(&store).await, local_node(&store).await);
            let first = one.projection(table("table"), database.open().await, options.clone()).await;
            reach(&first, ProjectionState::Waiting).await;
            let second = two.projection(table("table"), database.open().await, options.clone()).await;
            reach(&second, ProjectionState::Standby).await;
            let before = database.seen("table").await.len();
            append(&store, 0, [1, 3, 5]).await;
            assert!(!second.trigger_if(evens()).await.unwrap(), "{kind}: no even one waits");
            assert_eq!(database.seen("table").await.len(), before, "{kind}");
            let head = append(&store, 0, [2]).await;
            assert!(second.trigger_if(evens()).await.unwrap(), "{kind}");
            catch_up(&second, head).await;
            // The events in between as well.
            assert_eq!(database.seen("table").await.len(), 4 * round, "{kind}");
            assert!(!second.trigger_if(evens()).await.unwrap(), "{kind}: it is applied");
            one.stop(PATIENCE).await.unwrap();
            two.stop(PATIENCE).await.unwrap();
        }
    }
}
