//! Operator actions, from any node.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use storied::projection::{ControlError, FailurePolicy, InMemory, ProjectionState, Schedule};
use storied::testing::Node;
use storied::{Filter, Position, ProjectionHandle};

use super::Scene;
use super::place::Place;
use crate::projection::fixtures::*;

pub async fn applies_nothing_while_paused<P: Place>(scene: Scene<P>) {
    let (one, two) = (scene.node().await, scene.node().await);
    let first = scene.start(&one, scene.writes("paused"), scene.options()).await;
    let before = scene.append(0, 0..5).await;
    catch_up(&first, before).await;
    let second = scene.start(&two, scene.writes("paused"), scene.options()).await;
    // From the node that does not own it.
    second.pause().await.unwrap();
    for handle in [&first, &second] {
        reach(handle, ProjectionState::Paused).await;
    }
    scene.append(0, 0..5).await;
    one.stop(PATIENCE).await.unwrap();
    two.stop(PATIENCE).await.unwrap();

    let node = scene.node().await;
    let handle = scene.start(&node, scene.writes("paused"), scene.options()).await;
    reach(&handle, ProjectionState::Paused).await;
    let other = node.projection(recorder("other"), InMemory::new(), options()).await;
    let head = scene.append(0, 0..5).await;
    // The other projection has received the events: so would this one, unless paused.
    catch_up(&other, head).await;
    assert_eq!(handle.status().position, before);
    assert_eq!(scene.place.seen("paused").await.len(), 5);
    handle.resume().await.unwrap();
    catch_up(&handle, head).await;
    scene.assert_exact("paused", &Filter::all()).await;
    node.stop(PATIENCE).await.unwrap();
}

pub async fn replays_after_a_reset<P: Place>(scene: Scene<P>) {
    scene.append(0, 1..=10).await;
    let third = log(&scene.store, &Filter::all()).await[2];
    let broken = Arc::new(AtomicBool::new(true));
    let (one, two) = (scene.node().await, scene.node().await);
    let park = scene.options().on_failure(FailurePolicy::Park).max_attempts(1);
    let writes = || scene.writes("reset").hook(poison(third.get(), &broken));
    let first = scene.start(&one, writes(), park.clone()).await;
    let head = scene.head().await;
    catch_up(&first, head).await;
    assert_eq!(first.parked(10).await.unwrap().len(), 1);
    let second = scene.start(&two, writes(), park).await;
    reach(&second, ProjectionState::Standby).await;
    broken.store(false, Ordering::SeqCst);
    second.reset().await.unwrap();
    let head = scene.append(0, 1..=10).await;
    catch_up(&second, head).await;
    assert!(second.parked(10).await.unwrap().is_empty());
    let mut seen = scene.place.seen("reset").await;
    if !P::TOGETHER {
        // The owner may deliver some more events before it is notified, and again afterwards.
        seen.sort_unstable();
    }
    assert_eq!(seen, log(&scene.store, &Filter::all()).await);

    // A paused projection stays paused, and is empty.
    first.pause().await.unwrap();
    first.reset().await.unwrap();
    assert_eq!(first.status().position, Position::START);
    assert!(scene.place.seen("reset").await.is_empty());
    reach(&first, ProjectionState::Paused).await;
    first.resume().await.unwrap();
    catch_up(&first, head).await;
    scene.assert_exact("reset", &Filter::all()).await;
    one.stop(PATIENCE).await.unwrap();
    two.stop(PATIENCE).await.unwrap();
}

/// If the cut-over can be one transaction; otherwise the rebuild is refused with advice.
pub async fn is_rebuilt_beside_the_live_one<P: Place>(scene: Scene<P>) {
    for n in 0..10 {
        scene.append(n, 0..20).await;
    }
    let (one, two) = (scene.node().await, scene.node().await);
    let free = hook(|_| Ok(()));
    let first = scene.start_made(&one, "rebuilt", None, free.clone(), scene.options()).await;
    catch_up(&first, scene.head().await).await;
    let second = scene.start_made(&two, "rebuilt", None, free, scene.options()).await;
    if P::TOGETHER {
        let writers = Writers::start(&scene.store, 2, 30, 5);
        second.rebuild().await.unwrap();
        for handle in [&first, &second] {
            eventually("it is live", || handle.status().version == 1 && handle.rebuilding().is_none()).await;
        }
        writers.done().await;
        catch_up(&first, scene.head().await).await;
        scene.assert_exact("rebuilt@1", &Filter::all()).await;
    } else {
        let refused = second.rebuild().await.unwrap_err();
        assert!(matches!(refused, ControlError::NotRebuildable { .. }), "{refused}");
        assert!(refused.to_string().contains("reset"), "{refused}");
        scene.assert_exact("rebuilt", &Filter::all()).await;
    }
    one.stop(PATIENCE).await.unwrap();
    two.stop(PATIENCE).await.unwrap();
}

/// Also while another node is in the middle of the rebuild.
pub async fn a_rebuild_can_be_cancelled<P: Place>(scene: Scene<P>) {
    for n in 0..10 {
        scene.append(n, 0..20).await;
    }
    let (one, two) = (scene.node().await, scene.node().await);
    let free = hook(|_| Ok(()));
    let first = scene.start_made(&one, "cancelled", None, free.clone(), scene.options()).await;
    catch_up(&first, scene.head().await).await;
    let second = scene.start_made(&two, "cancelled", None, free, scene.options()).await;
    if !P::TOGETHER {
        let refused = second.cancel_rebuild().await.unwrap_err();
        assert!(matches!(refused, ControlError::NotRebuildable { .. }), "{refused}");
    } else {
        // There is nothing to cancel.
        second.cancel_rebuild().await.unwrap();
        let writers = Writers::start(&scene.store, 2, 30, 5);
        for _ in 0..5 {
            first.rebuild().await.unwrap();
            second.cancel_rebuild().await.unwrap();
            // Either the cut-over came first, which the nodes may not know yet, or nothing is left
            // of the rebuild.
            let give_up = tokio::time::Instant::now() + PATIENCE;
            loop {
                let version = first.status().version.max(second.status().version) + 1;
                let left = scene.place.seen(&format!("cancelled@{version}")).await;
                if left.is_empty() {
                    break;
                }
                assert!(tokio::time::Instant::now() < give_up, "{version}: {left:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        writers.done().await;
        second.rebuild().await.unwrap();
        for handle in [&first, &second] {
            eventually("it is live", || handle.status().version > 0 && handle.rebuilding().is_none()).await;
        }
        catch_up(&second, scene.head().await).await;
        let table = format!("cancelled@{}", second.status().version);
        assert_eq!(scene.place.seen(&table).await, log(&scene.store, &Filter::all()).await);
    }
    one.stop(PATIENCE).await.unwrap();
    two.stop(PATIENCE).await.unwrap();
}

pub async fn applies_up_to_the_trigger_target<P: Place>(scene: Scene<P>) {
    triggered(scene, "triggered", None).await;
}

pub async fn applies_up_to_the_trigger_target_in_partitions<P: Place>(scene: Scene<P>) {
    triggered(scene, "triggers", Some(3)).await;
}

/// Manual triggers, with dead owners and control calls in between.
async fn triggered<P: Place>(scene: Scene<P>, name: &'static str, partitions: Option<u16>) {
    let slow: Hook = Arc::new(|_| {
        Box::pin(async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            Ok(())
        })
    });
    let options = scene.options().schedule(Schedule::Manual).batch_size(1).lease(Duration::from_secs(1));
    let start = async || -> (Node, ProjectionHandle) {
        let node = scene.node().await;
        let handle = scene.start_made(&node, name, partitions, slow.clone(), options.clone()).await;
        (node, handle)
    };
    let append = async || {
        let mut last = Position::START;
        for n in 0..20 {
            last = scene.append(n, [n]).await;
        }
        last
    };
    let seen = async || scene.place.seen(name).await.len();
    // No other node owns it any more, and this one is idle.
    let waits = async |handle: &ProjectionHandle| {
        reach(handle, ProjectionState::Waiting).await;
        let sole = |handle: &ProjectionHandle| {
            handle.status().partitions.iter().all(|part| part.status.state == ProjectionState::Waiting)
        };
        eventually("it waits as a whole", || sole(handle)).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
    };
    let begins = async |before: usize| {
        let give_up = tokio::time::Instant::now() + PATIENCE;
        while seen().await <= before {
            assert!(tokio::time::Instant::now() < give_up, "{name} does not begin");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };

    let (one, first) = start().await;
    let head = append().await;
    waits(&first).await;
    assert_eq!(seen().await, 0);
    let (two, second) = start().await;
    second.trigger().await.unwrap();
    begins(0).await;
    // All owners re-read their position.
    second.pause().await.unwrap();
    second.resume().await.unwrap();
    catch_up(&second, head).await;
    assert_eq!(seen().await, 20);

    // After a takeover, the new owner knows that the target is reached, …
    let head = append().await;
    one.stop(PATIENCE).await.unwrap();
    waits(&second).await;
    assert_eq!(seen().await, 20);
    let (three, third) = start().await;
    third.trigger().await.unwrap();
    begins(20).await;
    // … or that it is not.
    two.kill();
    catch_up(&third, head).await;
    assert_eq!(seen().await, 40);

    // After a reset, it starts again at the next trigger, and not before.
    third.reset().await.unwrap();
    three.stop(PATIENCE).await.unwrap();
    let (four, fourth) = start().await;
    waits(&fourth).await;
    assert_eq!(seen().await, 0);
    fourth.trigger().await.unwrap();
    catch_up(&fourth, head).await;
    assert_eq!(seen().await, 40);
    if P::TOGETHER {
        fourth.rebuild().await.unwrap();
        eventually("it is live", || fourth.status().version == 1 && fourth.rebuilding().is_none()).await;
        let head = append().await;
        waits(&fourth).await;
        let rebuilt = format!("{name}@1");
        assert_eq!(scene.place.seen(&rebuilt).await.len(), 40);
        fourth.trigger().await.unwrap();
        catch_up(&fourth, head).await;
        scene.assert_partitions_exact(&rebuilt, partitions.unwrap_or(1)).await;
    } else {
        scene.assert_partitions_exact(name, partitions.unwrap_or(1)).await;
    }
    four.stop(PATIENCE).await.unwrap();
}
