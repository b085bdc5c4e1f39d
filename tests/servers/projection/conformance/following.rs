//! Catch-up from the store, and live operation.

use std::time::Duration;

use storied::Filter;
use storied::projection::{InMemory, ProjectionState};

use super::place::Place;
use super::{Bus, Scene};
use crate::projection::fixtures::*;

pub async fn catches_up_and_follows<P: Place>(scene: Scene<P>) {
    scene.append(0, 0..700).await;
    let writers = Writers::start(&scene.store, 3, 30, 4);
    let node = scene.node().await;
    let memory = recorder("memory").filter(evens());
    let seen = memory.seen.clone();
    let handles = [
        scene.start(&node, scene.writes("all"), scene.options().batch_size(7)).await,
        scene.start(&node, scene.writes("evens").filter(evens()), scene.options()).await,
        node.projection(memory, InMemory::new(), options()).await,
    ];
    writers.done().await;
    let head = scene.head().await;
    for handle in &handles {
        catch_up(handle, head).await;
        reach(handle, ProjectionState::Following).await;
        eventually("it is live", || handle.status().lag() == Some(0)).await;
        assert_eq!(handle.status().lag_time(), Some(Duration::ZERO));
    }
    scene.assert_exact("all", &Filter::all()).await;
    scene.assert_exact("evens", &evens()).await;
    let log = log(&scene.store, &evens()).await;
    assert_eq!(seen.positions(), log);
    assert_eq!(handles[1].status().events_applied, log.len() as u64);
    node.stop(PATIENCE).await.unwrap();
}

/// Between catch-up and live, repeatedly, while events are appended all the time.
pub async fn is_handed_over_under_load<P: Place>(scene: Scene<P>) {
    let writers = Writers::start(&scene.store, 3, 120, 5);
    for _ in 0..5 {
        let node = scene.node().await;
        let options = scene.options().batch_size(5);
        let handle = scene.start(&node, scene.writes("handover"), options).await;
        reach(&handle, ProjectionState::Following).await;
        let now = scene.head().await;
        catch_up(&handle, now).await;
        node.stop(PATIENCE).await.unwrap();
    }
    let node = scene.node().await;
    let handle = scene.start(&node, scene.writes("handover"), scene.options()).await;
    writers.done().await;
    catch_up(&handle, scene.head().await).await;
    scene.assert_exact("handover", &Filter::all()).await;
    node.stop(PATIENCE).await.unwrap();
}

pub async fn reaches_the_head_for_a_filter_without_matches<P: Place>(scene: Scene<P>) {
    scene.append(0, 0..1_200).await;
    let node = scene.node().await;
    let never = Filter::variants::<Thing>(["never"]);
    let handle = scene.start(&node, scene.writes("never").filter(never), scene.options()).await;
    for n in 0..10 {
        let position = scene.append(0, [n]).await;
        catch_up(&handle, position).await;
    }
    let head = scene.head().await;
    assert_eq!((handle.status().position, handle.status().events_applied), (head, 0));
    node.stop(PATIENCE).await.unwrap();
    // The checkpoint was saved, and nothing is read again.
    let node = scene.node().await;
    let never = Filter::variants::<Thing>(["never"]);
    let handle = scene.start(&node, scene.writes("never").filter(never), scene.options()).await;
    let mut status = handle.watch();
    let begun = status.wait_for(|status| status.epoch > 0).await.unwrap().clone();
    assert_eq!(begun.position, head);
    node.stop(PATIENCE).await.unwrap();
    assert!(scene.place.seen("never").await.is_empty());
}

pub async fn resumes_from_its_checkpoint<P: Place>(scene: Scene<P>) {
    let node = scene.node().await;
    let handle = scene.start(&node, scene.writes("goes on"), scene.options()).await;
    catch_up(&handle, scene.append(0, 0..30).await).await;
    node.stop(PATIENCE).await.unwrap();
    let head = scene.append(0, 0..10).await;
    let node = scene.node().await;
    let handle = scene.start(&node, scene.writes("goes on"), scene.options()).await;
    catch_up(&handle, head).await;
    assert_eq!(handle.status().events_applied, 10);
    scene.assert_exact("goes on", &Filter::all()).await;
    node.stop(PATIENCE).await.unwrap();

    // The same after a kill.
    let node = scene.node().await;
    let handle = scene.start(&node, scene.writes("goes on"), short_lived()).await;
    catch_up(&handle, scene.append(0, 0..10).await).await;
    node.kill();
    let head = scene.append(0, 0..10).await;
    let node = scene.node().await;
    let handle = scene.start(&node, scene.writes("goes on"), scene.options()).await;
    catch_up(&handle, head).await;
    scene.assert_exact("goes on", &Filter::all()).await;
    node.stop(PATIENCE).await.unwrap();
}

/// Events arrive without a bus, and through it once it is back.
pub async fn survives_a_bus_outage<P: Place>(scene: Scene<P>) {
    let Some(server) = &*scene.server else { return };
    let mut server = server.lock().await;
    let node = scene.node().await;
    let handle = scene.start(&node, scene.writes("gone"), scene.options()).await;
    catch_up(&handle, scene.append(0, 0..20).await).await;
    for _ in 0..2 {
        server.kill();
        for n in 0..10 {
            // The store is polled.
            catch_up(&handle, scene.append(0, [n]).await).await;
        }
        server.restart().await;
        let head = scene.append(0, 0..50).await;
        catch_up(&handle, head).await;
        if scene.bus != Bus::Core {
            eventually("the log stream continues", || {
                node.publisher().published.is_some_and(|upto| upto >= head)
            })
            .await;
        }
    }
    reach(&handle, ProjectionState::Following).await;
    scene.assert_exact("gone", &Filter::all()).await;
    node.stop(PATIENCE).await.unwrap();
}
